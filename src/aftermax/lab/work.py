"""The work: one frozen description of data, model, budget and seeds, for all systems alike."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch

from aftermax.catalogue import find
from aftermax.entry import Entry
from aftermax.positions import POSITIONS, NoPositions, RoPE
from aftermax.version import __version__
from aftermax.weights.clipped import ClippedSoftmax

SEARCH_SEED = 1000
"""Of the runs that choose the learning rate; no reported run has it."""


class Described(Protocol):
    """What reports say of a system: its formula and where it is from."""

    @property
    def formula(self) -> str: ...
    @property
    def paper(self) -> str: ...
    @property
    def arxiv(self) -> str: ...
    @property
    def claim(self) -> str: ...


class AnyArm(Protocol):
    """A system as it runs in a work."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def entry(self) -> Described: ...
    @property
    def optimiser(self) -> Literal["adamw", "sgd"]: ...
    @property
    def rate_scale(self) -> float:
        """What the work's learning rates are multiplied by."""
        ...

    @property
    def identity(self) -> dict[str, str]:
        """What of the code itself decides its numbers."""
        ...


class AnyWork:
    """What the loop, the grid and the store ask of a work, whatever its task.

    The works themselves are frozen dataclasses; what is annotated here are fields or properties.
    """

    task: ClassVar[str]
    headline: ClassVar[str] = "loss"
    """The measure that a system must have to be shown."""
    final: ClassVar[str]
    """A measure that a run has at each length once it has come to its end."""
    clip: ClassVar[float | None] = 1.0
    """Largest norm of the gradient of all parameters; None = any."""
    factored_rate: float = 1.0
    """Of a factored output layer's own steps, over the learning rate of the rest."""
    kept_for_tuning: ClassVar[str]
    """What the choice of learning rates sees, in words."""

    systems: tuple[str, ...]
    data: Path | None
    context: int
    """Tokens of one example in training."""
    lengths: tuple[int, ...]
    """Tokens of one example in evaluation, rising."""
    multiples: tuple[int, ...]
    """The same in training lengths."""
    steps: int
    batch: int
    warmup: float
    weight_decay: float
    learning_rates: tuple[float, ...]
    search_steps: int
    seeds: tuple[int, ...]
    threads: int

    def arm(self, name: str) -> AnyArm:
        """The system of that name, with its traits.

        Raises:
            ValueError: saying what there is.
        """
        raise TypeError(f"{type(self).__name__} does not say what its systems are")

    def settings(self) -> dict:
        """All fields as JSON can hold them."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        task = {} if self.task == "text" else {"task": self.task}  # stored runs of text say none
        return task | fields | {"data": None if self.data is None else str(self.data)}

    def check(self, *counts: str) -> None:
        """What no work can be, whatever its task; `counts` are fields that are 1 or more."""
        for name in (*counts, "steps", "batch", "search_steps", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in self.systems:
            self.arm(name)
        for name in ("systems", "seeds", "learning_rates"):
            given = getattr(self, name)
            if not given:
                raise ValueError(f"{name} must not be empty")
            if len(set(given)) < len(given):
                raise ValueError(f"one of the {name} stands twice in {' '.join(map(str, given))}")
        if not all(rate > 0 for rate in self.learning_rates):
            raise ValueError("learning_rates must be above 0")
        if not 0 <= self.warmup <= 1 or not self.weight_decay >= 0:
            raise ValueError("warmup is a share of the steps, 0 to 1; weight_decay is 0 or more")
        if not all(0 <= seed < SEARCH_SEED for seed in self.seeds):
            raise ValueError(f"seeds are 0 to {SEARCH_SEED - 1}, got {self.seeds}")


class AttentionWork(AnyWork):
    """A work whose systems are those of the catalogue, in a transformer."""

    causal: ClassVar[bool]
    """Whether a token sees only what came before it."""
    encodings: ClassVar[tuple[str, ...]]
    """Position encodings that a system's name can ask for."""

    layers: int
    width: int
    heads: int
    positions: str
    qk_norm: bool
    hybrid_norm: bool
    layer_scale: bool

    def arm(self, name: str) -> Arm:
        return arm(name, self)

    def check(self, *counts: str) -> None:
        super().check("layers", "width", "heads", *counts)
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width / heads must be a whole even number, got {self.width} / {self.heads}"
            )


@dataclass(frozen=True)
class Work(AttentionWork):
    """What is trained and measured, the same for each system."""

    task: ClassVar[str] = "text"
    causal: ClassVar[bool] = True
    encodings: ClassVar[tuple[str, ...]] = tuple(POSITIONS)
    final: ClassVar[str] = "truncated_loss"
    kept_for_tuning: ClassVar[str] = "text kept for this"

    systems: tuple[str, ...] = ("softmax", "cosine", "lssar")
    """Catalogue names, each with optional traits after a slash: a position encoding (rope, p-rope,
    alibi, none), bare (no QK-norm), hybrid (a norm after each branch too), layerscale. p-rope turns
    the frequencies that turn at least once within the training length.
    For example softmax/alibi or sigmoid/hybrid."""
    data: Path | None = None
    """A text file, or a folder of them; by default the Python standard library's source."""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """bytes, or a byte-level BPE trained on the training split."""
    vocabulary: int = 1024
    """Size of the BPE vocabulary; bytes have 256."""

    layers: int = 3
    width: int = 96
    heads: int = 3
    kv_heads: int | None = None
    """Key and value heads, a divisor of heads; by default as many as heads."""
    positions: Literal["rope", "p-rope", "alibi", "none"] = "rope"
    """Position encoding of the systems that name none themselves and have none of their own."""
    qk_norm: bool = True
    """RMSNorm on queries and keys of the dot-product systems (bare turns it off for one)."""
    hybrid_norm: bool = False
    """A second norm after attention and feed-forward, for all systems."""
    layer_scale: bool = False
    """A learned factor, initially 1e-4, on each branch, for all systems."""

    context: int = 64
    """Training length in tokens."""
    multiples: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Evaluation lengths as multiples of the training length."""
    steps: int = 1200
    batch: int = 32
    recall_share: float = 0.75
    """Share of the rows of a batch with a recall problem (passkey, MQAR) put into their text."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.1
    learning_rates: tuple[float, ...] = (3e-3,)
    """Tried for each system in runs of their own; one rate = no search."""
    search_steps: int = 400
    """Length of each search run."""
    seeds: tuple[int, ...] = (0,)
    windows: int = 64
    """Held-out windows, and recall problems of each kind and length, that are scored."""
    threads: int = 1
    """Threads of each run. Part of the work: sums depend on it in the last bit."""

    def __post_init__(self):
        self.check("windows")
        if self.multiples[:1] != (1,) or list(self.multiples) != sorted(set(self.multiples)):
            raise ValueError(f"multiples must rise and begin with 1, got {self.multiples}")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads must divide heads, got {self.kv_heads} and {self.heads}")
        if not 0 <= self.recall_share < 1:
            raise ValueError(
                f"recall_share is a share of the batch below 1, got {self.recall_share}"
            )
        if self.context < 48:
            raise ValueError(
                f"the recall tasks need a context of at least 48 tokens, got {self.context}"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Evaluation lengths in tokens."""
        return tuple(self.context * m for m in self.multiples)

    @property
    def targets(self) -> int:
        """Tokens at the end of a window that are scored, the same ones at every length."""
        return self.context // 2


CLIPPED_ALPHA = 0.9
"""gamma = -alpha / T of clipped softmax at the training length T.

The authors have 3.2 in effect for BERT and 12 for OPT. Then flat rows are all 0 and learn nothing,
and rows of models as narrow as the lab's are flat before training; below 1 flat rows live.
"""

MARKS = {
    "p-rope": "p-RoPE",
    "alibi": "ALiBi",
    "none": "NoPE",
    "rope": "RoPE",
    "qk-norm": "QK-norm",
}
"""Traits that are written otherwise in a title."""


@dataclass(frozen=True)
class Arm:
    """A system as it runs in the lab: the catalogue entry, its positions, its norms."""

    name: str
    entry: Entry
    positions: str
    qk_norm: bool
    hybrid_norm: bool
    layer_scale: bool
    context: int
    """Training length in tokens."""
    encoded: bool
    """Whether attention knows of positions here."""
    gated: bool = False
    """Whether each head's output is scaled by a gate, token by token."""
    optimiser: Literal["adamw", "sgd"] = "adamw"
    rate_scale: float = 1.0

    @property
    def place(self) -> NoPositions:
        """The position encoding; partial RoPE keeps what the training length shows whole."""
        partial = self.positions == "p-rope"
        return RoPE.for_length(self.context) if partial else POSITIONS[self.positions]

    @property
    def identity(self) -> dict[str, str]:
        places = {"places": repr(self.place)} if self.encoded else {}
        return {"arm": repr(self.system)} | places

    @property
    def system(self) -> Any:
        """The entry's; of clipped softmax the one for the training length."""
        system = self.entry.system
        clipped = isinstance(system, ClippedSoftmax)
        return ClippedSoftmax.for_length(self.context, CLIPPED_ALPHA) if clipped else system

    def system_of(self, layer: int, layers: int, longest: int) -> Any:
        """The system as it stands in a layer, counted from 0, of a model that never reads more than
        `longest` tokens: some formulas ask."""
        system = self.system
        placed = getattr(system, "placed", None)
        return system if placed is None else placed(layer, layers, longest)

    @property
    def traits(self) -> tuple[str, ...]:
        """What the name says after the system."""
        return tuple(self.name.split("/")[1:])

    @property
    def title(self) -> str:
        """Without what the entry's title already says, with what differs from the usual."""
        marks = [MARKS.get(trait, trait) for trait in self.traits]
        return self.entry.title + (f" · {', '.join(marks)}" if marks else "")


def arm(name: str, work: AttentionWork) -> Arm:
    """Read `system/trait/trait`.

    >>> arm("softmax/alibi", Work()).positions
    'alibi'
    """
    system, *traits = name.split("/")
    entry = find(system)
    if work.causal and not entry.causal:
        raise ValueError(
            f"{entry.name} has no causal form, which text needs; --task vision has a place for it"
        )
    known = (*work.encodings, "bare", "hybrid", "layerscale", "gated", "qk-norm")
    if unknown := [t for t in traits if t not in known]:
        raise ValueError(f"{name}: no trait {', '.join(unknown)}; there are {', '.join(known)}")
    places = [t for t in traits if t in POSITIONS]
    if len(places) > 1:
        raise ValueError(f"{name} names {len(places)} position encodings; give one")
    if entry.module is not None and "gated" in traits:
        raise ValueError(f"{name}: {entry.name} has a module of its own, which has no gate to add")
    if {"bare", "qk-norm"} <= set(traits):
        raise ValueError(f"{name} asks for QK-norm and for none; give one of bare and qk-norm")
    return Arm(
        name=name,
        entry=entry,
        positions=places[0] if places else entry.positions or work.positions,
        # the cosine systems normalise by themselves
        qk_norm=(work.qk_norm or "qk-norm" in traits)
        and "bare" not in traits
        and not entry.laws.scale_free,
        hybrid_norm=work.hybrid_norm or "hybrid" in traits,
        layer_scale=work.layer_scale or "layerscale" in traits,
        context=work.context,
        encoded=bool(work.encodings),
        gated="gated" in traits,
    )


W = TypeVar("W", bound=AnyWork)


@dataclass(frozen=True)
class Run(Generic[W]):
    """One training of one arm: what determines its numbers, and nothing else."""

    work: W
    system: str
    seed: int
    learning_rate: float
    kind: Literal["train", "search"]
    data_digest: str

    @property
    def steps(self) -> int:
        return self.work.steps if self.kind == "train" else self.work.search_steps

    @property
    def arm(self) -> Any:
        return self.work.arm(self.system)

    def settings(self) -> dict:
        """What the identity is made of: the work without what other runs do."""
        others = ("systems", "seeds", "learning_rates", "data", "search_steps", "steps")
        work = {k: v for k, v in self.work.settings().items() if k not in others}
        own = {f: getattr(self, f) for f in ("system", "seed", "learning_rate", "kind", "steps")}
        code = {"made_by": f"aftermax {__version__}, torch {torch.__version__}"}
        return work | own | code | self.arm.identity | {"data_digest": self.data_digest}

    @property
    def id(self) -> str:
        """Readable and unique: the system, the seed, and a digest of the settings."""
        return f"{self.system.replace('/', '+')}-{self.kind}{self.seed}-{digest(self.settings())}"


def digest(settings: dict) -> str:
    """12 hexadecimal digits that stand for the settings.

    >>> digest({"a": 1})
    'f9d86028c6e0'
    """
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


STANDARD_SYSTEMS = (
    "softmax",
    "softmax/alibi",
    "log-n",
    "log-n/p-rope",
    "cosine",
    "cosine/p-rope",
    "scale-invariant/p-rope",
    "lssa",
    "lssar",
    "lssar/p-rope",
    "lssar-log",
    "sigmoid/hybrid",
    "linear",
    "cosformer",
    "cottention",
    "transnormer",
    "transnormer-lrpe",
    "inline",
    "normalised",
)

PRESETS = {
    "quick": Work(
        systems=(
            "softmax",
            "softmax/alibi",
            "cosine",
            "scale-invariant/p-rope",
            "lssar",
            "sigmoid",
        ),
        steps=400,
        windows=24,
    ),
    "standard": Work(
        systems=STANDARD_SYSTEMS,
        steps=1000,
        learning_rates=(1.5e-3, 3e-3, 6e-3),
        search_steps=200,
        seeds=(0, 1, 2),
    ),
    "long": Work(
        systems=STANDARD_SYSTEMS,
        layers=6,
        width=192,
        heads=6,
        context=128,
        steps=5000,
        learning_rates=(1e-3, 2e-3, 4e-3),
        search_steps=1000,
        seeds=(0, 1, 2),
        windows=256,
    ),
}
"""quick: some minutes on two cores. standard: about an hour. long: a night or more."""
