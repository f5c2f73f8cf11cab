"""The command line: what it says, what it refuses in a line, and options that parse back."""

import dataclasses
import re
import shlex
import sqlite3
from pathlib import Path

import pytest

from aftermax import CATALOGUE
from aftermax.cli import main, preset_of
from aftermax.lab import grid
from aftermax.lab.results import Results
from aftermax.lab.store import Store
from aftermax.lab.tasks import PRESETS as PRESETS_OF
from aftermax.lab.work import PRESETS

from .lab_work import write_texts


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call `aftermax` with arguments: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def called(*arguments):
        monkeypatch.setattr("sys.argv", ["aftermax", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capsys.readouterr()

    return called


def refused(run, *arguments) -> str:
    """What is wrong, in a line: no trace, nothing on standard output."""
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    return err


def test_help_names_the_commands(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in (
        "compare",
        "report",
        "export",
        "import",
        "generate",
        "to-hugging-face",
        "catalogue",
    ):
        assert command in out


def test_help_of_a_preset_gives_its_own_defaults(run):
    code, out, _ = run("compare", "quick", "--help")
    assert code == 0
    for field in dataclasses.fields(PRESETS["quick"]):
        assert f"--{field.name.replace('_', '-')}" in out
    assert f"(default: {PRESETS['quick'].steps})" in out
    assert "--out" in out
    assert "--workers" in out


def test_help_of_a_task_gives_its_own_options(run):
    code, out, _ = run("compare", "--task", "vision", "--help")
    assert code == 0
    assert "(default: vision)" in out
    for preset in PRESETS_OF["vision"]:
        assert f"• {preset} " in out
    for arguments in (["quick", "--task=vision"], ["--task", "vision", "quick"]):
        code, out, _ = run("compare", *arguments, "--help")
        assert code == 0
        for field in dataclasses.fields(PRESETS_OF["vision"]["quick"]):
            assert f"--{field.name.replace('_', '-')}" in out
        assert "--multiples" not in out


@pytest.mark.parametrize(
    ("arguments", "task", "changes"),
    [
        ([], "text", {}),
        (["--task", "text", "--steps", "7"], "text", {"steps": 7}),
        (["--task", "vision"], "vision", {}),
        (["--steps", "7", "--task=vision"], "vision", {"steps": 7}),
        (["--task", "rates", "--dim", "1"], "rates", {"dim": 1}),
    ],
    ids=" ".join,
)
def test_without_a_preset_it_is_quick(run, monkeypatch, arguments, task, changes):
    taken = []
    monkeypatch.setattr(grid, "compare", lambda work, *_: taken.append(work) or interrupt())
    run("compare", *arguments)
    assert taken == [dataclasses.replace(PRESETS_OF[task]["quick"], **changes)]


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sound"], "invalid choice 'sound' for argument '--task'"),
        (["--task"], "--task"),
        (["fast", "--task", "vision"], "fast"),
        (["quick", "--task", "vision", "--context", "64"], "--context"),
        (["quick", "--patch", "2"], "--patch"),
        (["--task", "vision", "--systems", "softmax/alibi"], "softmax/alibi: no trait alibi;"),
        (["--task", "vision", "--data", "nowhere"], "--data nowhere: there is no such folder"),
        (["quick", "--task", "rates", "--steps", "7"], "--steps"),
        (["full", "--task", "rates", "--box", "1"], "box >= 1.2, got 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_task_and_options_that_do_not_fit_are_refused(run, tmp_path, arguments, message):
    assert message in refused(run, "compare", *arguments)
    assert not (tmp_path / "aftermax-runs" / "store.sqlite").exists()


def test_the_catalogue_is_a_table_of_every_system(run):
    code, out, _ = run("catalogue")
    assert code == 0
    for entry in CATALOGUE:
        assert entry.name in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "softmaxx"], "no system is called 'softmaxx'; the catalogue has softmax,"),
        (["--multiples", "2", "4"], "multiples must rise and begin with 1, got (2, 4)"),
        (["--seeds", "0", "0"], "one of the seeds stands twice"),
        (["--heads", "0"], "heads must be at least 1, got 0"),
        (["--steps", "many"], "many"),
    ],
)
def test_a_work_that_cannot_be_is_refused(run, tmp_path, arguments, message):
    assert message in refused(run, "compare", "quick", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_not_there_is_refused(run, tmp_path):
    err = refused(run, "compare", "quick", "--data", "nowhere")
    assert err == "aftermax: --data nowhere: there is no such file or folder\n"
    assert not (tmp_path / "aftermax-runs" / "store.sqlite").exists()


@pytest.mark.parametrize("command", ["report", "export"])
def test_a_folder_without_a_store_is_refused(run, tmp_path, command):
    err = refused(run, command, "--out", "empty")
    assert err == "aftermax: empty holds no store: run `aftermax compare --out empty` first\n"
    assert list(tmp_path.iterdir()) == []


def test_a_parquet_file_that_is_none_is_refused(run, tmp_path):
    assert "nowhere: there is no such file" in refused(run, "report", "--parquet", "nowhere")
    Path("text.parquet").write_text("no parquet")
    assert refused(run, "report", "--parquet", "text.parquet").startswith("aftermax: ")


def test_ctrl_c_is_no_trace(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "compare", interrupted)
    code, _, err = run("compare", "quick")
    assert (code, err) == (130, "interrupted; the same command goes on from here\n")


# a preset with options


CHANGES = {
    "quick": {},
    "long": {"threads": 2},
    "standard": {"seeds": (3, 4), "systems": ("softmax/alibi", "lssar")},
    "quick with others": {
        "data": Path("a folder/with spaces"),
        "kv_heads": 1,
        "qk_norm": False,
        "hybrid_norm": True,
        "learning_rates": (1e-3, 2.5e-4),
        "tokenizer": "bpe",
        "positions": "p-rope",
        "recall_share": 0.125,
    },
}


IMAGES = {
    "quick": {},
    "standard": {"seeds": (3,), "systems": ("softmax/bare", "sigmoid"), "threads": 2},
    "long": {
        "data": Path("a folder/with spaces"),
        "image_size": 32,
        "patch": 4,
        "colours": "rgb",
        "qk_norm": False,
        "split": 3,
    },
}


@pytest.mark.parametrize(("task", "name"), [("vision", name) for name in IMAGES])
def test_the_command_of_another_task_parses_back_too(run, monkeypatch, task, name):
    asked = dataclasses.replace(PRESETS_OF[task][name], **IMAGES[name])
    taken = []
    monkeypatch.setattr(grid, "compare", lambda work, *_: taken.append(work) or interrupt())
    assert preset_of(asked).startswith(f"{name} --task {task}")
    run("compare", *shlex.split(preset_of(asked)))
    assert taken == [asked]


@pytest.mark.parametrize("name", CHANGES)
def test_the_command_in_a_report_parses_back_to_the_same_work(run, monkeypatch, name):
    asked = dataclasses.replace(PRESETS[name.split()[0]], **CHANGES[name])
    taken = []

    def note(work, preset, *_):
        taken.append((work, preset))
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "compare", note)
    run("compare", *shlex.split(preset_of(asked)))
    assert taken == [(asked, preset_of(asked))]


def test_a_preset_is_named_with_the_options_that_differ():
    assert preset_of(PRESETS["standard"]) == "standard"
    changed = dataclasses.replace(PRESETS["quick"], steps=7, seeds=(1, 2), qk_norm=False)
    assert preset_of(changed) == "quick --no-qk-norm --steps 7 --seeds 1 2"


# what is taken out of a finished work


def test_export_and_report_of_what_was_exported(run, comparison, tmp_path):
    out, _ = comparison
    code, said, _ = run("export", "--out", out, "--to", "rows.parquet")
    assert code == 0
    assert said.endswith("rows in rows.parquet\n")
    with Store(out / "store.sqlite") as store:
        assert Results.of_parquet(Path("rows.parquet")) == Results.of_store(
            store, store.latest_work()
        )
    code, said, _ = run("report", "--parquet", "rows.parquet", "--to", "new/page.html")
    assert code == 0
    assert "report: new/page.html" in said
    assert Path("new/page.html").read_text() == (out / "report.html").read_text()


def test_import_of_what_was_exported(run, comparison):
    out, _ = comparison
    run("export", "--out", out, "--to", "rows.parquet")
    code, said, _ = run("import", "rows.parquet", "--out", "new")
    assert code == 0
    assert re.fullmatch(r"work \w+ \(\w+ .*\) in new: \d\d runs done\n", said)
    code, _, _ = run("export", "--out", "new", "--to", "again.parquet")
    assert code == 0
    assert Results.of_parquet(Path("rows.parquet")) == Results.of_parquet(Path("again.parquet"))


def test_import_of_no_such_file_makes_no_store(run, tmp_path):
    assert "nowhere: there is no such file" in refused(run, "import", "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_report_of_a_store(run, comparison):
    out, _ = comparison
    code, said, _ = run("report", "--out", out, "--to", "page.html")
    assert code == 0
    assert "lssar" in said
    assert Path("page.html").exists()


def test_report_of_an_unknown_work_is_refused(run, comparison):
    out, _ = comparison
    assert "holds no work 'w'; it has " in refused(run, "report", "--out", out, "--work", "w")


def test_the_same_text_elsewhere_is_the_same_text(tmp_path):
    """What a run is called depends on what the text says, not on where it lies."""
    from .lab_work import prepared, tiny_work

    here, there = (write_texts(tmp_path / name) for name in ("here", "there"))
    first, second = (prepared(tiny_work(d), tmp_path) for d in (here, there))
    assert first.digest == second.digest


def test_a_store_that_is_held_is_one_line(monkeypatch, capsys):
    def held(*_, **__):
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr("tyro.extras.subcommand_cli_from_dict", held)
    monkeypatch.setattr("sys.argv", ["aftermax", "report"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "another process has held the store" in capsys.readouterr().err
