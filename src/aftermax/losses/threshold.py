"""The search for the threshold of a soft top-k: t with sum_j sigmoid(alpha (s_j + t)) = k.

Take any set T of labels, m of them, and write the condition as

    A + max(m - k, 0) = B + max(k - m, 0),   A = sum over the rest of sigmoid(z_j),
                                             B = sum over T of sigmoid(-z_j)

with z_j = alpha (s_j + t). Newton's method runs on the difference of the logarithms of both sides,
within a bracket. T is the k largest scores (for large k those beyond a quantile), so that where the
scores lie far apart, A and B are tiny, and still exact, where the sum itself has rounded to k long
ago; there the difference is a straight line, and one step ends it. The authors halve a bracket 32
times, which in float32 leaves t open wherever the sum is flat. z is kept as alpha (s_j - c) + d
with c the k-th largest score: exact near the threshold, however large the scores and alpha.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aftermax import rows as row_maps

FEW = 256
"""Up to this k the largest scores are taken out by torch.topk; beyond, by a quantile."""

CHUNK = 128
"""Scores whose largest stands for them in the search for the largest of a row."""

SAMPLE = 1024
"""Scores of a row that its quantile is guessed from. It changes the number of steps alone."""

GUESSED_STEPS = 12
"""After so many, the k-th largest takes the place of the guess."""

MOST_STEPS = 200


class Split(NamedTuple):
    """A row cut in two; all but the first two are (R, 1)."""

    rest: Tensor
    """(R, n), alpha (s_j - centre), -inf for what is in T or hidden."""
    top: Tensor
    """(R, any), -alpha (s_j - centre) of T, filled up with -inf."""
    centre: Tensor
    taken: Tensor
    """How many are in T."""
    low: Tensor
    high: Tensor
    """The shift lies between them."""


class Here:
    """How numbers of a row's part become those of the row, where the part is all of it."""

    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x

    def logsumexp(self, x: Tensor) -> Tensor:
        return x


HERE = Here()


def search(block: Tensor, k: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """centre c and shift d, (R, 1) each: y_j = sigmoid(alpha (s_j - c) + d) sums to k in each row.

    Args:
        block: (R, n) float32 or float64, -inf where hidden; it may be written over.
        k: (R,), above 0. In rows with no more than k finite scores the shift is the largest float:
            all of them become 1.
    """
    big = torch.finfo(block.dtype).max / 4
    k, count = k[:, None], finite(block)
    full = k >= count
    if bool(full.all()):
        return torch.zeros_like(k), torch.full_like(k, big)
    # beyond the middle, those that are not picked are picked: 1 - sigmoid(z) = sigmoid(-z)
    turned = (2 * k > count) & ~full
    if bool(turned.any()):
        k = torch.where(turned, count - k, k)
        flipped = torch.where(block == -torch.inf, block, -block)
        block = torch.where(turned, flipped, block)
    k = k.masked_fill(full, 0.5)  # an easy row that stops no other
    most = math.ceil(k.max().item())
    if most <= FEW:
        found = solved(_few(block, k, alpha, most), k, full, big, MOST_STEPS)
    else:
        found = solved(_many(block, k, count, alpha, False), k, full, big, GUESSED_STEPS)
        if found is None:
            found = solved(_many(block, k, count, alpha, True), k, full, big, MOST_STEPS)
    assert found is not None
    centre, shift = (torch.where(turned, -x, x) for x in found)
    return centre.masked_fill(full, 0), shift.masked_fill(full, big)


def finite(block: Tensor) -> Tensor:
    """How many are not hidden, (R, 1)."""
    rows, labels = block.shape
    if labels and bool((block.amin(1) > -torch.inf).all()):
        return block.new_full((rows, 1), labels)
    return (block != -torch.inf).sum(1, keepdim=True).to(block.dtype)


def solved(
    split: Split, k: Tensor, full: Tensor, big: float, most_steps: int, over: Here = HERE
) -> tuple[Tensor, Tensor] | None:
    """centre and shift; None where `most_steps` below MOST_STEPS do not end it.

    `over` holds for the rest; T is all here.
    """
    rest, top, centre, taken, low, high = split
    spare, short = (taken - k).clamp_min(0), (k - taken).clamp_min(0)
    of_rest, of_top = (row_maps.logsumexp(x, 1, keepdim=True) for x in (rest, top))
    of_rest = over.logsumexp(of_rest)
    low, high = low.clamp(-big, big), high.clamp(-big, big)
    guess = torch.minimum(k.log() - of_rest, (of_top - of_rest) / 2)
    shift = torch.where(guess.isfinite(), guess, (low + high) / 2).clamp(min=low, max=high)
    best_of_rest, best_of_top = over.max(largest(rest)), largest(top)
    scratch = torch.empty_like(rest), torch.empty_like(top)
    eps = torch.finfo(rest.dtype).eps
    for _ in range(most_steps):
        left, left_slope = _side(
            rest, shift, best_of_rest + shift, of_rest + shift, spare, scratch[0], over
        )
        right, right_slope = _side(
            top, -shift, best_of_top - shift, of_top - shift, short, scratch[1], HERE
        )
        off = left - right
        low, high = torch.where(off < 0, shift, low), torch.where(off > 0, shift, high)
        new = shift - off / (left_slope + right_slope)
        new = torch.where((new >= low) & (new <= high), new, (low + high) / 2)
        step, shift = (new - shift).abs(), torch.where(off == 0, shift, new)
        # the error after a step is about its square
        near = (step <= eps**0.6) | (step <= 4 * eps * shift.abs()) | ~(off.abs() > 0)
        if bool((near | full).all()):
            break
    else:
        if most_steps < MOST_STEPS:
            return None
    return centre, shift


def largest(x: Tensor) -> Tensor:
    return x.amax(1, keepdim=True) if x.shape[1] else x.new_full((len(x), 1), -torch.inf)


def _side(
    x: Tensor,
    shift: Tensor,
    best: Tensor,
    logarithm: Tensor,
    extra: Tensor,
    scratch: Tensor,
    over: Here,
) -> tuple[Tensor, Tensor]:
    """log(sum sigmoid(x + shift) + extra) and its slope.

    Where the `best` of x + shift lies so low that every sigmoid is e^(x + shift) to rounding,
    the `logarithm` of their sum takes its place. Elsewhere what lies lower still adds nothing, and
    is kept from becoming numbers that processors are slow with.
    """
    low = math.log(torch.finfo(x.dtype).eps)
    far = (best <= low) & (extra == 0)
    if bool(far.all()):
        return logarithm, torch.ones_like(logarithm)
    y = torch.add(x, shift, out=scratch).clamp_min_(2.5 * low).sigmoid_()
    total = y.sum(1, keepdim=True)
    total, squares = over.sum(torch.stack((total, y.square_().sum(1, keepdim=True))))
    slope = total - squares
    whole = total + extra
    return torch.where(far, logarithm, whole.log()), (slope / whole).masked_fill_(far, 1)


def _few(block: Tensor, k: Tensor, alpha: float, most: int) -> Split:
    """T is the ceil(k) largest."""
    values, indices = top_of(block, most)
    inside = torch.arange(values.shape[1], device=block.device) < k.ceil()
    block.scatter_(1, indices, values.masked_fill(inside, -torch.inf))
    return split_few(block, values, k, alpha, block.shape[1], HERE)


def split_few(
    rest: Tensor, values: Tensor, k: Tensor, alpha: float, labels: int | Tensor, over: Here
) -> Split:
    """From the largest of a row, in order, and a block that has lost the first ceil(k) of them."""
    taken = k.ceil()
    inside = torch.arange(values.shape[1], device=rest.device) < taken
    centre = values.gather(1, taken.long() - 1)
    top = (values - centre).mul_(-alpha).masked_fill_(~inside, -torch.inf)
    rest.sub_(centre).mul_(alpha)
    second = over.max(largest(rest))
    low = torch.logit(k / labels) + top[:, :1]
    high = torch.maximum((2 * k).log() - second, (2 * k).log())
    high = torch.where(taken > k, torch.logit(k / taken), high)
    return Split(rest, top, centre, taken, low, high)


def top_of(block: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """topk. The largest of a long row lie in the chunks with the largest maxima."""
    rows, labels = block.shape
    chunks = labels // CHUNK
    if chunks < 4 * most:
        return block.topk(min(most, labels), 1)
    whole = chunks * CHUNK
    best = block[:, :whole].unflatten(1, (chunks, CHUNK)).amax(2).topk(most, 1).indices
    at = (best[..., None] * CHUNK + torch.arange(CHUNK, device=block.device)).flatten(1)
    if whole < labels:
        left = torch.arange(whole, labels, device=block.device).expand(rows, -1)
        at = torch.cat((at, left), 1)
    values, within = block.gather(1, at).topk(most, 1)
    return values, at.gather(1, within)


def _many(block: Tensor, k: Tensor, count: Tensor, alpha: float, exact: bool) -> Split:
    """T is what lies above the k-th largest, or above a guess of it."""
    hidden = block == -torch.inf
    step = 1 if exact else max(1, block.shape[1] // SAMPLE)
    some = block[:, ::step].sort(1, descending=True).values
    seen = (some != -torch.inf).sum(1, keepdim=True)
    at = (k.ceil() - 1 if exact else k / count * seen).long()
    at = torch.minimum(at, (seen - 1).clamp_min(0))
    centre = torch.where(seen > 0, some.gather(1, at), block.amax(1, keepdim=True))
    x = (block - centre).mul_(alpha)
    above = x >= 0
    ratio = torch.logit(k / count)
    low = ratio - x.amax(1, keepdim=True)
    high = ratio - x.masked_fill(hidden, torch.inf).amin(1, keepdim=True)
    rest = x.masked_fill(above, -torch.inf)
    top = x.neg_().masked_fill_(~above, -torch.inf)
    taken = above.sum(1, keepdim=True).to(k.dtype)
    return Split(rest, top, centre, taken, low, high)
