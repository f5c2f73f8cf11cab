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

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from aftermax.losses import positives as marks
from aftermax.losses.decoupled import RestAndPicked, decoupled_rows

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
