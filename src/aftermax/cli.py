"""The command line: the dataclasses are the options."""

from __future__ import annotations

import shlex
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Union

try:
    import tyro
    from rich.console import Console
    from rich.table import Table
except ImportError as error:  # the base install is the library alone
    raise SystemExit(
        f"the command line needs the lab: pip install 'aftermax[lab]' ({error})"
    ) from None

from aftermax import CATALOGUE, __version__
from aftermax.lab.tasks import PRESETS
from aftermax.lab.work import AnyWork

TAKES = {
    "quick": "One seed, one learning rate: some minutes on two cores.",
    "standard": "Three seeds, the learning rate of each system searched: an hour or so.",
    "long": "A larger model, trained for longer: hours, or a night.",
    "full": "What the documentation shows: half an hour or so.",
}
QUICK_FITS = "Eight replicates of five systems: a couple of minutes on two cores."

Out = Annotated[Path, tyro.conf.arg(help="Folder of the store, the data and the checkpoints.")]
OUT = Path("aftermax-runs")


LEARNED = {
    "text": "Train each system on the same text, measure it at every length",
    "vision": "Train each system on the same images, measure it on a test split",
    "labels": "Train each output layer to give documents their labels, measure what it ranks first",
    "words": "Train each output layer to tell the next word, measure its first guesses",
    "hashhop": "Train each system to follow chains of hashes, ask it in longer and longer contexts",
    "outliers": "Train encoders and decoders with each system, measure outliers and 8-bit losses",
    "experts": "Train a vision transformer for several questions, dense and with experts",
    "rates": "Fit mixtures of experts of each gate to ever more samples, measure the rates",
}
"""What `compare` does, by task."""


def takes(task: str, preset: str) -> str:
    """How long a preset takes, for its help."""
    return QUICK_FITS if (task, preset) == ("rates", "quick") else TAKES[preset]


def comparison(task: str) -> Callable[..., None]:
    """`aftermax compare` as it is for one task: its options are the fields of that task's work."""

    def compare(work, task, out=OUT, workers=None) -> None:
        _compare(work, out, workers)

    presets = [
        Annotated[  # type: ignore[valid-type]
            type(work), tyro.conf.subcommand(name, default=work, description=takes(task, name))
        ]
        for name, work in PRESETS[task].items()
    ]
    compare.__annotations__ = {
        "work": Annotated[Union[tuple(presets)], tyro.conf.arg(name="")],  # noqa: UP007
        "task": Annotated[
            Literal[tuple(PRESETS)],  # type: ignore[valid-type]
            tyro.conf.arg(help="What is learned; the options of a preset are those of its task."),
        ],
        "out": Out,
        "workers": int | None,
    }
    compare.__defaults__ = (task, OUT, None)
    others = " ".join(f"`--task {name}`" for name in PRESETS if name != task)
    compare.__doc__ = f"""{LEARNED[task]}, write the report.

    Run the same command again after a stop: it goes on where it was. Without a preset it is quick.
    With --help, {others} show the options of another task.

    Args:
        workers: runs at the same time; by default as many as the cores hold.
    """
    return compare


def _compare(work: AnyWork, out: Path, workers: int | None) -> None:
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


def generate(
    model: Path,
    prompt: str = "",
    run: str | None = None,
    system: str | None = None,
    attention: str | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    threads: int | None = None,
    impl: Literal["cpu", "reference"] | None = None,
) -> None:
    """Stream text from a model of `aftermax compare`, or from a Hugging Face folder.

    The text goes to standard output, what it took to standard error.

    Args:
        model: the --out of `aftermax compare`, a run's folder in it, or a Hugging Face folder.
        prompt: what the text goes on from; - reads standard input.
        run: the run of a folder of `aftermax compare` by its name.
        system: the same by its system; of several seeds the first is taken.
        attention: of a Hugging Face model; by default what it was converted to, or softmax.
        max_new_tokens: the longest text.
        temperature: what logits are divided by; 0 = always the likeliest token.
        top_k: only the k likeliest tokens are drawn; by default all are.
        top_p: only the likeliest tokens that hold this probability together are drawn.
        seed: of the draws: the same seed, the same text.
        dtype: of weights and activations.
        threads: by default what torch takes.
        impl: the kernels ("cpu") or plain torch; by default whichever can.
    """
    from aftermax.lab import generate as lab

    sampling = lab.Sampling(temperature, top_k, top_p, seed)
    try:
        lab.main(
            model,
            prompt,
            run=run,
            system=system,
            attention=attention,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            dtype=dtype,
            threads=threads,
            impl=impl,
        )
    except KeyboardInterrupt:  # before there was any text; nothing goes on from here
        raise SystemExit(130) from None


def to_hugging_face(
    model: Path, to: Path, run: str | None = None, system: str | None = None
) -> None:
    """Write a model of `aftermax compare` as a Hugging Face folder.

    It is a Llama, or a Qwen3 where queries and keys are normed; `aftermax.hf.load` opens it with
    its attention, and AutoTokenizer finds its tokens.

    Args:
        model: the --out of `aftermax compare`, or a run's folder in it.
        to: the folder that is written.
        run: the run of a folder of `aftermax compare` by its name.
        system: the same by its system; of several seeds the first is taken.
    """
    try:
        from aftermax.lab.hugging_face import save
    except ImportError as error:
        raise ValueError(f"this needs transformers: pip install 'aftermax[hf]' ({error})") from None
    from aftermax.lab.trained import find

    trained = find(model, run, system)
    written = save(trained, to)
    kind = type(written).__name__
    Console().print(f"{trained.name} in {to}, a {kind}", highlight=False, soft_wrap=True)


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


def preset_of(work: AnyWork) -> str:
    """The preset that a work is, with the options in which it differs from the nearest one."""
    presets = PRESETS[work.task]

    def changed(name: str) -> list[str]:
        base, own = presets[name].settings(), work.settings()
        return [key for key in own if own[key] != base[key]]

    name = min(presets, key=lambda preset: len(changed(preset)))
    task = [] if work.task == "text" else [f"--task {work.task}"]
    return " ".join([name, *task, *(_option(key, work.settings()[key]) for key in changed(name))])


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
    arguments = with_preset(sys.argv[1:])
    commands = {
        "compare": comparison(asked_task(arguments)),
        "report": report,
        "export": export,
        "import": import_,
        "generate": generate,
        "to-hugging-face": to_hugging_face,
        "catalogue": catalogue,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="aftermax",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.CascadeSubcommandArgs),
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        print(f"aftermax: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        print("aftermax: another process has held the store for a minute", file=sys.stderr)
        raise SystemExit(2) from None


def asked_task(arguments: list[str]) -> str:
    """Of `aftermax compare`, before its options are read: they depend on it.

    >>> asked_task(["compare", "quick", "--task", "vision"])
    'vision'
    """
    tasks = [
        given or following
        for argument, following in zip(arguments, [*arguments[1:], ""], strict=True)
        for name, _, given in [argument.partition("=")]
        if name == "--task"
    ]
    return tasks[-1] if tasks and tasks[-1] in PRESETS else "text"


def with_preset(arguments: list[str]) -> list[str]:
    """Quick, where `aftermax compare` is given options and no preset.

    >>> with_preset(["compare", "--task", "vision"])
    ['compare', 'quick', '--task', 'vision']
    """
    command, *rest = arguments or [""]
    named = set(rest) & {"-h", "--help", *TAKES} or not all(a.startswith("-") for a in rest[:1])
    return arguments if command != "compare" or named else [command, "quick", *rest]


if __name__ == "__main__":
    main()
