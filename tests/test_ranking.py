"""The measures of a ranking: by hand, against scikit-learn, and against napkinXC where it is."""

import math
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from aftermax.lab.data.labelled import inverse_propensities
from aftermax.lab.data.ragged import Ragged
from aftermax.lab.ranking import (
    hits,
    measures,
    ndcg_at,
    precision_at,
    propensity_scored_at,
    recall_at,
    without,
)


@st.composite
def cases(draw, least=0):
    """Rankings of all labels or fewer, labels of each document, inverse propensities."""
    labels = draw(st.integers(1, 12))
    documents = draw(st.integers(1, 6))
    depth = draw(st.integers(1, labels))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    top = torch.stack([torch.randperm(labels, generator=random) for _ in range(documents)])
    rows = [
        sorted(draw(st.sets(st.integers(0, labels - 1), min_size=least))) for _ in range(documents)
    ]
    inverse = 1 + torch.rand(labels, generator=random, dtype=torch.float64) * 9
    return top[:, :depth], Ragged.of(rows), inverse


def naive(top, labels, inverse, k):
    """P, PSP, nDCG and recall at k, as the definitions read."""
    p = psp = best_psp = ndcg = recall = 0.0
    for ranked, own in zip(top.tolist(), labels.lists(), strict=True):
        first = [label for label in ranked[:k] if label >= 0]
        right = [label in own for label in first]
        p += sum(right) / k
        psp += sum(inverse[label].item() for label in first if label in own)
        best_psp += sum(sorted((inverse[label].item() for label in own), reverse=True)[:k])
        ideal = sum(1 / math.log2(j + 2) for j in range(min(k, len(own))))
        gain = sum(1 / math.log2(j + 2) for j, it_is in enumerate(right) if it_is)
        ndcg += gain / ideal if ideal else 0.0
        recall += sum(right) / len(own) if own else 0.0
    count = len(top)
    return p / count, psp / best_psp if best_psp else 0.0, ndcg / count, recall / count


def ours(top, labels, inverse, k):
    held = measures(top, labels, inverse, precision=[k], ndcg=[k], recall=[k])
    return tuple(held.values())


@given(cases(), st.integers(1, 14))
def test_equal_to_the_definitions(case, k):
    assert ours(*case, k) == pytest.approx(naive(*case, k), abs=1e-12)


@given(cases(least=1))
def test_a_perfect_ranking_has_one_everywhere(case):
    _, labels, inverse = case
    ranked = [
        sorted(range(len(inverse)), key=lambda label: (label not in own, -inverse[label].item()))
        for own in labels.lists()
    ]
    top = torch.tensor(ranked)
    right = hits(top, labels)
    for k in (1, 3, len(inverse)):
        assert propensity_scored_at(right, top, labels, inverse, k) == pytest.approx(1)
        assert ndcg_at(right, labels, k) == pytest.approx(1)
    assert precision_at(right, 1) == recall_at(right, labels, len(inverse)) == 1


@given(cases(least=1), st.integers(1, 12))
def test_ndcg_is_that_of_scikit_learn(case, k):
    top, labels, inverse = case
    count = len(inverse)
    if count < 2:  # which scikit-learn refuses
        return
    truth = torch.zeros(labels.size, count)
    truth[labels.owners, labels.values.long()] = 1
    scores = torch.zeros(labels.size, count)
    scores.scatter_(1, top, torch.arange(top.shape[1], 0, -1.0).expand(top.shape))
    got = ndcg_at(hits(top, labels), labels, min(k, top.shape[1]))
    theirs = ndcg_score(truth.numpy(), scores.numpy(), k=min(k, top.shape[1]), ignore_ties=True)
    assert got == pytest.approx(theirs, abs=1e-9)


@given(cases(), st.data())
def test_pairs_that_are_taken_out(case, data):
    top, labels, inverse = case
    whole = [(i, int(label)) for i, row in enumerate(top) for label in row]
    gone = data.draw(st.lists(st.sampled_from(whole), unique=True))
    forbidden = torch.tensor(gone, dtype=torch.int64).reshape(-1, 2)
    left = without(top, forbidden)
    for i, row in enumerate(top.tolist()):
        kept = [label for label in row if (i, label) not in gone]
        assert left[i].tolist() == kept + [-1] * (len(row) - len(kept))
    assert ours(left, labels, inverse, 3) == pytest.approx(naive(left, labels, inverse, 3))


# Made once with napkinXC 0.7.2 (precision_at_k, psprecision_at_k, ndcg_at_k, recall_at_k and
# Jain_et_al_inverse_propensity) from `frozen()`.
NAPKINXC_INVERSE = [1.679318474730403, 2.1615944417677424, 4.561132599135828]
NAPKINXC = {
    "P@1": 0.875,
    "P@3": 0.6416666666666668,
    "P@5": 0.4299999999999999,
    "PSP@1": 0.7302456073145032,
    "PSP@3": 0.6080419545969548,
    "PSP@5": 0.5029807257852649,
    "nDCG@1": 0.875,
    "nDCG@3": 0.7020606479697052,
    "nDCG@5": 0.5968985227968476,
    "R@1": 0.19829212454212458,
    "R@5": 0.4634065934065933,
    "R@10": 0.6334249084249085,
}


def frozen():
    """Forty documents, thirty labels of very different frequency, rankings of twelve."""
    random = torch.Generator().manual_seed(17)
    likely = 1 / torch.arange(2.0, 32.0)
    truth = torch.rand(40, 30, generator=random) < likely * 1.5
    truth[3] = False
    scores = truth * 0.4 + torch.rand(40, 30, generator=random)
    top = scores.argsort(dim=1, descending=True)[:, :12]
    labels = Ragged.of([row.nonzero()[:, 0].tolist() for row in truth])
    inverse = inverse_propensities(truth.sum(0), 40, 0.55, 1.5)
    return top, labels, inverse


def test_equal_to_what_napkinxc_gave():
    top, labels, inverse = frozen()
    held = measures(top, labels, inverse, precision=[1, 3, 5], ndcg=[1, 3, 5], recall=[1, 5, 10])
    assert inverse[[0, 9, 29]].tolist() == pytest.approx(NAPKINXC_INVERSE, abs=1e-12)
    assert held == pytest.approx(NAPKINXC, abs=1e-12)


@pytest.mark.skipif(find_spec("napkinxc") is None, reason="pip install 'aftermax[trees]'")
@given(cases(), st.integers(1, 12))
def test_equal_to_napkinxc_itself(case, k):
    from napkinxc import metrics as theirs

    top, labels, inverse = case
    truth, ranked = labels.lists(), top.tolist()
    expected = (
        theirs.precision_at_k(truth, ranked, k=k)[-1],
        theirs.psprecision_at_k(truth, ranked, inverse.numpy(), k=k)[-1] if any(truth) else 0.0,
        theirs.ndcg_at_k(truth, ranked, k=k)[-1],
        theirs.recall_at_k(truth, ranked, k=k)[-1],
    )
    assert ours(top, labels, inverse, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("top", "problem"),
    [
        (torch.tensor([[0, 1]]), r"top is \(1, 2\) of torch.int64 for 2 rows"),
        (torch.tensor([[0.0], [1.0]]), r"of torch.float32 for 2 rows of labels; int64 \(2, K\)"),
        (torch.tensor([[1, 0, 1], [0, 1, 2]]), "a label twice"),
    ],
)
def test_rankings_that_are_none(top, problem):
    with pytest.raises(ValueError, match=problem):
        hits(top, Ragged.of([[0], [1]]))


def test_k_is_one_or_more():
    with pytest.raises(ValueError, match="k is 0"):
        precision_at(torch.ones(2, 2, dtype=torch.bool), 0)
