"""What Hugging Face says of the visible keys, in this library's form.

Hugging Face hands a model's attention a mask of (B, 1, Tq, Tk), made once for all layers, or none.
Here it is asked for as bool; what is None then means what it means to PyTorch's own attention.
Most masks are "causal, and these keys are padding": said that way, and not as a matrix, half of the
work falls away, and the linear systems walk with a state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from aftermax.visible import Visible, hidden_below, pieces

T = TypeVar("T")

ROWS = 128
"""Of a mask that are looked at together."""


def bool_mask(*args, **options) -> Tensor | None:
    """The mask function: True = may be seen; None = causal over equal lengths, or one query.

    A wrapper that names nothing by place, since the arguments differ between versions. "All is
    seen" is never None: a model that is causal in one place and not in another says both by None.
    Nor is "causal", in decoders of models that have encoders too: some of their modules (NLLB-MoE,
    BigBird-Pegasus) say `is_causal = False` and leave it to the mask.
    """
    options["allow_is_bidirectional_skip"] = False
    config = options.get("config")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        options["allow_is_causal_skip"] = False
    mask = sdpa_mask(*args, **options)
    if mask is not None and not torch.compiler.is_compiling():
        mask._aftermax_made_here = True  # type: ignore[attr-defined]
    return mask


def remembered(mask: Tensor, what: str, key: Any, look: Callable[[], T]) -> T:
    """`look()`, once for a mask that goes through all layers; again where it was written to."""
    if hasattr(mask, "_aftermax_made_here"):
        version = 0
    elif mask.is_inference():  # one of the user's own, and nothing tells whether it was changed
        return look()
    else:
        version = mask._version
    name = f"_aftermax_{what}"
    then, known = getattr(mask, name, (version, {}))
    known = known if then == version else {}
    if key not in known:
        known[key] = look()
        setattr(mask, name, (version, known))
    return known[key]


def visible_of(
    mask: Tensor | None,
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Visible:
    """What each query may see.

    Args:
        mask: (B, 1|H, Tq, Tk), bool or additive; longer than the keys, it is cut, as the models'
            own attention does.
        causal: what None means: several queries are the first of the keys, one alone is the last.
        window: a width that the mask may have been made with; only ever used where it agrees.
        bias: (1|B, H, Tq, Tk), added to the scores.
    """
    if mask is not None and mask.shape[-1] > keys:
        mask = mask[..., :keys]
    said = _said(mask, queries, keys, causal, window)
    return said if bias is None else _and_bias(said, mask, bias[..., :keys])


def _said(
    mask: Tensor | None, queries: int, keys: int, causal: bool, window: int | None
) -> Visible:
    if mask is None:
        return Visible(causal=causal, offset=keys - 1 if causal and queries == 1 else 0)
    if mask.ndim != 4 or torch.compiler.is_compiling():
        return Visible(mask=mask)
    key = (causal, window)
    return remembered(mask, "visible", key, lambda: _shortest(mask, causal, window))


def _and_bias(said: Visible, mask: Tensor | None, bias: Tensor) -> Visible:
    """The same keys, and the bias added to their scores."""
    if mask is None:
        return replace(said, mask=bias)
    if mask.dtype == torch.bool:
        return replace(said, mask=bias.masked_fill(~mask, torch.finfo(bias.dtype).min))
    hidden = mask <= hidden_below(mask.dtype)  # two numbers at the lowest would add up to -inf
    both = (bias + mask.masked_fill(hidden, 0)).masked_fill(hidden, -torch.inf)
    return replace(said, mask=both)


def _shortest(mask: Tensor, causal: bool, window: int | None) -> Visible:
    """The same keys without a Tq x Tk matrix, where they can be said so."""
    given = Visible(mask=mask)
    if mask.dtype != torch.bool:
        hidden = mask <= hidden_below(mask.dtype)
        if not (hidden | (mask == 0)).all():
            return given  # it adds to the scores
        mask = ~hidden
    if mask.shape[1] != 1:
        return given
    queries, keys = mask.shape[-2:]
    if (queries > 1 or not causal) and _rows_are_alike(mask):
        return Visible(mask=_or_none(mask[:, :, :1]))
    if not causal:
        return given
    seen = mask.any(-2, keepdim=True)
    last = (mask[:, 0, -1] * torch.arange(1, keys + 1, device=mask.device)).amax()
    offset = int(last) - queries
    for width in {None, window}:
        said = Visible(causal=True, offset=offset, window=width, mask=_or_none(seen))
        if offset >= 0 and _says(said, mask):
            return said
    return given


def _or_none(seen: Tensor) -> Tensor | None:
    return None if seen.all() else seen


def _rows_are_alike(mask: Tensor) -> bool:
    first = mask[:, :, :1]
    return torch.equal(first, mask[:, :, -1:]) and bool((mask == first).all())


def _says(visible: Visible, mask: Tensor) -> bool:
    """Whether these are the keys of the mask, looked at in blocks of rows."""
    queries, keys = mask.shape[-2:]
    for start, stop in pieces(queries, ROWS):
        rows = visible.rows(start, stop, (0, keys), mask.device, torch.float32).visible
        part = mask[:, :, start:stop]
        if not torch.equal(rows.expand_as(part), part):
            return False
    return True
