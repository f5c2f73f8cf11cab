"""The form itself: h_i = Lambda_i h_{i-1} + B_i u_i, y_i = C_i h_i + D_i u_i, as a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Gauge = Literal["state", "output"]


class Factors(NamedTuple):
    """B or C, factored: features (x) gated matrix, token by token and head by head::

        B_i = features_i (x) diag(gate_i) matrix,    C_i = features_i^T (x) matrix^T diag(gate_i)

    For attention the features of B are those of the key, its matrix is W_V; those of C are the
    query's, its matrix is W_O.
    """

    features: Tensor
    """(L, H, F)"""
    gate: Tensor
    """(L|1, H|1, V|1)"""
    matrix: Tensor
    """(H, V, d): d is the width of the input in B, that of the output in C."""


class Matrices(NamedTuple):
    """The same as full tensors, N = H F V: for small systems, to look at."""

    Lambda: Tensor
    """(L, N), the diagonal."""
    B: Tensor
    """(L, N, d)"""
    C: Tensor
    """(L, d_out, N)"""
    D: Tensor | None
    """(L, d_out, d)"""


@dataclass(frozen=True, eq=False)
class DynamicalSystem:
    """A causal sequence mixer at one input, as a linear system that varies in time.

        h_i = Lambda_i h_{i-1} + B_i u_i,    y_i = C_i h_i + D_i u_i,    h_0 = 0

    L tokens u_i of width d. The state h is a matrix of F features by V values in each of H heads;
    the heads do not meet before C, so that together they are block-diagonal. Lambda_i is diagonal:
    one number for each element of the state, or for as many as share it.

    Lambda, B and C belong to the input that they were made for. `aftermax.as_dynamical_system`
    makes this value, and says what y is for each kind of mixer.

    Only Phi, the map from u to y, is the mixer's own: for any invertible diagonal T_i, h -> T_i h
    gives other Lambda, B and C and the same Phi. So a statistic of Lambda means nothing without its
    `gauge`; compare `phi()`.
    """

    Lambda: Tensor = field(repr=False)
    """(L, H|1, F|1, V|1), the diagonal."""
    B: Factors = field(repr=False)
    C: Factors = field(repr=False)
    D: Tensor | None = field(repr=False)
    """(L, d_out, d) or None."""
    u: Tensor = field(repr=False)
    """(L, d): the input that it was made for."""
    own: Tensor = field(repr=False)
    """(L, d_out): what the mixer itself gives, in its own code."""
    context: Literal["step", "history"] = "step"
    """Whether B_i and C_i depend on u_i (and on i) alone, and Lambda_i too but for the normaliser
    of the row before; or on all tokens so far, as where a row is divided by its sum."""
    gauge: Gauge = "state"
    """Where the normaliser of a row stands: in Lambda and B ("state") or in C ("output"). Where
    there is none the two are the same."""
    truncation_error: float = 0.0
    """‖y - mixer‖ / ‖mixer‖, measured at this input, for a system that is a truncation; else 0."""
    after: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    """y (L, d_y) -> (L, d_out): what follows y and is not linear in h; None = nothing."""
    state_dim: int = field(init=False)
    """N = H F V, numbers in the state."""

    def __post_init__(self):
        heads, values, _ = self.B.matrix.shape
        object.__setattr__(self, "state_dim", heads * self.B.features.shape[-1] * values)

    def run(self, u: Tensor | None = None) -> Tensor:
        """y (L, d_out), token by token.

        Args:
            u: (L, d), other inputs of the same Lambda, B and C (y is linear in them); None = the
                input that they were made for.
        """
        u = self._input(u)
        written = torch.einsum("hvd,ld->lhv", self.B.matrix, u) * self.B.gate
        heads, values, _ = self.B.matrix.shape
        state = u.new_zeros(heads, self.B.features.shape[-1], values)
        read = []
        for i, decay in enumerate(self.Lambda):
            state = decay * state + self.B.features[i][..., None] * written[i][:, None]
            read.append((self.C.features[i][:, None] @ state)[:, 0])
        out = torch.einsum("hvo,lhv->lo", self.C.matrix, torch.stack(read) * self.C.gate)
        return out if self.D is None else out + torch.einsum("lod,ld->lo", self.D, u)

    def phi(self) -> Tensor:
        """Phi (L, L, d_out, d), y_i = sum_j Phi_ij u_j: O(L^2) in time and memory.

        Phi_ij = C_i Lambda_i ... Lambda_{j+1} B_j  for j < i,    Phi_ii = C_i B_i + D_i
        """
        length, d, d_out = len(self.u), self.B.matrix.shape[-1], self.C.matrix.shape[-1]
        into = self.B.gate.expand(length, *self.B.matrix.shape[:2])
        out_of = self.C.gate.expand(length, *self.B.matrix.shape[:2])
        phi = self.u.new_zeros(length, length, d_out, d)
        left = self.B.features[:0, ..., None]  # of what token j wrote, as it stands in the state
        for i, decay in enumerate(self.Lambda):
            new = self.B.features[i : i + 1, ..., None].expand(*(-1,) * 3, decay.shape[-1])
            left = torch.cat([(decay * left).expand(-1, *new.shape[1:]), new])
            weight = torch.einsum("hf,jhfv->jhv", self.C.features[i], left)
            weight = weight * into[: i + 1] * out_of[i]
            phi[i, : i + 1] = torch.einsum("hvo,jhv,hvd->jod", self.C.matrix, weight, self.B.matrix)
            if self.D is not None:
                phi[i, i] += self.D[i]
        return phi

    def dense(self) -> Matrices:
        """Lambda, B, C and D as full tensors; B and C take L N d numbers each."""
        length = len(self.u)
        heads, values, _ = self.B.matrix.shape
        features = self.B.features.shape[-1]
        diagonal = self.Lambda.expand(length, heads, features, values).reshape(length, -1)
        into = self.B.gate.expand(length, heads, values)
        out_of = self.C.gate.expand(length, heads, values)
        into = torch.einsum("lhf,lhv,hvd->lhfvd", self.B.features, into, self.B.matrix)
        out_of = torch.einsum("lhf,lhv,hvo->lohfv", self.C.features, out_of, self.C.matrix)
        return Matrices(diagonal, into.flatten(1, 3), out_of.flatten(2), self.D)

    def check(self, tolerance: float | None = None) -> float:
        """Run, and compare with the mixer's own output: the largest difference, relative to the
        largest output.

        A truncation is compared with the truncated attention, computed from its weights; what it
        lacks to the whole is `truncation_error`.

        Args:
            tolerance: None = 1e4 roundings of the dtype, 2.2e-12 in float64.

        Raises:
            AssertionError: where the difference is larger, or not a number.
        """
        out = self.run()
        out = out if self.after is None else self.after(out)
        largest = self.own.abs().max().item()
        error = (out - self.own).abs().max().item() / (largest or 1.0)
        tolerance = 1e4 * torch.finfo(out.dtype).eps if tolerance is None else tolerance
        if not error <= tolerance:
            raise AssertionError(
                f"{self} is off its mixer's own output by {error:.2g} of the largest, more than"
                f" {tolerance:.2g}"
            )
        return error

    def _input(self, u: Tensor | None) -> Tensor:
        if u is None:
            return self.u
        if u.shape != self.u.shape:
            raise ValueError(
                f"u must be (L, d) = {tuple(self.u.shape)}, the shape that Lambda, B and C were"
                f" made for; got {tuple(u.shape)}"
            )
        return u.to(self.u)


def normalised(
    decay: Tensor, into: Factors, out_of: Factors, normaliser: Tensor | None, gauge: Gauge
) -> tuple[Tensor, Factors, Factors]:
    """Lambda, B and C with row i divided by `normaliser` (L, H), eta_i, in one of two places::

        output   C_i / eta_i
        state    B_i / eta_i,  Lambda_i eta_{i-1} / eta_i

    Lambda_1 meets h_0 = 0 and might be anything; it is left as it is.

    Raises:
        ValueError: for the state where some eta_i is 0 or not finite.
    """
    if normaliser is None:
        return decay, into, out_of
    if gauge == "output":
        return decay, into, out_of._replace(features=out_of.features / normaliser[..., None])
    if not (normaliser.isfinite() & (normaliser != 0)).all():
        raise ValueError(
            "a row's normaliser is 0 or not finite: a state cannot be divided by it; take"
            " gauge='output'"
        )
    ratio = torch.cat([torch.ones_like(normaliser[:1]), normaliser[:-1] / normaliser[1:]])
    features = into.features / normaliser[..., None]
    return decay * ratio[..., None, None], into._replace(features=features), out_of
