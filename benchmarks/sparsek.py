"""SparseK: time against T and against softmax on our kernels, the cache, and who is kept.

    make bench-sparsek
    python benchmarks/sparsek.py --save docs/results/sparsek.json

Sections:
    lengths    thread time of a layer's attention, forward and with the backward pass, from 4K to
               256K tokens, k = w = 256, by coupling; softmax on our kernels beside it as long as
               that takes seconds; the exponent of T, and the crossing
    decode     a token after T tokens: time against softmax with all keys, bytes of either state
    selection  what the scores' deviation makes of k = 64 among 4,096: ones, fractions, and all with
               p > 0; and heap moves for a token

One thread, its own time. Contenders run in one process, interleaved, in shuffled order; ratios are
medians within rounds.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise

import torch
from interleaved import Record, need_kernels, options_parser, ratio, time_rounds
from rich.console import Console

from aftermax import SparseK, Visible, attention
from aftermax.dense import Dense
from aftermax.sparse.stream import lives
from aftermax.weights import Softmax

SECTIONS = ("lengths", "decode", "selection")
CAUSAL = Visible(causal=True)
HEADS, WIDTH, K, WINDOW = 4, 64, 256, 256
LENGTHS = tuple(2**n for n in range(12, 19))
LONGEST_SOFTMAX = 2**15


def tensors(tokens: int, gradients: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shape = (1, HEADS, tokens, WIDTH)
    return [torch.randn(shape, requires_grad=gradients) for _ in range(3)]


def lengths(record: Record, console: Console) -> None:
    for couple in ("kv", "v", "log"):
        system = SparseK(k=K, window=WINDOW, couple=couple)
        for tokens in LENGTHS:
            for way in ("forward", "both"):
                given = tensors(tokens, way == "both")

                def ours(system=system, given=given):
                    return system.attend(*given, CAUSAL)

                def softmax(given=given):
                    return attention(*given, is_causal=True)

                contenders = {"sparsek": ours}
                if tokens <= LONGEST_SOFTMAX:
                    contenders["softmax"] = softmax
                if way == "both":
                    contenders = {
                        name: lambda run=run: run().sum().backward()
                        for name, run in contenders.items()
                    }
                rounds = 5 if tokens <= LONGEST_SOFTMAX else 3
                seconds = time_rounds(contenders, rounds, clock=time.thread_time)
                line = {"couple": couple, "tokens": tokens, "way": way}
                line["per_token"] = sorted(seconds["sparsek"])[rounds // 2] / tokens
                if "softmax" in seconds:
                    line |= {"softmax": ratio(seconds["softmax"], seconds["sparsek"])}
                record.add("lengths", line, ("couple", "tokens", "way"))
                console.print(line)
    for couple in ("kv", "v", "log"):
        for way in ("forward", "both"):
            lines = [
                line
                for line in record.lines("lengths")
                if (line["couple"], line["way"]) == (couple, way)
            ]
            line = {"couple": couple, "way": way, "exponent": exponent(lines)}
            line["crossing"] = crossing([x for x in lines if "softmax" in x])
            record.add("fits", line, ("couple", "way"))
            console.print(line)


def exponent(lines: list[dict]) -> float:
    """Of T in the time, by least squares over the logarithms."""
    x = torch.tensor([math.log(line["tokens"]) for line in lines], dtype=torch.float64)
    y = torch.tensor(
        [math.log(line["per_token"] * line["tokens"]) for line in lines], dtype=torch.float64
    )
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def crossing(lines: list[dict]) -> float | None:
    """Tokens at which softmax takes as long, between the lengths that were measured."""
    lines = sorted(lines, key=lambda line: line["tokens"])
    for before, after in pairwise(lines):
        low, high = (math.log(line["softmax"]["ratio"]) for line in (before, after))
        if low < 0 <= high:
            share = -low / (high - low)
            return before["tokens"] * (after["tokens"] / before["tokens"]) ** share
    return None


@torch.inference_mode()
def decode(record: Record, console: Console) -> None:
    system, dense = SparseK(k=K, window=WINDOW), Dense(Softmax())
    for tokens in (1024, 4096, 16384, 65536):
        query, key, value = tensors(tokens, False)
        shape = (1, HEADS, WIDTH, WIDTH)
        _, state = system.step(query, key, value, system.init_state(*shape), CAUSAL)
        full = dense.init_state(*shape).append(key, value, None)
        new = [x[:, :, :1].contiguous() for x in (query, key, value)]
        contenders = {
            "sparsek": lambda new=new, state=state: system.step(*new, state, CAUSAL),
            "softmax": lambda new=new, full=full: dense.step(*new, full, CAUSAL),
        }
        seconds = time_rounds(contenders, 21, repeats=5, clock=time.thread_time)
        line = {
            "tokens": tokens,
            "softmax": ratio(seconds["softmax"], seconds["sparsek"]),
            "bytes": state.bytes,
            "pair_bytes": sum(
                x.numel() * x.element_size()
                for x in (state.slot_key, state.slot_value, state.ring_key, state.ring_value)
            ),
            "softmax_bytes": full.bytes,
            "support": state.support.shape[-1],
        }
        record.add("decode", line, ("tokens",))
        console.print(line)


def selection(record: Record, console: Console) -> None:
    for deviation in (0.5, 1, 2, 4, 8):
        torch.manual_seed(0)
        scores = deviation * torch.randn(64, 4096, dtype=torch.float64)
        found = lives(scores, 64, top=64)
        ones = (found.leaves_ones == 4096).sum(-1).double().mean()
        support = (found.leaves_support == 4096).sum(-1).double().mean()
        own = torch.arange(4096)  # what never was among them did not move
        moved = sum(
            ((own < x) & (x < 4096)).sum() for x in (found.leaves_ones, found.leaves_support)
        )
        line = {
            "deviation": deviation,
            "ones": float(ones),
            "fractions": float(support - ones),
            "support": float(support),
            "moves": float(moved) / scores.numel(),
        }
        record.add("selection", line, ("deviation",))
        console.print(line)


def main() -> None:
    options = options_parser(__doc__ or "", SECTIONS).parse_args()
    need_kernels()
    torch.set_num_threads(1)
    record, console = Record(options.save), Console()
    for name, run in (("lengths", lengths), ("decode", decode), ("selection", selection)):
        if options.only in (None, name):
            console.print(f"[bold]{name}[/]")
            run(record, console)


if __name__ == "__main__":
    main()
