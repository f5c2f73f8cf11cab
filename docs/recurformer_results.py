"""What `benchmarks/recurformer.py` measured, as tables and a figure."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aftermax.lab.draw import COLOURS, MARKERS

RECURFORMER = Path(__file__).parent / "results" / "recurformer.json"
PICKS = ("top", "random", "bottom")
STAGES = {
    ("window", "untrained"): "sliding window with sinks, not trained",
    ("asked", "untrained"): "the same, ranked by the tokens that ask",
    ("linear", "untrained"): "linear attention, not trained",
    ("linear", "trained"): "linear attention, trained on",
    ("mamba", "distilled"): "Mamba, heads distilled alone",
    ("mamba", "trained"): "Mamba, distilled and trained on",
}
"""Section and stage -> what it is."""


def _results() -> dict[str, Any]:
    return json.loads(RECURFORMER.read_text())


def _found(section: str, stage: str, share: float, pick: str, measure: str) -> list[float]:
    return [
        line[stage][measure]
        for line in _results()[section]
        if (line["share"], line["pick"]) == (share, pick) and stage in line
    ]


def _shares() -> list[float]:
    return sorted({line["share"] for line in _results()["window"]})


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def base() -> str:
    """The models before anything is replaced."""
    lines = [
        "| seed | recall, 1 hop | recall, 2 hops | text, nats a byte | RR, lowest to highest "
        "| uniform |",
        "| --: | --: | --: | --: | --- | --: |",
    ]
    for line in _results()["base"]:
        ratios = sorted(x for layer in line["recency"] for x in layer)
        quarters = ", ".join(f"{x:.2f}" for x in np.quantile(ratios, (0, 0.25, 0.5, 0.75, 1)))
        lines.append(
            f"| {line['seed']} | {line['recall_1']:.3f} | {line['recall_2']:.3f} "
            f"| {line['text']:.3f} | {quarters} | {line['uniform']:.2f} |"
        )
    return "\n".join(lines)


def ablation(measure: str) -> str:
    """Mean over the seeds, and the lowest and the highest."""
    lines = [
        "| in place of the heads | share | top (RecurFormer) | random | bottom | cache |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    digits = 2
    whole = next(line["cache"] for line in _results()["mamba"] if line["pick"] == "none")
    for (section, stage), title in STAGES.items():
        for share in _shares():
            found = [_found(section, stage, share, pick, measure) for pick in PICKS]
            if any(found):
                cells = " | ".join(_cell(values, digits) for values in found)
                held = [x["cache"] for x in _results()[section] if x["share"] == share]
                kept = statistics.mean(held) / whole
                lines.append(f"| {title} | {share:g} | {cells} | {kept:.2f} |")
    none = _found("mamba", "trained", 0.0, "none", measure)
    lines.append(f"| nothing, trained on | 0 | {_cell(none, digits)} | | | 1.00 |")
    return "\n".join(lines)


def orders() -> str:
    """For each way and share, in how many seeds the predicted order of recall held."""
    lines = ["| in place of the heads | share | top ≥ random | random ≥ bottom | top ≥ bottom |"]
    lines.append("| --- | --: | --: | --: | --: |")
    for (section, stage), title in STAGES.items():
        for share in _shares():
            rows = _by_seed(section, stage, share)
            if not rows:
                continue
            pairs = (("top", "random"), ("random", "bottom"), ("top", "bottom"))
            cells = " | ".join(
                f"{sum(row[a] >= row[b] for row in rows)} of {len(rows)}" for a, b in pairs
            )
            lines.append(f"| {title} | {share:g} | {cells} |")
    return "\n".join(lines)


def _by_seed(section: str, stage: str, share: float) -> list[dict[str, float]]:
    """Recall by pick, of each seed that has all three."""
    found: dict[int, dict[str, float]] = {}
    for line in _results()[section]:
        if line["share"] == share and stage in line:
            found.setdefault(line["seed"], {})[line["pick"]] = line[stage]["recall"]
    return [row for row in found.values() if set(row) == set(PICKS)]


def smol() -> str:
    """SmolLM2-135M: loss against the bytes of the cache."""
    lines = [
        "| in place of the heads | share | groups by RR | MiB | loss, not trained | distilled "
        "| trained on |",
        "| --- | --: | --- | --: | --: | --: | --: |",
    ]
    for line in _results().get("smol", []):
        losses = " | ".join(
            f"{line[name]:.3f}" if name in line else "–"
            for name in ("loss", "distilled", "trained")
        )
        held = f"{line['cache'] / 2**20:.1f}" if "cache" in line else "–"
        with_, pick = line.get("with", "nothing"), line["pick"]
        lines.append(
            f"| {'nothing' if with_ == 'none' else with_} | {line['share']:g} | {pick} | {held} "
            f"| {losses} |"
        )
    return "\n".join(lines)


def figure() -> Figure:
    """The histogram of recency ratios, recall by share, and SmolLM2's loss by bytes."""
    found = _results()
    shape, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    _histogram(axes[0], found)
    for axis, (section, stage) in zip(
        axes[1:3], (("window", "untrained"), ("mamba", "trained")), strict=True
    ):
        _recall(axis, section, stage)
    _smol(axes[3], found.get("smol", []))
    return shape


def _histogram(axis: Axes, found: dict[str, Any]) -> None:
    bins = np.linspace(0, 1, 21).tolist()
    groups = {
        f"ours, {len(found['base'])} seeds": [
            x for b in found["base"] for layer in b["recency"] for x in layer
        ]
    }
    if found.get("smol"):
        groups["SmolLM2-135M"] = [x for layer in found["smol"][0]["recency"] for x in layer]
    for number, (name, ratios) in enumerate(groups.items()):
        axis.hist(
            ratios, bins=bins, density=True, histtype="step", color=COLOURS[number], label=name,
            linewidth=1.8,
        )  # fmt: skip
    axis.axvline(found["base"][0]["uniform"], color="#999999", linestyle=":")
    axis.set(title="Recency ratio of heads", xlabel="RR, first token left out", ylabel="density")
    axis.legend()


def _recall(axis: Axes, section: str, stage: str) -> None:
    for number, pick in enumerate(PICKS):
        shares, low, middle, high = [], [], [], []
        for share in _shares():
            values = _found(section, stage, share, pick, "recall")
            if values:
                shares.append(share)
                low.append(min(values))
                middle.append(statistics.mean(values))
                high.append(max(values))
        axis.plot(shares, middle, color=COLOURS[number], marker=MARKERS[number], label=pick)
        axis.fill_between(shares, low, high, color=COLOURS[number], alpha=0.15, linewidth=0)
    axis.set(title=STAGES[section, stage], xlabel="share of the heads replaced", ylim=(-0.03, 1.03))
    axis.set_ylabel("recall of HashHop")
    axis.legend(title="by recency ratio")


def _smol(axis: Axes, lines: list[dict[str, Any]]) -> None:
    before = [x for x in lines if x.get("with") == "nothing"]
    for number, pick in enumerate(PICKS):
        mine = [x for x in lines if x.get("with") == "window" and x["pick"] == pick]
        ends = [x for x in lines if x.get("with") == "window" and x["share"] == 1]
        points = sorted(
            (x["cache"] / 2**20, x["loss"])
            for x in {id(x): x for x in before + mine + ends}.values()
        )
        if mine:
            axis.plot(
                *zip(*points, strict=True),
                color=COLOURS[number],
                marker=MARKERS[number],
                label=pick,
            )
    axis.set(title="SmolLM2-135M, windows, not trained", xlabel="cache, MiB at 1024 tokens")
    axis.set_ylabel("nats a token")
    if lines:
        axis.legend(title="by recency ratio")
