"""How good a ranking of labels is: P@k, PSP@k, nDCG@k, recall@k.

A ranking is `top`, int64 (N, K): label ids of each document, best first, each at most once; -1
where there are no more. What is right is `labels`, a `Ragged` of N rows. A document without labels
counts as 0 in every mean, as in napkinXC. Everything is exact, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aftermax.lab.data.ragged import Ragged


def measures(
    top: Tensor,
    labels: Ragged,
    inverse: Tensor,
    *,
    precision: Sequence[int] = (1, 3, 5),
    ndcg: Sequence[int] = (5,),
    recall: Sequence[int] = (10, 100),
) -> dict[str, float]:
    """All of them by name, in [0, 1]: P@k and PSP@k, nDCG@k, R@k.

    Args:
        top: int64 (N, K) with K at least the largest k, or all the labels there are.
        labels: N rows of ids.
        inverse: (L,), the inverse propensities.

    >>> top = torch.tensor([[0, 2], [1, 0]])
    >>> labels, inverse = Ragged.of([[0, 1], [0]]), torch.tensor([1.0, 3.0, 2.0])
    >>> measures(top, labels, inverse, precision=[1], ndcg=[2], recall=[2])
    {'P@1': 0.5, 'PSP@1': 0.25, 'nDCG@2': 0.62203..., 'R@2': 0.75}
    """
    right = hits(top, labels)
    out = {f"P@{k}": precision_at(right, k) for k in precision}
    out |= {f"PSP@{k}": propensity_scored_at(right, top, labels, inverse, k) for k in precision}
    out |= {f"nDCG@{k}": ndcg_at(right, labels, k) for k in ndcg}
    return out | {f"R@{k}": recall_at(right, labels, k) for k in recall}


def hits(top: Tensor, labels: Ragged) -> Tensor:
    """Which of the ranked labels are right: bool (N, K).

    Raises:
        ValueError: where the rows do not match, or a document has a label twice.

    >>> hits(torch.tensor([[2, 0, -1]]), Ragged.of([[0, 1]]))
    tensor([[False,  True, False]])
    """
    if top.ndim != 2 or top.dtype != torch.int64 or len(top) != labels.size:
        raise ValueError(
            f"top is {tuple(top.shape)} of {top.dtype} for {labels.size} rows of labels; int64"
            f" ({labels.size}, K) would be right"
        )
    in_order = top.sort(1).values
    if ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any():
        raise ValueError("top has a label twice in a row; it would count twice")
    return _among(top, labels.owners, labels.values.long())


def without(top: Tensor, forbidden: Tensor) -> Tensor:
    """The ranking without those pairs: what follows moves up, -1 fills the ends.

    Args:
        forbidden: int64 (M, 2): (document, label). A ranking that is scored at k should come with
            as many labels more as a document has forbidden ones.

    >>> without(torch.tensor([[4, 5, 6]]), torch.tensor([[0, 5]]))
    tensor([[ 4,  6, -1]])
    """
    out = _among(top, forbidden[:, 0], forbidden[:, 1]) | (top < 0)
    order = out.to(torch.uint8).argsort(dim=1, stable=True)
    return top.masked_fill(out, -1).gather(1, order)


def precision_at(right: Tensor, k: int) -> float:
    """mean_i |top_k(i) & right(i)| / k, with `right` from `hits`."""
    return _first(right, k).sum().item() / (max(1, len(right)) * k)


def propensity_scored_at(
    right: Tensor, top: Tensor, labels: Ragged, inverse: Tensor, k: int
) -> float:
    """sum_i sum_{l in top_k(i) & right(i)} 1/p_l over the same sum of the best possible rankings.

    Jain et al. (KDD 2016), section 4; the best possible ranking has the rarest labels of a document
    first. Normalised over the sums, as in the Extreme Classification Repository's tables.
    """
    inverse = inverse.double()
    gained = inverse[top[:, :k].clamp_min(0)].where(_first(right, k), 0.0)
    # the k largest of each row: sorted by value, then stably by row
    values = inverse[labels.values.long()]
    order = values.argsort(descending=True)
    owners = labels.owners[order]
    by_row = owners.argsort(stable=True)
    place = torch.arange(len(values)) - labels.offsets[:-1].repeat_interleave(labels.lengths)
    best = values[order[by_row]][place < k].sum().item()
    return gained.sum().item() / best if best else 0.0


def ndcg_at(right: Tensor, labels: Ragged, k: int) -> float:
    """mean_i  sum_{j <= k} right_ij / log2(j + 1)  over the same sum of a perfect ranking.

    That has ones in its first min(k, |right(i)|) places.
    """
    gains = 1 / torch.arange(2, k + 2, dtype=torch.float64).log2()
    found = _first(right, k).double() @ gains[: right.shape[1]]
    best = torch.cat((gains.new_zeros(1), gains.cumsum(0)))[labels.lengths.clamp_max(k)]
    return (found / best.where(best > 0, 1.0)).sum().item() / max(1, len(right))


def recall_at(right: Tensor, labels: Ragged, k: int) -> float:
    """mean_i |top_k(i) & right(i)| / |right(i)|."""
    found = _first(right, k).sum(1)
    return (found.double() / labels.lengths.clamp_min(1)).sum().item() / max(1, len(right))


def _first(right: Tensor, k: int) -> Tensor:
    if k < 1:
        raise ValueError(f"k is {k}; 1 or more would be right")
    return right[:, :k]


def _among(top: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """Whether (i, top[i, j]) is one of the pairs (rows, ids)."""
    if not len(rows) or not top.numel():
        return torch.zeros_like(top, dtype=torch.bool)
    width = int(torch.maximum(top.max(), ids.max())) + 1
    pairs = (rows * width + ids).sort().values
    asked = torch.arange(len(top))[:, None] * width + top
    places = torch.searchsorted(pairs, asked).clamp_max(len(pairs) - 1)
    return (pairs[places] == asked) & (top >= 0)
