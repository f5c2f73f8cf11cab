"""The systems that there are, one line each. Adding one = one file + one line here."""

from __future__ import annotations

from aftermax.entry import Entry
from aftermax.hybrid import recurformer
from aftermax.linear import cosformer, cottention, elu, inline, normalised, transnormer
from aftermax.lowrank import soft
from aftermax.quantised import longvq
from aftermax.sparse import sparsek
from aftermax.weights import clipped, rela, sigmoid, singlepass, softmax, softplus

CATALOGUE: tuple[Entry, ...] = (
    softmax.SOFTMAX,
    softmax.LOG_N,
    softmax.COSINE,
    softmax.SCALE_INVARIANT,
    softmax.SOFTMAX_ONE,
    softmax.SINK,
    clipped.CLIPPED,
    clipped.NORMALISED_CLIPPED,
    softplus.LSSA_ENTRY,
    softplus.LSSAR_ENTRY,
    softplus.LSSAR_LOG_ENTRY,
    sigmoid.ENTRY,
    rela.RELA,
    rela.RELA_RMS,
    rela.RELU_POWER,
    elu.ENTRY,
    cosformer.ENTRY,
    cottention.ROW,
    cottention.VALUE,
    transnormer.DECAY,
    transnormer.LRPE,
    inline.ENTRY,
    normalised.ENTRY,
    sparsek.ENTRY,
    longvq.ENTRY,
    recurformer.ENTRY,
    soft.ENTRY,
    soft.NORMALISED,
    singlepass.ONE_PASS,
    singlepass.FIXED_ONE_PASS,
)


def find(name: str) -> Entry:
    """The entry of that name.

    Raises:
        ValueError: where there is none; the message lists those that there are.

    >>> find("lssar").system
    LSSAR(power=15)
    """
    for entry in CATALOGUE:
        if entry.name == name:
            return entry
    names = ", ".join(entry.name for entry in CATALOGUE)
    raise ValueError(f"no system is called {name!r}; the catalogue has {names}")
