"""What `benchmarks/regression.py` found (docs/results/regression.json), as tables and a figure."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

REGRESSION = Path(__file__).parent / "results" / "regression.json"
OURS, THOROUGH = "aftermax", "aftermax, thorough"
STYLES = {
    "gradient descent": ("#999999", "-"),
    "lm": ("#0072B2", "-"),
    "newton": ("#D55E00", "-"),
    "auto": ("#222222", "--"),
}


def _section(name: str) -> list[dict]:
    return json.loads(REGRESSION.read_text())[name]


def cases() -> str:
    """Steps, and the worst of the seeds."""
    seeds = len(_section("cases")[0]["seeds"])
    lines = [
        "| target | n | d | scale | method | steps | loss, worst | error of x | gradient norm |",
        "| --- | --: | --: | --: | --- | --: | --: | --: | --: |",
    ]
    for line in _section("cases"):
        every = line["seeds"]
        worst = {key: max(seed[key] for seed in every) for key in ("loss", "error", "gradient")}
        steps = [seed["steps"] for seed in every]
        told = f"{min(steps)} to {max(steps)}" if min(steps) < max(steps) else f"{steps[0]:,}"
        error = f"{worst['error']:.1e}" if line["exact"] else "–"
        target = "exact" if line["exact"] else "other, w² = 0.001"
        lines.append(
            f"| {target} | {line['n']} | {line['d']} | {line['scale']:g} | {line['method']} |"
            f" {told} | {worst['loss']:.1e} | {error} | {worst['gradient']:.1e} |"
        )
    return "\n".join([*lines, "", f"{seeds} seeds each."])


def _ways() -> list[str]:
    return list(dict.fromkeys(way for line in _section("peers") for way in line["ways"]))


def _theirs() -> list[str]:
    return [way for way in _ways() if way not in (OURS, THOROUGH)]


def losses() -> str:
    """Who ends lower, split by whether both are at one minimum."""
    peers = _section("peers")
    heads = ("same minimum: ours lower", "equal", "ours higher", "another: ours lower", "higher")
    lines = []
    for own in (OURS, THOROUGH):
        name = "auto" if own == OURS else "thorough"
        lines += [f"| `{name}` against | {' | '.join(heads)} |", f"| --- |{' --: |' * len(heads)}"]
        for way in _theirs():
            count: Counter[tuple[str, bool]] = Counter()
            for line in peers:
                if way in line["ways"]:
                    found = line["ways"][way][own]
                    apart = found["other_minimum"] and found["told"] != "equal"
                    count[found["told"], apart] += 1
            cells = [count["ours lower", False], count["equal", False]]
            cells += [count["ours higher", False]]
            cells += [count["ours lower", True], count["ours higher", True]]
            lines.append(f"| {way} | {' | '.join(map(str, cells))} |")
        lines.append("")
    statuses = Counter(line["statuses"][OURS] for line in peers)
    told = "; ".join(f"{n} {words}" for words, n in statuses.most_common())
    version = json.loads(REGRESSION.read_text())["scipy"]
    return "\n".join([*lines, f"{len(peers)} problems; `auto` says: {told}. scipy {version}."])


def minima() -> str:
    """How often the way of a row ends lower than that of a column."""
    lines = _section("minima")
    ways = list(dict.fromkeys(line["way"] for line in lines))
    names = {OURS: "`auto`", THOROUGH: "`thorough`"}
    heads = " | ".join(names.get(way, way) for way in ways)
    table = [f"| lower than | {heads} |", f"| --- |{' --: |' * len(ways)}"]
    for way in ways:
        found = {line["other"]: line["lower"] for line in lines if line["way"] == way}
        cells = ("–" if other == way else str(found[other]) for other in ways)
        table.append(f"| {names.get(way, way)} | {' | '.join(cells)} |")
    return "\n".join([*table, "", f"{lines[0]['problems']} problems."])


def times() -> str:
    """Time of theirs over ours, over the problems, and on the large ones."""
    peers = _section("peers")
    large = [line for line in peers if line["d"] >= 15 and line["n"] >= 100]
    lines = [
        f"| way | time / `auto`'s, median (quartiles) of {len(peers)} problems |"
        f" of the {len(large)} with n ≥ 100, d ≥ 15 | ms, median |",
        "| --- | --: | --: | --: |",
    ]
    for way in _ways():
        cells = []
        for of in (peers, large):
            every = [line["ways"][way]["ratio"] for line in of if way in line["ways"]]
            low, middle, high = statistics.quantiles(every, n=4, method="inclusive")
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        ms = statistics.median(line["ways"][way]["ms"] for line in peers if way in line["ways"])
        name = {OURS: "`auto`", THOROUGH: "`thorough`"}.get(way, way)
        lines.append(f"| {name} | {' | '.join(cells)} | {ms:.2f} |")
    return "\n".join(lines)


def batches() -> str:
    """Many problems at once against lm one after the other."""
    lines = [
        "| problems | n | d | lm's time / ours (quartiles) | microseconds a problem |",
        "| --: | --: | --: | --: | --: |",
    ]
    for line in _section("batch"):
        spread = f"{line['ratio']:.2f} ({line['low']:.2f} to {line['high']:.2f})"
        lines.append(
            f"| {line['problems']:,} | {line['n']} | {line['d']} | {spread} |"
            f" {line['us_a_problem']:,.0f} |"
        )
    return "\n".join(lines)


def figure() -> Figure:
    """How far the loss is above the minimum, step by step."""
    drawn, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for axis, exact in zip(axes, (True, False), strict=True):
        for line in _section("curves"):
            if line["exact"] is not exact:
                continue
            steps = line.get("steps", range(len(line["losses"])))
            above = [max(loss - line["least"], 1e-18) for loss in line["losses"]]
            colour, dash = STYLES[line["method"]]
            x = [step + 1 for step in steps]
            axis.plot(x, above, dash, color=colour, label=line["method"], linewidth=2)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(3e-18, 1)
        axis.set_xlabel("steps + 1")
        axis.set_title("exact target" if exact else "a target that no x fits, w² = 0.001")
    axes[0].set_ylabel("loss above the minimum")
    axes[0].legend(fontsize=8)
    drawn.tight_layout()
    return drawn
