"""Thresholds of SparseK for all prefixes of a row, as scores come.

A new score can only raise tau (g of `operator.py` has one more term), so that p_j never rises: each
score is one, then a fraction, then nothing, and it never comes back; so it is with the k largest.
Each has one interval of life, and two heaps find it: a score moves at most twice, O(log) each.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import torch
from torch import Tensor

from aftermax import kernels
from aftermax.kernels.selection_ops import through_sums


class Threshold:
    """tau(z_1 .. z_i, k), one score after another (heaps of the ones and of the fractions).

    Args:
        k: the sum of all p, above 0.
        cap: most scores that are kept; None = as many as have p > 0, which may be all of them:
            scores that lie close share k. Beyond it the smallest are dropped, tau is that of the
            others, and `capped` says so.

    What is kept are scores alone: those with p = 1 and those with 0 < p < 1.

    >>> threshold = Threshold(2)
    >>> [threshold.push(score) for score in (3.0, 1.0, 0.75, -2.0)]
    [2.0, 0.0, 0.375, 0.375]
    """

    def __init__(self, k: float, cap: int | None = None):
        if not k > 0:
            raise ValueError(f"k must be above 0, got {k}")
        if cap is not None and cap < k:
            raise ValueError(f"cap must be at least k = {k}, got {cap}")
        self.k, self.cap, self.capped = k, cap, False
        self.tau = 0.0
        self.ones: list[tuple[float, int]] = []
        self.fractions: list[tuple[float, int]] = []
        self.seen = 0
        self.moved: list[tuple[str, int]] = []
        """What the last push did: ("leaves ones" or "leaves support", the score's number)."""

    def push(self, score: float) -> float:
        """Take in the next score and return tau. NaN and -inf are no scores, but have a number."""
        number, self.moved = self.seen, []
        self.seen += 1
        if not score > -math.inf:
            self.moved = [("leaves ones", number), ("leaves support", number)]
            return self.tau
        held = len(self.ones) + len(self.fractions)
        if held >= self.k and score <= self.tau:
            self.moved = [("leaves ones", number), ("leaves support", number)]
            return self.tau
        if held < self.k or score >= self.tau + 1:
            heapq.heappush(self.ones, (score, number))
        else:
            self._into_fractions((score, number))
        self._settle()
        if self.cap is not None and len(self.ones) + len(self.fractions) > self.cap:
            self.capped = self.capped or bool(self.fractions)
            while self.fractions and len(self.ones) + len(self.fractions) > self.cap:
                self._out()
            self._settle()
        return self.tau

    def _into_fractions(self, item: tuple[float, int]) -> None:
        heapq.heappush(self.fractions, item)
        self.moved.append(("leaves ones", item[1]))

    def _out(self) -> None:
        self.moved.append(("leaves support", heapq.heappop(self.fractions)[1]))

    def _settle(self) -> None:
        while len(self.ones) + len(self.fractions) > self.k:
            if not self.fractions:
                if len(self.ones) <= self.k:
                    break
                self._into_fractions(heapq.heappop(self.ones))
            rest = math.fsum(score for score, _ in self.fractions) + len(self.ones) - self.k
            self.tau = rest / len(self.fractions)
            # in this order: one that becomes a fraction lowers tau, and may save the least fraction
            if self.ones and self.tau > self.ones[0][0] - 1:
                self._into_fractions(heapq.heappop(self.ones))
            elif self.tau >= self.fractions[0][0]:
                self._out()
            else:
                return
        if not self.fractions:  # all are 1 or 0: any tau from the next score to the least - 1
            self.tau = self.ones[0][0] - 1 if self.ones else 0.0


class Lives(NamedTuple):
    """What the walk over a row of scores finds; queries are counted from the first offered one."""

    tau: Tensor
    """float64 (rows, queries)"""
    fractions: Tensor
    """int64 (rows, queries): scores with 0 < p < 1."""
    leaves_ones: Tensor
    """int64 (rows, items): the first query for which p < 1; as many as queries: never."""
    leaves_top: Tensor
    """The same for the `top` largest; among equal scores the later one stays."""
    leaves_support: Tensor
    """The same for p > 0."""
    capped: Tensor
    """int64 (rows,): 1 where `cap` was reached."""


def lives(scores: Tensor, k: float, top: int, *, carried: int = 0, cap: int = 0) -> Lives:
    """Walk over float64 (rows, items): `carried` scores that were there before, then one for each
    query. -inf, or NaN, is no score. tau has a gradient.

    On the kernels where they are there, else in Python: the same numbers.

    >>> found = lives(torch.tensor([[3.0, 1.0, 0.75, -2.0]], dtype=torch.float64), 2, top=2)
    >>> found.tau[0].tolist(), found.leaves_ones[0].tolist()
    ([2.0, 0.0, 0.375, 0.375], [4, 2, 2, 3])
    """
    if scores.device.type == "cpu" and kernels.absent() is None:
        walked = torch.ops.aftermax.thresholds(scores.contiguous(), float(k), top, carried, cap)
        return Lives(*walked)
    return Lives(*_Walk.apply(scores, k, top, carried, cap))


class _Walk(torch.autograd.Function):
    """The walk in Python."""

    @staticmethod
    def forward(ctx, scores: Tensor, k: float, top: int, carried: int, cap: int):
        rows, items = scores.shape
        queries = items - carried
        tau = scores.new_zeros(rows, queries)
        many = torch.zeros(rows, queries, dtype=torch.int64, device=scores.device)
        ones, largest, support = (
            torch.full((rows, items), queries, dtype=torch.int64, device=scores.device)
            for _ in range(3)
        )
        capped = many.new_zeros(rows)
        for r, row in enumerate(scores.tolist()):
            threshold, heap = Threshold(k, cap or None), []
            for j, score in enumerate(row):
                now = max(j - carried, 0)
                threshold.push(score)
                for what, which in threshold.moved:
                    (ones if what == "leaves ones" else support)[r, which] = now
                if score > -math.inf:
                    heapq.heappush(heap, (score, -j if j < carried else j, j))
                    if len(heap) > top:
                        largest[r, heapq.heappop(heap)[2]] = now
                else:
                    largest[r, j] = now
                if j >= carried:
                    tau[r, now], many[r, now] = threshold.tau, len(threshold.fractions)
            capped[r] = threshold.capped
        ctx.carried = carried
        ctx.save_for_backward(many, ones, support)
        ctx.mark_non_differentiable(many, ones, largest, support, capped)
        return tau, many, ones, largest, support, capped

    @staticmethod
    def backward(ctx, *grads):
        fractions, ones, support = ctx.saved_tensors
        of_scores = through_sums(grads[0], fractions, ones, support, ctx.carried)
        return of_scores, None, None, None, None


def spans(start: Tensor, stop: Tensor, block: int, blocks: int) -> Tensor:
    """int64 (rows, blocks, width): the items that stand in each block of queries, [start, stop)
    each, int64 (rows, items); -1 fills what is left of the width, the most of any block.

    >>> spans(torch.tensor([[0, 1, 3]]), torch.tensor([[2, 4, 3]]), block=2, blocks=2)
    tensor([[[ 0,  1],
             [ 1, -1]]])
    """
    rows, items = start.shape
    there = stop > start
    first, last = start // block, (stop - 1) // block + 1
    change = start.new_zeros(rows, blocks + 1)
    change.scatter_add_(1, first.masked_fill(~there, 0), there.to(torch.int64))
    change.scatter_add_(1, last.masked_fill(~there, 0), -there.to(torch.int64))
    width = int(change.cumsum(1).max()) if change.numel() else 0
    if start.device.type == "cpu" and kernels.absent() is None:
        return torch.ops.aftermax.spans(start.contiguous(), stop.contiguous(), block, blocks, width)
    many = (last - first).masked_fill(~there, 0).flatten()
    which = torch.arange(rows * items, device=start.device).repeat_interleave(many)
    ordinal = torch.arange(len(which), device=start.device) - (many.cumsum(0) - many)[which]
    place = which // items * blocks + first.flatten()[which] + ordinal
    order = place.argsort(stable=True)
    place, which = place[order], which[order] % items
    column = torch.arange(len(place), device=start.device) - torch.searchsorted(place, place)
    out = start.new_full((rows * blocks, width), -1)
    out[place, column] = which
    return out.view(rows, blocks, width)
