"""Attention in the form: what a linear system separates, and softmax cut short or with all keys.

For a head with features q_i and k_j (the key's of token j, the query's of token i), decay g and the
normaliser eta_i of a row::

    Lambda_i = g eta_{i-1} / eta_i,    B_i = k_i (x) W_V / eta_i,    C_i = q_i^T (x) W_O

The features come from the system's own `separate`, eta from its `finish` and from what `separate`
divided the query by, so that a new linear system has its form by itself.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from aftermax.catalogue import CATALOGUE
from aftermax.dense import Dense
from aftermax.dynamics.form import DynamicalSystem, Factors, Gauge, normalised
from aftermax.linear.normalised import NormalisedAttention
from aftermax.linear.separable import Places, Separable
from aftermax.linear.walk import walk
from aftermax.modules import Attention
from aftermax.visible import Visible
from aftermax.weights import Softmax


def of_attention(
    module: Attention, u: Tensor, gauge: Gauge, taylor_degree: int | None, exact_horizon: bool
) -> DynamicalSystem:
    """u (L, width). See `aftermax.as_dynamical_system`."""
    _refuse(module, taylor_degree, exact_horizon)
    system = module.system
    if isinstance(system, Separable):
        return _separable(module, system, u, gauge)
    if exact_horizon:
        return _all_keys(module, u, gauge)
    assert taylor_degree is not None
    return _taylor(module, u, gauge, taylor_degree)


def of_normalised(module: NormalisedAttention, u: Tensor, gauge: Gauge) -> DynamicalSystem:
    """Sieber et al. 2024, equation 21, where eta_i = exp(W u_i) is of the layer's input."""
    query, key = (
        layer(u).unflatten(-1, (module.heads, -1)) for layer in (module.to_query, module.to_key)
    )  # (L, H, n)
    decay, into, out_of = normalised(
        u.new_ones(len(u), 1, 1, 1),
        Factors(key, u.new_ones(1, 1, 1), _into(module)),
        Factors(query, u.new_ones(1, 1, 1), _out_of(module)),
        module.to_log_normaliser(u).exp(),
        gauge,
    )
    return DynamicalSystem(decay, into, out_of, None, u, module(u[None])[0], gauge=gauge)


def _refuse(module: Attention, taylor_degree: int | None, exact_horizon: bool) -> None:
    system = module.system
    of_rows = isinstance(system, Dense)
    name = type(system.weights if of_rows else system).__name__
    if any(type(e.system) is type(system) and not e.causal for e in CATALOGUE):
        raise ValueError(f"{name} has no causal form, and what sees later tokens has no state")
    if not module.causal:
        raise ValueError(
            f"{name} with causal=False sees later tokens: y_i is no function of a state h_i"
        )
    if module.window is not None:
        raise ValueError(
            f"window={module.window} forgets a token at once, which no diagonal Lambda does"
        )
    if module.slopes is not None:
        raise ValueError("ALiBi adds to the scores, which are then no product of features")
    if module.to_value.bias is not None:
        raise ValueError("bias=True makes values affine in u, and B u linear: give bias=False")
    if isinstance(system, Separable):
        if taylor_degree is not None or exact_horizon:
            raise ValueError(
                f"taylor_degree and exact_horizon are for softmax: {name} has a finite state"
            )
        return
    if not of_rows:
        raise ValueError(f"{name} is neither a linear system nor softmax: it has no known form")
    if system.weights != Softmax():
        raise ValueError(
            "of the row maps only Softmax() has a form here, its series cut short or a state with"
            f" all keys; got {system.weights!r}, whose weights are no product of finitely many"
            " features of query and key"
        )
    if (taylor_degree is None) is not exact_horizon:
        raise ValueError(
            "softmax needs features without end: give either taylor_degree=p (its series cut"
            " after degree p) or exact_horizon=True (a state as long as the sequence, the"
            f" key-value cache); got {taylor_degree=}, {exact_horizon=}"
        )
    if taylor_degree is not None and taylor_degree < 0:
        raise ValueError(f"taylor_degree must be at least 0, got {taylor_degree}")


# ---- linear systems ----------------------------------------------------------------------------


def _separable(module: Attention, system: Separable, u: Tensor, gauge: Gauge) -> DynamicalSystem:
    query, key, value = module.project(u[None], 0)  # (1, H|Hkv, L, D)
    learned = {name: x.clone() for name, x in module.learned.items()}
    to_out = module.to_out.weight.clone()
    places = _places(system, key, module.heads)
    parts = system.separate(query, key, value, places, module.scale, **learned)
    # of ones comes back what a token's value is multiplied by
    ones = value.new_ones(*value.shape[:-1], 1)
    factor = system.separate(query, key, ones, places, module.scale, **learned).value
    factor, key, new, value = (
        x.repeat_interleave(module.heads // x.shape[1], 1)
        for x in (factor, parts.key, parts.value, value)
    )
    if not torch.allclose(new, factor * value):
        raise ValueError(f"{type(system).__name__} does more to a value than multiply it")
    query = parts.query

    total = None
    if system.totals:
        walked = walk(
            query, key, torch.ones_like(factor), rate=parts.rate, form="recurrent", impl="reference"
        )
        total = walked.out[..., 0]
    divisor = parts.divisor
    if divisor is not None:
        divisor = divisor.expand(query.shape[:-1])
        query = query * divisor[..., None]

    @torch.no_grad()
    def finish(y: Tensor) -> Tensor:
        out = y.unflatten(-1, (module.heads, -1)).transpose(0, 1)[None]
        return torch.nn.functional.linear(_joined(system.finish(out, total, **learned)), to_out)

    eta = divisor
    of_row = _factor_of_rows(system, query, module.head_dim, total, learned)
    if of_row is not None:
        eta = 1 / of_row if divisor is None else divisor / of_row

    length = len(u)
    decay = u.new_ones(1) if parts.rate is None else torch.exp(-parts.rate.to(u))
    decay = decay[None, :, None, None].expand(length, -1, -1, -1)
    gate = u.new_ones(1, 1, 1)
    decay, into, out_of = normalised(
        decay,
        Factors((key * factor)[0].transpose(0, 1), gate, _into(module)),
        Factors(query[0].transpose(0, 1), gate, _out_of(module, joined=of_row is not None)),
        None if eta is None else eta[0].mT,
        gauge,
    )
    return DynamicalSystem(
        decay, into, out_of, None, u, _own(module, u),
        context="history" if system.totals or system.needs_key_sums else "step",
        gauge=gauge,
        after=finish if of_row is None else None,
    )  # fmt: skip


def _places(system: Separable, key: Tensor, heads: int) -> Places:
    """Of tokens that all are seen, from the first on."""
    tokens = key.shape[2]
    position = torch.arange(tokens, dtype=torch.float64, device=key.device)
    count = (position + 1).to(key.dtype)[None, None]
    sums = None
    if system.needs_key_sums:
        sums = system.key_features(key).cumsum(-2).repeat_interleave(heads // key.shape[1], 1)
    return Places(position, position, tokens, count, count, sums)


def _factor_of_rows(
    system: Separable, query: Tensor, width: int, total: Tensor | None, learned: dict[str, Tensor]
) -> Tensor | None:
    """What `finish` multiplies row i by, (1, H, L); None where it is not that, and not linear."""
    ones = query.new_ones(*query.shape[:-1], width)
    factor = system.finish(ones, total, **learned)[..., :1]
    random = torch.Generator(query.device).manual_seed(0)
    probe = torch.randn(ones.shape, generator=random, dtype=ones.dtype, device=ones.device)
    if not torch.allclose(system.finish(probe, total, **learned), factor * probe):
        return None
    return factor[..., 0]


# ---- softmax -----------------------------------------------------------------------------------


def _taylor(module: Attention, u: Tensor, gauge: Gauge, degree: int) -> DynamicalSystem:
    query, key, value = _heads(module, u)
    scores = _scores(module, query, key)
    weights = torch.zeros_like(scores)
    for power in range(degree, 0, -1):  # Horner's rule: 1 + s (1 + s/2 (1 + s/3 ...
        weights = (weights + 1) * scores / power
    weights = (weights + 1).tril()
    eta = weights.sum(-1)
    own = module.to_out(_joined(weights / eta[..., None] @ value))
    scale = _scale(module)
    decay, into, out_of = _softmax_form(
        module, monomials(key[0], degree), monomials(scale * query[0], degree), eta[0], gauge
    )
    whole = _own(module, u)
    cut = DynamicalSystem(decay, into, out_of, None, u, own, context="history", gauge=gauge)
    error = torch.linalg.norm(cut.run() - whole) / torch.linalg.norm(whole)
    return replace(cut, truncation_error=error.item())


def _all_keys(module: Attention, u: Tensor, gauge: Gauge) -> DynamicalSystem:
    query, key, _ = _heads(module, u)
    scores = _scores(module, query, key)[0]  # (H, L, L)
    later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, -math.inf)
    # eta_{i-1} / eta_i needs one measure for all rows
    highest = scores.amax(-1 if gauge == "output" else (-2, -1), keepdim=True)
    weights = (scores - highest).exp()
    place = torch.eye(len(u)).to(u).expand_as(weights)  # token j writes to the j-th row of h
    decay, into, out_of = _softmax_form(module, place, weights, weights.sum(-1), gauge)
    return DynamicalSystem(
        decay, into, out_of, None, u, _own(module, u), context="history", gauge=gauge
    )


def _softmax_form(
    module: Attention, key: Tensor, query: Tensor, eta: Tensor, gauge: Gauge
) -> tuple[Tensor, Factors, Factors]:
    """From features (H, L, F) and the rows' sums (H, L)."""
    one = key.new_ones(1, 1, 1)
    return normalised(
        key.new_ones(key.shape[1], 1, 1, 1),
        Factors(key.transpose(0, 1), one, _into(module)),
        Factors(query.transpose(0, 1), one, _out_of(module)),
        eta.mT,
        gauge,
    )


def monomials(x: Tensor, degree: int) -> Tensor:
    """Features whose inner product is the exponential's series up to `degree`, and no fewer do::

        sum_f m(x)_f m(y)_f = sum_{r <= p} (x . y)^r / r!,    m(x)_a = x^a / sqrt(a!), |a| <= p

    (..., n) -> (..., C(n + p, p)), one for each multi-index a.

    >>> monomials(torch.tensor([2.0, 3.0]), 2)
    tensor([1.0000, 2.0000, 3.0000, 2.8284, 6.0000, 6.3640])
    """
    width, features = x.shape[-1], []
    for power in range(degree + 1):
        indices = list(combinations_with_replacement(range(width), power))
        ways = [math.prod(math.factorial(i.count(j)) for j in set(i)) for i in indices]
        chosen = torch.tensor(indices, dtype=torch.long, device=x.device).view(len(indices), power)
        features.append(x[..., chosen].prod(-1) / torch.tensor(ways).to(x).sqrt())
    return torch.cat(features, -1)


# ---- what all of them need ---------------------------------------------------------------------


def _heads(module: Attention, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1, H, L, D), a key and value for each query head."""
    query, key, value = module.project(u[None], 0)
    groups = module.heads // module.kv_heads
    return query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def _scale(module: Attention) -> float:
    return Softmax.scale(module.head_dim) if module.scale is None else module.scale


def _scores(module: Attention, query: Tensor, key: Tensor) -> Tensor:
    return _scale(module) * query @ key.mT


def _own(module: Attention, u: Tensor) -> Tensor:
    """The module's output, without dropout."""
    out = module.system.attend(
        *module.project(u[None], 0), Visible(causal=True), enable_gqa=True, scale=module.scale,
        impl=module.impl, **module.learned,
    )  # fmt: skip
    return module.to_out(_joined(out))


def _joined(out: Tensor) -> Tensor:
    """(1, H, L, V) -> (L, H V)."""
    return out[0].transpose(0, 1).flatten(-2)


def _into(module: Attention | NormalisedAttention) -> Tensor:
    """W_V, (H, V, d)."""
    weight = module.to_value.weight
    groups = module.heads // getattr(module, "kv_heads", module.heads)
    # which copies: the form is a value, whatever becomes of the module
    return weight.unflatten(0, (module.heads // groups, -1)).repeat_interleave(groups, 0)


def _out_of(module: Attention | NormalisedAttention, joined: bool = True) -> Tensor:
    """W_O, (H, V, d_out); the heads side by side, (H, V, H V), where it cannot be joined to C."""
    weight = module.to_out.weight.clone()
    if not joined:
        weight = torch.eye(weight.shape[1]).to(weight)
    return weight.mT.unflatten(0, (module.heads, -1))
