"""GELU of fixed-point numbers: Edge-MoE's table and lines, a plain table, and a polynomial."""

# Amaranth makes members of what a signature says, and takes more than its types do
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import itertools
import math

from amaranth.hdl import Cat, Module, Mux, Shape, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from aftermax.moe.fixedpoint import ACTIVATION, Fixed
from aftermax.moe.gelu import LIMIT, POLYNOMIAL, STEP, GeluPolynomial, gelu_table


class _Gelu(wiring.Component):
    """relu less what a table gives for the size of x, one number in each cycle."""

    LATENCY: int
    """Cycles from a number to its GELU."""

    def __init__(self, form: Fixed, step: float):
        if not form.signed:
            raise ValueError(f"GELU takes a signed format, got {form}")
        self.form, self.step = form, step
        self.shift = form.fraction + round(math.log2(step))
        numbers = stream.Signature(signed(form.width))
        super().__init__({"x": In(numbers), "out": Out(numbers)})

    def _begin(self, m: Module) -> tuple[Signal, Signal, Signal]:
        """High where the registers go on, the size of x a cycle later, relu(x) beside delta."""
        go, size = Signal(), Signal(self.form.width)
        relu = [Signal(self.form.width - 1, name=f"relu_{i}") for i in range(self.LATENCY - 1)]
        valid = Signal(self.LATENCY)
        x = self.x.payload
        m.d.comb += [
            go.eq(~self.out.valid | self.out.ready),
            self.x.ready.eq(go),
            self.out.valid.eq(valid[-1]),
        ]
        with m.If(go):
            m.d.sync += [
                valid.eq(Cat(self.x.valid, valid)),
                size.eq(Mux(x[-1], -x, x)),
                relu[0].eq(Mux(x[-1], 0, x)),
                *(after.eq(before) for before, after in itertools.pairwise(relu)),
            ]
        return go, size, relu[-1]


class TableGelu(_Gelu):
    """Edge-MoE's: 177 entries with lines between them, equal to `aftermax.moe.fixed_gelu`.

    ::

        cycle 1   size = abs x
        cycle 2   an entry and its distance to the next are read
        cycle 3   delta = entry + share distance
        cycle 4   relu(x) - delta

    Args:
        form: of x and the result, signed; the paper's Q10.22.
        step, limit: as in `aftermax.moe.gelu_table`.

    Ports: the streams `x` and `out` of numbers.
    """

    LATENCY = 4

    def __init__(self, form: Fixed = ACTIVATION, step: float = STEP, limit: float = LIMIT):
        super().__init__(form, step)
        if self.shift < 0:
            raise ValueError(f"a step of {step} is finer than {form.fraction} bits of fraction")
        table = (gelu_table(step, limit, form.fraction) * 2.0**form.fraction).long().tolist()
        self.entries = list(itertools.pairwise(table))

    def elaborate(self, platform) -> Module:
        m = Module()
        shift = self.shift
        go, size, relu = self._begin(m)
        most = max(itertools.chain(*self.entries))
        furthest = max(abs(above - entry) for entry, above in self.entries)
        distances = Shape(furthest.bit_length() + 1, signed=True)
        held = data.StructLayout({"entry": most.bit_length(), "distance": distances})
        m.submodules.table = table = Memory(
            shape=held,
            depth=len(self.entries),
            init=[{"entry": entry, "distance": above - entry} for entry, above in self.entries],
        )
        read = table.read_port()
        index = size[shift:]
        beyond, share = Signal(), Signal(max(shift, 1))
        delta = Signal(most.bit_length())
        m.d.comb += [read.en.eq(go), read.addr.eq(index)]
        with m.If(go):
            m.d.sync += [
                share.eq(size[:shift]),
                beyond.eq(index >= len(self.entries)),
                delta.eq(Mux(beyond, 0, read.data.entry + ((share * read.data.distance) >> shift))),
                self.out.payload.eq(relu - delta),
            ]
        return m


class NearestGelu(_Gelu):
    """The nearest entry of a table that is fine enough without lines: `aftermax.moe.nearest_gelu`.

    Args:
        form, step, limit, fraction: as there; by default a table of the paper's error.

    Ports: the streams `x` and `out` of numbers.
    """

    LATENCY = 3

    def __init__(
        self,
        form: Fixed = ACTIVATION,
        step: float = 2**-12,
        limit: float = 4 + 9 / 128,
        fraction: int = 14,
    ):
        super().__init__(form, step)
        if self.shift < 1 or fraction > form.fraction:
            raise ValueError(f"step {step} and {fraction} bits must be coarser than {form}")
        self.fraction = fraction
        self.entries = (gelu_table(step, limit, fraction) * 2.0**fraction).long().tolist()

    def elaborate(self, platform) -> Module:
        m = Module()
        go, size, relu = self._begin(m)
        m.submodules.table = table = Memory(
            shape=unsigned(max(self.entries).bit_length()),
            depth=len(self.entries),
            init=self.entries,
        )
        read = table.read_port()
        index, beyond = Signal(self.form.width - self.shift + 1), Signal()
        m.d.comb += [
            index.eq((size[self.shift - 1 :] + 1) >> 1),
            read.en.eq(go),
            read.addr.eq(index),
        ]
        delta = Mux(beyond, 0, read.data) << self.form.fraction - self.fraction
        with m.If(go):
            m.d.sync += [beyond.eq(index >= len(self.entries)), self.out.payload.eq(relu - delta)]
        return m


class PolynomialGelu(_Gelu):
    """No table at all: delta as one polynomial, a product a cycle, `aftermax.moe.polynomial_gelu`.

    Args:
        form: of x and the result, signed.
        polynomial: by default of nine products, with no larger an error than the paper's table.

    Ports: the streams `x` and `out` of numbers.
    """

    def __init__(self, form: Fixed = ACTIVATION, polynomial: GeluPolynomial = POLYNOMIAL):
        if form.fraction < max(polynomial.fraction, polynomial.place - 1):
            raise ValueError(f"{form} has fewer bits of fraction than {polynomial}")
        self.polynomial = polynomial
        self.LATENCY = polynomial.degree + 3  # the size, w, the products, the difference
        super().__init__(form, 1.0)

    def elaborate(self, platform) -> Module:
        m = Module()
        form, polynomial = self.form, self.polynomial
        go, size, relu = self._begin(m)
        first, *rest = polynomial.coefficients()
        middle = polynomial.middle
        limit = round(polynomial.limit * 2**form.fraction)

        # w and whether u is beyond, beside each product; sums have the bits that they can need
        w = [Signal(signed(middle.bit_length() + 1), name=f"w_{i}") for i in range(len(rest))]
        beyond = Signal(len(rest) + 1)
        most, before = abs(first), first
        with m.If(go):
            m.d.sync += [
                w[0].eq(size[form.fraction + 1 - polynomial.place :] - middle),
                beyond.eq(Cat(size >= limit, beyond)),
                *(after.eq(earlier) for earlier, after in itertools.pairwise(w)),
            ]
            for i, coefficient in enumerate(rest):
                most = (most * middle >> polynomial.place) + 1 + abs(coefficient)
                total = Signal(range(-most, most + 1), name=f"sum_{i}")
                m.d.sync += total.eq(((before * w[i]) >> polynomial.place) + coefficient)
                before = total
            delta = Mux(beyond[-1], 0, before) << form.fraction - polynomial.fraction
            m.d.sync += self.out.payload.eq(relu - delta)
        return m
