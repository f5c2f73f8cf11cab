"""The comparison of experts with dense towers as tables, and what the images look like."""

from __future__ import annotations

import tempfile
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from aftermax.lab.data.pictures import DENSE, prepare
from aftermax.lab.experts_page import ANSWERS, FIXED, answers
from aftermax.lab.page import Cell
from aftermax.lab.report import tables
from aftermax.lab.results import Results
from aftermax.lab.verdicts import POINT

STANDARD = Path(__file__).parent / "results" / "experts.parquet"
UNBALANCED = STANDARD.with_name("experts_unbalanced.parquet")
UNTRAINED = STANDARD.with_name("experts_untrained.parquet")
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
    """Whether questions take experts of their own: at random, with the balancing loss, without."""
    ways = {"one step": UNTRAINED, "balanced": STANDARD, "not balanced": UNBALANCED}
    found = {name: Results.of_parquet(path) for name, path in ways.items() if path.exists()}
    work = found["balanced"].work
    shown = [(f"{q}: experts in use", f"{q}_experts", 1, 1) for q in work.questions]
    shown += [
        ("use shared (%)", "shared_use", 100, 1),
        ("choices shared (%)", "same_choices", 100, 1),
    ]
    shown += [(label, measure, 100, 1) for label, measure in answers(found["balanced"])]
    lines = [f"| | {' | '.join(label for label, *_ in shown)} |", f"| --- |{' --: |' * len(shown)}"]
    for name, results in found.items():
        cells = []
        for _, measure, factor, digits in shown:
            spread = results.at(OURS, measure, 1)
            cells.append("–" if spread is None else spread.times(factor).text(digits))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def icons() -> str:
    """Answers about icons, in the same form as the report's."""
    results = Results.of_parquet(ICONS)
    return f"{_written(*tables(results)[ANSWERS])}\n\n{reach(ICONS)}"


def fixed() -> str:
    """The answers of the models on softmax in Edge-MoE's numbers."""
    found = tables(Results.of_parquet(STANDARD))
    return _written(*found[FIXED]) if FIXED in found else "Not measured yet."


def _written(columns: list[str], rows: list[list[Cell]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' --: |' * (len(columns) - 1)}"]
    for row in rows:
        lines.append(f"| {' | '.join(f'**{c.text}**' if c.best else c.text for c in row)} |")
    return "\n".join(lines)


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
