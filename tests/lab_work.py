"""A work so small that a test can train it, a text so small that a test can write it."""

from __future__ import annotations

import contextlib
import io
import random
import shlex
from pathlib import Path

import pytest
import torch

from aftermax.cli import main, preset_of
from aftermax.lab.data.corpus import Corpus, prepare
from aftermax.lab.hashhop_work import HashHopWork
from aftermax.lab.labels_work import LabelsWork
from aftermax.lab.models import DecoderLM
from aftermax.lab.outliers_work import OutliersWork
from aftermax.lab.rates_work import RatesWork
from aftermax.lab.results import Results
from aftermax.lab.store import Store
from aftermax.lab.vision_work import VisionWork
from aftermax.lab.words_work import WordsWork
from aftermax.lab.work import AnyWork, Run, Work

from .label_set import write_set

TINY = {
    "systems": ("softmax", "lssar"),
    "layers": 1,
    "width": 16,
    "heads": 2,
    "context": 48,
    "multiples": (1, 2),
    "steps": 12,
    "batch": 4,
    "recall_share": 0.5,
    "windows": 2,
}


def tiny_work(data: Path, **changes) -> Work:
    """Two systems in a model of one layer; some milliseconds a step."""
    return Work(**{**TINY, "data": data, **changes})


def prose(seed: int, size: int) -> str:
    """Lines of made-up words, the same for the same seed."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("aeiounrstlé", k=chance.randint(2, 7))) for _ in range(40)]
    text = ""
    while len(text.encode()) < size:
        text += " ".join(chance.choices(words, k=8)) + ".\n"
    return text


def write_texts(folder: Path) -> Path:
    """Nine files of text, two of them in a folder below, and two files that are not text."""
    (folder / "deeper").mkdir(parents=True)
    for i in range(9):
        place = folder / "deeper" if i > 6 else folder
        (place / f"{i}.txt").write_text(prose(i, 900 + 100 * i), encoding="utf-8")
    (folder / "binary.bin").write_bytes(b"begins like text" + bytes(range(256)))
    (folder / "latin-1.txt").write_bytes("où été là ".encode("latin-1") * 50)
    return folder


def prepared(work: Work, out: Path) -> Corpus:
    """The work's corpus, as `compare` prepares it."""
    return prepare(
        work.data,
        work.tokenizer,
        work.vocabulary,
        work.context + 1,
        work.lengths[-1] + 1,
        out / "data",
    )


def run_of(work: Work, corpus: Corpus, system: str = "softmax", **changes) -> Run:
    settings = {"seed": 0, "learning_rate": 3e-3, "kind": "train"} | changes
    return Run(work, system, data_digest=corpus.digest, **settings)


def model_of(work: Work, system: str = "softmax", vocabulary: int = 290) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(work, run_arm(work, system), vocabulary)


def run_arm(work: Work, system: str):
    return Run(work, system, 0, 1e-3, "train", "").arm


def command(work: AnyWork, out: Path, workers: int = 1) -> list[str]:
    """The arguments of `aftermax` that run this work, as the report prints them."""
    options = shlex.split(preset_of(work))
    return ["compare", *options, "--out", str(out), "--workers", str(workers)]


def compared(folder: Path) -> tuple[Path, str]:
    """Two systems and a trait, three seeds, from the command line to the report, in this process.

    The learning rate is searched, so that every phase has its part.
    """
    work = tiny_work(
        write_texts(folder / "texts"),
        systems=("softmax", "lssar", "log-n/p-rope"),
        seeds=(0, 1, 2),
        learning_rates=(1e-3, 3e-3),
        search_steps=4,
        steps=40,
    )
    return compared_work(work, folder)


def compared_images(folder: Path) -> tuple[Path, str]:
    """The same of the vision task, on scikit-learn's digits."""
    work = VisionWork(
        systems=("softmax", "sigmoid/hybrid"),
        **{"layers": 1, "width": 16, "heads": 2, "patch": 4, "batch": 16, "steps": 40},
        seeds=(0, 1, 2),
        learning_rates=(3e-3, 1e-2),
        search_steps=4,
    )
    return compared_work(work, folder)


def compared_labels(folder: Path) -> tuple[Path, str]:
    """The same of the task of labels."""
    work = LabelsWork(
        systems=("softmax", "z-loss", "dual/infonce", "dual/decoupled"),
        data=write_set(folder / "set"),
        **{"width": 16, "batch": 16, "steps": 40, "temperature": 0.2, "factored_rate": 1.0},
        seeds=(0, 1, 2),
        learning_rates=(1e-2, 3e-2),
        search_steps=10,
    )
    return compared_work(work, folder)


def compared_words(folder: Path) -> tuple[Path, str]:
    """The same of the task of words."""
    work = WordsWork(
        systems=("softmax", "softmax/adamw", "z-loss", "sampled"),
        data=write_texts(folder / "texts"),
        **{"embedding": 8, "hidden": 16, "width": 16, "batch": 16, "steps": 40, "scored": 100},
        seeds=(0, 1, 2),
        learning_rates=(0.5, 2.0),
        search_steps=10,
    )
    return compared_work(work, folder)


def compared_outliers(folder: Path) -> tuple[Path, str]:
    """The same of the task of outliers: both models, and one rate, to save time."""
    work = OutliersWork(
        systems=("encoder/softmax", "decoder/softmax"),
        data=write_texts(folder / "texts"),
        **{"layers": 1, "width": 16, "heads": 2, "context": 16, "multiples": (1, 2)},
        **{"batch": 8, "steps": 20, "windows": 4, "calibration": 2},
        seeds=(0, 1, 2),
        learning_rates=(1e-2,),
    )
    return compared_work(work, folder)


def compared_hashhop(folder: Path) -> tuple[Path, str]:
    """The same of the task of HashHop."""
    work = HashHopWork(
        systems=("softmax", "linear"),
        **{"layers": 1, "width": 16, "heads": 2, "batch": 8, "steps": 20, "scored": 4},
        seeds=(0, 1, 2),
        learning_rates=(1e-2,),
    )
    return compared_work(work, folder)


def compared_rates(folder: Path) -> tuple[Path, str]:
    """The same of the task of rates: enough replicates for a band, and the other gate's data."""
    work = RatesWork(
        systems=("softmax/tanh/one", "sigmoid/tanh/one/softmax"),
        **{"dim": 1, "samples": 60, "multiples": (1, 4), "starts": 3, "searched": 6},
        seeds=(0, 1, 2, 3, 4),
    )
    return compared_work(work, folder)


def compared_work(work: AnyWork, folder: Path) -> tuple[Path, str]:
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("COLUMNS", "120")
        patch.setattr("sys.argv", ["aftermax", *command(work, folder / "out")])
        patch.setattr("aftermax.lab.cost.ROUNDS", 2)
        main()
    return folder / "out", said.getvalue()


def open_store(folder: Path, run: Run, work: str = "w") -> Store:
    """A store that knows of one run."""
    store = Store(folder / "store.sqlite")
    store.add_run(work, run.id, run.kind, run.system, run.seed, run.learning_rate, run.settings())
    return store


def latest_results(out: Path) -> Results:
    """Of the folder of a comparison."""
    with Store(out / "store.sqlite") as store:
        return Results.of_store(store, store.latest_work())
