"""What `aftermax compare` has trained, found again: the last checkpoint of every run stays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from aftermax.lab.store import Store
from aftermax.lab.tasks import Data, task_of, work_of
from aftermax.lab.work import Run

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Trained:
    """A run with something learned."""

    run: Run
    name: str
    """Of the run; its own id may be another, where another version of aftermax asks for it."""
    out: Path
    """The folder that `compare` wrote: `--out`."""
    digest: str
    """Of the data."""

    @property
    def checkpoint(self) -> Path:
        return self.out / "runs" / self.name / CHECKPOINT

    @property
    def step(self) -> int:
        with safe_open(self.checkpoint, "pt") as held:
            return json.loads(held.metadata()["step"])

    def data(self) -> Data:
        folder = self.out / "data" / self.digest
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: the data of {self.name} is not there any more")
        return task_of(self.run.work).open_data(folder)

    def model(self) -> nn.Module:
        """With the weights of the checkpoint, for evaluation.

        Raises:
            ValueError: for a checkpoint that is not of such a model.
        """
        torch.manual_seed(self.run.seed)
        model = task_of(self.run.work).model(self.run, self.data())
        with safe_open(self.checkpoint, "pt") as held:
            names = [n for n in held.keys() if n.startswith("model.")]  # noqa: SIM118, no mapping
            weights = {name.removeprefix("model."): held.get_tensor(name) for name in names}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{self.checkpoint} is of another model: {error}") from None
        return model.eval()


def find(path: Path, run: str | None = None, system: str | None = None) -> Trained:
    """The run that is meant.

    Args:
        path: the folder of `aftermax compare`, or in it that of a run, or a run's checkpoint.
        run: its name, where the folder holds several.
        system: or its system, as it was given to `compare`; the run of the first seed is taken.

    Raises:
        ValueError, OSError: where there is none, or more than one; the message lists what there is.
    """
    out, named = _places(path)
    if named is not None and run not in (None, named):
        raise ValueError(f"{path} is the run {named}, and --run asks for {run}")
    with Store(out / "store.sqlite") as store:
        work = _work_of(store, named or run)
        about = store.work(work)
        runs = store.runs(work)
        found = _chosen(out, runs, named or run, system)
    whole = work_of(about["settings"])
    made = Run(
        whole,
        found["system"],
        found["seed"],
        found["learning_rate"],
        found["kind"],
        about["data"]["digest"],
    )
    return Trained(made, found["id"], out, about["data"]["digest"])


def _places(path: Path) -> tuple[Path, str | None]:
    """The folder of the store, and the run that the path says."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if (path / "store.sqlite").exists():
        return path, None
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    out = folder.parent.parent
    if folder.parent.name != "runs" or not (out / "store.sqlite").exists():
        raise ValueError(
            f"{path} is no folder of `aftermax compare`, no run in one and no checkpoint of a run, "
            "and no Hugging Face folder: it holds neither store.sqlite nor config.json"
        )
    return out, folder.name


def _work_of(store: Store, run: str | None) -> str:
    if run is None:
        return store.latest_work()
    works = store.works_of(run)
    if not works:
        known = ", ".join(r["id"] for r in store.runs(store.latest_work()) if r["kind"] != "cost")
        raise ValueError(f"{store.path} holds no run {run}; its latest work has {known}")
    return works[0]


def _chosen(out: Path, runs: list[dict], run: str | None, system: str | None) -> dict:
    def learned(run: dict) -> bool:
        return (out / "runs" / run["id"] / CHECKPOINT).exists()

    if run is not None:
        [found] = [r for r in runs if r["id"] == run]
        if system not in (None, found["system"]):
            raise ValueError(f"{run} is of {found['system']}, and --system asks for {system}")
        if not learned(found):
            raise ValueError(
                f"{run} ({found['status']}) has no checkpoint: it has not come to its first, "
                "or it was imported, which brings its numbers and not its weights"
            )
        return found
    there = [r for r in runs if r["kind"] == "train" and learned(r)]
    systems = list(dict.fromkeys(r["system"] for r in there))
    if not systems:
        raise ValueError(f"{out} holds no trained model: `aftermax compare --out {out}` makes some")
    if system is None and len(systems) > 1:
        raise ValueError(f"{out} holds several models; give --system, one of {', '.join(systems)}")
    if system not in (None, *systems):
        raise ValueError(f"{out} has no model of {system}; it has {', '.join(systems)}")
    return next(r for r in there if system in (None, r["system"]))
