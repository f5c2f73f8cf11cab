"""softmax, log-softmax and logsumexp over one dimension, at the speed of memory.

The calls are torch's. On the CPU, in float32, bfloat16 and float16, they run on the compiled
kernels; everywhere else on `aftermax.reference`. What the kernels do differently from torch's:

- a softmax walks its row by one of four algorithms (`impl=` names them, see `softmax`), the
  fastest for the row's length by default;
- e^x is kept as a pair of a mantissa and an exponent, so that x - max is never rounded, and sums
  run in double: rows of 2^26 elements stay within 5 units in the last place of float32;
- one long row is shared among all threads, with the same result for any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aftermax import kernels, reference
from aftermax.kernels.ops import ALGORITHMS, EMPTIES, changed
from aftermax.reference import NOT_IN_ONNX, onnx_export, transformed

PLAIN_IMPLS = ("reference", "cpu")
"""What `impl=` may say where the kernel has one algorithm."""

IMPLS = (*PLAIN_IMPLS, *(f"cpu-{name}" for name in ALGORITHMS[1:]))
"""What `impl=` of the softmaxes may say."""

KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

MAX_DIMS = 64

_AUTO = 0

_forward: Any = None if kernels.absent() else torch.ops.aftermax.softmax_forward.default
_into: Any = None if kernels.absent() else torch.ops.aftermax.softmax_out.default


def softmax(
    input: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    empty: str = "nan",
    impl: str | None = None,
) -> Tensor:
    """y_i = e^(x_i) / sum_j e^(x_j) along `dim`, as `torch.softmax`.

    Args:
        input: any shape and strides; float32, bfloat16 and float16 run on the kernels, float64 on
            the reference. Half precision is computed in float32 and rounded once.
        dim: the dimension that sums to one.
        dtype: the dtype to compute and return in; the input is cast first, as in torch.
        out: where the result goes: the shape and dtype of the result, any strides, not overlapping
            the input unless it is the input itself. A result in reused memory costs much less than
            a fresh one (docs/kernels.md). Not differentiable, as in torch.
        empty: what a row of nothing but -inf gives: "nan" (torch's answer) or "zero".
        impl: "reference", "cpu", or an algorithm of the kernels by its name:
            "cpu-three-pass-recompute" (max; sum of exp; exp again), "cpu-three-pass-reload" (max;
            exp, stored; scaled), "cpu-two-pass" (sum of mantissa-exponent pairs; exp: arXiv:
            2001.04438) or "cpu-online" (running max and sum; exp: arXiv:1805.02867). None picks the
            kernels where they take the input, and "cpu" the algorithm by the row's length.

    Returns:
        The shape of `input`, contiguous (or `out`).

    Raises:
        TypeError: for an input that is not floating point.
        ValueError: for an `empty` or `impl` that there is not, or an `out` that does not fit.
        RuntimeError: for an `impl` that cannot run here, or an `out` in a graph.
        IndexError: for a `dim` out of range.

    >>> softmax(torch.tensor([0.0, 1.0, -torch.inf]))
    tensor([0.2689, 0.7311, 0.0000])
    >>> softmax(torch.full((2,), -torch.inf), empty="zero")
    tensor([0., 0.])
    """
    return _softmax("softmax", input, dim, dtype, out, empty, impl)


def log_softmax(
    input: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """y_i = x_i - log sum_j e^(x_j) along `dim`, as `torch.log_softmax`. Arguments as `softmax`.

    The two reloading and recomputing three-pass walks are one and the same here: nothing is stored
    between the passes.

    >>> log_softmax(torch.tensor([0.0, 0.0]))
    tensor([-0.6931, -0.6931])
    """
    return _softmax("log_softmax", input, dim, dtype, out, "nan", impl)


def logsumexp(
    input: Tensor,
    dim: int | Sequence[int],
    keepdim: bool = False,
    *,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """log sum_j e^(x_j) along `dim` (one or several), as `torch.logsumexp`: one read of the input.

    Args:
        input: as for `softmax`.
        dim: the dimensions to sum over; () is all of them.
        keepdim: keep them with size 1.
        out: where the result goes.
        impl: "reference", "cpu" or None.

    Raises:
        As `softmax`.

    >>> logsumexp(torch.zeros(2, 4), dim=1)
    tensor([1.3863, 1.3863])
    """
    _check_input("logsumexp", input)
    dims = (dim,) if isinstance(dim, int) else tuple(dim) or tuple(range(input.ndim))
    for d in dims:
        _check_dim("logsumexp", input, d)
    if not use_kernels("logsumexp", impl, PLAIN_IMPLS, input):
        result = reference.logsumexp(input, dims, keepdim)
    else:
        result = _kernel_logsumexp(input, dims, keepdim)
    if out is None:
        return result
    _check_out("logsumexp", input, out, result.shape, input.dtype)
    return out.copy_(result)


def _kernel_logsumexp(input: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    if input.ndim == 0:
        return torch.ops.aftermax.logsumexp(input, 0)[0]
    dims = tuple(d % input.ndim for d in dims)
    if len(dims) == 1:
        result = torch.ops.aftermax.logsumexp(input, dims[0])[0]
    else:
        rows = input.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))
        result = torch.ops.aftermax.logsumexp(rows, -1)[0]
    if keepdim:
        for d in sorted(dims):
            result = result.unsqueeze(d)
    return result


def _softmax(
    name: str,
    input: Tensor,
    dim: int,
    dtype: torch.dtype | None,
    out: Tensor | None,
    empty: str,
    impl: str | None,
) -> Tensor:
    log = name == "log_softmax"
    differentiable = input.requires_grad and torch.is_grad_enabled()
    if (
        _forward is not None
        and impl is dtype is None
        and not differentiable
        and input.dtype in KERNEL_DTYPES
        and input.is_cpu
        and input.layout is torch.strided
        and empty in EMPTIES
        and not transformed()
        and not onnx_export()
        and -input.ndim <= dim < input.ndim <= MAX_DIMS
    ):  # the usual call, before the checks that small inputs would pay for
        options = (dim, log, EMPTIES.index(empty), _AUTO, 0)
        if out is None:
            return _forward(input, *options)
        if (
            out.shape == input.shape
            and out.dtype is input.dtype
            and out.is_cpu
            and out.layout is torch.strided
            and not (out.requires_grad and torch.is_grad_enabled())
        ):
            _into(input, out, *options)
            changed(out)
            return out
    _check_input(name, input, dtype)
    _check_dim(name, input, dim)
    if empty not in EMPTIES:
        raise ValueError(f"{name}: empty={empty!r} is none of {', '.join(map(repr, EMPTIES))}")
    if dtype is not None:
        input = input.to(dtype)
    if out is not None:
        _check_out(name, input, out, input.shape, input.dtype)
    if not use_kernels(name, impl, IMPLS, input):
        result = reference.log_softmax(input, dim) if log else reference.softmax(input, dim, empty)
        return result if out is None else out.copy_(result)
    algorithm = ALGORITHMS.index(impl[4:]) if impl and impl.startswith("cpu-") else _AUTO
    options = (dim, log, EMPTIES.index(empty), algorithm, 0)
    if out is None:
        op = torch.ops.aftermax.softmax if differentiable else torch.ops.aftermax.softmax_forward
        return op.default(input, *options)
    _into(input, out, *options)
    changed(out)
    return out


def use_kernels(name: str, impl: str | None, impls: Sequence[str], *inputs: Tensor) -> bool:
    """Whether `impl` means the kernels for these inputs; raises where it cannot be had."""
    if impl is None:
        return kernels.absent() is None and _refusal(inputs) is None
    if impl not in impls:
        raise ValueError(f"{name}: impl={impl!r} is none of {', '.join(map(repr, impls))}")
    if impl == "reference":
        return False
    if kernels.absent() is not None:
        raise RuntimeError(f"{name}: impl={impl!r}, but {kernels.absent()}")
    refusal = _refusal(inputs)
    if refusal is not None:
        raise RuntimeError(f"{name}: impl={impl!r}, but {refusal}")
    return True


def _refusal(inputs: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot take these, or None."""
    for x in inputs:
        if x.device.type != "cpu":
            return f"the input is on {x.device}, not on the CPU"
        if x.dtype not in KERNEL_DTYPES:
            return f"the kernels take float32, bfloat16 and float16, not {x.dtype}"
        if x.ndim > MAX_DIMS:
            return f"the kernels take up to {MAX_DIMS} dimensions, not {x.ndim}"
        if x.layout != torch.strided:
            return f"the kernels take strided tensors, not {x.layout}"
    if transformed():
        return "the kernels know no torch.func transforms and no forward-mode derivatives"
    return NOT_IN_ONNX if onnx_export() else None


def _check_input(name: str, input: Tensor, dtype: torch.dtype | None = None) -> None:
    dtype = input.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"{name} takes floating point numbers, not {dtype}")


def _check_dim(name: str, input: Tensor, dim: int) -> None:
    dims = max(1, input.ndim)
    if not -dims <= dim < dims:
        shape = tuple(input.shape)
        raise IndexError(
            f"{name}: dim={dim} of an input of shape {shape}; {-dims} to {dims - 1} fit"
        )


def _check_out(
    name: str, input: Tensor, out: Tensor, shape: torch.Size, dtype: torch.dtype
) -> None:
    if out.shape != shape or out.dtype != dtype or out.device != input.device:
        raise ValueError(
            f"{name}: out is {tuple(out.shape)}, {out.dtype} on {out.device}; the result is"
            f" {tuple(shape)}, {dtype} on {input.device}"
        )
    if torch.is_grad_enabled() and (input.requires_grad or out.requires_grad):
        raise RuntimeError(f"{name}: out= is not differentiable; detach the tensors or use no_grad")
