"""Softmax regression in context: which attention learns it, and is it a gradient step?

    make bench-in-context
    python benchmarks/in_context.py [--save docs/results/in_context.json] [--only main systems ...]

`aftermax.lab.in_context_study` says what is compared. The file is written after each run; stopped
at any moment, the same call goes on from there, and a run that was begun begins anew. `--steps`,
`--seeds` and the like change all studies that are asked for, and need a file of their own.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import fields, replace
from pathlib import Path

import torch

import aftermax
from aftermax.lab.grid import machine
from aftermax.lab.in_context import ARMS
from aftermax.lab.in_context_study import STUDIES, UNTRAINED, Job, Outcome, Setting, Study, resumed

KINDS = {"rates": float, "start": float, "arms": str}
"""What is no whole number."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path, default=Path("build/in_context.json"))
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    for field in fields(Setting):
        many = {"nargs": "+"} if isinstance(field.default, tuple) else {}
        parser.add_argument(f"--{field.name}", type=KINDS.get(field.name, int), **many)
    options = vars(parser.parse_args())
    save, only = options.pop("save"), options.pop("only")
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if value is not None
    }
    torch.set_num_threads(1)
    held = json.loads(save.read_text())["studies"] if save.exists() else {}
    for name in only:
        study = resumed(held.get(name), replace(STUDIES[name], **given))
        complete(name, study, lambda name=name, study=study: keep(save, held, name, study))
        keep(save, held, name, study)
        show(name, study)


def complete(name: str, study: Study, store) -> None:
    began, first = time.monotonic(), study.count()[0]

    def note(job: Job, outcome: Outcome) -> None:
        store()
        done, asked = study.count()
        left = (asked - done) * (time.monotonic() - began) / (done - first) / 60
        print(
            f"{name:8} {done:3} of {asked}  {job.kind:6} {job.arm:15} rate {job.rate:.0e} seed "
            f"{job.seed:4}  loss {outcome.last.loss:.4f}  cosine {outcome.last.cosine:.4f}  "
            f"beta {outcome.temperature or 0:+.3f}  "
            f"{outcome.seconds:4.0f} s  about {left:.0f} min left",
            flush=True,
        )

    study.complete(note)


def show(name: str, study: Study) -> None:
    print(f"\n{name}: n = {study.setting.rows}, d = {study.setting.width}")
    print(f"{'':30} {'loss':>18} {'prediction':>18} {'model':>18} {'cosine':>18}")
    for arm, found in study.untrained.items():
        print(f"{UNTRAINED[arm]:30} {' '.join(f'{m:>18.4f}' for m in found.measures)}")
    for arm in study.setting.arms:
        spreads = [study.at(arm, m) for m in ("loss", "prediction", "model", "cosine")]
        cells = ("–" if s is None else s.text(4) for s in spreads)
        print(f"{ARMS[arm].title:30} {' '.join(f'{cell:>18}' for cell in cells)}")
    print(flush=True)


def keep(file: Path, held: dict, name: str, study: Study) -> None:
    held[name] = study.to_json()
    about = {"machine": machine(), "version": aftermax.__version__, "studies": held}
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(file.name + ".part")
    scratch.write_text(json.dumps(about, indent=1) + "\n")
    scratch.replace(file)


if __name__ == "__main__":
    main()
