"""aftermax in Hugging Face models (transformers 4.57 and newer)."""

try:
    import transformers as _  # noqa: F401
except ImportError as error:  # the base install is the library alone
    raise ImportError(
        f"aftermax.hf needs transformers: pip install 'aftermax[hf]' ({error})"
    ) from None

from aftermax.hf.check import Layer, Report, check
from aftermax.hf.convert import convert, load, make_recurrent
from aftermax.hf.distil import Distilled, distil
from aftermax.hf.door import register
from aftermax.hf.loss import causal_lm_loss
from aftermax.hf.recency import measure_recency
from aftermax.hf.recurrent import recurrent_refusal
from aftermax.hf.replace import distil_heads, replace_heads

__all__ = [
    "Distilled",
    "Layer",
    "Report",
    "causal_lm_loss",
    "check",
    "convert",
    "distil",
    "distil_heads",
    "load",
    "make_recurrent",
    "measure_recency",
    "recurrent_refusal",
    "register",
    "replace_heads",
]
