"""The vision task: a small vision transformer that tells images apart.

A batch is training images, moved a little; what is measured is the loss and the accuracy on a test
split that no run and no choice has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aftermax.lab.data.images import Images, Labelled
from aftermax.lab.data.images import prepare as prepare_images
from aftermax.lab.measure import TOKENS_AT_ONCE, sharpness
from aftermax.lab.models import VisionTransformer
from aftermax.lab.store import Row
from aftermax.lab.vision_work import VisionWork
from aftermax.lab.work import Run

MEMORY_BATCHES = 8
"""Batches of the step whose memory is measured."""


def prepare(work: VisionWork, out: Path) -> Images:
    return prepare_images(work.data, work.image_size, work.colours, work.split, out)


def open_data(folder: Path) -> Images:
    return Images.open(folder)


def about(images: Images) -> dict:
    counts = {split: len(held.labels) for split, held in images.splits.items()}
    shape = list(images.splits["train"].pixels.shape[1:])
    own = {"classes": len(images.classes), "repeated": images.repeated, "shape": shape}
    return {"name": images.name, "digest": images.digest, "images": counts, **own}


def told(about: dict) -> str:
    channels, side, _ = about["shape"]
    size = f"{side} x {side}, {'grey' if channels == 1 else 'rgb'}"
    counts = ", ".join(f"{n} {split}" for split, n in reversed(about["images"].items()))
    left_out = f"; {about['repeated']} repeated left out" if about["repeated"] else ""
    return f"images: {about['name']}, {size}, {about['classes']} classes ({counts}{left_out})"


def model(run: Run[VisionWork], images: Images) -> VisionTransformer:
    channels = images.splits["train"].pixels.shape[1]
    return VisionTransformer(run.work, run.arm, channels, len(images.classes), run.seed)


class Batch(NamedTuple):
    images: Tensor  # float32 (B, C, S, S), normed
    labels: Tensor  # int64 (B,)


def batch(run: Run[VisionWork], images: Images, generator: torch.Generator) -> Batch:
    pixels, labels = images.random_images(run.work.batch, run.work.shift, generator)
    return Batch(images.normed(pixels), labels)


def loss(model: VisionTransformer, data: Batch, run: Run[VisionWork]) -> tuple[Tensor, Tensor]:
    mean = F.cross_entropy(model(data.images).float(), data.labels)
    return mean, mean


def evaluate(model: VisionTransformer, work: VisionWork, images: Images, step: int) -> list[Row]:
    """Loss and accuracy on the test split, and on as many images that were trained on.

    Parameters are counted, since a system's own module for images may have more or fewer.
    """
    test, trained = images.splits["test"], images.splits["train"]
    some = torch.randperm(len(trained.labels), generator=torch.Generator().manual_seed(0))
    trained = Labelled(*(part[some[: len(test.labels)]] for part in trained))
    found = {}
    for prefix, held in (("", test), ("trained_", trained)):
        logits = _logits(model, work, images, held)
        found[f"{prefix}loss"] = F.cross_entropy(logits, held.labels).item()
        found[f"{prefix}accuracy"] = (logits.argmax(1) == held.labels).float().mean().item()
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    few = torch.linspace(0, len(test.labels) - 1, 64).long().unique()
    found |= sharpness(model, [images.normed(test.pixels[few])])
    found.pop("first_mass", None)  # the first patch is a corner like any other
    return [Row(step, work.context, measure, value) for measure, value in found.items()]


def tuning_loss(model: VisionTransformer, work: VisionWork, images: Images) -> float:
    held = images.splits["tune"]
    return F.cross_entropy(_logits(model, work, images, held), held.labels).item()


@torch.no_grad()
def _logits(model: VisionTransformer, work: VisionWork, images: Images, held: Labelled) -> Tensor:
    at_once = max(1, TOKENS_AT_ONCE // work.context)
    parts = held.pixels.split(at_once)
    return torch.cat([model(images.normed(part)).float() for part in parts])


def largest_step(
    run: Run[VisionWork], model: VisionTransformer, images: Images
) -> Callable[[], object]:
    """Of several batches at once: what one takes is held already since the step before."""
    generator = torch.Generator().manual_seed(0)
    pixels, labels = images.random_images(MEMORY_BATCHES * run.work.batch, 0, generator)
    data = Batch(images.normed(pixels), labels)
    return lambda: loss(model, data, run)[0].backward()
