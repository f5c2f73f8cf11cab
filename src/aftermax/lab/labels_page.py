"""The report of the task of labels: what is ranked first, at what size and cost."""

from __future__ import annotations

from rich.table import Table

from aftermax import __version__
from aftermax.lab.labels import MEMORY_BATCHES, told
from aftermax.lab.page import (
    OUTPUT_COSTS,
    Cell,
    Page,
    Tables,
    cost_row,
    mean_alone,
    shared_settings,
    table,
)
from aftermax.lab.page import terminal_table as begin_terminal_table
from aftermax.lab.results import Results

SHOWN = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5", "nDCG@5", "R@10", "R@100")
QUALITY = "Labels ranked first, on the test split (%)"

CAPTIONS = {
    "rankings": (
        "What is ranked first",
        "P@1: the first label is right. PSP@5: of the first five, right ones weighted by how rare "
        "they are. R@100: of a document's labels, the share among the first hundred. Marks: the "
        "mean over seeds; whiskers: one standard deviation; dots above: each seed.",
    ),
    "costs": OUTPUT_COSTS,
}


def intro(results: Results) -> str:
    data, work = results.data, results.work
    return (
        f"The same text encoder, trained with each output layer to give documents some of "
        f"{data['labels']:,} labels, {work.steps} steps of {work.batch} documents. "
        f"{results.seeds} seed{'s' if results.seeds != 1 else ''}, aftermax {__version__}."
    )


def tables(results: Results) -> Tables:
    return {
        QUALITY: table(
            results, list(SHOWN), [(measure, 1, 1) for measure in SHOWN], factors=[100] * len(SHOWN)
        ),
        "Cost": (
            ["output layer", "learning rate", "training speed, ratio (range)", "documents/s",
             f"peak MiB of {MEMORY_BATCHES * results.work.batch} documents", "parameters",
             "of which output layer"],
            [[*cost_row(results, e, counted=True), _own(results, e.name)] for e in results.arms],
        ),
    }  # fmt: skip


def _own(results: Results, system: str) -> Cell:
    """Parameters that are there for the labels alone."""
    counted = results.at(system, "label_parameters", 1)
    return Cell("–" if counted is None else f"{counted.mean:,.0f}")


def settings(results: Results) -> dict[str, str]:
    work, said = results.work, shared_settings(results)
    return {
        "command": said["command"],
        "documents": f"{told(results.data).removeprefix('labels: ')}, "
        f"digest {results.data['digest']}",
        "model": work.told,
        "training": f"{work.steps} steps of {work.batch} documents; AdamW, warm-up, cosine; the "
        f"factored layer by plain SGD at {work.factored_rate:g} times that rate",
        "learning rate": said["learning rate"],
        "seeds": said["seeds"],
        "diverged": said["diverged"],
        "scored": f"all {results.data['documents']['test']:,} documents of the test split",
        "machine": said["machine"],
    }


def terminal_table(results: Results) -> Table:
    """The ranking, and speed."""
    names = ("P@1", "P@5", "PSP@5", "R@10", "R@100")
    shown = begin_terminal_table("test split (%)", [*names, "speed"])
    _, rows = tables(results)[QUALITY]
    places = [SHOWN.index(name) for name in names]
    for arm, (_, *cells) in zip(results.arms, rows, strict=True):
        ratio = results.cost(arm.name, "speed_ratio")
        found = [mean_alone(cells[i]) for i in places]
        shown.add_row(arm.name, *found, "–" if ratio is None else f"{ratio:.2f}")
    return shown


PAGE = Page(
    question="Which output layer finds a document's labels, among very many?",
    intro=intro,
    captions=CAPTIONS,
    tables=tables,
    settings=settings,
    terminal=terminal_table,
    claims="what its paper says",
)
