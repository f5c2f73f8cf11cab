"""The task of words: the stream, the network, every output layer, the errors at k guesses."""

import dataclasses

import pytest
import torch

from aftermax.lab import heads, words
from aftermax.lab.data.sources import Document
from aftermax.lab.data.words import END, UNKNOWN, Words, _split
from aftermax.lab.outputs import WORD_OUTPUTS
from aftermax.lab.tasks import work_of
from aftermax.lab.train import batch, build, load, make_optimiser, save, train, train_step
from aftermax.lab.words_work import PRESETS, TOP, WordsWork
from aftermax.lab.work import Run
from aftermax.losses import ZScoreLoss

from .lab_work import open_store, write_texts

TINY = WordsWork(
    embedding=8, hidden=32, width=32, batch=16, steps=150, samples=16, scored=200, window=3,
    learning_rates=(0.5,),
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return dataclasses.replace(TINY, data=write_texts(tmp_path_factory.mktemp("texts") / "in"))


@pytest.fixture(scope="module")
def held(work, tmp_path_factory) -> Words:
    return words.prepare(work, tmp_path_factory.mktemp("prepared"))


def run_of(work, held, system="softmax", **changes) -> Run:
    given = {"seed": 0, "learning_rate": work.learning_rates[0], "kind": "train"} | changes
    return Run(work, system, data_digest=held.digest, **given)


def trained(run, held, steps=None):
    model, optimiser = build(run, held)
    for step in range(steps or run.steps):
        train_step(model, optimiser, batch(run, held, step), run, step)
    return model


def test_ids_are_ranks_in_frequency(held):
    counts = held.counts.tolist()
    assert counts == sorted(counts, reverse=True)
    stream = held.streams["train"].long()
    assert torch.equal(stream.bincount(minlength=len(counts)), held.counts)
    assert {END, UNKNOWN} < set(held.vocabulary)
    assert sum(len(s) for s in held.streams.values()) > 1500


def test_words_that_are_rare_in_training_are_unknown(work, tmp_path):
    texts = tmp_path / "in"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"the same words, and Once{i} alone. " * (1 + i % 2))
    held = words.prepare(dataclasses.replace(work, data=texts, least=3), tmp_path / "out")
    assert not any("once" in word for word in held.vocabulary)
    assert held.counts[held.unknown] > 20
    targets = held.random_windows(500, 4, torch.Generator().manual_seed(0))[:, -1]
    assert (targets != held.unknown).all()
    assert (held.held_out_windows("validation", 50, 4)[:, -1] != held.unknown).all()


def test_the_same_text_stands_in_one_split():
    documents = [Document(str(i), f"text {i % 7}".encode()) for i in range(70)]
    splits = _split(documents)
    texts = [{d.text for d in parts} for parts in splits.values()]
    assert sum(map(len, splits.values())) == 7
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]


def test_a_text_that_is_too_short_is_told(work, tmp_path):
    (tmp_path / "short.txt").write_text("three short words")
    with pytest.raises(ValueError, match=r"short.txt is too short: its \w+ part has \d words"):
        words.prepare(dataclasses.replace(work, data=tmp_path / "short.txt"), tmp_path / "out")


@pytest.mark.parametrize("traits", ["", "/adamw"])
@pytest.mark.parametrize("system", [output.name for output in WORD_OUTPUTS])
def test_every_output_layer_learns(work, held, system, traits):
    system += traits
    if traits:
        work = dataclasses.replace(work, learning_rates=(10.0,), factored_rate=0.05)
    run = run_of(work, held, system)
    before = words.tuning_loss(build(run, held)[0], work, held)
    model = trained(run, held)
    assert words.tuning_loss(model, work, held) < before - 0.05
    rows = {row.measure: row.value for row in words.evaluate(model, work, held, 150)}
    errors = [rows[f"top{k}_error"] for k in TOP]
    assert errors == sorted(errors, reverse=True)
    assert rows["parameters"] == heads.parameters(model) > 1000


def test_errors_count_the_words_that_are_missing(work, held):
    """A head that always ranks 0, 1, 2... finds a word at its own id."""
    model, _ = build(run_of(work, held), held)
    model.head.ranker = lambda k: lambda hidden: torch.arange(k).expand(len(hidden), k)
    windows = held.held_out_windows("validation", work.scored, work.window + 1)
    for k, error in words.top_errors(model, work, held, "validation").items():
        assert error == pytest.approx((windows[:, -1] >= k).float().mean().item())


def test_adamw_has_a_thousandth_of_the_rate_and_dense_gradients(work, held):
    run = run_of(work, held, "softmax/adamw", learning_rate=2.0)
    model, optimiser = build(run, held)
    train_step(model, optimiser, batch(run, held, 0), run, run.steps // 2)
    assert isinstance(optimiser, torch.optim.AdamW)
    assert 1e-3 < optimiser.param_groups[0]["lr"] < 2e-3
    assert not model.embed.weight.grad.is_sparse
    plain, sgd = build(run_of(work, held), held)
    train_step(plain, sgd, batch(run, held, 0), run_of(work, held), 5)
    assert isinstance(sgd, torch.optim.SGD)
    assert plain.embed.weight.grad.is_sparse


def test_a_name_may_have_the_numbers_of_the_loss(work, held):
    model, _ = build(run_of(work, held, "z-loss/0.3/8"), held)
    assert model.head.layer.loss == ZScoreLoss(0.3, 8.0)
    assert work.arm("z-loss/0.3/8").title == "Z-loss (factored) · a = 0.3, b = 8"
    assert work.arm("z-loss/1/5/adamw").title == "Z-loss (factored) · a = 1, b = 5 · AdamW"


def test_the_factored_layer_steps_with_the_optimiser(work, held):
    run = run_of(work, held, "z-loss")
    model, optimiser = build(run, held)
    before = model.head.layer.logits(torch.eye(work.width)).clone()
    step = batch(run, held, 0)
    words.loss(model, step, run)[0].backward()
    optimiser.step()
    assert (model.head.layer.logits(torch.eye(work.width)) != before).any()
    assert make_optimiser(model, run) is not optimiser


def test_a_factored_layer_decays_with_adamw(work, held):
    norms = []
    for decay in (0.0, 10.0):
        changed = dataclasses.replace(
            work, systems=("z-loss/adamw",), weight_decay=decay, factored_rate=1e-6
        )
        run = run_of(changed, held, "z-loss/adamw", learning_rate=10.0)
        model, optimiser = build(run, held)
        before = model.head.layer.weight.norm()
        train_step(model, optimiser, batch(run, held, 0), run, 20)
        norms.append((model.head.layer.weight.norm() / before).item())
    assert norms[0] == pytest.approx(1, abs=1e-4)
    assert norms[1] == pytest.approx(1 - optimiser.param_groups[0]["lr"] * 10.0, abs=1e-4)


@pytest.mark.parametrize("system", ["softmax", "softmax/adamw", "sampled", "z-loss"])
def test_a_stopped_run_goes_on_to_the_same_numbers(work, held, tmp_path, system):
    work = dataclasses.replace(work, steps=30)
    run = run_of(work, held, system)
    whole = trained(run, held)
    model, optimiser = build(run, held)
    for step in range(11):
        train_step(model, optimiser, batch(run, held, step), run, step)
    save(tmp_path / "checkpoint.safetensors", model, optimiser, 11)
    model, optimiser = build(run, held)
    for step in range(load(tmp_path / "checkpoint.safetensors", model, optimiser), run.steps):
        train_step(model, optimiser, batch(run, held, step), run, step)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_loop_writes_what_the_report_reads(work, held, tmp_path):
    run = run_of(dataclasses.replace(work, steps=20), held, "sampled")
    with open_store(tmp_path, run) as store:
        assert train(run, held, store, tmp_path / "runs")
        measures = {row.measure for row in store.rows(run.id)}
    assert {f"top{k}_error" for k in TOP} | {"parameters", "train_loss"} <= measures


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"systems": ("rela",)}, "no output 'rela'; there are softmax, adaptive"),
        ({"systems": ("sampled/1/2",)}, "sampled/1/2: an output layer may have the trait adamw"),
        ({"systems": ("softmax/sgd",)}, "softmax/sgd: an output layer may have the trait adamw"),
        ({"systems": ("z-loss/x/1",)}, "z-loss/x/1: a and b are numbers, as in z-loss/0.1/30"),
        ({"systems": ("z-loss/0/1",)}, "z-loss/0/1: a is above 0"),
        ({"a": 0.0}, "a is above 0, got 0.0"),
        ({"weight_decay": 0.1}, "weight_decay is AdamW's; softmax, adaptive"),
        ({"window": 0}, "window must be at least 1, got 0"),
    ],
)
def test_a_work_that_cannot_be_is_told(changes, said):
    with pytest.raises(ValueError, match=said):
        WordsWork(**changes)


def test_a_work_comes_back_from_its_settings():
    for work in PRESETS.values():
        assert work_of(work.settings()) == work
