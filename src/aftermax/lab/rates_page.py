"""The report of the task of rates: slopes, what the papers say of them, medians at each size."""

from __future__ import annotations

import numpy as np
from rich.table import Table

from aftermax import __version__
from aftermax.lab.page import Cell, Page, Tables
from aftermax.lab.page import terminal_table as begin_terminal_table
from aftermax.lab.rates import FIRST, FIRST_STEPS, JITTER, LATER_STEPS, told
from aftermax.lab.rates_claims import MEASURES, SAID, held
from aftermax.lab.rates_stats import FEWEST, medians, predicted, slope
from aftermax.lab.rates_work import RatesWork
from aftermax.lab.results import Results

CAPTIONS = {
    "rates": (
        "How fast the error falls",
        "Each gate on data that it made itself; a row for each kind of expert. Left, the L2 "
        "distance to the best function of so many atoms; middle, experts to the true ones, "
        "weighted by the share of their gates; right, experts to the nearest minimiser of the "
        "population's loss. Medians over replicates, 95% bootstrap bands, the slope in the legend. "
        "Grey: the slope of √(log n / n) and, dotted, of its square root.",
    ),
    "slopes": (
        "The slopes",
        "Of log median on log n, with 95% bootstrap bands over whole replicates; hollow where the "
        "data are not the gate's own. Grey: n^-1/2 and n^-1/4, each from the bare power to what it "
        "is with its logarithm over these very sizes. Dotted: no fall at all.",
    ),
    "crossed": (
        "The same data for both gates",
        "L2 distance to the truth, by whose data it is: each gate's own, the other's, and a wave "
        "that is neither's. It ends at the thin dotted line, the distance of the best function of "
        "so many atoms (none where the truth is within reach).",
    ),
}


def intro(results: Results) -> str:
    work = results.work
    sizes = f"{work.lengths[0]:,} to {work.lengths[-1]:,}"
    return (
        f"Mixtures of experts with {_more(work)} than the truth has, fitted by least squares to "
        f"{sizes} samples of a regression in {work.dim} dimension{'s' if work.dim > 1 else ''}. "
        f"{results.seeds} replicate{'s' if results.seeds != 1 else ''}, aftermax {__version__}."
    )


def tables(results: Results) -> Tables:
    """Claims, slopes, medians at each size, what the fits and the minimisers are like."""
    shown = {"Slopes": slopes(results)}
    if held(results):
        shown = {SAID: claims(results)} | shown
    for measure in ("function", "function_best", "experts_truth", "experts_minimisers"):
        shown[f"Median: {MEASURES[measure]}"] = by_size(results, measure)
    shown["Fits and minimisers"] = fits(results)
    return shown


def claims(results: Results) -> tuple[list[str], list[list[Cell]]]:
    rows = [
        [Cell(text) for text in (
            one.claim.said, MEASURES[one.claim.measure], one.expected, one.measured.text(),
            one.verdict,
        )]
        for one in held(results)
    ]  # fmt: skip
    return ["said", "measure", "expected", "slope, or difference (95%)", "here"], rows


def slopes(results: Results) -> tuple[list[str], list[list[Cell]]]:
    rows = []
    for arm in results.arms:
        found = [slope(results, arm.name, measure) for measure in MEASURES]
        rows.append([Cell(arm.title), *(Cell("–" if s is None else s.text()) for s in found)])
    return ["system", *MEASURES.values()], rows


def by_size(results: Results, measure: str) -> tuple[list[str], list[list[Cell]]]:
    rows = []
    for arm in results.arms:
        found = medians(results, arm.name, measure)
        cells = ["–"] * len(results.work.lengths) if found is None else map(_short, found)
        rows.append([Cell(arm.title), *map(Cell, cells)])
    return ["system", *(f"n = {n:,}" for n in results.work.lengths)], rows


def fits(results: Results) -> tuple[list[str], list[list[Cell]]]:
    """Of the largest samples, but for the first column."""
    rows, last = [], results.work.multiples[-1]
    for arm in results.arms:
        misfit, hit, converged, reached, below = (
            results.at(arm.name, measure, last)
            for measure in ("misfit", "found_misfit", "converged", "reached", "below")
        )
        gap = "–" if misfit is None else "0" if misfit.mean < 1e-12 else _short(misfit.mean**0.5)
        others = [
            "–" if s is None else f"{100 * s.mean:.0f}%" for s in (hit, converged, reached, below)
        ]
        rows.append([Cell(arm.title), Cell(gap), *map(Cell, others)])
    return [
        "system",
        "best function to the truth (L2)",
        "searches that reach it",
        "fits converged",
        "minimiser reached from the fit",
        "one below the best known",
    ], rows


def _short(value: float) -> str:
    return np.format_float_positional(value, 2, fractional=False, trim="-")


def _more(work: RatesWork) -> str:
    return f"{work.extra} atom{'s' if work.extra > 1 else ''} more"


def settings(results: Results) -> dict[str, str]:
    work, machine = results.work, results.machine
    root = f"{predicted(work.lengths):+.3f}" if len(work.lengths) > 1 else "no slope"
    return {
        "command": f"aftermax compare {results.preset}",
        "samples": f"{told(results.data)}; x uniform in [-1, 1]^{work.dim}, noise of standard "
        f"deviation {work.noise:g}, the same for every system; digest {results.data['digest']}",
        "sizes": ", ".join(f"{n:,}" for n in work.lengths),
        "replicates": str(results.seeds),
        "fits": f"{_more(work)} than the truth has, every number in [{-work.box:g}, {work.box:g}]; "
        f"Levenberg-Marquardt in float64 from {work.starts} starts (a third around the truth and a "
        f"third around minimisers, each with a jitter of {JITTER:g}, the rest anywhere), "
        f"{FIRST_STEPS} steps on at most {FIRST:,} samples, {LATER_STEPS} on each four times as "
        "many, from the better half",
        "minimisers": f"the best of {work.searched} starts on the population's loss, by quadrature",
        "slopes": "of log median on log n; bands by resampling replicates; √(log n / n) has "
        f"{root} over these sizes",
        "machine": f"{machine['processor']}, {machine['cores']} cores ({machine['isa']}), "
        f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}",
    }


def terminal_table(results: Results) -> Table:
    """The three slopes of the figure."""
    names = {"function_best": "function", "experts_truth": "to truth",
             "experts_minimisers": "to minimisers"}  # fmt: skip
    shown = begin_terminal_table("slopes of log median error on log n", list(names.values()))
    for arm in results.arms:
        found = [slope(results, arm.name, measure) for measure in names]
        shown.add_row(arm.name, *("–" if s is None else s.short() for s in found))
    return shown


PAGE = Page(
    question="Which gate learns a mixture of experts faster?",
    intro=intro,
    captions=CAPTIONS,
    tables=tables,
    settings=settings,
    terminal=terminal_table,
    claims="claim",
    verdicts="Slopes of log median error on log n, with 95% bootstrap bands over replicates; a "
    "difference is of two systems on the same samples.",
    cells="Medians over replicates; a band in brackets is 95% of the bootstrap.",
    fewest=FEWEST,
)
