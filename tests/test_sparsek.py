"""SparseK: the laws at a k and a window that leave something out, and what is special."""

import dataclasses

import pytest

from aftermax import SparseK
from aftermax.sparse.sparsek import ENTRY

from .contract import LAWS, hold
from .naive import NAIVE
from .naive_sparsek import sparsek as naive

SMALL = {
    "kv": SparseK(k=2, window=2),
    "v": SparseK(k=3, window=1, couple="v"),
    "log": SparseK(k=2, window=0, couple="log"),
    "raw": SparseK(k=2, window=2, normalise=False),
    "left out": SparseK(k=2, window=2, linear=True),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("law", LAWS)
def test_law_of_a_small_selection(name, law, monkeypatch):
    system = SMALL[name]
    given = (system.k, system.window, system.couple, system.normalise, system.linear)
    monkeypatch.setitem(NAIVE, ENTRY.name, naive(*given))
    hold(dataclasses.replace(ENTRY, system=system), law)
