"""The comparison of experts with dense towers as tables, and what the images look like."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from aftermax.lab.data.pictures import DENSE, prepare
from aftermax.lab.experts_page import ANSWERS, answers
from aftermax.lab.report import tables
from aftermax.lab.results import Results
from aftermax.lab.verdicts import POINT

STANDARD = Path(__file__).parent / "results" / "experts.parquet"
UNBALANCED = STANDARD.with_name("experts_unbalanced.parquet")
ICONS = STANDARD.with_name("experts_icons.parquet")
OURS = "experts/softmax"
TOWERS = ("dense", "large", "wide")


def reach(path: Path) -> str:
    """Experts against each dense tower, question by question: is a point lost?"""
    results = Results.of_parquet(path)
    names = [f"{tower}/softmax" for tower in TOWERS]
    lines = [
        "| | against | experts | theirs | difference (points) | active FLOPs | within a point |",
        "| --- | --- | --: | --: | --: | --: | --- |",
    ]
    for label, measure in answers(results):
        question = measure.partition("_")[0]
        for name in (n for n in names if n in results.work.systems):
            ours, theirs = (results.at(s, measure, 1) for s in (OURS, name))
            cost, whole = (results.at(s, f"{question}_flops", 1) for s in (OURS, name))
            told = results.difference(measure, OURS, name, 1)
            if not (ours and theirs and cost and whole):
                continue
            found = [s.times(100).text(1) for s in (ours, theirs)]
            numbers, word = _told(told)
            share = f"{cost.mean / whole.mean:.2f}"
            cells = [label, name.split("/")[0], *found, numbers, share, word]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(told: tuple[float, float] | None) -> tuple[str, str]:
    """The difference with its interval, and whether it is within a point."""
    if told is None:
        return "–", "too few seeds"
    mean, half = told
    word = "yes" if mean - half > -POINT else "no" if mean + half < -POINT else "open"
    if word == "open":
        word += ", mean yes" if mean > -POINT else ", mean no"
    return f"{100 * mean:+.1f} ± {100 * half:.1f}", word


def use() -> str:
    """Whether questions take experts of their own, with the balancing loss and without."""
    lines = [
        "| | layer | experts in use, a question | use shared (%) | choices shared (%) |",
        "| --- | --: | --: | --: | --: |",
    ]
    for path in (STANDARD, UNBALANCED):
        if not path.exists():
            continue
        results = Results.of_parquet(path)
        work = results.work
        for layer in range(work.layers // 2):
            shares = [_shares(results, question, layer) for question in work.questions]
            in_use = np.mean([(s >= 0.1 / work.experts).sum(1) for s in shares])
            shared = 100 * np.minimum(*shares[:2]).sum(1)
            same = results.at(OURS, "same_choices", 1)
            told = "" if layer or same is None else same.times(100).text(1)
            lines.append(
                f"| balance {work.balance:g} | {2 * layer + 1} | {in_use:.1f} of {work.experts} | "
                f"{shared.mean():.0f} ± {shared.std(ddof=1):.0f} | {told} |"
            )
    return "\n".join(lines)


def _shares(results: Results, question: str, layer: int) -> np.ndarray:
    """(seeds, experts)"""
    work = results.work
    of_expert = [
        results.seeds_of(OURS, f"{question}_share_{layer}_{expert}", work.context)
        for expert in range(work.experts)
    ]
    return np.array([[by_seed[seed] for by_seed in of_expert] for seed in sorted(of_expert[0])])


def icons() -> str:
    """Answers about icons, in the same form as the report's."""
    results = Results.of_parquet(ICONS)
    columns, rows = tables(results)[ANSWERS]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' --: |' * (len(columns) - 1)}"]
    for row in rows:
        lines.append(f"| {' | '.join(f'**{c.text}**' if c.best else c.text for c in row)} |")
    return "\n".join([*lines, "", reach(ICONS)])


def command(path: Path) -> Callable[[], str]:
    return lambda: f"    aftermax compare {Results.of_parquet(path).preset}"


def figure() -> Figure:
    """Some images of the test split, and what is asked of their pixels."""
    with tempfile.TemporaryDirectory() as folder:
        asked = prepare("digits", None, 16, 0, Path(folder)).held_out("test")
    shown = 14
    figure, axes = plt.subplots(3, shown, figsize=(0.8 * shown, 2.6), layout="constrained")
    rows = {"image": asked.images.permute(0, 2, 3, 1), **{q: asked.answers[q] for q in DENSE}}
    for (name, images), row in zip(rows.items(), axes, strict=True):
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image.numpy(), cmap="gray", interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(visible=False)
        row[0].set_ylabel(name)
    return figure
