"""The row functions in plain torch: what the kernels of `aftermax.rows` and `losses` compute.

Half precision is computed in float32 and rounded once. Everything runs on every device and in
float64, where it is exact to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

NOT_IN_ONNX = "ONNX has no operator for the kernels"
BLOCK_LOGITS = 2**22
"""Logits that one block of `linear_cross_entropy` may hold: 16 MiB in float32."""


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: the kernels know neither."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def onnx_export() -> bool:
    """Whether `torch.onnx.export` is tracing: ONNX knows none of the kernels' operators, and a
    length that stays open decides no loop."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def softmax(input: Tensor, dim: int, empty: str = "nan") -> Tensor:
    x = at_least_float32(input)
    if empty == "zero" and x.numel():
        nothing = (x == -torch.inf).all(dim, keepdim=True)
        out = x.masked_fill(nothing, 0).softmax(dim).masked_fill(nothing, 0)
    else:
        out = x.softmax(dim)
    return out.to(input.dtype)


def log_softmax(input: Tensor, dim: int) -> Tensor:
    return at_least_float32(input).log_softmax(dim).to(input.dtype)


def logsumexp(input: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    return at_least_float32(input).logsumexp(dim, keepdim).to(input.dtype)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    x = at_least_float32(logits)
    probabilities = target.is_floating_point()
    loss = F.cross_entropy(
        x,
        target.to(x.dtype) if probabilities else target,
        weight=None if weight is None else weight.to(x.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    if lse_square_scale:
        square = lse_square_scale * x.logsumexp(1 if x.ndim > 1 else 0).square()
        counts = torch.ones_like(square) if probabilities else (target != ignore_index)
        square = torch.where(counts != 0, square, 0)
        if reduction == "mean":
            square = square.sum() / counts.sum().to(square.dtype)
        elif reduction == "sum":
            square = square.sum()
        loss = loss + square
    return loss.to(logits.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """In blocks of rows: the logits of one block exist at a time, forward and backward."""
    out_dtype = hidden.dtype
    hidden, weight = at_least_float32(hidden), at_least_float32(weight)
    bias = None if bias is None else at_least_float32(bias)
    class_weight = None if class_weight is None else class_weight.to(hidden.dtype)

    def block(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight, bias)
        loss = cross_entropy(
            logits,
            target,
            weight=class_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        if not lse_square_scale:
            return loss, torch.zeros_like(loss)
        square = lse_square_scale * logits.logsumexp(1).square()
        return loss, torch.where(target != ignore_index, square, 0)

    step = max(1, BLOCK_LOGITS // max(1, weight.shape[0]))
    blocks = [
        # torch.func knows no checkpoints: there the logits of all blocks are kept
        block(h, t) if transformed() else checkpoint(block, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(step), target.split(step), strict=True)
    ]
    loss, square = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    if reduction == "none":
        return (loss + square).to(out_dtype)
    total = loss.sum()
    squares = square.sum()
    if reduction == "mean":
        counts = target != ignore_index
        if class_weight is None:
            total = total / counts.sum().to(total.dtype)
        else:
            # a target that is ignored may be no class at all
            total = total / class_weight[torch.where(counts, target, 0)][counts].sum()
        squares = squares / counts.sum().to(total.dtype)
    if lse_square_scale:
        total = total + squares
    return total.to(out_dtype)
