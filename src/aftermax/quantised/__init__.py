"""Attention over vector-quantised keys: a codebook and a window in place of the cache."""

from aftermax.quantised.codebook import Codebook
from aftermax.quantised.vector_quantised import CodeState, VectorQuantised

__all__ = ["CodeState", "Codebook", "VectorQuantised"]
