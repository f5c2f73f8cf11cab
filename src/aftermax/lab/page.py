"""What the pages of all tasks are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from aftermax.lab.results import Results
from aftermax.lab.work import AnyArm


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


Tables = dict[str, tuple[list[str], list[list[Cell]]]]
"""Title -> (columns, rows)."""


@dataclass(frozen=True)
class Page:
    """What the report of a task says; its figures are in `plots.FIGURES`."""

    question: str
    intro: Callable[[Results], str]
    captions: dict[str, tuple[str, str]]
    """Figure -> (title, caption)."""
    tables: Callable[[Results], Tables]
    settings: Callable[[Results], dict[str, str]]
    """What a reader needs to run it again."""
    terminal: Callable[[Results], RenderableType]
    """The main numbers, for the end of a run; 80 columns hold them."""
    claims: str = ""
    """Head of the column of what the papers claim; "" = no such column."""
    verdicts: str = (
        "Differences over the same seeds, mean ± half of the 95% interval of Student's t."
    )
    """How the sentences were come by."""
    cells: str = "Mean ± standard deviation over seeds. Shaded: the best mean of a column."
    """What stands in the tables."""
    fewest: int = 3
    """Seeds below which nothing is said in words."""


def table(
    results: Results,
    columns: list[str],
    cells: list[tuple[str, int, int]],
    best: Callable | list[Callable | None] | None = max,
    factors: Sequence[float] | None = None,
) -> tuple[list[str], list[list[Cell]]]:
    """A row for each system, a column for each (measure, multiple, digits).

    Args:
        best: min or max, of all columns or one for each; None marks nothing.
        factors: of each column, 1 by default.
    """
    bests = best if isinstance(best, list) else [best] * len(cells)
    scales = factors or [1.0] * len(cells)
    spreads = {e.name: [results.at(e.name, m, x) for m, x, _ in cells] for e in results.arms}
    tops = []
    for i, choose in enumerate(bests):
        known = [s.mean for row in spreads.values() if (s := row[i]) is not None]
        alike = len(set(known)) < 2  # then nothing is best
        tops.append(None if choose is None or alike else choose(known))
    rows = []
    for entry in results.arms:
        row = [Cell(entry.title)]
        for spread, (_, _, digits), top, scale in zip(
            spreads[entry.name], cells, tops, scales, strict=True
        ):
            text = "–" if spread is None else spread.times(scale).text(digits)
            row.append(Cell(text, spread is not None and spread.mean == top))
        rows.append(row)
    return ["system", *columns], rows


def cost_row(results: Results, entry: AnyArm, a_unit: int = 1, counted: bool = False) -> list[Cell]:
    """Title, learning rate, ratio of speeds, units (of so many tokens) per second, memory.

    Args:
        counted: the number of parameters as well.
    """
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
        costs = [
            f"{ratio:.2f} ({low:.2f} to {high:.2f})",
            f"{speed / a_unit:,.0f}",
            f"{memory:.0f}",
        ]
    if counted:
        parameters = results.at(entry.name, "parameters", 1)
        costs.append("–" if parameters is None else f"{parameters.mean:,.0f}")
    return [Cell(entry.title), Cell(f"{rate:g}"), *map(Cell, costs)]


def cache_table(results: Results) -> Tables:
    """The same for every seed, so without a spread; none where a store of before has no bytes."""
    multiples = results.work.multiples
    if not results.lengths_of("cache_bytes"):
        return {}
    cells = [bytes_per_token(results, m) for m in multiples]
    last = multiples[-1]
    rows = []
    for i, entry in enumerate(results.arms):
        held = results.at(entry.name, "cache_bytes", last)
        in_all = Cell("–" if held is None else f"{held.mean / 1024:,.1f}")
        rows.append([Cell(entry.title), *(column[i] for column in cells), in_all])
    columns = ["system", *(f"{m}x" for m in multiples), f"KiB in all at {last}x"]
    return {"Decode state (bytes per token held)": (columns, rows)}


def bytes_per_token(results: Results, multiple: int) -> list[Cell]:
    """A cell for each system; the least is the best."""
    found = [results.at(e.name, "cache_bytes_per_token", multiple) for e in results.arms]
    known = {s.mean for s in found if s is not None}
    least = min(known) if len(known) > 1 else None
    return [Cell("–") if s is None else Cell(f"{s.mean:,.0f}", s.mean == least) for s in found]


TRAINING_COSTS = (
    "What it costs",
    "Speed is measured side by side in one process, systems interleaved; bars end at the median, "
    "whiskers at the lowest and highest round. Memory is the peak that one step adds.",
)
"""Title and caption of the costs where attention is compared."""


OUTPUT_COSTS = (
    "What it costs",
    "Speed is that of the whole step, what is below the output layer included, measured side by "
    "side in one process, interleaved; bars end at the median, whiskers at the lowest and highest "
    "round. Memory is the peak that the forward and backward pass of some batches adds.",
)
"""Title and caption of the costs where output layers are compared."""


def bold_if_best(cell: Cell) -> str:
    """For the terminal."""
    return f"[bold]{cell.text}[/bold]" if cell.best else cell.text


def mean_alone(cell: Cell) -> str:
    """For the terminal too, whose 80 columns hold no spread."""
    return bold_if_best(Cell(cell.text.split(" ±")[0], cell.best))


def shared_settings(results: Results) -> dict[str, str]:
    """Lines that every task has."""
    work, machine = results.work, results.machine
    tried = ", ".join(f"{rate:g}" for rate in work.learning_rates)
    search = (
        f"the best of {tried}, and one beyond where the best lies at an edge, by "
        f"{work.search_steps}-step runs on {work.kept_for_tuning}"
        if len(work.learning_rates) > 1
        else f"{tried} for all, not searched"
    )
    return {
        "command": f"aftermax compare {results.preset}",
        "learning rate": search,
        "seeds": ", ".join(map(str, work.seeds)),
        "diverged": "; ".join(f"{s}, seed {n}" for s, n in results.diverged) or "no run",
        "machine": f"{machine['processor']}, {machine['cores']} cores ({machine['isa']}), "
        f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}",
    }


def transformer_settings(results: Results) -> tuple[str, str]:
    """The size of the model, and its norms."""
    work = results.work
    heads = f"{work.heads} heads of {work.width // work.heads}"
    norms = "QK-norm in the dot product systems" if work.qk_norm else "no QK-norm"
    return f"{work.layers} layers, width {work.width}, {heads}", norms


def terminal_table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("system", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
