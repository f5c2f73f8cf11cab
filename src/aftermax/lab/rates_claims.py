"""What the papers say of the rates, held against the slopes that were measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from aftermax.lab.rates_stats import Slope, predicted, slope, slope_difference
from aftermax.lab.results import Results

MEASURES = {
    "function": "function to the truth",
    "function_best": "function to the best fit",
    "experts_truth": "experts to the truth",
    "experts_found": "true experts found",
    "voronoi": "Voronoi loss",
    "experts_minimisers": "experts to the minimisers",
    "atoms_minimisers": "atoms to the minimisers",
}
"""Errors that have a rate, in words."""


@dataclass(frozen=True)
class Claim:
    """An exponent that is claimed of a system, or an order of two."""

    said: str
    measure: str
    systems: tuple[str, ...]
    """One for an exponent, two for an order: the first falls faster."""
    exponent: Literal["1/2", "1/4", ""] = ""


CLAIMS = (
    *(
        Claim(f"{gate}, {expert}: the function at n^-1/2", "function_best",
              (f"{gate}/{expert}",), "1/2")
        for expert in ("tanh", "linear")
        for gate in ("softmax", "sigmoid")
    ),
    Claim("softmax, tanh: split experts at n^-1/4", "experts_truth", ("softmax/tanh",), "1/4"),
    *(
        Claim(f"softmax: slower with {expert} experts than with tanh", "experts_truth",
              ("softmax/tanh", f"softmax/{expert}"))
        for expert in ("linear", "polynomial")
    ),
    Claim("softmax, linear: quicker where scores have no b", "experts_truth",
          ("softmax/linear/partial", "softmax/linear")),
    Claim("sigmoid, one true atom, 3 + tanh: to the minimiser at n^-1/2", "experts_minimisers",
          ("sigmoid/offset/one",), "1/2"),
    Claim("sigmoid, 3 + tanh: to the minimisers at n^-1/2", "experts_minimisers",
          ("sigmoid/offset",), "1/2"),
    Claim("sigmoid, tanh: to the minimisers at n^-1/2", "experts_minimisers",
          ("sigmoid/tanh",), "1/2"),
    Claim("sigmoid, linear: to the minimisers at n^-1/2", "experts_minimisers",
          ("sigmoid/linear",), "1/2"),
    Claim("sigmoid, constant true scores: to the truth at n^-1/4", "experts_truth",
          ("sigmoid/offset/constant",), "1/4"),
    *(
        Claim(f"sigmoid before softmax, {expert}", "experts_minimisers",
              (f"sigmoid/{expert}", f"softmax/{expert}"))
        for expert in ("linear", "polynomial", "tanh", "offset", "offset/one")
    ),
    *(
        Claim(f"sigmoid before softmax, {expert}, to the truth", "experts_truth",
              (f"sigmoid/{expert}", f"softmax/{expert}"))
        for expert in ("linear", "polynomial", "tanh", "offset", "offset/one")
    ),
)  # fmt: skip
"""Of 2502.00281 and 2405.13997. The last group is what a reader may take them to say."""


class Held(NamedTuple):
    claim: Claim
    expected: str
    measured: Slope
    verdict: str


def held(results: Results) -> list[Held]:
    """Every claim that the work has the systems and the replicates for."""
    root = predicted(results.work.lengths) if len(results.work.lengths) > 1 else 0.0
    out = []
    for claim in CLAIMS:
        if claim.exponent:
            measured = slope(results, claim.systems[0], claim.measure)
            wanted = {"1/2": root, "1/4": root / 2}[claim.exponent]
            expected = f"{wanted:+.2f}"
            verdict = "" if measured is None else _of_exponent(measured, wanted)
        else:
            first, second = claim.systems
            measured = slope_difference(results, first, second, claim.measure)
            expected = "below 0"
            verdict = "" if measured is None else _of_order(measured)
        if measured is not None:
            out.append(Held(claim, expected, measured, verdict))
    return out


def _of_exponent(measured: Slope, wanted: float) -> str:
    if measured.holds(wanted):
        width = measured.high - measured.low
        return "in the band" if width < 0.3 else "in the band, a wide one"
    return "faster" if measured.high < wanted else "slower"


def _of_order(measured: Slope) -> str:
    if measured.holds(0.0):
        return "not told apart"
    return "so" if measured.value < 0 else "the other way round"


def sentences(results: Results) -> list[str]:
    """Each claim and what came of it."""
    return [
        f"{one.claim.said} ({MEASURES[one.claim.measure]}): {one.verdict}, slope"
        f"{'' if one.claim.exponent else ' difference'} {one.measured.text()}"
        f"{f', expected {one.expected}' if one.claim.exponent else ''}."
        for one in held(results)
    ]
