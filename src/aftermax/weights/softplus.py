"""LSSA and LSSAR: softplus, an l1 norm, and a power of what stands above the row's mean.

Gao & Spratling, "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large
Language Models", arXiv 2501.13428 (ICML 2026). With f_ij = softplus(ln(d) ln(N_i) cos(q_i, k_j))::

    LSSA    w_ij = f_ij / sum_j f_ij
    LSSAR   A_ij = f_ij / sum_j f_ij,   R_ij = relu(A_ij N_i - o_i)^p,   w_ij = R_ij / sum_j R_ij

where o_i = 0 in the first three rows and 1 elsewhere. Typed in literally, R overflows float16 (and
float32, where one key stands out) and underflows on flat rows. What stands here is the same
function without the trap: A_ij N_i = f_ij / mu_i with mu_i the mean of f over the visible keys, and
the second norm cancels every factor of a row, so that::

    w_ij ~ (relu(f_ij - o_i mu_i) / max_j relu(f_ij - o_i mu_i))^p

is exactly LSSAR, with every number in [0, 1]. N is no second length scale: it only makes the
threshold the row's mean. A row whose maximum is within 1e-6 of its mean (all scores equal up to
rounding) has nothing to sharpen and takes its LSSA weights; else rounding noise would be sharpened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aftermax import scores as score
from aftermax.entry import Entry, Laws
from aftermax.visible import Rows, count
from aftermax.weights.row_map import Fused, Lengths, RowMap, log_lengths, raise_to, row_total

FLAT = 1e-6
"""A row is flat where its maximum exceeds its mean by no more than this share of the mean."""


def softplus_rows(scores: Tensor, visible: Tensor) -> Tensor:
    """softplus(scores) = ln(1 + e^s), 0 where a key is not visible, exact at both ends."""
    return torch.logaddexp(scores.masked_fill(~visible, -math.inf), scores.new_zeros(()))


def lssa_weights(scores: Tensor, visible: Tensor) -> Tensor:
    """l1-normalised softplus over the visible keys of each row (arXiv 2501.13428, stage 1).

    >>> lssa_weights(torch.zeros(1, 3), torch.tensor([[True, True, False]]))
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    f = softplus_rows(scores, visible)
    # already 0 where hidden: this keeps a hidden key's gradient out of the row's total
    return (f / row_total(f)).masked_fill(~visible, 0)


def lssar_weights(scores: Tensor, visible: Tensor, power: float | Tensor) -> Tensor:
    """LSSA re-weighted: only what exceeds the row's mean is kept, raised to `power`, normalised.

    Args:
        scores: (..., rows, keys), scaled, bias already added.
        visible: bool, broadcastable to `scores`.
        power: p >= 1; a number, or one for each row, (..., rows, 1).

    >>> lssar_weights(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.ones(1, 4).bool(), 2)
    tensor([[0.0000, 0.0000, 0.0654, 0.9346]])
    """
    f = softplus_rows(scores, visible)
    n = count(visible, f.dtype)
    mean = f.sum(-1, keepdim=True) / n.clamp_min(1)
    threshold = torch.where(n > 3, mean, 0)
    above = (f - threshold).relu()  # 0 where hidden, where f is 0
    top = above.detach().amax(-1, keepdim=True)  # a factor of the row, which the norm cancels
    flat = top <= FLAT * mean
    # 0 in flat rows: what rounding left there, raised to a power, has no gradient in float32
    share = torch.where(flat, 0, above / torch.where(flat, 1, top))
    sharpened = raise_to(share, power)
    weights = torch.where(flat, f / row_total(f), sharpened / row_total(sharpened))
    return weights.masked_fill(~visible, 0)  # as in `lssa_weights`


@dataclass(frozen=True)
class LSSA(RowMap):
    """Length-scaled softplus attention: `lssa_weights` of ln(d) ln(N_i) cos(q_i, k_j).

    No parameter, learned or not. The factor ln(d) ln(N_i) replaces 1/sqrt(d), and N_i is the number
    of keys that row i sees, in training and at any length after it. `attention(scale=...)` replaces
    ln(d).
    """

    prepare = staticmethod(score.cosine)
    scale = staticmethod(score.log_dim)

    def _scores(self, scores: Tensor, rows: Rows) -> Tensor:
        scores = scores * score.log_count(rows.visible, scores.dtype)
        return score.add_bias(scores, rows.bias)

    def weigh(self, scores, rows: Rows, **learned: Tensor) -> Tensor:
        return lssa_weights(self._scores(scores, rows), rows.visible)

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        return Fused("softplus", row_scale=log_lengths(lengths.of_rows()))


@dataclass(frozen=True)
class LSSAR(LSSA):
    """LSSA with re-weighting: `lssar_weights` with a constant power.

    Args:
        power: p, at least 1. 15 is the paper's choice for long contexts, 3 its best at the
            training length.
    """

    power: float = 15

    def __post_init__(self):
        if not self.power >= 1:
            raise ValueError(f"lssar needs power >= 1, got {self.power}")

    def weigh(self, scores, rows: Rows, **learned: Tensor) -> Tensor:
        return lssar_weights(self._scores(scores, rows), rows.visible, self.power)

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        count = lengths.of_rows()
        scale = log_lengths(count)
        return Fused("lssar", row_scale=scale, count=count, power=self.power)


@dataclass(frozen=True)
class LSSARLog(LSSA):
    """LSSAR with a power that grows with the row, p_i = max(1, factor * ln N_i). Ours.

    Args:
        factor: 2 by default: the maximum of N Gaussian scores grows like sqrt(2 ln N), and a power
            keeps picking it out while p stays above about 2 ln N. A constant power falls behind on
            rows much longer than e^(p/2).
    """

    factor: float = 2.0

    def __post_init__(self):
        if not self.factor > 0:
            raise ValueError(f"lssar-log needs factor > 0, got {self.factor}")

    def weigh(self, scores, rows: Rows, **learned: Tensor) -> Tensor:
        power = (self.factor * score.log_count(rows.visible, scores.dtype)).clamp_min(1)
        return lssar_weights(self._scores(scores, rows), rows.visible, power)

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        count = lengths.of_rows()
        scale = log_lengths(count)
        power = (self.factor * scale).clamp_min(1)
        return Fused("lssar", row_scale=scale, count=count, row_power=power)


LSSA_ENTRY = Entry(
    name="lssa",
    title="LSSA",
    system=LSSA(),
    formula="f / Σ f,  f = softplus(ln(d) ln(N_i) cos)",
    paper="Gao & Spratling 2025",
    arxiv="2501.13428",
    score="cosine · ln d · ln N",
    positivity="softplus",
    normaliser="row sum",
    laws=Laws(rows_sum_to_one=True, rows_at_most_one=True, scale_free=True, length_aware=True),
    claim="Like softmax at 1x, slightly better past it (8x: 5.94 against 6.28).",
)

LSSAR_ENTRY = Entry(
    name="lssar",
    title="LSSAR (p = 15)",
    system=LSSAR(),
    formula="relu(f − mean f)^15, l1-normalised",
    paper="Gao & Spratling 2025",
    arxiv="2501.13428",
    score="cosine · ln d · ln N",
    positivity="softplus",
    normaliser="row mean, row sum",
    reweight="power 15",
    laws=Laws(rows_sum_to_one=True, rows_at_most_one=True, scale_free=True, length_aware=True),
    claim="Validation loss nearly constant to 16x (1x 3.19, 8x 3.32).",
)

LSSAR_LOG_ENTRY = Entry(
    name="lssar-log",
    title="LSSAR (p = 2 ln N)",
    system=LSSARLog(),
    formula="relu(f − mean f)^(2 ln N_i), l1-normalised",
    paper="ours, after Gao & Spratling 2025",
    arxiv="2501.13428",
    score="cosine · ln d · ln N",
    positivity="softplus",
    normaliser="row mean, row sum",
    reweight="power 2 ln N",
    laws=Laws(rows_sum_to_one=True, rows_at_most_one=True, scale_free=True, length_aware=True),
    claim="None published: our extension.",
    ours=True,
)
