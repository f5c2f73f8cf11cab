"""The report of the task of words: errors at k guesses, and what an epoch takes."""

from __future__ import annotations

from rich.table import Table

from aftermax import __version__
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
from aftermax.lab.words import MEMORY_BATCHES, told
from aftermax.lab.words_work import TOP
from aftermax.lab.work import AnyArm

CAPTIONS = {
    "top_errors": (
        "Words that are not among the first k guesses",
        "Less the error of the first output layer at the same k and seed, in points: below 0 is "
        "better than it. Marks: the mean over seeds; shades: one standard deviation.",
    ),
    "errors_and_time": (
        "What the time of an epoch buys",
        "The error after the same number of steps, against the time of a pass over the training "
        "words on one thread, measured side by side. To the left and below is better.",
    ),
    "costs": OUTPUT_COSTS,
}


def intro(results: Results) -> str:
    data, work = results.data, results.work
    return (
        f"The same small network, trained with each output layer to tell the next of "
        f"{data['classes']:,} words from the {work.window} before it, "
        f"{work.steps * work.batch / data['words']['train']:.2f} passes over the text. "
        f"{results.seeds} seed{'s' if results.seeds != 1 else ''}, aftermax {__version__}."
    )


def tables(results: Results) -> Tables:
    return {
        "Words not among the first k guesses (% of held-out words)": table(
            results, [f"k = {k}" for k in TOP], [(f"top{k}_error", 1, 2) for k in TOP],
            best=min, factors=[100] * len(TOP),
        ),
        "Cost": (
            ["output layer", "learning rate", "training speed, ratio (range)", "words/s",
             f"peak MiB of {MEMORY_BATCHES * results.work.batch} words", "parameters", "epoch (s)"],
            [[*cost_row(results, entry, counted=True), _epoch(results, entry)]
             for entry in results.arms],
        ),
    }  # fmt: skip


def epoch_seconds(results: Results, arm: AnyArm) -> float | None:
    """Of one pass over the training words, by the speed of a step."""
    speed = results.cost(arm.name, "tokens_per_second")
    return None if speed is None else results.data["words"]["train"] / speed


def _epoch(results: Results, arm: AnyArm) -> Cell:
    seconds = epoch_seconds(results, arm)
    return Cell("–" if seconds is None else f"{seconds:,.0f}")


def settings(results: Results) -> dict[str, str]:
    work, said = results.work, shared_settings(results)
    return {
        "command": said["command"],
        "text": f"{told(results.data).removeprefix('words: ')}, digest {results.data['digest']}",
        "model": f"{work.window} words of {work.embedding}, a layer of ReLU ({work.hidden}), a "
        f"linear one ({work.width}), RMSNorm, the output layer",
        "output layers": f"Z-loss with a = {work.a:g}, b = {work.b:g}; {work.samples} draws for a "
        "batch of sampled softmax",
        "training": f"{work.steps} steps of {work.batch} words; plain SGD, or AdamW at a "
        "thousandth of the learning rate where the name says so; warm-up, cosine",
        "learning rate": said["learning rate"],
        "seeds": said["seeds"],
        "diverged": said["diverged"],
        "scored": f"{min(work.scored, results.data['asked']):,} held-out words, evenly spaced",
        "machine": said["machine"],
    }


def terminal_table(results: Results) -> Table:
    """Errors and speed."""
    shown = begin_terminal_table(
        "words not among the first k guesses (%)", [*(f"k = {k}" for k in TOP), "speed"]
    )
    _, rows = tables(results)["Words not among the first k guesses (% of held-out words)"]
    for arm, (_, *cells) in zip(results.arms, rows, strict=True):
        ratio = results.cost(arm.name, "speed_ratio")
        shown.add_row(arm.name, *map(mean_alone, cells), "–" if ratio is None else f"{ratio:.1f}")
    return shown


PAGE = Page(
    question="What does an output layer for many words cost, and what does it know?",
    intro=intro,
    captions=CAPTIONS,
    tables=tables,
    settings=settings,
    terminal=terminal_table,
    claims="what its paper says",
)
