"""Rectified weights: ReLA (relu, then a norm of the output) and relu(s)^p / n::

    ReLA        z_i = sum_j relu(s_ij) v_j,   out_i = RMSNorm(z_i) [* sigmoid(gate * z_i)]
                Zhang, Titov & Sennrich, "Sparse Attention with Linear Units", arXiv 2104.07012
    ReLUPower   w_ij = relu(s_ij)^p / N_i
                Wortsman et al., "Replacing softmax with ReLU in Vision Transformers", 2309.08586

Weights are exactly 0 for about half of the keys at random initialisation, and a row may see nothing
at all ("null attention"). ReLA's norm runs over all heads of a token together, as in the authors'
code: one active head sets the scale of every head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aftermax import scores as score
from aftermax.entry import Entry, Laws
from aftermax.visible import Rows, count
from aftermax.weights.row_map import Fused, Lengths, RowMap, raise_to


def relu_weights(scores: Tensor, visible: Tensor, power: float = 1) -> Tensor:
    """relu(scores)^power on the visible keys, 0 elsewhere.

    >>> relu_weights(torch.tensor([[-1.0, 2.0, 3.0]]), torch.tensor([[True, True, False]]))
    tensor([[0., 2., 0.]])
    """
    # hidden first: a hidden score that overflowed would be inf * 0 in the power's gradient
    return raise_to(scores.masked_fill(~visible, 0).relu(), power)


def rms_norm_heads(out: Tensor, gain: Tensor, eps: float) -> Tensor:
    """gain * z / sqrt(mean(z^2) + eps), the mean over heads and width of a token together.

    Args:
        out: (B, H, rows, Dv).
        gain: (H, Dv).
        eps: added to the mean square.
    """
    mean_square = out.square().mean((1, 3), keepdim=True)
    return out * (mean_square + eps).rsqrt() * gain.to(out.dtype)[:, None]


@dataclass(frozen=True)
class ReLA(RowMap):
    """Rectified linear attention: relu(s_ij), summed, and the output normed.

    Args:
        norm: `"gated"` (ReLA-g, what the authors released: RMSNorm times sigmoid(gate * z)),
            `"rms"` (RMSNorm alone, the base of ReLA-i) or `"none"` (bare relu; its rows grow with
            their length and the paper reports it unstable).
        eps: of the RMSNorm, 1e-6. The authors' 1e-8 multiplies gradients of nearly empty rows by
            up to 1e4.

    Learned: `gain` (H, Dv), ones; `gate` (H, Dv), zeros, so that the gate starts at 1/2 (the
    authors draw it from a small uniform range around 0).
    """

    norm: Literal["gated", "rms", "none"] = "gated"
    eps: float = 1e-6

    def __post_init__(self):
        if self.norm not in ("gated", "rms", "none"):
            raise ValueError(f"rela needs norm = 'gated', 'rms' or 'none', got {self.norm!r}")

    @property
    def mixes_heads(self) -> bool:  # type: ignore[override]
        return self.norm != "none"

    def weigh(self, scores, rows: Rows, **learned: Tensor) -> Tensor:
        return relu_weights(score.add_bias(scores, rows.bias), rows.visible)

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        return Fused("relu")

    def finish(self, out: Tensor, **learned: Tensor) -> Tensor:
        if self.norm == "none":
            return out
        normed = rms_norm_heads(out, learned["gain"], self.eps)
        if self.norm == "rms":
            return normed
        return normed * torch.sigmoid(learned["gate"].to(out.dtype)[:, None] * out)

    def learned(self, heads: int, value_dim: int) -> dict[str, Tensor]:
        gain = {} if self.norm == "none" else {"gain": torch.ones(heads, value_dim)}
        gate = {"gate": torch.zeros(heads, value_dim)} if self.norm == "gated" else {}
        return gain | gate


@dataclass(frozen=True)
class ReLUPower(RowMap):
    """relu(s_ij)^p / N_i: rectified weights with the row's count as the only normaliser.

    Args:
        power: p >= 1. 1 is the paper's vision setting; 2 is the squared ReLU of later work.
    """

    power: float = 1

    def __post_init__(self):
        if not self.power >= 1:
            raise ValueError(f"relu-power needs power >= 1, got {self.power}")

    def weigh(self, scores, rows: Rows, **learned: Tensor) -> Tensor:
        weights = relu_weights(score.add_bias(scores, rows.bias), rows.visible, self.power)
        return weights / count(rows.visible, scores.dtype).clamp_min(1)

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        return Fused("relu", row_weight=1 / lengths.of_rows().clamp_min(1), power=self.power)


RELA = Entry(
    name="rela",
    title="ReLA (gated)",
    system=ReLA(),
    formula="RMSNorm(Σ relu(s) v) · sigmoid(g z)",
    paper="Zhang, Titov & Sennrich 2021",
    arxiv="2104.07012",
    score="dot / √d",
    positivity="relu",
    normaliser="RMSNorm of the output, gated",
    exceptions={
        "head_independence": "the norm runs over all heads of a token together",
    },
    claim="Translation quality of softmax with exact zeros; no claim about length.",
)

RELA_RMS = Entry(
    name="rela-rms",
    title="ReLA (RMSNorm)",
    system=ReLA(norm="rms"),
    formula="RMSNorm(Σ relu(s) v)",
    paper="Zhang, Titov & Sennrich 2021",
    arxiv="2104.07012",
    score="dot / √d",
    positivity="relu",
    normaliser="RMSNorm of the output",
    exceptions={
        "head_independence": "the norm runs over all heads of a token together",
    },
    claim="As ReLA; stable only with a careful initialisation.",
)

RELU_POWER = Entry(
    name="relu-power",
    title="ReLU / N",
    system=ReLUPower(),
    formula="relu(s) / N_i",
    paper="Wortsman et al. 2023",
    arxiv="2309.08586",
    score="dot / √d",
    positivity="relu",
    normaliser="count",
    laws=Laws(length_aware=True),
    claim="Near softmax in vision; others report the second worst loss past the training length "
    "(8x: 10.35, 2501.13428).",
)
