"""The operators of attention: schema, fake, autograd. `aftermax.fused` calls them.

A call is twelve tensors (those that are not there are empty) and nine options. Its second result,
`stats`, holds four numbers for each row, its third what some maps need besides; both are there for
the backward pass alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MAPS = ("softmax", "sigmoid", "relu", "softplus", "lssar", "clipped")
"""By their numbers in the library (`am_row_map`)."""

SUMS_TWICE = ("lssar", "clipped")
"""The maps whose backward pass needs a second weighted sum of the values."""

TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor mask, Tensor slopes, Tensor distance,"
    " Tensor row_scale, Tensor row_bias, Tensor row_weight, Tensor row_power, Tensor count,"
    " Tensor sink"
)
OPTIONS = (
    "int map, bool cosine, bool causal, SymInt offset, SymInt window, float hidden_below,"
    " SymInt zero, float scale, float power"
)
ROW_SCALE, SINK, TENSOR_COUNT = 6, 11, 12
STATS = 4


def empty_heads(like: Tensor, *sizes: int) -> Tensor:
    """(B, H, T, D), its tokens before its heads in memory if `like` has them so."""
    if like.shape[1] > 1 and like.shape[2] > 1 and like.stride(1) < like.stride(2):
        batch, heads, tokens, width = sizes
        return like.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    return like.new_empty(sizes)


def fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return empty_heads(query, *query.shape[:3], value.shape[-1])


def fake(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = fake_forward(query, key, value)
    stats = query.new_empty((*query.shape[:3], STATS), dtype=torch.float32)
    twice = MAPS[others[TENSOR_COUNT - 3]] in SUMS_TWICE  # the first option
    extra = query.new_empty(out.shape if twice else (0,), dtype=torch.float32)
    return out, stats, extra


def fake_backward(grad: Tensor, out: Tensor, stats: Tensor, extra: Tensor, *call: Any) -> tuple:
    row_scale = call[ROW_SCALE]
    return (
        *(empty_heads(x, *x.shape) for x in call[:3]),
        row_scale.new_empty(row_scale.shape if row_scale.numel() else (0,)),
    )


def fake_count(mask: Tensor, *options: Any) -> Tensor:
    return mask.new_empty(options[4:7], dtype=torch.float32)


def setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.options = inputs[TENSOR_COUNT:]
    ctx.save_for_backward(*inputs[:TENSOR_COUNT], *output)


class Differentiable(torch.autograd.Function):
    """The operator `attention` with its graph, without what torch does around operators.

    That would be the larger part of a small call. Not for tracing.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = torch.ops.aftermax.attention.default(*inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        return backward(ctx, *grads)


def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "attention: the kernels' gradients have no gradient themselves (create_graph=True);"
            " impl='reference' has"
        )
    if grad is None:  # nothing came from above
        return (None,) * (TENSOR_COUNT + len(ctx.options))
    *tensors, out, stats, extra = ctx.saved_tensors
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    of_query, of_key, of_value, of_scale = torch.ops.aftermax.attention_backward.default(
        grad, out, stats, extra, *tensors, *ctx.options
    )
    grads: list[Tensor | None] = [of_query, of_key, of_value]
    grads += [None] * (TENSOR_COUNT - 3 + len(ctx.options))
    if ctx.needs_input_grad[ROW_SCALE]:
        grads[ROW_SCALE] = of_scale
    if ctx.needs_input_grad[SINK]:
        grads[SINK] = sink_gradient(tensors[SINK], grad, out, stats)
    return tuple(grads)


def sink_gradient(sink: Tensor, grad: Tensor, out: Tensor, stats: Tensor) -> Tensor:
    """-sum_i w_i0 (grad_i . out_i), w_i0 the weight of the sink in row i."""
    factor, exponent, shift, _ = stats.double().unbind(-1)
    weight = factor * (sink.double()[:, None] - shift - exponent * math.log(2)).exp()
    moved = weight * (grad.double() * out.double()).sum(-1)
    # rows that gave NaN for what they saw have no gradient
    return -moved.masked_fill(factor.isnan(), 0).sum((0, 2)).to(sink.dtype)


def schemas() -> dict[str, tuple]:
    """name -> schema, fake, setup, backward."""
    return {
        "attention": (
            f"({TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
            fake,
            setup,
            backward,
        ),
        # the same without what a backward pass needs
        "attention_forward": (f"({TENSORS}, {OPTIONS}) -> Tensor", fake_forward),
        "attention_backward": (
            f"(Tensor grad, Tensor out, Tensor stats, Tensor extra, {TENSORS}, {OPTIONS})"
            " -> (Tensor, Tensor, Tensor, Tensor)",
            fake_backward,
        ),
        "count_visible": (
            "(Tensor mask, bool causal, SymInt offset, SymInt window, float hidden_below,"
            " SymInt batch, SymInt heads, SymInt queries, SymInt keys) -> Tensor",
            fake_count,
        ),
    }
