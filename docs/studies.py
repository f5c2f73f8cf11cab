"""Studies of the linear family as tables: injectivity, and recall against the size of the state."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from aftermax.lab import injectivity
from aftermax.lab.mqar import ARMS, Study

MQAR = Path(__file__).parent / "results" / "mqar.json"


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
