"""What every linear system is: features of queries and keys, a walk, and what follows it.

A subclass is one paper. It says in `separate` what its features, values and decay are, and in
`finish` what is done with the sums. Everything else is here, once: what may be seen, tokens that
are hidden or not finite, grouped heads, precision, the state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from aftermax import kernels
from aftermax.blocks import no_autocast
from aftermax.call import check_inputs, complete, finite_rows
from aftermax.linear.walk import both_ways, check_way, in_parallel, repeated, walk, why_not_cpu
from aftermax.reference import onnx_export, transformed
from aftermax.state import bytes_of, check_meeting, rows_of
from aftermax.visible import Visible, check_tokens, refuse_mask

SEE_DIFFERENTLY = "the visible keys differ from query to query"


@dataclass(frozen=True)
class LinearState:
    """All that is kept of the tokens so far: its size does not depend on how many they are.

    Where grouped heads no longer share their sums (decay, a power for each head), it is of all
    heads from the first token on.
    """

    sums: Tensor  # (B, Hs, features, values), see walk.Walked.state
    count: Tensor  # int64 (B,), the tokens that may be seen
    flawed: Tensor  # bool (B, Hkv), whether one of them was not finite
    length: int
    """Tokens so far, padding included: the position of the next token."""
    start: int = 0
    """Position of the first of them."""

    @property
    def bytes(self) -> int:
        return bytes_of(self)

    def reorder(self, index: Tensor) -> LinearState:
        return rows_of(self, index)


@dataclass(frozen=True)
class Places:
    """Where the tokens of a call stand, for formulas that ask."""

    query: Tensor
    """float64 (Tq,): positions, from 0."""
    key: Tensor
    """float64 (Tk,)"""
    tokens: int
    """Tokens up to the last one, those before the call included."""
    count: Tensor
    """(B|1, H|1, Tq|1): N_i, the keys that query i sees."""
    of_keys: Tensor | None
    """(B|1, H|1, Tk|1): N_j, the keys that token j sees; None where not all of them ask."""
    key_sums: Tensor | None = None
    """(B, H, Tq, D): sum of the keys that query i sees, for systems that ask for it."""


@dataclass(frozen=True)
class Separated:
    """The two sides of the weights, ready to be walked."""

    query: Tensor  # (B, H, Tq, F)
    key: Tensor  # (B, Hkv, Tk, F)
    value: Tensor  # (B, Hkv, Tk, Dv)
    rate: Tensor | None = None  # (H,)
    divisor: Tensor | None = None
    """(B|1, H, Tq): what the query was divided by that belongs to its row, for those who want to
    know (`aftermax.dynamics`)."""


@dataclass(frozen=True)
class _Call:
    """A call, checked: in at least float32, the mask as bool."""

    query: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor | None
    visible: Visible
    scale: float | None
    impl: str | None
    form: str | None
    learned: dict[str, Tensor]


@dataclass(frozen=True)
class Separable:
    """A linear system, with the methods of `aftermax.System`.

    `attend` walks in O(T) where every query sees the same keys, but for causality; where a mask or
    a window differs from query to query the same weights are summed in parallel form, in O(T^2)
    time and O(T) memory. `torch.onnx.export` always takes the parallel form. There are no scores
    that anything could be added to: ALiBi and float masks that do more than hide raise.
    """

    totals: ClassVar[bool] = False
    """Whether the weights are summed too."""
    needs_key_sums: ClassVar[bool] = False
    """Whether `separate` asks for `Places.key_sums`. The key's features must then be the map of one
    token, `key_features`."""
    decays: ClassVar[bool] = False
    """Whether there is a rate."""
    mixes_heads: ClassVar[bool] = False
    """Whether `finish` lets the heads of a token meet."""
    can_truncate: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = True

    @property
    def can_merge(self) -> bool:
        """Sums add up; see `merge`."""
        return True

    # ---- what a paper says ----

    def learned(self, heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        """Name -> initial value of what the formula learns."""
        return {}

    def state_shape(self, key_dim: int, value_dim: int) -> tuple[int, int]:
        """Features and values of one head's state."""
        return key_dim, value_dim + self.totals

    def separate(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        places: Places,
        scale: float | None,
        **learned,
    ) -> Separated:
        """Features, values and decay. `scale`: a factor of the weights; None = the paper's own."""
        raise NotImplementedError(f"{type(self).__name__} does not define separate")

    def key_features(self, key: Tensor) -> Tensor:
        """The keys that `Places.key_sums` adds up."""
        return key

    def rates(self, heads: int) -> Tensor | None:
        """(H,): g = e^-rate, where the system `decays`."""
        return None

    def finish(self, out: Tensor, total: Tensor | None, **learned: Tensor) -> Tensor:
        """What follows the sum: (B, H, T, Dv) and (B, H, T) -> (B, H, T, Dv)."""
        return out

    # ---- the methods of a system ----

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Visible,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        dropout_p: float = 0.0,
        impl: str | None = None,
        form: str | None = None,
        **learned: Tensor,
    ) -> Tensor:
        """All at once: (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv) -> (B, H, Tq, Dv).

        Args:
            form: how the sum is walked, one of `walk.FORMS`; None picks. A call that is not causal
                is no walk: "parallel", or two products of matrices (with decay, a walk from either
                end).
            impl: as in `walk`; what is not causal is torch's own products, whatever is asked.

        Raises:
            ValueError: for shapes, dtypes, masks, a form or an impl that do not fit, and for
                dropout: there are no weights that could be dropped.
            RuntimeError: for `impl="cpu"` where the kernel cannot do what is asked.
        """
        call = self._checked(
            query, key, value, visible, scale, enable_gqa, dropout_p, impl, form, learned
        )
        walks = self._walks(visible, query, key)
        if form not in (None, "parallel") and not (walks and visible.causal):
            why = "the call is not causal" if walks else SEE_DIFFERENTLY
            raise ValueError(f"{self._name}: form={form!r}, but {why}")
        if form is None and onnx_export() and (visible.causal or self.decays):
            form = "parallel"
        with no_autocast(query.device):
            if walks and form != "parallel":
                out, _ = self._walk(call, self._nothing(call))
            elif impl == "cpu":
                why = SEE_DIFFERENTLY if form is None else "the parallel form was asked for"
                raise RuntimeError(f"{self._name}: impl='cpu', but {why}")
            else:
                out = self._in_parallel(call)
        return out.to(query.dtype)

    def init_state(
        self,
        batch: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        start: int = 0,
        **factory,
    ) -> LinearState:
        """The state before the first token, which stands at `start`: zeros, in float32 or better.

        Where `start` is not 0 the tokens before it count as seen, in formulas that ask how many
        there were.
        """
        dtype = wide(factory.get("dtype") or torch.get_default_dtype())
        device = factory.get("device")
        features, values = self.state_shape(key_dim, value_dim)
        return LinearState(
            torch.zeros(batch, kv_heads, features, values, dtype=dtype, device=device),
            torch.full((batch,), start, dtype=torch.int64, device=device),
            torch.zeros(batch, kv_heads, dtype=torch.bool, device=device),
            start,
            start,
        )

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: LinearState,
        visible: Visible,
        seen: Tensor | None = None,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        dropout_p: float = 0.0,
        impl: str | None = None,
        form: str | None = None,
        **learned: Tensor,
    ) -> tuple[Tensor, LinearState]:
        """The next tokens, one or many, after what `state` holds: (out, new state).

        Raises:
            ValueError: as `attend`; for masks (`seen`, bool (B, T), tells what later queries may
                see) and for a window: what was summed up cannot be forgotten.
        """
        refuse_mask(visible)
        if visible.window is not None or not visible.causal:
            raise ValueError(
                f"step of {self._name} is causal and has no window: a sum forgets nothing"
            )
        mask = None
        if seen is not None:
            check_tokens("seen", seen, key.shape[0], key.shape[-2])
            mask = seen[:, None, None]
        visible = replace(visible, mask=mask, offset=0)  # the state knows how many there were
        call = self._checked(
            query, key, value, visible, scale, enable_gqa, dropout_p, impl, form, learned
        )
        if state.count.shape[0] != query.shape[0]:
            raise ValueError(
                f"the state is of a batch of {state.count.shape[0]}, the query of {query.shape[0]}"
            )
        with no_autocast(query.device):
            out, state = self._walk(call, state)
        return out.to(query.dtype), state

    def merge(self, first: LinearState, second: LinearState) -> LinearState:
        """The state after two pieces, of which the second was read from a state that began at
        `start=first.length`: g^m S_1 + S_2, m tokens in the second.

        Raises:
            ValueError: where the pieces do not meet, and where the first one held padding and the
                formula puts the number of tokens before it into each value.
        """
        check_meeting(first, second.start)
        if not self.can_merge:
            raise ValueError(f"{self._name} cannot join two pieces read apart")
        if self.count_enters_sums and not bool((first.count == first.length).all()):
            raise ValueError(
                f"{self._name} divides a value by the number of tokens that its own token sees, and"
                " the second piece was not told that the first one held padding"
            )
        before, after = _alike(first.sums, second.sums)
        rates = self.rates(before.shape[1])
        if rates is not None:
            kept = torch.exp(-rates * (second.length - second.start)).to(before)
            before = before * kept[:, None, None]
        flawed, later_flawed = _alike(first.flawed, second.flawed)
        return LinearState(
            before + after,
            first.count + (second.count - second.start),
            flawed | later_flawed,
            second.length,
            first.start,
        )

    def explain(self, query: Tensor, key: Tensor, value: Tensor, visible: Visible) -> str:
        """Which way `attend` goes for these tensors, and if it is not the kernel, why.

        >>> from aftermax import Linear
        >>> x = torch.zeros(1, 1, 3, 4)
        >>> Linear().explain(x, x, x, Visible(causal=True, window=2))
        'reference: parallel, O(T^2): the visible keys differ from query to query'
        """
        if not self._walks(visible, query, key):
            return f"reference: parallel, O(T^2): {SEE_DIFFERENTLY}"
        if not visible.causal and not self.decays:
            return "reference: two matrix products, O(T)"
        refusal = "it is one token" if query.shape[-2] == 1 else why_not_cpu(query, key, value)
        ways = "chunked" if visible.causal else "chunked, from either end"
        if refusal is not None:
            return f"reference: {ways}, O(T): {refusal}"
        return f"cpu: {self._name} {ways} on the {kernels.isa()} kernels, O(T)"

    # ---- the walk ----

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def count_enters_sums(self) -> bool:
        """Whether a value or a key is scaled by how many tokens stand before it."""
        return False

    def _checked(
        self, query, key, value, visible, scale, enable_gqa, dropout_p, impl, form, learned
    ) -> _Call:
        if not 0 <= dropout_p <= 1:
            raise ValueError(f"dropout_p is a probability, got {dropout_p}")
        if dropout_p > 0:
            raise ValueError(f"{self._name} has no weights that dropout_p={dropout_p} could drop")
        check_way(form, impl)
        if not query.ndim == key.ndim == value.ndim == 4:
            raise ValueError(
                f"query, key and value must be (B, H, T, D), got {tuple(query.shape)},"
                f" {tuple(key.shape)}, {tuple(value.shape)}"
            )
        check_inputs(query, key, value, enable_gqa)
        batch, heads, queries, width = query.shape
        visible.check(batch, heads, queries, key.shape[-2])
        seen = visible.seen_keys(self._name)
        initial = self.learned(heads, width, value.shape[-1])
        learned = complete(self._name, initial, learned, query.device)
        query, key, value = (x.to(wide(x.dtype)) for x in (query, key, value))
        return _Call(query, key, value, seen, visible, scale, impl, form, learned)

    def _walks(self, visible: Visible, query: Tensor, key: Tensor) -> bool:
        aligned = visible.offset == 0 and query.shape[-2] == key.shape[-2]
        return not visible.differs_by_query() and (aligned or not (visible.causal or self.decays))

    def _nothing(self, call: _Call) -> LinearState:
        batch, kv_heads, _, width = call.key.shape
        factory = {"device": call.key.device, "dtype": call.key.dtype}
        return self.init_state(batch, kv_heads, width, call.value.shape[-1], **factory)

    def _walk(self, call: _Call, state: LinearState) -> tuple[Tensor, LinearState]:
        """In O(T): every query sees the same keys, but for causality."""
        causal, heads = call.visible.causal, call.query.shape[1]
        queries, tokens = call.query.shape[2], call.key.shape[2]
        clean = _Clean.of_walk(call)
        number = clean.seen.to(torch.int64)
        held = state.count[:, None, None]
        count = held + (number.cumsum(-1) if causal else number.sum(-1, keepdim=True))
        places = Places(
            _positions(state.length + call.visible.offset, queries, call.key),
            _positions(state.length, tokens, call.key),
            state.length + max(tokens, queries + call.visible.offset),
            count.to(call.query.dtype),
            count.to(call.query.dtype),
            self._key_sums(clean, causal, state, heads) if self.needs_key_sums else None,
        )
        parts = self._separated(call, clean, places)
        options: dict[str, Any] = {"rate": parts.rate, "totals": self.totals, "impl": call.impl}
        if causal:
            options |= {"state": state.sums, "form": call.form}
        summed = (walk if causal else both_ways)(parts.query, parts.key, parts.value, **options)
        out = self.finish(summed.out, summed.total, **call.learned)

        flaws = clean.seen & clean.flawed_key
        if causal:
            flaws = (flaws.to(torch.int32).cumsum(-1) > 0) | _heads(state.flawed, flaws)[..., None]
        else:
            flaws = flaws.any(-1, keepdim=True)
        poisoned = _heads(flaws, call.query) | (clean.flawed_query & (count > 0))
        new = LinearState(
            summed.state,
            state.count + number.sum(-1).expand(state.count.shape[0], -1).amax(1),
            flaws[..., -1] if tokens else state.flawed,
            state.length + tokens,
            state.start,
        )
        return self._poison(out, poisoned), new

    def _in_parallel(self, call: _Call) -> Tensor:
        """In O(T^2), whatever is visible: the dense walk sums the same weights."""
        query, key = call.query, call.key
        queries, keys = query.shape[2], key.shape[2]
        visible = replace(call.visible, mask=call.seen)
        clean = _Clean.of(query, key, call.value, torch.ones((), dtype=torch.bool))
        one = query.new_ones(*query.shape[:3], 1)
        ones = query.new_ones(*query.shape[:2], keys, 1)
        count = in_parallel(one, ones, ones, visible)[0][..., 0]
        key_sums = None
        if self.needs_key_sums:
            features = _filled(self.key_features(clean.key), clean.nothing)
            key_sums, _ = in_parallel(one, ones[:, : key.shape[1]], features, visible)
        places = Places(
            _positions(visible.offset, queries, key),
            _positions(0, keys, key),
            max(keys, queries + visible.offset),
            count,
            self._of_keys(count, call),
            key_sums,
        )
        # what is not finite is seen by the dense walk, which makes its rows NaN
        parts = self._separated(call, clean, places, nothing=torch.nan)
        out, total = in_parallel(
            _filled(parts.query, clean.flawed_query, torch.nan),
            _heads(parts.key, parts.value),
            parts.value,
            visible,
            rate=parts.rate,
            totals=self.totals,
        )
        poisoned = out.isnan().any(-1)
        out = out.masked_fill(poisoned[..., None], 0)
        total = None if total is None else total.masked_fill(poisoned, 0)
        return self._poison(self.finish(out, total, **call.learned), poisoned)

    def _of_keys(self, count: Tensor, call: _Call) -> Tensor | None:
        """What the token of each key sees itself, from what the queries see."""
        visible = call.visible
        if not visible.causal and not visible.differs_by_query():
            return count[..., :1]
        aligned = visible.offset == 0 and call.key.shape[2] == call.query.shape[2]
        return count if aligned else None

    def _separated(
        self, call: _Call, clean: _Clean, places: Places, nothing: float = 0
    ) -> Separated:
        """The two sides, with `nothing` for the features of keys that are none."""
        parts = self.separate(
            clean.query, clean.key, clean.value, places, call.scale, **call.learned
        )
        # of a key that is 0 they may be something
        return replace(parts, key=_filled(parts.key, _heads(clean.nothing, parts.key), nothing))

    def _key_sums(self, clean: _Clean, causal: bool, state: LinearState, heads: int) -> Tensor:
        features = _filled(self.key_features(clean.key), clean.nothing)
        if causal:
            before = state.sums[..., : features.shape[-1], -1].unsqueeze(-2)  # of the ones
            sums = _heads(before, features) + features.cumsum(-2)
        else:
            sums = features.sum(-2, keepdim=True)
        return repeated(sums, heads // sums.shape[1])

    def _poison(self, out: Tensor, poisoned: Tensor) -> Tensor:
        if self.mixes_heads:
            poisoned = poisoned.any(1, keepdim=True)
        return out.masked_fill(poisoned[..., None], torch.nan)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a sum is kept in."""
    return torch.promote_types(dtype, torch.float32)


def divided(out: Tensor, total: Tensor | None, floor: float = 0) -> Tensor:
    """Each row by the sum of its weights, at least `floor`; a row of no weight stays 0."""
    assert total is not None
    total = total.clamp_min(floor) if floor else total.masked_fill(total == 0, 1)
    return out / total[..., None]


@dataclass(frozen=True)
class _Clean:
    """A call without what is hidden or not finite: zeros stand there."""

    query: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor  # bool (B|1, H|1, T)
    nothing: Tensor  # bool (B, Hkv, T), the keys that are hidden or not finite
    flawed_query: Tensor  # bool (B, H, Tq)
    flawed_key: Tensor  # bool (B, Hkv, T)

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> _Clean:
        flawed_query, flawed_key = ~finite_rows(query), ~(finite_rows(key) & finite_rows(value))
        nothing = ~seen.to(key.device) | flawed_key
        return cls(
            _filled(query, flawed_query),
            _filled(key, nothing),
            _filled(value, nothing),
            seen,
            nothing,
            flawed_query,
            flawed_key,
        )

    @classmethod
    def of_walk(cls, call: _Call) -> _Clean:
        key, value, tokens = call.key, call.value, call.key.shape[2]
        if call.seen is None:
            seen = torch.ones(1, 1, tokens, dtype=torch.bool, device=key.device)
        else:
            mask = call.seen.reshape((1,) * (4 - call.seen.ndim) + tuple(call.seen.shape))
            seen = mask[:, :, 0].expand(-1, -1, tokens)
        if seen.shape[1] > 1:  # what is hidden from some heads of a group is no longer shared
            key, value = _heads(key, call.query), _heads(value, call.query)
        return cls.of(call.query, key, value, seen)


def _filled(x: Tensor, where: Tensor, by: float = 0) -> Tensor:
    """x (B, H, T, D) with `by` in the rows of `where` (B, H, T); x itself if there are none."""
    tracing = torch.compiler.is_compiling() or transformed()
    return x.masked_fill(where[..., None], by) if tracing or where.any() else x


def _heads(x: Tensor, like: Tensor) -> Tensor:
    """x with as many heads as `like`, each head for its group."""
    return repeated(x, like.shape[1] // x.shape[1])


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many heads as the one that has more."""
    heads = max(one.shape[1], other.shape[1])
    return repeated(one, heads // one.shape[1]), repeated(other, heads // other.shape[1])


def _positions(first: int, tokens: int, like: Tensor) -> Tensor:
    return torch.arange(tokens, dtype=torch.float64, device=like.device) + first
