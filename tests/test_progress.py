"""What is shown while runs are at work: bars on a terminal, plain lines elsewhere."""

import io
import re

import pytest
from rich.console import Console

from aftermax.lab import progress
from aftermax.lab.progress import Board
from aftermax.lab.store import Store
from aftermax.lab.work import Run

from .lab_work import tiny_work

RUNS = [Run(tiny_work(None), system, 0, 3e-3, "train", "d") for system in ("softmax", "lssar")]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store.sqlite") as opened:
        for run in RUNS:
            opened.add_run("w", run.id, "train", run.system, 0, 3e-3, {})
        yield opened


def shown(store: Store, terminal: bool) -> str:
    """A phase of two runs: one begins, measures, and is done; then a second phase."""
    first = RUNS[0]
    said = io.StringIO()
    console = Console(file=said, force_terminal=terminal, width=120)
    with Board(console, store) as board:
        board.start_phase("training", RUNS)
        board.refresh(set())
        store.report_progress(first.id, 6, 12, 3.14159)
        board.refresh(set())
        store.report_progress(first.id, 12, 12, float("nan"), "measuring")
        board.refresh(set())
        store.write(first.id, [], done=True)
        board.refresh({first.id})
        board.start_phase("once more", RUNS)
        board.refresh({first.id})
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.getvalue())


def test_elsewhere_than_on_a_terminal_there_are_plain_lines(store, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    lines = shown(store, terminal=False).splitlines()
    assert lines[0] == "training: 2 of 2 runs to do"
    assert lines[1].startswith("  softmax seed 0: step 6/12, loss 3.142, training done in about ")
    assert lines[2].startswith("  softmax seed 0: step 12/12, measuring")
    assert lines[3:] == ["once more: 1 of 2 runs to do"]


def test_a_run_is_not_spoken_of_all_the_time(store):
    """Once in PLAIN_SECONDS: a log file stays readable."""
    assert shown(store, terminal=False).count("softmax seed 0") == 1


def test_on_a_terminal_there_are_bars(store):
    said = shown(store, terminal=True)
    assert "training" in said
    assert "12/24" in said
    assert "step 6/12" not in said


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3600, "60 min 00 s")]
)
def test_times_are_said_in_minutes(seconds, text):
    assert progress._clock(seconds) == text


def test_runs_of_a_search_are_told_apart_by_their_rate():
    run = Run(RUNS[0].work, "softmax/alibi", 1000, 2e-3, "search", "d")
    assert progress._name(run) == "softmax/alibi rate 0.002"
