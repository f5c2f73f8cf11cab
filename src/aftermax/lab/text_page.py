"""The report of the text task: loss and recall against the length of the context."""

from __future__ import annotations

from rich.console import Group

from aftermax import __version__
from aftermax.lab.page import (
    TRAINING_COSTS,
    Cell,
    Page,
    Tables,
    bold_if_best,
    bytes_per_token,
    cache_table,
    cost_row,
    shared_settings,
    table,
    transformer_settings,
)
from aftermax.lab.page import terminal_table as begin_terminal_table
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
    "cache": (
        "What is held to go on from there",
        "Bytes of the decode state of one sequence, all layers together, as the states themselves "
        "count them. Keys and values grow with the context; a state of one size does not, and "
        "costs less where its curve is below theirs. Middle and right: what the bytes buy at the "
        "longest context. To the left and below, or above for recall, is better.",
    ),
    "learning_curves": ("Learning", "Training loss on text at the training length."),
    "costs": TRAINING_COSTS,
}


def intro(results: Results) -> str:
    work = results.work
    return (
        f"The same small language model, trained on the same text at {work.context}\n"
        f"tokens with each system, then read at up to {work.multiples[-1]} times that length.\n"
        f"{results.seeds} seed{'s' if results.seeds != 1 else ''}, aftermax {__version__}."
    )


def tables(results: Results) -> Tables:
    """Loss, the use of context, recall, what is held, cost."""
    multiples = results.work.multiples
    at = [f"{m}x" for m in multiples]
    first, last = multiples[0], multiples[-1]
    return {
        "Loss on the same targets (nats per token)": table(
            results, [*at, "last T only"],
            [("loss", m, 3) for m in multiples] + [("truncated_loss", first, 3)], best=min,
        ),
        "Passkeys found": table(results, at, [("passkey", m, 2) for m in multiples]),
        "Associative recall (MQAR) answers found": table(
            results, at, [("mqar", m, 2) for m in multiples]
        ),
        "Effective number of keys": table(
            results, at, [("effective_keys", m, 1) for m in multiples], best=None
        ),
        **cache_table(results),
        "Cost": (
            ["system", "learning rate", "training speed, ratio (range)", "tokens/s",
             f"peak MiB at {last}x"],
            [cost_row(results, entry) for entry in results.arms],
        ),
    }  # fmt: skip


def settings(results: Results) -> dict[str, str]:
    work, data, said = results.work, results.data, shared_settings(results)
    size, norms = transformer_settings(results)
    turning = round(RoPE.for_length(work.context).fraction * (work.width // work.heads // 2))
    return {
        "command": said["command"],
        "text": f"{data['name']}, {data['tokens'] / 1e6:.1f} million tokens ({work.tokenizer}), "
        f"digest {data['digest']}",
        "model": f"{size}; SwiGLU, RMSNorm, tied embeddings, {norms}",
        "positions": f"{work.positions} where neither name nor formula says else; p-RoPE turns the "
        f"{turning} fastest of {work.width // work.heads // 2} frequencies",
        "training": f"{work.steps} steps of {work.batch} x {work.context} tokens, "
        f"{work.recall_share:.0%} of a batch recall tasks; AdamW, warm-up, cosine",
        "learning rate": said["learning rate"],
        "seeds": said["seeds"],
        "diverged": said["diverged"],
        "scored": f"{work.windows} held-out windows, the last {work.targets} tokens of each; "
        f"{work.windows} recall problems of each kind and length",
        "machine": said["machine"],
    }


def terminal_table(results: Results) -> Group:
    """Loss and what is held at the longest context, then recall and speed."""
    multiples, last = results.work.multiples, results.work.multiples[-1]
    title, names = "loss (nats per token)", [f"{m}x" for m in multiples]
    held: list[list[Cell]] = []
    if results.lengths_of("cache_bytes"):
        held = [bytes_per_token(results, last)]
        title, names = f"{title}, decode state (bytes per token)", [*names, f"state {last}x"]
    loss = begin_terminal_table(title, names)
    lows = [
        min(s.mean for e in results.arms if (s := results.at(e.name, "loss", m))) for m in multiples
    ]
    for i, entry in enumerate(results.arms):
        cells = [bold_if_best(column[i]) for column in held]
        losses = []
        for m, low in zip(multiples, lows, strict=True):
            spread = results.at(entry.name, "loss", m)
            text = "–" if spread is None else f"{spread.mean:.2f}"
            losses.append(f"[bold]{text}[/bold]" if spread and spread.mean == low else text)
        loss.add_row(entry.name, *losses, *cells)

    names = [*(f"{m}x" for m in multiples), "kv 1x", f"kv {last}x", "speed"]
    recall = begin_terminal_table(
        "passkeys found (%), key-value answers (%), training speed", names
    )
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


PAGE = Page(
    question="Which attention keeps its loss when the context grows?",
    intro=intro,
    captions=CAPTIONS,
    tables=tables,
    settings=settings,
    terminal=terminal_table,
    claims="what its paper says of length",
)
