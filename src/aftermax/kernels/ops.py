"""The operators of the library, one table: schema, fake, autograd.

Their CPU implementations register themselves when the library is loaded (`cpu/torch_ops.cpp`).
Where there is no weight or no bias, an empty tensor stands in its place. The backward operators are
not differentiable themselves: where a graph of the gradient is asked for, the backward pass of rows
and losses goes through `aftermax.reference` instead, and that of attention raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from aftermax import reference
from aftermax.kernels import attention_ops, expert_ops, linear_ops, selection_ops

functorch: Any = torch._C.__dict__["_functorch"]  # which its stubs leave out

ALGORITHMS = ("auto", "three-pass-recompute", "three-pass-reload", "two-pass", "online")
STORES = ("auto", "cached", "streamed")
EMPTIES = ("nan", "zero")
REDUCTIONS = ("mean", "sum", "none")

_CLASSES = "int ignore_index, float label_smoothing, float lse_square_scale, int reduction"


class Op(NamedTuple):
    """One operator of the table. `backward(ctx, *grads)` sees what `setup` kept."""

    schema: str
    fake: Callable[..., Any]
    setup: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None


def define() -> None:
    """Tell torch about every operator of the table."""
    for name, op in TABLE.items():
        qualified = f"aftermax::{name}"
        torch.library.define(qualified, op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, op.fake)
        if op.backward is not None:
            torch.library.register_autograd(qualified, op.backward, setup_context=op.setup)


def changed(tensor: Tensor) -> None:
    """Tell autograd that an operator wrote over the tensor: who saved it before must not use it.

    torch does so by itself for its own operators only.
    """
    if not torch.compiler.is_compiling():
        increment_version(tensor)


# ---- what comes out, without computing it ------------------------------------------------------


def _fresh(like: Tensor, *_: Any) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _fresh_like_second(_: Tensor, like: Tensor, *__: Any) -> Tensor:
    return _fresh(like)


def _nothing(*_: Any) -> None:
    return None


def _fake_logsumexp(input: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    shape = list(input.shape)
    if shape:
        shape.pop(dim)
    out = input.new_empty(shape)
    return out, input.new_empty((out.numel(), 2), dtype=torch.float64)


def _fake_loss(rows: Any, like: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    shape = (rows,) if REDUCTIONS[reduction] == "none" else ()
    return (
        like.new_empty(shape, dtype=torch.float32),
        like.new_empty((rows, 2), dtype=torch.float64),
    )


def _fake_cross_entropy(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _fake_loss(target.numel(), logits, options[-1])


def _fake_linear(hidden: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _fake_loss(hidden.shape[0], hidden, options[-1])


def _fake_linear_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    given = zip((hidden, weight, bias), options[-3:], strict=True)
    return tuple(_fresh(t) if wanted else hidden.new_empty((0,)) for t, wanted in given)


def _fake_linear_gradients(hidden: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return (
        *_fake_linear(hidden, *options[:-3]),
        *_fake_linear_backward(hidden, hidden, *options),
    )


# ---- softmax -----------------------------------------------------------------------------------


def _setup_softmax(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.dim, ctx.log = inputs[1], inputs[2]
    ctx.save_for_backward(output)


def _softmax_backward(ctx: Any, grad: Tensor) -> tuple:
    (result,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # the result is a function of the input in the graph already
        if ctx.log:
            out = grad - result.exp() * grad.sum(ctx.dim, keepdim=True)
        else:
            out = result * (grad - (result * grad).sum(ctx.dim, keepdim=True))
    else:
        out = torch.ops.aftermax.softmax_backward(grad, result, ctx.dim, ctx.log)
    return out, None, None, None, None, None


# ---- logsumexp ---------------------------------------------------------------------------------


def _setup_logsumexp(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.dim = inputs[1]
    ctx.save_for_backward(inputs[0], output[1])


def _logsumexp_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    # the second result is kept for this pass alone: no gradient comes by it
    input, lse = ctx.saved_tensors
    if torch.is_grad_enabled():
        return *_through(lambda x: reference.logsumexp(x, ctx.dim), grad, input), None
    return torch.ops.aftermax.logsumexp_backward(grad.contiguous(), input, lse, ctx.dim), None


# ---- cross-entropy -----------------------------------------------------------------------------


def _named(options: list) -> dict[str, Any]:
    ignore_index, label_smoothing, lse_square_scale, reduction = options
    return {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "lse_square_scale": lse_square_scale,
        "reduction": REDUCTIONS[reduction],
    }


def _setup_cross_entropy(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, target, weight, ctx.dim, *ctx.options = inputs
    ctx.save_for_backward(logits, target, weight, output[1])


def _cross_entropy_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    logits, target, weight, lse = ctx.saved_tensors
    if torch.is_grad_enabled():
        out = _cross_entropy_graph(ctx, grad, logits, target, weight)
    else:
        out = torch.ops.aftermax.cross_entropy_backward(
            grad.contiguous(), logits, target, weight, lse, ctx.dim, *ctx.options
        )
    return (out, *(None,) * 7)


def _cross_entropy_backward_inplace(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    logits, target, weight, lse = ctx.saved_tensors
    # a graph of the gradient needs the logits; many gradients at once, or elements that share their
    # places, do not fit over them
    expanded = any(s == 0 and n > 1 for s, n in zip(logits.stride(), logits.shape, strict=True))
    batched = functorch.is_legacy_batchedtensor(grad)
    if torch.is_grad_enabled() or batched or expanded:
        return _cross_entropy_backward(ctx, grad, _)
    out = logits.detach()
    torch.ops.aftermax.cross_entropy_backward_(
        grad.contiguous(), out, target, weight, lse, ctx.dim, *ctx.options
    )
    changed(out)
    return (out, *(None,) * 7)


def _cross_entropy_graph(
    ctx: Any, grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor
) -> Tensor | None:
    def loss(logits: Tensor) -> Tensor:
        rows = logits.movedim(ctx.dim, -1)
        return reference.cross_entropy(
            rows.reshape(target.numel(), -1).float(),
            target.reshape(-1),
            weight=weight if weight.numel() else None,
            **_named(ctx.options),
        )

    return _through(loss, grad, logits)[0]


def _setup_linear(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, target, class_weight, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, target, class_weight, output[1])


def _linear_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    wanted = ctx.needs_input_grad[:3]
    out = linear_gradients(grad, ctx.saved_tensors, ctx.options, wanted)
    return (*out, *(None,) * 6)


def linear_gradients(
    grad: Tensor, saved: Sequence[Tensor], options: list, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, weight and bias, from the logits made again."""
    hidden, weight, bias, target, class_weight, _ = saved
    if torch.is_grad_enabled():

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return reference.linear_cross_entropy(
                hidden.float(),
                weight.float(),
                target,
                bias=bias.float() if bias.numel() else None,
                class_weight=class_weight if class_weight.numel() else None,
                **_named(options),
            )

        out = _through(loss, grad, hidden, weight, bias)
    else:
        out = torch.ops.aftermax.linear_cross_entropy_backward(
            grad.contiguous(), *saved, *options, *wanted
        )
    return tuple(g if w else None for g, w in zip(out, wanted, strict=True))


def _through(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple:
    """The gradient of `function` at `inputs`, itself differentiable."""
    with torch.enable_grad():
        wanted = [i for i in inputs if i.requires_grad]
        grads = iter(
            torch.autograd.grad(
                function(*inputs), wanted, grad, create_graph=True, allow_unused=True
            )
        )
    return tuple(next(grads) if i.requires_grad else None for i in inputs)


# ---- the table ---------------------------------------------------------------------------------

TABLE = {
    "softmax": Op(
        "(Tensor input, int dim, bool log, int empty, int algorithm, int store) -> Tensor",
        _fresh,
        _setup_softmax,
        _softmax_backward,
    ),
    # the same without a graph: a small call costs a third
    "softmax_forward": Op(
        "(Tensor input, int dim, bool log, int empty, int algorithm, int store) -> Tensor",
        _fresh,
    ),
    "softmax_out": Op(
        "(Tensor input, Tensor(a!) out, int dim, bool log, int empty, int algorithm, int store)"
        " -> ()",
        _nothing,
    ),
    "softmax_backward": Op(
        "(Tensor grad, Tensor result, int dim, bool log) -> Tensor", _fresh_like_second
    ),
    "logsumexp": Op(
        "(Tensor input, int dim) -> (Tensor, Tensor)",
        _fake_logsumexp,
        _setup_logsumexp,
        _logsumexp_backward,
    ),
    "logsumexp_backward": Op(
        "(Tensor grad, Tensor input, Tensor lse, int dim) -> Tensor", _fresh_like_second
    ),
    "cross_entropy": Op(
        f"(Tensor logits, Tensor target, Tensor weight, int dim, {_CLASSES}) -> (Tensor, Tensor)",
        _fake_cross_entropy,
        _setup_cross_entropy,
        _cross_entropy_backward,
    ),
    "cross_entropy_backward": Op(
        "(Tensor grad, Tensor logits, Tensor target, Tensor weight, Tensor lse, int dim,"
        f" {_CLASSES}) -> Tensor",
        _fresh_like_second,
    ),
    # the same loss, whose gradient takes the memory of the logits
    "cross_entropy_inplace": Op(
        f"(Tensor logits, Tensor target, Tensor weight, int dim, {_CLASSES}) -> (Tensor, Tensor)",
        _fake_cross_entropy,
        _setup_cross_entropy,
        _cross_entropy_backward_inplace,
    ),
    "cross_entropy_backward_": Op(
        "(Tensor grad, Tensor(a!) logits, Tensor target, Tensor weight, Tensor lse, int dim,"
        f" {_CLASSES}) -> ()",
        _nothing,
    ),
    "linear_cross_entropy": Op(
        "(Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor class_weight,"
        f" {_CLASSES}) -> (Tensor, Tensor)",
        _fake_linear,
        _setup_linear,
        _linear_backward,
    ),
    "linear_cross_entropy_backward": Op(
        "(Tensor grad, Tensor hidden, Tensor weight, Tensor bias, Tensor target,"
        f" Tensor class_weight, Tensor lse, {_CLASSES}, bool for_hidden, bool for_weight,"
        " bool for_bias) -> (Tensor, Tensor, Tensor)",
        _fake_linear_backward,
    ),
    "linear_cross_entropy_gradients": Op(
        "(Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor class_weight,"
        f" {_CLASSES}, bool for_hidden, bool for_weight, bool for_bias)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _fake_linear_gradients,
    ),
}
for family in (attention_ops, expert_ops, linear_ops, selection_ops):
    TABLE |= {name: Op(*fields) for name, fields in family.schemas().items()}
