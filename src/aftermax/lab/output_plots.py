"""Figures of the tasks whose systems are output layers: words, and labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from aftermax.lab.draw import costs, dots, legend_below, look
from aftermax.lab.results import Results
from aftermax.lab.words_page import epoch_seconds
from aftermax.lab.words_work import TOP


def top_errors(results: Results) -> Figure:
    """Errors at k guesses, less those of the first output layer with the same seed."""
    figure, axis = plt.subplots(figsize=(8, 4.8))
    base, lowest, highest = results.arms[0].name, 0.0, 0.0
    for arm in results.arms[1:]:
        means, sds = [], []
        for k in TOP:
            own, first = (results.seeds_of(s, f"top{k}_error", 1) for s in (arm.name, base))
            less = [100 * (own[seed] - first[seed]) for seed in sorted(set(own) & set(first))]
            means.append(np.mean(less))
            sds.append(np.std(less, ddof=1) if len(less) > 1 else 0.0)
        style = look(arm)
        mean, sd = np.array(means), np.array(sds)
        lowest, highest = min(lowest, mean.min()), max(highest, mean.max())
        axis.plot(TOP, mean, label=arm.title, **style)
        axis.fill_between(TOP, mean - sd, mean + sd, color=style["color"], alpha=0.1, linewidth=0)
    axis.axhline(0, color="#555555", linewidth=1)
    axis.annotate(
        results.arms[0].title, (TOP[-1], 0), (0, 4), textcoords="offset points", ha="right",
        color="#555555", fontsize=8,
    )  # fmt: skip
    room = 0.1 * (highest - lowest) + 0.1
    axis.set_ylim(lowest - room, highest + room)  # a seed that broke must not flatten the others
    axis.set_xscale("log")
    axis.set_xticks(TOP, [str(k) for k in TOP])
    axis.minorticks_off()
    axis.set_xlabel("guesses k")
    axis.set_ylabel("words not among them, points more")
    legend_below(figure, axis)
    return figure


def errors_and_time(results: Results) -> Figure:
    """Errors at few and at many guesses against the time of an epoch."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    for axis, k in zip(axes, (1, 50), strict=True):
        for arm in results.arms:
            error, seconds = results.at(arm.name, f"top{k}_error", 1), epoch_seconds(results, arm)
            if error is None or seconds is None:
                continue
            axis.errorbar(
                seconds, 100 * error.mean, yerr=100 * error.sd, capsize=3, markersize=8,
                label=arm.title, **look(arm) | {"linestyle": "none"},
            )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_minor_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.tick_params(axis="x", which="both", labelsize=8)
        axis.set_xlabel("time of an epoch (seconds, one thread)")
        axis.set_ylabel("words not among the guesses (%)")
        axis.set_title("First guess" if k == 1 else f"First {k} guesses")
    legend_below(figure, axes[0])
    return figure


def output_costs(results: Results) -> Figure:
    return costs(results, "")


WORDS: dict[str, Callable[[Results], Figure]] = {
    "top_errors": top_errors,
    "errors_and_time": errors_and_time,
    "costs": output_costs,
}


def rankings(results: Results) -> Figure:
    """What stands first, what is rare, what is found at all."""
    measures = (("P@1", "P@1 (%)"), ("PSP@5", "PSP@5 (%)"), ("R@100", "R@100 (%)"))
    figure = dots(results, [(measure, label, 100) for measure, label in measures])
    figure.axes[0].set_title("Higher is better, to the right")
    figure.tight_layout()
    return figure


LABELS: dict[str, Callable[[Results], Figure]] = {"rankings": rankings, "costs": output_costs}
