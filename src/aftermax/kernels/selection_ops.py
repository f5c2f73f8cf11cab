"""The operators of the selection by threshold: schema, fake, autograd, for `aftermax.sparse`.

Scores are float64 (rows, items): `carried` ones, then one for each query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Thresholds = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""tau and fractions (rows, queries); leaves_ones, leaves_top and leaves_support (rows, items);
capped (rows,)."""


def fake(scores: Tensor, k: float, top: int, carried: int, cap: int) -> Thresholds:
    rows, items = scores.shape
    tau = scores.new_empty((rows, items - carried))
    number = torch.empty_like(tau, dtype=torch.int64)
    leaves = [torch.empty_like(scores, dtype=torch.int64) for _ in range(3)]
    return tau, number, leaves[0], leaves[1], leaves[2], number.new_empty((rows,))


def setup(ctx: Any, inputs: tuple, output: Thresholds) -> None:
    ctx.carried = inputs[3]
    _, fractions, ones, _, support, _ = output
    ctx.save_for_backward(fractions, ones, support)


def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    fractions, ones, support = ctx.saved_tensors
    graph = torch.is_grad_enabled() and grad.requires_grad
    walk = through_sums if graph else torch.ops.aftermax.thresholds_backward.default
    return walk(grad.contiguous(), fractions, ones, support, ctx.carried), None, None, None, None


def through_sums(
    grad: Tensor, fractions: Tensor, ones: Tensor, support: Tensor, carried: int
) -> Tensor:
    """The gradient of the scores in plain torch, which has a gradient itself: each score is a
    fraction from one query to another, and has 1 / fractions of tau's gradient in each."""
    each = (grad / fractions.clamp_min(1)).masked_fill(fractions == 0, 0)
    before = torch.nn.functional.pad(each.cumsum(-1), (1, 0))
    return before.gather(-1, support) - before.gather(-1, ones)


def fake_backward(
    grad: Tensor, fractions: Tensor, ones: Tensor, support: Tensor, carried: int
) -> Tensor:
    return grad.new_empty(ones.shape)


def fake_spans(start: Tensor, stop: Tensor, block: int, blocks: int, width: int) -> Tensor:
    return start.new_empty((start.shape[0], blocks, width))


def schemas() -> dict[str, tuple]:
    """name -> schema, fake, setup, backward."""
    return {
        "thresholds": (
            "(Tensor scores, float k, int top, int carried, int cap)"
            " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
            fake, setup, backward,
        ),
        "thresholds_backward": (
            "(Tensor grad, Tensor fractions, Tensor ones, Tensor support, int carried) -> Tensor",
            fake_backward,
        ),
        "spans": (
            "(Tensor start, Tensor stop, int block, int blocks, int width) -> Tensor", fake_spans
        ),
    }  # fmt: skip
