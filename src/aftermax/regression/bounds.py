"""How sharply softmax bends: the constants of softmax regression, sharp ones beside the papers'.

With f = softmax(z), its Jacobian J = diag(f) - f f^T and l(z) = norm(softmax(z) - b)^2 / 2 the loss
of softmax regression is L(x) = l(Ax), and what moves how fast hangs on three numbers of l alone.

**J is at most 1/2**, in spectral norm. For a unit vector u, u^T J u is the variance of u under f:
at most a quarter of its range squared (Popoviciu), and (max u - min u)^2 <= 2. Attained at
f = (1/2, 1/2, 0, ...). J being the derivative of softmax at every point of the way::

    norm(f(Ax') - f(Ax)) <= norm(A) norm(x' - x) / 2
    norm(f(A'x) - f(Ax)) <= norm(x) norm(A' - A) / 2

**The Hessian of l** has its eigenvalues in `CURVATURE_PROVED`, (-0.24042, 0.30815), for any
b >= 0 with sum(b) <= 1; in a search all were from `CURVATURE_MIN` to `CURVATURE_MAX`, the
extremes of 4 s^2 (1 - s)(2 - 3 s), the curvature of two classes of which the first has s and the
target is on the second, at s = (15 + sqrt 33) / 24 and (15 - sqrt 33) / 24.

**The third derivative of l** along a unit vector is at most `THIRD_DERIVATIVE_MAX` in size, again
an extreme of two classes, of 2 sqrt 2 s^2 (1 - s) (8 - 30 s + 24 s^2).

Which of these are proved says `STATUS`, and how docs/regression_theory.md.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

JACOBIAN_MAX = 0.5
"""Largest spectral norm of the Jacobian of softmax."""


def _curvature_of_two(s: float) -> float:
    return 4 * s**2 * (1 - s) * (2 - 3 * s)


CURVATURE_MIN = _curvature_of_two((15 + math.sqrt(33)) / 24)
"""-0.240409, smallest eigenvalue of the Hessian of norm(softmax(z) - b)^2 / 2."""
CURVATURE_MAX = _curvature_of_two((15 - math.sqrt(33)) / 24)
"""0.308117, the largest."""
CURVATURE_PROVED = (-0.24042, 0.30815)
"""What both are proved to stay within, for any number of classes, by benchmarks/curvature.py."""
THIRD_DERIVATIVE_MAX = 0.5714073589522375
"""Largest size of its third derivative along a unit vector: s = 0.636264 is a root of
60 s^3 - 108 s^2 + 57 s - 8."""

Status = Literal["proved", "searched", "quoted"]
STATUS: dict[str, Status] = {
    "JACOBIAN_MAX": "proved",
    "CURVATURE_PROVED": "proved",
    "CURVATURE_MIN": "searched",
    "CURVATURE_MAX": "searched",
    "THIRD_DERIVATIVE_MAX": "searched",
}
"""Proved for any number of classes, or searched numerically: nothing beyond was found. What is
quoted is a paper's."""


def safe_step(A: Tensor) -> Tensor:
    """1 / (0.30815 norm(A)^2): gradient descent with it never raises the loss, (...,).

    Args:
        A: (..., n, d).

    >>> safe_step(torch.eye(2))
    tensor(3.2452)
    """
    return 1 / (CURVATURE_PROVED[1] * _norm(A, "A") ** 2)


def convex_weight(A: Tensor, strength: float = 0.0) -> Tensor:
    """A w with which norm(f - b)^2 / 2 + norm(w A x)^2 / 2 is convex, by `strength`, (...,).

    w^2 = 0.24042 + strength / sigma_min(A)^2 makes every eigenvalue of the Hessian at least
    `strength`, for every b >= 0 with sum(b) <= 1; of one b a smaller w may do.
    The papers (Deng, Li, Song, arXiv 2304.10411), as we recall, ask for 4 in place of 0.24042, and
    for 100 where the Hessian is approximated.

    Args:
        A: (..., n, d) of rank d.
        strength: 0 or more.

    >>> convex_weight(torch.eye(2))
    tensor(0.4903)
    """
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be 0 or more, and finite, got {strength}")
    if not strength:
        return torch.full_like(_norm(A, "A"), math.sqrt(-CURVATURE_PROVED[0]))
    if A.shape[-2] < A.shape[-1]:
        raise ValueError(
            f"A of shape {tuple(A.shape)} has no rank d = {A.shape[-1]}: no weight on A x makes "
            "the loss strongly convex; a ridge on x does"
        )
    values = torch.linalg.svdvals(_matrix(A, "A"))
    smallest = values[..., -1]
    rounding = max(A.shape[-2:]) * torch.finfo(A.dtype).eps * values[..., 0]
    if bool((smallest <= rounding).any()):
        raise ValueError(
            f"A of shape {tuple(A.shape)} has a rank below d = {A.shape[-1]}: no weight on A x "
            "makes the loss strongly convex; a ridge on x does"
        )
    return (strength / smallest**2 - CURVATURE_PROVED[0]).sqrt()


def hessian_lipschitz(A: Tensor) -> Tensor:
    """THIRD_DERIVATIVE_MAX norm(A)^3: how fast the Hessian of L changes with x, (...,).

    Searched, not proved; 4 norm(A)^3 is proved (docs/regression_theory.md).
    In place of n^1.5 exp(30 R^2) (arXiv 2304.10411).

    >>> hessian_lipschitz(2 * torch.eye(2))
    tensor(4.5713)
    """
    return THIRD_DERIVATIVE_MAX * _norm(A, "A") ** 3


def _norm(matrix: Tensor, name: str) -> Tensor:
    return torch.linalg.matrix_norm(_matrix(matrix, name), 2)


def _matrix(matrix: Tensor, name: str) -> Tensor:
    if matrix.ndim < 2 or 0 in matrix.shape[-2:] or not matrix.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point matrix (..., n, d), got {matrix.dtype} of shape "
            f"{tuple(matrix.shape)}"
        )
    return matrix
