"""Softmax of rows of fixed-point scores: Edge-MoE's in one pass, and the plain one in three.

Both take a row of scores as a stream, one a cycle, and take it again from wherever it is kept for
each further pass; the weights leave as a stream during the last one. Both have one exponential, one
multiplier and one divider of one bit a cycle, so that what differs is the algorithm::

    one pass       read: m, t in one go            divide 1 / t     read: exp(s - m) (1 / t)
    three passes   read: m    read: t              divide 1 / t     read: exp(s - m) (1 / t)

`aftermax.moe.single_pass_softmax` and `three_pass_softmax` are their integers.
"""

# Amaranth makes members of what a signature says, and takes more than its types do
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from aftermax.hdl.exponential import Exponential
from aftermax.hdl.reciprocal import Reciprocal
from aftermax.moe.fixedpoint import ACTIVATION, GUARD, ExpTables, Fixed, check_single_pass

_MARK = data.StructLayout({"sums": 1, "weighs": 1, "last": 1, "rises": 1})


def _item(width: int) -> data.StructLayout:
    return data.StructLayout({"value": signed(width), "last": 1})


class _Softmax(wiring.Component):
    """Both, told apart by how often they read a row."""

    READS: int
    LATENCY = 2 + Exponential.LATENCY
    """Cycles from a score to its weight: its gap to the maximum, the exponential, the product."""

    def __init__(
        self,
        form: Fixed = ACTIVATION,
        corrected: bool = False,
        longest: int = 1024,
        guard: int = 8,
    ):
        check_single_pass(form)
        if longest < 1:
            raise ValueError(f"a row has at least one score, got longest={longest}")
        self.form, self.corrected, self.longest = form, corrected, longest
        self.tables = ExpTables(form, guard)
        if not corrected and sum(self.tables.bits) >= form.width:
            raise ValueError(f"differences of {form} wrap where exp is not 0 yet: corrected=True")
        item = stream.Signature(_item(form.width))
        super().__init__({"scores": In(item), "weights": Out(item)})
        self.maximum = Signal(signed(form.width), init=form.lowest)
        bits = form.fraction + longest.bit_length()
        # the register of the sum has the reciprocal later on: the one thing that is multiplied
        held = max(bits, form.fraction + GUARD + 1)
        self.total = Signal(unsigned(held) if corrected else signed(form.width))
        if corrected:  # a sum that does not wrap is 1 or more
            power, least = 2 * form.fraction + GUARD, form.fraction
            self.reciprocal = Reciprocal(unsigned(bits), power, power - least + 1, least)
        else:
            self.reciprocal = Reciprocal(signed(form.width), 2 * form.fraction, form.width)

    def cycles(self, n: int) -> int:
        """From the first score of a row of n to that of the next, where neither stream waits."""
        return self.READS * n + self.LATENCY + self.reciprocal.cycles

    def elaborate(self, platform) -> Module:
        m = Module()
        one_pass, form, one = self.READS == 2, self.form, 1 << self.form.fraction
        width = form.width + 1  # that of a difference of two scores
        m.submodules.exponential = exponential = Exponential(self.tables, width)
        m.submodules.reciprocal = reciprocal = self.reciprocal
        score, total = self.scores.payload, self.total
        go, taken = Signal(), Signal()
        reading, sums, weighs = Signal(), Signal(), Signal()
        m.d.comb += [
            go.eq(~self.weights.valid | self.weights.ready),
            self.scores.ready.eq(reading & go),
            taken.eq(self.scores.valid & self.scores.ready),
            exponential.advance.eq(go),
            # what a sum of 0, which has wrapped, is taken for
            reciprocal.divisor.eq(total if self.corrected else Mux(total == 0, one, total)),
        ]

        # what goes beside a score through the registers, as far as its exponential
        marks = [Signal(_MARK, name=f"mark_{i}") for i in range(1 + Exponential.LATENCY)]
        end = marks[-1]
        with m.FSM():
            if not one_pass:
                with m.State("MAXIMUM"):
                    m.d.comb += reading.eq(1)
                    with m.If(taken & score.last):
                        m.next = "SUM"
            with m.State("SUM"):
                m.d.comb += [reading.eq(1), sums.eq(1)]
                with m.If(taken & score.last):
                    m.next = "EMPTY"
            with m.State("EMPTY"), m.If(end.sums & end.last & go):
                m.next = "START"
            with m.State("START"):
                m.d.comb += reciprocal.start.eq(1)
                m.next = "DIVIDE"
            with m.State("DIVIDE"), m.If(reciprocal.done):
                m.next = "WEIGH"
            with m.State("WEIGH"):
                m.d.comb += [reading.eq(1), weighs.eq(1)]
                with m.If(taken & score.last):
                    m.next = "SUM" if one_pass else "MAXIMUM"

        behind, rises = Signal(signed(width)), Signal()
        m.d.comb += [behind.eq(self.maximum - score.value), rises.eq(behind[-1])]
        with m.If(go):
            m.d.sync += [
                exponential.gap.eq(Mux(rises, -behind, behind) if one_pass else behind),
                marks[0].sums.eq(taken & sums),
                marks[0].weighs.eq(taken & weighs),
                marks[0].last.eq(score.last),
                marks[0].rises.eq(rises),
                *(marks[i].eq(marks[i - 1]) for i in range(1, len(marks))),
            ]
        with m.If(taken & rises):
            m.d.sync += self.maximum.eq(score.value)
        with m.If(taken & weighs & score.last):
            m.d.sync += self.maximum.eq(form.lowest)

        power, share = exponential.power, reciprocal.quotient
        product = total * power
        new = total + power
        if one_pass:
            new = Mux(end.rises, (product >> form.fraction) + one, new)
        guard = GUARD if self.corrected else 0
        with m.If(go):
            m.d.sync += [
                self.weights.valid.eq(end.weighs),
                self.weights.payload.value.eq(product >> form.fraction + guard),
                self.weights.payload.last.eq(end.last),
            ]
            with m.If(end.sums):
                m.d.sync += total.eq(new)
            with m.If(end.weighs & end.last):
                m.d.sync += total.eq(0)
        with m.If(reciprocal.done):
            m.d.sync += total.eq(share)
        return m


class OnePassSoftmax(_Softmax):
    """Edge-MoE's: maximum and sum in one reading of the row, the weights in a second one.

    ::

        s > m:  t = t exp(m - s) + 1,  m = s      else:  t = t + exp(s - m)
        weight  exp(s - m) (1 / t)

    Equal to `aftermax.moe.single_pass_softmax` with `exp=table_exp` of as many guard bits, or with
    the exact exponential where guard is 30 (Q10.22).

    Args:
        form: of scores and weights, signed; the paper's Q10.22.
        corrected: a sum and a reciprocal that do not wrap; else those of the paper, which wrap at
            512 equal scores.
        longest: scores in a row that the corrected sum has the bits for.
        guard: of `ExpTables`.

    Ports: streams of a value and whether it is the `last` of its row; `scores` takes each row
    twice, `weights` gives it once. `cycles(n)` says how long a row takes.
    """

    READS = 2


class ThreePassSoftmax(_Softmax):
    """The plain one: the maximum in one reading of the row, the sum in a second, then the weights.

    Equal to `aftermax.moe.three_pass_softmax`; `scores` takes each row three times. Everything else
    is that of `OnePassSoftmax`.
    """

    READS = 3
