"""The inverse of a symmetric matrix by products alone: the iteration of Newton, Raphson and Schulz.

Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity", arXiv 2110.11945, algorithm 2::

    Y_0 = alpha A,   Y_{k+1} = 2 Y_k - Y_k A Y_k,   alpha = 0.9 * 2 / |A|_1^2

On a singular value sigma of A the iteration has captured the share 1 - (1 - alpha sigma^2)^(2^k) of
1 / sigma after k steps: it squares what is missing, and begins where sigma is large. Twenty steps
resolve sigma / norm_1(A) down to about 2e-3. What is smaller stays where it was, near 0: stopping
early is a regulariser of its own.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from aftermax.blocks import no_autocast

DIVERGED = 16
"""Times the smallest residual so far: what rises above that diverges. A residual that has arrived
at the rounding of its own products wavers by a factor of ten at most; one that diverges doubles
with every step."""


@overload
def newton_inverse(
    matrix: Tensor, steps: int = 20, ridge: float = 0.0, return_residual: Literal[False] = False
) -> Tensor: ...
@overload
def newton_inverse(
    matrix: Tensor, steps: int = 20, ridge: float = 0.0, *, return_residual: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def newton_inverse(
    matrix: Tensor, steps: int = 20, ridge: float = 0.0, return_residual: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """(A + ridge I)^-1 of symmetric positive semi-definite matrices, by `steps` Newton steps.

    Args:
        matrix: (..., m, m), symmetric, m >= 1; half precision is computed in float32. Without a
            ridge the iteration goes to the pseudo-inverse.
        steps: 20 in the paper. In float32 the rounding errors of a nearly singular matrix double
            with every further step, up to NaN within sixty: a matrix whose residual rises stops,
            by itself, and goes back to its smallest.
        ridge: added to the diagonal.
        return_residual: also return the relative residual ‖A Y A - A‖ / ‖A‖ (Frobenius, of the
            matrix iterated on), (...,), without a gradient: how far to trust the inverse. It weighs
            each direction by its size and may be small where the inverse is far off in a direction
            of small sigma.

    The backward pass is that of the inverse, not of the steps: -Y^T G Y^T with Y alone kept, as in
    the paper. That is the derivative where A + ridge I is invertible and the steps have converged.
    For a singular A without a ridge it is not the derivative of the pseudo-inverse, and where
    steps are missing it is not that of what was computed: for 49 Gaussian landmarks of 32 numbers
    with deviation 0.3, twenty steps and a ridge of 0.01, a gradient is off by 2 %.

    There is no forward-mode derivative: torch.compile takes no function that has one of its own.

    Raises:
        ValueError: for what is no stack of square floating-point matrices, steps < 1, ridge < 0.

    >>> newton_inverse(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or not matrix.is_floating_point():
        raise ValueError(
            "newton_inverse needs floating-point matrices (..., m, m), "
            f"got {matrix.dtype} of shape {tuple(matrix.shape)}"
        )
    if matrix.shape[-1] == 0:
        raise ValueError(f"a matrix of no rows has no inverse, got {tuple(matrix.shape)}")
    check_newton(steps, ridge)
    dtype = matrix.dtype
    matrix = matrix.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if ridge:
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        matrix = matrix + ridge * identity
    with no_autocast(matrix.device):
        inverse: Tensor = _NewtonInverse.apply(matrix, steps)  # type: ignore[assignment]
        if not return_residual:
            return inverse.to(dtype)
        with torch.no_grad():
            return inverse.to(dtype), _residual(matrix, matrix @ inverse)


def check_newton(steps: int, ridge: float) -> None:
    if steps < 1:
        raise ValueError(f"Newton's iteration needs at least 1 step, got {steps}")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be 0 or more, and finite, got {ridge}")


class _NewtonInverse(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(matrix: Tensor, steps: int) -> Tensor:  # type: ignore[override]
        norm = matrix.abs().sum(-2, keepdim=True).amax(-1, keepdim=True)
        norm = norm.masked_fill(norm == 0, 1)
        matrix = matrix / norm  # whose inverse is norm A^-1: no square of it overflows
        inverse = 0.9 * 2 * matrix
        product = matrix @ inverse
        best, best_inverse = _residual(matrix, product), inverse
        rounding = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
        sound = torch.ones_like(best, dtype=torch.bool)
        for _ in range(steps):
            inverse_next = 2 * inverse - inverse @ product
            product_next = matrix @ inverse_next
            residual = _residual(matrix, product_next)
            # a comparison with NaN is false: what has overflowed is never taken
            sound = sound & (residual <= DIVERGED * best + rounding)
            inverse = _where(sound, inverse_next, inverse)
            product = _where(sound, product_next, product)
            better = sound & (residual < best)
            best = torch.where(better, residual, best)
            best_inverse = _where(better, inverse_next, best_inverse)
        return _where(sound, inverse, best_inverse) / norm

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return -transposed @ grad @ transposed, None


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(chosen[..., None, None], one, other)


def _residual(matrix: Tensor, product: Tensor) -> Tensor:
    """‖A Y A - A‖ / ‖A‖ from the product A Y, (...,)."""
    norm = torch.linalg.matrix_norm(matrix)
    return torch.linalg.matrix_norm(product @ matrix - matrix) / torch.where(norm > 0, norm, 1)
