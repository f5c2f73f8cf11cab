"""Query, key -> scores: what is compared, and the rules that scale it.

A score is an inner product of prepared vectors: `dot` and `cosine` prepare them, and the scales of
the systems (1/sqrt d, ln d, ln N_i) multiply the product. Rows are counted from `visible`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aftermax.visible import count


def dot(vectors: Tensor) -> Tensor:
    """The plain inner product compares the vectors as they are."""
    return vectors


def cosine(vectors: Tensor) -> Tensor:
    """L2-normalised along the head width, so that the inner product is a cosine in [-1, 1].

    A vector of zeros has no direction and stays zero; its gradient is what comes in, where a small
    floor on the norm would multiply it by one over the floor.
    """
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norm.masked_fill(norm == 0, 1)


def gaussian(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """exp(-scale |x - y|^2 / 2), in (0, 1]: (..., X, D), (..., Y, D) -> (..., X, Y).

    >>> gaussian(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [3.0, 4.0]]), 0.08)
    tensor([[1.0000, 0.3679]])
    """
    # only differences count, and small vectors have small rounding errors; so no gradient either
    centre = y.detach().mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    square = x.square().sum(-1, keepdim=True) + y.square().sum(-1).unsqueeze(-2)
    square = square - 2 * (x @ y.transpose(-1, -2))
    # rounding below 0 is undone in the value alone: the derivatives pass as if nothing had been
    square = square + (square.clamp_min(0) - square).detach()
    return torch.exp(-scale / 2 * square)


def inv_sqrt_dim(head_dim: int) -> float:
    """1 / sqrt(d): SDPA's default scale (Vaswani et al., arXiv 1706.03762)."""
    return head_dim**-0.5


def log_dim(head_dim: int) -> float:
    """ln d, the width factor of the cosine systems (Gao & Spratling, arXiv 2501.13428)."""
    return math.log(head_dim)


def log_count(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """ln N_i for each row, (..., rows, 1): 0 for a row that sees one key or none."""
    return count(visible, dtype).clamp_min(1).log()


def add_bias(scores: Tensor, bias: Tensor | None) -> Tensor:
    return scores if bias is None else scores + bias
