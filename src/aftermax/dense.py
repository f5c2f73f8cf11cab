"""A row map as a system: the dense walk for a whole sequence, a key-value cache for the next token.

Every system of the catalogue, of whatever kind, is a value with the three methods of `System`, so
that the module, the laws of the contract suite and the lab need no other word for any of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from aftermax.attention import attention
from aftermax.call import check_weights
from aftermax.state import bytes_of, check_meeting, rows_of
from aftermax.visible import Visible, check_tokens, refuse_mask
from aftermax.weights.row_map import RowMap


class System(Protocol):
    """query, key, value -> out, for a whole sequence or piece by piece."""

    def learned(self, heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        """Name -> initial value of what the system learns."""
        ...

    def attend(self, query, key, value, visible: Visible, **options) -> Tensor:
        """All at once: (B, H, T, D), (B, Hkv, T, D), (B, Hkv, T, Dv) -> (B, H, T, Dv)."""
        ...

    def init_state(self, batch: int, kv_heads: int, key_dim: int, value_dim: int, **factory) -> Any:
        """The state before the first token. States are values: `step` returns a new one."""
        ...

    def step(
        self, query, key, value, state, visible: Visible, seen=None, **options
    ) -> tuple[Tensor, Any]:
        """The next tokens, one or many, after what `state` holds: (out, new state).

        `seen`, bool (B, T), marks the new tokens that later queries may see; None = all.
        """
        ...

    # A system may have besides: `can_truncate` and `can_merge` (see `aftermax.cache`), `fixed_size`
    # (its state does not grow with the tokens), all False where it does not say; and where it can,
    # `merge(first, second)`: the state after both pieces, of which the second was read from
    # `init_state(..., start=first.length)`.


@dataclass(frozen=True)
class KeyValues:
    """A key-value cache as a value. `seen` marks real tokens, so that counts are true counts."""

    key: Tensor  # (B, Hkv, T, D), positions already applied
    value: Tensor  # (B, Hkv, T, Dv)
    seen: Tensor  # bool (B, T)
    start: int = 0
    """Position of the first token held."""

    @property
    def length(self) -> int:
        """Tokens so far, padding included: the position of the next token."""
        return self.start + self.key.shape[-2]

    @property
    def count(self) -> Tensor:
        """(B,) visible tokens held."""
        return self.seen.sum(-1)

    @property
    def bytes(self) -> int:
        return bytes_of(self)

    def reorder(self, index: Tensor) -> KeyValues:
        return rows_of(self, index)

    def truncate(self, length: int) -> KeyValues:
        """The first `length` tokens alone."""
        if not self.start <= length <= self.length:
            raise ValueError(
                f"asked for the first {length} tokens, and {self.start} to {self.length} are held"
            )
        held = length - self.start
        # no views, which would hold all
        key, value = self.key[..., :held, :].clone(), self.value[..., :held, :].clone()
        return KeyValues(key, value, self.seen[:, :held].clone(), self.start)

    def append(self, key: Tensor, value: Tensor, seen: Tensor | None) -> KeyValues:
        tokens = (key.shape[0], key.shape[-2])
        if seen is None:
            seen = self.seen.new_ones(tokens)
        check_tokens("seen", seen, *tokens)
        return KeyValues(
            torch.cat([self.key.to(key.dtype), key], -2),  # under autocast it is not the state's
            torch.cat([self.value.to(value.dtype), value], -2),
            torch.cat([self.seen, seen], -1),
            self.start,
        )


@dataclass(frozen=True)
class Dense:
    """A row map with the dense walk and a key-value cache.

    >>> from aftermax.weights import LSSAR
    >>> system = Dense(LSSAR())
    >>> state = system.init_state(1, 1, 4, 4)
    >>> x = torch.randn(1, 1, 3, 4)
    >>> out, state = system.step(x, x, x, state, Visible(causal=True))
    >>> state.length, torch.equal(out, system.attend(x, x, x, Visible(causal=True)))
    (3, True)
    """

    weights: RowMap

    can_truncate: ClassVar[bool] = True
    can_merge: ClassVar[bool] = True

    def learned(self, heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        return self.weights.learned(heads, value_dim)

    def attend(self, query, key, value, visible: Visible, **options) -> Tensor:
        return attention(query, key, value, weights=self.weights, attn_mask=visible, **options)

    def init_state(
        self,
        batch: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        start: int = 0,
        **factory,
    ) -> KeyValues:
        return KeyValues(
            torch.empty(batch, kv_heads, 0, key_dim, **factory),
            torch.empty(batch, kv_heads, 0, value_dim, **factory),
            torch.empty(batch, 0, dtype=torch.bool, device=factory.get("device")),
            start,
        )

    def step(self, query, key, value, state: KeyValues, visible: Visible, seen=None, **options):
        refuse_mask(visible)
        held = state.append(key, value, seen)
        before = state.key.shape[-2]
        visible = dataclasses.replace(visible, offset=before, mask=held.seen[:, None, None])
        return self.attend(query, held.key, held.value, visible, **options), held

    def merge(self, first: KeyValues, second: KeyValues) -> KeyValues:
        check_meeting(first, second.start)
        return first.append(second.key, second.value, second.seen)


def as_system(weights: RowMap | System) -> System:
    """A row map with the dense walk; any other system as it is."""
    if isinstance(weights, RowMap):
        return Dense(weights)
    if not all(hasattr(weights, name) for name in ("attend", "init_state", "step", "learned")):
        check_weights(weights)
    return weights
