"""inplace_backward of cross_entropy: the same gradient, in the memory of the logits."""

import functools
import itertools

import pytest
import torch
from torch.testing import assert_close

from aftermax import cross_entropy

from . import native
from .native import DTYPES, F64, needs_kernels

normal = functools.partial(native.normal, scale=2.0)


def _loss_in_place(x, **options):
    return cross_entropy(x, torch.arange(x.shape[0]), inplace_backward=True, **options)


@needs_kernels
def test_inplace_backward_gives_the_same_gradient_in_the_memory_of_the_logits():
    for dtype, options in itertools.product(
        DTYPES, ({}, {"label_smoothing": 0.1, "lse_square_scale": 1e-2}, {"reduction": "sum"})
    ):
        leaf = normal(5, 40, dtype=dtype).requires_grad_()
        (expected,) = torch.autograd.grad(cross_entropy(leaf, torch.arange(5), **options), leaf)
        logits = leaf * 1
        (got,) = torch.autograd.grad(_loss_in_place(logits, **options), logits)
        assert got.data_ptr() == logits.data_ptr()
        assert torch.equal(got, expected)
        _loss_in_place(leaf * 1, **options).backward()
        assert torch.equal(leaf.grad, expected)


@needs_kernels
def test_inplace_backward_is_refused_where_it_would_destroy_something():
    leaf = normal(3, 4).requires_grad_()
    with pytest.raises(ValueError, match=r"inplace_backward .* leaf"):
        _loss_in_place(leaf)
    # what else is computed from the logits finds them changed
    logits = leaf * 1
    square = logits.square().sum()
    loss = square + _loss_in_place(logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = leaf * 1
    loss = _loss_in_place(logits)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for view in (leaf.view(4, 3), leaf[:2], leaf.T):
        with pytest.raises(ValueError, match=r"inplace_backward .* view of"):
            _loss_in_place(view)
    assert _loss_in_place(leaf.detach()).isfinite()  # no gradient is wanted: nothing to destroy


@needs_kernels
def test_inplace_backward_makes_a_new_gradient_where_it_does_not_fit():
    leaf = normal(1, 5).requires_grad_()
    logits = (leaf * 1).expand(3, 5)
    (got,) = torch.autograd.grad(_loss_in_place(logits), leaf)
    (expected,) = torch.autograd.grad(cross_entropy(leaf.expand(3, 5), torch.arange(3)), leaf)
    assert_close(got, expected)
    leaf = normal(3, 5).requires_grad_()
    many, x = torch.eye(3), leaf * 1
    loss = _loss_in_place(x, reduction="none")
    (got,) = torch.autograd.grad(loss, leaf, many, is_grads_batched=True)
    loss = cross_entropy(leaf, torch.arange(3), reduction="none")
    (expected,) = torch.autograd.grad(loss, leaf, many, is_grads_batched=True)
    assert_close(got, expected)


def test_inplace_backward_changes_nothing_but_memory():
    leaf = normal(3, 4, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: _loss_in_place(x * 1, impl="reference"), leaf)
    leaf = normal(3, 4).requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(leaf, torch.arange(3)), leaf, create_graph=True)
    (got,) = torch.autograd.grad(_loss_in_place(leaf * 1), leaf, create_graph=True)
    assert_close(got, expected)
    wanted = torch.autograd.grad(expected.square().sum(), leaf)
    assert_close(torch.autograd.grad(got.square().sum(), leaf), wanted)


@needs_kernels
def test_inplace_backward_compiles():
    def step(x):
        return _loss_in_place(x * 2)

    leaf = normal(3, 4).requires_grad_()
    (expected,) = torch.autograd.grad(step(leaf), leaf)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(leaf), leaf)
    assert_close(got, expected)
