"""One cache for everything that decodes: keys and values, sums, codebooks, or some of each.

A state is a value: `step` returns a new one and leaves the old one as it was. `Cache` holds the
newest, so that code which decodes says `append` and need not know what is kept. What a state has:

    length            tokens so far, padding included: the position of the next one
    bytes             of all that it holds
    reorder(index)    the rows of the batch picked, repeated or dropped, as beams want it
    truncate(length)  its first tokens alone, where `can_truncate`

and two things may be true of its system or module, which says so: `can_truncate` (keys and values
can; what was summed, dropped or averaged cannot: take a `snapshot` before what may be taken back)
and `can_merge` (two pieces of a sequence that were read apart can be joined).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aftermax.dense import as_system
from aftermax.visible import Visible


class Cache:
    """What is kept of the tokens so far, and the way to read on.

    Args:
        reader: a module with `init_state` and `step` (`aftermax.Attention`, a paper's own module, a
            decoder whose state is a list of states), or an `OfSystem`.
        batch: sequences that are read side by side.
        start: position of the first token, for a later piece of a sequence that is read by itself
            and merged; 0.

    However the tokens are cut into pieces, the outputs are those of one pass over all of them.

    >>> from aftermax import LSSAR, Attention
    >>> attend = Attention(32, heads=4, weights=LSSAR())
    >>> x = torch.randn(2, 7, 32)
    >>> cache = Cache(attend, batch=2)
    >>> prompt, before = cache.append(x[:, :5]), cache.snapshot()
    >>> guess = cache.step(x[:, 5])
    >>> cache.restore(before)
    >>> rest = cache.append(x[:, 5:])
    >>> torch.allclose(torch.cat([prompt, rest], 1), attend(x), atol=1e-6)
    True
    >>> cache.length, cache.can_truncate
    (7, True)
    """

    def __init__(self, reader: Any, batch: int = 1, *, start: int = 0):
        if missing := [name for name in ("init_state", "step") if not hasattr(reader, name)]:
            raise TypeError(
                f"a cache needs something with init_state and step, {type(reader).__name__} has no "
                f"{' and no '.join(missing)}; for a system there is OfSystem(system, ...)"
            )
        self.reader = reader
        self.state = reader.init_state(batch, **({"start": start} if start else {}))

    def append(self, *tokens: Tensor, seen: Tensor | None = None) -> Tensor:
        """Read the next tokens, any number of them.

        Args:
            tokens: what the reader takes: (B, T, width) of a module, (B, T) of a decoder, query,
                key and value (B, H, T, D) of a system.
            seen: bool (B, T), the tokens that are real; None = all.

        Returns:
            What the reader makes of them, for each.
        """
        told = {} if seen is None else {"seen": seen}
        out, self.state = self.reader.step(*tokens, self.state, **told)
        return out

    def step(self, *tokens: Tensor, seen: Tensor | None = None) -> Tensor:
        """`append` of one token, without the dimension T, in and out; `seen` is bool (B,)."""
        dim = 1 if len(tokens) == 1 else 2
        seen = None if seen is None else seen.unsqueeze(1)
        return self.append(*(x.unsqueeze(dim) for x in tokens), seen=seen).squeeze(dim)

    @property
    def length(self) -> int:
        """Tokens read, padding included."""
        return parts_of(self.state)[0].length

    @property
    def bytes(self) -> int:
        """Of all that is kept, in all rows of the batch."""
        return sum(part.bytes for part in parts_of(self.state))

    @property
    def can_truncate(self) -> bool:
        return getattr(self.reader, "can_truncate", False)

    @property
    def can_merge(self) -> bool:
        return getattr(self.reader, "can_merge", False)

    def reorder(self, index: Tensor) -> None:
        """Keep the rows `index`, int64 (B',), of the batch: each beam goes on from the one it came
        from, a row may be repeated or dropped."""
        self.state = _each(self.state, lambda part: part.reorder(index))

    def snapshot(self) -> Any:
        """What is kept now, to come back to. It costs nothing but that it is held."""
        return self.state

    def restore(self, snapshot: Any) -> None:
        """Come back to a snapshot, which stays good."""
        self.state = snapshot

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            ValueError: where that cannot be, or there are fewer.
        """
        if not self.can_truncate:
            raise ValueError(
                f"{_name(self.reader)} cannot take tokens back: take a snapshot() before them and "
                "restore it"
            )
        self.state = _each(self.state, lambda part: part.truncate(length))

    def merge(self, later: Cache) -> None:
        """Go on after what `later` read: a `Cache(reader, batch, start=...)` of the same reader
        that began at the position where this one stands, and was not told of what came before.

        What the later piece's own outputs were is another matter: they did not see this one.

        Raises:
            ValueError: where that cannot be, or the pieces do not meet.
        """
        if not self.can_merge:
            raise ValueError(f"{_name(self.reader)} cannot join two pieces read apart")
        if not _same(later.reader, self.reader):
            raise ValueError("the two pieces were read by different readers")
        self.state = self.reader.merge(self.state, later.state)


@dataclass(frozen=True)
class OfSystem:
    """A system of the catalogue, or a row map, as a reader of query, key and value.

    Args:
        system: a row map (`LSSAR()`) or any `System`.
        kv_heads, key_dim, value_dim: of the keys and values that will come.
        visible: causal with what else a query may see (a window, ALiBi); causal alone by default.
        options: further arguments of the system's `step`, what it learned among them; grouped
            queries are allowed.
        device, dtype: of the state; torch's defaults.

    >>> from aftermax import Linear
    >>> cache = Cache(OfSystem(Linear(), kv_heads=2, key_dim=4, value_dim=4))
    >>> x = torch.randn(1, 2, 5, 4)
    >>> cache.append(x, x, x).shape, cache.can_merge
    (torch.Size([1, 2, 5, 4]), True)
    """

    system: Any
    kv_heads: int
    key_dim: int
    value_dim: int
    visible: Visible = field(default_factory=lambda: Visible(causal=True))
    options: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    @property
    def can_truncate(self) -> bool:
        return getattr(as_system(self.system), "can_truncate", False)

    @property
    def can_merge(self) -> bool:
        return getattr(as_system(self.system), "can_merge", False)

    def init_state(self, batch: int, start: int = 0) -> Any:
        given = {"device": self.device, "dtype": self.dtype} | ({"start": start} if start else {})
        shape = (batch, self.kv_heads, self.key_dim, self.value_dim)
        return as_system(self.system).init_state(*shape, **given)

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: Any, seen=None):
        options = {"enable_gqa": True, **self.options}
        return as_system(self.system).step(query, key, value, state, self.visible, seen, **options)

    def merge(self, first: Any, second: Any) -> Any:
        system: Any = as_system(self.system)
        return system.merge(first, second)


def can_all(systems: Any, what: str) -> bool:
    """Whether all of these can `what`: for readers that are made of several."""
    return all(getattr(system, what, False) for system in systems)


def parts_of(state: Any) -> list[Any]:
    """The states that a state is made of: itself, or those of a list, layer by layer."""
    return [part for one in state for part in parts_of(one)] if _is_many(state) else [state]


def _each(state: Any, change: Any) -> Any:
    if _is_many(state):
        return type(state)(_each(one, change) for one in state)
    return change(state)


def _same(one: Any, other: Any) -> bool:
    """Whether two readers are equal; tensors in them (slopes, what was learned) by their values."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if dataclasses.is_dataclass(one):
        fields = [f.name for f in dataclasses.fields(one)]
        return all(_same(getattr(one, name), getattr(other, name)) for name in fields)
    return bool(one == other)


def _is_many(state: Any) -> bool:
    return isinstance(state, (list, tuple))


def _name(reader: Any) -> str:
    return type(getattr(reader, "system", reader)).__name__
