"""The layers of a vision transformer in the fixed-point numbers of Edge-MoE, bit for bit.

Sarkar et al., arXiv 2305.18691; formats, order of operations and places of the cuts are those of
the released sources. All tensors are raw int64 (see `aftermax.moe.fixedpoint`): activations Q10.22,
weights of linear layers <16,2>, biases <16,5> (of attention <16,7>), weights of norms <16,5>, of
patches <16,0>, pixels unsigned <8,0>. A register is as wide as an activation, so that each product
of a sum is **cut by itself**, and the sum wraps around::

    linear      y = b + sum_i [x_i w_i]                         [.] cuts to 22 bits of fraction
    norm        m = sum_i [x_i [1/D]],  q = sum_i [x_i [x_i [1/D]]]
                r = [1 / [sqrt(q - [m m] + [eps])]],            y = [[(x - m) r] g] + b
    attention   s = sum over blocks of 8 of [scale sum_i [q_i k_i]],    w = [exp(s - max)] [1 / t]
                y = sum_j [w_j v_j]
    gate        s = sum_i [x_i w_i],    p = [[exp(s - max)] / t] of the best k
    experts     y = sum over the chosen of [p (W2 gelu(W1 x + b1) + b2)]

Four queries are walked at once, and the lane of query i starts at key i mod 4: the order in which t
is summed. A block of a score that wraps does so before it meets `scale`. The gate divides, where
attention multiplies by the reciprocal.

Not public are the vendor's exp, reciprocal and root: here they are exact, and cut. With these in
their place the released sources give the same bits (test_fixed_released.py). A variance of 0 or
less, which cutting can leave in tokens that are nearly constant, has no root: its token is counted,
and r taken as 0.

A `Tally` counts what wrapped: ask it before a model's answers are believed.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aftermax.moe.fixedpoint import (
    ACTIVATION,
    BIAS,
    LINEAR_WEIGHT,
    NORM_WEIGHT,
    PATCH_WEIGHT,
    PIXEL,
    Fixed,
    exp,
    multiply,
    recast,
    single_pass_softmax,
)
from aftermax.moe.gelu import fixed_gelu

LANES = 4
"""Queries that are walked at once."""
BLOCK = 8
"""Elements of a score that are summed before it is scaled."""
HELD = 2**16
"""Products that exist at a time, so that they stay in the cache."""
EPS = 1e-6
"""Of the norms, in the sources; 4 units of 2^-22 are left of it."""


@dataclass(frozen=True, eq=False)
class Tally:
    """How many numbers of each step went into a register, and how many of them did not fit.

    >>> tally = Tally()
    >>> one = ACTIVATION.encode(torch.tensor([[1.0, 300.0]]))
    >>> half = LINEAR_WEIGHT.encode(torch.tensor([[1.5, 1.5], [0.5, 0.5], [1.9, 1.9]]))
    >>> ACTIVATION.decode(fixed_linear(one, half, tally=tally))
    tensor([[ 451.5000,  150.5000, -452.1110]], dtype=torch.float64)
    >>> tally.kept["linear"], tally.wrapped["linear"]
    (3, 1)
    """

    kept: Counter[str] = field(default_factory=Counter)
    wrapped: Counter[str] = field(default_factory=Counter)

    def note(self, step: str, wrong: Tensor) -> None:
        """Of a bool tensor, with True for what went wrong."""
        self.kept[step] += wrong.numel()
        self.wrapped[step] += int(wrong.sum())


def _keep(raw: Tensor, step: str, tally: Tally | None) -> Tensor:
    """A sum goes into a register of an activation."""
    if tally is not None:
        tally.note(step, ~ACTIVATION.fits(raw))
    return ACTIVATION.wrap(raw)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """[a b] of two activations before it wraps."""
    return a * b >> ACTIVATION.fraction


def _dot(x: Tensor, weight: Tensor, shift: int) -> Tensor:
    """sum_i [x_i w_i], products cut by `shift` bits and the sum not wrapped.

    (G, R, n), (G, m, n) -> (G, R, m).
    """
    groups, length, width = *x.shape[:2], weight.shape[1]
    out = x.new_zeros(groups, length, width)
    columns = weight.transpose(1, 2).contiguous()
    together, rows = (max(1, HELD // max(1, n)) for n in (length * width, width))
    for xs, ws, outs in zip(*(t.split(together) for t in (x, columns, out)), strict=True):
        for some, into in zip(xs.split(rows, 1), outs.split(rows, 1), strict=True):
            product = torch.empty_like(into)
            for i in range(x.shape[-1]):
                torch.mul(some[:, :, i, None], ws[:, i, None], out=product)
                into += product.bitwise_right_shift_(shift)
    return out


def _check_width(name: str, x: Tensor, right: int, dim: int = -1) -> None:
    if x.shape[dim] != right:
        raise ValueError(f"{name} must have {right} in dimension {dim}, got {tuple(x.shape)}")


# ---- layers --------------------------------------------------------------------------------------


def fixed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    bias_form: Fixed = BIAS,
    tally: Tally | None = None,
    step: str = "linear",
) -> Tensor:
    """W x + b, then GELU by the table if asked for: the unified linear unit.

    Args:
        x: (..., n) activations.
        weight: (m, n), <16,2>.
        bias: (m,) of `bias_form`, <16,5>; `ATTENTION_BIAS` in attention.
        gelu: as the first matrix of an MLP or an expert has it.
        tally, step: where wraps are counted, and under which name.

    Returns:
        (..., m) activations.

    Raises:
        ValueError: for shapes that do not fit and numbers that are none of their format.

    >>> x, w = ACTIVATION.encode(torch.ones(2, 3)), LINEAR_WEIGHT.encode(torch.eye(3))
    >>> ACTIVATION.decode(fixed_linear(x, w, gelu=True))[0]
    tensor([0.8413, 0.8413, 0.8413], dtype=torch.float64)
    """
    ACTIVATION.check(x)
    LINEAR_WEIGHT.check(weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must be (outputs, inputs), got {tuple(weight.shape)}")
    _check_width("x", x, weight.shape[-1])
    out = _dot(x.reshape(1, -1, x.shape[-1]), weight[None], LINEAR_WEIGHT.fraction)
    if bias is not None:
        _check_width("bias", bias, len(weight))
        out += recast(bias, bias_form, ACTIVATION)
    out = _keep(out, step, tally).reshape(*x.shape[:-1], len(weight))
    return fixed_gelu(out) if gelu else out


def fixed_patches(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor,
    places: Tensor,
    *,
    weight_form: Fixed = PATCH_WEIGHT,
    tally: Tally | None = None,
) -> Tensor:
    """W p + b + place for each patch, behind a first token that is its place alone.

    Args:
        pixels: (..., N, n) unsigned <8,0>, the pixels of N patches: bytes, worth a 256th each.
        weight: (D, n), of `weight_form`, <16,0>: from -1/2 to 1/2.
        bias: (D,), <16,5>.
        places: (N + 1, D) activations; the first is the sum of the class token and its place.

    Returns:
        (..., N + 1, D) activations.
    """
    PIXEL.check(pixels)
    weight_form.check(weight)
    ACTIVATION.check(places)
    _check_width("pixels", pixels, weight.shape[-1])
    _check_width("places", places, pixels.shape[-2] + 1, -2)
    shift = PIXEL.fraction + weight_form.fraction - ACTIVATION.fraction
    out = _dot(pixels.reshape(1, -1, pixels.shape[-1]), weight[None], max(shift, 0))
    out = (out << max(-shift, 0)) + recast(bias, BIAS, ACTIVATION)
    out = _keep(out, "patches", tally).reshape(*pixels.shape[:-1], len(weight))
    out = _keep(out + places[1:], "patches", tally)
    return torch.cat([places[:1].expand(*out.shape[:-2], 1, -1), out], -2)


def fixed_add(x: Tensor, y: Tensor, *, tally: Tally | None = None) -> Tensor:
    """x + y, of a branch and what it is added to.

    >>> fixed_add(torch.tensor([2**31 - 1]), torch.tensor([1]))
    tensor([-2147483648])
    """
    return _keep(x + y, "residual", tally)


def fixed_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = EPS,
    *,
    tally: Tally | None = None,
) -> Tensor:
    """Layer norm over the last dimension, with the variance as the mean of squares less a square.

    Args:
        x: (..., D) activations.
        weight: (D,), <16,5>.
        bias: (D,), <16,5>.
        eps: cut to 22 bits of fraction.

    A deviation below some 2^-9 has an r of 512 and more, which wraps, and so does a mean of squares
    from 512 on.

    >>> x = ACTIVATION.encode(torch.tensor([[-1.0, 1.0, -1.0, 1.0]]))
    >>> one, nothing = NORM_WEIGHT.encode(torch.ones(4)), torch.zeros(4, dtype=torch.int64)
    >>> ACTIVATION.decode(fixed_layer_norm(x, one, nothing))
    tensor([[-1.0000,  1.0000, -1.0000,  1.0000]], dtype=torch.float64)
    """
    NORM_WEIGHT.check(weight)
    shares = _shares(x)
    mean = _keep(shares.sum(-1, keepdim=True), "norm", tally)
    square = _keep(_times(x, shares).sum(-1, keepdim=True), "norm", tally)
    of_mean = _keep(_times(mean, mean), "norm", tally)
    r = _over_root(square - of_mean + _cut(eps), tally)
    centred = _keep(x - mean, "norm", tally)
    return _keep(_scaled(centred, r, weight, tally) + recast(bias, BIAS, ACTIVATION), "norm", tally)


def fixed_rms_norm(
    x: Tensor, weight: Tensor, eps: float = 0.0, *, tally: Tally | None = None
) -> Tensor:
    """x r g with r = 1 / sqrt(mean of squares + eps): QK-norm, over the width of a head.

    The published model has none. The numbers and cuts are those of `fixed_layer_norm` without mean
    and bias, and are our choice. An eps below 2^-22, as torch's default, is 0.
    """
    NORM_WEIGHT.check(weight)
    square = _keep(_times(x, _shares(x)).sum(-1, keepdim=True), "norm", tally)
    return _scaled(x, _over_root(square + _cut(eps), tally), weight, tally)


def _shares(x: Tensor) -> Tensor:
    """[x [1 / D]]."""
    ACTIVATION.check(x)
    return _times(x, torch.tensor((1 << ACTIVATION.fraction) // x.shape[-1]))


def _cut(number: float) -> int:
    return math.floor(number * 2**ACTIVATION.fraction)


def _over_root(square: Tensor, tally: Tally | None) -> Tensor:
    """[1 / [sqrt(square)]]."""
    square = _keep(square, "norm", tally)
    if tally is not None:
        tally.note("root", square <= 0)
    wide = square.clamp_min(0) << ACTIVATION.fraction  # below 2^53
    root = wide.double().sqrt().floor().long()
    root = root - (root * root > wide).long()
    over = (1 << 2 * ACTIVATION.fraction) // root.clamp_min(1)
    return torch.where(square > 0, _keep(over, "norm", tally), 0)


def _scaled(x: Tensor, r: Tensor, weight: Tensor, tally: Tally | None) -> Tensor:
    """[[x r] g]."""
    x = _keep(_times(x, r), "norm", tally)
    return _keep(x * weight >> NORM_WEIGHT.fraction, "norm", tally)


# ---- attention -----------------------------------------------------------------------------------


def fixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    *,
    corrected: bool = False,
    tally: Tally | None = None,
) -> Tensor:
    """softmax(scale q k) v in one pass, every token seeing all.

    Args:
        query, key, value: (..., T, d) activations.
        scale: cut to 22 bits; None = 1 / sqrt(d), 1/8 in the paper.
        corrected: as in `single_pass_softmax`, for more than 511 keys.

    Returns:
        (..., T, d) activations. A width that is no multiple of 8 has a shorter last block, which
        the sources do not allow.

    >>> x = ACTIVATION.encode(torch.tensor([[0.0], [1.0], [2.0]]))
    >>> ACTIVATION.decode(fixed_attention(x, x, x))[0]
    tensor([1.0000], dtype=torch.float64)
    """
    for x in (query, key, value):
        ACTIVATION.check(x)
    _check_width("key", key, query.shape[-1])
    _check_width("value", value, key.shape[-2], -2)
    if key.shape[-2] == 0:
        raise ValueError(f"attention needs a key to see, got {tuple(key.shape)}")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    lead, tokens = query.shape[:-2], key.shape[-2]
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))

    scores = q.new_zeros(*q.shape[:2], tokens)
    for of_q, of_k in zip(q.split(BLOCK, -1), k.split(BLOCK, -1), strict=True):
        block = _keep(_dot(of_q, of_k, ACTIVATION.fraction), "scores", tally)
        scores += _keep(_times(block, torch.tensor(_cut(scale))), "scores", tally)
    scores = _keep(scores, "scores", tally)

    lane = torch.arange(q.shape[1])[:, None] % LANES
    order = ((torch.arange(tokens) + lane) % tokens).expand(scores.shape)
    found = single_pass_softmax(scores.gather(-1, order), corrected=corrected)
    if tally is not None:
        tally.note("softmax", found.wrapped)
    weights = torch.zeros_like(scores).scatter(-1, order, found.weights)
    out = _dot(weights, v.transpose(1, 2), ACTIVATION.fraction)
    return _keep(out, "values", tally).reshape(*lead, *out.shape[1:])


# ---- experts -------------------------------------------------------------------------------------


def fixed_gate(
    x: Tensor, gate: Tensor, top_k: int = 2, *, tally: Tally | None = None
) -> tuple[Tensor, Tensor]:
    """The best experts of each token and their weights among all: ((..., k) index, (..., k) raw).

    Args:
        x: (..., D) activations.
        gate: (E, D), <16,2>, of the task.
        top_k: experts of a token. Equal scores go to the lower number; the released top_k, which
            forgets its best where the next score is smaller, is not followed.

    >>> x = ACTIVATION.encode(torch.tensor([[1.0, 0.0]]))
    >>> index, weights = fixed_gate(x, LINEAR_WEIGHT.encode(torch.eye(2)), top_k=1)
    >>> int(index), ACTIVATION.decode(weights)
    (0, tensor([[0.7311]], dtype=torch.float64))
    """
    if not 1 <= top_k <= len(gate):
        raise ValueError(f"top_k must be 1 to the {len(gate)} experts, got {top_k}")
    scores = fixed_linear(x, gate, tally=tally, step="gate")
    found = single_pass_softmax(scores)
    if tally is not None:
        tally.note("softmax", found.wrapped)
    best, index = scores.sort(dim=-1, descending=True, stable=True)
    gap = best[..., :top_k] - found.maximum
    power = torch.where(ACTIVATION.fits(gap), exp(gap.clamp_min(ACTIVATION.lowest)), 0)
    total = found.total.masked_fill(found.total == 0, 1)
    # C++ divides towards 0; a sum below 0 has wrapped
    share = torch.div(power << ACTIVATION.fraction, total, rounding_mode="trunc")
    return index[..., :top_k], ACTIVATION.wrap(share)


def fixed_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    tally: Tally | None = None,
) -> Tensor:
    """sum over the chosen of weight (W2 gelu(W1 x + b1) + b2), expert by expert.

    Where all tokens choose the same expert the released unit waits for a queue that is not filled;
    here nothing depends on it.

    Args:
        x: (..., D) activations.
        index, weights: (..., k), of `fixed_gate`.
        w1, w2: (E, H, D) and (E, D, H), <16,2>.
        b1, b2: (E, H) and (E, D), <16,5>.
    """
    flat, index = x.reshape(-1, x.shape[-1]), index.reshape(-1, index.shape[-1])
    weights = weights.reshape(index.shape)
    if bool(((index < -1) | (index >= len(w1))).any()):
        raise ValueError(
            f"index must be experts 0 to {len(w1) - 1}, or -1 for none, "
            f"got {int(index.min())} to {int(index.max())}"
        )
    out = torch.zeros_like(flat)
    for expert in range(len(w1)):
        token, choice = (index == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        first, second = (None if b is None else b[expert] for b in (b1, b2))
        hidden = fixed_linear(flat[token], w1[expert], first, gelu=True, tally=tally)
        y = fixed_linear(hidden, w2[expert], second, tally=tally)
        weight = weights[token, choice][:, None]
        y = out[token] + multiply(y, weight, ACTIVATION, ACTIVATION, ACTIVATION)
        out[token] = _keep(y, "experts", tally)
    return out.reshape(x.shape)
