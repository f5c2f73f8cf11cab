"""Attention over the keys that are selected, chunk by chunk of queries, in O(T (k + w)).

A key is seen whole from its own query on, for as long as it is near or one of the ones; then as a
fraction p_ij = u_j - tau_i, for as long as it is among the k largest; then no more. A chunk of
queries so meets few keys, which are gathered, and each stands there once for either. What the
coupling does to a fraction is done by vectors of twice the width, so that any way of attention to
walk the chunk will do, the kernels among them:

    key    whole (k, 0)    fraction (u k, k)    query (q, -tau q)    the score: q.k, (u - tau) q.k
    value  whole (v, 0)    fraction (u v, v)    out = first half - tau second half
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aftermax.attention import attention
from aftermax.sparse.pairs import Couple, weigh
from aftermax.sparse.stream import spans

CHUNK = 128
"""Queries of a chunk; any number gives the same result."""

GATHERED = 2**22
"""Numbers of keys and values that may be gathered at a time: 16 MiB in float32."""

FEW = 16
"""Queries for which no chunks are made."""


@dataclass(frozen=True)
class Items:
    """The keys that the queries of a call may meet, and when; R = batch x key heads."""

    key: Tensor  # (R, N, D)
    value: Tensor  # (R, N, Dv)
    score: Tensor  # (R, N)
    tau: Tensor  # (R, T), of the queries
    start: Tensor  # int64 (R, N): the first query that sees it
    fades: Tensor  # int64 (R, N): the first that sees a fraction
    stop: Tensor  # int64 (R, N): the first that no longer sees it


def selected(query: Tensor, items: Items, couple: Couple, scale: float, impl: str | None) -> Tensor:
    """(R, G, T, D) queries of R key heads -> (R, G, T, Dv)."""
    if query.shape[2] <= FEW and impl != "cpu":
        return _at_once(query, items, couple, scale)
    return _in_chunks(query, items, couple, scale, impl)


def _at_once(query: Tensor, items: Items, couple: Couple, scale: float) -> Tensor:
    """Every query with every item."""
    number = torch.arange(query.shape[2], device=query.device)[:, None]  # (T, 1)
    start, fades, stop = (x[:, None] for x in (items.start, items.fades, items.stop))
    whole = (start <= number) & (number < fades)
    fraction = (fades <= number) & (number < stop)
    share = torch.where(whole, 1, items.score[:, None] - items.tau[..., None])
    there, share = (whole | fraction)[:, None], share.masked_fill(~(whole | fraction), 0)[:, None]
    scores = scale * (query @ items.key[:, None].mT)
    if couple == "kv":
        scores = scores * share
    return weigh(scores, items.value[:, None], share, there, couple)


def _in_chunks(
    query: Tensor, items: Items, couple: Couple, scale: float, impl: str | None
) -> Tensor:
    rows, _, tokens, _ = query.shape
    block = min(CHUNK, tokens)
    blocks = -(-tokens // block)
    pad = blocks * block - tokens
    start = torch.cat([items.start, items.fades], 1)
    stop = torch.cat([items.fades, items.stop], 1)
    where = spans(start, stop, block, blocks).flatten(0, 1)  # (R * blocks, width)
    query = torch.nn.functional.pad(query, (0, 0, 0, pad))
    query = query.unflatten(2, (blocks, block)).transpose(1, 2).flatten(0, 1)
    tau = torch.nn.functional.pad(items.tau, (0, pad)).view(rows * blocks, 1, block, 1)
    tensors = (items.key, items.value, items.score)
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in (query, tau, *tensors))
    each = where.shape[1] * 2 * (items.key.shape[-1] + items.value.shape[-1])
    many = max(1, GATHERED // max(1, each))
    out = []
    for first in range(0, rows * blocks, many):
        some = slice(first, first + many)
        number = torch.arange(first, min(first + many, rows * blocks), device=query.device)
        given = (query[some], tau[some], *tensors, where[some], start, stop, number)
        options = (couple, scale, impl, blocks)
        if wants and many < rows * blocks:
            out.append(checkpoint(_some_chunks, *given, *options, use_reentrant=False))
        else:
            out.append(_some_chunks(*given, *options))
    out = torch.cat(out) if len(out) > 1 else out[0]
    out = out.unflatten(0, (rows, blocks)).transpose(1, 2).flatten(2, 3)
    return out[:, :, :tokens]


def _some_chunks(
    query: Tensor,
    tau: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor,
    where: Tensor,
    start: Tensor,
    stop: Tensor,
    number: Tensor,
    couple: Couple,
    scale: float,
    impl: str | None,
    blocks: int,
) -> Tensor:
    """(C, G, block, D) queries of C chunks, whose numbers are given -> (C, G, block, Dv)."""
    items, block = key.shape[1], query.shape[2]
    row = (number // blocks)[:, None]
    place = where.clamp_min(0)
    first = (number % blocks * block)[:, None, None]
    at = first + torch.arange(block, device=query.device)[:, None]
    begin, end = start[row, place][:, None], stop[row, place][:, None]
    there = (begin <= at) & (at < end) & (where >= 0)[:, None]  # (C, block, width)

    fraction = (place >= items)[..., None]
    flat = (row * items + place % items).flatten()
    shape = where.shape
    u = score.flatten().index_select(0, flat).view(*shape, 1)
    k = key.flatten(0, 1).index_select(0, flat).view(*shape, -1)
    v = value.flatten(0, 1).index_select(0, flat).view(*shape, -1)
    if couple == "log":  # the weights of the fractions are summed with their values
        v = torch.nn.functional.pad(v, (0, 1), value=1)
    if couple == "kv":
        query = torch.cat([query, -tau * query], -1)
        k = _doubled(k, u, fraction)
    v = _doubled(v, u, fraction)
    out = attention(
        query,
        k[:, None],
        v[:, None],
        attn_mask=there[:, None],
        scale=scale,
        enable_gqa=True,
        impl=impl,
    )
    plain, fractions = out.chunk(2, -1)
    out = plain - tau * fractions
    if couple != "log":
        return out
    out, total = out[..., :-1], out[..., -1:]
    return out / total.masked_fill(total == 0, 1)


def _doubled(x: Tensor, u: Tensor, fraction: Tensor) -> Tensor:
    """(x, 0), or (u x, x) where it is a fraction."""
    return torch.cat([torch.where(fraction, u * x, x), torch.where(fraction, x, 0)], -1)
