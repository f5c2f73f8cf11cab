"""Where a token stands: the one place that computes positions.

A position encoding does at most two things: it turns the query and key vectors (RoPE), or it adds a
term to the scores (ALiBi, through `Visible.slopes`). Both depend on index differences alone, so
that padding on the left shifts nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoPositions:
    """No position encoding ("NoPE"): order is known only through what each row sees."""

    def check(self, head_dim: int) -> None:
        """Raise ValueError where heads of this width cannot be placed."""

    def rotate(self, vectors: Tensor, start: int) -> Tensor:
        """Vectors (B, H, T, D) whose first token stands at position `start`."""
        return vectors

    def slopes(self, heads: int) -> Tensor | None:
        """ALiBi slopes (H,), or None."""
        return None


@dataclass(frozen=True)
class RoPE(NoPositions):
    """Rotary positions (Su et al., arXiv 2104.09864), the halves of a head as pairs.

    Args:
        base: 10000, the paper's.
        fraction: the share of frequencies that turn, from the highest down; below 1 this is p-RoPE
            (Barbero et al., arXiv 2410.06205): the lowest frequencies, whose angles at long
            distance were never trained, stay still.

    >>> x = torch.ones(1, 1, 2, 4)
    >>> RoPE(fraction=0.5).rotate(x, 0)[0, 0, 1]
    tensor([-0.3012,  1.0000,  1.3818,  1.0000])
    """

    base: float = 10000.0
    fraction: float = 1.0

    def __post_init__(self):
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction is a share of the frequencies, 0 to 1, got {self.fraction}")

    def check(self, head_dim: int) -> None:
        if head_dim % 2:
            raise ValueError(f"RoPE turns pairs and needs an even head width, got {head_dim}")

    @classmethod
    def for_length(cls, tokens: int, base: float = 10000.0) -> RoPE:
        """p-RoPE whose frequencies all turn within a training length.

        Frequency base^-p has the wavelength 2 pi base^p, so the share that is kept, in whole
        frequencies, is p = ln(tokens / 2 pi) / ln(base). Slower ones never show all of their angles
        in training, and show new ones past it.

        >>> RoPE.for_length(64).fraction, RoPE.for_length(4096).fraction
        (0.25..., 0.70...)
        """
        return cls(base, min(1.0, max(0.0, math.log(tokens / (2 * math.pi)) / math.log(base))))

    def rotate(self, vectors: Tensor, start: int) -> Tensor:
        tokens, width = vectors.shape[-2:]
        self.check(width)
        half = width // 2
        # float64 angles: at position 10^6 a float32 angle is already off by several hundredths;
        # made on the CPU, since not every device has float64
        index = torch.arange(half, dtype=torch.float64)
        frequency = self.base ** (-index / half) * (index < round(self.fraction * half))
        position = torch.arange(start, start + tokens, dtype=torch.float64)
        angle = position[:, None] * frequency
        compute = torch.promote_types(vectors.dtype, torch.float32)
        cos, sin = (x.to(vectors.device, compute) for x in (angle.cos(), angle.sin()))
        left, right = vectors.to(compute).chunk(2, -1)
        turned = torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
        return turned.to(vectors.dtype)


@dataclass(frozen=True)
class ALiBi(NoPositions):
    """Attention with linear biases (Press et al., arXiv 2108.12409): score - slope_h * distance.

    Slopes are 2^(-8 h / H) for h = 1 ... H; for a head count that is no power of two the paper's
    code interleaves two such series, we use the one formula for all H.

    >>> ALiBi().slopes(2)
    tensor([0.0625, 0.0039])
    """

    def slopes(self, heads: int) -> Tensor:
        return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)


POSITIONS = {
    "rope": RoPE(),
    "p-rope": RoPE(fraction=0.5),
    "alibi": ALiBi(),
    "none": NoPositions(),
}
"""The encodings by the names that the command line uses."""
