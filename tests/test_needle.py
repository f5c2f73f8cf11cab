"""Needles in noise: the problems, the arms, the record, and what it says of its numbers."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax.lab import needle
from aftermax.lab.data.needle import Needles
from aftermax.lab.needle import ARMS, Job, Look, Outcome, Setting, Study, open_study

SMALL = Setting(width=16, batch=8, steps=3, rates=(1e-3, 1e-2), seeds=(0, 1, 2))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- problems ------------------------------------------------------------------------------------


@given(
    pairs=st.integers(1, 4),
    gap=st.integers(1, 6),
    more=st.integers(0, 9),
    seed=st.integers(0, 9),
)
def test_the_key_of_the_question_stands_before_the_answer(pairs, gap, more, seed):
    kind = Needles(2 * pairs + gap + more, pairs, gap, noise=3, keys=5, values=4)
    made = kind.problems(20, generator(seed))
    assert made.tokens.shape == (20, kind.length)
    for tokens, answer, place in zip(made.tokens.tolist(), *made[1:], strict=True):
        keys = [i for i, token in enumerate(tokens[:-1]) if 3 <= token < 8]
        values = [i for i, token in enumerate(tokens) if token >= 8]
        assert [i + 1 for i in keys] == values
        assert len({tokens[i] for i in keys}) == len({tokens[i] for i in values}) == pairs
        assert max(values) <= kind.length - 1 - gap
        assert tokens[place] == answer
        assert tokens[place - 1] == tokens[-1]
        assert max(tokens) < kind.symbols


def test_every_placement_is_as_likely_as_every_other():
    """Two pairs in six places: six placements of two dominoes."""
    made = Needles(8, 2, 2, noise=1, keys=2, values=2).problems(12_000, generator())
    starts = [
        tuple(i for i, t in enumerate(row[:-1]) if t in (1, 2)) for row in made.tokens.tolist()
    ]
    counts = {found: starts.count(found) for found in set(starts)}
    assert set(counts) == {(0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4)}
    for count in counts.values():
        assert abs(count - 2000) < 4 * math.sqrt(12_000 * (1 / 6) * (5 / 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gap": 0}, "gap, pairs and noise must be at least 1, got 0, 2, 12"),
        ({"length": 14}, "2 pairs before a gap of 11 need length >= 15, got 14"),
        ({"values": 1}, "2 different keys and values need as many symbols of each, got 6 and 1"),
    ],
)
def test_problems_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Needles(**changes)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="no arm is called 'bilinear'"):
        Setting(arms=("full", "bilinear"))
    with pytest.raises(ValueError, match="reach 12 back, so the gap must be at least that, got 7"):
        Setting(window=7, first_window=6)


# ---- the model -----------------------------------------------------------------------------------


def model_of(arm: str, setting: Setting = SMALL) -> needle.Model:
    torch.manual_seed(0)
    return needle.Model(setting, arm)


def test_the_arm_window_cannot_know_the_pairs():
    """Other tokens before the gap change nothing."""
    made = SMALL.needles.problems(20, generator())
    before = made.tokens.clone()
    before[:, : -SMALL.gap] = torch.randint(24, (20, 32 - SMALL.gap), generator=generator(1))
    model = model_of("window")
    assert_close(model(before), model(made.tokens), rtol=0, atol=0)
    assert not torch.allclose(model_of("full")(before), model_of("full")(made.tokens))


def test_arms_of_one_seed_begin_with_the_same_weights():
    weights = {
        arm: {k: v for k, v in model_of(arm).state_dict().items() if ".score." not in k}
        for arm in ARMS
    }
    for arm in ARMS:
        shared = {k: v for k, v in weights[arm].items() if "learned" not in k}
        assert_close(shared, weights["full"], rtol=0, atol=0)
    after = []
    for arm in ARMS:
        model_of(arm)
        after.append(torch.rand(3))  # what is drawn next is the same too
    assert all(torch.equal(drawn, after[0]) for drawn in after)


def test_of_the_tokens_that_left_the_window_k_are_kept_and_the_value_is_or_is_not():
    """A network whose score is the symbol's number keeps the values, the highest, of its pairs."""
    setting = replace(SMALL, keep=2)
    made = setting.needles.problems(50, generator())
    model = model_of("kv", setting)
    attend = model.blocks[1][0].layer

    class ByNumber(torch.nn.Module):
        def __init__(self, sign: float):
            super().__init__()
            self.sign = sign

        def forward(self, x):
            return (self.sign * made.tokens[..., None].float()).expand(-1, -1, attend.kv_heads)

    attend.system = replace(attend.system, normalise=False)
    attend.score = ByNumber(1.0)
    assert needle.kept(model, made) == (1.0, 1.0)
    attend.score = ByNumber(-1.0)
    assert needle.kept(model, made) == (0.0, 0.0)


def test_random_scores_keep_by_chance():
    made = SMALL.needles.problems(2000, generator())
    recall, by_any = needle.kept(model_of("random"), made)
    chance = SMALL.chance_kept
    assert chance == 4 / 26
    assert abs(recall - chance) < 4 * math.sqrt(chance / 4000)
    assert abs(by_any - (1 - (1 - chance) ** 2)) < 4 * math.sqrt(0.25 / 2000)


@pytest.mark.parametrize("arm", ["window", "full"])
def test_where_nothing_is_chosen_there_is_no_recall(arm):
    assert needle.kept(model_of(arm), SMALL.needles.problems(2, generator())) == ()


# ---- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["kv", "random"])
def test_a_run_is_the_same_each_time(arm, monkeypatch):
    monkeypatch.setattr(needle, "CHECK_EVERY", 2)
    monkeypatch.setattr(needle, "HELD_OUT", 20)
    job = Job("seed", arm, 3e-3, 0)
    outcome = needle.run(SMALL, job)
    assert [look.step for look in outcome.looks] == [2, 3]
    assert 0 <= outcome.last.recall <= outcome.last.any <= 1
    assert needle.run(SMALL, job).looks == outcome.looks


def test_full_attention_learns_whose_the_value_is():
    setting = replace(SMALL, width=32, batch=64, steps=200, length=16, noise=2)
    outcome = needle.run(setting, Job("seed", "full", 3e-3, 0))
    assert outcome.last.accuracy > 0.8
    assert outcome.last.recall is None


def test_the_rate_rises_and_falls_to_a_tenth():
    assert needle.schedule(0.0) == 0
    assert needle.schedule(needle.WARMUP) == pytest.approx(1)
    assert needle.schedule(1.0) == pytest.approx(0.1)
    assert needle.schedule(0.01) < needle.schedule(0.04)


# ---- the study -----------------------------------------------------------------------------------


def outcome_of(accuracy: float, recall: float | None = None, loss: float = 1.0) -> Outcome:
    looks = (
        Look(2, accuracy / 2, 2 * loss, recall, recall),
        Look(3, accuracy, loss, recall, recall),
    )
    return Outcome(looks, 0.5)


def study_of(**accuracy: list[float]) -> Study:
    done = {
        Job("seed", arm, 1e-3, seed): outcome_of(value, None if arm == "full" else value / 2)
        for arm, values in accuracy.items()
        for seed, value in enumerate(values)
    }
    return Study(SMALL, done)


def test_a_study_survives_json():
    study = study_of(kv=[0.1, 0.2, 0.4], full=[0.5])
    assert Study.of_json(json.loads(json.dumps(study.to_json()))) == study


def test_every_rate_is_tried_before_any_seed_and_the_best_is_taken():
    setting = replace(SMALL, arms=("kv", "full"), seeds=(0, 1))
    study, jobs = Study(setting, {}), []
    for job in study.jobs():
        jobs.append(job)
        found = {1e-3: 2.0, 1e-2: 1.0 if job.arm == "kv" else math.nan}[job.rate]
        study.done[job] = outcome_of(0.5, loss=found)
    assert [job.kind for job in jobs] == ["search"] * 4 + ["seed"] * 4
    assert {(job.arm, job.rate) for job in jobs[4:]} == {("kv", 1e-2), ("full", 1e-3)}
    assert [job.seed for job in jobs[4:]] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ((0.5, 0.2), 1e-2),
        ((2e-3, 1e-4), 1e-3),
        ((0.1, math.nan), 1e-3),
        ((math.nan, math.inf), 1e-3),
    ],
    ids=["lower", "alike", "diverged", "both diverged"],
)
def test_of_rates_that_are_as_good_the_lowest_is_taken(losses, best):
    done = {
        Job("search", "kv", rate, needle.SEARCH_SEED): outcome_of(1.0, loss=loss)
        for rate, loss in zip(SMALL.rates, losses, strict=True)
    }
    study = Study(SMALL, done)
    assert study.best_rate("kv") == best
    for rate in SMALL.rates:  # of an earlier study, with other rates
        for seed in range(4):
            done[Job("seed", "kv", rate, seed)] = outcome_of(rate)
    assert study.by_seed("kv", "accuracy") == {0: best, 1: best, 2: best}


def test_a_stopped_study_goes_on_where_it_was(tmp_path, monkeypatch):
    setting = replace(SMALL, arms=("window",), rates=(1e-3,), seeds=(0, 1))
    asked = []
    monkeypatch.setattr(
        needle, "run", lambda setting, job: asked.append(job) or outcome_of(len(asked) / 10)
    )
    study, file = Study(setting, {}), tmp_path / "needle.json"
    with pytest.raises(KeyboardInterrupt):
        study.complete(lambda job, _: _write(file, study, stop=job.kind == "seed"))
    assert [job.kind for job in asked] == ["search", "seed"]
    again = open_study(file, setting)
    assert again == study
    again.complete()
    assert [job.seed for job in asked] == [needle.SEARCH_SEED, 0, 1]
    assert open_study(file, replace(setting, seeds=(0, 5))).done == study.done
    with pytest.raises(ValueError, match="is of another setting"):
        open_study(file, replace(setting, steps=4))
    assert open_study(tmp_path / "other.json", setting).done == {}


def _write(file, study: Study, stop: bool) -> None:
    file.write_text(json.dumps(study.to_json()))
    if stop:
        raise KeyboardInterrupt


def test_looks_are_of_the_last_step_or_the_one_that_is_asked_for():
    study = study_of(kv=[0.2, 0.4])
    assert study.by_seed("kv", "accuracy") == {0: 0.2, 1: 0.4}
    assert study.by_seed("kv", "accuracy", step=2) == {0: 0.1, 1: 0.2}
    assert study.by_seed("kv", "accuracy", step=9) == {}
    assert study.steps("kv") == [2, 3]
    assert study.at("kv", "recall").mean == pytest.approx(0.15)
    assert study_of(full=[0.5]).at("full", "recall") is None


def test_differences_are_paired_by_seed_and_said_from_three_seeds_on():
    """By hand: 0.1, 0.2, 0.3; mean 0.2, half-width 0.1 t / sqrt 3, t(2) = 4.303."""
    said = study_of(kv=[0.5, 0.7, 0.9], random=[0.4, 0.5, 0.6]).verdicts()
    assert said[0].startswith("SparseK, scale K and V, over random scores, scale K and V: ")
    assert said[0].endswith("accuracy +0.200 ± 0.248, not told apart.")
    assert said[1].endswith("recall +0.100 ± 0.124, not told apart.")
    assert len(said) == 2
    assert study_of(kv=[0.5, 0.7], random=[0.4, 0.5]).verdicts() == []
    (sure,) = study_of(kv=[0.5, 0.5, 0.51], full=[0.8, 0.8, 0.8]).verdicts()
    assert sure.endswith("over full attention: accuracy -0.297 ± 0.014.")


def test_the_step_by_which_it_was_learned():
    """A look at step 2 has half the accuracy of the one at step 3."""
    study = study_of(kv=[0.9, 1.0, 0.8], v=[1.8, 1.0, 1.0])
    assert study.steps_to_learn("kv") == {0: 3, 1: 3}
    assert study.steps_to_learn("v") == {0: 2, 1: 3, 2: 3}
    assert not any("steps" in sentence for sentence in study.verdicts())  # two seeds in common
    said = study_of(kv=[1.8, 1.8, 1.8], v=[1.0, 1.0, 1.0]).verdicts()[-1]
    assert said.endswith("over SparseK, scale V: 90% of the answers after -1 ± 0 steps.")


def test_the_figure_shows_each_arm_on_its_way():
    plots = pytest.importorskip("aftermax.lab.plots")
    figure = plots.needle(study_of(kv=[0.2, 0.4], full=[1.0]))
    answers, kept = figure.axes
    shown = {line.get_label(): line.get_xydata().tolist() for line in answers.lines}
    assert shown[ARMS["kv"]] == [[2, pytest.approx(0.15)], [3, pytest.approx(0.3)]]
    assert shown[ARMS["full"]] == [[2, 0.5], [3, 1.0]]
    assert next(line.get_label() for line in kept.lines) == ARMS["kv"]
    assert ARMS["full"] not in {line.get_label() for line in kept.lines}
    plots.plt.close(figure)
