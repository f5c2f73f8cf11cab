"""One sum, three ways to walk it: the only loops of the linear family.

    S_i = g S_{i-1} + k_i v_i^T,    out_i = q_i^T S_i,    g = e^-rate, one for each head

The forms give the same numbers (float64: to rounding), forward and backward, and can follow each
other at any token, since the state S is a value:

    parallel    out = ((Q K^T) * decay) V, in blocks of rows: O(T^2) time, any mask
    chunked     parallel inside a chunk, the state from one to the next: O(T) time and memory
    recurrent   token by token: O(T) time, the formula as it stands

Chunk of m tokens, local index a = 1..m (Qin et al., arXiv 2401.04658, from S_i alone; powers of g
are relative to the chunk, so that none overflows, which g^-t does: at rate 1 from token 88 on in
float32):

    out = ((Q K^T) * g^(a-b) [a >= b]) V + (g^a Q) S;    S <- g^m S + (g^(m-a) K)^T V

The backward pass is written by hand: autograd would keep every chunk's scores and states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aftermax import kernels
from aftermax.attention import IMPLS, attention
from aftermax.blocks import no_autocast
from aftermax.fused import EMPTY
from aftermax.kernels import linear_ops
from aftermax.reference import NOT_IN_ONNX, onnx_export, transformed
from aftermax.visible import Rows, Visible
from aftermax.weights.row_map import RowMap

CHUNK = 64
"""Tokens of a chunk; any number gives the same result, near the head width it is the cheapest."""

FORMS = ("parallel", "chunked", "recurrent")


class Walked(NamedTuple):
    out: Tensor
    """(B, H, T, Dv)"""
    total: Tensor | None
    """(B, H, T): sum_j g^(i-j) q_i . k_j, if `totals` were asked for."""
    state: Tensor
    """(B, Hs, D, Dv), with `totals` (B, Hs, D, Dv + 1): the last column is sum_j g^(T-j) k_j. Hs is
    Hkv, or with a rate H."""


def walk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rate: Tensor | None = None,
    state: Tensor | None = None,
    totals: bool = False,
    form: str | None = None,
    impl: str | None = None,
) -> Walked:
    """out_i = sum_{j <= i} g^(i-j) (q_i . k_j) v_j, and the state after the last token.

    All numbers must be finite: within a chunk what is not finite would reach back. The systems
    (`Separable`) see to that.

    Args:
        query: (B, H, T, D), what the features of the queries are.
        key: (B, Hkv, T, D); Hkv divides H, query head h reads key head h // (H / Hkv).
        value: (B, Hkv, T, Dv).
        rate: (H,), not negative, g = e^-rate; None = no decay. It is a constant: no gradient.
        state: what an earlier call left behind; None = nothing came before.
        totals: whether to sum the weights as well, as if every value had one more element, 1.
        form: one of `FORMS`; None = recurrent for a single token, else chunked.
        impl: "reference" (plain torch) or "cpu" (the compiled kernel, chunked, float32); None picks
            the kernel where it can do what is asked, which `why_not_cpu` tells.

    Returns:
        `Walked`: float32 for half precision, else the dtype of the inputs.

    Raises:
        ValueError: for shapes, a form or an impl that do not fit.
        RuntimeError: for `impl="cpu"` where the kernel cannot do what is asked.

    >>> x = torch.ones(1, 1, 3, 1)
    >>> walk(x, x, x).out.flatten()
    tensor([1., 2., 3.])
    >>> first = walk(x[:, :, :2], x[:, :, :2], x[:, :, :2])
    >>> walk(x[:, :, 2:], x[:, :, 2:], x[:, :, 2:], state=first.state).out.flatten()
    tensor([3.])
    """
    _check(query, key, value, rate, form, impl)
    with no_autocast(query.device):
        query, key, value = _widened(query, key, value)
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and rate is not None:  # what decays differently is no longer shared
            key, value = (repeated(x, groups) for x in (key, value))
            groups = 1
        state = _state(state, key, value, totals)
        if form is None and impl is None and query.shape[2] == 1:
            form = "recurrent"
        if form == "chunked" or form is None:
            refusal = why_not_cpu(query, key, value)
            if impl == "cpu" and refusal not in (None, EMPTY):
                raise RuntimeError(f"walk: impl='cpu', but {refusal}")
            if impl != "reference" and refusal is None:
                return Walked(*linear_ops.walk(query, key, value, rate, state, totals))
        elif impl == "cpu":
            raise RuntimeError(f"walk: impl='cpu', but the kernel walks in chunks, not {form}")
        return _reference(query, key, value, rate, state, totals, form or "chunked", groups)


def why_not_cpu(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernel cannot walk these, or None where it can.

    >>> x = torch.zeros(1, 1, 3, 2, dtype=torch.float64)
    >>> why_not_cpu(x, x, x) is not None
    True
    """
    if kernels.absent() is not None:
        return kernels.absent()
    if query.device.type != "cpu":
        return f"the query is on {query.device}, not on the CPU"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernel computes in float32, not in {query.dtype}"
    if transformed():
        return "the kernel knows no torch.func transforms and no forward-mode derivatives"
    if onnx_export():
        return NOT_IN_ONNX
    if not all((query.numel(), key.numel(), value.numel())):
        return EMPTY
    return None


def both_ways(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rate: Tensor | None = None,
    totals: bool = False,
    impl: str | None = None,
) -> Walked:
    """The same where every token sees all others: out_i = sum_j g^|i-j| (q_i . k_j) v_j.

    Without a rate this is two matrix products, of torch, whatever `impl`: query and key may then
    differ in length. With one it is a walk from either end; its state is that of the forward walk.

    >>> x = torch.ones(1, 1, 3, 1)
    >>> both_ways(x, x, x).out.flatten()
    tensor([3., 3., 3.])
    """
    _check(query, key, value, rate, None, impl, same_length=rate is not None)
    with no_autocast(query.device):
        query, key, value = _widened(query, key, value)
        groups = query.shape[1] // key.shape[1]
        if rate is None:
            value = _with_ones(value) if totals else value
            state = key.mT @ value
            return _split(query @ repeated(state, groups), state, totals)
        key, value = (repeated(x, groups) for x in (key, value))
        options: dict[str, Any] = {"rate": rate, "totals": totals, "impl": impl}
        there = walk(query, key, value, **options)
        back = walk(query.flip(2), key.flip(2), value.flip(2), **options)
        own = (query * key).sum(-1)  # which both have
        out = there.out + back.out.flip(2) - own[..., None] * value
        total = None
        if there.total is not None and back.total is not None:
            total = there.total + back.total.flip(2) - own
        return Walked(out, total, there.state)


@dataclass(frozen=True)
class Products(RowMap):
    """The weights of the parallel form: g^|i-j| s_ij on the visible keys, 0 elsewhere.

    With it the dense walk sums what the other forms cannot: masks that differ by query. `rate` (H,)
    is taken by keyword.
    """

    def learned(self, heads: int, value_dim: int) -> dict[str, Tensor]:
        return {"rate": torch.zeros(heads)}

    def weigh(self, scores: Tensor, rows: Rows, **learned: Tensor) -> Tensor:
        decay = torch.exp(-learned["rate"].to(scores)[:, None, None] * rows.distance.abs())
        return (scores * decay).masked_fill(~rows.visible, 0)


def in_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible,
    *,
    rate: Tensor | None = None,
    totals: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The parallel form over whatever is visible: (out, total), in blocks, never T x T whole."""
    value = _with_ones(value) if totals else value
    rate = query.new_zeros(query.shape[1]) if rate is None else rate
    out = attention(
        query, key, value, weights=Products(), attn_mask=visible, scale=1.0, enable_gqa=True,
        impl="reference", rate=rate,
    )  # fmt: skip
    return (out[..., :-1], out[..., -1]) if totals else (out, None)


# ---- the reference -----------------------------------------------------------------------------


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rate: Tensor | None,
    state: Tensor,
    totals: bool,
    form: str,
    groups: int,
) -> Walked:
    """One head of keys for each head of queries, one more column of values for the totals."""
    value = _with_ones(value) if totals else value
    key, value, start = (repeated(x, groups) for x in (key, value, state))
    rates = query.new_zeros(query.shape[1]) if rate is None else rate.to(query)
    if form == "recurrent":
        out, state = _recurrent(query, key, value, rates, start)
    elif form == "parallel":
        out, state = _parallel(query, key, value, rates, start)
    elif transformed() or torch.compiler.is_compiling():  # who differentiate for themselves
        out, state = _chunked(query, key, value, rates, start, CHUNK)
    else:
        out, state = _Chunked.apply(query, key, value, rates, start, CHUNK)
    return _split(out, state[:, ::groups], totals)


def _recurrent(query, key, value, rates, state) -> tuple[Tensor, Tensor]:
    decay = torch.exp(-rates)[:, None, None]
    out = []
    for q, k, v in zip(query.unbind(2), key.unbind(2), value.unbind(2), strict=True):
        state = decay * state + k[..., None] * v[..., None, :]
        out.append(q[..., None, :] @ state)
    if not out:
        return value[:, :, :0], state
    return torch.cat(out, 2), state


def _parallel(query, key, value, rates, state) -> tuple[Tensor, Tensor]:
    out, _ = in_parallel(query, key, value, Visible(causal=True), rate=rates)
    tokens = query.shape[2]
    out = out + _powers(rates, 1, tokens + 1)[..., None] * (query @ state)
    left = key * _powers(rates, 0, tokens).flip(1)[..., None]
    return out, torch.exp(-rates * tokens)[:, None, None] * state + left.mT @ value


def _chunked(query, key, value, rates, state, chunk: int) -> tuple[Tensor, Tensor]:
    out = []
    for q, k, v in zip(*(x.split(chunk, 2) for x in (query, key, value)), strict=True):
        c = _Chunk(rates, q.shape[2])
        out.append(c.seen(q @ k.mT) @ v + (c.into * q) @ state)
        state = c.whole * state + (c.left * k).mT @ v
    return torch.cat(out, 2), state


class _Chunked(torch.autograd.Function):
    """`_chunked`, keeping its inputs alone; in operations that can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, query, key, value, rates, state, chunk):
        ctx.chunk = chunk
        ctx.save_for_backward(query, key, value, rates, state)
        return _chunked(query, key, value, rates, state, chunk)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple:  # type: ignore[override]
        query, key, value, rates, state = ctx.saved_tensors
        with no_autocast(query.device):
            pieces = list(
                zip(*(x.split(ctx.chunk, 2) for x in (query, key, value, grad_out)), strict=True)
            )
            of_query = []
            for q, k, v, g in pieces:  # the states come again on the way forward
                c = _Chunk(rates, q.shape[2])
                of_query.append(c.seen(g @ v.mT) @ k + c.into * (g @ state.mT))
                state = c.whole * state + (c.left * k).mT @ v
            of_key, of_value = [], []
            for q, k, v, g in reversed(pieces):
                c = _Chunk(rates, q.shape[2])
                of_key.append(c.seen(g @ v.mT).mT @ q + c.left * (v @ grad_state.mT))
                of_value.append(c.seen(q @ k.mT).mT @ g + (c.left * k) @ grad_state)
                grad_state = c.whole * grad_state + (c.into * q).mT @ g
            grads = (torch.cat(x, 2) for x in (of_query, of_key[::-1], of_value[::-1]))
            return *grads, None, grad_state, None


class _Chunk:
    """What decay does within a chunk of `tokens`: tensors of (H, tokens, 1) and the like."""

    def __init__(self, rates: Tensor, tokens: int):
        self.into = _powers(rates, 1, tokens + 1)[..., None]  # g^a: the state, seen by token a
        self.left = _powers(rates, 0, tokens).flip(1)[..., None]  # g^(m-a): of token a, at the end
        self.whole = torch.exp(-rates * tokens)[:, None, None]
        index = torch.arange(tokens, device=rates.device)
        self.distance = index[:, None] - index
        self.rates = rates

    def seen(self, scores: Tensor) -> Tensor:
        """Decayed, and nothing of what comes later, whatever it is."""
        decay = torch.exp(-self.rates[:, None, None] * self.distance.clamp_min(0))
        return (scores * decay).masked_fill(self.distance < 0, 0)


def _powers(rates: Tensor, first: int, end: int) -> Tensor:
    """g^first ... g^(end - 1): (H, end - first)."""
    return torch.exp(-rates[:, None] * torch.arange(first, end, device=rates.device))


def _with_ones(value: Tensor) -> Tensor:
    return torch.cat([value, value.new_ones((*value.shape[:-1], 1))], -1)


def _split(out: Tensor, state: Tensor, totals: bool) -> Walked:
    return Walked(out[..., :-1], out[..., -1], state) if totals else Walked(out, None, state)


def repeated(x: Tensor, groups: int) -> Tensor:
    """Heads of keys for the heads of queries, each for its group."""
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _state(state: Tensor | None, key: Tensor, value: Tensor, totals: bool) -> Tensor:
    shape = (*key.shape[:2], key.shape[-1], value.shape[-1] + totals)
    if state is None:
        return key.new_zeros(shape)
    heads = state.shape[1] if state.ndim == 4 else 0
    if heads and shape[1] % heads == 0:
        state = repeated(state, shape[1] // heads)
    if tuple(state.shape) != shape:
        raise ValueError(f"state must be {shape}, got {tuple(state.shape)}")
    return state.to(key.dtype)


def check_way(form: str | None, impl: str | None) -> None:
    """Raise ValueError for names of neither."""
    if form not in (None, *FORMS):
        raise ValueError(f"form={form!r} is none of {', '.join(map(repr, FORMS))}")
    if impl not in (None, *IMPLS):
        raise ValueError(f"impl={impl!r} is none of {', '.join(map(repr, IMPLS))}")


def _check(query, key, value, rate, form, impl, same_length: bool = True) -> None:
    check_way(form, impl)
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"query, key and value must be (B, H, T, D): {shapes}")
    if key.shape[:-1] != value.shape[:-1] or query.shape[0] != key.shape[0]:
        raise ValueError(f"key and value need the same (B, Hkv, T), and B is the query's: {shapes}")
    if query.shape[-1] != key.shape[-1] or (same_length and query.shape[2] != key.shape[2]):
        raise ValueError(f"query and key need one T and one D: {shapes}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"H must be divisible by Hkv: {shapes}")
    if rate is not None:
        if tuple(rate.shape) != (query.shape[1],):
            raise ValueError(f"rate must be (H,) = ({query.shape[1]},), got {tuple(rate.shape)}")
        if rate.requires_grad:
            raise ValueError("rate is a constant: there is no gradient for it")
        if not torch.compiler.is_compiling() and not transformed() and (rate < 0).any():
            raise ValueError(f"rate must not be negative, got {rate.min().item():g}")
