"""SparseK attention: each query sees the tokens near it, and of all before them the k best scored.

Lou et al. 2024, arXiv 2406.16747. A score network reads the tokens, not the queries: u_j is one
number for a token and key head. Of the tokens at distance w and more, query i keeps the k largest
u_j, and weighs them by the projection p_i of `operator.py`, through which the network learns; the
formulas stand in `pairs.py`. As u_j does not hang on the query, what once falls out never comes
back, so that a decoder holds k + w keys and values, whatever it has read (`stream.py`; the scores
with p > 0, that tau hangs on, are beside them, and are many where they lie close), and a whole
sequence is walked in O(T (k + w)) (`chunks.py`).

What could be read of the paper are its abstract, reviews and second-hand code; not given there, and
decided here:

- `couple`: what p scales. "kv", keys and values, is the paper's form, and the one that learns our
  needle task with every seed; "v" and "log" are ours.
- Scores are centred and divided by their deviation over the tokens so far ("timestep
  normalisation" in the paper), then multiplied by a learned `score_scale`, 2 at the start: with a
  deviation of 1 to 4 there are fractions, which alone have gradients, and ones.
- Alone, a system has no token to read, but its key: u = a . k, with a learned and shared by all
  heads. `SparseKAttention` has the network on the token itself.
- Equal scores: the later token is kept.
- `linear`: the tokens that are left out go to a linear attention (elu + 1) whose output is added
  with a learned factor for each head, 0 at the start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax import blocks
from aftermax.attention import IMPLS
from aftermax.blocks import no_autocast
from aftermax.call import check_inputs, complete, finite_rows
from aftermax.entry import Entry, Laws
from aftermax.linear.separable import wide
from aftermax.linear.walk import repeated, walk
from aftermax.modules import Attention
from aftermax.reference import onnx_export, transformed
from aftermax.scores import inv_sqrt_dim
from aftermax.sparse.chunks import selected
from aftermax.sparse.pairs import COUPLES, Couple, normalised, shares, weigh
from aftermax.sparse.state import Read, SparseKState, advanced, empty_state, merged
from aftermax.sparse.stream import lives
from aftermax.visible import Visible, check_tokens, hidden_below, pieces, refuse_mask

FORMS = ("dense", "chunked")

EPSILON = 1e-5
"""Beside the variance of the scores."""


@dataclass(frozen=True)
class SparseK:
    """The system: k selected tokens beside a window, in O(T (k + w)) where the call is causal and
    all queries see the same tokens, else in O(T^2), over pairs.

    Args:
        k: tokens that a query selects.
        window: w, the nearest tokens, itself included, that it sees in any case; 0 = none.
        couple: what p scales, see `pairs.py`.
        normalise: scores by the mean and deviation of those so far. Without it two pieces that
            were read apart can be merged.
        linear: whether what is left out goes to a linear attention.
        max_support: most scores that are remembered with p > 0, in the chunked form and in
            decoding; None = all, which scores that lie close can make as many as tokens. Beyond
            it p is approximate there, and not what the dense form gives; `SparseKState.capped`
            says that it was so.

    >>> system = SparseK(k=2, window=1)
    >>> query = torch.randn(1, 1, 6, 4)
    >>> out = system.attend(query, query, query, Visible(causal=True))
    >>> state = system.init_state(1, 1, 4, 4)
    >>> last, state = system.step(query, query, query, state, Visible(causal=True))
    >>> torch.allclose(out, last, atol=1e-6), state.slot_key.shape[2] + state.ring_key.shape[2]
    (True, 3)
    """

    k: int
    window: int
    couple: Couple = "kv"
    normalise: bool = True
    linear: bool = False
    max_support: int | None = None

    can_truncate: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = True

    def __post_init__(self):
        if self.k < 1 or self.window < 0:
            raise ValueError(f"k must be at least 1 and window 0, got {self.k} and {self.window}")
        if self.couple not in COUPLES:
            raise ValueError(f"couple must be one of {', '.join(COUPLES)}, got {self.couple!r}")
        if self.max_support is not None and self.max_support < self.k:
            raise ValueError(f"max_support must be at least k = {self.k}, got {self.max_support}")

    @property
    def can_merge(self) -> bool:
        """Scores that are normalised hang on all tokens before."""
        return not self.normalise

    def learned(self, heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        """The score's weights of the key, its scale, and the factor of what is left out."""
        scores = {
            "score_key": torch.full((key_dim,), inv_sqrt_dim(key_dim)),
            "score_scale": torch.full((1,), 2.0),
        }
        return scores | ({"mix": torch.zeros(heads)} if self.linear else {})

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Visible,
        *,
        scores: Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        dropout_p: float = 0.0,
        impl: str | None = None,
        form: str | None = None,
        **learned: Tensor,
    ) -> Tensor:
        """All at once: (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv) -> (B, H, Tq, Dv).

        Args:
            scores: (B, Hkv, Tk), what a score network says of the tokens; None = of the keys.
            form: "dense" (pairs, any mask) or "chunked" (causal, and all queries see the same
                tokens); None picks. What is traced, by torch.compile say, takes the dense form.
            impl: in the chunked form, the way of the attention over the selected keys.

        Raises:
            ValueError: for shapes, dtypes, a form or an impl that do not fit, and for dropout in
                the chunked form.
            RuntimeError: for `impl="cpu"` in the dense form, and where the kernel cannot.
        """
        call = self._checked(
            query, key, value, visible, scores, scale, enable_gqa, dropout_p, impl, learned
        )
        refusal = self._why_dense(call)
        if form not in (None, *FORMS):
            raise ValueError(f"form={form!r} is none of {', '.join(map(repr, FORMS))}")
        if form == "chunked" and refusal is not None:
            raise ValueError(f"SparseK: form='chunked', but {refusal}")
        dense = form == "dense" or refusal is not None
        if dense and impl == "cpu":
            raise RuntimeError(f"SparseK: impl='cpu', but {refusal or 'the dense form was asked'}")
        with no_autocast(query.device):
            if dense:
                return self._in_pairs(call).to(query.dtype)
            batch, kv_heads, _, width = key.shape
            factory = {"device": key.device, "dtype": key.dtype}
            state = self.init_state(batch, kv_heads, width, value.shape[-1], **factory)
            return self._walk(call, state)[0].to(query.dtype)

    def init_state(
        self,
        batch: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        start: int = 0,
        **factory: Any,
    ) -> SparseKState:
        """The state before the first token, which stands at `start`: no keys."""
        dtype = wide(factory.get("dtype") or torch.get_default_dtype())
        device = factory.get("device")
        return empty_state(
            (batch, kv_heads, key_dim, value_dim), start, self.linear, dtype=dtype, device=device
        )

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: SparseKState,
        visible: Visible,
        seen: Tensor | None = None,
        *,
        scores: Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        dropout_p: float = 0.0,
        impl: str | None = None,
        form: str | None = None,
        **learned: Tensor,
    ) -> tuple[Tensor, SparseKState]:
        """The next tokens, one or many, after what `state` holds: (out, new state).

        Raises:
            ValueError: as `attend`, for masks (`seen` says which tokens are real), and for what
                is not the system's own window.
        """
        refuse_mask(visible)
        if visible.window is not None or visible.slopes is not None or not visible.causal:
            raise ValueError("step of SparseK is causal, with its own window and without ALiBi")
        mask = None
        if seen is not None:
            check_tokens("seen", seen, key.shape[0], key.shape[-2])
            mask = seen[:, None, None]
        visible = replace(visible, mask=mask, offset=0)  # the state knows how many there were
        call = self._checked(
            query, key, value, visible, scores, scale, enable_gqa, dropout_p, impl, learned
        )
        if dropout_p > 0:
            raise ValueError("SparseK: decoding has no dropout")
        if state.flawed.shape != key.shape[:2]:
            raise ValueError(
                f"the state is of (B, Hkv) = {tuple(state.flawed.shape)}, the key of "
                f"{tuple(key.shape[:2])}"
            )
        with no_autocast(query.device):
            out, state = self._walk(call, state)
        return out.to(query.dtype), state

    def merge(self, first: SparseKState, second: SparseKState) -> SparseKState:
        """The state after two pieces, the second read from `start=first.length`: the union of what
        they kept meets the threshold of both. Exact, as what p > 0 the union has, one of them has.

        Raises:
            ValueError: where scores are normalised, and where the pieces do not meet.
        """
        if not self.can_merge:
            raise ValueError(
                "SparseK with normalise=True cannot join two pieces read apart: the second's scores"
                " hang on the mean of the first's"
            )
        return merged(first, second, self.k, self.window, self.max_support)

    def explain(self, query: Tensor, key: Tensor, value: Tensor, visible: Visible) -> str:
        """Which way `attend` goes for these tensors, and if it is not the short one, why.

        >>> x = torch.zeros(1, 1, 3, 4)
        >>> SparseK(k=2, window=1).explain(x, x, x, Visible())
        'reference: pairs, O(T^2): the call is not causal'
        """
        call = self._checked(query, key, value, visible, None, None, True, 0.0, None, {})
        refusal = self._why_dense(call)
        if refusal is not None:
            return f"reference: pairs, O(T^2): {refusal}"
        return f"chunked, O(T (k + w)), k + w = {self.k + self.window}"

    # ---- the call ----

    def _checked(
        self, query, key, value, visible, scores, scale, enable_gqa, dropout_p, impl, learned
    ) -> _Call:
        if not 0 <= dropout_p <= 1:
            raise ValueError(f"dropout_p is a probability, got {dropout_p}")
        if impl not in (None, *IMPLS):
            raise ValueError(f"impl={impl!r} is none of {', '.join(map(repr, IMPLS))}")
        if not query.ndim == key.ndim == value.ndim == 4:
            raise ValueError(
                f"query, key and value must be (B, H, T, D), got {tuple(query.shape)},"
                f" {tuple(key.shape)}, {tuple(value.shape)}"
            )
        check_inputs(query, key, value, enable_gqa)
        batch, heads, queries, width = query.shape
        visible.check(batch, heads, queries, key.shape[-2])
        if scores is not None and scores.shape != key.shape[:3]:
            raise ValueError(
                f"scores must be (B, Hkv, T) = {tuple(key.shape[:3])}, got {tuple(scores.shape)}"
            )
        learned = complete(
            "SparseK", self.learned(heads, width, value.shape[-1]), learned, query.device
        )
        query, key, value = (x.to(wide(x.dtype)) for x in (query, key, value))
        scale = inv_sqrt_dim(width) if scale is None else scale
        flawed = ~(finite_rows(key) & finite_rows(value))
        if scores is None:  # of what is finite: the weights' gradients are sums over all tokens
            with no_autocast(query.device):
                of_key = key.masked_fill(flawed[..., None], 0)
                scores = of_key @ learned["score_key"].to(key.dtype)
        flawed = flawed | ~scores.isfinite()
        return _Call(
            query, key, value, scores.to(key.dtype), flawed, visible, scale, dropout_p, impl,
            learned,
        )  # fmt: skip

    def _why_dense(self, call: _Call) -> str | None:
        visible = call.visible
        if not visible.causal:
            return "the call is not causal"
        if visible.offset or call.query.shape[2] != call.key.shape[2]:
            return "the queries are not those of all keys from the first on"
        if visible.differs_by_query() or visible.slopes is not None:
            return "the visible keys differ from query to query, or ALiBi adds to the scores"
        if call.query.is_meta:
            return "the device is meta, and there are no scores to walk over"
        if call.dropout_p > 0:
            return "only the dense form has weights that dropout_p could drop"
        if torch.compiler.is_compiling() or transformed() or onnx_export():
            return "it is traced, or transformed"
        mask = visible.mask
        if mask is not None and mask.ndim > 2 and mask.shape[-3] > 1:
            return "the visible keys differ from head to head"
        if mask is not None and mask.is_floating_point():
            hides = mask <= hidden_below(mask.dtype)
            if mask.requires_grad or not bool((hides | (mask == 0)).all()):
                return "a mask adds to the scores"
        return None

    # ---- over pairs ----

    def _in_pairs(self, call: _Call) -> Tensor:
        heads, keys = call.query.shape[1], call.key.shape[2]
        clean = call.without_flaws()
        key, value, scores, flawed = (
            repeated(x, heads // x.shape[1])
            for x in (clean.key, clean.value, clean.scores, call.flawed)
        )
        sound = finite_rows(call.query)
        query = call.query.masked_fill(~sound[..., None], 0)
        rows = max(1, blocks.BLOCK_SCORES // max(1, query.shape[0] * heads * keys))
        out = []
        for start, stop in pieces(query.shape[2], rows):
            seen = call.visible.rows(start, stop, (0, keys), query.device, query.dtype)
            there = seen.visible
            close = seen.distance.abs() < self.window
            near, far = there & close, there & ~close
            u = scores[:, :, None]
            if self.normalise:
                counted = there & ~flawed[:, :, None]
                u = normalised(u, counted, EPSILON, call.visible.causal)
            u = self._scaled(u, call)
            share, kept = shares(u, near, far, self.k)
            products = call.scale * (query[:, :, start:stop] @ key.mT)
            products = products.masked_fill(~kept, 0)
            if self.couple == "kv":
                products = products * share
            added = torch.zeros_like(kept[..., :1])
            if seen.bias is not None:
                added = (seen.bias.isnan() & there).any(-1, keepdim=True)
                products = products + seen.bias.masked_fill(added, 0)
            some = weigh(products, value, share, kept, self.couple, call.dropout_p)
            if self.linear:
                some = some + self._left_out(query[:, :, start:stop], key, value, far & ~kept, call)
            see_flaws = (there & (flawed[:, :, None] | ~sound[:, :, start:stop, None])).any(-1)
            out.append(some.masked_fill(see_flaws[..., None] | added, torch.nan))
        return torch.cat(out, 2) if len(out) > 1 else out[0]

    def _scaled(self, scores: Tensor, call: _Call) -> Tensor:
        return scores * call.learned["score_scale"].to(scores.dtype)

    def _left_out(
        self, query: Tensor, key: Tensor, value: Tensor, there: Tensor, call: _Call
    ) -> Tensor:
        weights = (features(query) @ features(key).mT).masked_fill(~there, 0)
        total = weights.sum(-1, keepdim=True)
        mix = call.learned["mix"].to(query.dtype)[:, None, None]
        return mix * (weights @ value) / total.masked_fill(total == 0, 1)

    # ---- in chunks, and token by token ----

    def _walk(self, call: _Call, state: SparseKState) -> tuple[Tensor, SparseKState]:
        batch, kv_heads, tokens, _ = call.key.shape
        heads = call.query.shape[1]
        if tokens == 0:
            return call.query.new_zeros(*call.query.shape[:3], call.value.shape[-1]), state
        seen = call.seen_tokens(batch)
        clean = call.without_flaws(seen[:, None])
        real = (seen[:, None] & ~call.flawed).double()
        u, statistics = self._scores(clean.scores, real, state.statistics)
        u = self._scaled(u, call)
        read = Read(clean.key, clean.value, u, seen)
        found = state.joined(read, self.k, self.window)
        lived = lives(
            found.offered.double(), self.k, self.k, carried=found.carried, cap=self.max_support or 0
        )
        items = found.items(lived)
        sound = finite_rows(call.query)
        query = call.query.masked_fill(~sound[..., None], 0)
        rows = query.unflatten(1, (kv_heads, heads // kv_heads)).flatten(0, 1)  # (R, G, T, D)
        out = selected(rows, items, self.couple, call.scale, call.impl)
        out = out.unflatten(0, (batch, kv_heads)).flatten(1, 2)
        new = advanced(state, found, lived, read, self.k, self.window)
        if self.linear:
            added, sums = self._walk_left_out(query, found.evicted(lived), state, call)
            out, new = out + added, replace(new, sums=sums)
        flaws = seen[:, None] & call.flawed
        flaws = (flaws.to(torch.int32).cumsum(-1) > 0) | state.flawed[..., None]
        count = state.count[:, None] + seen.to(torch.int64).cumsum(-1)
        bad = repeated(flaws, heads // kv_heads) | (~sound & (count[:, None] > 0))
        new = replace(new, statistics=statistics, flawed=flaws[..., -1], count=count[:, -1])
        return out.masked_fill(bad[..., None], torch.nan), new

    def _scores(self, scores: Tensor, real: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The scores, normalised over the tokens so far, and count, sum and sum of squares."""
        wide = scores.double()
        sums = torch.stack([real, real * wide, real * wide.square()], -1).cumsum(-2)
        sums = sums + before[:, :, None]
        if not self.normalise:
            return scores, sums[:, :, -1]
        number = sums[..., 0].clamp_min(1)
        mean = sums[..., 1] / number
        variance = (sums[..., 2] / number - mean.square()).clamp_min(0)
        return ((wide - mean) / (variance + EPSILON).sqrt()).to(scores.dtype), sums[:, :, -1]

    def _walk_left_out(
        self, query: Tensor, evicted: tuple[Tensor, Tensor, Tensor], state: SparseKState, call
    ) -> tuple[Tensor, Tensor]:
        """The token that falls out at a query is the one that a causal sum takes in there."""
        key, value, there = evicted
        key = features(key).masked_fill(~there[..., None], 0)
        shape = state.flawed.shape
        key, value = (x.unflatten(0, shape) for x in (key, value))
        walked = walk(features(query), key, value, state=state.sums, totals=True, impl=call.impl)
        assert walked.total is not None
        total = walked.total.masked_fill(walked.total == 0, 1)[..., None]
        mix = call.learned["mix"].to(query.dtype)[:, None, None]
        return mix * walked.out / total, walked.state


def features(x: Tensor) -> Tensor:
    """elu + 1, of what is left out."""
    return F.elu(x) + 1


class SparseKAttention(Attention):
    """`Attention` whose tokens are scored by a network that reads them: u_j = s_phi(x_j), one
    number for each key head.

    Args:
        weights: the system with its k and window.
        score: "linear", W x, or "mlp", W gelu(V x) of the tokens' width. How large the paper's
            network is could not be read; no bias, as p is the same for u and u + c.

    The others are those of `Attention`. At the start W is normal with deviation 1 / sqrt(width);
    scores are normalised after it, unless the system says otherwise.

    >>> import torch
    >>> attend = SparseKAttention(32, heads=4, weights=SparseK(k=2, window=2))
    >>> x = torch.randn(2, 9, 32)
    >>> state = attend.init_state(2)
    >>> first, state = attend.step(x[:, :5], state)
    >>> rest, state = attend.step(x[:, 5:], state)
    >>> torch.allclose(torch.cat([first, rest], 1), attend(x), atol=1e-5)
    True
    >>> state.slot_position.shape, int(state.slot_position.max()) < 7
    (torch.Size([2, 4, 2]), True)
    """

    system: SparseK

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        weights: SparseK,
        score: Literal["linear", "mlp"] = "linear",
        **options: Any,
    ):
        if not isinstance(weights, SparseK):
            raise TypeError(
                f"SparseKAttention needs weights=SparseK(k=..., window=...), got {weights!r}"
            )
        super().__init__(width, heads, weights=weights, **options)
        del self.learned["score_key"]  # the network has its place
        factory = {name: options.get(name) for name in ("device", "dtype")}
        if score == "linear":
            self.score: nn.Module = nn.Linear(width, self.kv_heads, bias=False, **factory)
        elif score == "mlp":
            self.score = nn.Sequential(
                nn.Linear(width, width, bias=False, **factory),
                nn.GELU(),
                nn.Linear(width, self.kv_heads, bias=False, **factory),
            )
        else:
            raise ValueError(f"score must be 'linear' or 'mlp', got {score!r}")
        for layer in self.score.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=width**-0.5)

    def of_tokens(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.scores(x)}

    def scores(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, Hkv, T), before they are normalised."""
        return self.score(x).transpose(1, 2)


@dataclass(frozen=True)
class _Call:
    """A call, checked: in at least float32."""

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor  # (B, Hkv, T)
    flawed: Tensor  # bool (B, Hkv, T): key, value or score is not finite
    visible: Visible
    scale: float
    dropout_p: float
    impl: str | None
    learned: dict[str, Tensor]

    def without_flaws(self, seen: Tensor | None = None) -> _Call:
        """0 for what is not finite, and for tokens that are not `seen`."""
        nothing = self.flawed if seen is None else self.flawed | ~seen
        key, value = (x.masked_fill(nothing[..., None], 0) for x in (self.key, self.value))
        return replace(self, key=key, value=value, scores=self.scores.masked_fill(nothing, 0))

    def seen_tokens(self, batch: int) -> Tensor:
        """bool (B, T)"""
        mask = self.visible.mask
        if mask is None:
            return torch.ones(batch, self.key.shape[2], dtype=torch.bool, device=self.key.device)
        if mask.dtype != torch.bool:
            mask = mask > hidden_below(mask.dtype)
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))[:, 0, 0]
        return mask.expand(batch, self.key.shape[2])


ENTRY = Entry(
    name="sparsek",
    title="SparseK",
    system=SparseK(k=16, window=16),
    formula="p_ij e^(p_ij q·k_j) / Σ, p = clip(u − τ, 0, 1), Σp = k",
    paper="Lou et al. 2024",
    arxiv="2406.16747",
    score="dot",
    positivity="exp",
    normaliser="row sum",
    reweight="projection of scores onto k",
    walk="selected keys",
    laws=Laws(rows_at_most_one=True),
    exceptions={
        "key_order": "which keys are near is a matter of their places",
        "length_aware": "a key that a large negative term pushes away keeps its place among the k",
    },
    module=SparseKAttention,
    claim="Linear time, constant memory in generation, better than other sparse attention.",
)
