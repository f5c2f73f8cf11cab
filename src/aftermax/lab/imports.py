"""What `aftermax export` wrote, read back: for a report, or into a store that goes on from it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from aftermax.lab.store import COLUMNS, Row, Store
from aftermax.lab.tasks import work_of
from aftermax.lab.work import AnyWork, Run, digest


class Imported(NamedTuple):
    work: str
    """Its id, as `aftermax compare` computes it."""
    preset: str
    done: int
    incomplete: int
    """Runs that had not come to their end when they were exported; compare trains them."""
    foreign: int
    """Done, but by another version of aftermax or torch: compare trains its own beside them."""


def read_export(path: Path) -> tuple[dict, list[dict]]:
    """What the file says of its work, and its rows."""
    import pyarrow.parquet as pq

    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    table = pq.read_table(path)
    about = (table.schema.metadata or {}).get(b"aftermax")
    if about is None or set(table.column_names) != set(COLUMNS):
        raise ValueError(f"{path} is not a file of `aftermax export`")
    return json.loads(about), table.to_pylist()


def import_into(store: Store, path: Path) -> Imported:
    """Put the work of an exported file into a store: its runs, under the same ids, and their rows.

    A run that the store has finished stays as it is. One that the file has finished takes the place
    of what the store has of it. One that neither has finished gets the file's rows where the store
    has none, and stays to be trained.
    """
    about, records = read_export(path)
    work = work_of(about["settings"])
    data = about["data"]["digest"]
    name = digest(about["settings"] | {"data_digest": data})
    of_run: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        of_run[record["run"]].append(record)
    store.add_work(name, about["preset"], about["settings"], about["machine"], about["data"])
    done, foreign = 0, 0
    for run, own in of_run.items():
        kind, system, seed, rate = (
            own[0][key] for key in ("kind", "system", "seed", "learning_rate")
        )
        whole = _complete(work, kind, own)
        rows = [Row(r["step"], r["length"], r["measure"], r["value"]) for r in own]
        store.add_run(name, run, kind, system, seed, rate, {"imported": about["machine"]})
        if store.status(run) != "done" and (whole or not store.rows(run)):
            store.write(run, rows, done=whole, instead=True)
        done += whole
        foreign += whole and kind != "cost" and run != Run(work, system, seed, rate, kind, data).id
    return Imported(name, about["preset"], done, len(of_run) - done, foreign)


def _complete(work: AnyWork, kind: str, records: list[dict]) -> bool:
    """Whether the run came to its end: the rows of its end are written all at once."""
    found = {(r["measure"], r["length"]) for r in records}
    measures = {measure for measure, _ in found}
    if kind == "cost":
        return "peak_mebibytes" in measures
    if "diverged" in measures:
        return True
    if kind == "search":
        return "tuning_loss" in measures
    return {(work.final, length) for length in work.lengths} <= found
