"""Soft top-k and the losses over many labels, against the ways there are.

    make bench-output
    python benchmarks/soft_topk.py --save docs/results/soft_topk.json

Sections:
    operators  soft top-k at n = 100,000 against 32 halvings of a bracket (as the authors' code does
               it), operators that sort (the Euclidean projection onto 0 <= y <= 1, sum y = k,
               written out here; torchsort's soft rank and softtorch's SoftSort, where they are
               installed), and torch.sort and torch.topk, which are no smooth operators at all but
               what the others stand on
    lengths    thread time against n, and passes over the scores
    losses     a loss over 512 x 16,384 scores, forward and backward, against the formula in plain
               torch with masks: time, and memory at the peak
    cache      a step through all labels with gradient caching, against plain autograd: time, and
               memory at the peak

One thread. Contenders run in one process, interleaved, in shuffled order; ratios are medians within
rounds. Memory is measured in processes of their own.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleaved import OURS, Contenders, Record, need_kernels, options_parser, ratio, time_rounds
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aftermax import cached_backward, decoupled_softmax_loss, soft_topk, soft_topk_loss
from aftermax.losses import threshold

SECTIONS = ("operators", "lengths", "losses", "cache")
SCORES = {"smooth": 1.0, "peaked": 10.0}
"""Standard deviations of normal scores, times alpha: cosines over a temperature of 0.05 lie
between."""
LENGTHS = tuple(10**n for n in range(3, 7))


def thread_time(contenders: Contenders, rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of this thread's own time, which others on the machine do not add to."""
    return time_rounds(contenders, rounds, repeats, time.thread_time)


# ---- the peers ---------------------------------------------------------------------------------


class Halved(torch.autograd.Function):
    """y by 32 halvings of [-max - 10, -min + 10], and the gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: float) -> Tensor:
        low = -x.amax(1, keepdim=True) - 10
        high = -x.amin(1, keepdim=True) + 10
        for _ in range(32):
            middle = (low + high) / 2
            short = torch.sigmoid(x + middle).sum(1, keepdim=True) < k
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        y = torch.sigmoid(x + (low + high) / 2)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (y,) = ctx.saved_tensors
        v = y * (1 - y)
        u = grad * v
        return u - v * (u.sum(1, keepdim=True) / v.sum(1, keepdim=True)), None


class Projected(torch.autograd.Function):
    """The nearest y to x with 0 <= y <= 1 and sum y = k: clamp(x + t), t between sorted corners."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: float) -> Tensor:
        corners, order = torch.cat((-x, 1 - x), 1).sort(1)  # where a y leaves 0, and reaches 1
        slope = torch.where(order < x.shape[1], 1.0, -1.0).cumsum(1)[:, :-1]
        reached = (slope * corners.diff(dim=1)).cumsum(1)
        at = torch.searchsorted(reached, torch.full_like(x[:, :1], k))
        before = torch.where(at > 0, reached.gather(1, (at - 1).clamp_min(0)), 0)
        t = corners.gather(1, at) + (k - before) / slope.gather(1, at)
        y = (x + t).clamp(0, 1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (y,) = ctx.saved_tensors
        free = ((y > 0) & (y < 1)).to(grad.dtype)
        u = grad * free
        return u - free * (u.sum(1, keepdim=True) / free.sum(1, keepdim=True).clamp_min(1)), None


def peers(k: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> x to something of which the sum has a gradient."""
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "32 halvings": lambda x: Halved.apply(x, k),
        "projection, sorted": lambda x: Projected.apply(x, k),
        "torch.sort": lambda x: x.sort(1).values,
        "torch.topk": lambda x: x.topk(k, 1).values,
    }
    sorting = _module("torchsort")
    if sorting is not None:
        found["torchsort soft rank"] = lambda x: sorting.soft_rank(x)
    soft = _module("softtorch")
    if soft is not None:
        found["softtorch SoftSort"] = lambda x: soft.topk(
            x, k, dim=1, method="softsort", gated_grad=True
        ).indices.sum(1)
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# ---- soft top-k --------------------------------------------------------------------------------


def _forward(way: Callable[[Tensor], Tensor], x: Tensor, _: Tensor) -> None:
    with torch.no_grad():
        way(x)


def _both(way: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> None:
    out = way(x)
    torch.autograd.grad(out, x, upstream[:, : out.shape[1]])


WORKS = {"forward": _forward, "forward and backward": _both}


def operators(record: Record, console: Console, rounds: int) -> None:
    rows, labels = 8, 100_000
    for scores, scale in SCORES.items():
        for k in (5, 100):
            x = (scale * torch.randn(rows, labels)).requires_grad_()
            upstream = torch.randn(rows, labels)
            ways = {OURS: lambda x, k=k: soft_topk(x, k)} | peers(k)
            right = soft_topk(x.detach().double(), k).float()
            torch.testing.assert_close(ways[OURS](x), right, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(ways["32 halvings"](x), right, rtol=1e-2, atol=1e-3)
            if k == 100:  # k x n numbers a row
                ways.pop("softtorch SoftSort", None)
            for work, run in WORKS.items():
                contenders: Contenders = {
                    name: functools.partial(run, way, x, upstream) for name, way in ways.items()
                }
                seconds = thread_time(contenders, rounds)
                for name in ways:
                    line = {"work": work, "scores": scores, "k": k, "labels": labels, "way": name}
                    line |= ratio(seconds[name], seconds[OURS])
                    line["ms_a_row"] = 1e3 * statistics.median(seconds[name]) / rows
                    record.add("operators", line, ("work", "scores", "k", "labels", "way"))
    table = Table("work", "scores", "k", "way", "ms a row", "times ours")
    for line in record.lines("operators"):
        spread = f"{line['ratio']:.2f} ({line['low']:.2f} to {line['high']:.2f})"
        cells = (line["work"], line["scores"], str(line["k"]), line["way"])
        table.add_row(*cells, f"{line['ms_a_row']:.3f}", spread)
    console.print(table)


def lengths(record: Record, console: Console, rounds: int) -> None:
    table = Table("n", "scores", "k", "passes", "ms", "ms of torch.sort")
    for labels in LENGTHS:
        for scores, scale in SCORES.items():
            for k in (5, labels // 10):
                x = scale * torch.randn(1, labels)
                ways = {OURS: lambda x=x, k=k: soft_topk(x, k)}
                ways["torch.sort"] = lambda x=x: x.sort(1)
                repeats = max(1, 10**5 // labels)
                seconds = thread_time(ways, max(3, rounds // 2), repeats)
                line = {"labels": labels, "scores": scores, "k": k, "passes": _passes(ways[OURS])}
                for name, key in ((OURS, "ms"), ("torch.sort", "sort_ms")):
                    line[key] = 1e3 * statistics.median(seconds[name])
                record.add("lengths", line, ("labels", "scores", "k"))
                cells = (f"{labels:,}", scores, str(k), str(line["passes"]))
                table.add_row(*cells, f"{line['ms']:.3f}", f"{line['sort_ms']:.3f}")
    console.print(table)


def _passes(call: Callable[[], object]) -> int:
    """Sums over the row that the search for the threshold takes."""
    counted, side = [0], threshold._side

    def counting(*inputs: Any) -> Any:
        counted[0] += 1
        return side(*inputs)

    threshold._side = counting
    try:
        call()
    finally:
        threshold._side = side
    return counted[0] // 2


# ---- the losses --------------------------------------------------------------------------------


def masked_decoupled(scores: Tensor, positives: Tensor) -> Tensor:
    """The formula as one would write it."""
    rest = scores.masked_fill(positives, -torch.inf).logsumexp(1, keepdim=True)
    each = torch.nn.functional.softplus(rest - scores).masked_fill(~positives, 0)
    return (each.sum(1) / positives.sum(1)).mean()


def losses(record: Record, console: Console, rounds: int) -> None:
    scores, positives = _loss_inputs()
    ways = _loss_ways()
    right = masked_decoupled(scores.double(), positives).float()
    for name in ("decoupled", "decoupled, by columns", "decoupled, masks in torch"):
        torch.testing.assert_close(ways[name](scores, positives), right)
    contenders = {
        name: (lambda way=way: torch.autograd.grad(way(scores, positives), scores))
        for name, way in ways.items()
    }
    seconds = thread_time(contenders, rounds)
    table = Table("loss", "ms", "times the decoupled", "MiB at the peak beyond the scores")
    for name in ways:
        line = {"way": name, "rows": scores.shape[0], "labels": scores.shape[1]}
        line |= ratio(seconds[name], seconds["decoupled"])
        line["ms"] = 1e3 * statistics.median(seconds[name])
        line["peak_mib"] = _apart(_peak_of_loss, name)
        record.add("losses", line, ("way", "rows", "labels"))
        cells = (f"{line['ms']:.1f}", f"{line['ratio']:.2f}", f"{line['peak_mib']:.0f}")
        table.add_row(name, *cells)
    console.print(table)


def _loss_inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    scores = (4 * torch.randn(512, 16_384)).requires_grad_()
    positives = torch.rand(512, 16_384) < 5 / 16_384
    positives[:, 0] = True
    return scores, positives


def _loss_ways() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    _, mask = _loss_inputs()
    most = int(mask.sum(1).max())
    columns = mask.to(torch.int8).topk(most, 1).indices
    columns = columns.masked_fill(~mask.gather(1, columns), -1)
    return {
        "decoupled": lambda s, p: decoupled_softmax_loss(s, p),
        "decoupled, by columns": lambda s, p: decoupled_softmax_loss(s, columns),
        "decoupled, masks in torch": masked_decoupled,
        "soft top-5, by columns": lambda s, p: soft_topk_loss(s, columns),
    }


def _peak_of_loss(name: str) -> float:
    scores, positives = _loss_inputs()
    way = _loss_ways()[name]
    return _peak(lambda: torch.autograd.grad(way(scores, positives), scores))


# ---- gradient caching --------------------------------------------------------------------------


def cache(record: Record, console: Console, rounds: int) -> None:
    ways = {name: (lambda name=name: _step(name)) for name in ("plain", "cached")}
    seconds = thread_time(ways, max(3, rounds // 3))
    table = Table("step", "s", "times plain", "MiB at the peak")
    for name in ways:
        line = {"way": name} | ratio(seconds[name], seconds["plain"])
        line["seconds"] = statistics.median(seconds[name])
        line["peak_mib"] = _apart(_peak_of_step, name)
        record.add("cache", line, ("way",))
        table.add_row(
            name, f"{line['seconds']:.2f}", f"{line['ratio']:.2f}", f"{line['peak_mib']:.0f}"
        )
    console.print(table)


def _step(name: str) -> None:
    """64 queries against 4,096 labels of 32 tokens, a transformer of two layers for both."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    table = torch.nn.Embedding(1000, 64)
    queries, labels = (torch.randint(1000, (n, 32)) for n in (64, 4096))
    positives = torch.randint(4096, (64, 3))

    def encode(ids: Tensor) -> Tensor:
        return torch.nn.functional.normalize(encoder(table(ids)).mean(1), dim=1)

    def loss(f: Tensor, g: Tensor) -> Tensor:
        return decoupled_softmax_loss(f @ g.T / 0.05, positives)

    chunks = labels.split(128)
    if name == "plain":
        loss(encode(queries), torch.cat([encode(chunk) for chunk in chunks])).backward()
    else:
        cached_backward(loss, encode(queries), (encode, chunks))


def _peak_of_step(name: str) -> float:
    return _peak(lambda: _step(name))


def _peak(call: Callable[[], object]) -> float:
    """MiB that this process holds at most during a call, beyond what it held before."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def _apart(call: Callable[[str], float], name: str) -> float:
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
        return pool.apply(call, (name,))


def main() -> None:
    parser = options_parser(__doc__ or "", SECTIONS)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    need_kernels()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    record, console = Record(options.save), Console()
    for section in SECTIONS:
        if options.only in (None, section):
            globals()[section](record, console, options.rounds)


if __name__ == "__main__":
    main()
