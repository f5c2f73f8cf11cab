"""FactoredLinear: an output layer whose exact gradient step does not depend on its classes.

Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091 (the factored step, for squared error
and its spherical family); de Brébisson & Vincent 2016, arXiv:1604.08859 (with the Z-loss).

Where we depart from the authors' code (factored_output_layer): the whole batch in one step (see
`gram.py`); the gram is centred, theirs cancels in float32; U is put right when its condition asks
for it, not every so many steps, since squared error ruins U within some hundred of them; weight
decay scales the gram with the weights; the step refuses a gradient that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aftermax.losses.gram import BatchGradient, Moments
from aftermax.losses.zloss import (
    SphericalLoss,
    ZScoreLoss,
    check_reduction,
    find_labels,
    reduced,
)

eager: Any = torch.compiler.disable
"""Not part of a compiled graph."""

CONDITION_LIMITS = {torch.float32: 10.0, torch.float64: 1e4}
"""How large ||U|| ||U^-1|| / d may grow: rounding of W grows with it, and so does the time between
two repairs, by its logarithm."""

INVERT_EVERY = 64
"""Steps after which U^-1 is made anew from U, O(d^3)."""

BLOCK_BYTES = 2**24
"""Held beside V by what walks through all classes."""

MOST_ROWS = 1024
"""Of hidden vectors that `topk` takes through the classes together."""


class FactoredLinear(nn.Module):
    """logits = hidden W^T, which learns W by exact SGD in O(d^2) an example, whatever C.

    W = V U + 1 offset^T + 1 mean^T, V (C, d), U (d, d). A spherical loss needs of all logits their
    mean and their variance alone, and these come from `mean` and the centred gram W_c^T W_c; its
    step on W is a step on U and on those rows of V that were targets. So a training step makes no
    logits and reads m K rows of V:

        loss = layer(hidden, target)  # exact, a graph to `hidden`
        loss.backward()  # the exact gradient of `hidden`; the layer keeps what its step needs
        layer.step(lr=1.0)  # W <- (1 - lr weight_decay) W - lr dL/dW, exact

    The step is the one that `torch.optim.SGD` without momentum makes on a dense W, to rounding.
    Several calls and backward passes before a step add up, and whatever the loss is multiplied by
    reaches the step. Momentum, Adam, a learning rate for each class, and dropout of logits cannot
    be written in this form. The layer has no parameters: no optimiser sees it, `step` is all that
    changes it; what it holds are buffers, and `state_dict` carries all of them.

    Args:
        in_features: d.
        out_features: C, the number of classes.
        bias: a number for each class, learned by the same step; it is the last column of a W of
            d + 1 columns, with a 1 behind each hidden vector, and decays with it.
        loss: `ZScoreLoss`, `LogTaylorLoss`, `LogSphericalLoss`, `SquaredErrorLoss`, or any other
            `SphericalLoss`.
        condition_limit: how large ||U||_F ||U^-1||_F / d may grow before U is put right, which
            costs O(C d) for each bad direction, O(C d^2) at most. At least 4. None: 10 in float32,
            1e4 in float64. `math.inf` leaves U alone as long as it can be inverted.
        device, dtype: float32 or float64.

    Raises:
        ValueError: for sizes, a dtype or a `condition_limit` that do not fit.

    The weights begin as those of `torch.nn.Linear`.

    >>> layer = FactoredLinear(8, 1000)
    >>> hidden = torch.randn(4, 8, requires_grad=True)
    >>> layer(hidden, torch.tensor([3, 1, 4, 1])).backward()
    >>> hidden.grad.shape
    torch.Size([4, 8])
    >>> layer.step(lr=1.0)
    >>> layer.topk(hidden, 5).indices.shape
    torch.Size([4, 5])
    """

    V: Tensor
    U: Tensor
    U_inverse: Tensor
    offset: Tensor
    mean: Tensor
    gram: Tensor
    age: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        loss: SphericalLoss | None = None,
        condition_limit: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"FactoredLinear({in_features}, {out_features}): both sizes must be at least 1"
            )
        if condition_limit is not None and not condition_limit >= 4:
            raise ValueError(
                f"FactoredLinear: condition_limit={condition_limit}; a repaired U can have 4"
            )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in CONDITION_LIMITS:
            raise ValueError(f"FactoredLinear takes float32 and float64, not {dtype}")
        self.in_features, self.out_features = in_features, out_features
        self.has_bias, self.condition_limit = bias, condition_limit
        self.loss = ZScoreLoss() if loss is None else loss
        width = in_features + bias
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("V", torch.empty(out_features, width, **options))
        for name in ("U", "U_inverse", "gram"):
            self.register_buffer(name, torch.empty(width, width, **options))
        for name in ("offset", "mean"):
            self.register_buffer(name, torch.empty(width, **options))
        self.register_buffer("age", torch.zeros((), dtype=torch.int64, device=device))
        self._pending: list[tuple[int, BatchGradient]] = []
        self._changes = 0
        self.reset_parameters()

    # -- a training step

    @eager  # it keeps a gradient aside, which no graph can hold
    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss, as on the dense logits `hidden @ weight.T`.

        Args:
            hidden: (..., d), in the dtype of the layer; half precision is taken to it.
            target: int64 classes (...), or K for each row, (..., K), where a negative number is
                no class; the row's loss is the mean over its classes.
            ignore_index: a target that is no class. Rows that have none cost nothing, and what
                their hidden vector holds does not matter.
            reduction: "mean" (over the rows that count), "sum" or "none": then a weight for each
                row is a product, `(weight * layer(hidden, target, reduction="none")).sum()`.

        Returns:
            A scalar, or the shape of the rows, in the dtype of the layer.

        Raises:
            ValueError: for shapes, dtypes or a `reduction` that do not fit.
            IndexError: for a target that is no class.
            RuntimeError: in the backward pass, if the weights have changed since.
        """
        check_reduction("FactoredLinear", reduction)
        rows, classes, labels = self._check_batch(hidden, target, ignore_index)
        counted = labels.any(1)
        everything = bool(counted.all())
        if not everything:
            rows, classes, labels = rows[counted], classes[counted], labels[counted]
        moments = self._moments(rows, classes.where(labels, 0))
        loss = reduced(self.loss.from_moments(*moments, self.out_features), labels, reduction)
        if reduction != "none":
            return loss
        if not everything:
            loss = loss.new_zeros(counted.shape).masked_scatter(counted, loss)
        return loss.reshape(hidden.shape[:-1])

    def step(self, lr: float, *, weight_decay: float = 0.0, max_norm: float | None = None) -> None:
        """W <- (1 - lr weight_decay) W - lr g, g = dL/dW: SGD as `torch.optim.SGD` makes it.

        Of all losses that went backward since the last step. O(m d^2), m the examples of all of
        them; when U has to be put right, O(C d) for each bad direction.

        Args:
            lr: at least 0, free to change from step to step.
            weight_decay: lambda >= 0, on the bias too.
            max_norm: g is scaled to this norm where it is larger, as `clip_grad_norm_` of
                torch.nn.utils does. To clip a whole network by its norm in common, read
                `grad_norm` and scale `lr`.

        Raises:
            ValueError: for a negative option, or lr weight_decay >= 1.
            RuntimeError: if no loss went backward since the last step, if the weights were loaded
                or moved since, or if g is not finite. The weights stay as they were.
        """
        self._step(lr, weight_decay, max_norm)

    @eager
    def _step(self, lr: float, weight_decay: float, max_norm: float | None) -> None:
        if not (lr >= 0 and weight_decay >= 0 and lr * weight_decay < 1):
            raise ValueError(
                f"FactoredLinear.step: lr={lr}, weight_decay={weight_decay}; both must be at least"
                " 0, and their product below 1"
            )
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"FactoredLinear.step: max_norm={max_norm} is not above 0")
        gradient = self._gradient("step")
        norm = self._norm(gradient)
        if not math.isfinite(norm):
            raise RuntimeError(
                f"FactoredLinear.step: the norm of the gradient is {norm}; nothing was changed,"
                " and zero_grad() drops this gradient"
            )
        self.zero_grad()
        self._changes += 1
        keep = 1 - lr * weight_decay
        clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        with torch.no_grad(), self._exact():
            self._descend(gradient, lr * clip / keep)
            if keep != 1:
                self._decay(keep)

    def grad_norm(self) -> float:
        """||dL/dW||_F of what the next `step` will use, without the C x d gradient.

        Raises:
            RuntimeError: as `step`.
        """
        return self._norm(self._gradient("grad_norm"))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what went backward since the last step."""
        super().zero_grad(set_to_none)
        self._pending = []

    # -- prediction

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden W^T + bias, (..., d) -> (..., C): all of them, O(C d). No gradient reaches W."""
        hidden = self._widened(self._check_hidden(hidden))
        shift = hidden @ (self.offset + self.mean)
        return (hidden @ self.U.T) @ self.V.T + shift[..., None]

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> torch.return_types.topk:
        """The k largest logits of each row and their classes, both (..., k), largest first.

        Exact: `hidden` goes through U once, then past all of V in blocks of classes, of whose
        logits the best k are kept. Among equal logits any may be named, as in `torch.topk`.

        Raises:
            ValueError: for a `hidden` that does not fit, or a k out of [1, C].

        >>> layer = FactoredLinear.from_linear(torch.nn.Linear(3, 3))
        >>> top = layer.topk(torch.ones(2, 3), k=2)
        >>> bool((top.values == layer.logits(torch.ones(2, 3)).topk(2).values).all())
        True
        """
        if not 1 <= k <= self.out_features:
            raise ValueError(
                f"FactoredLinear.topk: k={k}, where 1 to {self.out_features} classes can be asked"
                " for"
            )
        hidden = self._widened(self._check_hidden(hidden))
        flat = hidden.reshape(-1, hidden.shape[-1])
        with self._exact():
            mapped = flat @ self.U.T
            parts = [self._best(rows, k) for rows in mapped.split(MOST_ROWS)]
            values = torch.cat([values for values, _ in parts])
            values += (flat @ (self.offset + self.mean))[:, None]
        classes = torch.cat([classes for _, classes in parts])
        shape = (*hidden.shape[:-1], k)
        return torch.return_types.topk((values.reshape(shape), classes.reshape(shape)))

    def _best(self, mapped: Tensor, k: int) -> tuple[Tensor, Tensor]:
        block = max(k, BLOCK_BYTES // (mapped.element_size() * max(1, mapped.shape[0])))
        values = mapped.new_empty(mapped.shape[0], 0)
        classes = torch.empty_like(values, dtype=torch.int64)
        for start in range(0, self.out_features, block):
            logits = mapped @ self.V[start : start + block].T
            here = logits.topk(min(k, logits.shape[1]))
            values = torch.cat([values, here.values], 1)
            classes = torch.cat([classes, here.indices + start], 1)
            values, places = values.topk(min(k, values.shape[1]))
            classes = classes.gather(1, places)
        return values, classes

    # -- the weights as a whole

    @property
    def weight(self) -> Tensor:
        """W, (C, d), made anew at each call: O(C d^2). Writing to it changes nothing."""
        return self._dense()[:, : self.in_features]

    @property
    def bias(self) -> Tensor | None:
        """(C,), or None without bias; O(C d)."""
        if not self.has_bias:
            return None
        return self.V @ self.U[:, -1] + (self.offset + self.mean)[-1]

    def to_linear(self) -> nn.Linear:
        """The same logits from a `torch.nn.Linear`, O(C d^2)."""
        linear = nn.Linear(self.in_features, self.out_features, self.has_bias, device="meta")
        linear.weight = nn.Parameter(self.weight.clone())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias)
        return linear.train(self.training)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        loss: SphericalLoss | None = None,
        condition_limit: float | None = None,
    ) -> FactoredLinear:
        """A layer with a copy of the weights of `linear`, and a bias if it has one. O(C d^2)."""
        weight = linear.weight.detach()
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            loss=loss,
            condition_limit=condition_limit,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer.V[:, : linear.in_features] = weight
        if linear.bias is not None:
            layer.V[:, -1] = linear.bias.detach()
        layer._begin()
        return layer.train(linear.training)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make U^-1, the gram and the offset anew from V, U and the mean: O(C d^2).

        Steps keep them up to rounding; docs/output.md has how far they drift in float32.
        """
        with self._exact():
            self._invert()
            total = self.offset + self.mean
            centre, scatter = self._moments_of_V()
            self.offset.copy_(-(centre @ self.U.double()))
            self.mean.copy_(total - self.offset)
            self.gram.copy_(self.U.T.double() @ scatter @ self.U.double())
        self._changes += 1

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights (and bias) uniform within 1/sqrt(d), as `torch.nn.Linear`."""
        bound = 1 / math.sqrt(self.in_features)
        self.V.uniform_(-bound, bound)
        self._begin()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.has_bias}, loss={self.loss}"
        )

    # -- below: the parts

    @torch.no_grad()
    def _begin(self) -> None:
        """W = V as it stands."""
        self.zero_grad()
        self._changes += 1
        self.mean.zero_()
        self.offset.zero_()
        self.age.zero_()
        torch.eye(self.U.shape[0], out=self.U)
        torch.eye(self.U.shape[0], out=self.U_inverse)
        centre, scatter = self._moments_of_V()
        self.gram.copy_(scatter)
        self.mean.copy_(centre)
        self.V.sub_(self.mean)

    def _moments(self, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return Moments.apply(self._widened(rows), None, self, target, None)
        # A leaf of this call's own. That its gradient is accumulated says that this backward pass
        # is one that reaches weights; `torch.autograd.grad` with respect to others is none.
        ticket = rows.new_zeros(()).requires_grad_()
        made: list[BatchGradient] = []
        changes = self._changes
        ticket.register_post_accumulate_grad_hook(
            lambda _: self._pending.append((changes, made.pop()))
        )
        return Moments.apply(self._widened(rows), ticket, self, target, made)

    def _gradient(self, name: str) -> BatchGradient:
        if not self._pending:
            raise RuntimeError(
                f"FactoredLinear.{name}: no loss of this layer went backward since the last step"
            )
        if any(changes != self._changes for changes, _ in self._pending):
            raise RuntimeError(
                f"FactoredLinear.{name}: the weights were loaded or moved since the loss went"
                " backward; zero_grad() drops its gradient"
            )
        if len(self._pending) > 1:
            parts = [part for _, part in self._pending]
            self._pending = [(self._changes, BatchGradient.joined(parts))]
        return self._pending[0][1]

    @torch.no_grad()
    def _norm(self, gradient: BatchGradient) -> float:
        with self._exact():
            return math.sqrt(float(gradient.squared_norm))

    def _descend(self, gradient: BatchGradient, lr: float) -> None:
        """W - lr G^T H."""
        self.age += 1
        gradient.step_map(self.U, lr)
        mapped_back = gradient.step_inverse(self.U_inverse, lr)
        condition = float(self.U.norm() * self.U_inverse.norm()) / self.U.shape[0]
        limit = self.condition_limit or CONDITION_LIMITS[self.V.dtype]
        # V U is right already but for the chosen rows, for which U^-1 is needed
        if not condition <= limit:
            self._repair()
            mapped_back = gradient.hidden @ self.U_inverse
        elif int(self.age) >= INVERT_EVERY:
            self._invert()
            mapped_back = gradient.hidden @ self.U_inverse
        classes, _ = gradient.touched
        self.V.index_add_(0, classes, gradient.rows(mapped_back), alpha=-lr)
        centring = gradient.row_sum / self.out_features
        self.offset.sub_(gradient.scaled.T @ (gradient.hidden @ self.offset) - centring, alpha=lr)
        self.mean.sub_(gradient.mean_row, alpha=lr)
        gradient.step_gram(self.gram, lr)

    def _decay(self, keep: float) -> None:
        """W keep"""
        for part, factor in (
            (self.U, keep),
            (self.U_inverse, 1 / keep),
            (self.offset, keep),
            (self.mean, keep),
            (self.gram, keep * keep),
        ):
            part.mul_(factor)

    def _invert(self) -> None:
        """U^-1 anew from U, whose overall size moves to V where steps have carried it far."""
        size = float(self.U.norm()) / math.sqrt(self.U.shape[0])
        if not 2.0**-20 < size < 2.0**20:
            self.V.mul_(size)
            self.U.div_(size)
        self.U_inverse.copy_(torch.linalg.inv(self.U.double()))
        self.age.zero_()

    def _repair(self) -> None:
        """Singular values of U out of [1/2, 2] times their median move to V. U may be singular.

        With U = P diag(s) R^T: V U = (V P diag(s/t) P^T) (P diag(t) R^T) for any t.
        """
        left, values, right = torch.linalg.svd(self.U.double())
        middle = values.median()
        bad = (values < middle / 2) | (values > 2 * middle)
        if 3 * int(bad.sum()) > bad.numel() or not middle > 0:
            for rows in self._blocks_of_V():
                rows.copy_(rows @ self.U)
            torch.eye(self.U.shape[0], out=self.U)
        else:
            new = values.where(~bad, middle)
            directions = left[:, bad].to(self.V.dtype)
            moved = ((values / new)[bad] - 1).to(self.V.dtype)
            for rows in self._blocks_of_V():
                rows.addmm_((rows @ directions) * moved, directions.T)
            self.U.copy_((left * new) @ right)
        self._invert()

    def _dense(self) -> Tensor:
        return torch.addmm(self.offset + self.mean, self.V, self.U)

    def _blocks_of_V(self) -> tuple[Tensor, ...]:
        width = self.V.shape[1] * self.V.element_size()
        return self.V.split(max(1, BLOCK_BYTES // width))

    def _moments_of_V(self) -> tuple[Tensor, Tensor]:
        """The mean row of V, (d,), and the sum of (row - mean) (row - mean)^T, in float64."""
        centre = torch.stack([rows.sum(0, dtype=torch.float64) for rows in self._blocks_of_V()])
        centre = centre.sum(0) / self.out_features
        near = centre.to(self.V.dtype)
        scatter = torch.zeros_like(self.U, dtype=torch.float64)
        for rows in self._blocks_of_V():
            centred = rows - near
            scatter += (centred.T @ centred).double()
        return centre, scatter

    def _widened(self, hidden: Tensor) -> Tensor:
        return F.pad(hidden, (0, 1), value=1.0) if self.has_bias else hidden

    def _check_hidden(self, hidden: Tensor) -> Tensor:
        if hidden.ndim == 0 or hidden.shape[-1] != self.in_features:
            raise ValueError(
                f"FactoredLinear: hidden {tuple(hidden.shape)}; (..., {self.in_features}) would be"
                " right"
            )
        if self.V.dtype not in CONDITION_LIMITS:
            raise ValueError(
                f"FactoredLinear: the layer was converted to {self.V.dtype}, in which it cannot"
                " learn; keep it in float32 or float64, and give it hidden vectors in any"
            )
        if hidden.dtype in (torch.bfloat16, torch.float16):
            hidden = hidden.to(self.V.dtype)
        if hidden.dtype != self.V.dtype or hidden.device != self.V.device:
            raise ValueError(
                f"FactoredLinear: hidden is {hidden.dtype} on {hidden.device}, the layer"
                f" {self.V.dtype} on {self.V.device}; they must agree"
            )
        return hidden

    def _check_batch(
        self, hidden: Tensor, target: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden as (m, d), target as (m, K), and where it names a class."""
        hidden = self._check_hidden(hidden)
        rows, given = tuple(hidden.shape[:-1]), tuple(target.shape)
        several = len(given) == len(rows) + 1
        if given[: len(rows)] != rows or len(given) > len(rows) + 1:
            wanted = ", ".join((*map(str, rows), "K")) + "," * (not rows)
            raise ValueError(
                f"FactoredLinear: target {given} for hidden {tuple(hidden.shape)}; {rows} would be"
                f" right, or ({wanted}) for K classes in each row"
            )
        count, width = math.prod(rows), given[-1] if several else 1
        labels = find_labels(
            "FactoredLinear", target, self.out_features, ignore_index, several=several
        )
        return (
            hidden.reshape(count, self.in_features),
            target.reshape(count, width),
            labels.reshape(count, width),
        )

    def _exact(self) -> torch.autocast:
        """Autocast would round what has to be exact."""
        return torch.autocast(self.V.device.type, enabled=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredLinear:
        self._changes += 1
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._changes += 1
        super()._load_from_state_dict(*args, **kwargs)
