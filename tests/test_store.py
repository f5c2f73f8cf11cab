"""The record: keyed rows, all or nothing, many writers, and a copy that says the same."""

import sqlite3
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aftermax.lab.results import Results
from aftermax.lab.store import Row, Store
from aftermax.lab.work import Work

LOSS = Row(10, 64, "loss", 3.25)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "new" / "store.sqlite") as opened:
        opened.add_run("w", "a", "train", "softmax", 0, 1e-3, {"width": 16})
        yield opened


def test_a_store_makes_its_folder_and_keeps_a_log_ahead_of_the_file(store):
    assert store.path.exists()
    assert store.connection.execute("pragma journal_mode").fetchone() == ("wal",)


def test_rows_come_back_as_they_were_in_the_order_of_their_key(store):
    rows = [Row(10, 64, "mqar", 0.5), LOSS, Row(2, 64, "loss", 1e-300), Row(10, 32, "z", -1.0)]
    store.write("a", rows)
    assert store.rows("a") == [rows[2], rows[3], rows[1], rows[0]]
    assert store.rows("another") == []


def test_writing_the_same_rows_again_changes_nothing(store):
    for _ in range(3):
        store.write("a", [LOSS, Row(20, 64, "loss", 3.0)])
    assert store.rows("a") == [LOSS, Row(20, 64, "loss", 3.0)]


def test_a_loss_that_is_not_a_number_comes_back_as_such(store):
    store.write("a", [Row(1, 64, "loss", float("nan")), Row(2, 64, "loss", float("inf"))])
    first, second = (row.value for row in store.rows("a"))
    assert first != first
    assert second == float("inf")


def test_rows_are_written_all_or_none(store):
    with pytest.raises(sqlite3.Error):
        store.write("a", [LOSS, Row(object(), 64, "loss", 1.0)], done=True)
    assert store.rows("a") == []
    assert store.status("a") == "waiting"


def test_what_fails_in_a_transaction_never_was(store):
    def half():
        with store.transaction():
            store.connection.execute("insert into rows values ('a', 1, 1, 'loss', 1.0)")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert store.rows("a") == []
    store.write("a", [LOSS])  # and the store goes on working
    assert store.rows("a") == [LOSS]


def test_a_run_goes_from_waiting_to_done_and_leaves_no_progress(store):
    assert store.status("unknown") is None
    assert store.status("a") == "waiting"
    store.begin("a")
    store.report_progress("a", 3, 10, 2.5)
    assert store.status("a") == "running"
    assert store.progress()["a"]["step"] == 3
    store.write("a", [LOSS], done=True)
    assert store.status("a") == "done"
    assert store.progress() == {}


def test_adding_a_run_again_leaves_it_as_it_is(store):
    store.write("a", [LOSS], done=True)
    store.add_run("w", "a", "train", "softmax", 0, 1e-3, {})
    assert store.status("a") == "done"
    assert len(store.runs("w")) == 1


def test_two_works_share_a_run(store):
    store.add_run("other", "a", "train", "softmax", 0, 1e-3, {})
    store.add_run("other", "b", "train", "lssar", 0, 1e-3, {})
    assert [run["id"] for run in store.runs("w")] == ["a"]
    assert [run["id"] for run in store.runs("other")] == ["a", "b"]


def test_a_store_that_is_opened_again_holds_the_same(store):
    store.write("a", [LOSS])
    with Store(store.path) as again:
        assert again.rows("a") == [LOSS]


WRITER = """
import sys, pathlib
from aftermax.lab.store import Row, Store
with Store(pathlib.Path(sys.argv[1])) as store:
    for step in range(60):
        store.write(sys.argv[2], [Row(step, 64, "loss", 1.0), Row(step, 64, "mqar", 1.0)])
        store.report_progress(sys.argv[2], step, 60, 0.0)
"""


def test_several_processes_write_at_once(store):
    runs = ("a", "b", "c")
    arguments = [sys.executable, "-c", WRITER, str(store.path)]
    writers = [subprocess.Popen([*arguments, run]) for run in runs]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    for run in runs:
        assert len(store.rows(run)) == 120
        assert store.progress()[run]["step"] == 59


# works, and what is taken out


def fill(store: Store) -> Work:
    work = Work(systems=("softmax", "lssar"), multiples=(1, 2), seeds=(0, 1))
    about = {"name": "a text", "digest": "d", "tokens": 1000}
    store.add_work("full", "quick", work.settings(), {"cores": 2}, about)
    for system in work.systems:
        store.add_run("full", f"{system}-s", "search", system, 1000, 1e-3, {})
        store.write(f"{system}-s", [Row(9, 64, "tuning_loss", 4.0)], done=True)
        for seed in work.seeds:
            run = f"{system}-{seed}"
            store.add_run("full", run, "train", system, seed, 1e-3, {})
            rows = [Row(9, length, "loss", 3.0 + seed + length / 7) for length in work.lengths]
            store.write(run, [*rows, Row(5, 64, "train_loss", 5.0)], done=True)
        store.add_run("full", f"{system}-c", "cost", system, None, None, {})
        store.write(f"{system}-c", [Row(0, 64, "speed_ratio", 1.0)], done=True)
    return work


def test_a_work_comes_back_with_its_settings(store):
    work = fill(store)
    assert store.latest_work() == "full"
    assert store.work("full")["preset"] == "quick"
    assert Results.of_store(store, "full").work == work


def test_asking_for_a_work_again_makes_it_the_latest(store):
    for work in ("first", "second", "first"):
        store.add_work(work, "quick", {}, {}, {})
    assert store.latest_work() == "first"


def test_a_parquet_file_gives_the_same_results(store, tmp_path):
    fill(store)
    path = tmp_path / "rows.parquet"
    count = store.export("full", path)
    assert Results.of_parquet(path) == Results.of_store(store, "full")
    table = pq.read_table(path)
    assert table.num_rows == count == 2 * (1 + 2 * 3 + 1)
    columns = "run kind system seed learning_rate step length measure value"
    assert table.column_names == columns.split()
    assert [p.name for p in tmp_path.glob("*.parquet*")] == ["rows.parquet"]


def test_an_empty_store_says_what_to_do(store):
    with pytest.raises(ValueError, match=r"holds no work yet: run `aftermax compare` first"):
        store.latest_work()


def test_an_unknown_work_lists_those_that_there_are(store, tmp_path):
    store.add_work("known", "quick", {}, {}, {})
    with pytest.raises(ValueError, match="holds no work 'other'; it has known"):
        store.work("other")
    with pytest.raises(ValueError, match="work known has no rows yet"):
        store.export("known", tmp_path / "rows.parquet")


def test_a_parquet_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ValueError, match=r"other.parquet is not a file of `aftermax export`"):
        Results.of_parquet(path)
