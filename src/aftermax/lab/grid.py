"""All the runs of a work on this machine's cores; the same call goes on after a stop."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import platform
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from rich.console import Console

from aftermax.lab.cost import training_memory, training_speed
from aftermax.lab.progress import Board
from aftermax.lab.store import Store
from aftermax.lab.tasks import STUDIES, Data, source_of
from aftermax.lab.train import train
from aftermax.lab.work import SEARCH_SEED, AnyWork, Run, digest

WIDENINGS = 2
"""How often a search whose best rate lies at an edge of the tried ones goes on beyond it."""


def compare(work: AnyWork, preset: str, out: Path, workers: int | None, console: Console) -> str:
    """Train and measure every system of a work; its id in the store.

    Interrupted at any moment (Ctrl-C, a kill, a power cut), the same call goes on where it was.

    Args:
        out: folder of the store, the data and the checkpoints.
        workers: runs at the same time; None = as many as the cores hold.
    """
    task = source_of(work)
    data = task.prepare(work, out / "data")
    about = task.about(data)
    console.print(task.told(about), highlight=False)
    if workers is None:
        workers = max(1, _cores() // work.threads)
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    with Store(out / "store.sqlite") as store:
        name = digest(work.settings() | {"data_digest": data.digest})
        store.add_work(name, preset, work.settings(), machine(), about)
        with Board(console, store) as board:
            grid = _Grid(work, name, data, store, out, workers, board)
            rates = grid.search()
            grid.train(rates)
            if work.task not in STUDIES:
                grid.measure_cost(rates)
    return name


def machine() -> dict:
    """What the numbers were made on."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        processor = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    return {
        "processor": processor,
        "cores": _cores(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cores() -> int:
    """Those that this process may use, which a container may have fewer of than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Grid:
    """The three phases: the search for learning rates, the runs that count, what they cost."""

    def __init__(
        self,
        work: AnyWork,
        name: str,
        data: Data,
        store: Store,
        out: Path,
        workers: int,
        board: Board,
    ):
        self.work, self.name, self.data, self.store = work, name, data, store
        self.out, self.workers, self.board = out, workers, board

    def search(self) -> dict[str, float]:
        """The learning rate of each system, by the loss on the part kept for this.

        Where the best rate is the lowest or the highest that was tried, one beyond it is tried too,
        by the same factor; so no system is held back by the grid.
        """
        if len(self.work.learning_rates) == 1:
            return dict.fromkeys(self.work.systems, self.work.learning_rates[0])
        losses: dict[str, dict[float, float]] = {system: {} for system in self.work.systems}
        asked = {system: sorted(self.work.learning_rates) for system in self.work.systems}
        for _ in range(1 + WIDENINGS):
            runs = [
                Run(self.work, system, SEARCH_SEED, rate, "search", self.data.digest)
                for system, rates in asked.items()
                for rate in rates
            ]
            self._do("learning rates", runs)
            for run in runs:
                losses[run.system][run.learning_rate] = self._tuning_loss(run)
            beyond = {system: _beyond(tried) for system, tried in losses.items()}
            asked = {system: [rate] for system, rate in beyond.items() if rate is not None}
            if not asked:
                break
        chosen = {}
        for system, tried in losses.items():
            chosen[system] = min(tried, key=lambda rate: tried[rate])
            told = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(tried.items()))
            self.board.say(f"  {system}: {chosen[system]:g} ({told})")
        return chosen

    def train(self, rates: dict[str, float]) -> None:
        """Seed by seed, so that a first picture of every system comes early."""
        runs = [
            Run(self.work, system, seed, rates[system], "train", self.data.digest)
            for seed in self.work.seeds
            for system in self.work.systems
        ]
        self._do("fitting" if self.work.task in STUDIES else "training", runs)

    def measure_cost(self, rates: dict[str, float]) -> None:
        """Speed and memory; measured once, when nothing else of ours runs."""
        runs = [
            Run(self.work, system, self.work.seeds[0], rates[system], "train", self.data.digest)
            for system in self.work.systems
        ]
        # the speed of a system is a ratio to the first one's, so they are measured as one
        together = digest({"systems": self.work.systems, "runs": [run.id for run in runs]})
        names = {run.system: f"{run.system.replace('/', '+')}-cost-{together}" for run in runs}
        if all(self.store.status(name) == "done" for name in names.values()):
            for system, name in names.items():
                self.store.add_run(self.name, name, "cost", system, None, None, {})
            return
        self.board.say("cost: speed side by side, then memory")
        rows = training_speed(runs, self.data)
        for run in runs:
            name = names[run.system]
            self.store.add_run(self.name, name, "cost", run.system, None, None, run.settings())
            measured = rows[run.system] + training_memory(run, self.data)
            self.store.write(name, measured, done=True)

    def _tuning_loss(self, run: Run) -> float:
        rows = {row.measure: row.value for row in self.store.rows(run.id)}
        loss = rows.get("tuning_loss", math.nan)  # a run that diverged has none
        return loss if math.isfinite(loss) else math.inf

    def _do(self, phase: str, runs: list[Run]) -> None:
        for run in runs:
            self.store.add_run(
                self.name, run.id, run.kind, run.system, run.seed, run.learning_rate, run.settings()
            )
        finished = {run.id for run in runs if self.store.status(run.id) == "done"}
        waiting = [run for run in runs if run.id not in finished]
        self.board.start_phase(phase, runs)
        if not waiting:
            return
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        with ProcessPoolExecutor(
            min(self.workers, len(waiting)), context, _start_worker, (stop, os.getpid())
        ) as pool:
            futures: dict[Future, Run] = {}
            try:
                with _interrupt_held():  # workers inherit this: a Ctrl-C is the parent's alone
                    for run in waiting:
                        given = (run, self.data.folder, self.store.path, self.out / "runs")
                        futures[pool.submit(_work, *given)] = run
                pending = set(futures)
                while pending:
                    done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        finished.add(futures[future].id)
                    self.board.refresh(finished)
            except BrokenProcessPool:
                raise ChildProcessError(
                    "a worker was killed, for want of memory perhaps: try fewer --workers; "
                    "the same command goes on from here"
                ) from None
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _beyond(tried: dict[float, float]) -> float | None:
    """The next rate past the edge that the best one lies at; None where it lies inside."""
    rates = sorted(tried)
    best = rates.index(min(rates, key=lambda rate: tried[rate]))
    if best == 0:
        return _rounded(rates[0] * rates[0] / rates[1])
    if best == len(rates) - 1:
        return _rounded(rates[-1] * rates[-1] / rates[-2])
    return None


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


@contextlib.contextmanager
def _interrupt_held():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(stop, parent: int) -> None:
    """A worker leaves Ctrl-C to the parent, and ends when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    global _proceed
    _proceed = lambda: not stop.is_set()  # noqa: E731


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would wait for its next run forever."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)  # at any moment: what is written is whole


def _proceed() -> bool:
    return True


def _work(run: Run, data: Path, store: Path, folder: Path) -> None:
    with Store(store) as opened:
        study = STUDIES.get(run.work.task)
        perform = train if study is None else study.perform
        perform(run, source_of(run.work).open_data(data), opened, folder, lambda: _proceed())
