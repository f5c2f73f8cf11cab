"""What the tests of the kernels share."""

import contextlib

import pytest
import torch

from aftermax import kernels

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
HALVES = (BF16, F16)
DTYPES = (F32, *HALVES)
REDUCTIONS = ("mean", "sum", "none")
INF, NAN, MAX = torch.inf, torch.nan, torch.finfo(F32).max

needs_kernels = pytest.mark.skipif(kernels.absent() is not None, reason=str(kernels.absent()))


@contextlib.contextmanager
def running(name):
    """The body of that name, and afterwards the one that was in use."""
    if kernels.absent() is not None:
        pytest.skip(kernels.absent())
    before = kernels.isa()
    try:
        kernels.use_isa(name)
    except RuntimeError as lacking:
        pytest.skip(str(lacking))
    try:
        yield
    finally:
        kernels.use_isa(before)


def bodies():
    """The names of all bodies that run here; none without a library."""
    if kernels.absent() is not None:
        return []
    before, found = kernels.isa(), []
    for name in kernels.ISAS:
        with contextlib.suppress(RuntimeError):
            kernels.use_isa(name)
            found.append(name)
    kernels.use_isa(before)
    return found


def rounded_weights(dtype, spread):
    """By how much a result may be off because its weights were rounded to bfloat16, which the body
    does that multiplies pairs of them: half an ulp of each. `spread` = sum_j w_ij |v_j|."""
    pairs = kernels.absent() is None and kernels.isa() == "avx512bf16" and dtype == BF16
    return torch.finfo(BF16).eps / 2 * spread if pairs else torch.zeros_like(spread)


def normal(*shape, scale=1.0, dtype=F32, seed=0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
