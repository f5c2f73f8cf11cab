"""Associative recall against the size of the state, with one block for every mixer.

    make bench-mqar
    python benchmarks/mqar.py [--store build/mqar.jsonl] [--save docs/results/mqar.json] [--mlp]

`aftermax.lab.mqar` says what is compared. Every finished run is a line of the store; stopped at any
moment, the same call goes on with the run that it was at. `--save` writes all that there is after
each run. `--steps`, `--seeds` and the like make it smaller, `--mlp` puts an MLP into the block.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

import aftermax
from aftermax.lab.grid import machine
from aftermax.lab.mqar import Job, Record, Setting, Study, run, search_jobs, seed_jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--store", type=Path, default=Path("build/mqar.jsonl"))
    parser.add_argument("--save", type=Path, help="a JSON file of all runs")
    parser.add_argument("--mlp", action="store_true")
    for name in ("length", "pairs", "vocabulary", "steps", "batch", "search_at"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name, kind in {"key_dims": int, "rates": float, "seeds": int, "arms": str}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+")
    options = vars(parser.parse_args())
    store, save = options.pop("store"), options.pop("save")
    given = {name: value for name, value in options.items() if value not in (None, False)}
    setting = replace(
        Setting(), **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    )
    torch.set_num_threads(1)
    record = Record(store, setting)
    work(record, search_jobs(setting), save)
    work(record, seed_jobs(setting, record.done), save)
    for sentence in record.study().verdicts():
        print(sentence)


def work(record: Record, jobs: Iterable[Job], save: Path | None) -> None:
    for job in jobs:
        if job not in record.done:
            outcome = run(record.setting, job)
            record.add(job, outcome)
            print(
                f"{job.kind:6} {job.arm:12} n {job.key_dim:3} rate {job.rate:.0e} seed {job.seed:4}"
                f"  accuracy {outcome.accuracy:.3f}  loss {outcome.loss:.3f}"
                f"  {outcome.steps:5} steps  {outcome.seconds:4.0f} s",
                flush=True,
            )
        if save is not None:
            write(save, record.study())


def write(file: Path, study: Study) -> None:
    about = {"machine": machine(), "version": aftermax.__version__}
    scratch = file.with_name(file.name + ".part")
    scratch.write_text(json.dumps(about | study.to_json(), indent=1) + "\n")
    scratch.replace(file)


if __name__ == "__main__":
    main()
