"""The tasks that there are. What differs between them stands in a module each, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aftermax.lab import experts, hashhop, labels, outliers, rates, text, vision, words
from aftermax.lab.experts_work import PRESETS as EXPERTS_PRESETS
from aftermax.lab.hashhop_work import PRESETS as HASHHOP_PRESETS
from aftermax.lab.labels_work import PRESETS as LABEL_PRESETS
from aftermax.lab.outliers_work import PRESETS as OUTLIER_PRESETS
from aftermax.lab.rates_work import PRESETS as RATES_PRESETS
from aftermax.lab.store import Row, Store
from aftermax.lab.vision_work import PRESETS as VISION_PRESETS
from aftermax.lab.words_work import PRESETS as WORD_PRESETS
from aftermax.lab.work import PRESETS as TEXT_PRESETS
from aftermax.lab.work import AnyWork, Run


class Data(Protocol):
    """Prepared once, in a folder that every worker opens for itself."""

    @property
    def folder(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...


class Source(Protocol):
    """What the one grid asks of a task's module."""

    def prepare(self, work: Any, out: Path) -> Data:
        """Read and split the data of a work once; a later call opens what is there."""
        ...

    def open_data(self, folder: Path) -> Any: ...

    def about(self, data: Any, /) -> dict:
        """For the store: name, digest, sizes."""
        ...

    def told(self, about: dict) -> str:
        """`about` in a line."""
        ...


class Study(Source, Protocol):
    """A task whose runs are no training: it does them by itself, and no step has a cost."""

    def perform(
        self, run: Any, data: Any, store: Store, folder: Path, proceed: Callable[[], bool], /
    ) -> bool:
        """Do a run whole, from wherever it was left; whether it is finished (as `train.train`)."""
        ...


class Task(Source, Protocol):
    """What the one loop and the one measurement of cost ask beside it."""

    def model(self, run: Run, data: Any, /) -> nn.Module:
        """Before the first step; the global seed is set to the run's."""
        ...

    def batch(self, run: Run, data: Any, generator: torch.Generator, /) -> Any:
        """Of a step: a function of the generator alone, the same for every system."""
        ...

    def loss(self, model: Any, data: Any, run: Run) -> tuple[Tensor, Tensor]:
        """Of a batch: what is made smaller, and what is reported."""
        ...

    def evaluate(self, model: Any, work: Any, data: Any, step: int, /) -> list[Row]:
        """All measures of a trained model."""
        ...

    def tuning_loss(self, model: Any, work: Any, data: Any, /) -> float:
        """On the part of the data that only the choice of learning rates sees."""
        ...

    def largest_step(self, run: Run, model: Any, data: Any, /) -> Callable[[], object]:
        """What is called to measure memory: forward and backward at `work.lengths[-1]`.

        Larger than a step of training, whose memory the process holds already.
        """
        ...


TASKS: dict[str, Task] = {
    "text": text,
    "vision": vision,
    "labels": labels,
    "words": words,
    "outliers": outliers,
    "hashhop": hashhop,
    "experts": experts,
}
"""Those that train a model."""

STUDIES: dict[str, Study] = {"rates": rates}

PRESETS: dict[str, dict[str, Any]] = {
    "text": TEXT_PRESETS,
    "vision": VISION_PRESETS,
    "labels": LABEL_PRESETS,
    "words": WORD_PRESETS,
    "outliers": OUTLIER_PRESETS,
    "hashhop": HASHHOP_PRESETS,
    "experts": EXPERTS_PRESETS,
    "rates": RATES_PRESETS,
}


def task_of(work: AnyWork) -> Task:
    return TASKS[work.task]


def source_of(work: AnyWork) -> Source:
    """The module of a work, whether it trains or not."""
    return STUDIES[work.task] if work.task in STUDIES else TASKS[work.task]


def work_of(settings: dict) -> Any:
    """The work that these `settings()` are of, from JSON: lists were tuples."""
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()
    }
    task = fields.pop("task", "text")
    if fields.get("data") is not None:
        fields["data"] = Path(fields["data"])
    try:
        return type(PRESETS[task]["quick"])(**fields)
    except (KeyError, TypeError) as error:  # a task or a field that is no longer, or not yet
        raise ValueError(f"these are settings of another version of aftermax: {error}") from None
