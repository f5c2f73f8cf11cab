"""What every row map is: a small frozen value that turns a row of scores into a row of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from aftermax import scores
from aftermax.visible import Rows


class Lengths(Protocol):
    """What a row map may ask about the rows that a kernel is about to walk."""

    @property
    def heads(self) -> int: ...

    def of_rows(self) -> Tensor:
        """N_i, the number of keys that each row sees: float32, (B|1, H|1, Tq)."""
        ...

    def of_sequence(self) -> Tensor:
        """The number of keys that any row sees: (B|1, H|1, 1)."""
        ...

    def distances(self) -> Tensor:
        """Every j - i that there is, in order."""
        ...


@dataclass(frozen=True)
class Fused:
    """How the kernels run a row map: one of their maps, and what it takes.

    `map` is a name of `aftermax.kernels.attention_ops.MAPS`, with the formulas at `am_row_map` in
    `kernels/cpu/core.h`. What belongs to rows is (B|1, H|1, Tq).
    """

    map: str
    row_scale: Tensor | None = None
    """Multiplies the scores; may be learned."""
    row_bias: Tensor | None = None
    row_weight: Tensor | None = None
    row_power: Tensor | None = None
    count: Tensor | None = None
    sink: Tensor | None = None
    """(H,); may be learned."""
    by_distance: Tensor | None = None
    """(2, n): scores become by_distance[0] s + by_distance[1], for each of `Lengths.distances`."""
    power: float = 1


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

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        """How the kernels run it. A map that does not say so runs on the reference."""
        raise NotImplementedError(f"{type(self).__name__} has no kernel")

    def finish(self, out: Tensor, **learned: Tensor) -> Tensor:
        """What happens to the summed rows (B, H, rows, Dv); nothing for most systems."""
        return out

    def learned(self, heads: int, value_dim: int) -> dict[str, Tensor]:
        """Name -> initial value (float32) of what the formula learns."""
        return {}


def log_lengths(count: Tensor) -> Tensor:
    """ln N_i of `Lengths.of_rows`; 0 for a row that sees one key or none."""
    return count.clamp_min(1).log()


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
