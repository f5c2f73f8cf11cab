"""The results of `benchmarks/output.py` (docs/results/output.json) as tables and a figure."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from aftermax.lab import plots
from aftermax.lab.results import Results
from aftermax.lab.words_page import epoch_seconds

OUTPUT = Path(__file__).parent / "results" / "output.json"
VOCABULARY = 793_471
"""Of the One Billion Word set: the size at which the ratios are spoken."""


def output_steps() -> str:
    """Milliseconds of a step over the number of classes, and how many times cheaper than dense."""
    lines = _lines("steps")
    sizes = sorted({line["classes"] for line in lines})
    head = " | ".join(f"{size:,}" for size in sizes)
    table = [
        f"| milliseconds a step | {head} | against autograd | against by hand | against"
        " `linear_cross_entropy` |",
        f"| --- | {'--: | ' * len(sizes)}--: | --: | --: |",
    ]
    for name in dict.fromkeys(line["name"] for line in lines):
        at = {line["classes"]: line for line in lines if line["name"] == name}
        cells = [f"{at[size]['ms']:,.1f}" if size in at else "" for size in sizes]
        cells += [_times(at[VOCABULARY], key) for key in ("dense", "by_hand", "fused")]
        table.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(table)


def output_flat() -> str:
    """The factored step alone, over the number of classes."""
    table = [
        "| classes | milliseconds a step (quartiles) | of the step at 100,000 |",
        "| --: | --: | --: |",
    ]
    for line in _lines("flat"):
        spread = f"{line['ms']:.2f} ({line['ms_low']:.2f} to {line['ms_high']:.2f})"
        ratio = f"{line['ratio']:.2f} ({line['low']:.2f} to {line['high']:.2f})"
        table.append(f"| {line['classes']:,} | {spread} | {ratio} |")
    return "\n".join(table)


def output_repairs() -> str:
    """What keeping U in condition adds."""
    table = [
        "| classes | learning rate | repairs in 1,000 steps | one repair, ms |"
        " median step, ms | mean step with repairs, ms |",
        "| --: | --: | --: | --: | --: | --: |",
    ]
    for line in _lines("repairs"):
        often = 1000 * line["repairs"] / line["steps"]
        one = f"{line['repair_ms']:,.0f}" if line["repairs"] else ""
        table.append(
            f"| {line['classes']:,} | {line['lr']} | {often:.1f} | {one} |"
            f" {line['median_ms']:.2f} | {line['mean_ms']:.2f} |"
        )
    return "\n".join(table)


def output_memory() -> str:
    """The peak of a step above what stays between steps."""
    lines = _lines("memory")
    sizes = sorted({line["classes"] for line in lines})
    head = " | ".join(f"{size:,} classes" for size in sizes)
    table = [f"| MiB above the layer | {head} |", f"| --- | {'--: | ' * len(sizes)}".rstrip()]
    for name in dict.fromkeys(line["name"] for line in lines):
        at = {line["classes"]: line["mebibytes"] for line in lines if line["name"] == name}
        table.append(f"| {name} | {' | '.join(f'{at[size]:,.0f}' for size in sizes)} |")
    return "\n".join(table)


def output_topk() -> str:
    """The best 10 of a million."""
    table = ["| rows | way | milliseconds | times faster |", "| --: | --- | --: | --: |"]
    for line in _lines("topk"):
        table.append(
            f"| {line['rows']} | {line['name']} | {line['ms']:,.0f} | {line['ratio']:.2f} |"
        )
    return "\n".join(table)


def output_drift() -> str:
    """Where float32 stands after all steps."""
    table = [
        "| loss | steps | weights from the twin's | dense float32 SGD from the twin's |"
        " gram from its weights | U U⁻¹ from 1 | repairs |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    lines = _lines("drift")
    for name in dict.fromkeys(line["loss"] for line in lines):
        of_loss = sorted((x for x in lines if x["loss"] == name), key=lambda x: x["step"])
        for line in [x for x in of_loss if x["step"] in (1000, 10_000)] + of_loss[-1:]:
            cells = [line[key] for key in ("weight", "dense", "gram", "inverse")]
            table.append(
                f"| {name} | {line['step']:,} | {' | '.join(f'{x:.1e}' for x in cells)} |"
                f" {line['repairs']:,} |"
            )
    return "\n".join(table)


def word_summary(results: Results) -> str:
    """Errors at a few k, and the time of an epoch."""
    shown = (1, 10, 100)
    lines = [
        f"| | {' | '.join(f'k = {k}' for k in shown)} | epoch, seconds |",
        f"| --- |{' --: |' * (len(shown) + 1)}",
    ]
    for arm in results.arms:
        errors = [results.at(arm.name, f"top{k}_error", 1) for k in shown]
        cells = ["–" if e is None else e.times(100).text(1) for e in errors]
        seconds = epoch_seconds(results, arm)
        cells.append("–" if seconds is None else f"{seconds:,.0f}")
        lines.append(f"| {arm.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def output_figure() -> Figure:
    """Time of a step over the number of classes, and what rounding does to the factored layer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    lines = _lines("steps")
    for place, name in enumerate(dict.fromkeys(line["name"] for line in lines)):
        own = [line for line in lines if line["name"] == name]
        look = {
            "color": plots.COLOURS[place],
            "marker": "osD^vPX"[place % 7],
            "linewidth": 2.4 if name.startswith("factored") else 1.2,
        }
        left.plot([x["classes"] for x in own], [x["ms"] for x in own], label=name, **look)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("classes")
    left.set_ylabel("milliseconds a step")
    left.set_title("The output step, 128 examples, d = 256")
    left.legend(fontsize=7.5)
    runs = _lines("drift")
    for place, (loss, lr) in enumerate(dict.fromkeys((x["loss"], x["lr"]) for x in runs)):
        own = [x for x in runs if (x["loss"], x["lr"]) == (loss, lr)]
        steps, colour = [x["step"] for x in own], plots.COLOURS[place]
        told = f"{loss}, lr {lr:g}"
        right.plot(steps, [x["weight"] for x in own], color=colour, label=f"{told}: factored")
        right.plot(
            steps, [x["dense"] for x in own], color=colour, linestyle=":", label=f"{told}: dense"
        )
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("steps in float32")
    right.set_ylabel("relative error of W against float64")
    right.set_title("Drift of W, factored and dense")
    right.legend(fontsize=7.5)
    figure.tight_layout()
    return figure


def _lines(section: str) -> list[dict]:
    return json.loads(OUTPUT.read_text())[section]


def _times(line: dict, key: str) -> str:
    ratio, low, high = (line[f"{key}_{part}"] for part in ("ratio", "low", "high"))
    digits = 0 if ratio >= 100 else 1
    return f"{ratio:,.{digits}f}x ({low:,.{digits}f} to {high:,.{digits}f})"
