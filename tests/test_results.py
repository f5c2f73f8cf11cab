"""What is said of the numbers: means, intervals, and sentences that three seeds bear out."""

import math
import statistics

import pytest

from aftermax.lab.results import Results, Spread, spread
from aftermax.lab.work import Work

SYSTEMS = ("softmax", "log-n", "cosine", "lssar")


def results_of(values: dict, seeds: int = 3, **changes) -> Results:
    """`values`: (system, measure, multiple) -> one number for each seed."""
    work = Work(systems=SYSTEMS, context=64, multiples=(1, 4), seeds=tuple(range(seeds)))
    by_seed = {
        (system, measure, 64 * multiple): dict(enumerate(numbers))
        for (system, measure, multiple), numbers in values.items()
    }
    fields = {"machine": {}, "data": {}, "curves": {}, "rates": {}, "tuning": {}} | changes
    return Results(work=work, preset="quick", values=by_seed, **fields)


def test_a_spread_is_mean_and_sample_deviation():
    assert spread({0: 1.0, 1: 2.0, 2: 4.0}) == Spread(7 / 3, statistics.stdev([1, 2, 4]), 3)
    assert spread({5: 2.5}) == Spread(2.5, 0.0, 1)
    assert spread({}) is None


def test_a_spread_shows_its_deviation_only_where_there_is_one():
    assert Spread(1.2345, 0.0, 1).text() == "1.23"
    assert Spread(1.2345, 0.05, 3).text(3) == "1.234 ± 0.050"


def test_the_difference_is_paired_by_seed():
    """By hand: differences 1, 2, 3; mean 2, deviation 1, t(2) 4.303, half-width 4.303 / sqrt 3."""
    found = results_of({("lssar", "loss", 4): [11, 22, 33], ("cosine", "loss", 4): [10, 20, 30]})
    mean, half = found.difference("loss", "lssar", "cosine", 4)
    assert mean == 2
    assert half == pytest.approx(4.303 / math.sqrt(3), abs=1e-9)


def test_a_difference_takes_only_the_seeds_that_both_have():
    found = results_of({("lssar", "loss", 4): [1, 2, 3, 9], ("cosine", "loss", 4): [1, 1, 1]}, 4)
    assert found.difference("loss", "lssar", "cosine", 4)[0] == 1


@pytest.mark.parametrize(("count", "t"), [(3, 4.303), (5, 2.776), (10, 2.262), (11, 2.228)])
def test_half_widths_follow_students_table(count, t):
    """With deviation 1 the half-width is t / sqrt(n), t from the table at n - 1 degrees."""
    numbers = list(range(count))
    scale = statistics.stdev(numbers)
    found = results_of(
        {
            ("lssar", "loss", 4): [n / scale for n in numbers],
            ("cosine", "loss", 4): [0.0] * count,
        },
        count,
    )
    _, half = found.difference("loss", "lssar", "cosine", 4)
    assert half == pytest.approx(t / math.sqrt(count), rel=1e-6)


def verdicts(lssar: list, seeds: int = 3, more: dict | None = None) -> list[str]:
    steady = [2.0, 2.1, 1.9][:seeds]
    values = {(system, "loss", m): steady for system in SYSTEMS for m in (1, 4)}
    values["lssar", "loss", 4] = lssar
    return results_of(values | (more or {}), seeds).verdicts()


def sentence_about(title: str, sentences: list[str]) -> str:
    (found,) = [s for s in sentences if s.startswith(title)]
    return found


def test_nothing_is_said_below_three_seeds():
    truncated = {(s, "truncated_loss", m): [2.0, 2.0] for s in SYSTEMS for m in (1, 4)}
    values = {(s, "loss", m): [1.0, 1.1] for s in SYSTEMS for m in (1, 4)}
    assert results_of(values | truncated, seeds=2).verdicts() == []


def test_a_lower_loss():
    said = sentence_about("LSSAR", verdicts([1.0, 1.1, 0.9]))
    assert said.startswith("LSSAR")
    assert "at 4x: lower loss (-1.000 ± 0.000 nats) than" in said
    assert said.endswith("than log-n softmax (SSMax).")


def test_a_higher_loss():
    said = sentence_about("LSSAR", verdicts([3.0, 3.1, 2.9]))
    assert "higher loss (+1.000 ± 0.000 nats) than" in said


@pytest.mark.parametrize(
    ("held", "share"), [(100.0, "0.98%"), (20480.0, "200%"), (102400.0, "1,000%")]
)
def test_what_a_state_holds_is_said_beside_the_loss_where_it_is_another(held, share):
    bytes_held = {(s, "cache_bytes", 4): [10240.0] * 3 for s in SYSTEMS}
    bytes_held["lssar", "cache_bytes", 4] = [held] * 3
    said = verdicts([1.0, 1.1, 0.9], more=bytes_held)
    told = f"than log-n softmax (SSMax), with {share} of the bytes that its state holds."
    assert sentence_about("LSSAR", said).endswith(told)
    assert "bytes" not in sentence_about("cosine", said)


def test_a_difference_within_its_interval_is_not_told_apart():
    said = sentence_about("LSSAR", verdicts([2.3, 1.8, 2.0]))
    assert "not told apart (" in said
    assert ") from" in said


def test_the_baseline_is_not_compared_with_itself():
    said = verdicts([1.0, 1.1, 0.9])
    assert len(said) == len(SYSTEMS) - 1


@pytest.mark.parametrize(
    ("whole", "word"),
    [
        ([1.0, 1.1, 0.9], "gains by 4x the context"),
        ([3.0, 3.1, 2.9], "loses by 4x the context"),
        ([2.3, 1.8, 2.0], "4x the context is not told apart from"),
    ],
)
def test_what_more_context_brings_is_said_against_the_last_tokens_alone(whole, word):
    found = results_of(
        {
            ("lssar", "loss", 1): [2.0, 2.0, 2.0],
            ("lssar", "loss", 4): whole,
            ("lssar", "truncated_loss", 4): [2.0, 2.1, 1.9],
        }
    )
    (said,) = found.verdicts()
    assert word in said
    assert "the last 64 tokens alone" in said


def test_systems_without_a_measured_run_are_left_out():
    found = results_of({("lssar", "loss", 1): [2.0], ("softmax", "train_loss", 1): [2.0]})
    assert [arm.name for arm in found.arms] == ["lssar"]
    assert found.at("softmax", "loss", 1) is None


def test_values_that_are_no_numbers_have_no_part_in_a_mean():
    """A run whose loss overflowed at some length still has its other numbers."""
    about = {
        "preset": "quick",
        "machine": {},
        "data": {},
        "settings": results_of({}).work.settings(),
    }
    record = {"kind": "train", "system": "lssar", "learning_rate": 1e-3, "step": 9}
    values = [(0, 64, 2.0), (1, 64, 3.0), (0, 256, float("nan")), (1, 256, float("inf"))]
    found = Results._of(
        about,
        [
            record | {"seed": seed, "length": length, "measure": "loss", "value": value}
            for seed, length, value in values
        ],
    )
    assert found.at("lssar", "loss", 1).mean == 2.5
    assert found.at("lssar", "loss", 4) is None
