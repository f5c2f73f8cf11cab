"""The task of labels: documents, each with some of very many labels.

One text encoder under every output layer. A layer has a vector for each label, or makes one of the
label's own text by the same encoder (a dual encoder); what is measured is the ranking of all labels
on a test split that no run and no choice has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aftermax.lab import encoders, heads, ranking
from aftermax.lab.data import debian_packages, xmc
from aftermax.lab.data.labelled import LabelledTexts
from aftermax.lab.data.labelled import prepare as prepare_texts
from aftermax.lab.labels_work import LabelsWork
from aftermax.lab.models import DualEncoder
from aftermax.lab.store import Row
from aftermax.lab.work import Run

AT_ONCE = 512
"""Documents that are ranked in one pass."""
MOST = 100
"""Labels of a ranking."""
MEMORY_BATCHES = 4
"""Batches of the step whose memory is measured."""


def prepare(work: LabelsWork, out: Path) -> LabelledTexts:
    packages = work.data is None or debian_packages.has_lists(work.data)
    if packages:
        found = debian_packages.read(work.labels, work.data, names=work.names)
    elif work.names or work.labels != "tags":
        raise ValueError(f"--labels and --names are of Debian's packages, not of {work.data}")
    else:
        assert work.data is not None
        found = xmc.read(work.data)
    # the Repository's sets stay whole, so that figures compare with others'
    least = (2 if packages else 0) if work.least is None else work.least
    held = prepare_texts(found, out, least=least)
    _check(work, held)
    if work.sentences is not None:
        encoders.encode_once(held, work.sentences)
    return held


def _check(work: LabelsWork, held: LabelledTexts) -> None:
    """What the systems and the encoder read must be there."""
    if held.label_tokens is None and any(s.startswith("dual/") for s in work.systems):
        others = " ".join(s for s in work.systems if not s.startswith("dual/"))
        raise ValueError(
            f"{held.name} has no texts of its labels, which dual encoders read; --systems "
            f"{others or 'softmax bce'} takes it"
        )
    if work.encoder == "transformer":
        encoders.TokenReader(held, work.words)


def open_data(folder: Path) -> LabelledTexts:
    return LabelledTexts.open(folder)


def about(held: LabelledTexts) -> dict:
    return held.about | {"name": held.name, "digest": held.digest}


def told(about: dict) -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in about["documents"].items())
    gone = about["dropped"]
    rare = f"; {gone['labels']:,} rare labels left out" if gone["labels"] else ""
    without = sum(gone["documents"].values())
    empty = f", {without:,} documents without any other" if without else ""
    return (
        f"labels: {about['name']}, {about['labels']:,} labels, "
        f"{about['labels_per_document']:.1f} a document ({counts}{rare}{empty})"
    )


class LabelModel(nn.Module):
    """A dual encoder's towers, and the output layer on them; `reader` has the texts."""

    def __init__(self, work: LabelsWork, output: str, held: LabelledTexts):
        super().__init__()
        dual = output.startswith("dual/")
        self.reader = encoders.reader(work, held)
        self.towers = DualEncoder(
            self.reader.encoder(work),
            work.width,
            encode_labels=self.reader.encoder(work) if dual and work.separate else None,
            hidden=work.hidden,
            temperature=work.temperature,
            dropout=work.dropout,
        )
        if not dual:
            self.towers.of_label = nn.Identity()  # no label is read
        self.head = heads.of_labels(
            output,
            work,
            held.frequencies,
            len(held.splits["train"]),
            lambda rows: self.towers.labels(self.reader.labels(rows)),
        )

    def hidden(self, split: str, rows: Tensor) -> Tensor:
        """(B, width), of the documents in these rows."""
        return self.towers.documents(self.reader.documents(split, rows))


def model(run: Run[LabelsWork], held: LabelledTexts) -> LabelModel:
    return LabelModel(run.work, run.system, held)


class Batch(NamedTuple):
    rows: Tensor  # int64 (B,), of the training split
    positives: Tensor  # int64 (B, K), -1 after the last


def batch(run: Run[LabelsWork], held: LabelledTexts, generator: torch.Generator) -> Batch:
    labels = held.splits["train"].labels
    rows = torch.randint(0, labels.size, (run.work.batch,), generator=generator)
    return Batch(rows, labels.padded(rows))


def loss(model: LabelModel, data: Batch, run: Run[LabelsWork]) -> tuple[Tensor, Tensor]:
    mean = model.head.loss(model.hidden("train", data.rows), data.positives)
    return mean, mean


def evaluate(model: LabelModel, work: LabelsWork, held: LabelledTexts, step: int) -> list[Row]:
    """The ranking of the test split; the parameters, of all and of what stands for labels."""
    found = ranked(model, held, "test")
    found["parameters"] = heads.parameters(model)
    found["label_parameters"] = heads.parameters(model.head)
    return [Row(step, 1, measure, value) for measure, value in found.items()]


def tuning_loss(model: LabelModel, work: LabelsWork, held: LabelledTexts) -> float:
    """1 - nDCG@5: the same for every loss."""
    return 1 - ranked(model, held, "tune")["nDCG@5"]


@torch.no_grad()
def ranked(model: LabelModel, held: LabelledTexts, split: str) -> dict[str, float]:
    """All measures of a split, in evaluation mode."""
    documents = held.splits[split]
    spare = 0
    if len(documents.forbidden):  # what is taken out of a ranking must not leave it short
        spare = int(documents.forbidden[:, 0].bincount().max())
    most = min(MOST + spare, held.labels)
    was = model.training
    model.eval()
    rank = model.head.ranker(most)
    rows = torch.arange(len(documents)).split(AT_ONCE)
    top = torch.cat([rank(model.hidden(split, some)) for some in rows])
    model.train(was)
    top = ranking.without(top, documents.forbidden)
    return ranking.measures(top, documents.labels, held.inverse_propensities)


def largest_step(
    run: Run[LabelsWork], model: LabelModel, held: LabelledTexts
) -> Callable[[], object]:
    """Of several batches at once: what one takes is held already since the step before."""
    generator = torch.Generator().manual_seed(0)
    labels = held.splits["train"].labels
    rows = torch.randint(0, labels.size, (MEMORY_BATCHES * run.work.batch,), generator=generator)
    data = Batch(rows, labels.padded(rows))
    return lambda: loss(model, data, run)[0].backward()
