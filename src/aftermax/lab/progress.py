"""Which system, step, loss, time left: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aftermax.lab.store import Store
from aftermax.lab.work import Run

PLAIN_SECONDS = 15.0
"""Between two plain lines of one run."""


class Board:
    """Shows the progress that the runs write into the store."""

    def __init__(self, console: Console, store: Store):
        self.console, self.store = console, store
        self.live = console.is_terminal
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self.live,
        )
        self.tasks: dict[str, int] = {}
        self.said: dict[str, float] = {}

    def __enter__(self) -> Board:
        self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        self.bars.stop()

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def start_phase(self, name: str, runs: list[Run]) -> None:
        """A phase of several runs: one bar for all, one for each that is being worked on."""
        for task in self.tasks.values():
            self.bars.remove_task(task)  # type: ignore[arg-type]
        self.tasks.clear()
        self.name, self.runs, self.began = name, {run.id: run for run in runs}, time.time()
        self.total = sum(run.steps for run in runs)
        waiting = [run for run in runs if self.store.status(run.id) != "done"]
        self.start = self.total - sum(run.steps for run in waiting)
        self.whole = self.bars.add_task(f"[bold]{name}", total=self.total, note="")
        self.tasks["*"] = self.whole
        if waiting:
            self.say(f"{name}: {len(waiting)} of {len(runs)} runs to do")

    def refresh(self, finished: set[str]) -> None:
        """Read the store and show it."""
        progress = {k: v for k, v in self.store.progress().items() if k in self.runs}
        done = sum(self.runs[run].steps for run in finished)
        done += sum(p["step"] for run, p in progress.items() if run not in finished)
        self.bars.update(self.whole, completed=done)  # type: ignore[arg-type]
        for run in [r for r in self.tasks if r != "*" and (r in finished or r not in progress)]:
            self.bars.remove_task(self.tasks.pop(run))  # type: ignore[arg-type]
        for run, state in progress.items():
            if run in finished:
                continue
            note = state["note"] or f"loss {state['loss']:.3f}"
            if run not in self.tasks:
                name = _name(self.runs[run])
                self.tasks[run] = self.bars.add_task(f"  {name}", total=state["steps"], note=note)
            self.bars.update(self.tasks[run], completed=state["step"], note=note)  # type: ignore[arg-type]
            self._say_plainly(run, state, note, done)

    def _say_plainly(self, run: str, state: dict, note: str, done: int) -> None:
        recently = time.time() - self.said.get(run, 0) < PLAIN_SECONDS
        if self.live or recently:
            return
        self.said[run] = time.time()
        spent, made = time.time() - self.began, done - self.start
        left = (self.total - done) * spent / made if made > 0 else math.nan
        ahead = "" if math.isnan(left) else f", {self.name} done in about {_clock(left)}"
        step = f"step {state['step']}/{state['steps']}"
        self.say(f"  {_name(self.runs[run])}: {step}, {note}{ahead}")


def _name(run: Run) -> str:
    if run.kind == "search":
        return f"{run.system} rate {run.learning_rate:g}"
    return f"{run.system} seed {run.seed}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
