"""Cross-entropy of an output layer, without its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aftermax import reference
from aftermax.kernels.ops import REDUCTIONS, linear_gradients
from aftermax.losses.cross_entropy import (
    call,
    check_options,
    check_targets,
    class_weights,
)
from aftermax.rows import PLAIN_IMPLS, use_kernels


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """cross_entropy(hidden weight^T + bias, target), where the logits never exist as a whole.

    Where a gradient is wanted and the loss is one number, the kernel makes it together with the
    loss: the logits of some rows at a time, which turn into their gradient where they stand. Three
    products of the size of the logits in all, as in the separate calls, without their memory.
    Otherwise (no gradient, reduction="none", half precision, a second backward pass over a retained
    graph, inside torch.compile) it walks blocks of classes and makes the logits again in the
    backward pass. The sums run in an order that does not depend on the number of threads.

    Args:
        hidden: (..., D); float32, bfloat16 and float16 run on the kernel (in float32 inside).
        weight: (C, D), in the dtype of `hidden` (`torch.nn.functional.linear_cross_entropy` calls
            it `linear_weight`).
        target: (...), int64 classes.
        bias: (C,), in the dtype of `hidden`.
        class_weight: (C,), a weight for each class; no gradient. (`weight` in torch's.)
        ignore_index, label_smoothing, lse_square_scale, reduction: as `cross_entropy`. Rows that
            are ignored cost nothing.
        impl: "reference" (blocks of rows, checkpointed), "cpu", or None to pick.

    Returns:
        As `cross_entropy`, in the dtype of `hidden`.

    Raises:
        As `cross_entropy`.

    >>> hidden, weight = torch.eye(3), 2 * torch.eye(3)
    >>> linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2]))
    tensor(0.2395)
    """
    check_options("linear_cross_entropy", reduction, label_smoothing, lse_square_scale)
    _check_shapes(hidden, weight, target, bias, class_weight)
    given = [t for t in (hidden, weight, bias) if t is not None]
    rows = hidden.reshape(target.numel(), hidden.shape[-1])
    flat = target.reshape(-1).contiguous()
    if not use_kernels("linear_cross_entropy", impl, PLAIN_IMPLS, *given):
        loss = reference.linear_cross_entropy(
            rows,
            weight,
            flat,
            bias=bias,
            class_weight=class_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            lse_square_scale=lse_square_scale,
            reduction=reduction,
        )
    else:
        tensors = (
            _unit_stride(rows),
            _unit_stride(weight),
            hidden.new_empty((0,)) if bias is None else bias.contiguous(),
            flat,
            class_weights(class_weight, hidden),
        )
        options = (ignore_index, label_smoothing, lse_square_scale, REDUCTIONS.index(reduction))
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        one_go = hidden.dtype == torch.float32 and reduction != "none"
        if differentiable and one_go and not torch.compiler.is_compiling():
            loss = _WithGradients.apply(*tensors, *options)
        else:
            op = torch.ops.aftermax.linear_cross_entropy.default
            loss, _ = call(op, *tensors, *options)
    if reduction == "none":
        loss = loss.reshape(target.shape)
    return loss.to(hidden.dtype)


class _WithGradients(torch.autograd.Function):
    """The loss, its gradients made along with it and scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        tensors, ctx.options = inputs[:5], list(inputs[5:])
        wanted = ctx.needs_input_grad[:3]
        op = torch.ops.aftermax.linear_cross_entropy_gradients.default
        loss, lse, *ctx.gradients = call(op, *tensors, *ctx.options, *wanted)
        ctx.save_for_backward(*tensors, lse)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        wanted = ctx.needs_input_grad[:3]
        # saved_tensors first: it raises where an input was changed or the graph is gone
        saved, gradients, ctx.gradients = ctx.saved_tensors, ctx.gradients, None
        if gradients is None or torch.is_grad_enabled():
            out = linear_gradients(grad, saved, ctx.options, wanted)
        else:  # they belong to nobody else yet, so they are scaled where they stand
            out = tuple(
                (g if grad == 1 else g.mul_(grad)) if w else None
                for g, w in zip(gradients, wanted, strict=True)
            )
        return (*out, *(None,) * 6)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_shapes(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None
) -> None:
    name = "linear_cross_entropy"
    if hidden.ndim == 0 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)};"
            " (..., D) and (C, D) would be right"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: target {tuple(target.shape)} for hidden {tuple(hidden.shape)};"
            f" {tuple(hidden.shape[:-1])} would be right"
        )
    classes = weight.shape[0]
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"{name}: bias is {tuple(bias.shape)}; ({classes},) would be right")
    for other, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != hidden.dtype or tensor.device != hidden.device):
            raise ValueError(
                f"{name}: {other} is {tensor.dtype} on {tensor.device}, hidden {hidden.dtype} on"
                f" {hidden.device}; they must agree"
            )
    check_targets(name, target, classes, class_weight)
