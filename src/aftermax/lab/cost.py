"""What a system costs to train: speed side by side, and the peak of memory, each in a fair setting.

Speed is measured in one process, systems interleaved, several rounds: a noisy machine slows them
all alike, and the ratio to the first system within a round is what is reported. Memory is the peak
of a process of its own, above what it held before the step.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from aftermax.lab.store import Row
from aftermax.lab.tasks import Data, task_of
from aftermax.lab.train import batch, build, train_step
from aftermax.lab.work import Run

ROUNDS, STEPS_A_ROUND = 5, 4


def training_speed(runs: list[Run], data: Data) -> dict[str, list[Row]]:
    """Tokens per second of a training step, and the ratio to the first run's, by system."""
    torch.set_num_threads(runs[0].work.threads)
    built = {run.system: build(run, data) for run in runs}
    tokens = runs[0].work.batch * runs[0].work.context
    seconds: dict[str, list[float]] = {run.system: [] for run in runs}
    for _ in range(ROUNDS + 1):  # the first warms up
        for run in runs:
            start = time.perf_counter()
            for step in range(STEPS_A_ROUND):
                train_step(*built[run.system], batch(run, data, step), run, step)
            seconds[run.system].append((time.perf_counter() - start) / STEPS_A_ROUND)
    first = seconds[runs[0].system][1:]
    context = runs[0].work.context
    out = {}
    for system, taken in seconds.items():
        ratios = [a / b for a, b in zip(first, taken[1:], strict=True)]
        out[system] = [
            Row(0, context, "tokens_per_second", tokens / statistics.median(taken[1:])),
            Row(0, context, "speed_ratio", statistics.median(ratios)),
            Row(0, context, "speed_ratio_low", min(ratios)),
            Row(0, context, "speed_ratio_high", max(ratios)),
        ]
    return out


def training_memory(run: Run, data: Data) -> list[Row]:
    """MiB that one training step of the longest length adds at its peak, in a fresh process."""
    try:
        mebibytes = in_own_process(_peak, run, data.folder)
    except EOFError:
        raise RuntimeError(f"the memory of {run.system} could not be measured") from None
    return [Row(0, run.work.lengths[-1], "peak_mebibytes", mebibytes)]


def in_own_process(measure: Callable[..., float], *arguments: object) -> float:
    """What `measure(*arguments)` returns in a fresh process.

    Raises:
        EOFError: where the process ended before it had an answer.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(send, measure, *arguments), daemon=True)
    child.start()
    send.close()
    try:
        return receive.recv()
    finally:
        child.join()


def _answer(send: Connection, measure: Callable[..., float], *arguments: object) -> None:
    send.send(measure(*arguments))


def peak_mebibytes(function: Callable[[], object]) -> float:
    """How far the resident memory of this process rises above its present size in a call."""
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (Linux)
        before = _high_water()
    except OSError:
        before = _largest_ever()
    function()
    return _high_water() - before


def _give_back() -> None:
    """Free memory that is still resident serves a call without a trace: it goes first, on glibc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _high_water() -> float:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return _largest_ever()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _largest_ever() -> float:
    """Where the system keeps no mark that can be reset; macOS counts in bytes."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _peak(run: Run, folder: Path) -> float:
    torch.set_num_threads(run.work.threads)
    task = task_of(run.work)
    data = task.open_data(folder)
    model, optimiser = build(run, data)
    train_step(model, optimiser, batch(run, data, 0), run, 0)  # the optimiser's own memory
    return peak_mebibytes(task.largest_step(run, model, data))
