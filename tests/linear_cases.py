"""The linear family: what should come out, and by how much float32 may miss it."""

from __future__ import annotations

import torch
from torch import Tensor

from aftermax import Entry, Visible

from .cases import Case, gradients
from .native import F64, running

EPS = torch.finfo(torch.float32).eps

DRAWS, TIMES, UNITS = 4, 6, 16
"""How far rounded inputs carry a result is measured, not guessed: the float64 reference runs again
on inputs moved by an eps, and a result may be off by `TIMES` the root mean square of `DRAWS` such
distances (a kernel's rounding is one more draw, and the largest of many lies that far out), and by
`UNITS` eps of the largest number beside it, for the sums themselves."""


def results(entry: Entry, case: Case, visible: Visible, **options) -> list[Tensor]:
    """Outputs and all gradients."""
    leaves = case.wanting_gradients()
    out = leaves.attend(entry, visible, enable_gqa=True, **options)
    return [out.detach(), *gradients(out, leaves)]


def assert_right(entry: Entry, case: Case, visible: Visible, names: list[str]) -> None:
    """Float32 on these bodies gives what the reference gives in float64."""
    exact = case.to(F64)
    right = results(entry, exact, visible, impl="reference")
    random = torch.Generator().manual_seed(1)

    def nearly(x: Tensor) -> Tensor:
        return x * (1 + EPS * torch.randn(x.shape, generator=random, dtype=F64))

    squares = [torch.zeros_like(x) for x in right]
    for _ in range(DRAWS):
        moved = results(entry, exact.map(nearly), visible, impl="reference")
        for total, x, y in zip(squares, moved, right, strict=True):
            total += (x - y) ** 2 / DRAWS
    for name in names:
        with running(name):
            got = results(entry, case, visible, impl="cpu")
        for which, (x, y, square) in enumerate(zip(got, right, squares, strict=True)):
            near = tuple(range(max(0, y.ndim - 2), y.ndim))
            allowed = TIMES * square.mean(near, keepdim=True).sqrt()
            allowed = allowed + UNITS * EPS * y.abs().amax(near, keepdim=True)
            worst = ((x.to(F64) - y).abs() / allowed.clamp_min(1e-30)).max().item()
            assert worst <= 1, (
                f"{entry.name} on {name}: number {which} of out and gradients is off by {worst:.2f}"
                " of what it may be"
            )
