"""Clipped softmax, whose weights reach 0 and 1 exactly, and its form for every length::

    ClippedSoftmax            w_ij = clip((zeta - gamma) p_ij + gamma, 0, 1)        arXiv 2306.12929
    NormalisedClippedSoftmax  the same with zeta = eta, gamma_i = (beta - eta) / (N_i - 1)
                                                                                    arXiv 2402.12102

with p = softmax(s) and N_i the keys that row i sees. A head that wants to do nothing must drive
softmax's scores apart without end to come near 0, and the activations that do it spoil 8-bit
quantisation; here 0 is reached, and a clipped weight has no gradient that would push further.

gamma is one number, fixed at the length of training: the row's sum before clipping,
zeta + (N - 1) gamma, drifts with N, and far past that length all is clipped. In the normalised form
it is beta at every N, and the threshold comes near 1 - beta / eta of the uniform weight as N grows
(it is N (eta - beta) / (N eta - beta) of it).

A weight is 0 where p <= -gamma / (zeta - gamma), and then has no gradient either: a row that is
flat, as all are before training, must lie above it to learn anything. With gamma = -0.025 flat rows
of up to 40 keys do, in the normalised form all of them, as long as beta > 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aftermax import scores as score
from aftermax.entry import Entry, Laws
from aftermax.visible import Rows, count
from aftermax.weights.row_map import Fused, Lengths, RowMap
from aftermax.weights.softmax import softmax_weights


def clipped_softmax_weights(
    scores: Tensor, visible: Tensor, stretch: float | Tensor, shift: float | Tensor
) -> Tensor:
    """clip(stretch * softmax + shift, 0, 1) on the visible keys, 0 elsewhere.

    Args:
        scores: (..., rows, keys), bias already added.
        visible: bool, broadcastable to `scores`.
        stretch, shift: zeta - gamma and gamma <= 0; numbers, or one for each row, (..., rows, 1).

    >>> clipped_softmax_weights(torch.tensor([[0.0, 0.0, 4.0]]), torch.ones(1, 3).bool(), 1.1, -0.1)
    tensor([[0.0000, 0.0000, 0.9611]])
    """
    soft = softmax_weights(scores, visible)
    return (soft * stretch + shift).clamp(0, 1).masked_fill(~visible, 0)


@dataclass(frozen=True)
class ClippedSoftmax(RowMap):
    """clip((zeta - gamma) softmax(s) + gamma, 0, 1) (Bondarenko et al., arXiv 2306.12929, eq. 4).

    Args:
        gamma: at most 0; -0.025 in the authors' script for BERT, trained at 128 tokens.
        zeta: at least 1 and above gamma; 1, as in all their scripts.

    The authors' code reads its entry "clipped(-.005:1.005)" as gamma = -0.003; here what is given
    counts. `for_length` is their other way, gamma = -alpha / T.
    """

    gamma: float = -0.025
    zeta: float = 1.0

    def __post_init__(self):
        if not (self.gamma <= 0 and self.zeta >= 1):
            raise ValueError(
                "clipped softmax needs gamma <= 0 (else hidden keys would weigh something) and "
                f"zeta >= 1, got gamma={self.gamma}, zeta={self.zeta}"
            )

    @classmethod
    def for_length(cls, tokens: int, alpha: float = 12.0) -> ClippedSoftmax:
        """gamma = -alpha / T for a training length T: alpha is 12 in the authors' script for OPT,
        3.2 in effect in that for BERT.

        >>> ClippedSoftmax.for_length(512).gamma
        -0.0234375
        """
        if tokens < 1 or not alpha >= 0:
            raise ValueError(f"a length is 1 or more and alpha 0 or more, got {tokens}, {alpha}")
        return cls(-alpha / tokens)

    def weigh(self, scores: Tensor, rows: Rows, **learned: Tensor) -> Tensor:
        scores = score.add_bias(scores, rows.bias)
        return clipped_softmax_weights(scores, rows.visible, self.zeta - self.gamma, self.gamma)

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        row = torch.ones(1, 1, 1, device="cpu")
        return Fused(
            "clipped", row_weight=row * (self.zeta - self.gamma), row_bias=row * self.gamma
        )


@dataclass(frozen=True)
class NormalisedClippedSoftmax(RowMap):
    """clip(softmax(s) (N_i eta - beta) / (N_i - 1) + (beta - eta) / (N_i - 1), 0, 1).

    p = 1 becomes eta, and a row sums to beta before clipping, whatever N_i (Bondarenko et al.'s
    formula with the row's own length; arXiv 2402.12102). A row that sees one key keeps it.

    Args:
        eta: at least 1; 1.03.
        beta: at most eta; 1.0. Both defaults are those of the one port that is public: the paper's
            own numbers were not to be had. 1 - alpha with eta = 1 is clipped softmax of that alpha
            at every length, but for alpha >= 1 flat rows are all 0 and learn nothing.
    """

    eta: float = 1.03
    beta: float = 1.0

    def __post_init__(self):
        if not (self.eta >= 1 and self.beta <= self.eta):
            raise ValueError(
                "normalised clipped softmax needs eta >= 1 and beta <= eta (else hidden keys would "
                f"weigh something), got eta={self.eta}, beta={self.beta}"
            )

    def weigh(self, scores: Tensor, rows: Rows, **learned: Tensor) -> Tensor:
        stretch, shift = self._rows(count(rows.visible, scores.dtype))
        scores = score.add_bias(scores, rows.bias)
        return clipped_softmax_weights(scores, rows.visible, stretch, shift)

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        stretch, shift = self._rows(lengths.of_rows())
        return Fused("clipped", row_weight=stretch, row_bias=shift)

    def _rows(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """What each row is multiplied by, and what is added."""
        others = (n - 1).clamp_min(1)
        alone = n <= 1
        stretch = torch.where(alone, 1, (n * self.eta - self.beta) / others)
        return stretch, torch.where(alone, 0, (self.beta - self.eta) / others)


CLIPPED = Entry(
    name="clipped",
    title="clipped softmax",
    system=ClippedSoftmax(),
    formula="clip((ζ − γ) softmax + γ, 0, 1)",
    paper="Bondarenko et al. 2023",
    arxiv="2306.12929",
    score="dot / √d",
    positivity="exp",
    normaliser="row sum",
    reweight="stretch, clip",
    laws=Laws(rows_at_most_one=True, shift_invariant=True),
    claim="None about length: γ is fixed at the length of training.",
)

NORMALISED_CLIPPED = Entry(
    name="clipped-normalised",
    title="normalised clipped softmax",
    system=NormalisedClippedSoftmax(),
    formula="clip((η − γ_i) softmax + γ_i, 0, 1),  γ_i = (β − η) / (N_i − 1)",
    paper="No free lunch, 2024",
    arxiv="2402.12102",
    score="dot / √d",
    positivity="exp",
    normaliser="row sum",
    reweight="stretch by N, clip",
    laws=Laws(shift_invariant=True, length_aware=True),
    claim="The same sum before clipping at every length, and nearly the same threshold.",
)
