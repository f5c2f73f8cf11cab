"""What the tests of SOFT and of its inverse share."""

import torch

from aftermax.scores import gaussian

from .cases import F64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=F64)


def kernel_of(count: int, width: int, size: float) -> torch.Tensor:
    x = size * normal(count, width)
    return gaussian(x, x, width**-0.5)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).detach().norm() / wanted.detach().norm())
