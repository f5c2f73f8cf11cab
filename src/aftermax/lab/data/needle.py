"""Needles in noise: pairs of key and value, then a key once more, further away than a window sees.

    noise ... k1 v1 ... noise ... k2 v2 ... noise (at least `gap` tokens) ... k1 -> v1

What has to be kept is told apart by its kind alone (a value, not noise), which value is asked for
by the key before it. A model that holds no value guesses among all of them; one that holds the
values and does not know whose they are is right once in `pairs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Problems(NamedTuple):
    tokens: Tensor  # int64 (count, length): noise and pairs; the last token is the key asked for
    answers: Tensor  # int64 (count,): its value
    places: Tensor  # int64 (count,): where that value stands


@dataclass(frozen=True)
class Needles:
    """The problems.

    Args:
        length: tokens of a problem.
        pairs: of key and value; keys, and values, are different within a problem.
        gap: tokens after the last place that a value may have, the question included: a window of
            so many that ends there sees noise alone. Two layers with a window w see as far as one
            with 2 w - 1.
        noise, keys, values: symbols of each kind, numbered in this order.

    Raises:
        ValueError: where the pairs have no place before the gap, or there are not as many symbols.

    >>> made = Needles(length=8, pairs=1, gap=3).problems(1, torch.Generator().manual_seed(0))
    >>> place = made.places.item()
    >>> torch.equal(made.tokens[:, place], made.answers)
    True
    >>> torch.equal(made.tokens[:, place - 1], made.tokens[:, -1])  # its key is the question
    True
    """

    length: int = 32
    pairs: int = 2
    gap: int = 11
    noise: int = 12
    keys: int = 6
    values: int = 6

    def __post_init__(self):
        if self.gap < 1 or self.pairs < 1 or self.noise < 1:
            raise ValueError(
                f"gap, pairs and noise must be at least 1, got {self.gap}, {self.pairs}, "
                f"{self.noise}"
            )
        if 2 * self.pairs > self.length - self.gap:
            raise ValueError(
                f"{self.pairs} pairs before a gap of {self.gap} need length >= "
                f"{2 * self.pairs + self.gap}, got {self.length}"
            )
        if min(self.keys, self.values) < self.pairs:
            raise ValueError(
                f"{self.pairs} different keys and values need as many symbols of each, got "
                f"{self.keys} and {self.values}"
            )

    @property
    def symbols(self) -> int:
        return self.noise + self.keys + self.values

    def problems(self, count: int, generator: torch.Generator) -> Problems:
        """So many, drawn anew with each call."""
        tokens = torch.randint(self.noise, (count, self.length), generator=generator)
        keys = self.noise + _distinct(count, self.keys, self.pairs, generator)
        values = self.noise + self.keys + _distinct(count, self.values, self.pairs, generator)
        # `pairs` of the places that are left when each pair is drawn together to one
        room = self.length - self.gap - self.pairs
        starts = _distinct(count, room, self.pairs, generator).sort(1).values
        starts = starts + torch.arange(self.pairs)
        tokens.scatter_(1, starts, keys).scatter_(1, starts + 1, values)
        asked = torch.randint(self.pairs, (count, 1), generator=generator)
        tokens[:, -1:] = keys.gather(1, asked)
        return Problems(tokens, values.gather(1, asked)[:, 0], starts.gather(1, asked)[:, 0] + 1)


def _distinct(count: int, of: int, take: int, generator: torch.Generator) -> Tensor:
    """(count, take) numbers below `of`, different within a row, in random order."""
    return torch.rand(count, of, generator=generator).argsort(1)[:, :take]
