"""The report of the task of outliers: what stands out, where attention rests, what 8 bits cost."""

from __future__ import annotations

import dataclasses

from rich.console import Group

from aftermax import __version__
from aftermax.lab.outliers import SEPARATORS, told
from aftermax.lab.outliers_work import MODELS
from aftermax.lab.page import (
    TRAINING_COSTS,
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
    "outliers": (
        "What stands out, and what it costs in few bits",
        "At the training length, on held-out text. Inf norm: the largest activation of a sequence, "
        "in the tensor where it is largest. Kurtosis: a mean over tensors; 3 for a normal law. "
        "Right: the loss with weights and activations in integers less the loss in float. Marks: "
        "the mean over seeds; whiskers: one standard deviation; dots above: each seed.",
    ),
    "lengths": (
        "At the training length and beyond it",
        "The loss of the same tokens with ever more context, in float; what 8 bits add to it, with "
        "ranges from the training length; and the inf norm. Shades: one standard deviation.",
    ),
    "rest": (
        "Where attention rests",
        "Share of a row's |weights| on the begin token and on separators, a mean over layers, "
        "heads and the last rows. The grey line is what equal weights would give separators.",
    ),
    "learning_curves": ("Learning", "Loss on the batches of training; the mean over seeds."),
    "costs": TRAINING_COSTS,
}


def of_model(results: Results, model: str) -> Results:
    """The systems of one of the two models alone."""
    systems = tuple(s for s in results.work.systems if s.startswith(f"{model}/"))
    if not systems:
        return dataclasses.replace(results, values={})
    return dataclasses.replace(results, work=dataclasses.replace(results.work, systems=systems))


def models(results: Results) -> dict[str, Results]:
    """The models that anything was measured of."""
    found = {model: of_model(results, model) for model in MODELS}
    return {model: own for model, own in found.items() if own.arms}


def intro(results: Results) -> str:
    work = results.work
    kinds = " and ".join(models(results))
    return (
        f"The same small {kinds}, trained with each system on the same text at {work.context} "
        f"tokens, read at up to {work.multiples[-1]} times that length, in float and in 8 bits. "
        f"{results.seeds} seed{'s' if results.seeds != 1 else ''}, aftermax {__version__}."
    )


def tables(results: Results) -> Tables:
    """Outliers, bits, lengths and rest, for each model; then the cost."""
    multiples, found = results.work.multiples, {}
    at = [f"{m}x" for m in multiples]
    for model, own in models(results).items():
        name = model.capitalize()
        made = {
            f"{name}: what stands out": table(
                own,
                ["inf norm", "of attention", "of feed-forward", "kurtosis", "largest kurtosis"],
                [("inf_norm", 1, 1), ("inf_norm_attention", 1, 1), ("inf_norm_feed", 1, 1),
                 ("kurtosis", 1, 1), ("max_kurtosis", 1, 1)], best=min,
            ),
            f"{name}: loss in float, and what integers add (nats)": table(
                own, ["loss", "W8", "W8A8", "W4A4"],
                [("loss", 1, 3), ("w8_damage", 1, 4), ("w8a8_damage", 1, 4), ("w4a4_damage", 1, 3)],
                best=min,
            ),
            f"{name}: loss in float, by length (nats)": table(
                own, at, [("loss", m, 3) for m in multiples], best=min
            ),
            f"{name}: loss in W8A8, by length (nats)": table(
                own, at, [("w8a8_loss", m, 3) for m in multiples], best=min
            ),
            f"{name}: inf norm and kurtosis, by length": table(
                own, [*(f"inf norm {a}" for a in at), *(f"kurtosis {a}" for a in at)],
                [("inf_norm", m, 1) for m in multiples] + [("kurtosis", m, 1) for m in multiples],
                best=None,
            ),
            f"{name}: where attention rests (% of a row)": table(
                own, ["begin token", "in the head that does most", "separators",
                      "with equal weights", "sum of a row"],
                [("first_mass", 1, 1), ("top_first_mass", 1, 0), ("separator_mass", 1, 1),
                 ("separator_share", 1, 1), ("row_mass", 1, 0)],
                best=None, factors=[100] * 5,
            ),
        }  # fmt: skip
        for title, (columns, rows) in made.items():
            for arm, row in zip(own.arms, rows, strict=True):
                row[0] = dataclasses.replace(row[0], text=arm.system_title)
            found[title] = (columns, rows)
    found["Cost"] = (
        ["system", "learning rate", "training speed, ratio (range)", "tokens/s",
         f"peak MiB at {multiples[-1]}x"],
        [cost_row(results, entry) for entry in results.arms],
    )  # fmt: skip
    return found


def settings(results: Results) -> dict[str, str]:
    work, data, said = results.work, results.data, shared_settings(results)
    size, norms = transformer_settings(results)
    parted = " ".join("newline" if c == "\n" else c for c in SEPARATORS)
    return {
        "command": said["command"],
        "text": f"{told(data).removeprefix('text: ')} ({parted}, the end of a document), "
        f"{work.tokenizer}, digest {data['digest']}",
        "models": f"{size}; pre-norm, SwiGLU, RMSNorm, tied embeddings, {norms} but where a name "
        "says so; a begin token before each window; the encoder sees all and is asked for "
        f"{work.masked:.0%} of the tokens (80% masked, 10% another, 10% as they are)",
        "positions": f"{work.positions} where neither name nor formula says else",
        "training": f"{work.steps} steps of {work.batch} x {work.context} tokens; AdamW, weight "
        f"decay {work.weight_decay:g}, warm-up, cosine",
        "integers": "weights symmetric, activations asymmetric, one scale for each tensor; ranges "
        f"from {work.calibration} batches of training text at the training length",
        "learning rate": said["learning rate"],
        "seeds": said["seeds"],
        "diverged": said["diverged"],
        "scored": f"{work.windows} held-out windows: the last {work.context // 2} tokens of a "
        f"decoder's, what is masked of an encoder's last {work.context - 1}",
        "machine": said["machine"],
    }


def terminal_table(results: Results) -> Group:
    """Of each model: loss, what 8 bits add, inf norm and kurtosis at the training length."""
    shown = []
    for model, own in models(results).items():
        names = ["loss", "W8A8 adds", "W4A4 adds", "inf norm", "kurtosis"]
        at_the_end = begin_terminal_table(f"{model}, at the training length", names)
        _, rows = table(
            own, names,
            [("loss", 1, 3), ("w8a8_damage", 1, 4), ("w4a4_damage", 1, 3), ("inf_norm", 1, 1),
             ("kurtosis", 1, 1)],
            best=min,
        )  # fmt: skip
        for arm, (_, *cells) in zip(own.arms, rows, strict=True):
            at_the_end.add_row(arm.name, *map(mean_alone, cells))
        shown.append(at_the_end)
    return Group(*shown)


PAGE = Page(
    question="Which attention leaves no outliers, and survives 8 bits?",
    intro=intro,
    captions=CAPTIONS,
    tables=tables,
    settings=settings,
    terminal=terminal_table,
)
