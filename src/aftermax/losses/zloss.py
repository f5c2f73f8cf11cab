"""The spherical losses: of a row of logits they need its mean, its variance and the target's logit.

    Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091 (the family, its exact O(d^2) step)
    de Brébisson & Vincent 2016, arXiv:1511.05042 (log-Taylor softmax, log-spherical softmax)
    de Brébisson & Vincent 2016, arXiv:1604.08859 (the Z-loss)

Their papers speak of s = sum_k o_k and q = sum_k o_k^2. We speak of mean = s/C and variance = q/C -
mean^2, which say the same and do not cancel: with logits around 100 whose standard deviation is 1,
q/C - mean^2 keeps no digit in float32.

Here they are losses on dense logits, for any model. `aftermax.FactoredLinear` takes the same value
objects (`ZScoreLoss(a=0.1, b=10)`) and needs no logits for them.

"z-loss" has two meanings. Here it is the loss of the target's z-score (1604.08859). Trainers call
so a regulariser that is added to softmax's cross-entropy, the square of logsumexp (PaLM,
arXiv:2204.02311, section 5), with which it shares nothing but the letter: `cross_entropy(...,
lse_square_scale=1e-4)` is that one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from aftermax.kernels.ops import REDUCTIONS
from aftermax.reference import at_least_float32


class SphericalLoss(Protocol):
    """A loss of mean, variance and the target's logit: what `FactoredLinear` can learn with."""

    def from_moments(self, mean: Tensor, variance: Tensor, chosen: Tensor, classes: int) -> Tensor:
        """The loss of each chosen class.

        Args:
            mean: (..., 1), the mean of each row of logits over all classes.
            variance: (..., 1), the mean of (o_k - mean)^2, divided by C, not C - 1.
            chosen: (..., K), the logits of the classes that are right.
            classes: C.

        Returns:
            The shape of `chosen`.
        """
        ...


@dataclass(frozen=True)
class ZScoreLoss:
    """(1/a) log(1 + exp(a (b - z))), z = (o_c - mean) / sqrt(variance): 1604.08859's Z-loss.

    Args:
        a: the paper's a > 0, the sharpness of the bend: the loss is (b - z)^+ for a to infinity and
            log(2)/a + (b - z)/2 for a to 0.
        b: the paper's b, where the bend lies: z-scores above b are worth little more.

    The two say which top-k error is made small: the paper tunes them for k. Our defaults, 0.1 and
    10, are the best compromise over k = 1 to 100 of our own trials on next-word prediction; a = 1
    with b = 0, the authors' example code, does badly there. Others to try: a of 0.03 to 1 with b of
    5 to 30, a small a for a small k. The paper's own choice we could not look up.

    A row whose logits are all the same has no z-score: it counts as z = 0 and has no gradient
    (the authors add 1e-12 to the standard deviation, which gives it one of 1e12). Weights of zero
    are therefore no place to begin from.

    >>> ZScoreLoss().from_moments(*torch.tensor([0.0, 1.0, 10.0]), classes=100)
    tensor(6.9315)
    """

    a: float = 0.1
    b: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.a < math.inf:
            raise ValueError(f"ZScoreLoss needs a finite a > 0, got a={self.a}")
        if not math.isfinite(self.b):
            raise ValueError(f"ZScoreLoss needs a finite b, got b={self.b}")

    def from_moments(self, mean: Tensor, variance: Tensor, chosen: Tensor, classes: int) -> Tensor:
        z = (chosen - mean) * torch.where(variance > 0, variance, math.inf).rsqrt()
        # softplus of torch is linear from 20 on, off by 2e-9
        return F.logsigmoid(self.a * (z - self.b)) / -self.a


@dataclass(frozen=True)
class LogTaylorLoss:
    """-log(t(o_c) / sum_k t(o_k)), t(o) = 1 + o + o^2/2: 1511.05042's log-Taylor softmax.

    e^o to second order, which is at least 1/2. Nothing to tune.

    >>> LogTaylorLoss().from_moments(*torch.tensor([0.0, 0.0, 0.0]), classes=100)  # log(100)
    tensor(4.6052)
    """

    def from_moments(self, mean: Tensor, variance: Tensor, chosen: Tensor, classes: int) -> Tensor:
        right = 1 + chosen + chosen.square() / 2
        every = 1 + mean + (variance + mean.square()) / 2
        return every.log() - right.log() + math.log(classes)


@dataclass(frozen=True)
class LogSphericalLoss:
    """-log((o_c^2 + eps) / sum_k (o_k^2 + eps)): 1511.05042's log-spherical softmax.

    Even in o: a class may be right by a logit that is large and negative.

    Args:
        eps: > 0, keeps the logarithm finite. The paper tunes it; 0.1 is our place to begin.

    >>> LogSphericalLoss().from_moments(*torch.tensor([0.0, 0.0, 0.0]), classes=100)  # log(100)
    tensor(4.6052)
    """

    eps: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.eps < math.inf:
            raise ValueError(f"LogSphericalLoss needs a finite eps > 0, got eps={self.eps}")

    def from_moments(self, mean: Tensor, variance: Tensor, chosen: Tensor, classes: int) -> Tensor:
        right = chosen.square() + self.eps
        every = variance + mean.square() + self.eps
        return every.log() - right.log() + math.log(classes)


@dataclass(frozen=True)
class SquaredErrorLoss:
    """sum_k (o_k - [k = c])^2: the squared error against the one-hot vector, summed over classes.

    >>> SquaredErrorLoss().from_moments(*torch.tensor([0.0, 0.0, 0.0]), classes=100)
    tensor(1.)
    """

    def from_moments(self, mean: Tensor, variance: Tensor, chosen: Tensor, classes: int) -> Tensor:
        return classes * (variance + mean.square()) - 2 * chosen + 1


def z_score_loss(
    input: Tensor,
    target: Tensor,
    *,
    a: float = 0.1,
    b: float = 10.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """loss_i = (1/a) log(1 + exp(a (b - z_i))), z_i = (o_ic - mean_i) / std_i: the Z-loss.

    mean and std are those of row i over its classes, c is its target (arXiv:1604.08859). The loss
    does not change when a number is added to the logits or they are multiplied by one; their
    gradient sums to zero and is orthogonal to them. It gives a ranking, not probabilities. (Within
    the range of floats: a variance that overflows, from logits of 1e19 on in float32, or
    underflows, counts as that of equal logits.)

    This is not the "z-loss" of trainers, lambda logsumexp(o)^2 beside a cross-entropy: that is
    `aftermax.cross_entropy(..., lse_square_scale=lambda)`.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), as `torch.nn.functional.cross_entropy`.
        target: classes, int64 of shape (), (N,) or (N, d1, ...). Or several for each row: K in
            the place of C, (K,), (N, K) or (N, K, d1, ...), where a negative number is no class;
            the row's loss is then the mean over its classes.
        a, b: sharpness and place of the bend, see `ZScoreLoss`.
        ignore_index: a target that is no class. Rows that have none count for nothing.
        reduction: "mean" (over the rows that count), "sum" or "none".

    Returns:
        A scalar, or the shape of the rows with "none", in the dtype of `input`; half precision is
        computed in float32. The mean over nothing is NaN, as in torch.

    Raises:
        ValueError: for shapes, a dtype, `a`, `b` or a `reduction` that do not fit.
        IndexError: for a target that is no class.

    >>> logits = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    >>> z_score_loss(logits, torch.tensor([0]), a=1.0, b=0.0)  # z = sqrt(3)
    tensor(0.1629)
    >>> z_score_loss(logits, torch.tensor([[0, 1, -1]]), a=1.0, b=0.0)  # two of four are right
    tensor(0.5929)
    """
    return _dense("z_score_loss", ZScoreLoss(a, b), input, target, ignore_index, reduction)


def log_taylor_softmax_loss(
    input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """loss_i = -log(t(o_ic) / sum_k t(o_ik)), t(o) = 1 + o + o^2/2 (arXiv:1511.05042).

    Arguments, result and errors as `z_score_loss`.

    >>> log_taylor_softmax_loss(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))  # -log 5/7
    tensor(0.3365)
    """
    return _dense(
        "log_taylor_softmax_loss", LogTaylorLoss(), input, target, ignore_index, reduction
    )


def log_spherical_softmax_loss(
    input: Tensor,
    target: Tensor,
    *,
    eps: float = 0.1,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """loss_i = -log((o_ic^2 + eps) / sum_k (o_ik^2 + eps)) (arXiv:1511.05042).

    `eps` as in `LogSphericalLoss`; the other arguments, result and errors as `z_score_loss`.

    >>> log_spherical_softmax_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), eps=1.0)
    tensor(0.1823)
    """
    loss = LogSphericalLoss(eps)
    return _dense("log_spherical_softmax_loss", loss, input, target, ignore_index, reduction)


def squared_error_loss(
    input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """loss_i = sum_k (o_ik - [k = c])^2, without the one-hot vector.

    The sum over classes, of which `torch.nn.functional.mse_loss` takes the mean. With several
    classes in a row it is the mean over them, as in all losses here, and not the error against
    one vector of several ones. Arguments, result and errors as `z_score_loss`.

    >>> squared_error_loss(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0]))
    tensor(2.)
    """
    return _dense("squared_error_loss", SquaredErrorLoss(), input, target, ignore_index, reduction)


def _dense(
    name: str,
    loss: SphericalLoss,
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    check_reduction(name, reduction)
    dim = _class_dim(name, input, target)
    logits = at_least_float32(input).movedim(dim, -1)
    several = target.ndim == input.ndim
    target = target.movedim(dim, -1) if several else target[..., None]
    labelled = find_labels(name, target, logits.shape[-1], ignore_index, several=several)
    logits = logits.where(labelled.any(-1, keepdim=True), 0)  # a row that does not count may be NaN
    chosen = logits.gather(-1, target.where(labelled, 0))
    variance, mean = torch.var_mean(logits, -1, correction=0, keepdim=True)
    each = loss.from_moments(mean, variance, chosen, logits.shape[-1])
    return reduced(each, labelled, reduction).to(input.dtype)


def _class_dim(name: str, input: Tensor, target: Tensor) -> int:
    shape, given = tuple(input.shape), tuple(target.shape)
    if not input.is_floating_point():
        raise ValueError(f"{name}: input holds {input.dtype}; logits are floating point numbers")
    if input.ndim == 0:
        raise ValueError(f"{name}: input is a scalar; logits are (C,), (N, C) or (N, C, ...)")
    dim = 0 if input.ndim == 1 else 1
    if shape[dim] == 0:
        raise ValueError(f"{name}: input {shape} has no class")
    rows = shape[:dim] + shape[dim + 1 :]
    same_rows = len(given) == len(shape) and given[:dim] + given[dim + 1 :] == rows
    if given != rows and not same_rows:
        several = (*map(str, shape[:dim]), "K", *map(str, shape[dim + 1 :]))
        raise ValueError(
            f"{name}: target {given} for input {shape}; {rows} would be right, or"
            f" ({', '.join(several)}{',' * (len(several) == 1)}) for K classes in each row"
        )
    return dim


def check_reduction(name: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{name}: reduction={reduction!r} is none of {', '.join(map(repr, REDUCTIONS))}"
        )


def find_labels(
    name: str, target: Tensor, classes: int, ignore_index: int, *, several: bool
) -> Tensor:
    """Where `target` names a class; raises where it names one that there is not.

    With `several` classes to a row every negative number is none, otherwise `ignore_index` alone.
    """
    if target.dtype != torch.int64:
        raise ValueError(f"{name}: target holds {target.dtype}; classes come as int64")
    none = target == ignore_index
    if several:
        none = none | (target < 0)
    if not torch.compiler.is_compiling():
        wrong = ((target < 0) | (target >= classes)) & ~none
        if wrong.any():
            raise IndexError(
                f"{name}: target {target[wrong][0].item()} is out of bounds for {classes} classes"
            )
    return ~none


def reduced(each: Tensor, labelled: Tensor, reduction: str) -> Tensor:
    """The mean over the labels of each row, (..., K) -> (...), then over the rows that have any."""
    count = labelled.sum(-1)
    rows = each.where(labelled, 0).sum(-1) / count.clamp_min(1)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / (count > 0).sum()
