"""Softmax and the forms of it that know how long a row is, or that may look away::

    Softmax                 w_ij = exp(s_ij) / sum_j exp(s_ij)                   arXiv 1706.03762
    Softmax("log_n")        the same of  s * ln(N_i) * s_ij                      arXiv 2501.19399
    CosineSoftmax           the same of  ln(d) * ln(N_i) * cos(q_i, k_j)         arXiv 2501.13428
    ScaleInvariantSoftmax   the same of  a_t * s_ij + m_t, t = i - j             arXiv 2505.17083
    SoftmaxSink             w_ij = exp(s_ij) / (exp(b_h) + sum_j exp(s_ij))      arXiv 2508.10925
    SoftmaxOne              the same with b_h = 0                                Miller 2023

N_i is the number of keys that row i sees. A row that sees nothing gets weights of 0, not NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aftermax import scores as score
from aftermax.entry import Entry, Laws
from aftermax.visible import Rows
from aftermax.weights.row_map import Fused, Lengths, RowMap, log_lengths, per_head


def softmax_weights(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible keys of each row.

    Args:
        scores: (..., rows, keys), bias already added.
        visible: bool, broadcastable to `scores`.

    Returns:
        Weights of the shape of `scores`; a row sums to 1, or to 0 where it sees nothing.

    >>> softmax_weights(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    hidden = ~visible
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return weights.masked_fill(hidden, 0)  # an empty row is NaN up to here, forward and backward


def softmax_sink_weights(scores: Tensor, visible: Tensor, sink: Tensor) -> Tensor:
    """Softmax with one more key of score `sink` and value 0: a row may sum to less than 1.

    Args:
        scores, visible: as in `softmax_weights`.
        sink: broadcastable to (..., rows, 1); 0 gives "softmax one".

    >>> softmax_sink_weights(torch.zeros(1, 1), torch.ones(1, 1).bool(), torch.zeros(1, 1))
    tensor([[0.5000]])
    """
    hidden = ~visible
    sink = sink.expand(*scores.shape[:-1], 1)
    widened = torch.cat([scores.masked_fill(hidden, -math.inf), sink], -1).softmax(-1)
    return widened[..., :-1].masked_fill(hidden, 0)


def distance_scale_and_shift(
    distance: Tensor, tau: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """a_t and m_t of scale-invariant attention at distance t, with alpha = beta = e^(1/2).

        a_t^2 = 2 (ln(t / tau + 1) - ln(alpha) + beta / alpha),   m_t = -a_t^2 + beta / alpha

    so that a_0 = 1 and m_0 = 0: a query meets itself with its plain score.
    """
    log_alpha, ratio = 0.5, 1.0  # of alpha = beta = e^(1/2), the paper's choice
    squared = 2 * (torch.log1p(distance.abs().to(dtype) / tau) - log_alpha + ratio)
    return squared.sqrt(), ratio - squared


@dataclass(frozen=True)
class Softmax(RowMap):
    """softmax(scores), the field's default; with `scale_rule="log_n"` scalable softmax.

    Args:
        scale_rule: `None` leaves the scores alone. `"log_n"` multiplies row i by `s ln N_i`
            (SSMax, Nakanishi, arXiv 2501.19399; Chiang & Cholak, arXiv 2202.12172, with s = 1),
            so that a longer row is sharper. `s` is learned for each head: `attention(..., s=...)`
            takes it, `Attention` owns it.
        s: initial value of the learned `s`, 0.168 = 1 / (mean of ln n for n up to 1024).

    A count of 1 gives a factor of 0; with one key that changes nothing.

    >>> Softmax(scale_rule="log_n")
    Softmax(scale_rule='log_n', s=0.168)
    """

    scale_rule: Literal["log_n"] | None = None
    s: float = 0.168

    def __post_init__(self):
        if self.scale_rule not in (None, "log_n"):
            raise ValueError(f"scale_rule must be None or 'log_n', got {self.scale_rule!r}")

    def weigh(self, scores, rows: Rows, **learned: Tensor) -> Tensor:
        if self.scale_rule == "log_n":
            # a hidden score that overflowed must not reach the gradient of s
            scores = scores.masked_fill(~rows.visible, 0) * (
                per_head(learned["s"], scores) * score.log_count(rows.visible, scores.dtype)
            )
        return softmax_weights(score.add_bias(scores, rows.bias), rows.visible)

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        if self.scale_rule is None:
            return Fused("softmax")
        return Fused(
            "softmax", row_scale=learned["s"].float()[:, None] * log_lengths(lengths.of_rows())
        )

    def learned(self, heads: int, value_dim: int) -> dict[str, Tensor]:
        return {"s": torch.full((heads,), self.s)} if self.scale_rule == "log_n" else {}


@dataclass(frozen=True)
class CosineSoftmax(RowMap):
    """softmax(ln(d) ln(N_i) cos(q_i, k_j)): softmax with LSSA's normalisation and length factor.

    The honest baseline for every length-aware system: what LSSAR adds must be measured against it,
    since the cosine and the factor ln(d) ln(N_i) already keep the number of attended keys nearly
    constant as rows grow. `attention(scale=...)` replaces ln(d). No learned parameter.
    """

    prepare = staticmethod(score.cosine)
    scale = staticmethod(score.log_dim)

    def weigh(self, scores, rows: Rows, **learned: Tensor) -> Tensor:
        scores = scores * score.log_count(rows.visible, scores.dtype)
        return softmax_weights(score.add_bias(scores, rows.bias), rows.visible)

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        return Fused("softmax", row_scale=log_lengths(lengths.of_rows()))


@dataclass(frozen=True)
class ScaleInvariantSoftmax(RowMap):
    """softmax(a_t s_ij + m_t) at distance t = i - j (Anson, Wang & Aitchison, arXiv 2505.17083).

    Args:
        tau: length scale in positions; 10 in the paper.

    The scale a_t grows and the shift m_t falls with the logarithm of the distance, so that every
    octave of distance gets a similar share of a row. The authors use it with QK-norm and partial
    RoPE. Distances are index differences and are right under padding and with a cache; in
    a bidirectional row we take ``|i - j|``, which the paper does not treat.
    """

    tau: float = 10.0

    def __post_init__(self):
        if self.tau <= 0:
            raise ValueError(f"tau is a length in positions and must be above 0, got {self.tau}")

    def weigh(self, scores, rows: Rows, **learned: Tensor) -> Tensor:
        stretch, shift = distance_scale_and_shift(rows.distance, self.tau, scores.dtype)
        return softmax_weights(score.add_bias(stretch * scores + shift, rows.bias), rows.visible)

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        stretch, shift = distance_scale_and_shift(lengths.distances(), self.tau, torch.float32)
        return Fused("softmax", by_distance=torch.stack([stretch, shift]))


@dataclass(frozen=True)
class SoftmaxOne(RowMap):
    """exp(s_ij) / (1 + sum_j exp(s_ij)): a row may look away (Miller, 2023, off by one)."""

    def weigh(self, scores, rows: Rows, **learned: Tensor) -> Tensor:
        scores = score.add_bias(scores, rows.bias)
        return softmax_sink_weights(scores, rows.visible, scores.new_zeros(()))

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        return Fused("softmax", sink=torch.zeros(lengths.heads, device="cpu"))


@dataclass(frozen=True)
class SoftmaxSink(RowMap):
    """exp(s_ij) / (exp(sink_h) + sum_j exp(s_ij)) with a learned sink for each head, as in gpt-oss.

    `attention(..., sink=...)` takes the (H,) sinks, `Attention` owns them; they start at 0, where
    this is `SoftmaxOne`. gpt-oss draws them from a normal distribution; 0 is our choice.
    """

    def weigh(self, scores, rows: Rows, **learned: Tensor) -> Tensor:
        scores = score.add_bias(scores, rows.bias)
        return softmax_sink_weights(scores, rows.visible, per_head(learned["sink"], scores))

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        return Fused("softmax", sink=learned["sink"])

    def learned(self, heads: int, value_dim: int) -> dict[str, Tensor]:
        return {"sink": torch.zeros(heads)}


SOFTMAX = Entry(
    name="softmax",
    title="softmax",
    system=Softmax(),
    formula="exp(s) / Σ exp(s)",
    paper="Vaswani et al. 2017",
    arxiv="1706.03762",
    score="dot / √d",
    positivity="exp",
    normaliser="row sum",
    laws=Laws(rows_sum_to_one=True, rows_at_most_one=True, shift_invariant=True),
    claim="The default; with RoPE its loss rises steeply past the training length (2501.13428).",
)

LOG_N = Entry(
    name="log-n",
    title="log-n softmax (SSMax)",
    system=Softmax(scale_rule="log_n"),
    formula="softmax(σ_h ln(N_i) s)",
    paper="Nakanishi 2025",
    arxiv="2501.19399",
    score="dot / √d · learned σ ln N",
    positivity="exp",
    normaliser="row sum",
    laws=Laws(rows_sum_to_one=True, rows_at_most_one=True, length_aware=True),
    claim="Better long-context loss and needle retrieval than softmax; "
    "3.26 -> 3.38 from 1x to 16x with QK-norm and RoPE (2505.17083).",
)

COSINE = Entry(
    name="cosine",
    title="cosine softmax",
    system=CosineSoftmax(),
    formula="softmax(ln(d) ln(N_i) cos)",
    paper="stage 1 of Gao & Spratling 2025 with exp",
    arxiv="2501.13428",
    score="cosine · ln d · ln N",
    positivity="exp",
    normaliser="row sum",
    laws=Laws(rows_sum_to_one=True, rows_at_most_one=True, scale_free=True, length_aware=True),
    claim="None of its own: the control that LSSAR's paper leaves out.",
    ours=True,
)

SCALE_INVARIANT = Entry(
    name="scale-invariant",
    title="scale-invariant softmax",
    system=ScaleInvariantSoftmax(),
    formula="softmax(a_t s + m_t), t = i − j",
    paper="Anson, Wang & Aitchison 2025",
    arxiv="2505.17083",
    score="dot / √d · a_t + m_t",
    positivity="exp",
    normaliser="row sum",
    laws=Laws(rows_sum_to_one=True, rows_at_most_one=True),
    exceptions={"key_order": "its scores depend on the distance between query and key"},
    claim="With p-RoPE flat to 16x (3.244 -> 3.247), and the needle is found at 16x.",
)

SOFTMAX_ONE = Entry(
    name="softmax-one",
    title="softmax-one",
    system=SoftmaxOne(),
    formula="exp(s) / (1 + Σ exp(s))",
    paper="Miller 2023",
    arxiv="",
    score="dot / √d",
    positivity="exp",
    normaliser="row sum + 1",
    laws=Laws(rows_at_most_one=True),
    claim="A head may look away; no claim about length.",
)

SINK = Entry(
    name="sink",
    title="softmax with a learned sink",
    system=SoftmaxSink(),
    formula="exp(s) / (exp(b_h) + Σ exp(s))",
    paper="gpt-oss (OpenAI 2025)",
    arxiv="2508.10925",
    score="dot / √d",
    positivity="exp",
    normaliser="row sum + sink",
    laws=Laws(rows_at_most_one=True),
    claim="A head may look away; no claim about length.",
)
