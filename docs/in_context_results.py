"""Softmax regression in context: tables, sentences and figures of docs/results/in_context.json."""

from __future__ import annotations

import json
import statistics
from functools import cache
from pathlib import Path

import kernel_results
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aftermax.lab import plots
from aftermax.lab.in_context import ARMS
from aftermax.lab.in_context_study import (
    AS_GOOD,
    NEAR,
    SCORED,
    SIZED,
    STUDIES,
    UNTRAINED,
    Study,
    joined,
)
from aftermax.lab.results import Spread, spread
from aftermax.lab.verdicts import T_975

IN_CONTEXT = Path(__file__).parent / "results" / "in_context.json"
CORE = ("gd", "products", "softmax")
WIDTHS = ("d=5", "d=10", "main", "d=40")
LOOKS = {
    "gd": {"color": "#222222", "marker": "s", "linestyle": "--"},
    "products": {"color": "#D55E00", "marker": "D", "linestyle": "-"},
    "softmax": {"color": plots.COLOURS[0], "marker": "o", "linestyle": "-"},
}
LINES = {
    "uniform": {"color": "#999999", "linestyle": ":"},
    "gd-1": {"color": "#222222", "linestyle": "-"},
    "gd-5": {"color": "#009E73", "linestyle": "-."},
    "gd-20": {"color": "#009E73", "linestyle": "--"},
    "optimum": {"color": "#CC79A7", "linestyle": "-"},
}
"""Of what is not trained."""


@cache
def studies() -> dict[str, Study]:
    held = json.loads(IN_CONTEXT.read_text())["studies"]
    return {name: Study.of_json(held[name]) for name in STUDIES if name in held}


@cache
def all_systems() -> Study:
    """Every arm at the sizes of "main"."""
    found = studies()
    whole = found["main"]
    for name in ("systems", "linear"):
        if name in found:
            whole = joined(whole, found[name])
    return whole


# ---- words ---------------------------------------------------------------------------------------


def about() -> str:
    """What the numbers were made with."""
    s = studies()["main"].setting
    fewer = sorted({len(study.setting.seeds) for study in studies().values()})
    batches = ", ".join(
        f"{study.setting.batch} tasks a step at n = {study.setting.rows}"
        for study in {found.setting.rows: found for found in studies().values()}.values()
    )
    return (
        f"{s.steps} steps of Adam (betas 0.9, 0.999, no decay), {batches}; the learning rate rises "
        f"over the first 2% and falls to 0 along a cosine, gradients clipped at 1; its height is "
        f"the best of {', '.join(f'{rate:g}' for rate in s.rates)} for each arm. "
        f"{SCORED} tasks are scored, the same for all; step sizes are chosen on "
        f"{SIZED // s.rows} others. {max(fewer)} seeds of the three arms of the first table, "
        f"{min(fewer)} of all others. {kernel_results.machine(IN_CONTEXT)}"
    )


def _row(study: Study, arm: str) -> list[str]:
    spreads = [study.at(arm, m) for m in ("prediction", "model", "cosine")]
    cells = [_text(study.at(arm, "loss"), 4), _text(spread(study.ratio(arm)), 3)]
    cells += [_text(s, n) for s, n in zip(spreads, (3, 3, 4), strict=True)]
    return [ARMS[arm].title, f"{study.best_rate(arm):g}", *cells]


def _text(found: Spread | None, digits: int) -> str:
    return "–" if found is None else found.text(digits)


def _table(names: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(names)} |", "| --- |" + " --: |" * (len(names) - 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def main_table() -> str:
    """Learners that are not trained, then the three arms."""
    study = studies()["main"]
    of_step = study.untrained["gd-1"].measures.loss
    rows = []
    for name, title in UNTRAINED.items():
        loss, prediction, model, cosine = study.untrained[name].measures
        numbers = [f"{loss:.4f}", f"{loss / of_step:.3f}"]
        numbers += [f"{prediction:.3f}", f"{model:.3f}", f"{cosine:.4f}"]
        rows.append([title, "–", *numbers, "–"])
    for arm in CORE:
        reached = study.steps_to(arm).values()
        all_of_them = len(reached) == len(study.runs(arm)) > 0
        when = f"{min(reached)} to {max(reached)}" if all_of_them else f"{len(reached)} seeds"
        rows.append([*_row(study, arm), when])
    names = ["n = 25, d = 20", "rate", "loss", "to one step", "prediction", "model", "cosine"]
    return _table([*names, f"cosine above {NEAR} from step"], rows)


def systems_table() -> str:
    """Every arm, those that answer best first, and what it learned by the two bounds."""
    study = all_systems()
    arms = [arm for arm in study.setting.arms if study.runs(arm)]
    losses = {arm: statistics.mean(study.by_seed(arm, "loss").values()) for arm in arms}
    rows = []
    for arm in sorted(arms, key=losses.__getitem__):
        gained = _text(spread(_gain(study, arm)).times(100), 0)  # type: ignore[union-attr]
        rows.append([*_row(study, arm), gained, str(len(study.runs(arm))), learned(study, arm)])
    names = ["system", "rate", "loss", "to one step", "prediction", "model", "cosine"]
    return _table([*names, "gain, %", "seeds", "learned"], rows)


def _gain(study: Study, arm: str) -> dict[int, float]:
    """By seed, what it is better than uniform answers by, as a share of what one step is."""
    uniform, step = (study.untrained[name].measures.loss for name in ("uniform", "gd-1"))
    return {
        seed: (uniform - loss) / (uniform - step)
        for seed, loss in study.by_seed(arm, "loss").items()
    }


def learned(study: Study, arm: str) -> str:
    """By the two bounds, which every seed must keep."""
    near = all(cosine > NEAR for cosine in study.by_seed(arm, "cosine").values())
    good = all(ratio <= AS_GOOD for ratio in study.ratio(arm).values())
    if near and good:
        return "the step"
    if good:
        return "as good an answer, not the step"
    if near:
        return "the step's direction"
    return "part of it" if min(_gain(study, arm).values()) > 0.5 else "little"


def sizes_table() -> str:
    """Loss over d at n = 25, and at n = 200."""
    rows = []
    found = studies()
    untrained = ("uniform", "gd-1", "gd-20", "optimum")
    for name in (*WIDTHS, "n=200"):
        if name not in found or not all(found[name].runs(arm) for arm in CORE):
            continue
        study = found[name]
        cells = [f"{study.setting.rows}", f"{study.setting.width}"]
        cells += [f"{study.untrained[u].measures.loss:.4f}" for u in untrained]
        cells += [_text(study.at(arm, "loss"), 4) for arm in CORE]
        cells += [_text(spread(study.ratio("softmax")), 3)]
        cells += [_text(study.at(arm, "cosine"), 4) for arm in ("products", "softmax")]
        cells += [str(len(study.runs("softmax")))]
        rows.append(cells)
    names = ["n", "d", "uniform", "1 step", "20 steps", "optimum", "1 step, learned", "linear"]
    names += ["softmax", "softmax to 1 step", "linear cosine", "softmax cosine", "seeds"]
    return _table(names, rows)


def verdict() -> str:
    """What was asked of softmax attention, and whether it holds."""
    study = studies()["main"]
    cosines, ratios = study.by_seed("softmax", "cosine"), study.ratio("softmax")
    reached = study.steps_to("softmax")
    near = sum(cosine > NEAR for cosine in cosines.values())
    good = sum(ratio <= AS_GOOD for ratio in ratios.values())
    said = [
        f"- Cosine of softmax attention to one gradient step: {_interval(cosines, 4)}, the least "
        f"of {len(cosines)} seeds {min(cosines.values()):.4f}; above {NEAR} in {near} of them"
        + (
            f", from step {min(reached.values())} to {max(reached.values())} on."
            if reached
            else "."
        ),
        f"- Its loss, as a ratio to that of one step: {_interval(ratios, 3)}, the most "
        f"{max(ratios.values()):.3f}; within 5% in {good} of {len(ratios)} seeds.",
    ]
    linear = study.difference("softmax", "products", "loss")
    if linear is not None:
        mean, half = linear
        sure = "" if abs(mean) > half else ", not told apart"
        said.append(
            f"- Its loss over that of linear self-attention: {mean:+.4f} ± {half:.4f}{sure}."
        )
    return "\n".join(said)


def _interval(values: dict[int, float], digits: int) -> str:
    """Mean and the half-width of its 95% interval."""
    count = len(values)
    mean = statistics.mean(values.values())
    if not 3 <= count <= len(T_975) + 1:
        return f"{mean:.{digits}f}"
    half = T_975[count - 2] * statistics.stdev(values.values()) / count**0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


# ---- figures -------------------------------------------------------------------------------------


def figure() -> Figure:
    """On the way through training, and over d."""
    study = studies()["main"]
    drawn, axes = plt.subplots(2, 2, figsize=(12, 8.4))
    (loss, gap), (cosine, over) = axes
    for name, line in LINES.items():
        loss.axhline(
            study.untrained[name].measures.loss, linewidth=1.2, label=UNTRAINED[name], **line
        )
    for arm in CORE:
        _curve(loss, study, arm, "loss", label=ARMS[arm].title)
    for arm in CORE[1:]:
        _curve(gap, study, arm, "prediction", label=f"{ARMS[arm].title}: predictions")
        _curve(gap, study, arm, "model", label=f"{ARMS[arm].title}: sensitivities", thin=True)
        _curve(cosine, study, arm, "cosine", of=lambda value: 1 - value)
    for axis in (loss, gap, cosine):
        axis.set_xscale("log")
        axis.set_xlabel("steps of training")
    loss.set_ylim(-0.03, 0.8)
    loss.set_ylabel("loss, n/2 |softmax(l) − b'|²")
    loss.set_title(f"Loss, n = {study.setting.rows}, d = {study.setting.width}")
    loss.legend(fontsize=7.5, loc="lower left", ncols=2)
    gap.set_yscale("log")
    gap.set_ylabel("distance to one step, relative")
    gap.set_title("Distance to one gradient step")
    gap.legend(fontsize=8, loc="lower left")
    nines = (1, 0.1, 0.01, 0.001)
    cosine.set_yscale("log")
    cosine.set_yticks(nines, [f"{1 - missing:g}" for missing in nines])
    cosine.minorticks_off()
    cosine.invert_yaxis()
    cosine.axhline(1 - NEAR, color="#999999", linewidth=1)
    cosine.set_ylabel("cosine")
    cosine.set_title("Cosine of the sensitivities to one gradient step")
    _over_width(over)
    drawn.tight_layout()
    return drawn


def _curve(axis: Axes, study: Study, arm: str, measure: str, of=None, thin=False, label="") -> None:
    """Mean and deviation over the seeds, after the first ten steps."""
    steps = [step for step in study.steps(arm) if step > 0]
    spreads = []
    for step in steps:
        values = study.by_seed(arm, measure, step)
        spreads.append(spread({k: of(v) if of else v for k, v in values.items()}))
    known = [(step, s) for step, s in zip(steps, spreads, strict=True) if s is not None]
    x = [step for step, _ in known]
    mean, sd = (np.array([getattr(s, part) for _, s in known]) for part in ("mean", "sd"))
    look = LOOKS[arm] | ({"linestyle": ":", "markerfacecolor": "white"} if thin else {})
    axis.plot(x, mean, label=label or ARMS[arm].title, markersize=4, **look)
    low = np.maximum(mean - sd, mean / 10) if measure != "loss" else mean - sd
    axis.fill_between(x, low, mean + sd, color=look["color"], alpha=0.15, linewidth=0)


def _over_width(axis: Axes) -> None:
    found = [
        studies()[name] for name in WIDTHS if name in studies() and studies()[name].runs("softmax")
    ]
    widths = [study.setting.width for study in found]
    for name, line in LINES.items():
        losses = [study.untrained[name].measures.loss for study in found]
        axis.plot(widths, losses, linewidth=1.2, **line)
    for arm in CORE:
        spreads = [study.at(arm, "loss") for study in found]
        mean = [np.nan if s is None else s.mean for s in spreads]
        sd = [np.nan if s is None else s.sd for s in spreads]
        axis.errorbar(widths, mean, yerr=sd, capsize=3, markersize=5, **LOOKS[arm])
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [str(width) for width in widths])
    axis.minorticks_off()
    axis.set_xlabel("d")
    axis.set_ylabel("loss at the end")
    axis.set_title(f"Loss over d, n = {studies()['main'].setting.rows}")


def systems_figure() -> Figure:
    """Loss against cosine at the end, every seed a point."""
    study = all_systems()
    arms = [arm for arm in study.setting.arms if study.runs(arm) and arm != "gd"]
    drawn, axis = plt.subplots(figsize=(9.5, 6))
    for i, arm in enumerate(arms):
        cosines, losses = study.by_seed(arm, "cosine"), study.by_seed(arm, "loss")
        axis.plot(
            [cosines[seed] for seed in cosines], [losses[seed] for seed in cosines],
            color=plots.COLOURS[i % len(plots.COLOURS)],
            marker=plots.MARKERS[i % len(plots.MARKERS)],
            linestyle="none", label=ARMS[arm].title, alpha=0.8,
            markerfacecolor="white" if i >= len(plots.COLOURS) else None,
        )  # fmt: skip
    for name, said in {"uniform": "uniform answers", "gd-1": "one gradient step"}.items():
        height = study.untrained[name].measures.loss
        axis.axhline(height, linewidth=1, **LINES[name])
        axis.annotate(
            said, (0, height), (4, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", color="#555555", fontsize=8,
        )  # fmt: skip
    axis.axvline(NEAR, color="#999999", linewidth=1)
    axis.set_xlabel("cosine of the sensitivities to one gradient step")
    axis.set_ylabel("loss at the end")
    axis.set_title(f"What each system learns, n = {study.setting.rows}, d = {study.setting.width}")
    plots.legend_below(drawn, axis)
    return drawn


BLOCKS = {
    "about": about,
    "verdict": verdict,
    "main": main_table,
    "systems": systems_table,
    "sizes": sizes_table,
}
"""Name of a marked block of docs/in_context.md, after "in-context-" -> its text."""
