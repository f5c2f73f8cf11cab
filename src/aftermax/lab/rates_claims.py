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


SAID = "What the papers say"
"""Title of the table."""

PAIRS = {
    "linear": "linear",
    "polynomial": "polynomial",
    "tanh": "tanh",
    "offset": "3 + tanh",
    "offset/one": "3 + tanh, one true atom",
}
"""What follows the gate in a system's name, and how a sentence calls it."""


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
    Claim("softmax, tanh: experts at n^-1/4, where they split", "experts_truth",
          ("softmax/tanh",), "1/4"),
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
        Claim(f"sigmoid faster than softmax, {called}", "experts_minimisers",
              (f"sigmoid/{expert}", f"softmax/{expert}"))
        for expert, called in PAIRS.items()
    ),
    *(
        Claim(f"sigmoid faster than softmax, {called}", "experts_truth",
              (f"sigmoid/{expert}", f"softmax/{expert}"))
        for expert, called in PAIRS.items()
    ),
)  # fmt: skip
"""Of 2502.00281 and 2405.13997. The last group is what a reader may take them to say."""


class Held(NamedTuple):
    claim: Claim
    expected: str
    measured: Slope
    verdict: str


def expected(results: Results, exponent: str) -> tuple[float, float]:
    """The slopes that a rate of n^-exponent allows, the steepest first: the bare power, and
    (log n / n)^exponent over these sizes, which is what proofs leave."""
    power = {"1/2": 0.5, "1/4": 0.25}[exponent]
    return -power, 2 * power * predicted(results.work.lengths)


def held(results: Results) -> list[Held]:
    """Every claim that the work has the systems and the replicates for."""
    out = []
    for claim in CLAIMS:
        if claim.exponent:
            measured = slope(results, claim.systems[0], claim.measure)
            if measured is not None:
                wanted = expected(results, claim.exponent)
                told = f"{wanted[0]:+.2f} to {wanted[1]:+.2f}"
                out.append(
                    Held(claim, told, measured, _of_exponent(results, measured, claim.exponent))
                )
        else:
            first, second = claim.systems
            measured = slope_difference(results, first, second, claim.measure)
            if measured is not None:
                out.append(Held(claim, "below 0", measured, _of_order(measured)))
    return out


def _of_exponent(results: Results, measured: Slope, exponent: str) -> str:
    low, high = expected(results, exponent)
    if measured.meets(low, high):
        other = "1/4" if exponent == "1/2" else "1/2"
        also = measured.meets(*expected(results, other))
        return f"as said, or n^-{other}" if also else "as said"
    return "faster" if measured.high < low else "slower"


def _of_order(measured: Slope) -> str:
    if measured.meets(0.0, 0.0):
        return "not told apart"
    return "as said" if measured.value < 0 else "the other way round"


def sentences(results: Results) -> list[str]:
    """Each claim and what came of it."""
    return [
        f"{one.claim.said} ({MEASURES[one.claim.measure]}): {one.verdict}, slope"
        f"{'' if one.claim.exponent else ' difference'} {one.measured.text()}"
        f"{f', expected {one.expected}' if one.claim.exponent else ''}."
        for one in held(results)
    ]
