"""Calls of attention as they come, what they should give, and by how much float32 may miss it.

How much a rounded score moves a result hangs on the map: a softmax hardly notices, the sharpening
of LSSAR multiplies it. So that part is measured and not guessed: the float64 reference runs again
with its scores moved as rounding may move them, and the other inputs by an eps; a result may be off
by `TIMES` the distance that this carries it. The rest is `UNITS` eps of the sum of the absolute
terms, for every sum that there is: values by weights, grad . value and grad . out, and the sums of
gradients of scores by keys and by queries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from aftermax import (
    CATALOGUE,
    LSSA,
    LSSAR,
    ClippedSoftmax,
    Entry,
    LSSARLog,
    NormalisedClippedSoftmax,
    RowMap,
    Softmax,
    Visible,
    attention,
    attention_weights,
    scores,
)
from aftermax.visible import count, hidden_below
from aftermax.weights.softmax import distance_scale_and_shift

from .cases import Case, case_of, gradients
from .native import BF16, F16, F32, F64, running

EPS = torch.finfo(F32).eps
LEAST = torch.finfo(F32).tiny

UNITS = 8
"""Of eps: e^s to 1.1, a function of it to 3, the sum in its tiles, the factors behind it."""

UNITS_OF_PRODUCTS = 2
"""Of eps: a product of two rows is summed in several lanes, and most of its rounding cancels."""

TIMES = 6
"""Over the root mean square of four draws. A kernel's rounding is one more draw, and the largest of
a million of those lies five to six of them out."""

BY_LENGTH = ("log-n", "cosine", "lssa", "lssar", "lssar-log")
"""The entries whose scores are multiplied by ln N."""


# ---- what is run ----


ROW_MAPS = [e for e in CATALOGUE if isinstance(e.system, RowMap) and e.walk == "dense"]
"""Those of one pass have softmax's kernel, or none."""
every_entry = pytest.mark.parametrize("entry", ROW_MAPS, ids=lambda entry: entry.name)


def attend(entry, case, visible=Visible(), **options):  # noqa: B008, a frozen value
    return case.attend(entry, visible, **{"enable_gqa": True, "impl": "cpu"} | options)


def results(entry, case, visible, **options):
    """Outputs and all gradients."""
    leaves = case.map(lambda x: x.detach().requires_grad_())
    out = attend(entry, leaves, visible, **options)
    return [out.detach(), *gradients(out, leaves)]


# ---- what may be seen ----


def seen_in_float64(visible: Visible) -> Visible:
    """The same with numbers that are right for a float64 reference: finfo.min hides there too."""
    mask, slopes = visible.mask, visible.slopes
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(F64).masked_fill(mask <= hidden_below(mask.dtype), -torch.inf)
    return dataclasses.replace(
        visible, mask=mask, slopes=None if slopes is None else slopes.to(F64)
    )


def moved(visible: Visible, noise: Tensor) -> Visible:
    """`visible` in float64 with noise (B, H, Tq, Tk) added to the scores."""
    mask = visible.mask
    if mask is None:
        return dataclasses.replace(visible, mask=noise)
    if mask.dtype == torch.bool:
        return dataclasses.replace(visible, mask=noise.masked_fill(~mask, -torch.inf))
    return dataclasses.replace(visible, mask=mask + noise)


# ---- what is right, and how nearly ----


class Truth(NamedTuple):
    """The result and all gradients, and by how much float32 may miss each number of them."""

    out: Tensor
    gradients: list[Tensor]
    of_out: Tensor
    of_gradients: list[Tensor]
    spread: Tensor
    """sum_j w_ij |v_j|, where nothing follows the sum."""


def in_groups(x: Tensor, heads: int) -> Tensor:
    """(B, Hkv, ...) -> (B, H, ...)."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def score_factor(entry: Entry, case: Case, visible: Visible, scale: float | None) -> Tensor:
    """(H, 1, 1) or (): what multiplies the product of prepared vectors, at most."""
    factor = torch.tensor(
        abs(entry.system.scale(case.query.shape[-1]) if scale is None else scale), dtype=F64
    )
    if entry.name in BY_LENGTH:
        factor = factor * math.log(case.key.shape[-2] + 1)
    if entry.name == "log-n":
        factor = factor * case.learned["s"].detach().abs()[:, None, None]
    if entry.name == "scale-invariant":
        factor = (
            factor * distance_scale_and_shift(farthest(case, visible), entry.system.tau, F64)[0]
        )
    return factor


def farthest(case: Case, visible: Visible) -> Tensor:
    return torch.tensor(case.query.shape[-2] + visible.offset + case.key.shape[-2])


def score_sizes(entry: Entry, case: Case, visible: Visible, factor: Tensor) -> Tensor:
    """(B, H, Tq, 1): no score of the row has terms that sum to more, in absolute value."""
    query, key = (entry.system.prepare(x.detach()) for x in (case.query, case.key))
    longest = in_groups(key.norm(dim=-1).amax(-1), query.shape[1])[..., None, None]
    sizes = factor * query.norm(dim=-1, keepdim=True) * longest
    if entry.name == "scale-invariant":
        _, shift = distance_scale_and_shift(farthest(case, visible), entry.system.tau, F64)
        sizes = sizes + shift.abs()
    if visible.slopes is not None:
        sizes = sizes + (visible.slopes.abs() * farthest(case, visible))[:, None, None]
    if visible.mask is not None and visible.mask.dtype != torch.bool:
        finite = torch.where(visible.mask.isfinite(), visible.mask.abs(), 0)
        sizes = sizes + finite.amax(-1, keepdim=True)
    return sizes


def truth(
    entry: Entry, case: Case, visible: Visible, upstream: Tensor, scale: float | None = None
) -> Truth:
    """Of float64 inputs that hold what the kernel is given, and of `seen_in_float64(visible)`."""
    case = case.wanting_gradients()
    batch, heads, queries, width = case.query.shape
    square = (batch, heads, queries, case.key.shape[-2])
    options = {"enable_gqa": True, "scale": scale}

    def run(case: Case, visible: Visible, upstream: Tensor) -> list[Tensor]:
        """out, the gradients of the leaves, the gradient of the scores."""
        out = case.attend(entry, visible, impl="reference", **options)
        leaves = [*case.leaves, visible.mask]
        grads = torch.autograd.grad(out, leaves, upstream, materialize_grads=True)
        return [out.detach(), *grads]

    still = moved(visible, torch.zeros(square, dtype=F64))
    assert still.mask is not None
    still.mask.requires_grad_()
    *right, of_scores = run(case, still, upstream)
    factor = score_factor(entry, case, visible, scale)
    # a sum over the width, then some roundings by factors and functions
    step = EPS / 2 * (math.sqrt(width) + 4) * score_sizes(entry, case, visible, factor)
    random = torch.Generator().manual_seed(1)

    def nearly(x: Tensor) -> Tensor:
        return x.detach() * (1 + EPS * torch.randn(x.shape, generator=random, dtype=F64))

    squares = [torch.zeros_like(x) for x in right]
    for draw in range(4):
        noise = torch.randn(square, generator=random, dtype=F64)
        if draw < 2:  # all one way: what cannot average out, and what lies at the edge of a relu
            noise = torch.full_like(noise, 2.0 if draw else -2.0)
        near = moved(visible, noise * step)
        near.mask.requires_grad_()
        got = run(case.map(nearly).wanting_gradients(), near, nearly(upstream))
        for total, x, y in zip(squares, got, right, strict=False):
            total += (x - y) ** 2
    slack = [
        TIMES * x.mean(-1, keepdim=True).sqrt() + UNITS * EPS * y.abs().amax(-1, keepdim=True)
        for x, y in zip(squares, right, strict=True)
    ]

    # the sums of absolute terms
    weights, slope = _weights_and_slope(entry, case, still, scale)
    grad = upstream.abs()
    spread = weights @ in_groups(case.value.detach().abs(), heads)
    finishes = entry.system.mixes_heads
    if finishes:
        grad = _grad_before_norm(entry, case, still, grad, scale)
    else:
        slack[0] = slack[0] + UNITS * EPS * spread
    values = in_groups(case.value.detach().abs(), heads)
    of_products = grad @ values.mT + (grad * spread).sum(-1, keepdim=True)
    slope = slope + _slope_of_total(entry, case, still, weights, scale)
    error = EPS * (UNITS * of_scores.abs() + UNITS_OF_PRODUCTS * slope * of_products) * factor
    error = error + LEAST * of_products * factor  # a weight may be 0 in place of less than this
    if isinstance(entry.system, ClippedSoftmax | NormalisedClippedSoftmax):
        weights, flips = _at_the_clips(entry, case, still, scale, step)
        slack[0] = slack[0] + UNITS * EPS * weights @ values
        flips = flips * of_products
        soft = _softmax(case, still, scale)
        error = error + (flips + soft * flips.sum(-1, keepdim=True)) * factor

    query, key = (x.detach() for x in (case.query, case.key))
    lengths = [in_groups(x.norm(dim=-1, keepdim=True), heads) for x in (query, key)]
    if entry.system.prepare is scores.cosine:
        lengths = [torch.ones_like(x) for x in lengths]
    by_query, by_key = error @ lengths[1], error.mT @ lengths[0]
    if entry.system.prepare is scores.cosine:
        by_query = by_query / query.norm(dim=-1, keepdim=True)
        by_key = by_key / in_groups(key.norm(dim=-1, keepdim=True), heads)
    kv_heads = key.shape[1]

    def grouped(x: Tensor) -> Tensor:
        return x.reshape(batch, kv_heads, heads // kv_heads, *x.shape[2:]).sum(2)

    slack[1] = slack[1] + by_query
    slack[2] = slack[2] + grouped(by_key)
    slack[3] = slack[3] + UNITS * EPS * grouped(weights.mT @ grad)
    for i, name in enumerate(case.learned, start=4):
        if name == "sink":
            slack[i] = slack[i] + UNITS * EPS * (grad * spread).sum((0, 2, 3))
        if name == "s":
            product = lengths[0] @ lengths[1].mT
            slack[i] = (
                slack[i] + (error * product).sum((0, 2, 3)) / case.learned["s"].detach().abs()
            )
    return Truth(right[0], right[1:], slack[0], slack[1:], spread * (not finishes))


def _softmax(case: Case, visible: Visible, scale: float | None) -> Tensor:
    options = {"attn_mask": visible, "scale": scale, "enable_gqa": True}
    return attention_weights(case.query, case.key, weights=Softmax(), **options).detach()


def _at_the_clips(
    entry: Entry, case: Case, visible: Visible, scale: float | None, step: Tensor
) -> tuple[Tensor, Tensor]:
    """What is clipped, before anything is added to it; and the part of it that may or may not have
    a gradient, since float32 cannot tell on which side of a clip it lies."""
    soft = _softmax(case, visible, scale)
    system = entry.system
    if isinstance(system, ClippedSoftmax):
        stretch, shift = system.zeta - system.gamma, system.gamma
    else:
        queries, keys = soft.shape[-2:]
        rows = visible.rows(0, queries, (0, keys), soft.device, F64)
        stretch, shift = system._rows(count(rows.visible, F64))
    stretched = stretch * soft
    unsure = stretched * (UNITS * EPS + 4 * step)
    low, high = (stretched + shift).abs(), (stretched + shift - 1).abs()
    return stretched, stretched * ((low < unsure) | (high < unsure + 2**-15))


def _weights_and_slope(
    entry: Entry, case: Case, visible: Visible, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The weights, and by how much their sum moves with each score: their slopes, where each is a
    function of its own score alone; next to nothing where they sum to 1."""
    weights = attention_weights(
        case.query,
        case.key,
        weights=entry.system,
        attn_mask=visible,
        scale=scale,
        enable_gqa=True,
        **case.learned,
    )
    (slope,) = torch.autograd.grad(weights.sum(), visible.mask, materialize_grads=True)
    return weights.detach(), slope.abs()


def _slope_of_total(
    entry: Entry, case: Case, visible: Visible, weights: Tensor, scale: float | None
) -> Tensor:
    """By how much each score moves the logarithm of the row's total, at most.

    By its weight, for e^s and ln(1 + e^s). For LSSAR, r^p with r = f - mean f, by its weight times
    p f' / r, and every key of the row by the N-th part of that, for the mean. f' <= f, and the
    largest f decides: f / r = w N / (w N - 1), w the largest weight of the row without its power.
    """
    if not isinstance(entry.system, LSSAR | LSSARLog):
        return weights
    options = {"attn_mask": visible, "scale": scale, "enable_gqa": True}
    plain = attention_weights(case.query, case.key, weights=LSSA(), **options).detach()
    count = (plain > 0).sum(-1, keepdim=True).clamp_min(1)
    top = plain.amax(-1, keepdim=True) * count
    power = getattr(entry.system, "power", None) or 2 * count.log().clamp_min(0.5)
    sharpness = power * top / (top - (count > 3).to(F64)).clamp_min(EPS)
    return sharpness * (weights + (plain > 0) / count)


def _grad_before_norm(
    entry: Entry, case: Case, visible: Visible, grad: Tensor, scale: float | None
) -> Tensor:
    """What the RMSNorm of ReLA hands back, in absolute terms: gain grad / rms, and as much for the
    part along its input; the gate is at most 1, and its slope adds no more than it takes."""
    plain = dataclasses.replace(entry.system, norm="none")
    summed = attention(
        *case[:3], weights=plain, attn_mask=visible, scale=scale, enable_gqa=True, impl="reference"
    ).detach()
    over = (summed.square().mean((1, 3), keepdim=True) + entry.system.eps).rsqrt()
    gain = case.learned["gain"].detach().abs().amax()
    along = grad.square().sum((1, 3), keepdim=True).sqrt() / math.sqrt(
        grad.shape[1] * grad.shape[3]
    )
    return 2 * over * gain * (grad + along * summed.abs() * over)


def in_float64(case: Case) -> Case:
    return case.map(lambda x: x.detach().to(F64))


def assert_right(
    entry: Entry,
    case: Case,
    visible: Visible,
    names: Iterable[str],
    scale: float | None = None,
) -> None:
    """The kernels' result and gradients for the case, float32, on the bodies of these names; and
    the result where no gradient is asked for, which few rows of queries come to by another way."""
    shape = (*case.query.shape[:3], case.value.shape[-1])
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    right = truth(entry, in_float64(case), seen_in_float64(visible), upstream.to(F64), scale)
    for name in names:
        with running(name):
            leaves = case.map(lambda x: x.detach().requires_grad_())
            out = leaves.attend(entry, visible, enable_gqa=True, impl="cpu", scale=scale)
            got = torch.autograd.grad(out, leaves.leaves, upstream, materialize_grads=True)
            alone = attend(entry, case.map(torch.Tensor.detach), visible, scale=scale)
        assert out.dtype == alone.dtype == F32
        assert_within(out, right.out, right.of_out, f"out on {name}")
        assert_within(alone, right.out, right.of_out, f"out without gradients on {name}")
        of = ("query", "key", "value", *case.learned)
        for which, *each in zip(of, got, right.gradients, right.of_gradients, strict=True):
            assert_within(*each, f"gradient of {which} on {name}")


def assert_within(got: Tensor, right: Tensor, slack: Tensor, what: str) -> None:
    error = (got.to(F64) - right).abs()
    # one step of the subnormals is what float32 misses 0 by
    wrong = ~(error <= slack + LEAST)
    assert got.shape == right.shape
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} are off,"
        f" by up to {error[wrong].max():.3g}, {(error / slack)[wrong].max():.3g} times the bound;"
        f" first at {wrong.nonzero()[0].tolist()}"
    )


# ---- calls as they come ----

LAYOUTS = ("plain", "tokens first", "gaps", "every second", "width first", "one batch", "one head")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The numbers of x (of its first batch or head, repeated) where that layout has them; what lies
    between them is NaN."""
    batch, heads, tokens, width = x.shape
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gaps":
        room = x.new_full((batch, heads + 1, tokens + 2, width + 3), torch.nan)
        view = room[:, 1:, 1 : tokens + 1, 1 : width + 1]
        return view.copy_(x)
    if layout == "every second":
        return x.new_full((batch, heads, tokens, 2 * width), torch.nan)[..., ::2].copy_(x)
    if layout == "width first":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "one batch":
        return x[:1].contiguous().expand(x.shape)
    if layout == "one head":
        return x[:, :1].contiguous().expand(x.shape)
    return x.contiguous()


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call that was drawn: its shape, how its tensors lie, what may be seen."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    layouts: tuple[str, str, str]
    visible: Visible
    scale: float | None
    size: float
    seed: int

    def case(self, entry: Entry, dtype: torch.dtype) -> Case:
        case = case_of(
            entry,
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            tokens=max(self.queries, self.keys),
            width=self.width,
            value_width=self.value_width,
            seed=self.seed,
        )
        tensors = (
            self.size * case.query[:, :, : self.queries],
            case.key[:, :, : self.keys],
            case.value[:, :, : self.keys],
        )
        # what is learned stays in float32, as a module holds it
        learned = {name: x.float() for name, x in case.learned.items()}
        lying = (laid_out(x.to(dtype), how) for x, how in zip(tensors, self.layouts, strict=True))
        return Case(*lying, learned)


RAGGED = (1, 2, 3, 31, 63, 64, 65, 77, 127, 128, 129, 257)
WIDTHS = (8, 13, 40, 64, 80, 128, 129, 256)


@st.composite
def masks(draw, batch, heads, queries, keys, random):
    kind = draw(st.sampled_from(("none", "none", "bool", "float", "padding")))
    if kind == "none":
        return None
    shape = [draw(st.sampled_from((1, n))) for n in (batch, heads, queries, keys)]
    if kind == "padding":
        shape = [batch, 1, 1, keys]
    seen = torch.rand(shape, generator=random) < draw(st.sampled_from((0.1, 0.5, 0.9)))
    if draw(st.booleans()):
        seen[:, :, torch.rand(shape[2], generator=random) < 0.3] = False
    if kind != "float":
        return seen
    dtype = draw(st.sampled_from((F32, BF16, F16)))
    hidden = draw(st.sampled_from((-torch.inf, torch.finfo(dtype).min)))
    mask = torch.randn(shape, generator=random).to(dtype).masked_fill(~seen, hidden)
    return mask[:, :, :, ::1] if draw(st.booleans()) else mask.mT.contiguous().mT


@st.composite
def problems(draw, small=False):
    queries, keys = draw(st.sampled_from(RAGGED)), draw(st.sampled_from(RAGGED))
    if draw(st.booleans()):
        queries = keys
    heads, kv_heads = draw(st.sampled_from(((1, 1), (2, 2), (4, 2), (3, 1), (6, 2))))
    batch = draw(st.integers(1, 2))
    width, value_width = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(WIDTHS))
    if small:  # what a reference in float64 can do a few times in a moment
        while batch * heads * queries * keys * (width + value_width) > 4e6:
            if width + value_width > 100:
                width, value_width = min(width, 40), min(value_width, 13)
            elif batch > 1:
                batch = 1
            elif heads > kv_heads * 2 or heads == kv_heads > 1:
                heads, kv_heads = 2, 1
            elif queries > 65:
                queries = 65
            else:
                break
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    # no score below -80, where ln(1 + e^s) leaves float32
    slopes = torch.rand(heads, generator=random) / 5 if draw(st.integers(0, 3)) == 0 else None
    visible = Visible(
        causal=draw(st.booleans()),
        offset=draw(st.sampled_from((0, max(0, keys - queries), 5))),
        window=draw(st.sampled_from((None, None, 1, 3, 50, 130))),
        mask=draw(masks(batch, heads, queries, keys, random)),
        slopes=slopes,
    )
    return Problem(
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        width,
        value_width,
        tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(3)),
        visible,
        draw(st.sampled_from((None, None, 0.7))),
        draw(st.sampled_from((1.0, 1.0, 5.0, 0.1))),
        draw(st.integers(0, 10**6)),
    )
