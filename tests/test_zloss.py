"""The spherical losses on dense logits: the papers' formulas in float64, and their identities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import aftermax
from aftermax import (
    LogSphericalLoss,
    LogTaylorLoss,
    SquaredErrorLoss,
    ZScoreLoss,
    log_spherical_softmax_loss,
    log_taylor_softmax_loss,
    squared_error_loss,
    z_score_loss,
)

from .native import BF16, F16, F32, F64, REDUCTIONS


def naive_z(o, c, a=0.1, b=10.0):
    """1604.08859: z = (o_c - mu) / sigma, and the softplus of a (b - z), over a."""
    mu = sum(o) / len(o)
    sigma = math.sqrt(sum((x - mu) ** 2 for x in o) / len(o))
    return math.log1p(math.exp(a * (b - (o[c] - mu) / sigma))) / a


def naive_taylor(o, c):
    """1511.05042, the log-Taylor softmax."""
    return -math.log((1 + o[c] + o[c] ** 2 / 2) / sum(1 + x + x**2 / 2 for x in o))


def naive_spherical(o, c, eps=0.1):
    """1511.05042, the log-spherical softmax."""
    return -math.log((o[c] ** 2 + eps) / sum(x**2 + eps for x in o))


def naive_squared_error(o, c):
    return sum((x - (k == c)) ** 2 for k, x in enumerate(o))


MEMBERS = {
    "z": (z_score_loss, naive_z),
    "taylor": (log_taylor_softmax_loss, naive_taylor),
    "spherical": (log_spherical_softmax_loss, naive_spherical),
    "squared error": (squared_error_loss, naive_squared_error),
}
members = pytest.mark.parametrize(("loss", "naive"), MEMBERS.values(), ids=MEMBERS.keys())


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def reduce(rows, reduction):
    counted = [row for row in rows if row is not None]
    if reduction == "none":
        return torch.tensor([row or 0.0 for row in rows], dtype=F64)
    total = sum(counted)
    return torch.tensor(total / len(counted) if reduction == "mean" else total, dtype=F64)


@members
@given(
    rows=st.integers(1, 5),
    classes=st.integers(2, 9),
    reduction=st.sampled_from(REDUCTIONS),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_formula_for_one_class_a_row(loss, naive, rows, classes, reduction, data):
    logits = 3 * normal(rows, classes, seed=data.draw(st.integers(0, 99)))
    picks = st.lists(st.sampled_from([-100, *range(classes)]), min_size=rows, max_size=rows)
    target = data.draw(picks.filter(lambda picked: max(picked) >= 0))
    exact = [None if c < 0 else naive(o, c) for o, c in zip(logits.tolist(), target, strict=True)]
    got = loss(logits, torch.tensor(target), reduction=reduction)
    assert_close(got, reduce(exact, reduction), rtol=1e-10, atol=1e-12)


@members
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_formula_for_several_classes_a_row(loss, naive, reduction):
    logits = normal(4, 7)
    target = torch.tensor([[1, 5, -1], [0, -100, -7], [-1, -1, -1], [2, 2, 6]])
    exact = []
    for o, row in zip(logits.tolist(), target.tolist(), strict=True):
        each = [naive(o, c) for c in row if c >= 0]
        exact.append(sum(each) / len(each) if each else None)
    got = loss(logits, target, reduction=reduction)
    assert_close(got, reduce(exact, reduction), rtol=1e-12, atol=1e-12)


@members
def test_shapes_are_those_of_torch(loss, naive):
    logits = normal(2, 6, 3, 4)
    target = torch.randint(6, (2, 3, 4))
    got = loss(logits, target, reduction="none")
    rows = logits.movedim(1, -1).reshape(-1, 6)
    assert_close(got.flatten(), loss(rows, target.flatten(), reduction="none"))
    one = loss(logits[0, :, 0, 0], target[0, 0, 0])
    assert one.ndim == 0
    assert_close(one, got[0, 0, 0])
    several = torch.randint(6, (2, 5, 3, 4))
    got = loss(logits, several, reduction="none")
    assert_close(got.flatten(), loss(rows, several.movedim(1, -1).reshape(-1, 5), reduction="none"))
    assert_close(loss(logits[0, :, 0, 0], several[0, :, 0, 0]), got[0, 0, 0])


@members
def test_gradients(loss, naive):
    logits = normal(3, 5).requires_grad_()
    several = torch.tensor([[1, 4], [0, -1], [2, 2]])
    assert torch.autograd.gradcheck(lambda x: loss(x, torch.tensor([1, -100, 3])), logits)
    assert torch.autograd.gradcheck(lambda x: loss(x, several, reduction="none"), logits)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, several), logits)


CLOSED = {
    # (d mean, d variance, d chosen) of one row with moments m, v and chosen logit o, C classes
    ZScoreLoss(0.7, 1.5): lambda m, v, o, C: [
        -1 / (1 + math.exp(-0.7 * (1.5 - (o - m) / v**0.5))) * part
        for part in (-(v**-0.5), -(o - m) / 2 * v**-1.5, v**-0.5)
    ],
    LogTaylorLoss(): lambda m, v, o, C: [
        (1 + m) / (1 + m + (v + m * m) / 2),
        0.5 / (1 + m + (v + m * m) / 2),
        -(1 + o) / (1 + o + o * o / 2),
    ],
    LogSphericalLoss(0.3): lambda m, v, o, C: [
        2 * m / (v + m * m + 0.3),
        1 / (v + m * m + 0.3),
        -2 * o / (o * o + 0.3),
    ],
    SquaredErrorLoss(): lambda m, v, o, C: [2 * C * m, C, -2],
}


@pytest.mark.parametrize("member", CLOSED, ids=lambda member: type(member).__name__)
def test_gradients_in_closed_form(member):
    moments = [torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.4, 1.7, 2.1)]
    got = torch.autograd.grad(member.from_moments(*moments, 50), moments)
    exact = CLOSED[member](0.4, 1.7, 2.1, 50)
    assert_close(torch.stack(got), torch.tensor(exact, dtype=F64), rtol=1e-13, atol=0)


def test_z_score_knows_neither_shift_nor_scale():
    logits = normal(6, 40).requires_grad_()
    target = torch.arange(6)
    loss = z_score_loss(logits, target, a=0.5, b=2.0, reduction="none")
    moved = z_score_loss(3.5 * logits + 12.0, target, a=0.5, b=2.0, reduction="none")
    assert_close(moved, loss, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad.abs().sum() > 0.1
    assert grad.sum(1).abs().max() < 1e-15
    assert (grad * logits).sum(1).abs().max() < 1e-15


def test_sharpness_goes_from_a_line_to_a_hinge():
    logits, target = normal(8, 30), torch.arange(8)
    std, mean = torch.std_mean(logits, 1, correction=0)
    z = (logits[range(8), target] - mean) / std
    hinge = z_score_loss(logits, target, a=1e4, b=0.5, reduction="none")
    assert_close(hinge, (0.5 - z).clamp_min(0), rtol=0, atol=1e-4)
    line = z_score_loss(logits, target, a=1e-4, b=0.5, reduction="none")
    assert_close(line, math.log(2) / 1e-4 + (0.5 - z) / 2, rtol=0, atol=1e-3)


def test_equal_logits_have_no_z_score():
    logits = torch.full((2, 5), 3.0, requires_grad=True)
    loss = z_score_loss(logits, torch.tensor([1, 2]), a=1.0, b=0.0)
    assert_close(loss, torch.tensor(math.log(2)))
    assert torch.autograd.grad(loss, logits)[0].eq(0).all()


def test_a_common_offset_costs_no_digits():
    """q/C - mean^2 would leave none in float32."""
    logits, target = normal(5, 1000), torch.arange(5)
    exact = z_score_loss(logits, target)
    shifted = (logits + 1000).float()
    assert_close(z_score_loss(shifted, target).double(), exact, rtol=1e-5, atol=0)


@members
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_half_precision_is_rounded_once(loss, naive, dtype):
    logits, target = normal(7, 20, dtype=dtype), torch.arange(7)
    got = loss(logits, target)
    assert got.dtype == dtype
    rtol = 1e-5 if dtype == F32 else torch.finfo(dtype).eps
    assert_close(got.double(), loss(logits.double(), target), rtol=rtol, atol=0)


@members
def test_rows_that_count_for_nothing(loss, naive):
    logits = normal(3, 4)
    logits[1] = math.nan
    logits.requires_grad_()
    target = torch.tensor([0, 3, 2])
    kept = loss(logits[[0, 2]], target[[0, 2]])
    got = loss(logits, target, ignore_index=3)
    assert_close(got, kept)
    (grad,) = torch.autograd.grad(got, logits)
    assert grad[[0, 2]].isfinite().all()
    assert loss(logits, torch.full((3,), -100)).isnan()
    assert loss(logits, torch.full((3,), -100), reduction="sum") == 0


@members
def test_compiles_whole(loss, naive):
    logits, target = normal(3, 5, dtype=F32), torch.tensor([[0, 1], [2, -1], [3, 4]])
    compiled = torch.compile(lambda x: loss(x, target), fullgraph=True, backend="aot_eager")
    assert_close(compiled(logits), loss(logits, target))


def test_the_other_z_loss_is_another():
    """The square of the log-partition that trainers add goes by `lse_square_scale`."""
    logits, target = normal(4, 9), torch.arange(4)
    other = aftermax.cross_entropy(logits, target, lse_square_scale=1.0)
    plain = aftermax.cross_entropy(logits, target)
    assert_close(other - plain, logits.logsumexp(1).square().mean())
    assert not hasattr(aftermax, "z_loss")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, t: z_score_loss(x, t[:1]), ValueError, r"\(3,\) would be right.*\(3, K\)"),
        (lambda x, t: z_score_loss(x[0, 0], t), ValueError, "scalar"),
        (lambda x, t: z_score_loss(x.long(), t), ValueError, "floating"),
        (lambda x, t: z_score_loss(x, t.int()), ValueError, "int64"),
        (lambda x, t: z_score_loss(x, t + 3), IndexError, "5 is out of bounds for 5"),
        (lambda x, t: z_score_loss(x, t - 1), IndexError, "-1 is out of bounds for 5"),
        (lambda x, t: z_score_loss(x, t, a=0.0), ValueError, "a > 0"),
        (lambda x, t: z_score_loss(x, t, b=math.inf), ValueError, "finite b"),
        (lambda x, t: z_score_loss(x, t, reduction="all"), ValueError, "none of"),
        (lambda x, t: log_spherical_softmax_loss(x, t, eps=0.0), ValueError, "eps > 0"),
        (lambda x, t: squared_error_loss(x[:, :0], t), ValueError, "no class"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call(normal(3, 5), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("target", [[1, -100], [[1, 0], [-1, -1]]])
def test_what_an_ignored_row_holds_does_not_matter(target):
    logits = torch.tensor([[1.0, 2.0, 0.5], [math.nan, 1.0, math.inf]], requires_grad=True)
    loss = z_score_loss(logits, torch.tensor(target))
    loss.backward()
    assert_close(loss, z_score_loss(logits[:1], torch.tensor(target[:1])))
    assert logits.grad[0].isfinite().all()
    assert logits.grad[1].eq(0).all()
