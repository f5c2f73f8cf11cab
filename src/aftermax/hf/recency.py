"""The recency ratio of every head of a Hugging Face model, measured through the door."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from aftermax.dense import Dense
from aftermax.hf.convert import set_implementation
from aftermax.hf.door import LEARNED, OWN, PREFIX, attend_as
from aftermax.hf.masks import bool_mask, visible_of
from aftermax.hybrid.recency import Gathered, Recency
from aftermax.modules import evaluating
from aftermax.weights import Softmax

NAME = f"{PREFIX}recency"


class _Looking(threading.local):
    gathered: Gathered | None = None


_looking = _Looking()


def measure_recency(
    model: PreTrainedModel,
    batches: Sequence[Tensor | dict[str, Any]],
    window: int | float,
    *,
    drop_sink: int = 0,
) -> Recency:
    """RR of every head, over a calibration set: `aftermax.hybrid.recency_ratio` of the queries and
    keys with which each layer attends, RoPE and norms applied.

    Args:
        model: a decoder on transformers' attention interface, whose attention is softmax.
        batches: input ids (B, T), or the arguments of the model with an `attention_mask` that hides
            padding; all of one length.
        window, drop_sink: as in `recency_ratio`. Pretrained models rest on their first token: with
            `drop_sink=0` most of their heads look far-sighted.

    Returns:
        Mean and standard deviation over sequences, (layers, H). The model is as it was.

    Raises:
        ValueError: for layers that have a system of their own, and for what is not whole, causal
            and softmax.

    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2,
    ... )
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> measure_recency(model, [torch.randint(97, (3, 20))], 4).mean.shape
    torch.Size([2, 4])
    """
    own = [n for n, m in model.named_modules() if hasattr(m, OWN) or hasattr(m, LEARNED)]
    if own:
        raise ValueError(f"{', '.join(own)} run a system of their own: measure before converting")
    AttentionInterface.register(NAME, _show)
    AttentionMaskInterface.register(NAME, bool_mask)
    before = str(model.config._attn_implementation)
    gathered = Gathered(window, drop_sink)
    set_implementation(model, NAME)
    _looking.gathered = gathered
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
                model(**given, use_cache=False)
    finally:
        _looking.gathered = None
        set_implementation(model, before)
    if not gathered.ratios:
        raise ValueError(f"no attention of {type(model).__name__} came through the interface")
    return gathered.summary(sorted(gathered.ratios))


def _show(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
):
    """The softmax of the door, which is looked at as it goes through."""
    if _looking.gathered is not None:
        tokens = query.shape[-2]
        window = options.get("sliding_window")
        visible = visible_of(mask, tokens, key.shape[-2], causal=True, window=window)
        number = getattr(module, "layer_idx", None)
        if number is None:
            raise ValueError(f"{type(module).__name__} does not know the number of its layer")
        _looking.gathered.add(number, query, key, visible, options.get("scaling"))
    return attend_as(module, query, key, value, mask, system=Dense(Softmax()), **options)
