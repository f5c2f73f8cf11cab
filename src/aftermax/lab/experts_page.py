"""The report of the task of experts: answers, what they cost, and who answers."""

from __future__ import annotations

from rich.table import Table

from aftermax import __version__
from aftermax.lab.data.pictures import DENSE, EDGE
from aftermax.lab.experts import FIXED_IMAGES, IN_USE, MEMORY_BATCHES, told
from aftermax.lab.page import (
    Cell,
    Page,
    Tables,
    cost_row,
    mean_alone,
    shared_settings,
    table,
    transformer_settings,
)
from aftermax.lab.page import terminal_table as begin_terminal_table
from aftermax.lab.results import Results

CAPTIONS = {
    "answers": (
        "Answers about pictures never seen",
        "The test split has no part in training nor in the choice of learning rates, and is the "
        "same for every run. Marks: the mean over seeds; whiskers: one standard deviation; dots "
        "above: each seed. IoU: pixels that are rightly a yes, over those that are or should be.",
    ),
    "flops": (
        "Answers for their cost",
        "Active FLOPs of one image and one question, counted by formula. A model with experts has "
        "the FLOPs of what a token is sent through, and the parameters of all.",
    ),
    "use": (
        "Who answers",
        "Share of a question's choices that each expert gets on the test split, layer by layer, in "
        "the run of the first seed. An even share is 1/E. Numbers of experts mean nothing.",
    ),
    "learning_curves": (
        "Learning",
        "Loss on the batches of training, summed over the questions that a model is asked.",
    ),
    "costs": (
        "What it costs",
        "Speed of a step, which asks a model all its questions, measured side by side in one "
        "process, interleaved; bars end at the median, whiskers at the lowest and highest round. "
        "Memory is the peak that the forward and backward pass of some batches adds.",
    ),
}

ANSWERS = "Answers about pictures never seen (the test split)"
COUNTED = "What an image costs, counted"
FIXED = f"The same answers in Edge-MoE's numbers ({FIXED_IMAGES} images)"
READ = "What an image reads of its experts, counted (kB)"


def answers(results: Results) -> list[tuple[str, str]]:
    """(column, measure) of every question: what is right, and of pixels the IoU."""
    found = []
    for question in results.work.questions:
        found.append((f"{question}: right (%)", f"{question}_accuracy"))
        if question in DENSE:
            found.append((f"{question}: IoU (%)", f"{question}_iou"))
    return found


def intro(results: Results) -> str:
    images, work = results.data["images"], results.work
    asked = ", ".join(work.questions)
    return (
        f"The same {images['train']} images of {len(results.data['classes'])} classes, "
        f"{work.context} tokens each, and {len(work.questions)} questions about every one "
        f"({asked}), put to a vision transformer with experts in its odd layers and to dense "
        f"ones, and judged on "
        f"{images['test']} others. "
        f"{results.seeds} seed{'s' if results.seeds != 1 else ''}, aftermax {__version__}."
    )


def tables(results: Results) -> Tables:
    """Answers, FLOPs and bytes, what experts are used for, cost of training."""
    questions, shown = results.work.questions, answers(results)
    found = {
        ANSWERS: table(
            results, [name for name, _ in shown], [(measure, 1, 2) for _, measure in shown],
            factors=[100] * len(shown),
        ),
        "Loss on them (nats)": table(
            results, list(questions), [(f"{q}_loss", 1, 3) for q in questions], best=min
        ),
        COUNTED: table(
            results,
            [*(f"{q}: active MFLOPs" for q in questions), "parameters (M)", "weights (kB)"],
            [*((f"{q}_flops", 1, 1) for q in questions), ("parameters", 1, 3), ("bytes", 1, 0)],
            best=None, factors=[*[1e-6] * len(questions), 1e-6, 1e-3],
        ),
        READ: table(
            results,
            [f"{q}: {way}" for q in questions for way in
             ("expert by expert", "token by token", "held for it alone")],
            [(f"{q}_bytes_{way}", 1, 0) for q in questions for way in ("expert", "token", "held")],
            best=None, factors=[1e-3] * (3 * len(questions)),
        ),
        f"Experts in use (of {results.work.experts} in a layer), and shared": table(
            results,
            [*questions, "choices shared by two questions (%)", "use shared by two questions (%)"],
            [*((f"{q}_experts", 1, 1) for q in questions), ("same_choices", 1, 1),
             ("shared_use", 1, 1)],
            best=None, factors=[*[1] * len(questions), 100, 100],
        ),
        FIXED: fixed(results),
        "Cost of training": (
            ["system", "learning rate", "training speed, ratio (range)", "images/s",
             f"peak MiB of {MEMORY_BATCHES * results.work.batch} images"],
            [cost_row(results, e, results.work.context) for e in results.arms],
        ),
    }  # fmt: skip
    for title in list(found)[3:5]:  # of experts alone
        columns, rows = found[title]
        own = [row for e, row in zip(results.arms, rows, strict=True) if e.feed == "experts"]
        found[title] = (columns, own)
        if not own:
            del found[title]
    if not found[FIXED][1]:
        del found[FIXED]
    return found


def fixed(results: Results) -> tuple[list[str], list[list[Cell]]]:
    """Of the arms that have such a form: in floating point, in the published numbers, with patches
    whose weights may pass 1/2, and how many answers are the same as in floating point."""
    columns, cells = [], []
    for question in results.work.questions:
        score = "iou" if question in DENSE else "accuracy"
        told = "IoU" if question in DENSE else "right"
        columns += [
            f"{question}: {told} (%)", "fixed point", "patches <16,2>", "same answers (%)",
            "patches <16,2>",
        ]  # fmt: skip
        cells += [
            (f"{question}_{way}", 1, 2)
            for way in (
                f"float_{score}", f"fixed_{score}", f"fixed_patches_{score}", "fixed_same",
                "fixed_patches_same",
            )
        ]  # fmt: skip
    columns, rows = table(results, columns, cells, best=None, factors=[100] * len(cells))
    asked = [f"{q}_fixed_same" for q in results.work.questions]
    own = [any(results.at(e.name, m, 1) is not None for m in asked) for e in results.arms]
    return columns, [row for row, has in zip(rows, own, strict=True) if has]


def settings(results: Results) -> dict[str, str]:
    work, said, data = results.work, shared_settings(results), results.data
    size, norms = transformer_settings(results)
    families = ", ".join(f"{n} {split}" for split, n in reversed(data["families"].items()))
    turned = ", half of them mirrored" if work.mirror else ""
    return {
        "command": said["command"],
        "images": f"{told(data).removeprefix('images: ')}; of families {families}; split by seed "
        f"{work.split}, digest {data['digest']}",
        "questions": f"{', '.join(work.questions)}; a mask is where alpha is 1/2 or more, an edge "
        f"where the gradient of the brightness is {EDGE:g} or more",
        "model": f"{size}; patches of {work.patch} x {work.patch} and a class token, learned "
        f"places, LayerNorm, exact GELU, biases, MLPs of {work.hidden} widths, {norms}",
        "odd layers": f"{work.experts} experts of {work.expert_hidden} widths, the best "
        f"{work.top_k} for each token with their weights in the softmax over all; dense: an MLP of "
        f"{work.hidden} widths; wide: of {work.experts * work.expert_hidden}; large: dense, in a "
        "tower of 3/2 of the width",
        "training": f"{work.steps} steps of {work.batch} images, each asked every question of the "
        f"model, moved by up to {work.shift} pixels{turned}; AdamW, weight decay "
        f"{work.weight_decay:g}, warm-up, cosine; load balance {work.balance:g}",
        "experts in use": f"those with {IN_USE:g} of an even share of the choices, or more",
        "learning rate": said["learning rate"],
        "seeds": said["seeds"],
        "diverged": said["diverged"],
        "scored": f"all {data['images']['test']} images of the test split",
        "machine": said["machine"],
    }


def terminal_table(results: Results) -> Table:
    """Answers and active FLOPs."""
    best = {q: f"{q}_{'iou' if q in DENSE else 'accuracy'}" for q in results.work.questions}
    columns = [f"{q} {'IoU' if q in DENSE else ''} %".replace("  ", " ") for q in best]
    at_the_end = begin_terminal_table("test split", [*columns, "MFLOPs"])
    _, rows = table(
        results, columns, [(measure, 1, 1) for measure in best.values()], factors=[100] * len(best)
    )
    for entry, (_, *cells) in zip(results.arms, rows, strict=True):
        flops = results.at(entry.name, f"{entry.questions[0]}_flops", 1)
        told = "–" if flops is None else f"{flops.mean / 1e6:.1f}"
        at_the_end.add_row(entry.name, *map(mean_alone, cells), told)
    return at_the_end


PAGE = Page(
    question="Do experts, gated by task, see as much as dense layers?",
    intro=intro,
    captions=CAPTIONS,
    tables=tables,
    settings=settings,
    terminal=terminal_table,
)
