"""What Edge-MoE's numbers cost: its GELU table and its softmax in one pass, against exact ones.

    make bench-experts
    python benchmarks/fixed_point.py --save docs/results/fixed_point.json

Sections:
    gelu     the largest error over two million points of [-8, 8], by the step of the table: in
             floating point, in fixed point, and what the law says; the tanh form beside them
    softmax  rows of normal scores, by length and deviation: errors of weights and of their sum, the
             share of weights that becomes 0, rows whose largest is another; published and corrected
    equal    rows of equal scores around the length at which the sum wraps

Nothing here is timed: everyone gets the same numbers, but for the last digit of exp.
"""

from __future__ import annotations

import torch
from interleaved import Record, options_parser
from rich.console import Console
from torch.nn.functional import gelu

from aftermax.moe import (
    ACTIVATION,
    fixed_gelu,
    gelu_error,
    gelu_table,
    single_pass_softmax,
    table_gelu,
)

SECTIONS = ("gelu", "softmax", "equal")
STEPS = (1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128)
POINTS = 2_000_001
ROWS = 512


def gelu_steps(record: Record, console: Console) -> None:
    x = ACTIVATION.decode(ACTIVATION.encode(torch.linspace(-8, 8, POINTS, dtype=torch.float64)))
    exact = gelu(x)
    record.add("tanh", {"error": largest(gelu(x, approximate="tanh") - exact)}, ())
    for step in STEPS:
        fixed = ACTIVATION.decode(fixed_gelu(ACTIVATION.encode(x), step))
        line = {
            "step": step,
            "entries": len(gelu_table(step)),
            "law": gelu_error(step),
            "float": largest(table_gelu(x, step) - exact),
            "fixed": largest(fixed - exact),
            "mean": float((fixed - exact).abs().mean()),
        }
        record.add("gelu", line, ("step",))
        console.print(line)


def softmax_rows(record: Record, console: Console) -> None:
    for length in (129, 511, 1024):
        for deviation in (1.0, 4.0):
            torch.manual_seed(0)
            scores = ACTIVATION.encode(deviation * torch.randn(ROWS, length, dtype=torch.float64))
            exact = ACTIVATION.decode(scores).softmax(-1)
            for corrected in (False, True):
                found = single_pass_softmax(scores, corrected=corrected)
                weights = ACTIVATION.decode(found.weights)
                line = {
                    "length": length,
                    "deviation": deviation,
                    "corrected": corrected,
                    "error": largest(weights - exact),
                    "sum": largest(weights.sum(-1) - 1),
                    "zeros": float((weights == 0).double().mean()),
                    "other_largest": float(
                        (weights.argmax(-1) != exact.argmax(-1)).double().mean()
                    ),
                    "wrapped": float(found.wrapped.double().mean()),
                }
                record.add("softmax", line, ("length", "deviation", "corrected"))
                console.print(line)


def equal_scores(record: Record, console: Console) -> None:
    for length in (129, 510, 511, 512, 600, 1024):
        scores = torch.zeros(1, length, dtype=torch.int64)
        line: dict = {"length": length}
        for name, corrected in (("published", False), ("corrected", True)):
            found = single_pass_softmax(scores, corrected=corrected)
            line[name] = {
                "total": float(found.total) / 2**ACTIVATION.fraction,
                "weight": float(ACTIVATION.decode(found.weights)[0, 0]),
                "wrapped": bool(found.wrapped),
            }
        record.add("equal", line, ("length",))
        console.print(line)


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max())


def main() -> None:
    options = options_parser(__doc__ or "", SECTIONS).parse_args()
    record, console = Record(options.save), Console()
    for name, run in (("gelu", gelu_steps), ("softmax", softmax_rows), ("equal", equal_scores)):
        if options.only in (None, name):
            console.print(f"[bold]{name}[/]")
            run(record, console)


if __name__ == "__main__":
    main()
