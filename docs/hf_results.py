"""The results of `benchmarks/hf.py`, `hf_decode.py` and `conversion.py` as tables."""

from __future__ import annotations

import json
from pathlib import Path

from aftermax import find

RESULTS = Path(__file__).parent / "results"
DOOR = RESULTS / "hf.json"
CONVERSION = RESULTS / "conversion.json"
LAB = RESULTS / "conversion_lab.json"
DECODE = RESULTS / "hf_decode.json"

SECTIONS = {"step": "training step", "prefill": "2,048 in, 1 out", "generate": "2,048 in, 64 out"}


def door() -> str:
    """How many times sdpa's time each way takes less."""
    results = json.loads(DOOR.read_text())
    names = list(dict.fromkeys(n for line in results["step"] for n in line["sdpa over"]))
    table = [
        f"| times faster than `sdpa` (quartiles) | {' | '.join(names)} |",
        f"| --- | {' | '.join('--:' for _ in names)} |",
    ]
    for section, told in SECTIONS.items():
        for line in results[section]:
            cells = [_ratio(line["sdpa over"].get(name)) for name in names]
            table.append(f"| {told}, {line['shape']}, {line['dtype']} | {' | '.join(cells)} |")
    return "\n".join(table)


def _ratio(found: dict | None) -> str:
    return "" if found is None else f"{found['ratio']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def posthoc(path: Path) -> str:
    """Softmax taken out of a trained model, nothing trained after it."""
    results = json.loads(path.read_text())
    before = results["posthoc"][0]["loss"]
    table = ["| in place of softmax | loss at 512 | at 2,048 |", "| --- | --: | --: |"]
    for line in results["posthoc"]:
        cells = [f"{x:.2f} ({x - before[n]:+.2f})" for n, x in line["loss"].items()]
        table.append(f"| {find(line['system']).title} | {' | '.join(cells)} |")
    return "\n".join(table)


def distilled(path: Path) -> str:
    """The same after each layer was taught what the old one gave."""
    results = json.loads(path.read_text())
    table = [
        "| system | layers | loss at 512: before, after | at 2,048: before, after |"
        " output missed: first step, last | learning rate |",
        "| --- | --- | --: | --: | --: | --: |",
    ]
    for line in results.get("distilled", []):
        cells = [f"{line['posthoc'][n]:.2f}, **{x:.2f}**" for n, x in line["loss"].items()]
        missed = ", ".join(f"{100 * x:.1f} %" for x in line["missed"])
        table.append(
            f"| {find(line['system']).title} | {line['layers']} | {' | '.join(cells)} |"
            f" {missed} | {line['rate']:g} |"
        )
    return "\n".join(table)


def decode() -> str:
    """Decoding from a state against decoding from all keys."""
    results = json.loads(DECODE.read_text())
    table = [
        "| key heads | after | cache: all keys, state | softmax, our door | linear, all keys |"
        " linear, state |",
        "| --: | --: | --: | --: | --: | --: |",
    ]
    for line in results["decode"]:
        sizes = [line["cache bytes"][name] / 1e6 for name in ("sdpa", "linear, a state")]
        cells = [
            _ratio(line["sdpa over"][name])
            for name in ("softmax, all keys", "linear, all keys", "linear, a state")
        ]
        table.append(
            f"| {line['kv_heads']} | {line['position']:,} | {sizes[0]:.1f} MB, {sizes[1]:.1f} MB |"
            f" {' | '.join(cells)} |"
        )
    return "\n".join(table)
