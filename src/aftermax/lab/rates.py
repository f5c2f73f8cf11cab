"""The task of rates: mixtures of experts fitted by least squares at growing sample sizes.

A run is one system and one replicate. It draws its samples at each size, fits them from several
starts at once, and measures every fit when all are made. Nothing is trained by gradient descent, so
the task has `perform` in place of what the loop of training asks for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aftermax.lab.data.drawn import Drawn, keep, opened
from aftermax.lab.rates_fit import fit
from aftermax.lab.rates_losses import (
    Minimisers,
    Population,
    distance,
    expert_gaps,
    found,
    nearest,
    quadrature,
    search,
    shares,
    to_truth,
    voronoi,
)
from aftermax.lab.rates_work import RatesArm, RatesWork
from aftermax.lab.store import Row, Store, alone
from aftermax.lab.work import Run

NAME = "mixtures of experts"
JITTER = 0.25
"""Standard deviation of the starts around the truth."""
FIRST, FIRST_STEPS = 4000, 120
"""Samples that all starts see first, and steps of Levenberg-Marquardt on them."""
LATER_STEPS, KEPT = 40, 3
"""Steps on each four times as many; starts that go on at the least."""
EXPERT_METRIC = 0.01
"""Of the score's numbers where the nearest minimiser is asked for by its experts."""


class Samples(NamedTuple):
    x: Tensor
    """(n, dim), uniform in [-1, 1]."""
    noise: Tensor
    """(n,), of standard deviation 1."""


def prepare(work: RatesWork, out: Path) -> Drawn:
    """The folder keeps the minimisers of each system too, once a run has searched for them."""
    some = samples(work, 0, 4)
    return keep(out, NAME, [some.x.tolist(), some.noise.tolist(), work.dim])


def open_data(folder: Path) -> Drawn:
    return opened(folder, NAME)


def about(drawn: Drawn) -> dict:
    return {"name": drawn.name, "digest": drawn.digest}


def told(about: dict) -> str:
    return f"samples of {about['name']}, drawn anew in every replicate"


def perform(
    run: Run[RatesWork],
    data: Drawn,
    store: Store,
    folder: Path,
    proceed: Callable[[], bool] = lambda: True,
) -> bool:
    """Draw, fit and measure one replicate of a system.

    Args:
        folder: of all runs; this one's lock is in `folder / run.id`.
        proceed: asked before each size; False stops, and what was fitted is fitted again.

    Returns:
        Whether the run is finished.
    """
    work: RatesWork = run.work
    torch.set_num_threads(work.threads)
    with alone(folder / run.id):
        if store.status(run.id) == "done":
            return True
        store.begin(run.id)
        arm, x_and_weight = run.arm, quadrature(work.dim)
        population = Population(*x_and_weight, arm.true_values(x_and_weight[0]))
        store.report_progress(run.id, 0, run.steps, 0.0, "minimisers")
        minimisers = known_minimisers(work, arm, population, data.folder)
        fits, done = [], 0
        for size, multiple in zip(work.lengths, work.multiples, strict=True):
            if not proceed():
                return False
            store.report_progress(run.id, done, run.steps, 0.0, f"n = {size:,}")
            fits.append(fitted(work, arm, minimisers, run.seed, size))
            done += multiple
        store.report_progress(run.id, done, run.steps, 0.0, "measuring")
        rows = measured(work, arm, population, minimisers, fits)
        store.write(run.id, rows, done=True)
        return True


def samples(work: RatesWork, seed: int, size: int) -> Samples:
    """Of a replicate at a size, the same for every system."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + size)
    x = torch.rand(size, work.dim, generator=generator, dtype=torch.float64) * 2 - 1
    return Samples(x, torch.randn(size, generator=generator, dtype=torch.float64))


def starts(
    work: RatesWork,
    arm: RatesArm,
    generator: torch.Generator,
    count: int,
    minimisers: Tensor | None = None,
) -> Tensor:
    """(count, k, size): a third near the truth (its atoms, and copies of some), a third near some
    of the minimisers (m, k, size) where there are any, the rest anywhere in the box. A wave has
    no truth to be near."""
    k, size, truth = work.atoms(arm), arm.model.size, arm.true_atoms
    third = (count + 2) // 3
    out = torch.rand(count, k, size, generator=generator, dtype=torch.float64) * 2 - 1
    out *= work.box
    centres = out.clone()
    if truth is not None:
        copies = torch.randint(len(truth), (third, k - len(truth)), generator=generator)
        centres[:third] = torch.cat([truth.expand(third, -1, -1), truth[copies]], 1)
    if minimisers is not None:
        some = torch.randint(len(minimisers), (count,), generator=generator)[third : 2 * third]
        centres[third : 2 * third] = minimisers[some]
    jitter = JITTER * torch.randn(out.shape, generator=generator, dtype=torch.float64)
    near = (centres != out).any(-1, keepdim=True).any(-2, keepdim=True)
    return torch.where(near, centres + jitter, out).clamp(-work.box, work.box)


class Fitted(NamedTuple):
    """The best of the starts at a size."""

    size: int
    atoms: Tensor
    """(k, size of an atom)."""
    loss: float
    converged: bool
    agree: float
    """Share of the starts that went on to all samples whose loss is the best one, to a tenth of
    what a free parameter moves it by: noise^2 / n."""


def fitted(work: RatesWork, arm: RatesArm, minimisers: Minimisers, seed: int, size: int) -> Fitted:
    """Least squares at one size: all starts on the first samples, then the better half on four
    times as many, and so on to all of them."""
    drawn = samples(work, seed, size)
    y = arm.true_values(drawn.x) + work.noise * drawn.noise
    generator = torch.Generator().manual_seed(2**31 + 1_000_003 * seed + size)
    start = starts(work, arm, generator, work.starts, minimisers.atoms)
    seen, steps = min(size, FIRST), FIRST_STEPS
    while True:
        done = fit(arm.model, start, drawn.x[:seen], y[:seen], box=work.box, steps=steps)
        if seen == size:
            break
        kept = max(min(KEPT, len(start)), (len(start) + 1) // 2)
        start = done.atoms[done.loss.topk(kept, largest=False).indices]
        seen, steps = min(size, 4 * seen), LATER_STEPS
    best = int(done.loss.argmin())
    alike = done.loss <= done.loss[best] + 0.1 * work.noise**2 / size
    return Fitted(
        size,
        done.atoms[best],
        float(done.loss[best]),
        bool(done.converged[best]),
        float(alike.double().mean()),
    )


def known_minimisers(
    work: RatesWork, arm: RatesArm, population: Population, folder: Path
) -> Minimisers:
    """Searched for once for each system, then read."""
    asked = [arm.identity, work.atoms(arm), work.box, work.searched, torch.__version__]
    name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    path = folder / f"minimisers-{name}.safetensors"
    if not path.exists():
        generator = torch.Generator().manual_seed(0)
        start = starts(work, arm, generator, work.searched)
        best = search(arm.model, population, start, work.box)
        numbers = torch.tensor([best.misfit, best.share], dtype=torch.float64)
        # two workers that search at once write the same numbers, each to a file of its own
        scratch = path.with_suffix(f".{os.getpid()}.part")
        save_file({"atoms": best.atoms, "numbers": numbers}, scratch)
        scratch.replace(path)
    held = load_file(path)
    misfit, share = held["numbers"].tolist()
    return Minimisers(held["atoms"], misfit, share)


def measured(
    work: RatesWork,
    arm: RatesArm,
    population: Population,
    minimisers: Minimisers,
    fits: list[Fitted],
) -> list[Row]:
    """The rows of a run: every measure at every size, all sizes at once."""
    model = arm.model
    atoms = torch.stack([one.atoms for one in fits])
    share = shares(model, atoms, population)
    metric = torch.ones(model.size, dtype=atoms.dtype)
    of_experts = metric.clone()
    of_experts[: model.scores] = EXPERT_METRIC
    near = nearest(model, atoms, population, minimisers, work.box, metric)
    near_experts = nearest(model, atoms, population, minimisers, work.box, of_experts)
    gaps = expert_gaps(model, atoms, near_experts.atoms).diagonal(dim1=-2, dim2=-1)
    best = model(near.atoms, population.x) - model(atoms, population.x)
    columns = {
        "function": population.misfit(model, atoms).sqrt(),
        "function_best": (best.square() @ population.weight).sqrt(),
        "experts_minimisers": (share * gaps).sum(-1),
        "atoms_minimisers": distance(model, atoms, near.atoms),
        "reached": near.reached.double(),
        "below": near.below.double(),
        "misfit": torch.full_like(share[:, 0], max(minimisers.misfit, 0.0)),
        "found_misfit": torch.full_like(share[:, 0], minimisers.share),
        "least_share": share.amin(-1),
    }
    truth = arm.true_atoms
    if truth is not None and arm.own:
        columns |= {
            "experts_truth": to_truth(model, atoms, truth, share),
            "experts_found": found(model, atoms, truth),
            "voronoi": voronoi(model, atoms, truth),
        }
    rows = [
        Row(0, one.size, measure, float(column[i]))
        for measure, column in columns.items()
        for i, one in enumerate(fits)
    ]
    for one in fits:
        rows += [
            Row(0, one.size, "loss", one.loss),
            Row(0, one.size, "converged", float(one.converged)),
            Row(0, one.size, "starts_agree", one.agree),
        ]
    return rows
