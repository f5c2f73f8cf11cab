"""Labelled images -> three splits on disk, pixels as bytes, each class in each split."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aftermax.lab.data.folder import write_once

SPLITS = {"test": 0.25, "tune": 0.15, "train": 0.6}
"""Shares of each class: what is reported, what the learning rate is chosen by, what is learned."""


class Labelled(NamedTuple):
    pixels: Tensor  # uint8 (N, C, S, S)
    labels: Tensor  # int64 (N,)


@dataclass(frozen=True, eq=False)
class Images:
    """A prepared set of images, from its folder."""

    folder: Path
    name: str
    digest: str
    classes: tuple[str, ...]
    repeated: int
    """Images that were left out since the same pixels were there already."""
    mean: Tensor  # (C, 1, 1), of the pixels of the training split
    sd: Tensor  # (C, 1, 1)
    splits: dict[str, Labelled]

    @classmethod
    def open(cls, folder: Path) -> Images:
        meta = json.loads((folder / "meta.json").read_text())
        held = load_file(folder / "images.safetensors")
        splits = {s: Labelled(held[f"{s}.pixels"], held[f"{s}.labels"]) for s in SPLITS}
        pixels = splits["train"].pixels.double()
        return cls(
            folder,
            meta["name"],
            meta["digest"],
            tuple(meta["classes"]),
            meta["repeated"],
            pixels.mean((0, 2, 3)).float()[:, None, None],
            pixels.std((0, 2, 3)).clamp_min(1e-3).float()[:, None, None],
            splits,
        )

    def normed(self, pixels: Tensor) -> Tensor:
        """As the model takes them: mean 0 and deviation 1 over the training split."""
        return (pixels.float() - self.mean) / self.sd

    def random_images(self, count: int, shift: int, generator: torch.Generator) -> Labelled:
        """Of the training split, each moved by up to `shift` pixels, with black from the edge."""
        pixels, labels = self.splits["train"]
        chosen = torch.randint(0, len(labels), (count,), generator=generator)
        moved = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
        padded = torch.nn.functional.pad(pixels[chosen], (shift,) * 4)
        rows, columns = moved + torch.arange(pixels.shape[-1])  # (count, S) each
        image = torch.arange(count)[:, None, None]
        taken = padded[image, :, rows[:, :, None], columns[:, None, :]]  # (count, S, S, C)
        return Labelled(taken.permute(0, 3, 1, 2), labels[chosen])


def prepare(
    data: Path | None, size: int, colours: Literal["grey", "rgb"], split: int, out: Path
) -> Images:
    """Read and split once; a later call with the same images opens what is there.

    Args:
        data, size, colours, split: as `data`, `image_size`, `colours` and `split` of `VisionWork`.
        out: folder of all data; this one gets a folder named by its digest.

    Raises:
        ValueError, OSError: before anything is kept, saying what is wrong with the data.
    """
    classes, pixels, labels = _digits(size, colours) if data is None else _read(data, size, colours)
    pixels, labels, repeated = _without_repeats(pixels, labels)
    digest = _digest(classes, pixels, labels, split)
    folder = out / digest
    if not folder.exists():
        parts = split_by_class(torch.from_numpy(labels), classes, split)
        tensors = {}
        for name, places in parts.items():
            tensors[f"{name}.pixels"] = torch.from_numpy(pixels)[places]
            tensors[f"{name}.labels"] = torch.from_numpy(labels)[places]
        meta = {
            "name": "scikit-learn's digits" if data is None else str(data),
            "digest": digest,
            "classes": classes,
            "repeated": repeated,
        }

        def write(scratch: Path) -> None:
            save_file(tensors, scratch / "images.safetensors")
            (scratch / "meta.json").write_text(json.dumps(meta, indent=2))

        write_once(folder, write)
    return Images.open(folder)


def split_by_class(labels: Tensor, classes: list[str], seed: int) -> dict[str, Tensor]:
    """Places of each split, rising: of each class the same share, chosen at random by the seed."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {split: [] for split in SPLITS}
    for label, name in enumerate(classes):
        members = (labels == label).nonzero()[:, 0]
        if len(members) < len(SPLITS):
            raise ValueError(
                f"class {name} has {len(members)} different images; it needs {len(SPLITS)} or more,"
                " one for each of test, tune and train"
            )
        members = members[torch.randperm(len(members), generator=generator)]
        held_out = [max(1, round(share * len(members))) for share in list(SPLITS.values())[:-1]]
        sizes = [*held_out, len(members) - sum(held_out)]
        for split, part in zip(SPLITS, members.split(sizes), strict=True):
            parts[split].append(part)
    return {split: torch.cat(places).sort().values for split, places in parts.items()}


def _digits(size: int, colours: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Handwritten digits, 8 x 8, from scikit-learn: the test set of UCI's optical digits."""
    if size != 8 or colours != "grey":
        raise ValueError(
            f"scikit-learn's digits are 8 x 8 and grey, got --image-size {size} --colours {colours}"
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            f"the digits come with scikit-learn: pip install 'aftermax[lab]' ({error})"
        ) from None
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 1, 8, 8) * 15).astype(np.uint8)  # 0 to 16 -> 0 to 240
    return [str(digit) for digit in range(10)], pixels, labels.astype(np.int64)


def _read(data: Path, size: int, colours: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """A folder with one folder of images for each class; what is no image is passed over."""
    if not data.is_dir():
        problem = "is a file" if data.exists() else "there is no such folder"
        raise FileNotFoundError(f"--data {data}: {problem}; give a folder with one for each class")
    folders = sorted(p for p in data.iterdir() if p.is_dir() and not p.name.startswith("."))
    pixels, labels, classes = [], [], []
    for folder in folders:
        found = [_pixels(path, size, colours) for path in sorted(folder.rglob("*"))]
        found = [image for image in found if image is not None]
        if found:
            labels += [len(classes)] * len(found)
            classes.append(folder.name)
            pixels += found
    if len(classes) < 2:
        raise ValueError(
            f"--data {data} has images of {len(classes)} classes; it needs two or more folders, "
            "each with the images of its class"
        )
    return classes, np.stack(pixels), np.array(labels, np.int64)


def _pixels(path: Path, size: int, colours: str) -> np.ndarray | None:
    """uint8 (C, S, S); None for what is no image."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            if image.mode in ("P", "PA"):  # a palette may hold transparency
                image = image.convert("RGBA")
            image = ImageOps.exif_transpose(image).convert("L" if colours == "grey" else "RGB")
            image = image.resize((size, size), Image.Resampling.BILINEAR)
            pixels = np.asarray(image, np.uint8)
    except UnidentifiedImageError:
        return None
    except OSError as error:
        raise OSError(f"--data: {path} cannot be read: {error}") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _without_repeats(pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The first of each image: one that is in two splits would be learned by heart."""
    first: dict[bytes, int] = {}
    for place, image in enumerate(pixels):
        first.setdefault(image.tobytes(), place)
    kept = list(first.values())
    return np.ascontiguousarray(pixels[kept]), labels[kept], len(pixels) - len(kept)


def _digest(classes: list[str], pixels: np.ndarray, labels: np.ndarray, split: int) -> str:
    content = hashlib.sha256(f"1 {classes} {pixels.shape} {split} {SPLITS}".encode())
    content.update(pixels.tobytes())
    content.update(labels.tobytes())
    return content.hexdigest()[:12]
