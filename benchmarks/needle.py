"""Needles in noise, kept by SparseK or by its controls.

    make bench-needle
    python benchmarks/needle.py [--save docs/results/needle.json]

`aftermax.lab.needle` says what is compared. The file is written after each run; stopped at any
moment, the same call goes on from there. `--steps`, `--seeds` and the like make it another study,
which needs a file of its own.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

import torch

import aftermax
from aftermax.lab.grid import machine
from aftermax.lab.needle import ARMS, Job, Outcome, Setting, Study, open_study

KINDS = {"rates": float, "arms": str}
"""What is no whole number."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path, default=Path("build/needle.json"))
    for field in fields(Setting):
        many = {"nargs": "+"} if isinstance(field.default, tuple) else {}
        name = field.name.replace("_", "-")
        parser.add_argument(f"--{name}", type=KINDS.get(field.name, int), **many)
    options = vars(parser.parse_args())
    save = options.pop("save")
    given = {name: value for name, value in options.items() if value is not None}
    setting = replace(
        Setting(), **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    )
    torch.set_num_threads(1)
    study = open_study(save, setting)

    def note(job: Job, outcome: Outcome) -> None:
        last = outcome.last
        kept = "" if last.recall is None else f"  recall {last.recall:.3f}, any {last.any:.3f}"
        print(
            f"{job.kind:6} {job.arm:7} rate {job.rate:.0e} seed {job.seed:4}"
            f"  accuracy {last.accuracy:.3f}  loss {last.loss:.3f}{kept}  {outcome.seconds:4.0f} s",
            flush=True,
        )
        write(save, study)

    study.complete(note)
    print(f"\n{'':30} {'accuracy':>16} {'recall':>16} {'by any head':>16}")
    for arm in setting.arms:
        found = [study.at(arm, measure) for measure in ("accuracy", "recall", "any")]
        told = ("–" if spread is None else spread.text(3) for spread in found)
        print(f"{ARMS[arm]:30} {' '.join(f'{cell:>16}' for cell in told)}")
    for sentence in study.verdicts():
        print(sentence)


def write(file: Path, study: Study) -> None:
    about = {"machine": machine(), "version": aftermax.__version__}
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(file.name + ".part")
    scratch.write_text(json.dumps(about | study.to_json(), indent=1) + "\n")
    scratch.replace(file)


if __name__ == "__main__":
    main()
