"""The results of the kernels' benchmarks as tables and figures.

`docs/results/rows.json` is of `benchmarks/rows.py`, `attention.json` of `benchmarks/attention.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from aftermax import CATALOGUE

ROWS = Path(__file__).parent / "results" / "rows.json"
ATTENTION = ROWS.with_name("attention.json")
OURS, THEIRS, LINE = "#0072B2", "#D55E00", "#222222"

# ---- rows --------------------------------------------------------------------------------------


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


def machine(file: Path) -> str:
    m = json.loads(file.read_text())["machine"]
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


# ---- attention ---------------------------------------------------------------------------------


def attention_summary() -> str:
    """The middle length, the short one and the decoder's step, for the README."""
    at_large = ("D = 128", "32 heads")
    return _targets_table(
        target
        for target in _attention("targets")
        if target["tokens"] not in (1024, 16384) and not any(x in target["work"] for x in at_large)
    )


def attention_targets() -> str:
    """What was asked of attention beside what it does."""
    return _targets_table(_attention("targets"))


def _targets_table(chosen: Iterable[dict]) -> str:
    targets = list(chosen)
    runs = list(dict.fromkeys((t["isa"], t["threads"]) for t in targets))
    heads = [f"{isa}, {n} thread{'s' * (n > 1)} | ours, theirs" for isa, n in runs]
    lines = [
        f"| work | T | against | asked | {' | '.join(heads)} |",
        f"| --- | --: | --- | --: |{' --: | --: |' * len(runs)}",
    ]
    for work, tokens in dict.fromkeys((t["work"], t["tokens"]) for t in targets):
        of_work = {
            (t["isa"], t["threads"]): t
            for t in targets
            if (t["work"], t["tokens"]) == (work, tokens)
        }
        first = next(iter(of_work.values()))
        asked = "" if first["asked"] is None else f"{first['asked']:.3g}x"
        if "bound" in first:
            asked += f"; {first['bound_asked']} of the memory"
        cells = " | ".join(_attention_cells(of_work.get(run)) for run in runs)
        lines.append(f"| {work} | {tokens} | {first['against']} | {asked} | {cells} |")
    return "\n".join(lines)


def _attention_cells(target: dict | None) -> str:
    """The ratio, in italics where it misses what was asked, and the shares of the peak."""
    if target is None:
        return "– | –"
    text = f"{target['ratio']:.2f}x"
    missed = target["asked"] is not None and target["ratio"] < target["asked"]
    if "bound" in target:
        shares = f"{target['bound']['ratio']:.2f} of the memory"
        shares = f"*{shares}*" if target["bound"]["ratio"] < target["bound_asked"] else shares
    else:
        both = target["of_peak"]["ratio"], target["against_of_peak"]["ratio"]
        shares = "{:.2f}, {:.2f}".format(*both)
    return f"{f'*{text}*' if missed else text} | {shares}"


def attention_products() -> str:
    """Rates of the products by themselves, beside whole attentions."""
    products = _attention("products")
    run = products[0]["isa"], products[0]["threads"]
    products = [p for p in products if (p["isa"], p["threads"]) == run]
    shapes = list(dict.fromkeys(p["product"] for p in products))
    lines = [
        f"| GFLOP/s (share of the float32 peak) | {' | '.join(shapes)} |",
        f"| --- |{' --: |' * len(shapes)}",
    ]
    for way in dict.fromkeys(p["way"] for p in products):
        of_way = {p["product"]: p for p in products if p["way"] == way}
        cells = (f"{p['gigaflops']:.0f} ({p['of_peak']['ratio']:.2f})" for p in of_way.values())
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def attention_memory_table() -> str:
    """Extra memory at the longest length that the eager code can do."""
    took = {(m["way"], m["system"], m["tokens"]): m["mebibytes"] for m in _attention("memory")}
    longest = max(tokens for way, _, tokens in took if way == "eager")
    lines = [
        f"| T = {longest} | aftermax | SDPA | eager | eager / aftermax |",
        "| --- | --: | --: | --: | --: |",
    ]
    for system in dict.fromkeys(system for _, system, _ in took):
        ours, theirs, eager = (
            took.get((way, system, longest)) for way in ("aftermax", "SDPA", "eager")
        )
        cells = ("–" if m is None else f"{m:,.0f} MiB" for m in (ours, theirs, eager))
        ratio = "–" if ours is None or eager is None else f"{eager / ours:.0f}"
        lines.append(f"| {system} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def attention_lengths() -> Figure:
    """Speed over T of every system, as a ratio to SDPA: ours, FlexAttention's, and eager code."""
    lengths = _attention("lengths")
    systems = [e for e in CATALOGUE if any(r["system"] == e.name for r in lengths)]
    columns = 5
    rows = len(systems) // columns + 1  # a place is left for the legend
    figure, axes = plt.subplots(
        rows, columns, figsize=(13, 2.6 * rows), sharex=True, sharey=True, squeeze=False
    )
    looks = {
        "aftermax": {"color": OURS, "marker": "o", "linewidth": 2},
        "FlexAttention": {"color": THEIRS, "marker": "s"},
        "eager": {"color": "#777777", "marker": "^"},
    }
    tokens = sorted({r["tokens"] for r in lengths})
    for ax, entry in zip(axes.flat, systems, strict=False):
        ax.axhline(1, color=LINE, linewidth=1, label="SDPA (softmax)")
        for way, look in looks.items():
            for backward in (False, True):
                curve = [
                    (r["tokens"], r["over_sdpa"]["ratio"])
                    for r in lengths
                    if (r["way"], r["system"], r["backward"]) == (way, entry.name, backward)
                ]
                name = f"{way}, forward{' and backward' * backward}"
                dashes = {"linestyle": "--", "markerfacecolor": "white"} if backward else {}
                if curve:
                    ax.plot(*zip(*curve, strict=True), label=name, **look, **dashes)
        ax.set_title(entry.title, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xticks(tokens, [f"{t // 1024}K" if t >= 1024 else f"{t}" for t in tokens])
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    for ax in axes.flat[len(systems) :]:
        ax.set_axis_off()
    for row in axes:
        row[0].set_ylabel("speed over SDPA")
    named: dict = {}
    for ax in axes.flat[: len(systems)]:
        handles, labels = ax.get_legend_handles_labels()
        named = named | dict(zip(labels, handles, strict=True))
    axes.flat[-1].legend(named.values(), named.keys(), loc="center", fontsize=8)
    return figure


def attention_memory() -> Figure:
    """Peak of extra memory over T, forward and backward."""
    lines = _attention("memory")
    figure, ax = plt.subplots(figsize=(8, 4.4))
    colours = {"softmax": LINE, "lssa": "#E69F00", "lssar": "#009E73"}
    dashes = {"aftermax": "-", "SDPA": "--", "eager": ":"}
    for way, system in dict.fromkeys((m["way"], m["system"]) for m in lines):
        curve = [
            (m["tokens"], m["mebibytes"]) for m in lines if (m["way"], m["system"]) == (way, system)
        ]
        look = {"color": colours[system], "linestyle": dashes[way], "marker": "o", "markersize": 4}
        ax.plot(*zip(*curve, strict=True), label=f"{way}, {system}", **look)
    tokens = sorted({m["tokens"] for m in lines})
    needed = [4 * 8 * 64 * 4 * t / 2**20 for t in tokens]  # four tensors of 8 heads of 64 floats
    ax.plot(tokens, needed, color="#BBBBBB", linewidth=4, zorder=0, label="result and gradients")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(tokens, [f"{t:,}" for t in tokens])
    ax.yaxis.set_major_formatter(lambda v, _: _bytes(v * 2**20))
    ax.set_xlabel("T")
    ax.set_ylabel("peak above the inputs")
    ax.set_title("Extra memory, forward and backward, causal, 8 heads of 64, float32", fontsize=10)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, handlelength=4)
    return figure


def _attention(section: str) -> list[dict]:
    return json.loads(ATTENTION.read_text())[section]


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:g} {unit}"
        count /= 1024
    return f"{count:g} GB"
