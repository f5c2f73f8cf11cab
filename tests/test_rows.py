"""softmax, log_softmax and logsumexp: the kernels against torch in float64, in every body.

What a result may be off by is stated in units of float32's eps, before the one rounding to the
result's dtype (`bound`); test_row_accuracy.py measures the errors themselves.
"""

import contextlib
import functools
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import cross_entropy, kernels, linear_cross_entropy, log_softmax, logsumexp, softmax
from aftermax.kernels import ops
from aftermax.rows import IMPLS

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
HALVES = (BF16, F16)
DTYPES = (F32, *HALVES)
EPS = torch.finfo(F32).eps
INF, NAN, MAX = torch.inf, torch.nan, torch.finfo(F32).max

KERNELS = IMPLS[1:]
"""What asks for the kernels: "cpu" picks the algorithm, the others name one."""

# around the widths of vectors, groups of vectors and pieces of a row
LENGTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 1000, 4096)
LONG_LENGTHS = (32767, 32768, 32769, 70000)

needs_kernels = pytest.mark.skipif(kernels.absent() is not None, reason=str(kernels.absent()))
# parts of torch that are imported at their first use warn of other parts of torch
ignores_what_torch_imports = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
in_every_body = settings(
    max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@contextlib.contextmanager
def running(name):
    """The body of that name, and afterwards the one that was in use."""
    if kernels.absent() is not None:
        pytest.skip(kernels.absent())
    before = kernels.isa()
    try:
        kernels.use_isa(name)
    except RuntimeError as lacking:
        pytest.skip(str(lacking))
    try:
        yield
    finally:
        kernels.use_isa(before)


@pytest.fixture(params=kernels.ISAS)
def body(request):
    with running(request.param):
        yield request.param


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape, scale=4.0, dtype=F32, seed=0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


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


# values


@pytest.mark.parametrize(("name", "impl"), [(n, i) for n in FUNCTIONS for i in impls_of(n)])
def test_every_length_equals_float64(body, name, impl):
    function, _, assert_right = FUNCTIONS[name]
    for length, dtype in itertools.product(LENGTHS + LONG_LENGTHS, DTYPES):
        x, exact = rows_and_truth(name, length, dtype)
        assert_right(function(x, 1, impl=impl), exact, x, impl)
        assert_right(function(x[0], 0, impl=impl), exact[0], x, impl)  # a row that is alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "impl"), [(n, i) for n in FUNCTIONS for i in impls_of(n)])
def test_every_dim_of_every_layout_equals_float64(body, name, impl, dtype):
    function, truth, assert_right = FUNCTIONS[name]
    base = normal(3, 5, 4, 37, dtype=dtype)
    layouts = {
        "contiguous": base,
        "permuted": base.permute(2, 0, 3, 1),
        "stepped": base[::2, 1::3, :, 1::2],
        "offset": base[1:, :, 1:, 3:],
        "expanded": base[:, :1, :, :9].expand(3, 6, 4, 9),
        "one dimension": base[1, 2, 3],
    }
    for x in layouts.values():
        for dim in range(-x.ndim, x.ndim):
            got = function(x, dim, impl=impl)
            assert_right(got, truth(x.double(), dim), x, impl)
            assert got.is_contiguous()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_number_of_rows_side_by_side_equals_float64(body, name):
    # a lane each, in groups of some vectors, of which the last has what is left over
    function, truth, assert_right = FUNCTIONS[name]
    for rows in (1, 2, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 200):
        for length, dtype in itertools.product((1, 2, 5, 33, 300), DTYPES):
            x = normal(3, length, rows + 5, dtype=dtype)[:, :, 2 : rows + 2]
            exact = truth(x.double(), 1)
            assert_right(function(x, 1), exact, x, "cpu")
            g = normal(*exact.shape, scale=1.0, dtype=dtype, seed=1)
            assert_gradient(name, gradient_of(function, x, 1, g), x, 1, g, "cpu")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_flaw_in_a_row_leaves_the_rows_beside_it_alone(body, name):
    function, truth, assert_right = FUNCTIONS[name]
    clean = normal(40, 150)
    for dtype, flaw in itertools.product(DTYPES, (NAN, INF, -INF, 1e30, 2e5, -2e5)):
        for columns in ([0], [70], [149], [3, 17, 66, 140], range(150)):
            x = clean.to(dtype)
            x[7, columns] = flaw
            x[20, columns[0]] = -INF
            assert_right(function(x, 0), expected_of(truth, x, 0), x, "cpu")


@pytest.mark.parametrize("name", BOTH)
def test_nothing_beside_rows_side_by_side_is_written(body, name):
    function, truth, assert_right = FUNCTIONS[name]
    for rows, dtype in itertools.product((1, 5, 16, 63, 64, 65, 150), DTYPES):
        x = normal(20, rows, dtype=dtype)
        memory = torch.full((20, rows + 40), 7.0, dtype=dtype)
        out = memory[:, 20 : rows + 20]
        function(x, 0, out=out)
        assert_right(out, truth(x.double(), 0), x, "cpu")
        assert_same(out, function(x, 0))
        same = memory.clone()[:, 20 : rows + 20].copy_(x)
        function(same, 0, out=same)
        assert_same(same, out)
        out.fill_(7.0)
        assert (memory == 7.0).all()


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scalar_is_a_row_of_one(body, impl, dtype):
    x = torch.tensor(3.5, dtype=dtype)
    for dim in (0, -1):
        assert softmax(x, dim, impl=impl).item() == 1.0
        assert abs(log_softmax(x, dim, impl=impl).item()) < 3 * EPS
        assert logsumexp(x, dim, impl="cpu").item() == 3.5
        assert logsumexp(x, dim, keepdim=True, impl="cpu").shape == ()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dims", [(0,), (1, 2), (2, 0), [-1, 0], (0, 1, 2), (-2, -3)])
@needs_kernels
def test_logsumexp_over_several_dims_is_torchs(dims, impl):
    for x in (normal(3, 4, 5), normal(5, 3, 4).permute(1, 2, 0)):
        for keepdim in (False, True):
            got = logsumexp(x, dims, keepdim, impl=impl)
            exact = torch.logsumexp(x.double(), tuple(dims), keepdim)
            assert got.shape == exact.shape
            assert_logsumexp(got, exact, x)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@needs_kernels
def test_logsumexp_over_no_dims_is_over_all(impl):
    # as torch has it where it keeps them; without, its float64 raises from within
    x = normal(3, 4)
    got = logsumexp(x, (), True, impl=impl)
    assert got.shape == (1, 1)
    assert_logsumexp(got, torch.logsumexp(x.double(), (), True), x)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(("name", "most"), [("softmax", 1.0), ("log_softmax", 0.0)])
def test_no_probability_is_above_one(body, name, most, impl):
    random = torch.Generator().manual_seed(0)
    for length in (1, 2, 50, 1000):
        x = torch.randn(2000, length, generator=random) * 3
        x[:, length // 2] += 60.0  # next to which the others are nothing
        assert FUNCTIONS[name][0](x, 1, impl=impl).max().item() <= most


def test_dtype_casts_the_input_first():
    x = normal(3, 9, dtype=BF16)
    for function, truth in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        for dtype in (*DTYPES, F64):
            got = function(x, 1, dtype)
            assert got.dtype == dtype
            assert_close(got, truth(x, 1, F64).to(dtype))
    whole = torch.tensor([[1, 2], [3, 5]])
    assert_close(softmax(whole, 0, F32), torch.softmax(whole, 0, F32))
    assert_close(log_softmax(whole, 0, F16), torch.log_softmax(whole, 0, F32).half())


def test_float64_goes_to_the_reference():
    x = normal(3, 9).double()
    assert torch.equal(softmax(x, 1), torch.softmax(x, 1))
    assert torch.equal(log_softmax(x, 1), torch.log_softmax(x, 1))
    assert torch.equal(logsumexp(x, 1), torch.logsumexp(x, 1))


def test_meta_tensors_go_to_the_reference():
    x = torch.empty(3, 9, device="meta")
    assert softmax(x, 1).shape == (3, 9)
    assert logsumexp(x, 1).device.type == "meta"


@needs_kernels
def test_a_view_that_negates_is_read_as_what_it_means():
    # the imaginary part of a conjugate is its memory with a sign that nobody has applied yet
    x = normal(3, 9)
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    for name, (function, truth, assert_right) in FUNCTIONS.items():
        for impl in impls_of(name):
            got = function(negated, 1, impl=impl)
            assert_right(got, truth(-x.double(), 1), x, impl)


# special values

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


def expected_of(truth, x, dim):
    """Torch in float64, and infinite where that is beyond the dtype of x."""
    exact = truth(x.double(), dim)
    rounded = exact.to(x.dtype).double()
    return exact.where(rounded.isfinite(), rounded)


@pytest.mark.parametrize(("name", "impl"), [(n, i) for n in FUNCTIONS for i in impls_of(n)])
def test_special_values_are_torchs_wherever_in_the_row(body, name, impl):
    function, truth, assert_right = FUNCTIONS[name]
    for dtype, length in itertools.product(DTYPES, (3, 20, 133, 1100)):
        special = torch.tensor(SPECIAL_ROWS).to(dtype)
        for fill in (-INF, -1.0):
            x = torch.full((len(special), length), fill, dtype=dtype)
            for at in (slice(0, 3), slice(length - 3, length), slice(length // 2 - 1, None)):
                x[:, at][:, :3] = special[:, : x[:, at].shape[1]]
                exact = expected_of(truth, x, 1)
                assert_right(function(x, 1, impl=impl), exact, x, impl)
                across = x.T.contiguous()
                assert_right(
                    function(across, 0, impl=impl).T
                    if name != "logsumexp"
                    else function(across, 0, impl=impl),
                    exact,
                    x,
                    impl,
                )


@pytest.mark.parametrize(("name", "impl"), [(n, i) for n in FUNCTIONS for i in impls_of(n)])
def test_special_values_far_apart_in_a_long_row_are_torchs(body, name, impl):
    # the row is summed in pieces: each of them may hold what the others do not
    function, truth, assert_right = FUNCTIONS[name]
    for first, last in itertools.product((0.0, -INF, INF, NAN, 1e30, -1e30, 2e5), repeat=2):
        x = torch.full((70000,), -INF)
        x[5], x[40000], x[-5] = first, -2.0, last
        assert_right(function(x, 0, impl=impl), expected_of(truth, x, 0), x, impl)


@pytest.mark.parametrize("impl", ["reference", *KERNELS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_row_is_nan_or_zero_as_asked(impl, dtype):
    if impl != "reference" and kernels.absent() is not None:
        pytest.skip(kernels.absent())
    for length in (1, 5, 100, 40000):
        x = normal(3, length, dtype=dtype)
        x[1] = -INF
        got = softmax(x, 1, empty="nan", impl=impl)
        assert got[1].isnan().all()
        assert got[::2].isfinite().all()
        zero = softmax(x, 1, empty="zero", impl=impl)
        assert torch.equal(zero[1], torch.zeros_like(x[1]))
        assert torch.equal(zero[::2], got[::2])
        across = softmax(x.T.contiguous(), 0, empty="zero", impl=impl).T
        assert torch.equal(across[1], torch.zeros_like(x[1]))


@pytest.mark.parametrize("impl", ["reference", *KERNELS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_an_empty_row_is_zero_where_its_softmax_is(impl, dtype):
    if impl != "reference" and kernels.absent() is not None:
        pytest.skip(kernels.absent())
    x = normal(3, 5, dtype=dtype)
    x[1] = -INF
    x[2, :4] = -INF
    x.requires_grad_()
    (softmax(x, 1, empty="zero", impl=impl) * normal(3, 5, dtype=dtype, seed=1)).sum().backward()
    assert torch.equal(x.grad[1], torch.zeros_like(x.grad[1]))
    assert x.grad.isfinite().all()
    assert x.grad[0].any()


@pytest.mark.parametrize("impl", ["reference", *KERNELS])
def test_only_nothing_but_minus_infinity_is_empty(impl):
    if impl != "reference" and kernels.absent() is not None:
        pytest.skip(kernels.absent())
    for flaw in (NAN, INF):
        x = torch.tensor([-INF, flaw, -INF, -INF])
        assert softmax(x, 0, empty="zero", impl=impl).isnan().all()
    assert softmax(torch.tensor([-INF, -MAX]), 0, empty="zero", impl=impl).tolist() == [0, 1]


# fuzz

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


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_view_with_any_values_is_torchs(body, name):
    function, truth, assert_right = FUNCTIONS[name]

    @in_every_body
    @given(view=views(), impl=st.sampled_from(impls_of(name)))
    def is_torchs(view, impl):
        x, dim = view
        exact = expected_of(truth, x, dim)
        got = function(x, dim, impl=impl)
        assert got.shape == exact.shape
        assert_right(got, exact, x, impl)
        assert got.is_contiguous()

    is_torchs()


# gradients


def gradient_of(function, x, dim, cotangent, **options):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x, dim, **options), x, cotangent)[0]


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


@pytest.mark.parametrize(("name", "impl"), [(n, i) for n in FUNCTIONS for i in impls_of(n)])
def test_the_gradient_of_every_length_equals_float64(body, name, impl):
    function = FUNCTIONS[name][0]
    lengths = (*LENGTHS, 70000) if impl == "cpu" else (3, 33, 129, 4096)
    for length, dtype in itertools.product(lengths, DTYPES):
        x, exact = rows_and_truth(name, length, dtype)
        g = normal(*exact.shape, scale=1.0, dtype=dtype, seed=1)
        got = gradient_of(function, x, 1, g, impl=impl)
        assert_gradient(name, got, x, 1, g, impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_of_every_layout_equals_float64(body, name, dtype):
    function = FUNCTIONS[name][0]
    base = normal(3, 5, 4, 9, dtype=dtype)
    for x in (
        base,
        base.permute(2, 0, 3, 1),
        base[::2, 1:, :, 1::2],
        base[:, :1].expand(3, 6, 4, 9),
    ):
        for dim in range(-x.ndim, x.ndim):
            shape = function(x, dim).shape
            contiguous = normal(*shape, scale=1.0, dtype=dtype, seed=1)
            order = tuple(range(len(shape)))[::-1]
            for g in (
                contiguous,
                contiguous.permute(order).contiguous().permute(order),
                contiguous.new_ones(()).expand(shape),  # what sum() sends back
            ):
                got = gradient_of(function, x, dim, g, impl="cpu")
                assert_gradient(name, got, x, dim, g, "cpu")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_of_any_view_with_any_values_is_torchs(body, name):
    function = FUNCTIONS[name][0]

    @in_every_body
    @given(view=views(), seed=st.integers(0, 100))
    def is_torchs(view, seed):
        x, dim = view
        g = normal(*function(x, dim).shape, scale=1.0, dtype=x.dtype, seed=seed)
        got = gradient_of(function, x, dim, g, impl="cpu")
        assert_gradient(name, got, x, dim, g, "cpu")

    is_torchs()


@pytest.mark.parametrize(("name", "impl"), [(n, i) for n in FUNCTIONS for i in impls_of(n)])
def test_gradients_of_gradients_equal_float64(body, name, impl):
    function, truth, _ = FUNCTIONS[name]

    def second(function, x, v, w, **options):
        x, v = x.detach().requires_grad_(), v.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(x, 1, **options), x, v, create_graph=True)
        return first, *torch.autograd.grad(first, (x, v), w)

    for x in (normal(3, 7, scale=1.0), normal(7, 3, scale=1.0).T, normal(3, 200, scale=1.0)):
        v = normal(*truth(x, 1).shape, scale=1.0, seed=1)
        w = normal(*x.shape, scale=1.0, seed=2)
        got = second(function, x, v, w, impl=impl)
        exact = second(truth, x.double(), v.double(), w.double())
        for a, b in zip(got, exact, strict=True):
            assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradients_of_the_reference_are_the_derivatives(name):
    function = FUNCTIONS[name][0]
    x = normal(3, 4, 2, scale=1.0).double().requires_grad_()
    for dim in (0, 1, -1) if name != "logsumexp" else (0, 1, (0, 2)):

        def call(x, dim=dim):
            return function(x, dim, impl="reference")

        assert torch.autograd.gradcheck(call, x)
        assert torch.autograd.gradgradcheck(call, x)


def test_the_gradients_of_the_reference_with_empty_rows_are_the_derivatives():
    x = normal(3, 4, scale=1.0).double()
    x[1] = -INF
    x.requires_grad_()

    def call(x):
        return softmax(x, 1, empty="zero", impl="reference")

    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


@needs_kernels
def test_a_result_that_was_changed_is_not_used_for_its_gradient():
    for function in (softmax, log_softmax):
        x = normal(3, 9).requires_grad_()
        y = function(x, 1, impl="cpu")
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_no_graph_is_made_where_none_is_wanted():
    x = normal(3, 9).requires_grad_()
    for function, _, _ in FUNCTIONS.values():
        assert function(x, 1).requires_grad
        assert not function(x.detach(), 1).requires_grad
        with torch.no_grad():
            assert not function(x, 1).requires_grad


# out=


def assert_same(got, expected):
    assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", ["reference", *KERNELS])
@pytest.mark.parametrize("name", BOTH)
def test_out_takes_any_strides_and_the_input_itself(name, impl):
    if impl != "reference" and kernels.absent() is not None:
        pytest.skip(kernels.absent())
    function = FUNCTIONS[name][0]
    # strides decide how a row is walked, and one order of adding is as good as another
    atol = 0 if name == "softmax" else 3 * EPS
    for dtype, shape in itertools.product(DTYPES, ((6, 10), (5, 40000))):
        x, rtol = normal(*shape, dtype=dtype), 2 * torch.finfo(dtype).eps
        for dim in (0, 1):
            expected = function(x, dim, impl=impl)
            outs = (
                torch.full(shape, 7.0, dtype=dtype),
                torch.full(shape[::-1], 7.0, dtype=dtype).T,
                torch.full((shape[0], 2 * shape[1] + 1), 7.0, dtype=dtype)[:, 1::2],
                x.clone(),
            )
            for out in outs:
                assert function(x, dim, out=out, impl=impl) is out
                assert_close(out, expected, rtol=rtol, atol=atol)
            for same in (x.clone(), x.T.contiguous().T):
                assert function(same, dim, out=same, impl=impl) is same
                assert_close(same, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("impl", KERNELS)
@needs_kernels
def test_special_values_survive_in_place(impl):
    # what the passes keep in the result must not be missed where they start again from the input
    special = torch.tensor(SPECIAL_ROWS)
    for function in (softmax, log_softmax):
        for length in (3, 50, 1100):
            x = torch.full((len(special), length), -1.0)
            x[:, -3:] = special
            expected = function(x, 1, impl=impl)
            function(x, 1, out=x, impl=impl)
            assert_same(x, expected)


@pytest.mark.parametrize("store", range(len(ops.STORES)), ids=ops.STORES)
@pytest.mark.parametrize("name", BOTH)
def test_nothing_beside_the_result_is_written(body, name, store):
    log = name == "log_softmax"
    for dtype, length, offset in itertools.product(DTYPES, (1, 5, 16, 63, 64, 100, 515), range(4)):
        x = normal(3, length, dtype=dtype)
        expected = FUNCTIONS[name][1](x.double(), 1)
        for algorithm in range(len(ops.ALGORITHMS)):
            memory = torch.full((3 * (length + 3) + 8,), 7.0, dtype=dtype)
            out = memory[offset:].as_strided((3, length), (length + 3, 1))
            torch.ops.aftermax.softmax_out(x, out, 1, log, 0, algorithm, store)
            impl = "cpu-online" if ops.ALGORITHMS[algorithm] == "online" else "cpu"
            FUNCTIONS[name][2](out, expected, x, impl)
            out.fill_(7.0)
            assert (memory == 7.0).all()


@pytest.mark.parametrize("impl", KERNELS)
def test_a_result_larger_than_the_cache_equals_float64(body, impl):
    # it is written past the cache, by other instructions, where the rows begin anywhere
    for dtype in (F32, BF16):
        few = normal(3, 70001, dtype=dtype)
        exact = torch.softmax(few.double(), 1)
        got = softmax(few.repeat(80, 1), 1, impl=impl).reshape(80, 3, -1)
        assert_softmax(got[0], exact, few, impl)
        assert_same(got, got[0].expand(80, 3, -1))


def test_logsumexp_takes_out():
    x = normal(3, 4, 5)
    for dims in (1, (0, 2)):
        for keepdim in (False, True):
            expected = logsumexp(x, dims, keepdim)
            out = torch.full(expected.shape[::-1], 7.0).permute(tuple(range(expected.ndim))[::-1])
            assert logsumexp(x, dims, keepdim, out=out) is out
            assert_same(out, expected)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@needs_kernels
def test_an_out_that_does_not_fit_is_refused(impl):
    x = normal(3, 4)
    for function in (softmax, log_softmax):
        with pytest.raises(ValueError, match=r"out is \(4, 3\).* the result is \(3, 4\)"):
            function(x, out=torch.empty(4, 3), impl=impl)
        with pytest.raises(ValueError, match=r"float64.* the result is .*float32"):
            function(x, out=torch.empty(3, 4, dtype=F64), impl=impl)
        with pytest.raises(ValueError, match=r"the result is .*bfloat16"):
            function(x, dtype=BF16, out=torch.empty(3, 4), impl=impl)
        with pytest.raises(ValueError, match="meta"):
            function(x, out=torch.empty(3, 4, device="meta"), impl=impl)
        with pytest.raises(RuntimeError, match="out= is not differentiable"):
            function(x, out=torch.empty(3, 4, requires_grad=True), impl=impl)
        with pytest.raises(RuntimeError, match="out= is not differentiable"):
            function(x.clone().requires_grad_(), out=torch.empty(3, 4), impl=impl)
        with pytest.raises(RuntimeError, match=r"expanded|single memory location"):
            function(x, out=torch.empty(3, 1).expand(3, 4), impl=impl)
    with pytest.raises(ValueError, match=r"out is \(4,\)"):
        logsumexp(x, 1, out=torch.empty(4), impl=impl)
    with pytest.raises(ValueError, match="float16"):
        logsumexp(x, 1, out=torch.empty(3, dtype=F16), impl=impl)
    with pytest.raises(RuntimeError, match="out= is not differentiable"):
        logsumexp(x.clone().requires_grad_(), 1, out=torch.empty(3), impl=impl)
    with torch.no_grad():
        leaf = x.clone().requires_grad_()
        assert_same(softmax(leaf, out=torch.empty(3, 4), impl=impl), softmax(x, impl=impl))


@pytest.mark.parametrize("impl", KERNELS)
@needs_kernels
def test_an_out_that_partly_overlaps_the_input_is_refused(impl):
    memory = normal(40)
    x = memory[:12].reshape(3, 4)
    kept = memory.clone()
    for out in (
        memory[1:13].reshape(3, 4),
        memory[4:16].reshape(3, 4),
        memory[:12].reshape(4, 3).T,
        memory[:24].reshape(3, 8)[:, :4],
    ):
        for function in (softmax, log_softmax):
            with pytest.raises(RuntimeError, match="out overlaps the input"):
                function(x, out=out, impl=impl)
    assert_same(memory, kept)
    softmax(x, out=memory[12:24].reshape(3, 4), impl=impl)  # side by side is no overlap


# nothing to do


@pytest.mark.parametrize("impl", ["reference", *KERNELS])
def test_tensors_without_elements_are_as_torch_answers(impl):
    if impl != "reference" and kernels.absent() is not None:
        pytest.skip(kernels.absent())
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 3), (0, 0)):
        for dtype in DTYPES:
            x = torch.empty(shape, dtype=dtype)
            for dim in range(len(shape)):
                for empty in ops.EMPTIES:
                    assert_same(softmax(x, dim, empty=empty, impl=impl), torch.softmax(x, dim))
                assert_same(log_softmax(x, dim, impl=impl), torch.log_softmax(x, dim))
                plain = "reference" if impl == "reference" else "cpu"
                assert_same(logsumexp(x, dim, impl=plain), torch.logsumexp(x, dim))
                for function in (softmax, log_softmax, logsumexp):
                    leaf = x.clone().requires_grad_()
                    function(leaf, dim, impl=plain).sum().backward()
                    assert_same(leaf.grad, x)
            out = torch.empty(shape, dtype=dtype)
            assert softmax(x, 0, out=out, impl=impl) is out


# what is refused


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_that_make_no_sense_are_refused(name):
    function = FUNCTIONS[name][0]
    x = normal(3, 4)
    for dim in (2, -3, 100):
        with pytest.raises(IndexError, match=rf"{name}: dim={dim} of an input of shape \(3, 4\)"):
            function(x, dim)
    for dim in (1, -2):
        with pytest.raises(IndexError, match="-1 to 0 fit"):
            function(torch.tensor(1.0), dim)
    for wrong in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"{name} takes floating point numbers"):
            function(x.to(wrong), 1)
    with pytest.raises(ValueError, match=f"{name}: impl='gpu' is none of 'reference', 'cpu'"):
        function(x, 1, impl="gpu")


def test_what_only_some_take_is_refused_by_the_others():
    x = normal(3, 4)
    with pytest.raises(ValueError, match="empty='one' is none of 'nan', 'zero'"):
        softmax(x, empty="one")
    with pytest.raises(TypeError, match=r"not torch\.int32"):
        softmax(x, dtype=torch.int32)
    with pytest.raises(IndexError, match="dim=2"):
        logsumexp(x, (0, 2))
    with pytest.raises(ValueError, match="impl='cpu-two-pass'"):
        logsumexp(x, 1, impl="cpu-two-pass")
    for impl in ("reference", "cpu") if kernels.absent() is None else ("reference",):
        with pytest.raises(RuntimeError, match=r"repeated|multiple times"):
            logsumexp(x, (0, -2), impl=impl)


@pytest.mark.parametrize("impl", KERNELS)
@needs_kernels
def test_the_kernels_say_what_they_do_not_take(impl):
    for function in (softmax, log_softmax):
        with pytest.raises(RuntimeError, match=f"impl='{impl}', but .*not torch.float64"):
            function(normal(3).double(), impl=impl)
        with pytest.raises(RuntimeError, match=f"impl='{impl}', but .*on meta"):
            function(torch.empty(3, device="meta"), impl=impl)
        with pytest.raises(RuntimeError, match=f"impl='{impl}', but .*strided"):
            function(torch.eye(3).to_sparse(), impl=impl)
    with pytest.raises(RuntimeError, match="float64"):
        logsumexp(normal(3).double(), 0, impl="cpu")


# threads


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_two_threads_give_the_bits_of_one(body, set_threads, dtype):
    inputs = {
        "one long row": normal(1, 200_001, dtype=dtype),
        "three long rows": normal(3, 100_000, dtype=dtype),
        "many rows": normal(301, 1000, dtype=dtype),
        "across": normal(300, 301, dtype=dtype).T,
    }
    flaws = inputs["three long rows"].clone()
    flaws[0, 70_000], flaws[1, 3], flaws[2, :] = NAN, INF, 1e30
    inputs["with flaws"] = flaws
    calls = [(n, i) for n in FUNCTIONS for i in impls_of(n)]
    for x, (name, impl) in itertools.product(inputs.values(), calls):
        function, results = FUNCTIONS[name][0], []
        for threads in (1, 2):
            set_threads(threads)
            assert torch.get_num_threads() == threads
            y = function(x, 1, impl=impl)
            g = normal(*y.shape, dtype=dtype, seed=1)
            # what is kept for the backward pass is in double, where every order of adding shows
            kept = torch.ops.aftermax.logsumexp(x, 1)
            results.append((y, gradient_of(function, x, 1, g, impl=impl), *kept))
        for one, two in zip(*results, strict=True):
            assert_same(one, two)


# torch.compile, and what torch asks of operators


def _hidden_loss(x):
    weight = torch.linspace(-1, 1, 5 * x.shape[1]).reshape(5, -1)
    target = torch.arange(x.shape[0]) % 5
    return linear_cross_entropy(x, weight, target, label_smoothing=0.1)


COMPILED = {
    "softmax": lambda x: softmax(x, 1),
    "softmax, two-pass": lambda x: softmax(x, 0, impl="cpu-two-pass", empty="zero"),
    "log_softmax": lambda x: log_softmax(x, -1),
    "logsumexp": lambda x: logsumexp(x, 1),
    "logsumexp of all": lambda x: logsumexp(x, (0, 1), keepdim=True),
    "cross_entropy": lambda x: cross_entropy(x, torch.arange(x.shape[0]), lse_square_scale=1e-2),
    "cross_entropy, rows": lambda x: cross_entropy(x, torch.arange(x.shape[0]), reduction="none"),
    "linear_cross_entropy": _hidden_loss,
}


def compiles(function, **options):
    """The compiled function gives what the plain one gives, forward and backward."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, **options)
    for x in (normal(4, 9), normal(4, 9, seed=1)):
        plain, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, got = function(plain), compiled(traced)
        assert_close(got, expected, rtol=1e-6, atol=1e-6)
        assert not compiled(x).requires_grad
        assert_close(compiled(x), expected.detach(), rtol=1e-6, atol=1e-6)
        g = normal(*expected.shape, seed=2)
        expected.backward(g)
        got.backward(g)
        assert_close(traced.grad, plain.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", COMPILED)
@needs_kernels
def test_torch_compile_takes_the_calls_whole(name):
    compiles(COMPILED[name], backend="aot_eager")


@needs_kernels
def test_torch_compile_takes_sizes_that_change():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: softmax(x, 1) * logsumexp(x, 0), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for shape in ((4, 9), (5, 7), (3, 100)):
        x = normal(*shape)
        assert_close(compiled(x), softmax(x, 1) * logsumexp(x, 0))


@needs_kernels
def test_torch_compile_takes_out():
    def call(x, out):
        softmax(x, 1, out=out)
        return out + 1

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x, out = normal(4, 9), torch.empty(4, 9)
    assert_close(compiled(x, out), softmax(x, 1) + 1)
    assert_close(out, softmax(x, 1))


@pytest.mark.parametrize("name", COMPILED)
@ignores_what_torch_imports
def test_torch_func_and_forward_mode_differentiate_the_calls(name):
    # the kernels know neither, so these run on the reference
    if "two-pass" in name:
        pytest.skip("an algorithm of the kernels")
    function = COMPILED[name]
    x, v = normal(4, 9), normal(4, 9, seed=1)
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)

    close = {"rtol": 1e-5, "atol": 1e-5}
    assert_close(torch.func.grad(lambda x: function(x).sum())(x), gradient, **close)
    both = torch.func.vmap(function)(torch.stack([x, v]))
    assert_close(both, torch.stack([value.detach(), function(v)]), **close)
    assert_close(torch.func.jacrev(function)(x), torch.func.jacfwd(function)(x), **close)
    _, tangent = torch.func.jvp(function, (x,), (v,))
    assert_close(tangent.sum(), (gradient * v).sum(), **close)
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(x, v))
        assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent, **close)


@pytest.mark.slow
@ignores_what_torch_imports
@pytest.mark.parametrize("name", COMPILED)
@needs_kernels
def test_the_default_compiler_takes_the_calls_whole(name):
    # its cache on disk knows an operator by its name, and not what that gave when it was filled
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        compiles(COMPILED[name])


def shift_and_rest(lse):
    """A logsumexp as the backward operators take it: in two parts, of which the first may be 0."""
    return torch.stack([torch.zeros_like(lse), lse], 1)


def operator_samples():
    x, y = normal(3, 5), softmax(normal(3, 5), 1)
    leaf, across = normal(3, 5).requires_grad_(), normal(5, 3).T.requires_grad_()
    target, weight, none = torch.tensor([0, 4, -100]), torch.rand(5), torch.empty(0)
    bias = torch.rand(5).requires_grad_()
    hidden, matrix = normal(3, 2).requires_grad_(), normal(5, 2).requires_grad_()
    plain = (hidden.detach(), matrix.detach(), bias.detach(), target, weight)
    lse = shift_and_rest(x.double().logsumexp(1))
    mean, rows = (-100, 0.1, 1e-3, 0), (-100, 0.0, 0.0, 2)
    linear_lse = shift_and_rest((plain[0] @ plain[1].T + plain[2]).double().logsumexp(1))
    return {
        "softmax": [(leaf, 1, False, 0, 0, 0), (across, 0, True, 1, 3, 1), (x, -1, False, 0, 0, 0)],
        "softmax_forward": [(x, 1, False, 0, 0, 0), (x.T, 1, True, 0, 2, 2)],
        "softmax_out": [
            (x, torch.empty(3, 5), 1, False, 0, 0, 0),
            (x, torch.empty(5, 3).T, 0, True, 0, 4, 0),
        ],
        "softmax_backward": [(x, y, 1, False), (x.T, y.T, 0, True)],
        "logsumexp": [(leaf, 1), (across, -2), (x, 0), (torch.tensor(1.0), 0)],
        "logsumexp_backward": [(torch.rand(3), x, lse, 1)],
        "cross_entropy": [
            (leaf, target, weight, 1, *mean),
            (across, torch.arange(3), none, 1, *rows),
            (x, target, none, 1, *mean),
        ],
        "cross_entropy_backward": [
            (torch.tensor(1.0), x, target, weight, lse, 1, *mean),
            (torch.rand(3), x, target, none, lse, 1, *rows),
        ],
        "linear_cross_entropy": [
            (hidden, matrix, bias, target, weight, *mean),
            (hidden, matrix, none, target, none, *rows),
            (*plain, *mean),
        ],
        "linear_cross_entropy_backward": [
            (torch.tensor(1.0), *plain, linear_lse, *mean, True, True, True),
            (torch.rand(3), *plain, linear_lse, *rows, False, True, False),
        ],
        "linear_cross_entropy_gradients": [
            (*plain, *mean, True, True, True),
            (*plain, *mean, True, False, False),
        ],
    }


@pytest.mark.parametrize("name", ops.TABLE)
@needs_kernels
def test_torch_finds_nothing_wrong_with_the_operator(name):
    samples = operator_samples()[name]
    for sample in samples:
        torch.library.opcheck(getattr(torch.ops.aftermax, name).default, sample)
