"""What the laws put into a system: tensors, what may be seen of them, and ways to run them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from aftermax import Entry, RowMap, Visible, attention_weights
from aftermax.dense import System, as_system

F64 = torch.float64

EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""Rounding in float64."""


class Case(NamedTuple):
    """One call of a system: (B, H, T, D), (B, Hkv, T, D), (B, Hkv, T, Dv) and what it learned."""

    query: Tensor
    key: Tensor
    value: Tensor
    learned: dict[str, Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.query, self.key, self.value, *self.learned.values()]

    def attend(self, entry: Entry, visible: Visible, **options) -> Tensor:
        return as_system(entry.system).attend(
            self.query, self.key, self.value, visible, **self.learned, **options
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        learned = {name: change(x) for name, x in self.learned.items()}
        return Case(change(self.query), change(self.key), change(self.value), learned)

    def to(self, dtype: torch.dtype) -> Case:
        return self.map(lambda x: x.to(dtype))

    def wanting_gradients(self) -> Case:
        return self.map(lambda x: x.detach().clone().requires_grad_())


def case_of(
    entry: Entry,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    tokens: int = 9,
    width: int = 8,
    value_width: int | None = None,
    seed: int = 0,
) -> Case:
    """Gaussian tensors in float64. What is learned is moved off its initial value, which may hide
    it (a gate of 0, a gain of 1)."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=F64)

    kv_heads = heads if kv_heads is None else kv_heads
    value_width = width if value_width is None else value_width
    start = as_system(entry.system).learned(heads, width, value_width)
    learned = {name: x.to(F64) + 0.3 * normal(*x.shape) for name, x in start.items()}
    return Case(
        normal(batch, heads, tokens, width),
        normal(batch, kv_heads, tokens, width),
        normal(batch, kv_heads, tokens, value_width),
        learned,
    )


def natural(entry: Entry) -> Visible:
    """What a query sees where the system is used as it was meant to be."""
    return Visible(causal=entry.causal)


def plain_and_natural(entry: Entry) -> tuple[Visible, ...]:
    return (Visible(), Visible(causal=True)) if entry.causal else (Visible(),)


class View(NamedTuple):
    """What may be seen: as the library is told, and spelt out by hand."""

    visible: Visible
    seen: Tensor  # bool (B, H, T, T)
    bias: Tensor | None = None  # (B, H, T, T)


def distances(tokens: int) -> Tensor:
    return torch.tensor([[i - j for j in range(tokens)] for i in range(tokens)])


def plain_views(batch: int, heads: int, tokens: int) -> dict[str, View]:
    """The views that every kind of system must understand."""
    everything = torch.ones(batch, heads, tokens, tokens, dtype=torch.bool)
    causal = everything & (distances(tokens) >= 0)
    padding = torch.ones(batch, 1, 1, tokens, dtype=torch.bool)
    padding[0, ..., :2] = False
    padding[-1, ..., -3:] = False
    return {
        "everything": View(Visible(), everything),
        "causal": View(Visible(causal=True), causal),
        "padding": View(Visible(mask=padding), everything & padding),
        "causal, padding": View(Visible(causal=True, mask=padding), causal & padding),
    }


def masked_views(batch: int, heads: int, tokens: int) -> dict[str, View]:
    """Windows, and masks that hide what they like from whom they like."""
    random = torch.Generator().manual_seed(7)
    shape = (batch, heads, tokens, tokens)
    everything, distance = torch.ones(shape, dtype=torch.bool), distances(tokens)
    causal = everything & (distance >= 0)
    per_head = torch.rand(shape, generator=random) < 0.6
    per_head[0, 0, 1] = False  # a row that sees nothing
    per_head[0, 0, 2] = distance[2] == 1  # and one that sees one key
    lowest = torch.zeros(batch, 1, tokens, tokens, dtype=F64)
    lowest = lowest.masked_fill(~per_head[:, :1], torch.finfo(F64).min)
    near = distance.abs() < 3
    return {
        "window, causal": View(Visible(causal=True, window=3), causal & near),
        "window": View(Visible(window=3), everything & near),
        "bool mask": View(Visible(mask=per_head), per_head),
        "bool mask, one for all heads": View(
            Visible(mask=per_head[:, :1]), everything & per_head[:, :1]
        ),
        "bool mask, causal": View(Visible(causal=True, mask=per_head), causal & per_head),
        "float mask with finfo.min": View(Visible(mask=lowest), everything & per_head[:, :1]),
    }


def biased_views(batch: int, heads: int, tokens: int) -> dict[str, View]:
    """Terms that are added to the scores."""
    random = torch.Generator().manual_seed(8)
    shape = (batch, heads, tokens, tokens)
    everything, distance = torch.ones(shape, dtype=torch.bool), distances(tokens)
    seen = torch.rand(shape, generator=random) < 0.6
    additive = torch.randn(shape, generator=random, dtype=F64)
    slopes = torch.tensor([2.0 ** -(h + 1) for h in range(heads)], dtype=F64)
    alibi = -slopes[:, None, None] * distance.abs() + torch.zeros(shape, dtype=F64)
    causal = everything & (distance >= 0)
    return {
        "float mask": View(
            Visible(mask=additive.masked_fill(~seen, -torch.inf)),
            seen,
            additive.masked_fill(~seen, 0),
        ),
        "alibi": View(Visible(slopes=slopes), everything, alibi),
        "alibi, causal, window": View(
            Visible(causal=True, window=4, slopes=slopes), causal & (distance < 4), alibi
        ),
    }


@contextlib.contextmanager
def _set(module: str, name: str, number: int) -> Iterator[None]:
    # by its full name: a package may have a function where the module would stand
    holder = importlib.import_module(module)
    before = getattr(holder, name)
    setattr(holder, name, number)
    try:
        yield
    finally:
        setattr(holder, name, before)


def blocks_of(scores: int) -> contextlib.AbstractContextManager[None]:
    """The dense walk in blocks of this many scores, so that small tensors need several."""
    return _set("aftermax.blocks", "BLOCK_SCORES", scores)


def chunks_of(tokens: int) -> contextlib.AbstractContextManager[None]:
    """The linear walk in chunks of so many tokens."""
    return _set("aftermax.linear.walk", "CHUNK", tokens)


def gradients(out: Tensor, case: Case) -> tuple[Tensor, ...]:
    """Of a fixed, uneven functional of `out`."""
    random = torch.Generator().manual_seed(11)
    upstream = torch.randn(out.shape, generator=random, dtype=F64).to(out.dtype)
    return torch.autograd.grad(out, case.leaves, upstream, materialize_grads=True)


def decode(
    entry: Entry, case: Case, visible: Visible, cuts: list[int], seen: Tensor | None = None
) -> Tensor:
    """The case piece by piece, cut at these tokens, through `init_state` and `step`."""
    system: System = as_system(entry.system)
    state = system.init_state(
        case.key.shape[0], case.key.shape[1], case.key.shape[-1], case.value.shape[-1], dtype=F64
    )
    tokens, out = case.query.shape[-2], []
    for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
        pieces = (x[:, :, start:stop] for x in (case.query, case.key, case.value))
        real = None if seen is None else seen[:, start:stop]
        options = {"enable_gqa": True, **case.learned}
        piece, state = system.step(*pieces, state, visible, real, **options)
        out.append(piece)
    return torch.cat(out, -2)


def weights_of(entry: Entry, case: Case, visible: Visible, columns: int | None = None) -> Tensor:
    """(B, H, T, T). Systems that are no row map show their weights on one-hot values, which have so
    many `columns`."""
    if isinstance(entry.system, RowMap):
        return attention_weights(
            case.query, case.key, weights=entry.system, attn_mask=visible, **case.learned
        )
    tokens = case.key.shape[-2]
    one_hot = torch.eye(tokens, columns or tokens, dtype=F64)
    one_hot = one_hot.expand(*case.key.shape[:2], *one_hot.shape)
    return case._replace(value=one_hot).attend(entry, visible)[..., :tokens]
