"""The fixed-point numbers of Edge-MoE, and its softmax in one pass, bit for bit.

Sarkar et al., arXiv 2305.18691; formats and order of operations are those of the released sources.
A number of `width` bits with `integer` of them before the point is an integer times
2^(integer - width). Results are **cut** towards minus infinity and **wrap around**, the defaults of
the tools they were made with: nothing saturates, nothing is rounded. Here the integers are int64
tensors ("raw"), every operation is exact, and what would wrap can be asked for.

Their softmax keeps a running maximum and a running sum, one exponential for each score, and is the
online normaliser of Milakov and Gimelshein (arXiv 1805.02867)::

    m = lowest, t = 0
    for each score s:   s > m:  t = t exp(m - s) + 1,  m = s        else:  t = t + exp(s - m)
    weights             exp(s - m) (1 / t)

t has ten bits before the point, so that it wraps at 512: 512 equal scores have a sum of -512, and
600 one of -424, with weights below 0. `single_pass_softmax` says which rows wrapped, and
`corrected=True` is ours without it: sum, differences and reciprocal have the bits that they need.

The exponential and the reciprocal of the vendor's library are not public. Here they are the exact
ones, cut; theirs may differ in the last place. The exponential of a difference that has wrapped,
and so is above 0, is taken as 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext

import torch
from torch import Tensor

GUARD = 10
"""Further bits of the corrected reciprocal."""


@dataclass(frozen=True)
class Fixed:
    """A format: `width` bits in all, `integer` of them before the point, the sign among them.

    Args:
        width: 1 to 32, so that a product of two fits 64 bits.
        integer: may be 0 or negative, or above the width.
        signed: two's complement.

    >>> Fixed(16, 2)
    Fixed(width=16, integer=2, signed=True)
    >>> Fixed(16, 2).decode(Fixed(16, 2).encode(torch.tensor([0.1, -0.1, 2.5])))
    tensor([ 0.1000, -0.1000, -1.5000], dtype=torch.float64)
    """

    width: int
    integer: int
    signed: bool = True

    def __post_init__(self):
        if not 1 <= self.width <= 32:
            raise ValueError(f"width must be 1 to 32 bits, got {self.width}")

    @property
    def fraction(self) -> int:
        return self.width - self.integer

    @property
    def lowest(self) -> int:
        return -(1 << (self.width - 1)) if self.signed else 0

    @property
    def highest(self) -> int:
        return (1 << (self.width - int(self.signed))) - 1

    def encode(self, x: Tensor) -> Tensor:
        """Floating point -> raw: cut and wrapped, exactly. Finite numbers alone."""
        if not x.is_floating_point() or not bool(x.isfinite().all()):
            raise ValueError(
                f"a fixed-point form has what is floating point and finite, got {x.dtype}"
            )
        scaled = torch.ldexp(x.double(), torch.tensor(self.fraction)).floor()
        return self.wrap(torch.fmod(scaled, 2.0**self.width).long())

    def decode(self, raw: Tensor) -> Tensor:
        """Raw -> float64, exactly."""
        self.check(raw)
        return torch.ldexp(raw.double(), torch.tensor(-self.fraction))

    def wrap(self, raw: Tensor) -> Tensor:
        """What is left of an integer in so many bits."""
        return ((raw - self.lowest) & ((1 << self.width) - 1)) + self.lowest

    def fits(self, raw: Tensor) -> Tensor:
        """bool: what does not wrap."""
        return (raw >= self.lowest) & (raw <= self.highest)

    def check(self, raw: Tensor) -> None:
        """That a tensor is one of this format's.

        Raises:
            ValueError: for another dtype than int64, or numbers out of range.
        """
        if raw.dtype != torch.int64 or not bool(self.fits(raw).all()):
            raise ValueError(f"raw values of {self} are int64 in its range, got {raw.dtype}")


ACTIVATION = Fixed(32, 10)
LINEAR_WEIGHT = Fixed(16, 2)
BIAS = NORM_WEIGHT = Fixed(16, 5)
ATTENTION_BIAS = Fixed(16, 7)
PATCH_WEIGHT = Fixed(16, 0)
PIXEL = Fixed(8, 0, signed=False)
"""Those of Edge-MoE: 22 bits of fraction for activations, 14 for weights."""


def recast(raw: Tensor, source: Fixed, target: Fixed) -> Tensor:
    """The same number in another format: cut, and wrapped.

    >>> recast(ACTIVATION.encode(torch.tensor(-0.1)), ACTIVATION, Fixed(8, 4))
    tensor(-2)
    """
    source.check(raw)
    return _cut(raw, source.fraction, target)


def multiply(a: Tensor, b: Tensor, left: Fixed, right: Fixed, out: Fixed) -> Tensor:
    """a b, exact and then cut and wrapped to `out`.

    >>> half = ACTIVATION.encode(torch.tensor(0.5))
    >>> ACTIVATION.decode(multiply(half, half, ACTIVATION, ACTIVATION, ACTIVATION))
    tensor(0.2500, dtype=torch.float64)
    """
    left.check(a)
    right.check(b)
    return _cut(a * b, left.fraction + right.fraction, out)


def _cut(raw: Tensor, fraction: int, out: Fixed) -> Tensor:
    """From so many bits of fraction to those of `out`; a shift to the right is towards -inf."""
    more = out.fraction - fraction
    if more > 31:
        raise ValueError(f"{fraction} bits of fraction do not become {out.fraction} in 64 bits")
    return out.wrap(raw << more if more > 0 else raw >> min(-more, 63))


def exp(raw: Tensor, form: Fixed = ACTIVATION) -> Tensor:
    """exp of numbers that are 0 or less, cut: exact, where float64 cannot tell by decimals.

    >>> exp(torch.tensor([0, -(1 << 22)]))  # 1, and e^-1
    tensor([4194304, 1542998])
    """
    form.check(raw)
    if bool((raw > 0).any()):
        raise ValueError("exp takes numbers that are 0 or less, as differences to a maximum are")
    scaled = torch.ldexp(form.decode(raw).exp(), torch.tensor(form.fraction))
    out = scaled.floor()
    near = (scaled - scaled.round()).abs() < 1e-4  # 2^32 times the rounding of float64, and more
    near &= (raw < 0) & (scaled > 0.5)  # below that it is 0 for sure
    for place in near.nonzero():
        key = tuple(place.tolist())
        out[key] = _exact_exp(int(raw[key]), form.fraction)
    return out.long()


def _exact_exp(raw: int, fraction: int) -> int:
    with localcontext() as context:
        context.prec = 60
        return math.floor((Decimal(raw) / (1 << fraction)).exp() * (1 << fraction))


@dataclass(frozen=True, eq=False)
class SinglePass:
    """What one pass over the scores leaves.

    Args:
        weights: (..., n) raw.
        maximum: (..., 1) raw, of the row.
        total: (..., 1) raw, the running sum at the end; with `corrected` it has as many bits as it
            needs, and may be out of the format's range.
        wrapped: (..., 1) bool: the sum, a difference of two scores or a reciprocal went out of
            range on the way. Weights of such a row are what the hardware gives, and no softmax.
    """

    weights: Tensor
    maximum: Tensor
    total: Tensor
    wrapped: Tensor


def check_single_pass(form: Fixed) -> None:
    """Raise ValueError for a format that `single_pass_softmax` cannot compute in."""
    if not form.signed or not 0 <= 2 * form.fraction <= 62 - GUARD:
        raise ValueError(
            f"one pass needs a signed format of 0 to {31 - GUARD // 2} bits of fraction, got {form}"
        )


def single_pass_softmax(
    scores: Tensor,
    form: Fixed = ACTIVATION,
    corrected: bool = False,
    visible: Tensor | None = None,
) -> SinglePass:
    """Softmax of raw scores over the last dimension in one pass, bit for bit as Edge-MoE's unit.

    Args:
        scores: (..., n) int64, raw values of `form`; n >= 1.
        form: the paper's Q10.22, whose sums wrap from 512 equal scores on.
        corrected: keep the sum, the differences and the reciprocal in as many bits as they take.
        visible: bool, broadcastable to `scores`; the others never come to the unit and weigh 0. A
            row of which nothing is visible has weights and a sum of 0, and has not wrapped.

    Raises:
        ValueError: for other numbers than those of the format, rows of no scores, and formats or
            lengths whose products do not fit 64 bits.

    >>> scores = ACTIVATION.encode(torch.zeros(2, 600))
    >>> hardware, ours = (single_pass_softmax(scores, corrected=c) for c in (False, True))
    >>> bool(hardware.wrapped.all()), bool(ours.wrapped.any())
    (True, False)
    >>> ACTIVATION.decode(ours.weights).sum(-1)
    tensor([0.9999, 0.9999], dtype=torch.float64)
    """
    form.check(scores)
    if scores.ndim < 1 or scores.shape[-1] == 0:
        raise ValueError(f"a row needs at least one score, got {tuple(scores.shape)}")
    check_single_pass(form)
    if corrected and scores.shape[-1] >> (63 - 2 * form.fraction):
        raise ValueError(f"a sum of {scores.shape[-1]} scores of {form} does not fit 64 bits")
    if visible is None:
        visible = torch.ones((), dtype=torch.bool, device=scores.device)
    visible = visible.expand(scores.shape)
    one = 1 << form.fraction
    maximum = torch.full_like(scores[..., :1], form.lowest)
    total = torch.zeros_like(maximum)
    wrapped = torch.zeros_like(maximum, dtype=torch.bool)

    def kept(raw: Tensor) -> Tensor:
        return raw if corrected else form.wrap(raw)

    for score, seen in zip(scores.split(1, -1), visible.split(1, -1), strict=True):
        gap = maximum - score  # in one bit more, so that its sign is right
        higher = gap < 0
        power = _power(kept(-gap.abs()), form)
        new = torch.where(higher, (total * power >> form.fraction) + one, total + power)
        # the first gap is one to the lowest number there is, and multiplies a sum of 0
        wrapped |= seen & (~form.fits(new) | (~form.fits(-gap.abs()) & (total != 0)))
        total = torch.where(seen, kept(new), total)
        maximum = torch.where(seen & higher, score, maximum)

    gaps = torch.where(visible, scores - maximum, 0)
    guard = GUARD if corrected else 0
    share = (one << form.fraction + guard) // total.masked_fill(total == 0, one)
    wrapped |= ~form.fits(gaps).all(-1, keepdim=True) | (total <= 0) | ~form.fits(share >> guard)
    wrapped &= visible.any(-1, keepdim=True) & (not corrected)
    weights = _power(kept(gaps), form) * kept(share) >> form.fraction + guard
    return SinglePass(torch.where(visible, kept(weights), 0), maximum, total, wrapped)


def _power(gap: Tensor, form: Fixed) -> Tensor:
    """exp of a difference, 0 of one that has wrapped or lies below the format."""
    small = gap.clamp(form.lowest, 0)
    return torch.where((gap > 0) | (gap < form.lowest), 0, exp(small, form))
