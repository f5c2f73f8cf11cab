"""Newton's inverse: what its steps reach, what float32 does to them, and its backward pass."""

import pytest
import torch
from torch.testing import assert_close

from aftermax.lowrank import newton_inverse
from aftermax.scores import gaussian

from .cases import EXACT, F64
from .soft_cases import kernel_of, normal, relative


def test_newton_captures_of_each_direction_what_the_law_says():
    # 1 - (1 - alpha sigma^2)^(2^T) of 1 / sigma
    vectors = torch.linalg.qr(normal(12, 12)).Q
    sigma = torch.logspace(-4, 0, 12, dtype=F64)
    matrix = vectors * sigma @ vectors.T
    alpha = 0.9 * 2 / matrix.abs().sum(0).max() ** 2
    for steps in (5, 10, 15, 20):
        inverse = newton_inverse(matrix, steps)
        captured = (vectors.T @ inverse @ vectors).diagonal() * sigma
        assert_close(captured, 1 - (1 - alpha * sigma**2) ** (2**steps), rtol=0, atol=1e-10)


def test_the_residual_falls_with_every_step():
    matrix = kernel_of(49, 4, 1.0)
    residuals = [newton_inverse(matrix, n, return_residual=True)[1].item() for n in range(1, 35)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-8


@pytest.mark.parametrize(
    ("width", "size", "condition", "residual", "error"),
    [
        (32, 1.0, (1.5, 2.5), (0, 1e-15), (0, 1e-14)),
        (32, 0.3, (4e2, 1e3), (1e-5, 3e-4), (1e-3, 0.1)),
        (4, 1.0, (1e4, 1e5), (5e-4, 2e-3), (0.9, 1)),
    ],
)
def test_twenty_steps_suffice_where_the_landmarks_are_far_apart(
    width, size, condition, residual, error
):
    """And the residual does not tell how far off the inverse is in small directions."""
    matrix = kernel_of(49, width, size)
    inverse, left = newton_inverse(matrix, return_residual=True)
    assert condition[0] < torch.linalg.cond(matrix) < condition[1]
    assert residual[0] <= left < residual[1]
    assert error[0] <= relative(inverse, torch.linalg.inv(matrix)) < error[1]


def unguarded(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    inverse = 0.9 * 2 / matrix.detach().abs().sum(0).max() ** 2 * matrix
    for _ in range(steps):
        inverse = 2 * inverse - inverse @ matrix @ inverse
    return inverse


def test_in_float32_the_bare_iteration_diverges_and_ours_goes_back_to_its_best():
    matrix = kernel_of(49, 2, 0.5).float()
    assert unguarded(matrix, 20).isfinite().all()
    assert not unguarded(matrix, 80).isfinite().any()
    residuals = []
    for steps in (20, 29, 40, 60, 200):
        inverse, residual = newton_inverse(matrix, steps, return_residual=True)
        assert inverse.isfinite().all()
        residuals.append(residual.item())
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-4


def test_the_guard_is_each_matrix_its_own():
    matrices = torch.stack([kernel_of(49, 2, 0.5), kernel_of(49, 32, 1.0)]).float()
    together = newton_inverse(matrices, 60)
    for matrix, inverse in zip(matrices, together, strict=True):
        assert_close(inverse, newton_inverse(matrix, 60), rtol=1e-4, atol=1e-4)


def test_with_a_ridge_the_bare_iteration_is_stable_and_ours_converges():
    matrix = kernel_of(49, 2, 0.5)
    ridged = matrix + 0.01 * torch.eye(49, dtype=F64)
    assert unguarded(ridged.float(), 200).isfinite().all()
    for steps in (40, 60, 200):
        inverse, residual = newton_inverse(matrix.float(), steps, 0.01, return_residual=True)
        assert residual < 5e-4
        assert relative(inverse.to(F64), torch.linalg.inv(ridged)) < 1e-4
    assert relative(newton_inverse(matrix, 40, 0.01), torch.linalg.inv(ridged)) < 1e-10


def test_a_residual_that_only_wavers_does_not_stop_the_steps_that_are_needed():
    # of condition 1e4: the residual is at its rounding by step 26, the inverse right by step 33
    for seed in range(5):
        x = normal(49, 4, seed=seed)
        matrix = gaussian(x, x, 0.5)
        exact = torch.linalg.inv(matrix)
        assert relative(newton_inverse(matrix.float(), 26).to(F64), exact) > 0.1
        assert relative(newton_inverse(matrix.float(), 45).to(F64), exact) < 1e-3


def test_where_it_has_converged_the_backward_pass_is_that_of_the_inverse():
    x = normal(3, 10, 8)
    matrix = gaussian(x, x, 1.0).requires_grad_()
    upstream = normal(3, 10, 10, seed=1)
    identity = torch.eye(10, dtype=F64)
    for ridge in (0.0, 0.01):
        (ours,) = torch.autograd.grad(newton_inverse(matrix, 30, ridge), matrix, upstream)
        exact = torch.linalg.inv(matrix + ridge * identity)
        (expected,) = torch.autograd.grad(exact, matrix, upstream)
        assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_where_steps_are_missing_the_backward_pass_is_off():
    # as newton_inverse says: by 2 % here, and by nothing ten steps later
    x, value, upstream = 0.3 * normal(49, 32), normal(49, 8, seed=3), normal(49, 8, seed=4)
    x.requires_grad_()
    for steps, low, high in ((20, 0.01, 0.03), (30, 0, 1e-9)):
        ridged = gaussian(x, x, 32**-0.5) + 0.01 * torch.eye(49, dtype=F64)
        both = newton_inverse(ridged, steps), unguarded(ridged, steps)
        assert relative(*both) < 1e-12
        got, expected = (
            torch.autograd.grad(y @ value, x, upstream, retain_graph=True)[0] for y in both
        )
        assert low <= relative(got, expected) < high


def test_thirty_steps_invert_any_forty_nine_landmarks_with_the_default_ridge():
    # the worst that there is: all of them the same
    ones = torch.ones(49, 49, dtype=F64)
    exact = torch.linalg.inv(ones + 0.01 * torch.eye(49, dtype=F64))
    assert relative(newton_inverse(ones, 20, 0.01), exact) > 0.5
    assert relative(newton_inverse(ones, 30, 0.01), exact) < 1e-9


def test_its_gradients_and_theirs_are_the_derivatives():
    matrix = kernel_of(5, 6, 1.5)

    def inverse(x):
        return newton_inverse((x + x.T) / 2, 20, 0.01)

    leaf = matrix.requires_grad_()
    assert torch.autograd.gradcheck(inverse, leaf)
    assert torch.autograd.gradgradcheck(inverse, leaf)


def test_of_a_singular_matrix_without_a_ridge_the_backward_pass_is_not_the_derivative():
    # the paper's formula wants an inverse; the pseudo-inverse has terms of its null space
    matrix = normal(8, 6) @ normal(6, 8, seed=1)
    matrix = (matrix @ matrix.T).requires_grad_()
    upstream = normal(8, 8, seed=2)
    exact = torch.linalg.pinv(matrix, hermitian=True)
    ours = newton_inverse(matrix, 40)
    assert relative(ours, exact) < 1e-6
    got, expected = (torch.autograd.grad(x, matrix, upstream)[0] for x in (ours, exact))
    assert relative(got, expected) > 0.1


def test_it_keeps_the_inverse_alone_for_the_backward_pass():
    kept = []

    def keep(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        inverse = newton_inverse(kernel_of(10, 8, 1.0).requires_grad_())
    assert [x.shape for x in kept] == [(10, 10)]
    assert torch.equal(kept[0], inverse)


def test_the_inverse_works_under_torch_func():
    x = normal(3, 6, 8)
    matrices = gaussian(x, x, 1.0)
    assert_close(torch.func.vmap(newton_inverse)(matrices), newton_inverse(matrices), **EXACT)

    def loss(matrix):
        return newton_inverse(matrix).square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(matrices)
    leaf = matrices.requires_grad_()
    assert_close(each, torch.autograd.grad(loss(leaf), leaf)[0], **EXACT)


def test_half_precision_and_autocast_are_inverted_in_float32():
    matrix = kernel_of(16, 8, 1.0)
    for dtype in (torch.bfloat16, torch.float16):
        half = matrix.to(dtype)
        assert torch.equal(newton_inverse(half), newton_inverse(half.float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        under = newton_inverse(matrix.float())
    assert torch.equal(under, newton_inverse(matrix.float()))


# errors


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (torch.ones(3, 4), {}, r"\(\.\.\., m, m\), got torch.float32 of shape \(3, 4\)"),
        (torch.ones(3, 3, dtype=torch.int), {}, "got torch.int32"),
        (torch.eye(3), {"steps": 0}, "at least 1 step, got 0"),
        (torch.eye(3), {"ridge": -1.0}, r"ridge must be 0 or more, and finite, got -1\.0"),
    ],
)
def test_what_has_no_inverse_raises(matrix, options, message):
    with pytest.raises(ValueError, match=message):
        newton_inverse(matrix, **options)
