"""What a system keeps of the tokens so far, as a value: the words that all states share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor


class State(Protocol):
    """What every state has. `step` returns a new one; no state ever changes."""

    @property
    def length(self) -> int:
        """Tokens so far, padding included: the position of the next token."""
        ...

    @property
    def bytes(self) -> int:
        """Of all that it holds, in all rows of the batch."""
        ...

    def reorder(self, index: Tensor) -> Any:
        """The rows `index`, int64 (B',), of the batch: picked, repeated, dropped."""
        ...


S = TypeVar("S")


def tensors_of(state: Any) -> dict[str, Tensor]:
    """The fields of a state that are tensors."""
    given = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: x for name, x in given.items() if isinstance(x, Tensor)}


def bytes_of(state: Any) -> int:
    """Bytes of a state's tensors."""
    return sum(x.numel() * x.element_size() for x in tensors_of(state).values())


def changed(state: S, change: Callable[[Tensor], Tensor]) -> S:
    """A state of the same kind with `change` done to each of its tensors."""
    tensors = {name: change(x) for name, x in tensors_of(state).items()}
    return dataclasses.replace(state, **tensors)  # type: ignore[type-var]


def rows_of(state: S, index: Tensor) -> S:
    """A state whose tensors all begin with the batch, with the rows `index` of it.

    Raises:
        ValueError: for what is no index of rows.
    """
    batch = next(iter(tensors_of(state).values())).shape[0]
    if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"the rows of a batch are picked by int64 (B',), got {index.dtype} of shape "
            f"{tuple(index.shape)}"
        )
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < batch:
        raise ValueError(f"a batch of {batch} has no rows {index.tolist()}")
    return changed(state, lambda x: x.index_select(0, index.to(x.device)))


def check_meeting(first: Any, start: int) -> None:
    """Raise ValueError where a piece that began at `start` does not follow on `first`."""
    if start != first.length:
        raise ValueError(
            f"the first piece ends at token {first.length}, and the second was read from {start} "
            f"on: begin it with start={first.length}"
        )
