"""The work of the task of experts, and its presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from aftermax.lab.data.pictures import DENSE, QUESTIONS
from aftermax.lab.work import Arm, AttentionWork, arm

FEEDS = {
    "experts": "experts",
    "dense": "dense",
    "wide": "dense, wide",
    "large": "dense, large",
}
"""What stands in the odd layers: experts; an MLP of their active FLOPs; one of their parameters, of
which every token takes all; or the same as dense in a tower that is half again as wide."""


@dataclass(frozen=True)
class ExpertsWork(AttentionWork):
    """What is trained and measured, the same for each system."""

    task: ClassVar[str] = "experts"
    headline: ClassVar[str] = "parameters"
    causal: ClassVar[bool] = False
    encodings: ClassVar[tuple[str, ...]] = ()
    final: ClassVar[str] = "parameters"
    kept_for_tuning: ClassVar[str] = "pictures kept for this"
    positions: ClassVar[str] = "learned"
    """The model adds them to its patches; attention itself knows of none."""
    multiples: ClassVar[tuple[int, ...]] = (1,)
    hybrid_norm: ClassVar[bool] = False
    layer_scale: ClassVar[bool] = False

    systems: tuple[str, ...] = (
        "experts/softmax",
        "dense/softmax",
        "experts/softmax/alone-class",
        "experts/softmax/alone-mask",
        "experts/sigmoid",
    )
    """What stands in the odd layers (experts, dense, wide, large), a catalogue name, and optional
    traits after slashes: bare (no QK-norm), gated (attention gated by token and head), and
    alone-class, alone-mask and so on for a model that is asked one question alone."""
    data: Path | None = None
    """A folder with one folder of images for each class, or one of Debian's packages of icons; by
    default the pictures that are named."""
    pictures: Literal["digits", "icons"] = "digits"
    """scikit-learn's digits, or icons of Debian's themes, which apt fetches; laid on pieces of
    scikit-learn's photographs."""
    questions: tuple[str, ...] = ("class", "mask")
    """What is asked of an image, a gate and a head for each: class, colour (which one most of the
    picture has), mask (which pixels are the picture's), edges. Two or more, one of them of pixels.
    """
    image_size: int = 16
    """Side in pixels that every picture is drawn in."""
    split: int = 0
    """Seed of the split of each class: a quarter is the test, 15% are for the choice of the
    learning rate. It is no seed of a run: all runs of a work have the same split."""

    patch: int = 4
    """Side in pixels of a patch, a divisor of image_size: each is one token, beside the class
    token."""
    layers: int = 4
    width: int = 64
    heads: int = 4
    hidden: int = 4
    """Width of an MLP, in widths of a token."""
    experts: int = 16
    """In every odd layer."""
    top_k: int = 2
    """Experts of a token."""
    expert_hidden: int = 2
    """Width of an expert, in widths of a token."""
    balance: float = 1e-2
    """How much of the load-balancing loss, of each layer and question, joins the loss (Switch)."""
    qk_norm: bool = True
    """RMSNorm on queries and keys of the dot-product systems (bare turns it off for one). M3ViT has
    none."""

    steps: int = 300
    batch: int = 32
    shift: int = 1
    """Training pictures are moved by up to so many pixels at random."""
    mirror: bool = False
    """Half of the training pictures are mirrored."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.1
    learning_rates: tuple[float, ...] = (4e-3,)
    """Tried for each system in runs of their own; one rate = no search."""
    search_steps: int = 150
    """Length of each search run."""
    seeds: tuple[int, ...] = (0,)
    threads: int = 1
    """Threads of each run. Part of the work: sums depend on it in the last bit."""

    def __post_init__(self):
        asked = self.questions
        if unknown := [q for q in asked if q not in QUESTIONS]:
            raise ValueError(f"no question {', '.join(unknown)}; there are {', '.join(QUESTIONS)}")
        if len(set(asked)) < max(2, len(asked)) or not set(asked) & set(DENSE):
            raise ValueError(
                f"questions are two or more that differ, one of them {' or '.join(DENSE)}, got "
                f"{' '.join(asked) or 'none'}"
            )
        self.check("image_size", "patch", "hidden", "experts", "top_k", "expert_hidden")
        if self.image_size % self.patch:
            raise ValueError(
                f"patch must divide image_size, got {self.patch} and {self.image_size}"
            )
        if self.layers < 2:
            raise ValueError(f"experts stand in the odd layers: layers must be 2 or more, got "
                             f"{self.layers}")  # fmt: skip
        if self.top_k > self.experts:
            raise ValueError(f"top_k must be 1 to the {self.experts} experts, got {self.top_k}")
        if not self.balance >= 0:
            raise ValueError(f"balance is 0 or more, got {self.balance}")
        if not 0 <= self.shift < self.image_size:
            raise ValueError(
                f"shift is 0 or more pixels and less than image_size, got {self.shift}"
            )

    @property
    def context(self) -> int:  # type: ignore[override]
        """Patches of an image, and the class token."""
        return (self.image_size // self.patch) ** 2 + 1

    @property
    def lengths(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.context,)

    def arm(self, name: str) -> ExpertsArm:
        """Read `feed/system/trait/trait`.

        >>> ExpertsWork().arm("experts/softmax/alone-mask").questions
        ('mask',)
        """
        feed, _, rest = name.partition("/")
        if feed not in FEEDS or not rest:
            raise ValueError(
                f"{name} does not say what stands in the odd layers; ask for one of "
                f"{', '.join(f'{feed}/...' for feed in FEEDS)}, as experts/softmax"
            )
        system, *traits = rest.split("/")
        alone = [t.removeprefix("alone-") for t in traits if t.startswith("alone-")]
        if len(alone) > 1 or not set(alone) <= set(self.questions):
            raise ValueError(
                f"{name}: a model alone has one question, of {', '.join(self.questions)}; "
                "leave the model out of --systems, or ask its question by --questions"
            )
        others = [t for t in traits if not t.startswith("alone-")]
        if refused := {"hybrid", "layerscale"} & set(others):
            raise ValueError(f"{name}: this model has no {' nor '.join(sorted(refused))}")
        plain = arm("/".join([system, *others]), self)
        fields: dict[str, Any] = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
        fields["name"] = name
        return ExpertsArm(**fields, feed=feed, questions=tuple(alone) or self.questions)


@dataclass(frozen=True)
class ExpertsArm(Arm):
    """A system in one of the towers, with what it is asked."""

    feed: str = "experts"
    questions: tuple[str, ...] = ()

    @property
    def traits(self) -> tuple[str, ...]:
        return tuple(t for t in self.name.split("/")[2:] if not t.startswith("alone-"))

    @property
    def alone(self) -> bool:
        return "/alone-" in self.name

    @property
    def title(self) -> str:
        alone = f", {self.questions[0]} alone" if self.alone else ""
        return f"{super().title}, {FEEDS[self.feed]}{alone}"


_QUICK = ExpertsWork()
_STANDARD = dataclasses.replace(
    _QUICK,
    systems=(
        "experts/softmax",
        "dense/softmax",
        "wide/softmax",
        "large/softmax",
        "experts/softmax/alone-class",
        "experts/softmax/alone-mask",
        "experts/sigmoid",
        "experts/linear",
    ),
    steps=800,
    search_steps=200,
    learning_rates=(2e-3, 4e-3, 8e-3),
    seeds=(0, 1, 2),
)
PRESETS = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "long": dataclasses.replace(
        _STANDARD,
        pictures="icons",
        questions=("class", "colour", "mask", "edges"),
        image_size=32,
        mirror=True,
        shift=3,
        layers=8,
        width=128,
        steps=10000,
        search_steps=1000,
        learning_rates=(5e-4, 1e-3, 2e-3),
        systems=(*_STANDARD.systems, "experts/softmax/alone-colour", "experts/softmax/alone-edges"),
    ),
}
"""quick: some minutes on two cores. standard: an hour or so. long: days; its pictures are icons."""
