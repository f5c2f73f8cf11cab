"""The command itself, killed and interrupted: what it comes to is what a quiet run comes to."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aftermax.lab.store import Store
from aftermax.lab.train import train
from aftermax.lab.work import Run

from .lab_work import command, open_store, prepared, run_of, tiny_work, write_texts

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="finds the processes of a group in /proc"
)
PATIENCE = 600.0
"""Seconds: a machine that is busy with other things is slow, not wrong."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    texts = write_texts(tmp_path_factory.mktemp("kill") / "texts")
    return tiny_work(texts, steps=260)


@pytest.fixture(scope="module")
def quiet(work, tmp_path_factory):
    """Rows and tensors of runs that nobody disturbs, in this process."""
    folder = tmp_path_factory.mktemp("quiet")
    corpus = prepared(work, folder)
    for system in work.systems:
        run = run_of(work, corpus, system)
        with open_store(folder, run) as store:
            assert train(run, corpus, store, folder / "runs")
    return rows_of(folder), tensors_of(folder)


def rows_of(out: Path) -> list:
    """Every row but the costs, which are timings."""
    with Store(out / "store.sqlite") as store:
        found = store.connection.execute(
            "select rows.* from rows join runs on runs.id = rows.run where kind != 'cost' "
            "order by run, step, length, measure"
        )
        return found.fetchall()


def tensors_of(out: Path) -> dict:
    paths = sorted((out / "runs").glob("*/checkpoint.safetensors"))
    return {path.parent.name: load_file(path) for path in paths}


def assert_same(out: Path, quiet) -> None:
    rows, tensors = quiet
    assert rows_of(out) == rows
    ours = tensors_of(out)
    assert ours.keys() == tensors.keys()
    for run, expected in tensors.items():
        assert ours[run].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(ours[run][name], tensor), (run, name)


class Process:
    """`aftermax compare` as the leader of a group of its own, as in a terminal."""

    def __init__(self, work, out: Path):
        self.out, self.log = out, (out.parent / f"{out.name}.log")
        arguments = [sys.executable, "-m", "aftermax.cli", *command(work, out, workers=2)]
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                arguments,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # a suite in the background has Ctrl-C ignored, and would hand that down
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.members():
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def members(self) -> list[int]:
        """The living processes of the group."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            except OSError:  # it has just ended
                continue
            if int(group) == self.popen.pid and state not in "ZX":
                found.append(int(path.parent.name))
        return found

    def until(self, reached) -> None:
        """Wait until `reached(store)`, or the end of the process."""
        deadline = time.monotonic() + PATIENCE
        while self.popen.poll() is None and time.monotonic() < deadline:
            if (self.out / "store.sqlite").exists():
                with Store(self.out / "store.sqlite") as store:
                    if reached(store):
                        return
            time.sleep(0.01)
        assert self.popen.poll() is not None, f"nothing happened:\n{self.log.read_text()}"

    def until_all_are_gone(self) -> None:
        deadline = time.monotonic() + PATIENCE / 10
        while self.members() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.members() == [], "workers outlive their parent"

    def wait(self) -> int:
        return self.popen.wait(PATIENCE)


def steps_made(store: Store) -> int:
    done = store.connection.execute(
        "select count(*) from runs where status = 'done' and kind = 'train'"
    ).fetchone()[0]
    return 260 * done + sum(state["step"] for state in store.progress().values())


def more_steps(count: int):
    """Whether that many steps have been made since this was asked first."""
    seen: list[int] = []

    def reached(store: Store) -> bool:
        seen.append(steps_made(store))
        return seen[-1] >= seen[0] + count

    return reached


def test_killed_at_random_moments_it_comes_to_the_same(work, quiet, tmp_path):
    """Three times the whole group, once the parent alone: its workers end by themselves."""
    chance = random.Random(0)
    for kill in (os.killpg, os.kill, os.killpg, os.killpg):
        with Process(work, tmp_path / "out") as process:
            process.until(more_steps(chance.randint(20, 100)))
            kill(process.popen.pid, signal.SIGKILL)
            process.popen.wait()
            process.until_all_are_gone()
    with Process(work, tmp_path / "out") as process:
        assert process.wait() == 0, process.log.read_text()
    assert_same(tmp_path / "out", quiet)
    assert (tmp_path / "out" / "report.html").exists()


def test_ctrl_c_says_how_to_go_on_and_keeps_what_was_done(work, quiet, tmp_path):
    """In a terminal Ctrl-C reaches the workers too: also while they start, they stay quiet."""
    out = tmp_path / "out"
    with Process(work, out) as process:
        process.until(lambda store: store.connection.execute("select 1 from runs").fetchall())
        time.sleep(0.5)
        os.killpg(process.popen.pid, signal.SIGINT)
        assert process.wait() == 130
        lines = process.log.read_text().splitlines()
        assert lines[-1] == "interrupted; the same command goes on from here"
        assert not [line for line in lines if "Traceback" in line]
    with Process(work, out) as process:
        process.until(lambda store: steps_made(store) >= 40)
        os.killpg(process.popen.pid, signal.SIGINT)
        assert process.wait() == 130
        assert "Traceback" not in process.log.read_text()
    assert tensors_of(out)
    corpus = prepared(work, out)
    with Store(out / "store.sqlite") as store:
        for system in work.systems:
            assert train(run_of(work, corpus, system), corpus, store, out / "runs")
    assert_same(out, quiet)


def is_locked(store: Path) -> bool:
    with contextlib.closing(sqlite3.connect(store, timeout=0, isolation_level=None)) as asked:
        try:
            asked.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        asked.execute("ROLLBACK")
        return False


def test_two_commands_at_once_do_not_spoil_each_other(work, quiet, tmp_path):
    """The second gives up with one line, and the first goes on."""
    out = tmp_path / "out"
    with Process(work, out) as first:
        first.until(lambda store: steps_made(store) > 0)
        while True:  # stopped, so that it is still there, and so are its runs
            for pid in first.members():
                os.kill(pid, signal.SIGSTOP)
            if not is_locked(out / "store.sqlite"):
                break  # in the middle of a write it would be the store that the second waits for
            for pid in first.members():
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)
        with Process(work, tmp_path / "out") as second:
            assert second.wait() == 2
            said = second.log.read_text()
        for pid in first.members():
            os.kill(pid, signal.SIGCONT)
        assert "aftermax: another process is at work on " in said
        assert "Traceback" not in said
        assert first.wait() == 0
    assert_same(out, quiet)


def test_a_worker_that_is_killed_is_reported_in_one_line(work, tmp_path):
    with Process(work, tmp_path / "out") as process:
        process.until(lambda store: steps_made(store) > 0)
        for pid in process.members():
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                break
        assert process.wait() == 2
        said = process.log.read_text()
    assert "aftermax: a worker was killed" in said
    assert "Traceback" not in said


def test_a_run_that_diverged_is_a_result_like_any_other(work, tmp_path):
    """The grid goes on, the report is written, and says which run it was."""
    out = tmp_path / "out"
    short = tiny_work(work.data, steps=4)
    corpus = prepared(short, out)
    run = Run(short, "lssar", 0, 3e-3, "train", corpus.digest)
    with open_store(out, run) as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr("aftermax.lab.train.learning_rate", lambda run, step: 1e30)
        assert train(run, corpus, store, out / "runs")
        assert [row.measure for row in store.rows(run.id)] == ["diverged"]
    with Process(short, out) as process:
        assert process.wait() == 0, process.log.read_text()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "lssar, seed 0" in page


def test_the_search_passes_over_a_rate_that_diverged(work, tmp_path):
    out = tmp_path / "out"
    rates = (1e30, 3e-3)
    searching = tiny_work(
        work.data, systems=("softmax",), steps=4, search_steps=4, learning_rates=rates
    )
    with Process(searching, out) as process:
        assert process.wait() == 0, process.log.read_text()
    with Store(out / "store.sqlite") as store:
        runs = store.runs(store.latest_work())
    assert [run["learning_rate"] for run in runs if run["kind"] == "train"] == [3e-3]
