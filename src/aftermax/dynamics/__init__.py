"""Any causal mixer of the linear family as one linear system that varies in time.

Sieber et al., "Understanding the differences in Foundation Models: Attention, State Space Models,
and Recurrent Neural Networks", arXiv 2405.15731::

    h_i = Lambda_i h_{i-1} + B_i u_i,    y_i = C_i h_i + D_i u_i

`form.py` is the form, `systems.py` brings attention into it, `mixers.py` has the recurrent networks
that the paper compares with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aftermax.dynamics import systems
from aftermax.dynamics.form import DynamicalSystem, Factors, Gauge, Matrices
from aftermax.dynamics.mixers import MLSTM, RGLRU, S6, SSD, Mixer, QuasiLSTM
from aftermax.linear.normalised import NormalisedAttention
from aftermax.modules import Attention

__all__ = [
    "MLSTM",
    "RGLRU",
    "S6",
    "SSD",
    "DynamicalSystem",
    "Factors",
    "Matrices",
    "Mixer",
    "QuasiLSTM",
    "as_dynamical_system",
]


@torch.no_grad()
def as_dynamical_system(
    module: Attention | NormalisedAttention | Mixer,
    x: Tensor,
    *,
    gauge: Gauge = "state",
    taylor_degree: int | None = None,
    exact_horizon: bool = False,
) -> DynamicalSystem:
    """The module at input x, as h_i = Lambda_i h_{i-1} + B_i u_i, y_i = C_i h_i + D_i u_i, u = x.

    ======================  ===========  ========================  ==============  ==============
    module                  Lambda_i     B_i                       C_i             N per head
    ======================  ===========  ========================  ==============  ==============
    Linear, CosFormer       eta ratio    phi(k_i) (x) W_V / eta_i  phi(q_i)^T      F d
    Normalised              eta ratio    k_i (x) W_V / eta_i       q_i^T           n d
    Cottention, row side    eta ratio    k_i (x) W_V / eta_i       q_i^T           n d
    Cottention, value side  1            k_i (x) W_V / i^sigma     q_i^T           n d
    TransNormer             g            phi(k_i) (x) W_V          phi(q_i)^T      F d
    InLine                  1            [k_i, 1] (x) W_V          [q'_i, c_i]^T   (n + 1) d
    softmax, degree p       eta ratio    m(k_i) (x) W_V / eta_i    m(q_i)^T        C(n + p, p) d
    softmax, exact          eta ratio    e_i (x) W_V / eta_i       exp(q_i . k_j)  L d
    ======================  ===========  ========================  ==============  ==============

    (eta ratio = eta_{i-1} / eta_i, eta_i what row i is divided by; C_i stands before (x) W_O; n the
    head's width, d that of its values, F the features. The recurrent mixers tell in their classes.)
    Heads are blocks of a diagonal, W_O is part of C. A system that is not in the table has its form
    by its `separate` and `finish`, as long as `separate` does no more to a value than multiply it.

    Softmax has no such form with a state of one size: its features are without end. With
    `taylor_degree=p` the series of the exponential is cut after degree p, N = C(n + p, p) d, and
    `truncation_error` is what that changes, measured; after an odd degree weights may be negative
    and a row's sum next to 0, so an even one is better. With `exact_horizon=True` the state has a
    place for each token of x, which is the key-value cache.

    TransNormer's norm is not linear in h: y is what stands before it, heads side by side, and the
    norm and W_O are in `after`.

    Args:
        module: an `Attention` with a linear system or softmax, causal, without window, ALiBi or
            biases; a `NormalisedAttention`; or a mixer of `aftermax.dynamics`.
        x: (L, width), or (1, L, width): one sequence, since Lambda, B and C depend on it; float32
            or float64, as the module.
        gauge: where a row's normaliser goes: into Lambda and B ("state", the paper's), or into C
            ("output"). The map from u to y is the same, Lambda is not: in the first it may be far
            above 1 where nothing grows.

    Returns:
        `DynamicalSystem`, a value of its own: without gradients, the same whatever becomes of the
        module.

    Raises:
        ValueError: for what has no such form (row maps but softmax, attention that sees later
            tokens, windows, ALiBi, biases of values), with the reason; for a normaliser of 0 in the
            gauge "state"; for shapes and dtypes that do not fit.

    >>> from aftermax import Linear
    >>> attend = Attention(8, heads=2, weights=Linear(), positions="none").double()
    >>> form = as_dynamical_system(attend, torch.randn(5, 8, dtype=torch.float64))
    >>> form
    DynamicalSystem(context='history', gauge='state', truncation_error=0.0, state_dim=32)
    >>> form.phi().shape
    torch.Size([5, 5, 8, 8])
    >>> form.check() < 1e-12
    True
    """
    if gauge not in ("state", "output"):
        raise ValueError(f"gauge must be 'state' or 'output', got {gauge!r}")
    if not isinstance(module, Attention | NormalisedAttention | Mixer):
        raise ValueError(
            "as_dynamical_system takes an aftermax.Attention (a system goes into one:"
            " Attention(width, heads, weights=system, positions='none')), a NormalisedAttention or"
            f" a mixer of aftermax.dynamics; got {type(module).__name__}"
        )
    u = _one_sequence(x, next(module.parameters()).dtype)
    if isinstance(module, Attention):
        return systems.of_attention(module, u, gauge, taylor_degree, exact_horizon)
    if taylor_degree is not None or exact_horizon:
        raise ValueError(
            "taylor_degree and exact_horizon are for softmax:"
            f" {type(module).__name__} has a finite state"
        )
    if isinstance(module, Mixer):
        return module.dynamics(u, gauge)
    return systems.of_normalised(module, u, gauge)


def _one_sequence(x: Tensor, dtype: torch.dtype) -> Tensor:
    u = x[0] if x.ndim == 3 and len(x) == 1 else x
    if u.ndim != 2 or not len(u):
        raise ValueError(
            "x must be one sequence, (L, width) or (1, L, width) with L >= 1, since Lambda, B and C"
            f" depend on it; got {tuple(x.shape)}"
        )
    if u.dtype != dtype or dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"x and the module must both be float32 or float64, got {u.dtype} and {dtype}"
        )
    return u.clone()
