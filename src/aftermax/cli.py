"""The command line: the dataclasses are the options."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

try:
    import tyro
    from rich.console import Console
    from rich.table import Table
except ImportError as error:  # the base install is the library alone
    raise SystemExit(
        f"the command line needs the lab: pip install 'aftermax[lab]' ({error})"
    ) from None

from aftermax import CATALOGUE, __version__
from aftermax.lab.work import PRESETS, Work

Preset = Annotated[
    Annotated[Work, tyro.conf.subcommand("quick", default=PRESETS["quick"])]
    | Annotated[Work, tyro.conf.subcommand("standard", default=PRESETS["standard"])]
    | Annotated[Work, tyro.conf.subcommand("long", default=PRESETS["long"])],
    tyro.conf.arg(name=""),
]

Out = Annotated[Path, tyro.conf.arg(help="Folder of the store, the tokens and the checkpoints.")]
OUT = Path("aftermax-runs")


def compare(work: Preset, out: Out = OUT, workers: int | None = None) -> None:
    """Train each system on the same work, measure it at every length, write the report.

    Run the same command again after a stop: it goes on where it was.

    Args:
        workers: runs at the same time; by default as many as the cores hold.
    """
    from aftermax.lab.grid import compare as run_all

    console = Console()
    name = run_all(work, preset_of(work), out, workers, console)
    _show(out, name, console)


def report(
    out: Out = OUT, work: str | None = None, parquet: Path | None = None, to: Path | None = None
) -> None:
    """Write the report of what has been measured so far.

    Args:
        work: id of a work in the store; by default the latest.
        parquet: read a file of `aftermax export` instead of a store.
        to: the HTML file; by default report.html in the folder of the store.
    """
    from aftermax.lab.report import terminal_table, write_report
    from aftermax.lab.results import Results

    if parquet is not None:
        results = Results.of_parquet(parquet)
    else:
        with _existing(out) as store:
            results = Results.of_store(store, work or store.latest_work())
    path = to or (out / "report.html")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(results, path)
    console = Console()
    console.print(terminal_table(results))
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


def export(out: Out = OUT, work: str | None = None, to: Path = Path("aftermax.parquet")) -> None:
    """Write every row of a work as Parquet, with its settings in the file's metadata.

    Args:
        work: id of a work in the store; by default the latest.
        to: the Parquet file.
    """
    with _existing(out) as store:
        count = store.export(work or store.latest_work(), to)
    Console().print(f"{count} rows in {to}", highlight=False)


def import_(file: Annotated[Path, tyro.conf.Positional], out: Out = OUT) -> None:
    """Put what `aftermax export` wrote into a store: compare goes on from there.

    Runs keep their ids, so a comparison that asks for the same runs finds them done and trains only
    what is missing.

    Args:
        file: the Parquet file.
    """
    from aftermax.lab.imports import import_into, read_export
    from aftermax.lab.store import Store

    read_export(file)  # what is wrong with it is said before there is a store
    with Store(out / "store.sqlite") as store:
        taken = import_into(store, file)
    said = [f"work {taken.work} ({taken.preset}) in {out}: {taken.done} runs done"]
    if taken.incomplete:
        said.append(f"{taken.incomplete} not complete, to be trained")
    if taken.foreign:
        said.append(
            f"{taken.foreign} made by another version of aftermax or torch, which compare trains "
            "again beside them"
        )
    Console().print("; ".join(said), highlight=False, soft_wrap=True)


def catalogue() -> None:
    """Print the table of systems; a wide terminal shows the five words of each as well."""
    console = Console()
    words = ("score", "positivity", "normaliser", "reweight", "walk") if console.width > 130 else ()
    table = Table(title=f"aftermax {__version__}: {len(CATALOGUE)} systems")
    for column in ("name", "weights", *words, "source"):
        table.add_column(column, no_wrap=column == "name")
    for entry in CATALOGUE:
        source = entry.paper + (f", arXiv {entry.arxiv}" if entry.arxiv else "")
        told = (getattr(entry, word) for word in words)
        table.add_row(entry.name, entry.formula, *told, source)
    console.print(table)


def preset_of(work: Work) -> str:
    """The preset that a work is, with the options in which it differs from the nearest one."""

    def changed(name: str) -> list[str]:
        base, own = PRESETS[name].settings(), work.settings()
        return [key for key in own if own[key] != base[key]]

    name = min(PRESETS, key=lambda preset: len(changed(preset)))
    return " ".join([name, *(_option(key, work.settings()[key]) for key in changed(name))])


def _option(key: str, value) -> str:
    """As a shell wants it."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    values = value if isinstance(value, list | tuple) else [value]
    return f"--{name} {shlex.join(map(str, values))}"


def _existing(out: Path):
    from aftermax.lab.store import Store

    if not (out / "store.sqlite").exists():
        raise ValueError(f"{out} holds no store: run `aftermax compare --out {out}` first")
    return Store(out / "store.sqlite")


def _show(out: Path, work: str, console: Console) -> None:
    from aftermax.lab.report import terminal_table, write_report
    from aftermax.lab.results import Results
    from aftermax.lab.store import Store

    with Store(out / "store.sqlite") as store:
        results = Results.of_store(store, work)
    path = (out / "report.html").absolute()
    write_report(results, path)
    console.print(terminal_table(results))
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


def main() -> None:
    """The entry point: errors that a user can mend are one line, not a trace."""
    commands = {
        "compare": compare,
        "report": report,
        "export": export,
        "import": import_,
        "catalogue": catalogue,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="aftermax",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.CascadeSubcommandArgs),
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        print(f"aftermax: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
