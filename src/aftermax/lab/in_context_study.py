"""Which attention learns softmax regression in context, and is what it learns a gradient step?

`aftermax.lab.in_context` has the tasks, the layers and the measures. A study trains every arm of a
setting on fresh tasks at every step, the same for all arms of a seed, and looks on the way at tasks
that are held out. The learning rate of each arm is the best of a small grid, by a run of full
length with a seed of its own, scored on tasks of its own, which is not reported. Beside the arms
stand learners that are not trained: uniform answers; gradient steps, whose sizes are the best on
tasks of their own, one after the other; the optimum, which solves each task to the end; and
softmax heads that are set to the step by hand, at temperatures of either sign.

The reference of all differences is one gradient step of the best size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aftermax.lab.in_context import (
    ARMS,
    Answer,
    Layer,
    Measures,
    Tasks,
    answer,
    answer_of,
    best_factor,
    best_rates,
    descend,
    draw,
    loss_of,
    measure,
    model_of,
)
from aftermax.lab.jobs import Job
from aftermax.lab.results import Spread, spread
from aftermax.lab.verdicts import paired

SEARCH_SEED = 1000
"""Of the runs that choose a learning rate, which are not reported."""
HELD_OUT, TUNING, STEP_SIZES = 2**31, 2**31 + 1, 2**31 + 2
"""Seeds of the tasks that are scored, of those that choose learning rates, and step sizes."""
SCORED = 500
"""Tasks that are scored."""
SIZED = 125_000
"""Rows of the tasks on which step sizes are chosen: 5000 tasks of n = 25."""
WARMUP = 0.02
"""Share of the steps in which the learning rate rises; then a cosine takes it to 0."""
BETAS = tuple(sign * b for sign in (-1, 1) for b in (0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2))
"""Temperatures of the softmax heads that are set by hand."""
STEPS = (1, 2, 5, 20)
"""Gradient steps of the learners that are not trained."""
UNTRAINED = {
    "uniform": "uniform answers",
    **{f"gd-{k}": f"{k} gradient step{'s' * (k > 1)}" for k in STEPS},
    "optimum": "the optimum",
}
"""Name -> title."""
NEAR = 0.99
"""Cosine to the gradient step from which on a layer is said to take it."""
AS_GOOD = 1.05
"""Loss as a ratio to the gradient step's up to which a layer is said to be as good."""
LITTLE = 0.5
"""Share of what a gradient step gains over uniform answers up to which a layer learned little."""


@dataclass(frozen=True)
class Setting:
    """All that the numbers depend on.

    Args:
        rows: n, examples of a task, and its queries.
        width: d, of an example.
        batch: tasks of a step.
        rates: learning rates, of which each arm takes its best.
        start: factor of the layers' initial projections, those of `nn.Linear`.
    """

    rows: int = 25
    width: int = 20
    batch: int = 128
    steps: int = 5000
    start: float = 1.0
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = ("gd", "products", "softmax")

    def __post_init__(self):
        if unknown := set(self.arms) - set(ARMS):
            raise ValueError(f"no arm is called {unknown.pop()!r}; there are {', '.join(ARMS)}")

    def tasks(self, count: int, generator: torch.Generator | int, dtype=torch.float32) -> Tasks:
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        return draw(count, self.rows, self.width, generator, dtype)


LINEAR = ("inline", "linear", "normalised")
DENSE = tuple(name for name in ARMS if name not in (*Setting.arms, *LINEAR))
SMALL_START = Setting(start=0.1, rates=(3e-3, 1e-2))
STUDIES: dict[str, Setting] = {
    "main": replace(SMALL_START, seeds=tuple(range(8))),
    **{f"d={width}": replace(SMALL_START, width=width) for width in (5, 10, 40)},
    "n=200": replace(SMALL_START, rows=200, batch=16),
    "unscaled": Setting(seeds=tuple(range(8))),
    "systems": Setting(arms=DENSE),
    "linear": Setting(arms=LINEAR),
}
"""Name -> what is asked, in the order in which it is done. "systems" and "linear" are of the sizes
of "unscaled" and can be joined with it."""


# ---- one run -------------------------------------------------------------------------------------


class Look(NamedTuple):
    """At tasks that are held out, after a step."""

    step: int
    measures: Measures


class Outcome(NamedTuple):
    looks: tuple[Look, ...]
    seconds: float
    """Of this process's CPU."""
    temperature: float | None = None
    """Of the trained layer, `Layer.temperature`; None where there is none."""

    @property
    def last(self) -> Measures:
        return self.looks[-1].measures


class Scored(NamedTuple):
    """Tasks, and what one gradient step of the best size makes of them."""

    tasks: Tasks
    reference: Answer

    @classmethod
    def of(cls, setting: Setting, seed: int, rate: float) -> Scored:
        tasks = setting.tasks(SCORED, seed)
        return cls(tasks, answer_of(descend(tasks.data, tasks.target, [rate]), tasks))

    def measures(self, model: Callable[[Tasks], Tensor]) -> Measures:
        return measure(answer(model, self.tasks), self.reference, self.tasks.answers)


def checkpoints(steps: int) -> tuple[int, ...]:
    """0, five steps a decade from 10 on, and the last.

    >>> checkpoints(100)
    (0, 10, 16, 25, 40, 63, 100)
    """
    between = {round(10 ** (1 + i / 5)) for i in range(int(5 * math.log10(max(steps, 10))))}
    return tuple(sorted({0, steps} | {step for step in between if step < steps}))


def schedule(done: float) -> float:
    """Of the learning rate, after a share of the steps."""
    if done < WARMUP:
        return done / WARMUP
    return (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))) / 2


def run(setting: Setting, job: Job, scored: Scored) -> Outcome:
    """Train for all steps, looking on the way. The same numbers each time on a machine."""
    start = time.process_time()
    torch.manual_seed(job.seed)
    model = model_of(job.arm, setting.width, setting.start)
    optimiser = torch.optim.Adam(model.parameters(), lr=job.rate, fused=True)
    generator = torch.Generator().manual_seed(job.seed)
    watched = checkpoints(setting.steps)
    looks = [Look(0, scored.measures(model))]
    for step in range(1, setting.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = job.rate * schedule(step / setting.steps)
        tasks = setting.tasks(setting.batch, generator)
        optimiser.zero_grad()
        loss_of(model(tasks), tasks.answers).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step in watched:
            looks.append(Look(step, scored.measures(model)))
            if not math.isfinite(looks[-1].measures.loss):
                break
    temperature = model.temperature() if isinstance(model, Layer) else None
    return Outcome(tuple(looks), time.process_time() - start, temperature)


# ---- what is not trained -------------------------------------------------------------------------


class Untrained(NamedTuple):
    rates: tuple[float, ...]
    """Sizes of its steps, in units of n^2."""
    measures: Measures


def optimum(tasks: Tasks) -> Tensor:
    """x (B, d) that answers each task's own examples best; of several, the one of least norm."""
    centred = tasks.data - tasks.data.mean(1, keepdim=True)
    logits = tasks.target.log()
    logits = logits - logits.mean(1, keepdim=True)
    return (torch.linalg.pinv(centred) @ logits[..., None])[..., 0]


def untrained(setting: Setting) -> dict[str, Untrained]:
    """In float64, on the tasks that are held out."""
    sized = setting.tasks(SIZED // setting.rows, STEP_SIZES, torch.float64)
    rates = tuple(best_rates(sized, max(STEPS)))
    tasks = setting.tasks(SCORED, HELD_OUT, torch.float64)
    weights = {"uniform": torch.zeros_like(tasks.data[:, 0])}
    weights |= {f"gd-{k}": descend(tasks.data, tasks.target, rates[:k]) for k in STEPS}
    weights["optimum"] = optimum(tasks)
    reference = answer_of(weights["gd-1"], tasks)
    return {
        name: Untrained(
            rates[: int(name[3:])] if name.startswith("gd-") else (),
            measure(answer_of(x, tasks), reference, tasks.answers),
        )
        for name, x in weights.items()
    }


def heads(setting: Setting) -> dict[float, Untrained]:
    """Softmax heads set to the step, by temperature; their output is the best on the tasks that
    choose step sizes. In float64."""
    sized = setting.tasks(SIZED // setting.rows, STEP_SIZES, torch.float64)
    tasks = setting.tasks(SCORED, HELD_OUT, torch.float64)
    (rate,) = best_rates(sized, 1)
    reference = answer_of(descend(tasks.data, tasks.target, [rate]), tasks)
    layer = Layer(setting.width).double()
    found = {}
    for beta in sorted(BETAS):
        with torch.no_grad():
            along = layer.set_to_step(beta, 1.0, setting.rows)(sized)
        best = best_factor(torch.zeros_like(along), along, sized.answers)
        layer.set_to_step(beta, best, setting.rows)
        measures = measure(answer(layer, tasks), reference, tasks.answers)
        found[beta] = Untrained((best,), measures)
    return found


# ---- the study -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Finished runs of a setting, or as many of them as there are."""

    setting: Setting
    done: dict[Job, Outcome] = field(default_factory=dict)
    untrained: dict[str, Untrained] = field(default_factory=dict)
    heads: dict[float, Untrained] = field(default_factory=dict)

    @classmethod
    def of_json(cls, held: dict) -> Study:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in held["setting"].items()
        }
        done = {
            Job(*line["job"]): Outcome(
                tuple(Look(step, Measures(*m)) for step, m in line["looks"]),
                line["seconds"],
                line["temperature"],
            )
            for line in held["runs"]
        }
        untrained = {
            name: Untrained(tuple(rates), Measures(*m))
            for name, (rates, m) in held["untrained"].items()
        }
        by_hand = {
            beta: Untrained(tuple(rates), Measures(*m)) for beta, (rates, m) in held["heads"]
        }
        return cls(Setting(**fields), done, untrained, by_hand)

    def to_json(self) -> dict:
        runs = [
            outcome._asdict() | {"job": job, "seconds": round(outcome.seconds, 2)}
            for job, outcome in self.done.items()
        ]
        return {
            "setting": asdict(self.setting),
            "untrained": self.untrained,
            "heads": list(self.heads.items()),
            "runs": runs,
        }

    def jobs(self) -> Iterator[Job]:
        """All that the setting asks for: of each arm the rates, then the seeds at the best."""
        for arm in self.setting.arms:
            for rate in self.setting.rates:
                yield Job("search", arm, rate, SEARCH_SEED)
            for seed in self.setting.seeds:
                yield Job("seed", arm, self.best_rate(arm), seed)

    def count(self) -> tuple[int, int]:
        """Runs that there are of those that are asked for, and how many that is."""
        arms, rates = self.setting.arms, self.setting.rates
        found = sum(
            Job("search", a, rate, SEARCH_SEED) in self.done for a in arms for rate in rates
        )
        found += sum(len(self.runs(arm)) for arm in arms)
        return found, len(arms) * (len(rates) + len(self.setting.seeds))

    def best_rate(self, arm: str) -> float:
        """That of the least loss at the end."""

        def loss(rate: float) -> float:
            found = self.done[Job("search", arm, rate, SEARCH_SEED)].last.loss
            return found if math.isfinite(found) else math.inf

        return min(self.setting.rates, key=loss)

    def complete(self, each: Callable[[Job, Outcome], None] = lambda job, outcome: None) -> None:
        """Do what is missing; `each` is called after every run that was made."""
        if not self.untrained:
            self.untrained.update(untrained(self.setting))
        if not self.heads:
            self.heads.update(heads(self.setting))
        (rate,) = self.untrained["gd-1"].rates
        scored = {
            "search": Scored.of(self.setting, TUNING, rate),
            "seed": Scored.of(self.setting, HELD_OUT, rate),
        }
        for job in self.jobs():
            if job not in self.done:
                self.done[job] = run(self.setting, job, scored[job.kind])
                each(job, self.done[job])

    def runs(self, arm: str) -> dict[int, Outcome]:
        """Of the seeds that are asked for, at the best rate; {} while that is not known."""
        if any(
            Job("search", arm, rate, SEARCH_SEED) not in self.done for rate in self.setting.rates
        ):
            return {}
        best = self.best_rate(arm)
        jobs = ((seed, Job("seed", arm, best, seed)) for seed in self.setting.seeds)
        return {seed: self.done[job] for seed, job in jobs if job in self.done}

    def by_seed(self, arm: str, measure: str, step: int | None = None) -> dict[int, float]:
        """A number of the looks after a step, by default the last one."""
        found = {}
        for seed, outcome in self.runs(arm).items():
            looks = [look for look in outcome.looks if step is None or look.step == step]
            if looks:
                found[seed] = getattr(looks[-1].measures, measure)
        return found

    def at(self, arm: str, measure: str, step: int | None = None) -> Spread | None:
        """Mean and deviation over the seeds."""
        return spread(self.by_seed(arm, measure, step))

    def steps(self, arm: str) -> list[int]:
        """After which was looked."""
        return sorted({look.step for run in self.runs(arm).values() for look in run.looks})

    def ratio(self, arm: str) -> dict[int, float]:
        """By seed, the loss at the end as a ratio to that of one gradient step of the best size."""
        of_step = self.untrained["gd-1"].measures.loss
        return {seed: loss / of_step for seed, loss in self.by_seed(arm, "loss").items()}

    def steps_to(self, arm: str, cosine: float = NEAR) -> dict[int, int]:
        """By seed, the first look from which on the cosine stays above; a seed without such a look
        is not there."""
        found = {}
        for seed, outcome in self.runs(arm).items():
            below = [i for i, look in enumerate(outcome.looks) if not look.measures.cosine > cosine]
            first = below[-1] + 1 if below else 0
            if first < len(outcome.looks):
                found[seed] = outcome.looks[first].step
        return found

    def signs(self, arm: str) -> dict[int, int]:
        """By seed, the sign of the layer's temperature."""
        found = {seed: outcome.temperature for seed, outcome in self.runs(arm).items()}
        return {seed: 1 if t > 0 else -1 for seed, t in found.items() if t is not None}

    def gain(self, arm: str) -> dict[int, float]:
        """By seed, what it is better than uniform answers by, as a share of what one step is."""
        uniform, step = (self.untrained[name].measures.loss for name in ("uniform", "gd-1"))
        losses = self.by_seed(arm, "loss")
        return {seed: (uniform - loss) / (uniform - step) for seed, loss in losses.items()}

    def of_seeds(self, seeds: Iterable[int]) -> Study:
        """The same of these seeds alone."""
        return replace(self, setting=replace(self.setting, seeds=tuple(seeds)))

    def difference(self, ours: str, theirs: str, measure: str) -> tuple[float, float] | None:
        """Mean of ours - theirs seed by seed, and the half-width of its 95% interval."""
        return paired(self.by_seed(ours, measure), self.by_seed(theirs, measure))


def joined(one: Study, other: Study) -> Study:
    """Both sets of arms in one study, each with its own seeds as far as they were run.

    Raises:
        ValueError: where the sizes differ.
    """
    if _alike(one.setting) != _alike(other.setting):
        raise ValueError(f"studies of {one.setting} and {other.setting} cannot be joined")
    arms = (*one.setting.arms, *(a for a in other.setting.arms if a not in one.setting.arms))
    seeds = tuple(sorted({*one.setting.seeds, *other.setting.seeds}))
    rates = tuple(sorted({*one.setting.rates, *other.setting.rates}))
    setting = Setting(**(_alike(one.setting) | {"arms": arms, "seeds": seeds, "rates": rates}))
    return replace(one, setting=setting, done=other.done | one.done)


def _alike(setting: Setting) -> dict:
    """What a run depends on: not which others there are."""
    return {k: v for k, v in asdict(setting).items() if k not in ("rates", "seeds", "arms")}


def resumed(held: dict | None, setting: Setting) -> Study:
    """A study of the setting with the runs of a record; rates, seeds and arms may be others.

    Raises:
        ValueError: where the record is of another setting.
    """
    if held is None:
        return Study(setting)
    found = Study.of_json(held)
    if _alike(found.setting) != _alike(setting):
        raise ValueError(
            f"the record is of {_alike(found.setting)}, asked for is {_alike(setting)}: "
            "give another file, or remove it"
        )
    return replace(found, setting=setting)
