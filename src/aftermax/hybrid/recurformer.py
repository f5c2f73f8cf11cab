"""RecurFormer: some KV groups of a layer attend, the others are replaced by what keeps a state.

Yan et al., arXiv 2410.12850 (withdrawn from ICLR 2025): heads that look at what is near are
replaced by a Mamba block, the rest of the model is kept, and training goes on. Which heads:
`aftermax.hybrid.recency`. Three replacements stand under one interface::

    mamba    a `MambaHeads` block on the layer's input (theirs); queries, keys and values of the
             replaced heads are dropped
    window   `SinkWindow`: the last tokens and the first ones; needs no training
    linear   a linear system, such as `Linear`, on the same queries, keys and values

The outputs of all heads stand in their old order before the output projection, which is used
again. Only whole KV groups are replaced: the keys of a group stay in the cache as long as one of
its heads reads them. What a layer keeps is then, for n tokens in a cache of one element a number::

    2 n D (Hkv - r)  keys and values of the groups that stay, and for the r groups that do not
    mamba:  g r D expand (N + 3)     g = H / Hkv heads in a group
    window: 2 r D (sinks + min(n, window - 1))
    linear: r D (D + 1)

The authors' Mamba holds N + 4, one column of the convolution more than is read again. Counted that
way 90 % of the heads of Llama-2-7B save 89 % of 512 MiB at 1024 tokens and 90 % of 32 GiB at 64k
(`share_saved`): arithmetic, not a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from aftermax.call import check_inputs
from aftermax.dense import System, as_system
from aftermax.entry import Entry, Laws
from aftermax.hybrid.mamba import MambaHeads, MambaState
from aftermax.linear.elu import EXCEPTIONS, Linear
from aftermax.modules import Attention
from aftermax.visible import Visible, check_tokens
from aftermax.weights import RowMap, Softmax


@dataclass(frozen=True)
class HybridState:
    """The states of the groups that stay and of those that are replaced; None where there are
    none."""

    kept: Any
    replaced: Any

    @property
    def parts(self) -> list[Any]:
        return [part for part in (self.kept, self.replaced) if part is not None]

    @property
    def length(self) -> int:
        """Tokens so far, padding included: the position of the next token."""
        return self.parts[0].length

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def _each(self, change: Any) -> HybridState:
        kept, replaced = (
            None if part is None else change(part) for part in (self.kept, self.replaced)
        )
        return HybridState(kept, replaced)

    def reorder(self, index: Tensor) -> HybridState:
        return self._each(lambda part: part.reorder(index))

    def truncate(self, length: int) -> HybridState:
        """The first `length` tokens alone, where both parts can."""
        return self._each(lambda part: part.truncate(length))


@dataclass(frozen=True)
class RecurFormer:
    """Two systems side by side, each for some KV groups, with the methods of `aftermax.System`.

    Args:
        dense: of the groups that stay, a row map or any system; softmax.
        other: of those that are replaced, any system; `Linear()`. (A Mamba block reads the layer's
            input and not queries and keys: see `RecurFormerAttention`.)
        share: of the groups that is replaced, the last ones, rounded down; 0.5.
        replaced: the groups that are replaced, in rising order, in place of a share.

    >>> from aftermax import Visible
    >>> x = torch.randn(1, 4, 5, 2)
    >>> out = RecurFormer(replaced=(1, 2)).attend(x, x, x, Visible(causal=True))
    >>> linear = Linear().attend(x, x, x, Visible(causal=True))
    >>> [torch.equal(out[:, h], linear[:, h]) for h in range(4)]
    [False, True, True, False]
    """

    dense: RowMap | System = Softmax()  # noqa: RUF009, a frozen value
    other: RowMap | System = Linear()  # noqa: RUF009
    share: float = 0.5
    replaced: tuple[int, ...] | None = None

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is one of the groups, 0 to 1, got {self.share}")
        if self.replaced is not None and list(self.replaced) != sorted(set(self.replaced)):
            raise ValueError(f"replaced names groups once, in rising order, got {self.replaced}")

    @property
    def systems(self) -> tuple[System, System]:
        return as_system(self.dense), as_system(self.other)

    @property
    def can_truncate(self) -> bool:
        return all(getattr(system, "can_truncate", False) for system in self.systems)

    @property
    def can_merge(self) -> bool:
        return all(getattr(system, "can_merge", False) for system in self.systems)

    def groups(self, kv_heads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The groups that stay, and those that are replaced.

        >>> RecurFormer().groups(5)
        ((0, 1, 2), (3, 4))
        """
        replaced = self.replaced
        if replaced is None:
            replaced = tuple(range(kv_heads - int(self.share * kv_heads), kv_heads))
        if replaced and not 0 <= replaced[0] <= replaced[-1] < kv_heads:
            raise ValueError(f"replaced={replaced} names groups that {kv_heads} KV heads have not")
        return tuple(g for g in range(kv_heads) if g not in replaced), replaced

    def learned(self, heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        """What either learns, for all heads; the names of the other's begin with `other_`."""
        dense, other = (system.learned(heads, key_dim, value_dim) for system in self.systems)
        return dense | {f"other_{name}": x for name, x in other.items()}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Visible,
        *,
        enable_gqa: bool = False,
        **options: Any,
    ) -> Tensor:
        """All at once: (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv) -> (B, H, Tq, Dv)."""
        check_inputs(query, key, value, enable_gqa)
        heads, kv_heads = query.shape[1], key.shape[1]
        visible.check(query.shape[0], heads, query.shape[2], key.shape[2])
        outs, order = [], []
        for number, groups in enumerate(self.groups(kv_heads)):
            if groups:
                mine = heads_of(groups, heads // kv_heads)
                outs.append(
                    self.systems[number].attend(
                        of(query, mine),
                        of(key, groups),
                        of(value, groups),
                        _visible_of(visible, mine),
                        enable_gqa=True,
                        **self._options(number, mine, query, value, options),
                    )
                )
                order += mine
        return in_order(torch.cat(outs, 1), order)

    def init_state(
        self, batch: int, kv_heads: int, key_dim: int, value_dim: int, **options: Any
    ) -> HybridState:
        """The state before the first token."""
        parts = [
            system.init_state(batch, len(groups), key_dim, value_dim, **options) if groups else None
            for system, groups in zip(self.systems, self.groups(kv_heads), strict=True)
        ]
        return HybridState(*parts)

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: HybridState,
        visible: Visible,
        seen: Tensor | None = None,
        *,
        enable_gqa: bool = False,
        **options: Any,
    ) -> tuple[Tensor, HybridState]:
        """The next tokens, one or many, after what `state` holds: (out, new state)."""
        check_inputs(query, key, value, enable_gqa)
        heads, kv_heads = query.shape[1], key.shape[1]
        outs, order, parts = [], [], []
        held = (state.kept, state.replaced)
        for number, groups in enumerate(self.groups(kv_heads)):
            part = None
            if groups:
                mine = heads_of(groups, heads // kv_heads)
                out, part = self.systems[number].step(
                    of(query, mine),
                    of(key, groups),
                    of(value, groups),
                    held[number],
                    _visible_of(visible, mine),
                    seen,
                    enable_gqa=True,
                    **self._options(number, mine, query, value, options),
                )
                outs.append(out)
                order += mine
            parts.append(part)
        return in_order(torch.cat(outs, 1), order), HybridState(*parts)

    def merge(self, first: HybridState, second: HybridState) -> HybridState:
        """The state after two pieces, where both systems can join theirs."""
        if not self.can_merge:
            raise ValueError(f"{self} cannot join two pieces read apart: one of its systems cannot")
        pairs = ((first.kept, second.kept), (first.replaced, second.replaced))
        parts = [
            None if a is None else system.merge(a, b)  # type: ignore[attr-defined]
            for system, (a, b) in zip(self.systems, pairs, strict=True)
        ]
        return HybridState(*parts)

    def _options(
        self, number: int, heads: tuple[int, ...], query: Tensor, value: Tensor, options: dict
    ) -> dict:
        """Those of one of the two, with its heads' share of what is learned."""
        found = {name: x for name, x in options.items() if not isinstance(x, Tensor)}
        mine = {
            name.removeprefix("other_"): x
            for name, x in options.items()
            if isinstance(x, Tensor) and name.startswith("other_") == bool(number)
        }
        shape = (query.shape[-1], value.shape[-1])
        initial = self.learned(query.shape[1], *shape) if mine else {}
        for name, x in mine.items():
            asked = f"other_{name}" if number else name
            if asked not in initial or initial[asked].shape != x.shape:
                fits = {n: tuple(p.shape) for n, p in initial.items()}
                raise ValueError(
                    f"{asked} of shape {tuple(x.shape)} is none of what both systems learn for all "
                    f"{query.shape[1]} heads: {fits}"
                )
        return found | (share_of(self.systems[number], mine, heads, *shape) if mine else {})


def heads_of(groups: Sequence[int], size: int) -> tuple[int, ...]:
    """The query heads of these groups.

    >>> heads_of((0, 2), 2)
    (0, 1, 4, 5)
    """
    return tuple(g * size + i for g in groups for i in range(size))


def share_of(
    system: System, learned: dict[str, Tensor], heads: Sequence[int], key_dim: int, value_dim: int
) -> dict[str, Tensor]:
    """What these heads have of what all heads learned; what is no matter of heads stays whole."""
    as_for_few = system.learned(len(heads), key_dim, value_dim)
    return {
        name: x if name in as_for_few and as_for_few[name].shape == x.shape else x[list(heads)]
        for name, x in learned.items()
    }


def of(x: Tensor, heads: Sequence[int]) -> Tensor:
    """These heads of (B, H, T, D); a view where they stand side by side."""
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        return x[:, heads[0] : heads[0] + len(heads)]
    return x[:, list(heads)]


def in_order(x: Tensor, order: Sequence[int]) -> Tensor:
    """Heads that stand in `order`, from the first to the last."""
    if list(order) == sorted(order):
        return x
    places = [0] * len(order)
    for place, head in enumerate(order):
        places[head] = place
    return x[:, places]


def _visible_of(visible: Visible, heads: tuple[int, ...]) -> Visible:
    """What these heads see."""
    mask, slopes = visible.mask, visible.slopes
    if mask is not None and mask.ndim > 2 and mask.shape[-3] > 1:
        mask = mask[..., list(heads), :, :]
    return replace(visible, mask=mask, slopes=None if slopes is None else slopes[list(heads)])


class RecurFormerAttention(Attention):
    """`aftermax.Attention` in which a Mamba block stands for some KV groups.

    Args:
        width, heads: as in `Attention`.
        weights: of the heads that stay, a row map or a system; a `RecurFormer` gives its `dense`
            system, and its groups where `replaced` is None.
        replaced: the KV groups that the block stands for; None = the second half of them.
        expand, state, conv, rank: of the block, as in `MambaHeads`.
        options: the others of `Attention`. It is causal; a `window`, dropout and positions are of
            the heads that stay.

    The block reads the layer's input, so that positions do not matter to it. State: a `HybridState`
    of the system's state and a `MambaState`, which cannot be truncated or merged.

    Raises:
        ValueError: as `Attention`, and for `causal=False`.

    >>> attend = RecurFormerAttention(32, heads=4, kv_heads=2, replaced=(0,))
    >>> x = torch.randn(2, 5, 32)
    >>> first, state = attend.step(x[:, :3], attend.init_state(2))
    >>> rest, state = attend.step(x[:, 3:], state)
    >>> torch.allclose(torch.cat([first, rest], 1), attend(x), atol=1e-6)
    True
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        weights: RowMap | System = Softmax(),  # noqa: B008, a frozen value
        replaced: Sequence[int] | None = None,
        expand: int = 1,
        state: int = 16,
        conv: int = 4,
        rank: int | None = None,
        **options: Any,
    ):
        both = weights if isinstance(weights, RecurFormer) else RecurFormer(weights)
        if replaced is not None:
            both = replace(both, replaced=tuple(replaced))
        super().__init__(width, heads, weights=both.dense, **options)
        if not self.causal:
            raise ValueError("a Mamba block reads from left to right: it needs causal=True")
        self.kept, self.replaced = both.groups(self.kv_heads)
        size = heads // self.kv_heads
        self.kept_heads = heads_of(self.kept, size)
        self.replaced_heads = heads_of(self.replaced, size)
        self.order = (*self.kept_heads, *self.replaced_heads)
        self._keep()
        factory: Any = {name: options.get(name) for name in ("device", "dtype")}
        sizes: Any = {"expand": expand, "state": state, "conv": conv, "rank": rank}
        self.mamba = None
        if self.replaced:
            count = len(self.replaced_heads)
            self.mamba = MambaHeads(width, count, self.head_dim, **sizes, **factory)

    def _keep(self) -> None:
        """Drop the rows of the heads that are replaced."""
        kept = {"to_query": self.kept_heads, "to_key": self.kept, "to_value": self.kept}
        for name, heads in kept.items():
            whole = getattr(self, name)
            setattr(self, name, rows_of_heads(whole, heads, self.head_dim) if heads else None)
        sizes = (self.kept_heads, self.head_dim, self.head_dim)
        for name, x in share_of(self.system, dict(self.learned.items()), *sizes).items():
            self.learned[name] = nn.Parameter(x.detach().clone())
        if self.slopes is not None:
            self.slopes = self.slopes[list(self.kept_heads)]
        if not self.kept:
            self.query_norm, self.key_norm = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, visible: Tensor | Visible | None = None) -> Tensor:
        """A whole sequence (B, T, width); `visible` as in `Attention`, causal but for padding.

        Raises:
            ValueError: for a `Visible` that says more: the block cannot leave out a token for some
                queries.
        """
        return self._join(self.finish(self.heads_out(x, visible), x))

    def heads_out(self, x: Tensor, visible: Tensor | Visible | None = None) -> Tensor:
        """The heads (B, H, T, D) before the output projection."""
        if isinstance(visible, Tensor):
            check_tokens("visible as a mask of tokens", visible, *x.shape[:2])
        outs = []
        if self.kept:
            query, key, value = self.project(x, start=0)
            view = self.what_is_visible(visible)
            outs.append(self.system.attend(query, key, value, view, **self._options()))
        if self.mamba is not None:
            seen = _seen_of(visible, *x.shape[:2]) if isinstance(visible, Visible) else visible
            outs.append(self.mamba(x, seen))
        return in_order(torch.cat(outs, 1), self.order)

    @property
    def can_truncate(self) -> bool:
        return self.mamba is None and super().can_truncate

    @property
    def can_merge(self) -> bool:
        return self.mamba is None and super().can_merge

    def init_state(self, batch: int, start: int = 0) -> HybridState:
        """The state before the first token, which stands at `start`."""
        kept = None
        if self.kept:
            shape = (batch, len(self.kept), self.head_dim, self.head_dim)
            factory = {"device": self.to_out.weight.device, "dtype": self.to_out.weight.dtype}
            kept = self.system.init_state(*shape, **factory, **({"start": start} if start else {}))
        block: MambaState | None = None
        if self.mamba is not None:
            block = self.mamba.init_state(batch, start)
        return HybridState(kept, block)

    def step(self, x: Tensor, state: HybridState, seen: Tensor | None = None):
        """The next tokens (B, T, width), one or many: (out, new state)."""
        outs, kept, block = [], None, None
        if self.kept:
            query, key, value = self.project(x, start=state.length)
            out, kept = self.system.step(
                query, key, value, state.kept, self.what_is_visible(None), seen, **self._options()
            )
            outs.append(out)
        if self.mamba is not None:
            out, block = self.mamba.step(x, state.replaced, seen)
            outs.append(out)
        out = in_order(torch.cat(outs, 1), self.order)
        return self._join(self.finish(out, x)), HybridState(kept, block)

    def merge(self, first: HybridState, second: HybridState) -> HybridState:
        if not self.can_merge:
            raise ValueError(
                "a Mamba block cannot join two pieces read apart: the first tokens of the second "
                "pass a convolution with the last of the first"
            )
        return HybridState(super().merge(first.kept, second.kept), None)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, replaced={self.replaced}"


def rows_of_heads(linear: nn.Linear, heads: Sequence[int], width: int) -> nn.Linear:
    """A projection to some of the heads of that width."""
    weight, bias = linear.weight, linear.bias
    small = nn.Linear(
        linear.in_features, len(heads) * width, bias is not None, device="meta", dtype=weight.dtype
    )
    for name, whole in (("weight", weight), ("bias", bias)):
        if whole is not None:
            rows = whole.detach().unflatten(0, (-1, width))[list(heads)].flatten(0, 1)
            setattr(small, name, nn.Parameter(rows, whole.requires_grad))
    return small


def _seen_of(visible: Visible, batch: int, tokens: int) -> Tensor | None:
    """The mask of tokens that a `Visible` is, beside being causal."""
    plain = visible.causal and not visible.offset and visible.slopes is None
    if not plain or visible.differs_by_query():
        raise ValueError(
            "a Mamba block reads whole sequences, causal but for padding, which is given as bool "
            f"(B, T) = {(batch, tokens)}; got {visible}"
        )
    seen = visible.seen_keys("a Mamba block")
    if seen is None:
        return None
    seen = seen.reshape((1,) * (4 - seen.ndim) + tuple(seen.shape))
    if seen.shape[1] > 1:
        raise ValueError("a Mamba block stands for several heads, and the mask differs by head")
    return seen[:, 0, 0].expand(batch, tokens)


ENTRY = Entry(
    name="recurformer",
    title="RecurFormer",
    system=RecurFormer(),
    formula="softmax for some KV groups, a state of one size for the others",
    paper="Yan et al. 2024",
    arxiv="2410.12850",
    score="dot / √d, φ(q)·φ(k)",
    positivity="exp, elu + 1",
    normaliser="row sum",
    walk="dense, linear",
    laws=Laws(rows_sum_to_one=True, rows_at_most_one=True),
    exceptions=EXCEPTIONS
    | {
        "head_independence": "what a head is depends on its place: the first half attends",
        "grouped_queries": "whole KV groups are replaced: repeated heads are other groups",
    },
    module=RecurFormerAttention,
    claim="The model's quality with the heads that look near by replaced by Mamba (HashHop alone).",
)
