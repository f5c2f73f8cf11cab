"""TransNormerLLM: products that decay with the distance; the output is normed, no row has a sum.

Qin et al., "TransNormerLLM" and "Various Lengths, Constant Speed" (lightning attention), arXiv
2307.14995 and 2405.17381::

    GLA:  out_i = SRMSNorm(sum_j (silu(q_i) . silu(k_j)) g_h^(i-j) v_j) * u_i
    block:  x <- x + GLA(SRMSNorm(x)),  x <- x + SGLU(SRMSNorm(x))
    SRMSNorm(x) = x / sqrt(mean x^2),  SGLU(x) = (x V * x U) W

The norm runs over the concatenated heads, the gate u has no activation, nothing has a bias or a
gain. `TransNormer` is the sum and its norm, `TransNormerBlock` the whole block.

The decay is a constant of head and layer, and paper and code differ ("paper", "alibi")::

    paper   rate = 8 h/H (1 - l/L), h = 0..H-1, l = 0..L-1: head 0 never decays, the last one
            remembers a single token
    alibi   rate = slope_h (1 - l/(L-1) + 1e-5), ALiBi's slopes, 1/2 ... 1/256 for 8 heads:
            the released models, and our default

LRPE-d (`lrpe=True`) turns each element by an angle of its own besides, cos(theta (i - j)), theta
learned per head and element, initially 10000^(-2j / HD) with j over all channels: features of twice
the width. The released models have it in the first layer alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax.entry import Entry, Laws
from aftermax.linear.elu import EXCEPTIONS
from aftermax.linear.separable import LinearState, Places, Separable, Separated
from aftermax.linear.walk import repeated
from aftermax.visible import Visible, check_tokens

EPS = 1e-6
"""Of the norm, under the root; the authors'."""


def srms_norm(x: Tensor, dims: int | tuple[int, ...] = -1) -> Tensor:
    """x / sqrt(mean x^2 + 1e-6), without a gain; in float32 at least.

    >>> srms_norm(torch.tensor([3.0, 4.0]))
    tensor([0.8485, 1.1314])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # divided by what is largest, squares do not overflow
    largest = wide.detach().abs().amax(dims, keepdim=True).clamp_min(1)
    wide = wide / largest
    eps = EPS / largest.square()
    return (wide * (wide.square().mean(dims, keepdim=True) + eps).rsqrt()).to(x.dtype)


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slopes as its authors' code has them, between powers of two from the next series.

    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes + (alibi_slopes(2 * power)[::2][: heads - power] if heads > power else [])


def decay_rates(
    heads: int, layer: int, layers: int, decay: Literal["alibi", "paper"] = "alibi"
) -> Tensor:
    """rate (H,) in float64, g = e^-rate, of layer `layer` of `layers`, counted from 0.

    >>> decay_rates(4, 0, 2, "paper")
    tensor([0., 2., 4., 6.], dtype=torch.float64)
    """
    if decay == "paper":
        heads_part = [8 * h / heads for h in range(heads)]
        layer_part = 1 - layer / layers
    else:
        heads_part = alibi_slopes(heads)
        layer_part = 1 - layer / max(1, layers - 1) + 1e-5
    return torch.tensor(heads_part, dtype=torch.float64) * layer_part


@dataclass(frozen=True)
class TransNormer(Separable):
    """silu features with decay, normed over the heads of a token.

    Args:
        decay: "alibi" (the released models) or "paper"; see the head of this file.
        lrpe: whether elements are turned by learned angles too.
        layer, layers: where it stands, which the decay depends on; `placed` says it.

    >>> x = torch.ones(1, 2, 3, 2)
    >>> TransNormer().attend(x, x, x, Visible(causal=True))[0, 0, 2]
    tensor([0.9710, 0.9710])
    """

    decay: Literal["alibi", "paper"] = "alibi"
    lrpe: bool = False
    layer: int = 0
    layers: int = 1
    decays: ClassVar[bool] = True
    mixes_heads: ClassVar[bool] = True

    def __post_init__(self):
        if self.decay not in ("alibi", "paper"):
            raise ValueError(f"decay must be 'alibi' or 'paper', got {self.decay!r}")
        if not 0 <= self.layer < self.layers:
            raise ValueError(f"layer {self.layer} is none of {self.layers}, counted from 0")

    def placed(self, layer: int, layers: int, longest: int) -> TransNormer:
        """The same as layer `layer` of `layers`."""
        return replace(self, layer=layer, layers=layers)

    def learned(self, heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        if not self.lrpe:
            return {}
        channels = torch.arange(heads * key_dim, dtype=torch.float64)
        theta = 10000.0 ** (-2 * channels / (heads * key_dim))
        return {"theta": theta.float().view(heads, key_dim)}

    def state_shape(self, key_dim: int, value_dim: int) -> tuple[int, int]:
        return (2 if self.lrpe else 1) * key_dim, value_dim

    def separate(self, query, key, value, places: Places, scale, **learned: Tensor) -> Separated:
        query, key = F.silu(query), F.silu(key)
        heads, kv_heads = query.shape[1], key.shape[1]
        # decay and angles are those of the query's head
        key, value = (repeated(x, heads // kv_heads) for x in (key, value))
        if self.lrpe:
            theta = learned["theta"].double()[:, None]
            query = _turned(query, theta, places.query)
            key = _turned(key, theta, places.key)
        rates = self.rates(heads).to(query)
        return Separated(query if scale is None else scale * query, key, value, rates)

    def rates(self, heads: int) -> Tensor:
        return decay_rates(heads, self.layer, self.layers, self.decay)

    def finish(self, out, total, **learned: Tensor) -> Tensor:
        return srms_norm(out, (1, 3))


def _turned(x: Tensor, theta: Tensor, position: Tensor) -> Tensor:
    angle = theta * position[:, None]
    return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], -1)


class GatedLinearAttention(nn.Module):
    """SRMSNorm(sum) * u W_o, with one projection to query, key, value and gate.

    `forward` and `step` take (B, T, width); see `TransNormerBlock` for the options.
    """

    def __init__(self, width: int, heads: int, system: TransNormer):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads, self.system = heads, system
        self.to_query_key_value_gate = nn.Linear(width, 4 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.learned = nn.ParameterDict(
            {
                name: nn.Parameter(start)
                for name, start in system.learned(heads, width // heads, width // heads).items()
            }
        )

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        if seen is not None:
            check_tokens("seen", seen, *x.shape[:2])
            seen = seen[:, None, None]
        query, key, value, gate = self._project(x)
        visible = Visible(causal=True, mask=seen)
        out = self.system.attend(query, key, value, visible, **self.learned)
        return self._join(out, gate)

    def init_state(self, batch: int, start: int = 0) -> LinearState:
        weight = self.to_out.weight
        width = weight.shape[0] // self.heads
        return self.system.init_state(
            batch, self.heads, width, width, start=start, device=weight.device, dtype=weight.dtype
        )

    def merge(self, first: LinearState, second: LinearState) -> LinearState:
        return self.system.merge(first, second)

    def step(self, x: Tensor, state: LinearState, seen: Tensor | None = None):
        query, key, value, gate = self._project(x)
        visible = Visible(causal=True)
        out, state = self.system.step(query, key, value, state, visible, seen, **self.learned)
        return self._join(out, gate), state

    def _project(self, x: Tensor) -> list[Tensor]:
        *heads, gate = self.to_query_key_value_gate(x).chunk(4, -1)
        return [h.unflatten(-1, (self.heads, -1)).transpose(1, 2) for h in heads] + [gate]

    def _join(self, out: Tensor, gate: Tensor) -> Tensor:
        return self.to_out(out.transpose(1, 2).flatten(-2) * gate)


class SGLU(nn.Module):
    """(x V * x U) W, without an activation."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.to_both = nn.Linear(width, 2 * hidden, bias=False)
        self.to_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.to_both(x).chunk(2, -1)
        return self.to_out(left * right)


class TransNormerBlock(nn.Module):
    """One layer of TransNormerLLM: gated linear attention and SGLU, both behind SRMSNorm.

    Args:
        width: of the tokens, in and out.
        heads: H, a divisor of the width.
        layer, layers: where the block stands among how many, counted from 0; the decay follows.
        hidden: width of the SGLU; None = 8/3 of the width, up to a multiple of 128 (ours: the paper
            gives the sizes of its models alone).
        decay: "alibi" (the released models) or "paper".
        lrpe: LRPE-d; None = in layer 0 alone, as the released models ("Mix").

    Nothing but the angles of LRPE is learned beyond the projections. `step` is the robust
    inference of the paper: S_t = g S_{t-1} + k v^T, never the powers g^-t, which overflow.

    >>> block = TransNormerBlock(16, heads=2, layer=0, layers=4)
    >>> x = torch.randn(1, 5, 16)
    >>> whole, state = block(x), block.init_state(1)
    >>> first, state = block.step(x[:, :2], state)
    >>> rest, state = block.step(x[:, 2:], state)
    >>> torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-5)
    True
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        layer: int = 0,
        layers: int = 1,
        hidden: int | None = None,
        decay: Literal["alibi", "paper"] = "alibi",
        lrpe: bool | None = None,
    ):
        super().__init__()
        system = TransNormer(decay, layer == 0 if lrpe is None else lrpe, layer, layers)
        self.attend = GatedLinearAttention(width, heads, system)
        self.feed = SGLU(width, hidden or 128 * math.ceil(8 * width / 3 / 128))

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, T, width) -> the same; `seen`, bool (B, T), is False for padding."""
        x = x + self.attend(srms_norm(x), seen)
        return x + self.feed(srms_norm(x))

    can_truncate: ClassVar[bool] = False
    can_merge: ClassVar[bool] = True

    def init_state(self, batch: int, start: int = 0) -> LinearState:
        """The state before the first token, which stands at `start`."""
        return self.attend.init_state(batch, start)

    def merge(self, first: LinearState, second: LinearState) -> LinearState:
        """The state after two pieces of one layer, as `TransNormer.merge`."""
        return self.attend.merge(first, second)

    def step(self, x: Tensor, state: LinearState, seen: Tensor | None = None):
        """The next tokens, one or many: (out, new state)."""
        out, state = self.attend.step(srms_norm(x), state, seen)
        x = x + out
        return x + self.feed(srms_norm(x)), state


def _entry(name: str, title: str, system: TransNormer, formula: str) -> Entry:
    return Entry(
        name=name,
        title=title,
        system=system,
        formula=formula,
        paper="Qin et al. 2023",
        arxiv="2307.14995",
        score="silu(q)·silu(k)",
        positivity="none",
        normaliser="SRMSNorm",
        reweight="decay γ^(i − j)",
        walk="linear",
        laws=Laws(non_negative=False),
        exceptions=EXCEPTIONS
        | {
            "key_order": "its weights decay with the distance of the tokens",
            "head_independence": "the norm runs over all heads of a token together",
        },
        claim="Better than softmax at 385 M (loss 2.248 against 2.362 bits), constant speed.",
        positions="none",
    )


DECAY = _entry("transnormer", "TransNormer", TransNormer(), "SRMSNorm of silu(q)·silu(k) γ^(i − j)")
LRPE = _entry(
    "transnormer-lrpe",
    "TransNormer (LRPE-d)",
    TransNormer(lrpe=True),
    "SRMSNorm of Σ silu(q)silu(k) cos θ(i − j) γ^(i − j)",
)
