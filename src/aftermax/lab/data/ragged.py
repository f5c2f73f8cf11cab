"""Rows of several lengths in one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor


class Ragged(NamedTuple):
    """Row i is values[offsets[i] : offsets[i + 1]]: as `torch.nn.functional.embedding_bag` has it.

    >>> labels = Ragged.of([[3, 5], [], [2]])
    >>> labels.size, labels.lengths.tolist()
    (3, [2, 0, 1])
    >>> labels.padded()
    tensor([[ 3,  5],
            [-1, -1],
            [ 2, -1]])
    >>> labels.rows(torch.tensor([2, 0])).lists()
    [[2], [3, 5]]
    """

    values: Tensor  # int32 in prepared data (half the memory), int64 in what `rows` takes from it
    offsets: Tensor  # int64 (N + 1,), from 0, rising

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]], dtype: torch.dtype = torch.int32) -> Ragged:
        """From lists."""
        held = list(rows)
        lengths = torch.tensor([len(row) for row in held], dtype=torch.int64)
        return cls.by_lengths(torch.tensor(list(chain.from_iterable(held)), dtype=dtype), lengths)

    @classmethod
    def by_lengths(cls, values: Tensor, lengths: Tensor) -> Ragged:
        return cls(values, torch.cat((lengths.new_zeros(1), lengths.cumsum(0))))

    @property
    def size(self) -> int:
        """Rows."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """int64 (N,)."""
        return self.offsets.diff()

    @property
    def owners(self) -> Tensor:
        """The row that each value stands in: int64, the shape of `values`."""
        return torch.arange(self.size).repeat_interleave(self.lengths)

    def places(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Where the values of these rows stand in `values`, and how many each row has."""
        lengths = self.lengths[indices]
        ends = lengths.cumsum(0)
        shift = (self.offsets[indices] - ends + lengths).repeat_interleave(lengths)
        return torch.arange(len(shift)) + shift, lengths

    def rows(self, indices: Tensor) -> Ragged:
        """These rows, in this order, with int64 values.

        Args:
            indices: int64 (M,); a row may come several times.
        """
        places, lengths = self.places(indices)
        return Ragged.by_lengths(self.values[places].long(), lengths)

    def row(self, index: int) -> Tensor:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def kept(self, mask: Tensor) -> Ragged:
        """Without the values where the mask (bool, the shape of `values`) is False."""
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths.index_add_(0, self.owners, mask.long())
        return Ragged.by_lengths(self.values[mask], lengths)

    def padded(
        self, indices: Tensor | None = None, fill: int = -1, longest: int | None = None
    ) -> Tensor:
        """int64 (M, longest row): these rows (None: all), with `fill` after their ends.

        Args:
            longest: the first so many values of a row at most.
        """
        rows = self.rows(torch.arange(self.size) if indices is None else indices)
        width = int(rows.lengths.max()) if rows.size else 0
        if longest is not None:
            width = min(width, longest)
        places = rows.offsets[:-1, None] + torch.arange(width)
        there = torch.arange(width) < rows.lengths[:, None]
        out = torch.full(there.shape, fill, dtype=torch.int64)
        out[there] = rows.values[places[there]]
        return out

    def lists(self) -> list[list[int]]:
        return [row.tolist() for row in self.values.tensor_split(self.offsets[1:-1])][: self.size]
