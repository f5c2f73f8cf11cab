"""The work of the task of outliers, and its presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from aftermax.lab.work import Arm, AttentionWork, arm
from aftermax.positions import POSITIONS

MODELS = ("encoder", "decoder")
"""Masked language model that sees all, and language model that sees what came before."""

COMPARED = (
    "softmax",
    "log-n/qk-norm",
    "softmax-one",
    "clipped",
    "clipped-normalised",
    "softmax/gated",
    "sigmoid",
    "lssar",
)
"""Of the papers, with their baseline first; the lab's own baseline second."""


@dataclass(frozen=True)
class OutliersWork(AttentionWork):
    """What is trained, measured and quantised, the same for each system."""

    task: ClassVar[str] = "outliers"
    causal: ClassVar[bool] = False  # of the task; decoders are held to it in `arm`
    encodings: ClassVar[tuple[str, ...]] = tuple(POSITIONS)
    final: ClassVar[str] = "w8a8_loss"
    kept_for_tuning: ClassVar[str] = "text kept for this"
    kv_heads: ClassVar[int | None] = None

    systems: tuple[str, ...] = tuple(f"{model}/{name}" for model in MODELS for name in COMPARED)
    """encoder/ or decoder/ and a catalogue name, each with optional traits after a slash: gated
    (attention gated by token and head), qk-norm, a position encoding (rope, p-rope, alibi, none),
    hybrid (a norm after each branch too), layerscale. For example encoder/softmax/gated."""
    data: Path | None = None
    """A text file, or a folder of them; by default the Python standard library's source."""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """bytes, or a byte-level BPE trained on the training split."""
    vocabulary: int = 1024
    """Size of the BPE vocabulary; bytes have 256."""

    layers: int = 3
    width: int = 64
    heads: int = 4
    positions: Literal["rope", "p-rope", "alibi", "none"] = "rope"
    """Position encoding of the systems that name none themselves and have none of their own."""
    qk_norm: bool = False
    """RMSNorm on queries and keys of the dot-product systems; the papers have none (qk-norm turns
    it on for one)."""
    hybrid_norm: bool = False
    """A second norm after attention and feed-forward, for all systems."""
    layer_scale: bool = False
    """A learned factor, initially 1e-4, on each branch, for all systems."""

    context: int = 64
    """Training length in tokens, the begin token included."""
    multiples: tuple[int, ...] = (1, 2, 4)
    """Evaluation lengths as multiples of the training length."""
    masked: float = 0.15
    """Share of the tokens that an encoder is asked for (Devlin et al., arXiv 1810.04805)."""
    steps: int = 400
    batch: int = 16
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.1
    learning_rates: tuple[float, ...] = (4e-3,)
    """Tried for each system in runs of their own; one rate = no search."""
    search_steps: int = 200
    """Length of each search run."""
    seeds: tuple[int, ...] = (0,)
    windows: int = 64
    """Held-out windows that are scored."""
    calibration: int = 16
    """Batches of training text, at the training length, that the ranges of the activations are
    taken from (Bondarenko et al., arXiv 2306.12929, for BERT)."""
    threads: int = 1
    """Threads of each run. Part of the work: sums depend on it in the last bit."""

    def __post_init__(self):
        self.check("windows", "calibration")
        if self.multiples[:1] != (1,) or list(self.multiples) != sorted(set(self.multiples)):
            raise ValueError(f"multiples must rise and begin with 1, got {self.multiples}")
        if self.context < 8:
            raise ValueError(f"context must be at least 8 tokens, got {self.context}")
        if not 0 < self.masked < 1:
            raise ValueError(f"masked is a share of the tokens between 0 and 1, got {self.masked}")

    @property
    def lengths(self) -> tuple[int, ...]:  # type: ignore[override]
        """Evaluation lengths in tokens."""
        return tuple(self.context * m for m in self.multiples)

    def arm(self, name: str) -> OutlierArm:
        """Read `model/system/trait/trait`.

        >>> OutliersWork().arm("encoder/softmax").title
        'softmax, encoder'
        """
        model, _, system = name.partition("/")
        if model not in MODELS or not system:
            raise ValueError(
                f"{name} does not say in which model; ask for encoder/... or decoder/..., "
                "as encoder/softmax"
            )
        plain = arm(system, self)
        if model == "decoder" and not plain.entry.causal:
            raise ValueError(
                f"{name}: {plain.entry.name} has no causal form, which a decoder needs"
            )
        fields: dict[str, Any] = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
        fields["name"] = name
        return OutlierArm(**fields, model=model)


@dataclass(frozen=True)
class OutlierArm(Arm):
    """A system in one of the two models."""

    model: str = "decoder"

    @property
    def traits(self) -> tuple[str, ...]:
        return tuple(self.name.split("/")[2:])

    @property
    def system_title(self) -> str:
        """Without the model."""
        return super().title

    @property
    def title(self) -> str:
        return f"{self.system_title}, {self.model}"


_QUICK = OutliersWork()
PRESETS = {
    "quick": _QUICK,
    "standard": dataclasses.replace(
        _QUICK,
        steps=500,
        learning_rates=(2e-3, 4e-3, 8e-3),
        search_steps=100,
        seeds=(0, 1, 2),
    ),
    "long": dataclasses.replace(
        _QUICK,
        tokenizer="bpe",
        layers=6,
        width=192,
        heads=6,
        context=128,
        steps=10000,
        batch=32,
        learning_rates=(1e-3, 2e-3, 4e-3),
        search_steps=1000,
        seeds=(0, 1, 2),
        windows=256,
    ),
}
"""quick: some minutes on two cores. standard: less than an hour. long: a night or more."""
