"""Numbers of a finished (or half-finished) work, by system, measure, length and seed."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aftermax.lab.imports import read_export
from aftermax.lab.store import Store
from aftermax.lab.tasks import work_of
from aftermax.lab.verdicts import VERDICTS, paired


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds (0 with one seed)."""

    mean: float
    sd: float
    count: int

    def times(self, factor: float) -> Spread:
        return Spread(factor * self.mean, factor * self.sd, self.count)

    def text(self, digits: int = 2) -> str:
        if self.count < 2:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.sd:.{digits}f}"


@dataclass(frozen=True)
class Results:
    work: Any
    """Of whichever task."""
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
    def arms(self) -> list[Any]:
        """The systems that have a measured run, in the order of the work."""
        work = self.work
        return [work.arm(s) for s in work.systems if self.at(s, work.headline, 1)]

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
        return paired(self.seeds_of(a, measure, length), self.seeds_of(b, measure, length))

    def verdicts(self) -> list[str]:
        """Sentences that the seeds bear out; none below three seeds."""
        return VERDICTS[self.work.task](self) if self.arms else []


def spread(by_seed: dict[int, float]) -> Spread | None:
    values = list(by_seed.values())
    if not values:
        return None
    return Spread(
        statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values)
    )
