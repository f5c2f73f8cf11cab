"""The work of the task of labels, and its presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from aftermax.lab.outputs import DUAL, LABEL_OUTPUTS, ONE_VS_ALL, OutputArm, find
from aftermax.lab.work import AnyWork


@dataclass(frozen=True)
class LabelsWork(AnyWork):
    """What is trained and measured, the same for each output layer."""

    task: ClassVar[str] = "labels"
    clip: ClassVar[float | None] = None
    headline: ClassVar[str] = "P@1"
    final: ClassVar[str] = "P@1"
    kept_for_tuning: ClassVar[str] = "documents kept for this"
    context: ClassVar[int] = 1  # type: ignore[misc]
    lengths: ClassVar[tuple[int, ...]] = (1,)  # type: ignore[misc]
    multiples: ClassVar[tuple[int, ...]] = (1,)  # type: ignore[misc]

    systems: tuple[str, ...] = tuple(output.name for output in LABEL_OUTPUTS)
    """Output layers: one vector for each label, or (dual/...) one that the encoder makes of the
    label's own text."""
    data: Path | None = None
    """A folder in a format of the Extreme Classification Repository, or one of apt's lists; by
    default the lists of this machine, where it is Debian or Ubuntu."""
    labels: Literal["tags", "dependencies", "recommends"] = "tags"
    """Of Debian's packages: their tags, or the packages that they depend on, or recommend."""
    names: bool = False
    """Read the name of a package before its description."""
    least: int | None = None
    """Labels that fewer documents of the training split have are left out; by default 2 of Debian's
    packages and 0 of the Repository's sets."""

    encoder: str = "bag"
    """bag (embeddings of the words, weighted by TF-IDF), transformer (from scratch), the name or
    the folder of a model of sentence-transformers on this disk, which stays as it is, or bag+
    before such a name: the sum of both."""
    width: int = 256
    separate: bool = False
    """An encoder for documents and one for labels, rather than one for both."""
    hidden: int = 512
    """Of a residual layer after the encoder, one for documents and one for labels; 0 = none."""
    layers: int = 2
    """Of the transformer."""
    heads: int = 4
    """Of the transformer."""
    words: int = 64
    """Of a text that the transformer reads."""
    word_dropout: float = 0.2
    """Share of the words that a text is read without in training."""
    dropout: float = 0.2
    """Share of the numbers of a text's vector that are 0 in training."""
    temperature: float = 0.05
    """The cosine of document and label is divided by it; learned from here on."""
    prior: bool = True
    """The bias of a label begins at the logarithm of how frequent it is, rather than at 0."""
    negatives: Literal["all", "batch"] = "all"
    """What a dual encoder tells the right labels from: all labels, or those of the batch."""
    k: int = 5
    """Of the soft top-k loss."""
    alpha: float = 1.0
    """Sharpness of the soft top-k loss."""
    a: float = 0.1
    """Sharpness of the Z-loss."""
    b: float = 10.0
    """Location of the Z-loss, in standard deviations of the outputs."""
    samples: int = 256
    """Labels that sampled softmax draws for a batch."""
    factored_rate: float = 3000.0
    """The rate of the Z-loss's layer, which is trained by plain SGD, over AdamW's."""

    steps: int = 400
    batch: int = 512
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    learning_rates: tuple[float, ...] = (5e-3,)
    """Tried for each output layer in runs of their own; one rate = no search."""
    search_steps: int = 200
    """Length of each search run."""
    seeds: tuple[int, ...] = (0,)
    threads: int = 1
    """Threads of each run. Part of the work: sums depend on it in the last bit."""

    def __post_init__(self):
        self.check("width", "layers", "heads", "words", "k", "samples")
        if self.encoder == "transformer" and (
            self.width % self.heads or self.width // self.heads % 2
        ):
            raise ValueError(
                f"width / heads must be a whole even number, got {self.width} / {self.heads}"
            )
        for name in ("word_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a share below 1, got {getattr(self, name)}")
        for name in ("temperature", "alpha", "a", "factored_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is above 0, got {getattr(self, name)}")
        for name in ("hidden", "least"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is 0 or more, got {getattr(self, name)}")

    def arm(self, name: str) -> OutputArm:
        return OutputArm(name, find(name, LABEL_OUTPUTS))

    @property
    def sentences(self) -> str | None:
        """The model of sentence-transformers that texts are read by, if any."""
        name = self.encoder.removeprefix("bag+")
        return None if name in ("bag", "transformer") else name

    @property
    def told(self) -> str:
        """The encoder in words."""
        bag = "embeddings of the words, weighted by TF-IDF"
        sentences = f"a linear map of what {self.sentences} makes of the text"
        if self.encoder == "transformer":
            encoder = (
                f"a transformer of {self.layers} layers and {self.heads} heads over the first "
                f"{self.words} words"
            )
        elif self.sentences is None:
            encoder = bag
        else:
            encoder = sentences if self.encoder == self.sentences else f"{bag}, and {sentences}"
        tower = f", a residual layer of {self.hidden} for each side" if self.hidden else ""
        return (
            f"{encoder}{tower}, width {self.width}; word dropout {self.word_dropout:g}, dropout "
            f"{self.dropout:g}; dual encoders against the labels of the "
            f"{'whole set' if self.negatives == 'all' else 'batch'}"
        )


_QUICK = LabelsWork(
    systems=("softmax", "bce", "z-loss", "dual/infonce", "dual/decoupled", "dual/soft-topk")
)
_STANDARD = dataclasses.replace(
    _QUICK,
    systems=tuple(output.name for output in ONE_VS_ALL + DUAL),
    learning_rates=(2.5e-3, 5e-3, 1e-2),
    search_steps=100,
    seeds=(0, 1, 2),
)
PRESETS = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "long": dataclasses.replace(
        _STANDARD, labels="dependencies", width=512, steps=4000, search_steps=1000
    ),
}
"""quick: some minutes on two cores. standard: an hour or so. long: hours."""
