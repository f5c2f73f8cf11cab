"""A gate on each head of attention: out_h <- sigmoid(g_h) out_h, so that a head can do nothing.

Bondarenko, Nagel & Blankevoort, "Quantizable Transformers", arXiv 2306.12929: the other way, beside
clipped softmax, to let a head leave its token alone without driving the scores apart. With x the
input of the attention module, x_h the part of it that has head h's number, and pi_0 the gate's
value at the start::

    head     g_h = a_h                                     one number for each head
    token    g_h = w_h . x_h + b_h                         the paper's conditional gate
    mlp      g_h = v_h . relu(W_h x_h + c_h) + b_h         hidden width d / 4, 1 at least
    all      g_h = u_h . x + b_h                           all of the input, as for OPT-1.3b
    average  the mean of `token` over the tokens           not causal: it sees what comes after

b and a start at logit(pi_0). The authors leave pi_0 out of `mlp` and `all`, whose gates then start
near 1/2; here it counts for all of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

GATES = ("head", "token", "mlp", "all", "average")


class Gate(nn.Module):
    """sigmoid(g) of (B, T, width) inputs: (B, H, T, 1), or less where tokens do not differ.

    Args:
        width: of the input; the head's part is width / heads of it.
        heads: H.
        kind: one of `GATES`.
        open_at_start: pi_0, in (0, 1); 0.5. The authors' script for OPT has 0.25.

    Raises:
        ValueError: for another kind, a share that is none, and a width that heads do not divide.

    >>> Gate(8, heads=2, open_at_start=0.25)(torch.zeros(1, 3, 8))[0, :, :, 0]
    tensor([[0.2500, 0.2500, 0.2500],
            [0.2500, 0.2500, 0.2500]], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kind: str = "token",
        open_at_start: float = 0.5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if kind not in GATES:
            raise ValueError(f"a gate is one of {', '.join(GATES)}, got {kind!r}")
        if not 0 < open_at_start < 1:
            raise ValueError(f"open_at_start lies between 0 and 1, got {open_at_start}")
        if kind in ("token", "mlp", "average") and width % heads:
            raise ValueError(f"width {width} has no equal part for each of {heads} heads")
        factory = {"device": device, "dtype": dtype}
        self.kind, self.heads = kind, heads
        start = math.log(open_at_start / (1 - open_at_start))
        self.bias = nn.Parameter(torch.full((heads,), start, **factory))
        part = width // heads
        read = {"head": 0, "mlp": max(1, part // 4), "all": width}.get(kind, part)
        self.inner = (
            nn.Parameter(torch.empty(heads, read, part, **factory)) if kind == "mlp" else None
        )
        self.inner_bias = (
            nn.Parameter(torch.zeros(heads, read, **factory)) if kind == "mlp" else None
        )
        self.weight = nn.Parameter(torch.empty(heads, read, **factory)) if read else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear: uniform within 1 / sqrt(of what is read)."""
        for weight in (self.inner, self.weight):
            if weight is not None:
                bound = weight.shape[-1] ** -0.5
                nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return self.bias.sigmoid()[:, None, None]
        if self.kind == "all":
            logits = x @ self.weight.T + self.bias
        else:
            read = x.unflatten(-1, (self.heads, -1))
            if self.inner is not None and self.inner_bias is not None:
                read = torch.einsum("bthd,hed->bthe", read, self.inner) + self.inner_bias
                read = read.relu()
            logits = (read * self.weight).sum(-1) + self.bias  # (B, T, H)
        if self.kind == "average":
            logits = logits.mean(1, keepdim=True)
        return logits.sigmoid().transpose(1, 2)[..., None]

    def extra_repr(self) -> str:
        return f"{self.kind}, heads={self.heads}"
