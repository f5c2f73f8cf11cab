"""Sigmoid attention: w_ij = sigmoid(s_ij + b) with b = -ln n. No key competes with another.

Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", arXiv
2409.04431. A row's mass stays near 1.65 for random queries and keys with b = -ln n and would grow
like n / 2 with b = 0. Which n is meant differs between published codes; here it is a choice::

    "row"       the keys that this row sees (ours, and the default: rows of one model at any length,
                cached or not, then agree)
    "sequence"  the keys that any row of the sequence sees (as triton-sigmoid counts them)
    an int      one constant, the training length (as Apple's own language model sets it)

Early rows get next to no attention under a constant n (mass n_i / n), by the authors' design.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aftermax import scores as score
from aftermax.entry import Entry, Laws
from aftermax.visible import Rows, count
from aftermax.weights.row_map import Fused, Lengths, RowMap, log_lengths


def sigmoid_weights(scores: Tensor, visible: Tensor, bias: Tensor | float) -> Tensor:
    """sigmoid(scores + bias) on the visible keys, 0 elsewhere.

    >>> sigmoid_weights(torch.zeros(1, 2), torch.tensor([[True, False]]), 0.0)
    tensor([[0.5000, 0.0000]])
    """
    # hidden before, not after: sigmoid(-inf) is 0, and a hidden score that overflowed leaves no NaN
    return torch.sigmoid((scores + bias).masked_fill(~visible, -math.inf))


@dataclass(frozen=True)
class Sigmoid(RowMap):
    """sigmoid(s_ij - ln n), unnormalised.

    Args:
        n: `"row"` (default), `"sequence"` or a constant length; see the head of this file. With
            "sequence" a later token changes earlier rows, so that a cached decode differs from the
            full pass: that is the formula, and the reason why it is not the default.
    """

    n: Literal["row", "sequence"] | int = "row"

    def __post_init__(self):
        if self.n not in ("row", "sequence") and not (isinstance(self.n, int) and self.n >= 1):
            raise ValueError(
                f"sigmoid needs n = 'row', 'sequence' or a length >= 1, got {self.n!r}"
            )

    @property
    def needs_sequence_count(self) -> bool:  # type: ignore[override]
        return self.n == "sequence"

    def weigh(self, scores, rows: Rows, **learned: Tensor) -> Tensor:
        if self.n == "row":
            n = count(rows.visible, scores.dtype)
        elif self.n == "sequence":
            assert rows.sequence is not None
            n = rows.sequence.to(scores.dtype)
        else:
            n = scores.new_full((), self.n)
        return sigmoid_weights(
            score.add_bias(scores, rows.bias), rows.visible, -n.clamp_min(1).log()
        )

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        if self.n == "row":
            n = lengths.of_rows()
        elif self.n == "sequence":
            n = lengths.of_sequence()
        else:
            n = torch.full((1, 1, 1), float(self.n), device="cpu")
        return Fused("sigmoid", row_bias=-log_lengths(n))


ENTRY = Entry(
    name="sigmoid",
    title="sigmoid",
    system=Sigmoid(),
    formula="sigmoid(s − ln N_i)",
    paper="Ramapuram et al. 2024",
    arxiv="2409.04431",
    score="dot / √d",
    positivity="sigmoid",
    normaliser="bias −ln N",
    laws=Laws(length_aware=True),
    claim="Equal to softmax at the training length; "
    "others report the worst loss past it (8x: 14.50, 2501.13428).",
)
