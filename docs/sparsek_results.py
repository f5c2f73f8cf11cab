"""The results of `benchmarks/sparsek.py` (docs/results/sparsek.json) as tables and a figure."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from aftermax.lab import plots

SPARSEK = Path(__file__).parent / "results" / "sparsek.json"
COLOURS = {"kv": "#0072B2", "v": "#D55E00", "log": "#009E73"}


def _section(name: str) -> list[dict]:
    return json.loads(SPARSEK.read_text())[name]


def _ratio(line: dict) -> str:
    r = line["softmax"]
    return f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})"


def sparsek_time() -> str:
    """Softmax's time over SparseK's, by length."""
    lines = ["| T | kv, forward | both | v, forward | both | log, forward | both |"]
    lines.append("| --: |" + " --: |" * 6)
    found = {(x["tokens"], x["couple"], x["way"]): x for x in _section("lengths")}
    for tokens in sorted({tokens for tokens, _, _ in found}):
        cells = []
        for couple in COLOURS:
            for way in ("forward", "both"):
                line = found.get((tokens, couple, way))
                told = "–" if line is None or "softmax" not in line else _ratio(line)
                cells.append(told)
        if any(cell != "–" for cell in cells):
            lines.append(f"| {tokens // 1024}K | {' | '.join(cells)} |")
    return "\n".join(lines)


def sparsek_fits() -> str:
    """The exponents and the crossings, in words."""
    fits = {(x["couple"], x["way"]): x for x in _section("fits")}
    lengths = [x["tokens"] // 1024 for x in _section("lengths")]
    lines = ["| | exponent of T, forward | both | as quick as softmax at | both |"]
    lines.append("| --- |" + " --: |" * 4)
    for couple in COLOURS:
        forward, both = (fits[couple, way] for way in ("forward", "both"))
        crossings = [
            "–" if x["crossing"] is None else f"{round(x['crossing'], -2):,.0f} tokens"
            for x in (forward, both)
        ]
        lines.append(
            f"| {couple} | {forward['exponent']:.2f} | {both['exponent']:.2f} | "
            f"{' | '.join(crossings)} |"
        )
    lines.append("")
    lines.append(f"The exponents are fitted from {min(lengths)}K to {max(lengths)}K tokens.")
    return "\n".join(lines)


def sparsek_decode() -> str:
    """A token, and what is kept."""
    lines = ["| tokens read | softmax / SparseK, time of a token | SparseK keeps | of it pairs |"]
    lines[0] += " scores with p > 0 | softmax keeps |"
    lines.append("| --: |" + " --: |" * 5)
    for x in _section("decode"):
        lines.append(
            f"| {x['tokens']:,} | {_ratio(x)} | {x['bytes']:,} | {x['pair_bytes']:,} | "
            f"{x['support']} | {x['softmax_bytes']:,} |"
        )
    return "\n".join(lines)


def sparsek_selection() -> str:
    """How many are one, how many fractions."""
    lines = ["| deviation of the scores | p = 1 | 0 < p < 1 | p > 0 | moves of a score |"]
    lines.append("| --: |" + " --: |" * 4)
    for x in _section("selection"):
        cells = (x["ones"], x["fractions"], x["support"])
        told = " | ".join(f"{cell:.0f}" for cell in cells)
        lines.append(f"| {x['deviation']:g} | {told} | {x['moves']:.2f} |")
    return "\n".join(lines)


def sparsek_figure() -> Figure:
    """Microseconds of a token against T."""
    figure, axis = plt.subplots(figsize=(7.2, 4.6))
    all_tokens = sorted({x["tokens"] for x in _section("lengths")})
    for couple, colour in COLOURS.items():
        for way, line in (("forward", "-"), ("both", "--")):
            found = sorted(
                (x["tokens"], 1e6 * x["per_token"])
                for x in _section("lengths")
                if (x["couple"], x["way"]) == (couple, way)
            )
            label = f"SparseK, {couple}" if way == "forward" else None
            axis.plot(*zip(*found, strict=True), line, color=colour, marker="o", label=label)
    for way, line in (("forward", "-"), ("both", "--")):
        found = sorted(
            (x["tokens"], 1e6 * x["per_token"] * x["softmax"]["ratio"])
            for x in _section("lengths")
            if x["couple"] == "kv" and x["way"] == way and "softmax" in x
        )
        label = "softmax, all keys" if way == "forward" else None
        axis.plot(*zip(*found, strict=True), line, color="#444444", marker="s", label=label)
    axis.plot([], [], "--", color="#444444", label="with the backward pass")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(all_tokens, [f"{tokens // 1024}K" for tokens in all_tokens])
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    axis.set_ylabel("µs a token (one thread)")
    axis.set_title("Attention over k + w = 512 of T keys, 4 heads of 64")
    plots.legend_below(figure, axis)
    return figure
