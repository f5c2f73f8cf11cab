"""The operators of the linear walk: schema, fake, autograd. `aftermax.linear.walk` calls them.

What is not there (no rate, no totals) is an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aftermax.kernels.attention_ops import empty_heads

TENSORS = "Tensor query, Tensor key, Tensor value, Tensor rate, Tensor state, bool totals"


def walk(
    query: Tensor, key: Tensor, value: Tensor, rate: Tensor | None, state: Tensor, totals: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(out, total, new state) of checked float32 tensors."""
    rate = query.new_empty((0,)) if rate is None else rate.to(query).contiguous()
    tensors = (*(_side_by_side(x) for x in (query, key, value)), rate, state.contiguous())
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if wants and not torch.compiler.is_compiling():
        out, total, state = Differentiable.apply(*tensors, totals)
    else:
        out, total, state = torch.ops.aftermax.linear_walk.default(*tensors, totals)
    return out, total if totals else None, state


class Differentiable(torch.autograd.Function):
    """The operator with its graph, without what torch does around operators. Not for tracing."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = torch.ops.aftermax.linear_walk.default(*inputs)
        ctx.set_materialize_grads(False)
        setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        return backward(ctx, *grads)


def setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.totals = inputs[5]
    ctx.save_for_backward(*inputs[:5])


def backward(
    ctx: Any, grad: Tensor | None, of_total: Tensor | None, of_new_state: Tensor | None
) -> tuple:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "walk: the kernel's gradients have no gradient themselves (create_graph=True);"
            " impl='reference' has"
        )
    query, key, value, rate, state = ctx.saved_tensors
    totals = query.shape[:3] if ctx.totals else (0,)
    grads = (
        query.new_zeros(*query.shape[:3], value.shape[-1]) if grad is None else _side_by_side(grad),
        query.new_zeros(totals) if of_total is None else of_total.contiguous(),
        query.new_empty(0) if of_new_state is None else of_new_state.contiguous(),
    )
    of_query, of_key, of_value, of_state = torch.ops.aftermax.linear_walk_backward.default(
        *grads, query, key, value, rate, state, ctx.totals
    )
    return of_query, of_key, of_value, None, of_state, None


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def fake(
    query: Tensor, key: Tensor, value: Tensor, rate: Tensor, state: Tensor, totals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out = empty_heads(query, *query.shape[:3], value.shape[-1])
    return out, query.new_empty(query.shape[:3] if totals else (0,)), torch.empty_like(state)


def fake_backward(grad, of_total, of_new_state, query, key, value, rate, state, totals) -> tuple:
    return (*(empty_heads(x, *x.shape) for x in (query, key, value)), torch.empty_like(state))


def schemas() -> dict[str, tuple]:
    """name -> schema, fake, setup, backward."""
    return {
        "linear_walk": (f"({TENSORS}) -> (Tensor, Tensor, Tensor)", fake, setup, backward),
        "linear_walk_backward": (
            f"(Tensor grad, Tensor grad_total, Tensor grad_state, {TENSORS})"
            " -> (Tensor, Tensor, Tensor, Tensor)",
            fake_backward,
        ),
    }
