"""The softmax losses over many labels: their formulas, masks, samples, precision, derivatives."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import (
    coupled_softmax_loss,
    decoupled_softmax_loss,
    in_batch_masks,
    label_pool,
    one_vs_all_loss,
)
from aftermax.losses import positives as marks

from . import label_cases
from .label_cases import cases, columns
from .native import BF16, F16, F32, F64, INF, NAN

LOSSES = {
    "decoupled": (decoupled_softmax_loss, label_cases.decoupled),
    "coupled": (coupled_softmax_loss, label_cases.coupled),
    "one-vs-all": (one_vs_all_loss, label_cases.one_vs_all),
}
every_loss = pytest.mark.parametrize(("loss", "naive"), LOSSES.values(), ids=LOSSES)


def gradient(function, scores, upstream):
    leaf = scores.detach().clone().requires_grad_()
    out = function(leaf)
    out.backward(upstream.to(out.dtype))
    return out.detach(), leaf.grad


# the formulas


@every_loss
@given(case=cases())
def test_it_is_its_formula(loss, naive, case):
    scores, positives, visible = case
    upstream = torch.randn(len(scores), dtype=F64)
    call = functools.partial(loss, positives=positives, visible=visible, reduction="none")
    got, slope = gradient(call, scores, upstream)
    exact, right = gradient(lambda s: naive(s, positives, visible), scores, upstream)
    assert_close(got, exact, rtol=1e-12, atol=1e-12)
    assert_close(slope, right, rtol=1e-12, atol=1e-12)


@every_loss
@given(case=cases())
def test_the_traced_form_is_the_same(loss, naive, case):
    scores, positives, visible = case
    upstream = torch.randn(len(scores), dtype=F64)
    call = functools.partial(loss, positives=positives, visible=visible, reduction="none")
    got = gradient(call, scores, upstream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marks, "plain", lambda: True)
        traced = gradient(call, scores, upstream)
    assert_close(got, traced, rtol=1e-12, atol=1e-12)


def test_a_found_positive_is_pushed_down_by_the_coupled_loss_and_left_by_the_decoupled():
    scores, three = torch.tensor([[6.0, 0, 0, 0, 0, 0]], dtype=F64), torch.tensor([[0, 1, 2]])
    one = torch.ones(())
    _, coupled = gradient(lambda s: coupled_softmax_loss(s, three), scores, one)
    _, decoupled = gradient(lambda s: decoupled_softmax_loss(s, three), scores, one)
    assert round(coupled[0, 0].item(), 3) == 0.654
    assert round(decoupled[0, 0].item(), 4) == -0.0025


def test_one_positive_alone_is_cross_entropy():
    scores, target = torch.randn(6, 11, dtype=F64), torch.randint(11, (6,))
    right = F.cross_entropy(scores, target)
    assert_close(decoupled_softmax_loss(scores, target[:, None]), right)
    assert_close(coupled_softmax_loss(scores, target[:, None]), right)


def test_without_masks_one_vs_all_is_torchs():
    scores, positives = torch.randn(6, 11, dtype=F64), torch.rand(6, 11) < 0.3
    right = F.binary_cross_entropy_with_logits(scores, positives.double())
    assert_close(one_vs_all_loss(scores, positives), right)


@every_loss
def test_every_label_can_be_positive(loss, naive):
    """The last of a shard among them, which the authors' code leaves a negative."""
    scores = torch.randn(1, 7, dtype=F64)
    for p in range(7):
        at = torch.tensor([[p]])
        assert_close(loss(scores, at, reduction="none"), naive(scores, at, None))


def test_a_hidden_score_is_no_negative_where_a_visible_one_is_below_it():
    """With the constant -100 of the authors' code the hidden one would be all of the sum."""
    scores = torch.tensor([[-300.0, -300.0, 5.0]])
    visible = torch.tensor([[True, True, False]])
    loss = decoupled_softmax_loss(scores, torch.tensor([[0]]), visible=visible)
    assert_close(loss, torch.tensor(2.0).log())


# rows without positives, without negatives, reductions


@every_loss
@pytest.mark.parametrize("content", [0.0, NAN, INF])
def test_a_row_without_positives_or_that_sees_nothing(loss, naive, content):
    scores = torch.randn(3, 4)
    scores[1] = content
    positives = torch.tensor([[0], [1], [2]])
    visible = torch.tensor([[True], [False], [True]])
    got, slope = gradient(lambda s: loss(s, positives, visible=visible), scores, torch.ones(()))
    assert_close(got, loss(scores[::2], positives[::2]))
    assert (slope[1] == 0).all()
    if loss is not one_vs_all_loss:
        positives[1] = -1
        got, slope = gradient(lambda s: loss(s, positives), scores, torch.ones(()))
        assert_close(got, loss(scores[::2], positives[::2]))
        assert (slope[1] == 0).all()


def test_a_row_whose_every_negative_is_hidden_loses_nothing():
    scores, positives = torch.randn(2, 5), torch.eye(2, 5).bool()
    call = functools.partial(decoupled_softmax_loss, positives=positives, visible=positives)
    loss, slope = gradient(call, scores, torch.ones(()))
    assert loss == 0
    assert (slope == 0).all()


@every_loss
def test_the_mean_over_nothing_is_0(loss, naive):
    for shape in ((0, 5), (3, 0)):
        scores = torch.zeros(shape, requires_grad=True)
        loss(scores, torch.zeros(shape).bool()).backward()
        assert loss(scores, torch.zeros(shape).bool()) == 0
        assert (scores.grad == 0).all()


@every_loss
def test_reductions(loss, naive):
    scores, positives = torch.randn(4, 6), torch.rand(4, 6) < 0.5
    positives[:, 0] = True
    rows = loss(scores, positives, reduction="none")
    assert rows.shape == (4,)
    assert_close(loss(scores, positives), rows.mean())
    assert_close(loss(scores, positives, reduction="sum"), rows.sum())


# samples


@every_loss
def test_a_sample_is_drawn_alike_and_leaves_the_others_out(loss, naive):
    scores = torch.randn(1, 6, dtype=F64)
    positives, counts = torch.tensor([[4, 1, 2]]), {1: 0, 2: 0, 4: 0}
    random = torch.Generator().manual_seed(0)
    each = {}
    for p in counts:
        visible = torch.ones(1, 6).bool()
        visible[0, [q for q in counts if q != p]] = False
        each[p] = naive(scores, torch.tensor([[p]]), visible).item()
    for _ in range(600):
        got = loss(scores, positives, sample=1, generator=random).item()
        counts[min(each, key=lambda p: abs(each[p] - got))] += 1
        assert min(abs(got - value) for value in each.values()) < 1e-12
    assert all(150 < count < 250 for count in counts.values())


def test_the_mean_over_samples_is_the_decoupled_loss():
    scores, positives = torch.randn(1, 5, dtype=F64), torch.tensor([[0, 3]])
    seen = {decoupled_softmax_loss(scores, positives, sample=1).item() for _ in range(64)}
    assert len(seen) == 2
    assert_close(sum(seen) / 2, decoupled_softmax_loss(scores, positives).item())


@every_loss
def test_a_sample_as_large_as_the_positives_is_all_of_them(loss, naive):
    scores, positives = torch.randn(4, 6), torch.rand(4, 6) < 0.5
    assert loss(scores, positives, sample=6) == loss(scores, columns(positives))


def test_a_generator_fixes_the_sample():
    scores, positives = torch.randn(4, 60), torch.rand(4, 60) < 0.5
    one, other = (
        decoupled_softmax_loss(
            scores, positives, sample=2, generator=torch.Generator().manual_seed(5)
        )
        for _ in range(2)
    )
    assert one == other


# in batch


def test_a_pool_has_each_label_once():
    labels, at = label_pool(torch.tensor([[9, 4, -1], [4, -1, -1]]), torch.tensor([9, 0, -1]))
    assert labels.tolist() == [0, 4, 9]
    assert at.tolist() == [[2, 1, -1], [1, -1, -1]]
    assert label_pool(torch.full((2, 1), -1))[0].numel() == 0


@given(
    ids=st.lists(st.integers(-1, 5), min_size=1, max_size=8),
    rows=st.lists(st.lists(st.integers(-1, 5), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_in_batch_masks_see_each_label_once_and_know_every_true_one(ids, rows):
    positives, visible = in_batch_masks(torch.tensor(ids), torch.tensor(rows))
    for j, label in enumerate(ids):
        assert visible[0, j] == (label >= 0 and label not in ids[:j])
        for i, row in enumerate(rows):
            assert positives[i, j] == (label >= 0 and label in row)


def test_a_repeated_label_changes_nothing():
    queries, labels = torch.randn(3, 8), torch.randn(4, 8)
    ids, true = torch.tensor([5, 6, 7, 8]), torch.tensor([[5, 8], [6, -1], [8, 5]])
    again = torch.tensor([0, 1, 1, 3, 0, 2])
    for loss, _ in LOSSES.values():
        once = in_batch_masks(ids, true)
        more = in_batch_masks(ids[again], true)
        right = loss(queries @ labels.T, once[0], visible=once[1])
        assert_close(loss(queries @ labels[again].T, more[0], visible=more[1]), right)


# precision


@every_loss
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("labels", [7, 4097])
def test_it_is_computed_in_float32_at_least(loss, naive, dtype, labels):
    scores = (8 * torch.randn(3, labels)).to(dtype)
    positives = columns(torch.rand(3, labels) < 3 / labels)
    positives[:, -1] = labels - 1
    upstream = torch.rand(3, dtype=F64) + 0.5
    upstream = upstream.to(dtype).double()
    call = functools.partial(loss, positives=positives, reduction="none")
    got, slope = gradient(call, scores, upstream)
    exact, right = gradient(call, scores.double(), upstream)
    step = 0.0 if dtype == F32 else torch.finfo(dtype).eps / 2
    assert got.dtype == slope.dtype == dtype
    assert_close(got.double(), exact, rtol=step + 2e-6, atol=1e-6)
    tiny = torch.finfo(dtype).smallest_normal
    assert_close(slope.double(), right, rtol=step + 1e-5, atol=1e-7 + tiny)


@every_loss
def test_large_scores(loss, naive):
    scores = torch.tensor([[1e30, -1e30, 3e4, 0.0], [-3e38, -3e38, -3e38, -3e38]], dtype=F64)
    positives = torch.tensor([[1, -1], [0, 2]])
    got, slope = gradient(
        lambda s: loss(s, positives, reduction="none"), scores, torch.ones(2, dtype=F64)
    )
    exact, right = gradient(lambda s: naive(s, positives, None), scores, torch.ones(2, dtype=F64))
    assert_close(got, exact)
    assert_close(slope, right)


# derivatives and compilation


@every_loss
def test_derivatives_of_first_and_second_order(loss, naive):
    scores = torch.randn(3, 6, dtype=F64, requires_grad=True)
    positives = torch.tensor([[0, 1, 5], [3, -1, -1], [-1, -1, -1]])
    visible = torch.rand(3, 6) < 0.8
    visible[0] = True
    for reduction in ("mean", "none"):
        call = functools.partial(loss, positives=positives, visible=visible, reduction=reduction)
        assert torch.autograd.gradcheck(call, scores)
        assert torch.autograd.gradgradcheck(call, scores)


@every_loss
def test_it_compiles_as_one_graph(loss, naive):
    torch._dynamo.reset()
    scores, positives = torch.randn(4, 9), torch.rand(4, 9) < 0.4
    visible = torch.rand(4, 9) < 0.8
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    right = gradient(lambda s: loss(s, positives, visible=visible), scores, torch.ones(()))
    got = gradient(lambda s: compiled(s, positives, visible=visible), scores, torch.ones(()))
    assert_close(got, right)


@every_loss
def test_per_sample_gradients_by_torch_func(loss, naive):
    scores, positives = torch.randn(4, 9), torch.rand(4, 9) < 0.4
    slopes = torch.func.vmap(torch.func.grad(lambda s, p: loss(s[None], p[None], reduction="sum")))(
        scores, positives
    )
    _, right = gradient(lambda s: loss(s, positives, reduction="sum"), scores, torch.ones(()))
    assert_close(slopes, right)


# errors


@every_loss
def test_what_does_not_fit_is_said(loss, naive):
    scores, positives = torch.randn(3, 4), torch.zeros(3, 4).bool()
    with pytest.raises(ValueError, match=r"positives \(3, 5\) of torch.bool for scores \(3, 4\)"):
        loss(scores, torch.zeros(3, 5).bool())
    with pytest.raises(ValueError, match=r"positives \(4, 1\) of torch.int64 for scores"):
        loss(scores, torch.zeros(4, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"visible \(3, 2\)"):
        loss(scores, positives, visible=torch.ones(3, 2).bool())
    with pytest.raises(ValueError, match=r"visible \(3, 4\) of torch.float32"):
        loss(scores, positives, visible=torch.ones(3, 4))
    with pytest.raises(ValueError, match="reduction='all'"):
        loss(scores, positives, reduction="all")
    with pytest.raises(ValueError, match="sample=0"):
        loss(scores, positives, sample=0)
    with pytest.raises(ValueError, match=r"scores \(4,\)"):
        loss(scores[0], positives[0])
    with pytest.raises(IndexError, match="columns 0 to 3"):
        loss(scores, torch.tensor([[4], [0], [0]]))


@pytest.mark.parametrize("positives", [torch.full((2, 1), -1), torch.zeros(2, 0).bool()])
def test_no_labels_at_all_is_a_loss_of_nothing(positives):
    scores = torch.zeros(2, 0, requires_grad=True)
    for loss in (decoupled_softmax_loss, coupled_softmax_loss, one_vs_all_loss):
        loss(scores, positives, reduction="sum").backward()
        assert loss(scores, positives, reduction="none").tolist() == [0, 0]
