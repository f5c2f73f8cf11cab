"""The loop of the solver: damped steps of many problems at once, each with its own damping and end.

A step solves (M + mu m I) p = -gradient, m the mean of M's diagonal. M is the Gauss-Newton matrix
(Levenberg-Marquardt) or the Hessian (safeguarded Newton: where it has no Cholesky factor mu grows
until it has). It is taken if the true loss falls by Armijo's share of what its slope promises; mu
follows the ratio of what was gained to what the quadratic had promised (Marquardt 1963).

Neither model says anything of a logit that moves by more than a few units: where a step moves two
logits of a row further apart than a range, it is cut to the range. That is 2 at first and grows
by a quarter after each cut step that gains what it promised. Without it a path may enter places
where f is nearly one-hot, and creep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aftermax.regression.objective import Expansion, Objective

ARMIJO = 1e-4
STIFF = 1e-10
"""Smallest squared ratio of a Cholesky factor's diagonal at which its digits are still trusted."""
LATE = 0.01
"""`auto` goes to Newton where a step of Levenberg-Marquardt takes less than this off the loss."""
RANGE = 2.0
RUNNING, CONVERGED, STUCK, EXHAUSTED = range(4)


@dataclass
class Walk:
    """Where the problems are: (P, D) points, and how they came to their end."""

    x: Tensor
    step: Tensor
    """The last step tried, (P, D)."""
    iterations: Tensor
    """Steps tried, (P,)."""
    end: Tensor
    """CONVERGED, STUCK (no step lowers the loss) or EXHAUSTED (`max_iterations`), (P,)."""


@dataclass(frozen=True)
class Plan:
    """How to walk.

    newton: from the beginning. switch: go to Newton late. cg: products in place of matrices.
    """

    newton: bool = False
    switch: bool = True
    cg: bool = False
    tolerance: float = 0.0
    max_iterations: int = 300

    @classmethod
    def of(cls, method: str, tolerance: float, max_iterations: int, cg: bool) -> Plan:
        newton = method == "newton"
        return cls(newton, method not in ("lm", "newton"), cg, tolerance, max_iterations)


def expand(objective: Objective, x: Tensor) -> Expansion:
    return objective.at(x.reshape(len(x), *objective.unknowns))


def reach(objective: Objective, v: Tensor) -> Tensor:
    """How far v (P, D), or one (D,), moves logits: apart in a softmax's row, in all otherwise."""
    s = objective.logits(v.reshape(*v.shape[:-1], *objective.unknowns))
    own = len(objective.unknowns)
    if getattr(objective, "kind", None) is not None:
        return s.abs().flatten(-own).amax(-1)
    apart = s.amax(-1) - s.amin(-1)
    return apart.amax(-1) if own == 2 else apart


def rounding(objective: Objective, at: Expansion) -> Tensor:
    """The loss that is left where the residual is nothing but the rounding of f or u, (P,)."""
    eps = torch.finfo(at.x.dtype).eps
    return (32 * eps) ** 2 / 2 * objective._total(at.fitted.square())


def at_rounding(objective: Objective, at: Expansion) -> Tensor:
    """Whether no step is taken because the loss is 0 to what logits of that size leave of f."""
    size = at.logits.flatten(-len(objective.unknowns)).abs().amax(-1)
    return at.value.isfinite() & (at.value <= (1 + size).square() * rounding(objective, at))


def descend(objective: Objective, x: Tensor, plan: Plan, damping: Tensor) -> Walk:
    """Walks from x (P, D) downhill, a flat objective of P problems; damping (P,) is mu at x."""
    if len(x) == 1 and not plan.cg:
        return _descend_alone(objective, x, plan, float(damping))
    whole = Walk(x.clone(), torch.zeros_like(x), *torch.zeros(2, len(x), dtype=torch.long))
    index, now = torch.arange(len(x)), _Walkers(objective, x, plan, damping)
    for count in range(plan.max_iterations + 1):
        now.try_step(last=count == plan.max_iterations)
        over = now.end != RUNNING
        if bool(over.all()) or 2 * int(over.sum()) > len(over):
            at = index[over]
            whole.x[at], whole.step[at] = now.x[over], now.step[over]
            whole.end[at], whole.iterations[at] = now.end[over], now.iterations[over]
            if bool(over.all()):
                break
            index, now = index[~over], now.select(~over)
    return whole


def _descend_alone(objective: Objective, x: Tensor, plan: Plan, mu: float) -> Walk:
    """The same of one problem. Its numbers are Python's: of a small problem, tensors of one number
    each would cost more than the matrices. A test holds the two together."""
    one, size = objective.alone(), x.shape[1]
    eps, shape = torch.finfo(x.dtype).eps, objective.unknowns
    at, newton, step, end = one.at(x.reshape(shape)), plan.newton, torch.zeros(size), EXHAUSTED
    value, floor, matrix = float(at.value), float(rounding(one, at)), None
    gradient, mean, within = at.gradient.flatten(), 0.0, RANGE
    for count in range(plan.max_iterations + 1):
        if matrix is None:
            matrix = at.hessian if newton else at.gauss_newton
            mean = float(matrix.diagonal().abs().mean())
        if math.isfinite(value) and (value <= floor or not bool(gradient.any())):
            end = CONVERGED
            break
        if mu > 1e15 or not math.isfinite(value):
            end = CONVERGED if bool(at_rounding(one, at)) else STUCK
            break
        damped = matrix.clone()
        damped.diagonal().add_(mu * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        usable, edge = not int(info), factor.diagonal()
        p = torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1).neg_()
        if not newton and size > 1:
            low, high = torch.aminmax(edge)
            if not usable or float(low) < math.sqrt(STIFF) * float(high):
                exact = _orthogonal(at, torch.tensor(mu * mean, dtype=x.dtype))
                p, usable = (p, usable) if exact is None else (exact, True)
        slope, length = float(gradient @ p), float(p @ p)
        promise = (mu * mean * length - slope) / 2
        usable &= math.isfinite(promise)
        if usable and mu <= 1 and promise <= max(plan.tolerance, eps / 2) * value:
            end = CONVERGED
            break
        if count == plan.max_iterations:
            break
        cut = min(1.0, within / max(float(reach(one, p)), 1e-300)) if usable else 1.0
        if cut < 1:
            promise = -cut * slope + cut**2 / 2 * (slope + mu * mean * length)
            p, slope = cut * p, cut * slope
        step = p
        if usable:
            trial = one.at((x := x.reshape(shape)) + p.reshape(shape))
            there = float(trial.value)
        if usable and there <= value + ARMIJO * slope + 2 * eps * value:
            ratio = (value - there) / promise
            mu = max(1e-24, mu * (0.1 if ratio > 0.75 else 2.0 if ratio < 0.25 else 1.0))
            if cut < 1:
                within *= 1.25 if ratio > 0.75 else 0.5 if ratio < 0.25 else 1.0
            newton = (newton and not plan.switch) or (plan.switch and value - there < LATE * value)
            x, at, value, matrix = trial.x, trial, there, None
            gradient, floor = at.gradient.flatten(), float(rounding(one, at))
        else:
            mu = 4 * mu if usable else max(10 * mu, 1e-3)
            within *= 0.5 if cut < 1 else 1.0
        within = max(within, RANGE)
    counted, ended = torch.tensor([count]), torch.tensor([end])
    return Walk(x.reshape(1, size).clone(), step.reshape(1, size).to(x), counted, ended)


def _orthogonal(at: Expansion, shift: Tensor) -> Tensor | None:
    """A step of Levenberg-Marquardt by QR of R, which keeps the digits that R^T R squares away."""
    stacked = at.stacked()
    if stacked is None or not bool(stacked[0].isfinite().all()):
        return None
    rows, residual = stacked
    eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    damped = torch.cat([rows, shift.sqrt()[..., None, None] * eye], -2)
    q, r = torch.linalg.qr(damped)
    right = q[..., : residual.shape[-1], :].mT @ -residual.unsqueeze(-1)
    return torch.linalg.solve_triangular(r, right, upper=True).squeeze(-1)


class _Walkers:
    """The problems that still walk."""

    def __init__(self, objective: Objective, x: Tensor, plan: Plan, damping: Tensor):
        self.objective, self.x, self.plan = objective, x, plan
        self.mu, self.range = damping, torch.full_like(damping, RANGE)
        self.newton = torch.full((len(x),), plan.newton, device=x.device)
        self.end, self.iterations = torch.zeros(2, len(x), dtype=torch.long)
        self.step = torch.zeros_like(x)
        self.eps = torch.finfo(x.dtype).eps
        self._arrive(expand(objective, x))

    def select(self, kept: Tensor) -> _Walkers:
        index = kept.nonzero().squeeze(1)
        fewer = _Walkers(self.objective.select(index), self.x[kept], self.plan, self.mu[kept])
        fewer.newton, fewer.step = self.newton[kept], self.step[kept]
        fewer.range = self.range[kept]
        fewer.end, fewer.iterations = self.end[kept], self.iterations[kept]
        return fewer

    def _arrive(self, at: Expansion) -> None:
        self.at, self.value = at, at.value
        self.gradient = at.gradient.flatten(1)
        self.matrix: Tensor | None = None

    # ---- one step

    def try_step(self, last: bool) -> None:
        p, promise, usable = self._cg_step() if self.plan.cg else self._factored_step()
        floor = rounding(self.objective, self.at)
        small = promise <= max(self.plan.tolerance, self.eps / 2) * self.value
        # a step that only the damping makes small says nothing
        done = (usable & small & (self.mu <= 1)) | (self.value <= floor)
        done |= (self.gradient == 0).all(1)
        done &= self.value.isfinite()
        lost = (self.mu > 1e15) | ~self.value.isfinite()
        running = self.end == RUNNING
        self.end[running & done] = CONVERGED
        lost &= running & ~done
        if bool(lost.any()):
            floored = at_rounding(self.objective, self.at)
            self.end[lost] = torch.where(floored, CONVERGED, STUCK)[lost]
        running = self.end == RUNNING
        if last:
            self.end[running] = EXHAUSTED
            return
        if not bool(running.any()):
            return
        self.iterations += running
        slope = (self.gradient * p).sum(1)
        moved = reach(self.objective, p).clamp(min=torch.finfo(self.x.dtype).tiny)
        cut = (self.range / moved).clamp(max=1)
        # promise = -slope - bend / 2, and cut p has cut slope and cut^2 bend
        promise = -cut * slope + cut.square() * (promise + slope)
        p, slope = cut.unsqueeze(1) * p, cut * slope
        self.step = torch.where(running.unsqueeze(1), p, self.step)
        trial = expand(self.objective, self.x + p)
        noise = 2 * self.eps * self.value
        taken = running & usable & (trial.value <= self.value + ARMIJO * slope + noise)
        gained = self.value - trial.value
        self._adapt(taken, usable, gained / promise, cut < 1)
        if self.plan.switch:
            late = gained < LATE * self.value
            self.newton = torch.where(taken, late, self.newton)
        if bool(taken.all()):
            self.x = self.x + p
            self._arrive(trial)
        elif bool(taken.any()):
            self.x = torch.where(taken.unsqueeze(1), self.x + p, self.x)
            self._arrive(expand(self.objective, self.x))

    def _adapt(self, taken: Tensor, usable: Tensor, ratio: Tensor, cut: Tensor) -> None:
        wider = torch.where(ratio > 0.75, 1.25, torch.where(ratio < 0.25, 0.5, 1.0))
        wider = torch.where(taken, wider, 0.5).to(self.mu)
        self.range = torch.where(cut, wider * self.range, self.range).clamp(min=RANGE)
        down = torch.where(ratio > 0.75, 0.1, torch.where(ratio < 0.25, 2.0, 1.0))
        up = torch.where(usable, 4 * self.mu, (10 * self.mu).clamp(min=1e-3))
        self.mu = torch.where(taken, down.to(self.mu) * self.mu, up).clamp(min=1e-24)

    # ---- with matrices

    def _matrices(self) -> Tensor:
        if self.matrix is None:
            if bool(self.newton.all()):
                self.matrix = self.at.hessian
            elif not bool(self.newton.any()):
                self.matrix = self.at.gauss_newton
            else:
                pick = self.newton[:, None, None]
                self.matrix = torch.where(pick, self.at.hessian, self.at.gauss_newton)
            self.mean = self.matrix.diagonal(dim1=1, dim2=2).abs().mean(1)
        return self.matrix

    def _factored_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """p, what the quadratic promises to gain by it, and whether it can be used."""
        matrix, size = self._matrices(), self.x.shape[1]
        shift = self.mu * self.mean
        damped = matrix.clone()
        damped.diagonal(dim1=1, dim2=2).add_(shift.unsqueeze(1))
        factor, info = torch.linalg.cholesky_ex(damped)
        p = torch.cholesky_solve(-self.gradient.unsqueeze(2), factor).squeeze(2)
        usable = info == 0
        edge = factor.diagonal(dim1=1, dim2=2)
        stiff = ~usable | (edge.amin(1) < math.sqrt(STIFF) * edge.amax(1))
        stiff &= ~self.newton & (self.mean > 0)
        if size > 1 and bool(stiff.any()):
            index = stiff.nonzero().squeeze(1)
            exact = _orthogonal(expand(self.objective.select(index), self.x[index]), shift[index])
            if exact is not None:
                p, usable = p.index_put((index,), exact), usable | stiff
        promise = (shift * p.square().sum(1) - (self.gradient * p).sum(1)) / 2
        return p, promise, usable & p.isfinite().all(1)

    # ---- with products alone

    def _cg_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Truncated conjugate gradients (Steihaug 1983 on a damped matrix): stops at negative
        curvature with what it has, or with the gradient where it has nothing."""
        g, norm = self.gradient, self.gradient.norm(dim=1)
        shift = (
            self.mu * self._along(g) / norm.square().clamp(min=torch.finfo(self.x.dtype).tiny)
        ).unsqueeze(1)
        p, r, v = torch.zeros_like(g), -g, -g
        rr = r.square().sum(1)
        aim = norm * norm.sqrt().clamp(max=0.1)
        walking = rr > 0
        for count in range(2 * g.shape[1] + 10):
            y = self._product(v) + shift * v
            bend = (v * y).sum(1)
            down = bend > self.eps * v.square().sum(1) * 1e-3
            if count == 0:  # nothing yet: the gradient
                p = torch.where((walking & ~down).unsqueeze(1), -g, p)
            walking = walking & down
            if not bool(walking.any()):
                break
            pace = torch.where(walking, rr / bend, 0).unsqueeze(1)
            p, r = p + pace * v, r - pace * y
            new = r.square().sum(1)
            walking = walking & (new.sqrt() > aim)
            v = r + (new / rr.clamp(min=torch.finfo(self.x.dtype).tiny)).unsqueeze(1) * v
            rr = new
        promise = -(g * p).sum(1) - (p * self._product(p)).sum(1) / 2
        return p, promise, p.isfinite().all(1) & (promise > 0)

    def _product(self, v: Tensor) -> Tensor:
        shaped = v.reshape(len(v), *self.objective.unknowns)
        if bool(self.newton.all()):
            return self.at.hessian_product(shaped).flatten(1)
        y = self.at.gauss_newton_product(shaped).flatten(1)
        if bool(self.newton.any()):
            newton = self.at.hessian_product(shaped).flatten(1)
            y = torch.where(self.newton.unsqueeze(1), newton, y)
        return y

    def _along(self, g: Tensor) -> Tensor:
        """g^T (Gauss-Newton) g, the measure of the damping where no diagonal is known."""
        shaped = g.reshape(len(g), *self.objective.unknowns)
        return (g * self.at.gauss_newton_product(shaped).flatten(1)).sum(1)
