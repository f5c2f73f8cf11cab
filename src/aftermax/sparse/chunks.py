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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aftermax.attention import attention
from aftermax.sparse.pairs import Couple, weigh
from aftermax.sparse.stream import spans

CHUNK = 256
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
    query = F.pad(query, (0, 0, 0, pad)).unflatten(2, (blocks, block)).transpose(1, 2).flatten(0, 1)
    tau = F.pad(items.tau, (0, pad)).view(rows * blocks, 1, block, 1)
    start = torch.cat([items.start, items.fades], 1)
    stop = torch.cat([items.fades, items.stop], 1)
    where = spans(start, stop, block, blocks).flatten(0, 1)  # (R * blocks, width)
    given = (query, tau, items.key, items.value, items.score)
    options = _Options(where, start, stop, blocks, couple, scale, impl)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        out = _Chunks.apply(*given, options)
    else:
        out = _through(*given, options)
    out = out.unflatten(0, (rows, blocks)).transpose(1, 2).flatten(2, 3)
    return out[:, :, :tokens]


class _Options(NamedTuple):
    """Which items stand in which chunk, C = R x blocks of them, and what is done with them."""

    where: Tensor  # int64 (C, width), of 2 N: whole, then as fractions; -1 = nobody
    start: Tensor  # int64 (R, 2 N)
    stop: Tensor
    blocks: int
    couple: Couple
    scale: float
    impl: str | None

    def groups(self, key: Tensor, value: Tensor) -> Iterator[slice]:
        """Chunks whose keys and values are gathered at a time."""
        chunks, width = self.where.shape
        each = width * 2 * (key.shape[-1] + value.shape[-1])
        many = max(1, GATHERED // max(1, each))
        for first in range(0, chunks, many):
            yield slice(first, min(first + many, chunks))

    def met(self, some: slice, items: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of some chunks: the items' places among all rows' (c, width), whether they are fractions
        (c, width, 1), and which query sees which, bool (c, block, width)."""
        where = self.where[some]
        number = torch.arange(some.start, some.stop, device=where.device)[:, None]
        row, place = number // self.blocks, where.clamp_min(0)
        first = number % self.blocks * block
        # within the block, in few bytes: these are the largest tensors here
        at = torch.arange(block, dtype=torch.int16, device=where.device)[:, None]
        begin, end = (
            (x[row, place] - first).masked_fill(where < 0, 0).clamp(0, block).to(torch.int16)
            for x in (self.start, self.stop)
        )
        there = (begin[:, None] <= at) & (at < end[:, None])
        return row * items + place % items, (place >= items)[..., None], there


def _through(
    query: Tensor, tau: Tensor, key: Tensor, value: Tensor, score: Tensor, options: _Options
) -> Tensor:
    """(C, G, block, D) queries of the chunks -> (C, G, block, Dv), group after group."""
    out = []
    for some in options.groups(key, value):
        flat, fraction, there = options.met(some, key.shape[1], query.shape[2])
        k, v, u = (_gathered(x, flat) for x in (key, value, score[..., None]))
        out.append(_one_group(query[some], tau[some], k, v, u, fraction, there, options))
    return torch.cat(out) if len(out) > 1 else out[0]


class _Chunks(torch.autograd.Function):
    """`_through`, with a backward pass that gathers each group again and adds its gradients up in
    place: autograd would keep all that was gathered, and make a tensor of all keys' gradients for
    each group."""

    @staticmethod
    def forward(ctx, query, tau, key, value, score, options):
        ctx.options = options
        ctx.save_for_backward(query, tau, key, value, score)
        return _through(query, tau, key, value, score, options)

    @staticmethod
    def backward(ctx, *grads):
        options = ctx.options
        query, tau, key, value, score = given = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted: by autograd alone
            wanted = [x for x, wants in zip(given, ctx.needs_input_grad, strict=False) if wants]
            out = _through(query, tau, key, value, score, options)
            again = torch.autograd.grad(out, wanted, grads[0], create_graph=True)
            found = iter(again)
            wants = ctx.needs_input_grad[:5]
            return *(next(found) if want else None for want in wants), None
        of = [torch.zeros_like(x) for x in (key, value, score[..., None])]
        of_query, of_tau = torch.empty_like(query), torch.empty_like(tau)
        for some in options.groups(key, value):
            flat, fraction, there = options.met(some, key.shape[1], query.shape[2])
            parts = [query[some], tau[some]]
            parts += [_gathered(x, flat) for x in (key, value, score[..., None])]
            with torch.enable_grad():
                q, t, k, v, u = parts = [x.detach().requires_grad_() for x in parts]
                out = _one_group(q, t, k, v, u, fraction, there, options)
                found = torch.autograd.grad(out, parts, grads[0][some], allow_unused=True)
            of_query[some], of_tau[some] = found[0], found[1]
            for total, part in zip(of, found[2:], strict=True):
                if part is not None:
                    total.flatten(0, 1).index_add_(0, flat.flatten(), part.flatten(0, 1))
        return of_query, of_tau, of[0], of[1], of[2][..., 0], None


def _one_group(
    query: Tensor,
    tau: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor,
    fraction: Tensor,
    there: Tensor,
    options: _Options,
) -> Tensor:
    """(c, G, block, D) queries, their (c, width, D) keys, (c, width, 1) scores -> the output."""
    couple = options.couple
    if couple == "log":  # the weights of the fractions are summed with their values
        value = F.pad(value, (0, 1), value=1)
    if couple == "kv":
        query = torch.cat([query, -tau * query], -1)
        key = _doubled(key, score, fraction)
    out = attention(
        query,
        key[:, None],
        _doubled(value, score, fraction)[:, None],
        attn_mask=there[:, None],
        scale=options.scale,
        enable_gqa=True,
        impl=options.impl,
    )
    whole, fractions = out.chunk(2, -1)
    out = whole - tau * fractions
    if couple != "log":
        return out
    out, total = out[..., :-1], out[..., -1:]
    return out / total.masked_fill(total == 0, 1)


def _gathered(x: Tensor, flat: Tensor) -> Tensor:
    """(R, N, X) at places among R N, (c, width) -> (c, width, X)."""
    return x.flatten(0, 1).index_select(0, flat.flatten()).view(*flat.shape, -1)


def _doubled(x: Tensor, u: Tensor, fraction: Tensor) -> Tensor:
    """(x, 0), or (u x, x) where it is a fraction."""
    fraction = fraction.to(x.dtype)
    return torch.cat([x * (1 + fraction * (u - 1)), x * fraction], -1)
