"""Cross-entropy of an output layer, without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from aftermax import reference
from aftermax.kernels.ops import REDUCTIONS
from aftermax.losses.cross_entropy import IMPLS, check_options, check_targets, class_weights
from aftermax.rows import use_kernels


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

    The kernel walks blocks of classes: forward it keeps the logsumexp of each row, backward it
    makes each block of logits again (four products of the size of the logits in all, where the
    separate calls take three and the memory). The sums run in an order that does not depend on the
    number of threads.

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
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat = target.reshape(-1).contiguous()
    if not use_kernels("linear_cross_entropy", impl, IMPLS, *given):
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
        loss, _ = torch.ops.aftermax.linear_cross_entropy(
            _unit_stride(rows),
            _unit_stride(weight),
            hidden.new_empty((0,)) if bias is None else bias.contiguous(),
            flat,
            class_weights(class_weight, hidden),
            ignore_index,
            label_smoothing,
            lse_square_scale,
            REDUCTIONS.index(reduction),
        )
    if reduction == "none":
        loss = loss.reshape(target.shape)
    return loss.to(hidden.dtype)


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
