"""Normalised attention: w_ij = q_i . k_j / exp(w . u_i), a number of the token's own, not the sum.

Sieber et al., "Understanding the differences in Foundation Models: Attention, State Space Models,
and Recurrent Neural Networks", arXiv 2405.15731, equation 21. Without a feature map, and without a
sum: what divides a row is a number that its token gives by itself. As a dynamical system its Lambda
is exp(w . (u_{i-1} - u_i)), see `aftermax.dynamics`.

In the paper u_i is the input of the layer. `NormalisedAttention` is that. The system `Normalised`,
which is given heads and no inputs, lets the query stand for it, w . q_i: a linear function of the
input too, but of rank one less than the width of the head allows; this form of it is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from aftermax.entry import Entry, Laws
from aftermax.linear.elu import EXCEPTIONS
from aftermax.linear.separable import LinearState, Places, Separable, Separated
from aftermax.visible import Visible


@dataclass(frozen=True)
class Normalised(Separable):
    """q . k / exp(w . q), w learned, one vector for each head, initially 0.

    >>> from aftermax import Visible
    >>> x = torch.ones(1, 1, 3, 2)
    >>> Normalised().attend(x, x, x, Visible(causal=True))[0, 0, 2]
    tensor([6., 6.])
    """

    def learned(self, heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        return {"w": torch.zeros(heads, key_dim)}

    def separate(self, query, key, value, places: Places, scale, **learned: Tensor) -> Separated:
        log_normaliser = (query * learned["w"].to(query.dtype)[:, None]).sum(-1, keepdim=True)
        divisor = torch.exp(log_normaliser)
        query = query * torch.exp(-log_normaliser)
        query = query if scale is None else scale * query
        return Separated(query, key, value, divisor=divisor[..., 0])


@dataclass(frozen=True)
class _Bare(Separable):
    """q . k as it stands: what is divided has been divided before."""

    def separate(self, query, key, value, places: Places, scale, **learned: Tensor) -> Separated:
        return Separated(query, key, value)


class NormalisedAttention(nn.Module):
    """The paper's layer: causal, each head divided by exp(W u), u the input of the layer.

    Args:
        width: of the tokens, in and out.
        heads: H.
        key_dim: width of a head's queries and keys, the paper's state expansion n; None = width/H.

    >>> attend = NormalisedAttention(8, heads=2, key_dim=16)
    >>> x = torch.randn(1, 5, 8)
    >>> whole, state = attend(x), attend.init_state(1)
    >>> first, state = attend.step(x[:, :2], state)
    >>> rest, state = attend.step(x[:, 2:], state)
    >>> torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-6)
    True
    """

    def __init__(self, width: int, heads: int, *, key_dim: int | None = None):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        if key_dim is not None and key_dim < 1:
            raise ValueError(f"key_dim must be at least 1, got {key_dim}")
        self.heads, self.key_dim = heads, key_dim or width // heads
        self.system = _Bare()
        self.to_query = nn.Linear(width, heads * self.key_dim, bias=False)
        self.to_key = nn.Linear(width, heads * self.key_dim, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        self.to_log_normaliser = nn.Linear(width, heads, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, T, width) -> (B, T, width); `seen`, bool (B, T), is False for padding."""
        return self.step(x, self.init_state(x.shape[0]), seen)[0]

    can_truncate: ClassVar[bool] = False
    can_merge: ClassVar[bool] = True

    def init_state(self, batch: int, start: int = 0) -> LinearState:
        """The state before the first token, which stands at `start`."""
        weight = self.to_out.weight
        factory = {"device": weight.device, "dtype": weight.dtype}
        value_dim = weight.shape[0] // self.heads
        shape = (batch, self.heads, self.key_dim, value_dim)
        return self.system.init_state(*shape, start=start, **factory)

    def merge(self, first: LinearState, second: LinearState) -> LinearState:
        """The state after two pieces, as the system's."""
        return self.system.merge(first, second)

    def step(self, x: Tensor, state: LinearState, seen: Tensor | None = None):
        """The next tokens, one or many: (out, new state)."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_query, self.to_key, self.to_value)
        )
        # float32 at least: e^12 is more than float16 holds
        log_normaliser = self.to_log_normaliser(x).transpose(1, 2)[..., None]
        compute = torch.promote_types(x.dtype, torch.float32)
        query, key, value = (x.to(compute) for x in (query, key, value))
        query = query * torch.exp(-log_normaliser.to(compute))
        out, state = self.system.step(query, key, value, state, Visible(causal=True), seen)
        return self.to_out(out.to(x.dtype).transpose(1, 2).flatten(-2)), state


ENTRY = Entry(
    name="normalised",
    title="normalised (exp)",
    system=Normalised(),
    formula="q·k / exp(w·q)",
    paper="Sieber et al. 2024",
    arxiv="2405.15731",
    score="dot",
    positivity="none",
    normaliser="exp(w·q)",
    walk="linear",
    laws=Laws(non_negative=False),
    exceptions=EXCEPTIONS,
    claim="Far better than linear attention in recall with a small state (2405.15731, figure 3).",
)
