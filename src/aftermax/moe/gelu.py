"""GELU as a table: relu less a bump that is even, short and smooth.

Sarkar et al., "Edge-MoE", arXiv 2305.18691, as its released sources have it::

    gelu(x) = relu(x) - delta(abs x),   delta(u) = u (1 - Phi(u)) = u erfc(u / sqrt 2) / 2

delta is held at 177 places 1/32 apart, from 0 to 5.5, rounded to 22 bits of fraction; between them
it is linear, beyond them 0. Rounding erf gives every entry of theirs. With a step h the error is

    h^2 / 8 times the largest size of delta'' = h^2 / (4 sqrt(2 pi)) = 0.0997 h^2

halfway to the first place, as delta''(u) = (u^2 - 2) phi(u) is largest in size at 0: 9.74e-5 for
theirs, a fifth of what the tanh form is off by, and delta(limit) where the table ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aftermax.moe.fixedpoint import ACTIVATION, Fixed

STEP, LIMIT = 1 / 32, 5.5
"""The paper's: 177 entries."""


def gelu_delta(u: Tensor) -> Tensor:
    """u (1 - Phi(u)) for u >= 0, to the last digits: what gelu lacks to relu.

    >>> gelu_delta(torch.tensor([0.0, 1.0, 10.0]))
    tensor([0.0000e+00, 1.5866e-01, 7.6199e-23])
    """
    return u * torch.special.erfc(u / math.sqrt(2)) / 2


def gelu_table(
    step: float = STEP, limit: float = LIMIT, fraction: int | None = ACTIVATION.fraction
) -> Tensor:
    """delta at 0, step, .., limit, (limit / step + 1,) in float64.

    Args:
        step: between entries; a power of two, as bits of x are the index of the hardware.
        limit: a multiple of step, from where delta is taken as 0.
        fraction: bits that entries are rounded to; None leaves float64.

    >>> len(gelu_table()), float(gelu_table()[1] * 2**22)
    (177, 63902.0)
    """
    _check(step, limit)
    exact = gelu_delta(torch.arange(round(limit / step) + 1, dtype=torch.float64) * step)
    return exact if fraction is None else (exact * 2.0**fraction).round() / 2.0**fraction


def gelu_error(step: float = STEP, limit: float = LIMIT) -> float:
    """Bound on the error of an unrounded table: step^2 / (4 sqrt(2 pi)), or delta(limit).

    >>> round(gelu_error(), 7)
    9.74e-05
    """
    _check(step, limit)
    beyond = float(gelu_delta(torch.tensor(limit, dtype=torch.float64)))
    return max(step**2 / (4 * math.sqrt(2 * math.pi)), beyond)


def table_gelu(
    x: Tensor,
    step: float = STEP,
    limit: float = LIMIT,
    fraction: int | None = ACTIVATION.fraction,
) -> Tensor:
    """gelu(x) by the table, in the dtype of x: linear by pieces, with a gradient that jumps.

    Args:
        x: floating point, any shape. Half precision is computed in float32.
        step, limit, fraction: as in `gelu_table`.

    NaN stays, inf goes to inf, -inf to 0. The derivative at a place of the table is that of the
    piece further out, at 0 it is 1/2.

    >>> table_gelu(torch.tensor([-1.0, 0.0, 1.0, 8.0]))
    tensor([-0.1587,  0.0000,  0.8413,  8.0000])
    """
    if not x.is_floating_point():
        raise ValueError(
            f"table_gelu takes floating point, got {x.dtype}; fixed_gelu takes integers"
        )
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    table = gelu_table(step, limit, fraction).to(x)
    size = x.abs()
    inside = size < limit  # False for NaN
    place = torch.where(inside, size, 0) / step
    index = place.detach().floor().long()
    below, above = table[index], table[(index + 1).clamp_max(len(table) - 1)]
    delta = torch.lerp(below, above, place - index)
    # maximum, whose gradient at 0 is 1/2, as that of gelu
    relu = torch.maximum(x, x.new_zeros(()))
    return (relu - torch.where(inside, delta, 0)).to(dtype)


def fixed_gelu(
    x: Tensor, step: float = STEP, limit: float = LIMIT, form: Fixed = ACTIVATION
) -> Tensor:
    """The same on integers, bit for bit as the paper's unit: int64 raw values of `form`.

    The share between two entries is exact; its product with their difference is cut, not rounded,
    so that a result is up to one unit of the last place above the interpolation.

    >>> one = ACTIVATION.encode(torch.tensor(1.0))
    >>> ACTIVATION.decode(fixed_gelu(one))
    tensor(0.8413, dtype=torch.float64)
    """
    form.check(x)
    table = (gelu_table(step, limit, form.fraction) * 2.0**form.fraction).long()
    shift = form.fraction + round(math.log2(step))
    if shift < 0:
        raise ValueError(f"a step of {step} is finer than {form.fraction} bits of fraction")
    size = x.abs()
    inside = size < round(limit * 2**form.fraction)
    kept = torch.where(inside, size, 0)
    index, share = kept >> shift, kept & ((1 << shift) - 1)
    below, above = table[index], table[(index + 1).clamp_max(len(table) - 1)]
    delta = below + ((share * (above - below)) >> shift)
    return x.clamp_min(0) - torch.where(inside, delta, 0)


def nearest_gelu(
    x: Tensor,
    step: float = 2**-12,
    limit: float = 4 + 9 / 128,
    fraction: int = 14,
    form: Fixed = ACTIVATION,
) -> Tensor:
    """The same without lines between the entries: int64 raw values of `form`, by the nearest one.

    ::

        gelu(x) = relu(x) - delta(the nearest multiple of step to abs x)

    Its error is that of the table with lines only at a far finer step, as half a step times the
    slope of delta, up to 1/2, is missed: step / 4 + 2^-(fraction + 1), or delta(limit). By default
    it is as near to gelu as the paper's: 16,673 entries of 12 bits, an error of 9.6e-5.

    Args:
        x: int64 raw values of `form`.
        step: a power of two, no finer than `form`.
        limit: a multiple of step, after which delta is 0.
        fraction: bits that entries are rounded to, no more than those of `form`.

    >>> one = ACTIVATION.encode(torch.tensor(1.0))
    >>> ACTIVATION.decode(nearest_gelu(one))
    tensor(0.8414, dtype=torch.float64)
    """
    form.check(x)
    table = (gelu_table(step, limit, fraction) * 2.0**fraction).long()
    shift = form.fraction + round(math.log2(step))
    if shift < 1 or fraction > form.fraction:
        raise ValueError(f"step {step} and {fraction} bits must be coarser than {form}")
    index = (x.abs() >> shift - 1) + 1 >> 1
    inside = index < len(table)
    delta = table[torch.where(inside, index, 0)] << form.fraction - fraction
    return x.clamp_min(0) - torch.where(inside, delta, 0)


@dataclass(frozen=True)
class GeluPolynomial:
    """delta as one polynomial in w = u / 2 - middle, middle = limit / 4, for 0 <= u < limit.

    It meets delta at the places of Chebyshev, and its coefficients are rounded. By default it has
    the fewest products and bits with which gelu is off by no more than by the paper's table, by
    9.6e-5.

    Args:
        degree: with fewer than 9 the error is above 1e-4.
        limit: from where delta is taken as 0.
        place: bits of fraction of w, cut.
        fraction: bits of fraction of coefficients and sums.
    """

    degree: int = 9
    limit: float = 4.125
    place: int = 14
    fraction: int = 17

    @property
    def middle(self) -> int:
        """Raw, of so many bits as w."""
        return round(self.limit / 4 * 2**self.place)

    def coefficients(self) -> list[int]:
        """Raw, that of the highest power first."""
        count = self.degree + 1
        nodes = torch.cos((torch.arange(count, dtype=torch.float64) + 0.5) * math.pi / count)
        w = nodes * self.limit / 4
        powers = torch.linalg.vander(w, N=count)
        found = torch.linalg.solve(powers, gelu_delta(2 * w + self.limit / 2))
        return [round(c * 2**self.fraction) for c in found.flip(0).tolist()]


POLYNOMIAL = GeluPolynomial()


def polynomial_gelu(
    x: Tensor, polynomial: GeluPolynomial = POLYNOMIAL, form: Fixed = ACTIVATION
) -> Tensor:
    """gelu by one polynomial and no table: int64 raw values of `form`.

    ::

        gelu(x) = relu(x) - delta(abs x),   delta = (.. (c9 w + c8) w + ..) w + c0

    Each product is cut to the bits of the polynomial before the next coefficient is added.

    >>> one = ACTIVATION.encode(torch.tensor(1.0))
    >>> ACTIVATION.decode(polynomial_gelu(one))
    tensor(0.8414, dtype=torch.float64)
    """
    form.check(x)
    if form.fraction < max(polynomial.fraction, polynomial.place - 1):
        raise ValueError(f"{form} has fewer bits of fraction than {polynomial}")
    size = x.abs()
    inside = size < round(polynomial.limit * 2**form.fraction)
    w = (torch.where(inside, size, 0) >> form.fraction + 1 - polynomial.place) - polynomial.middle
    first, *rest = polynomial.coefficients()
    delta = torch.full_like(w, first)
    for coefficient in rest:
        delta = (delta * w >> polynomial.place) + coefficient
    delta = delta << form.fraction - polynomial.fraction
    return x.clamp_min(0) - torch.where(inside, delta, 0)


def _check(step: float, limit: float) -> None:
    if not (0 < step <= 1 and math.log2(step).is_integer()):
        raise ValueError(f"step must be a power of two from 1 down, got {step}")
    if not (0 < limit < math.inf and (limit / step).is_integer()):
        raise ValueError(f"limit must be a positive multiple of the step {step}, got {limit}")
