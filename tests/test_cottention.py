"""Cottention: the two sides that its divisor can stand on, and how its rows grow."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import Cottention, Visible

from .native import F64, normal

CAUSAL = Visible(causal=True)
SIDES = ["row", "value"]


def inputs(tokens: int = 300, width: int = 16) -> list[torch.Tensor]:
    return [normal(1, 2, tokens, width, seed=s).to(F64) for s in range(3)]


def power(exponent: float) -> torch.Tensor:
    """m (H,) of which the sigmoid is that."""
    exponents = torch.full((2,), exponent, dtype=F64)
    return torch.logit(exponents) if 0 < exponent < 1 else 1000 * (2 * exponents - 1)


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x - y).norm() / y.norm()).item()


def test_the_initial_power_is_that_of_the_authors():
    assert Cottention().learned(3, 4, 4)["m"].tolist() == [0.5] * 3
    case = inputs(9)
    start = Cottention().attend(*case, CAUSAL)
    exponent = 1 / (1 + math.exp(-0.5))
    assert_close(Cottention().attend(*case, CAUSAL, m=power(exponent)), start)
    sums = Cottention().attend(*case, CAUSAL, m=power(0.0))
    assert_close(start, sums / torch.arange(1, 10, dtype=F64)[:, None] ** exponent)


def test_the_two_sides_are_not_the_same():
    case = inputs()
    row, value = (Cottention(side).attend(*case, CAUSAL) for side in SIDES)
    # nothing but the first token, which stands alone, agrees
    assert_close(row[:, :, 0], value[:, :, 0], rtol=1e-14, atol=0)
    assert 0.5 < relative(value, row) < 5
    # where each token sees the same, so do both sides
    row, value = (Cottention(side).attend(*case, Visible()) for side in SIDES)
    assert_close(row, value, rtol=1e-12, atol=1e-13)


def test_a_value_weighs_by_its_own_place_wherever_the_query_stands():
    same = torch.ones(1, 2, 1000, 4, dtype=F64)
    one_hot = torch.eye(1000, dtype=F64)[:, [0, 999]].expand(1, 2, -1, -1)
    last = Cottention("value").attend(same, same, one_hot, CAUSAL)[0, 0, -1]
    exponent = 1 / (1 + math.exp(-0.5))
    assert_close(last, torch.tensor([1, 1000**-exponent], dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("side", SIDES)
@given(seed=st.integers(0, 100))
def test_only_directions_are_compared(side, seed):
    query, key, value = inputs(20)
    random = torch.Generator().manual_seed(seed)
    lengths = 10 ** (6 * torch.rand(2, 1, 2, 20, 1, generator=random, dtype=F64) - 3)
    expected = Cottention(side).attend(query, key, value, CAUSAL)
    out = Cottention(side).attend(lengths[0] * query, lengths[1] * key, value, CAUSAL)
    assert_close(out, expected, rtol=1e-12, atol=1e-13)
    # a sign is none of a direction
    assert_close(Cottention(side).attend(-query, key, value, CAUSAL), -expected)


@given(seed=st.integers(0, 1000), width=st.integers(1, 20))
def test_no_score_is_above_one(seed, width):
    query, key = (normal(1, 2, 30, width, seed=seed + s).to(F64) for s in range(2))
    one_hot = torch.eye(30, dtype=F64).expand(1, 2, 30, 30)
    scores = Cottention().attend(query, key, one_hot, Visible(), m=power(0.0))
    assert scores.abs().max() <= 1 + 1e-14
    itself = Cottention().attend(key, key, one_hot, Visible(), m=power(0.0))
    assert_close(itself.diagonal(dim1=-2, dim2=-1), torch.ones(1, 2, 30, dtype=F64))


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_aligned_keys_add_up_to_a_power_of_their_number(exponent):
    same = torch.ones(1, 2, 1000, 4, dtype=F64)
    out = Cottention().attend(same, same, same, CAUSAL, m=power(exponent))
    number = torch.arange(1, 1001, dtype=F64)[:, None].expand(1, 2, 1000, 4)
    # without a divisor a row grows as its number of keys, with all of it it is their mean
    assert_close(out, number ** (1 - exponent), rtol=1e-11, atol=0)


def test_random_keys_add_up_to_the_root_of_their_number():
    lengths = []
    for exponent in (0.0, 0.5, 1.0):
        sizes = Cottention().attend(*inputs(2000), CAUSAL, m=power(exponent)).norm(dim=-1)
        early, late = sizes[..., 100:300].mean(), sizes[..., 1500:].mean()
        lengths.append((late / early).log().item() / math.log(1750 / 200))
    for got, grows in zip(lengths, (0.5, 0.0, -0.5), strict=True):
        assert got == pytest.approx(grows, abs=0.15)


@pytest.mark.parametrize("queries", [3, 7])
def test_values_divided_at_their_own_place_need_as_many_queries(queries):
    query, key, value = inputs(5)
    query = inputs(queries)[0]
    message = rf"by what its own token sees: .* got {queries} queries and 5 keys"
    with pytest.raises(ValueError, match=message):
        Cottention("value").attend(query, key, value, CAUSAL)
    assert Cottention("row").attend(query, key, value, CAUSAL).shape == (1, 2, queries, 16)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("form", ["parallel", "chunked"])
def test_the_power_is_learned(side, form):
    query, key, value = inputs(20)
    m = torch.tensor([0.5, -1.0], dtype=F64, requires_grad=True)

    def loss(m):
        return Cottention(side).attend(query, key, value, CAUSAL, form=form, m=m).square().sum()

    (gradient,) = torch.autograd.grad(loss(m), m)
    assert (gradient != 0).all()
    assert torch.autograd.gradcheck(loss, m)


def test_a_zero_vector_has_no_direction():
    query, key, value = inputs(6)
    query[:, :, 2] = 0
    key[:, :, 1] = 0
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = Cottention().attend(*leaves, CAUSAL)
    assert torch.equal(out[:, :, 2], torch.zeros_like(out[:, :, 2]))
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


def test_there_are_two_sides():
    with pytest.raises(ValueError, match="scale_side must be 'row' or 'value', got 'both'"):
        Cottention("both")  # type: ignore[arg-type]
