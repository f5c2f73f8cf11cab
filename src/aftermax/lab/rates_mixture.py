"""Mixtures of experts whose gate has a quadratic score: values, exact derivatives, Gram matrices.

    softmax gate: f(x) = sum_j exp(s_j) h_j / sum_j exp(s_j)
    sigmoid gate: f(x) = sum_j sigmoid(s_j) h_j
    s_j = x' A_j x + b_j' x + c_j,   h_j = g(w_j' x + v_j)

Row i of attention is such a mixture of the tokens, of quadratic scores (arXiv 2502.00281, after
2405.13997). "Partially quadratic" scores have no b. An atom is one (A, b, c, w, v), a row of
numbers in this order; A is given by the coefficients of x_i x_j, i <= j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

OFFSET = 3.0
"""Of the experts that neither vanish nor add up to one another."""

CHUNK_NUMBERS = 2**18
"""Of a Jacobian that is held at once: 2 MiB, which stays in a core's cache."""


@dataclass(frozen=True)
class Expert:
    """g of h = g(w' x + v), and its derivative as a function of (u, g(u))."""

    title: str
    formula: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    even: bool = False
    """Whether (-w, -v) is the same expert."""


EXPERTS: dict[str, Expert] = {
    "linear": Expert("linear", "w·x + v", lambda u: u, lambda u, _: torch.ones_like(u)),
    "polynomial": Expert("polynomial", "(w·x + v)²", torch.square, lambda u, _: 2 * u, even=True),
    "tanh": Expert("tanh", "tanh(w·x + v)", torch.tanh, lambda _, h: 1 - h.square()),
    "offset": Expert(
        f"{OFFSET:g} + tanh",
        f"{OFFSET:g} + tanh(w·x + v)",
        lambda u: OFFSET + torch.tanh(u),
        lambda _, h: 1 - (h - OFFSET).square(),
    ),
}
"""linear, polynomial and tanh as in the papers; the last is ours: an atom of it cannot be nothing,
nor the sum of two others, so that a superfluous one is truly superfluous."""


class Normal(NamedTuple):
    """Weighted sums over the samples at some parameters, a batch of them."""

    loss: Tensor
    """(B,) sum of weight (f - y)^2."""
    gradient: Tensor
    """(B, P) half the loss's: J' W (f - y)."""
    gram: Tensor
    """(B, P, P) J' W J."""


@dataclass(frozen=True)
class Mixture:
    """A kind of mixture; its parameters are a tensor (..., atoms, size).

    >>> m = Mixture("sigmoid", "linear")
    >>> atom = torch.tensor([[0.0, 0.0, 0.0, 2.0, 1.0]])  # A, b, c = 0: a gate of 1/2
    >>> m(atom, torch.tensor([[0.5]]))
    tensor([1.])
    """

    gate: Literal["softmax", "sigmoid"]
    expert: str
    dim: int = 1
    partial: bool = False
    """Scores without b."""

    @property
    def scores(self) -> int:
        """Numbers of an atom that its score has."""
        return self.dim * (self.dim + 1) // 2 + (0 if self.partial else self.dim) + 1

    @property
    def size(self) -> int:
        """Numbers of an atom."""
        return self.scores + self.dim + 1

    @property
    def g(self) -> Expert:
        return EXPERTS[self.expert]

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, dim) -> what scores are linear in, (scores, n), and what u is, (dim + 1, n)."""
        one = torch.ones_like(x[:, 0])
        i, j = torch.triu_indices(self.dim, self.dim)
        columns = x.T
        linear = [*columns, one]
        quadratic = columns[i] * columns[j]
        score = torch.cat([quadratic, torch.stack([one] if self.partial else linear)])
        return score, torch.stack(linear)

    def __call__(self, atoms: Tensor, x: Tensor) -> Tensor:
        """(..., k, size) and (n, dim) -> f, (..., n)."""
        gates, experts = self.parts(atoms, x)
        return (gates * experts).sum(-2)

    def parts(self, atoms: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and experts, (..., k, n) each."""
        of_score, of_expert = self.features(x)
        s, u = atoms[..., : self.scores] @ of_score, atoms[..., self.scores :] @ of_expert
        gates = s.softmax(-2) if self.gate == "softmax" else s.sigmoid()
        return gates, self.g.value(u)

    def jacobian(self, atoms: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """f (B, n), and its derivatives by each number of each atom, (B, k * size, n)."""
        return self._jacobian(atoms, *self.features(x))

    def _jacobian(self, atoms: Tensor, of_score: Tensor, of_expert: Tensor):
        s, u = atoms[..., : self.scores] @ of_score, atoms[..., self.scores :] @ of_expert
        h = self.g.value(u)
        if self.gate == "softmax":
            gates = s.softmax(-2)
            f = (gates * h).sum(-2)
            by_score = gates * (h - f[..., None, :])
        else:
            gates = s.sigmoid()
            f = (gates * h).sum(-2)
            by_score = gates * (1 - gates) * h
        by_argument = gates * self.g.slope(u, h)
        whole = torch.cat(
            [by_score[..., None, :] * of_score, by_argument[..., None, :] * of_expert], -2
        )
        return f, whole.flatten(-3, -2)

    def normal(self, atoms: Tensor, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Normal:
        """Loss, gradient and Gram matrix of a batch of parameters on the same samples, in chunks.

        Args:
            atoms: (B, k, size).
            x: (n, dim).
            y: (n,) for all, or (B, n).
            weight: (n,) of the samples; 1 / n by default.
        """
        count = atoms.shape[1] * self.size
        loss = atoms.new_zeros(len(atoms))
        gradient = atoms.new_zeros(len(atoms), count)
        gram = atoms.new_zeros(len(atoms), count, count)
        for part in _chunks(len(x), len(atoms) * count):
            f, j = self._jacobian(atoms, *self.features(x[part]))
            rest = f - y[..., part]
            scaled = j if weight is None else j * weight[part]
            heavy = rest if weight is None else rest * weight[part]
            loss += (heavy * rest).sum(-1)
            gradient += (j @ heavy[..., None])[..., 0]
            gram += scaled @ j.mT
        if weight is None:
            return Normal(loss / len(x), gradient / len(x), gram / len(x))
        return Normal(loss, gradient, gram)


def _chunks(count: int, width: int) -> Iterator[slice]:
    step = max(64, CHUNK_NUMBERS // max(1, width))
    for start in range(0, count, step):
        yield slice(start, start + step)
