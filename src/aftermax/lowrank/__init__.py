"""Attention through a few landmarks: T x m and m x m matrices in place of T x T."""

from aftermax.lowrank.newton import newton_inverse
from aftermax.lowrank.soft import SOFT, SOFTAttention, soft_attention

__all__ = ["SOFT", "SOFTAttention", "newton_inverse", "soft_attention"]
