"""Which labels of a row are positive, which may be seen: what the losses over many labels share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aftermax.kernels.ops import REDUCTIONS
from aftermax.reference import transformed

BLOCK = 2**20
"""Scores that one block of rows may hold: 4 MiB in float32, which the caches still take."""


class Positives(NamedTuple):
    """Positives by their columns, ragged rows filled up."""

    index: Tensor
    """(B, K) int64, within [0, L) everywhere: 0 where there is no positive."""
    known: Tensor
    """(B, K) bool: a visible positive."""
    chosen: Tensor
    """(B, K) bool: a positive that the loss is about; the known ones, or a sample of them."""

    @property
    def others(self) -> Tensor:
        """Positives that are neither asked for nor negatives."""
        return self.known & ~self.chosen


def label_pool(positive_ids: Tensor, extra_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The labels that a batch has to encode, each once, and where the positives of its rows lie.

    Args:
        positive_ids: (B, K) int64, the labels of each query, -1 as none. All of them enter the
            pool; `in_batch_masks` takes a pool of fewer.
        extra_ids: any shape, more labels for the pool (hard negatives, say); -1 as none.

    Returns:
        labels (M,), sorted and without repetition, and positives (B, K) in index form: columns of
        scores against those labels, -1 as none.

    >>> label_pool(torch.tensor([[7, 3], [7, -1]]), torch.tensor([5]))
    (tensor([3, 5, 7]), tensor([[ 2,  0],
            [ 2, -1]]))
    """
    _check_ids("label_pool", positive_ids)
    given = positive_ids.flatten()
    if extra_ids is not None:
        given = torch.cat((given, extra_ids.flatten()))
    labels = given[given >= 0].unique()
    at = torch.searchsorted(labels, positive_ids.contiguous())
    return labels, at.masked_fill(positive_ids < 0, -1)


def in_batch_masks(label_ids: Tensor, positive_ids: Tensor) -> tuple[Tensor, Tensor]:
    """positives and visible for scores against labels that were encoded already, repeated or not.

    A label that stands in the pool twice is seen once, where it stands first: the other columns are
    no candidates. A label that is true for a query is its positive, whichever query brought it.

    Args:
        label_ids: (M,) int64, the label of each column; -1 for a column that is no label.
        positive_ids: (B, K) int64, the labels of each query, -1 as none.

    Returns:
        positives (B, M) and visible (1, M), bool.

    >>> true = torch.tensor([[7, 3], [3, -1]])
    >>> positives, visible = in_batch_masks(torch.tensor([7, 3, 7]), true)
    >>> positives & visible
    tensor([[ True,  True, False],
            [False,  True, False]])
    """
    _check_ids("in_batch_masks", positive_ids)
    if label_ids.ndim != 1:
        raise ValueError(f"in_batch_masks: label_ids {tuple(label_ids.shape)}; (M,) would be right")
    order = torch.sort(label_ids, stable=True)
    first = torch.ones_like(order.values, dtype=torch.bool)
    first[1:] = order.values[1:] != order.values[:-1]
    visible = torch.empty_like(first).scatter_(0, order.indices, first) & (label_ids >= 0)
    labels, at = label_pool(positive_ids)
    if labels.numel() == 0:
        return visible.new_zeros((len(positive_ids), len(label_ids))), visible[None]
    true = torch.zeros((len(positive_ids), len(labels) + 1), dtype=torch.bool, device=at.device)
    true.scatter_(1, at.masked_fill(at < 0, len(labels)), True)
    true[:, -1] = False
    column = torch.searchsorted(labels, label_ids.contiguous()).clamp_max(len(labels) - 1)
    column = torch.where(labels[column] == label_ids, column, len(labels))
    return true[:, column], visible[None]


def plain() -> bool:
    """Whether the call is traced or transformed, and takes the formula written with whole masks."""
    return torch.compiler.is_compiling() or transformed()


def checked(
    name: str,
    scores: Tensor,
    positives: Tensor,
    visible: Tensor | None,
    reduction: str,
    sample: int | None,
) -> None:
    """Raise where the arguments of a loss do not fit one another."""
    shape = tuple(scores.shape)
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"{name}: scores {shape} of {scores.dtype}; (B, L) of floats are right")
    by_index = positives.dtype == torch.int64
    fits = positives.ndim == 2 and len(positives) == shape[0] if by_index else (
        positives.dtype == torch.bool and positives.shape == scores.shape
    )  # fmt: skip
    if not fits:
        raise ValueError(
            f"{name}: positives {tuple(positives.shape)} of {positives.dtype} for scores {shape};"
            f" a bool mask {shape}, or int64 columns ({shape[0]}, K) with -1 as none, would be"
            " right"
        )
    if visible is not None and (
        visible.dtype != torch.bool or not broadcasts(visible.shape, scores.shape)
    ):
        raise ValueError(
            f"{name}: visible {tuple(visible.shape)} of {visible.dtype} for scores {shape}; bool"
            f" that broadcasts to {shape} would be right (True = may be seen)"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{name}: reduction={reduction!r} is none of {', '.join(map(repr, REDUCTIONS))}"
        )
    if sample is not None and sample < 1:
        raise ValueError(f"{name}: sample={sample}; at least one positive, or None for all")


def broadcasts(given: torch.Size, shape: torch.Size) -> bool:
    if len(given) > len(shape):
        return False
    ends = shape[len(shape) - len(given) :]
    return all(n in (1, m) for n, m in zip(given, ends, strict=True))


def by_index(
    name: str,
    scores: Tensor,
    positives: Tensor,
    visible: Tensor | None,
    sample: int | None,
    generator: torch.Generator | None,
) -> Positives:
    """The positives by columns; a column given twice counts once."""
    if positives.dtype == torch.bool:
        index, known = _columns(positives)
    else:
        index = positives.sort(1).values
        known = index >= 0
        if bool((index >= scores.shape[1]).any()) or bool((index < -1).any()):
            raise IndexError(
                f"{name}: positives reach from {int(index.min())} to {int(index.max())};"
                f" scores {tuple(scores.shape)} have columns 0 to {scores.shape[1] - 1}, and -1 is"
                " none"
            )
        known[:, 1:] &= index[:, 1:] != index[:, :-1]
        if not scores.shape[1]:  # an empty shard has no column to fill up with
            index, known = index[:, :0], known[:, :0]
    if visible is not None and index.numel():
        known = known & visible.expand(scores.shape).gather(1, index.clamp_min(0))
    index = index.masked_fill(~known, 0)
    return Positives(index, known, sampled(known, sample, generator))


def as_mask(scores: Tensor, positives: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """positives and visible as whole (B, L) masks: the first lies within the second."""
    if visible is None:
        visible = torch.ones_like(scores, dtype=torch.bool)
    visible = visible.expand(scores.shape)
    if positives.dtype == torch.int64:
        wide = torch.zeros(
            (scores.shape[0], scores.shape[1] + 1), dtype=torch.bool, device=scores.device
        )
        columns = torch.where(positives < 0, scores.shape[1], positives)
        positives = wide.scatter(1, columns, torch.ones_like(columns, dtype=torch.bool))[:, :-1]
    return positives & visible, visible


def sampled(known: Tensor, sample: int | None, generator: torch.Generator | None) -> Tensor:
    """At most `sample` of the known of each row, drawn alike without replacement; None is all."""
    if sample is None or sample >= known.shape[1]:
        return known
    lots = torch.rand(known.shape, generator=generator, device=known.device)
    drawn = lots.masked_fill(~known, -1).topk(sample, 1).indices
    chosen = torch.zeros_like(known).scatter(1, drawn, torch.ones_like(drawn, dtype=torch.bool))
    return chosen & known


def reduced(rows: Tensor, counts: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """`counts` tells the rows that the mean is taken over; the mean over none is 0."""
    if reduction == "sum":
        rows = rows.sum()
    elif reduction == "mean":
        rows = rows.sum() / counts.sum().clamp_min(1)
    return rows.to(dtype)


def shares(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / |P| at the chosen, 0 elsewhere."""
    return chosen.to(dtype) / chosen.sum(1, keepdim=True).clamp_min(1)


def hide(block: Tensor, rows: slice, visible: Tensor | None, index: Tensor, out: Tensor) -> None:
    """-inf into a block of rows, in place: where `visible` says no, and at `index` where `out`."""
    if visible is not None:
        seen = visible if visible.ndim < 2 or visible.shape[0] == 1 else visible[rows]
        torch.where(seen, block, block.new_tensor(-torch.inf), out=block)
    if index.shape[1]:
        at, out = index[rows], out[rows]
        # fillers put back what stands in column 0, maybe after a positive there was taken out
        block.scatter_(1, at, block.gather(1, at).masked_fill_(out, -torch.inf))
        block[:, 0].masked_fill_((out & (at == 0)).any(1), -torch.inf)


def blocks(scores: Tensor) -> list[slice]:
    """Rows in blocks of at most BLOCK scores, one row at least."""
    return blocks_of(*scores.shape)


def blocks_of(rows: int, labels: int) -> list[slice]:
    step = max(1, BLOCK // max(1, labels))
    return [slice(i, min(rows, i + step)) for i in range(0, rows, step)]


def _columns(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The True columns of each row, in order, filled up with 0; and which of them are real."""
    counts = mask.sum(1)
    most = int(counts.max()) if counts.numel() else 0
    known = torch.arange(most, device=mask.device) < counts[:, None]
    index = torch.zeros(known.shape, dtype=torch.int64, device=mask.device)
    index[known] = mask.nonzero()[:, 1]
    return index, known


def _check_ids(name: str, positive_ids: Tensor) -> None:
    if positive_ids.ndim != 2 or positive_ids.dtype != torch.int64:
        raise ValueError(
            f"{name}: positive_ids {tuple(positive_ids.shape)} of {positive_ids.dtype}; int64"
            " (B, K) with -1 as none would be right"
        )
