"""One line of the catalogue: a system, described. Data for tables, laws and plots, no switch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Laws:
    """What a system promises beyond the contract that binds all; the tests hold it to it."""

    rows_sum_to_one: bool = False
    rows_at_most_one: bool = False
    non_negative: bool = True
    shift_invariant: bool = False
    """The same number added to every score of a row changes nothing."""
    scale_free: bool = False
    """Queries and keys of any length give the same weights: only directions are compared."""
    length_aware: bool = False
    """The formula counts the keys that a row sees."""


@dataclass(frozen=True)
class Entry:
    """A system of the catalogue.

    Five words describe it, in the order in which it works: which `score` compares query and key;
    what makes it `positivity`-safe; which `normaliser` follows; what `reweight`s the result; how
    the sum is `walk`ed.
    """

    name: str
    """Lower case with hyphens: on the command line, in the store, in Hugging Face names."""
    title: str
    system: Any
    """A row map, or another value with the methods of `aftermax.System`."""
    formula: str
    paper: str
    arxiv: str
    """Number of the source, "" where it has none."""
    score: str
    positivity: str
    normaliser: str
    reweight: str = "none"
    walk: str = "dense"
    laws: Laws = Laws()
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """Law of the contract that this system cannot keep -> the reason."""
    claim: str = ""
    """What its paper claims about length, in a sentence."""
    ours: bool = False
    """True where the formula, or this form of it, is this library's own."""
    causal: bool = True
    """False where the formula has no causal form: a causal call then raises."""
    positions: str = ""
    """The position encoding that belongs to the formula; "" where any may stand before it."""
    module: Callable[..., Any] | None = None
    """Its paper's attention for text, a class that is called as `aftermax.Attention`; None where
    that is `Attention` with the system in it."""
    image_module: Callable[..., Any] | None = None
    """Its paper's attention for images, a class that is called with (width, heads=, grid=); None
    where that is `aftermax.Attention` with the system in it."""
