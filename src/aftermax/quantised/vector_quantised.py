"""Softmax attention over vector-quantised keys: exact, in linear time, from a state of one size.

The attention of LongVQ (Liu et al., arXiv 2404.11163, IJCAI 2024), in the form that Transformer-VQ
(Lingle, arXiv 2309.16354) gave it::

    z_j = argmin_s ‖k_j - C_s‖²                       S codes for each head
    l_ij = scale q_i.C_{z_j} + [|i - j| < w] b_{|i - j|}
    out_i = sum_j softmax_j(l_ij) v_j

Keys further back than the window w differ by their code alone, so that all of a code are one term,

    n_s exp(scale q_i.C_s) mean_s,    n_s of them with the mean value mean_s,

and the sum takes O(T (S + w)) instead of O(T²): the same number, not an approximation of it. What
is approximated is the key. Keys are never kept: a state has S sums and counts, and the codes and
values of the last w - 1 tokens.

Of the paper's own text only the abstract could be read; that its keys are quantised by a codebook,
with a bias for near tokens, is known from summaries of it. What is said of a window here, and of
the softmax (Mega, on which the paper builds, has others too), is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from aftermax import scores
from aftermax.blocks import no_autocast
from aftermax.call import check_inputs, complete, finite_rows
from aftermax.linear.walk import repeated
from aftermax.quantised.codebook import nearest, start_of
from aftermax.quantised.memory import Keys, Memory, Walk
from aftermax.reference import onnx_export
from aftermax.state import bytes_of, check_meeting, rows_of
from aftermax.visible import Visible, check_tokens, refuse_mask


@dataclass(frozen=True)
class CodeState:
    """All that is kept of the tokens so far: its size does not depend on how many they are.

    Hc is the heads of the codebook, as soon as a token has been read; before, those of the keys.
    """

    sums: Tensor  # (B, Hc, S, Dv): the values of each code, of tokens before the window
    counts: Tensor  # int64 (B, Hc, S): how many they are
    codes: Tensor  # int16, or int32 for many codes (B, Hc, w - 1): of the last tokens
    value: Tensor  # (B, Hc, w - 1, Dv)
    seen: Tensor  # bool (B, w - 1), False where there is no token yet
    flawed: Tensor  # bool (B, Hc): whether a token was not finite
    count: Tensor  # int64 (B,): the tokens that may be seen
    length: int
    """Tokens so far, padding included: the position of the next token."""
    start: int = 0
    """Position of the first of them."""
    through: Tensor | None = None
    """(B, Hc, w - 1, D): 0, for the gradients of the last keys; None where none is wanted."""

    @property
    def bytes(self) -> int:
        return bytes_of(self)

    def reorder(self, index: Tensor) -> CodeState:
        return rows_of(self, index)


class _Call(NamedTuple):
    """A call, checked: in at least float32, all that has key heads with those of the codebook."""

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Visible
    scale: float
    codebook: Tensor
    window_bias: Tensor
    codes: Tensor | None

    def wants_key_gradient(self) -> bool:
        return torch.is_grad_enabled() and self.key.requires_grad


@dataclass(frozen=True)
class VectorQuantised:
    """Softmax over vector-quantised keys, as a system.

    Learned are the `codebook`, (H, S, D) or one for each key head (Hkv, S, D), which starts
    Gaussian and the same for every head; and `window_bias`, (H, w), which starts at 0 (both starts
    are ours). `LongVQAttention` has a codebook that follows the keys instead.

    Gradients: a key chooses a code, which no derivative sees. To near queries (nearer than w) a key
    is C_z + k - sg(k), the straight-through estimator, sg being the identity without a gradient;
    to others it is its code, C_z, as in the authors' code of Transformer-VQ. The codebook's, the
    bias's, the query's and the value's are the derivatives for the codes as they are.

    Not causal, the window reaches to both sides, with one bias for a distance, and all other keys
    are in the memory: our extension, since neither paper has such a form.

    Args:
        codes: S, 64. The papers' sizes are not known or large (Transformer-VQ: 512): ours.
        window: w, 64, in tokens (Transformer-VQ: blocks of 512); at least 1, which is itself.

    A window of `Visible` (`window=`), a mask that differs from query to query or adds to the
    scores, and ALiBi are summed pair by pair, in O(T²).

    >>> system = VectorQuantised(codes=8, window=4)
    >>> x = torch.randn(1, 2, 50, 16)
    >>> state = system.init_state(1, 2, 16, 16)
    >>> out, state = system.step(x, x, x, state, Visible(causal=True))
    >>> torch.allclose(out, system.attend(x, x, x, Visible(causal=True)), atol=1e-6)
    True
    >>> state.length, state.bytes
    (50, 1561)
    """

    codes: int = 64
    window: int = 64

    can_truncate: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = True
    can_merge: ClassVar[bool] = True

    def __post_init__(self):
        if self.codes < 1 or self.window < 1:
            raise ValueError(
                f"VectorQuantised needs codes >= 1 and window >= 1, got {self.codes} and "
                f"{self.window}"
            )

    def learned(self, heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        """Initial values of the codebook (H, S, D) and of the bias of the window (H, w)."""
        return {
            "codebook": start_of(self.codes, key_dim).repeat(heads, 1, 1),
            "window_bias": torch.zeros(heads, self.window),
        }

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
        codes: Tensor | None = None,
        **learned: Tensor,
    ) -> Tensor:
        """All at once: (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv) -> (B, H, Tq, Dv).

        Args:
            scale: of the scores; None = 1/sqrt(D).
            codes: int64 (B, Hc, Tk), z where it is known already; None = the nearest.

        Raises:
            ValueError: for shapes, dtypes, masks or codes that do not fit, and for dropout: the
                weights of a code's keys cannot be dropped one by one.
            RuntimeError: for `impl="cpu"`: there is no kernel.
        """
        call = self._checked(
            query, key, value, visible, scale, enable_gqa, dropout_p, impl, codes, learned
        )
        seen = self._same_for_all(visible)
        with no_autocast(query.device):
            if seen is None:
                out = self._walk(call, self._keys(call, _ones(call.key)), visible).pair_by_pair()
            else:
                keys = self._keys(call, seen.to(query.device))
                walk = self._walk(call, keys, replace(visible, mask=None))
                out, _ = walk.with_memory(self._nothing(call))
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
    ) -> CodeState:
        """The state before the first token, which stands at `start`; sums in float32 or better."""
        dtype = factory.get("dtype") or torch.get_default_dtype()
        device, held = factory.get("device"), self.window - 1
        dtype = torch.promote_types(dtype, torch.float32)
        memory = Memory.empty(batch, kv_heads, self.codes, value_dim, dtype=dtype, device=device)
        return CodeState(
            memory.sums,
            memory.counts,
            torch.zeros(batch, kv_heads, held, dtype=self._code_dtype, device=device),
            torch.zeros(batch, kv_heads, held, value_dim, dtype=dtype, device=device),
            torch.zeros(batch, held, dtype=torch.bool, device=device),
            memory.flawed,
            torch.zeros(batch, dtype=torch.int64, device=device),
            start,
            start,
        )

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: CodeState,
        visible: Visible,
        seen: Tensor | None = None,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        dropout_p: float = 0.0,
        impl: str | None = None,
        codes: Tensor | None = None,
        **learned: Tensor,
    ) -> tuple[Tensor, CodeState]:
        """The next tokens, one or many, after what `state` holds: (out, new state).

        The codebook must be the one that the state was read with: its sums belong to codes.

        Raises:
            ValueError: as `attend`; for masks (`seen`, bool (B, T), tells what later queries may
                see), and for a window and ALiBi, which would tell far keys apart.
        """
        refuse_mask(visible)
        if visible.window is not None or visible.slopes is not None or not visible.causal:
            raise ValueError(
                "step of VectorQuantised is causal, without ALiBi and without a window beside its "
                "own: the keys of a code are told apart no longer"
            )
        call = self._checked(
            query, key, value, visible, scale, enable_gqa, dropout_p, impl, codes, learned
        )
        batch, heads, tokens = call.key.shape[:3]
        if state.count.shape[0] != batch:
            raise ValueError(f"the state is of a batch of {state.count.shape[0]}, the key {batch}")
        if seen is None:
            seen = _ones(call.key)[:, 0].expand(batch, -1)
        check_tokens("seen", seen, batch, tokens)
        state = _with_heads(state, heads)
        with no_autocast(query.device):
            keys = self._keys(call, seen[:, None])
            held = _joined(self._held(state, call), keys)
            visible = replace(visible, offset=self.window - 1)
            out, memory = self._walk(call, held, visible).with_memory(_memory_of(state))
        last = held.part(held.length - self.window + 1, held.length)
        known = torch.cat([state.seen, seen], -1)
        state = CodeState(
            memory.sums,
            memory.counts,
            last.codes.to(self._code_dtype),
            last.value.clone(),  # not as a view that keeps all tokens of this call
            known[:, known.shape[1] - self.window + 1 :].clone(),
            state.flawed | keys.flawed.any(-1),
            state.count + seen.sum(-1),
            state.length + tokens,
            state.start,
            None if last.through is None else last.through.clone(),
        )
        return out.to(query.dtype), state

    def merge(self, first: CodeState, second: CodeState) -> CodeState:
        """The state after two pieces, of which the second was read from a state that began at
        `start=first.length`, with the same codebook. Exact: counts and sums add up.

        Raises:
            ValueError: where the pieces do not meet.
        """
        check_meeting(first, second.start)
        heads = max(first.sums.shape[1], second.sums.shape[1])
        first, second = _with_heads(first, heads), _with_heads(second, heads)
        held = self.window - 1
        new = min(held, second.length - second.start)
        both = _joined(_recent(first), _recent(second).part(held - new, held))
        memory = _memory_of(first).plus(_memory_of(second)).add(both.part(0, new))
        last = both.part(new, new + held)
        return CodeState(
            memory.sums,
            memory.counts,
            last.codes.to(self._code_dtype),
            last.value,
            torch.cat([first.seen[:, new:], second.seen[:, held - new :]], -1),
            memory.flawed,
            first.count + second.count,
            second.length,
            first.start,
            last.through,
        )

    def explain(self, query: Tensor, key: Tensor, value: Tensor, visible: Visible) -> str:
        """Which way `attend` goes for these tensors.

        >>> x = torch.zeros(1, 1, 3, 4)
        >>> VectorQuantised().explain(x, x, x, Visible(causal=True, window=2))
        'reference: pair by pair, O(T^2): queries see different keys, or terms are added to scores'
        """
        if self._same_for_all(visible) is None:
            why = "queries see different keys, or terms are added to scores"
            return f"reference: pair by pair, O(T^2): {why}"
        return "reference: a window and a memory of codes, O(T)"

    # ---- what a call shares ----

    @property
    def _code_dtype(self) -> torch.dtype:
        return torch.int16 if self.codes <= 2**15 else torch.int32

    def _same_for_all(self, visible: Visible) -> Tensor | None:
        """bool (B|1, 1, Tk|1), the keys that may be seen; None where queries or heads differ."""
        mask = visible.mask
        if visible.slopes is not None or visible.differs_by_query() or onnx_export():
            return None
        if mask is None:
            return torch.ones(1, 1, 1, dtype=torch.bool)
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        if mask.dtype != torch.bool or mask.shape[1] > 1:
            return None
        return mask[:, :, 0]

    def _checked(
        self, query, key, value, visible, scale, enable_gqa, dropout_p, impl, codes, learned
    ) -> _Call:
        if not 0 <= dropout_p <= 1:
            raise ValueError(f"dropout_p is a probability, got {dropout_p}")
        if dropout_p > 0:
            raise ValueError(
                f"VectorQuantised weighs the keys of a code together: dropout_p={dropout_p} cannot "
                "drop one of them"
            )
        if impl not in (None, "reference", "cpu"):
            raise ValueError(f"impl={impl!r} is none of 'reference', 'cpu'")
        if impl == "cpu":
            raise RuntimeError("VectorQuantised: impl='cpu', but it has no kernel")
        if not query.ndim == key.ndim == value.ndim == 4:
            raise ValueError(
                f"query, key and value must be (B, H, T, D), got {tuple(query.shape)},"
                f" {tuple(key.shape)}, {tuple(value.shape)}"
            )
        check_inputs(query, key, value, enable_gqa)
        (batch, heads, queries, width), kv_heads, tokens = query.shape, key.shape[1], key.shape[2]
        visible.check(batch, heads, queries, tokens)
        given = self._completed(query, key, value, learned)
        codebook = given["codebook"]
        groups = codebook.shape[0] // kv_heads
        if codes is not None and (
            codes.dtype != torch.int64 or tuple(codes.shape) != (batch, groups * kv_heads, tokens)
        ):
            raise ValueError(
                f"codes must be int64 (B, Hc, Tk) = {(batch, groups * kv_heads, tokens)}, got "
                f"{codes.dtype} of shape {tuple(codes.shape)}"
            )
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key, value = (x.to(wide) for x in (query, key, value))
        return _Call(
            query,
            repeated(key, groups),
            repeated(value, groups),
            visible,
            scores.inv_sqrt_dim(width) if scale is None else scale,
            codebook.to(wide),
            given["window_bias"].to(wide),
            codes,
        )

    def _completed(self, query, key, value, learned: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is learned; the codebook may be one for each key head."""
        initial = self.learned(query.shape[1], key.shape[-1], value.shape[-1])
        of_keys = initial["codebook"][: key.shape[1]]
        book = learned.get("codebook")
        if book is None or book.shape == of_keys.shape:
            initial["codebook"] = of_keys
        return complete("VectorQuantised", initial, learned, query.device)

    def _keys(self, call: _Call, seen: Tensor) -> Keys:
        """`seen`: bool (B|1, 1, T), what any query may see."""
        flawed = ~(finite_rows(call.key) & finite_rows(call.value))
        nothing = flawed | ~seen
        key = call.key.masked_fill(nothing[..., None], 0)
        codes = nearest(key, call.codebook) if call.codes is None else call.codes
        return Keys(
            codes,
            call.value.masked_fill(nothing[..., None], 0),
            seen.expand(-1, -1, key.shape[2]),
            flawed & seen,
            key - key.detach() if call.wants_key_gradient() else None,
        )

    def _walk(self, call: _Call, keys: Keys, visible: Visible) -> Walk:
        sound = finite_rows(call.query)
        query = call.query.masked_fill(~sound[..., None], 0) * call.scale
        return Walk(query, sound, keys, visible, call.codebook, call.window_bias)

    def _nothing(self, call: _Call) -> Memory:
        batch, heads = call.key.shape[:2]
        factory = {"dtype": call.value.dtype, "device": call.value.device}
        return Memory.empty(batch, heads, self.codes, call.value.shape[-1], **factory)

    def _held(self, state: CodeState, call: _Call) -> Keys:
        recent = _recent(state)
        return replace(recent, value=recent.value.to(call.value.dtype))


def _ones(key: Tensor) -> Tensor:
    return torch.ones(1, 1, key.shape[2], dtype=torch.bool, device=key.device)


def _recent(state: CodeState) -> Keys:
    codes = state.codes.to(torch.int64)
    return Keys(
        codes,
        state.value,
        state.seen[:, None],
        torch.zeros_like(codes, dtype=torch.bool),  # the state's own mark stands for all
        state.through,
    )


def _memory_of(state: CodeState) -> Memory:
    return Memory(state.sums, state.counts, state.flawed)


def _joined(first: Keys, second: Keys) -> Keys:
    through = None
    if first.through is not None or second.through is not None:
        through = torch.cat([_through(first, second), _through(second, first)], -2)
    shape = second.codes.shape
    return Keys(
        torch.cat([first.codes, second.codes], -1),
        torch.cat([first.value, second.value], -2),
        torch.cat([first.seen.expand(first.codes.shape), second.seen.expand(shape)], -1),
        torch.cat([first.flawed, second.flawed], -1),
        through,
    )


def _through(keys: Keys, like: Keys) -> Tensor:
    if keys.through is not None:
        return keys.through
    assert like.through is not None
    return like.through.new_zeros(*keys.codes.shape, like.through.shape[-1])


def _with_heads(state: CodeState, heads: int) -> CodeState:
    """A state that was begun with the heads of the keys, with those of the codebook."""
    groups = heads // state.sums.shape[1]
    if groups == 1:
        return state
    names = ("sums", "counts", "codes", "value", "flawed")
    return replace(state, **{name: repeated(getattr(state, name), groups) for name in names})
