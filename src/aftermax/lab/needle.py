"""What a small memory learns to keep: needles in noise, one model, one layer exchanged.

The task is `aftermax.lab.data.needle`: pairs of key and value among noise, then one of the keys,
further away than any window sees. Layer 1 sees two tokens, so that a value knows its key, and no
other token knows both; layer 2 is the arm's::

    window      the same window: what comes before it is gone
    random      SparseK with kv coupling, whose scores are drawn anew at every pass
    v, log, kv  SparseK (arXiv 2406.16747), by what the share of a kept pair scales
    full        softmax attention over all

Scored are the answers; and, of the slots that the decode state has once the question is read, the
share of problems in which one holds the value ("recall", a mean over heads; and "any", of problems
in which a slot of any head does): what the scores learned to keep, whatever the rest makes of it.
Scores that know nothing keep the value with chance k / (tokens that left the window). Whoever holds
the values without their keys answers one in `pairs`.

With a wider window in layer 1 the tokens after a pair know it too, so that keeping any of those
serves as well. With two pairs an answer can also be told from the other value and its key, and the
token after a value knows that value: there may be more right answers than values kept.

All arms of a seed begin with the same weights, see the same problems and choose their learning rate
from the same ones, by the loss of runs of full length that are not reported.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax.lab.data.needle import Needles, Problems
from aftermax.lab.jobs import Job
from aftermax.lab.models import Branch, SwiGLU
from aftermax.lab.results import Spread, spread
from aftermax.lab.verdicts import paired
from aftermax.modules import Attention
from aftermax.sparse import SparseK, SparseKAttention, SparseKState

ARMS = {
    "window": "window alone",
    "random": "random scores, scale K and V",
    "v": "SparseK, scale V",
    "log": "SparseK, log p in the logit",
    "kv": "SparseK, scale K and V",
    "full": "full attention",
}
"""Name -> title."""
COUPLED: dict[str, Literal["kv", "v", "log"]] = {"random": "kv", "v": "v", "log": "log", "kv": "kv"}
"""How the arms that select couple what they keep."""
SEARCH_SEED = 1000
"""Of the runs that choose a learning rate, which are not reported."""
CHECK_EVERY = 100
"""Steps between looks at held-out problems."""
WARMUP = 0.05
"""Share of the steps in which the learning rate rises; then a cosine takes it to a tenth."""
ALIKE = 0.01
"""Nats an answer by which two learning rates may differ and be as good: where both solve the task
of the search, what is left is chance, and the lower rate is the safer."""
LEARNED = 0.9
"""Share of right answers at which an arm is said to have learned."""
HELD_OUT = 1000
"""Problems that are scored."""


@dataclass(frozen=True)
class Setting:
    """All that the numbers depend on.

    Args:
        window: tokens that a row of SparseK, and of the arm "window", sees beside what is kept.
        first_window: of layer 1.
        keep: pairs that SparseK keeps, k.
        rates: learning rates, of which each arm takes its best.
    """

    length: int = 32
    pairs: int = 2
    gap: int = 7
    noise: int = 12
    keys: int = 6
    values: int = 6
    window: int = 6
    first_window: int = 2
    keep: int = 4
    width: int = 32
    heads: int = 2
    batch: int = 32
    steps: int = 2000
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = tuple(ARMS)

    def __post_init__(self):
        if unknown := set(self.arms) - set(ARMS):
            raise ValueError(f"no arm is called {unknown.pop()!r}; there are {', '.join(ARMS)}")
        reach = self.window + self.first_window - 1
        if reach > self.gap:
            raise ValueError(
                f"windows of {self.first_window} and {self.window} tokens reach {reach} back, so "
                f"the gap must be at least that, got {self.gap}"
            )
        self.needles  # noqa: B018, what it cannot be is said now

    @property
    def needles(self) -> Needles:
        names = ("length", "pairs", "gap", "noise", "keys", "values")
        return Needles(**{name: getattr(self, name) for name in names})

    @property
    def chance_kept(self) -> float:
        """That scores which know nothing keep the value: k of all that left the window."""
        return min(1.0, self.keep / (self.length - self.window))


# ---- the model ---------------------------------------------------------------------------------


class RandomScores(nn.Module):
    """(B, T, width) -> (B, T, heads) standard normal numbers, new ones each time."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn(*x.shape[:2], self.heads, device=x.device, dtype=x.dtype)


def second_layer(setting: Setting, arm: str) -> Attention:
    """The arm's attention, with the projections of plain attention of the same random state."""
    window = setting.window if arm == "window" else None
    plain = Attention(setting.width, setting.heads, window=window)
    if arm in ("window", "full"):
        return plain
    with torch.random.fork_rng([]):  # what is drawn after it is the same for all arms
        system = SparseK(setting.keep, setting.window, couple=COUPLED[arm])
        made = SparseKAttention(setting.width, setting.heads, weights=system)
        if arm == "random":
            made.score = RandomScores(made.kv_heads)
    made.load_state_dict(plain.state_dict(), strict=False)
    return made


class Model(nn.Module):
    """Tied embeddings, two layers with SwiGLU and RoPE; `forward` gives the logits at the last
    token. Embeddings start at a deviation of 0.3, as in `aftermax.lab.mqar`."""

    def __init__(self, setting: Setting, arm: str):
        super().__init__()
        width = setting.width
        self.embed = nn.Embedding(setting.needles.symbols, width)
        nn.init.normal_(self.embed.weight, std=0.3)
        first = Attention(width, setting.heads, window=setting.first_window)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                Branch(attend, width, hybrid_norm=False, layer_scale=False),
                Branch(SwiGLU(width), width, hybrid_norm=False, layer_scale=False),
            )
            for attend in (first, second_layer(setting, arm))
        )
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, symbols)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x[:, -1]), self.embed.weight)

    def read_by_second(self, tokens: Tensor) -> Tensor:
        """(B, T, width), what the second layer's attention is given."""
        branch = self.blocks[1][0]  # type: ignore[index]
        return branch.before(self.blocks[0](self.embed(tokens)))


# ---- one run -----------------------------------------------------------------------------------


class Look(NamedTuple):
    """At held-out problems."""

    step: int
    accuracy: float
    loss: float
    """Nats an answer."""
    recall: float | None = None
    """Share of problems whose value is kept, a mean over heads; None where nothing is chosen."""
    any: float | None = None
    """Share of problems whose value is kept by some head."""


class Outcome(NamedTuple):
    looks: tuple[Look, ...]
    seconds: float
    """Of this process's CPU."""

    @property
    def last(self) -> Look:
        return self.looks[-1]


def run(setting: Setting, job: Job) -> Outcome:
    """Train for all steps, looking on the way. The same numbers each time on a machine."""
    start = time.process_time()
    torch.manual_seed(job.seed)
    model = Model(setting, job.arm)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=job.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    generator = torch.Generator().manual_seed(job.seed)
    held_out = setting.needles.problems(HELD_OUT, torch.Generator().manual_seed(2**31))
    looks = []
    for step in range(1, setting.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = job.rate * schedule(step / setting.steps)
        made = setting.needles.problems(setting.batch, generator)
        optimiser.zero_grad()
        F.cross_entropy(model(made.tokens), made.answers).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % CHECK_EVERY == 0 or step == setting.steps:
            looks.append(Look(step, *score(model, held_out), *kept(model, held_out)))
            if not math.isfinite(looks[-1].loss):
                break
    return Outcome(tuple(looks), time.process_time() - start)


def schedule(done: float) -> float:
    """Of the learning rate, after a share of the steps."""
    if done < WARMUP:
        return done / WARMUP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


@torch.no_grad()
def score(model: Model, made: Problems) -> tuple[float, float]:
    """Share of right answers, and nats an answer."""
    logits = model(made.tokens)
    right = (logits.argmax(-1) == made.answers).double().mean()
    return float(right), float(F.cross_entropy(logits, made.answers))


@torch.no_grad()
def kept(model: Model, made: Problems) -> tuple[float, float] | tuple[()]:
    """`recall` and `any` of a `Look`, from the state after the question; nothing of other arms."""
    attend = model.blocks[1][0].layer  # type: ignore[index]
    if not isinstance(attend, SparseKAttention):
        return ()
    x = model.read_by_second(made.tokens)
    _, state = attend.step(x, attend.init_state(len(x)))
    assert isinstance(state, SparseKState)
    holds = (state.slot_position == made.places[:, None, None]).any(-1)  # (B, heads)
    return holds.double().mean().item(), holds.any(-1).double().mean().item()


# ---- the study ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Finished runs, or as many of them as there are."""

    setting: Setting
    done: dict[Job, Outcome]

    @classmethod
    def of_json(cls, held: dict) -> Study:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in held["setting"].items()
        }
        done = {
            Job(*line["job"]): Outcome(
                tuple(Look(*look) for look in line["looks"]), line["seconds"]
            )
            for line in held["runs"]
        }
        return cls(Setting(**fields), done)

    def to_json(self) -> dict:
        runs = [
            {"job": job, "looks": outcome.looks, "seconds": round(outcome.seconds, 2)}
            for job, outcome in self.done.items()
        ]
        return {"setting": asdict(self.setting), "runs": runs}

    def jobs(self) -> Iterator[Job]:
        """All that the setting asks for; those of the seeds once every rate was tried."""
        for rate in self.setting.rates:
            for arm in self.setting.arms:
                yield Job("search", arm, rate, SEARCH_SEED)
        for seed in self.setting.seeds:
            for arm in self.setting.arms:
                yield Job("seed", arm, self.best_rate(arm), seed)

    def best_rate(self, arm: str) -> float:
        """The lowest of those whose loss at the end is the least, or within `ALIKE` of it."""

        def loss(rate: float) -> float:
            found = self.done[Job("search", arm, rate, SEARCH_SEED)].last.loss
            return found if math.isfinite(found) else math.inf

        least = min(map(loss, self.setting.rates))
        return min(rate for rate in self.setting.rates if loss(rate) <= least + ALIKE)

    def runs(self, arm: str) -> list[tuple[Job, Outcome]]:
        """Of the seeds; where there are some at several rates, those at the best."""
        found = [(j, o) for j, o in self.done.items() if (j.kind, j.arm) == ("seed", arm)]
        if len({job.rate for job, _ in found}) > 1:
            best = self.best_rate(arm)
            found = [(job, outcome) for job, outcome in found if job.rate == best]
        return [(job, outcome) for job, outcome in found if job.seed in self.setting.seeds]

    def complete(self, each: Callable[[Job, Outcome], None] = lambda job, outcome: None) -> None:
        """Do what is missing; `each` is called after every run that was made."""
        for job in self.jobs():
            if job not in self.done:
                self.done[job] = run(self.setting, job)
                each(job, self.done[job])

    def by_seed(self, arm: str, measure: str, step: int | None = None) -> dict[int, float]:
        """A number of the looks at a step, by default the last one."""
        found = {}
        for job, outcome in self.runs(arm):
            looks = [look for look in outcome.looks if step is None or look.step == step]
            if looks:
                value = getattr(looks[-1], measure)
                if value is not None:
                    found[job.seed] = value
        return found

    def at(self, arm: str, measure: str, step: int | None = None) -> Spread | None:
        """Mean and deviation over the seeds."""
        return spread(self.by_seed(arm, measure, step))

    def steps_to_learn(self, arm: str) -> dict[int, float]:
        """By seed, the first look at which `LEARNED` of the answers were right; a seed without such
        a look is not there."""
        return {
            job.seed: min(learned)
            for job, outcome in self.runs(arm)
            if (learned := [look.step for look in outcome.looks if look.accuracy >= LEARNED])
        }

    def steps(self, arm: str) -> list[int]:
        """At which was looked."""
        return sorted({look.step for _, outcome in self.runs(arm) for look in outcome.looks})

    def verdicts(self) -> list[str]:
        """Differences seed by seed with their 95% intervals, from three seeds on."""
        asked = [
            ("kv", "random", "accuracy"),
            ("kv", "window", "accuracy"),
            ("kv", "v", "accuracy"),
            ("kv", "log", "accuracy"),
            ("kv", "full", "accuracy"),
            *((arm, "random", "recall") for arm in ("kv", "v", "log")),
        ]
        said = [self._over(*ask) for ask in asked]
        said += [self._sooner("kv", other) for other in ("v", "log", "full")]
        return [sentence for sentence in said if sentence is not None]

    def _over(self, ours: str, theirs: str, measure: str) -> str | None:
        told = paired(self.by_seed(ours, measure), self.by_seed(theirs, measure))
        if told is None:
            return None
        mean, half = told
        return f"{_title(ours, theirs)}: {measure} {mean:+.3f} ± {half:.3f}{_reserve(mean, half)}."

    def _sooner(self, ours: str, theirs: str) -> str | None:
        told = paired(self.steps_to_learn(ours), self.steps_to_learn(theirs))
        if told is None:
            return None
        mean, half = told
        about = f"{LEARNED:.0%} of the answers after {mean:+.0f} ± {half:.0f} steps"
        return f"{_title(ours, theirs)}: {about}{_reserve(mean, half)}."


def _title(ours: str, theirs: str) -> str:
    return f"{ARMS[ours][0].upper()}{ARMS[ours][1:]}, over {ARMS[theirs]}"


def _reserve(mean: float, half: float) -> str:
    return "" if abs(mean) > half else ", not told apart"


def open_study(file: Path, setting: Setting) -> Study:
    """What the file has of that setting; seeds, rates and arms may be others.

    Raises:
        ValueError: where it is of another setting.
    """
    if not file.exists():
        return Study(setting, {})
    held = Study.of_json(json.loads(file.read_text()))

    def alike(s: Setting) -> dict:
        return {k: v for k, v in asdict(s).items() if k not in ("rates", "seeds", "arms")}

    if alike(held.setting) != alike(setting):
        raise ValueError(f"{file} is of another setting; give another file, or remove it")
    return Study(setting, held.done)
