"""One step of gradient descent beside one update by attention: what each does to the target.

Li, Song, Xia, Yu and Zhou, "The closeness of in-context learning and weight shifting for softmax
regression" (arXiv 2304.13276). Moving x to x' in softmax(Ax) is, with x kept, the same as moving
the target b to b - (f(Ax') - f(Ax)); moving the data A to A' moves it to b - (f(A'x) - f(Ax)).
Theorems 5.1 and 5.2 bound both shifts by exp(O(R^2 + log n)) times the size of the move. Bounds of
one form do not say that the moves are near each other, and these are larger than any shift can be
(sqrt 2) long before R is that of a trained layer. `closeness_report` measures what they bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aftermax.regression.bounds import JACOBIAN_MAX, STATUS, Status
from aftermax.regression.construct import (
    _check,
    _product,
    _residual,
    equivalent_update,
    softmax_attention_update,
)

LARGEST_SHIFT = math.sqrt(2)
"""Of a probability vector, in the Euclidean norm."""


@dataclass(frozen=True)
class Bound:
    """A bound on the size of a shift, and what became of it.

    Args:
        value: of the bound; inf where it overflows.
        source: the paper, or "sharp" for ours.
        status: "proved", "searched", or "quoted" for a paper's, whose constant is not known to us
            and taken as 1.
        holds: no shift measured was larger.
        vacuous: larger than sqrt 2, which no shift of a probability vector exceeds.
    """

    value: float
    source: str
    status: Status
    holds: bool
    vacuous: bool


@dataclass(frozen=True)
class Shift:
    """What a move does to the target.

    Args:
        target: (n,), the target b~ with which the old point has what the move would have.
        size: Euclidean norm of b~ - b.
        move: norm of the move: Euclidean of dx, spectral of dA.
        sharp: bound by half of norm(A) move, or norm(x) move: proved.
        paper: bound by exp(R^2 + log n) move, R the larger of norm(A) and norm(x), and what it
            moves to.
    """

    target: Tensor
    size: float
    move: float
    sharp: Bound
    paper: Bound

    @property
    def ratio(self) -> float:
        """Size per move: what the theorems bound; 0 where nothing moved."""
        return self.size / self.move if self.move else 0.0


@dataclass(frozen=True)
class ClosenessReport:
    """What one gradient step and one update by attention do, side by side.

    Args:
        step: the shift of the target by moving x.
        update: the shift by moving A.
        cosine: of the angle between the two shifts; NaN where one of them is 0.
        difference: norm of softmax((A + dA) x) - softmax(A (x + dx)): how near the update is to
            the step, in what both predict.
        equivalent: (n, d), the update that does what the step does exactly.
        distance: norm(dA - equivalent) / norm(equivalent), Frobenius; 0 is the step itself.
    """

    step: Shift
    update: Shift
    cosine: float
    difference: float
    equivalent: Tensor
    distance: float

    def __str__(self) -> str:
        lines = [f"{'':22}{'step of x':>18}{'update of A':>18}"]

        def line(name: str, of: Callable[[Shift], str]) -> None:
            lines.append(f"{name:22}{of(self.step):>18}{of(self.update):>18}")

        def bound(which: Bound) -> str:
            return f"{which.value:.4g}{'' if not which.vacuous else ' (vacuous)'}"

        line("size of the move", lambda shift: f"{shift.move:.4g}")
        line("shift of the target", lambda shift: f"{shift.size:.4g}")
        line("shift / move", lambda shift: f"{shift.ratio:.4g}")
        line(f"sharp bound, {self.step.sharp.status}", lambda shift: bound(shift.sharp))
        line(f"paper's, {self.step.paper.status}", lambda shift: bound(shift.paper))
        lines += [
            f"cosine of the shifts          {self.cosine:.6f}",
            f"difference of the predictions {self.difference:.4g}",
            f"distance to the exact update  {self.distance:.4g} of its norm",
        ]
        return "\n".join(lines)


@torch.no_grad()
def closeness_report(
    A: Tensor,
    x: Tensor,
    b: Tensor,
    step: float | Tensor,
    update: Tensor | Callable[[Tensor], Tensor] | None = None,
) -> ClosenessReport:
    """Compare a step of x with an update of A by attention, and both with what bounds them.

    Args:
        A: (n, d), the tokens.
        x: (d,), not 0.
        b: (n,), the target.
        step: learning rate of a step of gradient descent on norm(softmax(Ax) - b)^2 / 2, or dx
            itself, (d,).
        update: dA (n, d), or a function (an attention layer, say) that takes A and returns A + dA.
            By default one head of softmax self-attention at its usual temperature,
            `softmax_attention_update` with beta = 1 / sqrt d, which needs a learning rate as step.

    Raises:
        ValueError: for shapes or dtypes that do not fit, values that are not finite, x = 0, and no
            update where step is not a learning rate.

    >>> A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    >>> x, b = torch.tensor([1.0, -1.0]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    >>> print(closeness_report(A, x, b, step=0.5))  # doctest: +NORMALIZE_WHITESPACE
                                   step of x       update of A
    size of the move                  0.0813           0.06716
    shift of the target              0.02367           0.02339
    shift / move                      0.2911            0.3483
    sharp bound, proved              0.07041           0.04749
    paper's, quoted          4.918 (vacuous)   4.063 (vacuous)
    cosine of the shifts          0.997988
    difference of the predictions 0.001517
    distance to the exact update  0.1213 of its norm
    """
    if (A.ndim, x.ndim, b.ndim) != (2, 1, 1):
        raise ValueError(
            "closeness_report takes one problem, A (n, d), x (d,) and b (n,), got"
            f" A {tuple(A.shape)}, x {tuple(x.shape)} and b {tuple(b.shape)}"
        )
    _check(A, x=x, b=b)
    if not all(bool(t.isfinite().all()) for t in (A, x, b)):
        raise ValueError("A, x and b must be finite")
    moved_by = _step(A, x, b, step)
    exact = equivalent_update(A, x, moved_by)
    moved = _update(A, x, b, step, update)

    f = _product(A, x).softmax(-1)
    by_step = _product(A, x + moved_by).softmax(-1) - f
    by_update = _product(A + moved, x).softmax(-1) - f
    size_A, size_x = float(torch.linalg.matrix_norm(A, 2)), float(x.norm())
    radius = max(
        size_A, size_x, float((x + moved_by).norm()), float(torch.linalg.matrix_norm(A + moved, 2))
    )
    paper = _exp(radius**2 + math.log(len(A)))
    exact_size = float(exact.norm())
    return ClosenessReport(
        step=_shift(b, by_step, float(moved_by.norm()), size_A, paper),
        update=_shift(b, by_update, float(torch.linalg.matrix_norm(moved, 2)), size_x, paper),
        cosine=float((by_step @ by_update) / (by_step.norm() * by_update.norm())),
        difference=float((by_step - by_update).norm()),
        equivalent=exact,
        distance=float((moved - exact).norm()) / exact_size if exact_size else math.nan,
    )


def _step(A: Tensor, x: Tensor, b: Tensor, step: float | Tensor) -> Tensor:
    if isinstance(step, Tensor) and step.ndim:
        _check(A, step=step)
        if step.shape != x.shape:
            raise ValueError(f"step must be {tuple(x.shape)} as x, got {tuple(step.shape)}")
        if not bool(step.isfinite().all()):
            raise ValueError("step must be finite")
        return step
    if not math.isfinite(step):
        raise ValueError(f"step must be a finite learning rate or dx, got {float(step)}")
    return -float(step) * _product(A.mT, _residual(A, b, x))


def _update(
    A: Tensor,
    x: Tensor,
    b: Tensor,
    step: float | Tensor,
    update: Tensor | Callable[[Tensor], Tensor] | None,
) -> Tensor:
    if update is None:
        if isinstance(step, Tensor) and step.ndim:
            raise ValueError("a step dx does not say how attention would move A: give update")
        return softmax_attention_update(A, b, x, float(step), A.shape[-1] ** -0.5, heads=1)
    moved = update if isinstance(update, Tensor) else update(A) - A
    if moved.shape != A.shape or moved.dtype != A.dtype:
        raise ValueError(
            f"update must be {A.dtype} of shape {tuple(A.shape)} as A, got {moved.dtype} of shape "
            f"{tuple(moved.shape)}"
        )
    if not bool(moved.isfinite().all()):
        raise ValueError("update must be finite")
    return moved


def _shift(b: Tensor, by: Tensor, move: float, other: float, paper: float) -> Shift:
    size = float(by.norm())
    rounding = 8 * torch.finfo(by.dtype).eps

    def bound(rate: float, source: str, status: Status) -> Bound:
        value = rate * move if move else 0.0
        return Bound(value, source, status, size <= value + rounding, value > LARGEST_SHIFT)

    return Shift(
        target=b - by,
        size=size,
        move=move,
        sharp=bound(JACOBIAN_MAX * other, "sharp", STATUS["JACOBIAN_MAX"]),
        paper=bound(paper, "2304.13276", "quoted"),
    )


def _exp(exponent: float) -> float:
    """inf where it overflows."""
    return math.exp(exponent) if exponent < 700 else math.inf
