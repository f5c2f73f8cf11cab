"""A sliding window with sinks: each query sees the last tokens and the first ones.

Xiao et al., "Efficient streaming language models with attention sinks" (StreamingLLM, arXiv
2309.17453): a window alone breaks a trained model as soon as the first tokens leave it, since many
heads rest on them; with a few of them kept it holds. It is what a head that looks near by can be
replaced by without any training (DuoAttention, RazorAttention), and so the control of RecurFormer.

Of the keys that a query may see, it sees those at a distance below `window`, and the first `sinks`.
Tokens keep the positions that they have: StreamingLLM counts positions within its cache instead,
which for RoPE moves the sinks nearer as text runs on. A state holds sinks + window - 1 pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aftermax.attention import attention
from aftermax.blocks import BLOCK_SCORES
from aftermax.call import check_inputs
from aftermax.state import bytes_of, check_meeting, rows_of
from aftermax.visible import Visible, check_tokens, pieces, refuse_mask
from aftermax.weights import RowMap, ScaleInvariantSoftmax, Softmax

LEAST_ROWS = 64
"""Queries that are walked together, at least: a window of one token would take as many calls."""


@dataclass(frozen=True)
class WindowState:
    """The first tokens and the last ones."""

    sink_key: Tensor  # (B, Hkv, sinks, D); zeros where there is none yet
    sink_value: Tensor  # (B, Hkv, sinks, Dv)
    sink_at: Tensor  # int64 (B, sinks), positions; -1 where there is none yet
    key: Tensor  # (B, Hkv, up to window - 1, D), the last ones
    value: Tensor
    seen: Tensor  # bool (B, up to window - 1)
    length: int
    """Tokens so far, padding included: the position of the next token."""
    start: int = 0
    """Position of the first of them."""

    @property
    def bytes(self) -> int:
        return bytes_of(self)

    def reorder(self, index: Tensor) -> WindowState:
        return rows_of(self, index)


@dataclass(frozen=True)
class SinkWindow:
    """A row map over the last tokens and the first ones, with the methods of `aftermax.System`.

    Args:
        sinks: tokens at the start that every query sees; 4 (StreamingLLM's).
        window: keys nearer than this are seen, itself included; 64.
        weights: the row map; softmax.

    Raises:
        ValueError: for numbers out of range, and for row maps that ask for distances or for all
            queries of a sequence, which a state does not have.

    >>> x = torch.zeros(1, 1, 6, 1)
    >>> value = torch.arange(6.0).reshape(1, 1, 6, 1)
    >>> system = SinkWindow(sinks=1, window=2)  # the last row sees tokens 0, 4 and 5
    >>> system.attend(x, x, value, Visible(causal=True)).flatten()
    tensor([0.0000, 0.5000, 1.0000, 1.6667, 2.3333, 3.0000])
    """

    sinks: int = 4
    window: int = 64
    weights: RowMap = Softmax()  # noqa: RUF009, a frozen value

    can_truncate: ClassVar[bool] = False
    can_merge: ClassVar[bool] = True

    def __post_init__(self):
        if self.sinks < 0 or self.window < 1:
            raise ValueError(
                f"SinkWindow needs sinks >= 0 and window >= 1, got {self.sinks} and {self.window}"
            )
        if isinstance(self.weights, ScaleInvariantSoftmax) or self.weights.needs_sequence_count:
            raise ValueError(
                f"SinkWindow does not know what {self.weights} asks for: the distance of each key, "
                "or what the other queries see"
            )

    def learned(self, heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        return self.weights.learned(heads, value_dim)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Visible, **options
    ) -> Tensor:
        """All at once; `options` are those of `aftermax.attention`.

        Causal calls with padding are walked in O(T (sinks + window)); where a mask or a window
        differs from query to query, or the call is not causal, in O(T^2) and blocks of rows.
        """
        check_inputs(query, key, value, options.get("enable_gqa", False))
        batch, heads, queries, _ = query.shape
        keys = key.shape[-2]
        visible.check(batch, heads, queries, keys)
        if not self._walks(visible, queries, keys):
            return self._by_rows(query, key, value, visible, options)
        seen = None
        if visible.mask is not None:
            mask = visible.mask.reshape((1,) * (4 - visible.mask.ndim) + visible.mask.shape)
            seen = mask[:, 0, 0].expand(batch, keys)
        state = self.init_state(
            batch, key.shape[1], key.shape[-1], value.shape[-1], device=key.device, dtype=key.dtype
        )
        return self._walk(query, key, value, state, seen, visible.slopes, options)[0]

    def init_state(
        self,
        batch: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        start: int = 0,
        **factory,
    ) -> WindowState:
        """The state before the first token, which stands at `start`."""
        device = factory.get("device")
        return WindowState(
            torch.zeros(batch, kv_heads, self.sinks, key_dim, **factory),
            torch.zeros(batch, kv_heads, self.sinks, value_dim, **factory),
            torch.full((batch, self.sinks), -1, dtype=torch.int64, device=device),
            torch.empty(batch, kv_heads, 0, key_dim, **factory),
            torch.empty(batch, kv_heads, 0, value_dim, **factory),
            torch.empty(batch, 0, dtype=torch.bool, device=device),
            start,
            start,
        )

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: WindowState,
        visible: Visible,
        seen: Tensor | None = None,
        **options,
    ) -> tuple[Tensor, WindowState]:
        """The next tokens, one or many, after what `state` holds: (out, new state)."""
        refuse_mask(visible)
        if visible.window is not None or not visible.causal:
            raise ValueError("step of SinkWindow is causal, and has the window of the system alone")
        return self._walk(query, key, value, state, seen, visible.slopes, options)

    def merge(self, first: WindowState, second: WindowState) -> WindowState:
        """The state after two pieces, of which the second was read from a state that began at
        `start=first.length`: the first sinks of both, and the last tokens of both."""
        check_meeting(first, second.start)
        sinks = self._sinks(first, second.sink_key, second.sink_value, second.sink_at)
        ends = ((first.key, second.key, -2), (first.value, second.value, -2))
        key, value = (self._last(torch.cat([a, b], dim), dim) for a, b, dim in ends)
        seen = self._last(torch.cat([first.seen, second.seen], -1), -1)
        return WindowState(*sinks, key, value, seen, second.length, first.start)

    # ---- the walk ----

    def _walks(self, visible: Visible, queries: int, keys: int) -> bool:
        """Whether each query sees what causality and the padding of its sequence leave."""
        mask = visible.mask
        by_token = mask is None or (
            mask.dtype == torch.bool and (mask.ndim < 3 or mask.shape[-3] == 1)
        )
        aligned = visible.causal and visible.offset == 0 and queries == keys
        return by_token and aligned and not visible.differs_by_query()

    def _walk(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: WindowState,
        seen: Tensor | None,
        slopes: Tensor | None,
        options: dict,
    ) -> tuple[Tensor, WindowState]:
        batch, tokens = key.shape[0], key.shape[-2]
        if state.seen.shape[0] != batch:
            raise ValueError(f"the state is of a batch of {state.seen.shape[0]}, the keys {batch}")
        if seen is None:
            seen = torch.ones(batch, tokens, dtype=torch.bool, device=key.device)
        check_tokens("seen", seen, batch, tokens)
        position = torch.arange(tokens, device=key.device) + state.length
        at = torch.where(seen, position, -1)
        sink_key, sink_value, sink_at = self._sinks(state, key, value, at)
        held = state.seen.shape[1]
        all_key = torch.cat([state.key.to(key.dtype), key], -2)
        all_value = torch.cat([state.value.to(value.dtype), value], -2)
        all_seen = torch.cat([state.seen, seen], -1)

        out = []
        for start, stop in pieces(tokens, max(self.window, LEAST_ROWS)):
            low, high = max(0, held + start - self.window + 1), held + stop
            rows = torch.arange(start, stop, device=key.device)
            places = torch.arange(low - held, high - held, device=key.device)
            near = rows[:, None] - places
            far = (rows + state.length)[:, None] - sink_at[:, None]  # (B, rows, sinks)
            is_sink = (sink_at >= 0)[:, None] & (far >= self.window)  # those nearer are in `near`
            is_near = (near >= 0) & (near < self.window) & all_seen[:, None, low:high]
            mask = torch.cat([is_sink, is_near], -1)[:, None]
            if slopes is not None:
                distance = torch.cat([far, near.expand_as(is_near)], -1)[:, None]
                wide = torch.promote_types(query.dtype, torch.float32)
                bias = -slopes.to(query.device, wide)[None, :, None, None] * distance.abs()
                mask = bias.masked_fill(~mask, -torch.inf)
            out.append(
                attention(
                    query[:, :, start:stop],
                    torch.cat([sink_key, all_key[:, :, low:high]], -2),
                    torch.cat([sink_value, all_value[:, :, low:high]], -2),
                    weights=self.weights,
                    attn_mask=mask,
                    **options,
                )
            )
        new = WindowState(
            sink_key,
            sink_value,
            sink_at,
            self._last(all_key, -2),
            self._last(all_value, -2),
            self._last(all_seen, -1),
            state.length + tokens,
            state.start,
        )
        return out[0] if len(out) == 1 else torch.cat(out, -2), new

    def _sinks(
        self, state: WindowState, key: Tensor, value: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sinks and those of the new tokens, at positions `at` (B, T), that follow them."""
        places = torch.cat([state.sink_at, at], -1)
        order = (places < 0).to(torch.int8).argsort(dim=-1, stable=True)[:, : self.sinks]
        sink_at = places.gather(-1, order)
        index = order[:, None, :, None]
        found = (sink_at >= 0)[:, None, :, None]
        pairs = []
        for held, new in ((state.sink_key, key), (state.sink_value, value)):
            every = torch.cat([held.to(new.dtype), new], -2)
            picked = every.gather(-2, index.expand(-1, every.shape[1], -1, every.shape[-1]))
            pairs.append(torch.where(found, picked, 0))
        return pairs[0], pairs[1], sink_at

    def _last(self, x: Tensor, dim: int) -> Tensor:
        """The last window - 1 of them, and not as a view that keeps the others."""
        kept = min(self.window - 1, x.shape[dim])
        return x.narrow(dim, x.shape[dim] - kept, kept).clone(memory_format=torch.contiguous_format)

    def _by_rows(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Visible, options: dict
    ) -> Tensor:
        batch, heads, queries, _ = query.shape
        keys = key.shape[-2]
        compute = torch.promote_types(query.dtype, torch.float32)
        rows = max(1, BLOCK_SCORES // max(1, batch * heads * keys))
        out = []
        for start, stop in pieces(queries, rows):
            block = visible.rows(start, stop, (0, keys), query.device, compute)
            first = block.visible.cumsum(-1) <= self.sinks
            mask = block.visible & (first | (block.distance.abs() < self.window))
            if block.bias is not None:
                mask = block.bias.masked_fill(~mask, -torch.inf)
            out.append(
                attention(
                    query[:, :, start:stop],
                    key,
                    value,
                    weights=self.weights,
                    attn_mask=mask,
                    **options,
                )
            )
        return torch.cat(out, -2)
