"""SparseK written out: p of every pair of query and key. The specification, in O(T^2) time.

    near_ij    |i - j| < w
    kept_ij    j is one of the k largest scores that i sees and that are not near (later ones win)
    p_i        sparsek(scores that i sees and that are not near, k)
    share_ij   1 where near, p_ij where kept, else none

and with s_ij = scale q_i . k_j (+ what a mask adds), by `couple`:

    kv    a_i = softmax(share_ij s_ij)     out_i = sum_j a_ij share_ij v_j
    v     a_i = softmax(s_ij)              out_i = sum_j a_ij share_ij v_j
    log   a_i = softmax(s_ij + log share)  out_i = sum_j a_ij v_j
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aftermax.reference import onnx_export
from aftermax.sparse.operator import sparsek

Couple = Literal["kv", "v", "log"]
COUPLES = ("kv", "v", "log")


def shares(scores: Tensor, near: Tensor, far: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """share, and bool where there is one, of (B, H, rows, keys).

    Args:
        scores: (B, H, rows|1, keys).
        near, far: bool, broadcastable to (B, H, rows, keys): what each query sees, nearer than the
            window and beyond it.
    """
    shape = torch.broadcast_shapes(scores.shape, far.shape)
    scores, far = scores.expand(shape), far.expand(shape)
    kept = largest(scores, far, k)
    share = torch.where(near, torch.ones_like(scores), sparsek(scores, k, far))
    return share, near | kept


@torch.no_grad()
def largest(scores: Tensor, there: Tensor, k: int) -> Tensor:
    """bool: the k largest scores of each row that are there; among equals the later ones."""
    keys = scores.shape[-1]
    ranked = scores.masked_fill(~there, -torch.inf).flip(-1)
    if onnx_export():  # whose sort is not stable; of equal scores its TopK takes the first
        first = F.pad(ranked, (0, k), value=-torch.inf).topk(k).indices
        kept = torch.zeros_like(F.pad(there, (0, k))).scatter(-1, first, True)
        return kept[..., :keys].flip(-1) & there
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(keys, device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return (rank.flip(-1) < k) & there


def weigh(
    scores: Tensor,
    value: Tensor,
    share: Tensor,
    there: Tensor,
    couple: Couple,
    dropout_p: float = 0.0,
) -> Tensor:
    """(B, H, rows, keys) scores, without what is not finite, and (B, H, keys, Dv) -> the output;
    a row that has nothing is 0."""
    if couple == "log":
        scores = scores + share.masked_fill(~there, 1).log()
    scores = scores.masked_fill(~there, -torch.inf)
    nothing = ~there.any(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0).softmax(-1)
    if couple != "log":
        weights = weights * share
    weights = weights.masked_fill(~there, 0)  # last, so that no gradient comes of what is hidden
    return F.dropout(weights, dropout_p) @ value if dropout_p > 0 else weights @ value


def normalised(scores: Tensor, there: Tensor, epsilon: float, causal: bool) -> Tensor:
    """Each score of (..., keys) less the mean, over the deviation, of the scores that are there:
    those up to it where the call is causal, else all. Rows that see different keys have statistics
    of their own."""
    wide = scores.double().expand(torch.broadcast_shapes(scores.shape, there.shape))
    wide = wide.masked_fill(~there, 0)  # what is hidden may be as large as it likes
    number = there.double().expand_as(wide)
    sums = [number, number * wide, number * wide.square()]
    if causal:
        count, total, squares = (x.cumsum(-1) for x in sums)
    else:
        count, total, squares = (x.sum(-1, keepdim=True) for x in sums)
    mean = total / count.clamp_min(1)
    variance = (squares / count.clamp_min(1) - mean.square()).clamp_min(0)
    return ((wide - mean) / (variance + epsilon).sqrt()).to(scores.dtype)
