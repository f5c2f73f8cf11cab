"""LongVQ as a layer: a damped memory, from which keys, queries and gates come, and codes for keys.

Liu et al., "LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory", arXiv
2404.11163 (IJCAI 2024). Its text could not be read beyond the abstract; what is known of it is that
its keys are quantised by a codebook, with a bias for near tokens, behind a structured memory, and
that it builds on Transformer-VQ (arXiv 2309.16354) and Mega (arXiv 2209.10655). How the parts are
joined here is therefore a composition of those two, whose parts are theirs::

    M = silu(EMA(x) + ω x)                               `ema.DampedEMA`
    z = silu(M W_z),  v = silu(x W_v)                    shared by queries and keys; values
    q = norm(κ_q z + μ_q),  k = norm(κ_k z + μ_k)
    o = softmax over the quantised keys                  `VectorQuantised`
    r = silu(M W_r),  u = sigmoid(M W_u),  h = M W_h
    out = u (silu(h + (r o) W_o) - x)

so that x + out = u ĥ + (1 - u) x, Mega's gated update, where x is added around it. In a pre-norm
block the x that is subtracted is the normed one, where the authors of Mega take the one before the
norm: a layer that is called as `Attention` is does not see that one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax.entry import Entry, Laws
from aftermax.modules import Attention
from aftermax.quantised.codebook import Codebook, Diagnostics, gathered, nearest
from aftermax.quantised.ema import DampedEMA, MemoryState
from aftermax.quantised.vector_quantised import CodeState, VectorQuantised
from aftermax.visible import Visible, check_tokens


@dataclass(frozen=True)
class LongVQState:
    """All that a layer keeps of the tokens so far: of one size, however many they are."""

    codes: CodeState
    memory: MemoryState
    primed: bool = False
    """Whether it began with the memory of what came before."""

    @property
    def length(self) -> int:
        """Tokens so far, padding included: the position of the next token."""
        return self.codes.length

    @property
    def bytes(self) -> int:
        return self.codes.bytes + self.memory.bytes

    def reorder(self, index: Tensor) -> LongVQState:
        return LongVQState(self.codes.reorder(index), self.memory.reorder(index), self.primed)


class LongVQAttention(Attention):
    """Mega's gated attention over quantised keys; its formulas stand at the head of the file.

    The codebook, one for each key head, is no parameter: in training mode it follows the keys, once
    for each forward pass and after it, from a start by k-means of the first batch (`Codebook`); in
    evaluation, and in `step`, it rests. The trainer adds `auxiliary_loss()` to its loss.

    Args:
        width, heads, kv_heads, head_dim, causal, bias, scale, impl: as in `Attention`; `bias` is
            that of z, v and o, the gates have one, as Mega's.
        weights: the `VectorQuantised`, with its numbers of codes and of tokens in the window.
        positions: "none": the bias of the window and the memory tell where a key is. Rotary
            positions may stand before the quantiser; ALiBi may not.
        qk_norm: a learned gain after the RMSNorm that queries and keys have in any case, so that
            one scale of codes fits (Transformer-VQ, which has a LayerNorm there).
        memory_dims: N of the memory, 16 (Mega).
        commitment: weight of the commitment loss, 0.25 (arXiv 1711.00937, equation 3).
        decay, dead, k_means_steps: of the `Codebook`.
        window, dropout: None and 0.0; another window than the system's would tell the keys of a
            code apart, and the weights of a code's keys cannot be dropped one by one.

    Where causal is False the memory runs from both ends. With `torch.compile` the following of the
    codebook is a break in the graph, in training mode alone. Activation checkpointing runs the
    forward pass twice, with two codebooks: leave this layer out of it. Under data parallelism
    every process follows its own keys, unless buffers are broadcast, which makes it those of the
    first.

    >>> attend = LongVQAttention(32, heads=4, weights=VectorQuantised(codes=16, window=8))
    >>> x = torch.randn(2, 30, 32)
    >>> loss = attend(x).square().mean() + attend.auxiliary_loss()
    >>> attend = attend.eval()
    >>> first, state = attend.step(x[:, :13], attend.init_state(2))
    >>> rest, state = attend.step(x[:, 13:], state)
    >>> torch.allclose(torch.cat([first, rest], 1), attend(x), atol=1e-5)
    True
    """

    can_truncate: ClassVar[bool] = False  # type: ignore[assignment]
    can_merge: ClassVar[bool] = False  # type: ignore[assignment]
    """Keys are read from the memory of all that came before: see `merge`."""

    system: VectorQuantised  # type: ignore[assignment]

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        weights: VectorQuantised = VectorQuantised(),  # noqa: B008, a frozen value
        positions: Any = "none",
        qk_norm: bool = False,
        window: int | None = None,
        dropout: float = 0.0,
        memory_dims: int = 16,
        commitment: float = 0.25,
        decay: float = 0.99,
        dead: float = 0.02,
        k_means_steps: int = 10,
        device=None,
        dtype=None,
        **options: Any,
    ):
        if not isinstance(weights, VectorQuantised):
            raise TypeError(f"LongVQAttention attends with a VectorQuantised, got {weights!r}")
        if window is not None or dropout:
            raise ValueError(
                "LongVQAttention has the window of its system and no dropout on weights, got "
                f"window={window} and dropout={dropout}"
            )
        if commitment < 0:
            raise ValueError(f"commitment is a weight of at least 0, got {commitment}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            width,
            heads,
            weights=weights,
            positions=positions,
            qk_norm=qk_norm,
            **options,
            **factory,
        )
        if self.slopes is not None:
            raise ValueError("ALiBi would tell the keys of a code apart; give other positions")
        del self.to_query, self.learned["codebook"]  # to_key is W_z, of both
        inner = heads * self.head_dim
        self.memory = DampedEMA(width, memory_dims, bidirectional=not self.causal, **factory)
        self.to_reset = nn.Linear(width, inner, **factory)
        self.to_update = nn.Linear(width, width, **factory)
        self.to_hidden = nn.Linear(width, width, **factory)
        for gate in (self.to_reset, self.to_update, self.to_hidden):
            nn.init.zeros_(gate.bias)
        # drawn 50 times as large as Mega's, which has no norm behind them
        shapes = {"query": heads, "key": self.kv_heads}
        self.gain = nn.ParameterDict(
            {
                n: nn.Parameter(torch.randn(h, 1, self.head_dim, **factory))
                for n, h in shapes.items()
            }
        )
        self.shift = nn.ParameterDict(
            {
                n: nn.Parameter(torch.zeros(h, 1, self.head_dim, **factory))
                for n, h in shapes.items()
            }
        )
        if not qk_norm:
            self.query_norm = nn.RMSNorm(self.head_dim, elementwise_affine=False)
            self.key_norm = nn.RMSNorm(self.head_dim, elementwise_affine=False)
        self.codebook = Codebook(
            self.kv_heads,
            weights.codes,
            self.head_dim,
            decay=decay,
            dead=dead,
            k_means_steps=k_means_steps,
            **factory,
        )
        self.commitment = commitment
        self._committed: Tensor | None = None

    def forward(self, x: Tensor, visible: Tensor | Visible | None = None) -> Tensor:
        """A whole sequence (B, T, width).

        Args:
            visible: None; a bool (B, T) mask of the tokens that may be seen; or a `Visible`, as
                causal as the module is. The memory is kept from tokens that no query sees where the
                mask is bool and the same for all queries and heads.
        """
        if isinstance(visible, Tensor):
            check_tokens("visible as a mask of tokens", visible, *x.shape[:2])
        if isinstance(visible, Visible) and visible.causal != self.causal:
            raise ValueError(
                f"the memory is {'' if self.causal else 'not '}causal, and the Visible asks for "
                f"causal={visible.causal}"
            )
        seen = visible if isinstance(visible, Tensor) else _seen(visible, *x.shape[:2])
        memory = self.memory(x, seen)
        query, key, value = self._read(x, memory, start=0)
        if self.training:
            self.codebook.begin(key, seen)  # type: ignore[call-arg]
        codebook = self.codebook.codes
        if self.training:
            codebook = codebook.clone()  # which `follow` does not change under the backward pass
        options: Any = self._options() | {"codebook": codebook}
        out = self.system.attend(query, key, value, self.what_is_visible(visible), **options)
        if self.training:
            self._committed = _commitment(key, codebook, seen)
            self.codebook.follow(key, seen)  # type: ignore[call-arg]
        return self._gated(x, memory, out)

    def init_state(
        self, batch: int, start: int = 0, memory: MemoryState | None = None
    ) -> LongVQState:
        """The state before the first token, which stands at `start`.

        Args:
            memory: of the tokens before `start`, from `self.memory.step`, where they are not read
                here but by another, to be merged.
        """
        weight = self.to_key.weight
        codes = self.system.init_state(
            batch,
            self.kv_heads,
            self.head_dim,
            self.head_dim,
            start=start,
            device=weight.device,
            dtype=weight.dtype,
        )
        if memory is None:
            return LongVQState(codes, self.memory.init_state(batch, start))
        if memory.length != start or memory.h.shape[0] != batch:
            raise ValueError(
                f"a piece of a batch of {batch} from token {start} on begins with a memory of as "
                f"much, got one of a batch of {memory.h.shape[0]} and {memory.length} tokens"
            )
        return LongVQState(codes, memory, primed=True)

    def step(
        self, x: Tensor, state: LongVQState, seen: Tensor | None = None
    ) -> tuple[Tensor, LongVQState]:
        """The next tokens (B, T, width), one or many, after what `state` holds; as `Attention`."""
        if not self.causal:
            raise ValueError("step needs a causal module: a later token would change earlier rows")
        memory, kept = self.memory.step(x, state.memory, seen)
        query, key, value = self._read(x, memory, start=state.length)
        visible = self.what_is_visible(None)
        options: Any = self._options() | {"codebook": self.codebook.codes}
        out, codes = self.system.step(query, key, value, state.codes, visible, seen, **options)
        return self._gated(x, memory, out), LongVQState(codes, kept, state.primed)

    def merge(self, first: LongVQState, second: LongVQState) -> LongVQState:
        """The state after two pieces. Exact, but not of pieces that know nothing of each other: the
        keys of the second are read from the memory of the first too. That memory is a pass of its
        own, linear and cheap; with it the second piece is read beside the first::

            _, memory = attend.memory.step(x[:, :n], attend.memory.init_state(batch))
            second = attend.init_state(batch, n, memory)

        Raises:
            ValueError: where the second did not begin so, or the pieces do not meet.
        """
        if not second.primed:
            raise ValueError(
                "the keys of the second piece were read without the memory of the first: begin it "
                "with init_state(batch, start, memory), the memory from attend.memory.step"
            )
        codes = self.system.merge(first.codes, second.codes)
        return LongVQState(codes, second.memory, first.primed)

    def auxiliary_loss(self) -> Tensor:
        """The commitment loss of the last forward pass in training mode, times its weight::

            commitment * mean over real tokens, heads and D of (k - sg(C_z))²

        Keys have a mean square of 1, so that the mean is the share of them that the codes miss.
        Given once: until the next pass it is 0.
        """
        loss, self._committed = self._committed, None
        return self.to_key.weight.new_zeros(()) if loss is None else self.commitment * loss

    def diagnostics(self) -> Diagnostics:
        """How the codes of each key head are used: perplexity and dead codes."""
        return self.codebook.diagnostics()

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a sequence that begins with these tokens; keys not quantised."""
        return self._read(x, self.memory(x), start)

    def _read(self, x: Tensor, memory: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        shared = self._split(F.silu(self.to_key(memory)))  # (B, Hkv, T, D)
        of_queries = shared.repeat_interleave(self.heads // self.kv_heads, 1)
        query = self.query_norm(self.gain["query"] * of_queries + self.shift["query"])
        key = self.key_norm(self.gain["key"] * shared + self.shift["key"])
        value = self._split(F.silu(self.to_value(x))).to(key.dtype)  # which autocast does not norm
        return self.positions.rotate(query, start), self.positions.rotate(key, start), value

    def _gated(self, x: Tensor, memory: Tensor, out: Tensor) -> Tensor:
        reset = self._split(F.silu(self.to_reset(memory)))
        update = self.to_update(memory).sigmoid()
        hidden = F.silu(self.to_hidden(memory) + self._join(reset * out))
        return update * (hidden - x)

    def __getstate__(self) -> dict:
        # a loss that nobody fetched is part of a graph, which cannot be copied
        return self.__dict__ | {"_committed": None}


def _commitment(key: Tensor, codebook: Tensor, seen: Tensor | None) -> Tensor:
    key = key.to(torch.promote_types(key.dtype, torch.float32))
    codebook = codebook.to(key.dtype)
    missed = (key - gathered(codebook, nearest(key, codebook))).square().mean(-1)  # (B, Hkv, T)
    real = missed.isfinite()
    if seen is not None:
        real = real & seen[:, None]
    return torch.where(real, missed, 0).sum() / real.sum().clamp_min(1)


def _seen(visible: Visible | None, batch: int, tokens: int) -> Tensor | None:
    """The tokens that any query sees, as bool (B, T), where a mask says that of all alike."""
    mask = None if visible is None else visible.mask
    if mask is None or mask.dtype != torch.bool:
        return None
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    if mask.shape[1] != 1 or mask.shape[2] != 1:
        return None
    return mask[:, 0, 0].expand(batch, tokens)


ENTRY = Entry(
    name="longvq",
    title="LongVQ",
    system=VectorQuantised(),
    formula="softmax(q·C_z / √d + b_{i−j}), z = argmin_s ‖k − C_s‖², b within a window",
    paper="Liu et al. 2024",
    arxiv="2404.11163",
    score="q·C_z / √d",
    positivity="exp",
    normaliser="row sum",
    walk="window and codes",
    laws=Laws(rows_sum_to_one=True, rows_at_most_one=True, shift_invariant=True),
    exceptions={
        "gradients": "a key's gradient is the straight-through one: the derivative of its choice "
        "of a code is 0",
        "key_order": "its bias of the window reads distances",
    },
    positions="none",
    module=LongVQAttention,
    claim="Better than Transformers, convolutions and state space models on LRA, text, images and "
    "speech, with a memory of fixed size.",
)
