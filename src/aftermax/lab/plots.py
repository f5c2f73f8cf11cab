"""Every figure is a pure function of `Results` (or of the catalogue): numbers in, figure out."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, FuncFormatter, LogLocator, NullLocator

from aftermax.attention import attention_weights
from aftermax.catalogue import CATALOGUE
from aftermax.lab import experts_plots, outliers_plots, output_plots, rates_plots
from aftermax.lab import needle as needles
from aftermax.lab.data.recall import PAIRS
from aftermax.lab.draw import (
    COLOURS,
    STYLE,
    against_length,
    colour,
    costs,
    dots,
    legend_below,
    look,
)
from aftermax.lab.injectivity import Measured
from aftermax.lab.mqar import ARMS as MQAR_ARMS
from aftermax.lab.mqar import Study
from aftermax.lab.results import Results
from aftermax.lab.work import Arm
from aftermax.weights import RowMap


def _groups(results: Results) -> dict[str, list[Arm]]:
    """The arms by what they keep of the past, each group with the first system to compare with."""
    others = [e for e in results.arms if getattr(e.entry.system, "fixed_size", False)]
    dense = [e for e in results.arms if e not in others]
    if results.work.task not in ("text", "hashhop") or not dense or not others:
        return {"": results.arms}
    return {"all keys and values kept": dense, "a state of one size": [dense[0], *others]}


def loss_and_recall(results: Results) -> Figure:
    """The headline: loss on the same targets, and recall, against the length of the context."""
    groups = _groups(results)
    figure, axes = plt.subplots(
        len(groups), 3, figsize=(13, 4.4 * len(groups)), width_ratios=(1.5, 1, 1), squeeze=False
    )
    for row, (kept, arms) in zip(axes, groups.items(), strict=True):
        _loss_and_recall_of(row, results, arms)
        row[0].set_title(kept.capitalize() or "Same target tokens, ever longer context")
    if len(groups) == 1:
        legend_below(figure, axes[0, 0])
    else:
        figure.tight_layout()
        for row in axes:
            row[-1].legend(
                *row[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.03, 0.5),
                handlelength=3.2,
            )  # fmt: skip
    return figure


def _loss_and_recall_of(axes, results: Results, arms: list[Arm]) -> None:
    against_length(axes[0], results, "loss", "loss (nats per token)", arms)
    best = min(
        spread.mean
        for entry in results.arms
        if (spread := results.at(entry.name, "truncated_loss", 1))
    )
    axes[0].axhline(best, color="#999999", linewidth=1)
    axes[0].annotate(
        f"best system shown only the last {results.work.context} tokens",
        (results.work.lengths[-1], best), (0, -11), textcoords="offset points",
        ha="right", color="#777777", fontsize=8,
    )  # fmt: skip
    against_length(axes[1], results, "passkey", "passkeys found (share)", arms)
    axes[1].set_title("Passkey")
    against_length(axes[2], results, "mqar", "answers found (share)", arms)
    axes[2].set_title("Associative recall (MQAR)")
    axes[2].axhline(1 / PAIRS, color="#999999", linewidth=1)
    axes[2].annotate(
        "a guess among the values in sight", (results.work.lengths[-1], 1 / PAIRS), (0, 4),
        textcoords="offset points", ha="right", color="#777777", fontsize=8,
    )  # fmt: skip
    for axis in axes[1:]:
        axis.set_ylim(-0.03, 1.03)


def buckets(results: Results) -> Figure:
    """Loss by place in the longest window."""
    groups = _groups(results)
    figure, axes = plt.subplots(
        1, len(groups), figsize=(7 * len(groups), 4.2), squeeze=False, sharey=True
    )
    for axis, (kept, arms) in zip(axes[0], groups.items(), strict=True):
        against_length(axis, results, "bucket_loss", "loss (nats per token)", arms)
        axis.set_xlabel(f"part of a {results.work.lengths[-1]}-token window that ends at (tokens)")
        axis.set_title(kept.capitalize() or "Loss by place in the longest window")
    _legends_below(figure, axes[0])
    return figure


def diagnostics(results: Results) -> Figure:
    """Why the curves come out so: how sharp rows are, and what the first token takes."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    names = {
        "entropy": "entropy of a row (nats)",
        "effective_keys": "effective number of keys",
        "first_mass": "share of the first token",
    }
    for axis, (measure, label) in zip(axes, names.items(), strict=True):
        against_length(axis, results, measure, label)
    axes[1].set_yscale("log", base=2)
    axes[1].yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes[0].set_title("Mean over layers, heads and the last rows")
    legend_below(figure, axes[0])
    return figure


def cache(results: Results, recall: str = "mqar") -> Figure | None:
    """What is held against the length, and what loss and recall it buys at the longest one; None
    where a store of before has no bytes.

    Args:
        recall: a measure that is a share: "mqar", or "hops2" and the like.
    """
    if not results.lengths_of("cache_bytes"):
        return None
    *_, told_apart = _groups(results).values()
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    against_length(axes[0], results, "cache_bytes", "bytes of the decode state", told_apart)
    axes[0].set_title("One sequence, all layers")
    longest = results.work.multiples[-1]
    found = "MQAR answers" if recall == "mqar" else f"chains of {recall[4:]} hops"
    names = {"loss": "loss (nats per token)", recall: f"{found} found (share)"}
    for axis, (measure, label) in zip(axes[1:], names.items(), strict=True):
        for entry in results.arms:
            held, got = (results.at(entry.name, m, longest) for m in ("cache_bytes", measure))
            if held is None or got is None:
                continue
            style = look(entry) if entry in told_apart else OTHERS
            style = style | {"linestyle": "none", "capsize": 3}
            axis.errorbar(held.mean, got.mean, yerr=got.sd, markersize=7, **style)
        axis.set_xlabel("bytes of the decode state")
        axis.set_ylabel(label)
        axis.set_title(f"At {results.work.lengths[-1]} tokens ({longest}x)")
        axis.set_xscale("log", base=2)
    axes[0].set_yscale("log", base=2)
    for axis in (axes[0].yaxis, axes[1].xaxis, axes[2].xaxis):
        axis.set_major_locator(LogLocator(2, numticks=6))
        axis.set_major_formatter(FuncFormatter(_binary))
        axis.set_minor_locator(NullLocator())
    axes[2].set_ylim(-0.03, 1.03)
    if len(told_apart) < len(results.arms):
        axes[0].plot([], [], label="the others that keep all", linestyle="none", **OTHERS)
    legend_below(figure, axes[0])
    return figure


OTHERS: dict[str, Any] = {"color": "#BBBBBB", "marker": "o", "markerfacecolor": "white"}
"""Look of systems that are not told apart, since what they hold is the same."""


def _binary(size: float, _: object = None) -> str:
    """Bytes as one writes them.

    >>> _binary(4096.0)
    '4 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:g} {unit}"


def learning_curves(results: Results, of: str = "on text (nats per token)") -> Figure:
    """Training loss over steps, the mean over seeds."""
    groups = _groups(results)
    figure, axes = plt.subplots(
        1, len(groups), figsize=(7 * len(groups), 4.2), squeeze=False, sharey=True
    )
    for axis, (kept, arms) in zip(axes[0], groups.items(), strict=True):
        for entry in arms:
            runs = list(results.curves[entry.name].values())
            steps = [step for step, _ in min(runs, key=len)]
            losses = np.mean([[loss for _, loss in run[: len(steps)]] for run in runs], 0)
            smooth = np.convolve(np.pad(losses, (2, 2), "edge"), np.ones(5) / 5, "valid")
            axis.plot(steps, smooth, label=entry.title, **{**look(entry), "marker": ""})
        axis.set_xlabel("step")
        axis.set_ylabel(f"training loss {of}")
        axis.set_title(kept.capitalize() or "Learning, mean over seeds (moving mean of 5 points)")
    _legends_below(figure, axes[0])
    return figure


RESULT_FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "loss_and_recall": loss_and_recall,
    "buckets": buckets,
    "diagnostics": diagnostics,
    "cache": cache,
    "learning_curves": learning_curves,
    "costs": costs,
}


def image_learning_curves(results: Results) -> Figure:
    return learning_curves(results, "(nats per image)")


def image_costs(results: Results) -> Figure:
    return costs(results, "patches")


def held_out(results: Results) -> Figure:
    """Accuracy and loss on the test split."""
    figure = dots(
        results,
        [("accuracy", "accuracy (% of the test split)", 100), ("loss", "loss (nats per image)", 1)],
    )
    for axis, title in zip(figure.axes, ("Higher is better", "Lower is better"), strict=True):
        axis.set_title(title)
    figure.tight_layout()
    return figure


def hops(results: Results) -> Figure:
    """Chains followed to their end against the length, a panel for each number of hops."""
    groups, work = _groups(results), results.work
    figure, axes = plt.subplots(
        len(groups), len(work.hops), squeeze=False,
        figsize=(4.5 * len(work.hops) + 3, 4.2 * len(groups)),
    )  # fmt: skip
    for row, (kept, arms) in zip(axes, groups.items(), strict=True):
        for axis, number in zip(row, work.hops, strict=True):
            against_length(axis, results, f"hops{number}", "chains followed (share)", arms)
            guess = work.hashes ** -(number if work.chain_of_thought else 1)
            axis.axhline(guess, color="#999999", linewidth=1)
            axis.set_title(f"{number} hop{'s' if number > 1 else ''}{', ' if kept else ''}{kept}")
            axis.set_ylim(-0.03, 1.03)
    figure.tight_layout()
    for row in axes:
        row[-1].legend(loc="center left", bbox_to_anchor=(1.03, 0.5), handlelength=3.2)
    return figure


def hops_cache(results: Results) -> Figure | None:
    return cache(results, f"hops{results.work.hops[-1]}")


def hops_learning_curves(results: Results) -> Figure:
    return learning_curves(results, "(nats per token of an answer)")


FIGURES: dict[str, Mapping[str, Callable[[Results], Figure | None]]] = {
    "text": RESULT_FIGURES,
    "vision": {
        "held_out": held_out,
        "learning_curves": image_learning_curves,
        "costs": image_costs,
    },
    "labels": output_plots.LABELS,
    "words": output_plots.WORDS,
    "outliers": outliers_plots.OUTLIERS,
    "hashhop": {
        "hops": hops,
        "cache": hops_cache,
        "learning_curves": hops_learning_curves,
        "costs": costs,
    },
    "experts": experts_plots.EXPERTS,
    "rates": rates_plots.RATES,
}
"""By task. None is no figure: what it would show was not measured."""


def row_maps() -> Figure:
    """One row of scores through every row map of the catalogue.

    Sixteen keys whose cosine with the query falls from 0.95 to -0.55, all of length 8 = sqrt(d)
    with d = 64, so that the dot product systems see scores from 7.6 to -4.4.
    """
    width, cosines = 64, torch.linspace(0.95, -0.55, 16, dtype=torch.float64)
    query = torch.zeros(1, 1, 1, width, dtype=torch.float64)
    query[..., 0] = 8.0
    key = torch.zeros(1, 1, 16, width, dtype=torch.float64)
    key[..., 0] = 8.0 * cosines
    key[..., 1] = 8.0 * (1 - cosines**2).sqrt()
    like_others = ("rela-rms", "singlepass", "singlepass-fixed")
    entries = [e for e in CATALOGUE if isinstance(e.system, RowMap) and e.name not in like_others]
    figure, axes = plt.subplots(2, (len(entries) + 1) // 2, figsize=(13, 4.6), sharex=True)
    for place, (axis, entry) in enumerate(zip(axes.flat, entries, strict=False)):
        weights = attention_weights(query, key, weights=entry.system)
        index = [e.name for e in CATALOGUE].index(entry.name)
        axis.bar(range(16), weights[0, 0, 0].numpy(), color=COLOURS[index % len(COLOURS)])
        axis.set_title(textwrap.fill(entry.title, 19), fontsize=8.5, va="bottom")
        axis.tick_params(labelsize=7, labelbottom=place >= len(entries) / 2)
        axis.set_xticks([0, 5, 10, 15], ["0.95", "0.45", "-0.05", "-0.55"])
        axis.grid(axis="x", visible=False)
    for axis in list(axes.flat)[len(entries) :]:
        axis.set_visible(False)
    figure.supxlabel("cosine of query and key", fontsize=9)
    figure.supylabel("weight", fontsize=9)
    figure.tight_layout()
    return figure


def injectivity(found: Sequence[Measured]) -> Figure:
    """Which systems tell their queries apart: rows of four, what the Jacobian loses, confusion.

    Above, where curves fall on one another the queries are confused. Below, a dot at rounding is a
    direction in which the query moves and the row does not.
    """
    figure = plt.figure(figsize=(13, 7.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    above, below = parts
    shown = [m for m in found if m.subject.title in ROWS_SHOWN]
    axes = above.subplots(1, len(shown), sharex=True)
    for axis, m in zip(axes, shown, strict=True):
        for i, (factor, row) in enumerate(zip(m.factors, m.rows, strict=True)):
            axis.plot(
                row.numpy(), color=colour(m.subject.name), alpha=0.4 + 0.2 * i,
                linewidth=2.6 - 0.5 * i, linestyle=("-", (0, (4, 2)), (0, (1, 1.5)), "-.")[i],
                label=FAMILY_LABELS[m.subject.family].format(factor),
            )  # fmt: skip
        axis.set_title(m.subject.title, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xticks([])
        axis.legend(fontsize=7, handlelength=3, labelspacing=0.2)
    axes[0].set_ylabel("weight")
    above.supxlabel("keys, the highest score first", fontsize=9)
    above.suptitle(
        "The rows of four different queries: where there is one curve they are confused",
        fontsize=11, fontweight="bold",
    )  # fmt: skip
    left, right = below.subplots(1, 2, sharey=True)
    places = np.arange(len(found), 0, -1)
    colours = [colour(m.subject.name) for m in found]
    ratios = [max(m.ratio, RATIO_FLOOR) for m in found]
    left.axvspan(RATIO_FLOOR / 3, 1e-14, color="#F2DEDE", linewidth=0)
    left.annotate("a direction is lost", (1.3e-17, len(found) + 0.62), color="#A94442", fontsize=8)
    left.hlines(places, ratios, 1, color="#DDDDDD", linewidth=1, zorder=1)
    faces = [
        c if m.subject.title in TITLES else "white" for m, c in zip(found, colours, strict=True)
    ]
    left.scatter(ratios, places, color=faces, edgecolors=colours, s=60, linewidths=1.6, zorder=2)
    for m, x, y in zip(found, ratios, places, strict=True):
        text = "0" if m.ratio < RATIO_FLOOR else f"{m.ratio:.0e}".replace("e-0", "e-")
        left.annotate(
            text, (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=7.5,
            color="#444444",
        )  # fmt: skip
    left.set_xscale("log")
    left.set_xlim(RATIO_FLOOR / 3, 3)
    left.set_ylim(0.4, len(found) + 1.1)
    left.set_yticks(places, [m.subject.title for m in found])
    left.set_xlabel("smallest singular value of dA/dq, as a share of the largest")
    left.set_title("What the row knows of its query")
    height = 0.8 / len(found[0].confusion)
    for i, family in enumerate(found[0].confusion):
        shares = [m.confusion[family] for m in found]
        at = places + 0.4 - height * (i + 0.5)
        right.barh(at, shares, height, color=FAMILY_COLOURS[i], label=f"queries of {family}")
    for m, y in zip(found, places, strict=True):
        if not any(m.confusion.values()):
            right.annotate("none found", (0.01, y), va="center", fontsize=8, color="#444444")
    right.set_xlim(0, 1.02)
    right.set_xlabel("different queries that get the same row, share of pairs")
    right.set_title("Confusion")
    right.legend(loc="lower right", fontsize=8)
    for axis in (left, right):
        axis.grid(axis="y", visible=False)
    return figure


def mqar(study: Study) -> Figure:
    """Answers found against the width of queries and keys, mean and deviation over the seeds."""
    figure, axis = plt.subplots(figsize=(7.2, 4.4))
    setting = study.setting
    for arm in setting.arms:
        known = [(n, s) for n in setting.key_dims if (s := study.accuracy(arm, n)) is not None]
        if not known:
            continue
        n = [n for n, _ in known]
        mean = np.array([s.mean for _, s in known])
        sd = np.array([s.sd for _, s in known])
        look = ARM_LOOKS[arm]
        axis.plot(n, mean, label=MQAR_ARMS[arm].title, **look)
        axis.fill_between(n, mean - sd, mean + sd, color=look["color"], alpha=0.1, linewidth=0)
    axis.axhline(1 / setting.pairs, color="#999999", linewidth=1)
    axis.annotate(
        "a guess among the values in sight", (setting.key_dims[-1], 1 / setting.pairs), (0, -11),
        textcoords="offset points", ha="right", color="#777777", fontsize=8,
    )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks(setting.key_dims, [f"{n}\n{n * setting.width}" for n in setting.key_dims])
    axis.minorticks_off()
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("width n of queries and keys, and n d, the state of a linear layer in numbers")
    axis.set_ylabel("answers found (share)")
    axis.set_title(f"Recall of {setting.pairs} pairs, one block for all mixers")
    legend_below(figure, axis)
    return figure


ARM_LOOKS: dict[str, dict[str, Any]] = {
    "softmax": {"color": colour("softmax"), "marker": "o"},
    "linear": {"color": "#D55E00", "marker": "s"},
    "linear-exp": {
        "color": "#D55E00",
        "marker": "s",
        "linestyle": "--",
        "markerfacecolor": "white",
    },
    "linear-bare": {
        "color": "#D55E00",
        "marker": "v",
        "linestyle": ":",
        "markerfacecolor": "white",
    },
    "normalised": {"color": colour("normalised"), "marker": "^"},
    "bare": {
        "color": colour("normalised"),
        "marker": "v",
        "linestyle": ":",
        "markerfacecolor": "white",
    },
}
"""Colour by the features, dashes by the normaliser: whole for what a paper proposes."""


def needle(study: needles.Study) -> Figure:
    """Answers found, and values kept, on the way through training; mean and deviation over the
    seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), sharex=True)
    setting = study.setting
    for axis, (measure, label) in zip(
        axes,
        {
            "accuracy": "answers found (share)",
            "recall": "values kept (share, mean over heads)",
        }.items(),
        strict=True,
    ):
        for arm in setting.arms:
            known = [(n, s) for n in study.steps(arm) if (s := study.at(arm, measure, n))]
            if not known:
                continue
            steps = [n for n, _ in known]
            mean, sd = (np.array([getattr(s, part) for _, s in known]) for part in ("mean", "sd"))
            look = NEEDLE_LOOKS[arm]
            axis.plot(steps, mean, label=needles.ARMS[arm], markevery=0.1, **look)
            axis.fill_between(
                steps, mean - sd, mean + sd, color=look["color"], alpha=0.12, linewidth=0
            )
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("steps")
        axis.set_ylabel(label)
    for axis, height, said in (
        (axes[0], 1 / setting.pairs, "a guess among the values in the context"),
        (axes[0], 1 / setting.values, "a guess among all values"),
        (axes[1], setting.chance_kept, "kept by chance"),
    ):
        axis.axhline(height, color="#999999", linewidth=1)
        axis.annotate(
            said, (1, height), (-2, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", color="#777777", fontsize=8,
        )  # fmt: skip
    axes[0].set_title(f"Needles in {setting.length} tokens, {setting.keep} kept")
    axes[1].set_title("What the scores learned to keep")
    legend_below(figure, axes[0])
    return figure


NEEDLE_LOOKS: dict[str, dict[str, Any]] = {
    "window": {"color": "#999999", "marker": "v", "linestyle": ":"},
    "random": {"color": "#222222", "marker": "X", "linestyle": "--"},
    "v": {"color": "#56B4E9", "marker": "s"},
    "log": {"color": "#009E73", "marker": "^"},
    "kv": {"color": "#D55E00", "marker": "D"},
    "full": {"color": colour("softmax"), "marker": "o"},
}


TITLES = {entry.title for entry in CATALOGUE}
ROWS_SHOWN = (
    "softmax",
    "InLine",
    "InLine with relu",
    "linear (elu + 1)",
    "cosFormer",
    "Cottention",
)
FAMILY_LABELS = {
    "one direction": "{:g} q",
    "one positive part": "relu(q) − {:g} relu(−q)",
    "one ray of elu + 1": "φ⁻¹({:g} φ(q))",
}
RATIO_FLOOR = 1e-17
"""Where the ratio 0 stands on a logarithmic axis."""
FAMILY_COLOURS = ("#555555", "#A6A6A6", "#D55E00")


def save(figures: dict[str, Figure], folder: Path) -> None:
    """SVG and PNG of each figure, the same bytes for the same numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.style.context(STYLE):
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png")


def draw(results: Results) -> dict[str, Figure]:
    """All figures of a work."""
    matplotlib.use("agg")
    with plt.style.context(STYLE):
        drawn = {name: figure(results) for name, figure in FIGURES[results.work.task].items()}
        return {name: figure for name, figure in drawn.items() if figure is not None}


def _legends_below(figure: Figure, axes) -> None:
    """One for all axes where there is but one, else one below each."""
    if len(axes) == 1:
        legend_below(figure, axes[0])
        return
    figure.tight_layout()
    for axis in axes:
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handlelength=3.2, fontsize=8
        )
