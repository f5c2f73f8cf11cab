"""Decoding from a state of one size, in the cache of transformers: linear systems, SparseK, LongVQ.

Through the door alone a model keeps all keys and values, whatever its attention is. A layer that is
`carry`-ed keeps its system's state in their place: its entry of the model's cache is a
`RecurrentLayer`, which hands the new keys and values on and takes the state in. The attention
modules stay what they are, with their projections, norms and rotary positions, so that this is a
matter of the cache and of nothing else: the logits are those of a model that keeps all keys.

Rotary positions are applied to queries and keys as the model does it, for systems that do without
or have positions of their own too: what runs is what runs with a full cache.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from aftermax.dense import System
from aftermax.hf.masks import remembered
from aftermax.linear.cosformer import CosFormer
from aftermax.state import changed, tensors_of
from aftermax.visible import Visible, hidden_below

CARRIED = "aftermax_recurrent"
"""Of an attention module: the hook that gives it a state. Of a config: the layers that have one."""

HELD = "aftermax_held"
"""The argument by which a module hands its `RecurrentLayer` on to the door."""

CACHE_NAMES = ("cache", "past_key_values")
"""How the forward of an attention module calls the cache: from transformers 5 on, and before."""

_Theirs: Any = getattr(cache_utils, "LinearAttentionLayer", None)
_Bases: tuple[Any, ...] = (CacheLayerMixin,) if _Theirs is None else (_Theirs, CacheLayerMixin)


class RecurrentLayer(*_Bases):
    """A layer of a cache that holds the state of a system of `fixed_size`, and not all keys.

    From transformers 5 on it is one of their `LinearAttentionLayer`: its recurrent states are the
    state's tensors. Unlike theirs it knows how many tokens went in, so that it may be the first
    layer of a cache, which a model asks for masks and positions.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self):
        CacheLayerMixin.__init__(self)
        if _Theirs is not None:
            _Theirs.__init__(self, number_of_states=3)
        self.state: Any = None
        self.handed = 0
        """Tokens whose keys were handed on; the state has them too, or the door was not called."""

    # ---- what the attention module and the door do ----

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """The new keys and values, alone."""
        if self.handed != self.get_seq_length():
            raise ValueError(
                f"a layer with a recurrent cache handed on {self.handed} tokens, and its state has "
                f"{self.get_seq_length()}: its model no longer runs an attention of aftermax"
            )
        self.handed += key_states.shape[-2]
        return key_states, value_states

    def attend(
        self,
        system: System,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """The next tokens after the state, which takes them in: as `System.step`.

        Args:
            mask: (B, 1, T, all tokens so far), bool or additive: causal, beside padding.

        Raises:
            ValueError: for a system that has no state, and for any other mask.
        """
        self.check_system(system)
        self.handed = self.get_seq_length()  # until the state has the new ones
        state, seen = self.state, seen_tokens(mask, query.shape[-2])
        if state is not None:
            self.check_past(mask, query.shape[-2])
        else:
            batch, kv_heads, _, width = key.shape
            factory = {"device": key.device, "dtype": key.dtype}
            state = system.init_state(batch, kv_heads, width, value.shape[-1], **factory)
        out, state = system.step(
            query, key, value, state, Visible(causal=True), seen, enable_gqa=True, **options
        )
        self.hold(self.alone(state))
        return out

    def check_system(self, system: System) -> None:
        """Raise ValueError for a system that has no state of one size."""
        refused = why_no_state(system)
        if refused is not None:
            raise ValueError(f"a layer with a recurrent cache: {refused}")

    def check_past(self, mask: Tensor | None, queries: int) -> None:
        """Raise ValueError where a mask shows other earlier tokens than the state took in."""
        check_past(mask, self.state, queries)

    def alone(self, state: Any) -> Any:
        """The state without views that keep something larger."""
        return changed(state, _alone)

    def hold(self, state: Any) -> None:
        """Keep this state in the place of what there was."""
        self.state, self.handed = state, 0 if state is None else state.length
        self.is_initialized = state is not None
        if _Theirs is not None:
            tensors = [None] * 3 if state is None else list(tensors_of(state).values())
            self.recurrent_states = dict(enumerate(tensors))
            for known in (self.is_recurrent_states_initialized, self.has_previous_state):
                known.update(dict.fromkeys(self.recurrent_states, state is not None))

    # ---- what a cache asks of its layers ----

    @property
    def bytes(self) -> int:
        """Of the state, in all rows of the batch."""
        return 0 if self.state is None else self.state.bytes

    @property
    def batch(self) -> int:
        return 0 if self.state is None else self.state.count.shape[0]

    def lazy_initialization(self, *_, **__) -> None:
        """The state is made by the first tokens."""

    def get_seq_length(self) -> int:
        return 0 if self.state is None else self.state.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """As if the keys were there: the mask says which of the new tokens are padding."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + new, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.hold(None)

    def offload(self) -> None:
        """Nothing: one state is small."""

    def prefetch(self) -> None:
        """Nothing was moved."""

    def activate_past_recording(self) -> None:
        raise ValueError(NO_WAY_BACK)

    def crop(self, to: int) -> None:
        """Nothing, where nothing is to be taken back.

        Raises:
            ValueError: for anything else.
        """
        whole = to == 0 if _Theirs is not None else to >= self.get_seq_length()  # takes back, or to
        if not whole:
            raise ValueError(NO_WAY_BACK)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.hold(self.state.reorder(indices))


NO_WAY_BACK = (
    "a recurrent cache cannot take tokens back, which assisted decoding asks for: "
    "convert the model with cache='full'"
)


def recurrent_refusal(
    model: PreTrainedModel, module: nn.Module, system: System | None = None
) -> str | None:
    """Why this attention module of this model cannot keep a state in place of keys; None if it can.

    Args:
        system: what it runs, where that is to be looked at too.
    """
    refused = None if system is None else why_no_state(system)
    if refused is not None:
        return refused
    kind = type(module).__name__
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "generate"):
        return "only decoders that generate have a cache of one layer for each attention"
    if not getattr(module, "is_causal", True):
        return f"{kind} is not causal"
    number = getattr(module, "layer_idx", None)
    takes = inspect.signature(module.forward).parameters
    if number is None or not set(CACHE_NAMES) & set(takes):
        return f"{kind} is not given the cache, with a number of its layer in it"
    if not any(x.kind is inspect.Parameter.VAR_KEYWORD for x in takes.values()):
        return f"{kind} hands no further arguments on to its attention"
    kept = DynamicCache(config=config).layers
    if number < len(kept) and type(kept[number]) is not DynamicLayer:
        return (
            f"its place in the cache is a {type(kept[number]).__name__}, and a state has no window "
            "that it could forget by: build the model with sliding_window=None, or leave out the "
            "layer"
        )
    return None


def why_no_state(system: System) -> str | None:
    """Why this system has no state of one size; None if it has."""
    if not getattr(system, "fixed_size", False):
        return f"{getattr(system, 'weights', system)} needs all keys and values, not a state"
    if isinstance(system, CosFormer) and system.horizon == "length":
        return "cosFormer with horizon='length' changes its past: give it a number"
    return None


def carry(module: nn.Module, recurrent: bool) -> None:
    """Let this attention module keep a state, or all keys."""
    handle = getattr(module, CARRIED, None)
    if recurrent and handle is None:
        setattr(module, CARRIED, module.register_forward_pre_hook(_give_state, with_kwargs=True))
    if not recurrent and handle is not None:
        handle.remove()
        delattr(module, CARRIED)


def is_carried(module: nn.Module) -> bool:
    return hasattr(module, CARRIED)


def _give_state(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Before an attention module runs: its layer of the cache is one with a state."""
    cache = next((kwargs[n] for n in CACHE_NAMES if kwargs.get(n) is not None), None)
    if cache is None:
        return None
    return args, kwargs | {HELD: layer_of(cache, module.layer_idx)}  # type: ignore[arg-type]


def layer_of(cache: Any, number: int) -> RecurrentLayer:
    """The layer of that number, made one with a state where it is empty.

    Raises:
        ValueError: for a cache that is not dynamic, and for one that holds keys in this layer.
    """
    layers, kind = cache.layers, getattr(cache, "layer_class_to_replicate", None)
    while kind is not None and len(layers) <= number:
        layers.append(kind())
    layer = layers[number]
    if isinstance(layer, RecurrentLayer):
        return layer
    asked = f"layer {number} keeps a state"
    if type(layer) is not DynamicLayer or getattr(cache, "offloading", False):
        raise ValueError(
            f"{asked}, and the cache is a {type(cache).__name__} with {type(layer).__name__}: use "
            "a dynamic cache (cache_implementation=None), or convert with cache='full'"
        )
    if layer.get_seq_length():
        raise ValueError(
            f"{asked}, and the cache holds {layer.get_seq_length()} keys there, of another model"
        )
    layers[number] = RecurrentLayer()
    return layers[number]


def _alone(x: Tensor) -> Tensor:
    """x, but not as a view that keeps something larger: what all tokens, or all heads, had."""
    if torch.compiler.is_compiling() or x.untyped_storage().nbytes() == x.nbytes:
        return x
    return x.clone(memory_format=torch.contiguous_format)


# ---- masks ----


def seen_tokens(mask: Tensor | None, queries: int) -> Tensor | None:
    """bool (B, T): which of the new tokens later ones may see; None = all.

    Raises:
        ValueError: for a mask that says more than "causal, and these tokens are padding".
    """
    if mask is None:
        return None
    if torch.compiler.is_compiling():
        return _seen_tokens(mask, queries)
    return remembered(mask, "seen", queries, lambda: _seen_tokens(mask, queries))


def _seen_tokens(mask: Tensor, queries: int) -> Tensor | None:
    if mask.dtype != torch.bool:
        hidden = mask <= hidden_below(mask.dtype)
        if not (hidden | (mask == 0)).all():
            raise ValueError(f"{ONLY_PADDING}, and the mask adds to the scores")
        mask = ~hidden
    if mask.ndim != 4 or mask.shape[1] != 1 or not mask.shape[-1] >= queries == mask.shape[-2]:
        raise ValueError(
            f"{ONLY_PADDING}: a mask of (B, 1, {queries}, tokens so far), got {tuple(mask.shape)}"
        )
    mask = mask[:, 0]
    past = mask.shape[-1] - queries
    seen = mask[..., past:].diagonal(dim1=-2, dim2=-1)  # each token sees itself, or nobody does
    if torch.compiler.is_compiling():
        return seen
    if queries > 1:
        before = mask[..., :past].any(-2, keepdim=True).expand(-1, queries, -1)
        ours = seen[:, None].expand(-1, queries, -1).tril()
        if not torch.equal(torch.cat([before, ours], -1), mask):
            raise ValueError(f"{ONLY_PADDING}, and the mask differs from query to query")
    return None if seen.all() else seen


def check_past(mask: Tensor | None, state: Any, queries: int) -> None:
    """Raise ValueError where a mask shows other earlier tokens than the state took in.

    By their number, which is all that a state knows of them.
    """
    if torch.compiler.is_compiling():
        return
    shown = torch.full_like(state.count, state.length)
    if mask is not None:
        past = mask[:, 0, -1, : mask.shape[-1] - queries]
        shown = (past if mask.dtype == torch.bool else past > hidden_below(mask.dtype)).sum(-1)
    if not torch.equal(shown.expand_as(state.count).to(state.count.dtype), state.count):
        raise ValueError(
            f"a recurrent cache took in {state.count.tolist()} tokens of the rows, and the mask "
            f"shows {shown.tolist()} of them: what was summed can be neither hidden nor shown later"
        )


ONLY_PADDING = "a recurrent cache takes a mask that is causal and hides padding"
