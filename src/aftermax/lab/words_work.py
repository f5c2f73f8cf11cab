"""The work of the task of words, and its presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from aftermax.lab.outputs import WORD_OUTPUTS, OutputArm, find
from aftermax.lab.work import AnyWork

TOP = (1, 5, 10, 20, 50, 100)
"""How many guesses the errors are counted at."""


@dataclass(frozen=True)
class WordsWork(AnyWork):
    """What is trained and measured, the same for each output layer."""

    task: ClassVar[str] = "words"
    headline: ClassVar[str] = "top1_error"
    final: ClassVar[str] = "top1_error"
    clip: ClassVar[float | None] = None
    kept_for_tuning: ClassVar[str] = "text kept for this"
    context: ClassVar[int] = 1  # type: ignore[misc]
    lengths: ClassVar[tuple[int, ...]] = (1,)  # type: ignore[misc]
    multiples: ClassVar[tuple[int, ...]] = (1,)  # type: ignore[misc]

    systems: tuple[str, ...] = tuple(output.name for output in WORD_OUTPUTS)
    """Output layers, trained by plain SGD, as the Z-loss's paper does. With /adamw after its name
    all is trained by AdamW, but for a factored layer, which has its own steps. z-loss/1/5 has a = 1
    and b = 5."""
    data: Path | None = None
    """A text file or a folder of them; or a folder of apt's lists, by default this machine's, of
    which the descriptions of packages are read."""
    least: int = 2
    """A word that is seen less often in training is unknown."""

    window: int = 5
    """Words that the next one is predicted from."""
    embedding: int = 64
    """Width of a word on the way in."""
    hidden: int = 256
    width: int = 128
    """Of what the output layer is given: d."""
    a: float = 0.1
    """Sharpness of the Z-loss."""
    b: float = 10.0
    """Location of the Z-loss, in standard deviations of the outputs."""
    factored_rate: float = 10.0
    """The rate of a factored layer's own steps, over that of the rest: the gradient of its loss is
    spread over all classes, and small."""
    samples: int = 1024
    """Classes that sampled softmax draws for a batch."""

    steps: int = 600
    batch: int = 128
    warmup: float = 0.02
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    learning_rates: tuple[float, ...] = (2.0,)
    """Of SGD; a thousandth of it is AdamW's. Tried for each output layer in runs of their own; one
    rate = no search."""
    search_steps: int = 500
    """Length of each search run."""
    seeds: tuple[int, ...] = (0,)
    scored: int = 10000
    """Held-out words that are predicted."""
    threads: int = 1
    """Threads of each run. Part of the work: sums depend on it in the last bit."""

    def __post_init__(self):
        self.check("least", "window", "embedding", "hidden", "width", "samples", "scored")
        plain = [name for name in self.systems if self.arm(name).optimiser == "sgd"]
        if self.weight_decay and plain:
            raise ValueError(
                f"weight_decay is AdamW's; {', '.join(plain)} are trained by plain SGD on sparse "
                "gradients, which takes none"
            )
        for name in ("a", "factored_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is above 0, got {getattr(self, name)}")

    def arm(self, name: str) -> OutputArm:
        output, *traits = name.split("/")
        entry = find(output, WORD_OUTPUTS)
        adamw = traits[-1:] == ["adamw"]
        numbers = traits[:-1] if adamw else traits
        values = _numbers(name, numbers) if output == "z-loss" and len(numbers) == 2 else ()
        if len(numbers) > len(values):
            raise ValueError(
                f"{name}: an output layer may have the trait adamw, and z-loss two numbers before "
                "it, as in z-loss/0.1/30 for a and b"
            )
        optimiser, scale = ("adamw", 1e-3) if adamw else ("sgd", 1.0)
        return OutputArm(name, entry, optimiser, scale, values)


def _numbers(name: str, traits: list[str]) -> tuple[float, ...]:
    try:
        a, b = map(float, traits)
    except ValueError:
        raise ValueError(f"{name}: a and b are numbers, as in z-loss/0.1/30") from None
    if not a > 0:
        raise ValueError(f"{name}: a is above 0")
    return a, b


_QUICK = WordsWork(systems=("softmax", "adaptive", "sampled", "z-loss"))
_STANDARD = dataclasses.replace(
    _QUICK,
    systems=(
        "softmax",
        "softmax/adamw",
        "adaptive",
        "adaptive/adamw",
        "hierarchical",
        "sampled",
        "sampled/adamw",
        "z-loss",
        "z-loss/adamw",
        "z-loss/0.1/30",
        "log-taylor",
    ),
    steps=1000,
    learning_rates=(0.5, 1.0, 2.0),
    search_steps=300,
    seeds=(0, 1, 2),
)
PRESETS = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "long": dataclasses.replace(
        _STANDARD, hidden=512, width=256, steps=60000, search_steps=6000, seeds=(0, 1, 2)
    ),
}
"""quick: some minutes on two cores. standard: an hour or two. long: a night."""
