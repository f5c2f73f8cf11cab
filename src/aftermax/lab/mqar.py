"""Multi-query associative recall, with the size of the state as the axis: one block, any mixer.

The task is Zoology's (Arora et al., arXiv 2312.04927), with which Sieber et al. (arXiv 2405.15731,
"DSF", section 6.4) compare softmax, linear and normalised attention::

    k1 v1 k2 v2 ... kP vP | 0 0 k2 0 k1 0 ...      at a key after the bar: which value was its?

Their claims: linear attention nears softmax as the width n of queries and keys grows, since its
state is n x d numbers (figure 2); and at one n normalised attention, divided by exp(w . u_i), is
far better than linear attention, divided by the row's sum (figure 3). In the configurations that
the authors published those two differ in three things: the normaliser; the features, elu + 1
against none; and the block, which has an MLP for normalised attention alone. Here the block is the
same for all, and each arm differs from its neighbours in one thing:

    features     row's sum    exp(w . u)    nothing
    elu + 1      linear       linear-exp    linear-bare
    none         (may be 0)   normalised    bare

All have two layers of one head, learned positions, and the same initial weights for one seed: w
starts at 0, so that an exp arm begins as the bare arm beside it (ours; the authors draw w as they
draw any weight). Problems are fresh in every step and the same for all arms; answers alone are
scored. A run ends early where all but a hundredth of the answers are right, as theirs do.

Sizes are ours: what a core learns in seconds (DSF: L = 64 to 512, P = 4 to 64, d = 64 to 512,
vocabulary 8192, 100 000 problems in 64 epochs).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax.attention import attention
from aftermax.lab.results import Spread, spread
from aftermax.lab.verdicts import paired
from aftermax.linear.elu import elu_plus_one
from aftermax.linear.separable import divided
from aftermax.linear.walk import walk


class Arm(NamedTuple):
    title: str
    features: str
    """"elu", "none", or "softmax": the scores go through it."""
    normaliser: str
    """"sum", "exp" or "none"."""


ARMS = {
    "softmax": Arm("softmax", "softmax", "sum"),
    "linear": Arm("linear: elu + 1, row's sum", "elu", "sum"),
    "linear-exp": Arm("elu + 1, exp(w·u)", "elu", "exp"),
    "linear-bare": Arm("elu + 1, nothing", "elu", "none"),
    "normalised": Arm("normalised: q·k, exp(w·u)", "none", "exp"),
    "bare": Arm("q·k, nothing", "none", "none"),
}
NAMES = {"linear": "linear attention"}
"""In sentences."""
SEARCH_SEED = 1000
"""Of the runs that choose a learning rate, which are not reported."""
SOLVED = 0.99
"""Share of right answers at which a run ends; DSF's."""
CHECK_EVERY = 100
"""Steps between looks at the share of right answers."""
WARMUP = 50
"""Steps in which the learning rate rises from 0; then it stays, as a run may end at any step."""
HELD_OUT = 512
"""Problems that are scored."""


@dataclass(frozen=True)
class Setting:
    """All that the numbers depend on.

    Args:
        length, pairs: tokens of a problem, L, and its key-value pairs, P; 4 P must fit.
        vocabulary: token 0 is the blank; keys are the rest of the lower half, values the upper.
        power: of the distances between the pairs and their questions, p(x) ~ x^(power - 1), x in
            steps of two tokens; 0.01 is Zoology's.
        width: d, of tokens and values.
        key_dims: n, the axis; the state of a linear layer is n x d. P / 2 to 4 P, as DSF's 32 to
            256 for 64 pairs.
        mlp: an MLP of four times the width after each mixer.
        rates: learning rates, of which each arm takes its best, sought at `search_at`.
    """

    length: int = 32
    pairs: int = 8
    vocabulary: int = 64
    power: float = 0.01
    width: int = 64
    key_dims: tuple[int, ...] = (4, 8, 16, 32)
    layers: int = 2
    mlp: bool = False
    batch: int = 64
    steps: int = 2000
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    search_at: int = 16
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = ("softmax", "linear", "linear-exp", "normalised", "bare")

    def __post_init__(self):
        if unknown := set(self.arms) - set(ARMS):
            raise ValueError(f"no arm is called {unknown.pop()!r}; there are {', '.join(ARMS)}")
        if self.length < 4 * self.pairs:
            raise ValueError(
                f"{self.pairs} pairs and as many questions, each with a blank, need length >= "
                f"{4 * self.pairs}, got {self.length}"
            )
        if self.vocabulary // 2 - 1 < self.pairs:
            raise ValueError(
                f"{self.pairs} different keys need vocabulary >= {2 * self.pairs + 2}, "
                f"got {self.vocabulary}"
            )


# ---- the task ----------------------------------------------------------------------------------


class Problems(NamedTuple):
    tokens: Tensor  # int64 (count, length)
    asked: Tensor  # bool (count, length): where a key is asked for
    answers: Tensor  # int64 (count, length): its value there, 0 elsewhere


def problems(setting: Setting, count: int, generator: torch.Generator) -> Problems:
    """Pairs, then each key once more among blanks.

    >>> made = problems(Setting(length=8, pairs=2), 1, torch.Generator().manual_seed(0))
    >>> made.asked.nonzero()[:, 1].tolist()
    [4, 6]
    """
    pairs, half = setting.pairs, setting.vocabulary // 2
    keys = 1 + _distinct(count, half - 1, pairs, generator)
    values = half + _distinct(count, setting.vocabulary - half, pairs, generator)
    tokens = torch.zeros(count, setting.length, dtype=torch.int64)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    places = (setting.length - 2 * pairs) // 2
    likely = torch.arange(1.0, places + 1) ** (setting.power - 1)
    places = torch.multinomial(likely.expand(count, -1), pairs, generator=generator)
    where = 2 * pairs + 2 * places
    answers = torch.zeros_like(tokens).scatter_(1, where, values)
    return Problems(tokens.scatter_(1, where, keys), answers > 0, answers)


def _distinct(count: int, of: int, take: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, of, generator=generator).argsort(1)[:, :take]


# ---- the model ---------------------------------------------------------------------------------


class Mixer(nn.Module):
    """One causal head whose queries and keys are n wide and whose values are as wide as the tokens.

    Args:
        impl: as in `aftermax.attention` and `aftermax.linear.walk`.

    >>> Mixer(8, 3, ARMS["normalised"])(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, width: int, key_dim: int, arm: Arm, impl: str | None = None):
        super().__init__()
        self.arm, self.impl = arm, impl
        self.to_query = nn.Linear(width, key_dim, bias=False)
        self.to_key = nn.Linear(width, key_dim, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        if arm.normaliser == "exp":
            self.log_normaliser = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        query, key, value = (
            layer(x)[:, None] for layer in (self.to_query, self.to_key, self.to_value)
        )
        if self.arm.features == "softmax":
            out = attention(query, key, value, is_causal=True, impl=self.impl)
            return self.to_out(out[:, 0])
        if self.arm.features == "elu":
            query, key = elu_plus_one(query), elu_plus_one(key)
        if self.arm.normaliser == "exp":
            query = query * torch.exp(-(x @ self.log_normaliser))[:, None, :, None]
        walked = walk(query, key, value, totals=self.arm.normaliser == "sum", impl=self.impl)
        out = walked.out if walked.total is None else divided(walked.out, walked.total)
        return self.to_out(out[:, 0])


class Block(nn.Module):
    """x + mixer(norm x), and if wanted the same with an MLP."""

    def __init__(self, setting: Setting, key_dim: int, arm: Arm):
        super().__init__()
        width = setting.width
        self.norm = nn.LayerNorm(width)
        self.mixer = Mixer(width, key_dim, arm)
        self.mlp = _mlp(width) if setting.mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        return x if self.mlp is None else x + self.mlp(x)


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    )


class Recall(nn.Module):
    """Tied embeddings, learned positions, blocks. `forward` gives logits where they are asked for.

    Embeddings start at a deviation of 0.3, which is ours: in a few trials with softmax alone it
    learned as soon as at GPT-2's 0.02, or sooner. The other arms were not tried at 0.02.
    """

    def __init__(self, setting: Setting, key_dim: int, arm: Arm):
        super().__init__()
        self.embed = nn.Embedding(setting.vocabulary, setting.width)
        self.place = nn.Embedding(setting.length, setting.width)
        for embedding in (self.embed, self.place):
            nn.init.normal_(embedding.weight, std=0.3)
        self.blocks = nn.Sequential(*(Block(setting, key_dim, arm) for _ in range(setting.layers)))
        self.norm = nn.LayerNorm(setting.width)

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """(B, L) tokens, bool (B, L) -> (asked, vocabulary)."""
        x = self.embed(tokens) + self.place.weight
        return F.linear(self.norm(self.blocks(x)[asked]), self.embed.weight)


# ---- one run -----------------------------------------------------------------------------------


class Job(NamedTuple):
    """What distinguishes a run from the others of its setting."""

    kind: str
    """"search" or "seed"."""
    arm: str
    key_dim: int
    rate: float
    seed: int


class Outcome(NamedTuple):
    accuracy: float
    """Share of right answers to held-out problems."""
    loss: float
    """Nats an answer, of the same problems."""
    steps: int
    seconds: float
    """Of this process's CPU."""


def run(setting: Setting, job: Job) -> Outcome:
    """Train until solved, or for all steps, and score. The same numbers each time on a machine."""
    start = time.process_time()
    torch.manual_seed(job.seed)
    model = Recall(setting, job.key_dim, ARMS[job.arm])
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=job.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    generator = torch.Generator().manual_seed(job.seed)
    held_out = problems(setting, HELD_OUT, torch.Generator().manual_seed(2**31))
    accuracy, loss, step = 0.0, math.inf, 0
    for step in range(1, setting.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = job.rate * min(1.0, step / WARMUP)
        optimiser.zero_grad()
        _loss(model, problems(setting, setting.batch, generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % CHECK_EVERY == 0 or step == setting.steps:
            accuracy, loss = score(model, held_out)
            if accuracy >= SOLVED or not math.isfinite(loss):
                break
    return Outcome(accuracy, loss, step, time.process_time() - start)


def score(model: Recall, made: Problems) -> tuple[float, float]:
    """Share of right answers, and nats an answer."""
    with torch.no_grad():
        logits = model(made.tokens, made.asked)
    answers = made.answers[made.asked]
    right = (logits.argmax(-1) == answers).double().mean()
    return float(right), float(F.cross_entropy(logits, answers))


def _loss(model: Recall, made: Problems) -> Tensor:
    return F.cross_entropy(model(made.tokens, made.asked), made.answers[made.asked])


# ---- the study ---------------------------------------------------------------------------------


class Record:
    """Finished runs, one line of JSON each, appended: a study that is stopped goes on from there.

    Runs of other settings may stand in the same file.
    """

    def __init__(self, file: Path, setting: Setting):
        self.file, self.setting = file, setting
        self.done: dict[Job, Outcome] = {}
        about = self._about()
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                held = json.loads(line)
            except json.JSONDecodeError:  # the last line of a process that was killed
                continue
            if held["setting"] == about:
                self.done[Job(*held["job"])] = Outcome(*held["outcome"])

    def add(self, job: Job, outcome: Outcome) -> None:
        self.done[job] = outcome
        line = {"setting": self._about(), "job": job, "outcome": outcome}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(f"\n{json.dumps(line)}")  # a line that was cut short ends here

    def study(self) -> Study:
        """What the setting asks for of all that there is: at the rates that are its best."""
        jobs = list(search_jobs(self.setting))
        if all(job in self.done for job in jobs):
            jobs += seed_jobs(self.setting, self.done)
        return Study(self.setting, {job: self.done[job] for job in jobs if job in self.done})

    def _about(self) -> dict:
        """What a run depends on: not which others there are."""
        about = asdict(self.setting)
        for name in ("key_dims", "rates", "search_at", "seeds", "arms"):
            del about[name]
        return about


def search_jobs(setting: Setting) -> Iterator[Job]:
    for arm in setting.arms:
        for rate in setting.rates:
            yield Job("search", arm, setting.search_at, rate, SEARCH_SEED)


def best_rate(setting: Setting, done: dict[Job, Outcome], arm: str) -> float:
    """The rate that solves in the fewest steps; if none does, that of the lowest loss."""

    def order(job: Job) -> tuple:
        outcome = done[job]
        solved = outcome.accuracy >= SOLVED
        loss = outcome.loss if math.isfinite(outcome.loss) else math.inf
        return (not solved, outcome.steps if solved else loss)

    return min((job for job in search_jobs(setting) if job.arm == arm), key=order).rate


def seed_jobs(setting: Setting, done: dict[Job, Outcome]) -> Iterator[Job]:
    """All arms and widths of one seed before the next: half a study is a study with fewer seeds."""
    for seed in setting.seeds:
        for key_dim in setting.key_dims:
            for arm in setting.arms:
                yield Job("seed", arm, key_dim, best_rate(setting, done, arm), seed)


# ---- what is said of it ------------------------------------------------------------------------


class Study(NamedTuple):
    """A finished study, or as much of it as there is."""

    setting: Setting
    done: dict[Job, Outcome]

    @classmethod
    def of_json(cls, held: dict) -> Study:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in held["setting"].items()
        }
        done = {Job(*line["job"]): Outcome(*line["outcome"]) for line in held["runs"]}
        return cls(Setting(**fields), done)

    def to_json(self) -> dict:
        runs = [{"job": job, "outcome": outcome} for job, outcome in self.done.items()]
        return {"setting": asdict(self.setting), "runs": runs}

    def by_seed(self, arm: str, key_dim: int) -> dict[int, float]:
        return {
            job.seed: outcome.accuracy
            for job, outcome in self.done.items()
            if (job.kind, job.arm, job.key_dim) == ("seed", arm, key_dim)
        }

    def accuracy(self, arm: str, key_dim: int) -> Spread | None:
        """Mean and deviation over the seeds."""
        return spread(self.by_seed(arm, key_dim))

    def difference(self, ours: str, theirs: str, key_dim: int) -> tuple[float, float] | None:
        """Mean of (ours - theirs) seed by seed, and the half-width of its 95% interval."""
        return paired(self.by_seed(ours, key_dim), self.by_seed(theirs, key_dim))

    def verdicts(self) -> list[str]:
        """What was measured of each claim: differences with their 95% intervals, of three seeds or
        more."""
        return [
            *self._over("softmax", "linear", "claimed: nearer as n grows"),
            *self._over("normalised", "linear", "claimed: far better at one n"),
            *self._over("linear-exp", "linear", "the normaliser alone, with elu + 1"),
            *self._over("bare", "linear-bare", "the features alone, without a normaliser"),
            *self._over("normalised", "bare", "exp(w·u) against no normaliser"),
        ]

    def _over(self, ours: str, theirs: str, about: str) -> Iterable[str]:
        parts = []
        for key_dim in self.setting.key_dims:
            difference = self.difference(ours, theirs, key_dim)
            if difference is None:
                continue
            mean, half = difference
            sure = "" if abs(mean) > half else ", not told apart"
            parts.append(f"n = {key_dim}: {mean:+.2f} ± {half:.2f}{sure}")
        if parts:
            a, b = NAMES.get(ours, ours), NAMES.get(theirs, theirs)
            yield f"{a.capitalize()} over {b} ({about}; share of answers): {'; '.join(parts)}."
