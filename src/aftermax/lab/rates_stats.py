"""How fast a median falls with the sample size: the slope in log-log, and its bootstrap band."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aftermax.lab.results import Results

DRAWS = 20_000
"""Resamplings of the replicates, whole: all sizes of a replicate stay together."""
BAND = (2.5, 97.5)
"""Percentiles."""
FEWEST = 5
"""Replicates below which no band is drawn."""


class Slope(NamedTuple):
    value: float
    low: float
    high: float

    def meets(self, low: float, high: float) -> bool:
        """Whether the band has something in common with those slopes."""
        return self.low <= high and low <= self.high

    def short(self) -> str:
        """With half the width of the band, for 80 columns."""
        return f"{self.value:+.2f} ± {(self.high - self.low) / 2:.2f}"

    def text(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def predicted(sizes: Sequence[int]) -> float:
    """The slope of sqrt(log n / n) over these sizes: -1/2 is its limit, and far away.

    >>> round(predicted([1000, 4000, 16000, 64000]), 3)
    -0.443
    """
    return float(fitted_slope(sizes, np.array([math.sqrt(math.log(n) / n) for n in sizes])))


def fitted_slope(sizes: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Least squares of log values (..., sizes) on log n."""
    x = np.log(np.asarray(sizes, dtype=float))
    x = x - x.mean()
    return np.log(values) @ x / (x @ x)


def replicates(results: Results, system: str, measure: str) -> np.ndarray | None:
    """(replicates, sizes) of those that have every size, by seed; None where there are none."""
    by_size = [results.seeds_of(system, measure, n) for n in results.work.lengths]
    seeds = sorted(set.intersection(*(set(by) for by in by_size)))
    if not seeds:
        return None
    return np.array([[by[seed] for by in by_size] for seed in seeds])


def medians(results: Results, system: str, measure: str) -> np.ndarray | None:
    found = replicates(results, system, measure)
    return None if found is None else np.median(found, 0)


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the median at each size, (low, high)."""
    low, high = np.percentile(_resampled(values), BAND, axis=0)
    return low, high


def slope(results: Results, system: str, measure: str) -> Slope | None:
    """Of the medians; None where there are too few replicates or sizes."""
    values = replicates(results, system, measure)
    sizes = results.work.lengths
    if values is None or len(values) < FEWEST or len(sizes) < 2 or not (values > 0).all():
        return None
    drawn = fitted_slope(sizes, _resampled(values))
    low, high = np.percentile(drawn, BAND)
    return Slope(float(fitted_slope(sizes, np.median(values, 0))), float(low), float(high))


def slope_difference(results: Results, left: str, right: str, measure: str) -> Slope | None:
    """Slope of left less that of right; replicates are resampled together, since they share their
    samples."""
    pair = [replicates(results, system, measure) for system in (left, right)]
    sizes = results.work.lengths
    if any(v is None or len(v) < FEWEST or not (v > 0).all() for v in pair) or len(sizes) < 2:
        return None
    a, b = (v for v in pair if v is not None)
    if len(a) != len(b):
        return None
    drawn = fitted_slope(sizes, _resampled(a)) - fitted_slope(sizes, _resampled(b))
    whole = fitted_slope(sizes, np.median(a, 0)) - fitted_slope(sizes, np.median(b, 0))
    low, high = np.percentile(drawn, BAND)
    return Slope(float(whole), float(low), float(high))


def _resampled(values: np.ndarray) -> np.ndarray:
    """Medians of `DRAWS` resamplings of the rows, the same rows for the same number of them."""
    generator = np.random.default_rng(0)
    rows = generator.integers(len(values), size=(DRAWS, len(values)))
    return np.median(values[rows], 1)
