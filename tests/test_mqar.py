"""The recall study: its problems, its mixers, its record, and what it says of its numbers."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from aftermax import Linear, NormalisedAttention, Visible
from aftermax.lab import mqar
from aftermax.lab.mqar import ARMS, Job, Outcome, Record, Setting, Study

SMALL = Setting(
    length=16, pairs=4, vocabulary=32, width=16, key_dims=(4, 8), batch=8, steps=3, search_at=4,
    rates=(1e-3, 1e-2), seeds=(0, 1, 2), arms=("softmax", "linear"),
)  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- problems ------------------------------------------------------------------------------------


def test_every_key_is_asked_for_once_and_its_value_is_the_answer():
    setting = Setting(length=40, pairs=6, vocabulary=32)
    made = mqar.problems(setting, 50, generator())
    assert made.tokens.shape == made.asked.shape == made.answers.shape == (50, 40)
    for tokens, asked, answers in zip(*made, strict=True):
        keys, values = tokens[0:12:2].tolist(), tokens[1:12:2].tolist()
        assert len(set(keys)) == len(set(values)) == 6
        assert set(keys) <= set(range(1, 16))
        assert set(values) <= set(range(16, 32))
        assert sorted(tokens[asked].tolist()) == sorted(keys)
        pairs = dict(zip(keys, values, strict=True))
        assert [pairs[key] for key in tokens[asked].tolist()] == answers[asked].tolist()
        assert not asked[:12].any()
        assert not tokens[12:][~asked[12:]].any()  # blanks
        assert not answers[~asked].any()


def test_questions_stand_near_the_pairs_more_often_than_far():
    """p(x) ~ 1/x: of a pair at a time, with room for four, 12/25 at the first place."""
    setting = Setting(length=10, pairs=1, vocabulary=8, power=0.0)
    asked = mqar.problems(setting, 20_000, generator()).asked.double().mean(0)
    expected = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4], dtype=torch.float64) / (25 / 12)
    assert_close(asked[2::2], expected, rtol=0, atol=4 * math.sqrt(0.25 / 20_000))


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="need length >= 32, got 31"):
        Setting(length=31, pairs=8)
    with pytest.raises(ValueError, match="need vocabulary >= 18, got 17"):
        Setting(pairs=8, vocabulary=17)
    with pytest.raises(ValueError, match="no arm is called 'bilinear'"):
        Setting(arms=("softmax", "bilinear"))


# ---- mixers --------------------------------------------------------------------------------------


def mixer(name: str, key_dim: int = 5) -> mqar.Mixer:
    made = mqar.Mixer(8, key_dim, ARMS[name]).double()
    if ARMS[name].normaliser == "exp":  # off its initial value, which may hide it
        torch.nn.init.normal_(made.log_normaliser, std=0.3)
    return made


def heads(made: mqar.Mixer, x):
    return (layer(x)[:, None] for layer in (made.to_query, made.to_key, made.to_value))


def test_the_normalised_arm_is_the_papers_layer():
    made, layer = mixer("normalised"), NormalisedAttention(8, 1, key_dim=5).double()
    for name in ("to_query", "to_key", "to_value", "to_out"):
        getattr(layer, name).weight = getattr(made, name).weight
    layer.to_log_normaliser.weight = torch.nn.Parameter(made.log_normaliser[None])
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    assert_close(made(x), layer(x), rtol=1e-12, atol=1e-12)


def test_the_linear_arm_is_the_catalogues_system():
    made, x = mixer("linear"), torch.randn(2, 9, 8, dtype=torch.float64)
    out = Linear().attend(*heads(made, x), Visible(causal=True))
    assert_close(made(x), made.to_out(out[:, 0]), rtol=1e-12, atol=1e-12)


def test_the_softmax_arm_is_torchs():
    made, x = mixer("softmax"), torch.randn(2, 9, 8, dtype=torch.float64)
    out = torch.nn.functional.scaled_dot_product_attention(*heads(made, x), is_causal=True)
    assert_close(made(x), made.to_out(out[:, 0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ARMS)
def test_no_mixer_sees_what_comes_later(name):
    made, x = mixer(name), torch.randn(2, 9, 8, dtype=torch.float64)
    assert_close(made(x[:, :5]), made(x)[:, :5], rtol=1e-12, atol=1e-12)


def test_arms_of_one_seed_begin_with_the_same_weights_and_exp_as_its_bare_neighbour():
    made = mqar.problems(SMALL, 4, generator())
    outs, weights = {}, {}
    for name, arm in ARMS.items():
        torch.manual_seed(0)
        model = mqar.Recall(SMALL, 4, arm)
        outs[name] = model(made.tokens, made.asked)
        weights[name] = {k: v for k, v in model.state_dict().items() if "log_normaliser" not in k}
    for name in ARMS:
        assert_close(weights[name], weights["softmax"], rtol=0, atol=0)
    assert_close(outs["normalised"], outs["bare"])
    assert_close(outs["linear-exp"], outs["linear-bare"])
    assert not torch.allclose(outs["linear"], outs["linear-bare"])


def test_the_mlp_is_in_every_block_or_in_none():
    def parameters(setting: Setting) -> dict[str, int]:
        models = {name: mqar.Recall(setting, 4, arm) for name, arm in ARMS.items()}
        return {
            name: sum(p.numel() for k, p in model.named_parameters() if "log_normaliser" not in k)
            for name, model in models.items()
        }

    without, with_mlp = parameters(SMALL), parameters(replace(SMALL, mlp=True))
    assert len(set(without.values())) == len(set(with_mlp.values())) == 1
    assert with_mlp["linear"] > without["linear"]


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_learns_what_one_step_after_another_teaches():
    """Four values of a vocabulary of 32: soon the answer is one of those in sight."""
    setting = replace(SMALL, width=32, steps=200, batch=32)
    outcome = mqar.run(setting, Job("seed", "softmax", 8, 3e-3, 0))
    assert outcome.loss < math.log(16)  # better than a guess among all values
    assert outcome.accuracy > 1 / 16
    assert outcome.steps == 200
    again = mqar.run(setting, Job("seed", "softmax", 8, 3e-3, 0))
    assert again[:3] == outcome[:3]


def test_a_run_ends_where_the_task_is_solved(monkeypatch):
    monkeypatch.setattr(mqar, "SOLVED", 0.0)
    setting = replace(SMALL, steps=5 * mqar.CHECK_EVERY)
    assert mqar.run(setting, Job("seed", "linear", 4, 1e-3, 0)).steps == mqar.CHECK_EVERY


def test_a_run_that_diverges_ends_and_says_so(monkeypatch):
    monkeypatch.setattr(mqar, "CHECK_EVERY", 1)
    outcome = mqar.run(replace(SMALL, steps=60), Job("seed", "normalised", 4, 1e30, 0))
    assert not math.isfinite(outcome.loss)
    assert outcome.steps < 60


# ---- the record ----------------------------------------------------------------------------------


def test_a_stopped_study_goes_on_where_it_was(tmp_path):
    file = tmp_path / "runs.jsonl"
    record, jobs = Record(file, SMALL), list(mqar.search_jobs(SMALL))
    assert len(jobs) == 4
    for loss, job in enumerate(jobs[:3]):
        record.add(job, Outcome(0.5, float(loss), 3, 0.1))
    with file.open("a") as cut_short:
        cut_short.write('\n{"setting": {"len')
    again = Record(file, SMALL)
    assert again.done == record.done
    again.add(jobs[3], Outcome(0.5, math.inf, 3, 0.1))
    assert Record(file, SMALL).done == again.done
    assert not Record(file, replace(SMALL, steps=4)).done  # another setting
    assert Record(file, replace(SMALL, seeds=(7,), arms=("linear",))).done == again.done


def test_a_study_is_of_the_runs_at_the_best_rates(tmp_path):
    record = Record(tmp_path / "runs.jsonl", SMALL)
    for job in list(mqar.search_jobs(SMALL))[:-1]:
        record.add(job, Outcome(0.5, job.rate, 3, 0.1))
    other = Job("seed", "linear", 4, 1e-2, 0)
    record.add(other, Outcome(0.9, 0.1, 3, 0.1))
    assert len(record.study().done) == 3  # the search is not over
    for job in (list(mqar.search_jobs(SMALL))[-1], Job("seed", "linear", 4, 1e-3, 0)):
        record.add(job, Outcome(0.5, 1.0, 3, 0.1))
    assert record.done.keys() - record.study().done.keys() == {other}


def test_the_best_rate_solves_soonest_or_else_has_the_lowest_loss():
    low, high = (Job("search", "linear", 4, rate, mqar.SEARCH_SEED) for rate in SMALL.rates)
    for first, second, best in (
        (Outcome(0.3, 2.0, 3, 0), Outcome(0.2, 1.0, 3, 0), high),
        (Outcome(0.3, 2.0, 3, 0), Outcome(0.1, math.nan, 1, 0), low),
        (Outcome(0.995, 0.1, 300, 0), Outcome(0.995, 0.2, 200, 0), high),
        (Outcome(0.995, 0.1, 300, 0), Outcome(0.5, 0.01, 200, 0), low),
    ):
        assert mqar.best_rate(SMALL, {low: first, high: second}, "linear") == best.rate


def study_of(accuracy: dict[tuple[str, int], list[float]]) -> Study:
    done = {
        Job("seed", arm, n, 1e-3, seed): Outcome(value, 1.0, 3, 0.1)
        for (arm, n), values in accuracy.items()
        for seed, value in enumerate(values)
    }
    return Study(SMALL, done)


def test_a_study_survives_json():
    study = study_of({("linear", 4): [0.1, 0.2, 0.4]})
    assert Study.of_json(json.loads(json.dumps(study.to_json()))) == study


def test_differences_are_paired_by_seed():
    """By hand: 0.1, 0.2, 0.3; mean 0.2, deviation 0.1, half-width 0.1 t / sqrt 3, t(2) = 4.303."""
    study = study_of({("softmax", 4): [0.5, 0.7, 0.9], ("linear", 4): [0.4, 0.5, 0.6]})
    mean, half = study.difference("softmax", "linear", 4)
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(0.1 * 4.303 / math.sqrt(3))
    assert study.difference("softmax", "linear", 8) is None
    (said,) = study.verdicts()
    assert said.endswith("share of answers): n = 4: +0.20 ± 0.25, not told apart.")


def test_a_difference_beyond_its_interval_is_said_without_reserve():
    study = study_of({("normalised", 8): [0.9, 0.9, 0.91], ("linear", 8): [0.4, 0.41, 0.4]})
    (said,) = study.verdicts()
    assert said.startswith("Normalised over linear attention")
    assert "n = 8: +0.50" in said
    assert "not told apart" not in said


def test_nothing_is_said_below_three_seeds():
    assert study_of({("softmax", 4): [0.9, 0.9], ("linear", 4): [0.1, 0.1]}).verdicts() == []


def test_the_figure_shows_each_arm_at_the_widths_that_there_are():
    plots = pytest.importorskip("aftermax.lab.plots")
    study = study_of({("linear", 4): [0.1, 0.2, 0.3], ("linear", 8): [0.5], ("softmax", 8): [1.0]})
    figure = plots.mqar(study)
    (axis,) = figure.axes
    shown = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert shown[ARMS["linear"].title] == [[4, pytest.approx(0.2)], [8, 0.5]]
    assert shown[ARMS["softmax"].title] == [[8, 1.0]]
    plots.plt.close(figure)
