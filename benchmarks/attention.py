"""Attention on the kernels against torch's, and against what this machine can multiply.

    make bench-attention
    python benchmarks/attention.py [--save attention.json] [--threads 1 2]
                                   [--only targets|lengths|products|memory] [--quick]
                                   [--up-to T]

`interleaved.py` says how contenders are timed. B = 1, H = 8, D = 64 where nothing else is said;
inputs are N(0, 1), seed 0. "Eager" is the same formula in plain torch, with the T x T matrix whole.
Of a multiplication and an addition each counts as one operation: 4 B H T T D in a forward pass, 10
in a backward pass, half of it where causal; what a row map does to a score is not counted. "Of the
peak" is their rate over that of a loop of nothing but products in registers, timed beside the rest.
Peaks of memory are those of processes of their own.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from attention_ways import (
    Shape,
    Way,
    as_printed,
    as_reference,
    eager,
    flex,
    ours,
    sdpa,
)
from interleaved import (
    OURS,
    Contenders,
    Record,
    bodies,
    fastest,
    memory,
    multipliers,
    need_kernels,
    options_parser,
    ratio,
    settings,
    time_rounds,
)
from rich.console import Console
from rich.table import Table

from aftermax import CATALOGUE, RowMap, kernels
from aftermax.lab.cost import in_own_process, peak_mebibytes

LENGTHS = (1024, 4096, 16384)
"""Of the targets."""
SWEEP = tuple(2**k for k in range(9, 15))
"""Of the curves over T."""
EAGER_UP_TO = 4096
"""Tokens: one T x T matrix of 8 heads then has 512 MiB, and a backward pass keeps a dozen."""
QUICK = 1e10
"""Operations of the largest work of --quick."""
SAVED = 50
"""How much less memory than the eager code LSSA and LSSAR shall take."""


# ---- the table of targets ----------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    name: str
    shape: Shape
    ways: Callable[[Shape], dict[str, Way]]
    asked: float | None = None  # times faster; None: to be reported
    of_bound: float | None = None  # of the time of reading the keys and values once
    rounds: int | None = None


def softmax_and_sdpa(shape: Shape) -> dict[str, Way]:
    return {OURS: ours("softmax", shape)} | sdpa(shape)


def beside_softmax(name: str) -> Callable[[Shape], dict[str, Way]]:
    return lambda shape: {OURS: ours(name, shape), "our softmax": ours("softmax", shape)}


def beside_eager(name: str) -> Callable[[Shape], dict[str, Way]]:
    return lambda shape: {
        OURS: ours(name, shape),
        "eager": as_printed(name, shape),
        "eager, the reference's": as_reference(name, shape),
    }


def targets() -> list[Work]:
    full, causal = Shape(0), Shape(0, causal=True)
    training = replace(causal, backward=True)
    half = torch.bfloat16

    def at(tokens: int, name: str, shape: Shape, ways: Callable, *asked, **options) -> Work:
        shape = replace(shape, tokens=tokens)
        return Work(f"{name}, {shape.words}", shape, ways, *asked, **options)

    def at_all(name: str, shape: Shape, ways: Callable, asked: float, since: int = 0) -> list[Work]:
        return [
            at(tokens, name, shape, ways, asked if tokens >= since else None) for tokens in LENGTHS
        ]

    shared = {"heads": 32, "kv_heads": 8}
    return [
        *at_all("softmax", full, softmax_and_sdpa, 2, since=4096),
        *at_all("softmax", causal, softmax_and_sdpa, 2, since=4096),
        *at_all("softmax", replace(full, dtype=half), softmax_and_sdpa, 3),
        *at_all("softmax", replace(causal, dtype=half), softmax_and_sdpa, 3),
        *at_all("softmax", training, softmax_and_sdpa, 1.8),
        *at_all("sigmoid", causal, beside_softmax("sigmoid"), 1),
        *at_all("sigmoid", training, beside_softmax("sigmoid"), 1),
        *at_all("LSSAR(15)", full, beside_softmax("lssar"), 1 / 1.6),
        *at_all("LSSAR(15)", causal, beside_softmax("lssar"), 1 / 1.6),
        *(
            at(4096, title, shape, beside_eager(name), 8, rounds=3)
            for title, name in (("LSSA", "lssa"), ("LSSAR(15)", "lssar"))
            for shape in (replace(full, backward=True), training)
        ),
        *(
            at(2**16, "softmax, one query", shape, softmax_and_sdpa, 1, of_bound=0.7)
            for shape in (Shape(0, queries=1), Shape(0, queries=1, dtype=half))
        ),
        *(
            at(4096, "softmax, D = 128", replace(shape, width=128), softmax_and_sdpa, 1)
            for shape in (full, causal, replace(causal, dtype=half), training)
        ),
        *(
            at(4096, "softmax, 32 heads on 8", replace(shape, **shared), softmax_and_sdpa, 1)
            for shape in (causal, replace(causal, dtype=half), training)
        ),
        *(
            at(77, "softmax", shape, softmax_and_sdpa, 1)
            for shape in (full, causal, replace(causal, dtype=half), training)
        ),
    ]


def rounds_and_repeats(operations: float, quick: bool) -> tuple[int, int]:
    rounds = 21 if operations < 3e9 else 11 if operations < 1e11 else 5 if operations < 3e11 else 3
    return 3 if quick else rounds, int(min(max(1, 1e9 // operations), 50))


def measure_targets(isa: str, threads: int, console: Console, record: Record, quick: bool) -> None:
    works = [work for work in targets() if not quick or work.shape.operations <= QUICK]
    for place, work in enumerate(works, 1):
        console.print(f"  {place}/{len(works)} {work.name}, T = {work.shape.tokens}", end=": ")
        line = {"isa": isa, "threads": threads} | measured(work, quick)
        record.add("targets", line, ("isa", "threads", "work", "tokens"))
        console.print(", ".join(cell for cell in _cells(line)[1:] if cell))


def measured(work: Work, quick: bool) -> dict:
    shape, operations = work.shape, work.shape.operations
    contenders = shape.contenders(work.ways(shape))
    in_pairs = shape.dtype == torch.bfloat16 and kernels.isa() == "avx512bf16"
    peak, in_peak = multipliers("multiply_pairs" if in_pairs else "multiply_adds", operations)
    if work.of_bound is None:
        contenders["yardstick"] = peak
    else:
        contenders["yardstick"] = keys_and_values(shape)
    rounds, repeats = rounds_and_repeats(operations, quick)
    if work.rounds is not None:
        rounds = min(rounds, work.rounds)
    seconds = time_rounds(contenders, rounds, repeats)
    peer, took = fastest(seconds, (OURS, "yardstick")), statistics.median(seconds[OURS])
    line = {
        "work": work.name,
        "tokens": shape.tokens,
        "against": peer,
        "asked": work.asked,
        **ratio(seconds[peer], seconds[OURS]),
        "milliseconds": 1e3 * took,
    }
    if work.of_bound is not None:
        bound = ratio(seconds["yardstick"], seconds[OURS])
        return line | {"bound": bound, "bound_asked": work.of_bound}
    return line | {
        "gigaflops": operations / took / 1e9,
        "of_peak": of_peak(seconds, OURS, operations, "yardstick", in_peak),
        "against_of_peak": of_peak(seconds, peer, operations, "yardstick", in_peak),
        "multipliers": "pairs" if in_pairs else "float32",
    }


def keys_and_values(shape: Shape) -> Callable[[], None]:
    """A read of both: what decoding cannot do without."""
    _, key, value = shape.inputs()
    reads = [memory(x.view(torch.float32)) for x in (key, value)]

    def run() -> None:
        for read in reads:
            read()

    return run


def of_peak(
    seconds: dict[str, list[float]], name: str, operations: float, peak: str, in_peak: float
) -> dict[str, float]:
    """How much of the multipliers' rate that contender reaches, round by round."""
    return ratio([taken * operations / in_peak for taken in seconds[peak]], seconds[name])


def hit(line: dict) -> bool | None:
    """Whether it does what was asked; None where nothing was."""
    asked = [(line["ratio"], line["asked"])]
    if "bound" in line:
        asked.append((line["bound"]["ratio"], line["bound_asked"]))
    asked = [(has, wanted) for has, wanted in asked if wanted is not None]
    return all(has >= wanted for has, wanted in asked) if asked else None


def _cells(line: dict) -> list[str]:
    asked = "" if line["asked"] is None else f"asked {line['asked']:.3g}"
    rate = f"{line['gigaflops']:.0f} GFLOP/s" if "gigaflops" in line else ""
    share = ""
    if "of_peak" in line:
        both = (line[name]["ratio"] for name in ("of_peak", "against_of_peak"))
        share = "{:.2f} and {:.2f} of the peak".format(*both)
    if "bound" in line:
        share = f"{line['bound']['ratio']:.2f} of the memory (asked {line['bound_asked']})"
    return [
        f"{line['work']}, T = {line['tokens']}",
        f"{line['ratio']:.2f} ({line['low']:.2f} to {line['high']:.2f})",
        line["against"],
        asked,
        {True: "hit", False: "MISS", None: ""}[hit(line)],
        f"{line['milliseconds']:.3g} ms",
        rate,
        share,
    ]


# ---- the curves over T -------------------------------------------------------------------------


def measure_lengths(
    isa: str, threads: int, console: Console, record: Record, quick: bool, up_to: int
) -> None:
    """Every system, causal, ours, FlexAttention's and eager, beside SDPA: its time over theirs."""
    for backward in (False, True):
        for tokens in SWEEP:
            shape = Shape(tokens, causal=True, backward=backward)
            if tokens > up_to or (quick and shape.operations > QUICK / 3):
                continue
            contenders = _curve_contenders(shape, console)
            rounds, repeats = rounds_and_repeats(13 * shape.operations, quick)
            seconds = time_rounds(contenders, min(rounds, 3) if tokens >= 4096 else rounds, repeats)
            for name, taken in seconds.items():
                way, system = name.split("/")
                line = {
                    "isa": isa,
                    "threads": threads,
                    "backward": backward,
                    "tokens": tokens,
                    "way": way,
                    "system": system,
                    "milliseconds": 1e3 * statistics.median(taken),
                    "over_sdpa": ratio(seconds["SDPA/softmax"], taken),
                }
                key = ("isa", "threads", "backward", "tokens", "way", "system")
                record.add("lengths", line, key)
            shown = ", ".join(
                f"{name.split('/')[1]} {ratio(seconds['SDPA/softmax'], taken)['ratio']:.2f}"
                for name, taken in seconds.items()
                if name.startswith(OURS)
            )
            console.print(f"  {shape.words}, T = {tokens}, ours over SDPA: {shown}")
            torch.compiler.reset()


def _curve_contenders(shape: Shape, console: Console) -> Contenders:
    ways = {"SDPA/softmax": sdpa(shape)["SDPA"]}
    for entry in (e for e in CATALOGUE if isinstance(e.system, RowMap) and e.walk == "dense"):
        ways[f"{OURS}/{entry.name}"] = ours(entry.name, shape)
        if shape.tokens <= EAGER_UP_TO:
            ways[f"eager/{entry.name}"] = eager(entry.name, shape)
        compiled = None if shape.backward else flex(entry.name, shape.tokens)
        if compiled is not None:
            ways[f"FlexAttention/{entry.name}"] = compiled
    contenders = shape.contenders(ways)
    compiled = [name for name in contenders if name.startswith("FlexAttention")]
    if compiled:
        console.print(f"  FlexAttention for T = {shape.tokens} is compiled")
    for name in compiled:
        try:
            contenders[name]()
        except Exception as error:  # whatever a compiler may say
            console.print(f"  {name} does not compile: {str(error).splitlines()[0]}")
            del contenders[name]
    return contenders


# ---- products ----------------------------------------------------------------------------------


def measure_products(isa: str, threads: int, console: Console, record: Record, quick: bool) -> None:
    """The two products of attention by themselves, as torch has them, beside a whole attention."""
    tokens, width = (1024 if quick else 4096), 64
    for rows, depth, columns in ((tokens, width, tokens), (tokens, tokens, width)):
        operations = 2 * rows * depth * columns
        contenders = products(rows, depth, columns)
        work: dict[str, float] = dict.fromkeys(contenders, operations)
        for dtype in (torch.float32, torch.bfloat16):
            shape = Shape(tokens, heads=1, kv_heads=1, width=width, dtype=dtype)
            ways = {f"{OURS}.attention": ours("softmax", shape)} | sdpa(shape)
            for name, run in shape.contenders(ways).items():
                title = f"{name}, {shape.words.split(',')[0]}"
                contenders[title], work[title] = run, shape.operations
        contenders["peak"], in_peak = multipliers("multiply_adds", operations)
        seconds = time_rounds(contenders, *rounds_and_repeats(operations, quick))
        product = f"{rows} x {depth} x {columns}"
        for name, done in work.items():
            line = {
                "isa": isa,
                "threads": threads,
                "product": product,
                "way": name,
                "gigaflops": done / statistics.median(seconds[name]) / 1e9,
                "of_peak": of_peak(seconds, name, done, "peak", in_peak),
            }
            record.add("products", line, ("isa", "threads", "product", "way"))
            rate = f"{line['gigaflops']:.0f} GFLOP/s, {line['of_peak']['ratio']:.2f} of the peak"
            console.print(f"  {product}: {name}: {rate}")


def products(rows: int, depth: int, columns: int) -> Contenders:
    """torch's: MKL's in float32 (in its usual builds), oneDNN's in bfloat16 and, asked for by name,
    in float32, whose result is always fresh."""
    torch.manual_seed(0)
    left, right, out = (
        torch.randn(n, m) for n, m in ((rows, depth), (depth, columns), (rows, columns))
    )
    half = [x.bfloat16() for x in (left, right, out)]
    ways: Contenders = {
        "torch.mm, float32": lambda: torch.mm(left, right, out=out),
        "torch.mm, bfloat16": lambda: torch.mm(half[0], half[1], out=half[2]),
    }
    if torch.backends.mkldnn.is_available():
        weight, linear = right.t().contiguous(), torch.ops.mkldnn._linear_pointwise
        ways["torch.mm, float32, fresh result"] = lambda: torch.mm(left, right)
        ways["oneDNN, float32, fresh result"] = lambda: linear(left, weight, None, "none", [], "")
    return ways


# ---- memory ------------------------------------------------------------------------------------

MEMORY_OF = (
    (OURS, "softmax"),
    (OURS, "lssa"),
    (OURS, "lssar"),
    ("SDPA", "softmax"),
    ("eager", "softmax"),
    ("eager", "lssa"),
    ("eager", "lssar"),
)


def _peak(way: str, system: str, tokens: int) -> float:
    torch.set_num_threads(1)

    def run(tokens: int) -> Callable[[], object]:
        shape = Shape(tokens, causal=True, backward=True)
        ways = {"SDPA": lambda: sdpa(shape)["SDPA"], "eager": lambda: eager(system, shape)}
        attend = ways.get(way, lambda: ours(system, shape))()
        return shape.contenders({way: attend})[way]

    run(64)()  # the libraries' own memory
    return peak_mebibytes(run(tokens))


def measure_memory(console: Console, record: Record, quick: bool) -> None:
    """Peak of forward and backward above the inputs; the result and three gradients count."""
    for tokens in SWEEP:
        if quick and tokens > 1024:
            continue
        for way, system in MEMORY_OF:
            if way == "eager" and tokens > EAGER_UP_TO:
                continue
            mebibytes = in_own_process(_peak, way, system, tokens)
            line = {"way": way, "system": system, "tokens": tokens, "mebibytes": mebibytes}
            record.add("memory", line, ("way", "system", "tokens"))
            console.print(f"  T = {tokens}, {way}, {system}: {mebibytes:,.0f} MiB")


# ---- the run -----------------------------------------------------------------------------------


def print_tables(console: Console, record: Record) -> None:
    """All targets with what was asked."""
    lines = record.lines("targets")
    for isa, threads in dict.fromkeys((r["isa"], r["threads"]) for r in lines):
        title = f"{isa}, {threads} thread{'s' * (threads > 1)}"
        table = Table(title=title, title_justify="left")
        for column in ("work", "times faster", "than", "asked", "", "time", "rate", "share"):
            table.add_column(column, justify="left" if column in ("work", "than") else "right")
        for line in lines:
            if (line["isa"], line["threads"]) == (isa, threads):
                table.add_row(*_cells(line), style="red" if hit(line) is False else None)
        console.print(table)
    took = {(r["way"], r["system"], r["tokens"]): r["mebibytes"] for r in record.lines("memory")}
    for system in ("lssa", "lssar"):
        at = {"system": system, "tokens": EAGER_UP_TO}
        both = [took.get((way, *at.values())) for way in ("eager", OURS)]
        if None not in both:
            less = both[0] / both[1]
            verdict = "hit" if less >= SAVED else "MISS"
            console.print(
                f"{system}, T = {EAGER_UP_TO}: {both[1]:,.0f} MiB, 1/{less:.0f} of the eager"
                f" {both[0]:,.0f} MiB (asked 1/{SAVED}): {verdict}"
            )


def main() -> None:
    parser = options_parser(__doc__, ("targets", "lengths", "products", "memory"))
    parser.add_argument("--isa", nargs="+", help="bodies; the best that runs by default")
    parser.add_argument("--quick", action="store_true", help="small works, three rounds: a trial")
    parser.add_argument(
        "--up-to", type=int, default=SWEEP[-1], metavar="T", help="the longest of the curves over T"
    )
    options = parser.parse_args()
    need_kernels()
    console, record = Console(highlight=False, soft_wrap=True), Record(options.save)
    if not console.is_terminal:
        console.width = 180
    isas = options.isa or bodies()[:1]
    timed = {
        "targets": (measure_targets, options.threads),
        "lengths": (
            functools.partial(measure_lengths, up_to=options.up_to),
            options.threads[:1],
        ),
        "products": (measure_products, options.threads),
    }
    try:
        for section, (measure, threads) in timed.items():
            if options.only in (None, section):
                for isa, count in settings(section, isas, threads, console):
                    measure(isa, count, console, record, options.quick)
        if options.only in (None, "memory"):
            kernels.use_isa(isas[0])
            console.print("[bold]extra memory, causal, forward and backward[/]")
            measure_memory(console, record, options.quick)
    except KeyboardInterrupt:
        console.print("\nstopped; what was measured:")
        print_tables(console, record)
        raise SystemExit(130) from None
    print_tables(console, record)


if __name__ == "__main__":
    main()
