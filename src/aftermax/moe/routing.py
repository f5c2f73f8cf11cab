"""Which experts a token goes to: one gate for each task, and what keeps the experts busy.

    Sarkar et al., "Edge-MoE", arXiv 2305.18691, and Liang et al., "M3ViT", arXiv 2210.14793
    Shazeer et al., arXiv 1701.06538            importance and load
    Fedus, Zoph & Shazeer, arXiv 2101.03961     load balancing of Switch
    Zoph et al., "ST-MoE", arXiv 2202.08906     router z-loss

For a token x of a task m, and the k experts with the largest scores::

    s = G_m x,    p = softmax(s) over all experts,    weight of expert i = p_i

The chosen keep the weight that they have among all experts, as in Edge-MoE and Switch, so that
weights of a token sum to less than 1 (`renormalise` divides by that sum, as GShard and Mixtral do).
Experts and everything else are shared by the tasks; a task is its gates. There is no noise: neither
has Edge-MoE, at inference. Equal scores go to the expert of the lower number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aftermax.reference import onnx_export


@dataclass(frozen=True, eq=False)
class Routing:
    """Where tokens go. A token that is padding has index -1 and weight 0.

    Args:
        weights: (..., tokens, k), of the chosen, the largest score first; float32 at least.
        index: (..., tokens, k) int64, the expert, or -1 for none.
        probabilities: (..., tokens, experts), the full softmax.
        logits: (..., tokens, experts).

    >>> routing = TaskRouter(8, experts=4)(torch.randn(3, 5, 8))
    >>> routing.weights.shape, routing.experts, routing.top_k
    (torch.Size([3, 5, 2]), 4, 2)
    """

    weights: Tensor
    index: Tensor
    probabilities: Tensor
    logits: Tensor

    def __post_init__(self):
        shapes = [tuple(t.shape) for t in (self.weights, self.index)]
        full = [tuple(t.shape) for t in (self.probabilities, self.logits)]
        if shapes[0] != shapes[1] or full[0] != full[1] or shapes[0][:-1] != full[0][:-1]:
            raise ValueError(
                "a routing has weights and index (..., tokens, k), probabilities and logits "
                f"(..., tokens, experts), got {shapes[0]}, {shapes[1]}, {full[0]}, {full[1]}"
            )

    @property
    def experts(self) -> int:
        return self.logits.shape[-1]

    @property
    def top_k(self) -> int:
        return self.index.shape[-1]

    @property
    def seen(self) -> Tensor:
        """(..., tokens) bool: False is padding."""
        return self.index[..., 0] >= 0


class TaskRouter(nn.Module):
    """Top-k routing with one gate matrix for each task, no bias.

    Args:
        width: of the tokens.
        experts: E.
        tasks: gates to choose from.
        top_k: 1 to E; Edge-MoE has 2 of 16.
        renormalise: weights of a token sum to 1. The published model does not.

    Half precision is routed in float32 (Switch, section 2.4). `gates` is (tasks, E, width), each as
    `nn.Linear` begins.

    >>> router = TaskRouter(8, experts=4, tasks=3)
    >>> x = torch.randn(2, 5, 8)
    >>> one = router(x, task=1)
    >>> each = router(x, task=torch.tensor([0, 1]))  # one for each sequence
    >>> torch.equal(each.index[1], one.index[1])
    True
    """

    def __init__(
        self,
        width: int,
        experts: int,
        tasks: int = 1,
        top_k: int = 2,
        renormalise: bool = False,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, number in {"width": width, "experts": experts, "tasks": tasks}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k must be 1 to the {experts} experts, got {top_k}")
        self.width, self.experts, self.tasks = width, experts, tasks
        self.top_k, self.renormalise = top_k, renormalise
        self.gates = nn.Parameter(torch.empty(tasks, experts, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.gates, -bound, bound)

    def forward(self, x: Tensor, task: int | Tensor = 0, seen: Tensor | None = None) -> Routing:
        """x (..., tokens, width) -> `Routing`.

        Args:
            task: one for all, or an integer tensor with one for each sequence, (B,) of an x
                (B, tokens, width).
            seen: (..., tokens) bool; False is padding, whatever x holds there, NaN included.

        Raises:
            ValueError: for shapes that do not fit, and tasks that there are not.
        """
        if x.ndim < 2 or x.shape[-1] != self.width or not x.is_floating_point():
            raise ValueError(
                f"x must be floating point (..., tokens, {self.width}), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        gate = self._gate(task, x)
        if seen is not None:
            if seen.dtype != torch.bool or seen.shape != x.shape[:-1]:
                raise ValueError(
                    f"seen must be bool of shape {tuple(x.shape[:-1])}, "
                    f"got {seen.dtype} of shape {tuple(seen.shape)}"
                )
            x = x.masked_fill(~seen.unsqueeze(-1), 0)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = x.to(wide) @ gate.to(wide).mT
        probabilities = logits.softmax(-1)
        # of the logits, which still differ where small probabilities are rounded to equal ones;
        # topk leaves open which of equal ones it takes
        if onnx_export():  # ONNX has no stable sort, and its TopK takes the lower number of equals
            index = logits.topk(self.top_k).indices
        else:
            index = logits.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
        weights = probabilities.gather(-1, index)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        if seen is not None:
            weights = weights.masked_fill(~seen.unsqueeze(-1), 0)
            index = index.masked_fill(~seen.unsqueeze(-1), -1)
        return Routing(weights, index, probabilities, logits)

    def _gate(self, task: int | Tensor, x: Tensor) -> Tensor:
        if not isinstance(task, Tensor):
            if not 0 <= task < self.tasks:
                raise ValueError(f"task must be 0 to {self.tasks - 1}, got {task}")
            return self.gates[task]
        if task.is_floating_point() or task.dtype == torch.bool or task.shape != x.shape[:-2]:
            raise ValueError(
                f"task must be an int, or integers of shape {tuple(x.shape[:-2])} for x "
                f"{tuple(x.shape)}, got {task.dtype} of shape {tuple(task.shape)}"
            )
        if not torch.compiler.is_compiling() and bool(((task < 0) | (task >= self.tasks)).any()):
            raise ValueError(f"tasks must be 0 to {self.tasks - 1}, got {task.tolist()}")
        return self.gates[task]

    def extra_repr(self) -> str:
        return (
            f"width={self.width}, experts={self.experts}, tasks={self.tasks}, "
            f"top_k={self.top_k}, renormalise={self.renormalise}"
        )


# ---- what keeps the experts busy -----------------------------------------------------------------
# All are over every token that is seen, of all sequences, and 0 where there is none. How much of
# one joins the loss is the caller's: 1e-2 in Switch, 1e-3 for z in ST-MoE.


def load_balance(routing: Routing) -> Tensor:
    """E sum_i f_i P_i (Switch, equations 4 to 6): 1 where either is even, at most E / k.

    P_i is the mean probability of expert i. f_i is its share of all choices, counted before any
    capacity and without a gradient. Switch has one choice for each token; with k of them f is
    divided by k here, so that even is 1 for any k (others leave k in). 1 is no minimum: where many
    choose an expert by a little and few another by far, f and P go against each other.

    >>> routing = TaskRouter(8, experts=4, top_k=1)(torch.zeros(100, 8))  # ties: all to expert 0
    >>> float(load_balance(routing).detach())  # P is even
    1.0
    >>> float(load_balance(TaskRouter(8, experts=4)(torch.randn(100, 8))).detach()) < 2
    True
    """
    share = load(routing) / (_tokens(routing) * routing.top_k)
    mean = _sum(routing.probabilities, routing) / _tokens(routing)
    return routing.experts * (share * mean).sum()


def importance_loss(routing: Routing) -> Tensor:
    """CV^2 of sum_tokens weight_i (1701.06538, equations 6 and 7), CV = deviation over mean.

    The weights are those of the chosen, as there; V-MoE sums the full softmax. The variance is
    that of E values, divided by E: one expert has 0, all on one of E has E - 1.

    >>> routing = TaskRouter(8, experts=4, top_k=1)(torch.zeros(100, 8))  # ties: all to expert 0
    >>> float(importance_loss(routing).detach())
    3.0
    """
    chosen = torch.zeros_like(routing.probabilities)
    chosen = chosen.scatter_add(-1, routing.index.clamp_min(0), routing.weights)
    return _cv2(_sum(chosen, routing))


def load_loss(routing: Routing, noise: float | None = None) -> Tensor:
    """CV^2 of the load, smooth: of the chance that noise on its own score puts an expert on top.

    1701.06538, appendix A, equations 8 to 11, of scores that carry no noise::

        load_i = sum_tokens Phi((s_i - the k-th largest of the other scores) / noise)

    Args:
        noise: standard deviation; None = 1 / E, of V-MoE (2106.05974). 0 counts choices, which
            has no gradient. There the noise is learned and on all scores; here it is in the loss
            alone.

    >>> routing = TaskRouter(8, experts=4)(torch.randn(100, 8))
    >>> load_loss(routing).requires_grad, load_loss(routing, noise=0).requires_grad
    (True, False)
    """
    experts, k = routing.experts, routing.top_k
    noise = 1 / experts if noise is None else noise
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be 0 or more, got {noise}")
    if noise == 0 or k == experts:  # all are chosen, with any noise
        return _cv2(load(routing))
    largest, order = routing.logits.sort(dim=-1, descending=True, stable=True)
    # without itself, the k-th of the others is the next one for the chosen
    above = order.argsort(-1) < k
    bound = torch.where(above, largest[..., k : k + 1], largest[..., k - 1 : k])
    chance = torch.special.ndtr((routing.logits - bound) / noise)
    return _cv2(_sum(chance, routing))


def load(routing: Routing) -> Tensor:
    """How many tokens chose each expert, (E,) in the dtype of the weights; no gradient.

    >>> load(TaskRouter(8, experts=4, top_k=4)(torch.randn(10, 8)))
    tensor([10., 10., 10., 10.])
    """
    experts = torch.arange(routing.experts, device=routing.index.device)
    chosen = (routing.index.unsqueeze(-1) == experts).flatten(0, -2)
    return chosen.sum(0).to(routing.weights.dtype)


def router_z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of logsumexp(s)^2 (ST-MoE, equation 5): scores stay small.

    >>> routing = TaskRouter(8, experts=4)(torch.zeros(100, 8))
    >>> round(float(router_z_loss(routing).detach()), 4), round(math.log(4) ** 2, 4)
    (1.9218, 1.9218)
    """
    square = routing.logits.logsumexp(-1, keepdim=True).square()
    return _sum(square, routing).squeeze(-1) / _tokens(routing)


def _tokens(routing: Routing) -> Tensor:
    """Those seen, at least 1."""
    return routing.seen.sum().clamp_min(1).to(routing.weights.dtype)


def _sum(x: Tensor, routing: Routing) -> Tensor:
    """(..., tokens, n) -> (n,), over what is seen."""
    return torch.where(routing.seen.unsqueeze(-1), x, 0).flatten(0, -2).sum(0)


def _cv2(x: Tensor) -> Tensor:
    mean = x.mean()
    return (x - mean).square().mean() / torch.where(mean == 0, 1, mean).square()
