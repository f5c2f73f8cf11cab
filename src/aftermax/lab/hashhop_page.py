"""The report of the task of HashHop: chains followed to their end, by their hops and the length."""

from __future__ import annotations

from rich.table import Table

from aftermax import __version__
from aftermax.lab.hashhop import told
from aftermax.lab.page import (
    TRAINING_COSTS,
    Page,
    Tables,
    bytes_per_token,
    cache_table,
    cost_row,
    mean_alone,
    shared_settings,
    table,
    transformer_settings,
)
from aftermax.lab.page import terminal_table as begin_terminal_table
from aftermax.lab.results import Results

CAPTIONS = {
    "hops": (
        "Chains followed to their end",
        "Share of the chains whose answer is right, against the length of the problem; a longer "
        "one holds more chains. The grey line is a guess among all hashes for every link. A system "
        "that is not near 100% at 1x has not learned the task in this budget, and its curve says "
        "nothing of length. Shades: one standard deviation over seeds, on the same problems.",
    ),
    "cache": (
        "What is held to go on from there",
        "Bytes of the decode state of one sequence, all layers together, as the states themselves "
        "count them; middle and right: what they buy at the longest problems.",
    ),
    "learning_curves": (
        "Learning",
        "Loss on the batches of training, whose problems are of a random size up to the training "
        "length: the curve is rough by itself.",
    ),
    "costs": TRAINING_COSTS,
}


def intro(results: Results) -> str:
    work = results.work
    hops = " or ".join(map(str, work.hops))
    return (
        f"The same small language model, trained with each system to follow chains of random "
        f"hashes over {hops} hops in up to {work.context} tokens, then asked in up to "
        f"{work.multiples[-1]} times as many. "
        f"{results.seeds} seed{'s' if results.seeds != 1 else ''}, aftermax {__version__}."
    )


def tables(results: Results) -> Tables:
    """The answers of each number of hops, the loss, what is held, cost."""
    work = results.work
    multiples = work.multiples
    at = [f"{m}x" for m in multiples]
    chains = {
        hops: ", ".join(str(work.chains(hops, length)) for length in work.lengths)
        for hops in work.hops
    }
    return {
        **{
            _title(hops, chains[hops]): table(
                results, at, [(f"hops{hops}", m, 2) for m in multiples]
            )
            for hops in work.hops
        },
        "Loss (nats per token of an answer)": table(
            results, at, [("loss", m, 3) for m in multiples], best=min
        ),
        **cache_table(results),
        "Cost": (
            ["system", "learning rate", "training speed, ratio (range)", "tokens/s",
             f"peak MiB at {multiples[-1]}x"],
            [cost_row(results, entry) for entry in results.arms],
        ),
    }  # fmt: skip


def _title(hops: int, chains: str) -> str:
    return f"Chains of {hops} hop{'s' if hops > 1 else ''} followed, of {chains} in a problem"


def settings(results: Results) -> dict[str, str]:
    work, said = results.work, shared_settings(results)
    size, norms = transformer_settings(results)
    answer = "the whole chain, link by link" if work.chain_of_thought else "the end of the chain"
    return {
        "command": said["command"],
        "problems": f"{told(results.data).removeprefix('problems: ')}; {work.hashes} hashes, an "
        f"answer is {answer}; digest {results.data['digest']}",
        "model": f"{size}; SwiGLU, RMSNorm, tied embeddings, {norms}",
        "positions": f"{work.positions} where neither name nor formula says else",
        "training": f"{work.steps} steps of {work.batch} problems of up to {work.context} tokens, "
        "more where they are shorter; AdamW, warm-up, cosine",
        "learning rate": said["learning rate"],
        "seeds": said["seeds"],
        "diverged": said["diverged"],
        "scored": f"{work.scored} problems of each number of hops and length, every chain of each",
        "machine": said["machine"],
    }


def terminal_table(results: Results) -> Table:
    """Chains followed at the training length and the longest, what is held there, speed."""
    multiples = results.work.multiples
    asked = [(hops, m) for hops in results.work.hops for m in (multiples[0], multiples[-1])]
    measures = [(f"hops{hops}", m, 0) for hops, m in dict.fromkeys(asked)]
    names = [f"{measure.removeprefix('hops')} @ {m}x" for measure, m, _ in measures]
    shown = begin_terminal_table(
        "chains followed (%) of hops @ length, decode state (bytes per token)",
        [*names, f"state {multiples[-1]}x", "speed"],
    )
    _, rows = table(results, names, measures, factors=[100] * len(measures))
    held = bytes_per_token(results, multiples[-1])
    for entry, (_, *cells), state in zip(results.arms, rows, held, strict=True):
        ratio = results.cost(entry.name, "speed_ratio")
        speed = "–" if ratio is None else f"{ratio:.2f}"
        shown.add_row(entry.name, *map(mean_alone, [*cells, state]), speed)
    return shown


PAGE = Page(
    question="Which attention follows a chain through its context?",
    intro=intro,
    captions=CAPTIONS,
    tables=tables,
    settings=settings,
    terminal=terminal_table,
)
