"""Sparse attention: each query sees some of the keys, those that a score picks.

The operator `sparsek` is `aftermax.sparsek`; here that name is the file of the system.
"""

from aftermax.sparse.sparsek import SparseK, SparseKAttention
from aftermax.sparse.state import SparseKState
from aftermax.sparse.stream import Threshold

__all__ = ["SparseK", "SparseKAttention", "SparseKState", "Threshold"]
