"""Numbers of a finished (or half-finished) work, by system, measure, length and seed."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aftermax.lab.imports import read_export
from aftermax.lab.store import Store
from aftermax.lab.tasks import work_of
from aftermax.lab.work import Arm, Work, arm

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5% for 1 to 10 degrees of freedom, the half-width of a 95% interval."""


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds (0 with one seed)."""

    mean: float
    sd: float
    count: int

    def text(self, digits: int = 2) -> str:
        if self.count < 2:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.sd:.{digits}f}"


@dataclass(frozen=True)
class Results:
    work: Work
    preset: str
    machine: dict
    data: dict
    values: dict[tuple[str, str, int], dict[int, float]]
    """(system, measure, length) -> seed -> value, of the last step; costs stand under seed -1."""
    curves: dict[str, dict[int, list[tuple[int, float]]]]
    """system -> seed -> (step, training loss)."""
    rates: dict[str, float]
    """system -> learning rate of the runs that count."""
    tuning: dict[str, dict[float, float]]
    """system -> learning rate tried -> its loss."""

    @classmethod
    def of_store(cls, store: Store, work: str) -> Results:
        records = [
            run | dataclasses.asdict(row)
            for run in store.runs(work)
            for row in store.rows(run["id"])
        ]
        return cls._of(store.work(work), records)

    @classmethod
    def of_parquet(cls, path: Path) -> Results:
        """From a file that `aftermax export` wrote."""
        return cls._of(*read_export(path))

    @classmethod
    def _of(cls, about: dict, records: list[dict]) -> Results:
        work = work_of(about["settings"])
        values: dict = defaultdict(dict)
        curves: dict = defaultdict(lambda: defaultdict(list))
        rates, tuning = {}, defaultdict(dict)
        for r in records:
            if r["kind"] == "search":
                if r["measure"] == "tuning_loss":
                    tuning[r["system"]][r["learning_rate"]] = r["value"]
                continue
            if r["kind"] == "train":
                rates[r["system"]] = r["learning_rate"]
            if r["measure"] == "train_loss":
                curves[r["system"]][r["seed"]].append((r["step"], r["value"]))
                continue
            seed = -1 if r["kind"] == "cost" else r["seed"]
            if math.isfinite(r["value"]):
                values[r["system"], r["measure"], r["length"]][seed] = r["value"]
            else:
                values[r["system"], "diverged", r["length"]][seed] = 1.0
        plain = {s: {seed: sorted(c) for seed, c in by.items()} for s, by in curves.items()}
        return cls(
            work, about["preset"], about["machine"], about["data"],
            dict(values), plain, rates, {s: dict(sorted(t.items())) for s, t in tuning.items()},
        )  # fmt: skip

    @property
    def arms(self) -> list[Arm]:
        """The systems that have a measured run, in the order of the work."""
        return [arm(s, self.work) for s in self.work.systems if self.at(s, "loss", 1)]

    @property
    def diverged(self) -> list[tuple[str, int]]:
        """System and seed of the runs that have no part in some mean."""
        found = {(s, seed) for (s, m, _), by in self.values.items() if m == "diverged"
                 for seed in by}  # fmt: skip
        return sorted(found)

    @property
    def seeds(self) -> int:
        return len(self.work.seeds)

    def seeds_of(self, system: str, measure: str, length: int) -> dict[int, float]:
        return self.values.get((system, measure, length), {})

    def at(self, system: str, measure: str, multiple: int) -> Spread | None:
        """Mean and spread at a multiple of the training length; None where nothing was measured."""
        return spread(self.seeds_of(system, measure, multiple * self.work.context))

    def lengths_of(self, measure: str) -> list[int]:
        return sorted({length for (_, m, length) in self.values if m == measure})

    def cost(self, system: str, measure: str) -> float | None:
        found = [v for (s, m, _), by in self.values.items() if (s, m) == (system, measure)
                 for v in by.values()]  # fmt: skip
        return found[0] if found else None

    def difference(self, measure: str, a: str, b: str, multiple: int) -> tuple[float, float] | None:
        """Mean of a - b over the seeds that both have, and the half-width of its 95% interval.

        None with fewer than three seeds: then nothing is said in words.
        """
        length = multiple * self.work.context
        return _paired(self.seeds_of(a, measure, length), self.seeds_of(b, measure, length))

    def verdicts(self) -> list[str]:
        """Sentences that the seeds bear out about the longest length; none below three seeds.

        A system is compared with log-n softmax under the same position encoding, since encodings
        decide much by themselves.
        """
        sentences, longest = [], self.work.multiples[-1]
        for entry in self.arms:
            sentences += self._context_used(entry, longest)
        for entry in self.arms:
            baseline = next(
                (e for e in self.arms if (e.entry.name, e.positions) == ("log-n", entry.positions)),
                None,
            )
            if baseline is None or baseline.name == entry.name:
                continue
            told = self.difference("loss", entry.name, baseline.name, longest)
            if told is not None:
                sentences.append(
                    f"{entry.title} at {longest}x: {_compared(told)} {baseline.title}."
                )
        return sentences

    def _context_used(self, entry: Arm, longest: int) -> list[str]:
        length = longest * self.work.context
        told = _paired(
            self.seeds_of(entry.name, "loss", length),
            self.seeds_of(entry.name, "truncated_loss", length),
        )
        if told is None:
            return []
        mean, half = told
        numbers = f"({mean:+.3f} ± {half:.3f} nats)"
        alone = f"the last {self.work.context} tokens alone {numbers}"
        if abs(mean) <= half:
            return [f"{entry.title}: {longest}x the context is not told apart from {alone}."]
        word = "gains" if mean < 0 else "loses"
        return [f"{entry.title} {word} by {longest}x the context, against {alone}."]


def spread(by_seed: dict[int, float]) -> Spread | None:
    values = list(by_seed.values())
    if not values:
        return None
    return Spread(
        statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values)
    )


def _paired(left: dict[int, float], right: dict[int, float]) -> tuple[float, float] | None:
    """Mean of left - right over common seeds and the half-width of its 95% interval."""
    pairs = [left[seed] - right[seed] for seed in sorted(set(left) & set(right))]
    if not 3 <= len(pairs) <= len(T_975) + 1:
        return None
    half = T_975[len(pairs) - 2] * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return statistics.mean(pairs), half


def _compared(told: tuple[float, float]) -> str:
    mean, half = told
    numbers = f"({mean:+.3f} ± {half:.3f} nats)"
    if abs(mean) <= half:
        return f"not told apart {numbers} from"
    return f"{'lower' if mean < 0 else 'higher'} loss {numbers} than"
