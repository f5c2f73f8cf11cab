"""Output layers for linear_cross_entropy, their truth in float64, and the comparison."""

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from aftermax import linear_cross_entropy

from .native import F32, normal


def layer(rows, width, count, *, dtype=F32, bias=True, ignored=0.0, seed=0):
    """hidden, weight, target and bias, with logits of about N(0, 2)."""
    random = torch.Generator().manual_seed(seed)
    target = torch.randint(count, (rows,), generator=random)
    target = target.masked_fill(torch.rand(rows, generator=random) < ignored, -100)
    return (
        normal(rows, width, dtype=dtype, seed=seed + 1),
        normal(count, width, scale=max(1, width) ** -0.5, dtype=dtype, seed=seed + 2),
        target,
        normal(count, dtype=dtype, seed=seed + 3) if bias else None,
    )


def truth(
    hidden,
    weight,
    target,
    bias=None,
    *,
    class_weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    lse_square_scale=0.0,
    reduction="mean",
):
    logits = F.linear(hidden, weight, bias).reshape(-1, weight.shape[0])
    target = target.reshape(-1)
    rows = F.cross_entropy(
        logits,
        target,
        None if class_weight is None else class_weight.to(logits.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    counted = target != ignore_index
    squares = lse_square_scale * logits.logsumexp(1).square().where(counted, 0)
    if reduction == "none":
        return (rows + squares).reshape(hidden.shape[:-1])
    if reduction == "sum":
        return rows.sum() + squares.sum()
    weights = counted.to(rows.dtype)
    if class_weight is not None:
        weights = class_weight.to(rows.dtype)[target.where(counted, 0)] * weights
    return rows.sum() / weights.sum() + squares.sum() / counted.sum()


def assert_near(got, exact, dtype, scale=1.0):
    """To the rounding of products and sums in float32 of terms of that size, and of the dtype."""
    assert got.dtype == dtype
    assert got.shape == exact.shape
    rounding = 0.0 if dtype == F32 else torch.finfo(dtype).eps / 2
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    atol = 2e-6 * scale + step
    assert_close(got.double(), exact, rtol=rounding + 2e-6, atol=atol, equal_nan=True)


def largest(x):
    return x.detach().abs().max().item() if x.numel() else 0.0


def terms_of(wide, target, g, **options):
    """The sizes of what the gradients of hidden, weight and bias add up: their sum may be next to
    nothing, the error of it not."""
    hidden, weight, bias = (None if t is None else t.detach() for t in wide)
    class_weight, mark = options.get("class_weight"), options.get("ignore_index", -100)
    lse = largest(F.linear(hidden, weight, bias).logsumexp(-1)) if weight.numel() else 0.0
    square = 2 * options.get("lse_square_scale", 0.0) * lse
    each = 1.0 if class_weight is None else largest(class_weight)
    if options.get("reduction", "mean") == "mean":
        counted = target[target != mark]
        total = counted.numel() if class_weight is None else class_weight[counted].sum().item()
        each, square = each / (total or 1), square / max(1, counted.numel())
    size = (each + square) * largest(g)
    return size * largest(weight), size * largest(hidden), size


def check(hidden, weight, target, bias=None, *, impl="cpu", wanted=(True, True, True), **options):
    """Loss and gradients equal float64's."""
    given = (hidden, weight, bias)
    leaves = [
        None if t is None else t.detach().requires_grad_(w)
        for t, w in zip(given, wanted, strict=True)
    ]
    wide = [
        None if t is None else t.detach().double().requires_grad_(w)
        for t, w in zip(given, wanted, strict=True)
    ]
    got = linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], impl=impl, **options)
    exact = truth(wide[0], wide[1], target, wide[2], **options)
    dtype = hidden.dtype
    assert_near(got.detach(), exact.detach(), dtype, max(1.0, largest(exact)))
    with torch.no_grad():
        plain = linear_cross_entropy(hidden, weight, target, bias, impl=impl, **options)
    assert_near(plain, exact.detach(), dtype, max(1.0, largest(exact)))
    g = normal(*exact.shape, dtype=dtype, seed=9)
    if g.ndim == 0:
        g.fill_(1)  # another one rounds the gradients of half precision twice: see below
    got.backward(g)
    exact.backward(g.double())
    terms = terms_of(wide, target, g, **options)
    for leaf, expected, size in zip(leaves, wide, terms, strict=True):
        if leaf is None or not leaf.requires_grad:
            assert leaf is None or leaf.grad is None
        else:
            assert_near(leaf.grad, expected.grad, dtype, max(size, largest(expected.grad)))


OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "all smooth": {"label_smoothing": 1.0},
    "square": {"lse_square_scale": 0.01},
    "all": {"label_smoothing": 0.3, "lse_square_scale": 0.1},
}
