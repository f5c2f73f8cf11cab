"""Studies as tables and figures: injectivity, recall against the size of the state, SOFT."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from aftermax.lab import injectivity, needle, plots
from aftermax.lab.mqar import ARMS, Study
from aftermax.lab.results import spread
from aftermax.lowrank.newton import newton_inverse

MQAR = Path(__file__).parent / "results" / "mqar.json"
NEEDLE = MQAR.with_name("needle.json")


@cache
def injectivity_measured() -> tuple[injectivity.Measured, ...]:
    """Measured here and now: half a minute, and the same numbers up to rounding."""
    return tuple(injectivity.measure(subject) for subject in injectivity.subjects())


def injectivity_table() -> str:
    """Rank and confusion, which rounding does not change."""
    found = injectivity_measured()
    width = found[0].rank  # of softmax, the first: all of d
    families = list(injectivity.FAMILIES)
    lines = [
        f"| system | rank of dA/dq, of {width} | confused, of {' | of '.join(families)} |",
        f"| --- | --: |{' --: |' * len(families)}",
    ]
    for m in found:
        shares = " | ".join(f"{100 * m.confusion[family]:.0f}%" for family in families)
        lines.append(f"| {m.subject.title} | {m.rank} | {shares} |")
    return "\n".join(lines)


def mqar_study() -> Study:
    return Study.of_json(json.loads(MQAR.read_text()))


def mqar_table() -> str:
    """Answers found at each width, over the seeds, and the learning rate that each arm chose."""
    study = mqar_study()
    widths = study.setting.key_dims
    lines = [
        f"| share of answers | learning rate | {' | '.join(f'n = {n}' for n in widths)} |",
        f"| --- | --: |{' --: |' * len(widths)}",
    ]
    for arm in study.setting.arms:
        found = [study.accuracy(arm, n) for n in widths]
        rates = {job.rate for job in study.done if (job.kind, job.arm) == ("seed", arm)}
        cells = " | ".join("–" if spread is None else spread.text(2) for spread in found)
        lines.append(f"| {ARMS[arm].title} | {', '.join(f'{r:g}' for r in rates)} | {cells} |")
    return "\n".join(lines)


def mqar_verdicts() -> str:
    return "\n".join(f"- {sentence}" for sentence in mqar_study().verdicts())


def mqar_page() -> str:
    """The table, the figure, and what three seeds bear out."""
    if not MQAR.exists():
        return "Not measured yet."
    figure = "![Answers found against the width of queries and keys](figures/mqar.png)"
    return f"{mqar_table()}\n\n{figure}\n\n{mqar_verdicts()}"


def needle_study() -> needle.Study:
    return needle.Study.of_json(json.loads(NEEDLE.read_text()))


def needle_table() -> str:
    """Answers found and values kept at the end, over the seeds, and the rate of each arm."""
    study = needle_study()
    measures = {"accuracy": "answers found", "recall": "value kept", "any": "by any head"}
    names = ["layer 2", "learning rate", *measures.values(), f"steps to {needle.LEARNED:.0%}"]
    lines = [f"| {' | '.join(names)} |", "| --- |" + " --: |" * 5]
    for arm in study.setting.arms:
        cells = [
            "–" if spread is None else spread.text(2)
            for spread in (study.at(arm, measure) for measure in measures)
        ]
        told = ", ".join(f"{rate:g}" for rate in {job.rate for job, _ in study.runs(arm)})
        cells.append(_steps(study, arm))
        lines.append(f"| {needle.ARMS[arm]} | {told} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _steps(study: needle.Study, arm: str) -> str:
    """Mean and deviation over the seeds that learned, and how many those are if not all."""
    found = spread(study.steps_to_learn(arm))
    if found is None:
        return "–"
    some = f" ({found.count} of {len(study.setting.seeds)} seeds)"
    return found.text(0) + (some if found.count < len(study.setting.seeds) else "")


def _at_other_rates(study: needle.Study) -> str:
    """Of an earlier choice of rates, whose runs are in the file too."""
    counts: dict[tuple[str, float], list[bool]] = {}
    for job, outcome in study.done.items():
        if job.kind == "seed" and job.rate != study.best_rate(job.arm):
            learned = outcome.last.accuracy >= needle.LEARNED
            counts.setdefault((job.arm, job.rate), []).append(learned)
    told = [
        f"{needle.ARMS[arm]} at {rate:g}, {sum(learned)} of {len(learned)}"
        for (arm, rate), learned in counts.items()
    ]
    if not told:
        return ""
    return f"Seeds that ended with {needle.LEARNED:.0%} at other rates: {'; '.join(told)}."


def needle_page() -> str:
    """What it was, the table, the figure, and what the seeds bear out."""
    if not NEEDLE.exists():
        return "Not measured yet."
    held = json.loads(NEEDLE.read_text())
    study, made_on = needle_study(), held["machine"]
    s = study.setting
    about = (
        f"{s.pairs} pairs of key and value among noise of {s.noise} symbols, {s.length} tokens, "
        f"the question at least {s.gap} tokens after them; window {s.window}, k = {s.keep}, width "
        f"{s.width}, {s.heads} heads; {s.steps} steps of {s.batch} problems, seeds "
        f"{', '.join(map(str, s.seeds))}; learning rate the best of "
        f"{', '.join(f'{rate:g}' for rate in s.rates)} for each. Chance keeps a value with "
        f"{s.chance_kept:.2f}. {made_on['processor']}, torch {made_on['torch']}."
    )
    figure = "![Answers found and values kept on the way through training](figures/needle.png)"
    said = "\n".join(f"- {sentence}" for sentence in study.verdicts())
    parts = [about, needle_table(), figure, said, _at_other_rates(study)]
    return "\n\n".join(filter(None, parts))


# ---- SOFT --------------------------------------------------------------------------------------

CROWDS = {
    "d = 32, deviation 1": (32, 1.0),
    "d = 32, deviation 0.3": (32, 0.3),
    "d = 4, deviation 1": (4, 1.0),
    "d = 2, deviation 0.5": (2, 0.5),
}
"""49 Gaussian landmarks, from far apart to crowded."""


def _landmark_kernel(width: int, deviation: float) -> Tensor:
    random = torch.Generator().manual_seed(0)
    x = deviation * width**-0.25 * torch.randn(49, width, generator=random, dtype=torch.float64)
    return torch.exp(-torch.cdist(x, x).square() / 2)


def _bare_residuals(matrix: Tensor, steps: int) -> list[float]:
    """|A Y A - A| / |A| after each step of Newton's iteration, without a guard."""
    inverse = 1.8 / matrix.abs().sum(0).max() ** 2 * matrix
    found = []
    for _ in range(steps):
        inverse = 2 * inverse - inverse @ matrix @ inverse
        found.append(((matrix @ inverse @ matrix - matrix).norm() / matrix.norm()).item())
    return found


def soft_conditioning() -> Figure:
    """What Newton's iteration makes of crowded landmarks, and what more landmarks bring."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4))
    steps = range(1, 61)
    for i, (name, crowd) in enumerate(CROWDS.items()):
        matrix = _landmark_kernel(*crowd)
        shown = f"{name} (condition {torch.linalg.cond(matrix).item():.0e})"
        own = plots.COLOURS[i]
        left.plot(steps, _bare_residuals(matrix, 60), color=own, label=shown)
        middle.plot(steps, _bare_residuals(matrix.float(), 60), "--", color=own)
        guarded = [newton_inverse(matrix.float(), n, return_residual=True)[1] for n in steps]
        middle.plot(steps, guarded, color=own)
    for axis, title in ((left, "float64"), (middle, "float32: dashed without the guard")):
        axis.set_yscale("log")
        axis.set_ylim(1e-17, 10)
        axis.axvline(20, color="#999999", linewidth=1)
        axis.set_xlabel("steps (20 in the paper)")
        axis.set_title(title)
    left.set_ylabel("residual |A Y A − A| / |A|")
    middle.legend(*left.get_legend_handles_labels(), fontsize=7.5, loc="lower left")
    random = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=random, dtype=torch.float64)
    kernel = torch.exp(-torch.cdist(x, x).square() / 2 / 8**0.5)
    counts = (8, 16, 32, 49, 64, 128, 256)
    for ridge, style in ((0.0, "--"), (0.01, "-")):
        errors = []
        for count in counts:
            chosen = x[:count]
            across = torch.exp(-torch.cdist(x, chosen).square() / 2 / 8**0.5)
            inverse = newton_inverse(across[:count], 30, ridge)
            errors.append(((across @ inverse @ across.mT - kernel).norm() / kernel.norm()).item())
        right.plot(counts, errors, style, marker="o", color="#222222", label=f"ridge {ridge:g}")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_ylim(1e-3, 1.5)
    right.set_xticks(counts, [str(n) for n in counts])
    right.minorticks_off()
    right.set_xlabel("landmarks, of 256 tokens (d = 8)")
    right.set_ylabel("error of the whole kernel")
    right.set_title("More landmarks")
    right.legend(fontsize=8)
    figure.tight_layout()
    return figure
