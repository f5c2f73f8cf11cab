"""The residuals of softmax regression as functions of their logits s = A x, expanded at a point.

`objective.py` brings the data in; here logits (..., n) stand alone. A block has, with K = dr/ds of
its residual r, all but for a factor that `grow` puts back after the data have come in::

    residual     r, (..., n)                  value       1/2 ||r||^2, (...)
    slope        K^T r, (..., n)              fitted      f, or u: what r takes the target from
    rows         K a, a (..., n, d)
    jacobian     K v                          transposed  K^T v
    second       the Hessian in s, times v
    gauss_newton a^T K^T K a                  hessian     a^T (the Hessian in s) a
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["exp", "cosh", "sinh"]


class SoftmaxBlock:
    """r = softmax(s) - b."""

    def __init__(self, s: Tensor, b: Tensor):
        self.f = s.softmax(-1)
        self.residual = self.f - b
        self.mean = _dot(self.f, self.residual)
        self.b = b

    @cached_property
    def value(self) -> Tensor:
        return self.residual.square().sum(-1) / 2

    @cached_property
    def slope(self) -> Tensor:
        return self.f * (self.residual - self.mean)

    @cached_property
    def bend(self) -> Tensor:
        """k, the diagonal that the Hessian has between centred rows."""
        return self.f * (2 * self.f - self.b - self.mean)

    def grow(self, y: Tensor, power: int) -> Tensor:
        return y

    def jacobian(self, v: Tensor) -> Tensor:
        return self.f * (v - _dot(self.f, v))

    transposed = jacobian  # diag(f) - f f^T is symmetric

    def second(self, v: Tensor) -> Tensor:
        y = self.bend * (v - _dot(self.f, v))
        return y - self.f * y.sum(-1, keepdim=True)

    @property
    def fitted(self) -> Tensor:
        return self.f

    def _centred(self, a: Tensor) -> Tensor:
        return a - self.f.unsqueeze(-2) @ a

    def rows(self, a: Tensor) -> Tensor:
        return self.f.unsqueeze(-1) * self._centred(a)

    def gauss_newton(self, a: Tensor) -> Tensor:
        return gram(self.rows(a))

    def hessian(self, a: Tensor) -> Tensor:
        rows = self._centred(a)
        return rows.mT @ (self.bend.unsqueeze(-1) * rows)


class RescaledBlock:
    """r = u(s) - <u(s), 1> b = P u with P = I - b 1^T.

    What it gives is of u exp(-m), with an m > 0 only where logits are so large that a square of u
    might overflow on the way to a result that does not; m is one number for the last `own`
    dimensions of s.
    """

    def __init__(self, s: Tensor, b: Tensor, kind: Kind, own: int):
        limit = math.log(torch.finfo(s.dtype).max) / 4
        large = s.detach() if kind == "exp" else s.detach().abs()
        m = (large.amax(tuple(range(-own, 0)), keepdim=True) - limit).clamp(min=0)
        self.m = m.flatten(-own).squeeze(-1)
        if kind == "exp":
            self.u = self.du = (s - m).exp()
        else:
            even, odd = _cosh_sinh(s, m, limit)
            self.u, self.du = (even, odd) if kind == "cosh" else (odd, even)
        self.b = b
        self.residual = self._project(self.u)
        self.pull = self.residual - _dot(b, self.residual)
        """P^T r."""

    def _project(self, v: Tensor) -> Tensor:
        return v - v.sum(-1, keepdim=True) * self.b

    def grow(self, y: Tensor, power: int) -> Tensor:
        """y exp(power m) in two halves, so that only a product that overflows does; 0 stays 0."""
        m = self.m[(..., *[None] * (y.ndim - self.m.ndim))]
        half = (power * m / 2).exp()
        return torch.where(y == 0, y, y * half * half)

    @cached_property
    def value(self) -> Tensor:
        return self.residual.square().sum(-1) / 2

    @cached_property
    def slope(self) -> Tensor:
        return self.du * self.pull

    def jacobian(self, v: Tensor) -> Tensor:
        return self._project(self.du * v)

    def transposed(self, v: Tensor) -> Tensor:
        return self.du * (v - _dot(self.b, v))

    def second(self, v: Tensor) -> Tensor:
        return self.transposed(self.jacobian(v)) + self.u * self.pull * v  # u'' = u for all three

    @property
    def fitted(self) -> Tensor:
        return self.u

    def rows(self, a: Tensor) -> Tensor:
        moved = self.du.unsqueeze(-1) * a
        return moved - self.b.unsqueeze(-1) * moved.sum(-2, keepdim=True)

    def gauss_newton(self, a: Tensor) -> Tensor:
        return gram(self.rows(a))

    def hessian(self, a: Tensor) -> Tensor:
        return self.gauss_newton(a) + a.mT @ ((self.u * self.pull).unsqueeze(-1) * a)


def _cosh_sinh(s: Tensor, m: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """cosh(s) exp(-m) and sinh(s) exp(-m): by torch's own up to the limit, beyond it |s| rules."""
    far = s.abs() > limit
    near, shrink = s.clamp(-limit, limit), (-m).exp()
    half = (s.abs() - m).exp() / 2
    even = torch.where(far, half, near.cosh() * shrink)
    return even, torch.where(far, s.sign() * half, near.sinh() * shrink)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def gram(a: Tensor) -> Tensor:
    return a.mT @ a


Block = SoftmaxBlock | RescaledBlock
