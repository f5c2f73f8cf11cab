"""Softmax regression in context: tables, sentences and figures of docs/results/in_context.json."""

from __future__ import annotations

import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import kernel_results
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aftermax.lab import plots
from aftermax.lab.draw import MARKERS
from aftermax.lab.in_context import ARMS
from aftermax.lab.in_context_study import (
    AS_GOOD,
    LITTLE,
    NEAR,
    SCORED,
    SIZED,
    STUDIES,
    UNTRAINED,
    WARMUP,
    Setting,
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
    "softmax-": {"color": "#56B4E9", "marker": "v", "linestyle": "-"},
}
SIGNS = {1: "β > 0", -1: "β < 0"}
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
    """Every arm, from the initial projections of `nn.Linear`."""
    found = studies()
    whole = found["unscaled"]
    for name in ("systems", "linear"):
        if name in found:
            whole = joined(whole, found[name])
    return whole


class Shown(NamedTuple):
    """An arm in a table or a figure: softmax attention once for each sign of its temperature."""

    study: Study
    arm: str
    title: str
    look: dict[str, Any]


def shown(study: Study) -> list[Shown]:
    """The seeds that learned, and of how many they are."""
    found = []
    for arm in CORE:
        learners = [seed for seed, gain in study.gain(arm).items() if gain > LITTLE]
        of = f" of {len(study.runs(arm))} seeds"
        if arm != "softmax" and learners:
            title = f"{ARMS[arm].title} ({len(learners)}{of})"
            found.append(Shown(study.of_seeds(learners), arm, title, LOOKS[arm]))
        for sign, said in SIGNS.items() if arm == "softmax" else ():
            seeds = [seed for seed in learners if study.signs(arm)[seed] == sign]
            if seeds:
                title = f"{ARMS[arm].title}, {said} ({len(seeds)}{of})"
                look = LOOKS[arm + "-" * (sign < 0)]
                found.append(Shown(study.of_seeds(seeds), arm, title, look))
    return found


def others(study: Study) -> list[Shown]:
    """The seeds that learned little."""
    found = []
    for arm in CORE:
        seeds = [seed for seed, gain in study.gain(arm).items() if gain <= LITTLE]
        if seeds:
            title = f"{ARMS[arm].title}, the rest ({len(seeds)})"
            found.append(Shown(study.of_seeds(seeds), arm, title, LOOKS[arm]))
    return found


# ---- words ---------------------------------------------------------------------------------------


def about() -> str:
    """What the numbers were made with."""
    found = studies()
    s = found["main"].setting
    batches = {study.setting.rows: study.setting.batch for study in found.values()}
    of_rows = " and ".join(f"{batch} at n = {rows}" for rows, batch in batches.items())
    return (
        f"{s.steps} steps of Adam (betas 0.9 and 0.999, no decay) with fresh tasks at each, "
        f"{of_rows}, the same for all arms of a seed; the learning rate rises over the first "
        f"{WARMUP:.0%} and falls to 0 along a cosine; gradients are clipped at norm 1. Its height "
        f"is the best of {_rates(s)} for each arm ({_rates(found['unscaled'].setting)} in the "
        f"comparison of systems), by a run of full length with a seed of its own, scored on tasks "
        f"of its own. Projections start at {s.start:g} times those of `nn.Linear` (as they are in "
        f"the comparison of systems). {SCORED} held-out tasks are scored, the same for all; step "
        f"sizes are chosen on {SIZED // s.rows} others. {kernel_results.machine(IN_CONTEXT)}"
    )


def _rates(setting: Setting) -> str:
    *first, last = (f"{rate:g}" for rate in setting.rates)
    return f"{', '.join(first)} and {last}"


def _row(study: Study, arm: str) -> list[str]:
    spreads = [study.at(arm, m) for m in ("prediction", "model", "cosine")]
    cells = [_text(study.at(arm, "loss"), 4), _text(spread(study.ratio(arm)), 3)]
    cells += [_text(s, n) for s, n in zip(spreads, (3, 3, 4), strict=True)]
    return [f"{study.best_rate(arm):g}", *cells]


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
        rows.append([title, "–", *numbers, "–", "–"])
    for part, arm, title, _ in (*shown(study), *others(study)):
        reached, count = part.steps_to(arm).values(), len(part.runs(arm))
        ends = sorted({min(reached), max(reached)}) if reached else []
        when = "–" if arm == "gd" else " to ".join(map(str, ends)) or "–"
        rows.append([title, *_row(part, arm), f"{len(reached)} of {count}", when])
    names = ["n = 25, d = 20", "rate", "loss", "to one step", "prediction", "model", "cosine"]
    return _table([*names, f"seeds above {NEAR}", "from step"], rows)


def systems_table() -> str:
    """Every arm, those that answer best first, and what it learned by the two bounds."""
    study = all_systems()
    arms = [arm for arm in study.setting.arms if study.runs(arm)]
    losses = {arm: statistics.mean(study.by_seed(arm, "loss").values()) for arm in arms}
    rows = []
    for arm in sorted(arms, key=losses.__getitem__):
        gained = _text(spread({k: 100 * v for k, v in study.gain(arm).items()}), 0)
        signs = " ".join("+" if sign > 0 else "−" for sign in study.signs(arm).values())
        rows.append([ARMS[arm].title, *_row(study, arm), gained, signs or "–", learned(study, arm)])
    names = ["system", "rate", "loss", "to one step", "prediction", "model", "cosine"]
    return _table([*names, "gain, %", "signs of β", "learned"], rows)


def learned(study: Study, arm: str) -> str:
    """By the two bounds, in so many seeds."""
    near = {seed for seed, cosine in study.by_seed(arm, "cosine").items() if cosine > NEAR}
    good = {seed for seed, ratio in study.ratio(arm).items() if ratio <= AS_GOOD}
    seeds, gain = len(study.runs(arm)), study.gain(arm)
    counts = {
        "the step": len(near & good),
        "its direction": len(near - good),
        "as good an answer": len(good - near),
        "part of it": sum(gain[seed] > LITTLE for seed in gain.keys() - near - good),
        "little": sum(gain[seed] <= LITTLE for seed in gain.keys() - near - good),
    }
    return ", ".join(
        said if count == seeds else f"{said} ({count} of {seeds})"
        for said, count in counts.items()
        if count
    )


def starts_table() -> str:
    """What softmax learned from either start, and linear attention."""
    rows = []
    for name in ("main", "unscaled"):
        study = studies()[name]
        cells = [learned(study, arm) for arm in ("products", "softmax")]
        rows.append([f"{study.setting.start:g}", str(len(study.runs("softmax"))), *cells])
    names = ["projections start at nn.Linear's times", "seeds"]
    return _table([*names, ARMS["products"].title, ARMS["softmax"].title], rows)


def sizes_table() -> str:
    """Loss over d at n = 25, and at n = 200."""
    rows = []
    untrained = ("uniform", "gd-1", "gd-20", "optimum")
    for name in (*WIDTHS, "n=200"):
        study = studies().get(name)
        if study is None or not study.runs("softmax"):
            continue
        losses = [f"{study.untrained[u].measures.loss:.4f}" for u in untrained]
        begin = [f"{study.setting.rows}", f"{study.setting.width}", *losses]
        for part, arm, title, _ in (*shown(study), *others(study)):
            if arm != "gd":
                cells = [_text(part.at(arm, "loss"), 4), _text(spread(part.ratio(arm)), 3)]
                rows.append([*begin, title, *cells, _text(part.at(arm, "cosine"), 4)])
                begin = [""] * len(begin)
    names = ["n", "d", "uniform", "1 step", "20 steps", "optimum", "trained"]
    return _table([*names, "loss", "to one step", "cosine"], rows)


def heads_table() -> str:
    """Softmax heads that are set to the step by hand."""
    study = studies()["main"]
    of_step = study.untrained["gd-1"].measures.loss
    rows = []
    for beta, (_, (loss, prediction, model, cosine)) in study.heads.items():
        numbers = [f"{loss:.4f}", f"{loss / of_step:.3f}"]
        rows.append([f"{beta:g}", *numbers, f"{prediction:.3f}", f"{model:.3f}", f"{cosine:.4f}"])
    return _table(["β", "loss", "to one step", "prediction", "model", "cosine"], rows)


def verdict() -> str:
    """What was asked of softmax attention, and whether it holds."""
    study = studies()["main"]
    parts = [part for part in shown(study) if part.arm == "softmax"]
    said = [f"- All seeds: {_held(study)}"]
    return "\n".join(said + [f"- {part.title}: {_held(part.study)}" for part in parts])


def _held(study: Study) -> str:
    cosines, ratios = study.by_seed("softmax", "cosine"), study.ratio("softmax")
    temperatures = [run.temperature for run in study.runs("softmax").values()]
    near = sum(cosine > NEAR for cosine in cosines.values())
    good = sum(ratio <= AS_GOOD for ratio in ratios.values())
    return (
        f"{len(cosines)}; the cosine to one step {_interval(cosines, 4)}, above {NEAR} in {near}; "
        f"the loss {_interval(ratios, 3)} times that of one step, at most {AS_GOOD} in {good}; "
        f"β from {min(temperatures):+.3f} to {max(temperatures):+.3f}."
    )


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
    """On the way through training, and what one head can be at each temperature."""
    study = studies()["main"]
    drawn, axes = plt.subplots(2, 2, figsize=(12, 8.6))
    (loss, gap), (cosine, heads) = axes
    for name, line in LINES.items():
        height = study.untrained[name].measures.loss
        loss.axhline(height, linewidth=1.2, label=UNTRAINED[name], **line)
    for part in shown(study):
        _curve(loss, part, "loss")
        if part.arm != "gd":
            _curve(gap, part, "prediction")
            _curve(gap, part, "model", thin=True)
            _curve(cosine, part, "cosine", of=lambda value: 1 - value)
    for axis in (loss, gap, cosine):
        axis.set_xscale("log")
        axis.set_xlabel("steps of training")
    loss.set_ylim(-0.03, 0.8)
    loss.set_ylabel("loss, n/2 |softmax(l) − b'|²")
    loss.set_title(f"Loss, n = {study.setting.rows}, d = {study.setting.width}")
    gap.set_yscale("log")
    gap.set_ylabel("relative distance: predictions –, sensitivities ···")
    gap.set_title("Distance to one gradient step")
    _nines(cosine)
    _heads(heads, study)
    plots.legend_below(drawn, loss)
    return drawn


def _nines(axis: Axes) -> None:
    missing = (1, 0.1, 0.01, 0.001)
    axis.set_yscale("log")
    axis.set_yticks(missing, [f"{1 - share:g}" for share in missing])
    axis.minorticks_off()
    axis.invert_yaxis()
    axis.axhline(1 - NEAR, color="#999999", linewidth=1)
    axis.set_ylabel("cosine")
    axis.set_title("Cosine of the sensitivities to one gradient step")


def _curve(axis: Axes, part: Shown, measure: str, of=None, thin: bool = False) -> None:
    """Mean and deviation over the seeds, after the first ten steps."""
    study, arm, title, look = part
    steps = [step for step in study.steps(arm) if step > 0]
    spreads = []
    for step in steps:
        values = study.by_seed(arm, measure, step)
        spreads.append(spread({k: of(v) if of else v for k, v in values.items()}))
    known = [(step, s) for step, s in zip(steps, spreads, strict=True) if s is not None]
    x = [step for step, _ in known]
    mean, sd = (np.array([getattr(s, part) for _, s in known]) for part in ("mean", "sd"))
    look = look | ({"linestyle": ":", "markerfacecolor": "white"} if thin else {})
    axis.plot(x, mean, label=title, markersize=4, **look)
    low = mean - sd if measure == "loss" else np.maximum(mean - sd, mean / 10)
    axis.fill_between(x, low, mean + sd, color=look["color"], alpha=0.15, linewidth=0)


def _heads(axis: Axes, study: Study) -> None:
    """Loss over the temperature: set by hand, and where the trained layers ended."""
    betas = list(study.heads)
    losses = [study.heads[beta].measures.loss for beta in betas]
    for sign in SIGNS:
        side = [(b, loss) for b, loss in zip(betas, losses, strict=True) if b * sign > 0]
        axis.plot(*zip(*side, strict=True), ".-", color="#777777", linewidth=1.2)
    axis.plot(0, study.untrained["gd-1"].measures.loss, "s", color="#222222")
    axis.annotate(
        "one gradient step", (0, study.untrained["gd-1"].measures.loss), (8, -4),
        textcoords="offset points", color="#555555", fontsize=8,
    )  # fmt: skip
    for part in shown(study):
        if part.arm == "softmax":
            ends = part.study.runs("softmax").values()
            look = part.look | {"linestyle": "none", "markersize": 7, "alpha": 0.7}
            axis.plot([o.temperature for o in ends], [o.last.loss for o in ends], **look)
    axis.set_xlabel("temperature β of the scores β a·a'")
    axis.set_ylabel("loss")
    axis.set_title("One softmax head: set by hand (line), trained (points)")


def sizes_figure() -> Figure:
    """Loss over d at n = 25, every seed a point."""
    found = [s for name in WIDTHS if (s := studies().get(name)) and s.runs("softmax")]
    drawn, axis = plt.subplots(figsize=(7.6, 4.8))
    widths = [study.setting.width for study in found]
    for name, line in LINES.items():
        losses = [study.untrained[name].measures.loss for study in found]
        axis.plot(widths, losses, linewidth=1.2, label=UNTRAINED[name], **line)
    labelled = set()
    for study in found:
        for part in (*shown(study), *others(study)):
            if part.arm == "gd":
                continue
            losses = list(part.study.by_seed(part.arm, "loss").values())
            look = part.look | {"linestyle": "none", "alpha": 0.7}
            name = part.title.split(" (")[0]
            if name.endswith("the rest"):
                look["markerfacecolor"] = "white"
            label = name if name not in labelled else None
            labelled.add(name)
            axis.plot([study.setting.width] * len(losses), losses, label=label, **look)
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [str(width) for width in widths])
    axis.minorticks_off()
    axis.set_xlabel("d")
    axis.set_ylabel("loss at the end")
    axis.set_title(f"Loss over d, n = {studies()['main'].setting.rows}")
    plots.legend_below(drawn, axis)
    return drawn


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
            marker=MARKERS[i % len(MARKERS)],
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
    "heads": heads_table,
    "starts": starts_table,
}
"""Name of a marked block of docs/in_context.md, after "in-context-" -> its text."""
