"""Bounds of softmax regression, updates by attention that equal its steps, the report on both."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aftermax.regression import (
    bounds,
    closeness_report,
    convex_weight,
    equivalent_update,
    gradient_step_logits,
    hessian_lipschitz,
    linear_attention_update,
    safe_step,
    softmax_attention_update,
    softmax_gradient,
    softmax_head_logits,
    softmax_hessian,
)

ROOT = Path(__file__).parent.parent


def curvature_script():
    """The proof, as a module."""
    spec = importlib.util.spec_from_file_location("curvature", ROOT / "benchmarks/curvature.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["curvature"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


PROOF = curvature_script()


def problem(n: int = 6, d: int = 4, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, ...]:
    """A, b, x in float64."""
    random = torch.Generator().manual_seed(seed)
    A, x, b = (torch.randn(s, generator=random).double() for s in ((n, d), (d,), (n,)))
    return scale * A, (2 * b).softmax(-1), x


# ---- bounds ------------------------------------------------------------------------------------


@given(st.integers(2, 9), st.floats(0.1, 8), st.integers(0, 10**6))
def test_curvature_stays_between_its_bounds(n, scale, seed):
    random = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, generator=random).double()
    for b in (*torch.eye(n).double(), torch.zeros(n).double()):
        eigenvalues = torch.linalg.eigvalsh(softmax_hessian(torch.eye(n).double(), b, z))
        assert eigenvalues[0] >= bounds.CURVATURE_MIN - 1e-12
        assert eigenvalues[-1] <= bounds.CURVATURE_MAX + 1e-12


@pytest.mark.parametrize("sign", [1, -1])
def test_two_classes_attain_them(sign):
    share = torch.tensor((15 + sign * math.sqrt(33)) / 24, dtype=torch.float64)
    z, b = torch.stack([share, 1 - share]).log(), torch.tensor([0.0, 1.0]).double()
    eigenvalues = torch.linalg.eigvalsh(softmax_hessian(torch.eye(2).double(), b, z))
    found, bound = (
        (eigenvalues[0], bounds.CURVATURE_MIN)
        if sign > 0
        else (eigenvalues[-1], bounds.CURVATURE_MAX)
    )
    assert float(found) == pytest.approx(bound, abs=1e-12)


def third_derivative(z: Tensor, b: Tensor, u: Tensor) -> Tensor:
    along = lambda t: 0.5 * ((z + t * u).softmax(-1) - b).square().sum()  # noqa: E731
    once = torch.func.grad(along)
    return torch.func.grad(torch.func.grad(once))(torch.zeros((), dtype=z.dtype))


def test_third_derivative_of_two_classes():
    (s,) = (float(r.real) for r in np.roots([60, -108, 57, -8]) if 0.5 < r.real < 0.8)
    z, u = (
        torch.tensor([s, 1 - s], dtype=torch.float64).log(),
        torch.tensor([1.0, -1.0]).double() / 2**0.5,
    )
    found = third_derivative(z, torch.tensor([0.0, 1.0]).double(), u)
    assert float(found.abs()) == pytest.approx(bounds.THIRD_DERIVATIVE_MAX, abs=1e-12)


@given(st.integers(2, 9), st.floats(0.1, 6), st.integers(0, 10**6))
def test_third_derivative_stays_below_its_bound(n, scale, seed):
    random = torch.Generator().manual_seed(seed)
    z, u = (torch.randn(n, generator=random).double() for _ in range(2))
    for b in (*torch.eye(n).double(), torch.zeros(n).double()):
        size = third_derivative(scale * z, b, u / u.norm()).abs()
        assert float(size) <= bounds.THIRD_DERIVATIVE_MAX + 1e-12


@given(st.integers(1, 7), st.floats(-3, 3), st.integers(0, 10**6))
def test_forms_of_the_proof_are_the_curvature(rest, log_odds, seed):
    """bound norm^2 - s u^T B u, with no measure: classes one by one."""
    random = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(log_odds))
    g = random.dirichlet(np.ones(rest))
    y, D, c = random.normal(size=rest), random.normal(), random.normal()
    y -= (g * y).sum()  # sum g y = 0
    f = torch.from_numpy(np.append(p, (1 - p) * g))
    b = torch.eye(rest + 1, dtype=torch.float64)[0]
    u = torch.from_numpy(np.append(D, y))
    hessian = softmax_hessian(torch.eye(rest + 1, dtype=torch.float64), b, f.log())
    for bound in (PROOF.LOWER, PROOF.UPPER):
        wanted = abs(bound) * ((D - c) ** 2 + ((y - c) ** 2).sum()) - np.sign(bound) * float(
            u @ hessian @ u
        )
        for heavy in range(min(rest, 3)):
            form = PROOF.Form(bound, heavy)
            shares, others = g[:heavy], g[heavy:]
            G = (others**2).sum() / others.sum()
            vector = np.array([0, *y[:heavy], c, D])
            found = vector @ form.apart(p, shares, G) @ vector
            for share, value in zip(others, y[heavy:], strict=True):
                vector[0] = value
                matrix = form.of_measure(p, shares, G, share, 1 / share)
                found += share * (vector @ matrix @ vector)
            assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_the_proof_shows_no_more_than_what_is_true(monkeypatch):
    assert PROOF.prove(PROOF.UPPER).boxes > 5
    monkeypatch.setattr(PROOF, "SMALLEST", 0.02)
    with pytest.raises(RuntimeError, match="not shown"):
        PROOF.prove(-0.23)  # -0.240409 is attained


@pytest.mark.slow
def test_the_whole_proof():
    for bound, heavy in ((PROOF.LOWER, 0), (PROOF.UPPER, 1), (PROOF.UPPER, 2)):
        assert PROOF.prove(bound, heavy).boxes > 10


def test_steps_weights_and_lipschitz_constants():
    A, b, x = problem(scale=3.0)
    norm = float(torch.linalg.matrix_norm(A, 2))
    assert float(safe_step(A)) == pytest.approx(1 / (bounds.CURVATURE_PROVED[1] * norm**2))
    assert float(hessian_lipschitz(A)) == pytest.approx(bounds.THIRD_DERIVATIVE_MAX * norm**3)
    for strength in (0.0, 0.5):
        w = convex_weight(A, strength)
        hessian = softmax_hessian(A, b, x) + w**2 * A.mT @ A
        assert float(torch.linalg.eigvalsh(hessian)[0]) >= strength - 1e-9
    with pytest.raises(ValueError, match="ridge"):
        convex_weight(A[:2], 0.5)
    with pytest.raises(ValueError, match="strength"):
        convex_weight(A, -1.0)
    with pytest.raises(ValueError, match=r"\(\.\.\., n, d\)"):
        safe_step(x)


# ---- constructions -----------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6))
def test_moving_A_is_moving_x(n, d, seed):
    A, b, x = problem(n, d, seed)
    step = torch.randn(d, generator=torch.Generator().manual_seed(seed + 1)).double()
    moved = equivalent_update(A, x, step)
    torch.testing.assert_close((A + moved) @ x, A @ (x + step), rtol=1e-12, atol=1e-12)
    norms = [float(torch.linalg.matrix_norm(moved, order)) for order in (2, "fro")]
    assert norms == pytest.approx([float((A @ step).norm() / x.norm())] * 2)
    by_attention = linear_attention_update(A, b, x, 0.7)
    wanted = equivalent_update(A, x, -0.7 * softmax_gradient(A, b, x))
    torch.testing.assert_close(by_attention, wanted, rtol=1e-12, atol=1e-12)


def slope(error_at, betas=(1e-2, 1e-3)) -> float:
    first, second = (float(error_at(beta)) for beta in betas)
    return math.log10(first / second)


@pytest.mark.parametrize("heads", [1, 2])
def test_softmax_heads_near_the_step_as_beta_falls(heads):
    A, b, x = problem(25, 20)
    queries = problem(7, 20, seed=1)[0]
    wanted = gradient_step_logits(A, b, queries, 11.0).softmax(-1)

    def of_logits(beta: float) -> Tensor:
        logits = softmax_head_logits(A, b, queries, 11.0, beta, heads)
        return (logits.softmax(-1) - wanted).norm()

    exact = linear_attention_update(A, b, x, 11.0)

    def of_update(beta: float) -> Tensor:
        return (softmax_attention_update(A, b, x, 11.0, beta, heads) - exact).norm()

    assert slope(of_logits) == pytest.approx(heads, abs=0.05)
    assert slope(of_update) == pytest.approx(heads, abs=0.05)


def test_the_step_from_zero_is_the_gradient():
    A, b, _ = problem(9, 4)
    queries = problem(5, 4, seed=2)[0]
    wanted = queries @ (-3.0 * softmax_gradient(A, b, torch.zeros(4).double()))
    torch.testing.assert_close(gradient_step_logits(A, b, queries, 3.0), wanted)


def test_constructions_take_stacks_of_problems():
    A, b, x = (torch.stack([t, t.flip(0)]) for t in problem(5, 3))
    queries = torch.stack([A[0, :2], A[1, :2]])
    of = {
        "step": lambda *i: gradient_step_logits(A[i], b[i], queries[i], 2.0),
        "head": lambda *i: softmax_head_logits(A[i], b[i], queries[i], 2.0),
        "linear": lambda *i: linear_attention_update(A[i], b[i], x[i], 2.0),
        "softmax": lambda *i: softmax_attention_update(A[i], b[i], x[i], 2.0),
    }
    for call in of.values():
        torch.testing.assert_close(call(...), torch.stack([call(0), call(1)]))


def test_constructions_say_what_does_not_fit():
    A, b, x = problem(5, 3)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 3\)"):
        equivalent_update(A, b, x)
    with pytest.raises(ValueError, match="x is 0"):
        equivalent_update(A, 0 * x, x)
    with pytest.raises(ValueError, match="one dtype"):
        linear_attention_update(A, b.float(), x, 1.0)
    with pytest.raises(ValueError, match="1 or 2 heads"):
        softmax_head_logits(A, b, A, 1.0, heads=3)
    with pytest.raises(ValueError, match="beta"):
        softmax_attention_update(A, b, x, 1.0, beta=0.0)
    with pytest.raises(ValueError, match="queries"):
        gradient_step_logits(A, b, A[:, :2], 1.0)


# ---- the report --------------------------------------------------------------------------------


@given(st.integers(2, 8), st.integers(1, 6), st.floats(0.05, 4), st.integers(0, 10**6))
def test_shifts_stay_within_their_bounds(n, d, scale, seed):
    A, b, x = problem(n, d, seed, scale)
    report = closeness_report(A, x, b, step=0.5)
    for shift in (report.step, report.update):
        assert shift.sharp.holds
        assert shift.size <= math.sqrt(2)
        assert float((shift.target - b).sum()) == pytest.approx(0, abs=1e-12)
    f = (A @ x).softmax(-1)
    stepped = x - 0.5 * softmax_gradient(A, b, x)
    # x kept and the target moved: the residual is that of the step
    torch.testing.assert_close(f - report.step.target, (A @ stepped).softmax(-1) - b)


def test_the_exact_update_is_the_step():
    A, b, x = problem(6, 4)
    exact = linear_attention_update(A, b, x, 0.5)
    for update in (exact, lambda tokens: tokens + exact):
        report = closeness_report(A, x, b, 0.5, update)
        assert report.distance == pytest.approx(0, abs=1e-12)
        assert report.difference == pytest.approx(0, abs=1e-12)
        assert report.cosine == pytest.approx(1, abs=1e-12)
    step = -0.5 * softmax_gradient(A, b, x)
    assert closeness_report(A, x, b, step, exact).distance == pytest.approx(0, abs=1e-12)


def test_the_sharp_bound_is_attained_and_the_papers_is_vacuous():
    A = torch.tensor([[1.0], [-1.0]]).double() / 2**0.5 * 4
    b, x = torch.tensor([0.5, 0.5]).double(), torch.tensor([1e-5]).double()
    report = closeness_report(A, x, b, step=torch.tensor([1e-6]).double(), update=0 * A)
    assert report.step.size / report.step.sharp.value == pytest.approx(1, abs=1e-8)
    assert report.update.size == report.update.ratio == 0
    assert math.isnan(report.cosine)
    assert report.step.paper.vacuous  # exp(16 + log 2) 1e-6
    small = closeness_report(A / 4, x, b, step=torch.tensor([1e-6]).double(), update=0 * A)
    assert not small.step.paper.vacuous
    large = closeness_report(10 * A, x, b, step=torch.tensor([0.1]).double(), update=A)
    assert large.step.paper.vacuous
    assert large.step.paper.value == math.inf
    assert "vacuous" in str(large)


def test_the_report_says_what_does_not_fit():
    A, b, x = problem(5, 3)
    with pytest.raises(ValueError, match="one problem"):
        closeness_report(A[None], x[None], b[None], 1.0)
    with pytest.raises(ValueError, match="give update"):
        closeness_report(A, x, b, x)
    with pytest.raises(ValueError, match="update must be"):
        closeness_report(A, x, b, 1.0, update=A[:2])
    with pytest.raises(ValueError, match="finite"):
        closeness_report(A * math.nan, x, b, 1.0)
    with pytest.raises(ValueError, match="learning rate"):
        closeness_report(A, x, b, math.inf)
    with pytest.raises(ValueError, match=r"one problem.*x \(2, 3\)"):
        closeness_report(A, x.expand(2, 3), b, 1.0)
    with pytest.raises(ValueError, match=r"one problem.*b \(2, 5\)"):
        closeness_report(A, x, b.expand(2, 5), 1.0)
    with pytest.raises(ValueError, match="step must be finite"):
        closeness_report(A, x, b, x * math.nan, update=A)
    with pytest.raises(ValueError, match="update must be finite"):
        closeness_report(A, x, b, 1.0, update=A * math.inf)


def test_the_report_needs_no_gradients():
    """Of a layer that is trained, say: warnings are errors here."""
    A, b, x = problem(5, 3)
    layer = torch.nn.Linear(3, 3, dtype=torch.float64)
    plain = closeness_report(A, x, b, 1.0, update=layer(A).detach() - A)
    traced = closeness_report(A.clone().requires_grad_(), x.clone().requires_grad_(), b, 1.0, layer)
    assert str(traced) == str(plain)
    assert not traced.equivalent.requires_grad


def test_a_matrix_without_rank_has_no_convex_weight():
    A = torch.ones(4, 2, dtype=torch.float64)
    assert float(convex_weight(A)) ** 2 == pytest.approx(0.24042)
    with pytest.raises(ValueError, match="rank"):
        convex_weight(A, strength=1.0)
