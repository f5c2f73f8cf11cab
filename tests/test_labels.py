"""The task of labels: every output layer over every encoder, from the texts to the ranking."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from aftermax.lab import encoders, labels
from aftermax.lab.data.labelled import LabelledTexts
from aftermax.lab.labels_work import PRESETS, LabelsWork
from aftermax.lab.outputs import DUAL, LABEL_OUTPUTS, ONE_VS_ALL
from aftermax.lab.tasks import work_of
from aftermax.lab.train import batch, build, load, save, train, train_step
from aftermax.lab.work import Run

from .lab_work import open_store
from .label_set import THINGS, write_set

TINY = LabelsWork(
    width=16, hidden=0, batch=16, steps=60, word_dropout=0.1, dropout=0.0, samples=8,
    learning_rates=(2e-2,), factored_rate=1.0, k=2, temperature=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return dataclasses.replace(TINY, data=write_set(tmp_path_factory.mktemp("set") / "in"))


@pytest.fixture(scope="module")
def held(work, tmp_path_factory) -> LabelledTexts:
    return labels.prepare(work, tmp_path_factory.mktemp("prepared"))


def run_of(work, held, system="dual/decoupled", **changes) -> Run:
    given = {"seed": 0, "learning_rate": work.learning_rates[0], "kind": "train"} | changes
    return Run(work, system, data_digest=held.digest, **given)


def trained(run, held):
    model, optimiser = build(run, held)
    for step in range(run.steps):
        train_step(model, optimiser, batch(run, held, step), run, step)
    return model


@pytest.mark.parametrize("system", [output.name for output in LABEL_OUTPUTS])
def test_every_output_layer_learns(work, held, system):
    model = trained(run_of(work, held, system), held)
    rows = {row.measure: row.value for row in labels.evaluate(model, work, held, 60)}
    assert rows["P@1"] > (0.5 if system == "adaptive" else 0.85)  # 7 of its 8 classes are a tail
    assert rows["R@100"] == 1
    assert labels.tuning_loss(model, work, held) < 0.4
    dual = system.startswith("dual/")
    assert (rows["label_parameters"] == len(THINGS)) is dual


@pytest.mark.parametrize("system", ["softmax", "dual/soft-topk"])
def test_a_transformer_from_scratch_learns(work, held, system):
    work = dataclasses.replace(
        work, encoder="transformer", layers=1, heads=2, words=6, steps=120, learning_rates=(1e-2,)
    )
    model = trained(run_of(work, held, system), held)
    assert labels.ranked(model, held, "test")["P@1"] > 0.7


def test_a_transformer_reads_no_padding(held):
    torch.manual_seed(0)
    encode = encoders.TransformerEncoder(held.vocabulary, 16, 1, 2, dropout=0.9).eval()
    words = torch.tensor([[3, 1, 2]])
    whole = encode(words)
    padded = torch.tensor([[3, 1, 2, -1, -1], [-1] * 5])
    assert_close(encode(padded)[:1], whole)
    assert encode(padded)[1].abs().max() == 0
    assert (encode.train()(words.expand(9, 3)) != whole).any()


def test_a_bag_is_the_weighted_sum_of_its_words(held):
    reader, encode = encoders.BagReader(held), encoders.BagEncoder(held.vocabulary, 4, 0.5).eval()
    rows = torch.tensor([5, 0])
    words, weights = held.features(held.splits["train"].tokens.rows(rows))
    bag = reader.documents("train", rows)
    assert torch.equal(bag.words, words.values.long())
    assert_close(bag.weights, weights)
    for i, row in enumerate(encode(bag)):
        part = slice(words.offsets[i], words.offsets[i + 1])
        assert_close(row, weights[part] @ encode.embed[words.values[part].long()])


class Sentences:
    """A model of sentence-transformers as far as the lab knows it."""

    def encode(self, texts, **options):
        return torch.tensor([[float(thing in text) for thing in THINGS] for text in texts])


def test_a_sentence_encoder_is_asked_once_and_stays_as_it_is(work, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        encoders, "_sentence_transformer", lambda name: asked.append(name) or Sentences()
    )
    for encoder in ("some/model", "bag+some/model"):
        work = dataclasses.replace(work, encoder=encoder)
        held = labels.prepare(work, tmp_path)
        assert labels.prepare(work, tmp_path).digest == held.digest
        assert asked == ["some/model"]
        for system in ("bce", "dual/decoupled"):
            model = trained(run_of(work, held, system), held)
            assert labels.ranked(model, held, "test")["P@1"] > 0.9
            assert "what some/model makes of the text" in work.told


def test_what_is_no_encoder_is_told(work, tmp_path):
    with pytest.raises(ValueError, match=r"--encoder nothing.*bag and transformer|neither bag"):
        labels.prepare(dataclasses.replace(work, encoder="nothing"), tmp_path)


def test_negatives_of_the_batch_alone_learn_too(work, held):
    work = dataclasses.replace(work, negatives="batch")
    model = trained(run_of(work, held, "dual/decoupled"), held)
    assert labels.ranked(model, held, "test")["P@1"] > 0.85


@pytest.mark.parametrize("system", ["dual/decoupled-one", "z-loss", "sampled"])
def test_a_stopped_run_goes_on_to_the_same_numbers(work, held, tmp_path, system):
    run = run_of(work, held, system)
    whole = trained(run, held)
    model, optimiser = build(run, held)
    for step in range(23):
        train_step(model, optimiser, batch(run, held, step), run, step)
    save(tmp_path / "checkpoint.safetensors", model, optimiser, 23)
    model, optimiser = build(run, held)
    step = load(tmp_path / "checkpoint.safetensors", model, optimiser)
    assert step == 23
    for step in range(23, run.steps):
        train_step(model, optimiser, batch(run, held, step), run, step)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_loop_writes_what_the_report_reads(work, held, tmp_path):
    run = run_of(work, held, "dual/decoupled")
    with open_store(tmp_path, run) as store:
        assert train(run, held, store, tmp_path / "runs")
        measures = {row.measure for row in store.rows(run.id)}
    assert {"P@1", "P@3", "P@5", "PSP@1", "PSP@5", "nDCG@5", "R@10", "R@100"} <= measures
    assert {"parameters", "label_parameters", "train_loss"} <= measures


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"systems": ("lssa",)}, "no output 'lssa'; there are softmax, bce"),
        ({"encoder": "transformer", "width": 30}, "width / heads must be a whole even number"),
        ({"dropout": 1.0}, "dropout is a share below 1, got 1.0"),
        ({"temperature": 0.0}, "temperature is above 0, got 0.0"),
        ({"hidden": -1}, "hidden is 0 or more, got -1"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"least": -1}, "least is 0 or more, got -1"),
    ],
)
def test_a_work_that_cannot_be_is_told(changes, said):
    with pytest.raises(ValueError, match=said):
        LabelsWork(**changes)


def test_a_set_of_the_repository_stays_whole(held, work, tmp_path):
    assert held.about["dropped"]["labels"] == 0
    fewer = labels.prepare(dataclasses.replace(work, least=27), tmp_path)
    assert 0 < fewer.labels < held.labels
    assert f"{fewer.about['dropped']['labels']} rare labels left out" in labels.told(
        labels.about(fewer)
    )


def test_what_a_set_does_not_have_is_told_before_anything_is_trained(work, tmp_path):
    for given in ({"names": True}, {"labels": "dependencies"}):
        with pytest.raises(ValueError, match="--labels and --names are of Debian's packages"):
            labels.prepare(dataclasses.replace(work, **given), tmp_path)
    folder = tmp_path / "features"
    folder.mkdir()
    lines = [f"{i % 3} {i % 4}:1.0" for i in range(30)]
    for name in ("train.txt", "test.txt"):
        (folder / name).write_text("\n".join(["30 4 3", *lines]) + "\n")
    bare = dataclasses.replace(work, data=folder, systems=("bce", "dual/bce"))
    with pytest.raises(ValueError, match=r"no texts of its labels.*--systems bce takes it"):
        labels.prepare(bare, tmp_path / "out")
    read = dataclasses.replace(bare, systems=("bce",), encoder="transformer", heads=2)
    with pytest.raises(ValueError, match="bags of features"):
        labels.prepare(read, tmp_path / "out")
    features = labels.prepare(dataclasses.replace(bare, systems=("bce",)), tmp_path / "out")
    model = trained(run_of(dataclasses.replace(bare, systems=("bce",)), features, "bce"), features)
    assert labels.ranked(model, features, "test")["P@1"] > 0.3


def test_a_work_comes_back_from_its_settings():
    for work in PRESETS.values():
        assert work_of(work.settings()) == work
    assert {o.name for o in ONE_VS_ALL} & {o.name for o in DUAL} == set()


def test_labels_without_texts_have_no_dual_encoder(tmp_path):
    reader = encoders.VectorReader.__new__(encoders.VectorReader)
    reader.vectors = {}
    with pytest.raises(ValueError, match="these labels have no texts"):
        reader.labels()
