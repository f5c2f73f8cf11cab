"""Heads of several kinds in one layer: which look near by, and what may stand in their place."""

from aftermax.hybrid.mamba import MambaHeads, MambaState, selective_scan
from aftermax.hybrid.recency import (
    Plan,
    Recency,
    measure_recency,
    of_groups,
    plan_of,
    rank_heads,
    recency_ratio,
    uniform_ratio,
)
from aftermax.hybrid.recurformer import HybridState, RecurFormer, RecurFormerAttention
from aftermax.hybrid.window import SinkWindow, WindowState

__all__ = [
    "HybridState",
    "MambaHeads",
    "MambaState",
    "Plan",
    "Recency",
    "RecurFormer",
    "RecurFormerAttention",
    "SinkWindow",
    "WindowState",
    "measure_recency",
    "of_groups",
    "plan_of",
    "rank_heads",
    "recency_ratio",
    "selective_scan",
    "uniform_ratio",
]
