"""Layers of transformers' cache for attention of which some KV groups keep a state.

`CompositeLayer` holds the state of a `RecurFormer` system: keys and values of the groups that stay,
a window or sums of the others. `MambaLayer` holds keys and values as any layer does, of the groups
that stay, and the state of the Mamba block beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from aftermax.dense import System
from aftermax.hf.recurrent import (
    CACHE_NAMES,
    HELD,
    NO_WAY_BACK,
    RecurrentLayer,
)
from aftermax.hybrid.mamba import MambaState
from aftermax.hybrid.recurformer import HybridState

COMPOSITE = "aftermax_composite"
"""Of an attention module: the hook that gives it a `CompositeLayer`."""


class CompositeLayer(RecurrentLayer):
    """A layer of a cache that holds a `HybridState`."""

    def check_system(self, system: System) -> None:
        """Any: what one keeps of the groups that stay grows, as keys do."""

    def check_past(self, mask: Tensor | None, queries: int) -> None:
        _check_past(mask, self.state, queries)

    def alone(self, state: HybridState) -> HybridState:
        """As it is: its parts see to it."""
        return state

    def hold(self, state: HybridState | None) -> None:
        self.state, self.handed = state, 0 if state is None else state.length
        self.is_initialized = state is not None

    @property
    def batch(self) -> int:
        if self.state is None:
            return 0
        part = self.state.parts[0]
        return next(x for x in vars(part).values() if isinstance(x, Tensor)).shape[0]


class MambaLayer(DynamicLayer):
    """A layer of a cache with the state of a Mamba block beside its keys and values."""

    is_croppable = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.block: MambaState | None = None

    @property
    def bytes(self) -> int:
        keys = [x for x in (self.keys, self.values) if x is not None]
        block = 0 if self.block is None else self.block.bytes
        return block + sum(x.numel() * x.element_size() for x in keys)

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.block is None else self.block.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + new, 0

    def reset(self) -> None:
        self.block = self.keys = self.values = None
        self.is_initialized = False

    def crop(self, *lengths: int) -> None:
        """Nothing can be taken back.

        Raises:
            ValueError: always, but for nothing.
        """
        if any(lengths) and lengths[0] != self.get_seq_length():
            raise ValueError(NO_WAY_BACK)

    def activate_past_recording(self) -> None:
        raise ValueError(NO_WAY_BACK)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.block is not None:
            rows = torch.arange(self.block.sums.shape[0])
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.block is None:
            return
        self.block = self.block.reorder(indices)
        if self.keys is not None and self.values is not None:
            rows = indices.to(self.keys.device)
            self.keys, self.values = self.keys[rows], self.values[rows]


def give_composite(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Before an attention module runs: its layer of the cache is one with a `HybridState`."""
    cache = cache_in(kwargs)
    if cache is None:
        return None
    layer = place_of(cache, module.layer_idx, CompositeLayer)  # type: ignore[arg-type]
    return args, kwargs | {HELD: layer}


def cache_in(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of an attention module, by either of its names."""
    return next((kwargs[n] for n in CACHE_NAMES if kwargs.get(n) is not None), None)


def place_of(cache: Any, number: int, kind: Any) -> Any:
    """The layer of that number, made one of that kind where it is empty.

    Raises:
        ValueError: for a cache that is not dynamic, and for one that holds something else there.
    """
    layers, usual = cache.layers, getattr(cache, "layer_class_to_replicate", None)
    while usual is not None and len(layers) <= number:
        layers.append(usual())
    layer = layers[number]
    if type(layer) is kind:
        return layer
    fits = type(layer) is DynamicLayer and not getattr(cache, "offloading", False)
    if not fits or layer.get_seq_length():
        raise ValueError(
            f"layer {number} has replaced heads, and its place in the {type(cache).__name__} is a "
            f"{type(layer).__name__} of {layer.get_seq_length()} tokens: use a fresh dynamic cache"
        )
    layers[number] = kind()
    return layers[number]


def _check_past(mask: Tensor | None, state: HybridState, queries: int) -> None:
    """Raise ValueError where a mask shows other earlier tokens than were read as real."""
    if state.kept is None or torch.compiler.is_compiling():
        return
    held = state.kept.seen
    shown = torch.ones_like(held)
    if mask is not None:
        past = mask[:, 0, -1, : mask.shape[-1] - queries]
        shown = past if mask.dtype == torch.bool else past == 0
    if not torch.equal(shown.expand_as(held), held):
        raise ValueError(
            "a cache with replaced heads was told of other padding before: what a state took in "
            "can be neither hidden nor shown later"
        )
