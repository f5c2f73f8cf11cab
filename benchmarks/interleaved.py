"""What the benchmarks share: contenders side by side in one process, yardsticks, and the record.

All contenders of a line run in one process, interleaved, in an order that is shuffled anew every
round; what is reported is the median over the rounds of the ratio within a round, and its
interquartile range. The record is written after each line, so that a run that is stopped (Ctrl-C)
keeps what it has measured.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import aftermax
from aftermax import kernels
from aftermax.lab.grid import machine

Contenders = dict[str, Callable[[], object]]

OURS = "aftermax"


# ---- timing ------------------------------------------------------------------------------------


def time_rounds(
    contenders: Contenders,
    rounds: int,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, order shuffled."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):  # the first warms up
        for name in order.sample(list(contenders), len(contenders)):
            start = clock()
            for _ in range(repeats):
                contenders[name]()
            seconds[name].append((clock() - start) / repeats)
    return {name: taken[1:] for name, taken in seconds.items()}


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """The median of over / under round by round, and its quartiles."""
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(over, under, strict=True)], n=4, method="inclusive"
    )
    return {"ratio": middle, "low": low, "high": high}


def fastest(seconds: dict[str, list[float]], but: tuple[str, ...]) -> str:
    """The quickest of the peers: all contenders `but` those."""
    peers = [name for name in seconds if name not in but]
    return min(peers, key=lambda name: statistics.median(seconds[name]))


# ---- yardsticks --------------------------------------------------------------------------------


def memory(x: Tensor, y: Tensor | None = None) -> Callable[[], None]:
    """A read of float32 x, or a streamed copy to y, on torch's threads."""
    library = kernels.loaded()
    count = ctypes.c_int64(x.numel())
    source = ctypes.c_void_p(x.data_ptr())
    target = None if y is None else ctypes.c_void_p(y.data_ptr())
    return lambda held=(x, y): library.am_memory(source, target, count)


def multipliers(name: str, about: float) -> tuple[Callable[[], None], int]:
    """The loop of nothing but products, on as many threads as torch's; its number of operations.

    Args:
        name: "multiply_adds" (float32) or "multiply_pairs" (bfloat16); 0 operations where the body
            in use has no such multipliers.
        about: operations that there should be, within limits: enough to be timed, not too many.
    """
    loop = getattr(kernels.loaded(), f"am_{name}")
    loop.argtypes, loop.restype = [ctypes.c_int64], ctypes.c_int64
    in_a_round, threads = loop(1), torch.get_num_threads()
    rounds = int(min(max(about, 2e8), 4e9) / max(1, in_a_round * threads))

    def run() -> None:  # ctypes leaves Python's lock to the others
        others = [threading.Thread(target=loop, args=(rounds,)) for _ in range(threads - 1)]
        for other in others:
            other.start()
        loop(rounds)
        for other in others:
            other.join()

    return run, rounds * in_a_round * threads


# ---- the record --------------------------------------------------------------------------------


class Record:
    """Sections of lines, in a JSON file where one is given, written after each line.

    What is measured again takes the place of what the file had; the rest of it is kept.
    """

    def __init__(self, file: Path | None):
        self.file, about = file, machine()
        kept = json.loads(file.read_text()) if file is not None and file.exists() else {}
        for name in ("processor", "torch"):
            if kept and kept["machine"][name] != about[name]:
                raise SystemExit(
                    f"{file} was measured with another {name} ({kept['machine'][name]}, and here"
                    f" {about[name]}): name another file"
                )
        self.results: dict = kept | {"machine": about, "version": aftermax.__version__}

    def lines(self, section: str) -> list[dict]:
        return self.results.get(section, [])

    def add(self, section: str, line: dict, key: tuple[str, ...]) -> None:
        """Two lines that are the same in `key` are of the same thing."""
        lines = self.results.setdefault(section, [])
        for i, other in enumerate(lines):
            if all(other.get(name) == line.get(name) for name in key):
                lines[i] = line
                break
        else:
            lines.append(line)
        if self.file is not None:
            fresh = self.file.with_name(f"{self.file.name}.new")
            fresh.write_text(json.dumps(self.results, indent=1) + "\n")
            fresh.replace(self.file)


# ---- the run -----------------------------------------------------------------------------------


def options_parser(doc: str, sections: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--save", type=Path, help="a JSON file to keep the numbers in")
    parser.add_argument("--only", choices=sections)
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    return parser


def need_kernels() -> None:
    if kernels.absent():
        raise SystemExit(kernels.absent())


def bodies() -> list[str]:
    """The bodies that run here and are written for some processor, best first."""
    return [isa for isa in kernels.ISAS if isa != "portable" and _runs(isa)]


def _runs(isa: str) -> bool:
    try:
        kernels.use_isa(isa)
    except RuntimeError:
        return False
    return True


def settings(
    section: str, isas: list[str], threads: list[int], console: Console
) -> Iterator[tuple[str, int]]:
    """Each body with each number of threads, set and announced."""
    for isa in isas:
        kernels.use_isa(isa)
        for count in threads:
            torch.set_num_threads(count)
            console.print(f"[bold]{section}, {isa}, {count} thread{'s' * (count > 1)}[/]")
            yield isa, count
