"""The soft top-k operator, and the loss on it: which k labels would be picked, smoothly.

y_j = sigmoid(alpha (s_j + t)) with the one t for which sum_j y_j = k. arXiv:2310.10636 takes it for
a loss over the k labels at the head of a ranking; the operator is older (it credits T. Ahle).

`threshold.py` finds t. The sigmoids are taken of alpha (s_j - c) + d with c the k-th largest score,
which is exact near the threshold, however large the scores and alpha.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aftermax.losses import positives as marks
from aftermax.losses import threshold
from aftermax.losses.threshold import HERE, Here


def soft_topk(
    scores: Tensor,
    k: float | Tensor,
    *,
    alpha: float = 1.0,
    dim: int = -1,
    visible: Tensor | None = None,
) -> Tensor:
    """y_j = sigmoid(alpha (s_j + t)), with t such that sum_j y_j = k along `dim`

    As alpha grows, y becomes 1 at the k largest scores and 0 elsewhere; labels that tie for the
    last places share them. The gradient is in closed form: with v_j = y_j (1 - y_j),
    dy_j / ds_i = alpha v_j ([i = j] - v_i / sum v), and dy_j / dk = v_j / sum v.

    Args:
        scores: any shape and strides. float64 is exact to about 1e-12; half precision is computed
            in float32 and rounded once.
        k: how many, 0 < k <= n; any real number. Or a tensor that broadcasts to the shape of scores
            without `dim`, one k for each row; it may want a gradient.
        alpha: sharpness, > 0, in units of 1 / scores. Scores that hold a temperature already,
            <f, g> / tau, and alpha are one number together: alpha / tau.
        dim: the dimension to choose along.
        visible: bool that broadcasts to scores, True = may be seen. What is hidden, or -inf, gives
            0 and takes no gradient, and n is how many a row sees besides: where that is k or less,
            all of them are 1.

    Returns:
        The shape and dtype of scores. A row that holds NaN is NaN, and so is one with k or more
        scores of +inf; fewer are 1.

    Raises:
        ValueError: for a k, alpha or `visible` that does not fit.
        IndexError: for a `dim` out of range.

    Differentiable any number of times; within `torch.compile` (fullgraph) once. `torch.func`
    transforms do not reach inside.

    >>> soft_topk(torch.tensor([3.0, 1.0, 1.0, -2.0]), 2)
    tensor([0.8920, 0.5277, 0.5277, 0.0527])
    >>> soft_topk(torch.tensor([3.0, 1.0, 1.0, -2.0]), 2, alpha=20)
    tensor([1.0000e+00, 5.0000e-01, 5.0000e-01, 8.7565e-27])
    """
    return _operator("soft_topk", scores, k, alpha, dim, visible, log=False)


def log_soft_topk(
    scores: Tensor,
    k: float | Tensor,
    *,
    alpha: float = 1.0,
    dim: int = -1,
    visible: Tensor | None = None,
) -> Tensor:
    """log y_j of `soft_topk`, exact where y_j is too small for a float. Arguments as there.

    What is hidden gives -inf, and takes no gradient.

    >>> log_soft_topk(torch.tensor([1000.0, 0.0, 0.0, -1000.0]), 1)
    tensor([    0.0000,  -500.3466,  -500.3466, -1500.3466])
    """
    return _operator("log_soft_topk", scores, k, alpha, dim, visible, log=True)


def soft_topk_loss(
    scores: Tensor,
    positives: Tensor,
    *,
    k: float | str = 5,
    alpha: float = 2.0,
    visible: Tensor | None = None,
    sample: int | None = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """loss_i = -mean_{p in P} log sigmoid(alpha (s_p + t)), sum_j sigmoid(alpha (s_j + t)) = k

    It asks that the positives be among the first k, in no order, and does not care which negatives
    take the places that are left. The scores are read in blocks of rows; the backward pass makes
    one tensor of their size, the gradient.

    Args:
        scores, positives, visible, reduction, generator: as `decoupled_softmax_loss`.
        k: how many places there are, or "positives": as many as the row has positives. 5 is the
            authors' default. Where a row has more than k positives, the loss cannot reach 0.
        alpha: as `soft_topk`. 2 is the authors' default, for scores over their temperature.
        sample: at most so many positives of a row, drawn anew with each call; the others take no
            places. None takes all. The authors draw k (`sample=5`).

    Returns:
        As `decoupled_softmax_loss`. A row without positives, or that sees k labels or fewer, gives
        0 and takes no gradient.

    Raises:
        As `decoupled_softmax_loss`; ValueError for k or alpha. More places than labels are not an
        error here: whoever is seen has one.

    >>> scores = torch.tensor([[4.0, 2.0, 1.0, -1.0]])
    >>> soft_topk_loss(scores, torch.tensor([[0, 3]]), k=2)
    tensor(2.5067)
    """
    name = "soft_topk_loss"
    marks.checked(name, scores, positives, visible, reduction, sample)
    check_places(name, k, alpha)
    wide = torch.promote_types(scores.dtype, torch.float32)

    def places(chosen: Tensor) -> Tensor:
        if k == "positives":
            return chosen.sum(1).clamp_min(1).to(wide)
        return scores.new_full((len(scores),), float(k), dtype=wide)

    if torch.compiler.is_compiling():
        known, seen = marks.as_mask(scores, positives, visible)
        chosen = marks.sampled(known, sample, generator)
        picked = _traced(scores.to(wide), seen & (chosen | ~known), places(chosen), alpha)
    else:
        found = marks.by_index(name, scores, positives, visible, sample, generator)
        chosen = found.chosen
        picked = _Picked.apply(scores, places(chosen), visible, found.index, found.others, alpha)
    each = torch.where(chosen, F.logsigmoid(torch.where(chosen, picked, 0)), 0)
    rows = -(marks.shares(chosen, each.dtype) * each).sum(1)
    return marks.reduced(rows, chosen.any(1), reduction, scores.dtype)


def _operator(
    name: str,
    scores: Tensor,
    k: float | Tensor,
    alpha: float,
    dim: int,
    visible: Tensor | None,
    log: bool,
) -> Tensor:
    shape = tuple(scores.shape)
    if scores.ndim == 0 or not scores.is_floating_point():
        raise ValueError(f"{name}: scores {shape} of {scores.dtype}; (..., n) of floats are right")
    if not -scores.ndim <= dim < scores.ndim:
        raise IndexError(f"{name}: dim={dim} of scores {shape}")
    _check_alpha(name, alpha)
    if visible is not None:
        if visible.dtype != torch.bool or not marks.broadcasts(visible.shape, scores.shape):
            raise ValueError(
                f"{name}: visible {tuple(visible.shape)} of {visible.dtype} for scores {shape};"
                " bool that broadcasts to them would be right (True = may be seen)"
            )
        visible = _rows(visible.expand(shape).movedim(dim, -1))
    moved = scores.movedim(dim, -1)
    labels, outer = moved.shape[-1], moved.shape[:-1]
    _check_k(name, k, labels, outer, tuple(scores.shape))
    wide = torch.promote_types(scores.dtype, torch.float32)
    places = torch.as_tensor(k, dtype=wide, device=scores.device).expand(outer).reshape(-1)
    if torch.compiler.is_compiling():
        seen = torch.ones_like(_rows(moved), dtype=torch.bool) if visible is None else visible
        z = _traced(_rows(moved).to(wide), seen, places, alpha)
        y = (F.logsigmoid(z) if log else z.sigmoid()).to(scores.dtype)
    else:
        y = _SoftTopK.apply(_rows(moved), places, visible, alpha, log)
    return y.reshape(moved.shape).movedim(-1, dim)


def check_places(name: str, k: float | str, alpha: float) -> None:
    if k != "positives" and (isinstance(k, str) or not 0 < k < math.inf):
        raise ValueError(f"{name}: k={k!r}; a number above 0, or 'positives', would be right")
    _check_alpha(name, alpha)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check_alpha(name: str, alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise ValueError(f"{name}: alpha={alpha}; a finite number above 0 would be right")


def _check_k(
    name: str, k: float | Tensor, labels: int, outer: torch.Size, shape: tuple[int, ...]
) -> None:
    given = k
    if isinstance(k, Tensor):
        if not marks.broadcasts(k.shape, outer):
            raise ValueError(
                f"{name}: k {tuple(k.shape)} for scores {shape}; a number, or a tensor that"
                f" broadcasts to {tuple(outer)}, would be right"
            )
        if k.numel() == 0 or torch.compiler.is_compiling():
            return
        low, high = (x.item() for x in k.detach().aminmax())
        given = f"{low:g} to {high:g}"
    else:
        low = high = k
    if not (low > 0 and high <= labels) and math.prod(shape):
        raise ValueError(
            f"{name}: k={given} of {labels} (scores {shape}); 0 < k <= {labels} would be right"
        )


# ---- one graph for torch.compile ----------------------------------------------------------------


@torch.library.custom_op(
    "aftermax::soft_topk_threshold",
    mutates_args=(),
    schema="(Tensor scores, Tensor k, float alpha) -> (Tensor, Tensor)",
)
def _threshold_op(scores: Tensor, k: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    centre, shift = k.new_empty((len(scores), 1)), k.new_empty((len(scores), 1))
    for rows in marks.blocks(scores):
        centre[rows], shift[rows] = threshold.search(scores[rows].clone(), k[rows], alpha)
    return centre, shift


@_threshold_op.register_fake
def _(scores: Tensor, k: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return k.new_empty((len(scores), 1)), k.new_empty((len(scores), 1))


def _traced(x: Tensor, seen: Tensor, k: Tensor, alpha: float) -> Tensor:
    """alpha (s + t), with its first derivatives, as torch.compile can follow it."""
    fixed = torch.where(seen, x, -torch.inf).detach()
    centre, shift = torch.ops.aftermax.soft_topk_threshold(fixed, k.detach(), alpha)
    depth = -(alpha * (fixed - centre) + shift).abs()
    small = depth.sigmoid()
    v = small * (1 - small)
    total = v.sum(1, keepdim=True)
    q = torch.where(_lost(total, shift), depth.softmax(1), v / torch.where(total > 0, total, 1))
    # the threshold's value is known: what is added is 0, and has its gradient
    moved = torch.where(q > 0, q * (x - x.detach()), 0).sum(1, keepdim=True)
    by_k = (k - k.detach())[:, None] / torch.where(total > 0, total, torch.inf)
    z = alpha * (x - centre) + (shift - alpha * moved + by_k)
    return torch.where(seen, z, -torch.inf)


# ---- derivatives -------------------------------------------------------------------------------


def hidden_block(
    scores: Tensor, rows: slice, visible: Tensor | None, *out: Tensor, into: Tensor | None = None
) -> Tensor:
    """A block in float32 at least, -inf where it is hidden; in the memory of `into` if that is."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    if into is None or into.dtype != wide:
        block = scores[rows].to(wide, copy=True)
    else:
        block = into.copy_(scores[rows])
    index = out if out else (torch.empty((len(scores), 0)),) * 2
    marks.hide(block, rows, visible, *index)
    return block


def inner(block: Tensor, centre: Tensor, shift: Tensor, alpha: float) -> Tensor:
    """alpha (s - c) + d over the block."""
    return block.sub_(centre).mul_(alpha).add_(shift)


def _slopes(z: Tensor) -> Tensor:
    """v = y (1 - y), without loss where y is nearly 1."""
    small = z.abs().neg_().sigmoid_()
    return small.mul_(1 - small)


def portions(z: Tensor, shift: Tensor, over: Here = HERE) -> tuple[Tensor, Tensor]:
    """v / sum v, and sum v (R, 1); 0 in rows where all is 1."""
    v = _slopes(z)
    total = over.sum(v.sum(1, keepdim=True))
    q = v.div_(torch.where(total > 0, total, 1))
    lost = _lost(total, shift)
    if bool(lost.any()):  # so far out v is e^-|z|
        depth = z.abs().neg_()
        far = depth.sub_(over.max(threshold.largest(depth))).exp_()
        q = torch.where(lost, far / over.sum(far.sum(1, keepdim=True)), q)
    return q, total


def _lost(total: Tensor, shift: Tensor) -> Tensor:
    """Rows whose v are all too small for floats, but not those where all is 1."""
    info = torch.finfo(total.dtype)
    return (total < info.tiny * 1e6) & (shift < info.max / 4)


class _SoftTopK(torch.autograd.Function):
    """y, or log y, of (R, n)."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, k: Tensor, visible: Tensor | None, alpha: float, log: bool
    ) -> Tensor:
        out = torch.empty_like(scores, memory_format=torch.contiguous_format)
        centre, shift = k.new_empty((2, len(scores), 1))
        for rows in marks.blocks(scores):
            block = hidden_block(scores, rows, visible)
            centre[rows], shift[rows] = threshold.search(block, k[rows], alpha)
            z = hidden_block(scores, rows, visible, into=out[rows])
            y = inner(z, centre[rows], shift[rows], alpha)
            y = F.logsigmoid(y) if log else y.sigmoid_()
            if log or z.dtype != out.dtype:
                out[rows] = y
        ctx.save_for_backward(scores, k, visible, centre, shift)
        ctx.alpha, ctx.log = alpha, log
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        scores, k, visible, centre, shift = ctx.saved_tensors
        if torch.is_grad_enabled():
            of_scores, of_k = _graph(ctx, grad)
            return of_scores, of_k, None, None, None
        out, of_k = torch.empty_like(scores), torch.empty_like(k)
        for rows in marks.blocks(scores):
            z = inner(hidden_block(scores, rows, visible), centre[rows], shift[rows], ctx.alpha)
            q, total = portions(z, shift[rows])
            if ctx.log:
                idle = z == -torch.inf
                own = z.neg_().sigmoid_().mul_(grad[rows]).masked_fill_(idle, 0)
                mean = own.sum(1, keepdim=True)  # over all, times sum v
                of_k[rows] = (mean / total).squeeze(1).masked_fill(total.squeeze(1) == 0, 0)
                out[rows] = own.sub_(q.mul_(mean)).mul_(ctx.alpha)
            else:
                g = grad[rows].to(q.dtype, copy=True)
                mean = (q * g).sum(1, keepdim=True)
                if not bool(mean.isfinite().all()):  # such as that of log y where y is 0
                    g = torch.where(q > 0, g, 0)
                    mean = (q * g).sum(1, keepdim=True)
                of_k[rows] = mean.squeeze(1)
                out[rows] = g.sub_(mean).mul_(q).mul_(total).mul_(ctx.alpha)
        return out, of_k, None, None, None


def _graph(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient, written in terms of log y, which has derivatives itself."""
    scores, k, visible, centre, shift = ctx.saved_tensors
    q, total, rest = _portions_of(scores, k, visible, ctx.alpha, centre, shift)
    if ctx.log:
        hidden = scores == -torch.inf if visible is None else ~visible | (scores == -torch.inf)
        own = torch.where(hidden, 0, rest * grad)
        mean = own.sum(1, keepdim=True)
        of_k = mean / torch.where(total > 0, total, 1)
        return (ctx.alpha * (own - q * mean)).to(scores.dtype), of_k.squeeze(1)
    g = torch.where(q > 0, grad, 0)
    mean = (q * g).sum(1, keepdim=True)
    return (ctx.alpha * total * q * (g - mean)).to(scores.dtype), mean.squeeze(1)


def _portions_of(
    scores: Tensor,
    k: Tensor,
    visible: Tensor | None,
    alpha: float,
    centre: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`portions` and 1 - y, all with derivatives.

    From log y, which still tells how far from 1 a y is that has rounded to it. Rows that are lost
    even so have the value of `portions` and no further derivative.
    """
    log_y = _SoftTopK.apply(scores.to(k.dtype), k, visible, alpha, True)
    rest = -torch.expm1(log_y)
    v = log_y.exp() * rest
    total = v.sum(1, keepdim=True)
    with torch.no_grad():
        everything = slice(0, len(scores))
        z = inner(hidden_block(scores, everything, visible), centre, shift, alpha)
        fixed, whole = portions(z, shift)
    lost = _lost(whole, shift)
    q = torch.where(lost, fixed, v / torch.where(total > 0, total, 1))
    return q, total, rest


class _Picked(torch.autograd.Function):
    """alpha (s_p + t) at the columns of `index` (B, K); those of `out` take no place."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        k: Tensor,
        visible: Tensor | None,
        index: Tensor,
        out: Tensor,
        alpha: float,
    ) -> Tensor:
        centre, shift = k.new_empty((2, len(scores), 1))
        for rows in marks.blocks(scores):
            block = hidden_block(scores, rows, visible, index, out)
            centre[rows], shift[rows] = threshold.search(block, k[rows], alpha)
        ctx.save_for_backward(scores, k, visible, index, out, centre, shift)
        ctx.alpha = alpha
        return inner(scores.gather(1, index).to(k.dtype), centre, shift, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        scores, k, visible, index, out, centre, shift = ctx.saved_tensors
        none = (None,) * 5
        if torch.is_grad_enabled():
            seen = torch.zeros_like(scores, dtype=torch.int8)
            seen = seen.scatter_add(1, index, out.to(torch.int8)) == 0
            seen = seen if visible is None else seen & visible
            q, _, _ = _portions_of(scores, k, seen, ctx.alpha, centre, shift)
            own = torch.zeros_like(q).scatter_add(1, index, grad)
            return (ctx.alpha * (own - q * grad.sum(1, keepdim=True))).to(scores.dtype), *none
        of_scores = torch.empty_like(scores)
        for rows in marks.blocks(scores):
            block = hidden_block(scores, rows, visible, index, out)
            q, _ = portions(inner(block, centre[rows], shift[rows], ctx.alpha), shift[rows])
            total = grad[rows].sum(1, keepdim=True)
            q = torch.where(total == 0, 0, q.mul_(-total))
            of_scores[rows] = q.scatter_add_(1, index[rows], grad[rows]).mul_(ctx.alpha)
        return of_scores, *none
