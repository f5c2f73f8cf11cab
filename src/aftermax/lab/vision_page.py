"""The report of the vision task: accuracy and loss on a test split."""

from __future__ import annotations

from rich.table import Table

from aftermax import __version__
from aftermax.lab.page import (
    Page,
    Tables,
    bold_if_best,
    cost_row,
    shared_settings,
    table,
    transformer_settings,
)
from aftermax.lab.page import terminal_table as begin_terminal_table
from aftermax.lab.results import Results
from aftermax.lab.vision import MEMORY_BATCHES, told

CAPTIONS = {
    "held_out": (
        "Accuracy and loss on images never seen",
        "The test split has no part in training nor in the choice of learning rates, and is the "
        "same for every run. Marks: the mean over seeds; whiskers: one standard deviation; dots "
        "above: each seed. The spread is that of training again on the same images; another test "
        "split would move all systems too. The loss tells systems apart sooner than the accuracy, "
        "which moves in steps of one image.",
    ),
    "learning_curves": ("Learning", "Loss on the batches of training."),
    "costs": (
        "What it costs",
        "Speed is measured side by side in one process, systems interleaved; bars end at the "
        "median, whiskers at the lowest and highest round. Memory is the peak that the forward and "
        "backward pass of many images adds.",
    ),
}


def intro(results: Results) -> str:
    images, work = results.data["images"], results.work
    return (
        f"The same small vision transformer, trained with each system on the same {images['train']}"
        f" images of {results.data['classes']} classes, {work.context} patches each, and judged on "
        f"{images['test']} others. "
        f"{results.seeds} seed{'s' if results.seeds != 1 else ''}, aftermax {__version__}."
    )


def tables(results: Results) -> Tables:
    """Both splits, how sharp rows are, cost."""
    return {
        "Images never seen (the test split)": table(
            results, ["accuracy (%)", "loss (nats per image)"],
            [("accuracy", 1, 2), ("loss", 1, 3)], best=[max, min], factors=[100, 1],
        ),
        "As many of the images that were learned": table(
            results, ["accuracy (%)", "loss (nats per image)"],
            [("trained_accuracy", 1, 2), ("trained_loss", 1, 3)], best=None, factors=[100, 1],
        ),
        f"How sharp rows of {results.work.context} patches are": table(
            results, ["effective number of keys", "entropy (nats)"],
            [("effective_keys", 1, 1), ("entropy", 1, 2)], best=None,
        ),
        "Cost": (
            ["system", "learning rate", "training speed, ratio (range)", "images/s",
             f"peak MiB of {MEMORY_BATCHES * results.work.batch} images", "parameters"],
            [cost_row(results, e, results.work.context, counted=True) for e in results.arms],
        ),
    }  # fmt: skip


def settings(results: Results) -> dict[str, str]:
    work, said = results.work, shared_settings(results)
    size, norms = transformer_settings(results)
    images = told(results.data).removeprefix("images: ")
    moved = f"moved by up to {work.shift} pixels" if work.shift else "as they are"
    return {
        "command": said["command"],
        "images": f"{images}, split by seed {work.split}, digest {results.data['digest']}",
        "model": f"{size}; patches of {work.patch} x {work.patch}, learned places, "
        f"SwiGLU, RMSNorm, mean pooling, {norms}",
        "training": f"{work.steps} steps of {work.batch} images, {moved}; AdamW, warm-up, cosine",
        "learning rate": said["learning rate"],
        "seeds": said["seeds"],
        "diverged": said["diverged"],
        "scored": f"all {results.data['images']['test']} images of the test split",
        "machine": said["machine"],
    }


def terminal_table(results: Results) -> Table:
    """Accuracy, loss and speed."""
    shown = begin_terminal_table("test split", ["accuracy (%)", "loss (nats per image)", "speed"])
    _, rows = tables(results)["Images never seen (the test split)"]
    for entry, (_, *cells) in zip(results.arms, rows, strict=True):
        ratio = results.cost(entry.name, "speed_ratio")
        speed = "–" if ratio is None else f"{ratio:.2f}"
        shown.add_row(entry.name, *map(bold_if_best, cells), speed)
    return shown


PAGE = Page(
    question="Which attention tells images apart?",
    intro=intro,
    captions=CAPTIONS,
    tables=tables,
    settings=settings,
    terminal=terminal_table,
)
