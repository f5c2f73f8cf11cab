"""out= of softmax, log_softmax and logsumexp."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from aftermax import kernels, log_softmax, logsumexp, softmax
from aftermax.kernels import ops

from .native import BF16, DTYPES, F16, F32, F64, needs_kernels
from .row_cases import (
    BOTH,
    EPS,
    FUNCTIONS,
    KERNELS,
    SPECIAL_ROWS,
    assert_same,
    assert_softmax,
    normal,
)


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


@needs_kernels
def test_autograd_learns_that_out_was_written():
    leaf = normal(3, 4).requires_grad_()
    x = leaf * 1
    square = x.square().sum()
    with torch.no_grad():
        softmax(x, out=x, impl="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


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
@pytest.mark.parametrize("fresh", [True, False])
def test_a_result_larger_than_the_cache_equals_float64(body, impl, fresh):
    # given memory is written past the cache, by other instructions, where the rows begin anywhere;
    # the pages of fresh memory are asked for along the way
    for dtype in (F32, BF16):
        few = normal(3, 70001, dtype=dtype)
        exact = torch.softmax(few.double(), 1)
        many = few.repeat(80, 1)
        out = None if fresh else torch.full_like(many, 7.0)
        got = softmax(many, 1, out=out, impl=impl).reshape(80, 3, -1)
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
    overlapping = memory[20:].as_strided((3, 4), (2, 1))
    for function in (softmax, log_softmax):
        with pytest.raises(RuntimeError, match="several elements in one place"):
            function(x, out=overlapping, impl=impl)
    assert_same(memory, kept)
    # neither side by side nor woven into each other is an overlap
    expected = softmax(x, impl=impl)
    woven = memory[28:36].as_strided((2, 3), (3, 2))  # 0 2 4, 3 5 7
    assert_same(softmax(x, out=memory[12:24].reshape(3, 4), impl=impl), expected)
    assert_same(softmax(x[:2, :3], out=woven, impl=impl), softmax(x[:2, :3], impl=impl))
    halves = normal(3, 8)
    expected = softmax(halves[:, :4], impl=impl)
    assert_same(softmax(halves[:, :4], out=halves[:, 4:], impl=impl), expected)
    for out in (halves[:, 3:7], halves[:, 1:5]):
        with pytest.raises(RuntimeError, match="out overlaps the input"):
            softmax(halves[:, :4], out=out, impl=impl)
    pairs = normal(3, 8)
    expected = softmax(pairs[:, ::2], impl=impl)
    assert_same(softmax(pairs[:, ::2], out=pairs[:, 1::2], impl=impl), expected)
