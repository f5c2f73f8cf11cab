"""What `benchmarks/closeness.py` and `benchmarks/curvature.py` found, as tables and a figure."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aftermax.lab.draw import COLOURS

CLOSENESS = Path(__file__).parent / "results" / "closeness.json"
CURVATURE = Path(__file__).parent / "results" / "curvature.json"
HEADS = {1: "one head", 2: "two heads, β and -β"}


def _results() -> dict[str, Any]:
    return json.loads(CLOSENESS.read_text())


def slopes() -> str:
    found = _results()["slopes"]
    betas = found["betas"]
    shown = [i for i, beta in enumerate(betas) if i % 2 == 0]
    head = " | ".join(f"β = {betas[i]:.3g}" for i in shown)
    lines = [f"| relative error | heads | {head} | slope |"]
    lines.append("| --- | --: |" + " --: |" * (len(shown) + 1))
    for name in ("predictions", "updates"):
        for line in found[name]:
            cells = " | ".join(f"{statistics.median(line['errors'][i]):.1e}" for i in shown)
            lines.append(f"| of the {name} | {line['heads']} | {cells} | {line['slope']:.2f} |")
    return "\n".join(lines)


def ratios() -> str:
    lines = [
        "| R | shift / step of x | shift / update of A | sharp bound R / 2 | exp(R² + log n) "
        "| distance of the softmax head to the exact update | cosine of the shifts |",
        "| --: | --: | --: | --: | --: | --: | --: |",
    ]
    for line in _results()["ratios"]:
        lines.append(
            f"| {line['radius']} | {line['step']:.3f} | {line['update']:.3f} | {line['sharp']:g} "
            f"| {line['paper']:.0e} | {line['distance']:.3f} | {line['cosine']:.4f} |"
        )
    return "\n".join(lines)


def search() -> str:
    lines = [
        "| classes | least curvature | largest curvature | largest third derivative |",
        "| --: | --: | --: | --: |",
    ]
    for line in _results()["search"]:
        lines.append(
            f"| {line['classes']} | {-abs(line['least']):.6f} | {line['largest']:.6f} "
            f"| {line['third']:.6f} |"
        )
    return "\n".join(lines)


def proof() -> str:
    lines = ["| bound | classes apart | boxes | narrowest |", "| --: | --: | --: | --: |"]
    for line in json.loads(CURVATURE.read_text())["proofs"]:
        lines.append(
            f"| {line['bound']} | {line['heavy']} | {line['boxes']} | {line['smallest']:.1e} |"
        )
    return "\n".join(lines)


def slope_figure() -> Figure:
    """Error of one and two heads over the inverse temperature."""
    found = _results()["slopes"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for ax, name, title in (
        (axes[0], "predictions", "predictions after one step from 0"),
        (axes[1], "updates", "updates of the tokens"),
    ):
        _errors(ax, found["betas"], found[name])
        ax.set_title(title)
    axes[0].set_ylabel("relative error to the step")
    return figure


def _errors(ax: Axes, betas: list[float], lines: list[dict[str, Any]]) -> None:
    for line, colour in zip(lines, COLOURS, strict=False):
        errors = np.array(line["errors"])
        ax.fill_between(betas, errors.min(1), errors.max(1), color=colour, alpha=0.2, lw=0)
        label = f"{HEADS[line['heads']]}: slope {line['slope']:.2f}"
        ax.plot(betas, np.median(errors, 1), color=colour, marker="o", ms=3, label=label)
    ax.set(xscale="log", yscale="log", xlabel="inverse temperature β")
    ax.legend()
