"""The figures of the task of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from aftermax.lab.data.pictures import DENSE
from aftermax.lab.draw import costs, dots, legend_below, look
from aftermax.lab.results import Results


def _best(question: str) -> tuple[str, str]:
    """What a question is judged by, and in words."""
    if question in DENSE:
        return f"{question}_iou", f"{question}: IoU (%)"
    return f"{question}_accuracy", f"{question}: right (%)"


def answers(results: Results) -> Figure:
    """What each model gets right, a panel for each question."""
    shown = [(*_best(question), 100.0) for question in results.work.questions]
    figure = dots(results, shown)
    figure.tight_layout()
    return figure


def flops(results: Results) -> Figure:
    """The same against active FLOPs."""
    questions = results.work.questions
    figure, axes = plt.subplots(1, len(questions), figsize=(5.2 * len(questions), 4.2))
    for axis, question in zip(np.atleast_1d(axes), questions, strict=True):
        measure, label = _best(question)
        for entry in results.arms:
            found, cost = (results.at(entry.name, m, 1) for m in (measure, f"{question}_flops"))
            if found is None or cost is None:
                continue
            style = look(entry) | {"linestyle": "none"}
            axis.errorbar(
                cost.mean / 1e6, 100 * found.mean, yerr=100 * found.sd, capsize=3, markersize=7,
                label=entry.title, **style,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("active MFLOPs of an image")
        axis.set_ylabel(label)
    named = {}
    for axis in np.atleast_1d(axes):
        for handle, title in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(title, handle)
    figure.tight_layout()
    figure.legend(
        named.values(), named.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3
    )
    return figure


def use(results: Results) -> Figure | None:
    """Shares of the choices: a row for each question, a panel for each layer, of the first arm that
    has experts and several questions."""
    work = results.work
    arm = next((e for e in results.arms if e.feed == "experts" and not e.alone), None)
    if arm is None:
        return None
    layers = work.layers // 2
    figure, axes = plt.subplots(
        layers, 1, figsize=(0.5 * work.experts + 2, (0.45 * len(work.questions) + 0.6) * layers),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for layer, axis in enumerate(axes[:, 0]):
        shares = np.full((len(work.questions), work.experts), np.nan)
        for row, question in enumerate(work.questions):
            for expert in range(work.experts):
                by_seed = results.seeds_of(
                    arm.name, f"{question}_share_{layer}_{expert}", work.context
                )
                shares[row, expert] = by_seed.get(work.seeds[0], np.nan)
        order = np.argsort(-shares[0])
        image = axis.imshow(shares[:, order], cmap="viridis", vmin=0, aspect="auto")
        axis.set_yticks(range(len(work.questions)), work.questions)
        axis.set_xticks(range(work.experts), order)
        axis.set_title(f"layer {2 * layer + 1}", fontsize=9)
        axis.grid(visible=False)
        figure.colorbar(image, ax=axis, format="{x:.0%}")
    figure.suptitle(arm.title, fontsize=10)
    return figure


def learning_curves(results: Results) -> Figure:
    """Training loss over steps, the mean over seeds."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for entry in results.arms:
        runs = list(results.curves[entry.name].values())
        steps = [step for step, _ in min(runs, key=len)]
        losses = np.mean([[loss for _, loss in run[: len(steps)]] for run in runs], 0)
        smooth = np.convolve(np.pad(losses, (2, 2), "edge"), np.ones(5) / 5, "valid")
        axis.plot(steps, smooth, label=entry.title, **{**look(entry), "marker": ""})
    axis.set_xlabel("step")
    axis.set_ylabel("training loss (nats, summed over questions)")
    axis.set_title("Learning, mean over seeds (moving mean of 5 points)")
    legend_below(figure, axis)
    return figure


def training_costs(results: Results) -> Figure:
    return costs(results, "")


EXPERTS: Mapping[str, Callable[[Results], Figure | None]] = {
    "answers": answers,
    "flops": flops,
    "use": use,
    "learning_curves": learning_curves,
    "costs": training_costs,
}
