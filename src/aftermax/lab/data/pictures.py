"""Pictures with an outline, laid on photographs: one image, several questions.

What is asked of an image::

    class     what kind of picture it is
    colour    which colour most of the picture has
    mask      which pixels are the picture's
    edges     where the image as a whole changes

Pictures are scikit-learn's digits, icons of Debian's packages, or a folder of the reader's. What
they are laid on is a piece of scikit-learn's two photographs, drawn anew at every step of training;
the test has parts of the photographs that training never shows. Pictures without transparency stay
as they are, and have no mask to ask for.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from aftermax.lab.data import icons
from aftermax.lab.data.folder import write_once

SPLITS = {"test": 0.25, "tune": 0.15, "train": 0.6}
"""Shares of the families of each class."""

STRIPS = {"train": (0.0, 0.56), "tune": (0.56, 0.78), "test": (0.78, 1.0)}
"""Columns of the photographs that each split's pieces are from."""

COLOURS = ("black", "grey", "white", "red", "yellow", "green", "cyan", "blue", "magenta")

EDGE = 0.1
"""Size of the gradient (Sobel's, for a step of 1 at most 1/2) from which a pixel is an edge."""

LEAST = 40
"""Families below which a context of icons is left out."""

QUESTIONS = ("class", "colour", "mask", "edges")
DENSE = ("mask", "edges")


class Asked(NamedTuple):
    """Images and the answers."""

    images: Tensor  # float32 (B, 3, S, S), from 0 to 1
    answers: dict[str, Tensor]  # int64 (B,), or float32 (B, S, S) of zeros and ones


@dataclass(frozen=True)
class Split:
    pixels: Tensor  # uint8 (N, 4, S, S): red, green, blue, alpha
    labels: Tensor  # int64 (N,)
    colours: Tensor  # int64 (N,)
    backs: tuple[Tensor, ...]  # uint8 (3, h, w) each


@dataclass(frozen=True, eq=False)
class Pictures:
    """A prepared set, from its folder."""

    folder: Path
    meta: dict
    splits: dict[str, Split]

    @classmethod
    def open(cls, folder: Path) -> Pictures:
        held = load_file(folder / "pictures.safetensors")
        splits = {}
        for name in SPLITS:
            pixels, labels, colours = (held[f"{name}.{k}"] for k in ("pixels", "labels", "colours"))
            backs = tuple(held[key] for key in sorted(held) if key.startswith(f"{name}.back"))
            splits[name] = Split(pixels, labels, colours, backs)
        return cls(folder, json.loads((folder / "meta.json").read_text()), splits)

    @property
    def name(self) -> str:
        return self.meta["name"]

    @property
    def digest(self) -> str:
        return self.meta["digest"]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.meta["classes"])

    @property
    def outlined(self) -> bool:
        """Whether there are masks to ask for."""
        return self.meta["outlined"]

    def outputs(self, question: str) -> int:
        """Logits of an answer.

        Raises:
            ValueError: for what these pictures cannot be asked.
        """
        if question not in QUESTIONS:
            raise ValueError(f"there is no task {question}; there are {', '.join(QUESTIONS)}")
        if question == "mask" and not self.outlined:
            raise ValueError(
                f"{self.name} has no transparency to take masks from; "
                "--questions class edges would be right"
            )
        if question == "colour" and not self.meta["coloured"]:
            raise ValueError(
                f"{self.name} has no colours of its own; leave colour out of --questions"
            )
        return {"class": len(self.classes), "colour": len(COLOURS)}.get(question, 1)

    def random(self, count: int, shift: int, mirror: bool, generator: torch.Generator) -> Asked:
        """Of the training split, each moved by up to `shift` pixels, half of them mirrored if
        asked for, on pieces of photographs."""
        held = self.splits["train"]
        chosen = torch.randint(0, len(held.labels), (count,), generator=generator)
        moved = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
        turned = torch.rand(count, generator=generator) < 0.5
        pixels = F.pad(held.pixels[chosen], (shift,) * 4)
        rows, columns = moved + torch.arange(held.pixels.shape[-1])
        image = torch.arange(count)[:, None, None]
        pixels = pixels[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if mirror:
            pixels = torch.where(turned[:, None, None, None], pixels.flip(3), pixels)
        return self._laid(held, chosen, pixels, generator)

    def held_out(self, split: str) -> Asked:
        """All of a split in their places, on the same pieces at every call."""
        held = self.splits[split]
        generator = torch.Generator().manual_seed(0)
        return self._laid(held, torch.arange(len(held.labels)), held.pixels, generator)

    def _laid(
        self, held: Split, chosen: Tensor, pixels: Tensor, generator: torch.Generator
    ) -> Asked:
        colour, alpha = pixels[:, :3].float() / 255, pixels[:, 3:].float() / 255
        if not self.meta["coloured"]:  # ink of any colour
            ink = torch.rand((len(pixels), 3, 1, 1), generator=generator)
            colour = ink.expand_as(colour)
        images = colour
        if self.outlined:
            back = pieces(held.backs, len(pixels), pixels.shape[-1], generator)
            images = alpha * colour + (1 - alpha) * back
        answers = {"class": held.labels[chosen], "colour": held.colours[chosen]}
        answers |= {"mask": (alpha[:, 0] >= 0.5).float(), "edges": edges(images)}
        return Asked(images, answers)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel over the training split, (3, 1, 1)."""
        images = self.held_out("train").images.double()
        mean, sd = images.mean((0, 2, 3)), images.std((0, 2, 3)).clamp_min(1e-3)
        return mean.float()[:, None, None], sd.float()[:, None, None]

    def normed(self, images: Tensor) -> Tensor:
        """As the model takes them."""
        mean, sd = self.moments
        return (images - mean) / sd


def pieces(backs: Sequence[Tensor], count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 3, size, size), from 0 to 1, of any place in any of the photographs."""
    which = torch.randint(0, len(backs), (count,), generator=generator).tolist()
    places = torch.rand((count, 2), generator=generator).tolist()
    cut = []
    for back, (down, right) in zip(which, places, strict=True):
        whole = backs[back]
        y, x = int(down * (whole.shape[1] - size + 1)), int(right * (whole.shape[2] - size + 1))
        cut.append(whole[:, y : y + size, x : x + size])
    return torch.stack(cut).float() / 255


def edges(images: Tensor) -> Tensor:
    """(B, 3, S, S) from 0 to 1 -> (B, S, S), 1 where the brightness changes by `EDGE` or more.

    Sobel's gradient over 8 of 0.299 R + 0.587 G + 0.114 B; beyond the border is what is on it.

    >>> image = torch.zeros(1, 3, 4, 4)
    >>> image[..., 2:] = 1.0
    >>> edges(image)[0, 0]
    tensor([0., 1., 1., 0.])
    """
    grey = images.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    grey = (images * grey).sum(1, keepdim=True)
    across = images.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    both = F.conv2d(
        F.pad(grey, (1,) * 4, mode="replicate"), torch.stack([across, across.T])[:, None]
    )
    return (both.square().sum(1).sqrt() >= EDGE).float()


def dominant(pixels: np.ndarray) -> int:
    """The place in `COLOURS` of most of a picture (S, S, 4), each pixel counted by its alpha.

    Of hue, saturation and value from 0 to 1: black below a value of 0.2; below a saturation of 0.25
    grey, or white from a value of 0.85; else the nearest of six hues.

    >>> red = np.full((2, 2, 4), 255, np.uint8)
    >>> red[..., 1:3] = 10
    >>> COLOURS[dominant(red)]
    'red'
    """
    rgb, alpha = pixels[..., :3].astype(np.float64) / 255, pixels[..., 3].astype(np.float64)
    value, low = rgb.max(-1), rgb.min(-1)
    spread = value - low
    safe = np.where(spread == 0, 1, spread)
    r, g, b = np.moveaxis(rgb, -1, 0)
    hue = np.select(
        [value == r, value == g], [(g - b) / safe % 6, (b - r) / safe + 2], (r - g) / safe + 4
    )
    named = 3 + np.round(hue).astype(int) % 6
    pale = spread < 0.25 * value
    named = np.where(pale, np.where(value >= 0.85, 2, 1), named)
    named = np.where(value < 0.2, 0, named)
    return int(np.bincount(named.ravel(), alpha.ravel(), len(COLOURS)).argmax())


def prepare(
    which: Literal["digits", "icons"], data: Path | None, size: int, split: int, out: Path
) -> Pictures:
    """Read and split once; a later call with the same pictures opens what is there.

    Args:
        which: the pictures where `data` is None. Icons are fetched by apt into `out / "packages"`.
        data: a folder of Debian's packages of icons, or one with a folder of images for each class.
        size: side in pixels.
        split: seed of the split.
        out: folder of all data; this one gets a folder named by its digest.

    Raises:
        ValueError, OSError: before anything is kept, saying what is wrong.
    """
    found = _read(which, data, size, out)
    backs = photographs(size) if found.outlined else {}
    parts, repeated = _split(found, split)
    tensors: dict[str, Tensor] = {}
    for name, places in parts.items():
        tensors[f"{name}.pixels"] = torch.from_numpy(
            np.ascontiguousarray(found.pixels[places].transpose(0, 3, 1, 2))
        )
        tensors[f"{name}.labels"] = torch.tensor([found.labels[i] for i in places])
        tensors[f"{name}.colours"] = torch.tensor(
            [dominant(found.pixels[i]) if found.coloured else 0 for i in places]
        )
        for i, back in enumerate(backs.get(name, ())):
            tensors[f"{name}.back{i}"] = back
    content = hashlib.sha256(f"1 {found.classes} {found.coloured} {found.outlined}".encode())
    for key, tensor in sorted(tensors.items()):
        content.update(f"{key} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    digest = content.hexdigest()[:12]
    meta = {
        "name": found.name,
        "digest": digest,
        "classes": found.classes,
        "families": {name: len({found.families[i] for i in at}) for name, at in parts.items()},
        "repeated": repeated,
        "outlined": found.outlined,
        "coloured": found.coloured,
        "size": size,
        "packages": found.packages,
    }

    def write(scratch: Path) -> None:
        save_file(tensors, scratch / "pictures.safetensors")
        (scratch / "meta.json").write_text(json.dumps(meta, indent=2))

    write_once(out / digest, write)
    return Pictures.open(out / digest)


@dataclass(frozen=True)
class _Found:
    """Pictures before they are split."""

    name: str
    classes: list[str]
    pixels: np.ndarray  # uint8 (N, S, S, 4)
    labels: list[int]
    families: list[str]
    outlined: bool
    coloured: bool = True
    packages: dict[str, str] | None = None


def _read(which: str, data: Path | None, size: int, out: Path) -> _Found:
    if data is None and which == "digits":
        return _digits(size)
    if data is None:
        data = icons.fetch(out / "packages")
    if not data.is_dir():
        problem = "is a file" if data.exists() else "there is no such folder"
        raise FileNotFoundError(
            f"--data {data}: {problem}; give a folder with one for each class, or with .deb files"
        )
    packages = icons.packages_of(data)
    return _icons(packages, size) if packages else _folder(data, size)


def _digits(size: int) -> _Found:
    """Ink of scikit-learn's digits, 8 x 8, drawn larger."""
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            f"the digits come with scikit-learn: pip install 'aftermax[lab]' ({error})"
        ) from None
    ink, labels = load_digits(return_X_y=True)
    pixels = np.zeros((len(ink), size, size, 4), np.uint8)
    for i, drawn in enumerate((ink.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)):
        grown = Image.fromarray(drawn).resize((size, size), Image.Resampling.BILINEAR)
        pixels[i, ..., 3] = np.asarray(grown)
    own = [str(i) for i in range(len(labels))]  # each is a family
    name = "scikit-learn's digits on its photographs"
    return _Found(name, [str(d) for d in range(10)], pixels, labels.tolist(), own, True, False)


def _icons(packages: list[Path], size: int) -> _Found:
    found, family = icons.read(packages, size)
    found = [icon for icon in found if icon.pixels[..., 3].max() >= 128]
    count = Counter(context for context, _ in {(i.context, family[i.name]) for i in found})
    classes = sorted(context for context, number in count.items() if number >= LEAST)
    if len(classes) < 2:
        raise ValueError(
            f"the packages have {len(classes)} contexts of {LEAST} or more families of icons, and "
            f"two are needed; found {dict(count)} in {', '.join(p.name for p in packages)}"
        )
    kept = [icon for icon in found if icon.context in classes]
    versions = dict(icons.versions(packages))
    themes = ", ".join(f"{name} {version}" for name, version in versions.items())
    return _Found(
        f"icons of {themes}, on scikit-learn's photographs",
        classes,
        np.stack([icon.pixels for icon in kept]),
        [classes.index(icon.context) for icon in kept],
        [family[icon.name] for icon in kept],
        True,
        packages=versions,
    )


def _folder(data: Path, size: int) -> _Found:
    """A folder for each class; a file's name without its digits is no family here, nor one that two
    classes have: photographs are numbered."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    pixels, labels, stems, classes = [], [], [], []
    for folder in sorted(p for p in data.iterdir() if p.is_dir() and not p.name.startswith(".")):
        before = len(pixels)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            try:
                with Image.open(path) as image:
                    turned = ImageOps.exif_transpose(image).convert("RGBA")
                    pixels.append(icons.resized(turned, size))
            except UnidentifiedImageError:
                continue
            except OSError as error:
                raise OSError(f"--data: {path} cannot be read: {error}") from None
            labels.append(len(classes))
            stems.append(f"{folder.name}/{path.resolve().stem}")
        if len(pixels) > before:
            classes.append(folder.name)
    if len(classes) < 2:
        raise ValueError(
            f"--data {data} has images of {len(classes)} classes; it needs two or more folders, "
            "each with the images of its class, or Debian's packages of icons (.deb)"
        )
    whole = np.stack(pixels)
    see_through = (whole[..., 3] < 128).any((1, 2)).mean()
    return _Found(str(data), classes, whole, labels, stems, bool(see_through >= 0.5))


def _split(found: _Found, seed: int) -> tuple[dict[str, list[int]], int]:
    """Places of each split, rising, and how many pictures were there before. Families of a class
    are shared out at random; one that is in several classes follows the first of them."""
    first: dict[bytes, int] = {}
    for place, image in enumerate(found.pixels):
        first.setdefault(image.tobytes(), place)
    kept = sorted(first.values())
    of_class: dict[int, list[str]] = {label: [] for label in range(len(found.classes))}
    seen = set()
    for place in kept:
        family = found.families[place]
        if family not in seen:
            seen.add(family)
            of_class[found.labels[place]].append(family)
    generator = torch.Generator().manual_seed(seed)
    split_of = {}
    for label, members in of_class.items():
        if len(members) < len(SPLITS):
            raise ValueError(
                f"class {found.classes[label]} has {len(members)} different pictures of its own; "
                f"it needs {len(SPLITS)} or more, one for each of test, tune and train"
            )
        order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        test, tune = (max(1, round(SPLITS[name] * len(order))) for name in ("test", "tune"))
        for i, family in enumerate(order):
            split_of[family] = "test" if i < test else "tune" if i < test + tune else "train"
    parts = {name: [i for i in kept if split_of[found.families[i]] == name] for name in SPLITS}
    return parts, len(found.labels) - len(kept)


def photographs(size: int) -> dict[str, list[Tensor]]:
    """scikit-learn's two photographs at half their size, uint8 (3, h, w), cut into strips."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    strips: dict[str, list[Tensor]] = {name: [] for name in STRIPS}
    for photograph in load_sample_images().images:
        half = Image.fromarray(photograph).reduce(2)
        whole = torch.from_numpy(np.array(half, np.uint8)).permute(2, 0, 1)
        for name, (left, right) in STRIPS.items():
            cut = whole[:, :, int(left * whole.shape[2]) : int(right * whole.shape[2])]
            if min(cut.shape[1:]) < size:
                raise ValueError(
                    f"the photographs have pieces of up to {cut.shape[2]} pixels for the {name} "
                    f"split, got image_size {size}"
                )
            strips[name].append(cut.contiguous())
    return strips
