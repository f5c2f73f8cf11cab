"""Decoupled softmax, and the coupled softmax and one-vs-all losses that it is compared with.

Dual EXtreme Multi-Label classification (DEXML), arXiv:2310.10636: scores s_j = <f(x), g(y_j)> / tau
of a query x against labels y_j, several of which are positive. In

    coupled     -1/|P| sum_{p in P} log e^(s_p) / sum_j e^(s_j)
    decoupled   -1/|P| sum_{p in P} log e^(s_p) / (e^(s_p) + sum_{n not in P} e^(s_n))

the first makes the positives compete: it pulls each of their probabilities to 1/|P|, and pushes a
positive that is found already down. In the second each positive stands against the negatives alone.

All three losses take the same arguments. They read the scores in blocks of rows and keep no tensor
of their size; the backward pass makes one, the gradient. Where the authors' code departs from the
formulas:

- it hides a score by setting it to -100, which for scores that are not normalised is no small
  number; here a hidden column takes no part, whatever it holds;
- in its label shards `cols < local_y_inds[-1]` leaves the last label of every shard a negative even
  where it is positive; there is no such case here (see `aftermax.losses.sharded`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aftermax import rows as row_maps
from aftermax.losses import positives as marks
from aftermax.losses.positives import Positives
from aftermax.reference import at_least_float32


def decoupled_softmax_loss(
    scores: Tensor,
    positives: Tensor,
    *,
    visible: Tensor | None = None,
    sample: int | None = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """loss_i = mean_{p in P} log(1 + sum_{n in N} e^(s_n - s_p))

    with P the positives of row i and N all other visible labels that are no positives.

    Args:
        scores: (B, L), similarities over the temperature. float64, float32, or half precision,
            which is computed in float32.
        positives: (B, L) bool, or (B, K) int64 columns with -1 as none: for large L, where a mask
            is mostly False. A column given twice counts once.
        visible: bool that broadcasts to (B, L), True = may be seen. A label that a row does not see
            is neither a positive nor a negative of it, whatever its score holds: a label that the
            pool has twice (`in_batch_masks`), or a true one that is not to be learned here.
        sample: at most so many positives of a row, drawn anew with each call; the others are no
            negatives either. None takes all (the formula); 1 is what the authors' configurations
            train with (`loss_sample`), and means the same in the long run: it leaves the expected
            gradient as it is and makes it noisier.
        reduction: "mean" over the rows that have a positive, "sum", or "none".
        generator: for `sample`.

    Returns:
        A scalar, or (B,) with "none", in the dtype of the scores. A row without positives gives 0
        and takes no gradient, and so does a row without negatives.

    Raises:
        ValueError: for shapes or dtypes that do not fit, a `reduction` that there is none of, or a
            `sample` below 1.
        IndexError: for a column that there is not.

    >>> scores = torch.tensor([[6.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    >>> decoupled_softmax_loss(scores, torch.tensor([[0, 1, 2]]))
    tensor(0.9267)
    >>> decoupled_softmax_loss(scores, torch.tensor([[0, 1, 2]]), visible=scores > -1, sample=3)
    tensor(0.9267)
    """
    name = "decoupled_softmax_loss"
    marks.checked(name, scores, positives, visible, reduction, sample)
    if marks.plain():
        rows, counts = _plain_decoupled(scores, positives, visible, sample, generator)
    else:
        found = marks.by_index(name, scores, positives, visible, sample, generator)
        rest, picked, _ = RestAndPicked.apply(scores, visible, found.index, found.known)
        rows, counts = decoupled_rows(rest, picked, found), found.chosen.any(1)
    return marks.reduced(rows, counts, reduction, scores.dtype)


def coupled_softmax_loss(
    scores: Tensor,
    positives: Tensor,
    *,
    visible: Tensor | None = None,
    sample: int | None = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """loss_i = log(sum_j e^(s_j)) - mean_{p in P} s_p, over all visible labels j

    The usual contrastive loss (InfoNCE, arXiv:1807.03748) with several positives: cross-entropy
    against an equal share for each of them. Arguments as `decoupled_softmax_loss`; with `sample`
    the other positives take no part in the sum, and with sample=1 it is the decoupled loss.

    >>> scores = torch.tensor([[6.0, 0.0, 0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    >>> coupled_softmax_loss(scores, torch.tensor([[0, 1, 2]])).backward()
    >>> scores.grad[0, :2]  # the positive that is found already is pushed down
    tensor([ 0.6544, -0.3309])
    """
    name = "coupled_softmax_loss"
    marks.checked(name, scores, positives, visible, reduction, sample)
    if marks.plain():
        known, seen = marks.as_mask(scores, positives, visible)
        chosen = marks.sampled(known, sample, generator)
        x = _centred(at_least_float32(scores), seen)
        rest, has = _logsumexp(x, seen & (chosen | ~known)), chosen.any(1)
        mean = (marks.shares(chosen, x.dtype) * x.masked_fill(~chosen, 0)).sum(1)
        rows = torch.where(has, rest - mean, 0)
    else:
        found = marks.by_index(name, scores, positives, visible, sample, generator)
        rest, picked, _ = RestAndPicked.apply(scores, visible, found.index, found.others)
        has = found.chosen.any(1)
        mean = (marks.shares(found.chosen, picked.dtype) * _safe(picked, found.chosen)).sum(1)
        rows = torch.where(has, rest - mean, 0)
    return marks.reduced(rows, has, reduction, scores.dtype)


def one_vs_all_loss(
    scores: Tensor,
    positives: Tensor,
    *,
    visible: Tensor | None = None,
    sample: int | None = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """loss_i = (sum_j log(1 + e^(s_j)) - sum_{p in P} s_p) / L_i over the L_i labels that i sees

    Binary cross-entropy of each label by itself. Arguments as `decoupled_softmax_loss`; a row
    without positives has a loss here too, and "mean" is over the rows that see a label: without
    `visible` it is `torch.nn.functional.binary_cross_entropy_with_logits`. Scores of a dual encoder
    want a learned scale and bias, the latter begun at the log of the share of positives: with none,
    half of all labels are predicted at first.

    >>> one_vs_all_loss(torch.tensor([[2.0, -1.0]]), torch.tensor([[0]]))
    tensor(0.2201)
    """
    name = "one_vs_all_loss"
    marks.checked(name, scores, positives, visible, reduction, sample)
    if marks.plain():
        known, seen = marks.as_mask(scores, positives, visible)
        chosen = marks.sampled(known, sample, generator)
        seen = seen & (chosen | ~known)
        x = at_least_float32(scores)
        rows = torch.where(seen, _softplus(torch.where(seen, x, 0)), 0).sum(1)
        rows = rows - x.masked_fill(~chosen, 0).sum(1)
        count = seen.sum(1)
    else:
        found = marks.by_index(name, scores, positives, visible, sample, generator)
        total, picked, _ = _SoftplusAndPicked.apply(scores, visible, found.index, found.others)
        rows = total - _safe(picked, found.chosen).sum(1)
        count = scores.shape[1] - found.others.sum(1)
        if visible is not None:
            count = count - (~visible).expand(scores.shape).sum(1)
    rows = torch.where(count > 0, rows / count.clamp_min(1), 0)
    return marks.reduced(rows, count > 0, reduction, scores.dtype)


def decoupled_rows(rest: Tensor, picked: Tensor, found: Positives) -> Tensor:
    """The loss of each row from the logsumexp of its negatives (B,) and its positives (B, K)."""
    counted = found.chosen & (rest != -torch.inf)[:, None]
    margin = torch.where(counted, rest[:, None] - picked, 0)
    return (marks.shares(found.chosen, picked.dtype) * _safe(_softplus(margin), counted)).sum(1)


def _safe(x: Tensor, real: Tensor) -> Tensor:
    return torch.where(real, x, 0)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); torch's softplus is x from 20 on, which float64 tells from it"""
    return -F.logsigmoid(-x)


def _logsumexp(x: Tensor, seen: Tensor) -> Tensor:
    """Of what is seen in each row; -inf, with finite gradients, where that is nothing."""
    x = x.masked_fill(~seen, -torch.inf)
    empty = (x == -torch.inf).all(1)
    return torch.where(empty, -torch.inf, x.masked_fill(empty[:, None], 0).logsumexp(1))


def _centre(x: Tensor) -> Tensor:
    """(R, 1), the largest of each row; 0 where nothing is finite."""
    top = x.amax(1, keepdim=True) if x.shape[1] else x.new_zeros((len(x), 1))
    return torch.where(top.abs() == torch.inf, 0, top)


def _centred(x: Tensor, seen: Tensor) -> Tensor:
    """The losses do not change by what is added to all scores of a row, their rounding does."""
    return x - _centre(x.detach().masked_fill(~seen, -torch.inf))


def _plain_decoupled(
    scores: Tensor,
    positives: Tensor,
    visible: Tensor | None,
    sample: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    known, seen = marks.as_mask(scores, positives, visible)
    chosen = marks.sampled(known, sample, generator)
    x = _centred(at_least_float32(scores), seen & ~known)
    rest = _logsumexp(x, seen & ~known)
    found = Positives(rest, known, chosen)
    return decoupled_rows(rest, x, found), chosen.any(1)


# ---- one read of the scores forward, one read and one write backward ---------------------------


class _Picking(torch.autograd.Function):
    """A sum over all labels of a row that are seen and not `out` (B,), and the scores at `index`
    (B, K): together, since the gradients of both are one tensor.

    Where `centred`, both are of scores less a number of the row, which is the third result (B, 1)
    and counts as a constant: for losses that do not change by it.
    """

    centred: bool

    total: Callable[[Tensor], Tensor]
    """A block (R, L) -> (R,), where -inf counts for nothing."""
    slope: Callable[[Tensor, Tensor], Tensor]
    """A block, which may be written over, and the totals of its rows -> the gradient."""
    graph: Callable[[Tensor, Tensor], Tensor]
    """`total` of x where a mask says so, with derivatives of any order."""

    @classmethod
    def forward(
        cls, ctx: Any, scores: Tensor, visible: Tensor | None, index: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(scores.dtype, torch.float32)
        total = scores.new_empty(len(scores), dtype=wide)
        picked, centre = scores.gather(1, index).to(wide), total.new_zeros((len(total), 1))
        for rows in marks.blocks(scores):
            block = scores[rows].to(wide, copy=True)
            marks.hide(block, rows, visible, index, out)
            if cls.centred:
                centre[rows] = _centre(block)
                block -= centre[rows]
                picked[rows] -= centre[rows]
            total[rows] = cls.total(block)
        ctx.save_for_backward(scores, visible, index, out, total)
        ctx.mark_non_differentiable(centre)
        return total, picked, centre

    @classmethod
    def backward(cls, ctx: Any, of_total: Tensor, of_picked: Tensor, _: Tensor) -> tuple:
        scores, visible, index, out, total = ctx.saved_tensors
        if torch.is_grad_enabled():
            grad = cls._graph(scores, visible, index, out, of_total, of_picked)
        else:
            grad = torch.empty_like(scores)
            for rows in marks.blocks(scores):
                block = scores[rows].to(total.dtype, copy=True)
                marks.hide(block, rows, visible, index, out)
                block = cls.slope(block, total[rows]).mul_(of_total[rows, None])
                idle = of_total[rows] == 0  # whose scores may be anything
                if idle.any():
                    block.masked_fill_(idle[:, None], 0)
                grad[rows] = block.scatter_add_(1, index[rows], of_picked[rows])
        return grad, None, None, None

    @classmethod
    def _graph(
        cls,
        scores: Tensor,
        visible: Tensor | None,
        index: Tensor,
        out: Tensor,
        of_total: Tensor,
        of_picked: Tensor,
    ) -> Tensor | None:
        """The gradient with a graph of its own."""
        taken = torch.zeros_like(scores, dtype=torch.int8).scatter_add(1, index, out.to(torch.int8))
        seen = taken == 0 if visible is None else (taken == 0) & visible
        with torch.enable_grad():
            x = at_least_float32(scores)
            x = _centred(x, seen) if cls.centred else x
            results = cls.graph(x, seen), x.gather(1, index)
            (grad,) = torch.autograd.grad(results, scores, (of_total, of_picked), create_graph=True)
        return grad


class RestAndPicked(_Picking):
    centred = True

    @staticmethod
    def total(block: Tensor) -> Tensor:
        return row_maps.logsumexp(block, 1)

    @staticmethod
    def slope(block: Tensor, total: Tensor) -> Tensor:
        return row_maps.softmax(block, 1, out=block, empty="zero")

    graph = staticmethod(_logsumexp)


class _SoftplusAndPicked(_Picking):
    centred = False

    @staticmethod
    def total(block: Tensor) -> Tensor:
        return _softplus(block).sum(1)

    @staticmethod
    def slope(block: Tensor, total: Tensor) -> Tensor:
        return block.sigmoid_()

    @staticmethod
    def graph(x: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen, _softplus(torch.where(seen, x, 0)), 0).sum(1)
