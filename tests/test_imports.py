"""An exported work in another store: the same runs under the same ids, and nothing to do again."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from aftermax.lab import grid
from aftermax.lab.imports import import_into
from aftermax.lab.results import Results
from aftermax.lab.store import COLUMNS, Row, Store


@pytest.fixture(scope="module")
def exported(comparison, tmp_path_factory):
    """The finished comparison as a file."""
    path = tmp_path_factory.mktemp("exported") / "rows.parquet"
    with Store(comparison[0] / "store.sqlite") as store:
        store.export(store.latest_work(), path)
    return path


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "out" / "store.sqlite") as opened:
        yield opened


def rows_but(path, dropped, to):
    """The file without the rows that are `dropped(row)`."""
    table = pq.read_table(path)
    kept = [row for row in table.to_pylist() if not dropped(row)]
    pq.write_table(pa.Table.from_pylist(kept, table.schema), to)
    return to


def test_what_was_imported_is_exported_as_the_same_table(exported, store, tmp_path):
    work, *_ = import_into(store, exported)
    store.export(work, tmp_path / "again.parquet")
    first, again = (pq.read_table(path) for path in (exported, tmp_path / "again.parquet"))
    assert again.equals(first, check_metadata=True)
    assert again.column_names == list(COLUMNS)


def test_the_work_has_the_id_that_it_had(exported, store, comparison):
    with Store(comparison[0] / "store.sqlite") as source:
        assert import_into(store, exported).work == source.latest_work() == store.latest_work()
        assert Results.of_store(source, source.latest_work()) == Results.of_store(
            store, store.latest_work()
        )


def test_importing_twice_changes_nothing(exported, store, tmp_path):
    first = import_into(store, exported)
    before = store.connection.execute("select * from rows").fetchall()
    assert import_into(store, exported) == first
    assert store.connection.execute("select * from rows").fetchall() == before
    assert (first.incomplete, first.foreign) == (0, 0)
    assert first.done == len(store.runs(first.work)) > 9


def test_compare_trains_nothing_that_is_there(exported, store, monkeypatch, comparison):
    """Nor does it measure again what the same systems cost."""
    name = import_into(store, exported).work
    results = Results.of_store(store, name)

    def never(*_, **__):
        raise AssertionError("there is nothing to do")

    for work in ("ProcessPoolExecutor", "training_speed", "training_memory"):
        monkeypatch.setattr(grid, work, never)
    out = store.path.parent
    assert grid.compare(results.work, results.preset, out, 1, Console(quiet=True)) == name
    assert Results.of_store(store, name).values == results.values


def test_compare_trains_what_the_file_lacks(exported, store, monkeypatch):
    """A system more than was published: its runs alone."""
    results = Results.of_store(store, import_into(store, exported).work)
    wider = dataclasses.replace(
        results.work, systems=(*results.work.systems, "cosine"), learning_rates=(1e-3,), seeds=(0,)
    )
    asked = []

    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, run, *_):
            asked.append(run.id)
            raise KeyboardInterrupt

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(grid, "ProcessPoolExecutor", Pool)
    rates = {system: results.rates.get(system, 1e-3) for system in wider.systems}
    monkeypatch.setattr(grid._Grid, "search", lambda self: rates)
    with pytest.raises(KeyboardInterrupt):
        grid.compare(wider, "quick", store.path.parent, 1, Console(quiet=True))
    assert [run.partition("-")[0] for run in asked] == ["cosine"]


# runs that had not come to their end


@pytest.mark.parametrize(
    ("kind", "measure"),
    [("train", "truncated_loss"), ("search", "tuning_loss"), ("cost", "peak_mebibytes")],
)
def test_a_run_without_its_end_is_not_done(exported, store, tmp_path, kind, measure):
    def last(row):
        return (row["kind"], row["system"], row["measure"]) == (kind, "lssar", measure)

    part = rows_but(exported, last, tmp_path / "part.parquet")
    taken = import_into(store, part)
    waiting = [run for run in store.runs(taken.work) if run["status"] != "done"]
    assert {(run["kind"], run["system"]) for run in waiting} == {(kind, "lssar")}
    assert len(waiting) == taken.incomplete >= 1
    assert all(store.rows(run["id"]) for run in waiting)
    assert import_into(store, exported).incomplete == 0  # the rest came later
    assert all(run["status"] == "done" for run in store.runs(taken.work))


def test_a_run_that_diverged_is_done(exported, store, tmp_path):
    table = pq.read_table(exported)
    rows = table.to_pylist()
    run = next(row["run"] for row in rows if row["kind"] == "train")
    kept = [row for row in rows if row["run"] != run]
    end = next(row for row in rows if row["run"] == run) | {"measure": "diverged", "value": 1.0}
    pq.write_table(pa.Table.from_pylist([*kept, end], table.schema), tmp_path / "part.parquet")
    import_into(store, tmp_path / "part.parquet")
    assert store.status(run) == "done"


def test_what_the_store_has_finished_stays_as_it_is(exported, store):
    work, *_ = import_into(store, exported)
    run = store.runs(work)[0]["id"]
    own = [Row(1, 48, "tuning_loss", 9.0)]
    store.write(run, own, done=True, instead=True)
    import_into(store, exported)
    assert store.rows(run) == own


def test_rows_of_a_run_begun_here_make_way_for_the_whole_run(exported, store):
    work, *_ = import_into(store, exported)
    run = store.runs(work)[-4]["id"]
    whole = store.rows(run)
    store.connection.execute("update runs set status = 'running' where id = ?", (run,))
    store.write(run, [Row(7, 1, "train_loss", 9.0)], instead=True)
    import_into(store, exported)
    assert store.rows(run) == whole
    assert store.status(run) == "done"


def test_runs_of_another_version_are_told(exported, store, tmp_path):
    table = pq.read_table(exported)
    rows = [row | {"run": row["run"] + "0"} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "other.parquet")
    taken = import_into(store, tmp_path / "other.parquet")
    assert taken.foreign == taken.done - 3  # the costs of three systems are no runs


def test_a_file_without_a_column_is_refused(exported, store, tmp_path):
    table = pq.read_table(exported).drop_columns("seed")
    pq.write_table(table, tmp_path / "less.parquet")
    with pytest.raises(ValueError, match=r"less.parquet is not a file of `aftermax export`"):
        import_into(store, tmp_path / "less.parquet")


def test_a_work_of_another_version_is_refused(exported, store, tmp_path):
    table = pq.read_table(exported)
    about = json.loads(table.schema.metadata[b"aftermax"])
    about["settings"]["colour"] = "blue"
    odd = table.replace_schema_metadata({b"aftermax": json.dumps(about).encode()})
    pq.write_table(odd, tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match=r"settings of another version.*colour"):
        import_into(store, tmp_path / "odd.parquet")
    assert store.connection.execute("select count(*) from works").fetchone() == (0,)
