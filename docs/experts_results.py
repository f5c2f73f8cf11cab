"""The results of `benchmarks/experts.py` and `benchmarks/fixed_point.py` as tables."""

from __future__ import annotations

import json
import math
from pathlib import Path

SPEED = Path(__file__).parent / "results" / "experts_speed.json"
FIXED_POINT = SPEED.with_name("fixed_point.json")
WAYS = {"forward": "forward", "both": "with backward"}
PEERS = ("grouped_mm", "loop", "dense", "token")
ASKED = 1.5
"""Times as fast as the fastest peer, at the two larger sizes."""


def _section(file: Path, name: str) -> list[dict]:
    return json.loads(file.read_text())[name]


def _ratio(r: dict) -> str:
    return f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})"


# ---- the layer -----------------------------------------------------------------------------------


def experts_speed() -> str:
    """The time of each peer over ours."""
    lines = [
        "| layer | dtype | pass | threads | grouped_mm | loop | dense | token | ours, theirs |"
    ]
    lines.append("| --- | --- | --- | --: |" + " --: |" * 5)
    for x in _section(SPEED, "speed"):
        cells = [f"{x['peers'][name]['ratio']:.2f}" for name in PEERS]
        cells[0] = _ratio(x["peers"]["grouped_mm"])
        place = PEERS.index(x["fastest"])
        missed = x["size"] != "Edge-MoE" and x["peers"][x["fastest"]]["ratio"] < ASKED
        mark = "*" if missed else "**"
        cells[place] = f"{mark}{cells[place]}{mark}"
        shares = x.get("of_bound", {}) if x["threads"] == 1 else {}
        bound = ", ".join(f"{share:.2f}" for share in shares.values()) or "–"
        lines.append(
            f"| {x['size']} | {x['dtype']} | {WAYS[x['way']]} | {x['threads']} | "
            f"{' | '.join(cells)} | {bound} |"
        )
    return "\n".join(lines)


def experts_summary() -> str:
    """The larger sizes in one line for each dtype and pass, for the README."""
    lines = ["| layer | dtype | forward, 1 thread | 2 | with backward, 1 thread | 2 |"]
    lines.append("| --- | --- |" + " --: |" * 4)
    found = {
        (x["size"], x["dtype"], x["way"], x["threads"]): x["peers"][x["fastest"]]["ratio"]
        for x in _section(SPEED, "speed")
    }
    for size, dtype in dict.fromkeys((size, dtype) for size, dtype, _, _ in found):
        cells = []
        for way in WAYS:
            for threads in (1, 2):
                share = found[size, dtype, way, threads]
                missed = size != "Edge-MoE" and share < ASKED
                cells.append(f"*{share:.2f}x*" if missed else f"{share:.2f}x")
        lines.append(f"| {size} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def experts_lengths() -> str:
    """grouped_mm's time over ours by the number of tokens."""
    found = {(x["tokens"], x["way"], x["threads"]): x for x in _section(SPEED, "lengths")}
    lines = ["| tokens | forward, 1 thread | 2 | with backward, 1 thread | 2 |"]
    lines.append("| --: |" + " --: |" * 4)
    for tokens in sorted({tokens for tokens, _, _ in found}):
        cells = [
            _ratio(found[tokens, way, threads]["peers"]["grouped_mm"])
            for way in WAYS
            for threads in (1, 2)
        ]
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def experts_kept() -> str:
    """grouped_mm's time over ours with the backward pass, where memory is kept."""
    found = {(x["size"], x["dtype"], x["threads"]): x for x in _section(SPEED, "kept")}
    lines = ["| layer | dtype | 1 thread | 2 |", "| --- | --- | --: | --: |"]
    for size, dtype in dict.fromkeys((size, dtype) for size, dtype, _ in found):
        cells = [_ratio(found[size, dtype, n]["peers"]["grouped_mm"]) for n in (1, 2)]
        lines.append(f"| {size} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def experts_bytes() -> str:
    """What each order reads."""
    lines = ["| layer | tokens | queues | token order | all experts | expert by expert | less by |"]
    lines.append("| --- | --: | --- |" + " --: |" * 4)
    for x in _section(SPEED, "bytes"):
        read = x["bytes"]
        cells = [f"{read[order] / 1e6:,.1f} MB" for order in ("token", "dense", "expert")]
        queues = f"{min(x['queues'])} to {max(x['queues'])}"
        lines.append(
            f"| {x['size']} | {x['tokens']} | {queues} | {' | '.join(cells)} | "
            f"{read['token'] / read['expert']:.1f}x |"
        )
    return "\n".join(lines)


# ---- the numbers ---------------------------------------------------------------------------------


def gelu_table() -> str:
    """Errors of the table by its step."""
    lines = ["| step | entries | law | floating point | fixed point | mean, fixed |"]
    lines.append("| --: |" + " --: |" * 5)
    for x in _section(FIXED_POINT, "gelu"):
        cells = " | ".join(f"{x[name]:.3e}" for name in ("law", "float", "fixed", "mean"))
        lines.append(f"| 2^{round(math.log2(x['step']))} | {x['entries']} | {cells} |")
    (tanh,) = _section(FIXED_POINT, "tanh")
    lines.append(f"| tanh form | – | – | {tanh['error']:.3e} | – | – |")
    return "\n".join(lines)


def fixed_softmax() -> str:
    """Errors of the one-pass softmax in Q10.22."""
    lines = [
        "| scores | deviation | error of a weight | of the sum | weights of 0 "
        "| corrected: of a weight | of the sum |"
    ]
    lines.append("| --: |" + " --: |" * 6)
    found = {
        (x["length"], x["deviation"], x["corrected"]): x for x in _section(FIXED_POINT, "softmax")
    }
    for length, deviation in dict.fromkeys((n, d) for n, d, _ in found):
        published, corrected = (found[length, deviation, c] for c in (False, True))
        lines.append(
            f"| {length} | {deviation:g} | {published['error']:.1e} | {published['sum']:.1e} | "
            f"{100 * published['zeros']:.0f}% | {corrected['error']:.1e} | {corrected['sum']:.1e} |"
        )
    return "\n".join(lines)


def equal_scores() -> str:
    """Sum and weights of rows of equal scores."""
    lines = ["| equal scores | 1 / scores | sum | weight | told | corrected: sum | weight |"]
    lines.append("| --: |" + " --: |" * 6)
    for x in _section(FIXED_POINT, "equal"):
        ours, theirs = x["corrected"], x["published"]
        told = "wrapped" if theirs["wrapped"] else "–"
        lines.append(
            f"| {x['length']} | {1 / x['length']:.6f} | {theirs['total']:g} | "
            f"{theirs['weight']:.6f} | {told} | {ours['total']:g} | {ours['weight']:.6f} |"
        )
    return "\n".join(lines)
