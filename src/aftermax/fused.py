"""The dense walk on the compiled kernels: a checked call becomes the operators' arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aftermax import blocks, kernels, scores
from aftermax.call import Call
from aftermax.kernels.attention_ops import MAPS, Differentiable
from aftermax.reference import NOT_IN_ONNX, onnx_export, transformed
from aftermax.visible import Visible, hidden_below
from aftermax.weights.row_map import RowMap

CPU = torch.device("cpu")
EMPTY = "there is nothing to compute"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(call: Call) -> str | None:
    """Why the kernels cannot do what is asked, or None where they can."""
    if kernels.absent() is not None:
        return kernels.absent()
    query, visible = call.query, call.visible
    if query.device.type != "cpu":
        return f"the query is on {query.device}, not on the CPU"
    if query.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {query.dtype}"
    if any(x.layout is not torch.strided for x in (query, call.key, call.value)):
        return "the kernels take strided tensors"
    if call.dropout_p > 0:
        return "the kernels have no dropout"
    if transformed():
        return "the kernels know no torch.func transforms and no forward-mode derivatives"
    if onnx_export():
        return NOT_IN_ONNX
    if torch.is_grad_enabled():
        for name, x in (("attn_mask", visible.mask), ("the ALiBi slopes", visible.slopes)):
            if x is not None and x.requires_grad:
                return f"the kernels have no gradient for {name}"
    if not _says_how(type(call.weights)):
        return f"there is no kernel for {type(call.weights).__name__}"
    if not all((query.numel(), call.key.numel(), call.value.numel())):
        return EMPTY
    return None


def _says_how(kind: type[RowMap]) -> bool:
    """Whether the class's `fused` speaks of its own formula, and not of one that it has changed."""
    if kind.prepare not in (scores.dot, scores.cosine):
        return False
    owner = next(c for c in kind.__mro__ if "fused" in vars(c) or "weigh" in vars(c))
    return owner is not RowMap and "fused" in vars(owner)


def description(call: Call) -> str:
    """What runs where nothing is refused."""
    return f"cpu: {type(call.weights).__name__} on the {kernels.isa()} kernels"


def attend(call: Call) -> Tensor:
    """(B, H, Tq, Dv) in the dtype of the query. `refusal` has been asked before."""
    weights, dtype = call.weights, call.query.dtype
    finishes = type(weights).finish is not RowMap.finish
    tensors = [call.query, call.key, call.value]
    if finishes:  # what is rounded, is rounded after it
        tensors = [x.float() for x in tensors]
    out = _walk(call, *(x if x.stride(-1) == 1 else x.contiguous() for x in tensors))
    if not finishes:
        return out
    poisoned = out.isnan().any(-1, keepdim=True)
    if weights.mixes_heads:
        poisoned = poisoned.any(1, keepdim=True)
    out = weights.finish(out.masked_fill(poisoned, 0), **call.learned)
    return out.masked_fill(poisoned, torch.nan).to(dtype)


def _walk(call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    visible = call.visible
    batch, heads, queries, _ = query.shape
    lengths = _Lengths(visible, batch, heads, queries, key.shape[2])
    fused = call.weights.fused(lengths, **call.learned)
    for name in ("row_bias", "row_weight", "row_power", "count", "by_distance"):
        x = getattr(fused, name)
        if x is not None and x.requires_grad:
            raise RuntimeError(
                f"the kernels have no gradient for {name} of {type(call.weights).__name__}"
            )
    nothing = query.new_empty((0,), dtype=torch.float32)
    mask, limit = _mask(visible, nothing)
    tensors = (
        query,
        key,
        value,
        mask,
        nothing if visible.slopes is None else visible.slopes.float().contiguous(),
        nothing if fused.by_distance is None else fused.by_distance.contiguous(),
        *(
            nothing if rows is None else _of_rows(rows, batch, heads, queries)
            for rows in (
                fused.row_scale,
                fused.row_bias,
                fused.row_weight,
                fused.row_power,
                fused.count,
            )
        ),
        nothing if fused.sink is None else fused.sink.float().contiguous(),
    )
    options = (
        MAPS.index(fused.map),
        call.weights.prepare is scores.cosine,
        visible.causal,
        visible.offset,
        visible.window or 0,
        limit,
        0 if fused.by_distance is None else queries - 1 + visible.offset,
        float(call.scale),
        float(fused.power),
    )
    ops = torch.ops.aftermax
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        # tracing takes the operator as it is registered, with what torch does around it
        differentiable = ops.attention if torch.compiler.is_compiling() else Differentiable.apply
        return differentiable(*tensors, *options)[0]
    return ops.attention_forward.default(*tensors, *options)


def _of_rows(rows: Tensor, batch: int, heads: int, queries: int) -> Tensor:
    rows = rows.float().expand(batch, heads, queries)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _mask(visible: Visible, nothing: Tensor) -> tuple[Tensor, float]:
    """Bool or float32, in four dimensions; and the number up to which it hides."""
    mask = visible.mask
    if mask is None:
        return nothing, 0.0
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if stride == 0 and size > 1:  # what was expanded stays small
            mask = mask.narrow(dim, 0, 1)
    if mask.dtype == torch.bool:
        return mask, 0.0
    return mask.float(), hidden_below(mask.dtype)


@dataclass(frozen=True)
class _Lengths:
    """What a row map may ask about the rows of a call; nothing is counted that is not asked for."""

    visible: Visible
    batch: int
    heads: int
    queries: int
    keys: int

    def of_rows(self) -> Tensor:
        visible = self.visible
        if visible.mask is None:
            return self._without_mask()
        mask, limit = _mask(visible, torch.empty(0, device=CPU))
        options = (visible.causal, visible.offset, visible.window or 0, limit)
        sizes = (mask.shape[0], mask.shape[1], self.queries, self.keys)
        return torch.ops.aftermax.count_visible(mask, *options, *sizes)

    def _without_mask(self) -> Tensor:
        visible, keys = self.visible, self.keys
        position = torch.arange(self.queries, device=CPU) + visible.offset
        first, last = torch.zeros_like(position), torch.full_like(position, keys)
        if visible.window is not None:
            first = (position - visible.window + 1).clamp_min(0)
            last = (position + visible.window).clamp_max(keys)
        if visible.causal:
            last = last.clamp_max(position + 1)
        return (last - first).clamp_min(0).float()[None, None]

    def of_sequence(self) -> Tensor:
        block = max(1, blocks.BLOCK_SCORES // max(1, self.batch * self.heads * self.keys))
        seen = self.visible.seen_by_any(self.queries, self.keys, block, CPU, torch.float32)
        return seen[..., 0]

    def distances(self) -> Tensor:
        offset = self.visible.offset
        return torch.arange(-(self.queries - 1 + offset), self.keys - offset, device=CPU)
