"""Figures of the task of outliers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from aftermax.lab.draw import against_length, costs, dots, legend_below, look
from aftermax.lab.outliers_page import models
from aftermax.lab.results import Results


def outliers(results: Results) -> Figure:
    """Inf norm, kurtosis, and what few bits add to the loss."""
    measures = [
        ("inf_norm", "largest activation (inf norm)"),
        ("kurtosis", "kurtosis, mean over tensors"),
        ("w8a8_damage", "W8A8 adds to the loss (nats)"),
        ("w4a4_damage", "W4A4 adds to the loss (nats)"),
    ]
    figure = dots(results, [(measure, label, 1) for measure, label in measures])
    figure.set_figwidth(15)
    for axis in figure.axes[:2]:
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis)
    figure.axes[0].set_title("Less is to the left")
    figure.tight_layout()
    return figure


def lengths(results: Results) -> Figure:
    """Loss, damage and inf norm against the length, a row for each model."""
    found = models(results)
    figure, axes = plt.subplots(len(found), 3, figsize=(13, 3.9 * len(found)), squeeze=False)
    names = {
        "loss": "loss in float (nats)",
        "w8a8_damage": "W8A8 adds (nats)",
        "inf_norm": "inf norm",
    }
    for row, (model, own) in zip(axes, found.items(), strict=True):
        for axis, (measure, label) in zip(row, names.items(), strict=True):
            against_length(axis, own, measure, label)
        row[0].set_title(model.capitalize())
        row[2].set_yscale("log")
        _plain_ticks(row[2].yaxis)
    _legend_of_systems(figure, results)
    return figure


def rest(results: Results) -> Figure:
    """Attention on the begin token and on separators, at every length."""
    found = models(results)
    figure, axes = plt.subplots(len(found), 2, figsize=(11, 3.9 * len(found)), squeeze=False)
    for row, (model, own) in zip(axes, found.items(), strict=True):
        against_length(row[0], own, "first_mass", "share of the begin token")
        against_length(row[1], own, "separator_mass", "share of separators")
        known = [e.name for e in own.arms if own.at(e.name, "separator_share", 1)]
        if known:
            spreads = [own.at(known[0], "separator_share", m) for m in own.work.multiples]
            row[1].plot(
                own.work.lengths, [s.mean for s in spreads if s], color="#999999", linewidth=1
            )
        row[0].set_title(model.capitalize())
    _legend_of_systems(figure, results)
    return figure


def learning_curves(results: Results) -> Figure:
    """Training loss over steps, a panel for each model."""
    found = models(results)
    figure, axes = plt.subplots(1, len(found), figsize=(6.5 * len(found), 4.2), squeeze=False)
    for axis, (model, own) in zip(axes[0], found.items(), strict=True):
        for arm in own.arms:
            runs = list(own.curves[arm.name].values())
            steps = [step for step, _ in min(runs, key=len)]
            losses = np.mean([[loss for _, loss in run[: len(steps)]] for run in runs], 0)
            axis.plot(steps, losses, label=arm.system_title, **{**look(arm), "marker": ""})
        axis.set_xlabel("step")
        axis.set_ylabel("training loss (nats per token)")
        axis.set_title(model.capitalize())
    _legend_of_systems(figure, results)
    return figure


def _plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10 ... on a logarithmic axis, in plain digits."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend_of_systems(figure: Figure, results: Results) -> None:
    """One below all panels, without the model in its names."""
    first = next(iter(models(results).values()))
    titles = {arm.title: arm.system_title for arm in first.arms}
    for line in figure.axes[0].lines:
        line.set_label(titles.get(str(line.get_label()), str(line.get_label())))
    legend_below(figure, figure.axes[0])


OUTLIERS: dict[str, Callable[[Results], Figure]] = {
    "outliers": outliers,
    "lengths": lengths,
    "rest": rest,
    "learning_curves": learning_curves,
    "costs": costs,
}
