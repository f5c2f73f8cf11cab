"""Experts, expert by expert: the weights of each are read once, whatever the number of tokens.

Sarkar et al., "Edge-MoE", arXiv 2305.18691. A token x with the chosen experts i gives::

    out = sum_i weight_i (W2_i act(W1_i x + b1_i) + b2_i)

In the order of tokens this reads two matrices for each (token, choice). Edge-MoE gates all tokens
first, which makes a queue of tokens for each expert, and then walks over the experts::

    for each expert:    out[queue] += weight * (W2 act(W1 x[queue] + b1) + b2)

The sum is the same, the reads fall from tokens * k to at most E. The reference is plain PyTorch,
with two yardsticks that give the same numbers: "token", and "dense", which runs every expert on
every token and keeps what was chosen. On the CPU a compiled kernel does the walk over the experts,
forward and backward: queues, gather, products, gelu and weighted sum in one call.

The released top_k forgets its best entries when the next score is smaller; ours sorts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from aftermax.kernels import expert_ops
from aftermax.moe.routing import Routing, TaskRouter
from aftermax.reference import onnx_export
from aftermax.rows import PLAIN_IMPLS, use_kernels

Order = Literal["expert", "token", "dense"]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)

# ---- queues --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Queues:
    """The tokens of each expert, one queue after another.

    Args:
        token: (n,) int64; ascending within a queue.
        choice: (n,) int64, which of its k choices this is: weights[token, choice] goes with it.
        offsets: (experts + 1,) int64; the queue of e is offsets[e] up to offsets[e + 1].
        dropped: (tokens, k) bool, what found its queue full.
    """

    token: Tensor
    choice: Tensor
    offsets: Tensor
    dropped: Tensor

    @property
    def lengths(self) -> Tensor:
        """(experts,)"""
        return self.offsets.diff()


def dispatch(
    index: Tensor,
    experts: int,
    capacity: int | None = None,
    capacity_factor: float | None = None,
) -> Queues:
    """The queue of each expert; dropless unless there is a capacity.

    Args:
        index: (tokens, k) integers, the experts of each token; -1 is none.
        capacity: the most that a queue takes. Earlier tokens come first.
        capacity_factor: the same as ceil(factor * choices / experts), where choices are all that
            are not -1, tokens * k without padding (Switch, equation 3, which has k = 1).

    Raises:
        ValueError: for another shape, experts that there are not, or both capacities.

    >>> queues = dispatch(torch.tensor([[1, 0], [1, 2], [1, -1]]), experts=4, capacity=2)
    >>> queues.token, queues.offsets
    (tensor([0, 0, 1, 1]), tensor([0, 1, 3, 4, 4]))
    >>> queues.dropped.nonzero()  # the third of expert 1
    tensor([[2, 0]])
    """
    order, kept, counts = _sorted(index, experts, capacity, capacity_factor)
    chosen = order[kept]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    k = index.shape[1]
    dropped = (index >= 0) & ~_of_pairs(order, kept, index)
    return Queues(chosen // k, chosen % k, offsets, dropped)


def _sorted(
    index: Tensor, experts: int, capacity: int | None, factor: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs token * k + choice by expert and token, which of them are kept, how many of each
    expert are: of shapes that do not hang on the values."""
    _check_dispatch(index, experts, capacity, factor)
    of, order = index.flatten().long().sort(stable=True)
    bounds = torch.searchsorted(of, torch.arange(experts + 1, device=of.device))
    kept, counts = of >= 0, bounds.diff()
    limit = capacity
    if factor is not None:
        limit = (counts.sum().double() * factor / experts).ceil().clamp_max(len(of)).long()
    if limit is not None:
        place = torch.arange(len(of), device=of.device) - bounds[of.clamp_min(0)]
        kept = kept & (place < limit)
        counts = counts.clamp_max(limit)
    return order, kept, counts


def _check_dispatch(
    index: Tensor, experts: int, capacity: int | None, factor: float | None
) -> None:
    if index.ndim != 2 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"index must be integers (tokens, k), got {index.dtype} of shape {tuple(index.shape)}"
        )
    if not torch.compiler.is_compiling() and bool(((index < -1) | (index >= experts)).any()):
        raise ValueError(
            f"index must be experts 0 to {experts - 1}, or -1 for none, "
            f"got {int(index.min())} to {int(index.max())}"
        )
    if capacity is not None and factor is not None:
        raise ValueError(f"capacity {capacity} or capacity_factor {factor}, not both")
    for name, number in {"capacity": capacity, "capacity_factor": factor}.items():
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} must be above 0, got {number}")
    if isinstance(capacity, float):
        raise ValueError(f"capacity must be whole, got {capacity}; a share is capacity_factor")


def _of_pairs(order: Tensor, kept: Tensor, index: Tensor) -> Tensor:
    """What is kept in the order of experts -> (tokens, k)."""
    return torch.zeros_like(kept).scatter(0, order, kept).view(index.shape)


# ---- the layer -----------------------------------------------------------------------------------


def expert_layer(
    x: Tensor,
    routing: Routing,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: Callable[[Tensor], Tensor] = gelu,
    order: Order = "expert",
    capacity: int | None = None,
    capacity_factor: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """out = sum of weight * (W2 act(W1 x + b1) + b2) over the chosen experts of each token.

    Args:
        x: (..., tokens, D). Leading dimensions are further tokens: queues run across sequences.
        routing: of the same tokens.
        w1, b1: (E, H, D) and (E, H), or None.
        w2, b2: (E, D, H) and (E, D), or None.
        activation: elementwise; the exact gelu, or `table_gelu`.
        order: "expert" walks over queues, "token" over (token, choice), "dense" over all experts
            with all tokens; the numbers are the same. In ONNX, which has no queues, the last, and
            no capacity.
        capacity, capacity_factor: as in `dispatch`. With either, a token hangs on earlier ones.
        impl: "reference" (plain torch), or "cpu": the compiled kernel, for the order "expert" and
            the exact gelu, in float32 and bfloat16. None picks the kernel where it can. It gathers,
            multiplies, applies gelu and adds up without a copy of the queues, and its result does
            not depend on the number of threads.

    Returns:
        like x. A token without an expert (padding, or dropped) is 0, and what x holds there never
        matters. Half precision is computed in float32 and rounded once; but the kernel in bfloat16
        rounds the hidden vectors too, and under autocast to bfloat16 it runs in that.

    Raises:
        ValueError: for shapes, experts, an order or an impl that do not fit.
        RuntimeError: for `impl="cpu"` where the kernel cannot do what is asked.

    >>> x, router = torch.randn(5, 8), TaskRouter(8, experts=4)
    >>> w1, w2 = torch.randn(4, 16, 8), torch.randn(4, 8, 16)
    >>> out = expert_layer(x, router(x), w1, None, w2, None)
    >>> slow = expert_layer(x, router(x), w1, None, w2, None, order="token")
    >>> torch.allclose(out, slow, atol=1e-4)
    True
    """
    _check(x, routing, w1, b1, w2, b2, order)
    wide = torch.promote_types(x.dtype, torch.float32)
    flat = x.reshape(-1, x.shape[-1])
    index = routing.index.reshape(-1, routing.top_k)
    weights = routing.weights.reshape(index.shape).to(wide)
    tensors = (flat, weights, w1, b1, w2, b2)
    if _takes_kernel(impl, tensors, activation, order):
        _check_dispatch(index, len(w1), capacity, capacity_factor)
        out = _on_kernel(index, *tensors, capacity, capacity_factor)
        return out.to(x.dtype).reshape(x.shape)
    # one node each: a select for every expert would have a gradient of the size of all
    up, down = w1.unbind(0), w2.unbind(0)
    biases = [None if b is None else b.unbind(0) for b in (b1, b2)]

    def through(expert: int, rows: Tensor) -> Tensor:
        first, second = (None if b is None else b[expert].to(wide) for b in biases)
        hidden = activation(linear(rows.to(wide), up[expert].to(wide), first))
        return linear(hidden, down[expert].to(wide), second)

    out = torch.zeros_like(flat, dtype=wide)
    dropless = capacity is None and capacity_factor is None
    if order == "dense" or (onnx_export() and dropless):  # ONNX has no queues
        if not dropless:
            pairs, kept, _ = _sorted(index, len(w1), capacity, capacity_factor)
            index = index.masked_fill(~_of_pairs(pairs, kept, index), -1)
        else:
            _check_dispatch(index, len(w1), None, None)
        flat = flat.masked_fill((index < 0).all(-1, keepdim=True), 0)
        for expert in range(len(w1)):
            mine = index == expert
            weight = torch.where(mine, weights, 0).sum(-1, keepdim=True)
            y = torch.where(mine.any(-1, keepdim=True), through(expert, flat), 0)
            out = out + weight * y
    else:
        queues = dispatch(index, len(w1), capacity, capacity_factor)
        walk = _by_expert if order == "expert" else _by_token
        for expert, token, choice in walk(queues):
            y = through(expert, flat[token])
            out.index_add_(0, token, weights[token, choice].unsqueeze(-1) * y)
    return out.to(x.dtype).reshape(x.shape)


def _takes_kernel(
    impl: str | None,
    tensors: tuple[Tensor | None, ...],
    activation: Callable[[Tensor], Tensor],
    order: Order,
) -> bool:
    """Whether `impl` means the kernel; raises where it is asked for and cannot be had."""
    given = [t for t in tensors if t is not None]
    refusal = _refusal(given, activation, order)
    if impl == "cpu" and refusal is not None:
        raise RuntimeError(f"expert_layer: impl='cpu', but {refusal}")
    return use_kernels("expert_layer", impl, PLAIN_IMPLS, *given) and refusal is None


def _refusal(
    tensors: list[Tensor], activation: Callable[[Tensor], Tensor], order: Order
) -> str | None:
    x, weights, w1, *_ = tensors
    exact = activation is gelu or (
        isinstance(activation, nn.GELU) and activation.approximate == "none"
    )
    if not exact:
        return f"the kernel has the exact gelu, not {activation!r}"
    if order != "expert":
        return f"the kernel walks in the order 'expert', not {order!r}"
    if x.dtype not in _KERNEL_DTYPES:
        return f"the kernel takes float32 and bfloat16, not {x.dtype}"
    others = [t.dtype for t in tensors if t is not weights and t.dtype != x.dtype]
    if _autocasts(x):  # which casts them all, as it does for a linear layer
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return f"autocast asks for {torch.get_autocast_dtype('cpu')}"
        others = [dtype for dtype in others if dtype not in _KERNEL_DTYPES]
    if others:
        return f"x is {x.dtype} and a weight {others[0]}; they must agree"
    if 0 in (weights.shape[-1], *w1.shape):
        return f"there is nothing to multiply (w1 {tuple(w1.shape)}, k = {weights.shape[-1]})"
    return None


def _autocasts(x: Tensor) -> bool:
    return x.is_cpu and torch.is_autocast_enabled("cpu")


def _on_kernel(
    index: Tensor,
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    capacity: int | None,
    capacity_factor: float | None,
) -> Tensor:
    if _autocasts(x):
        x, w1, w2 = (t.to(torch.bfloat16) for t in (x, w1, w2))
        b1, b2 = (None if b is None else b.to(torch.bfloat16) for b in (b1, b2))
    return expert_ops.experts(x, index.long(), weights, w1, b1, w2, b2, capacity, capacity_factor)


def _by_expert(queues: Queues) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Empty queues too: they cost nothing, and every parameter has a gradient."""
    lengths = queues.lengths.tolist()
    parts = zip(queues.token.split(lengths), queues.choice.split(lengths), strict=True)
    for expert, (token, choice) in enumerate(parts):
        yield expert, token, choice


def _by_token(queues: Queues) -> Iterator[tuple[int, Tensor, Tensor]]:
    experts = torch.arange(len(queues.lengths), device=queues.token.device)
    of = experts.repeat_interleave(queues.lengths)
    for pair in (queues.token * queues.dropped.shape[1] + queues.choice).argsort().tolist():
        here = slice(pair, pair + 1)
        yield int(of[pair]), queues.token[here], queues.choice[here]


def _check(
    x: Tensor,
    routing: Routing,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    order: str,
) -> None:
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}")
    if w1.ndim != 3 or x.ndim < 2:
        raise ValueError(
            "expert_layer needs x (..., tokens, D) and w1 (experts, H, D), "
            f"got {tuple(x.shape)} and {tuple(w1.shape)}"
        )
    experts, hidden, width = w1.shape
    right = {
        "x": (x, (*x.shape[:-1], width)),
        "routing.index": (routing.index, (*x.shape[:-1], routing.top_k)),
        "routing.logits": (routing.logits, (*x.shape[:-1], experts)),
        "b1": (b1, (experts, hidden)),
        "w2": (w2, (experts, width, hidden)),
        "b2": (b2, (experts, width)),
    }
    for name, (tensor, shape) in right.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must be {shape} for x {tuple(x.shape)} and w1 {tuple(w1.shape)}, "
                f"got {tuple(tensor.shape)}"
            )


# ---- the module ----------------------------------------------------------------------------------


class Experts(nn.Module):
    """A mixture of experts in place of an MLP: `TaskRouter` and `expert_layer`.

    Args:
        width: of the tokens, D.
        hidden: of an expert, H.
        experts: E.
        top_k, tasks, renormalise: of the router.
        activation: elementwise; the exact gelu, or `table_gelu`.
        bias: of both matrices.
        order, capacity, capacity_factor, impl: as in `expert_layer`. Dropless by default, as
            Edge-MoE.

    `w1` (E, H, D), `b1` (E, H), `w2` (E, D, H), `b2` (E, D) begin as `nn.Linear` does, each expert
    for itself. A call keeps nothing: what the losses need is returned when it is asked for.

    >>> layer = Experts(192, 384, experts=16, tasks=2)
    >>> x = torch.randn(1, 129, 192)
    >>> out, routing = layer(x, task=1, return_routing=True)
    >>> from aftermax.moe import load_balance
    >>> loss = out.square().mean() + 0.01 * load_balance(routing)
    >>> layer.weight_bytes(129, "token") / 1e6, layer.weight_bytes(129, "expert") / 1e6
    (152.174592, 9.437184)
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        top_k: int = 2,
        tasks: int = 1,
        *,
        renormalise: bool = False,
        activation: Callable[[Tensor], Tensor] = gelu,
        bias: bool = True,
        order: Order = "expert",
        capacity: int | None = None,
        capacity_factor: float | None = None,
        impl: str | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        factory = {"device": device, "dtype": dtype}
        self.router = TaskRouter(width, experts, tasks, top_k, renormalise, **factory)
        self.width, self.hidden, self.experts = width, hidden, experts
        self.activation = activation
        self.order: Order = order
        self.capacity, self.capacity_factor = capacity, capacity_factor
        self.impl = impl
        self.w1 = nn.Parameter(torch.empty(experts, hidden, width, **factory))
        self.w2 = nn.Parameter(torch.empty(experts, width, hidden, **factory))
        self.b1 = nn.Parameter(torch.empty(experts, hidden, **factory)) if bias else None
        self.b2 = nn.Parameter(torch.empty(experts, width, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.router.reset_parameters()
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1 / math.sqrt(weight.shape[-1])
            for parameter in (weight, bias):
                if parameter is not None:
                    nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        x: Tensor,
        task: int | Tensor = 0,
        seen: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """(..., tokens, D) -> the same, and the `Routing` if asked for.

        Args:
            task, seen: as in `TaskRouter`. Padding gives 0.
        """
        routing = self.router(x, task, seen)
        out = expert_layer(
            x,
            routing,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            self.activation,
            self.order,
            self.capacity,
            self.capacity_factor,
            self.impl,
        )
        return (out, routing) if return_routing else out

    def dispatch(self, routing: Routing) -> Queues:
        """The queues of a routing, with what this layer's capacity drops."""
        index = routing.index.reshape(-1, routing.top_k)
        return dispatch(index, self.experts, self.capacity, self.capacity_factor)

    def weight_bytes(self, tokens: int | Routing, order: Order = "expert") -> int:
        """Bytes of W1 and W2 that an order reads in a call: counted, no measured traffic.

        Args:
            tokens: a routing, whose queues are counted; or a number of tokens, for the most that
                an order reads without drops.
            order: "token" reads an expert for each (token, choice), "expert" those with a token,
                "dense" all. A cache may hold what is read again.

        Biases, 0.4 % in Edge-MoE, are left out.
        """
        if isinstance(tokens, Routing):
            lengths = self.dispatch(tokens).lengths
            pairs, filled = int(lengths.sum()), int((lengths > 0).sum())
        else:
            pairs = tokens * self.router.top_k
            filled = min(self.experts, pairs)
        times = {"token": pairs, "expert": filled, "dense": self.experts}
        if order not in times:
            raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}")
        return times[order] * 2 * self.width * self.hidden * self.w1.element_size()

    def extra_repr(self) -> str:
        return f"width={self.width}, hidden={self.hidden}, experts={self.experts}"
