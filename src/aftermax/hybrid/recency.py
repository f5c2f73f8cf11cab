"""How much of a head's attention stays near by: the recency ratio, and who ranks first by it.

RecurFormer (Yan et al., arXiv 2410.12850) replaces the heads that look at what is near. For one
head, over the last `window` = alpha keys of each query::

    RR = mean over i of  sum_{i - alpha < j <= i} A_ij,    A the weights of causal softmax

Only the paper's abstract could be read here; the normalisation is ours, and so are three things
that keep the number honest:

- queries that see no more than alpha keys are left out, whose sum is 1 whatever the head does;
- `uniform_ratio` is what a head that looks at all alike would have: 0.255 at alpha = n/10, any n;
- `drop_sink` = s takes the first s keys out and lets the rest sum to 1. Heads that rest on the
  first token look neither far nor near by, and without this they count as far.

As sum_{near} A_ij = exp(lse_near,i - lse_i), two log-sum-exps of each row are all that is needed:
rows are walked in blocks, and the n x n matrix is never whole.

Grouped queries: the keys and values of a group leave the cache when all of its heads are replaced.
Whoever chooses 90 % of the heads of Qwen2-7B one by one (28 heads on 4 groups) frees 41 % of its
cache, at 50 % nothing. So groups are ranked, not heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aftermax.blocks import no_autocast
from aftermax.dense import Dense
from aftermax.modules import Attention, evaluating
from aftermax.visible import Visible, check_tokens
from aftermax.weights import Softmax

BLOCK_SCORES = 2**20
"""Scores that one block of rows may hold, over batch, heads, rows and keys."""

Pick = Literal["top", "random", "bottom"]


def recency_ratio(
    query: Tensor,
    key: Tensor,
    window: int | float,
    *,
    drop_sink: int = 0,
    seen: Tensor | None = None,
    asked: Tensor | None = None,
    scale: float | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """RR of each head of each sequence: (B, H).

    Args:
        query: (B, H, T, D), placed (RoPE) as attention reads it.
        key: (B, Hkv, T, D), Hkv a divisor of H.
        window: alpha, in tokens (int, the query's own included), or as a share of the tokens that
            are seen (float below 1).
        drop_sink: s, keys at the start that are taken out.
        seen: bool (B, T), False = padding: neither a query nor a key.
        asked: bool (B, T), the queries that the mean is over; None = all. A head that looks far
            where something is asked, and rests near by otherwise, is near-sighted in the mean over
            all: where it is known which tokens ask, they say more.
        scale: of the inner product; None = 1/sqrt(D).
        slopes: (H,), of ALiBi.

    Raises:
        ValueError: for shapes that do not fit, and where a sequence has no query that sees more
            than alpha keys.

    >>> q = k = torch.zeros(1, 1, 100, 4)  # a head that looks at all alike
    >>> recency_ratio(q, k, 10), uniform_ratio(100, 10)
    (tensor([[0.2509]]), 0.2509...)
    """
    batch, heads, tokens, width = _checked(query, key)
    if drop_sink < 0:
        raise ValueError(f"drop_sink must be at least 0, got {drop_sink}")
    if seen is None:
        seen = torch.ones(batch, tokens, dtype=torch.bool, device=query.device)
    check_tokens("seen", seen, batch, tokens)
    rank = seen.cumsum(-1) - 1  # (B, T), the place among the tokens that are seen
    near = _in_tokens(window, seen.sum(-1))  # (B,)
    counts = seen & (rank >= (near + drop_sink)[:, None])
    if asked is not None:
        check_tokens("asked", asked, batch, tokens)
        counts = counts & asked
    if not counts.any(-1).all():
        shortest = int(seen.sum(-1).min())
        raise ValueError(
            f"window={window} and drop_sink={drop_sink} leave no query of the shortest sequence "
            f"({shortest} tokens) that sees more"
        )
    compute = torch.promote_types(query.dtype, torch.float32)
    factor = 1 / math.sqrt(width) if scale is None else scale
    total = query.new_zeros((batch, heads), dtype=compute)
    rows = max(1, BLOCK_SCORES // (batch * heads * tokens))
    with torch.no_grad(), no_autocast(query.device):
        for start in range(0, tokens, rows):
            stop = min(start + rows, tokens)
            part = query[:, :, start:stop].to(compute) * factor
            scores = _grouped_scores(part, key[:, :, :stop].to(compute))
            distance = rank[:, start:stop, None] - rank[:, None, :stop]  # (B, rows, keys)
            if slopes is not None:
                scores = scores - slopes.to(scores)[None, :, None, None] * distance[:, None]
            held = seen[:, None, :stop] & (rank[:, None, :stop] >= drop_sink) & (distance >= 0)
            scores = scores.masked_fill(~held[:, None], -torch.inf)
            close = (distance < near[:, None, None])[:, None]
            local = scores.masked_fill(~close, -torch.inf).logsumexp(-1)
            share = (local - scores.logsumexp(-1)).exp()  # (B, H, rows)
            total += share.masked_fill(~counts[:, None, start:stop], 0).sum(-1)
    return total / counts.sum(-1, keepdim=True)


def uniform_ratio(tokens: int, window: int | float, drop_sink: int = 0) -> float:
    """RR of a head that looks at all alike: mean of alpha / (i + 1 - s) over i >= alpha + s.

    >>> [round(uniform_ratio(1024, window), 3) for window in (16, 64, 0.1)]
    [0.066, 0.184, 0.255]
    """
    near = int(_in_tokens(window, torch.tensor([tokens])))
    counted = range(near + drop_sink, tokens)
    if not counted:
        raise ValueError(f"{tokens} tokens have no query that sees more than {near} keys")
    return sum(near / (i + 1 - drop_sink) for i in counted) / len(counted)


def of_groups(ratios: Tensor, kv_heads: int, how: Literal["mean", "min"] = "mean") -> Tensor:
    """RR of each KV group from those of its heads: (..., H) -> (..., Hkv).

    Args:
        how: "mean", or "min": a group is as near-sighted as its most far-sighted head.

    >>> of_groups(torch.tensor([0.9, 0.1, 0.6, 0.8]), 2)
    tensor([0.5000, 0.7000])
    """
    heads = ratios.shape[-1]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads must divide the {heads} heads, got {kv_heads}")
    if how not in ("mean", "min"):
        raise ValueError(f"how must be 'mean' or 'min', got {how!r}")
    grouped = ratios.unflatten(-1, (kv_heads, -1))
    return grouped.mean(-1) if how == "mean" else grouped.amin(-1)


def rank_heads(
    ratios: Tensor,
    *,
    kv_heads: int | None = None,
    groups: bool = True,
    how: Literal["mean", "min"] = "mean",
) -> list[tuple[int, int]]:
    """(layer, group) from the most near-sighted to the least.

    Args:
        ratios: (layers, H), RR of every head of a model.
        kv_heads: groups of a layer; None = H.
        groups: False = (layer, head), for looking at: a head alone frees no cache.
        how: as in `of_groups`.

    >>> rank_heads(torch.tensor([[0.9, 0.1], [0.6, 0.8]]))
    [(0, 0), (1, 1), (1, 0), (0, 1)]
    """
    if ratios.ndim != 2:
        raise ValueError(f"ratios must be (layers, H), got {tuple(ratios.shape)}")
    heads = ratios.shape[1]
    units = of_groups(ratios, (kv_heads or heads) if groups else heads, how)
    order = units.flatten().argsort(descending=True, stable=True).tolist()
    return [divmod(place, units.shape[1]) for place in order]


@dataclass(frozen=True)
class Plan:
    """Which KV groups of which layer are replaced.

    >>> Plan(((0,), ()), kv_heads=2).share
    0.25
    """

    replaced: tuple[tuple[int, ...], ...]
    """For each layer, its groups in rising order."""
    kv_heads: int

    def __post_init__(self):
        for layer, groups in enumerate(self.replaced):
            if list(groups) != sorted(set(groups)) or not set(groups) <= set(range(self.kv_heads)):
                raise ValueError(
                    f"layer {layer} has the groups 0 to {self.kv_heads - 1}, each once and in "
                    f"rising order; got {groups}"
                )

    @property
    def share(self) -> float:
        """Of all groups."""
        return sum(map(len, self.replaced)) / (len(self.replaced) * self.kv_heads)


def plan_of(
    ratios: Tensor,
    share: float,
    *,
    kv_heads: int | None = None,
    pick: Pick = "top",
    per_layer: bool = False,
    how: Literal["mean", "min"] = "mean",
    seed: int = 0,
) -> Plan:
    """The plan that replaces a share of the groups.

    Args:
        ratios: (layers, H).
        share: beta, of the groups of the model, or of each layer; rounded to whole groups.
        pick: "top" of the ranking, RecurFormer's; its "bottom", or "random" ones (of `seed`), to
            see whether the ranking matters.
        per_layer: the same number in every layer.
        kv_heads, how: as in `rank_heads`.

    >>> plan_of(torch.tensor([[0.9, 0.1], [0.6, 0.8]]), 0.5)
    Plan(replaced=((0,), (1,)), kv_heads=2)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is one of the groups, 0 to 1, got {share}")
    if pick not in ("top", "random", "bottom"):
        raise ValueError(f"pick must be 'top', 'random' or 'bottom', got {pick!r}")
    layers, groups = ratios.shape[0], kv_heads or ratios.shape[1]
    order = rank_heads(ratios, kv_heads=groups, how=how)
    if pick == "bottom":
        order = order[::-1]
    if pick == "random":
        generator = torch.Generator().manual_seed(seed)
        order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
    pools = [[u for u in order if u[0] == n] for n in range(layers)] if per_layer else [order]
    chosen = [unit for pool in pools for unit in pool[: math.floor(share * len(pool) + 0.5)]]
    replaced = (tuple(sorted(g for n, g in chosen if n == layer)) for layer in range(layers))
    return Plan(tuple(replaced), groups)


# ---- over a calibration set --------------------------------------------------------------------


@dataclass(frozen=True)
class Recency:
    """RR of all heads of a model over some sequences."""

    mean: Tensor  # (layers, H)
    sd: Tensor  # (layers, H), over sequences; 0 where there is one
    baseline: float
    """`uniform_ratio` of sequences of this length without padding."""
    window: int | float
    drop_sink: int
    sequences: int


def measure_recency(
    model: nn.Module,
    batches: Sequence[Any],
    window: int | float,
    *,
    drop_sink: int = 0,
    asked: Sequence[Tensor] | None = None,
) -> Recency:
    """RR of every head of a model that is built on `aftermax.Attention`, such as the lab's decoder.

    Args:
        model: called with each of the batches, in evaluation, without gradients.
        batches: inputs of the model, all of one length.
        window, drop_sink: as in `recency_ratio`.
        asked: for each batch, the queries that count, as in `recency_ratio`; None = all.

    Raises:
        ValueError: for layers that are not causal softmax: other weights have no such ratio here.

    >>> from aftermax import Attention
    >>> found = measure_recency(Attention(8, heads=2), [torch.randn(3, 20, 8)], 4)
    >>> found.mean.shape, found.sequences
    (torch.Size([1, 2]), 3)
    """
    layers = [m for m in model.modules() if isinstance(m, Attention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no aftermax.Attention in it")
    gathered = Gathered(window, drop_sink)
    with torch.no_grad(), evaluating(model), _watched(layers, gathered):
        for number, batch in enumerate(batches):
            gathered.asked = None if asked is None else asked[number]
            model(batch)
    return gathered.summary(range(len(layers)))


class Gathered:
    """Ratios as layers run, by the number of the layer."""

    def __init__(self, window: int | float, drop_sink: int):
        self.window, self.drop_sink = window, drop_sink
        self.asked: Tensor | None = None
        self.ratios: dict[int, list[Tensor]] = {}
        self.tokens = 0

    def add(
        self, layer: int, query: Tensor, key: Tensor, visible: Visible, scale: float | None
    ) -> None:
        batch, heads, tokens, _ = query.shape
        visible.check(batch, heads, tokens, key.shape[-2])
        whole = visible.causal and visible.window is None and key.shape[-2] == tokens
        if not whole or visible.offset or visible.differs_by_query():
            raise ValueError("the recency ratio is of whole sequences, causal but for padding")
        seen = replace(visible, slopes=None).seen_keys("the recency ratio")
        if seen is not None:
            seen = seen.expand(batch, seen.shape[1], 1, tokens)[:, 0, 0]
        found = recency_ratio(
            query,
            key,
            self.window,
            drop_sink=self.drop_sink,
            seen=seen,
            asked=self.asked,
            scale=scale,
            slopes=visible.slopes,
        )
        self.ratios.setdefault(layer, []).append(found.cpu())
        self.tokens = tokens

    def summary(self, layers: Sequence[int]) -> Recency:
        """The layers of these numbers, in this order."""
        every = torch.stack([torch.cat(self.ratios[n]) for n in layers])  # (layers, sequences, H)
        return Recency(
            every.mean(1),
            every.std(1, correction=min(1, every.shape[1] - 1)),
            uniform_ratio(self.tokens, self.window, self.drop_sink),
            self.window,
            self.drop_sink,
            every.shape[1],
        )


class _Watched:
    """A system that shows what it is asked, and answers as it did."""

    def __init__(self, system: Any, layer: int, gathered: Gathered):
        self.system, self.layer, self.gathered = system, layer, gathered

    def attend(self, query, key, value, visible, **options):
        self.gathered.add(self.layer, query, key, visible, options.get("scale"))
        return self.system.attend(query, key, value, visible, **options)


@contextmanager
def _watched(layers: Sequence[Attention], gathered: Gathered) -> Iterator[None]:
    for layer in layers:
        if layer.system != Dense(Softmax()):
            raise ValueError(f"the recency ratio is of softmax's weights, not of {layer.system}")
    before = [layer.system for layer in layers]
    try:
        for number, layer in enumerate(layers):
            layer.system = _Watched(layer.system, number, gathered)  # type: ignore[assignment]
        yield
    finally:
        for layer, system in zip(layers, before, strict=True):
            layer.system = system


def _checked(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    fits = query.ndim == key.ndim == 4 and query.shape[0] == key.shape[0]
    if not fits or query.shape[2:] != key.shape[2:] or query.shape[1] % max(1, key.shape[1]):
        raise ValueError(
            "needs query (B, H, T, D) and key (B, Hkv, T, D), Hkv a divisor of H, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    batch, heads, tokens, width = query.shape
    return batch, heads, tokens, width


def _in_tokens(window: int | float, tokens: Tensor) -> Tensor:
    """alpha, for sequences of so many tokens."""
    if isinstance(window, int) and window >= 1:
        return torch.full_like(tokens, window)
    if isinstance(window, float) and 0 < window < 1:
        return (tokens * window).round().long().clamp_min(1)
    raise ValueError(
        f"window is a number of tokens (int, at least 1), or a share of them (float, below 1), "
        f"got {window!r}"
    )


def _grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    query = query.reshape(batch, groups, heads // groups * rows, width)
    return (query @ key.transpose(-1, -2)).reshape(batch, heads, rows, key.shape[-2])
