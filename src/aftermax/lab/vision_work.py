"""The work of the vision task, and its presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from aftermax.lab.work import AttentionWork

SYSTEMS = ("softmax", "cosine", "sigmoid", "linear", "inline", "soft", "soft-norm")


@dataclass(frozen=True)
class VisionWork(AttentionWork):
    """What is trained and measured, the same for each system."""

    task: ClassVar[str] = "vision"
    causal: ClassVar[bool] = False
    encodings: ClassVar[tuple[str, ...]] = ()
    final: ClassVar[str] = "trained_loss"
    kept_for_tuning: ClassVar[str] = "images kept for this"
    positions: ClassVar[str] = "learned"
    """The model adds them to its patches; attention itself knows of none."""
    multiples: ClassVar[tuple[int, ...]] = (1,)

    systems: tuple[str, ...] = SYSTEMS
    """Catalogue names, each with optional traits after a slash: bare (no QK-norm), hybrid (a norm
    after each branch too), layerscale. For example sigmoid/hybrid."""
    data: Path | None = None
    """A folder with one folder of images for each class; by default scikit-learn's 1797 digits."""
    image_size: int = 8
    """Side in pixels that every image is resized to; the digits have 8."""
    colours: Literal["grey", "rgb"] = "grey"
    split: int = 0
    """Seed of the split of each class: a quarter is the test, 15% are for the choice of the
    learning rate. It is no seed of a run: all runs of a work have the same split."""

    patch: int = 1
    """Side in pixels of a patch, a divisor of image_size: each is one token."""
    layers: int = 3
    width: int = 64
    heads: int = 4
    qk_norm: bool = True
    """RMSNorm on queries and keys of the dot-product systems (bare turns it off for one)."""
    hybrid_norm: bool = False
    """A second norm after attention and feed-forward, for all systems."""
    layer_scale: bool = False
    """A learned factor, initially 1e-4, on each branch, for all systems."""

    steps: int = 400
    batch: int = 32
    shift: int = 0
    """Training images are moved by up to so many pixels at random, black coming in."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.1
    learning_rates: tuple[float, ...] = (1e-3,)
    """Tried for each system in runs of their own; one rate = no search."""
    search_steps: int = 200
    """Length of each search run."""
    seeds: tuple[int, ...] = (0,)
    threads: int = 1
    """Threads of each run. Part of the work: sums depend on it in the last bit."""

    def __post_init__(self):
        self.check("image_size", "patch")
        if self.image_size % self.patch:
            raise ValueError(
                f"patch must divide image_size, got {self.patch} and {self.image_size}"
            )
        if self.context < 2:
            raise ValueError(f"one patch of {self.patch} x {self.patch} leaves nothing to attend")
        if not 0 <= self.shift < self.image_size:
            raise ValueError(
                f"shift is 0 or more pixels and less than image_size, got {self.shift}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch
        return side, side

    @property
    def context(self) -> int:  # type: ignore[override]
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def lengths(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.context,)


_QUICK = VisionWork()
_STANDARD = dataclasses.replace(
    _QUICK, steps=1000, learning_rates=(5e-4, 1e-3, 2e-3), search_steps=200, seeds=(0, 1, 2)
)
PRESETS = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "long": dataclasses.replace(
        _STANDARD,
        layers=6,
        width=128,
        steps=5000,
        search_steps=1500,
        seeds=(0, 1, 2, 3, 4),
    ),
}
"""quick: some minutes on two cores. standard: less than an hour. long: hours."""
