"""Losses over classes."""

from aftermax.losses.cross_entropy import cross_entropy
from aftermax.losses.linear_cross_entropy import linear_cross_entropy

__all__ = ["cross_entropy", "linear_cross_entropy"]
