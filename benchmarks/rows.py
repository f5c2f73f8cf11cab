"""The row kernels against torch, and against what the memory of this machine can do.

    make bench-rows
    python benchmarks/rows.py [--save rows.json] [--only targets|lengths|memory]

`interleaved.py` says how contenders are timed; those of a line work on the same buffers. Inputs are
N(0, 1), seed 0. "bound" is the time that memory alone would take, measured beside the rest by the
same loops without arithmetic: for a softmax a read of the input and a streamed copy of it, for
logsumexp a read. Peaks of memory are those of processes of their own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from interleaved import (
    OURS,
    Contenders,
    Record,
    bodies,
    fastest,
    memory,
    need_kernels,
    options_parser,
    ratio,
    settings,
    time_rounds,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

import aftermax
from aftermax import kernels
from aftermax.kernels.ops import ALGORITHMS
from aftermax.lab.cost import in_own_process, peak_mebibytes

Made = tuple[Contenders, list[str]]
"""What runs against each other, and which of it makes up the bound."""

LENGTHS = [2**k for k in range(10, 29)]
"""Of the sweep, in float32: rows of 4 KB to 1 GB."""
IN_CACHE = 2**16
"""Elements of the batches of short rows: 256 KB, so that they stay in the cache of one core."""


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
        contenders |= {"read": memory(x), "copy": memory(x, y)}
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
        "read": memory(x),
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


def measure_targets(isa: str, threads: int, console: Console, record: Record) -> None:
    for work, make, (one, two, of_bound), rounds, repeats in TARGETS:
        torch.manual_seed(0)
        contenders, bound = make()
        seconds = time_rounds(contenders, rounds, repeats)
        peer = fastest(seconds, (OURS, *bound))
        line = {
            "isa": isa,
            "threads": threads,
            "work": work,
            "against": peer,
            "asked": one if threads == 1 else two,
            **ratio(seconds[peer], seconds[OURS]),
            "milliseconds": 1e3 * statistics.median(seconds[OURS]),
        }
        if bound:
            whole = [sum(parts) for parts in zip(*(seconds[b] for b in bound), strict=True)]
            line["bound"] = ratio(whole, seconds[OURS])
            line["bound_asked"] = of_bound
        record.add("targets", line, ("isa", "threads", "work"))
        console.print(_cells(line))


def _cells(line: dict) -> str:
    text = f"  {line['work']}: {line['ratio']:.2f}x {line['against']}"
    text += f" (asked {line['asked']}; {line['low']:.2f} to {line['high']:.2f})"
    if "bound" in line:
        text += f", {line['bound']['ratio']:.2f} of the bound"
    return text


# ---- the sweep over row lengths ----------------------------------------------------------------


def measure_lengths(isa: str, threads: int, console: Console, record: Record) -> None:
    """One row of every length, every algorithm: nanoseconds an element, median over the rounds."""
    for length in LENGTHS:
        torch.manual_seed(0)
        x = torch.randn(1, length)
        y = torch.empty_like(x)
        contenders: Contenders = {
            "torch": lambda x=x, y=y: torch.softmax(x, -1, out=y),
            OURS: lambda x=x, y=y: aftermax.softmax(x, -1, out=y),
            "read": memory(x),
            "copy": memory(x, y),
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
        line = {"isa": isa, "threads": threads, "length": length, "ns": nanoseconds}
        record.add("lengths", line, ("isa", "threads", "length"))
        shown = ", ".join(f"{name} {ns:.2f}" for name, ns in nanoseconds.items())
        console.print(f"  {4 * length / 1024:,.0f} KB: {shown} ns an element")


# ---- memory ------------------------------------------------------------------------------------


def _peak(name: str) -> float:
    torch.set_num_threads(2)
    hidden, weight, target = _layer(*LAYER)
    return peak_mebibytes(_backward(linear_losses(target)[name], hidden, weight))


def measure_memory(console: Console, record: Record) -> None:
    """Peak of forward and backward above the inputs, less the two gradients, in MiB."""
    rows, width, classes = LAYER
    gradients = 4 * width * (rows + classes) / 2**20
    for name in linear_losses(torch.zeros(0)):
        mebibytes = in_own_process(_peak, name) - gradients
        record.add("memory", {"name": name, "mebibytes": mebibytes}, ("name",))
        console.print(f"  {name}: {mebibytes:,.0f} MiB")


# ---- the run -----------------------------------------------------------------------------------


def print_table(console: Console, targets: list[dict]) -> None:
    """All targets with what was asked."""
    for isa, threads in dict.fromkeys((r["isa"], r["threads"]) for r in targets):
        title = f"{isa}, {threads} thread{'s' if threads > 1 else ''}"
        table = Table(title=title, title_justify="left")
        for column in ("work", "times faster", "asked", "of the bound"):
            table.add_column(column, justify="left" if column == "work" else "right")
        for line in targets:
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
    parser = options_parser(__doc__, ("targets", "lengths", "memory"))
    parser.add_argument("--isa", nargs="+", default=None, help="bodies; all that run by default")
    options = parser.parse_args()
    need_kernels()
    console, record = Console(highlight=False), Record(options.save)
    isas = options.isa or bodies()
    sections = {"targets": measure_targets, "lengths": measure_lengths}
    for section, measure in sections.items():
        if options.only in (None, section):
            for isa, threads in settings(section, isas, options.threads, console):
                measure(isa, threads, console, record)
    if options.only in (None, "memory"):
        kernels.use_isa(isas[0])
        console.print("[bold]extra memory of the linear cross-entropy[/]")
        measure_memory(console, record)
    if options.only in (None, "targets"):
        print_table(console, record.lines("targets"))


if __name__ == "__main__":
    main()
