"""The record: one SQLite file in WAL mode, one row for each (run, step, length, measure)."""

from __future__ import annotations

import fcntl
import json
import math
import sqlite3
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

SCHEMA = """
create table if not exists works (
    id text primary key, preset text, settings text, machine text, data text, started real
);
create table if not exists runs (
    id text primary key, kind text, system text, seed integer, learning_rate real,
    settings text, status text default 'waiting', started real, finished real
);
create table if not exists members (
    work text, run text, primary key (work, run)
) without rowid;
create table if not exists rows (
    run text, step integer, length integer, measure text, value real,
    primary key (run, step, length, measure)
) without rowid;
create table if not exists progress (
    run text primary key, step integer, steps integer, loss real, note text, updated real
);
"""


COLUMNS = (
    "run", "kind", "system", "seed", "learning_rate", "step", "length", "measure", "value",
)  # fmt: skip
"""Of an exported table."""


@dataclass(frozen=True)
class Row:
    step: int
    length: int
    measure: str
    value: float


class Store:
    """Open for reading and writing by several processes at once.

    Rows are keyed, so that a run which repeats steps after a kill writes the same rows again
    instead of more of them.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(path, timeout=60, isolation_level=None)
        self.connection.execute("pragma journal_mode = wal")
        self.connection.execute("pragma synchronous = full")
        self.connection.executescript(SCHEMA)

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @contextmanager
    def transaction(self):
        self.connection.execute("begin immediate")
        try:
            yield
        except BaseException:
            self.connection.execute("rollback")
            raise
        self.connection.execute("commit")

    def add_work(self, work: str, preset: str, settings: dict, machine: dict, data: dict) -> None:
        """Note the work; asking for it again makes it the latest."""
        self.connection.execute(
            "insert or replace into works values (?, ?, ?, ?, ?, ?)",
            (work, preset, *(json.dumps(x) for x in (settings, machine, data)), time.time()),
        )

    def add_run(self, work: str, run: str, kind: str, system: str, seed, rate, settings) -> None:
        with self.transaction():
            self.connection.execute(
                "insert or ignore into runs (id, kind, system, seed, learning_rate, settings) "
                "values (?, ?, ?, ?, ?, ?)",
                (run, kind, system, seed, rate, json.dumps(settings)),
            )
            self.connection.execute("insert or ignore into members values (?, ?)", (work, run))

    def status(self, run: str) -> str | None:
        found = self.connection.execute("select status from runs where id = ?", (run,)).fetchone()
        return found[0] if found else None

    def begin(self, run: str) -> None:
        self.connection.execute(
            "update runs set status = 'running', started = coalesce(started, ?) where id = ?",
            (time.time(), run),
        )

    def write(
        self, run: str, rows: Iterable[Row], done: bool = False, instead: bool = False
    ) -> None:
        """All rows or none; with `done` the run is finished in the same transaction.

        Args:
            instead: of all the rows that the run has so far.
        """
        values = [(run, r.step, r.length, r.measure, r.value) for r in rows]
        with self.transaction():
            if instead:
                self.connection.execute("delete from rows where run = ?", (run,))
            self.connection.executemany(
                "insert or replace into rows values (?, ?, ?, ?, ?)", values
            )
            if done:
                self.connection.execute(
                    "update runs set status = 'done', finished = ? where id = ?", (time.time(), run)
                )
                self.connection.execute("delete from progress where run = ?", (run,))

    def report_progress(self, run: str, step: int, steps: int, loss: float, note: str = "") -> None:
        self.connection.execute(
            "insert or replace into progress values (?, ?, ?, ?, ?, ?)",
            (run, step, steps, loss, note, time.time()),
        )

    def progress(self) -> dict[str, dict]:
        columns = ("run", "step", "steps", "loss", "note", "updated")
        found = self.connection.execute(f"select {', '.join(columns)} from progress").fetchall()
        return {row[0]: dict(zip(columns, row, strict=True)) for row in found}

    def latest_work(self) -> str:
        found = self.connection.execute(
            "select id from works order by started desc limit 1"
        ).fetchone()
        if found is None:
            raise ValueError(f"{self.path} holds no work yet: run `aftermax compare` first")
        return found[0]

    def work(self, work: str) -> dict:
        found = self.connection.execute(
            "select preset, settings, machine, data from works where id = ?", (work,)
        ).fetchone()
        if found is None:
            known = [w for (w,) in self.connection.execute("select id from works")]
            raise ValueError(f"{self.path} holds no work {work!r}; it has {', '.join(known)}")
        preset, *parts = found
        settings, machine, data = (json.loads(part) for part in parts)
        return {"preset": preset, "settings": settings, "machine": machine, "data": data}

    def works_of(self, run: str) -> list[str]:
        """The works that have this run, the latest first."""
        found = self.connection.execute(
            "select works.id from works join members on members.work = works.id "
            "where members.run = ? order by works.started desc",
            (run,),
        )
        return [work for (work,) in found]

    def runs(self, work: str) -> list[dict]:
        """The runs of a work, in the order in which they were added."""
        columns = ("id", "kind", "system", "seed", "learning_rate", "status", "started", "finished")
        found = self.connection.execute(
            f"select {', '.join(f'runs.{c}' for c in columns)} from runs join members "
            "on members.run = runs.id where members.work = ? order by runs.rowid",
            (work,),
        ).fetchall()
        return [dict(zip(columns, row, strict=True)) for row in found]

    def rows(self, run: str) -> list[Row]:
        found = self.connection.execute(
            "select step, length, measure, value from rows where run = ? "
            "order by step, length, measure",
            (run,),
        )
        return [
            Row(
                step, length, measure, math.nan if value is None else value
            )  # null is NaN to SQLite
            for step, length, measure, value in found
        ]

    def export(self, work: str, path: Path) -> int:
        """Every row of a work, with its run's system, seed and rate, as Parquet; their count."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        records = [
            {"run": run["id"], **run, **asdict(row)}
            for run in self.runs(work)
            for row in self.rows(run["id"])
        ]
        if not records:
            raise ValueError(f"work {work} has no rows yet")
        kept = [{name: record[name] for name in COLUMNS} for record in records]
        table = pa.Table.from_pylist(kept)
        about = {b"aftermax": json.dumps(self.work(work)).encode()}
        scratch = path.with_name(path.name + ".part")
        pq.write_table(table.replace_schema_metadata(about), scratch)
        scratch.replace(path)
        return len(records)


@contextmanager
def alone(folder: Path):
    """Hold the run's lock, so that two processes never write one run; it dies with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is at work on {folder.name}") from None
        yield
