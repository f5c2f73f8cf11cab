"""Attention that is a step of gradient descent: exactly, or as its temperature goes to 0.

Softmax regression fits x to A (n, d) and b (n,) by steps on L(x) = norm(softmax(Ax) - b)^2 / 2; in
context, x stands still and layers of attention move the data instead. Li, Song, Xia, Yu and Zhou
(arXiv 2304.13276) bound both moves by numbers of one form, which does not say that they are near
each other. These are, by construction (ours):

**Moving A as a step moves x.** (A + dA) x = A (x + dx) for dA = (A dx) x^T / norm(x)^2, and for no
smaller dA. With dx = -lr A^T r, r = J (f - b), the token a_i moves by
-lr sum_j (a_i . a_j) r_j x / norm(x)^2: linear self-attention without a normaliser, whose values
are -lr r_j x / norm(x)^2 (`equivalent_update`, `linear_attention_update`).

**The same by softmax.** As r sums to 0, sum_j softmax_j(beta a_i . a_j) r_j is beta / n times
sum_j (a_i . a_j) r_j, up to O(beta^2). So a head at inverse temperature beta whose values are
multiplied by n / beta is off by O(beta), and half the difference of the heads at beta and -beta by
O(beta^2) (`softmax_attention_update`).

**A prediction.** From x = 0 a step gives the query a' the logit

    lr / n sum_i (b_i - mean b) (a_i - mean a) . a'

(`gradient_step_logits`). One softmax head with query a', keys a_i, values b_i and its output
multiplied by lr / beta gives the same, up to a constant that softmax does not see and O(beta); half
the difference of the heads at beta and -beta is off by O(beta^2) (`softmax_head_logits`). A layer
that trains on such tasks can therefore be as near to the step as it likes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aftermax.attention import attention
from aftermax.regression.blocks import SoftmaxBlock
from aftermax.regression.bounds import _matrix


def equivalent_update(A: Tensor, x: Tensor, step: Tensor) -> Tensor:
    """dA = (A step) x^T / norm(x)^2, with which (A + dA) x = A (x + step): (..., n, d).

    The smallest in every unitarily invariant norm that does so; its norm is
    norm(A step) / norm(x). softmax alone would let the mean of A step be dropped.

    Args:
        A: (..., n, d).
        x: (..., d), not 0.
        step: (..., d), what is added to x.

    >>> A, x = torch.eye(2), torch.tensor([1.0, 0.0])
    >>> equivalent_update(A, x, torch.tensor([0.0, 2.0]))
    tensor([[0., 0.],
            [2., 0.]])
    """
    _check(A, x=x, step=step)
    return _product(A, step)[..., :, None] * _direction(x)[..., None, :]


def linear_attention_update(A: Tensor, b: Tensor, x: Tensor, learning_rate: float) -> Tensor:
    """What linear self-attention adds to the tokens of A where gradient descent would step x.

    a_i moves by -learning_rate sum_j (a_i . a_j) r_j x / norm(x)^2, r = J (f - b): equal to
    `equivalent_update` for the step -learning_rate times the gradient. O(n^2 d) as attention; the
    order (A^T r) first makes it O(n d).

    Args:
        A: (..., n, d).
        b: (..., n), the target.
        x: (..., d), not 0.
        learning_rate: of the step.

    >>> A, x, b = torch.eye(2), torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0])
    >>> linear_attention_update(A, b, x, 1.0)
    tensor([[-0.1150, -0.0575],
            [ 0.1150,  0.0575]])
    """
    _check(A, x=x, b=b)
    moved = A @ (A.mT @ _residual(A, b, x)[..., None])
    return -learning_rate * moved * _direction(x)[..., None, :]


def softmax_attention_update(
    A: Tensor, b: Tensor, x: Tensor, learning_rate: float, beta: float = 1e-3, heads: int = 2
) -> Tensor:
    """The same by softmax self-attention at inverse temperature beta, (..., n, d).

    Args:
        A, b, x, learning_rate: as in `linear_attention_update`.
        beta: what scores a_i . a_j are multiplied by. The relative error is O(beta) with one head,
            O(beta^2) with two, and rounding adds about eps / beta.
        heads: 1, or 2 for the difference of beta and -beta.

    >>> A, x, b = torch.eye(2).double(), torch.tensor([2.0, 1.0]).double(), torch.tensor([0.0, 1.0])
    >>> softmax_attention_update(A, b.double(), x, 1.0)
    tensor([[-0.1150, -0.0575],
            [ 0.1150,  0.0575]], dtype=torch.float64)
    """
    _check(A, x=x, b=b)
    values = A.shape[-2] * _residual(A, b, x)
    moved = _heads(A, A, values, beta, heads)
    return -learning_rate * moved[..., None] * _direction(x)[..., None, :]


def gradient_step_logits(A: Tensor, b: Tensor, queries: Tensor, learning_rate: float) -> Tensor:
    """Logits of `queries` after one step of gradient descent from x = 0, (..., m).

    x = -learning_rate grad L(0), of which softmax(queries @ x) is the prediction.

    Args:
        A: (..., n, d).
        b: (..., n).
        queries: (..., m, d).
        learning_rate: of the step, in units of L; n^2 / 50 is a good first guess for Gaussian data.

    >>> A, b = torch.eye(2), torch.tensor([0.0, 1.0])
    >>> gradient_step_logits(A, b, A, 4.0)
    tensor([-1.,  1.])
    """
    _check_queries(A, b, queries)
    centred = b - b.mean(-1, keepdim=True)
    x = A.mT @ centred[..., None] * (learning_rate / A.shape[-2])
    return (queries @ x)[..., 0]


def softmax_head_logits(
    A: Tensor,
    b: Tensor,
    queries: Tensor,
    learning_rate: float,
    beta: float = 1e-3,
    heads: int = 2,
) -> Tensor:
    """The same by one or two softmax heads over the tokens of A, up to a constant per task.

    Args:
        A, b, queries, learning_rate: as in `gradient_step_logits`.
        beta, heads: as in `softmax_attention_update`.

    With one head the logits carry learning_rate mean(b) / beta, which softmax over the queries does
    not see; with two it cancels.

    >>> A, b = torch.eye(2).double(), torch.tensor([0.0, 1.0]).double()
    >>> softmax_head_logits(A, b, A, 4.0)
    tensor([-1.0000,  1.0000], dtype=torch.float64)
    """
    _check_queries(A, b, queries)
    return learning_rate * _heads(queries, A, b, beta, heads)


def _heads(query: Tensor, key: Tensor, value: Tensor, beta: float, heads: int) -> Tensor:
    """1 / beta times softmax attention with scale beta; with two, the half difference."""
    if heads not in (1, 2):
        raise ValueError(f"the construction has 1 or 2 heads, got {heads}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be above 0, and finite, got {beta}")
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-1])
    q, k, v = (
        t.expand(*lead, *t.shape[-2:]).reshape(-1, 1, *t.shape[-2:])
        for t in (query, key, value[..., None])
    )

    def head(scale: float) -> Tensor:
        return attention(q, k, v, scale=scale).reshape(*lead, query.shape[-2])

    if heads == 1:
        return head(beta) / beta
    return (head(beta) - head(-beta)) / (2 * beta)


def _residual(A: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """J (f - b), the gradient of the loss by Ax."""
    return SoftmaxBlock(_product(A, x), b).slope


def _product(A: Tensor, x: Tensor) -> Tensor:
    return (A @ x[..., None])[..., 0]


def _direction(x: Tensor) -> Tensor:
    """x / norm(x)^2."""
    square = x.square().sum(-1, keepdim=True)
    if not bool((square > 0).all()):
        raise ValueError("x is 0: no update of A moves Ax then")
    return x / square


def _check(A: Tensor, **vectors: Tensor) -> None:
    """That vectors fit the matrix: b has its rows, all else its columns."""
    _matrix(A, "A")
    for name, vector in vectors.items():
        wanted = A.shape[-2 if name == "b" else -1]
        if vector.ndim < 1 or vector.shape[-1] != wanted:
            raise ValueError(
                f"{name} must be (..., {wanted}) for A of shape {tuple(A.shape)}, got "
                f"{tuple(vector.shape)}"
            )
        if vector.dtype != A.dtype:
            raise ValueError(f"A and {name} must have one dtype, got {A.dtype} and {vector.dtype}")


def _check_queries(A: Tensor, b: Tensor, queries: Tensor) -> None:
    _check(A, b=b)
    _matrix(queries, "queries")
    if queries.shape[-1] != A.shape[-1] or queries.dtype != A.dtype:
        raise ValueError(
            f"queries must be (..., m, {A.shape[-1]}) of {A.dtype} for A of shape "
            f"{tuple(A.shape)}, got {queries.dtype} of shape {tuple(queries.shape)}"
        )
