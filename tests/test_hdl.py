# amaranth: UnusedElaboratable=no
"""The circuits in Amaranth's simulator, bit for bit those of `aftermax.moe`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("amaranth")

from amaranth.hdl import signed, unsigned
from amaranth.sim import Simulator

from aftermax.hdl import (
    Exponential,
    NearestGelu,
    OnePassSoftmax,
    PolynomialGelu,
    Reciprocal,
    TableGelu,
    ThreePassSoftmax,
    verilog,
)
from aftermax.moe import (
    ACTIVATION,
    ExpTables,
    Fixed,
    fixed_gelu,
    nearest_gelu,
    polynomial_gelu,
    single_pass_softmax,
    table_exp,
    three_pass_softmax,
)
from aftermax.moe.fixedpoint import exp

ONE = 1 << 22


def simulated(unit, bench) -> None:
    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()


def streamed(unit, source: str, target: str, items: list, count: int, stalls: float = 0) -> list:
    """What leaves `target` when `items` go into `source`; both wait now and then where asked to."""
    chance = random.Random(0)
    source, target = getattr(unit, source), getattr(unit, target)
    out = []

    async def put(context):
        for item in items:
            while chance.random() < stalls:
                await context.tick()
            context.set(source.payload, item)
            context.set(source.valid, 1)
            await context.tick().until(source.ready)
            context.set(source.valid, 0)

    async def take(context):
        for _ in range(count):
            while chance.random() < stalls:
                await context.tick()
            context.set(target.ready, 1)
            (payload,) = await context.tick().sample(target.payload).until(target.valid)
            out.append(payload)
            context.set(target.ready, 0)

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(put, background=True)
    simulator.add_testbench(take)
    simulator.run()
    return out


# ---- exponential and reciprocal ------------------------------------------------------------------


@pytest.mark.parametrize("guard", [0, 3, 8, 30])
def test_the_exponential_is_that_of_the_tables(guard):
    chance = random.Random(guard)
    tables = ExpTables(ACTIVATION, guard)
    last = 63_959_939  # the last gap whose exponential is not 0
    steps = [i << 17 for i in range(0, 512, 37)] + [i << 8 for i in range(0, 512, 61)]
    gaps = [0, 1, 255, 256, last, last + 1, 2**26 - 1, 2**26, 2**31, 2**33 - 1]
    gaps += [g + d for g in steps for d in (-1, 0, 1) if g + d >= 0]
    gaps += [chance.randrange(2**26) for _ in range(1000)]
    unit, out = Exponential(tables, 33), []

    async def bench(context):
        context.set(unit.advance, 1)
        for gap in gaps + [0] * unit.LATENCY:
            context.set(unit.gap, gap)
            await context.tick()
            out.append(context.get(unit.power))

    simulated(unit, bench)
    raw = -torch.tensor(gaps).clamp_max(2**31)
    wanted = exp(raw) if guard == 30 else table_exp(raw, guard=guard)
    assert out[unit.LATENCY - 1 : -1] == wanted.tolist()


@pytest.mark.parametrize("form", [ACTIVATION, Fixed(16, 6), Fixed(18, 8)])
def test_the_law_of_the_tables_is_0_or_1_above_and_never_rises(form):
    most = min(1 << sum(ExpTables(form, 0).bits), -form.lowest)
    if form == ACTIVATION:
        raw = -torch.randint(most, (400_000,), generator=torch.Generator().manual_seed(0))
        raw = raw.sort(descending=True).values
    else:
        raw = -torch.arange(most)
    exact = exp(raw, form)
    for guard, share in ((4, 0.15), (8, 0.01)):
        found = table_exp(raw, form, guard)
        above = found - exact
        assert set(above.unique().tolist()) <= {0, 1}
        assert 0 < float(above.double().mean()) < share
        assert bool((found.diff() <= 0).all())


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 to 31 bits"):
        ExpTables(Fixed(8, 8), 3)
    with pytest.raises(ValueError, match="0 or less"):
        table_exp(torch.tensor([1]))
    with pytest.raises(ValueError, match="64 bits"):
        table_exp(torch.tensor([0]), guard=15)
    with pytest.raises(ValueError, match="gaps of 26 bits"):
        Exponential(ExpTables(ACTIVATION, 8), 25)


@pytest.mark.parametrize(
    ("unit", "divisors"),
    [
        (
            Reciprocal(signed(32), 44, 32),
            [1, 2, 3, -1, -2, -3, ONE, -ONE, ONE - 1, ONE + 1, 2**31 - 1, -(2**31), 511 * ONE],
        ),
        (Reciprocal(unsigned(33), 54, 33, least=22), [ONE, ONE + 1, 600 * ONE, 2**33 - 1]),
        (Reciprocal(signed(32), 8, 32), [1, 3, -3, 1 << 8, -(1 << 8), 1 << 9]),
    ],
)
def test_the_reciprocal_is_cut_towards_minus_infinity(unit, divisors):
    chance, found = random.Random(0), []
    low = -(2**31) if unit.shape.signed else 1 << unit.least
    divisors = divisors + [chance.randrange(low, 2**31) or 1 for _ in range(100)]

    async def bench(context):
        for divisor in divisors:
            context.set(unit.divisor, divisor)
            context.set(unit.start, 1)
            await context.tick()
            context.set(unit.start, 0)
            cycles = 1
            while not context.get(unit.done):
                await context.tick()
                cycles += 1
            assert cycles == unit.cycles
            found.append(context.get(unit.quotient) % (1 << len(unit.quotient)))

    simulated(unit, bench)
    assert found == [(2**unit.power // d) % (1 << len(unit.quotient)) for d in divisors]


# ---- softmax -------------------------------------------------------------------------------------


def rows(many: int, long: bool = True) -> list[list[int]]:
    """Edges first, then rows of all lengths and spreads."""
    low, high = ACTIVATION.lowest, ACTIVATION.highest
    edges = [
        [0],
        [low],
        [high],
        [low, low],
        [low, high],
        [high, low],
        [low, high, low, high],
        [-1, 0, 1, 0, -1],
        [0, -63_959_939, -63_959_940, -(1 << 26), 1 - (1 << 26)],
        [-(2**31) + 1, 0, 2**31 - 1],
        list(range(-(20 << 22), 20 << 22, 1 << 22)),
        list(range(20 << 22, -(20 << 22), -(1 << 22))),
        list(range(100)),
        [(i << 17) + d for i in range(0, -480, -97) for d in (-1, 0, 1)],
    ]
    if long:
        edges += [[7] * 511, [7] * 512, [low] * 600, [0] * 512 + [ONE // 3] * 3]
    chance = random.Random(1)
    for _ in range(many):
        spread = chance.choice([1e-6, 0.1, 1, 4, 30, 200])
        row = [chance.gauss(0, spread) * ONE for _ in range(chance.choice([1, 2, 3, 7, 20]))]
        edges.append([max(low, min(high, int(score))) for score in row])
    return edges


def of_rows(unit, many: list[list[int]], stalls: float = 0) -> list[list[int]]:
    items = [
        {"value": score, "last": i == len(row) - 1}
        for row in many
        for _ in range(unit.READS)
        for i, score in enumerate(row)
    ]
    found = streamed(unit, "scores", "weights", items, sum(map(len, many)), stalls)
    out: list[list[int]] = [[]]
    for weight in found:
        out[-1].append(weight.value)
        if weight.last:
            out.append([])
    return out[:-1]


SOFTMAX = {OnePassSoftmax: single_pass_softmax, ThreePassSoftmax: three_pass_softmax}


@pytest.mark.parametrize("unit", SOFTMAX)
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("guard", [8, 30])
def test_the_softmax_units_are_their_integers(unit, corrected, guard):
    many = rows(60, long=guard == 8)
    found = of_rows(unit(corrected=corrected, guard=guard), many)
    power = exp if guard == 30 else functools.partial(table_exp, guard=guard)
    for row, weights in zip(many, found, strict=True):
        wanted = SOFTMAX[unit](torch.tensor(row), corrected=corrected, exp=power)
        assert weights == wanted.weights.tolist()


@pytest.mark.parametrize("unit", SOFTMAX)
@pytest.mark.parametrize(
    ("form", "corrected"),
    [(Fixed(16, 6), True), (Fixed(20, 12), True), (Fixed(12, 8), False), (Fixed(8, 3), True)],
)
def test_other_formats_and_streams_that_wait(unit, form, corrected):
    chance = random.Random(2)
    many = [[form.highest] * 9, [form.highest] * 3, [form.lowest, form.highest], [3]]
    many += [
        [chance.randint(form.lowest, form.highest) >> chance.choice([0, 3]) for _ in range(n)]
        for n in (1, 2, 5, 9)
    ]
    found = of_rows(unit(form, corrected=corrected, longest=9, guard=6), many, stalls=0.4)
    power = functools.partial(table_exp, guard=6)
    for row, weights in zip(many, found, strict=True):
        wanted = SOFTMAX[unit](torch.tensor(row), form, corrected=corrected, exp=power)
        assert weights == wanted.weights.tolist()


@pytest.mark.parametrize("unit", [OnePassSoftmax(), ThreePassSoftmax(corrected=True)])
def test_a_row_takes_the_cycles_that_are_said(unit):
    starts = []

    async def bench(context):
        context.set(unit.scores.valid, 1)
        context.set(unit.weights.ready, 1)
        taken = 0
        for cycle in range(3 * unit.cycles(6)):
            if taken % (6 * unit.READS) == 0 and context.get(unit.scores.ready):
                starts.append(cycle)
            context.set(unit.scores.payload.last, taken % 6 == 5)
            taken += context.get(unit.scores.ready)
            await context.tick()

    simulated(unit, bench)
    assert starts == [0, unit.cycles(6), 2 * unit.cycles(6)]


def test_the_sum_at_the_end_is_that_of_the_integers():
    unit = OnePassSoftmax()
    many = rows(10, long=False)
    sums = []

    async def bench(context):
        context.set(unit.weights.ready, 1)
        for row in many:
            for read in range(2):
                for i, score in enumerate(row):
                    context.set(unit.scores.payload, {"value": score, "last": i == len(row) - 1})
                    context.set(unit.scores.valid, 1)
                    await context.tick().until(unit.scores.ready)
                    context.set(unit.scores.valid, 0)
                if read == 0:
                    while not context.get(unit.reciprocal.done):
                        await context.tick()
                    sums.append((context.get(unit.total), context.get(unit.maximum)))

    simulated(unit, bench)
    for row, (total, maximum) in zip(many, sums, strict=True):
        wanted = single_pass_softmax(torch.tensor(row), exp=table_exp)
        assert (total, maximum) == (int(wanted.total), int(wanted.maximum))


# ---- GELU ----------------------------------------------------------------------------------------


def numbers(form: Fixed, many: int) -> list[int]:
    chance = random.Random(3)
    steps = [i << form.fraction - 5 for i in range(180)]
    out = [form.lowest, form.lowest + 1, form.highest]
    out += [sign * (s + d) for s in steps for d in (-1, 0, 1) for sign in (-1, 1)]
    out += [chance.randint(-(6 << form.fraction), 6 << form.fraction) for _ in range(many)]
    out += [chance.randint(form.lowest, form.highest) for _ in range(many // 4)]
    return [x for x in out if form.lowest <= x <= form.highest]


@pytest.mark.parametrize(
    ("unit", "integers"),
    [
        (TableGelu(), fixed_gelu),
        (NearestGelu(), nearest_gelu),
        (PolynomialGelu(), polynomial_gelu),
        (TableGelu(Fixed(16, 4), 1 / 4, 5), functools.partial(fixed_gelu, step=1 / 4, limit=5)),
        (TableGelu(Fixed(12, 6), 1, 1), functools.partial(fixed_gelu, step=1, limit=1)),
    ],
)
@pytest.mark.parametrize("stalls", [0, 0.3])
def test_the_gelu_units_are_their_integers(unit, integers, stalls):
    x = numbers(unit.form, 200 if stalls else 2000)
    found = streamed(unit, "x", "out", x, len(x), stalls)
    assert found == integers(torch.tensor(x), form=unit.form).tolist()


# ---- Verilog -------------------------------------------------------------------------------------


def test_verilog_has_the_ports_of_the_streams_and_is_always_the_same():
    text = verilog(TableGelu(), "table_gelu")
    for port in ("clk", "rst", "x__payload", "x__valid", "x__ready", "out__payload"):
        assert f"put {port};" in text or f"] {port};" in text
    assert text == verilog(TableGelu(), "table_gelu")


@pytest.mark.parametrize(
    ("unit", "error"),
    [
        (lambda: OnePassSoftmax(Fixed(16, 6, signed=False)), "signed"),
        (lambda: ThreePassSoftmax(longest=0), "at least one score"),
        (lambda: OnePassSoftmax(Fixed(16, 1)), "2 or more before the point"),
        (lambda: OnePassSoftmax(Fixed(6, 2)), "corrected=True"),
        (lambda: TableGelu(Fixed(16, 6, signed=False)), "signed"),
        (lambda: TableGelu(Fixed(8, 6)), "finer"),
        (lambda: NearestGelu(Fixed(16, 6)), "coarser"),
        (lambda: Reciprocal(signed(8), 8, 8, least=2), "least"),
    ],
)
def test_units_that_cannot_be_are_refused(unit, error):
    with pytest.raises(ValueError, match=error):
        unit()


@pytest.fixture(scope="module")
def hardware():
    """benchmarks/hardware.py, which is a script and not on the path."""
    missing = [name for name in ("yosys", "yosys-config", "g++") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}")
    folder = Path(__file__).parent.parent / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("hardware", folder / "hardware.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["hardware"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("section", ["softmax", "gelu"])
def test_a_million_numbers_through_the_verilog(hardware, section, tmp_path):
    bench = hardware.Bench(tmp_path, hardware.Record(None), hardware.Console(quiet=True))
    hardware.verilog(bench)
    getattr(hardware, section)(bench)
    lines = bench.record.lines(section)
    assert len(lines) == {"softmax": 8, "gelu": 3}[section]
    for line in lines:
        assert line["differ"] == 0
        assert line.get("scores", line.get("random")) >= 1_000_000
        assert line["cycles"] == line.get("cycles_said", line["cycles"])


@pytest.mark.slow
def test_the_verilog_of_a_unit_is_counted(hardware, tmp_path):
    (tmp_path / "unit.v").write_text(verilog(TableGelu(Fixed(16, 6), 1 / 4, 5), "unit"))
    cells = {}
    for name, script in hardware.SYNTHESIS.items():
        out = tmp_path / "cells.txt"
        hardware.yosys(f"read_verilog {tmp_path}/unit.v; " + script.format(top="unit", out=out))
        cells[name] = hardware.counted(out.read_text())
    assert cells["xilinx"]["DSP48E2"] == 1
    assert set(cells["gates"]) <= {"NAND", "NOR", "NOT", "DFF_P", "transistors", "depth"}
    totals = hardware.totals(cells)
    assert totals["LUTs alone"] > totals["LUTs"] > 0
    assert totals["NAND, NOR, NOT"] > totals["LUTs alone"]
    assert totals["depth"] > 3


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("aftermax.hdl")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "amaranth", None)
    with pytest.raises(ImportError, match=r"pip install 'aftermax\[hdl\]'"):
        importlib.import_module("aftermax.hdl")
