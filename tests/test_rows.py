"""softmax, log_softmax and logsumexp: the kernels against torch in float64, in every body."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import kernels, log_softmax, logsumexp, softmax
from aftermax.kernels import ops

from .native import BF16, DTYPES, F16, F32, F64, INF, MAX, NAN, needs_kernels
from .row_cases import (
    BOTH,
    EPS,
    FUNCTIONS,
    KERNELS,
    LENGTHS,
    LONG_LENGTHS,
    SPECIAL_ROWS,
    assert_gradient,
    assert_logsumexp,
    assert_same,
    assert_softmax,
    expected_of,
    gradient_of,
    impls_of,
    in_every_body,
    normal,
    rows_and_truth,
    views,
)

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


@pytest.mark.parametrize("first", [-INF, -100.0, -1e4, 200.0])
def test_a_row_may_begin_with_what_is_far_from_the_rest(body, first):
    # a sum takes the exponent of its first terms for that of all
    for length in (700, 5000, 70000):
        x = normal(2, length)
        for count in (1, 128, 300):
            x[:, :count] = first
            assert_logsumexp(logsumexp(x, 1, impl="cpu"), x.double().logsumexp(1), x)
            assert_softmax(
                softmax(x, 1, impl="cpu-two-pass"), x.double().softmax(1), x, "cpu-two-pass"
            )
