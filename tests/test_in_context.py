"""Regression in context: the tasks, the gradient step, the layers, the record and its page."""

import importlib
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import Softmax
from aftermax.lab import in_context_study
from aftermax.lab.in_context import (
    ARMS,
    Answer,
    GradientStep,
    Layer,
    LinearLayer,
    Measures,
    Products,
    Tasks,
    answer,
    answer_of,
    best_rates,
    descend,
    draw,
    logits_of,
    loss_of,
    measure,
    model_of,
)
from aftermax.lab.in_context_study import (
    SEARCH_SEED,
    STUDIES,
    Job,
    Look,
    Outcome,
    Setting,
    Study,
    Untrained,
    checkpoints,
    joined,
    optimum,
    resumed,
)
from aftermax.regression import softmax_regression

SMALL = Setting(rows=6, width=3, batch=4, steps=12, rates=(1e-3, 1e-2), seeds=(0, 1))


def tasks_of(seed: int = 0, count: int = 3, rows: int = 6, width: int = 4) -> Tasks:
    return draw(count, rows, width, torch.Generator().manual_seed(seed), torch.float64)


@pytest.fixture
def few_tasks(monkeypatch):
    monkeypatch.setattr(in_context_study, "SCORED", 20)
    monkeypatch.setattr(in_context_study, "SIZED", 600)


# ---- tasks ---------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), rows=st.integers(1, 7), width=st.integers(1, 5))
def test_tasks_are_softmax_regressions_of_one_x(seed, rows, width):
    """log b is A x but for a constant, and log b' is A' x but for another, with the same x."""
    made = tasks_of(seed, 2, rows, width)
    again = tasks_of(seed, 2, rows, width)
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    both = torch.cat([made.data, made.queries], 1)
    ones = torch.block_diag(torch.ones(rows, 1), torch.ones(rows, 1)).to(both).expand(2, -1, -1)
    known = torch.cat([both, ones], -1)
    logits = torch.cat([made.target, made.answers], 1).log()[..., None]
    found = torch.linalg.pinv(known) @ logits
    assert_close(known @ found, logits, rtol=1e-9, atol=1e-9)


def test_tasks_have_the_moments_that_are_promised():
    made = draw(4000, 5, 4, torch.Generator().manual_seed(0))
    for x in (made.data, made.queries):
        assert abs(x.mean()) < 0.01
        assert abs(x.var() - 1) < 0.02
    logits = made.answers.log()
    of_differences = (logits[:, 0] - logits[:, 1]).var()  # (a - a').x: 2 |x|^2, and E |x|^2 = 1
    assert abs(of_differences - 2) < 0.15


# ---- gradient descent ----------------------------------------------------------------------------


def test_the_arm_of_one_step_is_its_formula():
    """s A' A^T (n b - 1), and one step of descent from 0."""
    made = tasks_of()
    model = GradientStep(0.03).double()
    weights = 0.03 * torch.einsum("bnd,bn->bd", made.data, 6 * made.target - 1)
    assert_close(model(made), torch.einsum("bnd,bd->bn", made.queries, weights), atol=1e-7, rtol=0)
    stepped = descend(made.data, made.target, [float(model.rate.detach())])
    assert_close(model(made), logits_of(stepped, made.queries), rtol=0, atol=1e-12)


def test_a_step_overshoots_where_its_logits_are_large_and_falls_short_where_they_are_small():
    """At n = 25, d = 20 and the best size: what a flattened logit repairs."""
    made = draw(2000, 25, 20, torch.Generator().manual_seed(0), torch.float64)
    (rate,) = best_rates(made, 1)
    logits = logits_of(descend(made.data, made.target, [rate]), made.queries)
    x = torch.linalg.lstsq(
        made.queries - made.queries.mean(1, keepdim=True),
        (made.answers.log() - made.answers.log().mean(1, keepdim=True))[..., None],
    ).solution
    true = (made.queries @ x)[..., 0]  # d < n: this is the x of the task
    large, small = logits > 1.5, (logits > 0.1) & (logits < 0.5)
    assert logits[large].mean() > true[large].mean() + 0.3
    assert logits[small].mean() < true[small].mean() - 0.02


def test_step_sizes_are_the_best_one_after_the_other():
    made = tasks_of(count=200)

    def cost(rates):
        x = descend(made.data, made.target, rates)
        return float(loss_of(logits_of(x, made.queries), made.answers))

    rates = best_rates(made, 3)
    costs = [cost(rates[:k]) for k in range(4)]
    assert costs == sorted(costs, reverse=True)
    for k in range(3):
        for factor in (0.5, 0.98, 1.02, 2):
            assert cost([*rates[:k], factor * rates[k]]) >= costs[k + 1]


def test_the_optimum_answers_every_example_and_is_of_least_norm():
    for width in (4, 9):  # fewer and more than the six examples have to say
        made = tasks_of(width=width)
        found = optimum(made)
        answers = logits_of(found, made.data).softmax(-1)
        assert_close(answers, made.target, rtol=0, atol=1e-12)
        if width == 4:
            assert_close(logits_of(found, made.queries).softmax(-1), made.answers)
            assert_close(softmax_regression(made.data, made.target).x, found)
        shift = torch.randn(3, width, generator=torch.Generator().manual_seed(1)).double()
        centred = made.data - made.data.mean(1, keepdim=True)
        within = torch.linalg.pinv(centred) @ centred
        silent = shift - (within @ shift[..., None])[..., 0]  # what no example speaks of
        assert_close((found * silent).sum(-1), torch.zeros(3).double(), rtol=0, atol=1e-10)


# ---- the layers ----------------------------------------------------------------------------------


def test_a_layer_is_self_attention_over_the_examples_and_one_query():
    """By hand: each query's own sequence of n + 1 tokens, its last output, the last channel."""
    made = tasks_of(count=2)
    torch.manual_seed(0)
    layer = Layer(4, weights=Softmax()).double()
    q, k, v, o = (
        getattr(layer, name).weight for name in ("to_query", "to_key", "to_value", "to_out")
    )
    for task in range(2):
        examples = torch.cat([made.data[task], (6 * made.target[task] - 1)[:, None]], -1)
        for query in range(6):
            last = torch.cat([made.queries[task, query], torch.zeros(1).double()])
            tokens = torch.cat([examples, last[None]])
            scores = tokens @ k.T @ (q @ last) / math.sqrt(5)
            logit = (o @ (scores.softmax(0) @ (tokens @ v.T)))[-1]
            assert_close(layer(made)[task, query], logit, rtol=0, atol=1e-12)


@pytest.mark.parametrize("arm", sorted(set(ARMS) - {"gd"}))
def test_a_query_knows_nothing_of_the_others(arm):
    made = tasks_of()
    torch.manual_seed(0)
    model = model_of(arm, 4).double()
    whole = model(made)
    changed = made.queries.clone()
    changed[:, 1:] += 1
    other = model(made._replace(queries=changed))
    assert_close(other[:, 0], whole[:, 0], rtol=0, atol=1e-12)
    assert not torch.allclose(other[:, 1], whole[:, 1])


def test_arms_of_one_seed_begin_with_the_same_projections():
    def projections(arm, start=1.0):
        torch.manual_seed(0)
        state = model_of(arm, 4, start).state_dict()
        return {name: x for name, x in state.items() if name.startswith("to_")}

    assert len(projections("softmax")) == 4
    tenth = {name: x / 10 for name, x in projections("softmax").items()}
    assert_close(projections("softmax", 0.1), tenth)
    for arm in set(ARMS) - {"gd"}:
        assert_close(projections(arm), projections("softmax"), rtol=0, atol=0)


def test_linear_self_attention_is_its_system_under_the_mask():
    made = tasks_of()
    torch.manual_seed(0)
    quick = LinearLayer(4).double()
    torch.manual_seed(0)
    plain = Layer(4, weights=Products()).double()
    assert_close(quick(made), plain(made), rtol=0, atol=1e-12)


def test_linear_self_attention_can_be_one_gradient_step():
    made = tasks_of()
    layer = LinearLayer(4).double().set_to_step(1.0, 0.03 / math.sqrt(5), 6)  # scores unscaled
    expected = answer(GradientStep(0.03).double(), made)
    found = measure(answer(layer, made), expected, made.answers)
    assert found.cosine == pytest.approx(1, abs=1e-12)
    assert found.model < 1e-7  # the step's 0.03 is a float32
    assert found.prediction < 1e-7


@pytest.mark.parametrize("sign", [1, -1])
def test_softmax_attention_can_be_one_gradient_step_up_to_its_temperature(sign):
    """Ten times nearer with a temperature ten times lower, of either sign."""
    made = tasks_of()
    expected = answer(GradientStep(0.03).double(), made)
    gaps = []
    for beta in (sign * 1e-2, sign * 1e-3, sign * 1e-4):
        layer = Layer(4).double().set_to_step(beta, 0.03, 6)
        assert layer.temperature() == pytest.approx(beta)
        gaps.append(measure(answer(layer, made), expected, made.answers).model)
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.1)
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("beta", [0.3, -0.3])
def test_of_many_examples_a_head_makes_an_exponential_of_the_logit(beta):
    """(e^(beta t) - 1) / beta times the step's factor, t = a'.x: what it is for a normal law of
    examples, which these many come near."""
    rows, generator = 400_000, torch.Generator().manual_seed(0)
    data = torch.randn(1, rows, 2, generator=generator, dtype=torch.float64)
    x = torch.tensor([0.6, -0.4]).double()
    queries = torch.tensor([[[1.0, 0.0], [0.5, -1.0], [-1.0, 1.0]]]).double()
    target = (data @ x).softmax(-1)
    layer = Layer(2).double().set_to_step(beta, 1 / rows, rows)
    found = layer(Tasks(data, target, queries, target))
    expected = torch.expm1(beta * (queries @ x)) / beta
    assert_close(found, expected, rtol=0, atol=0.01)


def test_the_temperature_has_the_gains_of_a_norm_in_it():
    layer = Layer(4, qk_norm=True).set_to_step(0.5, 0.03, 6)
    with torch.no_grad():
        layer.query_norm.weight.fill_(-2)
        layer.key_norm.weight.fill_(3)
    assert layer.temperature() == pytest.approx(-3)


@pytest.mark.parametrize("arm", ["cosine", "lssa", "lssar"])
def test_what_compares_directions_alone_has_no_sensitivity_along_the_query(arm):
    """With values that do not read the query its logit is the same at every length."""
    made = tasks_of()
    torch.manual_seed(0)
    layer = model_of(arm, 4).double()
    with torch.no_grad():
        layer.to_value.weight[:, :-1] = 0
    longer = layer(made._replace(queries=3 * made.queries))
    assert_close(longer, layer(made), rtol=0, atol=1e-12)
    along = (answer(layer, made).sensitivities * made.queries).sum(-1)
    assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-12)


# ---- what is measured ----------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["softmax", "products", "sigmoid", "rela", "inline"])
def test_sensitivities_are_differences_of_the_logit_by_its_query(arm):
    made = tasks_of()
    torch.manual_seed(0)
    model = model_of(arm, 4).double()
    sensitivities = answer(model, made).sensitivities
    for channel in range(4):
        step = torch.zeros(4).double()
        step[channel] = 1e-5
        with torch.no_grad():
            up = model(made._replace(queries=made.queries + step))
            down = model(made._replace(queries=made.queries - step))
        expected = (up - down) / 2e-5
        assert_close(sensitivities[..., channel], expected, rtol=1e-5, atol=1e-8)


def test_measures_by_hand():
    """Two queries of one task, n = 2: the reference says (3/4, 1/4), the learner the reverse."""
    log3 = math.log(3)
    reference = Answer(torch.tensor([[log3, 0.0]]), torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]))
    given_answer = Answer(torch.tensor([[0.0, log3]]), torch.tensor([[[2.0, 0.0], [2.0, 0.0]]]))
    found = measure(given_answer, reference, torch.tensor([[0.75, 0.25]]))
    assert found.loss == pytest.approx(0.5)  # 2/2 (1/2^2 + 1/2^2)
    assert found.prediction == pytest.approx(2)
    assert found.model == pytest.approx(math.sqrt((1 + 8) / 5))
    assert found.cosine == pytest.approx(0.5)


def test_uniform_answers_are_as_far_from_the_step_as_the_step_is_from_them():
    made = tasks_of()
    step = answer_of(descend(made.data, made.target, [0.02]), made)
    uniform = answer_of(torch.zeros(3, 4).double(), made)
    assert measure(uniform, step, made.answers)[1:] == pytest.approx((1, 1, 0))
    assert measure(step, step, made.answers)[1:] == pytest.approx((0, 0, 1))


# ---- the study -----------------------------------------------------------------------------------


def test_an_arm_that_there_is_not():
    with pytest.raises(ValueError, match="no arm is called 'mamba'; there are gd, products, softm"):
        Setting(arms=("gd", "mamba"))


@pytest.mark.usefixtures("few_tasks")
def test_all_arms_of_a_seed_see_the_same_tasks(monkeypatch):
    seen = {}

    def remember(*asked):
        arm, model = asked[0], model_of(*asked)
        model.register_forward_pre_hook(lambda _, tasks: seen.setdefault(arm, []).append(tasks[0]))
        return model

    monkeypatch.setattr(in_context_study, "model_of", remember)
    Study(replace(SMALL, steps=3, rates=(1e-3,))).complete()
    for arm in ("products", "softmax"):
        for ours, theirs in zip(seen[arm], seen["gd"], strict=True):
            assert torch.equal(ours.data, theirs.data)
            assert torch.equal(ours.answers, theirs.answers)
    fresh = [tasks.data for tasks in seen["gd"] if len(tasks.data) == SMALL.batch]
    assert len(fresh) == 9  # three steps of the search and of two seeds
    for i, tasks in enumerate(fresh):
        assert not any(torch.equal(tasks, other) for other in fresh[:i])


def _rows(study: Study) -> list:
    return [(job, outcome.looks) for job, outcome in study.done.items()]


@pytest.mark.usefixtures("few_tasks")
def test_a_study_that_is_stopped_goes_on_with_the_same_numbers():
    whole = Study(SMALL)
    whole.complete()
    stopped = Study(SMALL)

    def stop(job, outcome):
        if len(stopped.done) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.complete(stop)
    held = json.loads(json.dumps(stopped.to_json()))
    again = resumed(held, SMALL)
    assert len(again.done) == 8
    made = []
    again.complete(lambda job, outcome: made.append(job))
    assert len(made) == whole.count()[1] - 8
    assert _rows(again) == _rows(whole)
    assert again.untrained == whole.untrained
    assert again.count() == (12, 12)


@pytest.mark.usefixtures("few_tasks")
def test_progress_counts_what_is_asked_for_alone():
    """Runs of a record that are not asked for any more are no progress."""
    whole = Study(SMALL)
    whole.complete()
    more = resumed(json.loads(json.dumps(whole.to_json())), replace(SMALL, seeds=(7, 8)))
    arms, rates = len(SMALL.arms), len(SMALL.rates)
    assert more.count() == (arms * rates, arms * (rates + 2))
    counts = []
    more.complete(lambda job, outcome: counts.append(more.count()[0]))
    assert counts == [arms * rates + i for i in range(1, 2 * arms + 1)]


def test_a_record_of_another_setting_is_refused():
    held = Study(SMALL).to_json()
    assert resumed(held, replace(SMALL, seeds=(7,), rates=(1.0,))).setting.seeds == (7,)
    with pytest.raises(ValueError, match="the record is of"):
        resumed(held, replace(SMALL, steps=13))


@pytest.mark.usefixtures("few_tasks")
def test_a_step_of_learned_size_finds_the_best_one():
    setting = Setting(rows=6, width=3, batch=64, steps=300, rates=(1e-2,), seeds=(0,), arms=("gd",))
    study = Study(setting)
    study.complete()
    assert study.by_seed("gd", "cosine")[0] == pytest.approx(1, abs=1e-5)
    assert study.ratio("gd")[0] == pytest.approx(1, abs=0.05)


def outcome(*cosines: float, loss: float = 1.0) -> Outcome:
    looks = [Look(10 * i, Measures(loss, 0.5, 0.5, cosine)) for i, cosine in enumerate(cosines)]
    return Outcome(tuple(looks), 1.0)


def test_the_step_from_which_on_it_is_near():
    study = Study(replace(SMALL, rates=(0.1, 0.2), seeds=(0, 1, 2)))
    for rate, loss in ((0.1, 2.0), (0.2, 1.0)):
        study.done[Job("search", "softmax", rate, SEARCH_SEED)] = outcome(0.0, loss=loss)
    assert study.best_rate("softmax") == 0.2
    study.done[Job("seed", "softmax", 0.2, 0)] = outcome(0.5, 0.995, 0.999)
    study.done[Job("seed", "softmax", 0.2, 1)] = outcome(0.995, 0.5, 0.999)
    study.done[Job("seed", "softmax", 0.2, 2)] = outcome(0.5, 0.999, 0.5)
    study.done[Job("seed", "softmax", 0.1, 0)] = outcome(1.0)
    assert study.steps_to("softmax") == {0: 10, 1: 20}
    assert study.by_seed("softmax", "cosine", 10) == {0: 0.995, 1: 0.5, 2: 0.999}
    assert study.steps("softmax") == [0, 10, 20]
    assert study.runs("gd") == {}


def test_a_rate_whose_loss_is_no_number_is_not_taken():
    study = Study(SMALL)
    study.done[Job("search", "softmax", 1e-3, SEARCH_SEED)] = outcome(0.0, loss=math.nan)
    study.done[Job("search", "softmax", 1e-2, SEARCH_SEED)] = outcome(0.0, loss=9.0)
    assert study.best_rate("softmax") == 1e-2


def test_studies_of_one_size_are_joined_and_others_are_not():
    one, other = Study(SMALL), Study(replace(SMALL, arms=("sigmoid",), seeds=(2,)))
    assert joined(one, other).setting.arms == ("gd", "products", "softmax", "sigmoid")
    assert joined(one, other).setting.seeds == (0, 1, 2)
    with pytest.raises(ValueError, match="cannot be joined"):
        joined(one, Study(replace(SMALL, width=9)))
    for name in ("systems", "linear"):
        joined(Study(STUDIES["unscaled"]), Study(STUDIES[name]))
    asked = [arm for name in ("unscaled", "systems", "linear") for arm in STUDIES[name].arms]
    assert sorted(asked) == sorted(ARMS)


def test_looks_are_log_spaced_and_end_with_the_last_step():
    assert checkpoints(7) == (0, 7)
    assert checkpoints(5000)[:5] == (0, 10, 16, 25, 40)
    assert checkpoints(5000)[-2:] == (3981, 5000)


def test_what_was_learned_is_said_by_loss_and_cosine():
    """One step costs 1 and uniform answers 2: five seeds, one of each kind."""
    pytest.importorskip("matplotlib")
    page = importlib.import_module("in_context_results")
    study = Study(replace(SMALL, rates=(0.1,), seeds=(0, 1, 2, 3, 4)))
    for name, loss in (("gd-1", 1.0), ("uniform", 2.0)):
        study.untrained[name] = Untrained((), Measures(loss, 0, 0, 0))
    study.done[Job("search", "softmax", 0.1, SEARCH_SEED)] = outcome(0.0)
    ends = ((1.04, 0.995), (1.06, 0.995), (0.9, 0.98), (1.4, 0.5), (1.6, 0.5))
    for seed, (loss, cosine) in enumerate(ends):
        study.done[Job("seed", "softmax", 0.1, seed)] = outcome(cosine, loss=loss)
    assert page.learned(study, "softmax") == (
        "the step (1 of 5), its direction (1 of 5), as good an answer (1 of 5), "
        "part of it (1 of 5), little (1 of 5)"
    )
    alone = replace(study, setting=replace(study.setting, seeds=(2,)))
    assert page.learned(alone, "softmax") == "as good an answer"


def test_seeds_are_told_apart_by_the_sign_of_what_they_compare():
    study = Study(replace(SMALL, rates=(0.1,), seeds=(0, 1, 2)))
    study.done[Job("search", "softmax", 0.1, SEARCH_SEED)] = outcome(0.0)
    for seed, temperature in enumerate((0.1, -0.1, 0.2)):
        made = outcome(0.1 * seed)._replace(temperature=temperature)
        study.done[Job("seed", "softmax", 0.1, seed)] = made
    assert study.signs("softmax") == {0: 1, 1: -1, 2: 1}
    assert study.of_seeds([0, 2]).by_seed("softmax", "cosine") == {0: 0.0, 2: 0.2}
    assert Study.of_json(json.loads(json.dumps(study.to_json()))) == study
