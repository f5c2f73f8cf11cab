"""Cross-entropy from logits: one read of them forward, one read and one write backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aftermax import reference
from aftermax.kernels.ops import REDUCTIONS
from aftermax.rows import PLAIN_IMPLS, log_softmax, logsumexp, use_kernels


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    reduction: str = "mean",
    inplace_backward: bool = False,
    impl: str | None = None,
) -> Tensor:
    """loss_i = (1 - s) w_t (lse_i - x_t) + s/C sum_k w_k (lse_i - x_k) + z lse_i^2

    with lse_i = logsumexp of row i, t its target, w the class weights, s = `label_smoothing` and
    z = `lse_square_scale`. The first two terms are `torch.nn.functional.cross_entropy`.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), as in torch; any strides.
        target: classes, int64 of shape (), (N,) or (N, d1, ...); or probabilities in the shape of
            the input (these run on the `log_softmax` kernel, not in one read).
        weight: (C,), a weight for each class.
        ignore_index: rows with this target count for nothing.
        label_smoothing: s in [0, 1] (arXiv:1512.00567).
        lse_square_scale: z >= 0. Trainers call this term "z-loss" (1e-4 in PaLM, arXiv:2204.02311,
            section 5); it is not the Z-loss of arXiv:1604.08859. 0 by default.
        reduction: "mean" (the first two terms over the sum of w_t, the last over the number of rows
            that count), "sum" or "none".
        inplace_backward: write the gradient over the logits in the backward pass (the name is
            flash-attn's). It saves a tensor of their size, and on a CPU most of the time, which
            goes into the pages of fresh memory. The logits are gone then; what else needs them
            backward raises torch's error for tensors modified in place. Where the kernels do not
            run, with probabilities as targets, for expanded logits, under `torch.compile`, and
            where a graph of the gradient or many gradients at once are asked for, the gradient is
            a new tensor as ever.
        impl: "reference", "cpu", or None to pick.

    Returns:
        A scalar, or the shape of `target` with "none", in the dtype of `input`. As in torch, the
        mean over nothing is NaN, and so is the loss of a row that holds NaN or +inf.

    Raises:
        ValueError: for shapes, a `reduction` or an `impl` that do not fit, and for
            `inplace_backward` on a leaf or a view of one, whose values would be lost.
        IndexError: for a target that is no class.

    >>> logits = torch.tensor([[2.0, 0.0, 0.0]])
    >>> cross_entropy(logits, torch.tensor([0]))
    tensor(0.2395)
    >>> cross_entropy(logits, torch.tensor([0]), lse_square_scale=0.1)
    tensor(0.7411)
    """
    check_options("cross_entropy", reduction, label_smoothing, lse_square_scale)
    dim = _check_shapes(input, target, weight)
    kernel = use_kernels("cross_entropy", impl, PLAIN_IMPLS, input)
    options = (ignore_index, label_smoothing, lse_square_scale)
    if kernel and target.is_floating_point():
        return _soft_target(input, target, weight, dim, *options[1:], reduction)
    if not kernel:
        return reference.cross_entropy(
            input,
            target,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            lse_square_scale=lse_square_scale,
            reduction=reduction,
        )
    ops = torch.ops.aftermax
    inplace = inplace_backward and not torch.compiler.is_compiling()  # which plans its own memory
    if inplace and torch.is_grad_enabled() and _lies_in_a_leaf(input):
        raise ValueError(
            "cross_entropy: inplace_backward writes over the logits, and these are a leaf, or a"
            " view of one, which wants its gradient beside its values"
        )
    loss, _ = call(
        (ops.cross_entropy_inplace if inplace else ops.cross_entropy).default,
        input,
        target.contiguous(),
        class_weights(weight, input),
        dim,
        *options,
        REDUCTIONS.index(reduction),
    )
    if reduction == "none":
        loss = loss.reshape(target.shape)
    return loss.to(input.dtype)


def _soft_target(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dim: int,
    label_smoothing: float,
    lse_square_scale: float,
    reduction: str,
) -> Tensor:
    """The loss against probabilities: the smoothed target times -log softmax, summed."""
    classes = input.shape[dim]
    x = reference.at_least_float32(input)
    smoothed = (1 - label_smoothing) * target.to(x.dtype) + label_smoothing / max(classes, 1)
    if weight is not None:
        smoothed = smoothed * weight.to(x.dtype).reshape(-1, *(1,) * (input.ndim - dim - 1))
    rows = -(smoothed * log_softmax(x, dim)).sum(dim)
    if lse_square_scale:
        rows = rows + lse_square_scale * logsumexp(x, dim).square()
    if reduction == "mean":
        rows = rows.mean()
    elif reduction == "sum":
        rows = rows.sum()
    return rows.to(input.dtype)


def _lies_in_a_leaf(x: Tensor) -> bool:
    whole = x._base if x._is_view() and x._base is not None else x
    return whole.is_leaf and whole.requires_grad


def call(op: Callable[..., Any], *inputs: Any) -> Any:
    """The operator's result; a target that is no class raises IndexError, as in torch."""
    if torch.compiler.is_compiling():
        return op(*inputs)
    try:
        return op(*inputs)
    except RuntimeError as error:
        if "is out of bounds" not in str(error):
            raise
        raise IndexError(str(error).split("\n")[0]) from None


def check_options(
    name: str, reduction: str, label_smoothing: float, lse_square_scale: float
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{name}: reduction={reduction!r} is none of {', '.join(map(repr, REDUCTIONS))}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing={label_smoothing} is not within [0, 1]")
    if not lse_square_scale >= 0:
        raise ValueError(f"{name}: lse_square_scale={lse_square_scale} is below 0")


def class_weights(weight: Tensor | None, like: Tensor) -> Tensor:
    """The weights as the operators take them: contiguous float32, empty where there are none."""
    if weight is None:
        return like.new_empty((0,), dtype=torch.float32)
    return weight.detach().to(torch.float32).contiguous()


def check_targets(name: str, target: Tensor, classes: int, weight: Tensor | None) -> None:
    if target.dtype != torch.int64:
        raise ValueError(f"{name}: target holds {target.dtype}; classes come as int64")
    if weight is not None and weight.shape != (classes,):
        raise ValueError(
            f"{name}: weight is {tuple(weight.shape)}; one number for each of {classes} classes"
            f" would be ({classes},)"
        )


def _check_shapes(input: Tensor, target: Tensor, weight: Tensor | None) -> int:
    """The dimension of the classes."""
    shape, given = tuple(input.shape), tuple(target.shape)
    if input.ndim == 0:
        raise ValueError("cross_entropy: input is a scalar; logits are (C,), (N, C) or (N, C, ...)")
    dim = 0 if input.ndim == 1 else 1
    classes = shape[dim]
    if target.is_floating_point():
        if given != shape:
            raise ValueError(
                f"cross_entropy: target {given} holds probabilities, which come in the shape of the"
                f" input, {shape}"
            )
        if weight is not None and weight.shape != (classes,):
            raise ValueError(f"cross_entropy: weight is {tuple(weight.shape)}, not ({classes},)")
        return dim
    fits = shape[:dim] + shape[dim + 1 :]
    if given != fits:
        raise ValueError(f"cross_entropy: target {given} for input {shape}; {fits} would be right")
    check_targets("cross_entropy", target, classes, weight)
    return dim
