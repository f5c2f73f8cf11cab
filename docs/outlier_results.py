"""The comparison of outliers once more, with one learning rate for all systems."""

from __future__ import annotations

from aftermax.lab.outliers_page import models
from aftermax.lab.results import Results

MEASURES = {
    "inf norm": ("inf_norm", 1),
    "kurtosis": ("kurtosis", 1),
    "loss": ("loss", 3),
    "W8A8 adds": ("w8a8_damage", 4),
    "W4A4 adds": ("w4a4_damage", 3),
}


def one_rate(results: Results) -> str:
    """Both models in a table, at the training length."""
    (rate,) = results.work.learning_rates
    heads = " | ".join(MEASURES)
    lines = [
        f"| learning rate {rate:g} | {heads} |",
        f"| --- |{' --: |' * len(MEASURES)}",
    ]
    for own in models(results).values():
        for arm in own.arms:
            cells = []
            for measure, digits in MEASURES.values():
                spread = own.at(arm.name, measure, 1)
                cells.append("–" if spread is None else spread.text(digits))
            lines.append(f"| {arm.title} | {' | '.join(cells)} |")
    return "\n".join(lines)
