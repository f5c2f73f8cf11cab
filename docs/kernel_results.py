"""The results of the kernels' benchmarks as tables and a figure: `docs/results/rows.json`."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

ROWS = Path(__file__).parent / "results" / "rows.json"


def row_targets(isas: tuple[str, ...]) -> str:
    """What was asked of the row kernels beside what they do."""
    targets = json.loads(ROWS.read_text())["targets"]
    runs = [r for r in dict.fromkeys((t["isa"], t["threads"]) for t in targets) if r[0] in isas]
    heads = [f"{isa}, {n} thread{'s' * (n > 1)}" for isa, n in runs]
    lines = [
        f"| work | against | asked | {' | '.join(heads)} |",
        f"| --- | --- | --: |{' --: |' * len(runs)}",
    ]
    for work in dict.fromkeys(t["work"] for t in targets):
        of_work = {(t["isa"], t["threads"]): t for t in targets if t["work"] == work}
        first = of_work[runs[0]]
        asked = ", ".join(dict.fromkeys(f"{of_work[run]['asked']:g}x" for run in runs))
        if first.get("bound_asked"):
            asked += f"; {first['bound_asked']} of the bound"
        cells = " | ".join(_row_cell(of_work[run]) for run in runs)
        lines.append(f"| {work} | `{first['against']}` | {asked} | {cells} |")
    return "\n".join(lines)


def _row_cell(target: dict) -> str:
    text = f"{target['ratio']:.2f}x"
    if "bound" in target:
        text += f" ({target['bound']['ratio']:.2f} of the bound)"
    return text


def row_algorithms() -> str:
    """Nanoseconds an element by algorithm and row length."""
    lengths = json.loads(ROWS.read_text())["lengths"]
    lines = []
    for isa, threads in dict.fromkeys((r["isa"], r["threads"]) for r in lengths):
        of_run = [r for r in lengths if (r["isa"], r["threads"]) == (isa, threads)]
        titles = {"aftermax": "by default"}
        names = list(of_run[0]["ns"])
        lines += [
            "",
            f"{isa}, {threads} thread{'s' * (threads > 1)}:",
            "",
            f"| row | {' | '.join(titles.get(n, n) for n in names)} |",
            f"| --- |{' --: |' * len(names)}",
        ]
        for row in of_run[6::2]:  # below 256 KB a call costs more than its row
            best = min(row["ns"][n] for n in names if n != "bound")
            cells = (
                f"**{row['ns'][n]:.3f}**" if row["ns"][n] == best else f"{row['ns'][n]:.3f}"
                for n in names
            )
            lines.append(f"| {_bytes(4 * row['length'])} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])


def row_memory() -> str:
    lines = ["| way | extra memory |", "| --- | --: |"]
    for line in json.loads(ROWS.read_text())["memory"]:
        lines.append(f"| `{line['name']}` | {line['mebibytes']:,.0f} MiB |")
    return "\n".join(lines)


def row_machine() -> str:
    m = json.loads(ROWS.read_text())["machine"]
    return (
        f"{m['processor']}, {m['cores']} cores, {m['isa']}, {m['system']}, Python {m['python']},"
        f" torch {m['torch']}."
    )


def row_lengths() -> Figure:
    """Speed over the length of one row, with the bound of the memory."""
    lengths = json.loads(ROWS.read_text())["lengths"]
    isa = lengths[0]["isa"]
    of_isa = [r for r in lengths if r["isa"] == isa]
    threads = sorted({r["threads"] for r in of_isa})
    figure, axes = plt.subplots(1, len(threads), figsize=(10, 4), sharey=True)
    looks = {
        "bound": {"color": "black", "linestyle": "--", "linewidth": 1},
        "aftermax": {"color": "black", "linewidth": 2.6},
        "torch": {"color": "#888888", "linewidth": 2.6},
    }
    titles = {
        "bound": "bound: read + streamed copy",
        "aftermax": "aftermax, by default",
        "torch": "torch.softmax(out=)",
    }
    for ax, count in zip(axes, threads, strict=True):
        of_run = [r for r in of_isa if r["threads"] == count]
        kilobytes = [4 * r["length"] / 1024 for r in of_run]
        for name in of_run[0]["ns"]:
            speed = [1 / r["ns"][name] for r in of_run]
            ax.plot(
                kilobytes, speed, label=titles.get(name, name), **looks.get(name, {"alpha": 0.8})
            )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ticks = [4**k for k in range(1, 11)]
        ax.set_xticks(ticks, [_bytes(1024 * t) for t in ticks], rotation=45)
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        ax.set_title(f"softmax of one row, {count} thread{'s' * (count > 1)}, {isa}")
        ax.set_xlabel("row, float32")
    axes[0].set_ylabel("billion elements a second")
    axes[-1].legend()
    return figure


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:g} {unit}"
        count /= 1024
    return f"{count:g} GB"
