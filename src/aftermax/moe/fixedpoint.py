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
ones, cut; theirs may differ in the last place. `table_exp` is an exponential that hardware can do
cheaply, from three tables, and may take the place of the exact one. The exponential of a difference
that has wrapped, and so is above 0, is taken as 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
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
            what = "infinity or NaN" if x.is_floating_point() else str(x.dtype)
            raise ValueError(
                f"a fixed-point form has what is floating point and finite, got {what}"
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
        if raw.dtype != torch.int64:
            raise ValueError(f"raw values of {self} are int64, got {raw.dtype}")
        if not bool(self.fits(raw).all()):
            raise ValueError(
                f"raw values of {self}, int64, are {self.lowest} to {self.highest}, "
                f"got {int(raw.min())} to {int(raw.max())}"
            )


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


@dataclass(frozen=True)
class ExpTables:
    """exp(-g) for g >= 0 as a product of three table entries, with `guard` bits more than `form`.

    The bits of g that matter, those of 2^-fraction up to where exp(-g) is below the format, are cut
    into high, middle and low ones. With one = 2^(fraction + guard), all in whole numbers::

        y = T[high] - T[high] V[middle] / one      T = one exp(-high)
        z = y - y W[low] / one                     V = one (1 - exp(-middle)), W likewise
        exp(-g) = z / 2^guard

    Entries are rounded, products and the result are cut, and the bits of T and y that the smaller
    factor pushes out are left out of the product. Measured on each of the 2^26 g of Q10.22
    that the tables have a place for (benchmarks/hardware.py): the result is that of `exp` or 1 unit
    of the last place above it, never rises with g, and is above at

        guard          4         8    30
        results  6709232    464042     0

    so that 8 bits give 99.3 % of an exact exponential, and 30 one that is exact.

    Args:
        form: its fraction is that of g and of the result; signed or not does not matter.
        guard: further bits of fraction.

    >>> ExpTables(ACTIVATION, 8).bits
    (9, 9, 8)
    """

    form: Fixed
    guard: int

    def __post_init__(self):
        if not 4 <= self.form.fraction <= 31 or self.guard < 0:
            raise ValueError(
                "tables of exp take 4 to 31 bits of fraction and no fewer than 0 bits of guard, got"
                f" {self.form}, guard {self.guard}"
            )

    @property
    def bits(self) -> tuple[int, int, int]:
        """Of the index of each table, the high one first."""
        last = math.floor(self.form.fraction * math.log(2) * 2**self.form.fraction)
        bits = last.bit_length()
        high = -(-bits // 3)
        return high, -(-(bits - high) // 2), (bits - high) // 2

    @property
    def fraction(self) -> int:
        """Bits of fraction of the entries."""
        return self.form.fraction + self.guard

    @property
    def leading(self) -> tuple[int, int]:
        """How many bits of fraction of V and of W are always 0."""
        _, middle, low = self.bits
        return self.form.fraction - middle - low, self.form.fraction - low

    def entries(self) -> tuple[list[int], list[int], list[int]]:
        """T, V and W."""
        return _exp_entries(self)


@functools.lru_cache
def _exp_entries(tables: ExpTables) -> tuple[list[int], list[int], list[int]]:
    high, middle, low = tables.bits
    one = 1 << tables.fraction

    def power(index: int, shift: int) -> int:
        with localcontext() as context:
            context.prec = 60
            exact = (-Decimal(index << shift) / (1 << tables.form.fraction)).exp() * one
            return math.floor(exact + Decimal("0.5"))

    return (
        [power(i, middle + low) for i in range(1 << high)],
        [one - power(i, low) for i in range(1 << middle)],
        [one - power(i, 0) for i in range(1 << low)],
    )


def table_exp(raw: Tensor, form: Fixed = ACTIVATION, guard: int = 8) -> Tensor:
    """exp of numbers that are 0 or less by the three tables of `ExpTables`: in integers alone.

    Args:
        raw: int64 raw values of `form`.
        guard: with 8, that of the exact exponential, or at 0.7 % of the numbers 1 above it. Those
            of more than 14 do not fit 64 bits here (fraction + guard <= 36); with the 30 that make
            it exact it is `exp`.

    >>> table_exp(torch.tensor([0, -(1 << 22)])), exp(torch.tensor([0, -(1 << 22)]))
    (tensor([4194304, 1542998]), tensor([4194304, 1542998]))
    """
    form.check(raw)
    if bool((raw > 0).any()):
        raise ValueError("exp takes numbers that are 0 or less, as differences to a maximum are")
    tables = ExpTables(form, guard)
    if tables.fraction > 36:
        raise ValueError(f"{tables.fraction} bits of fraction do not fit 64 bits when multiplied")
    high, middle, low = (torch.tensor(t, device=raw.device) for t in tables.entries())
    _, middle_bits, low_bits = tables.bits
    gap, fraction = -raw, tables.fraction
    (first, second), last = tables.leading, len(high) << middle_bits + low_bits
    kept = torch.where(gap < last, gap, 0)
    y = high[kept >> middle_bits + low_bits]
    y = y - ((y >> first) * middle[(kept >> low_bits) & len(middle) - 1] >> fraction - first)
    z = y - ((y >> second) * low[kept & len(low) - 1] >> fraction - second)
    return torch.where(gap < last, z >> guard, 0)


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
    if not form.signed or not 0 <= 2 * form.fraction <= 62 - GUARD or form.integer < 2:
        raise ValueError(
            f"one pass needs a signed format of 0 to {31 - GUARD // 2} bits of fraction, and 2 or "
            f"more before the point for a weight of 1, got {form}"
        )


def single_pass_softmax(
    scores: Tensor,
    form: Fixed = ACTIVATION,
    corrected: bool = False,
    visible: Tensor | None = None,
    exp: Callable[[Tensor, Fixed], Tensor] = exp,
) -> SinglePass:
    """Softmax of raw scores over the last dimension in one pass, bit for bit as Edge-MoE's unit.

    Args:
        scores: (..., n) int64, raw values of `form`; n >= 1.
        form: the paper's Q10.22, whose sums wrap from 512 equal scores on.
        corrected: keep the sum, the differences and the reciprocal in as many bits as they take.
        visible: bool, broadcastable to `scores`; the others never come to the unit and weigh 0. A
            row of which nothing is visible has weights and a sum of 0, and has not wrapped.
        exp: of raw numbers that are 0 or less; `table_exp` is that of a small circuit.

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
    visible = _checked(scores, form, corrected, visible)
    one, of_gap = 1 << form.fraction, _of_gap(form, corrected)
    maximum = torch.full_like(scores[..., :1], form.lowest)
    total = torch.zeros_like(maximum)
    wrapped = torch.zeros_like(maximum, dtype=torch.bool)

    def kept(raw: Tensor) -> Tensor:
        return raw if corrected else form.wrap(raw)

    for score, seen in zip(scores.split(1, -1), visible.split(1, -1), strict=True):
        gap = maximum - score  # in one bit more, so that its sign is right
        higher = gap < 0
        power = _power(kept(-gap.abs()), of_gap, exp)
        new = torch.where(higher, (total * power >> form.fraction) + one, total + power)
        # the first gap is one to the lowest number there is, and multiplies a sum of 0
        wrapped |= seen & (~form.fits(new) | (~form.fits(-gap.abs()) & (total != 0)))
        total = torch.where(seen, kept(new), total)
        maximum = torch.where(seen & higher, score, maximum)

    weights, bad = _weights(scores, visible, maximum, total, form, corrected, exp)
    return SinglePass(weights, maximum, total, (wrapped | bad) & (not corrected))


def three_pass_softmax(
    scores: Tensor,
    form: Fixed = ACTIVATION,
    corrected: bool = False,
    visible: Tensor | None = None,
    exp: Callable[[Tensor, Fixed], Tensor] = exp,
) -> SinglePass:
    """The plain way in the same numbers: the maximum, then the sum, then the weights.

    ::

        m = max of s,   t = sum of exp(s - m),   weights = exp(s - m) (1 / t)

    Arguments, errors and what comes back are those of `single_pass_softmax`, which cuts a product
    more for each new maximum: its sum may be lower by some units of the last place.

    >>> scores = ACTIVATION.encode(torch.tensor([0.0, 0.5, 1.5, 2.0]))
    >>> [int(f(scores).total) for f in (single_pass_softmax, three_pass_softmax)]
    [8241788, 8241789]
    """
    visible = _checked(scores, form, corrected, visible)
    maximum = scores.masked_fill(~visible, form.lowest).amax(-1, keepdim=True)
    gaps = torch.where(visible, scores - maximum, 0)
    powers = _power(gaps if corrected else form.wrap(gaps), _of_gap(form, corrected), exp)
    sums = torch.where(visible, powers, 0).cumsum(-1)
    total = sums[..., -1:] if corrected else form.wrap(sums[..., -1:])
    weights, bad = _weights(scores, visible, maximum, total, form, corrected, exp)
    wrapped = ~form.fits(sums).all(-1, keepdim=True) | bad
    return SinglePass(weights, maximum, total, wrapped & (not corrected))


def _checked(scores: Tensor, form: Fixed, corrected: bool, visible: Tensor | None) -> Tensor:
    """`visible` for each score, of scores that a row can have."""
    form.check(scores)
    if scores.ndim < 1 or scores.shape[-1] == 0:
        raise ValueError(f"a row needs at least one score, got {tuple(scores.shape)}")
    check_single_pass(form)
    if corrected and scores.shape[-1] >> (63 - 2 * form.fraction):
        raise ValueError(f"a sum of {scores.shape[-1]} scores of {form} does not fit 64 bits")
    if visible is None:
        visible = torch.ones((), dtype=torch.bool, device=scores.device)
    return visible.expand(scores.shape)


def _weights(
    scores: Tensor,
    visible: Tensor,
    maximum: Tensor,
    total: Tensor,
    form: Fixed,
    corrected: bool,
    exp: Callable[[Tensor, Fixed], Tensor],
) -> tuple[Tensor, Tensor]:
    """exp(s - m) (1 / t), and which rows wrapped here or have a sum that did."""

    def kept(raw: Tensor) -> Tensor:
        return raw if corrected else form.wrap(raw)

    one, guard = 1 << form.fraction, GUARD if corrected else 0
    gaps = torch.where(visible, scores - maximum, 0)
    share = (one << form.fraction + guard) // total.masked_fill(total == 0, one)
    bad = ~form.fits(gaps).all(-1, keepdim=True) | (total <= 0) | ~form.fits(share >> guard)
    powers = _power(kept(gaps), _of_gap(form, corrected), exp)
    weights = powers * kept(share) >> form.fraction + guard
    return torch.where(visible, kept(weights), 0), bad & visible.any(-1, keepdim=True)


def _of_gap(form: Fixed, corrected: bool) -> Fixed:
    """The format that differences of two scores keep to: with a bit more they all fit. 32 bits have
    6 or more before the point here, and the exponential of -32 is below their last."""
    wider = corrected and form.width < 32
    return Fixed(form.width + 1, form.integer + 1) if wider else form


def _power(gap: Tensor, form: Fixed, exp: Callable[[Tensor, Fixed], Tensor]) -> Tensor:
    """exp of a difference, 0 of one that has wrapped or lies below the format."""
    small = gap.clamp(form.lowest, 0)
    return torch.where((gap > 0) | (gap < form.lowest), 0, exp(small, form))
