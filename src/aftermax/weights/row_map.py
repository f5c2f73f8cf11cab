"""What every row map is: a small frozen value that turns a row of scores into a row of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aftermax import scores
from aftermax.visible import Rows


@dataclass(frozen=True)
class RowMap:
    """scores -> weights, row by row. `attention(weights=...)` takes one of these.

    A subclass is the value object of one system: its fields are the constants of its formula, and
    `weigh` calls the pure function beside it, where the mathematics stands. What a formula learns
    (a sink, a gate, a scale) is no field: `learned` names it with its initial value, the module in
    `modules.py` owns it, and `attention` takes it by keyword.
    """

    prepare: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(scores.dot)
    """What happens to queries and keys before they are compared."""
    scale: ClassVar[Callable[[int], float]] = staticmethod(scores.inv_sqrt_dim)
    """The default factor of the scores, from the head width."""
    needs_sequence_count: ClassVar[bool] = False
    """Whether `Rows.sequence` must be filled in."""
    mixes_heads: ClassVar[bool] = False
    """Whether `finish` lets the heads of a token meet: what is NaN in one is then NaN in all."""

    def weigh(self, scores: Tensor, rows: Rows, **learned: Tensor) -> Tensor:
        """Weights of (B, H, rows, keys) scores; 0 wherever a key is not visible."""
        raise NotImplementedError(f"{type(self).__name__} does not define weigh")

    def finish(self, out: Tensor, **learned: Tensor) -> Tensor:
        """What happens to the summed rows (B, H, rows, Dv); nothing for most systems."""
        return out

    def learned(self, heads: int, value_dim: int) -> dict[str, Tensor]:
        """Name -> initial value (float32) of what the formula learns."""
        return {}


def per_head(parameter: Tensor, like: Tensor) -> Tensor:
    """A learned (H,) parameter, shaped and cast to meet (B, H, rows, keys) scores."""
    return parameter.to(like.dtype)[:, None, None]


def row_total(weights: Tensor) -> Tensor:
    """The l1 normaliser of non-negative rows, with 1 in place of an empty row's 0."""
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, total, 1)


def raise_to(base: Tensor, power: float | Tensor) -> Tensor:
    """base^power; small whole powers by repeated squaring, since pow() is many times slower."""
    if isinstance(power, Tensor) or power != int(power) or power > 64:
        return base**power
    power, square, result = int(power), base, None
    while True:
        if power & 1:
            result = square if result is None else result * square
        power >>= 1
        if not power:
            assert result is not None
            return result
        square = square * square
