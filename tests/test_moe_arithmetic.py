"""The arithmetic of Edge-MoE against exact arithmetic: numbers, softmax in one pass, GELU."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext
from fractions import Fraction
from hashlib import sha256

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax.moe import (
    ACTIVATION,
    Fixed,
    fixed_gelu,
    gelu_delta,
    gelu_error,
    gelu_table,
    multiply,
    recast,
    single_pass_softmax,
    table_gelu,
    three_pass_softmax,
)
from aftermax.moe.fixedpoint import exp

RELEASED_TABLE = "a76d51f652a5e04302508bf8cc4f7a61df0aead0f3f2e782797de5481c8a585c"
"""SHA-256 of the 177 entries of src/gelu.cpp in the released sources (sharc-lab/Edge-MoE, commit
984b23bd), as integers over 2^22 with commas between them."""

FORMS = st.builds(Fixed, st.integers(2, 32), st.integers(-3, 16), st.booleans())


def cut(value: Fraction, form: Fixed) -> int:
    """By definition: towards minus infinity, then the lowest bits."""
    raw = math.floor(value * Fraction(2) ** form.fraction) % 2**form.width
    return raw - 2**form.width if form.signed and raw >= 2 ** (form.width - 1) else raw


def raws(form: Fixed) -> st.SearchStrategy[int]:
    return st.integers(form.lowest, form.highest)


def value_of(raw: int, form: Fixed) -> Fraction:
    return raw * Fraction(2) ** -form.fraction


# ---- numbers -------------------------------------------------------------------------------------


@given(FORMS, st.floats(-1e6, 1e6))
def test_a_number_is_cut_and_wrapped(form, x):
    raw = form.encode(torch.tensor(x, dtype=torch.float64))
    assert int(raw) == cut(Fraction(x), form)
    assert Fraction(float(form.decode(raw))) == value_of(int(raw), form)


@given(st.data(), FORMS, FORMS)
def test_formats_are_exchanged_exactly(data, source, target):
    raw = data.draw(raws(source))
    if target.fraction - source.fraction > 31:
        with pytest.raises(ValueError, match="bits of fraction"):
            recast(torch.tensor(raw), source, target)
    else:
        wanted = cut(value_of(raw, source), target)
        assert int(recast(torch.tensor(raw), source, target)) == wanted


@given(st.data(), FORMS, FORMS)
def test_products_are_exact_until_they_are_cut(data, left, right):
    a, b = data.draw(raws(left)), data.draw(raws(right))
    wanted = cut(value_of(a, left) * value_of(b, right), ACTIVATION)
    if ACTIVATION.fraction - left.fraction - right.fraction <= 0:
        found = multiply(torch.tensor(a), torch.tensor(b), left, right, ACTIVATION)
        assert int(found) == wanted


@given(st.integers(-(2**31), 0))
def test_exponentials_are_exact_until_they_are_cut(raw):
    getcontext().prec = 60
    exact = (Decimal(raw) / 2**22).exp() * 2**22
    assert int(exp(torch.tensor(raw))) == math.floor(exact)


def test_what_is_no_number_of_a_format_is_refused():
    with pytest.raises(ValueError, match="1 to 32"):
        Fixed(33, 2)
    with pytest.raises(ValueError, match="finite"):
        ACTIVATION.encode(torch.tensor([math.inf]))
    with pytest.raises(ValueError, match="floating point"):
        ACTIVATION.encode(torch.tensor([1]))
    with pytest.raises(ValueError, match="int64"):
        ACTIVATION.decode(torch.tensor([2**31]))
    with pytest.raises(ValueError, match="0 or less"):
        exp(torch.tensor([1]))


# ---- softmax -------------------------------------------------------------------------------------


def by_hand(scores: list[int]) -> tuple[list[int], int, bool]:
    """One score after another in whole numbers: weights, sum, and whether anything wrapped."""
    one, lowest, modulus = 2**22, -(2**31), 2**32
    wrapped = False

    def kept(raw: int, matters: bool = True) -> int:
        nonlocal wrapped
        out = (raw - lowest) % modulus + lowest
        wrapped |= matters and out != raw
        return out

    def power(gap: int) -> int:
        if gap > 0:
            return 0
        return math.floor((Decimal(gap) / one).exp() * one)

    getcontext().prec = 60
    maximum, total = lowest, 0
    for score in scores:
        gap = maximum - score
        p = power(kept(-abs(gap), matters=total != 0))
        total = kept(total * p // one + one if gap < 0 else total + p)
        maximum = score if gap < 0 else maximum
    share = kept(one * one // total) if total else kept(one)
    wrapped |= total <= 0
    weights = [kept(power(kept(s - maximum)) * share // one) for s in scores]
    return weights, total, wrapped


@given(
    st.lists(st.floats(-500, 500) | st.sampled_from([0.0, -512.0, 511.5]), min_size=1, max_size=12),
    st.sampled_from([1.0, 0.01]),
)
def test_one_pass_is_that_of_whole_numbers(values, scale):
    scores = ACTIVATION.encode(scale * torch.tensor(values, dtype=torch.float64))
    found = single_pass_softmax(scores)
    weights, total, wrapped = by_hand(scores.tolist())
    assert found.weights.tolist() == weights
    assert int(found.total) == total
    assert bool(found.wrapped) == wrapped


@pytest.mark.parametrize("n", [129, 511])
@pytest.mark.parametrize("deviation", [1, 4])
def test_it_is_a_softmax_up_to_its_format(n, deviation):
    random = torch.Generator().manual_seed(0)
    x = deviation * torch.randn(200, n, generator=random, dtype=torch.float64)
    scores = ACTIVATION.encode(x)
    for corrected in (False, True):
        found = single_pass_softmax(scores, corrected=corrected)
        weights = ACTIVATION.decode(found.weights)
        exact = ACTIVATION.decode(scores).softmax(-1)
        assert not bool(found.wrapped.any())
        assert float((weights - exact).abs().max()) < 5e-5
        # a weight is the product of two numbers that were cut by up to 2^-22 each, times their sum
        assert float((weights.sum(-1) - 1).abs().max()) < (2 * n + 600) * 2.0**-22
        assert bool((weights.gather(-1, exact.argmax(-1, True)) == weights.amax(-1, True)).all())


@pytest.mark.parametrize("equal", [511, 512, 600, 1024])
def test_its_sum_wraps_at_512_and_says_so(equal):
    scores = torch.zeros(1, equal, dtype=torch.int64)
    found = single_pass_softmax(scores)
    assert bool(found.wrapped) == (equal >= 512)
    wanted = equal if equal < 512 else (equal + 512) % 1024 - 512
    assert int(found.total) == wanted * 2**22
    corrected = single_pass_softmax(scores, corrected=True)
    assert not bool(corrected.wrapped)
    assert_close(
        ACTIVATION.decode(corrected.weights),
        torch.full((1, equal), 1 / equal).double(),
        rtol=0,
        atol=2.0**-22,
    )


def test_scores_further_apart_than_the_format_wrap_unless_corrected():
    scores = ACTIVATION.encode(torch.tensor([300.0, -300.0, 299.0]))
    assert bool(single_pass_softmax(scores).wrapped)
    found = single_pass_softmax(scores, corrected=True)
    wanted = torch.tensor([300.0, -300.0, 299.0]).double().softmax(-1)
    assert_close(ACTIVATION.decode(found.weights), wanted, rtol=0, atol=2.0**-21)


@pytest.mark.parametrize("form", [Fixed(24, 2), Fixed(16, 3), Fixed(22, 4), Fixed(32, 6)])
@pytest.mark.parametrize("softmax", [single_pass_softmax, three_pass_softmax])
def test_few_bits_before_the_point_keep_the_weights_of_far_scores(form, softmax):
    """exp of a difference that the format does not hold is no 0 there."""
    edge = 2.0 ** (form.integer - 1) - 0.1
    scores = form.encode(torch.tensor([edge, -edge, 0.0], dtype=torch.float64))
    wanted = form.decode(scores).softmax(-1)
    found = softmax(scores, form, corrected=True)
    assert_close(form.decode(found.weights), wanted, rtol=0, atol=2.0 ** (3 - form.fraction))


def test_rows_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one score"):
        single_pass_softmax(torch.zeros(2, 0, dtype=torch.int64))
    for form in (Fixed(8, 0, signed=False), Fixed(32, 2), Fixed(8, 10), Fixed(16, 1)):
        with pytest.raises(ValueError, match="signed format"):
            single_pass_softmax(torch.zeros(2, 3, dtype=torch.int64), form)
    with pytest.raises(ValueError, match="64 bits"):
        single_pass_softmax(torch.zeros(1, 2**19).long().expand(1, 2**19), corrected=True)


# ---- GELU ----------------------------------------------------------------------------------------


def test_the_table_is_rounded_to_the_nearest():
    getcontext().prec = 40
    table = gelu_table()
    assert len(table) == 177
    assert float(table[-1]) == 0
    for place in (0, 1, 32, 100, 175):
        u = place / 32
        exact = Decimal(float(gelu_delta(torch.tensor(u, dtype=torch.float64)))) * 2**22
        assert abs(Decimal(float(table[place]) * 2**22) - exact) <= Decimal("0.5")


def test_the_table_is_the_released_one():
    raw = (gelu_table() * 2**22).long().tolist()
    assert sha256(",".join(map(str, raw)).encode()).hexdigest() == RELEASED_TABLE


@pytest.mark.parametrize("step", [1 / 4, 1 / 32, 1 / 128])
def test_the_error_is_that_of_the_law(step):
    x = torch.linspace(-8, 8, 2_000_001, dtype=torch.float64)
    error = (table_gelu(x, step, fraction=None) - torch.nn.functional.gelu(x)).abs().max()
    bound = gelu_error(step)
    assert 0.9 * bound < float(error) <= bound * (1 + 1e-9)
    if step == 1 / 32:
        with_rounding = (table_gelu(x) - torch.nn.functional.gelu(x)).abs().max()
        assert float(with_rounding) < 9.8e-5


@given(st.integers(-(2**31) + 1, 2**31 - 1) | st.integers(-(6 << 22), 6 << 22))
def test_the_unit_is_that_of_rational_numbers(raw):
    x = value_of(raw, ACTIVATION)
    table = [Fraction(float(t)) for t in gelu_table()]
    wanted = max(x, Fraction(0))
    if abs(x) < Fraction(11, 2):
        place = abs(x) * 32
        index = math.floor(place)
        slope = table[index + 1] - table[index]
        delta = math.floor((table[index] + (place - index) * slope) * 2**22)
        wanted -= Fraction(delta, 2**22)
    assert value_of(int(fixed_gelu(torch.tensor(raw))), ACTIVATION) == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_takes_every_float_and_has_a_gradient(dtype):
    x = torch.linspace(-7, 7, 301).to(dtype).requires_grad_()
    out = table_gelu(x)
    assert out.dtype == dtype
    out.float().sum().backward()
    exact = x.detach().double().requires_grad_()
    torch.nn.functional.gelu(exact).sum().backward()
    assert exact.grad is not None
    # the slope of a piece is off by h / 2 times the second derivative
    assert_close(x.grad.double(), exact.grad, rtol=0, atol=1 / 64 + torch.finfo(dtype).eps)


def test_what_is_not_finite_stays():
    x = torch.tensor([math.nan, math.inf, -math.inf])
    assert_close(table_gelu(x), torch.tensor([math.nan, math.inf, 0.0]), equal_nan=True)
    with pytest.raises(ValueError, match="fixed_gelu"):
        table_gelu(torch.tensor([1]))
    with pytest.raises(ValueError, match="power of two"):
        gelu_table(0.03)
    with pytest.raises(ValueError, match="multiple"):
        gelu_table(1 / 4, 5.3)
