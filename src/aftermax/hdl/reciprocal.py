"""2^k over an integer, one bit of the quotient a cycle."""

# Amaranth makes members of what a signature says, and takes more than its types do
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Shape, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out


class Reciprocal(wiring.Component):
    """floor(2^power / divisor) by long division.

    Args:
        shape: of the divisor, which is not 0. A negative one gives a negative quotient, cut towards
            minus infinity.
        power: k of 2^k.
        bits: of the quotient that are kept, the lowest.
        least: the divisor is known to be 2^least or more: the quotient bits that are 0 for that
            reason take no cycle.

    Ports: `start` (1 bit, in: takes `divisor` and begins), `divisor` (in), `done` (1 bit, out: high
    in one cycle, `cycles` after `start`), `quotient` (bits, as signed as the divisor; holds until
    the next start).
    """

    def __init__(self, shape: Shape, power: int, bits: int, least: int = 0):
        if shape.signed and least:
            raise ValueError("a divisor that may be negative has no least power of two")
        self.shape, self.power, self.least = shape, power, least
        super().__init__(
            {
                "start": In(1),
                "divisor": In(shape),
                "done": Out(1),
                "quotient": Out(Shape(bits, shape.signed)),
            }
        )

    @property
    def cycles(self) -> int:
        """From `start` to `done`."""
        return self.power - self.least + 2

    def elaborate(self, platform) -> Module:
        m = Module()
        width = self.shape.width
        size = Signal(width)
        rest = Signal(width + 1)  # below twice the size
        kept = Signal(len(self.quotient))
        left = Signal(range(self.cycles))
        less = Signal(range(-(1 << width), 1 << width + 1))
        goes = ~less[-1]
        negative = Signal() if self.shape.signed else None

        m.d.comb += less.eq(rest - size)
        with m.If(left > 0):
            m.d.sync += [
                rest.eq(Mux(goes, less[:width], rest[:width]) << 1),
                kept.eq(Cat(goes, kept)),
                left.eq(left - 1),
                self.done.eq(left == 1),
            ]
        with m.Else():
            m.d.sync += self.done.eq(0)
        with m.If(self.start):
            divisor = self.divisor
            m.d.sync += [
                size.eq(Mux(divisor[-1], -divisor, divisor) if self.shape.signed else divisor),
                rest.eq(1 << self.least),
                left.eq(self.cycles - 1),
            ]
            if negative is not None:
                m.d.sync += negative.eq(divisor[-1])
            if len(kept) >= self.cycles:  # what is not shifted out
                m.d.sync += kept.eq(0)
        if negative is None:
            m.d.comb += self.quotient.eq(kept)
        else:
            # -(q + 1) is ~q, and what is left over is above 0 for all but exact quotients
            below = Mux(rest == 0, -kept, ~kept)
            m.d.comb += self.quotient.eq(Mux(negative, below, kept))
        return m
