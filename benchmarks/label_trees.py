"""The label trees that a user would pick, on the prepared sets: napkinXC's PLT, omikuji's Parabel.

    make bench-trees
    python benchmarks/label_trees.py [tags] [dependencies] [FOLDER ...] [--lists apt-lists]
        [--names] [--seeds 0 1 2] [--save docs/results/label_trees.json]

Needs `pip install 'aftermax[lab,trees]'`. A folder is a prepared set, or one in a form of the
Extreme Classification Repository. Both trees take their own default settings, one thread, and
TF-IDF of the tokens that our models take (or the values that the set came with); they learn from
the training split alone. omikuji takes no seed and differs from run to run by itself. Beside them
the labels in order of their frequency, for every document the same. Times are CPU seconds of this
process; the size of a model is that of its files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor

import aftermax
from aftermax.lab.data import debian_packages, xmc
from aftermax.lab.data.labelled import Documents, LabelledTexts
from aftermax.lab.data.ragged import Ragged
from aftermax.lab.grid import machine
from aftermax.lab.ranking import measures, without

DEEPEST = 100
"""Labels of a ranking."""


class Outcome(NamedTuple):
    top: Tensor  # int64 (N, K)
    train_seconds: float
    predict_seconds: float
    size: int


class Features(NamedTuple):
    rows: Ragged
    values: Tensor

    @classmethod
    def of(cls, held: LabelledTexts, split: Documents) -> Features:
        return cls(*held.features(split.tokens, split.weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="*", default=["tags", "dependencies"])
    parser.add_argument("--lists", type=Path, help="folder of apt's lists, if not the system's")
    parser.add_argument("--names", action="store_true", help="names of packages in their texts")
    parser.add_argument("--out", type=Path, default=Path("build/data"), help="prepared sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", type=Path, help="a JSON file to keep the numbers in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {"machine": machine(), "version": aftermax.__version__, "sets": []}
    if options.save and options.save.exists():
        results["sets"] = json.loads(options.save.read_text())["sets"]
    for name in options.sets:
        held = opened(name, options)
        line = {"name": held.name, "digest": held.digest, "about": held.about, "runs": []}
        print(f"{held.name}: {held.labels} labels", flush=True)
        for tree, run in TREES.items():
            for seed in options.seeds if tree != "popularity" else [0]:
                outcome = run(held, seed)
                line["runs"].append({"tree": tree, "seed": seed} | scored(held, outcome))
            print(told(tree, [run for run in line["runs"] if run["tree"] == tree]), flush=True)
        others = [other for other in results["sets"] if other["digest"] != held.digest]
        results["sets"] = [*others, line]
        if options.save:
            scratch = options.save.with_name(options.save.name + ".part")
            scratch.write_text(json.dumps(results, indent=1) + "\n")
            scratch.replace(options.save)


def opened(name: str, options: argparse.Namespace) -> LabelledTexts:
    if name in debian_packages.FIELDS:
        return debian_packages.build(
            name,  # type: ignore[arg-type]
            options.out,
            lists=options.lists,
            names=options.names,
        )
    folder = Path(name)
    if (folder / "meta.json").exists():
        return LabelledTexts.open(folder)
    return xmc.build(folder, options.out)


def scored(held: LabelledTexts, outcome: Outcome) -> dict:
    test = held.splits["test"]
    top = without(outcome.top, test.forbidden)
    return measures(top, test.labels, held.inverse_propensities) | {
        "train_cpu_seconds": outcome.train_seconds,
        "predict_cpu_milliseconds": 1e3 * outcome.predict_seconds / len(test),
        "model_bytes": outcome.size,
    }


def told(tree: str, runs: list[dict]) -> str:
    parts = []
    for name in runs[0]:
        if "@" in name:
            values = [100 * run[name] for run in runs]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            parts.append(f"{name} {mean(values):.2f}{spread}")
    seconds = mean(run["train_cpu_seconds"] for run in runs)
    size = mean(run["model_bytes"] for run in runs) / 2**20
    return f"{tree:11} " + "  ".join(parts) + f"  {seconds:.0f} CPU s  {size:.1f} MiB"


def popularity(held: LabelledTexts, seed: int) -> Outcome:
    order = held.frequencies.argsort(descending=True, stable=True)[: deep(held)]
    return Outcome(order.expand(len(held.splits["test"]), -1), 0.0, 0.0, 0)


def plt(held: LabelledTexts, seed: int) -> Outcome:
    from napkinxc.models import PLT
    from scipy.sparse import csr_matrix

    def matrix(split: str) -> csr_matrix:
        rows, values = Features.of(held, held.splits[split])
        parts = (values.numpy(), rows.values.numpy(), rows.offsets.numpy())
        return csr_matrix(parts, shape=(rows.size, held.vocabulary))

    train, test = matrix("train"), matrix("test")
    labels = held.splits["train"].labels.lists()
    with tempfile.TemporaryDirectory() as folder:
        model = PLT(folder, seed=seed, threads=1)
        start = time.process_time()
        model.fit(train, labels)
        trained = time.process_time()
        model.load()
        loaded = time.process_time()
        rankings = model.predict(test, top_k=deep(held))
        return Outcome(
            Ragged.of(rankings).padded(),
            trained - start,
            time.process_time() - loaded,
            size_of(folder),
        )


def parabel(held: LabelledTexts, seed: int) -> Outcome:
    import omikuji

    test = Features.of(held, held.splits["test"])
    rows = zip(rows_of(test.rows.values, test), rows_of(test.values, test), strict=True)
    asked = [list(zip(ids, values, strict=True)) for ids, values in rows]
    with tempfile.TemporaryDirectory() as folder, quiet():
        file = Path(folder) / "train.txt"
        write_bag(file, held)
        start = time.process_time()
        model = omikuji.Model.train_on_data(str(file), n_threads=1)
        trained = time.process_time()
        model.init_prediction_thread_pool(1)
        rankings = [[label for label, _ in model.predict(row, top_k=deep(held))] for row in asked]
        taken = time.process_time() - trained
        model.save(f"{folder}/model")
        size = size_of(f"{folder}/model")
    return Outcome(Ragged.of(rankings).padded(), trained - start, taken, size)


TREES: dict[str, Callable[[LabelledTexts, int], Outcome]] = {
    "popularity": popularity,
    "PLT": plt,
    "Parabel": parabel,
}


def deep(held: LabelledTexts) -> int:
    """Labels to ask for, with more where pairs will be taken out."""
    out = held.forbidden[:, 0].bincount()
    return min(held.labels, DEEPEST + (int(out.max()) if len(out) else 0))


def rows_of(values: Tensor, like: Features) -> list[list]:
    return Ragged(values, like.rows.offsets).lists()


def write_bag(file: Path, held: LabelledTexts) -> None:
    """The training split in the repository's first form, which omikuji reads."""
    train = held.splits["train"]
    features = Features.of(held, train)
    columns, values = rows_of(features.rows.values, features), rows_of(features.values, features)
    with file.open("w") as stream:
        stream.write(f"{len(train)} {held.vocabulary} {held.labels}\n")
        for labels, ids, numbers in zip(train.labels.lists(), columns, values, strict=True):
            row = " ".join(f"{i}:{v:.6g}" for i, v in zip(ids, numbers, strict=True))
            stream.write(f"{','.join(map(str, labels))} {row}\n")


def size_of(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """omikuji writes its progress to the streams of the process, past Python's."""
    kept = [(stream.fileno(), os.dup(stream.fileno())) for stream in (sys.stdout, sys.stderr)]
    sys.stdout.flush()
    try:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            for number, _ in kept:
                os.dup2(nowhere.fileno(), number)
        yield
    finally:
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)


if __name__ == "__main__":
    main()
