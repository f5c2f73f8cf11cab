"""The task of rates: its systems, samples and runs, the slopes, and the report."""

import dataclasses
import html
import math
import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aftermax.lab import plots, rates_claims
from aftermax.lab import rates as task
from aftermax.lab.imports import import_into
from aftermax.lab.rates_claims import CLAIMS, held
from aftermax.lab.rates_losses import Population, quadrature
from aftermax.lab.rates_page import CAPTIONS
from aftermax.lab.rates_stats import predicted, slope, slope_difference
from aftermax.lab.rates_work import PRESETS, RatesWork, wave
from aftermax.lab.report import settings, tables, terminal_table, write_report
from aftermax.lab.results import Results
from aftermax.lab.store import Store
from aftermax.lab.tasks import work_of
from aftermax.lab.work import Run

from .lab_work import latest_results, open_store
from .test_report import Links, assert_drawn, without

TINY = RatesWork(
    systems=("sigmoid/tanh/one",),
    **{"dim": 1, "samples": 50, "multiples": (1, 4), "starts": 3, "searched": 4},
    seeds=(0, 1),
)


# the work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multiples": (2, 4)}, "multiples must rise and begin with 1"),
        ({"dim": 3}, "dim is 1 or 2, got 3"),
        ({"box": 1.0}, "the box must hold the truth, box >= 1.2, got 1"),
        ({"noise": 0.0}, "noise must be above 0, got 0"),
        ({"extra": 0}, "extra must be at least 1, got 0"),
        ({"systems": ("softmax",)}, "softmax: a system is a gate"),
        ({"systems": ("relu/tanh",)}, "relu/tanh: a system is a gate"),
        ({"systems": ("softmax/tanh/two",)}, "softmax/tanh/two: no trait two; there are partial"),
        ({"systems": ("softmax/tanh/wave/sigmoid",)}, "data are made by one truth"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("name", PRESETS)
def test_settings_are_read_back(name):
    assert work_of(PRESETS[name].settings()) == PRESETS[name]


def test_a_name_says_what_is_fitted_and_whose_data_it_is():
    arm = RatesWork().arm("softmax/linear/partial/sigmoid")
    assert (arm.gate, arm.model.expert, arm.model.partial) == ("softmax", "linear", True)
    assert not arm.own
    assert arm.title == "softmax · linear, no b, on sigmoid's data"
    x = quadrature(2)[0]
    truth = dataclasses.replace(arm.model, gate="sigmoid")
    assert_close(arm.true_values(x), truth(arm.true_atoms, x))
    assert_close(RatesWork().arm("sigmoid/tanh/wave").true_values(x), wave(x))


@pytest.mark.parametrize("dim", [1, 2])
def test_constant_true_scores_have_no_x_and_their_atoms_are_as_many_as_is_said(dim):
    work = dataclasses.replace(TINY, dim=dim, extra=2)
    arm = work.arm("sigmoid/offset/constant")
    assert arm.true_atoms.shape == (2, arm.model.size)
    assert (arm.true_atoms[:, : arm.model.scores - 1] == 0).all()
    assert (arm.true_atoms[:, arm.model.scores - 1 :] != 0).all()
    assert (work.atoms(arm), work.atoms(work.arm("sigmoid/offset/one"))) == (4, 3)


def test_two_gates_on_the_same_truth_have_the_same_data_and_other_names():
    work = PRESETS["full"]
    own, other = work.arm("sigmoid/tanh"), work.arm("softmax/tanh/sigmoid")
    x = quadrature(2)[0]
    assert_close(own.true_values(x), other.true_values(x), rtol=0, atol=0)
    assert own.setting == other.setting
    assert own.identity != other.identity


# samples and starts


def test_samples_are_of_the_seed_and_the_size_alone():
    first, again = task.samples(TINY, 1, 50), task.samples(TINY, 1, 50)
    assert_close(first.x, again.x, rtol=0, atol=0)
    assert first.x.abs().max() <= 1
    assert not torch.equal(first.x, task.samples(TINY, 2, 50).x)
    assert not torch.equal(first.x, task.samples(TINY, 1, 200).x[:50])
    many = task.samples(TINY, 0, 50_000)
    assert float(many.noise.std()) == pytest.approx(1, abs=0.02)
    assert float(many.x.var()) == pytest.approx(1 / 3, abs=0.01)


def test_starts_are_near_the_truth_near_minimisers_and_anywhere():
    work = RatesWork()
    arm = work.arm("sigmoid/tanh")
    pool = torch.zeros(4, 3, arm.model.size, dtype=torch.float64)
    made = task.starts(work, arm, torch.Generator().manual_seed(0), 300, pool)
    assert made.abs().max() <= work.box
    assert made.abs().max(-1).values.max(-1).values[200:].min() > 1  # anywhere: far out too
    centre = made[:100, :2].mean(0)
    assert_close(centre, arm.true_atoms, rtol=0, atol=0.15)
    extra = made[:100, 2]  # a copy of one of the two
    gaps = torch.cdist(extra, arm.true_atoms).min(-1).values
    assert gaps.mean() < 1.2 * task.JITTER * math.sqrt(arm.model.size)
    assert_close(made[100:200].std(), torch.tensor(task.JITTER).double(), rtol=0.05, atol=0)
    free = task.starts(work, work.arm("sigmoid/tanh/wave"), torch.Generator().manual_seed(0), 9)
    assert free.abs().mean() == pytest.approx(work.box / 2, rel=0.15)


# a run


def run_of(drawn, seed=0, work=TINY) -> Run:
    return Run(work, work.systems[0], seed, 1.0, "train", drawn.digest)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return task.prepare(TINY, tmp_path_factory.mktemp("rates"))


def test_a_run_stopped_between_sizes_comes_to_the_same_rows(drawn, tmp_path):
    run = run_of(drawn)
    with open_store(tmp_path / "quiet", run) as store:
        assert task.perform(run, drawn, store, tmp_path / "quiet" / "runs")
        expected = store.rows(run.id)
        assert store.status(run.id) == "done"
        assert task.perform(run, drawn, store, tmp_path / "quiet" / "runs", lambda: False)
    fresh = task.prepare(TINY, tmp_path / "data")  # without the minimisers either
    asked = iter([True, False])
    with open_store(tmp_path / "stopped", run) as store:
        folder = tmp_path / "stopped" / "runs"
        assert not task.perform(run, fresh, store, folder, lambda: next(asked))
        assert store.rows(run.id) == []
        assert store.status(run.id) == "running"
        assert task.perform(run, fresh, store, folder)
        assert store.rows(run.id) == expected


def test_every_measure_stands_at_every_size_and_is_finite(drawn, tmp_path):
    run = run_of(drawn)
    with open_store(tmp_path, run) as store:
        task.perform(run, drawn, store, tmp_path / "runs")
        rows = store.rows(run.id)
    assert all(math.isfinite(row.value) for row in rows)
    names = {row.measure for row in rows}
    assert {(r.measure, r.length) for r in rows} == {(m, n) for m in names for n in TINY.lengths}
    assert {"function", "voronoi", "experts_truth", "experts_minimisers"} <= names


def test_no_distance_to_a_truth_of_another_kind(drawn, tmp_path):
    work = dataclasses.replace(TINY, systems=("sigmoid/tanh/one/softmax",))
    run = run_of(drawn, work=work)
    with open_store(tmp_path, run) as store:
        task.perform(run, drawn, store, tmp_path / "runs")
        names = {row.measure for row in store.rows(run.id)}
    assert "experts_minimisers" in names
    assert not names & {"experts_truth", "experts_found", "voronoi"}


def test_a_fit_is_the_best_of_its_starts_and_better_than_the_truth(drawn, monkeypatch):
    """With an atom more, whose share can be small: so the noise is fitted too."""
    monkeypatch.setattr(task, "FIRST", 40)  # 200 samples come in three rounds
    arm = TINY.arm(TINY.systems[0])
    x, weight = quadrature(1)
    population = Population(x, weight, arm.true_values(x))
    pool = task.known_minimisers(TINY, arm, population, drawn.folder)
    samples = task.samples(TINY, 0, 200)
    y = arm.true_values(samples.x) + TINY.noise * samples.noise
    one = task.fitted(TINY, arm, pool, 0, 200)
    again = float((arm.model(one.atoms, samples.x) - y).square().mean())
    assert one.loss == pytest.approx(again)
    assert one.loss < float((arm.true_values(samples.x) - y).square().mean())
    assert 0 < one.agree <= 1


def test_minimisers_are_searched_for_once(drawn, monkeypatch):
    arm = TINY.arm(TINY.systems[0])
    x, weight = quadrature(1)
    population = Population(x, weight, arm.true_values(x))
    first = task.known_minimisers(TINY, arm, population, drawn.folder)
    monkeypatch.setattr(task, "search", lambda *_: pytest.fail("searched again"))
    again = task.known_minimisers(TINY, arm, population, drawn.folder)
    assert_close(again.atoms, first.atoms, rtol=0, atol=0)
    assert (again.misfit, again.share) == (first.misfit, first.share)
    assert list(drawn.folder.glob("*.part")) == []


# slopes


def of_values(values, sizes=(100, 400, 1600), systems=("softmax/tanh", "sigmoid/tanh")) -> Results:
    """Results of replicates by system and measure: (replicates, sizes) each."""
    multiples = tuple(n // sizes[0] for n in sizes)
    work = RatesWork(systems=systems, samples=sizes[0], multiples=multiples)
    rows = {
        (system, measure, n): {seed: float(v) for seed, v in enumerate(table[:, i])}
        for (system, measure), table in values.items()
        for i, n in enumerate(sizes)
    }
    return Results(work, "quick", {}, {"name": "x", "digest": "y"}, rows, {}, {}, {})


def power(exponent: float, spread: float = 0.0, seed: int = 0, replicates: int = 9) -> np.ndarray:
    chance = np.random.default_rng(seed)
    table = np.array([100.0, 400, 1600]) ** exponent
    return table * np.exp(spread * chance.standard_normal((replicates, 3)))


def test_the_slope_of_a_power_is_its_exponent():
    exact = of_values({("softmax/tanh", "function"): power(-0.5)})
    assert slope(exact, "softmax/tanh", "function") == pytest.approx((-0.5, -0.5, -0.5))
    noisy = slope(
        of_values({("softmax/tanh", "function"): power(-0.5, 0.3)}), "softmax/tanh", "function"
    )
    assert noisy is not None
    assert noisy.low < noisy.value < noisy.high
    assert noisy.meets(-0.5, -0.5)
    assert 0.02 < noisy.high - noisy.low < 0.4


def test_a_difference_of_slopes_is_of_the_same_replicates():
    shared = power(-0.5, 0.5)
    pair = of_values(
        {("softmax/tanh", "function"): shared, ("sigmoid/tanh", "function"): shared * power(0.2)}
    )
    found = slope_difference(pair, "softmax/tanh", "sigmoid/tanh", "function")
    assert found == pytest.approx((-0.2, -0.2, -0.2))


@pytest.mark.parametrize("replicates", [1, 4])
def test_few_replicates_have_no_slope(replicates):
    few = of_values({("softmax/tanh", "function"): power(-0.5, replicates=replicates)})
    assert slope(few, "softmax/tanh", "function") is None
    assert held(few) == []


def test_what_theory_predicts_over_these_sizes_is_less_than_a_half():
    assert predicted([10**6, 10**9]) == pytest.approx(-0.5, abs=0.05)
    sizes = (1000, 64000)
    by_hand = math.log(
        math.sqrt(math.log(64000) / 64000) / math.sqrt(math.log(1000) / 1000)
    ) / math.log(64)
    assert predicted(sizes) == pytest.approx(by_hand)


def test_claims_are_held_against_the_bands():
    root = predicted((100, 400, 1600))
    values = {
        ("softmax/tanh", "function_best"): power(root, 0.01),
        ("sigmoid/tanh", "function_best"): power(-0.3, 0.01),
        ("softmax/tanh", "experts_truth"): power(-0.9, 0.01),
        ("softmax/tanh", "experts_minimisers"): power(-0.2, 0.01),
        ("sigmoid/tanh", "experts_minimisers"): power(root, 0.01),
        ("sigmoid/tanh", "experts_truth"): power(-0.9, 0.01),
    }
    results = of_values(values)
    verdicts = {(one.claim.said, one.claim.measure): one.verdict for one in held(results)}
    faster = "sigmoid faster than softmax, tanh"
    assert verdicts == {
        ("softmax, tanh: the function at n^-1/2", "function_best"): "as said",
        ("sigmoid, tanh: the function at n^-1/2", "function_best"): "slower",
        ("softmax, tanh: experts at n^-1/4, where they split", "experts_truth"): "faster",
        ("sigmoid, tanh: to the minimisers at n^-1/2", "experts_minimisers"): "as said",
        (faster, "experts_minimisers"): "as said",
        (faster, "experts_truth"): "not told apart",
    }
    (said,) = (
        s for s in rates_claims.sentences(results) if s.startswith("sigmoid, tanh: the function")
    )
    assert said.startswith(
        "sigmoid, tanh: the function at n^-1/2 (function to the best fit): slower"
    )
    assert "expected" in said


def test_every_claim_is_of_a_system_that_full_has_and_a_measure_that_is_told():
    for claim in CLAIMS:
        assert set(claim.systems) <= set(PRESETS["full"].systems), claim.said
        assert claim.measure in rates_claims.MEASURES


# the report


@pytest.fixture(scope="module")
def out(rates_comparison):
    return rates_comparison[0]


@pytest.fixture(scope="module")
def results(out) -> Results:
    return latest_results(out)


def test_compare_says_what_it_did_and_measures_no_cost(rates_comparison, results):
    out, said = rates_comparison
    assert "samples of mixtures of experts, drawn anew in every replicate" in said
    assert "fitting: 10 of 10 runs to do" in said
    assert "cost" not in said
    for system in results.work.systems:
        assert re.search(rf"{system} +[+-]\d\.\d\d ± ", said), system
    assert f"report: {out / 'report.html'}" in said


def test_the_page_has_its_own_question_figures_and_numbers(out, results):
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h1>Which gate learns a mixture of experts faster?</h1>" in page
    figures = re.findall(r"<figure>\s*<svg.*?</svg>\s*<figcaption>(.*?)</figcaption>", page, re.S)
    assert [html.unescape(caption) for caption in figures] == [c for _, c in CAPTIONS.values()]
    assert list(CAPTIONS) == list(plots.FIGURES["rates"])
    for title, (columns, rows) in tables(results).items():
        assert f"<h3>{html.escape(title)}</h3>" in page
        assert all(len(row) == len(columns) for row in rows)
        for cell in [*columns, *(cell.text for row in rows for cell in row)]:
            assert cell in html.unescape(page)
    for value in [*settings(results).values(), *results.verdicts()]:
        assert value in html.unescape(page)
    assert "Student" not in page
    links = Links()
    links.feed(page)
    assert [link for link in links.found if not link.startswith("#")] == []


@pytest.mark.parametrize("name", CAPTIONS)
def test_every_figure_stands_beside_the_page(out, name):
    assert_drawn(out / "figures" / f"{name}.png")


@pytest.mark.parametrize(
    "dropped",
    [
        lambda system, measure, length: length > 60,
        lambda system, measure, length: system == "softmax/tanh/one",
        lambda system, measure, length: measure == "experts_minimisers",
        lambda system, measure, length: measure in ("misfit", "reached"),
    ],
    ids=["the largest size", "a system", "a measure", "what the minimisers are like"],
)
def test_what_is_not_measured_yet_is_a_dash_or_left_out(results, tmp_path, dropped):
    half = without(results, dropped)
    write_report(half, tmp_path / "half.html")
    page = (tmp_path / "half.html").read_text(encoding="utf-8")
    assert "<td>–</td>" in page
    gone = dropped("softmax/tanh/one", "function", 60)
    assert terminal_table(half).row_count == (1 if gone else 2)


def test_an_exported_work_is_imported_whole(out, results, tmp_path):
    with Store(out / "store.sqlite") as store, Store(tmp_path / "new.sqlite") as new:
        work = store.latest_work()
        store.export(work, tmp_path / "rows.parquet")
        taken = import_into(new, tmp_path / "rows.parquet")
        assert (taken.work, taken.incomplete, taken.foreign) == (work, 0, 0)
        assert Results.of_store(new, work) == results
