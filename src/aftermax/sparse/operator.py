"""The SparseK operator: k of m, softly, with exact zeros and exact ones.

    p = argmin { |p - z|^2 : 0 <= p <= 1, sum p = k }  =  min(max(z - tau, 0), 1)

(Lou et al. 2024, arXiv 2406.16747.) g(tau) = sum_j min(max(z_j - tau, 0), 1) falls from m to 0 and
is linear between the places z_j and z_j - 1: one sort finds the two places between which it is k,
and tau follows from what is one (U) and what lies between (F):

    tau = (sum_F z + |U| - k) / |F|,    dp/dz = diag(s) - s s^T / |F|,    dp/dk = s / |F|,  s = 1_F

With k = 1 it is sparsemax. Equal scores share. Where all p are 0 or 1 the gradient is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aftermax.reference import onnx_export

HALVINGS = 30
"""After which an interval of 30 is shorter than an eps of float32."""


def sparsek(scores: Tensor, k: float | Tensor, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """The point of { 0 <= p <= 1, sum p = k } that is nearest to the scores.

    Args:
        scores: floating point, any shape. float16 and bfloat16 are computed in float32.
        k: above 0; a number, or a tensor (a gradient flows into it) that broadcasts to the scores
            with `dim` taken away: one k for each row.
        mask: bool, broadcastable to the scores: False = not one of the row, p = 0.
        dim: along which the scores are a row.

    Returns:
        p like the scores. A row with k or fewer scores is all ones (their sum is then less than
        k: no p could be larger). A NaN, or an infinite score, that the mask shows makes its row
        NaN.

    Raises:
        ValueError: for a k that is not above 0 or does not broadcast, and for integers.

    >>> sparsek(torch.tensor([3.0, 1.0, 0.9, -2.0]), 2)
    tensor([1.0000, 0.5500, 0.4500, 0.0000])
    >>> sparsek(torch.tensor([1.0, 1, 1, 1, 0, 0]), 2)
    tensor([0.5000, 0.5000, 0.5000, 0.5000, 0.0000, 0.0000])
    """
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    if not scores.numel():
        return scores.clone()
    z = scores.movedim(dim, -1)
    dtype = torch.promote_types(z.dtype, torch.float32)
    z = z.to(dtype)
    number = _number(k, z)
    there = torch.ones_like(z, dtype=torch.bool)
    if mask is not None:
        there = mask.expand(scores.shape).movedim(dim, -1)
    flawed = (~z.isfinite() & there).any(-1, keepdim=True)
    z = z.masked_fill(~there | flawed, 0)
    ones, fractions = _sets(z.detach(), number.detach(), there)
    p = torch.where(fractions, z - _threshold(z, number, ones, fractions), ones.to(dtype))
    p = p.clamp(0, 1) if not p.requires_grad else p  # rounding alone can leave [0, 1]
    p = p.masked_fill(flawed, torch.nan).to(scores.dtype)
    return p.movedim(-1, dim)


def _number(k: float | Tensor, z: Tensor) -> Tensor:
    """k as (..., 1) beside the rows."""
    if not isinstance(k, Tensor):
        if not k > 0:
            raise ValueError(f"k must be above 0, got {k}")
        return z.new_full((1,) * z.ndim, k)
    try:
        k.expand(z.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"k of shape {tuple(k.shape)} does not broadcast to the rows {tuple(z.shape[:-1])}"
        ) from None
    if not torch.compiler.is_compiling() and not bool((k > 0).all()):
        raise ValueError(f"k must be above 0, got {k.min().item():g}")
    return k.to(z.dtype)[..., None]


def _threshold(z: Tensor, k: Tensor, ones: Tensor, fractions: Tensor) -> Tensor:
    """tau (..., 1) of these sets; 0 where nothing is a fraction."""
    many = fractions.sum(-1, keepdim=True)
    # near zero, so that float32 keeps its digits
    shift = z.detach().masked_fill(~fractions, -torch.inf).amax(-1, keepdim=True)
    shift = shift.masked_fill(many == 0, 0)
    of_fractions = (z - shift).masked_fill(~fractions, 0).sum(-1, keepdim=True)
    tau = (of_fractions + ones.sum(-1, keepdim=True) - k) / many.clamp_min(1)
    return torch.where(many > 0, tau, torch.zeros_like(tau)) + shift


@torch.no_grad()
def _sets(z: Tensor, k: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """bool like z: which p are 1, and which lie between 0 and 1."""
    if onnx_export():
        return _sets_by_halving(z, k, there)
    z = z.double().masked_fill(~there, -torch.inf)
    many = there.sum(-1, keepdim=True)
    m = z.shape[-1]
    rising = z.sort(-1).values
    # the places where g bends, and g there: beside each place the scores above it, and above it + 1
    places = torch.cat([rising, rising - 1], -1).sort(-1).values
    sums = torch.nn.functional.pad(rising.masked_fill(rising == -torch.inf, 0).cumsum(-1), (1, 0))
    positive = torch.searchsorted(rising, places, right=True)
    whole = torch.searchsorted(rising - 1, places)
    between = sums.gather(-1, whole) - sums.gather(-1, positive)
    g = (m - whole) + between - (whole - positive) * places.masked_fill(places == -torch.inf, 0)
    g = g.masked_fill(places == -torch.inf, torch.inf)
    # g falls along the places: tau lies between the last one with g >= k and the next
    low = (g >= k.double()).sum(-1, keepdim=True) - 1
    high = places.gather(-1, (low + 1).clamp(0, 2 * m - 1))
    low = places.gather(-1, low.clamp_min(0))
    ones = there & (z - 1 >= high)  # as the places were rounded
    fractions = there & (z > low) & ~ones
    all_ones = many <= k
    return ones | (there & all_ones), fractions & ~all_ones


def _sets_by_halving(z: Tensor, k: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The same for ONNX, which cannot search what is sorted: to rounding, which tau forgets."""
    low = z.masked_fill(~there, torch.inf).amin(-1, keepdim=True) - 1
    high = z.masked_fill(~there, -torch.inf).amax(-1, keepdim=True)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = (z - middle).clamp(0, 1).masked_fill(~there, 0).sum(-1, keepdim=True) >= k
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    ones, fractions = there & (z - low >= 1), there & (z > low)
    all_ones = there.sum(-1, keepdim=True) <= k
    return ones | (there & all_ones), fractions & ~ones & ~all_ones
