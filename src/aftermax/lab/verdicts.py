"""Sentences that the seeds bear out; with fewer than three seeds nothing is said in words."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from aftermax.lab.data.pictures import DENSE
from aftermax.lab.work import Arm

if TYPE_CHECKING:
    from aftermax.lab.results import Results

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5% for 1 to 10 degrees of freedom, the half-width of a 95% interval."""


def paired(left: dict[int, float], right: dict[int, float]) -> tuple[float, float] | None:
    """Mean of left - right over common seeds and the half-width of its 95% interval."""
    pairs = [left[seed] - right[seed] for seed in sorted(set(left) & set(right))]
    if not 3 <= len(pairs) <= len(T_975) + 1:
        return None
    half = T_975[len(pairs) - 2] * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return statistics.mean(pairs), half


def of_text(results: Results) -> list[str]:
    """About the longest length.

    A system is compared with log-n softmax under the same position encoding, since encodings
    decide much by themselves.
    """
    sentences, longest = [], results.work.multiples[-1]
    for entry in results.arms:
        sentences += _context_used(results, entry, longest)
    for entry in results.arms:
        baseline = next(
            (e for e in results.arms if (e.entry.name, e.positions) == ("log-n", entry.positions)),
            None,
        )
        if baseline is None or baseline.name == entry.name:
            continue
        told = results.difference("loss", entry.name, baseline.name, longest)
        if told is not None:
            share = _share_of_cache(results, entry.name, baseline.name, longest)
            sentences.append(
                f"{entry.title} at {longest}x: {_compared(told)} {baseline.title}{share}."
            )
    return sentences


def _share_of_cache(results: Results, a: str, b: str, multiple: int) -> str:
    """How much a holds of what b does, where it is not the same; "" where it was not measured."""
    held, whole = (results.at(system, "cache_bytes", multiple) for system in (a, b))
    if held is None or whole is None or held.mean == whole.mean:
        return ""
    share = 100 * held.mean / whole.mean
    told = f"{share:.2g}" if share < 100 else f"{share:,.0f}"
    return f", with {told}% of the bytes that its state holds"


def _context_used(results: Results, entry: Arm, longest: int) -> list[str]:
    length = longest * results.work.context
    told = paired(
        results.seeds_of(entry.name, "loss", length),
        results.seeds_of(entry.name, "truncated_loss", length),
    )
    if told is None:
        return []
    mean, half = told
    numbers = f"({mean:+.3f} ± {half:.3f} nats)"
    alone = f"the last {results.work.context} tokens alone {numbers}"
    if abs(mean) <= half:
        return [f"{entry.title}: {longest}x the context is not told apart from {alone}."]
    word = "gains" if mean < 0 else "loses"
    return [f"{entry.title} {word} by {longest}x the context, against {alone}."]


def of_vision(results: Results) -> list[str]:
    """About the test split: each system against softmax, or the first where that is not there."""
    sentences, arms = [], results.arms
    baseline = next((entry for entry in arms if entry.name == "softmax"), arms[0])
    for entry in arms:
        loss, accuracy = (
            results.difference(measure, entry.name, baseline.name, 1)
            for measure in ("loss", "accuracy")
        )
        if entry.name == baseline.name or loss is None or accuracy is None:
            continue
        mean, half = accuracy
        word = "higher" if mean > 0 else "lower"
        word = "not told apart" if abs(mean) <= half else word
        sentences.append(
            f"{entry.title}: {_compared(loss)} {baseline.title}; "
            f"accuracy {word} ({100 * mean:+.1f} ± {100 * half:.1f} points)."
        )
    return sentences


POINT = 0.01
"""Behind by less than this is as good."""


def of_experts(results: Results) -> list[str]:
    """Experts against each dense tower, several questions against one, systems against the first:
    by what a question is judged by, in points."""
    arms = {entry.name: entry for entry in results.arms}
    first = next((e for e in results.arms if e.feed == "experts" and not e.alone), None)
    if first is None:
        return []
    sentences = []
    for entry in arms.values():
        if entry.name == first.name:
            continue
        for question in entry.questions:
            measure = f"{question}_{'iou' if question in DENSE else 'accuracy'}"
            told = results.difference(measure, first.name, entry.name, 1)
            cost, theirs = (results.at(e.name, f"{question}_flops", 1) for e in (first, entry))
            if told is None or cost is None or theirs is None:
                continue
            mean, half = told
            numbers = f"{100 * mean:+.1f} ± {100 * half:.1f} points"
            if mean - half > -POINT:
                word = "reach" if mean - half <= 0 else "pass"
            elif mean + half < -POINT:
                word = "stay more than a point behind"
            else:
                word = "may be within a point of"
            sentences.append(
                f"{question}: {first.title} {word} {entry.title} ({numbers}), at "
                f"{cost.mean / theirs.mean:.2f} of its active FLOPs."
            )
    return sentences


def _compared(told: tuple[float, float]) -> str:
    mean, half = told
    numbers = f"({mean:+.3f} ± {half:.3f} nats)"
    if abs(mean) <= half:
        return f"not told apart {numbers} from"
    return f"{'lower' if mean < 0 else 'higher'} loss {numbers} than"


def of_words(results: Results) -> list[str]:
    """Each output layer against the first, at one guess and at many."""
    arms, sentences = results.arms, []
    for entry in arms[1:]:
        told = [
            (k, results.difference(f"top{k}_error", entry.name, arms[0].name, 1)) for k in (1, 50)
        ]
        parts = [
            f"{_points(*difference, 'more', 'fewer')} at {k} guess{'es' if k > 1 else ''}"
            for k, difference in told
            if difference is not None
        ]
        if parts:
            sentences.append(
                f"{entry.title}, against {arms[0].title}, misses words: {', '.join(parts)}."
            )
    return sentences


def of_labels(results: Results) -> list[str]:
    """Each dual encoder against InfoNCE, each one-vs-all layer against softmax."""
    sentences, arms = [], results.arms
    for base in ("softmax", "dual/infonce"):
        dual = base.startswith("dual/")
        group = [entry for entry in arms if entry.name.startswith("dual/") == dual]
        first = next((entry for entry in group if entry.name == base), None)
        if first is None:
            continue
        for entry in group:
            told = [
                (measure, results.difference(measure, entry.name, base, 1))
                for measure in ("P@1", "PSP@5", "R@100")
            ]
            parts = [
                f"{measure} {_points(*difference, 'higher', 'lower')}"
                for measure, difference in told
                if difference is not None
            ]
            if entry.name != base and parts:
                sentences.append(f"{entry.title}, against {first.title}: {', '.join(parts)}.")
    return sentences


def _points(mean: float, half: float, more: str, less: str) -> str:
    numbers = f"({100 * mean:+.1f} ± {100 * half:.1f} points)"
    if abs(mean) <= half:
        return f"not told apart {numbers}"
    return f"{more if mean > 0 else less} {numbers}"


def of_outliers(results: Results) -> list[str]:
    """Each system against softmax in the same model: outliers as ratios, losses as differences.

    Nothing is said where zero outliers or one seed leave no ratio.
    """
    sentences = []
    for entry in results.arms:
        base = f"{entry.model}/softmax"
        first = next((arm for arm in results.arms if arm.name == base), None)
        if first is None or entry.name == base:
            continue
        parts = []
        for measure, called in (("inf_norm", "inf norm"), ("kurtosis", "kurtosis")):
            told = _ratio(results, measure, entry.name, base)
            if told is not None:
                parts.append(f"{called} {told}")
        longest = results.work.multiples[-1]
        for measure, multiple, called in (
            ("loss", 1, "loss"),
            ("loss", longest, f"loss at {longest}x"),
            ("w8a8_damage", 1, "what W8A8 adds"),
            ("w4a4_damage", 1, "what W4A4 adds"),
        ):
            told = results.difference(measure, entry.name, base, multiple)
            if told is not None:
                parts.append(f"{called} {_nats(*told)}")
        if parts:
            sentences.append(f"{entry.title}, against {first.title}: {'; '.join(parts)}.")
    return sentences


def of_hashhop(results: Results) -> list[str]:
    """Each system against softmax, or the first where that is not there: at the training length
    and at the longest, for each number of hops."""
    sentences, arms = [], results.arms
    base = next((entry for entry in arms if entry.name == "softmax"), arms[0])
    ends = dict.fromkeys((1, results.work.multiples[-1]))
    for entry in arms:
        told = [
            (hops, m, results.difference(f"hops{hops}", entry.name, base.name, m))
            for hops in results.work.hops
            for m in ends
        ]
        parts = [
            f"{hops} hop{'s' if hops > 1 else ''} at {m}x {_points(*difference, 'more', 'fewer')}"
            for hops, m, difference in told
            if difference is not None
        ]
        if entry.name != base.name and parts:
            sentences.append(
                f"{entry.title}, against {base.title}, follows chains: {', '.join(parts)}."
            )
    return sentences


def of_rates(results: Results) -> list[str]:
    """What the papers say of the rates, and what was measured."""
    from aftermax.lab.rates_claims import sentences  # it reads `Results`, which reads this

    return sentences(results)


def _ratio(results: Results, measure: str, a: str, b: str) -> str | None:
    """Geometric mean of a / b over the seeds that both have, with its 95% interval."""
    logs = [
        {seed: math.log(value) for seed, value in by.items() if value > 0}
        for by in (results.seeds_of(s, measure, results.work.context) for s in (a, b))
    ]
    told = paired(*logs)
    if told is None:
        return None
    mean, half = told
    numbers = f"x{math.exp(mean):.2f} ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})"
    if abs(mean) <= half:
        return f"not told apart {numbers}"
    return f"{'higher' if mean > 0 else 'lower'} {numbers}"


def _nats(mean: float, half: float) -> str:
    numbers = f"({mean:+.4f} ± {half:.4f} nats)"
    if abs(mean) <= half:
        return f"not told apart {numbers}"
    return f"{'higher' if mean > 0 else 'lower'} {numbers}"


VERDICTS = {
    "text": of_text,
    "vision": of_vision,
    "labels": of_labels,
    "words": of_words,
    "outliers": of_outliers,
    "hashhop": of_hashhop,
    "experts": of_experts,
    "rates": of_rates,
}
