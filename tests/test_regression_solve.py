"""The solver of softmax regression: what it finds, and what it says of what it found."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aftermax.regression import (
    MatrixForm,
    Normalised,
    Rescaled,
    minimize,
    softmax_regression,
    solve,
)
from aftermax.regression.descent import Plan, descend

F64 = torch.float64
METHODS = ("auto", "lm", "newton", "cg", "thorough")


def normal(*shape):
    return torch.randn(*shape, dtype=F64)


def softmax_of(A, x):
    return (A @ x.unsqueeze(-1)).squeeze(-1).softmax(-1)


def realizable(n, d, scale=1.0, batch=()):
    A, x = scale * normal(*batch, n, d) / math.sqrt(d), normal(*batch, d)
    return A, softmax_of(A, x), x


# what it finds


@pytest.mark.parametrize("method", METHODS)
def test_it_finds_the_x_that_made_the_target(method):
    A, b, x = realizable(40, 5, batch=(3,))
    fit = softmax_regression(A, b, method=method)
    assert fit.converged.all()
    assert (fit.loss < 1e-24).all()
    assert (fit.smallest_eigenvalue > 0).all()
    torch.testing.assert_close(fit.x, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("n", "d", "scale", "error", "steps"),
    [(200, 20, 1, 1e-9, 10), (200, 20, 3, 1e-9, 12), (50, 40, 3, 1e-6, 17)],
)
def test_few_steps_are_enough_for_exact_targets(n, d, scale, error, steps):
    """Eight problems; steps are what plain Levenberg-Marquardt needed (docs/regression.md)."""
    A, b, x = realizable(n, d, scale, batch=(8,))
    fit = softmax_regression(A, b)
    assert fit.converged.all()
    assert (fit.loss < 1e-24).all()
    assert ((fit.x - x).norm(dim=1) < error * x.norm(dim=1)).all()
    assert fit.iterations.double().mean() <= steps


@given(
    n=st.integers(2, 12),
    d=st.integers(1, 4),
    weighted=st.booleans(),
    kind=st.sampled_from(("softmax", "exp", "cosh", "sinh")),
    seed=st.integers(0, 999),
)
def test_where_it_converges_the_gradient_is_0_and_the_hessian_has_no_negative_direction(
    n, d, weighted, kind, seed
):
    torch.manual_seed(seed)
    A, b = normal(n, d), normal(n).softmax(-1)
    weight = 0.1 + torch.rand(n, dtype=F64) if weighted else None
    ridge = 0.0 if weighted else 0.01
    fit = softmax_regression(A, b, weight, ridge, x0=normal(d), objective=kind)
    assert fit.converged
    problem = Normalised(A, b, weight, ridge)
    if kind != "softmax":
        problem = Rescaled(A, b, weight, ridge, kind)
    at = problem.at(fit.x)
    assert torch.equal(fit.loss, at.value)
    size = torch.linalg.eigvalsh(at.hessian)
    assert size[0] > -1e-9 * size[-1]
    torch.testing.assert_close(fit.smallest_eigenvalue, size[0])
    # a step that takes less off the loss than the dtype tells
    gain = at.gradient @ torch.linalg.lstsq(at.hessian, at.gradient[:, None]).solution[:, 0] / 2
    assert gain <= 1e-14 * at.value + 1e-28


@pytest.mark.parametrize("method", ["auto", "lm", "newton"])
@pytest.mark.parametrize("weight", [None, 0.03])
def test_a_problem_alone_goes_the_way_it_goes_in_a_batch(method, weight):
    A, b = normal(6, 20, 4), normal(6, 20).softmax(-1)
    b[:3] = softmax_of(A[:3], normal(3, 4))
    weights = None if weight is None else torch.full_like(b, weight)
    problem = Normalised(A, b, weights)
    plan, start = Plan.of(method, 0.0, 100, False), normal(6, 4)
    mu = torch.full((6,), 0.1, dtype=F64)
    together = descend(problem, start, plan, mu)
    for i in range(6):
        only = torch.tensor([i])
        alone = descend(problem.select(only), start[only], plan, mu[only])
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=1e-6, atol=1e-6)
        assert alone.end[0] == together.end[i]
        assert abs(int(alone.iterations[0] - together.iterations[i])) <= 2


def test_shared_data_with_a_batch_of_targets():
    A, x = normal(30, 3), normal(2, 5, 3)
    fit = softmax_regression(A, softmax_of(A, x))
    assert fit.x.shape == (2, 5, 3)
    assert fit.loss.shape == (2, 5)
    torch.testing.assert_close(fit.x, x, rtol=0, atol=1e-9)
    assert fit.status == "10 converged"


def test_the_matrix_form_shares_x():
    A1, A2, X = normal(2, 8, 3), normal(2, 9, 4), normal(2, 3, 4)
    for method in METHODS:
        fit = minimize(MatrixForm(A1, A2, (A1 @ X @ A2.mT).softmax(-1)), method=method)
        assert fit.converged.all()
        torch.testing.assert_close(fit.x, X, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["exp", "cosh", "sinh"])
def test_rescaled_targets_are_found_from_near_by(kind):
    A, x = normal(15, 3) / 2, normal(3)
    u = getattr(torch, kind)(A @ x)
    problem = Rescaled(A, u / u.sum(), kind=kind)
    fit = minimize(problem, x0=x + 0.05 * normal(3))
    assert fit.converged
    assert fit.loss < 1e-24 * u.square().sum()


def test_stiff_targets_keep_their_digits():
    """Entries of b go down to 1e-9: R^T R alone has lost them and creeps."""
    A, b, _ = realizable(30, 40, scale=6)
    assert b.min() < 1e-9
    fit = softmax_regression(A, b)
    assert fit.converged
    assert fit.loss < 1e-24
    assert fit.iterations < 100


def test_columns_that_change_nothing_do_no_harm():
    A, b, _ = realizable(20, 3)
    A = torch.cat([A, torch.ones(20, 1, dtype=F64), A[:, :1]], 1)
    fit = softmax_regression(A, b)
    assert fit.converged
    assert fit.loss < 1e-24
    assert abs(fit.smallest_eigenvalue) < 1e-12


def test_large_logits_at_the_start_are_no_obstacle():
    A, b, _ = realizable(30, 3)
    fit = softmax_regression(A, b, ridge=1e-6, x0=1e4 * normal(3))
    assert fit.converged
    assert fit.loss < 1e-4


def test_thorough_is_never_worse_than_auto():
    A, b = 3 * normal(12, 60, 15) / math.sqrt(15), (2 * normal(12, 60)).softmax(-1)
    auto = softmax_regression(A, b)
    thorough = softmax_regression(A, b, method="thorough")
    assert (thorough.loss <= auto.loss * (1 + 1e-12)).all()
    assert (thorough.loss < auto.loss * (1 - 1e-6)).any()
    assert (thorough.iterations > auto.iterations).all()


def test_a_saddle_is_left():
    """cosh is even: x = 0 has no gradient, and here it is a maximum along x."""
    A = torch.tensor([[3.0], [0.0]], dtype=F64)
    problem = Rescaled(A, torch.tensor([0.9, 0.1], dtype=F64), kind="cosh")
    assert problem.hessian(torch.zeros(1, dtype=F64)) < 0
    fit = minimize(problem)
    assert fit.converged
    assert fit.smallest_eigenvalue > 0
    assert fit.loss < 1e-24


def test_float32_is_solved_to_its_own_digits():
    A, b, x = realizable(40, 4)
    fit = softmax_regression(A.float(), b.float())
    assert fit.x.dtype == torch.float32
    assert fit.converged
    torch.testing.assert_close(fit.x.double(), x, rtol=0, atol=1e-3)


def test_many_unknowns_go_by_products(monkeypatch):
    monkeypatch.setattr("aftermax.regression.solve.DENSE", 20)
    A, b, x = realizable(200, 30)
    fit = softmax_regression(A, b)
    assert fit.converged
    torch.testing.assert_close(fit.x, x, rtol=0, atol=1e-8)
    true = torch.linalg.eigvalsh(Normalised(A, b).hessian(fit.x))[0]
    torch.testing.assert_close(fit.smallest_eigenvalue, true, rtol=1e-6, atol=0)


# what it says


@pytest.mark.parametrize("method", METHODS)
def test_a_target_that_only_the_limit_reaches_is_unbounded(method):
    A = normal(20, 3)
    b = torch.zeros(20, dtype=F64)
    b[(A @ normal(3)).argmax()] = 1  # a vertex of the hull: some direction makes it the largest
    fit = softmax_regression(A, b, method=method)
    assert fit.unbounded
    assert not fit.converged
    assert "leads to infinity" in fit.status
    # and with a regulariser there is a minimum
    for more in ({"ridge": 1e-3}, {"weight": 0.03}):
        fit = softmax_regression(A, b, method=method, **more)
        assert fit.converged
        assert not fit.unbounded


def test_an_infimum_that_is_not_0_is_unbounded_too():
    """Rows 1 and 2 are one row: f of them is equal, and b's third entry is 0."""
    A = torch.tensor([[1.0], [1.0], [-1.0]], dtype=F64)
    fit = softmax_regression(A, torch.tensor([0.7, 0.3, 0.0], dtype=F64))
    assert fit.unbounded
    assert abs(fit.loss - 0.04) < 1e-12  # 1/2 (0.2^2 + 0.2^2)


def test_zeros_in_b_are_not_unbounded_by_themselves():
    A = torch.tensor([[1.0], [0.0], [-1.0]], dtype=F64)
    for b in ([0.6, 0.4, 0.0], [0.9, 0.0, 0.0]):
        fit = softmax_regression(A, torch.tensor(b, dtype=F64))
        assert fit.converged, fit.status
        # further out is worse
        problem = Normalised(A, torch.tensor(b, dtype=F64))
        assert problem.value(fit.x + 1) > fit.loss < problem.value(fit.x - 1)


def test_none_of_many_problems_with_a_minimum_is_called_unbounded():
    A = 4 * normal(60, 30, 6) / math.sqrt(6)
    b = (2 * normal(60, 30)).softmax(-1)
    b[:20] = softmax_of(A[:20], normal(20, 6))
    fit = softmax_regression(A, b)
    minimum = fit.smallest_eigenvalue > 1e-7
    assert minimum.sum() > 40
    assert not (fit.unbounded & minimum).any()
    assert fit.converged[minimum].all()


def test_rescaled_exp_shrinks_to_0_without_a_regulariser():
    A, b = torch.rand(12, 3, dtype=F64) + 0.1, torch.rand(12, dtype=F64)
    b /= b.sum()
    fit = softmax_regression(A, b, objective="exp")
    assert fit.unbounded
    assert not fit.converged
    fit = softmax_regression(A, b, objective="exp", ridge=0.1)
    assert fit.converged


def test_max_iterations_are_told():
    A, b, _ = realizable(40, 5)
    fit = softmax_regression(A, b, max_iterations=2)
    assert fit.iterations == 2
    assert fit.out_of_steps
    assert not fit.converged
    assert fit.status == "max_iterations reached"
    equal = torch.full_like(b, 1 / 40)  # x = 0 fits it
    both = softmax_regression(A, torch.stack([b, equal]), max_iterations=2)
    assert both.statuses == ["max_iterations reached", "converged"]
    assert both.status == "1 max_iterations reached; 1 converged"


def test_a_loss_that_is_infinite_at_the_start_is_stuck():
    A, b = torch.full((3, 1), 500.0, dtype=F64), torch.full((3,), 0.25, dtype=F64)
    fit = softmax_regression(A, b, objective="exp", x0=torch.ones(1, dtype=F64))
    assert fit.status.startswith("stuck")
    assert "not finite" in fit.status
    assert fit.loss == math.inf


def test_a_looser_tolerance_stops_sooner():
    A, b = normal(40, 5), normal(40).softmax(-1)
    loose = softmax_regression(A, b, tolerance=1e-3)
    tight = softmax_regression(A, b)
    assert loose.converged
    assert loose.iterations < tight.iterations
    assert tight.loss <= loose.loss


# errors


def test_errors_say_what_came():
    A, b, _ = realizable(5, 2)
    with pytest.raises(ValueError, match=r"b \(5,\) with a least entry of -1"):
        softmax_regression(A, b - b.min() - 1)
    with pytest.raises(ValueError, match=r"a largest sum of 2 *; minimize"):
        softmax_regression(A, 2 * b)
    broken = A.clone()
    broken[1, 1] = math.nan
    with pytest.raises(ValueError, match=r"got A \(5, 2\) with 1 that are nan"):
        softmax_regression(broken, b)
    with pytest.raises(ValueError, match=r"got b \(5,\) with 5 that are nan"):
        softmax_regression(A, b * math.nan)
    with pytest.raises(ValueError, match=r"x0 must be \(2,\) or broadcast to it, got \(3,\)"):
        softmax_regression(A, b, x0=normal(3))
    with pytest.raises(ValueError, match=r"x0 must be torch.float64 as the data"):
        softmax_regression(A, b, x0=torch.zeros(2))
    with pytest.raises(ValueError, match=r"got x0 \(2,\) with 1 that are nan"):
        softmax_regression(A, b, x0=torch.tensor([0.0, math.nan], dtype=F64))
    with pytest.raises(ValueError, match=r"method must be one of .*'bfgs'"):
        softmax_regression(A, b, method="bfgs")
    with pytest.raises(ValueError, match=r"objective must be .*'tanh'"):
        softmax_regression(A, b, objective="tanh")
    with pytest.raises(ValueError, match=r"max_iterations >= 1 .* got 0 and 0"):
        softmax_regression(A, b, max_iterations=0)
    with pytest.raises(ValueError, match=r"A \(5, 2\) and b \(4,\)"):
        softmax_regression(A, b[:4])


def test_targets_that_are_no_distribution_go_to_minimize():
    A, b, _ = realizable(10, 2)
    shifted = b + 0.1 * normal(10)
    fit = minimize(Normalised(A, shifted))
    assert fit.converged or fit.unbounded


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_by_name(dtype):
    A, b = torch.eye(3, dtype=dtype), torch.full((3,), 0.25, dtype=dtype)
    with pytest.raises(ValueError, match=f"float32 or float64, got {dtype}"):
        softmax_regression(A, b)


def test_no_problems_are_refused():
    A, b = torch.randn(0, 5, 2), torch.full((5,), 0.2)
    with pytest.raises(ValueError, match=r"at least one problem, got a batch of \(0,\)"):
        softmax_regression(A, b)
    with pytest.raises(ValueError, match="at least one problem"):
        softmax_regression(A, b.expand(0, 5))


def test_a_weight_is_any_one_number():
    A, b = torch.randn(6, 2, dtype=torch.float64), torch.full((6,), 1 / 8, dtype=torch.float64)
    want = softmax_regression(A, b, weight=0.5).x
    for weight in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        torch.testing.assert_close(softmax_regression(A, b, weight=weight).x, want)


def test_a_lanczos_certificate_does_not_hang_on_the_neighbours_of_a_problem():
    """One whose Hessian is 0, or of small rank, has seen all of its directions at once."""
    A, x = torch.randn(30, 60, dtype=F64), torch.randn(1, 60, dtype=F64)
    b = (2 * torch.randn(30, dtype=F64)).softmax(0)
    problem = Normalised(torch.stack([A, 0 * A, A[:, :1].expand(30, 60)]), b)
    points = x.expand(3, 60)
    hessian = problem.hessian(points)

    def product(v):
        return (hessian @ v[..., None])[..., 0]

    found = solve._lanczos(product, points).smallest
    torch.testing.assert_close(found, torch.linalg.eigvalsh(hessian)[:, 0], rtol=1e-9, atol=1e-12)
