"""Labels over several processes: embeddings gathered, or scores against a shard on each.

Every loss here is a part: over the ranks of the group the parts add up to the loss of one process
with the whole batch, and so do the gradients, exactly. DistributedDataParallel and FSDP divide the
sum of the gradients by the number of ranks, so under them multiply the loss by it:

    (dist.get_world_size() * loss).backward()

Shards and batches may be of different sizes on different ranks; a mean over "the rank's own rows"
would then be wrong by more than a factor, which is why `global_mean` asks the other ranks how many
they have. All functions here are collective: every rank of the group calls them, in the same order,
and a backward pass that one rank leaves out leaves the others waiting.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from aftermax.losses import positives as marks
from aftermax.losses import threshold
from aftermax.losses.decoupled import RestAndPicked, decoupled_rows
from aftermax.losses.softtopk import check_places, hidden_block, inner, portions

if TYPE_CHECKING:  # which torch without distributed lacks
    from torch.distributed import ProcessGroup


def gather_embeddings(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The x of all ranks, one after the other by rank, with a gradient.

    Args:
        x: (n, ...); n may differ from rank to rank, and be 0. The rest of the shape may not.
        group: the processes; None is all.

    Returns:
        (sum of all n, ...). In the backward pass the gradients of all ranks are added up, and each
        rank takes its own part.

    Raises:
        ValueError: where ranks differ in the shape beyond n, or the dtype.
    """
    return _Gather.apply(x, group)


def gather_ids(ids: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """(B, K) int64 ids of all ranks, of as many columns as the widest has, filled up with -1."""
    width = torch.tensor(ids.shape[1], device=ids.device)
    dist.all_reduce(width, dist.ReduceOp.MAX, group)
    return _gathered(F.pad(ids, (0, int(width) - ids.shape[1]), value=-1), group)[0]


def global_mean(
    rows: Tensor, counts: Tensor | None = None, group: ProcessGroup | None = None
) -> Tensor:
    """This rank's part of the mean of a loss over the rows of all ranks.

    Args:
        rows: (b,) losses of this rank's rows (`reduction="none"`).
        counts: (b,) bool, the rows that the mean is over; None is all. For the softmax losses those
            that have a positive.
        group: the processes; None is all.

    Returns:
        sum(rows) / the number of rows that count on all ranks.
    """
    mine = rows.numel() if counts is None else int(counts.sum())
    total = torch.tensor(mine, device=rows.device)
    dist.all_reduce(total, group=group)
    return rows.sum() / max(1, int(total))


def sharded_decoupled_softmax_loss(
    scores: Tensor,
    positives: Tensor,
    *,
    visible: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """`decoupled_softmax_loss` where each rank holds the scores of all rows against its own labels.

    Four numbers for each row go over the wire (the largest, the sum, the number of positives; and
    in the backward pass the gradient of the sum), and no score.

    Args:
        scores: (B, L_r): all rows of the batch, the same on all ranks and in the same order
            (`gather_embeddings` of the queries), against the labels of this rank; L_r may differ.
        positives, visible: those of this rank's columns, as `decoupled_softmax_loss`.
        reduction: "mean" over the rows that have a positive on any rank, "sum" or "none".
        group: the processes; None is all.

    Returns:
        This rank's part, that of its own positives: a scalar, or (B,). The parts of all ranks add
        up to the loss, and the gradient on each rank is that of the whole loss by its own scores.

    Raises:
        As `decoupled_softmax_loss`.

    The authors' code leaves the last label of every shard a negative even where it is positive
    (`cols < local_y_inds[-1]`); there is no last label here.
    """
    name = "sharded_decoupled_softmax_loss"
    marks.checked(name, scores, positives, visible, reduction, None)
    found = marks.by_index(name, scores, positives, visible, None, None)
    own, picked, centre = RestAndPicked.apply(scores, visible, found.index, found.known)
    counts = _summed(found.known.sum(1), group)
    # all ranks' scores are taken less the same number
    top = torch.where(own > -torch.inf, centre.squeeze(1), -torch.inf)
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    moved = (centre.squeeze(1) - top.masked_fill(top == -torch.inf, 0)).detach()
    rest = _LogSumExp.apply(own + moved, group)
    # the share of a positive is that of all ranks
    rows = decoupled_rows(rest, picked + moved[:, None], found)
    rows = rows * (found.known.sum(1).to(rows.dtype) / counts.clamp_min(1))
    if reduction == "mean":
        rows = rows.sum() / (counts > 0).sum().clamp_min(1)
    elif reduction == "sum":
        rows = rows.sum()
    return rows.to(scores.dtype)


def sharded_soft_topk_loss(
    scores: Tensor,
    positives: Tensor,
    *,
    k: float | str = 5,
    alpha: float = 2.0,
    visible: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """`soft_topk_loss` where each rank holds the scores of all rows against its own labels.

    Over the wire go the largest ceil(k) scores of each row and shard, two sums of a row for each
    step of the search, and two more in the backward pass.

    Args:
        scores, positives, visible, reduction, group: as `sharded_decoupled_softmax_loss`.
        k, alpha: as `soft_topk_loss`. No row may have more places than 256: the largest scores of
            all shards have to be brought together.

    Returns:
        As `sharded_decoupled_softmax_loss`.

    Raises:
        As `soft_topk_loss`; ValueError for more than 256 places.
    """
    name = "sharded_soft_topk_loss"
    marks.checked(name, scores, positives, visible, reduction, None)
    check_places(name, k, alpha)
    found = marks.by_index(name, scores, positives, visible, None, None)
    wide = torch.promote_types(scores.dtype, torch.float32)
    counts = _summed(found.known.sum(1), group)
    if k == "positives":
        places = counts.clamp_min(1).to(wide)
    else:
        places = scores.new_full((len(scores),), float(k), dtype=wide)
    if places.numel() and places.max() > threshold.FEW:
        raise ValueError(
            f"{name}: k reaches {places.max().item():g}; up to {threshold.FEW} would be right"
        )
    picked = _PickedOfShards.apply(scores, places, visible, found.index, alpha, group)
    each = torch.where(found.known, F.logsigmoid(torch.where(found.known, picked, 0)), 0)
    rows = -each.sum(1) / counts.clamp_min(1)
    if reduction == "mean":
        rows = rows.sum() / (counts > 0).sum().clamp_min(1)
    elif reduction == "sum":
        rows = rows.sum()
    return rows.to(scores.dtype)


class _Shards(threshold.Here):
    """Numbers of this rank's part of a row become those of the whole row."""

    def __init__(self, group: ProcessGroup | None):
        self.group = group

    def sum(self, x: Tensor) -> Tensor:
        return _summed(x, self.group)

    def max(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX, self.group)
        return x

    def logsumexp(self, x: Tensor) -> Tensor:
        top = self.max(x)
        top = top.masked_fill(top == -torch.inf, 0)
        return self.sum((x - top).exp_()).log_() + top


class _PickedOfShards(torch.autograd.Function):
    """alpha (s_p + t) at this rank's columns of `index` (B, K), with the t of the whole row."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        k: Tensor,
        visible: Tensor | None,
        index: Tensor,
        alpha: float,
        group: ProcessGroup | None,
    ) -> Tensor:
        centre, shift = k.new_empty((2, len(scores), 1))
        ctx.blocks = _blocks(scores, group)
        for rows in ctx.blocks:
            block = hidden_block(scores, rows, visible)
            centre[rows], shift[rows] = _search(block, k[rows, None], alpha, group)
        ctx.save_for_backward(scores, visible, index, centre, shift)
        ctx.alpha, ctx.group = alpha, group
        return inner(scores.gather(1, index).to(k.dtype), centre, shift, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        scores, visible, index, centre, shift = ctx.saved_tensors
        of_scores, over = torch.empty_like(scores), _Shards(ctx.group)
        totals = over.sum(grad.sum(1, keepdim=True))
        for rows in ctx.blocks:
            block = hidden_block(scores, rows, visible)
            z = inner(block, centre[rows], shift[rows], ctx.alpha)
            q, _ = portions(z, shift[rows], over)
            q = torch.where(totals[rows] == 0, 0, q.mul_(-totals[rows]))
            of_scores[rows] = q.scatter_add_(1, index[rows], grad[rows]).mul_(ctx.alpha)
        return of_scores, *(None,) * 5


def _blocks(scores: Tensor, group: ProcessGroup | None) -> list[slice]:
    """The same on every rank, so that they meet in each block."""
    most = torch.tensor(scores.shape[1], device=scores.device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    return marks.blocks_of(len(scores), int(most))


def _search(
    block: Tensor, k: Tensor, alpha: float, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """`threshold.search` for a row in parts; k (R, 1)."""
    over, big = _Shards(group), torch.finfo(block.dtype).max / 4
    count = over.sum(threshold.finite(block))
    full = k >= count
    if bool(full.all()):
        return torch.zeros_like(k), torch.full_like(k, big)
    k = k.masked_fill(full, 0.5)
    most = math.ceil(k.max().item())
    best = block.new_full((len(block), most), -torch.inf)
    columns = torch.zeros(best.shape, dtype=torch.int64, device=block.device)
    values, at = threshold.top_of(block, most)
    best[:, : values.shape[1]], columns[:, : at.shape[1]] = values, at
    everyone = [torch.empty_like(best) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, best, group)
    values, places = torch.cat(everyone, 1).topk(most, 1)
    # what of it is mine leaves the rest
    inside = torch.arange(most, device=block.device) < k.ceil()
    mine = inside & (places // most == dist.get_rank(group))
    taken = columns.gather(1, places % most)
    if block.shape[1]:
        gone = torch.zeros_like(block, dtype=torch.int8)
        gone.scatter_add_(1, taken.masked_fill(~mine, 0), mine.to(torch.int8))
        block.masked_fill_(gone > 0, -torch.inf)
    split = threshold.split_few(block, values, k, alpha, count, over)
    found = threshold.solved(split, k, full, big, threshold.MOST_STEPS, over)
    assert found is not None
    centre, shift = found
    return centre.masked_fill(full, 0), shift.masked_fill(full, big)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        whole, ctx.sizes = _gathered(x, group)
        ctx.group = group
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        mine = dist.get_rank(ctx.group)
        grad = _summed(grad, ctx.group)
        return grad.split(ctx.sizes)[mine], None


class _LogSumExp(torch.autograd.Function):
    """log of the sum over ranks of e^x; -inf, without a gradient, where that is nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        mine = x.exp()
        total = _summed(mine, group)
        ctx.save_for_backward(mine / torch.where(total > 0, total, 1))
        ctx.group = group
        return total.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (share,) = ctx.saved_tensors
        return share * _summed(grad, ctx.group), None


def _summed(x: Tensor, group: ProcessGroup | None) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gathered(x: Tensor, group: ProcessGroup | None) -> tuple[Tensor, list[int]]:
    """The x of all ranks, and how many rows each has. Ranks of fewer rows send filling."""
    about = torch.tensor([*x.shape, -x.element_size()], device=x.device)
    abouts = [torch.empty_like(about) for _ in range(dist.get_world_size(group))]
    dist.all_gather(abouts, about, group)
    sizes = [int(a[0]) for a in abouts]
    if any((a[1:] != about[1:]).any() for a in abouts):
        raise ValueError(
            f"gather_embeddings: shapes {[tuple(a[:-1].tolist()) for a in abouts]} on the ranks;"
            " they may differ in the first dimension alone, and have one dtype"
        )
    filled = x.new_zeros((max(sizes), *x.shape[1:]))
    filled[: len(x)] = x
    parts = [torch.empty_like(filled) for _ in sizes]
    dist.all_gather(parts, filled, group)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)]), sizes
