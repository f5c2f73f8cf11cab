"""The row kernels against torch, and against what the memory of this machine can do.

    make bench-rows
    python benchmarks/rows.py [--save rows.json] [--only targets|lengths|memory]

All contenders of a line run in one process on the same buffers, interleaved, in an order that is
shuffled anew every round; what is reported is the median over the rounds of the ratio within a
round, and its interquartile range. Inputs are N(0, 1), seed 0. "bound" is the time that memory
alone would take, measured beside the rest by the same loops without arithmetic: for a softmax a
read of the input and a streamed copy of it, for logsumexp a read. Peaks of memory are those of
processes of their own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import aftermax
from aftermax import kernels
from aftermax.kernels.ops import ALGORITHMS
from aftermax.lab.cost import in_own_process, peak_mebibytes
from aftermax.lab.grid import machine

Contenders = dict[str, Callable[[], object]]
Made = tuple[Contenders, list[str]]
"""What runs against each other, and which of it makes up the bound."""

OURS = "aftermax"
LENGTHS = [2**k for k in range(10, 29)]
"""Of the sweep, in float32: rows of 4 KB to 1 GB."""
IN_CACHE = 2**16
"""Elements of the batches of short rows: 256 KB, so that they stay in the cache of one core."""


# ---- timing ------------------------------------------------------------------------------------


def time_rounds(contenders: Contenders, rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of each contender in each round, order shuffled."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):  # the first warms up
        for name in order.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            for _ in range(repeats):
                contenders[name]()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: taken[1:] for name, taken in seconds.items()}


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """The median of over / under round by round, and its quartiles."""
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(over, under, strict=True)], n=4, method="inclusive"
    )
    return {"ratio": middle, "low": low, "high": high}


def _memory(x: Tensor, y: Tensor | None) -> Callable[[], None]:
    """A read of x, or a streamed copy to y."""
    library = kernels.loaded()
    count = ctypes.c_int64(x.numel())
    source = ctypes.c_void_p(x.data_ptr())
    target = None if y is None else ctypes.c_void_p(y.data_ptr())
    return lambda: library.am_memory(source, target, count)


# ---- the table of targets ----------------------------------------------------------------------


def into(name: str, rows: int, length: int, dtype: torch.dtype = torch.float32) -> Made:
    """torch's function of that name and ours, with the result given."""
    x = torch.randn(rows, length).to(dtype)
    y = torch.empty_like(x)
    contenders: Contenders = {
        f"torch.{name}(out=)": lambda: getattr(torch, name)(x, -1, out=y),
        OURS: lambda: getattr(aftermax, name)(x, -1, out=y),
    }
    if dtype == torch.float32:
        contenders |= {"read": _memory(x, None), "copy": _memory(x, y)}
    return contenders, [name for name in contenders if name in ("read", "copy")]


def softmax_fresh(rows: int, length: int) -> Made:
    x = torch.randn(rows, length)
    contenders: Contenders = {
        "torch.softmax": lambda: torch.softmax(x, -1),
        OURS: lambda: aftermax.softmax(x, -1),
    }
    return contenders, []


def softmax_backward(rows: int, length: int) -> Made:
    x = torch.randn(rows, length, requires_grad=True)
    grad = torch.randn(rows, length)

    def run(softmax: Callable[[Tensor, int], Tensor]) -> Callable[[], object]:
        y = softmax(x, -1)
        return lambda: torch.autograd.grad(y, x, grad, retain_graph=True)

    return {"torch.softmax": run(torch.softmax), OURS: run(aftermax.softmax)}, []


def logsumexp(rows: int, length: int) -> Made:
    x = torch.randn(rows, length)
    contenders: Contenders = {
        "torch.logsumexp": lambda: torch.logsumexp(x, -1),
        OURS: lambda: aftermax.logsumexp(x, -1),
        "read": _memory(x, None),
    }
    return contenders, ["read"]


def _backward(loss: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], None]:
    def run() -> None:
        for tensor in tensors:
            tensor.grad = None
        loss(*tensors).backward()

    return run


def cross_entropy(rows: int, length: int) -> Made:
    x = torch.randn(rows, length, requires_grad=True)
    target = torch.randint(0, length, (rows,))
    contenders: Contenders = {
        "F.cross_entropy": _backward(lambda x: F.cross_entropy(x, target), x),
        OURS: _backward(lambda x: aftermax.cross_entropy(x, target), x),
    }
    return contenders, []


def cross_entropy_inplace(rows: int, length: int) -> Made:
    x = torch.randn(rows, length, requires_grad=True)
    # of its own, and no leaf: its gradient becomes the logits of the next round, at the same cost
    y = x.clone()
    target = torch.randint(0, length, (rows,))
    contenders: Contenders = {
        "F.cross_entropy": _backward(lambda x: F.cross_entropy(x, target), x),
        OURS: lambda: torch.autograd.grad(
            aftermax.cross_entropy(y, target, inplace_backward=True), y
        ),
    }
    return contenders, []


def _layer(rows: int, width: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = (torch.randn(classes, width) / width**0.5).requires_grad_()
    return hidden, weight, torch.randint(0, classes, (rows,))


def linear_losses(target: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "F.linear, F.cross_entropy": lambda h, w: F.cross_entropy(F.linear(h, w), target),
        "F.linear_cross_entropy": lambda h, w: F.linear_cross_entropy(h, w, target),
        "F.linear_cross_entropy, chunked": lambda h, w: F.linear_cross_entropy(
            h, w, target, options=torch.nn.LinearCrossEntropyOptions()
        ),
        OURS: lambda h, w: aftermax.linear_cross_entropy(h, w, target),
    }


LAYER = (2048, 512, 50_000)


def linear_cross_entropy() -> Made:
    hidden, weight, target = _layer(*LAYER)
    losses = linear_losses(target)
    return {name: _backward(loss, hidden, weight) for name, loss in losses.items()}, []


# work, how it is made, the ratios asked for (one thread, two, of the bound; 1: never slower),
# rounds, repeats
TARGETS: list[tuple[str, Callable[[], Made], tuple, int, int]] = [
    *(
        (
            f"softmax, rows of {n} in cache, out given",
            lambda n=n: into("softmax", IN_CACHE // n, n),
            (1.0, 1.0, None),
            21,
            50,
        )
        for n in (32, 128, 1024, 4096)
    ),
    *(
        (
            f"softmax, rows of {n} in cache, fresh result",
            lambda n=n: softmax_fresh(IN_CACHE // n, n),
            (1.0, 1.0, None),
            21,
            50,
        )
        for n in (32, 128, 1024, 4096)
    ),
    (
        "softmax, one row of 64M, out given",
        lambda: into("softmax", 1, 2**26),
        (1.9, 2.5, 0.93),
        11,
        1,
    ),
    (
        "softmax, 4096 x 32768, out given",
        lambda: into("softmax", 4096, 32768),
        (1.3, 1.3, None),
        11,
        1,
    ),
    ("softmax, 4096 x 32768, fresh result", lambda: softmax_fresh(4096, 32768), (1, 1, None), 5, 1),
    (
        "softmax, 4096 x 32768, bfloat16, out given",
        lambda: into("softmax", 4096, 32768, torch.bfloat16),
        (1, 1, None),
        7,
        1,
    ),
    (
        "softmax backward, 4096 x 32768",
        lambda: softmax_backward(4096, 32768),
        (1, 1, None),
        5,
        1,
    ),
    (
        "log-softmax, 4096 x 32768, out given",
        lambda: into("log_softmax", 4096, 32768),
        (1, 1, None),
        7,
        1,
    ),
    ("logsumexp, 4096 x 32768", lambda: logsumexp(4096, 32768), (15, 15, 0.75), 7, 1),
    (
        "cross-entropy forward and backward, 4096 x 32768",
        lambda: cross_entropy(4096, 32768),
        (4, 4, None),
        5,
        1,
    ),
    (
        "the same, inplace_backward",
        lambda: cross_entropy_inplace(4096, 32768),
        (4, 4, None),
        5,
        1,
    ),
    (
        "linear cross-entropy forward and backward, 2048 x 512, 50,000 classes",
        linear_cross_entropy,
        (1.5, 1.5, None),
        7,
        1,
    ),
]


def measure_targets(isa: str, threads: int, console: Console) -> list[dict]:
    lines = []
    for work, make, (one, two, of_bound), rounds, repeats in TARGETS:
        torch.manual_seed(0)
        contenders, bound = make()
        seconds = time_rounds(contenders, rounds, repeats)
        peers = [name for name in contenders if name not in (OURS, *bound)]
        fastest = min(peers, key=lambda name: statistics.median(seconds[name]))
        line = {
            "isa": isa,
            "threads": threads,
            "work": work,
            "against": fastest,
            "asked": one if threads == 1 else two,
            **ratio(seconds[fastest], seconds[OURS]),
            "milliseconds": 1e3 * statistics.median(seconds[OURS]),
        }
        if bound:
            whole = [sum(parts) for parts in zip(*(seconds[b] for b in bound), strict=True)]
            line["bound"] = ratio(whole, seconds[OURS])
            line["bound_asked"] = of_bound
        lines.append(line)
        console.print(_cells(line))
    return lines


def _cells(line: dict) -> str:
    text = f"  {line['work']}: {line['ratio']:.2f}x {line['against']}"
    text += f" (asked {line['asked']}; {line['low']:.2f} to {line['high']:.2f})"
    if "bound" in line:
        text += f", {line['bound']['ratio']:.2f} of the bound"
    return text


# ---- the sweep over row lengths ----------------------------------------------------------------


def measure_lengths(isa: str, threads: int, console: Console) -> list[dict]:
    """One row of every length, every algorithm: nanoseconds an element, median over the rounds."""
    lines = []
    for length in LENGTHS:
        torch.manual_seed(0)
        x = torch.randn(1, length)
        y = torch.empty_like(x)
        contenders: Contenders = {
            "torch": lambda x=x, y=y: torch.softmax(x, -1, out=y),
            OURS: lambda x=x, y=y: aftermax.softmax(x, -1, out=y),
            "read": _memory(x, None),
            "copy": _memory(x, y),
        }
        for name in ALGORITHMS[1:]:
            contenders[name] = lambda x=x, y=y, name=name: aftermax.softmax(
                x, -1, out=y, impl=f"cpu-{name}"
            )
        rounds = 9 if length < 2**25 else 5
        seconds = time_rounds(contenders, rounds, max(1, 2**20 // length))
        nanoseconds = {
            name: 1e9 * statistics.median(taken) / length for name, taken in seconds.items()
        }
        nanoseconds["bound"] = nanoseconds.pop("read") + nanoseconds.pop("copy")
        lines.append({"isa": isa, "threads": threads, "length": length, "ns": nanoseconds})
        shown = ", ".join(f"{name} {ns:.2f}" for name, ns in nanoseconds.items())
        console.print(f"  {4 * length / 1024:,.0f} KB: {shown} ns an element")
    return lines


# ---- memory ------------------------------------------------------------------------------------


def _peak(name: str) -> float:
    torch.set_num_threads(2)
    hidden, weight, target = _layer(*LAYER)
    return peak_mebibytes(_backward(linear_losses(target)[name], hidden, weight))


def measure_memory(console: Console) -> list[dict]:
    """Peak of forward and backward above the inputs, less the two gradients, in MiB."""
    rows, width, classes = LAYER
    gradients = 4 * width * (rows + classes) / 2**20
    lines = []
    for name in linear_losses(torch.zeros(0)):
        lines.append({"name": name, "mebibytes": in_own_process(_peak, name) - gradients})
        console.print(f"  {name}: {lines[-1]['mebibytes']:,.0f} MiB")
    return lines


# ---- the run -----------------------------------------------------------------------------------


def print_table(console: Console, results: dict) -> None:
    """All targets with what was asked."""
    for isa, threads in dict.fromkeys((r["isa"], r["threads"]) for r in results["targets"]):
        title = f"{isa}, {threads} thread{'s' if threads > 1 else ''}"
        table = Table(title=title, title_justify="left")
        for column in ("work", "times faster", "asked", "of the bound"):
            table.add_column(column, justify="left" if column == "work" else "right")
        for line in results["targets"]:
            if (line["isa"], line["threads"]) != (isa, threads):
                continue
            bound = f"{line['bound']['ratio']:.2f}" if "bound" in line else ""
            table.add_row(
                line["work"],
                f"{line['ratio']:.2f} ({line['low']:.2f} to {line['high']:.2f})",
                f"{line['asked']}",
                bound,
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path, help="a JSON file to keep the numbers in")
    parser.add_argument("--only", choices=("targets", "lengths", "memory"))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--isa", nargs="+", default=None, help="bodies; all that run by default")
    options = parser.parse_args()
    console = Console(highlight=False)
    if kernels.absent():
        raise SystemExit(kernels.absent())
    isas = options.isa or [isa for isa in kernels.ISAS if isa != "portable" and _runs(isa)]
    results: dict = {"machine": machine(), "version": aftermax.__version__}
    sections = {"targets": measure_targets, "lengths": measure_lengths}
    for section, measure in sections.items():
        if options.only in (None, section):
            results[section] = []
            for isa in isas:
                kernels.use_isa(isa)
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    console.print(f"[bold]{section}, {isa}, {threads} thread(s)[/]")
                    results[section] += measure(isa, threads, console)
    if options.only in (None, "memory"):
        kernels.use_isa(isas[0])
        console.print("[bold]extra memory of the linear cross-entropy[/]")
        results["memory"] = measure_memory(console)
    if "targets" in results:
        print_table(console, results)
    if options.save:
        kept = json.loads(options.save.read_text()) if options.save.exists() else {}
        options.save.write_text(json.dumps(kept | results, indent=1) + "\n")


def _runs(isa: str) -> bool:
    try:
        kernels.use_isa(isa)
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main()
