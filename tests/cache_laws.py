"""Law 6 through `aftermax.Cache`: what a cache keeps can be split, picked from, taken back, joined
and counted, for every entry that decodes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from aftermax import Cache, Entry, OfSystem, Visible
from aftermax.cache import parts_of
from aftermax.state import tensors_of

from .cases import EXACT, F64, Case, case_of

TOKENS = 10
PLACES = st.integers(0, TOKENS)


def _case(entry: Entry) -> tuple[Case, OfSystem]:
    case = case_of(entry, tokens=TOKENS, kv_heads=2, value_width=5)
    return case, OfSystem(entry.system, 2, 8, 5, options=case.learned, dtype=F64)


def _piece(case: Case, start: int, stop: int) -> tuple[Tensor, ...]:
    return tuple(x[:, :, start:stop] for x in case[:3])


def _whole(entry: Entry, case: Case) -> Tensor:
    return case.attend(entry, Visible(causal=True), enable_gqa=True)


def law_cache_steps(entry: Entry) -> None:
    """6. A token at a time through `step`, after a prompt of any length, equals the full pass; the
    length and the bytes are those of what is kept."""
    case, reader = _case(entry)
    whole = _whole(entry, case)
    for prompt in (0, 1, 7):
        cache = Cache(reader, batch=2)
        out = [cache.append(*_piece(case, 0, prompt))] if prompt else []
        for i in range(prompt, TOKENS):
            out.append(cache.step(*(x[:, :, i] for x in case[:3])).unsqueeze(2))
            assert cache.length == i + 1
            parts = [p for part in parts_of(cache.state) for p in getattr(part, "parts", [part])]
            held = [x for part in parts for x in tensors_of(part).values()]
            assert cache.bytes >= sum(x.numel() * x.element_size() for x in held) > 0
        assert_close(torch.cat(out, 2), whole, **EXACT)


def law_cache_rollback(entry: Entry) -> None:
    """6. A snapshot brings back what was kept, whatever was read since; `truncate` does so without
    one, or says that it cannot."""

    @given(length=PLACES, further=PLACES)
    def equal(length: int, further: int) -> None:
        case, reader = _case(entry)
        whole = _whole(entry, case)
        cache = Cache(reader, batch=2)
        cache.append(*_piece(case, 0, length))
        before = cache.snapshot()
        other = case_of(entry, tokens=TOKENS, kv_heads=2, value_width=5, seed=1)
        cache.append(*_piece(other, 0, further))
        if cache.can_truncate:
            cache.truncate(length)
            assert cache.length == length
            assert_close(cache.append(*_piece(case, length, TOKENS)), whole[:, :, length:], **EXACT)
            with pytest.raises(ValueError, match="are held"):
                cache.truncate(TOKENS + 1)
        else:
            with pytest.raises(ValueError, match="snapshot"):
                cache.truncate(length)
        cache.restore(before)
        assert_close(cache.append(*_piece(case, length, TOKENS)), whole[:, :, length:], **EXACT)

    equal()


def law_cache_rows(entry: Entry) -> None:
    """6. Rows of the batch that are picked, repeated or dropped go on as the ones they were."""
    case, reader = _case(entry)
    whole = _whole(entry, case)
    for index in ([1, 0], [1, 1, 0], [0], [1]):
        rows = torch.tensor(index)
        cache = Cache(reader, batch=2)
        cache.append(*_piece(case, 0, 6))
        cache.reorder(rows)
        rest = cache.append(*(x[rows] for x in _piece(case, 6, TOKENS)))
        assert_close(rest, whole[rows][:, :, 6:], **EXACT)
    for wrong in (torch.tensor([2]), torch.tensor([[0, 1]]), torch.tensor([0.0])):
        with pytest.raises(ValueError, match="rows"):
            cache.reorder(wrong)


def law_cache_merge(entry: Entry) -> None:
    """6. Where two pieces that were read apart can be joined, what follows is what follows one
    pass; where they cannot, the cache says so."""

    @given(cuts=st.tuples(PLACES, PLACES).map(sorted))
    def equal(cuts: list[int]) -> None:
        middle, end = cuts
        case, reader = _case(entry)
        first = Cache(reader, batch=2)
        first.append(*_piece(case, 0, middle))
        second = Cache(reader, batch=2, start=middle)
        second.append(*_piece(case, middle, end))
        assert second.length == end
        if not first.can_merge:
            with pytest.raises(ValueError, match="read apart"):
                first.merge(second)
            return
        first.merge(second)
        assert first.length == end
        rest = first.append(*_piece(case, end, TOKENS))
        assert_close(rest, _whole(entry, case)[:, :, end:], **EXACT)
        third = Cache(reader, batch=2, start=end + 1)
        with pytest.raises(ValueError, match="begin it with start"):
            third.merge(second)

    equal()


CACHE_LAWS = {
    "cache_steps": law_cache_steps,
    "cache_rollback": law_cache_rollback,
    "cache_rows": law_cache_rows,
    "cache_merge": law_cache_merge,
}
