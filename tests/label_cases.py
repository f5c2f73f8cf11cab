"""Scores of labels with positives and masks, and the losses of arXiv:2310.10636 written naively."""

import math

import torch
from hypothesis import strategies as st

from .native import INF, NAN


@st.composite
def cases(draw, dtype=torch.float64, most_rows=5, most_labels=9):
    """scores, positives (mask or columns), visible or None."""
    rows, labels = draw(st.integers(1, most_rows)), draw(st.integers(1, most_labels))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    scale = draw(st.sampled_from((0.1, 3.0, 100.0)))
    scores = (scale * torch.randn(rows, labels, generator=random)).to(dtype)
    share = draw(st.sampled_from((0.0, 0.3, 0.7, 1.0)))
    positives = torch.rand(rows, labels, generator=random) < share
    shape = draw(st.sampled_from((None, (labels,), (1, labels), (rows, labels), (rows, 1))))
    visible = None if shape is None else torch.rand(shape, generator=random) < 0.7
    if visible is not None:  # what nobody may see is anything
        poison = torch.tensor((NAN, INF, -INF, 1e30)).to(dtype)
        filled = poison[torch.randint(4, scores.shape, generator=random)]
        scores = torch.where(visible.expand(scores.shape), scores, filled)
    if draw(st.booleans()):
        positives = columns(positives, repeat=draw(st.booleans()))
    return scores, positives, visible


def columns(mask, repeat=False):
    """A mask as columns, -1 as none, in no order; with `repeat` each stands twice."""
    rows = [row.nonzero().flatten().flip(0).tolist() * (1 + repeat) for row in mask]
    most = max(map(len, rows)) + 1
    return torch.tensor([row[::2] + row[1::2] + [-1] * (most - len(row)) for row in rows])


def sets(scores, positives, visible):
    """For each row its positives and its negatives, as lists of columns."""
    count, labels = scores.shape
    seen = torch.ones(count, labels).bool() if visible is None else visible.expand(count, labels)
    for i in range(count):
        if positives.dtype == torch.bool:
            true = set(positives[i].nonzero().flatten().tolist())
        else:
            true = {p for p in positives[i].tolist() if p >= 0}
        mine = set(seen[i].nonzero().flatten().tolist())
        yield sorted(true & mine), sorted(mine - true)


def decoupled(scores, positives, visible):
    rows = []
    for s, (true, false) in zip(scores, sets(scores, positives, visible), strict=True):
        each = [torch.stack([0 * s[p], *(s[n] - s[p] for n in false)]).logsumexp(0) for p in true]
        rows.append(sum(each) / len(each) if each and false else 0 * s.nan_to_num(0, 0, 0).sum())
    return torch.stack(rows)


def coupled(scores, positives, visible):
    rows = []
    for s, (true, false) in zip(scores, sets(scores, positives, visible), strict=True):
        each = [(s[sorted(true + false)] - s[p]).logsumexp(0) for p in true]
        rows.append(sum(each) / len(each) if each else 0 * s.nan_to_num(0, 0, 0).sum())
    return torch.stack(rows)


def one_vs_all(scores, positives, visible):
    rows = []
    for s, (true, false) in zip(scores, sets(scores, positives, visible), strict=True):
        each = [torch.logaddexp(s[j], s.new_tensor(0.0)) for j in (*true, *false)]
        total = sum(each) - sum(s[p] for p in true)
        rows.append(total / len(each) if each else 0 * s.nan_to_num(0, 0, 0).sum())
    return torch.stack(rows)


def threshold(scores, k, alpha):
    """t with sum sigmoid(alpha (s_j + t)) = k, by halving: a list of floats, 0 < k < len."""
    low, high = -max(scores) - 800 / alpha, -min(scores) + 800 / alpha
    for _ in range(300):
        t = (low + high) / 2
        total = math.fsum(sigmoid(alpha * (s + t)) for s in scores)
        low, high = (t, high) if total < k else (low, t)
    return t


def sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
