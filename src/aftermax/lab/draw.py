"""What figures of all tasks are drawn with: style, colours, bars of cost, dots of measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aftermax.catalogue import CATALOGUE
from aftermax.lab.experts_work import ExpertsArm
from aftermax.lab.outputs import LOSSES, OutputArm, loss_of
from aftermax.lab.results import Results
from aftermax.lab.work import Arm

STYLE = Path(__file__).with_name("aftermax.mplstyle")

COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#8DA0CB", "#56B4E9", "#CC79A7"),
    *("#222222", "#7F5AA8", "#A6761D", "#66A61E", "#999999", "#B2182B"),
)
"""Okabe and Ito's colours without their yellow, then others; the first is softmax's."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Also by place, so that no two neighbours are told apart by colour alone."""
LINES = {"rope": "-", "p-rope": (0, (5, 1.5)), "alibi": (0, (1, 1.2)), "none": "-.", "learned": "-"}

GATED = (0, (6, 1, 1, 1))
"""Of a system behind a gate."""


def colour(name: str) -> str:
    """Of a system: by place among those that keep all keys, or among the others.

    The two stand in figures of their own, with softmax in both.
    """
    dense = [e.name for e in CATALOGUE if e.walk == "dense"]
    if name in dense:
        return COLOURS[dense.index(name) % len(COLOURS)]
    others = [e.name for e in CATALOGUE if e.walk != "dense"]
    return COLOURS[1 + others.index(name) % (len(COLOURS) - 1)]


def look(entry: Any) -> dict[str, Any]:
    """Colour by the system, dashes by the position encoding, a hollow marker for other traits."""
    if isinstance(entry, OutputArm):
        return _look_of_output(entry)
    if isinstance(entry, ExpertsArm):
        return _look_of_tower(entry)
    place = [e.name for e in CATALOGUE].index(entry.entry.name)
    own = colour(entry.entry.name)
    traits = set(entry.traits) & {"bare", "hybrid", "layerscale", "gated", "qk-norm"}
    return {
        "color": own,
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": GATED if "gated" in traits else LINES[entry.positions],
        "markerfacecolor": "white" if traits else own,
    }


def _look_of_tower(entry: ExpertsArm) -> dict[str, Any]:
    """With experts the system's colour, without a red that darkens with the FLOPs; dashes and a
    hollow marker where a model has one question alone."""
    place = [e.name for e in CATALOGUE].index(entry.entry.name)
    reds = {"dense": "#E08070", "large": "#B2182B", "wide": "#5C0A14"}
    own = reds.get(entry.feed, colour(entry.entry.name))
    return {
        "color": own,
        "marker": {"wide": ">", "large": "<"}.get(entry.feed, MARKERS[place % len(MARKERS)]),
        "linestyle": "--" if entry.alone else "-",
        "markerfacecolor": "white" if entry.alone or entry.traits else own,
    }


def _look_of_output(entry: OutputArm) -> dict[str, Any]:
    """Colour by the loss, the same in one layer as in another; dashes and a hollow marker where a
    trait or the layer is not the usual one."""
    place = LOSSES.index(loss_of(entry.entry))
    own = COLOURS[place]
    return {
        "color": own,
        "marker": "<" if entry.values else MARKERS[place % len(MARKERS)],
        "linestyle": ":" if entry.values else "--" if "/" in entry.name else "-",
        "markerfacecolor": "white" if "/" in entry.name else own,
    }


def costs(results: Results, unit: str = "tokens") -> Figure:
    """Speed as a ratio to the first system, and memory, as bars.

    Args:
        unit: of the lengths; "" where examples have none.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.34 * len(results.arms) + 1.4), sharey=True)
    entries = [e for e in results.arms if results.cost(e.name, "speed_ratio") is not None]
    places = range(len(entries), 0, -1)
    colours = [look(e)["color"] for e in entries]
    ratio, low, high, memory = (
        [results.cost(e.name, measure) or 0.0 for e in entries]
        for measure in ("speed_ratio", "speed_ratio_low", "speed_ratio_high", "peak_mebibytes")
    )
    error = [np.subtract(ratio, low), np.subtract(high, ratio)]
    axes[0].barh(places, ratio, color=colours, xerr=error, ecolor="#555555")
    axes[0].set_yticks(places, [e.title for e in entries])
    work, of = results.work, f" at {results.work.context} {unit}" if unit else ""
    axes[0].set_xlabel(f"training speed{of}, as a ratio to the first")
    axes[1].barh(places, memory, color=colours)
    of = f" at {work.lengths[-1]} {unit}" if unit else ""
    axes[1].set_xlabel(f"peak memory of a step{of} (MiB)")
    for axis in axes:
        axis.grid(axis="y", visible=False)
    return figure


def dots(results: Results, measures: Sequence[tuple[str, str, float]]) -> Figure:
    """Mean and deviation of each (measure, label, factor), and above them each seed."""
    figure, axes = plt.subplots(
        1, len(measures), figsize=(5.5 * len(measures), 0.42 * len(results.arms) + 1.6),
        sharey=True,
    )  # fmt: skip
    places = range(len(results.arms), 0, -1)
    for axis, (measure, label, factor) in zip(axes, measures, strict=True):
        for place, entry in zip(places, results.arms, strict=True):
            style = look(entry) | {"linestyle": "none"}
            spread = results.at(entry.name, measure, 1)
            if spread is None:
                continue
            seeds = results.seeds_of(entry.name, measure, results.work.context).values()
            axis.plot(
                [factor * value for value in seeds], [place + 0.22] * len(seeds),
                ".", color=style["color"], alpha=0.45, markersize=6,
            )  # fmt: skip
            shown = spread.times(factor)
            axis.errorbar(shown.mean, place, xerr=shown.sd, capsize=3, markersize=7, **style)
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(places, [entry.title for entry in results.arms])
    axes[0].set_ylim(0.4, len(results.arms) + 0.6)
    return figure


def against_length(
    axis: Axes, results: Results, measure: str, label: str, arms: list[Arm] | None = None
) -> None:
    lengths = results.lengths_of(measure)
    for entry in results.arms if arms is None else arms:
        multiples = [length // results.work.context for length in lengths]
        spreads = [results.at(entry.name, measure, m) for m in multiples]
        known = [(x, s) for x, s in zip(lengths, spreads, strict=True) if s is not None]
        if not known:
            continue
        x = [length for length, _ in known]
        mean = np.array([s.mean for _, s in known])
        sd = np.array([s.sd for _, s in known])
        style = look(entry)
        axis.plot(x, mean, label=entry.title, **style)
        axis.fill_between(x, mean - sd, mean + sd, color=style["color"], alpha=0.1, linewidth=0)
    axis.set_xscale("log", base=2)
    context = results.work.context
    axis.set_xticks(lengths, [f"{n}\n{n // context}x" for n in lengths])
    axis.minorticks_off()
    axis.set_xlabel("context (tokens, multiples of the training length)")
    axis.set_ylabel(label)


def legend_below(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    columns = 4 if figure.get_figwidth() > 8 else 3
    figure.tight_layout()
    figure.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns,
        handlelength=3.2,
    )  # fmt: skip
