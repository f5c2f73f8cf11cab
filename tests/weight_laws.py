"""Law 10: what the weights of an entry are like, by what it declares of them (`Entry.laws`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from aftermax import Entry, Visible

from .cases import EXACT, F64, Case, case_of, distances, plain_and_natural, weights_of


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A drawn case with masks, the tokens and sizes of its scores being hypothesis's choice."""

    case: Case
    visible: Visible
    seen: Tensor


def drawn(entry: Entry, seed: int, tokens: int, size: float) -> Drawn:
    case = case_of(entry, tokens=tokens, seed=seed)
    case = case._replace(query=case.query * size)
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 1, tokens, tokens, generator=random) < 0.7
    causal = entry.causal and bool(seed % 2)
    visible = Visible(causal=causal, mask=mask)
    seen = mask & (distances(tokens) >= 0) if causal else mask
    return Drawn(case, visible, seen.expand(2, 4, tokens, tokens))


def _for_all_weights(entry: Entry, check: Callable[[Drawn, Tensor], None]) -> None:
    @given(
        seed=st.integers(0, 10**6),
        tokens=st.integers(1, 40),
        size=st.sampled_from([0.0, 1e-6, 0.1, 1.0, 10.0, 100.0]),
    )
    def holds(seed: int, tokens: int, size: float) -> None:
        draw = drawn(entry, seed, tokens, size)
        weights = weights_of(entry, draw.case, draw.visible)
        assert weights[~draw.seen].eq(0).all()
        check(draw, weights)

    holds()


def law_rows_sum_to_one(entry: Entry) -> None:
    """10. Every row that sees a key sums to 1."""

    def check(draw: Drawn, weights: Tensor) -> None:
        assert_close(weights.sum(-1), draw.seen.any(-1).to(F64), **EXACT)

    _for_all_weights(entry, check)


def law_rows_at_most_one(entry: Entry) -> None:
    """10. No row sums to more than 1."""

    def check(draw: Drawn, weights: Tensor) -> None:
        assert weights.sum(-1).max() <= 1 + 1e-12

    _for_all_weights(entry, check)


def law_non_negative(entry: Entry) -> None:
    """10. No weight is negative."""

    def check(draw: Drawn, weights: Tensor) -> None:
        assert weights.min() >= 0

    _for_all_weights(entry, check)


def law_shift_invariant(entry: Entry) -> None:
    """10. The same number added to every score of a row changes nothing."""

    @given(shift=st.floats(-50, 50), seed=st.integers(0, 100))
    def holds(shift: float, seed: int) -> None:
        case = case_of(entry, seed=seed)
        shifts = torch.full((2, 1, 9, 1), shift, dtype=F64)
        plain = weights_of(entry, case, Visible(causal=True))
        assert_close(weights_of(entry, case, Visible(causal=True, mask=shifts)), plain, **EXACT)

    holds()


def law_scale_free(entry: Entry) -> None:
    """10. Queries and keys of any length, each its own, give the same weights."""

    @given(seed=st.integers(0, 100), decades=st.floats(0, 6))
    def holds(seed: int, decades: float) -> None:
        case = case_of(entry, seed=seed)
        random = torch.Generator().manual_seed(seed + 1)
        lengths = 10 ** (decades * (torch.rand(2, 2, 4, 9, 1, generator=random, dtype=F64) - 0.5))
        stretched = case._replace(query=case.query * lengths[0], key=case.key * lengths[1])
        for visible in plain_and_natural(entry):
            weights = weights_of(entry, stretched, visible)
            # the longest keys differ by rounding, which the sharpest maps multiply by their power
            assert_close(weights, weights_of(entry, case, visible), rtol=1e-11, atol=1e-12)

    holds()


def _with_far_keys(entry: Entry, hidden: bool) -> tuple[Tensor, Tensor]:
    """Weights of 9 keys, alone and beside 30 more: hidden, or seen but pushed away by a bias that
    leaves them no weight at all."""
    case, more = case_of(entry), case_of(entry, tokens=30, seed=5)
    mask = torch.zeros(39, dtype=F64)
    mask[9:] = -torch.inf if hidden else -1e4
    beside = Case(
        case.query, *(torch.cat(pair, 2) for pair in zip(case[1:3], more[1:3], strict=True)), {}
    )
    weights = weights_of(entry, beside._replace(learned=case.learned), Visible(mask=mask))
    assert weights[..., 9:].abs().max() == 0
    return weights_of(entry, case, Visible(), columns=39), weights[..., :9]


def law_hidden_keys_do_not_count(entry: Entry) -> None:
    """10. Keys that are not visible are not counted: with 30 of them beside its own, every row has
    the weights that it has alone."""
    alone, beside = _with_far_keys(entry, hidden=True)
    assert_close(beside, alone, **EXACT)


def law_length_aware(entry: Entry) -> None:
    """10. Where the formula counts keys, visible keys that get no weight still change the weights
    of the others (a row with all on one key has nothing to change, hence the median); where it
    does not, they change nothing."""
    alone, beside = _with_far_keys(entry, hidden=False)
    if entry.laws.length_aware:
        changed = (alone - beside).abs().amax(-1)
        assert changed.median() > 1e-6
    else:
        assert_close(beside, alone, **EXACT)


DECLARED: dict[str, Callable[[Entry], None]] = {
    "rows_sum_to_one": law_rows_sum_to_one,
    "rows_at_most_one": law_rows_at_most_one,
    "non_negative": law_non_negative,
    "shift_invariant": law_shift_invariant,
    "scale_free": law_scale_free,
}
"""The laws that bind the entries whose `Laws` declare them, by the field's name."""
