"""The task of words: the next word from a few before it, out of a large vocabulary.

A feed-forward network (Bengio et al. 2003) with one output layer or another; what is measured is
the share of words that are not among the first k guesses, since not every output layer gives
probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from aftermax.lab import heads
from aftermax.lab.data.words import Words
from aftermax.lab.data.words import prepare as prepare_words
from aftermax.lab.outputs import OutputArm
from aftermax.lab.store import Row
from aftermax.lab.words_work import TOP, WordsWork
from aftermax.lab.work import Run

AT_ONCE = 500
"""Words that are predicted in one pass."""
MEMORY_BATCHES = 4
"""Batches of the step whose memory is measured."""


def prepare(work: WordsWork, out: Path) -> Words:
    return prepare_words(work.data, work.least, max(work.window + 1, work.scored // 10), out)


def open_data(folder: Path) -> Words:
    return Words.open(folder)


def about(words: Words) -> dict:
    sizes = {split: len(stream) for split, stream in words.streams.items()}
    unknown = words.counts[words.unknown].item() / sizes["train"]
    held_out = len(words.known("validation"))
    own = {"words": sizes, "classes": len(words.vocabulary), "unknown": unknown, "asked": held_out}
    return {"name": words.name, "digest": words.digest, **own}


def told(about: dict) -> str:
    return (
        f"words: {about['name']}, {about['words']['train'] / 1e6:.2f} million to train on, "
        f"{about['classes']:,} different, {about['unknown']:.1%} unknown"
    )


class NextWord(nn.Module):
    """A layer of ReLU over the embedded window, a linear one, a norm, the output layer."""

    def __init__(self, work: WordsWork, arm: OutputArm, words: Words):
        super().__init__()
        sparse = arm.optimiser == "sgd"
        classes = len(words.vocabulary)
        self.embed = nn.Embedding(classes, work.embedding, sparse=sparse)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.network = nn.Sequential(
            nn.Linear(work.window * work.embedding, work.hidden),
            nn.ReLU(),
            nn.Linear(work.hidden, work.width),
            nn.RMSNorm(work.width),  # without it plain SGD soon leaves nothing above ReLU's 0
        )
        self.head = heads.of_words(arm, work, words.counts, sparse)

    def forward(self, windows: Tensor) -> Tensor:
        """(B, window) words -> (B, width)."""
        return self.network(self.embed(windows).flatten(1))


def model(run: Run[WordsWork], words: Words) -> NextWord:
    return NextWord(run.work, run.arm, words)


def batch(run: Run[WordsWork], words: Words, generator: torch.Generator) -> Tensor:
    return words.random_windows(run.work.batch, run.work.window + 1, generator)


def loss(model: NextWord, data: Tensor, run: Run[WordsWork]) -> tuple[Tensor, Tensor]:
    mean = model.head.loss(model(data[:, :-1]), data[:, -1:])
    return mean, mean


def evaluate(model: NextWord, work: WordsWork, words: Words, step: int) -> list[Row]:
    """Errors at each k on the held-out words; the parameters are counted too."""
    errors = top_errors(model, work, words, "validation")
    found = {f"top{k}_error": error for k, error in errors.items()}
    found["parameters"] = heads.parameters(model)
    return [Row(step, 1, measure, value) for measure, value in found.items()]


def tuning_loss(model: NextWord, work: WordsWork, words: Words) -> float:
    """The mean of the errors at all k: no one k is favoured."""
    errors = top_errors(model, work, words, "tune").values()
    return sum(errors) / len(errors)


@torch.no_grad()
def top_errors(model: NextWord, work: WordsWork, words: Words, split: str) -> dict[int, float]:
    windows = words.held_out_windows(split, work.scored, work.window + 1)
    most = min(TOP[-1], len(words.vocabulary))
    rank_words, ranks = model.head.ranker(most), []
    for part in windows.split(AT_ONCE):
        found = rank_words(model(part[:, :-1])) == part[:, -1:]  # (B, most)
        ranks.append(torch.where(found.any(1), found.int().argmax(1), most))
    rank = torch.cat(ranks)
    return {k: (rank >= k).float().mean().item() for k in TOP}


def largest_step(run: Run[WordsWork], model: NextWord, words: Words) -> Callable[[], object]:
    """Of several batches at once: what one takes is held already since the step before."""
    generator = torch.Generator().manual_seed(0)
    data = words.random_windows(MEMORY_BATCHES * run.work.batch, run.work.window + 1, generator)
    return lambda: loss(model, data, run)[0].backward()
