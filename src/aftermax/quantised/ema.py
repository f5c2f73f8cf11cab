"""A damped exponential moving average in several dimensions for each channel: Mega's memory.

Ma et al., "Mega: Moving Average Equipped Gated Attention", arXiv 2209.10655, section 3::

    q = 1 - sigmoid(δ) sigmoid(α)                 (N,) for each channel, all of it learned
    h_t = q h_{t-1} + sigmoid(δ) β x_t
    y_t = sum_N γ h_t / sqrt(N)
    M_t = silu(y_t + ω x_t)

The 1/sqrt(N) and the residual ω are of the authors' code. A whole sequence is a convolution, done
by FFT in chunks whose states follow on each other; the next tokens are the recurrence. Hidden
tokens add nothing, but time goes on over them.

A convolution by FFT rounds on the scale of the largest token of its chunk: in float32 a later token
a million times larger than an earlier one is felt by it, as rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax.blocks import no_autocast
from aftermax.state import bytes_of, check_meeting, rows_of
from aftermax.visible import check_tokens

CHUNK = 512
"""Tokens that one convolution takes."""


@dataclass(frozen=True)
class MemoryState:
    """The averages after the last token."""

    h: Tensor  # (B, width, N), float32 or better
    length: int
    """Tokens so far, padding included: the position of the next token."""
    start: int = 0
    """Position of the first of them."""

    @property
    def bytes(self) -> int:
        return bytes_of(self)

    def reorder(self, index: Tensor) -> MemoryState:
        return rows_of(self, index)


class DampedEMA(nn.Module):
    """(B, T, width) -> M, of the same shape; see the head of this file.

    Args:
        width: channels.
        dims: N, averages for each channel; 16, as the authors' language models have.
        bidirectional: a second set of averages runs from the end, and y is the sum of both, as in
            the authors' code; there is then no `step`.

    Start, as in the authors' code: α, δ ~ N(0, 0.2²), β = 1, -1, 1, ... + N(0, 0.02²), γ, ω ~
    N(0, 1).

    >>> memory = DampedEMA(8, dims=4)
    >>> x = torch.randn(2, 20, 8)
    >>> first, state = memory.step(x[:, :13], memory.init_state(2))
    >>> rest, state = memory.step(x[:, 13:], state)
    >>> torch.allclose(torch.cat([first, rest], 1), memory(x), atol=1e-5)
    True
    """

    can_truncate = False
    can_merge = True

    def __init__(
        self, width: int, dims: int = 16, *, bidirectional: bool = False, device=None, dtype=None
    ):
        super().__init__()
        if width < 1 or dims < 1:
            raise ValueError(f"width and dims must be at least 1, got {width} and {dims}")
        self.width, self.dims, self.bidirectional = width, dims, bidirectional
        # three dimensions, as the authors have it: these are no matrices, which a recipe may draw
        # or decay
        shape = (width * (1 + bidirectional), dims, 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        signs = torch.where(torch.arange(dims) % 2 == 0, 1.0, -1.0)[:, None]
        self.alpha = nn.Parameter(0.2 * torch.randn(shape, **factory))
        self.delta = nn.Parameter(0.2 * torch.randn(shape, **factory))
        self.beta = nn.Parameter(signs.to(**factory) + 0.02 * torch.randn(shape, **factory))
        self.gamma = nn.Parameter(torch.randn(shape, **factory))
        self.omega = nn.Parameter(torch.randn(width, **factory))

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """A whole sequence.

        Args:
            x: (B, T, width).
            seen: bool (B, T), the tokens that are real; None = all.
        """
        shown = self._shown(x, seen)
        with no_autocast(x.device):
            y, _ = self._walk(shown, self._zeros(x), slice(0, self.width))
            if self.bidirectional:
                back = slice(self.width, 2 * self.width)
                y = y + self._walk(shown.flip(1), self._zeros(x), back)[0].flip(1)
            return self._out(x, y)

    def init_state(self, batch: int, start: int = 0) -> MemoryState:
        """Zeros, before the first token, which stands at `start`."""
        like = self.alpha
        dtype = torch.promote_types(like.dtype, torch.float32)
        h = torch.zeros(batch, self.width, self.dims, dtype=dtype, device=like.device)
        return MemoryState(h, start, start)

    def step(
        self, x: Tensor, state: MemoryState, seen: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """The next tokens (B, T, width), one or many: M and the new state."""
        if self.bidirectional:
            raise ValueError("a bidirectional memory has no step: later tokens change earlier rows")
        shown = self._shown(x, seen)
        with no_autocast(x.device):
            h = state.h.to(shown.dtype)
            y, h = self._walk(shown, h, slice(0, self.width))
            return self._out(x, y), MemoryState(h, state.length + x.shape[1], state.start)

    def merge(self, first: MemoryState, second: MemoryState) -> MemoryState:
        """The state after two pieces, of which the second was read from
        `init_state(batch, start=first.length)`: q^m h_1 + h_2, m tokens in the second."""
        check_meeting(first, second.start)
        log_q, _, _ = self._constants(slice(0, self.width), first.h.dtype)
        kept = (log_q * (second.length - second.start)).exp()[..., 0]
        return MemoryState(kept * first.h + second.h, second.length, first.start)

    def _constants(self, part: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """log q, sigmoid(δ) β and γ / sqrt(N), each (width, N, 1)."""
        alpha, delta, beta, gamma = (
            x[part].to(dtype) for x in (self.alpha, self.delta, self.beta, self.gamma)
        )
        p = delta.sigmoid()
        return torch.log1p(-p * alpha.sigmoid()), p * beta, gamma / self.dims**0.5

    def _walk(self, x: Tensor, h: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """y (B, T, width) and the last h. What is not finite makes the rest of its channel NaN."""
        log_q, into, out_of = self._constants(part, x.dtype)
        flawed = (x * 0 != 0).to(torch.int32).cumsum(1) > 0
        lost = (h * 0 != 0).any(-1)
        flawed = flawed | lost[:, None]
        x = x.masked_fill(flawed, 0).transpose(1, 2)  # (B, width, T)
        h = h.masked_fill(lost[..., None], 0)
        rows = []
        for piece in x.split(CHUNK, -1):
            tokens = piece.shape[-1]
            powers = torch.arange(tokens + 1, dtype=x.dtype, device=x.device)
            decay = (log_q * powers).exp()  # (width, N, tokens + 1)
            y = torch.einsum("wnt,bwn->bwt", out_of * decay[..., 1:], h)
            kernel = (out_of * into * decay[..., :-1]).sum(1)
            rows.append(y + (piece * kernel if tokens < 2 else _convolved(piece, kernel)))
            new = torch.einsum("wnt,bwt->bwn", into * decay[..., :-1].flip(-1), piece)
            h = decay[..., -1] * h + new
        y = torch.cat(rows, -1).transpose(1, 2) if rows else x.transpose(1, 2)
        last = flawed[:, -1] if flawed.shape[1] else lost
        return y.masked_fill(flawed, torch.nan), h.masked_fill(last[..., None], torch.nan)

    def _shown(self, x: Tensor, seen: Tensor | None) -> Tensor:
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ValueError(f"expected (B, T, {self.width}), got {tuple(x.shape)}")
        shown = x.to(torch.promote_types(x.dtype, torch.float32))
        if seen is None:
            return shown
        check_tokens("seen", seen, *x.shape[:2])
        return shown.masked_fill(~seen[..., None], 0)

    def _zeros(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.zeros(x.shape[0], self.width, self.dims, dtype=dtype, device=x.device)

    def _out(self, x: Tensor, y: Tensor) -> Tensor:
        return F.silu(y + self.omega.to(y.dtype) * x).to(x.dtype)

    def extra_repr(self) -> str:
        return f"width={self.width}, dims={self.dims}, bidirectional={self.bidirectional}"


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """sum_{l <= t} kernel_l x_{t-l} of (B, width, T) and (width, T), by FFT."""
    tokens = x.shape[-1]
    if x.numel() == 0:
        return x
    product = torch.fft.rfft(x, 2 * tokens) * torch.fft.rfft(kernel, 2 * tokens)
    return torch.fft.irfft(product, 2 * tokens)[..., :tokens]
