"""The linear walk: time against T, against chunk loops in plain torch, and memory while decoding.

    make bench-linear
    python benchmarks/linear.py --save docs/results/linear.json

Sections:
    targets   forward and backward at T = 16384, 8 heads of 64, against the loop over chunks as
              models on Hugging Face have it (256 tokens a chunk, each cut out of the whole by an
              index), and against the same loop with what it lacks: `split`, of which autograd makes
              one node, and the quickest of four chunk lengths
    lengths   thread time against T, to 256K, for the walk, every linear system and our softmax
              kernel; the exponent is fitted from T = 1K on
    decode    token by token, linear attention to 1,000,000: bytes of the state, resident memory,
              time a token

One thread. Contenders run in one process, interleaved, in shuffled order; ratios are medians within
rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import (
    OURS,
    Contenders,
    Record,
    multipliers,
    need_kernels,
    options_parser,
    ratio,
    time_rounds,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aftermax import CATALOGUE, Softmax, Visible, attention
from aftermax.dense import as_system
from aftermax.linear import Separable, walk

SECTIONS = ("targets", "lengths", "decode")
LENGTHS = tuple(2**n for n in range(6, 19))
FITTED_FROM = 2**10
"""Shorter calls cost what a call costs; they are there for the crossing point with softmax."""
LONGEST_SOFTMAX = 2**15
SYSTEMS = [entry for entry in CATALOGUE if isinstance(entry.system, Separable)]
HEADS, WIDTH = 8, 64


def thread_time(contenders: Contenders, rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of this thread's own time, which others on the machine do not add to."""
    return time_rounds(contenders, rounds, repeats, time.thread_time)


# ---- chunk loops in plain torch ----------------------------------------------------------------


def chunk_loop(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, chunk: int, cut: str) -> Tensor:
    """out of the walk, as lightning attention's models write it; T is a multiple of the chunk."""
    index = torch.arange(1, chunk + 1, dtype=q.dtype)
    into = torch.exp(-rate[:, None] * index)[..., None]
    left = torch.exp(-rate[:, None] * (chunk - index))[..., None]
    distance = index[:, None] - index
    inside = torch.exp(-rate[:, None, None] * distance.clamp_min(0)) * (distance >= 0)
    whole = torch.exp(-rate * chunk)[:, None, None]
    state, out = q.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]), []
    if cut == "split":
        pieces = zip(*(x.split(chunk, 2) for x in (q, k, v)), strict=True)
    else:
        pieces = ([x[:, :, i : i + chunk] for x in (q, k, v)] for i in range(0, q.shape[2], chunk))
    for q_, k_, v_ in pieces:
        out.append(((q_ @ k_.mT) * inside) @ v_ + (q_ * into) @ state)
        state = whole * state + (k_ * left).mT @ v_
    return torch.cat(out, 2)


def targets(record: Record, console: Console, rounds: int) -> None:
    tokens = 16384
    q, k, v, upstream = (torch.randn(1, HEADS, tokens, WIDTH) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    rate = 2.0 ** -torch.arange(1.0, HEADS + 1)
    loops = {"loop, indexed, 256": (256, "index")} | {
        f"loop, split, {chunk}": (chunk, "split") for chunk in (32, 64, 128, 256)
    }
    ways: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: walk(q, k, v, rate=rate, impl="cpu").out,
        "our reference": lambda: walk(q, k, v, rate=rate, impl="reference").out,
        "our softmax": lambda: attention(q, k, v, is_causal=True, impl="cpu"),
    } | {
        name: lambda chunk=chunk, cut=cut: chunk_loop(q, k, v, rate, chunk, cut)
        for name, (chunk, cut) in loops.items()
    }
    right = ways["our reference"]()
    for name in (OURS, *loops):
        torch.testing.assert_close(ways[name](), right, rtol=1e-4, atol=1e-3)

    def forward(way: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            way()

    # C/2 products of a token within its chunk, and the state in and out
    inside, through = 64 / 2 * 2 * WIDTH, 2 * WIDTH * WIDTH
    work = {"forward": inside + through, "forward and backward": 4 * inside + 3.5 * through}
    for name, products in work.items():
        contenders: Contenders = {}
        for way, call in ways.items():
            if name == "forward":
                contenders[way] = lambda call=call: forward(call)
            else:
                contenders[way] = lambda call=call: torch.autograd.grad(call(), leaves, upstream)
        about = 2 * HEADS * tokens * products
        loop, operations = multipliers("multiply_adds", about)
        seconds = thread_time(contenders | {"peak": loop}, rounds)
        peak = [operations / s for s in seconds.pop("peak")]
        share = [about / s / p for s, p in zip(seconds[OURS], peak, strict=True)]
        for way in ways:
            if way == OURS:
                continue
            line = {"work": name, "tokens": tokens, "against": way}
            line |= ratio(seconds[way], seconds[OURS])
            line["ms"] = 1e3 * statistics.median(seconds[OURS])
            line["peak"] = statistics.median(share)
            record.add("targets", line, ("work", "tokens", "against"))
    table = Table("work", "against", "times faster", "share of the multipliers' peak")
    for line in record.lines("targets"):
        spread = f"{line['ratio']:.2f} ({line['low']:.2f} to {line['high']:.2f})"
        table.add_row(line["work"], line["against"], spread, f"{line['peak']:.2f}")
    console.print(table)


# ---- time against T ----------------------------------------------------------------------------


def lengths(record: Record, console: Console, rounds: int) -> None:
    heads = HEADS // 2
    for tokens in LENGTHS:
        q, k, v, upstream = (torch.randn(1, heads, tokens, WIDTH) for _ in range(4))
        contenders = _contenders(q, k, v, upstream)
        rounds_here = max(3, min(rounds, 2**20 // tokens))
        seconds = thread_time(contenders, rounds_here, max(1, 2**12 // tokens))
        for name, taken in seconds.items():
            line = {"name": name, "tokens": tokens, "heads": heads, "width": WIDTH}
            line["us_per_token"] = 1e6 * statistics.median(taken) / tokens
            line["least_us_per_token"] = 1e6 * min(taken) / tokens
            record.add("lengths", line, ("name", "tokens", "heads", "width"))
        console.print(f"T = {tokens}: {len(contenders)} contenders", highlight=False)
        del q, k, v, upstream, contenders
    table = Table("way", "exponent", "microseconds a token at the longest")
    for name in dict.fromkeys(line["name"] for line in record.lines("lengths")):
        curve = [line for line in record.lines("lengths") if line["name"] == name]
        line = {"name": name, "exponent": exponent(curve), "from": FITTED_FROM}
        record.add("exponents", line, ("name",))
        table.add_row(name, f"{line['exponent']:.2f}", f"{curve[-1]['us_per_token']:.2f}")
    console.print(table)


def _contenders(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> Contenders:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    rate = 2.0 ** -torch.arange(1.0, q.shape[1] + 1)
    causal = Visible(causal=True)

    def both() -> None:
        out = walk(*leaves, rate=rate, impl="cpu").out
        torch.autograd.grad(out, leaves, upstream)

    contenders: Contenders = {
        "walk, forward": lambda: walk(q, k, v, rate=rate, impl="cpu"),
        "walk, forward and backward": both,
        "walk, forward, reference": lambda: walk(q, k, v, rate=rate, impl="reference"),
    }
    for entry in SYSTEMS:
        system = entry.system
        if hasattr(system, "placed"):
            system = system.placed(0, 1, LENGTHS[-1])
        learned = system.learned(q.shape[1], WIDTH, WIDTH)

        def attend(system=system, learned=learned) -> None:
            with torch.no_grad():
                system.attend(q, k, v, causal, impl="cpu", **learned)

        contenders[entry.name] = attend
    if q.shape[2] <= LONGEST_SOFTMAX:
        contenders["softmax, forward"] = lambda: attention(q, k, v, is_causal=True, impl="cpu")
    return contenders


def exponent(curve: list[dict]) -> float:
    """The slope of log time over log T, by least squares; the least time of each T."""
    curve = [line for line in curve if line["tokens"] >= FITTED_FROM]
    x = [math.log(line["tokens"]) for line in curve]
    y = [math.log(line["least_us_per_token"] * line["tokens"]) for line in curve]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


# ---- decoding ----------------------------------------------------------------------------------


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


@torch.inference_mode()
def decode(record: Record, console: Console, tokens: int) -> None:
    """One sequence of 4 heads, as far as asked, read at every power of ten."""
    heads = HEADS // 2
    names = [e.name for e in SYSTEMS] + ["softmax"]
    for name in names:
        entry = next((e for e in SYSTEMS if e.name == name), None)
        system = as_system(Softmax()) if entry is None else entry.system
        if hasattr(system, "placed"):
            system = system.placed(0, 1, tokens)
        learned = system.learned(heads, WIDTH, WIDTH)
        most = tokens
        if entry is None:  # whose cache of keys and values is copied at every token
            most = min(tokens, 1000)
        elif name != "linear":
            most = min(tokens, 10_000)
        state = system.init_state(1, heads, WIDTH, WIDTH)
        x = torch.randn(3, 1, heads, 1, WIDTH)
        visible, start, done, line = Visible(causal=True), time.thread_time(), 0, {}
        for n in range(1, most + 1):
            _, state = system.step(*x, state, visible, **learned)
            if n == 10 ** round(math.log10(n)):
                spent = time.thread_time() - start
                line = {"name": name, "tokens": n, "state_bytes": state.bytes}
                line |= {"resident_bytes": resident_bytes()}
                line |= {"us_per_token": 1e6 * spent / max(1, n - done)}
                record.add("decode", line, ("name", "tokens"))
                start, done = time.thread_time(), n
        console.print(
            f"{name}: {line['tokens']:,} tokens, state {line['state_bytes']:,} bytes,"
            f" resident {line['resident_bytes'] / 2**20:,.0f} MiB",
            highlight=False,
        )


def main() -> None:
    parser = options_parser(__doc__ or "", SECTIONS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="to decode")
    options = parser.parse_args()
    need_kernels()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    record, console = Record(options.save), Console()
    for section in SECTIONS:
        if options.only in (None, section):
            if section == "decode":
                decode(record, console, options.tokens)
            else:
                globals()[section](record, console, options.rounds)


if __name__ == "__main__":
    main()
