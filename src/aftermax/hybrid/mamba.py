"""A Mamba block in place of attention heads: convolution, selective scan, gate.

Gu & Dao, arXiv 2312.00752, as RecurFormer (arXiv 2410.12850) puts it beside the heads that stay::

    u, z = W_in x                        width -> C, C;  C = expand x heads x head_dim
    u = silu(conv(u))                    depthwise, causal, over 4 tokens
    r, b_t, c_t = W_x u                  C -> rank, N, N
    Delta_t = softplus(W_Delta r + bias)
    s_t = exp(Delta_t A) s_{t-1} + (Delta_t u_t) (x) b_t
    y_t = s_t c_t + D u_t
    heads = W_out (y * silu(z))          C -> heads x head_dim

The sizes and initial values are those of the authors' code: N = 16, A = -1 ... -N in each channel,
D = 1, Delta between 0.001 and 0.1 at the start, rank = heads x head_dim / 16 rounded up. expand is
1 here (theirs 2): the block is as wide as the heads that it stands for. With expand = 1, W_out
starts as the identity, so that W_in may start as a head's value projection.

A token that is padding is 0 to the convolution and has Delta = 0: it changes no state. The scan is
computed, and its state is kept, in float32 or better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aftermax.blocks import no_autocast
from aftermax.reference import transformed
from aftermax.state import bytes_of, rows_of
from aftermax.visible import check_tokens

CHUNK = 16
"""Tokens whose states exist at a time: B x CHUNK x C x N numbers, a few times."""

Form = Literal["chunked", "recurrent"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    *,
    form: Form | None = None,
) -> tuple[Tensor, Tensor]:
    """s_t = exp(delta_t a) s_{t-1} + (delta_t u_t) b_t,  y_t = s_t . c_t, for each channel.

    Args:
        u, delta: (B, T, C). a: (C, N), below 0. b, c: (B, T, N). state: (B, C, N).
        form: "recurrent", a loop that autograd follows and that holds every state; "chunked", the
            same sums with a backward written by hand, which keeps one state a chunk and computes
            the others again. None = "chunked" but under torch.func and while tracing.

    Returns:
        y (B, T, C) and the last state.

    >>> one = torch.ones(1, 3, 1)
    >>> y, state = selective_scan(one, one, -torch.ones(1, 1), one, one, torch.zeros(1, 1, 1))
    >>> y.flatten(), torch.equal(y[:, -1:], state)
    (tensor([1.0000, 1.3679, 1.5032]), True)
    """
    _check_scan(u, delta, a, b, c, state)
    if form not in (None, "chunked", "recurrent"):
        raise ValueError(f"form must be 'chunked' or 'recurrent', got {form!r}")
    if u.shape[1] == 0:
        return u.new_zeros(u.shape), state
    if form is None:
        form = "recurrent" if torch.compiler.is_compiling() or transformed() else "chunked"
    if form == "chunked":
        return _Scan.apply(u, delta, a, b, c, state)  # type: ignore[return-value]
    states = []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        state = torch.exp(step * a) * state + (step * u[:, t, :, None]) * b[:, t, None]
        states.append(state)
    return torch.stack([(s * c[:, t, None]).sum(-1) for t, s in enumerate(states)], 1), state


class _Scan(torch.autograd.Function):
    """The chunked form. With l_t the gradient of the loss in s_t::

    l_t = g_t c_t + exp(delta_{t+1} a) l_{t+1}

    Inside, states are (L, B, N, C): time first, so that one token is one piece of memory, and
    channels last, so that what all numbers of a channel share is read along with them.
    """

    @staticmethod
    def forward(ctx, u, delta, a, b, c, state):
        state, turned = state.mT.contiguous(), a.T.contiguous()
        starts, out, room = [], [], _Room(u, a)
        for start in range(0, u.shape[1], CHUNK):
            starts.append(state)
            part = _of_chunk(start, u, delta, b, c)
            states, _ = room.states(part, turned, state)
            out.append((part.c[:, :, None] @ states)[:, :, 0])
            state = states[-1].clone()  # the room is used again
        ctx.save_for_backward(u, delta, a, b, c, *starts)
        return torch.cat(out).transpose(0, 1), state.mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_state):
        u, delta, a, b, c, *starts = ctx.saved_tensors
        turned, room = a.T.contiguous(), _Room(u, a)
        grads = [torch.empty_like(x) for x in (u, delta, b, c)]
        grad_a, later = torch.zeros_like(turned), grad_state.mT.contiguous()
        for number in reversed(range(len(starts))):
            start = number * CHUNK
            part = _of_chunk(start, u, delta, b, c)
            states, decay = room.states(part, turned, starts[number])
            upstream = grad[:, start : start + CHUNK].transpose(0, 1).contiguous()  # (L, B, C)
            into = torch.mul(part.c[..., None], upstream[:, :, None], out=room.third(len(states)))
            into[-1] += later  # and so on: it becomes l
            for t in range(len(into) - 2, -1, -1):
                into[t].addcmul_(decay[t + 1], into[t + 1])
            later = decay[0] * into[0]
            of_c = (states @ upstream[..., None])[..., 0]
            of_new = (part.b[:, :, None] @ into)[:, :, 0]  # of delta u
            of_b = (into @ (part.delta * part.u)[..., None])[..., 0]
            of_decay = decay.mul_(into)  # and by the state before: of delta a
            of_decay[0] *= starts[number]
            of_decay[1:] *= states[:-1]
            of_delta = torch.mul(of_decay, turned, out=states).sum(-2)
            grad_a += of_decay.mul_(part.delta[:, :, None]).sum((0, 1))
            parts = (part.delta * of_new, part.u * of_new + of_delta, of_b, of_c)
            for whole, piece in zip(grads, parts, strict=True):
                whole[:, start : start + CHUNK] = piece.transpose(0, 1)
        grad_u, grad_delta, grad_b, grad_c = grads
        return grad_u, grad_delta, grad_a.T, grad_b, grad_c, later.mT


@dataclass(frozen=True)
class _Chunk:
    u: Tensor  # (L, B, C)
    delta: Tensor  # (L, B, C)
    b: Tensor  # (L, B, N)
    c: Tensor  # (L, B, N)


def _of_chunk(start: int, *tensors: Tensor) -> _Chunk:
    return _Chunk(*(x[:, start : start + CHUNK].transpose(0, 1).contiguous() for x in tensors))


class _Room:
    """Memory that chunk after chunk is written to: fresh pages would cost more than the sums."""

    def __init__(self, u: Tensor, a: Tensor):
        batch, tokens, channels = u.shape
        shape = (3, min(CHUNK, tokens), batch, a.shape[1], channels)
        self.room = u.new_empty(shape)

    def third(self, tokens: int) -> Tensor:
        return self.room[2, :tokens]

    def states(self, part: _Chunk, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """All states of a chunk (L, B, N, C), and the decays that led to them."""
        states, decay = self.room[0, : len(part.u)], self.room[1, : len(part.u)]
        torch.mul(part.delta[:, :, None], a, out=decay).exp_()
        torch.mul(part.b[..., None], (part.delta * part.u)[:, :, None], out=states)
        for t in range(len(states)):
            states[t].addcmul_(decay[t], state)
            state = states[t]
        return states, decay


@dataclass(frozen=True)
class MambaState:
    """What a block keeps of the tokens so far: heads x head_dim x expand x (N + 3) numbers."""

    sums: Tensor  # (B, C, N), float32 or better
    recent: Tensor  # (B, 3, C), what the convolution will see again
    length: int
    """Tokens so far, padding included: the position of the next token."""

    @property
    def bytes(self) -> int:
        return bytes_of(self)

    def reorder(self, index: Tensor) -> MambaState:
        return rows_of(self, index)


class MambaHeads(nn.Module):
    """(B, T, width) -> (B, heads, T, head_dim), causal.

    Args:
        width: of the tokens.
        heads, head_dim: what it stands for.
        expand: channels C = expand x heads x head_dim; 1.
        state: N, numbers kept for each channel; 16.
        conv: tokens that the convolution sees; 4.
        rank: of W_Delta; None = heads x head_dim / 16, rounded up.

    >>> block = MambaHeads(32, heads=2, head_dim=8)
    >>> x = torch.randn(1, 5, 32)
    >>> first, state = block.step(x[:, :3], block.init_state(1))
    >>> rest, state = block.step(x[:, 3:], state)
    >>> torch.allclose(torch.cat([first, rest], 2), block(x), atol=1e-6), state.bytes
    (True, 1216)
    """

    can_truncate: ClassVar[bool] = False
    can_merge: ClassVar[bool] = False
    """What the first three tokens of a piece put into the state depends on the three before."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        expand: int = 1,
        state: int = 16,
        conv: int = 4,
        rank: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        numbers = {"width": width, "heads": heads, "head_dim": head_dim, "expand": expand}
        for name, number in {**numbers, "state": state, "conv": conv}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads, self.head_dim, self.expand = heads, head_dim, expand
        self.states, self.conv = state, conv
        out = heads * head_dim
        self.channels = channels = expand * out
        self.rank = math.ceil(out / 16) if rank is None else rank
        self.to_in = nn.Linear(width, 2 * channels, bias=False, **factory)
        bound = conv**-0.5  # of torch's depthwise convolution
        taps = torch.empty(channels, conv, **factory).uniform_(-bound, bound)
        self.taps = nn.Parameter(taps)
        self.taps_bias = nn.Parameter(torch.empty(channels, **factory).uniform_(-bound, bound))
        self.to_parts = nn.Linear(channels, self.rank + 2 * state, bias=False, **factory)
        self.to_delta = nn.Linear(self.rank, channels, **factory)
        steps = torch.arange(1.0, state + 1, **factory)
        self.log_minus_a = nn.Parameter(steps.log().repeat(channels, 1))
        self.skip = nn.Parameter(torch.ones(channels, **factory))
        self.to_out = nn.Linear(channels, out, bias=False, **factory)
        with torch.no_grad():
            drawn = torch.rand(channels, **factory) * math.log(100) + math.log(1e-3)
            delta = drawn.exp()
            self.to_delta.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # softplus of it is
            if expand == 1:
                nn.init.eye_(self.to_out.weight)

    def start_from_values(self, weight: Tensor) -> None:
        """Let the convolution read what these heads had for values: W_V (heads head_dim, width).

        Raises:
            ValueError: for an `expand` that is not 1.
        """
        if self.expand != 1:
            raise ValueError(f"values are as wide as their heads, and expand is {self.expand}")
        with torch.no_grad():
            self.to_in.weight[: self.channels].copy_(weight)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, T, width) -> (B, heads, T, head_dim); `seen`, bool (B, T), is False for padding."""
        return self.step(x, self.init_state(len(x)), seen)[0]

    def init_state(self, batch: int, start: int = 0) -> MambaState:
        """The state before the first token, which stands at `start`: zeros."""
        weight = self.to_in.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        shape, device = (batch, self.channels, self.states), weight.device
        return MambaState(
            torch.zeros(shape, dtype=wide, device=device),
            torch.zeros(batch, self.conv - 1, self.channels, dtype=weight.dtype, device=device),
            start,
        )

    def step(
        self, x: Tensor, state: MambaState, seen: Tensor | None = None, *, form: Form | None = None
    ) -> tuple[Tensor, MambaState]:
        """The next tokens (B, T, width), one or many: (out (B, heads, T, head_dim), new state)."""
        if x.ndim != 3 or x.shape[-1] != self.to_in.in_features:
            raise ValueError(f"expected (B, T, {self.to_in.in_features}), got {tuple(x.shape)}")
        if len(x) != len(state.sums):
            raise ValueError(f"the state is of a batch of {len(state.sums)}, the input of {len(x)}")
        if x.shape[1] == 0:
            return x.new_zeros(len(x), self.heads, 0, self.head_dim), state
        if seen is not None:
            check_tokens("seen", seen, *x.shape[:2])
            x = x.masked_fill(~seen[..., None], 0)  # whatever stood there
        if x.shape[1] == 0:  # shorter than the convolution, which torch does not unfold
            return x.new_zeros(len(x), self.heads, 0, self.head_dim), state
        u, gate = self.to_in(x).chunk(2, -1)
        held = torch.cat([state.recent.to(u.dtype), u], 1)
        windows = held.unfold(1, self.conv, 1)  # (B, T, C, conv)
        u = F.silu((windows * self.taps).sum(-1) + self.taps_bias)
        low, b, c = self.to_parts(u).split([self.rank, self.states, self.states], -1)
        delta = F.softplus(self.to_delta(low))
        if seen is not None:
            delta = delta.masked_fill(~seen[..., None], 0)
        with no_autocast(x.device):
            u, delta, b, c = (t.to(state.sums.dtype) for t in (u, delta, b, c))
            a = -self.log_minus_a.to(state.sums.dtype).exp()
            y, sums = selective_scan(u, delta, a, b, c, state.sums, form=form)
            y = y + self.skip.to(y.dtype) * u
        out = self.to_out(y.to(gate.dtype) * F.silu(gate))
        recent = held[:, held.shape[1] - (self.conv - 1) :]
        new = replace(state, sums=sums, recent=recent.clone(), length=state.length + x.shape[1])
        return out.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2), new

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, states={self.states}"


def _check_scan(u, delta, a, b, c, state) -> None:
    batch, tokens, channels = u.shape if u.ndim == 3 else (-1, -1, -1)
    states = a.shape[-1]
    fits = (
        delta.shape == u.shape
        and tuple(a.shape) == (channels, states)
        and tuple(b.shape) == tuple(c.shape) == (batch, tokens, states)
        and tuple(state.shape) == (batch, channels, states)
    )
    if not fits:
        shapes = ", ".join(str(tuple(x.shape)) for x in (u, delta, a, b, c, state))
        raise ValueError(
            "selective_scan needs u and delta (B, T, C), a (C, N), b and c (B, T, N) and state "
            f"(B, C, N), got {shapes}"
        )
