"""What SparseK holds of the tokens so far: k selected pairs, w near ones, and scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from aftermax.sparse.chunks import Items
from aftermax.sparse.stream import Lives, lives
from aftermax.state import bytes_of, check_meeting, rows_of


@dataclass(frozen=True)
class SparseKState:
    """k slots and a ring of w, of each key head; exactly as many keys and values as that.

    The scores with p > 0 are kept beside them, largest first: the first of them are the slots'.
    Positions are applied to the keys already.
    """

    slot_key: Tensor  # (B, Hkv, <= k, D)
    slot_value: Tensor  # (B, Hkv, <= k, Dv)
    slot_position: Tensor  # int64 (B, Hkv, <= k), where they stood; -1 = an empty slot
    support: Tensor  # (B, Hkv, S), -inf where there is none
    ring_key: Tensor  # (B, Hkv, <= w, D), of the last tokens
    ring_value: Tensor  # (B, Hkv, <= w, Dv)
    ring_score: Tensor  # (B, Hkv, <= w)
    ring_seen: Tensor  # bool (B, <= w)
    statistics: Tensor  # float64 (B, Hkv, 3): count of the scores, their sum, and of squares
    flawed: Tensor  # bool (B, Hkv), whether a token was not finite
    count: Tensor  # int64 (B,), tokens that may be seen
    capped: Tensor  # bool (B, Hkv), whether `max_support` was reached
    sums: Tensor | None  # (B, Hkv, D, Dv + 1), of what is left out, if that is asked for
    length: int
    """Tokens so far, padding included: the position of the next token."""
    start: int
    """Position of the first of them."""

    @property
    def bytes(self) -> int:
        return bytes_of(self)

    def reorder(self, index: Tensor) -> SparseKState:
        return rows_of(self, index)

    def joined(self, read: Read, k: int, window: int) -> Found:
        """What the next queries may select from: the slots, and the tokens as they leave the
        window."""
        tokens = read.key.shape[2]
        near = self.ring_score.shape[2]
        gap = window - near  # queries before the first token of the ring leaves
        seen = torch.cat([self.ring_seen, read.seen], 1)[:, None].expand(-1, read.key.shape[1], -1)
        score = torch.cat([self.ring_score, read.score], 2)
        leaving = F.pad(score.masked_fill(~seen, -torch.inf), (gap, 0), value=-torch.inf)
        offered = torch.cat([self.support, leaving[..., :tokens]], 2)
        positions = torch.arange(self.length - near, self.length + tokens, device=score.device)
        slots = self.slot_key.shape[2]
        return Found(
            key=torch.cat([self.slot_key, self.ring_key, read.key], 2).flatten(0, 1),
            value=torch.cat([self.slot_value, self.ring_value, read.value], 2).flatten(0, 1),
            score=torch.cat([self.support[..., :slots], score], 2).flatten(0, 1),
            position=torch.cat(
                [self.slot_position, positions.expand(*score.shape[:2], -1)], 2
            ).flatten(0, 1),
            there=torch.cat([self.slot_position >= 0, seen], 2).flatten(0, 1),
            offered=offered.flatten(0, 1),
            carried=self.support.shape[2],
            slots=slots,
            near=near,
            gap=gap,
            tokens=tokens,
        )


@dataclass(frozen=True)
class Read:
    """New tokens, clean: what is hidden or not finite is 0."""

    key: Tensor  # (B, Hkv, T, D)
    value: Tensor  # (B, Hkv, T, Dv)
    score: Tensor  # (B, Hkv, T), as it is compared
    seen: Tensor  # bool (B, T)


@dataclass(frozen=True)
class Found:
    """Slots, ring and new tokens in a row, R = batch x key heads: N items; and the scores that are
    offered, those of the support and then one for each query."""

    key: Tensor  # (R, N, D)
    value: Tensor  # (R, N, Dv)
    score: Tensor  # (R, N)
    position: Tensor  # (R, N)
    there: Tensor  # bool (R, N)
    offered: Tensor  # (R, carried + T)
    carried: int
    slots: int
    near: int
    gap: int
    tokens: int

    @property
    def leaving(self) -> int:
        """How many of the ring and the new tokens leave the window."""
        return max(self.tokens - self.gap, 0)

    def of_items(self, leaves: Tensor) -> Tensor:
        """When the items leave, from when the offered scores do; those that stay near never do."""
        first = self.carried + min(self.gap, self.tokens)
        never = self.near + self.tokens - self.leaving
        stay = leaves.new_full((leaves.shape[0], never), self.tokens)
        return torch.cat([leaves[:, : self.slots], leaves[:, first:], stay], 1)

    def items(self, lived: Lives) -> Items:
        """As the walk over chunks takes them."""
        held = self.slots + self.near
        own = torch.arange(self.tokens, device=self.key.device)
        start = F.pad(own, (held, 0)).expand(self.key.shape[0], -1)
        fades, stop = (self.of_items(x) for x in (lived.leaves_ones, lived.leaves_top))
        fades, stop = (torch.where(self.there, x, start) for x in (fades, stop))
        tau = lived.tau.to(self.score.dtype)
        return Items(self.key, self.value, self.score, tau, start, fades, stop.maximum(fades))

    def evicted(self, lived: Lives) -> tuple[Tensor, Tensor, Tensor]:
        """The item that falls out at each query: key (R, T, D), value (R, T, Dv), and bool (R, T),
        whether there is one. There never are two: one token is offered for each query."""
        rows = self.key.shape[0]
        stop = self.of_items(lived.leaves_top)
        falls = self.there & (stop < self.tokens)
        which = torch.full((rows, self.tokens + 1), -1, device=self.key.device)
        place = torch.where(falls, stop, self.tokens)
        items = torch.arange(self.key.shape[1], device=self.key.device).expand(rows, -1)
        which = which.scatter(1, place, items)[:, : self.tokens]
        at = which.clamp_min(0)[..., None]
        key = self.key.gather(1, at.expand(-1, -1, self.key.shape[-1]))
        value = self.value.gather(1, at.expand(-1, -1, self.value.shape[-1]))
        return key, value, which >= 0

    def best(self, lived: Lives, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The scores that are left with p > 0, largest first, later ones first among equals
        (R, S); and of the k first the item (R, <= k), and whether there is one."""
        alive = lived.leaves_support == self.tokens
        scores = self.offered.masked_fill(~alive, -torch.inf)
        carried, new = scores[:, : self.carried], scores[:, self.carried :]
        in_order = torch.cat([new.flip(1), carried], 1)
        ranked, order = in_order.detach().sort(dim=1, descending=True, stable=True)
        held = int(alive.sum(1).max()) if alive.numel() else 0
        support = in_order.gather(1, order[:, :held])
        many = min(k, held)
        first, there = order[:, :many], ranked[:, :many] > -torch.inf
        tokens = self.tokens
        item = torch.where(
            first < tokens, self.slots + (tokens - 1 - first) - self.gap, first - tokens
        )
        return support, item.masked_fill(~there, 0), there


def empty_state(
    shape: tuple[int, int, int, int], start: int, linear: bool, *, dtype, device
) -> SparseKState:
    batch, kv_heads, key_dim, value_dim = shape
    lead, factory = (batch, kv_heads), {"dtype": dtype, "device": device}

    def none(*further: int) -> Tensor:
        return torch.zeros(*lead, 0, *further, **factory)

    return SparseKState(
        slot_key=none(key_dim),
        slot_value=none(value_dim),
        slot_position=torch.zeros(*lead, 0, dtype=torch.int64, device=device),
        support=none(),
        ring_key=none(key_dim),
        ring_value=none(value_dim),
        ring_score=none(),
        ring_seen=torch.zeros(batch, 0, dtype=torch.bool, device=device),
        statistics=torch.zeros(*lead, 3, dtype=torch.float64, device=device),
        flawed=torch.zeros(*lead, dtype=torch.bool, device=device),
        count=torch.full((batch,), start, dtype=torch.int64, device=device),
        capped=torch.zeros(*lead, dtype=torch.bool, device=device),
        sums=torch.zeros(*lead, key_dim, value_dim + 1, **factory) if linear else None,
        length=start,
        start=start,
    )


def advanced(
    state: SparseKState, found: Found, lived: Lives, read: Read, k: int, window: int
) -> SparseKState:
    """The state after the queries of `found`: slots, support and ring. What else changes is put in
    by the caller."""
    near = min(window, found.near + found.tokens)
    return replace(
        _with_slots(state, found, lived, k),
        ring_key=_last(state.ring_key, read.key, 2, near),
        ring_value=_last(state.ring_value, read.value, 2, near),
        ring_score=_last(state.ring_score, read.score, 2, near),
        ring_seen=_last(state.ring_seen, read.seen, 1, near),
        length=state.length + found.tokens,
    )


def _with_slots(state: SparseKState, found: Found, lived: Lives, k: int) -> SparseKState:
    shape = state.flawed.shape
    support, item, there = found.best(lived, k)

    def slot(x: Tensor) -> Tensor:
        at = item if x.ndim == 2 else item[..., None].expand(-1, -1, x.shape[-1])
        return x.gather(1, at).unflatten(0, shape)

    filled = there.unflatten(0, shape)
    return replace(
        state,
        slot_key=slot(found.key).masked_fill(~filled[..., None], 0),
        slot_value=slot(found.value).masked_fill(~filled[..., None], 0),
        slot_position=slot(found.position).masked_fill(~filled, -1),
        support=support.unflatten(0, shape),
        capped=state.capped | lived.capped.bool().unflatten(0, shape),
    )


def _last(held: Tensor, new: Tensor, dim: int, many: int) -> Tensor:
    both = torch.cat([held, new], dim)
    return both.narrow(dim, both.shape[dim] - many, many).clone()  # no view that would hold all


def merged(
    first: SparseKState, second: SparseKState, k: int, window: int, cap: int | None
) -> SparseKState:
    """The second's tokens follow the first's: those that leave the ring, and then the second's
    support, meet the threshold of the first's."""
    check_meeting(first, second.start)
    near = min(window, first.ring_score.shape[2] + second.ring_score.shape[2])
    left = first.ring_score.shape[2] + second.ring_score.shape[2] - near
    shape = first.flawed.shape

    # what left the ring, oldest first, then the second's: smallest and oldest first
    seen = first.ring_seen[:, None, :left].expand(*shape, -1)
    leaving = first.ring_score[..., :left].masked_fill(~seen, -torch.inf)
    offered = torch.cat([first.support, leaving, second.support.flip(2)], 2).flatten(0, 1)
    tokens, slots = left + second.support.shape[2], second.slot_key.shape[2]
    strangers = second.support.shape[2] - slots  # whose keys the second no longer has
    positions = torch.arange(first.length - first.ring_score.shape[2], first.length)[:left]

    def row(own: Tensor, near: Tensor, other: Tensor) -> Tensor:
        nobody = other.new_zeros(*shape, strangers, *other.shape[3:])
        return torch.cat([own, near, nobody, other.flip(2)], 2).flatten(0, 1)

    found = Found(
        key=row(first.slot_key, first.ring_key[:, :, :left], second.slot_key),
        value=row(first.slot_value, first.ring_value[:, :, :left], second.slot_value),
        score=offered,
        position=row(
            first.slot_position, positions.to(seen.device).expand(*shape, -1), second.slot_position
        ),
        there=row(first.slot_position >= 0, seen, second.slot_position >= 0),
        offered=offered,
        carried=first.support.shape[2],
        slots=first.slot_key.shape[2],
        near=0,
        gap=0,
        tokens=tokens,
    )
    lived = lives(offered.double(), k, k, carried=found.carried, cap=cap or 0)
    new = _with_slots(first, found, lived, k)
    sums = first.sums
    if sums is not None and second.sums is not None:
        key, value, there = found.evicted(lived)
        key = (F.elu(key) + 1).masked_fill(~there[..., None], 0)
        fallen = key.mT @ F.pad(value, (0, 1), value=1)
        sums = sums + second.sums + fallen.unflatten(0, shape)
    return replace(
        new,
        ring_key=_last(first.ring_key, second.ring_key, 2, near),
        ring_value=_last(first.ring_value, second.ring_value, 2, near),
        ring_score=_last(first.ring_score, second.ring_score, 2, near),
        ring_seen=_last(first.ring_seen, second.ring_seen, 1, near),
        statistics=first.statistics + second.statistics,
        flawed=first.flawed | second.flawed,
        count=first.count + (second.count - second.start),
        capped=new.capped | second.capped,
        sums=sums,
        length=second.length,
    )
