"""The operators of the experts: schema, fake, autograd. `aftermax.moe.expert_layer` calls them.

Where there is no bias, an empty tensor stands in its place; 0 is no capacity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ARGUMENTS = (
    "Tensor x, Tensor index, Tensor weights, Tensor w1, Tensor b1, Tensor w2, Tensor b2,"
    " int capacity, float capacity_factor"
)
TENSOR_COUNT = 7
WANTED = "bool for_x, bool for_weights, bool for_w1, bool for_b1, bool for_w2, bool for_b2"
DIFFERENTIABLE = (0, 2, 3, 4, 5, 6)
"""All tensors but the index."""


def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    capacity: int | None,
    capacity_factor: float | None,
) -> Tensor:
    """(tokens, D) of checked tensors of one dtype; float32 weights and int64 index (tokens, k)."""
    tensors = (
        _rows_whole(x),
        index.contiguous(),
        weights.contiguous(),
        _rows_whole(w1),
        x.new_empty(0) if b1 is None else b1.contiguous(),
        _rows_whole(w2),
        x.new_empty(0) if b2 is None else b2.contiguous(),
    )
    options = (capacity or 0, capacity_factor or 0.0)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return torch.ops.aftermax.experts_forward.default(*tensors, *options)
    if torch.compiler.is_compiling():
        return torch.ops.aftermax.experts.default(*tensors, *options)[0]
    return Differentiable.apply(*tensors, *options)


class Differentiable(torch.autograd.Function):
    """The operator with its graph, without what torch does around operators. Not for tracing."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = torch.ops.aftermax.experts.default(*inputs)
        setup(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return backward(ctx, grad)


def setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[TENSOR_COUNT:]
    ctx.save_for_backward(*inputs[:TENSOR_COUNT], output[1])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "experts: the kernel's gradients have no gradient themselves (create_graph=True);"
            " impl='reference' has"
        )
    out: list[Tensor | None] = [None] * (TENSOR_COUNT + 2)
    if grad is None:
        return tuple(out)
    *tensors, saved = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
    grads = torch.ops.aftermax.experts_backward.default(
        _rows_whole(grad), saved, *tensors, *ctx.options, *wanted
    )
    for i, wants, each in zip(DIFFERENTIABLE, wanted, grads, strict=True):
        out[i] = each if wants else None
    return tuple(out)


def _rows_whole(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def fake_forward(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def fake(x: Tensor, index: Tensor, weights: Tensor, w1: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    saved = x.new_empty((index.shape[0] * index.shape[1], w1.shape[1]), dtype=torch.float32)
    return fake_forward(x), saved


def fake_backward(grad: Tensor, saved: Tensor, *call: Any) -> tuple[Tensor, ...]:
    wanted = call[-len(DIFFERENTIABLE) :]
    return tuple(
        call[i].new_empty(call[i].shape if wants else (0,))
        for i, wants in zip(DIFFERENTIABLE, wanted, strict=True)
    )


def schemas() -> dict[str, tuple]:
    """name -> schema, fake, setup, backward."""
    return {
        "experts": (f"({ARGUMENTS}) -> (Tensor, Tensor)", fake, setup, backward),
        # the same without what a backward pass needs
        "experts_forward": (f"({ARGUMENTS}) -> Tensor", fake_forward),
        "experts_backward": (
            f"(Tensor grad, Tensor saved, {ARGUMENTS}, {WANTED})"
            " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
            fake_backward,
        ),
    }
