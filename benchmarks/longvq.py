"""LongVQ: what a codebook remembers, and what it costs.

    make bench-longvq
    python benchmarks/longvq.py --save docs/results/longvq.json

Sections:
    recall      M pairs of a random key and a random value, all of them further back than the
                window, each asked for by its own key, through `VectorQuantised.step`: the share
                whose value comes back as it was. Keys that share a code are averaged, so that where
                all codes are used alike a pair is alone in its code, and comes back, with
                probability (1 - 1/S)^(M - 1); where code s is used with probability p_s, with
                sum_s p_s (1 - p_s)^(M - 1). Three cases: keys that use all codes alike (a code
                drawn, and a little noise); keys of random direction, with a codebook of random
                directions; and these with a codebook that has followed such keys (k-means and
                running means). "blunt" is the second with scores 2500 times smaller, where a query
                reads more codes than its own
    time        of a token, forward and with the backward pass, from 4K to 64K tokens, and of
                softmax on our kernels beside it: one thread, its own time
    state       bytes that are kept after so many tokens, and by keys and values
    perplexity  of a codebook that follows keys whose centres wander, with and without k-means at
                the start and re-seeding of dead codes; and of those of a small decoder in training

Contenders of `time` run in one process, interleaved, in shuffled order.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from interleaved import Record, options_parser, ratio, time_rounds
from rich.console import Console
from torch import Tensor

from aftermax import Attention, Visible, attention, auxiliary_loss
from aftermax.quantised import Codebook, LongVQAttention, VectorQuantised
from aftermax.quantised.codebook import nearest

SECTIONS = ("recall", "time", "state", "perplexity")
CAUSAL = Visible(causal=True)
CODES = (16, 64, 256)
PAIRS = (2, 4, 8, 16, 32, 64, 128)
SEEDS = tuple(range(5))
WIDTH = 64
WINDOW = 16
SEQUENCES = 64
"""That are asked at once, for each seed."""
SHARP, BLUNT = 1e6, 400.0
"""Factors of cosines. A query shall read one code, however near another is."""


# ---- recall ------------------------------------------------------------------------------------


def directions(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, WIDTH, dtype=torch.float64), dim=-1)


def followed(codes: int, batches: int = 100) -> Tensor:
    """(1, S, D): a codebook after so many batches of 4096 keys, at length 1."""
    book = Codebook(1, codes, WIDTH, dtype=torch.float64)
    for _ in range(batches):
        book.follow(directions(1, 1, 4096))
    return F.normalize(book.codes, dim=-1)


def recalled(codebook: Tensor, pairs: int, even: bool = False, scale: float = SHARP) -> float:
    """Share of pairs whose value comes back to 1 in 1000, beyond the window.

    Args:
        even: keys lie near codes that are drawn alike; else they are random directions.
    """
    system = VectorQuantised(codes=codebook.shape[1], window=WINDOW)
    key, value = directions(SEQUENCES, 1, pairs), directions(SEQUENCES, 1, pairs)
    if even:
        drawn = codebook[0][torch.randint(codebook.shape[1], (SEQUENCES, 1, pairs))]
        key = F.normalize(drawn + 0.1 * key, dim=-1)
    state = system.init_state(SEQUENCES, 1, WIDTH, WIDTH, dtype=torch.float64)
    learned = {
        "codebook": codebook,
        "window_bias": torch.zeros(1, WINDOW, dtype=torch.float64),
        "scale": scale,
    }
    _, state = system.step(key, key, value, state, CAUSAL, **learned)
    filler = directions(SEQUENCES, 1, WINDOW)
    nothing = torch.zeros(SEQUENCES, WINDOW, dtype=torch.bool)
    _, state = system.step(filler, filler, filler, state, CAUSAL, nothing, **learned)
    # codes of length 1 have the order of their distances in their products: a key reads its own
    asking = torch.zeros(SEQUENCES, pairs, dtype=torch.bool)
    out, _ = system.step(key, key, value, state, CAUSAL, asking, **learned)
    return float(((out - value).norm(dim=-1) < 1e-3).double().mean())


def usage(codebook: Tensor) -> Tensor:
    """(S,): how often a random key has each code."""
    codes = nearest(directions(1, 1, 2**17), codebook).flatten()
    return torch.bincount(codes, minlength=codebook.shape[1]) / len(codes)


def recall(record: Record, console: Console) -> None:
    for codes in CODES:
        for seed in SEEDS:
            torch.manual_seed(1000 * codes + seed)
            books = {"random": directions(1, codes), "followed": followed(codes)}
            used = {name: usage(book) for name, book in books.items()}
            for pairs in PAIRS:
                line = {"codes": codes, "pairs": pairs, "seed": seed}
                line["predicted"] = (1 - 1 / codes) ** (pairs - 1)
                line["even"] = recalled(books["random"], pairs, even=True)
                line["blunt"] = recalled(books["random"], pairs, scale=BLUNT)
                for name, book in books.items():
                    p = used[name]
                    line[name] = recalled(book, pairs)
                    line[f"{name}_by_usage"] = float((p * (1 - p) ** (pairs - 1)).sum())
                record.add("recall", line, ("codes", "pairs", "seed"))
        told = [x for x in record.lines("recall") if x["codes"] == codes]
        for pairs in PAIRS:
            here = [x for x in told if x["pairs"] == pairs]
            names = ("predicted", "even", "random", "random_by_usage", "followed", "blunt")
            means = (f"{name} {statistics.mean(x[name] for x in here):.3f}" for name in names)
            console.print(f"S = {codes}, M = {pairs}: {', '.join(means)}")


# ---- time and state ----------------------------------------------------------------------------

TOKENS = tuple(2**n for n in range(12, 17))
LONGEST_SOFTMAX = 2**14
HEADS = 2


def passes(tokens: int) -> dict[str, Callable[[], object]]:
    query, key, value = (torch.randn(1, HEADS, tokens, WIDTH) for _ in range(3))
    wanting = [x.clone().requires_grad_() for x in (query, key, value)]
    system = VectorQuantised()

    def forward() -> None:
        with torch.no_grad():
            system.attend(query, key, value, CAUSAL)

    def backward() -> None:
        torch.autograd.grad(system.attend(*wanting, CAUSAL).sum(), wanting)

    def softmax() -> None:
        with torch.no_grad():
            attention(query, key, value, is_causal=True)

    found: dict[str, Callable[[], object]] = {"forward": forward, "backward": backward}
    return found | ({"softmax": softmax} if tokens <= LONGEST_SOFTMAX else {})


def times(record: Record, console: Console, rounds: int = 7) -> None:
    torch.set_num_threads(1)
    for tokens in TOKENS:
        torch.manual_seed(0)
        seconds = time_rounds(passes(tokens), rounds, clock=time.thread_time)
        line: dict = {"tokens": tokens}
        for name, taken in seconds.items():
            line[name] = 1e6 * statistics.median(taken) / tokens
        if "softmax" in seconds:
            line["softmax_over_forward"] = ratio(seconds["softmax"], seconds["forward"])
        record.add("time", line, ("tokens",))
        console.print(line)
    for name in ("forward", "backward"):
        lines = record.lines("time")
        slope = statistics.linear_regression(
            [math.log(x["tokens"]) for x in lines],
            [math.log(x[name] * x["tokens"]) for x in lines],
        ).slope
        record.add("exponents", {"of": name, "exponent": slope}, ("of",))
        console.print(f"{name}: T^{slope:.3f} from {TOKENS[0]} to {TOKENS[-1]}")


def states(record: Record, console: Console) -> None:
    layers = {
        "longvq": LongVQAttention(128, heads=4, kv_heads=2),
        "softmax": Attention(128, heads=4, kv_heads=2),
    }
    held = {name: layer.eval().init_state(1) for name, layer in layers.items()}
    for tokens in (1, 64, 128, 1024, *TOKENS):
        line: dict = {"tokens": tokens}
        for name, layer in layers.items():
            while held[name].length < tokens:  # softmax's time is not the point
                more = min(256, tokens - held[name].length)
                x = torch.randn(1, more, 128)
                with torch.no_grad():
                    if name == "longvq":
                        _, held[name] = layer.step(x, held[name])
                    else:
                        _, key, value = layer.project(x, held[name].length)
                        held[name] = held[name].append(key, value, None)
            line[name] = held[name].bytes
        record.add("state", line, ("tokens",))
        console.print(line)


# ---- perplexity --------------------------------------------------------------------------------

ARMS = {
    "k-means, re-seeding": {},
    "k-means": {"dead": 0.0},
    "re-seeding": {"k_means_steps": 0},
    "neither": {"dead": 0.0, "k_means_steps": 0},
}


def wandering(seed: int, batches: int = 1500, centres: int = 64) -> dict[str, float]:
    """Perplexity at the end of each arm, on the same keys: clusters whose centres take a step of a
    hundredth of their length in every batch, at unit mean square."""
    found = {}
    for name, options in ARMS.items():
        torch.manual_seed(seed)
        where = torch.randn(centres, 32)
        book = Codebook(1, 64, 32, **options)
        for _ in range(batches):
            where = where + 0.01 * torch.randn_like(where)
            keys = where[torch.randint(centres, (1024,))] + 0.3 * torch.randn(1024, 32)
            book.follow(F.rms_norm(keys, (32,))[None, None])
        found[name] = float(book.diagnostics().perplexity[0])
    return found


def trained(seed: int, steps: int = 400) -> tuple[dict[str, float], dict[str, float]]:
    """Perplexity at the end, mean over layers and heads, and loss, mean over the last 50 steps, of
    two layers on tokens of a fixed chain (each drawn by the one before), 8 windows of 128 a step.
    """
    chain = torch.Generator().manual_seed(7)
    likely = torch.randn(128, 128, generator=chain).mul(2).softmax(-1)
    perplexity, losses = {}, {}
    for name, options in ARMS.items():
        torch.manual_seed(seed)
        embed = torch.nn.Embedding(128, 64)
        torch.nn.init.normal_(embed.weight, std=0.3)
        system = VectorQuantised(codes=64, window=16)
        layers = torch.nn.ModuleList(
            LongVQAttention(64, heads=2, weights=system, **options) for _ in range(2)
        )
        norms = torch.nn.ModuleList(torch.nn.RMSNorm(64) for _ in range(3))
        model = torch.nn.ModuleList([embed, layers, norms]).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        data = torch.Generator().manual_seed(seed)
        reported = []
        for _ in range(steps):
            tokens = [torch.randint(128, (8,), generator=data)]
            for _ in range(128):
                step = likely[tokens[-1]]
                tokens.append(torch.multinomial(step, 1, generator=data)[:, 0])
            batch = torch.stack(tokens, 1)
            x = embed(batch[:, :-1])
            for norm, layer in zip(norms, layers, strict=False):
                x = x + layer(norm(x))
            logits = F.linear(norms[-1](x), embed.weight)
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            reported.append(float(loss.detach()))
            optimiser.zero_grad()
            (loss + auxiliary_loss(model)).backward()
            optimiser.step()
        used = [layer.diagnostics().perplexity for layer in layers]
        perplexity[name] = float(torch.stack(used).mean())
        losses[name] = statistics.mean(reported[-50:])
    return perplexity, losses


def perplexities(record: Record, console: Console) -> None:
    for seed in SEEDS:
        line = {"keys": "wandering", "seed": seed, "perplexity": wandering(seed)}
        record.add("perplexity", line, ("keys", "seed"))
        console.print(line)
    for seed in SEEDS[:3]:
        perplexity, losses = trained(seed)
        line = {"keys": "trained", "seed": seed, "perplexity": perplexity, "loss": losses}
        record.add("perplexity", line, ("keys", "seed"))
        console.print(line)


def main() -> None:
    parser = options_parser(__doc__ or "", SECTIONS)
    options = parser.parse_args()
    record, console = Record(options.save), Console()
    runs = {"recall": recall, "time": times, "state": states, "perplexity": perplexities}
    for name, run in runs.items():
        if options.only in (None, name):
            console.print(f"[bold]{name}[/]")
            run(record, console)


if __name__ == "__main__":
    main()
