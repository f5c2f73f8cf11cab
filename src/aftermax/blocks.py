"""The dense walk of the reference: every visible key of every query, in blocks of rows.

One block's scores exist at a time, and where gradients are wanted each block is checkpointed, so
that the backward pass builds one block's scores at a time as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aftermax.call import Call
from aftermax.visible import Rows, pieces

BLOCK_SCORES = 2**20
"""Scores that one block may hold, over batch, heads, rows and keys: 4 MiB in float32."""


def attend(call: Call) -> Tensor:
    """(B, H, Tq, Dv) in the dtype of the query."""
    walk = Walk.of(call)
    blocks = list(walk.blocks())
    needs_grad = call.wants_gradient()
    out = []
    with no_autocast(call.query.device):
        # from the last block, the largest under causality: what it frees holds all others, where
        # ever larger blocks would each find the freed memory too small and leave it in pieces
        for start, stop in reversed(blocks):
            if needs_grad and len(blocks) > 1:
                out.append(checkpoint(walk.out, start, stop, use_reentrant=False))
            else:
                out.append(walk.out(start, stop))
    out.reverse()
    return out[0] if len(out) == 1 else torch.cat(out, -2)


@dataclasses.dataclass(frozen=True)
class Walk:
    """One call, prepared: what all of its blocks share."""

    call: Call
    query: Tensor  # (B, H, Tq, D), as given: each block prepares its own rows
    key: Tensor  # (B, Hkv, Tk, D), prepared
    value: Tensor  # (B, Hkv, Tk, Dv)
    flawed_key: Tensor  # bool (B, H, 1, Tk): key or value not finite, and set to 0 above
    sequence: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, call: Call) -> Walk:
        query, key, value, weights = call.query, call.key, call.value, call.weights
        heads = query.shape[1]
        dtype = query.dtype
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        query, key, value = (x.to(compute) for x in (query, key, value))
        key_is_sound = (key.isfinite().all(-1) & value.isfinite().all(-1))[..., None]
        key = weights.prepare(torch.where(key_is_sound, key, 0))
        value = torch.where(key_is_sound, value, 0)
        flawed_key = ~key_is_sound.transpose(-1, -2).repeat_interleave(heads // key.shape[1], 1)

        walk = cls(call, query, key, value, flawed_key, None, dtype)
        if not weights.needs_sequence_count:
            return walk
        counted = call.visible.seen_by_any(
            query.shape[-2], key.shape[-2], walk.block_rows(), query.device, compute
        )
        return dataclasses.replace(walk, sequence=counted)

    def block_rows(self) -> int:
        batch, heads = self.query.shape[:2]
        return max(1, BLOCK_SCORES // max(1, batch * heads * self.key.shape[-2]))

    def blocks(self) -> Iterator[tuple[int, int]]:
        queries, block = self.query.shape[-2], self.block_rows()
        yield from pieces(queries, block)

    def rows(self, start: int, stop: int, span: tuple[int, int]) -> Rows:
        rows = self.call.visible.rows(start, stop, span, self.query.device, self.query.dtype)
        return rows._replace(sequence=self.sequence)

    def weights_of(self, start: int, stop: int, rows: Rows, span: tuple[int, int]) -> Tensor:
        """(B, H, rows, keys of the span)."""
        key = self.key[:, :, span[0] : span[1]]
        query = torch.where(self.sound_query(start, stop), self.query[:, :, start:stop], 0)
        query = self.call.weights.prepare(query) * self.call.scale
        scores = _matmul_grouped(query, key.transpose(-1, -2))
        if span[0] == span[1]:
            return scores  # no keys, no weights
        return self.call.weights.weigh(scores, rows, **self.call.learned)

    def out(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the result, (B, H, rows, Dv), in the caller's dtype."""
        span = self.call.visible.span(start, stop, self.key.shape[-2])
        rows = self.rows(start, stop, span)
        weights = self.weights_of(start, stop, rows, span)
        if self.call.dropout_p > 0:
            weights = torch.nn.functional.dropout(weights, self.call.dropout_p)
        out = _matmul_grouped(weights, self.value[:, :, span[0] : span[1]])
        out = self.call.weights.finish(out, **self.call.learned)
        poisoned = self.poisoned(start, stop, rows, span)
        if self.call.weights.mixes_heads:
            poisoned = poisoned.any(1, keepdim=True)
        return out.masked_fill(poisoned, torch.nan).to(self.dtype)

    def sound_query(self, start: int, stop: int) -> Tensor:
        """bool (B, H, rows, 1): the queries that are finite."""
        return self.query[:, :, start:stop].isfinite().all(-1, keepdim=True)

    def poisoned(self, start: int, stop: int, rows: Rows, span: tuple[int, int]) -> Tensor:
        """(B, H, rows, 1): the rows that see what is not finite."""
        flawed = self.flawed_key[..., span[0] : span[1]] | ~self.sound_query(start, stop)
        return (rows.visible & flawed).any(-1, keepdim=True)


def no_autocast(device: torch.device):
    """Autocast would compute the products in half precision, which `Walk` has just left."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _matmul_grouped(left: Tensor, right: Tensor) -> Tensor:
    """(B, H, R, X) @ (B, Hkv, X, Y), the heads of `right` shared in groups, not copied."""
    batch, heads, rows, inner = left.shape
    groups = right.shape[1]
    if heads == groups:
        return left @ right
    left = left.reshape(batch, groups, heads // groups * rows, inner)
    return (left @ right).reshape(batch, heads, rows, right.shape[-1])
