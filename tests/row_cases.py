"""Rows, what they should come to, and what a result may be off by.

That is stated in units of float32's eps, before the one rounding to the result's dtype (`bound`);
test_row_accuracy.py measures the errors themselves.
"""

import functools

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import log_softmax, logsumexp, softmax
from aftermax.rows import IMPLS

from . import native
from .native import DTYPES, F32, INF, MAX, NAN

normal = functools.partial(native.normal, scale=4.0)

EPS = torch.finfo(F32).eps

KERNELS = IMPLS[1:]
"""What asks for the kernels: "cpu" picks the algorithm, the others name one."""

# around the widths of vectors, groups of vectors and pieces of a row
LENGTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 1000, 4096)
LONG_LENGTHS = (32767, 32768, 32769, 70000)

in_every_body = settings(
    max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def bound(dtype, units, atol=0.0):
    """`units` of float32's eps, one rounding to half precision, one step of the subnormals."""
    info = torch.finfo(dtype)
    rounding = 0.0 if dtype == F32 else info.eps / 2
    step = info.smallest_normal * info.eps
    return {"rtol": rounding + units * EPS, "atol": atol + step, "equal_nan": True}


def spread(x):
    """How far a row's elements lie below its maximum, as far as e^x tells them from 0."""
    finite = x[x.isfinite()]
    return 0.0 if finite.numel() == 0 else min((finite.max() - finite.min()).item(), 104.0)


def softmax_units(x, impl):
    # online rounds x - max, by half a unit of its size; the others never form it
    return 3 + (spread(x) / 2 if impl == "cpu-online" else 0)


def assert_softmax(got, exact, x, impl):
    assert got.dtype == x.dtype
    assert_close(got.double(), exact, **bound(x.dtype, softmax_units(x, impl)))


def assert_log_softmax(got, exact, x, impl):
    assert got.dtype == x.dtype
    # x - lse is rounded twice; the sum's relative error is the logarithm's absolute one
    sums = 3 + (12 if impl == "cpu-online" else 0)
    assert_close(got.double(), exact, **bound(x.dtype, 2, sums * EPS))


def assert_logsumexp(got, exact, x, impl="cpu"):
    assert got.dtype == x.dtype
    assert_close(got.double(), exact, **bound(x.dtype, 1, 3 * EPS))


FUNCTIONS = {
    "softmax": (softmax, torch.softmax, assert_softmax),
    "log_softmax": (log_softmax, torch.log_softmax, assert_log_softmax),
    "logsumexp": (logsumexp, torch.logsumexp, assert_logsumexp),
}
BOTH = ("softmax", "log_softmax")


def impls_of(name):
    return ("cpu",) if name == "logsumexp" else KERNELS


@functools.cache
def rows_and_truth(name, length, dtype):
    rows = 2 if length > 10000 else 5
    x = normal(rows, length, dtype=dtype, seed=length)
    return x, FUNCTIONS[name][1](x.double(), 1)


def expected_of(truth, x, dim):
    """Torch in float64, and infinite where that is beyond the dtype of x."""
    exact = truth(x.double(), dim)
    rounded = exact.to(x.dtype).double()
    return exact.where(rounded.isfinite(), rounded)


def gradient_of(function, x, dim, cotangent, **options):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x, dim, **options), x, cotangent)[0]


def assert_same(got, expected):
    assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def gradient_slack(name, x, dim, cotangent):
    """The sizes of the terms that a gradient adds up: cancellation is no excuse for more than
    their rounding. The derivative is a function of the result, which is rounded to its dtype."""
    x, g = x.double(), cotangent.double()
    if name == "logsumexp":
        return exact_gradient(name, x, dim, g).abs()
    y, logs = x.softmax(dim), x.log_softmax(dim)
    if name == "softmax":
        return y * (g.abs() + (g * y).abs().sum(dim, keepdim=True))
    per_log = (y * (1 + logs.abs())).nan_to_num(0.0)
    return g.abs() + per_log * g.abs().sum(dim, keepdim=True)


def exact_gradient(name, x, dim, g):
    if name != "logsumexp":
        return gradient_of(FUNCTIONS[name][1], x, dim, g)
    # torch's e^(x - lse) loses, beyond 10^16, what the logarithm adds to the maximum
    lse = x.logsumexp(dim, keepdim=True)
    probabilities = torch.where(lse.isfinite(), x.softmax(dim), (x - lse).exp())
    return g.reshape(lse.shape) * probabilities


def assert_gradient(name, got, x, dim, cotangent, impl):
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    exact = exact_gradient(name, x.double(), dim, cotangent.double()).to(x.dtype).double()
    info = torch.finfo(x.dtype)
    units = 3 + softmax_units(x, impl)
    slack = gradient_slack(name, x, dim, cotangent) * (2 * info.eps + units * EPS)
    largest = cotangent.double().abs().sum().item() + 1
    slack = slack + 4 * info.smallest_normal * info.eps * largest
    difference = got.double() - exact
    same = (got.double() == exact) | (got.isnan() & exact.isnan())
    wrong = ~(same | (difference.abs() <= slack))
    assert not wrong.any(), (got[wrong], exact[wrong], slack[wrong])


SPECIAL_ROWS = (
    (INF, 0.0, 1.0),
    (INF, INF, -INF),
    (-INF, 0.0, 1.0),
    (-INF, -INF, 2.0),
    (-INF, -INF, -INF),
    (NAN, 0.0, 1.0),
    (NAN, -INF, -INF),
    (NAN, INF, 0.0),
    (1e30, 0.0, -1e30),
    (1e30, 1e30, 1e30),
    (-1e30, -1e30, -INF),
    (MAX, MAX, 0.0),
    (-MAX, -MAX, -INF),
    (MAX, -MAX, 0.0),
    (1e-42, -1e-42, 0.0),
    (-0.0, 0.0, -0.0),
    (2e5, 2e5 - 1, 0.0),
    (-2e5, -2e5 - 1, -INF),
    (89.0, 88.0, -104.0),
    (-89.0, -90.0, -194.0),
    (1e30, NAN, -INF),
    (INF, 1e30, NAN),
)

SPECIALS = torch.tensor(
    # infinite, nearly so, subnormal, beyond what the pairs of the kernels hold, where e^x ends
    (
        INF,
        -INF,
        -INF,
        NAN,
        1e30,
        -1e30,
        MAX,
        -MAX,
        1e-42,
        -1e-42,
        0.0,
        -0.0,
        2e5,
        -2e5,
        89.0,
        -104.0,
    )
)


@st.composite
def views(draw, special=True):
    """Tensors as they come: permuted, sliced with steps, expanded, off the start of their memory;
    and a dim of theirs."""
    dims = draw(st.integers(0, 4))
    sizes = [draw(st.sampled_from((1, 2, 3, 5, 0, 9))) for _ in range(dims)]
    if dims and draw(st.booleans()):
        sizes[draw(st.integers(0, dims - 1))] = draw(st.integers(1, 300))
    steps = [draw(st.integers(1, 3)) for _ in sizes]
    starts = [draw(st.integers(0, 3)) for _ in sizes]
    expanded = [draw(st.integers(0, 5)) == 0 for _ in sizes]
    scale = draw(st.sampled_from((1.0, 0.01, 10.0, 100.0, 1e4)))
    share = draw(st.sampled_from((0.0, 0.02, 0.3, 1.0))) if special else 0.0
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    memory = [
        1 if e else a + n * s for n, s, a, e in zip(sizes, steps, starts, expanded, strict=True)
    ]
    values = torch.randn(memory, generator=random) * scale
    picked = SPECIALS[torch.randint(len(SPECIALS), memory, generator=random)]
    values = torch.where(torch.rand(memory, generator=random) < share, picked, values)
    cuts = tuple(
        slice(None) if e else slice(a, a + n * s, s)
        for n, s, a, e in zip(sizes, steps, starts, expanded, strict=True)
    )
    x = values.to(draw(st.sampled_from(DTYPES)))[cuts].expand(sizes)
    dim = draw(st.integers(-max(1, dims), max(1, dims) - 1))
    return x.permute(draw(st.permutations(range(dims)))), dim
