"""SparseK as its paper prints it, one query after another; the projection by halving."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def projection(scores: list[float], k: float) -> list[float]:
    """The nearest point of { 0 <= p <= 1, sum p = k }."""
    if len(scores) <= k:
        return [1.0] * len(scores)

    def p(tau: float) -> list[float]:
        return [min(max(z - tau, 0.0), 1.0) for z in scores]

    low, high = min(scores) - 1, max(scores)
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return p(low)
        low, high = (middle, high) if math.fsum(p(middle)) >= k else (low, middle)


def sparsek(
    k: int, window: int, couple: str = "kv", normalise: bool = True, linear: bool = False
) -> Callable[..., Tensor]:
    """arXiv 2406.16747; what is not in it as `aftermax.sparse.sparsek` says at its head."""

    def scored(key: Tensor, sees: list[int], causal: bool, learned) -> list[Tensor]:
        raw = [learned["score_key"] @ key[j] for j in sees]
        scores = []
        for place, u in enumerate(raw):
            known = torch.stack(raw[: place + 1] if causal else raw)
            if normalise:
                deviation = torch.sqrt(((known - known.mean()) ** 2).mean() + 1e-5)
                u = (u - known.mean()) / deviation
            scores.append(u * learned["score_scale"][0])
        return scores

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor,
        *,
        distance: Tensor,
        bias: Tensor | None = None,
        scale: float | None = None,
        learned: dict[str, Tensor],
    ) -> Tensor:
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        causal = not (visible & (distance < 0)).any()
        batch, heads, queries, _ = query.shape
        group = heads // key.shape[1]
        out = query.new_zeros(batch, heads, queries, value.shape[-1])
        for b in range(batch):
            for h in range(heads):
                keys, values = key[b, h // group], value[b, h // group]
                for i in range(queries):
                    sees = visible[b, h, i].nonzero().flatten().tolist()
                    if not sees:
                        continue
                    scores = scored(keys, sees, causal, learned)
                    by_token = dict(zip(sees, scores, strict=True))
                    far = [j for j in sees if abs(int(distance[i, j])) >= window]
                    kept = sorted(far, key=lambda j: (by_token[j].item(), j))[-k:]
                    p = projection([by_token[j].item() for j in far], k)
                    share = dict(zip(far, p, strict=True))
                    used = [j for j in sees if j in kept or j not in share]
                    total, row = 0.0, torch.zeros_like(out[b, h, i])
                    for j in used:
                        product = scale * (query[b, h, i] @ keys[j])
                        m = share.get(j, 1.0)
                        added = 0 if bias is None else bias[b, h, i, j]
                        weight = torch.exp((m * product if couple == "kv" else product) + added)
                        weight = weight * m if couple == "log" else weight
                        total = total + weight
                        row = row + weight * (values[j] if couple == "log" else m * values[j])
                    out[b, h, i] = row / total
                    if linear:
                        rest = [j for j in sees if j not in used]
                        feature = torch.nn.functional.elu(query[b, h, i]) + 1
                        weights = [feature @ (torch.nn.functional.elu(keys[j]) + 1) for j in rest]
                        if rest:
                            mean = sum(w * values[j] for w, j in zip(weights, rest, strict=True))
                            out[b, h, i] += learned["mix"][h] * mean / sum(weights)
        return out

    return attend
