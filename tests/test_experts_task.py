"""The task of experts: arms, loss, measures, the loop, the command, the report."""

import dataclasses
import html
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt
from safetensors.torch import load_file

from aftermax.cli import main, preset_of
from aftermax.lab import experts, grid, plots
from aftermax.lab import train as loop
from aftermax.lab.data.pictures import DENSE, QUESTIONS
from aftermax.lab.experts_page import ANSWERS, CAPTIONS, COUNTED, READ
from aftermax.lab.experts_work import FEEDS, PRESETS, ExpertsWork
from aftermax.lab.multitask import MultiTaskVisionTransformer
from aftermax.lab.report import settings, tables, terminal_table
from aftermax.lab.results import Results
from aftermax.lab.tasks import work_of
from aftermax.lab.train import batch, build, train
from aftermax.lab.trained import find
from aftermax.lab.work import Run
from aftermax.moe import Routing, load_balance

from .lab_work import compared_work, latest_results, open_store

TINY = ExpertsWork(
    systems=("experts/softmax",),
    **{"image_size": 8, "layers": 2, "width": 16, "heads": 2, "experts": 4, "batch": 8, "steps": 6},
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return experts.prepare(TINY, tmp_path_factory.mktemp("digits"))


def run_of(data, work=TINY, system="experts/softmax", **changes) -> Run:
    settings = {"seed": 0, "learning_rate": 3e-3, "kind": "train"} | changes
    return Run(work, system, data_digest=data.digest, **settings)


# the work


def test_an_arm_says_tower_system_and_questions():
    arm = TINY.arm("wide/sigmoid/bare/alone-mask")
    assert (arm.feed, arm.entry.name, arm.questions) == ("wide", "sigmoid", ("mask",))
    assert not arm.qk_norm
    assert arm.title == "sigmoid · bare, dense, wide, mask alone"
    assert TINY.arm("experts/softmax").title == "softmax, experts"
    assert TINY.arm("experts/softmax").questions == ("class", "mask")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ("softmax",)}, "softmax does not say what stands in the odd layers"),
        ({"systems": ("deep/softmax",)}, r"ask for one of experts/\.\.\., dense/\.\.\., wide/"),
        ({"systems": ("experts/softmax/alone-edges",)}, "has one question, of class, mask"),
        ({"systems": ("experts/softmax/hybrid",)}, "this model has no hybrid"),
        ({"systems": ("experts/softmax/alibi",)}, "no trait alibi"),
        ({"questions": ("class", "colour")}, "one of them mask or edges, got class colour"),
        ({"questions": ("mask",)}, "two or more that differ"),
        ({"questions": ("mask", "mask")}, "two or more that differ"),
        ({"questions": ("mask", "depth")}, "no question depth; there are class, colour"),
        ({"layers": 1}, "layers must be 2 or more, got 1"),
        ({"top_k": 5}, "top_k must be 1 to the 4 experts, got 5"),
        ({"balance": -1.0}, "balance is 0 or more"),
        ({"shift": 8}, "less than image_size, got 8"),
        ({"patch": 3}, "patch must divide image_size, got 3 and 8"),
        ({"width": 15}, "width / heads must be a whole even number"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("name", PRESETS)
def test_settings_give_the_work_back(name):
    assert work_of(PRESETS[name].settings()) == PRESETS[name]


def test_what_the_pictures_cannot_be_asked_is_said_first(tmp_path):
    work = dataclasses.replace(TINY, questions=("colour", "mask"), systems=("experts/softmax",))
    with pytest.raises(ValueError, match="has no colours of its own"):
        experts.prepare(work, tmp_path)


@pytest.mark.parametrize("name", ["quick", "standard", "long"])
def test_towers_have_the_sizes_that_they_are_compared_by(name):
    """dense has the active FLOPs of experts but for the gates; wide their parameters; wide and
    large have at least twice the FLOPs, so that half of them is what experts have at most."""
    work = PRESETS[name]
    shapes = {feed: experts.shape(work, work.arm(f"{feed}/softmax")) for feed in FEEDS}
    for question in work.questions:
        target = experts.Target(question, 10, question in DENSE)
        flops = {feed: shape.flops(target) for feed, shape in shapes.items()}
        gates = work.layers // 2 * 2 * work.context * work.width * work.experts
        assert flops["experts"] == flops["dense"] + gates
        assert flops["wide"] > 2 * flops["experts"]
        assert flops["large"] > 2 * flops["experts"]

    def size(feed):
        with torch.device("meta"):
            targets = [experts.Target(q, 10, q in DENSE) for q in work.questions]
            model = MultiTaskVisionTransformer(shapes[feed], targets)
        return sum(p.numel() for p in model.parameters())

    assert size("wide") == pytest.approx(size("experts"), rel=0.03)
    assert size("dense") < size("large") < size("experts")


# loss and measures


def test_the_loss_is_the_sum_over_questions_and_the_balance_of_each(digits):
    run = run_of(digits)
    model, data = build(run, digits)[0], batch(run_of(digits), digits, 0)
    total, told = experts.loss(model, data, run)
    logits, [routing] = model(data.images, "class", return_routing=True)
    chances = logits.log_softmax(1)
    by_hand = -chances.gather(1, data.answers["class"][:, None]).mean()
    mask, [other] = model(data.images, "mask", return_routing=True)
    yes = mask[:, 0].sigmoid()
    wanted = data.answers["mask"]
    by_hand = by_hand - (wanted * yes.log() + (1 - wanted) * (1 - yes).log()).mean()
    assert told.item() == pytest.approx(by_hand.item(), rel=1e-5)
    balance = load_balance(routing) + load_balance(other)
    assert total.item() == pytest.approx((by_hand + 0.01 * balance).item(), rel=1e-5)
    alone = run_of(digits, system="experts/softmax/alone-mask")
    assert build(alone, digits)[0].tasks == ("mask",)


def test_before_it_learns_the_loss_is_that_of_knowing_nothing(digits):
    for system in ("experts/softmax", "dense/softmax", "large/cosine"):
        run = run_of(digits, system=system)
        _, told = experts.loss(build(run, digits)[0], batch(run, digits, 0), run)
        assert told.item() == pytest.approx(math.log(10) + math.log(2), abs=0.3)


def test_scores_by_hand():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    assert experts.scores(logits, torch.tensor([0, 1, 1, 1]))["accuracy"] == 0.75
    pixels = torch.tensor([[[[5.0, -5.0], [5.0, 5.0]]], [[[-5.0, -5.0], [-5.0, -5.0]]]])
    wanted = torch.tensor([[[1.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    found = experts.scores(pixels, wanted)
    assert found["accuracy"] == 6 / 8
    assert found["iou"] == 2 / 4  # over all pixels together
    assert experts.scores(-5 * torch.ones(1, 1, 2, 2), torch.zeros(1, 2, 2))["iou"] == 1.0


@torch.no_grad()
def test_what_is_measured_is_right(digits):
    run = run_of(digits, dataclasses.replace(TINY, layers=4))
    model, work = build(run, digits)[0].eval(), run.work
    found = {row.measure: row.value for row in experts.evaluate(model, work, digits, 6)}
    asked = digits.held_out("test")
    images = digits.normed(asked.images)
    right = model(images, "class").argmax(1) == asked.answers["class"]
    assert found["class_accuracy"] == pytest.approx(right.float().mean().item())
    assert found["mask_flops"] == model.shape.flops(model.targets["mask"])
    assert found["bytes"] == 4 * found["parameters"]
    _, routings = model(images, "mask", return_routing=True)
    read = {"expert": 0, "token": 0}
    for image in range(len(images)):
        for layer, whole in zip(model.experts, routings, strict=True):
            parts = (whole.weights, whole.index, whole.probabilities, whole.logits)
            one = Routing(*(part[image] for part in parts))
            for order in read:
                read[order] += layer.weight_bytes(one, order)
    for order, total in read.items():
        assert found[f"mask_bytes_{order}"] == pytest.approx(total / len(images), rel=1e-9)
    shares = [found[f"mask_share_1_{expert}"] for expert in range(4)]
    count = (routings[1].index.flatten() == 2).sum().item() / routings[1].index.numel()
    assert shares[2] == pytest.approx(count)
    assert sum(shares) == pytest.approx(1)
    _, others = model(images, "class", return_routing=True)
    same = [
        len({*a} & {*b}) / 2
        for one, other in zip(routings, others, strict=True)
        for a, b in zip(one.index.flatten(0, 1).tolist(), other.index.flatten(0, 1).tolist(),
                        strict=True)
    ]  # fmt: skip
    assert found["same_choices"] == pytest.approx(sum(same) / len(same))
    logits, joined = experts.answered(model, images, "mask")
    assert torch.equal(torch.cat([r.index for r in joined]), torch.cat([r.index for r in routings]))
    assert logits.shape == (len(images), 1, 8, 8)


def routing_of(index: list[list[int]], number: int = 4) -> Routing:
    chosen = torch.tensor([index])
    shape = (1, len(index), number)
    return Routing(torch.ones(chosen.shape), chosen, torch.ones(shape), torch.ones(shape))


def test_use_by_hand(digits):
    model = build(run_of(digits), digits)[0]
    routed = {
        "class": [routing_of([[0, 1], [0, 1], [0, 2], [0, 1]])],
        "mask": [routing_of([[3, 2], [0, 1], [2, 0], [2, 3]])],
    }
    found = experts.used(model, routed)
    one = 2 * 16 * 32 * 4
    assert found["class_experts"] == 3
    assert found["class_bytes_held"] == found["class_bytes_expert"] == 3 * one
    assert found["mask_bytes_expert"] == 4 * one
    assert found["same_choices"] == (0 + 1 + 1 + 0) / 4
    # shares 4 3 1 0 and 2 1 3 2 of eight
    assert found["shared_use"] == pytest.approx((2 + 1 + 1 + 0) / 8)
    assert [found[f"class_share_0_{i}"] for i in range(4)] == [0.5, 0.375, 0.125, 0.0]


def test_dense_towers_have_no_experts_to_measure(digits):
    model = build(run_of(digits, system="dense/softmax/alone-class"), digits)[0]
    found = {row.measure for row in experts.evaluate(model, TINY, digits, 0)}
    found = {measure for measure in found if "_fixed" not in measure and "_float" not in measure}
    assert found == {"class_loss", "class_accuracy", "class_flops", "parameters", "bytes"}


def test_only_softmax_has_a_form_in_fixed_point(digits):
    rows = {}
    for system in ("dense/softmax", "dense/sigmoid"):
        model = build(run_of(digits, system=system), digits)[0]
        rows[system] = {row.measure: row.value for row in experts.evaluate(model, TINY, digits, 0)}
    ours, none = (rows[system] for system in rows)
    assert not any("fixed" in measure for measure in none)
    assert ours["mask_fixed_patches_same"] > 0.99
    assert ours["mask_fixed_wrapped"] == 0
    assert ours["class_fixed_same"] <= 1
    assert ours["mask_float_accuracy"] == pytest.approx(ours["mask_accuracy"], abs=0.2)


# the one loop


def test_every_tower_sees_the_same_images_and_shares_what_it_can(digits):
    first, second = run_of(digits), run_of(digits, system="dense/linear/alone-mask")
    for step in range(3):
        ours, theirs = batch(first, digits, step), batch(second, digits, step)
        assert torch.equal(ours.images, theirs.images)
    ours, theirs = (dict(build(run, digits)[0].named_parameters()) for run in (first, second))
    shared = [n for n, p in theirs.items() if n in ours and p.ndim > 1]
    assert {"to_patches.weight", "heads.mask.weight", "places"} < {*shared}
    assert all(torch.equal(ours[n], theirs[n]) for n in shared)


def test_experts_and_gates_decay_as_matrices_do(digits):
    model, optimiser = build(run_of(digits), digits)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in g["params"]} for g in optimiser.param_groups)
    assert {f"blocks.1.feed.{n}" for n in ("w1", "w2", "router.gates")} < decayed
    assert {"places", "class_token", "blocks.1.feed.b1", "norm.weight"} < others
    assert decayed | others == {*names.values()}


def outcome(run, data, folder, *ways):
    """Rows and last checkpoint of a run that was stopped in these ways, then finished."""
    with open_store(folder, run) as store:
        for step in ways:
            asked = iter(range(step))
            proceed = lambda asked=asked: next(asked, None) is not None  # noqa: E731
            assert not train(run, data, store, folder / "runs", proceed)
        assert train(run, data, store, folder / "runs")
        return store.rows(run.id), load_file(folder / "runs" / run.id / "checkpoint.safetensors")


@pytest.mark.parametrize("system", ["experts/softmax", "wide/sigmoid/alone-mask"])
def test_resumed_is_uninterrupted_bit_for_bit(digits, tmp_path, monkeypatch, system):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    run = run_of(digits, dataclasses.replace(TINY, shift=1, mirror=True), system)
    straight = outcome(run, digits, tmp_path / "a")
    resumed = outcome(run, digits, tmp_path / "b", 2, 0, 3)
    assert resumed[0] == straight[0]
    assert resumed[1].keys() == straight[1].keys()
    for name, tensor in straight[1].items():
        assert torch.equal(resumed[1][name], tensor), name
    assert {row.measure for row in straight[0]} >= {"train_loss", "mask_iou", "parameters"}
    assert {row.length for row in straight[0]} == {5}


def test_it_learns(digits):
    work = dataclasses.replace(TINY, steps=60, batch=32)
    run = run_of(digits, work, learning_rate=1e-2)
    model, optimiser = build(run, digits)
    first = experts.tuning_loss(model, work, digits)
    for step in range(work.steps):
        loop.train_step(model, optimiser, batch(run, digits, step), run, step)
    model.eval()
    assert experts.tuning_loss(model, work, digits) < first - 0.2
    found = {row.measure: row.value for row in experts.evaluate(model, work, digits, 60)}
    assert found["mask_accuracy"] > 0.75
    assert found["mask_iou"] > 0.1


# the command and the report


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    work = dataclasses.replace(
        TINY,
        systems=("experts/softmax", "dense/linear/alone-mask"),
        seeds=(0, 1, 2),
        steps=2,
    )
    return compared_work(work, tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def results(comparison) -> Results:
    return latest_results(comparison[0])


def test_the_command_trains_measures_and_tells(comparison, results):
    out, said = comparison
    assert "scikit-learn's digits on its photographs, 8 x 8, 10 classes" in said
    for system in results.work.systems:
        assert re.search(rf"{system} +[\d–]", said)
        assert results.at(system, "parameters", 1).count == 3
        assert results.cost(system, "speed_ratio") is not None
    assert results.at("dense/linear/alone-mask", "class_accuracy", 1) is None
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "<h1>Do experts, gated by task, see as much as dense layers?</h1>" in text
    figures = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.S)
    assert [html.unescape(caption) for caption in figures] == [c for _, c in CAPTIONS.values()]
    for value in [*settings(results).values(), *results.verdicts()]:
        assert value in html.unescape(text)


def test_tables_hold_what_was_measured(results):
    found = tables(results)
    columns, rows = found[ANSWERS]
    assert columns == ["system", "class: right (%)", "mask: right (%)", "mask: IoU (%)"]
    assert [row[1].text == "–" for row in rows] == [False, True]
    _, counted = found[COUNTED]
    flops = results.at("dense/linear/alone-mask", "mask_flops", 1).mean
    assert counted[1][2].text == f"{flops / 1e6:.1f} ± 0.0"
    _, read = found[READ]
    assert [row[0].text for row in read] == ["softmax, experts"]
    assert terminal_table(results).row_count == 2


def test_figures_are_drawn_and_none_without_experts(results):
    figures = plots.draw(results)
    assert [*figures] == [*CAPTIONS]
    work = dataclasses.replace(results.work, systems=("dense/linear/alone-mask",))
    assert plots.experts_plots.use(dataclasses.replace(results, work=work)) is None
    plt.close("all")


def test_the_command_of_a_report_parses_back(monkeypatch):
    asked = dataclasses.replace(
        PRESETS["long"],
        systems=("wide/softmax/bare", "experts/cosine/alone-edges"),
        data=Path("a folder/with spaces"),
        questions=("edges", "class"),
        mirror=False,
        balance=0.0,
    )
    taken = []

    def stop(work, *_):
        taken.append(work)
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "compare", stop)
    assert preset_of(asked).startswith("long --task experts --systems wide/softmax/bare ")
    monkeypatch.setattr("sys.argv", ["aftermax", "compare", *shlex.split(preset_of(asked))])
    with pytest.raises(SystemExit):
        main()
    assert taken == [asked]


def test_a_trained_model_is_found_again(comparison):
    out, _ = comparison
    trained = find(out, system="experts/softmax")
    model, data = trained.model(), trained.data()
    assert isinstance(model, MultiTaskVisionTransformer)
    rows = {r.measure: r.value for r in experts.evaluate(model, trained.run.work, data, 4)}
    held = latest_results(out).seeds_of("experts/softmax", "mask_iou", 5)
    assert rows["mask_iou"] == held[trained.run.seed]


def verdicts(ours: list[float], theirs: list[float]) -> list[str]:
    systems = ("experts/softmax", "wide/softmax")
    values = {}
    for system, found, flops in zip(systems, (ours, theirs), (1e6, 3e6), strict=True):
        values[system, "mask_iou", 5] = dict(enumerate(found))
        for measure, value in {"mask_flops": flops, "parameters": 1.0}.items():
            values[system, measure, 5] = dict.fromkeys(range(3), value)
    work = dataclasses.replace(TINY, systems=systems, seeds=(0, 1, 2))
    return Results(work, "quick", {}, {}, values, {}, {}, {}).verdicts()


@pytest.mark.parametrize(
    ("difference", "word"),
    [
        ([0.02, 0.021, 0.019], "pass"),
        ([0.001, -0.001, 0.0], "reach"),
        ([-0.05, -0.051, -0.049], "stay more than a point behind"),
        ([-0.03, 0.03, 0.0], "may be within a point of"),
    ],
)
def test_a_point_is_told_by_the_seeds(difference, word):
    (said,) = verdicts([0.8 + d for d in difference], [0.8] * 3)
    assert said.startswith(f"mask: softmax, experts {word} softmax, dense, wide (")
    assert said.endswith("at 0.33 of its active FLOPs.")


def test_every_question_has_a_kind():
    assert set(DENSE) < set(QUESTIONS)
