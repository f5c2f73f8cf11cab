"""The algebra of a spherical gradient: what `FactoredLinear` does in place of C x d weights.

Symbols: m examples H (m, d), C classes; W = W_c + 1 mean^T, where the columns of W_c sum to zero;
gram = W_c^T W_c (d, d). The gradient of a spherical loss with respect to the logits (m, C) is

    G = scale ∘ (H W_c^T) + level 1^T + Y,    scale = 2/C dL/dvariance,  level = 1/C dL/dmean

where Y is sparse: dL/dchosen at the chosen classes. So everything that the step on W, gram and the
hidden vectors needs follows from H, H gram, and the rows of W that were chosen.

arXiv:1412.7091 has the update for one example at a time. This is the step of the whole batch at
once, on the centred gram: the uncentred W^T W loses the variance to cancellation where rows share
an offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class BatchGradient:
    """The gradient of one or several batches, in factors; all for the same W.

    Everything that is computed from it here needs O(m d^2 + m^2 d) or, for m >= d, O(m d^2 + d^3).
    """

    hidden: Tensor  # (m, d): H
    mapped: Tensor  # (m, d): H U^T
    scale: Tensor  # (m, 1)
    level: Tensor  # (m, 1)
    target: Tensor  # (m, K)
    chosen: Tensor  # (m, K): dL/dchosen, 0 where there is no label
    of_scale: Tensor  # (m, d): scale ∘ (H gram)
    of_chosen: Tensor  # (m, d): Y W_c
    classes: int

    @staticmethod
    def joined(parts: list[BatchGradient]) -> BatchGradient:
        """One batch of all the examples, whose numbers of labels may differ."""
        if len(parts) == 1:
            return parts[0]
        most = max(part.target.shape[1] for part in parts)

        def padded(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, most - x.shape[1]))

        return BatchGradient(
            hidden=torch.cat([p.hidden for p in parts]),
            mapped=torch.cat([p.mapped for p in parts]),
            scale=torch.cat([p.scale for p in parts]),
            level=torch.cat([p.level for p in parts]),
            target=torch.cat([padded(p.target) for p in parts]),
            chosen=torch.cat([padded(p.chosen) for p in parts]),
            of_scale=torch.cat([p.of_scale for p in parts]),
            of_chosen=torch.cat([p.of_chosen for p in parts]),
            classes=parts[0].classes,
        )

    @property
    def few(self) -> bool:
        """Whether m x m matrices are the cheaper ones."""
        return self.hidden.shape[0] < self.hidden.shape[1]

    @cached_property
    def scaled(self) -> Tensor:
        """scale ∘ H, (m, d)"""
        return self.scale * self.hidden

    @cached_property
    def touched(self) -> tuple[Tensor, Tensor]:
        """The classes that were chosen, each once; and for (m, K) which of them."""
        return torch.unique(self.target, return_inverse=True)

    def rows(self, x: Tensor) -> Tensor:
        """Y^T x for the touched classes, (touched, d): sums over the examples of each class."""
        classes, which = self.touched
        each = self.chosen[..., None] * x[:, None]  # (m, K, d)
        out = x.new_zeros(classes.shape[0], x.shape[1])
        return out.index_add_(0, which.flatten(), each.flatten(0, 1))

    @cached_property
    def own_rows(self) -> Tensor:
        """Y^T H of the touched classes."""
        return self.rows(self.hidden)

    @cached_property
    def row_sum(self) -> Tensor:
        """1^T Y^T H, (d,)"""
        return self.chosen.sum(1) @ self.hidden

    @cached_property
    def mean_row(self) -> Tensor:
        """The gradient of `mean`: (level + Y 1 / C)^T H, (d,)"""
        return self.level[:, 0] @ self.hidden + self.row_sum / self.classes

    @cached_property
    def outer(self) -> Tensor:
        """H^T diag(scale) H, (d, d)"""
        return self.hidden.T @ self.scaled

    @cached_property
    def inner(self) -> Tensor:
        """H H^T, (m, m)"""
        return self.hidden @ self.hidden.T

    @cached_property
    def first_order(self) -> Tensor:
        """G_c W_c, (m, d), G_c being G whose rows are centred."""
        return self.of_scale + self.of_chosen

    @cached_property
    def second_order(self) -> Tensor:
        """G_c G_c^T H, (m, d), for few examples; for many H^T G_c G_c^T H, (d, d)."""
        if self.few:
            half = self.scaled @ (self.of_scale / 2 + self.of_chosen).T  # (m, m)
            _, which = self.touched
            same = weighted(self.chosen, self.own_rows[which])  # Y Y^T H
            y = self.chosen.sum(1, keepdim=True)
            return (half + half.T) @ self.hidden + same - y * (self.row_sum / self.classes)
        chosen = self.of_chosen.T @ self.hidden
        both = self.outer @ (self.of_scale.T @ self.hidden + chosen) + chosen.T @ self.outer
        same = self.own_rows.T @ self.own_rows
        return both + same - torch.outer(self.row_sum, self.row_sum / self.classes)

    @cached_property
    def squared_norm(self) -> Tensor:
        """||G^T H||_F^2, the gradient of W with all its C x d entries."""
        second = self.second_order
        centred = (second * self.hidden).sum() if self.few else second.trace()
        # a gradient that vanishes may come out as less than nothing
        return (centred + self.classes * self.mean_row.square().sum()).clamp_min(0)

    def step_gram(self, gram: Tensor, lr: float) -> None:
        """gram becomes that of W - lr G^T H; (d, d), in place."""
        if self.few:
            half = lr * self.first_order - (lr * lr / 2) * self.second_order
            change = half.T @ self.hidden
            gram.sub_(change + change.T)
        else:
            change = self.first_order.T @ self.hidden
            gram.sub_(change + change.T, alpha=lr).add_(self.second_order, alpha=lr * lr)

    def step_map(self, map_: Tensor, lr: float) -> None:
        """U (I - lr H^T diag(scale) H), in place."""
        if self.few:
            map_.addmm_(self.mapped.T, self.scaled, alpha=-lr)
        else:
            map_.copy_(map_ - lr * (map_ @ self.outer))

    def step_inverse(self, inverse: Tensor, lr: float) -> Tensor:
        """U^-1 follows U, in place; H U^-1 after it is returned, (m, d).

        With K = H H^T, T = H U^-1 before and T' after: (I - lr K diag(scale)) T' = T and
        U'^-1 = U^-1 + lr (scale ∘ H)^T T'. Where U' has no inverse the result is not finite.
        """
        if self.few:
            system = self.inner * (-lr * self.scale.T)
            system.diagonal().add_(1)
            # by columns: a quarter faster than the same by rows
            after = torch.linalg.solve_ex(system.T, (self.hidden @ inverse).T, left=False)[0].T
            inverse.addmm_(self.scaled.T, after, alpha=lr)
            return after
        system = -lr * self.outer
        system.diagonal().add_(1)
        inverse.copy_(torch.linalg.solve_ex(system, inverse)[0])
        return self.hidden @ inverse


def weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """sum_k weights_ik rows_ik, (m, K) and (m, K, d) -> (m, d)."""
    if weights.shape[1] == 1:
        return weights * rows[:, 0]
    return (weights[:, None] @ rows)[:, 0]


class Moments(torch.autograd.Function):
    """Mean (m, 1), variance (m, 1) and chosen logits (m, K) of hidden (m, d)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        hidden, _, layer, target, made = inputs
        with layer._exact():
            of_gram, mapped = hidden @ layer.gram, hidden @ layer.U.T
            mean = hidden @ layer.mean
            variance = torch.linalg.vecdot(of_gram, hidden) / layer.out_features
            rows = layer.V[target]  # (m, K, d)
            chosen = torch.linalg.vecdot(rows, mapped[:, None])
            chosen = chosen + (mean + hidden @ layer.offset)[:, None]
        ctx.save_for_backward(hidden, target, of_gram, mapped, rows)
        ctx.layer, ctx.changes, ctx.made = layer, layer._changes, made
        return mean[:, None], variance[:, None], chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor, of_chosen: Tensor) -> tuple:
        layer = ctx.layer
        hidden, target, of_gram, mapped, rows = ctx.saved_tensors
        if ctx.changes != layer._changes:
            raise RuntimeError(
                "FactoredLinear: the weights have changed (by a step, by loading or by moving)"
                " between the loss and its backward pass"
            )
        with layer._exact():
            scale = of_variance * (2 / layer.out_features)
            picked = weighted(of_chosen, rows)
            total = of_chosen.sum(1, keepdim=True)
            gradient = BatchGradient(
                hidden=hidden.clone(),  # the caller may write the next batch over it
                mapped=mapped,
                scale=scale,
                level=of_mean / layer.out_features,
                target=target,
                chosen=of_chosen,
                of_scale=scale * of_gram,
                of_chosen=picked @ layer.U + total * layer.offset,
                classes=layer.out_features,
            )
            of_hidden = gradient.first_order + (of_mean + total) * layer.mean
        ctx.made[:] = [gradient]
        return of_hidden, of_hidden.new_zeros(()), None, None, None
