"""nn.Module shells around the functions; no mathematics here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from aftermax.dense import System, as_system
from aftermax.gate import Gate
from aftermax.positions import POSITIONS, NoPositions
from aftermax.visible import Visible, check_tokens
from aftermax.weights import RowMap, Softmax


class Attention(nn.Module):
    """Multi-head self-attention with any system of the catalogue.

    Args:
        width: of the tokens, in and out.
        heads: query heads H.
        weights: a row map (`LSSAR()`), or any `System`.
        kv_heads: heads of key and value, a divisor of `heads`; None = `heads`.
        head_dim: width of a head; None = width / heads.
        positions: "rope", "p-rope" (half of the frequencies), "alibi", "none", or a value of
            `aftermax.positions`; `RoPE.for_length(T)` suits p-RoPE to a training length.
        qk_norm: RMSNorm with a learned gain over the head width of queries and keys, before
            positions (Dehghani et al., arXiv 2302.05442, with RMSNorm). Idle in the cosine systems
            but for its gain.
        causal: a token sees itself and what came before.
        window: tokens further back than this are not seen; None = all are.
        dropout: on the weights, in training.
        bias: of the four projections.
        scale, impl: as in `aftermax.attention`.

    Shapes: `forward` and `step` take (B, T, width) and return the same. What the system learns (a
    sink, a gate, a scale) is in `self.learned`.

    >>> import torch
    >>> from aftermax import LSSAR
    >>> attend = Attention(32, heads=4, weights=LSSAR())
    >>> x = torch.randn(2, 5, 32)
    >>> whole = attend(x)
    >>> state = attend.init_state(batch=2)
    >>> first, state = attend.step(x[:, :3], state)
    >>> rest, state = attend.step(x[:, 3:], state)
    >>> torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-6)
    True
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        weights: RowMap | System = Softmax(),  # noqa: B008, a frozen value
        kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: str | NoPositions = "rope",
        qk_norm: bool = False,
        causal: bool = True,
        window: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        scale: float | None = None,
        impl: str | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        for name, number in {"heads": heads, "head_dim": head_dim, "window": window}.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is a probability, got {dropout}")
        if head_dim is None and width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads; give head_dim")
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {self.kv_heads} and {heads}")
        self.head_dim = head_dim or width // heads
        self.positions = _positions(positions)
        self.positions.check(self.head_dim)
        self.system = as_system(weights)
        self.causal, self.window = causal, window
        self.dropout, self.scale, self.impl = dropout, scale, impl

        inner, kv_inner = heads * self.head_dim, self.kv_heads * self.head_dim
        self.to_query = nn.Linear(width, inner, bias, **factory)
        self.to_key = nn.Linear(width, kv_inner, bias, **factory)
        self.to_value = nn.Linear(width, kv_inner, bias, **factory)
        self.to_out = nn.Linear(inner, width, bias, **factory)
        self.query_norm = (
            _HeadNorm(self.head_dim, device=device, dtype=dtype) if qk_norm else nn.Identity()
        )
        self.key_norm = (
            _HeadNorm(self.head_dim, device=device, dtype=dtype) if qk_norm else nn.Identity()
        )
        self.learned = nn.ParameterDict(
            {
                name: nn.Parameter(start.to(device=device, dtype=dtype))
                for name, start in self.system.learned(heads, self.head_dim, self.head_dim).items()
            }
        )
        self.register_buffer("slopes", self.positions.slopes(heads), persistent=False)
        if self.slopes is not None and device is not None:
            self.slopes = self.slopes.to(device)

    def forward(self, x: Tensor, visible: Tensor | Visible | None = None) -> Tensor:
        """A whole sequence (B, T, width).

        Args:
            visible: None; a bool (B, T) mask of the tokens that may be seen (False = padding, whose
                own outputs are then without meaning); or a `Visible`, taken as it is, causal or
                not, with this module's ALiBi slopes added.
        """
        query, key, value = self.project(x, start=0)
        if isinstance(visible, Tensor):
            check_tokens("visible as a mask of tokens", visible, *x.shape[:2])
        out = self.system.attend(
            query,
            key,
            value,
            self.what_is_visible(visible),
            **self._options(),
            **self.of_tokens(x),
        )
        return self._join(self.finish(out, x))

    @property
    def can_truncate(self) -> bool:
        """Whether `aftermax.Cache` may take tokens back."""
        return getattr(self.system, "can_truncate", False)

    @property
    def can_merge(self) -> bool:
        """Whether two pieces of a sequence that were read apart can be joined."""
        return getattr(self.system, "can_merge", False)

    def init_state(self, batch: int, start: int = 0) -> Any:
        """The state before the first token, which stands at position `start`, for `step`."""
        weight = self.to_key.weight
        return self.system.init_state(
            batch,
            self.kv_heads,
            self.head_dim,
            self.head_dim,
            device=weight.device,
            dtype=weight.dtype,
            **({"start": start} if start else {}),
        )

    def merge(self, first: Any, second: Any) -> Any:
        """The state after two pieces, of which the second was read from
        `init_state(batch, start=first.length)`."""
        return self.system.merge(first, second)  # type: ignore[attr-defined]

    def step(self, x: Tensor, state, seen: Tensor | None = None) -> tuple[Tensor, object]:
        """The next tokens (B, T, width), one or many, after what `state` holds.

        Args:
            seen: bool (B, T), the new tokens that are real; None = all.

        Returns:
            out (B, T, width) and the new state; the old one stays as it was.
        """
        if not self.causal:
            raise ValueError("step needs a causal module: a later token would change earlier rows")
        query, key, value = self.project(x, start=state.length)
        visible = self.what_is_visible(None)
        options = self._options() | self.of_tokens(x)
        out, state = self.system.step(query, key, value, state, visible, seen, **options)
        return self._join(self.finish(out, x)), state

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, T, D), key and value (B, Hkv, T, D), normed, placed from `start` on."""
        if x.ndim != 3 or x.shape[-1] != self.to_query.in_features:
            raise ValueError(f"expected (B, T, {self.to_query.in_features}), got {tuple(x.shape)}")
        query = self.query_norm(self._split(self.to_query(x)))
        key = self.key_norm(self._split(self.to_key(x)))
        value = self._split(self.to_value(x))
        return self.positions.rotate(query, start), self.positions.rotate(key, start), value

    def of_tokens(self, x: Tensor) -> dict[str, Tensor]:
        """What the system is told of the tokens (B, T, width) beside query, key and value."""
        return {}

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """What happens to the heads (B, H, T, D) of the input (B, T, width); here nothing."""
        return out

    def what_is_visible(self, visible: Tensor | Visible | None) -> Visible:
        """The module's own view (causal, window, ALiBi) joined with the caller's."""
        if isinstance(visible, Visible):
            if self.slopes is None:
                return visible
            if visible.slopes is not None:
                raise ValueError("this module has ALiBi slopes of its own; give it none")
            return dataclasses.replace(visible, slopes=self.slopes)
        mask = None if visible is None else visible[:, None, None]
        return Visible(causal=self.causal, window=self.window, mask=mask, slopes=self.slopes)

    def _options(self) -> dict:
        return {
            "enable_gqa": True,
            "scale": self.scale,
            "dropout_p": self.dropout if self.training else 0.0,
            "impl": self.impl,
            **self.learned,
        }

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _join(self, out: Tensor) -> Tensor:
        return self.to_out(out.transpose(1, 2).flatten(-2))

    def extra_repr(self) -> str:
        heads = f"heads={self.heads}, kv_heads={self.kv_heads}"
        return f"{self.system}, {heads}, positions={self.positions}"


class GatedAttention(Attention):
    """`Attention` whose heads pass a gate that reads the input: out_h <- sigmoid(g_h(x)) out_h.

    Args:
        gate: what the gate reads, one of `aftermax.gate.GATES`, where the formulas stand; "token",
            the paper's (arXiv 2306.12929).
        open_at_start: the gate's value at the start; 0.5.

    The others are those of `Attention`; any system may stand behind the gate.

    Raises:
        ValueError: as `Attention`, and for the gate "average" in a causal module: the mean over all
            tokens would tell each of what comes after it.

    >>> import torch
    >>> attend = GatedAttention(32, heads=4, gate="head")
    >>> x = torch.randn(2, 5, 32)
    >>> plain = Attention(32, heads=4)
    >>> _ = plain.load_state_dict(attend.state_dict(), strict=False)
    >>> torch.allclose(attend(x), plain(x) / 2, atol=1e-6)
    True
    """

    def __init__(
        self, width: int, heads: int, *, gate: str = "token", open_at_start: float = 0.5, **options
    ):
        super().__init__(width, heads, **options)
        if gate == "average" and self.causal:
            raise ValueError("the gate 'average' looks ahead: it needs causal=False")
        factory = {name: options.get(name) for name in ("device", "dtype")}
        self.gate = Gate(width, heads, kind=gate, open_at_start=open_at_start, **factory)

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        return out * self.gate(x)


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """What the parts of a model ask a trainer to add to its loss, since their last forward pass:
    the sum of `auxiliary_loss()` of every module that has one; 0.0 where none has.

    >>> auxiliary_loss(Attention(32, heads=4))
    0.0
    """
    parts = [m for m in model.modules() if hasattr(m, "auxiliary_loss")]
    return sum((part.auxiliary_loss() for part in parts), 0.0)  # type: ignore[operator]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and each part of it in its own again afterwards."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


class _HeadNorm(nn.RMSNorm):
    """RMSNorm in the gain's dtype: under autocast the vectors are half and the gain is not, which
    torch's own norm meets with a warning."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def _positions(positions: str | NoPositions) -> NoPositions:
    if isinstance(positions, NoPositions):
        return positions
    if positions not in POSITIONS:
        raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
    return POSITIONS[positions]
