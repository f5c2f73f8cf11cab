"""Redraw the figures of README and docs, and rewrite their tables, from `docs/results`.

    aftermax compare standard
    aftermax export --to docs/results/standard.parquet
    python benchmarks/rows.py --save docs/results/rows.json
    make figures

What stands between `<!-- name -->` and `<!-- /name -->` in README.md and docs/*.md is written here;
with `--check` nothing is written, and a text that does not follow from the results is an error.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from aftermax import CATALOGUE
from aftermax.lab import plots
from aftermax.lab.report import settings, tables
from aftermax.lab.results import Results

DOCS = Path(__file__).parent
RESULTS = DOCS / "results" / "standard.parquet"
ROWS = DOCS / "results" / "rows.json"
ALIBI = "Flat loss to 16x (3.281 -> 3.270), but the needle is lost (2505.17083)."
"""Published of softmax with ALiBi, which is no entry of its own."""
PAGES = (
    DOCS.parent / "README.md",
    DOCS / "results.md",
    DOCS / "systems.md",
    DOCS / "kernels.md",
)


def loss_table(results: Results) -> str:
    """What the papers claim beside what was measured."""
    last = results.work.multiples[-1]
    passkey = f"passkey 1x, 4x, {last}x"
    lines = [
        f"| system | 1x | 4x | {last}x | last T only | {passkey} | speed | published |",
        "| --- | --: | --: | --: | --: | --: | --: | --- |",
    ]
    for entry in results.arms:
        cells = [_spread(results, entry.name, "loss", m) for m in (1, 4, last)]
        cells.append(_spread(results, entry.name, "truncated_loss", 1))
        shares = [results.at(entry.name, "passkey", m) for m in (1, 4, last)]
        cells.append(", ".join("–" if s is None else f"{100 * s.mean:.0f}%" for s in shares))
        ratio = results.cost(entry.name, "speed_ratio")
        cells.append("–" if ratio is None else f"{ratio:.2f}")
        claim = ALIBI if entry.name == "softmax/alibi" else entry.entry.claim
        lines.append(f"| {entry.title} | {' | '.join(cells)} | {claim} |")
    return "\n".join(lines)


def verdicts(results: Results) -> str:
    return "\n".join(f"- {sentence}" for sentence in results.verdicts())


def all_tables(results: Results) -> str:
    """Every table of the report, in Markdown."""
    parts = []
    for title, (columns, rows) in tables(results).items():
        head = f"| {' | '.join(columns)} |\n| --- |{' --: |' * (len(columns) - 1)}"
        body = "\n".join(
            f"| {' | '.join(f'**{c.text}**' if c.best else c.text for c in row)} |" for row in rows
        )
        parts.append(f"### {title}\n\n{head}\n{body}")
    return "\n\n".join(parts)


def settings_list(results: Results) -> str:
    return "\n".join(f"- **{key}**: {value}" for key, value in settings(results).items())


def systems_table(results: Results) -> str:
    """The catalogue with its five words and its source."""
    lines = [
        "| name | weights | score | positivity | normaliser | reweight | walk | source |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in CATALOGUE:
        link = f", [{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else ""
        words = (entry.score, entry.positivity, entry.normaliser, entry.reweight, entry.walk)
        lines.append(
            f"| `{entry.name}` | {entry.formula} | {' | '.join(words)} | {entry.paper}{link} |"
        )
    return "\n".join(lines)


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
        first, second = of_work[runs[0]], of_work[runs[1]]
        asked = f"{first['asked']:g}x"
        if second["asked"] != first["asked"]:
            asked += f", {second['asked']:g}x"
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
        names = [n for n in of_run[0]["ns"] if n != "aftermax"]
        lines += [
            "",
            f"{isa}, {threads} thread{'s' * (threads > 1)}:",
            "",
            f"| row | {' | '.join(names)} |",
            f"| --- |{' --: |' * len(names)}",
        ]
        for row in of_run[::3]:
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


BLOCKS: dict[str, Callable[[Results], str]] = {
    "row-targets": lambda _: row_targets(("avx512",)),
    "row-targets-all": lambda _: row_targets(("avx512", "avx2")),
    "row-algorithms": lambda _: row_algorithms(),
    "row-memory": lambda _: row_memory(),
    "row-machine": lambda _: row_machine(),
    "loss-table": loss_table,
    "verdicts": verdicts,
    "all-tables": all_tables,
    "settings": settings_list,
    "systems": systems_table,
}


def rewritten(text: str, results: Results) -> str:
    """The page with every marked block made anew."""
    for name, block in BLOCKS.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if marked.search(text):
            new = f"{block(results)}\n"
            text = marked.sub(lambda found, new=new: found[1] + new + found[2], text)
    return text


def _spread(results: Results, system: str, measure: str, multiple: int) -> str:
    spread = results.at(system, measure, multiple)
    return "–" if spread is None else spread.text(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    results = Results.of_parquet(RESULTS)
    for page in PAGES:
        text = page.read_text()
        new = rewritten(text, results)
        if options.check and new != text:
            raise SystemExit(f"{page.name} does not follow from {RESULTS.name}: run `make figures`")
        if not options.check:
            page.write_text(new)
    if not options.check:
        matplotlib.use("agg")
        with plt.style.context(plots.STYLE):
            ours = {"row_maps": plots.row_maps(), "row_lengths": row_lengths()}
        plots.save(ours | plots.draw(results), DOCS / "figures")


if __name__ == "__main__":
    main()
