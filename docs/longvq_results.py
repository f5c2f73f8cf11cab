"""The results of `benchmarks/longvq.py` (docs/results/longvq.json) as tables and a figure."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from aftermax.lab import plots
from aftermax.lab.results import Spread, spread

LONGVQ = Path(__file__).parent / "results" / "longvq.json"
CASES = {
    "even": ("codes used alike", "o"),
    "random": ("random directions", "s"),
    "followed": ("the same, codes that followed them", "^"),
}
COLOURS = {16: "#D55E00", 64: "#0072B2", 256: "#009E73"}


def _section(name: str) -> list[dict]:
    return json.loads(LONGVQ.read_text())[name]


def _recall(codes: int, pairs: int, case: str) -> Spread:
    lines = [x for x in _section("recall") if (x["codes"], x["pairs"]) == (codes, pairs)]
    return _over_seeds({line["seed"]: line[case] for line in lines})


def _over_seeds(found: dict[int, float]) -> Spread:
    over = spread(found)
    assert over is not None
    return over


def _axes() -> tuple[list[int], list[int]]:
    lines = _section("recall")
    return sorted({x["codes"] for x in lines}), sorted({x["pairs"] for x in lines})


def longvq_recall() -> str:
    """Recall beyond the window beside the prediction, mean and deviation over the seeds."""
    all_codes, all_pairs = _axes()
    heads = " | ".join(f"M = {pairs}" for pairs in all_pairs)
    lines = [f"| S | | {heads} |", f"| --: | --- |{' --: |' * len(all_pairs)}"]
    for codes in all_codes:
        predicted = [f"{(1 - 1 / codes) ** (pairs - 1):.3f}" for pairs in all_pairs]
        lines.append(f"| {codes} | (1 − 1/S)^(M−1) | {' | '.join(predicted)} |")
        for case, (title, _) in CASES.items():
            cells = [_recall(codes, pairs, case).text(3) for pairs in all_pairs]
            lines.append(f"| | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def longvq_largest_gap() -> str:
    """How far the means are from the prediction."""
    all_codes, all_pairs = _axes()
    gaps = {
        (abs(_recall(codes, pairs, case).mean - (1 - 1 / codes) ** (pairs - 1)), codes, pairs)
        for codes in all_codes
        for pairs in all_pairs
        for case in CASES
    }
    worst, codes, pairs = max(gaps)
    seeds = len({line["seed"] for line in _section("recall")})
    blunt, sharp = (_recall(64, 64, case).mean for case in ("blunt", "random"))
    return (
        f"The largest difference of a mean over {seeds} seeds from the prediction is {worst:.3f} "
        f"(S = {codes}, M = {pairs}). With scores of 400 cos(q, C) in place of a million, where a "
        f"query reads codes beside its own, a share of {blunt:.2f} of 64 pairs comes back from 64 "
        f"codes in place of {sharp:.2f}."
    )


def longvq_time() -> str:
    """Microseconds a token."""
    lines = [
        "| T | forward | with the backward pass | softmax kernel, forward | softmax / forward |",
        "| --: | --: | --: | --: | --: |",
    ]
    for line in _section("time"):
        softmax = ratio = "–"
        if "softmax" in line:
            r = line["softmax_over_forward"]
            softmax = f"{line['softmax']:.1f}"
            ratio = f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
        cells = f"{line['forward']:.1f} | {line['backward']:.1f} | {softmax} | {ratio}"
        lines.append(f"| {line['tokens'] // 1024}K | {cells} |")
    exponents = {line["of"]: line["exponent"] for line in _section("exponents")}
    lines.append("")
    lines.append(
        f"Over these lengths the time grows as T^{exponents['forward']:.2f} forward and "
        f"T^{exponents['backward']:.2f} with the backward pass."
    )
    return "\n".join(lines)


def longvq_state() -> str:
    """Bytes that are kept of one sequence by a layer."""
    lines = ["| tokens read | LongVQ | keys and values |", "| --: | --: | --: |"]
    for line in _section("state"):
        lines.append(f"| {line['tokens']:,} | {line['longvq']:,} | {line['softmax']:,} |")
    return "\n".join(lines)


def longvq_perplexity() -> str:
    """Perplexity of codebooks of 64 codes, with and without what is ours."""
    of = {kind: [x for x in _section("perplexity") if x["keys"] == kind] for kind in _kinds()}
    wandering, trained = of["wandering"], of["trained"]
    lines = [
        "| codebook | wandering keys: perplexity | a trained layer: perplexity | its loss |",
        "| --- | --: | --: | --: |",
    ]
    for arm in wandering[0]["perplexity"]:
        cells = (
            _over_seeds({x["seed"]: x["perplexity"][arm] for x in wandering}).text(1),
            _over_seeds({x["seed"]: x["perplexity"][arm] for x in trained}).text(1),
            _over_seeds({x["seed"]: x["loss"][arm] for x in trained}).text(3),
        )
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines.append("")
    lines.append(f"{len(wandering)} seeds on the left, {len(trained)} on the right; S = 64.")
    return "\n".join(lines)


def _kinds() -> list[str]:
    return ["wandering", "trained"]


def longvq_recall_figure() -> Figure:
    """Measured against predicted recall, over the number of pairs."""
    figure, axis = plt.subplots(figsize=(7.2, 4.6))
    all_codes, all_pairs = _axes()
    fine = [2 ** (1 + i / 20) for i in range(121)]
    for codes in all_codes:
        own = COLOURS[codes]
        axis.plot(fine, [(1 - 1 / codes) ** (m - 1) for m in fine], color=own, linewidth=1.2)
        for shift, (case, (_, marker)) in enumerate(CASES.items()):
            found = [_recall(codes, pairs, case) for pairs in all_pairs]
            axis.errorbar(
                [pairs * 1.06 ** (shift - 1) for pairs in all_pairs],
                [one.mean for one in found],
                [one.sd for one in found],
                color=own,
                marker=marker,
                markersize=5,
                markerfacecolor="white" if shift else own,
                linestyle="none",
                linewidth=1,
            )
        axis.annotate(
            f"S = {codes}", (all_pairs[-1], (1 - 1 / codes) ** (all_pairs[-1] - 1)), (12, -3),
            textcoords="offset points", color=own, fontsize=9,
        )  # fmt: skip
    axis.plot([], [], color="#444444", linewidth=1.2, label="predicted, (1 − 1/S)^(M−1)")
    for shift, (title, marker) in enumerate(CASES.values()):
        axis.plot(
            [], [], color="#444444", marker=marker, linestyle="none", markersize=5,
            markerfacecolor="white" if shift else "#444444", label=title,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks(all_pairs, [str(pairs) for pairs in all_pairs])
    axis.minorticks_off()
    axis.set_xlim(1.7, 210)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("pairs M stored beyond the window")
    axis.set_ylabel("pairs whose value comes back (share)")
    axis.set_title("What S codes remember of M random keys")
    plots.legend_below(figure, axis)
    return figure
