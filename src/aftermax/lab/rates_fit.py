"""Levenberg-Marquardt for many mixtures at once, inside a box, never worse than its start."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aftermax.lab.rates_mixture import Mixture, Normal

FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-2, 1e-12, 1e12
QUIET_STEPS = 2
"""Steps in a row that gain less than the tolerance before a fit counts as converged."""


class Fit(NamedTuple):
    atoms: Tensor
    """(B, k, size)."""
    loss: Tensor
    """(B,) mean square, without the pull to an anchor."""
    converged: Tensor
    """(B,) bool; False where the steps ran out."""


class Anchor(NamedTuple):
    """What a fit is pulled to: strength * sum of metric (atoms - at)^2 is added to its loss."""

    at: Tensor
    """(B, k, size)."""
    metric: Tensor
    """(size,)."""
    strength: float


def fit(
    mixture: Mixture,
    start: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    *,
    box: float = 3.0,
    steps: int = 200,
    tolerance: float = 1e-10,
    anchor: Anchor | None = None,
) -> Fit:
    """Least squares over atoms whose numbers lie in [-box, box], from each start by itself.

    A step solves (J'J + damping diag J'J) d = -J'r among the numbers that no bound holds, and is
    projected on the box. It is taken where the loss falls, so no fit ends above its start. The
    samples enter by their Gram matrix alone, which is summed in chunks.

    Args:
        start: (B, k, size).
        x, y: the samples, (n, dim) and (n,), the same for all; or y (B, n).
        weight: (n,); 1 / n by default.
        tolerance: of the share of the loss that a step still gains; `QUIET_STEPS` of them end a
            fit.

    >>> truth = torch.tensor([[[0.5, 1.0, 0.0, 2.0, 1.0]]], dtype=torch.float64)
    >>> x = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None]
    >>> m = Mixture("sigmoid", "tanh")
    >>> found = fit(m, truth + 0.2, x, m(truth, x)[0])
    >>> bool((found.atoms - truth).abs().max() < 1e-6), bool(found.converged.all())
    (True, True)
    """
    atoms = start.clamp(-box, box)
    state = _State(atoms, _normal(mixture, atoms, x, y, weight, anchor, slice(None)))
    active = torch.arange(len(atoms))
    for _ in range(steps):
        tried, gain = state.step(active, box)
        own = y if y.ndim == 1 else y[active]
        normal = _normal(mixture, tried, x, own, weight, anchor, active)
        state.judge(active, tried, normal, gain, tolerance)
        active = active[~state.done[active]]
        if not len(active):
            break
    loss = state.loss
    if anchor is not None:
        loss = loss - _pull(state.atoms, anchor, slice(None))
    return Fit(state.atoms, loss, state.done)


def _pull(atoms: Tensor, anchor: Anchor, own: Tensor | slice) -> Tensor:
    return anchor.strength * (anchor.metric * (atoms - anchor.at[own]).square()).sum((-2, -1))


def _normal(mixture, atoms, x, y, weight, anchor: Anchor | None, own) -> Normal:
    loss, gradient, gram = mixture.normal(atoms, x, y, weight)
    if anchor is None:
        return Normal(loss, gradient, gram)
    metric = anchor.strength * anchor.metric.repeat(atoms.shape[1])
    away = (atoms - anchor.at[own]).flatten(1)
    return Normal(loss + _pull(atoms, anchor, own), gradient + metric * away, gram + metric.diag())


class _State:
    """Where every fit of a batch stands."""

    def __init__(self, atoms: Tensor, normal: Normal):
        self.atoms = atoms.clone()
        self.loss, self.gradient, self.gram = normal
        self.damping = torch.full_like(self.loss, FIRST_DAMPING)
        self.growth = torch.full_like(self.loss, 2.0)
        self.quiet = torch.zeros_like(self.loss)
        self.done = torch.zeros_like(self.loss, dtype=torch.bool)

    def step(self, active: Tensor, box: float) -> tuple[Tensor, Tensor]:
        """Where the active ones are tried next, and what the quadratic model says they gain."""
        atoms = self.atoms[active]
        flat, gradient, gram = atoms.flatten(1), self.gradient[active], self.gram[active]
        held = ((flat <= -box) & (gradient > 0)) | ((flat >= box) & (gradient < 0))
        free = (~held).to(flat.dtype)
        inner = gram * free[:, :, None] * free[:, None, :]
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        floor = 1e-10 * diagonal.amax(-1, keepdim=True) + 1e-300
        damped = self.damping[active, None] * diagonal.clamp_min(floor) * free + (1 - free)
        factor, _ = torch.linalg.cholesky_ex(inner + torch.diag_embed(damped))
        move = torch.cholesky_solve(-(gradient * free)[..., None], factor)[..., 0]
        move = torch.nan_to_num(move, 0.0, 0.0, 0.0)  # no factor: the damping grows
        tried = (flat + move).clamp(-box, box)
        move = tried - flat
        gain = -2 * (gradient * move).sum(-1) - (move * (gram @ move[..., None])[..., 0]).sum(-1)
        return tried.view_as(atoms), gain

    def judge(
        self, active: Tensor, tried: Tensor, normal: Normal, gain: Tensor, tolerance: float
    ) -> None:
        """Take the steps that gain; Nielsen's rule for the damping."""
        gained = self.loss[active] - normal.loss
        better = gained > 0  # False for NaN too
        ratio = gained / gain.clamp_min(1e-300)
        shrink = (1 - (2 * ratio - 1) ** 3).clamp(1 / 3, 2.0)
        damping, growth = self.damping[active], self.growth[active]
        self.damping[active] = torch.where(better, damping * shrink, damping * growth).clamp(
            LEAST_DAMPING, MOST_DAMPING
        )
        self.growth[active] = torch.where(better, torch.full_like(growth, 2.0), growth * 2)
        small = gained.abs() <= tolerance * self.loss[active]
        quiet = torch.where(small, self.quiet[active] + 1, torch.zeros_like(growth))
        self.quiet[active] = quiet
        stuck = ~better & (damping >= MOST_DAMPING)
        taken = active[better]
        self.atoms[taken] = tried[better]
        self.loss[taken] = normal.loss[better]
        self.gradient[taken] = normal.gradient[better]
        self.gram[taken] = normal.gram[better]
        self.done[active] = (quiet >= QUIET_STEPS) | stuck
