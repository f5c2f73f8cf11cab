"""How far the row kernels are from the exact values, in units in the last place of float32 (ULP).

The truth is summed and divided in extended precision and held against mpmath. Errors are counted
from the float32 next to the exact value; a ULP is never smaller than the step of the subnormal
numbers, 2^-149. The bounds hold for the algorithms that never round x - max. "cpu-online" subtracts
the maximum, and so does the reference: their error grows with the distance from it (65 ULP where
the maximum is 20.7 and x is 65 below), and neither is held to anything here.
"""

import functools

import mpmath
import numpy as np
import pytest
import torch

from aftermax import log_softmax, logsumexp, softmax

from .native import needs_kernels

IMPLS = ("cpu", "cpu-two-pass", "cpu-three-pass-recompute", "cpu-three-pass-reload")
EPS = 2.0**-23
SMALLEST_NORMAL = 2.0**-126

EXP = 1.1 * EPS
"""What e^x may be off by, relatively (exp.h)."""

SUM = EXP + 1.5 * EPS
"""And a sum of it: three additions in float32, half a unit each, before it goes on in double."""

pytestmark = needs_kernels


def normal(scale, mean=0.0):
    return lambda shape, random: mean + scale * torch.randn(shape, generator=random)


def uniform(low, high):
    return lambda shape, random: low + (high - low) * torch.rand(shape, generator=random)


def one_far_above(shape, random):
    x = uniform(-65, 0)(shape, random)
    x[:, shape[1] // 3] = 20.7
    return x


DRAWS = {
    "N(0, 1)": normal(1),
    "N(0, 4)": normal(2),
    "U(-100, 100)": uniform(-100, 100),
    "10000 + N(0, 4)": normal(2, 10000),
    "20.7 and U(-65, 0)": one_far_above,
    "N(0, 16)": normal(4),
}
MILD = tuple(DRAWS)[:-1]
"""All but the one whose rows are often one large term and some rounding."""


def draw(name, rows, length):
    return DRAWS[name]((rows, length), torch.Generator().manual_seed(0))


@functools.lru_cache(maxsize=64)
def case(name, rows, length):
    """Rows and the truth: softmax, log-softmax and logsumexp, each rounded to double once."""
    x = draw(name, rows, length)
    wide = x.numpy().astype(np.longdouble)
    top = wide.max(1, keepdims=True)
    terms = np.exp(wide - top)
    total = terms.sum(1, keepdims=True)
    lse = top + np.log(total)
    return x, (terms / total).astype(float), (wide - lse).astype(float), lse[:, 0].astype(float)


def ulp(exact):
    return np.ldexp(1.0, np.maximum(np.frexp(np.abs(exact))[1] - 24, -149))


def error(got, exact):
    """The largest one in ULP, among the normal numbers."""
    nearest = exact.astype(np.float32).astype(float)
    off = np.abs(got.double().numpy() - nearest) / ulp(nearest)
    return off.max(where=nearest >= SMALLEST_NORMAL, initial=0)


@functools.cache
def mpmath_truth(name, every):
    """Softmax of every so many elements of the first row, and the row's logsumexp."""
    with mpmath.workdps(40):
        x = [mpmath.mpf(v) for v in case(name, 64, 4096)[0][0].tolist()]
        total = mpmath.fsum(mpmath.exp(v) for v in x)
        return [mpmath.exp(v) / total for v in x[::every]], mpmath.log(total)


@pytest.mark.parametrize("name", DRAWS)
def test_the_truth_is_mpmaths(name):
    _, probabilities, logs, lse = case(name, 64, 4096)
    exact, exact_lse = mpmath_truth(name, 13)
    assert abs(lse[0] - exact_lse) <= 2.0**-51 * abs(exact_lse)
    for p, log, truth in zip(probabilities[0, ::13], logs[0, ::13], exact, strict=True):
        assert abs(p - truth) <= 2.0**-50 * truth
        assert abs(log - mpmath.log(truth)) <= 2.0**-50 * max(abs(log), abs(lse[0]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", MILD)
def test_some_hundred_elements_are_within_3_ulp_of_mpmath(body, name, impl):
    exact = np.array([float(p) for p in mpmath_truth(name, 13)[0]])
    got = softmax(case(name, 64, 4096)[0][0], 0, impl=impl)
    assert error(got[::13], exact) <= 3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", MILD)
def test_rows_of_4096_are_within_3_ulp(body, name, impl):
    x, exact, _, _ = case(name, 64, 4096)
    assert error(softmax(x, 1, impl=impl), exact) <= 3


@pytest.mark.parametrize("name", MILD)
def test_rows_side_by_side_are_within_3_ulp(body, name):
    x, exact, _, _ = case(name, 64, 4096)
    assert error(softmax(x.T.contiguous(), 0).T, exact) <= 3


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_of_65536_from_minus_to_plus_100_is_within_5_ulp(body, impl):
    x, exact, _, _ = case("U(-100, 100)", 4, 65536)
    assert error(softmax(x, 1, impl=impl), exact) <= 5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["N(0, 1)", "N(0, 16)"])
def test_a_row_of_a_million_is_within_5_ulp(body, name, impl):
    x, exact, _, _ = case(name, 1, 2**20)
    assert error(softmax(x, 1, impl=impl), exact) <= 5


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_of_67_million_is_within_5_ulp(body, impl):
    x, exact = longest()
    got = softmax(x, 0, impl=impl)
    assert max(error(a, b) for a, b in zip(got.split(2**20), exact, strict=True)) <= 5


@functools.cache
def longest():
    x = draw("N(0, 1)", 1, 2**26)[0]
    top, total = np.longdouble(x.max().item()), np.longdouble(0)
    for part in x.split(2**20):
        total += np.exp(part.numpy().astype(np.longdouble) - top).sum()
    return x, [
        (np.exp(part.numpy().astype(np.longdouble) - top) / total).astype(float)
        for part in x.split(2**20)
    ]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [1, 2, 5, 31, 64, 112, 127, 128, 255, 4096])
def test_no_row_among_many_is_beyond_5_ulp(body, length, impl):
    # wide rows, where one term is most of the sum and every rounding of it counts whole
    for scale in (4.0, 8.0):
        for seed in range(2):
            random = torch.Generator().manual_seed(seed)
            x = scale * torch.randn(2**19 // length, length, generator=random)
            exact = many_rows(length, scale, seed)
            assert error(softmax(x, 1, impl=impl), exact) <= 5


@functools.lru_cache(maxsize=4)
def many_rows(length, scale, seed):
    # torch's double is off by some 2^-50, which is nothing here
    random = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(2**19 // length, length, generator=random)
    return torch.softmax(x.double(), 1).numpy()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("below", "most"), [(2.0**-127, 1), (SMALLEST_NORMAL, 2)], ids=["2^-127", "2^-126"]
)
def test_subnormal_results_are_right_to_a_step_or_two(body, below, most, impl):
    # the last multiplication is the only one that rounds among them: an error of 3 ULP of a normal
    # number is one step of 2^-149 and a half at 2^-126, and less than one at half of that, before
    # that last rounding
    for top in (0.0, 0.3, 0.6):
        x = -80 - 25 * torch.rand(2**18, generator=torch.Generator().manual_seed(0))
        x[5] = top
        wide = x.numpy().astype(np.longdouble) - np.longdouble(x[5].item())
        exact = (np.exp(wide) / np.exp(wide).sum()).astype(float)
        counted = exact < below
        assert counted.sum() > 100_000
        nearest = exact[counted].astype(np.float32).astype(float)
        steps = np.abs(softmax(x, 0, impl=impl).double().numpy()[counted] - nearest) * 2.0**149
        assert steps.max() <= most


# logarithms


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", DRAWS)
def test_log_softmax_is_off_by_a_ulp_and_the_error_of_the_sum(body, name, impl):
    # half a ULP for x - lse, half a ULP for the part of lse that float32 does not hold, and the
    # relative error of the sum, which is the absolute one of its logarithm
    for length in (1, 2, 5, 64, 112, 127, 128, 1000, 4096):
        x, _, exact, _ = case(name, 64, length)
        off = np.abs(log_softmax(x, 1, impl=impl).double().numpy() - exact)
        assert (off <= ulp(exact) + SUM).all()


def test_logsumexp_is_off_by_half_a_ulp_and_the_error_of_the_sum(body):
    for name in DRAWS:
        for length in (1, 2, 5, 64, 112, 127, 128, 1000, 4096):
            x, _, _, exact = case(name, 64, length)
            off = np.abs(logsumexp(x, 1, impl="cpu").double().numpy() - exact)
            assert (off <= ulp(exact) / 2 + SUM).all()


def test_logsumexp_beyond_one_is_within_1_ulp(body):
    for length in (1, 2, 5, 64, 128, 1000):
        for shift in (0.0, 1.5, -5.0, 7.0, 300.0):
            random = torch.Generator().manual_seed(0)
            x = torch.randn(20000 // length, length, generator=random) + shift - np.log(length)
            wide = x.numpy().astype(np.longdouble)
            top = wide.max(1, keepdims=True)
            exact = top[:, 0] + np.log(np.exp(wide - top).sum(1))
            nearest = exact.astype(np.float32).astype(float)
            off = np.abs(logsumexp(x, 1, impl="cpu").double().numpy() - nearest) / ulp(nearest)
            assert off.max(where=np.abs(nearest) > 1, initial=0) <= 1


def test_the_exponential_is_off_by_what_it_states(body):
    # a row of one: the logarithm of e^x in double, kept in two parts, against x
    x = uniform(-500, 500)((2**20, 1), torch.Generator().manual_seed(0))
    _, lse = torch.ops.aftermax.logsumexp(x, 1)
    rounding = 2.0**-43  # of the logarithm itself
    assert (lse.sum(1) - x[:, 0].double()).abs().max().item() <= EXP + rounding
