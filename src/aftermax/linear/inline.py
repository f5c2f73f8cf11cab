"""InLine: linear attention that subtracts its mean, where others divide by their sum.

Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention", arXiv 2412.06590::

    w_ij = (s/N) q_i . k_j - (s/N^2) q_i . sum_s k_s + 1/N,    s = 1/sqrt(d)
    out_i = (s/N) q_i^T sum_j k_j v_j^T + (1 - (s/N) q_i . sum_j k_j) mean_j v_j

Rows sum to one; weights may be negative. Division by the sum forgets the length of a query, and
different queries then get the same weights; subtraction does not: the weights tell any two queries
apart if the feature map does and there are d + 1 keys in general position
(`aftermax.lab.injectivity`). The factor s/N stands in the authors' code and not in their equation
5. Their released models use the identity as feature map, which is the default; with "relu" two
queries that differ in a negative element alone are the same.

The paper's attention sees all tokens. The causal form here, sums and N up to token i, is ours.

`InLineAttention` adds the paper's local residual (equation 6): a depth-wise 3 x 3 convolution of
the values whose nine weights per channel are predicted from the mean token of the image; or, causal
and ours, a convolution over the last tokens whose weights are predicted at each token from the mean
so far.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax.entry import Entry, Laws
from aftermax.linear.elu import EXCEPTIONS
from aftermax.linear.separable import LinearState, Places, Separable, Separated, wide
from aftermax.scores import inv_sqrt_dim
from aftermax.state import bytes_of, rows_of
from aftermax.visible import Visible

KERNELS = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "leaky-relu": lambda x: F.leaky_relu(x, 0.01),
    "exp": lambda x: torch.exp(0.2 * x),
}
"""The feature maps of the authors' code; each is a function of one element."""


@dataclass(frozen=True)
class InLine(Separable):
    """(s/N) q . k, less its mean over the keys, plus 1/N.

    Args:
        kernel: the feature map of queries and keys, one of `KERNELS`.

    >>> x = torch.eye(3)[None, None]
    >>> InLine().attend(x, x, x, Visible(), scale=1.0)[0, 0, 0]
    tensor([0.5556, 0.2222, 0.2222])
    """

    kernel: Literal["identity", "relu", "leaky-relu", "exp"] = "identity"
    totals: ClassVar[bool] = True
    needs_key_sums: ClassVar[bool] = True

    def __post_init__(self):
        if self.kernel not in KERNELS:
            raise ValueError(
                f"InLine's kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}"
            )

    def state_shape(self, key_dim: int, value_dim: int) -> tuple[int, int]:
        return key_dim + 1, value_dim + 1

    def key_features(self, key: Tensor) -> Tensor:
        return KERNELS[self.kernel](key)

    def separate(self, query, key, value, places: Places, scale, **learned: Tensor) -> Separated:
        assert places.key_sums is not None
        number = places.count.clamp_min(1)[..., None]
        factor = inv_sqrt_dim(key.shape[-1]) if scale is None else scale
        query = KERNELS[self.kernel](query) * (factor / number)
        of_mean = (1 - (query * places.key_sums).sum(-1, keepdim=True)) / number
        key = self.key_features(key)
        ones = key.new_ones((*key.shape[:-1], 1))
        return Separated(torch.cat([query, of_mean], -1), torch.cat([key, ones], -1), value)


@dataclass(frozen=True)
class InLineState:
    """The state of the system, and what the local residual needs besides."""

    system: LinearState
    values: Tensor  # (B, window - 1, width), of the last tokens
    tokens: Tensor  # (B, width), the sum of all so far, in float32 at least

    @property
    def length(self) -> int:
        return self.system.length

    @property
    def bytes(self) -> int:
        return self.system.bytes + bytes_of(self)

    def reorder(self, index: Tensor) -> InLineState:
        return replace(rows_of(self, index), system=self.system.reorder(index))


class InLineAttention(nn.Module):
    """InLine with the local residual, on a grid of tokens or causal.

    Args:
        width: of the tokens, in and out.
        heads: H, a divisor of the width.
        grid: rows and columns of the image's tokens; None with `causal`.
        causal: our extension for sequences, in place of the grid.
        window: tokens that the causal residual reaches back, the token itself included (ours: 4).
        kernel: as in `InLine`.
        leading: tokens before the grid (a class token): they have no residual, but are part of the
            mean, as in the authors' DeiT.

    Shapes: (B, T, width) -> the same, T = leading + rows * columns on a grid.

    >>> x = torch.randn(2, 12, 16)
    >>> InLineAttention(16, heads=2, grid=(3, 4))(x).shape
    torch.Size([2, 12, 16])
    >>> attend = InLineAttention(16, heads=2, causal=True)
    >>> first, state = attend.step(x[:, :5], attend.init_state(2))
    >>> torch.allclose(first, attend(x)[:, :5], atol=1e-6)
    True
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        grid: tuple[int, int] | None = None,
        causal: bool = False,
        window: int = 4,
        kernel: Literal["identity", "relu", "leaky-relu", "exp"] = "identity",
        leading: int = 0,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        if (grid is None) is not causal:
            raise ValueError(
                f"InLineAttention needs a grid, or causal=True without; got {grid=}, {causal=}"
            )
        if window < 1:
            raise ValueError(f"window must be at least 1 (the token itself), got {window}")
        self.heads, self.grid, self.causal, self.leading = heads, grid, causal, leading
        self.system = InLine(kernel)
        self.weights = window if causal else 9
        self.to_query_key_value = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        # of the mean token, head by head
        self.to_weights = nn.Sequential(
            nn.Conv1d(width, width, 1, groups=heads),
            nn.GELU(),
            nn.Conv1d(width, self.weights * width, 1, groups=heads),
        )

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, T, width) -> (B, T, width). `seen`, bool (B, T), is False for padding (causal)."""
        if self.causal:
            return self.step(x, self.init_state(x.shape[0]), seen)[0]
        if seen is not None:
            raise ValueError("a grid has no padding: seen is for causal=True")
        rows, columns = self.grid  # type: ignore[misc]
        if x.shape[1] != self.leading + rows * columns:
            raise ValueError(
                f"expected {self.leading} + {rows} x {columns} tokens, got {tuple(x.shape)}"
            )
        query, key, value = self._project(x)
        heads = self._split(query), self._split(key), self._split(value)
        out = _joined(self.system.attend(*heads, Visible()))
        of_grid = value[:, self.leading :]
        residual = self._on_grid(of_grid, self.to_weights(x.mean(1)[..., None]))
        return self.to_out(out + F.pad(residual, (0, 0, self.leading, 0)))

    can_truncate: ClassVar[bool] = False

    @property
    def can_merge(self) -> bool:
        return self.causal

    def init_state(self, batch: int, start: int = 0) -> InLineState:
        """The state before the first token, which stands at `start`."""
        if not self.causal:
            raise ValueError("InLineAttention on a grid has no state: it sees all tokens at once")
        weight = self.to_out.weight
        width, factory = weight.shape[0], {"device": weight.device, "dtype": weight.dtype}
        head = width // self.heads
        return InLineState(
            self.system.init_state(batch, self.heads, head, head, start=start, **factory),
            torch.zeros(batch, self.weights - 1, width, **factory),
            torch.zeros(batch, width, device=weight.device, dtype=wide(weight.dtype)),
        )

    def step(self, x: Tensor, state: InLineState, seen: Tensor | None = None):
        """The next tokens, any number of them: (out, new state)."""
        if x.shape[1] == 0:  # which no convolution takes
            return self.to_out(x), state
        query, key, value = self._project(x)
        heads = self._split(query), self._split(key), self._split(value)
        out, system = self.system.step(*heads, state.system, Visible(causal=True), seen)
        real = x.to(state.tokens.dtype)
        real = real if seen is None else real.masked_fill(~seen[..., None], 0)
        value = value if seen is None else value.masked_fill(~seen[..., None], 0)
        sums = state.tokens[:, None] + real.cumsum(1)
        number = torch.ones_like(real[..., 0]) if seen is None else seen.to(real.dtype)
        number = state.system.count[:, None] + number.cumsum(1)
        weights = self.to_weights((sums / number.clamp_min(1)[..., None]).to(x.dtype).mT)
        weights = weights.unflatten(1, (-1, self.weights)).permute(0, 3, 2, 1)  # (B, T, w, width)
        values = torch.cat([state.values, value], 1)
        near = values.unfold(1, self.weights, 1).permute(0, 1, 3, 2).flip(2)  # the token first
        out = self.to_out(_joined(out) + (weights * near).sum(2))
        last = values[:, values.shape[1] - (self.weights - 1) :]
        return out, InLineState(system, last, sums[:, -1])

    def merge(self, first: InLineState, second: InLineState) -> InLineState:
        """The state after two pieces, of which the second was read from `start=first.length`."""
        system = self.system.merge(first.system, second.system)
        new = min(second.length - second.system.start, self.weights - 1)
        kept = second.values.shape[1] - new  # what stands there was none of its own
        values = torch.cat([first.values[:, new:], second.values[:, kept:]], 1)
        return InLineState(system, values, first.tokens + second.tokens)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.to_query_key_value(x).chunk(3, -1)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _on_grid(self, value: Tensor, weights: Tensor) -> Tensor:
        """The depth-wise convolution, each image and channel with weights of its own."""
        batch, tokens, width = value.shape
        image = value.mT.reshape(1, batch * width, *self.grid)  # type: ignore[misc]
        kernel = weights.reshape(batch * width, 1, 3, 3)
        out = F.conv2d(image, kernel, padding=1, groups=batch * width)
        return out.reshape(batch, width, tokens).mT


def _joined(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(-2)


ENTRY = Entry(
    name="inline",
    title="InLine",
    system=InLine(),
    formula="(s/N) q·k − its mean + 1/N",
    paper="Han et al. 2024",
    arxiv="2412.06590",
    score="dot / √d",
    positivity="none",
    normaliser="less the mean",
    reweight="1/N",
    walk="linear",
    laws=Laws(rows_sum_to_one=True, rows_at_most_one=True, non_negative=False, length_aware=True),
    exceptions=EXCEPTIONS,
    claim="Better than softmax on images (ImageNet, DeiT-T 74.5); it has no causal form but ours.",
    image_module=InLineAttention,
)
