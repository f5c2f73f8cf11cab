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
from aftermax.hf.recurrent import recurrent_refusal

__all__ = [
    "Distilled",
    "Layer",
    "Report",
    "causal_lm_loss",
    "check",
    "convert",
    "distil",
    "load",
    "make_recurrent",
    "recurrent_refusal",
    "register",
]
