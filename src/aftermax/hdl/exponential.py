"""exp(-g) from three tables and two products, as `aftermax.moe.ExpTables` writes it."""

# Amaranth makes members of what a signature says, and takes more than its types do
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, unsigned
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from aftermax.moe.fixedpoint import ExpTables


class Exponential(wiring.Component):
    """exp(-gap), 3 cycles later, one in each cycle in which `advance` is high.

    ::

        cycle 1   T[high], V[middle], W[low] are read
        cycle 2   y = T - T V
        cycle 3   power = y - y W, without its guard bits

    Args:
        tables: format and guard bits; with 30 of them for Q10.22 it is the exact exponential, cut.
        width: bits of the gap, which is 0 or more. Beyond those of the tables the power is 0.

    Ports: `advance` (1 bit, in), `gap` (width bits, in), `power` (fraction + 1 bits, out).
    """

    LATENCY = 3

    def __init__(self, tables: ExpTables, width: int):
        self.tables, self.width = tables, width
        if width < sum(tables.bits):
            raise ValueError(f"{tables} takes gaps of {sum(tables.bits)} bits, got {width}")
        super().__init__(
            {
                "advance": In(1),
                "gap": In(unsigned(width)),
                "power": Out(unsigned(tables.form.fraction + 1)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        tables, fraction = self.tables, self.tables.fraction
        high_bits, middle_bits, low_bits = tables.bits
        first, second = tables.leading

        def read(name: str, entries: list[int], bits: int, start: int, count: int):
            memory = Memory(shape=unsigned(bits), depth=len(entries), init=entries)
            m.submodules[name] = memory
            port = memory.read_port()
            m.d.comb += [port.en.eq(self.advance), port.addr.eq(self.gap[start : start + count])]
            return port.data

        entries = tables.entries()
        top = read("high", entries[0], fraction + 1, middle_bits + low_bits, high_bits)
        step = read("middle", entries[1], fraction - first, low_bits, middle_bits)
        rest = read("low", entries[2], fraction - second, 0, low_bits)

        y = Signal(fraction + 1)
        rest_of_y = Signal(fraction - second)
        beyond = Signal(2)
        z = y - ((y[second:] * rest_of_y) >> fraction - second)
        with m.If(self.advance):
            m.d.sync += [
                beyond.eq((self.gap[sum(tables.bits) :] != 0) | beyond << 1),
                y.eq(top - ((top[first:] * step) >> fraction - first)),
                rest_of_y.eq(rest),
                self.power.eq(Mux(beyond[1], 0, z[tables.guard : fraction + 1])),
            ]
        return m
