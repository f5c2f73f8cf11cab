"""The results of `benchmarks/soft_topk.py` (docs/results/soft_topk.json) as tables."""

from __future__ import annotations

import json
from pathlib import Path

SOFT_TOPK = Path(__file__).parent / "results" / "soft_topk.json"
OURS = "aftermax"


def _lines(section: str) -> list[dict]:
    return json.loads(SOFT_TOPK.read_text())[section]


def soft_topk_operators() -> str:
    """Soft top-k against other operators: a column for each kind of scores and k."""
    lines = _lines("operators")
    cases = list(dict.fromkeys((line["scores"], line["k"]) for line in lines))
    heads = " | ".join(f"{scores}, k = {k}" for scores, k in cases)
    parts = [f"| work | way | {heads} |", f"| --- | --- |{' --: |' * len(cases)}"]
    at = {(x["work"], x["way"], x["scores"], x["k"]): x for x in lines}
    for work, way in dict.fromkeys((line["work"], line["way"]) for line in lines):
        cells = []
        for case in cases:
            line = at.get((work, way, *case))
            if line is None:
                cells.append("–")
            elif way == OURS:
                cells.append(f"{line['ms_a_row']:.2f} ms a row")
            else:
                cells.append(f"{line['ratio']:.1f}x ({line['low']:.1f} to {line['high']:.1f})")
        parts.append(f"| {work} | {way} | {' | '.join(cells)} |")
    return "\n".join(parts)


def soft_topk_lengths() -> str:
    parts = [
        "| n | scores | k | passes | ms | ms of torch.sort |",
        "| --: | --- | --: | --: | --: | --: |",
    ]
    for line in _lines("lengths"):
        parts.append(
            f"| {line['labels']:,} | {line['scores']} | {line['k']:,} | {line['passes']} |"
            f" {line['ms']:.2f} | {line['sort_ms']:.2f} |"
        )
    return "\n".join(parts)


def label_losses() -> str:
    lines = _lines("losses")
    rows, labels = lines[0]["rows"], lines[0]["labels"]
    whole = 4 * rows * labels / 2**20
    parts = [
        f"| {rows} x {labels:,} scores ({whole:.0f} MiB), forward and backward | ms |"
        " times the first | MiB at the peak |",
        "| --- | --: | --: | --: |",
    ]
    for line in lines:
        parts.append(
            f"| {line['way']} | {line['ms']:.0f} | {line['ratio']:.2f} | {line['peak_mib']:.0f} |"
        )
    return "\n".join(parts)


def label_cache() -> str:
    parts = ["| step | seconds | times plain | MiB at the peak |", "| --- | --: | --: | --: |"]
    for line in _lines("cache"):
        parts.append(
            f"| {line['way']} | {line['seconds']:.2f} | {line['ratio']:.2f} |"
            f" {line['peak_mib']:.0f} |"
        )
    return "\n".join(parts)
