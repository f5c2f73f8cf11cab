"""The gradients of softmax, log_softmax and logsumexp, and the gradients of those."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import log_softmax, softmax

from .native import DTYPES, INF, needs_kernels
from .row_cases import (
    FUNCTIONS,
    LENGTHS,
    assert_gradient,
    gradient_of,
    impls_of,
    in_every_body,
    normal,
    rows_and_truth,
    views,
)


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
