"""The walk: keys that are near one by one, all others as one count and one sum for each code."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aftermax import blocks, reference
from aftermax.quantised.codebook import gathered
from aftermax.reference import transformed
from aftermax.visible import Rows, Visible, pieces


@dataclass(frozen=True)
class Keys:
    """Keys as their codes, with what belongs to them. The value of what is hidden from all queries,
    or not finite, is 0."""

    codes: Tensor  # int64 (B, Hc, T)
    value: Tensor  # (B, Hc, T, Dv)
    seen: Tensor  # bool (B|1, Hc|1, T)
    flawed: Tensor  # bool (B, Hc, T): seen, and key or value not finite
    through: Tensor | None
    """(B, Hc, T, D): 0, with the gradient of the key; None where none is wanted."""

    @property
    def length(self) -> int:
        return self.codes.shape[-1]

    def part(self, start: int, stop: int) -> Keys:
        through = None if self.through is None else self.through[:, :, start:stop]
        return Keys(
            self.codes[..., start:stop],
            self.value[:, :, start:stop],
            self.seen[..., start:stop],
            self.flawed[..., start:stop],
            through,
        )


@dataclass(frozen=True)
class Memory:
    """What is kept of keys that are told apart no longer. Two of them add up."""

    sums: Tensor  # (B, Hc, S, Dv), the values of each code
    counts: Tensor  # int64 (B, Hc, S)
    flawed: Tensor  # bool (B, Hc), whether one of the keys was not finite

    @classmethod
    def empty(cls, batch: int, heads: int, codes: int, value_dim: int, **factory) -> Memory:
        device = factory.get("device")
        return cls(
            torch.zeros(batch, heads, codes, value_dim, **factory),
            torch.zeros(batch, heads, codes, dtype=torch.int64, device=device),
            torch.zeros(batch, heads, dtype=torch.bool, device=device),
        )

    def add(self, keys: Keys) -> Memory:
        if not keys.length:
            return self
        where = keys.codes[..., None].expand(keys.value.shape)
        seen = keys.seen.expand(keys.codes.shape).to(self.counts.dtype)
        return Memory(
            self.sums.scatter_add(-2, where, keys.value),
            self.counts.scatter_add(-1, keys.codes, seen),
            self.flawed | keys.flawed.any(-1),
        )

    def plus(self, other: Memory) -> Memory:
        return Memory(
            self.sums + other.sums, self.counts + other.counts, self.flawed | other.flawed
        )


@dataclass(frozen=True)
class Walk:
    """One call: what all of its blocks of rows share."""

    query: Tensor  # (B, H, Tq, D), scaled; 0 where it is not finite
    sound: Tensor  # bool (B, H, Tq): where it is
    keys: Keys
    visible: Visible
    codebook: Tensor  # (Hc, S, D)
    window_bias: Tensor  # (H, w)

    @property
    def window(self) -> int:
        return self.window_bias.shape[-1]

    def with_memory(self, before: Memory) -> tuple[Tensor, Memory]:
        """(B, H, Tq, Dv) in O(T (S + w)): every query sees the same keys, but for causality.

        Args:
            before: what came before all of the keys.

        Returns:
            Also the memory of all but the last w - 1 keys, where the call is causal.
        """
        rows = list(pieces(self.query.shape[2], self._block_rows(2 * self.window)))
        spans = [self._near(start, stop) for start, stop in rows]
        last = max(spans[-1][0], self.keys.length - self.window + 1)
        cut = _Cut(self.keys, [*(edge for span in spans for edge in span), last])
        queries = self.query.split([stop - start for start, stop in rows], 2)
        behind = (
            [] if self.visible.causal else self._behind(cut, [high for _, high in spans], before)
        )
        out, first = [], 0
        for block, ((start, stop), (low, high)) in enumerate(zip(rows, spans, strict=True)):
            before, first = before.add(cut.part(first, low)), low
            memory = before.plus(behind[block]) if behind else before
            near = cut.part(low, high)
            out.append(self._rows(queries[block], near, start, stop, low, high, memory))
        return torch.cat(out, -2), before.add(cut.part(first, last))

    def pair_by_pair(self) -> Tensor:
        """The same in O(T^2), whatever each query sees."""
        tokens = self.keys.length
        rows = list(pieces(self.query.shape[2], self._block_rows(tokens, linear=False)))
        again = torch.is_grad_enabled() and len(rows) > 1 and not transformed()
        out = []
        for start, stop in rows:
            low, high = self.visible.span(start, stop, tokens)
            if again:
                out.append(checkpoint(self._pairs, start, stop, low, high, use_reentrant=False))
            else:
                out.append(self._pairs(start, stop, low, high))
        return torch.cat(out, -2)

    def _pairs(self, start: int, stop: int, low: int, high: int) -> Tensor:
        query, keys = self.query[:, :, start:stop], self.keys.part(low, high)
        return self._rows(query, keys, start, stop, low, high, None)

    def _behind(self, cut: _Cut, firsts: list[int], like: Memory) -> list[Memory]:
        """For each of `firsts`, the memory of the keys from it on."""
        memory = Memory(
            torch.zeros_like(like.sums),
            torch.zeros_like(like.counts),
            torch.zeros_like(like.flawed),
        )
        behind, last = [], self.keys.length
        for first in reversed(firsts):
            memory, last = memory.add(cut.part(first, last)), first
            behind.append(memory)
        return behind[::-1]

    def _near(self, start: int, stop: int) -> tuple[int, int]:
        """The keys [low, high) that rows [start, stop) must be told one by one."""
        visible, tokens = self.visible, self.keys.length
        first, last = start + visible.offset, max(start, stop - 1) + visible.offset
        low = min(max(0, first - self.window + 1), tokens)
        high = last + (1 if visible.causal else self.window)
        return low, max(low, min(high, tokens))

    def _block_rows(self, keys: int, linear: bool = True) -> int:
        batch, heads = self.query.shape[:2]
        most = max(
            1, blocks.BLOCK_SCORES // max(1, batch * heads * (keys + self.codebook.shape[1]))
        )
        # rows of a block meet each other's windows: more than w of them would be more work
        return min(most, max(self.window, 64)) if linear else most

    def _rows(
        self,
        query: Tensor,
        keys: Keys,
        start: int,
        stop: int,
        low: int,
        high: int,
        memory: Memory | None,
    ) -> Tensor:
        """Rows [start, stop) over the keys [low, high) and the memory of others."""
        heads, device = query.shape[1], query.device
        rows = self.visible.rows(start, stop, (low, high), device, query.dtype)
        rows = rows._replace(visible=rows.visible & _of_heads(keys.seen, heads)[:, :, None])
        scores = [self._scores(query, keys, rows)]
        values = [keys.value]
        if memory is not None:
            counts = _of_heads(memory.counts, heads)[:, :, None]
            known = counts.clamp_min(1).to(query.dtype)
            far = _grouped(query, self.codebook.transpose(-1, -2)[None]) + known.log()
            scores.append(far.masked_fill(counts == 0, -torch.inf))
            values.append(memory.sums / memory.counts.clamp_min(1)[..., None])
        weights = reference.softmax(torch.cat(scores, -1), -1, empty="zero")
        near = weights[..., : high - low].masked_fill(~rows.visible, 0)
        out = _grouped(near, values[0])
        if memory is not None:
            out = out + _grouped(weights[..., high - low :], values[1])
        return out.masked_fill(self._poisoned(start, stop, keys, rows.visible, memory), torch.nan)

    def _scores(self, query: Tensor, keys: Keys, rows: Rows) -> Tensor:
        distance = rows.distance.abs()
        near = distance < self.window
        scores = _grouped(query, gathered(self.codebook, keys.codes).transpose(-1, -2))
        if keys.through is not None:
            # nothing, but for the gradient: near queries tell the key itself, others its code
            scores = scores + _grouped(query, keys.through.transpose(-1, -2)).masked_fill(~near, 0)
        steps = distance.clamp_max(self.window - 1).flatten()
        bias = self.window_bias.index_select(1, steps).unflatten(1, distance.shape)
        scores = scores + bias.masked_fill(~near, 0)
        if rows.bias is not None:
            scores = scores + rows.bias
        return scores.masked_fill(~rows.visible, -torch.inf)

    def _poisoned(
        self, start: int, stop: int, keys: Keys, visible: Tensor, memory: Memory | None
    ) -> Tensor:
        """bool (B, H, rows, 1): the rows that see what is not finite, or that are not themselves
        and see anything."""
        heads = self.query.shape[1]
        flawed = _of_heads(keys.flawed, heads)[:, :, None]
        bad, sees = (visible & flawed).any(-1), visible.any(-1)
        if memory is not None:
            bad = bad | _of_heads(memory.flawed, heads)[..., None]
            sees = sees | (_of_heads(memory.counts, heads) > 0).any(-1, keepdim=True)
        return (bad | (sees & ~self.sound[:, :, start:stop]))[..., None]


class _Cut:
    """Keys cut at these edges, once for all blocks: were each cut out of the whole by an index, the
    backward pass would add up a gradient of the whole length for each, O(T²) in all."""

    def __init__(self, keys: Keys, edges: list[int]):
        edges = sorted({0, keys.length, *edges})
        self.keys, self.place = keys, {edge: number for number, edge in enumerate(edges)}
        sizes = [high - low for low, high in pairwise(edges)]
        through = keys.through
        self.pieces = (
            [
                Keys(*parts)
                for parts in zip(
                    keys.codes.split(sizes, -1),
                    keys.value.split(sizes, -2),
                    keys.seen.split(sizes, -1),
                    keys.flawed.split(sizes, -1),
                    [None] * len(sizes) if through is None else through.split(sizes, -2),
                    strict=True,
                )
            ]
            if sizes
            else []
        )

    def part(self, low: int, high: int) -> Keys:
        """The keys [low, high), two of the edges."""
        if low >= high:
            return self.keys.part(low, low)
        parts = self.pieces[self.place[low] : self.place[high]]
        if len(parts) == 1:
            return parts[0]
        through = [part.through for part in parts if part.through is not None]
        return Keys(
            torch.cat([part.codes for part in parts], -1),
            torch.cat([part.value for part in parts], -2),
            torch.cat([part.seen for part in parts], -1),
            torch.cat([part.flawed for part in parts], -1),
            torch.cat(through, -2) if through else None,
        )


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """(B, Hc, ...) for the heads of queries, each for its group; one for all stays one."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)


def _grouped(left: Tensor, right: Tensor) -> Tensor:
    """(B, H, R, X) @ (B|1, Hc, X, Y), the heads of `right` shared in groups, not copied."""
    batch, heads, rows, inner = left.shape
    groups = right.shape[1]
    if heads != groups:
        left = left.reshape(batch, groups, heads // groups * rows, inner)
    return (left @ right).reshape(batch, heads, rows, right.shape[-1])
