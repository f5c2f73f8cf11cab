"""The door: every system of the catalogue as an `attn_implementation` of transformers.

`register` makes two entries for each system, the attention function and the mask function. With
the first alone the models run without any mask, and say nothing.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from aftermax import scores
from aftermax.attention import attention_weights
from aftermax.catalogue import CATALOGUE
from aftermax.dense import Dense, System, as_system
from aftermax.hf.masks import bool_mask, visible_of
from aftermax.hf.recurrent import HELD
from aftermax.linear import CosFormer, TransNormer
from aftermax.weights import RowMap, ScaleInvariantSoftmax, SoftmaxSink

PREFIX = "aftermax-"
LEARNED = "aftermax_learned"
"""Of an attention module: the parameters of its system, put there by `convert`."""
OWN = "aftermax_system"
"""Of an attention module: its own system, where it is not the whole model's."""
SAVED = "aftermax"
"""The field of a model's config that says what `convert` did."""

REFUSED = {
    "softcap": "its scores are capped by tanh (softcap), which no system here does; "
    "for Gemma 2 set config.attn_logit_softcapping = None, or stay with 'eager'",
    "head_mask": "a head_mask multiplies the weights, which are never whole here",
    "sinks": "it has sinks of its own form",
    "indices": "it picks its keys by index (a sparse indexer)",
    "block_indices": "it picks its keys by blocks (a sparse indexer)",
    "alibi": "it gives ALiBi as a tensor of its own; give it within the attention mask",
}
"""Arguments of attention that cannot be honoured -> why. None stands for "not used"."""

BY_DISTANCE = (ScaleInvariantSoftmax, CosFormer, TransNormer)


def register(**systems: RowMap | System) -> tuple[str, ...]:
    """Make every system of the catalogue an `attn_implementation`, and those given beside them.

    Args:
        **systems: further systems by name: `register(sharp=LSSAR(power=30))` makes
            "aftermax-sharp"; underscores become hyphens.

    Returns:
        The names. To register twice does no harm.

    Raises:
        TypeError: for what is no system.
        ValueError: for names that transformers takes for something else.

    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> names = register()
    >>> config = LlamaConfig(
    ...     vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2,
    ... )
    >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="aftermax-lssar")
    >>> model(torch.arange(8)[None]).logits.shape
    torch.Size([1, 8, 97])
    """
    named = {entry.name: entry.system for entry in CATALOGUE}
    named |= {name.replace("_", "-"): system for name, system in systems.items()}
    for name in named:
        if any(word in name for word in ("flash", "sdpa", "flex_attention", "/", "|")):
            raise ValueError(f"transformers takes a name like {name!r} for an attention of its own")
    for name, system in named.items():
        attend = functools.partial(attend_as, system=as_system(system))
        AttentionInterface.register(PREFIX + name, attend)
        AttentionMaskInterface.register(PREFIX + name, bool_mask)
    return tuple(PREFIX + name for name in named)


def implementation(attention: str) -> str:
    """The registered name of "lssar" or "aftermax-lssar".

    Raises:
        ValueError: where there is none; the message lists those that there are.

    >>> implementation("lssar")
    'aftermax-lssar'
    """
    names = register()
    name = attention if attention.startswith(PREFIX) else PREFIX + attention
    if name not in AttentionInterface._global_mapping:
        raise ValueError(f"no system is called {attention!r}; there are {', '.join(names)}")
    return name


def system_named(attention: str) -> System:
    """The system that is registered under this name, with or without the prefix."""
    return AttentionInterface._global_mapping[implementation(attention)].keywords["system"]


def system_of(module: nn.Module, otherwise: System) -> System:
    """What this attention module runs: its own system, or the whole model's."""
    return getattr(module, OWN, otherwise)


@dataclass(frozen=True)
class Seen:
    """An attention module that came through the door."""

    module: nn.Module
    system: System
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    sinks: bool
    """Whether the model gives sinks that the system takes for its own."""


class _Looking(threading.local):
    """What this thread looks at: another may be using a model meanwhile."""

    def __init__(self):
        self.seen: list[dict[int, Seen]] = []
        self.on_softmax = False


_looking = _Looking()


@contextlib.contextmanager
def watched() -> Iterator[dict[int, Seen]]:
    """Which modules come through while this is open, by their id."""
    seen: dict[int, Seen] = {}
    _looking.seen.append(seen)
    try:
        yield seen
    finally:
        _looking.seen.pop()


@contextlib.contextmanager
def on_softmax() -> Iterator[None]:
    """While this is open, every module runs softmax: to look at a model, not to use it."""
    before, _looking.on_softmax = _looking.on_softmax, True
    try:
        yield
    finally:
        _looking.on_softmax = before


def attend_as(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    *,
    system: System,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv) -> (B, Tq, H, Dv).

    Queries and keys come placed (RoPE) and with all that the cache holds, or with the layer of the
    cache that holds a state (see `aftermax.hf.recurrent`). `scaling` is taken as
    given by the systems that multiply query and key; those that compare directions, or map both to
    features, have a scale of their own.

    Returns:
        The output, and the weights where `output_attentions` is asked for and there are weights.

    Raises:
        ValueError: for what the model asks of its attention and this system does not do.
    """
    query, key, value = _as_autocast(query, key, value)
    system, learned = system_of(module, system), dict(getattr(module, LEARNED, {}))
    held, sinks = kwargs.pop(HELD, None), kwargs.pop("s_aux", None)
    if not torch.compiler.is_compiling():  # which is never done to look
        if _looking.on_softmax:
            system, learned, held = Dense(SoftmaxSink()), {}, None
        if _looking.seen:
            shape = (query.shape[1], query.shape[-1], value.shape[-1])
            found = Seen(module, system, *shape, query.dtype, query.device, sinks is not None)
            _looking.seen[-1].setdefault(id(module), found)
    weights = system.weights if isinstance(system, Dense) else None
    if sinks is not None and isinstance(weights, SoftmaxSink):
        learned["sink"] = sinks
        sinks = None
    _refuse(module, system, sinks, attention_mask, kwargs)
    scaled = {"scale": scaling} if _is_scaled(system) else {}
    if held is not None:
        options = {"dropout_p": dropout, **scaled, **learned}
        out = held.attend(system, query, key, value, attention_mask, **options)
        return out.transpose(1, 2).contiguous(), None
    # some models say False where they mean "not by PyTorch's flag": beside a mask, for one query
    if is_causal is None or attention_mask is not None or query.shape[-2] == 1:
        is_causal = getattr(module, "is_causal", True)
    visible = visible_of(
        attention_mask,
        query.shape[-2],
        key.shape[-2],
        causal=bool(is_causal),
        window=kwargs.get("sliding_window"),
        bias=kwargs.get("position_bias"),
    )
    if by_distance(system) and query.shape[-2] != key.shape[-2] and not visible.causal:
        raise ValueError(
            f"{type(module).__name__} with {system}, which weighs keys by distance: "
            f"{query.shape[-2]} queries to {key.shape[-2]} keys, and nothing says where they stand "
            "(cross-attention, a mask that is not causal, a compiled model with a static cache)"
        )
    options: dict[str, Any] = {"enable_gqa": True, **scaled, **learned}
    out = system.attend(query, key, value, visible, dropout_p=dropout, **options)
    rows = None
    if weights is not None and kwargs.get("output_attentions"):
        rows = attention_weights(query, key, weights=weights, attn_mask=visible, **options)
        rows = rows.to(query.dtype)
    return out.transpose(1, 2).contiguous(), rows


def by_distance(system: System) -> bool:
    """Whether the system must know how far a key is from its query, beside what it sees."""
    return isinstance(getattr(system, "weights", system), BY_DISTANCE)


def _is_scaled(system: System) -> bool:
    """Whether it multiplies query and key, some heads at least, and so takes the model's scale."""
    of = getattr(system, "dense", system)
    return isinstance(weights := getattr(of, "weights", of), RowMap) and (
        weights.prepare is scores.dot
    )


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype, as PyTorch's own attention has them: rotary positions, or a norm, may
    have made float32 of queries and keys, and not of values."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    half = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(half) for x in tensors)


def _refuse(
    module: nn.Module, system: System, sinks: Tensor | None, mask: Tensor | None, kwargs: dict
) -> None:
    problems = [why for name, why in REFUSED.items() if kwargs.get(name) is not None]
    if sinks is not None:
        problems.append("it has attention sinks (s_aux), which 'aftermax-sink' alone honours")
    if kwargs.get("position_bias") is not None and not isinstance(system, Dense):
        problems.append("it adds a position_bias to the scores, and this system has no scores")
    if mask is None and kwargs.get("cu_seq_lens_q") is not None:
        problems.append("its sequences are packed by cu_seq_lens alone; give position_ids instead")
    if problems:
        raise ValueError(f"{type(module).__name__} with {system}: {'; '.join(problems)}")
