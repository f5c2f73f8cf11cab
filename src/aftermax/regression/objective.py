"""Softmax regression: objectives with their gradients, Hessians and Gauss-Newton matrices.

    Deng, Li & Song 2023, arXiv:2304.10411 (softmax regression, normalised)
    Li, Song, Xia, Yu & Zhou 2023, arXiv:2304.13276 (the same, for in-context learning)
    Gao, Song & Yin 2023, arXiv:2305.00660 (rescaled: exp, cosh, sinh)
    Gao, Song & Xie 2023, arXiv:2307.02419 (the matrix form, by the tensor trick)

Of s = A x, or S = A1 X A2^T, with a regulariser that all of them share::

    Normalised   1/2 ||softmax(s) - b||^2
    Rescaled     1/2 ||u(s) - <u(s), 1> b||^2,             u = exp, cosh or sinh
    MatrixForm   1/2 sum_i (one of the two, of row i of S against row i of B)
    each         + 1/2 ||diag(w) s||^2 + ridge/2 ||x||^2

2304.10411 writes the Hessian of the first as A^T B A where B is a diagonal and three matrices of
rank one. B 1 = 0 (a constant on the logits changes nothing), so with the rows of A less their mean
under f, E = A - 1 (f^T A), nothing is left but a diagonal::

    f = softmax(s),  c = f - b,  k = f * (2 f - b - <c, f>)
    gradient      E^T (f * c)
    Gauss-Newton  E^T diag(f^2) E
    Hessian       E^T diag(k) E

That is what is computed. It costs one weighted Gram matrix, needs no centring of A for its digits,
and says when the Hessian is known to be positive: where 2 f - b >= <c, f> in every row.

An objective is the data; `at(x)` is its `Expansion` there: value, slope and matrices that share one
evaluation. The methods of the same names are short for it.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from aftermax.regression.blocks import Block, Kind, RescaledBlock, SoftmaxBlock, gram

# ---- an expansion ------------------------------------------------------------------------------


class Expansion:
    """An objective at a point x: what is asked for is computed once, of one evaluation of f.

    ======================  ==================  ==================================================
    `value`                 (...)               the loss, regularisers included
    `gradient`              like x              its gradient
    `residual`              like b              c = f - b, or u - <u, 1> b; unregularised
    `hessian`               (..., d, d)         second derivatives; d counts all entries of x
    `gauss_newton`          (..., d, d)         J^T J and the regularisers'; never indefinite
    `jacobian_product`      like b, of v        J v, J = d residual / d x
    `transposed_product`    like x, of r        J^T r
    `hessian_product`       like x, of v        hessian v without the matrix, O(n d)
    `gauss_newton_product`  like x, of v        the same of the Gauss-Newton matrix
    ======================  ==================  ==================================================
    """

    def __init__(self, objective: Objective, x: Tensor):
        self.objective, self.x = objective, x
        self.logits = objective.logits(x)
        self._block = objective._block(self.logits)

    @cached_property
    def residual(self) -> Tensor:
        return self._block.grow(self._block.residual, 1)

    @cached_property
    def value(self) -> Tensor:
        of = self.objective
        value = self._block.value
        value = self._block.grow(value.sum(-1) if len(of.unknowns) == 2 else value, 2)
        if of.weight is not None:
            value = value + of._total((of.weight * self.logits).square()) / 2
        if of.ridge:
            value = value + of._total(self.x.square()) * (of.ridge / 2)
        return value

    @cached_property
    def gradient(self) -> Tensor:
        return self._regularised(self._block.slope, self.logits, self.x)

    @cached_property
    def hessian(self) -> Tensor:
        return self._matrix(self._block.hessian)

    @cached_property
    def gauss_newton(self) -> Tensor:
        return self._matrix(self._block.gauss_newton)

    @property
    def fitted(self) -> Tensor:
        """softmax(A x), or exp, cosh or sinh of A x; like b."""
        return self._block.grow(self._block.fitted, 1)

    def stacked(self) -> tuple[Tensor, Tensor] | None:
        """(R, r) with gauss_newton = R^T R and gradient = R^T r: regularisers are rows of it too.

        What a factor of R keeps a Cholesky factor of R^T R loses. None of the matrix form, where R
        would be the Kronecker product that is not to be formed.
        """
        of = self.objective
        if not isinstance(of, _OfVector):
            return None
        rows, residuals = [self._block.grow(self._block.rows(of.A), 1)], [self.residual]
        if of.weight is not None:
            rows.append(of.weight.unsqueeze(-1) * of.A)
            residuals.append(of.weight * self.logits)
        if of.ridge:
            root = math.sqrt(of.ridge)
            rows.append(root * torch.eye(self.x.shape[-1], dtype=self.x.dtype).to(self.x.device))
            residuals.append(root * self.x)
        batch = self.logits.shape[:-1]
        return (
            torch.cat([row.expand(*batch, *row.shape[-2:]) for row in rows], -2),
            torch.cat([residual.expand(*batch, residual.shape[-1]) for residual in residuals], -1),
        )

    def jacobian_product(self, v: Tensor) -> Tensor:
        return self._block.grow(self._block.jacobian(self.objective.logits(v)), 1)

    def transposed_product(self, r: Tensor) -> Tensor:
        return self._block.grow(self.objective._pull(self._block.transposed(r)), 1)

    def hessian_product(self, v: Tensor) -> Tensor:
        s = self.objective.logits(v)
        return self._regularised(self._block.second(s), s, v)

    def gauss_newton_product(self, v: Tensor) -> Tensor:
        s = self.objective.logits(v)
        return self._regularised(self._block.transposed(self._block.jacobian(s)), s, v)

    def _regularised(self, y: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """A^T y of the block, and what the regularisers add for a v with A v = s."""
        of = self.objective
        total = self._block.grow(of._pull(y), 2)
        if of.weight is not None:
            total = total + of._pull(of.weight.square() * s)
        return total + of.ridge * v if of.ridge else total

    def _matrix(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        matrix = self._block.grow(self.objective._matrix(of), 2)
        if self.objective.weight is not None:
            weight = self.objective.weight.unsqueeze(-1)
            matrix = matrix + self.objective._matrix(lambda a: gram(weight * a))
        if not self.objective.ridge:
            return matrix
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return matrix + self.objective.ridge * eye


# ---- the objectives ----------------------------------------------------------------------------


class Objective(ABC):
    """What the three have in common; `Expansion` tells what each method gives."""

    ridge: float
    weight: Tensor | None

    @property
    @abstractmethod
    def unknowns(self) -> tuple[int, ...]:
        """The shape of x without leading dimensions: (d,), or (d1, d2) of the matrix form."""

    @property
    @abstractmethod
    def batch(self) -> torch.Size:
        """The leading dimensions that the data have."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """A x, or A1 X A2^T."""

    @abstractmethod
    def flat(self) -> Objective:
        """The same with one leading dimension, that of `batch` flattened, in all of its data."""

    @abstractmethod
    def select(self, index: Tensor) -> Objective:
        """Those problems of a `flat` objective."""

    def alone(self) -> Objective:
        """The one problem of a `flat` objective, without its leading dimension."""
        tensors = {name: t[0] for name, t in vars(self).items() if isinstance(t, Tensor)}
        return dataclasses.replace(self, **tensors)  # pyright: ignore[reportArgumentType]

    @abstractmethod
    def _pull(self, y: Tensor) -> Tensor:
        """The transpose of `logits`."""

    @abstractmethod
    def _block(self, s: Tensor) -> Block: ...

    @abstractmethod
    def _matrix(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """`of(A)` for A (..., n, d), a matrix of each block, summed over blocks."""

    def at(self, x: Tensor) -> Expansion:
        """All of the objective at x, whose last dimensions are the unknowns."""
        if tuple(x.shape[-len(self.unknowns) :]) != self.unknowns:
            raise ValueError(f"{self._name} has unknowns {self.unknowns}, got x {tuple(x.shape)}")
        return Expansion(self, x)

    def value(self, x: Tensor) -> Tensor:
        return self.at(x).value

    def gradient(self, x: Tensor) -> Tensor:
        return self.at(x).gradient

    def residual(self, x: Tensor) -> Tensor:
        return self.at(x).residual

    def hessian(self, x: Tensor) -> Tensor:
        return self.at(x).hessian

    def gauss_newton(self, x: Tensor) -> Tensor:
        return self.at(x).gauss_newton

    def jacobian_product(self, x: Tensor, v: Tensor) -> Tensor:
        return self.at(x).jacobian_product(v)

    def transposed_product(self, x: Tensor, r: Tensor) -> Tensor:
        return self.at(x).transposed_product(r)

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        return self.at(x).hessian_product(v)

    def gauss_newton_product(self, x: Tensor, v: Tensor) -> Tensor:
        return self.at(x).gauss_newton_product(v)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _total(self, t: Tensor) -> Tensor:
        return t.flatten(-len(self.unknowns)).sum(-1)


@dataclass(frozen=True, eq=False)
class _OfVector(Objective):
    """x is a vector, s = A x."""

    A: Tensor
    b: Tensor
    weight: Tensor | None = None
    ridge: float = 0.0

    def __post_init__(self) -> None:
        if self.A.ndim < 2 or self.b.ndim < 1 or self.A.shape[-2] != self.b.shape[-1]:
            raise ValueError(
                f"{self._name} takes A (..., n, d) and b (..., n), got A {tuple(self.A.shape)}"
                f" and b {tuple(self.b.shape)}"
            )
        _check(self._name, self.ridge, self.weight, self.b, A=self.A)
        self.batch  # noqa: B018  (leading dimensions that do not fit are an error here)

    @property
    def unknowns(self) -> tuple[int, ...]:
        return (self.A.shape[-1],)

    @property
    def batch(self) -> torch.Size:
        return _batch(self._name, A=(self.A, 2), b=(self.b, 1), weight=(self.weight, 1))

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    def logits(self, x: Tensor) -> Tensor:
        if x.ndim == 1:  # a product of its own in torch, and quicker
            return self.A @ x
        return (self.A @ x.unsqueeze(-1)).squeeze(-1)

    def flat(self) -> Objective:
        batch = self.batch
        a, b, weight = _flat(batch, self.A, 2), _flat(batch, self.b, 1), self.weight
        weight = None if weight is None else _flat(batch, weight, 1)
        return dataclasses.replace(self, A=a, b=b, weight=weight)

    def select(self, index: Tensor) -> Objective:
        weight = None if self.weight is None else self.weight[index]
        return dataclasses.replace(self, A=self.A[index], b=self.b[index], weight=weight)

    def _pull(self, y: Tensor) -> Tensor:
        if y.ndim == 1:
            return y @ self.A
        return (y.unsqueeze(-2) @ self.A).squeeze(-2)

    def _matrix(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        return of(self.A)


@dataclass(frozen=True, eq=False)
class Normalised(_OfVector):
    """1/2 ||softmax(A x) - b||^2 + 1/2 ||diag(weight) A x||^2 + ridge/2 ||x||^2 (2304.10411).

    Args:
        A: (..., n, d), the data; leading dimensions are problems, and broadcast with those of b
            and x.
        b: (..., n), the target. Papers: b >= 0 with ||b||_1 <= 1; here any, as b - (f(x') - f(x))
            of 2304.13276 need not be positive.
        weight: (..., n), the papers' w; None is 0. With it a constant on all logits counts.
        ridge: >= 0, on x itself; not in the papers.

    Raises:
        ValueError: shapes or dtypes that do not fit, with both.

    >>> A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    >>> problem = Normalised(A, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
    >>> x = torch.tensor([2.0, 1.0], dtype=torch.float64).log()
    >>> problem.value(x).item() < 1e-30
    True
    >>> problem.gradient(torch.zeros(2, dtype=torch.float64))
    tensor([-0.0556,  0.0278], dtype=torch.float64)
    """

    def _block(self, s: Tensor) -> Block:
        return SoftmaxBlock(s, self.b)


@dataclass(frozen=True, eq=False)
class Rescaled(_OfVector):
    """1/2 ||u - <u, 1> b||^2 with u = exp, cosh or sinh of A x, and the regularisers (2305.00660).

    With exp the first term is alpha^2 times that of `Normalised`, alpha = <exp(A x), 1>, and goes
    to 0 wherever all logits go to -infinity; with sinh it is 0 at x = 0, whatever b. Neither finds
    a fit by being made small: regularise, or take `Normalised`.

    Overflow: logits beyond log(max)/4 (177 in float64, 22 in float32) are computed with exp(-max)
    taken out and put back last. A value or derivative is `inf` (or `-inf`) only where it is itself
    beyond the dtype, and is never nan at finite logits; the solver takes no step to such a point.

    Args:
        A, b, weight, ridge: as of `Normalised`.
        kind: "exp", "cosh" or "sinh".

    Raises:
        ValueError: as `Normalised`, and for another kind.

    >>> A = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    >>> b = torch.tensor([0.75, 0.25], dtype=torch.float64)
    >>> x = torch.tensor([2.0], dtype=torch.float64)
    >>> alpha = (A @ x).exp().sum()
    >>> torch.allclose(Rescaled(A, b).value(x), alpha**2 * Normalised(A, b).value(x))
    True
    """

    kind: Kind = "exp"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")
        super().__post_init__()

    def _block(self, s: Tensor) -> Block:
        return RescaledBlock(s, self.b, self.kind, own=1)


@dataclass(frozen=True, eq=False)
class MatrixForm(Objective):
    """1/2 ||D(X)^-1 exp(A1 X A2^T) - B||_F^2 and regularisers, D the row sums (2307.02419).

    n softmax regressions that share X, row i with data a1_i (x) A2. The paper's trick is to write
    A = A1 (x) A2, of n m rows and d1 d2 columns; here that is never formed. A product is three
    small ones, O(n m (d1 + d2)); a matrix is n blocks of (d2, d2) that a1_i a1_i^T spreads,
    O(n m d2^2 + n d1^2 d2^2). The half is ours, as in the other objectives; the paper has none.

    Args:
        A1: (..., n, d1).
        A2: (..., m, d2).
        B: (..., n, m), a target for each row.
        weight: (..., n, m), the w of 1/2 ||w * (A1 X A2^T)||^2; None is 0.
        ridge: >= 0, on X.
        kind: None for softmax; "exp", "cosh" or "sinh" for the rescaled form of that.

    x is (..., d1, d2), and so are gradient and products; matrices are (..., d1 d2, d1 d2), of x
    read row by row.

    Raises:
        ValueError: shapes or dtypes that do not fit, another kind.

    >>> A1, A2 = (torch.randn(4, 3, dtype=torch.float64) for _ in range(2))
    >>> X = torch.randn(3, 3, dtype=torch.float64)
    >>> problem = MatrixForm(A1, A2, (A1 @ X @ A2.T).softmax(-1))
    >>> problem.value(X).item() < 1e-30, problem.hessian(X).shape
    (True, torch.Size([9, 9]))
    """

    A1: Tensor
    A2: Tensor
    B: Tensor
    weight: Tensor | None = None
    ridge: float = 0.0
    kind: Kind | None = None

    def __post_init__(self) -> None:
        A1, A2, B = self.A1, self.A2, self.B
        small = min(A1.ndim, A2.ndim, B.ndim) < 2
        if small or (A1.shape[-2], A2.shape[-2]) != tuple(B.shape[-2:]):
            raise ValueError(
                f"{self._name} takes A1 (..., n, d1), A2 (..., m, d2) and B (..., n, m), got"
                f" A1 {tuple(A1.shape)}, A2 {tuple(A2.shape)} and B {tuple(B.shape)}"
            )
        if self.kind is not None and self.kind not in get_args(Kind):
            raise ValueError(f"kind must be None or one of {get_args(Kind)}, got {self.kind!r}")
        _check(self._name, self.ridge, self.weight, B, A1=A1, A2=A2)
        self.batch  # noqa: B018

    @property
    def unknowns(self) -> tuple[int, ...]:
        return (self.A1.shape[-1], self.A2.shape[-1])

    @property
    def batch(self) -> torch.Size:
        of = {"A1": (self.A1, 2), "A2": (self.A2, 2), "B": (self.B, 2), "weight": (self.weight, 2)}
        return _batch(self._name, **of)

    @property
    def dtype(self) -> torch.dtype:
        return self.A1.dtype

    def logits(self, x: Tensor) -> Tensor:
        return self.A1 @ x @ self.A2.mT

    def flat(self) -> Objective:
        batch, weight = self.batch, self.weight
        a1, a2, b = (_flat(batch, t, 2) for t in (self.A1, self.A2, self.B))
        weight = None if weight is None else _flat(batch, weight, 2)
        return dataclasses.replace(self, A1=a1, A2=a2, B=b, weight=weight)

    def select(self, index: Tensor) -> Objective:
        weight = None if self.weight is None else self.weight[index]
        a1, a2, b = (t[index] for t in (self.A1, self.A2, self.B))
        return dataclasses.replace(self, A1=a1, A2=a2, B=b, weight=weight)

    def _pull(self, y: Tensor) -> Tensor:
        return self.A1.mT @ y @ self.A2

    def _block(self, s: Tensor) -> Block:
        if self.kind is None:
            return SoftmaxBlock(s, self.B)
        return RescaledBlock(s, self.B, self.kind, own=2)

    def _matrix(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        blocks = of(self.A2.unsqueeze(-3))  # of every row
        spread = torch.einsum("...np,...nq,...nkl->...pkql", self.A1, self.A1, blocks)
        return spread.flatten(-4, -3).flatten(-2)


def _check(name: str, ridge: float, weight: Tensor | None, target: Tensor, **data: Tensor) -> None:
    every = data | {"target": target} | ({} if weight is None else {"weight": weight})
    kinds = {str(t.dtype) for t in every.values()}
    if len(kinds) > 1 or not target.is_floating_point():
        of = ", ".join(f"{name} {t.dtype}" for name, t in every.items())
        raise ValueError(f"{name} takes tensors of one floating dtype, got {of}")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"{name} needs a finite ridge >= 0, got {ridge}")
    if any(not size for t in data.values() for size in t.shape[-2:]):
        of = ", ".join(f"{name} {tuple(t.shape)}" for name, t in data.items())
        raise ValueError(f"{name} needs at least one row and one column, got {of}")
    own = len(data)  # A: (n,), A1 and A2: (n, m)
    if weight is not None and weight.shape[-own:] != target.shape[-own:]:
        raise ValueError(
            f"{name} takes a weight of the target's shape {tuple(target.shape)} (leading"
            f" dimensions broadcast), got {tuple(weight.shape)}"
        )


def _batch(name: str, **data: tuple[Tensor | None, int]) -> torch.Size:
    """The leading dimensions of all, broadcast."""
    leading = {key: t.shape[: t.ndim - own] for key, (t, own) in data.items() if t is not None}
    try:
        return torch.broadcast_shapes(*leading.values())
    except RuntimeError:
        of = ", ".join(f"{key} {tuple(shape)}" for key, shape in leading.items())
        raise ValueError(f"{name}: leading dimensions do not broadcast: {of}") from None


def _flat(batch: torch.Size, t: Tensor, own: int) -> Tensor:
    """(batch, *own) as one leading dimension, without a copy where nothing is broadcast."""
    shape = t.shape[t.ndim - own :]
    return t.expand(*batch, *shape).reshape(batch.numel(), *shape)


# ---- functions ---------------------------------------------------------------------------------


def softmax_loss(A: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """L(x) = 1/2 ||softmax(A x) - b||^2, (...), of A (..., n, d), b (..., n), x (..., d).

    >>> softmax_loss(torch.eye(2), torch.tensor([0.5, 0.5]), torch.zeros(2))
    tensor(0.)
    """
    return Normalised(A, b).value(x)


def softmax_gradient(A: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The gradient of `softmax_loss` in x: A^T (f * c - <f, c> f), c = f - b; (..., d).

    >>> softmax_gradient(torch.eye(2), torch.tensor([1.0, 0.0]), torch.zeros(2))
    tensor([-0.2500,  0.2500])
    """
    return Normalised(A, b).gradient(x)


def softmax_hessian(A: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The Hessian of `softmax_loss`: A^T B A of 2304.10411, (..., d, d).

    >>> softmax_hessian(torch.eye(2), torch.tensor([0.5, 0.5]), torch.zeros(2))
    tensor([[ 0.1250, -0.1250],
            [-0.1250,  0.1250]])
    """
    return Normalised(A, b).hessian(x)


def softmax_gauss_newton(A: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """A^T J^2 A, J = diag(f) - f f^T: the Hessian of `softmax_loss` where c = 0; (..., d, d).

    >>> softmax_gauss_newton(torch.eye(2), torch.tensor([1.0, 0.0]), torch.zeros(2))
    tensor([[ 0.1250, -0.1250],
            [-0.1250,  0.1250]])
    """
    return Normalised(A, b).gauss_newton(x)
