"""Softmax regression's derivatives against autograd, its shapes, and what large logits do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.functional import hessian, jacobian

from aftermax.regression import (
    MatrixForm,
    Normalised,
    Rescaled,
    softmax_gauss_newton,
    softmax_gradient,
    softmax_hessian,
    softmax_loss,
)

KINDS = (None, "exp", "cosh", "sinh")
F64 = torch.float64


def naive(objective, x):
    """The formula as the papers print it, of one problem."""
    form = isinstance(objective, MatrixForm)
    s = objective.A1 @ x @ objective.A2.T if form else objective.A @ x
    target = objective.B if form else objective.b
    kind = getattr(objective, "kind", None)
    if kind is None:
        u = torch.exp(s)
        residual = u / u.sum(-1, keepdim=True) - target
    else:
        u = getattr(torch, kind)(s)
        residual = u - u.sum(-1, keepdim=True) * target
    value = (residual**2).sum() / 2 + objective.ridge / 2 * (x**2).sum()
    if objective.weight is not None:
        value = value + ((objective.weight * s) ** 2).sum() / 2
    return value, residual


def objective_of(kind, matrix, weighted, ridge, sizes, batch=(), scale=1.0):
    """A random one, and a point."""
    n, m, d1, d2 = sizes

    def normal(*shape):
        return scale * torch.randn(*batch, *shape, dtype=F64)

    if matrix:
        data = normal(n, d1), normal(m, d2), normal(n, m).softmax(-1)
        weight = torch.rand(*batch, n, m, dtype=F64) if weighted else None
        return MatrixForm(*data, weight, ridge, kind), normal(d1, d2)
    data = normal(n, d1), normal(n).softmax(-1)
    weight = torch.rand(*batch, n, dtype=F64) if weighted else None
    if kind is None:
        return Normalised(*data, weight, ridge), normal(d1)
    return Rescaled(*data, weight, ridge, kind), normal(d1)


cases = given(
    kind=st.sampled_from(KINDS),
    matrix=st.booleans(),
    weighted=st.booleans(),
    ridge=st.sampled_from((0.0, 0.3)),
    sizes=st.tuples(*[st.integers(1, 5)] * 4),
    seed=st.integers(0, 999),
)


def close(ours, right):
    scale = max(1.0, right.abs().max().item())
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-12 * scale)


@cases
def test_values_and_derivatives_are_autograds(kind, matrix, weighted, ridge, sizes, seed):
    torch.manual_seed(seed)
    objective, x = objective_of(kind, matrix, weighted, ridge, sizes)
    at, size = objective.at(x), x.numel()

    def value(x):
        return naive(objective, x)[0]

    close(at.value, value(x))
    close(at.residual, naive(objective, x)[1])
    close(at.gradient, jacobian(value, x))
    second = hessian(value, x).reshape(size, size)
    close(at.hessian, second)

    first = jacobian(lambda x: naive(objective, x)[1], x).reshape(-1, size)
    weighed = torch.zeros(size, size, dtype=F64)
    if weighted:
        half = lambda x: (objective.weight * objective.logits(x)).square().sum() / 2  # noqa: E731
        weighed = hessian(half, x).reshape(size, size)
    right = first.T @ first + weighed + ridge * torch.eye(size, dtype=F64)
    close(at.gauss_newton, right)

    v, r = torch.randn_like(x), torch.randn_like(at.residual)
    close(at.jacobian_product(v), (first @ v.flatten()).reshape(r.shape))
    close(at.transposed_product(r), (first.T @ r.flatten()).reshape(x.shape))
    close(at.hessian_product(v), (second @ v.flatten()).reshape(x.shape))
    close(at.gauss_newton_product(v), (right @ v.flatten()).reshape(x.shape))


@cases
def test_a_batch_is_its_problems(kind, matrix, weighted, ridge, sizes, seed):
    torch.manual_seed(seed)
    objective, x = objective_of(kind, matrix, weighted, ridge, sizes, batch=(2, 3))
    flat, points = objective.flat(), x.flatten(0, 1)
    assert objective.batch == (2, 3)
    assert flat.batch == (6,)
    for name in ("value", "gradient", "hessian", "gauss_newton", "residual"):
        whole = getattr(objective, name)(x)
        assert whole.shape[:2] == (2, 3)
        one = flat.select(torch.tensor([4]))
        close(getattr(flat, name)(points), whole.flatten(0, 1))
        close(getattr(one, name)(points[4:5]), whole[1, 1][None])


def test_data_are_shared_where_they_do_not_have_a_dimension():
    A, b = torch.randn(6, 3, dtype=F64), torch.rand(4, 6, dtype=F64)
    x = torch.randn(5, 4, 3, dtype=F64)
    problem = Normalised(A, b, weight=torch.rand(6, dtype=F64))
    assert problem.batch == (4,)
    assert problem.hessian(x).shape == (5, 4, 3, 3)
    alone = Normalised(A, b[2], problem.weight)
    close(problem.gradient(x)[3, 2], alone.gradient(x[3, 2]))
    close(problem.flat().gradient(x[3]), problem.gradient(x[3]))


def test_the_functions_are_the_normalised_objective():
    A, b, x = torch.randn(5, 2, dtype=F64), torch.rand(5, dtype=F64), torch.randn(2, dtype=F64)
    problem = Normalised(A, b)
    assert torch.equal(softmax_loss(A, b, x), problem.value(x))
    assert torch.equal(softmax_gradient(A, b, x), problem.gradient(x))
    assert torch.equal(softmax_hessian(A, b, x), problem.hessian(x))
    assert torch.equal(softmax_gauss_newton(A, b, x), problem.gauss_newton(x))


def test_the_hessian_is_the_papers_diagonal_and_three_of_rank_one():
    A, b, x = torch.randn(7, 3, dtype=F64), torch.rand(7, dtype=F64), torch.randn(3, dtype=F64)
    f = (A @ x).softmax(-1)
    g = (2 * f - b) * f
    B = (g - (f - b) @ f * f).diag() - g.outer(f) - f.outer(g) + (3 * f - 2 * b) @ f * f.outer(f)
    close(softmax_hessian(A, b, x), A.T @ B @ A)


def test_the_derivatives_have_derivatives():
    A, b, x = torch.randn(4, 2, dtype=F64), torch.rand(4, dtype=F64), torch.randn(2, dtype=F64)
    A.requires_grad_(), b.requires_grad_(), x.requires_grad_()
    assert torch.autograd.gradcheck(lambda A, b, x: Normalised(A, b).gradient(x), (A, b, x))
    for kind in KINDS[1:]:
        of = lambda A, b, x, kind=kind: Rescaled(A, b, kind=kind).gradient(x)  # noqa: E731
        assert torch.autograd.gradcheck(of, (A, b, x))


# large logits


def test_normalised_is_finite_at_any_finite_logits():
    A = torch.tensor([[1e6], [-1e6], [0.0]], dtype=F64)
    at = Normalised(A, torch.tensor([1.0, 0.0, 0.0], dtype=F64)).at(torch.ones(1, dtype=F64))
    assert at.value == 0
    for name in ("gradient", "hessian", "gauss_newton"):
        assert torch.equal(getattr(at, name), torch.zeros_like(getattr(at, name)))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("top", [50.0, 180.0, 350.0])
def test_what_is_taken_out_before_the_exponential_is_put_back(kind, top):
    mpmath = pytest.importorskip("mpmath")
    s, b = [top, -top / 2, 1.0], [0.5, 0.25, 0.25]
    at = Rescaled(torch.eye(3, dtype=F64), torch.tensor(b, dtype=F64), kind=kind).at(
        torch.tensor(s, dtype=F64)
    )
    with mpmath.workdps(60):
        u = [getattr(mpmath, kind)(value) for value in s]
        c = [ui - sum(u) * mpmath.mpf(bi) for ui, bi in zip(u, b, strict=True)]
        value = sum(ci**2 for ci in c) / 2
        other = {"exp": "exp", "cosh": "sinh", "sinh": "cosh"}[kind]
        pulled = sum(bi * ci for bi, ci in zip(b, c, strict=True))
        slope = [getattr(mpmath, other)(si) * (ci - pulled) for si, ci in zip(s, c, strict=True)]
        assert abs(at.value.item() / value - 1) < 1e-12
        for ours, right in zip(at.gradient.tolist(), slope, strict=True):
            assert abs(ours / right - 1) < 1e-12


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_value_beyond_the_dtype_is_inf_and_nothing_is_nan(kind, dtype):
    top = math.log(torch.finfo(dtype).max)
    problem = Rescaled(torch.eye(3, dtype=dtype), torch.full((3,), 0.25, dtype=dtype), kind=kind)
    at = problem.at(torch.tensor([2 * top, top, -top], dtype=dtype))
    assert at.value == math.inf
    for name in ("gradient", "hessian", "gauss_newton"):
        assert not getattr(at, name).isnan().any()
    assert at.gradient.isinf().any()
    # a quarter of the way up every square still fits
    at = problem.at(torch.tensor([0.45 * top, 0.3 * top, -top], dtype=dtype))
    low = kind == "exp"
    assert at.value.isfinite() == low


# errors


def test_errors_say_the_shapes():
    A, b = torch.zeros(5, 2), torch.zeros(5)
    with pytest.raises(ValueError, match=r"A \(5, 2\) and b \(4,\)"):
        Normalised(A, b[:4])
    with pytest.raises(ValueError, match=r"A torch.float32, target torch.float64"):
        Normalised(A, b.double())
    with pytest.raises(ValueError, match=r"floating dtype, got A torch.int64"):
        Normalised(A.long(), b.long())
    with pytest.raises(ValueError, match=r"weight of the target's shape \(5,\).*got \(2,\)"):
        Normalised(A, b, weight=torch.zeros(2))
    with pytest.raises(ValueError, match=r"do not broadcast: A \(3,\), b \(2,\)"):
        Normalised(A.expand(3, 5, 2), b.expand(2, 5))
    with pytest.raises(ValueError, match=r"finite ridge >= 0, got -1"):
        Normalised(A, b, ridge=-1)
    with pytest.raises(ValueError, match=r"one row and one column, got A \(0, 2\)"):
        Normalised(A[:0], b[:0])
    with pytest.raises(ValueError, match=r"unknowns \(2,\), got x \(3,\)"):
        Normalised(A, b).value(torch.zeros(3))
    with pytest.raises(ValueError, match=r"kind must be one of .*'tanh'"):
        Rescaled(A, b, kind="tanh")
    with pytest.raises(ValueError, match=r"A1 \(5, 2\), A2 \(4, 2\) and B \(5, 5\)"):
        MatrixForm(A, A[:4], torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"unknowns \(2, 2\), got x \(2,\)"):
        MatrixForm(A, A, torch.zeros(5, 5)).value(torch.zeros(2))
