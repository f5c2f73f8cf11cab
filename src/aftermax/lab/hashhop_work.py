"""The work of the task of HashHop, and its presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from aftermax.lab.work import AttentionWork
from aftermax.positions import POSITIONS


@dataclass(frozen=True)
class HashHopWork(AttentionWork):
    """What is trained and measured, the same for each system."""

    task: ClassVar[str] = "hashhop"
    causal: ClassVar[bool] = True
    encodings: ClassVar[tuple[str, ...]] = tuple(POSITIONS)
    final: ClassVar[str] = "loss"
    kept_for_tuning: ClassVar[str] = "problems kept for this"
    data: ClassVar[Path | None] = None  # type: ignore[misc]
    """Problems are drawn, not read."""

    systems: tuple[str, ...] = ("softmax", "softmax/alibi", "log-n/p-rope", "lssar", "linear")
    """Catalogue names, each with optional traits after a slash: a position encoding (rope, p-rope,
    alibi, none), bare (no QK-norm), hybrid (a norm after each branch too), layerscale. p-rope turns
    the frequencies that turn at least once within the training length."""
    hops: tuple[int, ...] = (1, 2)
    """Links of the chains; as many problems of each in a batch, all chains of a problem alike."""
    chain_of_thought: bool = True
    """An answer is the whole chain, link by link; else its end alone."""
    hashes: int = 64
    """Different ones, each a token; the longest problem must not need more."""

    layers: int = 3
    width: int = 64
    heads: int = 4
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

    context: int = 32
    """Tokens of the longest problems in training, questions and answers included; a batch has
    problems of one size, from two chains on, and more of them where they are shorter."""
    multiples: tuple[int, ...] = (1, 2, 4)
    """Evaluation lengths as multiples of the training length."""
    steps: int = 800
    batch: int = 64
    """Problems of a step at the training length."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.1
    learning_rates: tuple[float, ...] = (3e-3,)
    """Tried for each system in runs of their own; one rate = no search."""
    search_steps: int = 400
    """Length of each search run."""
    seeds: tuple[int, ...] = (0,)
    scored: int = 64
    """Problems of each kind and length that are scored."""
    threads: int = 1
    """Threads of each run. Part of the work: sums depend on it in the last bit."""

    def __post_init__(self):
        self.check("hashes", "scored")
        if self.multiples[:1] != (1,) or list(self.multiples) != sorted(set(self.multiples)):
            raise ValueError(f"multiples must rise and begin with 1, got {self.multiples}")
        if not self.hops or list(self.hops) != sorted(set(self.hops)) or self.hops[0] < 1:
            raise ValueError(f"hops must rise and begin with 1 or more, got {self.hops}")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads must divide heads, got {self.kv_heads} and {self.heads}")
        if self.batch < len(self.hops):
            raise ValueError(f"a batch has a problem of each of the hops, got {self.batch}")
        for hops in self.hops:
            if self.chains(hops, self.context) < 2:
                raise ValueError(
                    f"two chains of {hops} hops need a context of "
                    f"{1 + 2 * self.tokens_of_chain(hops)} tokens, got {self.context}"
                )
            needed = self.chains(hops, self.lengths[-1]) * (hops + 1)
            if needed > self.hashes:
                raise ValueError(
                    f"{self.lengths[-1]} tokens of {hops}-hop chains hold {needed} different "
                    f"hashes, got hashes={self.hashes}"
                )

    def settings(self) -> dict:
        return {name: value for name, value in super().settings().items() if name != "data"}

    @property
    def lengths(self) -> tuple[int, ...]:  # type: ignore[override]
        """Evaluation lengths in tokens."""
        return tuple(self.context * m for m in self.multiples)

    def tokens_of_chain(self, hops: int) -> int:
        """Its lines, two tokens each, its question and its answer."""
        return 2 * hops + 1 + (hops if self.chain_of_thought else 1)

    def chains(self, hops: int, length: int) -> int:
        """As many as the length holds, beside the mark before the questions."""
        return (length - 1) // self.tokens_of_chain(hops)

    def tokens(self, hops: int, chains: int) -> int:
        """Of a problem of so many chains."""
        return 1 + chains * self.tokens_of_chain(hops)


_QUICK = HashHopWork()
_STANDARD = dataclasses.replace(
    _QUICK,
    systems=(
        "softmax",
        "softmax/alibi",
        "log-n/p-rope",
        "cosine/p-rope",
        "lssar/p-rope",
        "linear",
        "cosformer",
        "transnormer-lrpe",
        "normalised",
    ),
    steps=1500,
    learning_rates=(1.5e-3, 3e-3, 6e-3),
    search_steps=500,
    seeds=(0, 1, 2),
)
PRESETS = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "long": dataclasses.replace(
        _STANDARD,
        **{"hops": (1, 2, 3), "hashes": 512, "layers": 6, "width": 128, "context": 64},
        multiples=(1, 2, 4, 8, 16),
        steps=10000,
        search_steps=2000,
        scored=256,
    ),
}
"""quick: some minutes on two cores. standard: an hour or so. long: a night or more."""
