"""The work of the task of rates: which mixture is fitted to whose data, at which sample sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aftermax.lab.rates_mixture import EXPERTS, Mixture
from aftermax.lab.work import AnyWork

TRUTH_SCORES: dict[int, tuple[tuple[float, ...], ...]] = {
    1: ((-1.0, 1.2, 0.3), (0.8, -1.0, -0.2)),
    2: ((1.2, -1.2, 1.2, 1.2, -1.2, -1.0), (-0.8, 1.0, 0.6, -1.0, 0.6, 0.2)),
}
"""By the dimension of x: A, b, c of the true atoms."""
TRUTH_EXPERTS: dict[int, tuple[tuple[float, ...], ...]] = {
    1: ((1.2, 0.4), (-1.0, 0.8)),
    2: ((1.2, 0.8, 0.4), (-0.8, 1.2, -0.4)),
}
"""w and v of the true atoms."""

TRAITS = ("partial", "one", "constant", "softmax", "sigmoid", "wave")
GATES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Gated:
    """What a page says of a gate."""

    formula: str
    paper: str
    arxiv: str
    claim: str


ENTRIES = {
    "softmax": Gated(
        "Σ exp(s_j) h_j / Σ exp(s_l)",
        "Nguyen, Ho & Rinaldo, as the baseline",
        "2405.13997",
        "Experts at n^-1/4 where two share a true one, and no polynomial rate with linear experts.",
    ),
    "sigmoid": Gated(
        "Σ σ(s_j) h_j",
        "Yan et al.",
        "2502.00281",
        "Experts at about n^-1/2, with linear ones too, where a superfluous score is not zero.",
    ),
}


@dataclass(frozen=True)
class RatesArm:
    """A mixture, and what makes the data that it is fitted to."""

    name: str
    model: Mixture
    truth_gate: Literal["softmax", "sigmoid", "wave"]
    """Of the true mixture, whose experts are of the fitted kind; wave is a function of neither."""
    truth_atoms: int
    constant: bool
    """Whether the true scores are constants: A = b = 0."""
    optimiser: Literal["adamw", "sgd"] = "sgd"
    rate_scale: float = 1.0

    @property
    def gate(self) -> str:
        return self.model.gate

    @property
    def entry(self) -> Gated:
        return ENTRIES[self.gate]

    @property
    def own(self) -> bool:
        """Whether the data are made by the gate that is fitted."""
        return self.truth_gate == self.gate

    @property
    def setting(self) -> str:
        """What the systems to compare it with have in common, but for whose data it is."""
        marks = [
            EXPERTS[self.model.expert].title,
            "no b" if self.model.partial else "",
            "one true atom" if self.truth_atoms == 1 else "",
            "constant true scores" if self.constant else "",
        ]
        return ", ".join(mark for mark in marks if mark)

    @property
    def title(self) -> str:
        made = {"wave": "a wave"}.get(self.truth_gate, f"{self.truth_gate}'s data")
        return f"{self.gate} · {self.setting}" + ("" if self.own else f", on {made}")

    @property
    def identity(self) -> dict[str, str]:
        truth = self.true_atoms
        known = self.truth_gate if truth is None else f"{self.truth_gate} {truth.tolist()}"
        return {"arm": repr(self.model), "expert": self.model.g.formula, "truth": known}

    @property
    def true_mixture(self) -> Mixture | None:
        if self.truth_gate == "wave":
            return None
        return dataclasses.replace(self.model, gate=self.truth_gate)

    @property
    def true_atoms(self) -> Tensor | None:
        """(k, size) in float64; None of a wave."""
        true, dim = self.true_mixture, self.model.dim
        if true is None:
            return None
        rows = []
        for score, expert in zip(TRUTH_SCORES[dim], TRUTH_EXPERTS[dim], strict=True):
            quadratic, (*linear, constant) = score[: -dim - 1], score[-dim - 1 :]
            kept = [] if self.model.partial else linear
            forms = [*quadratic, *kept]
            rows.append([*(0.0 * x if self.constant else x for x in forms), constant, *expert])
        return torch.tensor(rows[: self.truth_atoms], dtype=torch.float64)

    def true_values(self, x: Tensor) -> Tensor:
        """f* at (n, dim): (n,)."""
        true, atoms = self.true_mixture, self.true_atoms
        if true is None or atoms is None:
            return wave(x)
        return true(atoms, x)


def wave(x: Tensor) -> Tensor:
    """A smooth function that no mixture here is equal to: sin(3 x_1), times cos(2 x_2) in two
    dimensions."""
    out = (3 * x[:, 0]).sin()
    return out if x.shape[1] == 1 else out * (2 * x[:, 1]).cos()


@dataclass(frozen=True)
class RatesWork(AnyWork):
    """What is drawn and fitted, the same for each system."""

    task: ClassVar[str] = "rates"
    headline: ClassVar[str] = "function"
    final: ClassVar[str] = "function"
    kept_for_tuning: ClassVar[str] = "nothing"
    data: ClassVar[Path | None] = None  # type: ignore[misc]
    """Samples are drawn, not read."""
    batch: ClassVar[int] = 1  # type: ignore[misc]
    search_steps: ClassVar[int] = 1  # type: ignore[misc]
    warmup: ClassVar[float] = 0.0  # type: ignore[misc]
    weight_decay: ClassVar[float] = 0.0  # type: ignore[misc]
    learning_rates: ClassVar[tuple[float, ...]] = (1.0,)  # type: ignore[misc]
    """Least squares has none."""

    systems: tuple[str, ...] = (
        *("softmax/tanh/one", "sigmoid/tanh/one", "sigmoid/offset/one"),
        *("softmax/linear/one", "sigmoid/linear/one"),
    )
    """Gate and expert, and after further slashes: partial (scores without b), one (one true atom,
    not two), constant (true scores are constants), and whose data it is fitted to, softmax, sigmoid
    or wave, where it is not its own gate's. Experts are linear, polynomial, tanh and offset
    (3 + tanh, which cannot vanish)."""
    dim: Literal[1, 2] = 2
    """Of x, which is uniform in [-1, 1]^dim."""
    extra: int = 1
    """Atoms fitted beyond the true ones (of a wave, beyond two, or one)."""
    box: float = 1.5
    """Every number of a fitted atom lies between -box and box."""
    noise: float = 0.1
    """Standard deviation of the noise."""
    samples: int = 1000
    """Of the smallest fit."""
    multiples: tuple[int, ...] = (1, 4, 16)
    """Sample sizes as multiples of the smallest."""
    starts: int = 9
    """Of each fit: a third near the truth, a third near minimisers of the population's loss, the
    rest anywhere in the box; the least loss counts."""
    searched: int = 64
    """Starts of the search for the minimisers of the population's loss."""
    seeds: tuple[int, ...] = tuple(range(8))
    """Replicates: each draws its own samples, the same for every system."""
    threads: int = 1
    """Threads of each run. Part of the work: sums depend on it in the last bit."""

    def __post_init__(self):
        self.check("extra", "samples", "starts", "searched")
        if self.dim not in TRUTH_SCORES:
            raise ValueError(f"dim is 1 or 2, got {self.dim}")
        if self.multiples[:1] != (1,) or list(self.multiples) != sorted(set(self.multiples)):
            raise ValueError(f"multiples must rise and begin with 1, got {self.multiples}")
        largest = max(
            abs(x) for rows in (TRUTH_SCORES, TRUTH_EXPERTS) for r in rows[self.dim] for x in r
        )
        if not self.box >= largest:
            raise ValueError(f"the box must hold the truth, box >= {largest:g}, got {self.box:g}")
        if not self.noise > 0:
            raise ValueError(f"noise must be above 0, got {self.noise:g}")

    def settings(self) -> dict:
        return {name: value for name, value in super().settings().items() if name != "data"}

    @property
    def context(self) -> int:  # type: ignore[override]
        """The smallest sample size, where other tasks have the training length."""
        return self.samples

    @property
    def lengths(self) -> tuple[int, ...]:  # type: ignore[override]
        """Sample sizes."""
        return tuple(self.samples * m for m in self.multiples)

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Of a run: the samples that it fits, in thousands or so."""
        return sum(self.multiples)

    def arm(self, name: str) -> RatesArm:
        """Read `gate/expert/trait/trait`.

        >>> RatesWork().arm("sigmoid/tanh/softmax").title
        "sigmoid · tanh, on softmax's data"
        """
        gate, _, rest = name.partition("/")
        expert, *traits = rest.split("/")
        if gate not in GATES or expert not in EXPERTS:
            raise ValueError(
                f"{name}: a system is a gate ({', '.join(GATES)}), a slash and an expert "
                f"({', '.join(EXPERTS)})"
            )
        if unknown := [t for t in traits if t not in TRAITS]:
            raise ValueError(
                f"{name}: no trait {', '.join(unknown)}; there are {', '.join(TRAITS)}"
            )
        made = [t for t in traits if t in (*GATES, "wave")]
        if len(made) > 1 or len(set(traits)) < len(traits):
            raise ValueError(f"{name}: data are made by one truth; each trait stands once")
        return RatesArm(
            name=name,
            model=Mixture(gate, expert, self.dim, "partial" in traits),  # type: ignore[arg-type]
            truth_gate=made[0] if made else gate,  # type: ignore[arg-type]
            truth_atoms=1 if "one" in traits else 2,
            constant="constant" in traits,
        )

    def atoms(self, arm: RatesArm) -> int:
        """Fitted ones."""
        return arm.truth_atoms + self.extra


PRESETS = {
    "quick": RatesWork(),
    "full": RatesWork(
        systems=(
            *("softmax/linear", "sigmoid/linear"),
            *("softmax/linear/partial", "sigmoid/linear/partial"),
            *("softmax/polynomial", "sigmoid/polynomial"),
            *("softmax/tanh", "sigmoid/tanh"),
            *("softmax/offset", "sigmoid/offset"),
            *("softmax/offset/one", "sigmoid/offset/one"),
            "sigmoid/offset/constant",
            *("softmax/tanh/sigmoid", "sigmoid/tanh/softmax"),
            *("softmax/linear/sigmoid", "sigmoid/linear/softmax"),
            *("softmax/tanh/wave", "sigmoid/tanh/wave"),
        ),
        multiples=(1, 4, 16, 64),
        searched=256,
        seeds=tuple(range(24)),
    ),
}
"""quick: a couple of minutes on two cores. full: half an hour or so."""
