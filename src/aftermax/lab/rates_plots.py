"""Figures of the task of rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aftermax.lab.draw import COLOURS
from aftermax.lab.rates_claims import expected
from aftermax.lab.rates_stats import FEWEST, band, replicates, slope
from aftermax.lab.rates_work import RatesArm
from aftermax.lab.results import Results

SHOWN = {
    "function_best": "function to the best fit (L2)",
    "experts_truth": "experts to the truth",
    "experts_minimisers": "experts to the minimisers",
}
LOOKS: dict[str, dict[str, Any]] = {
    "softmax": {"color": COLOURS[0], "marker": "o"},
    "sigmoid": {"color": COLOURS[1], "marker": "s"},
}
TRUTH_LINES = {"softmax": "-", "sigmoid": (0, (5, 1.5)), "wave": ":"}
"""By whose data it is, where there are several."""


def _settings(results: Results) -> dict[str, list[RatesArm]]:
    """Arms on their own data, by what is fitted; a gate without a partner stands alone."""
    groups: dict[str, list[RatesArm]] = {}
    for arm in results.arms:
        if arm.own:
            groups.setdefault(arm.setting, []).append(arm)
    return groups


def rates(results: Results) -> Figure | None:
    """Three errors against the sample size, a row for each kind of expert."""
    groups = _settings(results)
    if not groups:
        return None
    figure, axes = plt.subplots(
        len(groups), 3, figsize=(12.5, 2.75 * len(groups) + 0.6), squeeze=False, sharex=True
    )
    for row, (setting, arms) in zip(axes, groups.items(), strict=True):
        for axis, (measure, label) in zip(row, SHOWN.items(), strict=True):
            for arm in arms:
                _curve(axis, results, arm, measure, arm.gate, LOOKS[arm.gate])
            _guides(axis, results, measure != "function_best")
            _axes(axis, results, label)
            if axis.lines:
                axis.legend(fontsize=7.5, loc="lower left", handlelength=1.6)
        row[0].set_title(setting[0].upper() + setting[1:])
    for axis in axes[:-1].flat:
        axis.set_xlabel("")
    figure.tight_layout()
    return figure


def _curve(
    axis: Axes, results: Results, arm: RatesArm, measure: str, label: str, look, told: bool = True
) -> None:
    values = replicates(results, arm.name, measure)
    if values is None:
        return
    x = results.work.lengths
    known = slope(results, arm.name, measure) if told else None
    label = label if known is None else f"{label}  {known.text()}"
    axis.plot(x, np.median(values, 0), label=label, **look)
    if len(values) >= FEWEST:
        axis.fill_between(x, *band(values), color=look["color"], alpha=0.15, linewidth=0)


def _guides(axis: Axes, results: Results, quarter: bool) -> None:
    """The slope of sqrt(log n / n), and half of it, through where the first curve begins."""
    sizes = np.array(results.work.lengths, dtype=float)
    if len(sizes) < 2 or not axis.lines:
        return
    top = max(float(np.asarray(line.get_ydata())[0]) for line in axis.lines) * 1.35
    root = np.sqrt(np.log(sizes) / sizes)
    axis.plot(sizes, top * root / root[0], color="#999999", linewidth=1, zorder=0)
    if quarter:
        shape = np.sqrt(root / root[0])
        axis.plot(sizes, top * shape, color="#999999", linewidth=1, linestyle=":", zorder=0)


def _axes(axis: Axes, results: Results, label: str) -> None:
    sizes = results.work.lengths
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axis.minorticks_off()
    low, high = axis.get_ylim()
    axis.set_ylim(low / 1.8, high)  # the legend's place
    axis.set_yticks(_decades(low / 1.8, high), minor=False)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("samples")
    axis.set_ylabel(label)


def _decades(low: float, high: float) -> list[float]:
    """1, 3, 10 and so on within the bounds."""
    steps = [m * 10.0**e for e in range(-6, 3) for m in (1, 3)]
    return [step for step in steps if low <= step <= high]


def slopes(results: Results) -> Figure | None:
    """Each system's slopes with their bands, three panels."""
    if len(results.work.lengths) < 2:
        return None
    arms = results.arms
    figure, axes = plt.subplots(1, 3, figsize=(13, 0.36 * len(arms) + 1.5), sharey=True)
    for axis, (measure, label) in zip(axes, SHOWN.items(), strict=True):
        axis.axvline(0.0, color="#999999", linewidth=1, linestyle=":")
        for exponent in ("1/2", "1/4"):
            axis.axvspan(*expected(results, exponent), color="#E4E4E4", linewidth=0, zorder=0)
        for place, arm in zip(range(len(arms), 0, -1), arms, strict=True):
            known = slope(results, arm.name, measure)
            if known is None:
                continue
            error = [[known.value - known.low], [known.high - known.value]]
            face = LOOKS[arm.gate]["color"] if arm.own else "white"
            axis.errorbar(
                known.value, place, xerr=error, capsize=3, markersize=7, linestyle="none",
                markerfacecolor=face, **LOOKS[arm.gate],
            )  # fmt: skip
        axis.set_xlabel(f"slope of {label}")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(arms), 0, -1), [arm.title for arm in arms])
    axes[0].set_ylim(0.4, len(arms) + 0.6)
    axes[0].set_title("Faster is to the left")
    figure.tight_layout()
    return figure


def crossed(results: Results) -> Figure | None:
    """Error of the function for both gates on both gates' data, a panel for each kind of expert."""
    groups: dict[str, list[RatesArm]] = {}
    for arm in results.arms:
        groups.setdefault(arm.setting, []).append(arm)
    kept = {name: arms for name, arms in groups.items() if any(not arm.own for arm in arms)}
    if not kept:
        return None
    figure, axes = plt.subplots(1, len(kept), figsize=(5.6 * len(kept) + 1, 4.4), squeeze=False)
    for axis, (setting, arms) in zip(axes[0], kept.items(), strict=True):
        for arm in arms:
            made = "a wave" if arm.truth_gate == "wave" else f"{arm.truth_gate}'s data"
            look = LOOKS[arm.gate] | {"linestyle": TRUTH_LINES[arm.truth_gate]}
            if not arm.own:
                look["markerfacecolor"] = "white"
            _curve(axis, results, arm, "function", f"{arm.gate} on {made}", look, told=False)
            floor = results.at(arm.name, "misfit", results.work.multiples[-1])
            if floor is not None and floor.mean > 1e-9:
                axis.axhline(floor.mean**0.5, color=look["color"], linewidth=0.8, linestyle=":")
        _axes(axis, results, "function to the truth (L2)")
        axis.set_title(setting[0].upper() + setting[1:])
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    figure.tight_layout()
    return figure


RATES: dict[str, Callable[[Results], Figure | None]] = {
    "rates": rates,
    "slopes": slopes,
    "crossed": crossed,
}
