"""The vision task: images and their splits, the transformer, the loop over both, the command."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from aftermax.catalogue import CATALOGUE, find
from aftermax.entry import Entry
from aftermax.lab import models, vision
from aftermax.lab import train as loop
from aftermax.lab import work as works
from aftermax.lab.data import images as source
from aftermax.lab.data.images import SPLITS
from aftermax.lab.models import VisionTransformer
from aftermax.lab.tasks import PRESETS, work_of
from aftermax.lab.train import batch, build, load, save, train
from aftermax.lab.vision_work import VisionWork
from aftermax.lab.work import Run, Work, arm

from .lab_work import open_store

TINY = VisionWork(systems=("softmax",), patch=2, layers=1, width=16, heads=2, steps=6, batch=8)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The digits."""
    return vision.prepare(TINY, tmp_path_factory.mktemp("digits"))


def run_of(images, work=TINY, system="softmax", **changes) -> Run:
    settings = {"seed": 0, "learning_rate": 3e-3, "kind": "train"} | changes
    return Run(work, system, data_digest=images.digest, **settings)


def model_of(system="softmax", **changes) -> VisionTransformer:
    work = dataclasses.replace(TINY, **changes)
    return VisionTransformer(work, arm(system, work), channels=1, classes=10, seed=0)


# images and their splits


def test_the_digits_are_split_class_by_class(images):
    everything = sum(len(held.labels) for held in images.splits.values())
    assert everything == 1797
    for split, share in SPLITS.items():
        pixels, labels = images.splits[split]
        assert pixels.shape == (len(labels), 1, 8, 8)
        assert pixels.dtype == torch.uint8
        for label in range(10):
            whole = sum((held.labels == label).sum().item() for held in images.splits.values())
            assert (labels == label).sum().item() == pytest.approx(share * whole, abs=1)


def test_no_image_is_in_two_splits(images):
    seen = [{image.numpy().tobytes() for image in held.pixels} for held in images.splits.values()]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 1797


def test_the_split_hangs_on_its_seed_alone(images, tmp_path):
    again, other = (
        vision.prepare(dataclasses.replace(TINY, split=split, seeds=(5,)), tmp_path)
        for split in (0, 1)
    )
    assert again.digest == images.digest != other.digest
    for split in SPLITS:
        assert torch.equal(again.splits[split].pixels, images.splits[split].pixels)
    assert not torch.equal(other.splits["test"].pixels, images.splits["test"].pixels)


def test_pixels_are_normed_by_the_training_split_alone(images):
    normed = images.normed(images.splits["train"].pixels)
    assert normed.mean().item() == pytest.approx(0, abs=1e-5)
    assert normed.std().item() == pytest.approx(1, abs=1e-4)


def test_images_move_by_whole_pixels_and_black_comes_in(images):
    generator = torch.Generator().manual_seed(3)
    still, _ = images.random_images(50, 0, generator)
    known = {image.numpy().tobytes() for image in images.splits["train"].pixels}
    assert all(image.numpy().tobytes() in known for image in still)
    moved, labels = images.random_images(50, 2, generator)
    assert moved.shape == (50, 1, 8, 8)
    pixels, all_labels = images.splits["train"]
    wide = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    for image, label in zip(moved, labels, strict=True):
        alike = [
            (wide[:, :, y : y + 8, x : x + 8] == image).flatten(1).all(1)
            for y in range(5)
            for x in range(5)
        ]
        assert label in all_labels[torch.stack(alike).any(0)]


def write_images(folder: Path, counts: dict[str, int], mode: str = "RGB") -> Path:
    """Noise, darker in one class than in the next; a file that is no image beside it."""
    chance = np.random.default_rng(0)
    for place, (name, count) in enumerate(counts.items()):
        (folder / name / "deeper").mkdir(parents=True)
        (folder / name / "notes.txt").write_text("no image")
        for i in range(count):
            noise = chance.integers(80 * place, 80 * place + 80, (20, 30, 3), dtype=np.uint8)
            where = folder / name / ("deeper" if i % 2 else "")
            Image.fromarray(noise).convert(mode).save(where / f"{i}.png")
    return folder


@pytest.mark.parametrize(("colours", "channels"), [("grey", 1), ("rgb", 3)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_a_folder_of_images(tmp_path, mode, colours, channels):
    folder = write_images(tmp_path / "in", {"dark": 6, "light": 5}, mode)
    work = dataclasses.replace(TINY, data=folder, image_size=12, colours=colours, patch=4)
    found = vision.prepare(work, tmp_path / "out")
    assert found.classes == ("dark", "light")
    assert sum(len(held.labels) for held in found.splits.values()) == 11
    for held in found.splits.values():
        assert held.pixels.shape[1:] == (channels, 12, 12)
        brightness = held.pixels.float().mean((1, 2, 3))
        assert torch.equal((brightness > 80).long(), held.labels)
    assert vision.prepare(work, tmp_path / "out").digest == found.digest
    assert [path.name for path in (tmp_path / "out").iterdir()] == [found.digest]
    logits = vision.model(run_of(found, work), found)(found.normed(found.splits["test"].pixels))
    assert logits.shape == (len(found.splits["test"].labels), 2)


def test_an_image_that_is_there_twice_is_taken_once(tmp_path):
    folder = write_images(tmp_path / "in", {"dark": 6, "light": 5})
    for i in range(4):
        Image.open(folder / "dark" / "0.png").save(folder / "dark" / f"again{i}.png")
    found = vision.prepare(dataclasses.replace(TINY, data=folder), tmp_path / "out")
    assert found.repeated == 4
    assert "4 repeated left out" in vision.told(vision.about(found))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"one": 5}, r"has images of 1 classes; it needs two or more folders"),
        ({}, r"has images of 0 classes"),
        ({"one": 5, "two": 2}, r"class two has 2 different images; it needs 3 or more"),
    ],
)
def test_images_that_cannot_be_split_are_refused(tmp_path, counts, message):
    folder = tmp_path / "in"
    folder.mkdir()
    write_images(folder, counts)
    with pytest.raises(ValueError, match=message):
        vision.prepare(dataclasses.replace(TINY, data=folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_is_not_there_or_broken_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data .*nowhere: there is no such folder"):
        vision.prepare(dataclasses.replace(TINY, data=tmp_path / "nowhere"), tmp_path)
    folder = write_images(tmp_path / "in", {"dark": 4, "light": 4})
    whole = (folder / "dark" / "0.png").read_bytes()
    (folder / "dark" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"--data: .*dark.0.png cannot be read"):
        vision.prepare(dataclasses.replace(TINY, data=folder), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is a file"):
        vision.prepare(dataclasses.replace(TINY, data=folder / "dark" / "2.png"), tmp_path)


@pytest.mark.parametrize("changes", [{"image_size": 16}, {"colours": "rgb"}])
def test_the_digits_are_what_they_are(tmp_path, changes):
    with pytest.raises(ValueError, match="scikit-learn's digits are 8 x 8 and grey, got"):
        vision.prepare(dataclasses.replace(TINY, **changes), tmp_path)


# the work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "patch must divide image_size, got 3 and 8"),
        ({"patch": 0}, "patch must be at least 1, got 0"),
        ({"patch": 8}, "leaves nothing to attend"),
        ({"shift": 8}, "shift is 0 or more pixels and less than image_size, got 8"),
        ({"systems": ("softmax/alibi",)}, "softmax/alibi: no trait alibi; there are bare, hybrid"),
        ({"systems": ()}, "systems must not be empty"),
        ({"width": 15}, "width / heads must be a whole even number, got 15 / 2"),
        ({"seeds": (1, 1)}, "one of the seeds stands twice"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_settings_give_the_work_back():
    work = dataclasses.replace(TINY, data=Path("a/b"), seeds=(1, 2))
    settings = work.settings()
    assert settings["task"] == "vision"
    assert work_of(settings | {"seeds": [1, 2]}) == work
    assert work_of(Work().settings()) == Work()  # text says nothing of tasks


def test_every_preset_is_of_its_task():
    for task, presets in PRESETS.items():
        trained = ["quick", "standard", "long"]
        assert list(presets) == (["quick", "full"] if task == "rates" else trained)
        assert {work.task for work in presets.values()} == {task}


def test_names_of_runs_know_the_images_and_the_task(images):
    run = run_of(images)
    assert run.id == run_of(images, dataclasses.replace(TINY, data=Path("elsewhere"))).id
    for changes in ({"patch": 4}, {"shift": 1}, {"steps": 7}):
        assert run.id != run_of(images, dataclasses.replace(TINY, **changes)).id


def not_causal(module=None) -> Entry:
    return dataclasses.replace(find("softmax"), name="whole", causal=False, image_module=module)


def test_a_system_without_a_causal_form_is_for_images_alone(monkeypatch):
    monkeypatch.setattr(works, "find", lambda name: not_causal())
    assert arm("whole", TINY).name == "whole"
    with pytest.raises(ValueError, match="whole has no causal form, which text needs"):
        arm("whole", Work())


# the transformer


def test_a_patch_is_a_square_of_the_image_in_reading_order():
    model = model_of(patch=4)
    torch.nn.init.zeros_(model.places)
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 1, 6] = 1.0  # row 1, column 2 of the second patch
    expected = torch.zeros(1, 4, 16)
    expected[0, 1] = model.to_patches.weight[:, 1 * 4 + 2]
    assert_close(model.embed(image), expected)


@pytest.mark.parametrize("system", ["softmax", "sigmoid/hybrid/layerscale", "lssar", "cosine"])
@torch.no_grad()
def test_every_patch_sees_every_other(system):
    model, generator = model_of(system), torch.Generator().manual_seed(1)
    images = torch.randn(3, 1, 8, 8, generator=generator)
    assert model(images).shape == (3, 10)
    x = model.embed(images)
    attend = model.blocks[0][0].layer
    before = attend(x)
    x[:, -1] += 1
    assert ((attend(x) - before)[:, 0].abs() > 0).any()


def test_a_system_with_a_module_for_images_gets_the_grid(monkeypatch):
    asked = []

    class Own(torch.nn.Linear):
        def __init__(self, width, *, heads, grid):
            asked.append((width, heads, grid))
            super().__init__(width, width)

    monkeypatch.setattr(works, "find", lambda name: not_causal(Own))
    model = model_of("whole", patch=2)
    assert asked == [(16, 2, (4, 4))]
    assert isinstance(model.blocks[0][0].layer, Own)


@pytest.mark.parametrize("system", [entry.name for entry in CATALOGUE])
def test_every_system_learns_from_images_and_starts_from_the_same_weights(images, system):
    """Of the catalogue, its own modules for images among them."""
    run = run_of(images, system=system)
    model, optimiser = build(run, images)
    softmax = dict(build(run_of(images), images)[0].named_parameters())
    own = "blocks.0.0.layer" if find(system).image_module else "learned"
    shared = {n: p for n, p in model.named_parameters() if n in softmax and own not in n}
    assert len(shared) >= 8
    for name, parameter in shared.items():
        assert torch.equal(parameter, softmax[name]), name
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        loss = loop.train_step(model, optimiser, batch(run, images, step), run, step)
    assert torch.isfinite(loss)
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    if system == "sparsek":  # whose 16 best and 16 nearest are all the patches: nothing to score
        still = [n for n in still if "score_" not in n]
    assert still == [], "what is never moved is no part of the model"


def test_another_seed_gives_other_weights(images):
    first, second = (build(run_of(images, seed=seed), images)[0] for seed in (0, 1))
    assert not torch.equal(first.places, second.places)


def test_places_and_vectors_do_not_decay(images):
    model, optimiser = build(run_of(images), images)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in optimiser.param_groups[0]["params"]}
    assert "places" not in decayed
    assert {"to_patches.weight", "head.weight"} < decayed


# the one loop


def test_every_system_sees_the_same_images_in_the_same_order(images):
    runs = [run_of(images, system=s, learning_rate=r) for s, r in (("softmax", 1), ("lssar", 2))]
    for step in range(3):
        ours, theirs = (batch(run, images, step) for run in runs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(batch(runs[0], images, 0).images, batch(runs[0], images, 1).images)


def outcome(run, images, folder, *ways):
    """Rows and last checkpoint of a run that was stopped in these ways, then finished."""
    with open_store(folder, run) as store:
        for step in ways:
            asked = iter(range(step))
            proceed = lambda asked=asked: next(asked, None) is not None  # noqa: E731
            assert not train(run, images, store, folder / "runs", proceed)
        assert train(run, images, store, folder / "runs")
        return store.rows(run.id), load_file(folder / "runs" / run.id / "checkpoint.safetensors")


@pytest.mark.parametrize("system", ["softmax", "rela/hybrid"])
def test_resumed_is_uninterrupted_bit_for_bit(images, tmp_path, monkeypatch, system):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    run = run_of(images, dataclasses.replace(TINY, shift=1), system)
    straight = outcome(run, images, tmp_path / "a")
    resumed = outcome(run, images, tmp_path / "b", 2, 0, 3)
    assert resumed[0] == straight[0]
    assert resumed[1].keys() == straight[1].keys()
    for name, tensor in straight[1].items():
        assert torch.equal(resumed[1][name], tensor), name
    measures = {row.measure for row in straight[0]}
    assert measures >= {"train_loss", "loss", "accuracy", "trained_loss", "trained_accuracy"}
    assert {row.length for row in straight[0]} == {16}


def test_a_checkpoint_holds_buffers_too(images, tmp_path, monkeypatch):
    """Of systems whose own module has running means."""

    class Own(torch.nn.Module):
        def __init__(self, width, *, heads, grid):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(width)

        def forward(self, x):
            return self.norm(x.mT).mT

    monkeypatch.setattr(works, "find", lambda name: not_causal(Own))
    run = run_of(images, system="whole")
    model, optimiser = build(run, images)
    loop.train_step(model, optimiser, batch(run, images, 0), run, 0)
    save(tmp_path / "c.safetensors", model, optimiser, 1)
    other, its_optimiser = build(run, images)
    assert load(tmp_path / "c.safetensors", other, its_optimiser) == 1
    ours, theirs = model.state_dict(), other.state_dict()
    assert "blocks.0.0.layer.norm.running_mean" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_learns_and_what_is_measured_is_right(images):
    work = dataclasses.replace(TINY, width=32, steps=60, batch=32)
    run = run_of(images, work, learning_rate=5e-3)
    model, optimiser = build(run, images)
    for step in range(work.steps):
        loop.train_step(model, optimiser, batch(run, images, step), run, step)
    model.eval()
    found = {row.measure: row.value for row in vision.evaluate(model, work, images, 60)}
    test, tune = images.splits["test"], images.splits["tune"]
    with torch.no_grad():
        right = model(images.normed(test.pixels)).argmax(1) == test.labels
        chances = model(images.normed(tune.pixels)).log_softmax(1)
    assert found["accuracy"] == pytest.approx(right.float().mean().item())
    assert found["accuracy"] > 0.4  # ten classes
    assert found["loss"] < 1.8
    assert 1 < found["effective_keys"] <= 16
    by_hand = -chances.gather(1, tune.labels[:, None]).mean().item()
    assert vision.tuning_loss(model, work, images) == pytest.approx(by_hand, rel=1e-5)


def test_the_initial_loss_is_that_of_knowing_nothing(images):
    run = run_of(images)
    loss, _ = vision.loss(build(run, images)[0], batch(run, images, 0), run)
    assert loss.item() == pytest.approx(np.log(10), abs=0.05)


def test_weights_of_a_module_that_is_no_row_map_are_not_looked_at(images, monkeypatch):
    monkeypatch.setattr(
        models, "image_attention", lambda work, arm, layer: torch.nn.Linear(work.width, work.width)
    )
    found = vision.evaluate(vision.model(run_of(images), images), TINY, images, 0)
    assert {row.measure for row in found} == {
        "loss", "accuracy", "trained_loss", "trained_accuracy", "parameters",
    }  # fmt: skip


def test_without_scikit_learn_the_digits_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'aftermax[lab]'")):
        source._digits(8, "grey")
