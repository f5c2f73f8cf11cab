"""The report: one HTML file that opens from disk, its figures inside it, its numbers in tables."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import pyplot as plt
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from aftermax import __version__
from aftermax.lab import plots
from aftermax.lab.results import Results
from aftermax.positions import RoPE

CAPTIONS = {
    "loss_and_recall": (
        "Loss, and what is recalled",
        "Left: the loss on the same held-out target tokens with ever more context before them. "
        "A curve that falls uses its context; one that rises is disturbed by it. The grey line is "
        "what the best system reaches when it is shown only the training length. Middle and right: "
        "the answer stands somewhere in the context, and is found or not. A flat loss with "
        "recall that falls is a system that forgets; a system that is not near 100% at 1x has not "
        "learned the task in this budget, and its curve says nothing of length. Shades: one "
        "standard deviation over seeds, on the same windows and problems.",
    ),
    "buckets": (
        "Where in a long window it goes wrong",
        "The loss of every token of the longest window, averaged over parts of it.",
    ),
    "diagnostics": (
        "Why: how sharp rows are",
        "Weights made to sum to one. A row that spreads over ever more keys as its context grows "
        "loses the few that matter; a row that stays sharp may have become local.",
    ),
    "learning_curves": ("Learning", "Training loss on text at the training length."),
    "costs": (
        "What it costs",
        "Speed is measured side by side in one process, systems interleaved; bars end at the "
        "median, whiskers at the lowest and highest round. Memory is the peak that one step adds.",
    ),
}


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


def write_report(results: Results, path: Path) -> None:
    """Write the HTML, and SVG and PNG of every figure in `figures/` beside it."""
    if not results.arms:
        raise ValueError("no system has a measured run: none is finished, or each diverged")
    figures = plots.draw(results)
    plots.save(figures, path.parent / "figures")
    shown = [(name, *CAPTIONS[name], _svg(figure)) for name, figure in figures.items()]
    for figure in figures.values():
        plt.close(figure)
    environment = Environment(
        loader=PackageLoader("aftermax.lab", "."), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(
        version=__version__,
        results=results,
        figures=shown,
        tables=tables(results),
        verdicts=results.verdicts(),
        settings=settings(results),
    )
    scratch = path.with_suffix(".part")
    scratch.write_text(page, encoding="utf-8")
    scratch.replace(path)


def tables(results: Results) -> dict[str, tuple[list[str], list[list[Cell]]]]:
    """Title -> (columns, rows): loss, the use of context, recall, cost."""
    multiples = results.work.multiples
    at = [f"{m}x" for m in multiples]
    first, last = multiples[0], multiples[-1]
    return {
        "Loss on the same targets (nats per token)": _table(
            results, [*at, "last T only"],
            [("loss", m, 3) for m in multiples] + [("truncated_loss", first, 3)], lowest=True,
        ),
        "Passkeys found": _table(results, at, [("passkey", m, 2) for m in multiples]),
        "Associative recall (MQAR) answers found": _table(
            results, at, [("mqar", m, 2) for m in multiples]
        ),
        "Effective number of keys": _table(
            results, at, [("effective_keys", m, 1) for m in multiples], mark=False
        ),
        "Cost": (
            ["system", "learning rate", "training speed, ratio (range)", "tokens/s",
             f"peak MiB at {last}x"],
            [_cost_row(results, entry) for entry in results.arms],
        ),
    }  # fmt: skip


def _table(results: Results, columns, cells, lowest=False, mark=True):
    rows = []
    spreads = {e.name: [results.at(e.name, m, x) for m, x, _ in cells] for e in results.arms}
    best = []
    for i in range(len(cells)):
        known = [s.mean for row in spreads.values() if (s := row[i]) is not None]
        worth = mark and len(set(known)) > 1  # nothing is best where all are alike
        best.append((min(known) if lowest else max(known)) if worth else None)
    for entry in results.arms:
        row = [Cell(entry.title)]
        for spread, (_, _, digits), top in zip(spreads[entry.name], cells, best, strict=True):
            text = "–" if spread is None else spread.text(digits)
            row.append(Cell(text, spread is not None and spread.mean == top))
        rows.append(row)
    return ["system", *columns], rows


def _cost_row(results: Results, entry) -> list[Cell]:
    rate = results.rates.get(entry.name)
    ratio, low, high, speed, memory = (
        results.cost(entry.name, measure)
        for measure in (
            "speed_ratio", "speed_ratio_low", "speed_ratio_high", "tokens_per_second",
            "peak_mebibytes",
        )
    )  # fmt: skip
    if ratio is None or speed is None or memory is None:
        costs = ["–"] * 3
    else:
        costs = [f"{ratio:.2f} ({low:.2f} to {high:.2f})", f"{speed:,.0f}", f"{memory:.0f}"]
    return [Cell(entry.title), Cell(f"{rate:g}"), *map(Cell, costs)]


def settings(results: Results) -> dict[str, str]:
    """What a reader needs to run it again."""
    work, machine, data = results.work, results.machine, results.data
    heads = f"{work.heads} heads of {work.width // work.heads}"
    size = f"{work.layers} layers, width {work.width}, {heads}"
    turning = round(RoPE.for_length(work.context).fraction * (work.width // work.heads // 2))
    norms = "QK-norm in the dot product systems" if work.qk_norm else "no QK-norm"
    tried = ", ".join(f"{rate:g}" for rate in work.learning_rates)
    search = (
        f"the best of {tried}, and one beyond where the best lies at an edge, by "
        f"{work.search_steps}-step runs on text kept for this"
        if len(work.learning_rates) > 1
        else f"{tried} for all, not searched"
    )
    return {
        "command": f"aftermax compare {results.preset}",
        "text": f"{data['name']}, {data['tokens'] / 1e6:.1f} million tokens ({work.tokenizer}), "
        f"digest {data['digest']}",
        "model": f"{size}; SwiGLU, RMSNorm, tied embeddings, {norms}",
        "positions": f"{work.positions} where a name says nothing else; p-RoPE turns the "
        f"{turning} fastest of {work.width // work.heads // 2} frequencies",
        "training": f"{work.steps} steps of {work.batch} x {work.context} tokens, "
        f"{work.recall_share:.0%} of a batch recall tasks; AdamW, warm-up, cosine",
        "learning rate": search,
        "seeds": ", ".join(map(str, work.seeds)),
        "diverged": "; ".join(f"{s}, seed {n}" for s, n in results.diverged) or "no run",
        "scored": f"{work.windows} held-out windows, the last {work.targets} tokens of each; "
        f"{work.windows} recall problems of each kind and length",
        "machine": f"{machine['processor']}, {machine['cores']} cores ({machine['isa']}), "
        f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}",
    }


def terminal_table(results: Results) -> Group:
    """The main numbers, for the end of a run: loss, then recall and speed; 80 columns hold them."""
    multiples = results.work.multiples
    loss = _terminal_table("loss (nats per token)", [f"{m}x" for m in multiples])
    lows = [
        min(s.mean for e in results.arms if (s := results.at(e.name, "loss", m))) for m in multiples
    ]
    for entry in results.arms:
        cells = []
        for m, low in zip(multiples, lows, strict=True):
            spread = results.at(entry.name, "loss", m)
            text = "–" if spread is None else f"{spread.mean:.2f}"
            cells.append(f"[bold]{text}[/bold]" if spread and spread.mean == low else text)
        loss.add_row(entry.name, *cells)

    last = multiples[-1]
    names = [*(f"{m}x" for m in multiples), "kv 1x", f"kv {last}x", "speed"]
    recall = _terminal_table("passkeys found (%), key-value answers (%), training speed", names)
    for entry in results.arms:
        asked = [("passkey", m) for m in multiples] + [("mqar", 1), ("mqar", last)]
        found = [results.at(entry.name, measure, m) for measure, m in asked]
        ratio = results.cost(entry.name, "speed_ratio")
        recall.add_row(
            entry.name,
            *("–" if s is None else f"{100 * s.mean:.0f}" for s in found),
            "–" if ratio is None else f"{ratio:.2f}",
        )
    return Group(loss, recall)


def _terminal_table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("system", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _svg(figure) -> Markup:
    """The figure as an inline element, without the XML head."""
    buffer = io.StringIO()
    with plt.style.context(plots.STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])
