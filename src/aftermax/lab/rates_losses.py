"""How far a fitted mixture is from the truth, and from the minimisers of the population's loss.

The population's loss of atoms G is E (f_G(X) - f*(X))^2 + noise^2, X uniform in [-1, 1]^dim. It is
smooth, so that Gauss-Legendre quadrature knows it. Least squares goes to the set of its minimisers,
wherever the truth is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aftermax.lab.rates_fit import Anchor, fit
from aftermax.lab.rates_mixture import Mixture

NODES = {1: 48, 2: 14}
"""Of the quadrature along each axis, by the dimension. Against finer ones the L2 errors are off by
at most 2e-7, where fits have 1e-3."""

SEARCH_STEPS = 500
EXCESS, EXCESS_SHARE = 1e-9, 1e-3
"""A misfit that is at most so much above the best known one is the best one: 3e-5 in L2."""
POOLED = 48
"""Most minimisers that are kept of a search."""
STRENGTHS = tuple(10.0**-e for e in range(2, 12))
"""Of the pull to the estimate, from a weak one on."""
SLIDE_FROM = 5
"""The strength, by its place, with which minimisers that are known are pulled along their set."""
SLIDERS = 2
STAGE_STEPS, LAST_STEPS = 25, 150


class Population(NamedTuple):
    """Quadrature of the uniform law, and f* there."""

    x: Tensor
    weight: Tensor
    """Adds up to 1."""
    values: Tensor

    def misfit(self, mixture: Mixture, atoms: Tensor) -> Tensor:
        """E (f - f*)^2 of atoms (..., k, size)."""
        return (mixture(atoms, self.x) - self.values).square() @ self.weight


def quadrature(dim: int, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Nodes (n, dim) in [-1, 1]^dim and weights that add up to 1: Gauss-Legendre along each axis.

    >>> x, weight = quadrature(2)
    >>> round(float((x[:, 0].square() * weight).sum()), 12)  # the variance of a uniform number
    0.333333333333
    """
    place, weight = (
        torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(count or NODES[dim])
    )
    x = torch.cartesian_prod(*[place] * dim).view(-1, dim)
    return x, torch.cartesian_prod(*[weight / 2] * dim).view(-1, dim).prod(-1)


# distances between atoms


def gaugeless(mixture: Mixture, atoms: Tensor) -> Tensor:
    """The same function in one form: a softmax does not see what all scores have in common."""
    if mixture.gate == "sigmoid":
        return atoms
    shift = atoms[..., : mixture.scores].mean(-2, keepdim=True)
    return torch.cat([atoms[..., : mixture.scores] - shift, atoms[..., mixture.scores :]], -1)


def expert_gaps(mixture: Mixture, left: Tensor, right: Tensor) -> Tensor:
    """Distances of experts, all of left (..., k, size) to all of right (..., m, size): (..., k, m).

    (-w, -v) counts as (w, v) where it is the same expert.
    """
    a, b = (atoms[..., mixture.scores :] for atoms in (left, right))
    gaps = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    if mixture.g.even:
        other = torch.cdist(a, -b, compute_mode="donot_use_mm_for_euclid_dist")
        gaps = torch.minimum(gaps, other)
    return gaps


def shares(mixture: Mixture, atoms: Tensor, population: Population) -> Tensor:
    """(..., k): the mean gate of each atom over the law of x, as a share of all."""
    gates, _ = mixture.parts(atoms, population.x)
    mean = gates @ population.weight
    return mean / mean.sum(-1, keepdim=True)


def matched(
    mixture: Mixture, atoms: Tensor, pool: Tensor, metric: Tensor, count: int = 1
) -> Tensor:
    """Of the pool (m, k, size) the nearest members to each of atoms (B, k, size), their atoms in
    the order (and their even experts with the signs) in which they are nearest.

    Returns:
        (B, count, k, size), the nearest first; fewer where the pool has fewer.
    """
    own, others = gaugeless(mixture, atoms), gaugeless(mixture, pool)
    sign = torch.ones(mixture.size, dtype=atoms.dtype)
    signs = sign[None]
    if mixture.g.even:
        flipped = sign.clone()
        flipped[mixture.scores :] = -1
        signs = torch.stack([sign, flipped])
    forms = others[:, None] * signs[:, None]  # (m, signs, k, size)
    # (B, m, signs, k, k): from each atom to each of each member
    away = (own[:, None, None, :, None] - forms[None, :, :, None]).square() @ metric
    least, which = away.min(2)
    k = atoms.shape[1]
    orders = torch.tensor(list(itertools.permutations(range(k))))  # (k!, k)
    totals = least[:, :, torch.arange(k), orders].sum(-1)  # (B, m, k!)
    best, order = totals.min(-1)
    members = best.topk(min(count, len(pool)), largest=False).indices  # (B, count)
    out = []
    for b, row in enumerate(members.tolist()):
        for member in row:
            columns = orders[order[b, member]]
            turned = which[b, member, torch.arange(k), columns]
            out.append(forms[member, turned, columns])
    return torch.stack(out).view(len(atoms), -1, *atoms.shape[1:])


def distance(mixture: Mixture, left: Tensor, right: Tensor) -> Tensor:
    """Euclidean, of all numbers of atoms in the same order; (...,)."""
    gap = gaugeless(mixture, left) - gaugeless(mixture, right)
    return gap.square().sum((-2, -1)).sqrt()


# the truth


def to_truth(mixture: Mixture, atoms: Tensor, truth: Tensor, share: Tensor) -> Tensor:
    """Mean distance of a fitted expert to the nearest true one, weighted by its share: (B,)."""
    return (share * expert_gaps(mixture, atoms, truth).amin(-1)).sum(-1)


def found(mixture: Mixture, atoms: Tensor, truth: Tensor) -> Tensor:
    """Mean distance of a true expert to the nearest fitted one: (B,)."""
    return expert_gaps(mixture, atoms, truth).amin(-2).mean(-1)


def voronoi(mixture: Mixture, atoms: Tensor, truth: Tensor) -> Tensor:
    """The Voronoi loss of fitted atoms (B, k, size) to true ones (m, size): (B,).

        D = sum_j |sum_{i in V_j} m_i - m*_j|
          + sum_{|V_j| = 1} m_i |d_ij| + sum_{|V_j| > 1} m_i |d_ij|^2

    V_j are the fitted atoms whose expert is nearest to the j-th true one, d_ij the difference of
    (A, b, w, v), and the mass m is exp(c) as a share of all (softmax) or sigmoid(c). Order 1 where
    an atom is fitted by one, order 2 where it is split: the form that this line of papers has
    (2405.13997; its text was not at hand in full). Cells are drawn by experts alone, since a
    softmax knows scores only up to what all have in common; that is taken off by least squares
    over the cells.
    """
    gaps = expert_gaps(mixture, atoms, truth)
    cell = torch.nn.functional.one_hot(gaps.argmin(-1), len(truth)).to(atoms.dtype)  # (B, k, m)
    constant = mixture.scores - 1
    mass, true_mass = (
        a[..., constant].softmax(-1) if mixture.gate == "softmax" else a[..., constant].sigmoid()
        for a in (atoms, truth)
    )
    forms, true_forms = atoms[..., :constant], truth[..., :constant]
    away = forms - cell @ true_forms
    if mixture.gate == "softmax":
        away = away - (mass[..., None] * away).sum(-2, keepdim=True)
    of_expert = (cell * gaps).sum(-1)
    squared = away.square().sum(-1) + of_expert.square()
    split = (cell @ (cell.sum(-2) > 1).to(atoms.dtype)[..., None])[..., 0] > 0
    apart = (mass * torch.where(split, squared, squared.sqrt())).sum(-1)
    return ((mass[..., None] * cell).sum(-2) - true_mass).abs().sum(-1) + apart


# the minimisers


@dataclass(frozen=True)
class Minimisers:
    """What a search among many starts found of the set of minimisers."""

    atoms: Tensor
    """(m, k, size), no two the same up to order and sign."""
    misfit: float
    """The least E (f - f*)^2 that is known."""
    share: float
    """Of the starts that reached it."""

    @property
    def bar(self) -> float:
        """A misfit up to here is the least one."""
        return self.misfit * (1 + EXCESS_SHARE) + EXCESS


def search(mixture: Mixture, population: Population, start: Tensor, box: float) -> Minimisers:
    """Minimise the population's loss from each start (m, k, size), keep what is least."""
    x, weight, values = population
    done = fit(mixture, start, x, values, weight, box=box, steps=SEARCH_STEPS, tolerance=1e-12)
    least = float(done.loss.min())
    bar = Minimisers(start, least, 0.0).bar
    kept = done.atoms[done.loss <= bar]
    metric = torch.ones(mixture.size, dtype=kept.dtype)
    apart = [kept[0]]
    for atoms in kept[1:]:
        if len(apart) == POOLED:
            break
        near = matched(mixture, atoms[None], torch.stack(apart), metric)[:, 0]
        if distance(mixture, atoms[None], near) > 1e-3:
            apart.append(atoms)
    return Minimisers(torch.stack(apart), least, len(kept) / len(start))


class Nearest(NamedTuple):
    atoms: Tensor
    """(B, k, size): a minimiser for each estimate, its atoms in the estimate's order."""
    reached: Tensor
    """(B,) bool: whether the way from the estimate itself ended at a best minimiser known."""
    below: Tensor
    """(B,) bool: whether it ended at a better one than the search had found."""


def nearest(
    mixture: Mixture,
    atoms: Tensor,
    population: Population,
    minimisers: Minimisers,
    box: float,
    metric: Tensor,
) -> Nearest:
    """The nearest minimiser of each of atoms (B, k, size).

    Minimises misfit + strength * metric (G - atoms)^2 from the atoms on, the strength falling to
    nothing: where that ends is a minimiser, and of those around it the nearest. One that is no best
    one known does not count. The same from the nearest of the pool on, which slide along a set
    that is a continuum; and the nearest of the pool as it is. Of all these the nearest is taken: an
    upper bound of the distance, sharp where the minimisers are few.
    """
    pooled = matched(mixture, atoms, minimisers.atoms, metric, SLIDERS)
    ends = [pooled[:, 0]]
    ways = [(atoms, STRENGTHS), *((way, STRENGTHS[SLIDE_FROM:]) for way in pooled.unbind(1))]
    for begin, strengths in ways:
        ends.append(_pulled(mixture, begin, atoms, population, box, metric, strengths))
    misfits = torch.stack([population.misfit(mixture, end) for end in ends])
    own = gaugeless(mixture, atoms)
    away = torch.stack(
        [(metric * (own - gaugeless(mixture, end)).square()).sum((-2, -1)) for end in ends]
    )
    counts = misfits <= minimisers.bar
    counts[0] = True
    best = torch.where(counts, away, torch.inf).argmin(0)
    chosen = torch.stack(ends)[best, torch.arange(len(atoms))]
    return Nearest(chosen, counts[1], misfits[1] < minimisers.misfit - EXCESS)


def _pulled(mixture, begin, atoms, population: Population, box, metric, strengths) -> Tensor:
    x, weight, values = population
    here = begin
    for strength in strengths:
        here = fit(
            mixture, here, x, values, weight,
            box=box, steps=STAGE_STEPS, tolerance=1e-9, anchor=Anchor(atoms, metric, strength),
        ).atoms  # fmt: skip
    return fit(mixture, here, x, values, weight, box=box, steps=LAST_STEPS, tolerance=1e-10).atoms
