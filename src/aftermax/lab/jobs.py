"""The runs of a study that is kept in one file."""

from __future__ import annotations

from typing import NamedTuple


class Job(NamedTuple):
    """What distinguishes a run from the others of its setting."""

    kind: str
    """"search" or "seed"."""
    arm: str
    rate: float
    seed: int
