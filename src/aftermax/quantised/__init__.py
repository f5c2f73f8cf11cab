"""Attention over vector-quantised keys: a codebook and a window in place of the cache."""

from aftermax.quantised.codebook import Codebook, Diagnostics
from aftermax.quantised.ema import DampedEMA, MemoryState
from aftermax.quantised.longvq import LongVQAttention, LongVQState
from aftermax.quantised.vector_quantised import CodeState, VectorQuantised

__all__ = [
    "CodeState",
    "Codebook",
    "DampedEMA",
    "Diagnostics",
    "LongVQAttention",
    "LongVQState",
    "MemoryState",
    "VectorQuantised",
]
