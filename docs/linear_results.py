"""The results of `benchmarks/linear.py` (docs/results/linear.json) as tables and a figure."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from aftermax import CATALOGUE
from aftermax.lab import plots

LINEAR = Path(__file__).parent / "results" / "linear.json"
WALK, SOFTMAX = "walk, forward", "softmax, forward"


def linear_targets() -> str:
    """The kernel against chunk loops in plain torch."""
    lines = [
        "| work | against | times faster (quartiles) | share of the multipliers' peak |",
        "| --- | --- | --: | --: |",
    ]
    for line in json.loads(LINEAR.read_text())["targets"]:
        spread = f"{line['ratio']:.2f}x ({line['low']:.2f} to {line['high']:.2f})"
        lines.append(f"| {line['work']} | {line['against']} | {spread} | {line['peak']:.2f} |")
    return "\n".join(lines)


def linear_exponents() -> str:
    """How time grows with T, and what a token costs at either end."""
    lines = [
        "| way | exponent | microseconds a token at T = 1K | at the longest T |",
        "| --- | --: | --: | --: |",
    ]
    exponents = json.loads(LINEAR.read_text())["exponents"]
    for line in exponents:
        name, curve = line["name"], _curves()[line["name"]]
        first = next(at for at in curve if at["tokens"] >= line["from"])
        last = curve[-1]
        longest = f"{last['us_per_token']:.2f} ({last['tokens'] // 1024}K)"
        lines.append(
            f"| {name} | {line['exponent']:.2f} | {first['us_per_token']:.2f} | {longest} |"
        )
    return "\n".join(lines)


def linear_crossing() -> str:
    """Where the walk becomes cheaper than our softmax."""
    cells = [(name, _crossing(curve)) for name, curve in _curves().items()]
    known = [
        f"{name.removesuffix(', forward')} from {at:,.0f} tokens on"
        for name, at in cells
        if at and name != SOFTMAX and "backward" not in name
    ]
    return f"Cheaper than our softmax kernel, forward: {'; '.join(known)}."


def linear_decode() -> str:
    """What is held while decoding."""
    lines = [
        "| system | tokens | bytes of the state | resident MiB | microseconds a token |",
        "| --- | --: | --: | --: | --: |",
    ]
    decoded = json.loads(LINEAR.read_text())["decode"]
    for name in dict.fromkeys(line["name"] for line in decoded):
        of_name = [line for line in decoded if line["name"] == name]
        shown = of_name if len(of_name) > 6 or name == "softmax" else of_name[-1:]
        for line in shown:
            lines.append(
                f"| {name} | {line['tokens']:,} | {line['state_bytes']:,} |"
                f" {line['resident_bytes'] / 2**20:,.0f} | {line['us_per_token']:.0f} |"
            )
    return "\n".join(lines)


def linear_lengths() -> Figure:
    """Time a token over T; a flat line is a time that grows with T alone."""
    figure, axis = plt.subplots(figsize=(9, 4.6))
    places = {entry.name for entry in CATALOGUE}
    for name, curve in _curves().items():
        if name.endswith("reference"):
            continue
        x = [line["tokens"] for line in curve]
        y = [line["us_per_token"] for line in curve]
        if name in places:
            axis.plot(x, y, color=plots.colour(name), linewidth=1, alpha=0.8, label=name)
        else:
            style = "--" if "backward" in name else "-"
            colour = "#D55E00" if name == SOFTMAX else "#222222"
            axis.plot(x, y, style, color=colour, linewidth=2.4, label=name)
    at = _crossing(_curves()[WALK])
    if at:
        axis.axvline(at, color="#999999", linewidth=1)
        axis.annotate(
            f"the walk is cheaper\nfrom {at:,.0f} tokens on", (at, axis.get_ylim()[1]), (4, -4),
            textcoords="offset points", va="top", fontsize=8, color="#555555",
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    ticks = [line["tokens"] for line in _curves()[WALK]]
    axis.set_xticks(ticks, [f"{t // 1024}K" if t >= 1024 else str(t) for t in ticks])
    axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    axis.set_ylabel("microseconds a token")
    axis.set_title("4 heads of 64, float32, one thread")
    axis.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure


def _curves() -> dict[str, list[dict]]:
    lines = json.loads(LINEAR.read_text())["lengths"]
    names = dict.fromkeys(line["name"] for line in lines)
    return {name: [line for line in lines if line["name"] == name] for name in names}


def _crossing(curve: list[dict]) -> float | None:
    """The T from which on `curve` lies below softmax's, between the measured ones by their logs."""
    softmax = {line["tokens"]: line["us_per_token"] for line in _curves()[SOFTMAX]}
    points = [
        (line["tokens"], math.log(line["us_per_token"] / softmax[line["tokens"]]))
        for line in curve
        if line["tokens"] in softmax
    ]
    for (t0, above), (t1, below) in reversed(list(pairwise(points))):
        if above > 0 >= below:
            return t0 * (t1 / t0) ** (above / (above - below))
    return None
