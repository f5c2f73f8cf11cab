"""The text task: a small language model, trained at one length and read at longer ones.

A batch is windows of text, some of them with a recall problem put into it; what is measured stands
in `measure.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aftermax.lab import measure
from aftermax.lab.data.corpus import Corpus
from aftermax.lab.data.corpus import prepare as prepare_corpus
from aftermax.lab.data.recall import TRAINING_TASKS
from aftermax.lab.models import DecoderLM
from aftermax.lab.work import Run, Work
from aftermax.modules import auxiliary_loss

MEMORY_BATCH = 4
"""Windows of the step whose memory is measured."""

evaluate, tuning_loss = measure.evaluate, measure.tuning_loss


def prepare(work: Work, out: Path) -> Corpus:
    longest = work.lengths[-1] + 1
    return prepare_corpus(
        work.data, work.tokenizer, work.vocabulary, work.context + 1, longest, out
    )


def open_data(folder: Path) -> Corpus:
    return Corpus.open(folder)


def about(corpus: Corpus) -> dict:
    size = sum(len(corpus.tokens(split)) for split in ("train", "tune", "validation"))
    return {"name": corpus.name, "digest": corpus.digest, "tokens": size}


def told(about: dict) -> str:
    return f"text: {about['name']}, {about['tokens'] / 1e6:.1f} million tokens"


def model(run: Run[Work], corpus: Corpus) -> DecoderLM:
    return DecoderLM(run.work, run.arm, corpus.symbols.total)


class Batch(NamedTuple):
    tokens: Tensor  # int64 (B, T + 1)
    text: Tensor  # bool (B, T): targets that are text
    answers: Tensor  # bool (B, T): targets that are answers of recall problems


def batch(run: Run[Work], corpus: Corpus, generator: torch.Generator) -> Batch:
    """Windows of text; the first rows have recall problems put into them, half of each kind."""
    work = run.work
    tokens = corpus.random_windows("train", work.batch, work.context + 1, generator)
    text = torch.ones(work.batch, work.context, dtype=torch.bool)
    answers = torch.zeros_like(text)
    each = recall_rows(work) // len(TRAINING_TASKS)
    for i, task in enumerate(TRAINING_TASKS):
        part = slice(i * each, (i + 1) * each)
        problems = task(tokens[part], corpus.symbols, generator)
        tokens[part], answers[part], text[part] = problems.tokens, problems.asked, problems.text
    return Batch(tokens, text, answers)


def recall_rows(work: Work) -> int:
    """Rows of a batch that are recall problems, as many of each kind."""
    kinds = len(TRAINING_TASKS)
    return round(work.recall_share * work.batch / kinds) * kinds


def loss(model: DecoderLM, data: Batch, run: Run[Work]) -> tuple[Tensor, Tensor]:
    """The mean text loss, plus the mean recall loss and what the layers ask for (a commitment to
    their codes); reported is the first."""
    logits = model.logits(model(data.tokens[:, :-1])).float()
    each = F.cross_entropy(logits.flatten(0, 1), data.tokens[:, 1:].flatten(), reduction="none")
    each = each.view_as(data.text)
    text = each[data.text].mean()
    recall = each[data.answers].mean() if recall_rows(run.work) else 0.0
    return text + recall + auxiliary_loss(model), text


def largest_step(run: Run[Work], model: DecoderLM, corpus: Corpus) -> Callable[[], object]:
    """A step of the longest length."""
    work, generator = run.work, torch.Generator().manual_seed(0)
    tokens = corpus.random_windows("train", MEMORY_BATCH, work.lengths[-1] + 1, generator)

    def step() -> None:
        logits = model.logits(model(tokens[:, :-1])[:, -work.targets :])
        F.cross_entropy(logits.transpose(1, 2), tokens[:, -work.targets :]).backward()

    return step
