"""The results of `benchmarks/hardware.py` (docs/results/hardware.json) as tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

HARDWARE = Path(__file__).parent / "results" / "hardware.json"

PASSES = {"one": "one pass", "three": "three passes"}
GELU = {
    "table_gelu": "176 lines (Edge-MoE)",
    "nearest_gelu": "nearest of 16,673 entries",
    "polynomial_gelu": "polynomial of degree 9",
}
SOFTMAX = [
    f"{passes}_pass_{sums}_{guard}"
    for guard in (8, 30)
    for sums in ("published", "corrected")
    for passes in PASSES
]
UNITS = [*SOFTMAX, *(f"exponential_{guard}" for guard in (4, 8, 30)), *GELU]


def _section(name: str) -> list[dict]:
    """Its lines, in the order of the units, whichever was measured first."""
    lines = json.loads(HARDWARE.read_text()).get(name, [])
    return sorted(lines, key=lambda line: UNITS.index(line["unit"]))


def _guard(unit: str) -> int:
    return int(unit.rpartition("_")[2])


def _softmax(unit: str) -> str:
    passes, _, sums, guard = unit.split("_")
    return f"{PASSES[passes]}, {sums}, {guard} guard bits"


def exponential() -> str:
    """What the Verilog gives on all 2^26 gaps."""
    parts = [
        "| guard bits | differs from its integers | exact | 1 unit above | otherwise | rises |",
        "| --: | --: | --: | --: | --: | --: |",
    ]
    for line in _section("exponential"):
        exact = line["gaps"] - line["one_above"] - line["otherwise"]
        parts.append(
            f"| {line['guard']} | {line['differ']:,} of {line['gaps']:,} |"
            f" {100 * exact / line['gaps']:.2f} % | {line['one_above']:,} |"
            f" {line['otherwise']:,} | {line['rises']:,} |"
        )
    return "\n".join(parts)


def compared() -> str:
    """How many numbers each unit was compared on, and how many differed."""
    parts = ["| unit | compared with | numbers | differ |", "| --- | --- | --: | --: |"]
    for line in _section("softmax"):
        passes = line["unit"].split("_")[0]
        model = {"one": "single_pass_softmax", "three": "three_pass_softmax"}[passes]
        wraps = f", {line['rows_that_wrap']:,} of them wrap" if line["rows_that_wrap"] else ""
        parts.append(
            f"| {_softmax(line['unit'])} | `{model}` |"
            f" {line['scores']:,} in {line['rows']:,} rows{wraps} | {line['differ']:,} |"
        )
    for line in _section("gelu"):
        model = line["unit"].replace("table", "fixed")
        parts.append(
            f"| GELU, {GELU[line['unit']]} | `{model}` | all {line['within']:,} from -6 to 6,"
            f" and {line['random']:,} | {line['differ']:,} |"
        )
    return "\n".join(parts)


def cycles() -> str:
    """What the rows of the comparison took, beside what the units say of themselves."""
    parts = ["| unit | cycles | said |", "| --- | --: | --: |"]
    for line in _section("softmax"):
        parts.append(f"| {_softmax(line['unit'])} | {line['cycles']:,} | {line['cycles_said']:,} |")
    return "\n".join(parts)


def _cells(kind: str, title: str, name: Callable[[str], str]) -> str:
    lines = [line for line in _section("cells") if line["kind"] == kind]
    counts = list(lines[0]["totals"])
    parts = [f"| {title} | {' | '.join(counts)} |", f"| --- |{' --: |' * len(counts)}"]
    for line in lines:
        cells = (f"{count:,.1f}".removesuffix(".0") for count in line["totals"].values())
        parts.append(f"| {name(line['unit'])} | {' | '.join(cells)} |")
    return "\n".join(parts)


def softmax_cells() -> str:
    return _cells("softmax", "softmax", _softmax)


def exponential_cells() -> str:
    return _cells("exponential", "exponential", lambda unit: f"{_guard(unit)} guard bits")


def gelu_cells() -> str:
    errors = {line["unit"]: line["error"] for line in _section("gelu")}
    return _cells("gelu", "GELU", lambda unit: f"{GELU[unit]}, error {errors[unit]:.2e}")


def ratios() -> str:
    """One pass over three, in every count."""
    at = {line["unit"]: line["totals"] for line in _section("cells")}
    counts = list(at[SOFTMAX[0]])
    parts = [f"| one pass over three | {' | '.join(counts)} |", f"| --- |{' --: |' * len(counts)}"]
    for one, first in at.items():
        second = at.get(one.replace("one", "three"))
        if one.startswith("one_pass") and second is not None:
            cells = (f"{first[count] / second[count]:.2f}" for count in counts)
            parts.append(f"| {_softmax(one).partition(', ')[2]} | {' | '.join(cells)} |")
    return "\n".join(parts)


def verdict() -> str:
    """What the counts say of the paper's two ideas, in sentences, of what has been measured."""
    at = {line["unit"]: line["totals"] for line in _section("cells")}
    said = []

    def more(unit: str, other: str, count: str) -> str:
        share = 100 * (at[unit][count] / at[other][count] - 1)
        return f"{abs(share):.0f} % {'more' if share >= 0 else 'fewer'} {count}"

    for sums in ("published", "corrected"):
        one, three = (f"{passes}_pass_{sums}_8" for passes in PASSES)
        if one in at and three in at:
            told = ", ".join(more(one, three, count) for count in ("LUTs alone", "transistors"))
            said.append(
                f"- **One pass against three, {sums} numbers**: {more(one, three, 'LUTs')} with"
                f" {at[one]['DSPs']} and {at[three]['DSPs']} DSPs; {told}."
            )
    for unit, title in GELU.items():
        if unit in at:
            alone = f"{at[unit]['LUTs alone']:,} LUTs alone"
            said.append(f"- **GELU, {title}**: {_taken(at[unit])}; {alone}.")
    for guard, what in ((8, "up to 1 unit too high"), (30, "exact")):
        unit = f"exponential_{guard}"
        if unit in at:
            alone = f"{at[unit]['LUTs alone']:,} LUTs alone"
            said.append(f"- **Exponential, {what}**: {_taken(at[unit])}; {alone}.")
    return "\n".join(said)


def _taken(totals: dict[str, float]) -> str:
    return f"{totals['LUTs']:,} LUTs, {totals['DSPs']} DSPs, {totals['memories']:g} block memories"


def tools() -> str:
    read = json.loads(HARDWARE.read_text())
    tools = ", ".join(f"{name} {version}" for name, version in read["tools"].items())
    return f"{tools}; aftermax {read['version']}."


BLOCKS = {
    "exponential": exponential,
    "compared": compared,
    "cycles": cycles,
    "softmax-cells": softmax_cells,
    "ratios": ratios,
    "exponential-cells": exponential_cells,
    "gelu-cells": gelu_cells,
    "verdict": verdict,
    "tools": tools,
}
