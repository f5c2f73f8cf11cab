"""The table of arXiv 2405.15731, each mechanism's Lambda, B, C and D written by hand.

From the modules' weights alone; nothing of the library's features or forms is used.
"""

import math
from dataclasses import dataclass

import torch

from aftermax import (
    Attention,
    CosFormer,
    Cottention,
    InLine,
    Linear,
    Normalised,
    NormalisedAttention,
    TransNormer,
)
from aftermax.dynamics import MLSTM, RGLRU, S6, SSD, QuasiLSTM
from aftermax.linear.separable import Separable, Separated

F64 = torch.float64
LENGTH, WIDTH, HEAD = 7, 6, 4


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@dataclass(frozen=True)
class Plain(Separable):
    """Linear attention without a normaliser, which is not in the catalogue."""

    def separate(self, query, key, value, places, scale, **learned):
        return Separated(query, key, value)


def attend_with(system, **options) -> Attention:
    torch.manual_seed(1)
    options = {"heads": 1, "head_dim": HEAD, "positions": "none"} | options
    module = Attention(WIDTH, weights=system, **options).double()
    for i, parameter in enumerate(module.learned.values()):
        parameter.data += normal(*parameter.shape, seed=40 + i, scale=0.3)
    return module


# ---- by hand -----------------------------------------------------------------------------------
# N = F V: element (f, v) of the state is number f V + v


def kron(features, matrix):
    """B_i = features_i (x) matrix: (L, F), (V, d) -> (L, F V, d)."""
    return torch.stack([torch.kron(f[:, None].contiguous(), matrix) for f in features])


def kron_read(features, matrix):
    """C_i = features_i^T (x) matrix: (L, F), (d, V) -> (L, d, F V)."""
    return torch.stack([torch.kron(f[None].contiguous(), matrix) for f in features])


def projected(module, x):
    return (x @ layer.weight.T for layer in (module.to_query, module.to_key))


def from_features(module, query, key, eta=None, decay=1.0, joined=True):
    """eta_{i-1} / eta_i, k_i (x) W_V / eta_i, q_i^T (x) W_O."""
    eta = query.new_ones(len(query)) if eta is None else eta
    ratio = decay * torch.cat([eta[:1], eta[:-1]]) / eta
    count = query.shape[1] * HEAD
    into = kron(key, module.to_value.weight) / eta[:, None, None]
    w_out = module.to_out.weight if joined else torch.eye(HEAD, dtype=F64)
    return ratio[:, None].expand(-1, count), into, kron_read(query, w_out), None


def row_sums(query, key):
    return (query * key.cumsum(0)).sum(-1)


def plain(module, x):
    return from_features(module, *projected(module, x))


def linear(module, x):
    query, key = (torch.nn.functional.elu(y) + 1 for y in projected(module, x))
    return from_features(module, query, key, row_sums(query, key))


def normalised_by_query(module, x):
    query, key = projected(module, x)
    return from_features(module, query, key, torch.exp(query @ module.learned["w"][0]))


def normalised(module, x):
    w = module.to_log_normaliser.weight[0]
    ratio = torch.exp((x.roll(1, 0) - x) @ w)
    query, key = projected(module, x)
    into = kron(key, module.to_value.weight) * torch.exp(-x @ w)[:, None, None]
    count = query.shape[1] * WIDTH
    return (
        ratio[:, None].expand(-1, count),
        into,
        kron_read(query, module.to_out.weight),
        None,
    )


def transnormer(module, x):
    query, key = (y * torch.sigmoid(y) for y in projected(module, x))
    decay = math.exp(-(2.0**-8) * (1 + 1e-5))  # ALiBi's slope of one head
    return from_features(module, query, key, decay=decay, joined=False)


def transnormer_lrpe(module, x):
    angle = torch.arange(LENGTH, dtype=F64)[:, None] * module.learned["theta"][0]
    query, key = (
        torch.cat([y * torch.sigmoid(y) * angle.cos(), y * torch.sigmoid(y) * angle.sin()], 1)
        for y in projected(module, x)
    )
    decay = math.exp(-(2.0**-8) * (1 + 1e-5))
    return from_features(module, query, key, decay=decay, joined=False)


def cosformer(module, x):
    angle = math.pi / 2 / 16 * torch.arange(LENGTH, dtype=F64)[:, None]
    query, key = (
        torch.cat([y.relu() * angle.sin(), y.relu() * angle.cos()], 1) for y in projected(module, x)
    )
    return from_features(module, query, key, row_sums(query, key).clamp_min(1e-6))


def directions(module, x):
    return (y / y.norm(dim=1, keepdim=True) for y in projected(module, x))


def cottention_row(module, x):
    sigma = torch.sigmoid(module.learned["m"][0])
    number = torch.arange(1, LENGTH + 1, dtype=F64)
    return from_features(module, *directions(module, x), number**sigma)


def cottention_value(module, x):
    sigma = torch.sigmoid(module.learned["m"][0])
    query, key = directions(module, x)
    number = torch.arange(1, LENGTH + 1, dtype=F64)
    return from_features(module, query, key / number[:, None] ** sigma)


def inline(module, x):
    query, key = projected(module, x)
    number = torch.arange(1, LENGTH + 1, dtype=F64)
    s = HEAD**-0.5
    rest = (1 - s / number * row_sums(query, key)) / number
    query = torch.cat([s / number[:, None] * query, rest[:, None]], 1)
    return from_features(module, query, torch.cat([key, torch.ones(LENGTH, 1, dtype=F64)], 1))


def s6(module, x):
    w_down, w_up = (layer.weight for layer in module.to_delta)
    delta = torch.log1p(torch.exp(x @ w_down.T @ w_up.T + module.to_delta[1].bias))
    b, c = x @ module.to_b.weight.T, x @ module.to_c.weight.T
    a = -module.log_minus_a.exp()  # (width, n)
    decay = torch.stack([torch.exp(d[:, None] * a).T.flatten() for d in delta])
    into = torch.stack([kron(f[None], torch.diag(d))[0] for f, d in zip(b, delta, strict=True)])
    out_of = kron_read(c, torch.eye(WIDTH, dtype=F64))
    return decay, into, out_of, torch.diag(module.skip).expand(LENGTH, -1, -1)


def ssd(module, x):
    delta = torch.log1p(torch.exp(x @ module.to_delta.weight.T + module.to_delta.bias))
    decay = torch.exp(-module.log_a.exp() * delta)
    b, c = x @ module.to_b.weight.T, x @ module.to_c.weight.T
    whole = torch.eye(WIDTH, dtype=F64)
    skip = (module.skip * whole).expand(LENGTH, -1, -1)
    return decay.expand(-1, 3 * WIDTH), kron(delta * b, whole), kron_read(c, whole), skip


def qlstm(module, x):
    gates = x @ module.to_gates.weight.T + module.to_gates.bias
    forget, into, out_of = gates.split(WIDTH, 1)
    if module.alpha is None:
        decay = torch.sigmoid(forget)
    else:
        decay = torch.sigmoid(-forget) ** module.alpha
    into = torch.sigmoid(into)[:, :, None] * module.to_new.weight
    return decay, into, torch.diag_embed(torch.sigmoid(out_of)), None


def rglru(module, x):
    gates = torch.sigmoid(x @ module.to_gates.weight.T + module.to_gates.bias)
    recurrence, into = gates.split(WIDTH, 1)
    decay = torch.sigmoid(module.logit) ** (8 * recurrence)
    into = torch.diag_embed((1 - decay.square()).sqrt() * into)
    return decay, into, torch.eye(WIDTH, dtype=F64).expand(LENGTH, -1, -1), None


def mlstm(module, x):
    """In the gauge "output", as the table has it."""
    query, key = projected(module, x)
    key = key / WIDTH**0.5
    forget, into = (x @ module.to_gates.weight.T + module.to_gates.bias).unbind(1)
    forget, into = torch.sigmoid(forget), torch.exp(into)
    norm, totals = torch.zeros(WIDTH, dtype=F64), []
    for f, e, k, q in zip(forget, into, key, query, strict=True):
        norm = f * norm + e * k
        totals.append((norm @ q).abs().clamp_min(1))
    assert 0 < sum(total > 1 for total in totals) < LENGTH  # both sides of the maximum
    gate = torch.sigmoid(x @ module.to_out_gate.weight.T + module.to_out_gate.bias)
    read = kron_read(query, torch.eye(WIDTH, dtype=F64)) / torch.stack(totals)[:, None, None]
    return (
        forget[:, None].expand(-1, WIDTH**2),
        kron(into[:, None] * key, module.to_value.weight),
        gate[:, :, None] * read,
        None,
    )


TABLE = {
    "linear, unnormalised": (lambda: attend_with(Plain()), plain, HEAD),
    "linear, elu + 1": (lambda: attend_with(Linear()), linear, HEAD),
    "normalised": (lambda: NormalisedAttention(WIDTH, 1, key_dim=5), normalised, 5 * WIDTH / HEAD),
    "normalised, by query": (lambda: attend_with(Normalised()), normalised_by_query, HEAD),
    "lightning": (lambda: attend_with(TransNormer()), transnormer, HEAD),
    "lightning, LRPE": (lambda: attend_with(TransNormer(lrpe=True)), transnormer_lrpe, 2 * HEAD),
    "cosFormer": (lambda: attend_with(CosFormer(horizon=16)), cosformer, 2 * HEAD),
    "Cottention, row": (lambda: attend_with(Cottention()), cottention_row, HEAD),
    "Cottention, value": (lambda: attend_with(Cottention("value")), cottention_value, HEAD),
    "InLine": (lambda: attend_with(InLine()), inline, HEAD + 1),
    "S6": (lambda: S6(WIDTH, state=3, rank=2), s6, 3 * WIDTH / HEAD),
    "SSD": (lambda: SSD(WIDTH, state=3), ssd, 3 * WIDTH / HEAD),
    "qLSTM": (lambda: QuasiLSTM(WIDTH), qlstm, WIDTH / HEAD),
    "qLSTM, reversed": (
        lambda: QuasiLSTM(WIDTH, reversed_sigmoid=True),
        qlstm,
        WIDTH / HEAD,
    ),
    "RG-LRU": (lambda: RGLRU(WIDTH), rglru, WIDTH / HEAD),
    "mLSTM": (lambda: MLSTM(WIDTH), mlstm, WIDTH**2 / HEAD),
}
"""Mechanism -> module, its Lambda, B, C and D by hand, its N as a multiple of the head's width."""


def made(make):
    torch.manual_seed(2)
    module = make().double()
    if isinstance(module, QuasiLSTM) and module.alpha is not None:
        module.alpha.data.fill_(1.7)
    if isinstance(module, S6 | SSD):
        module.skip.data = normal(len(module.skip), seed=30)
    if isinstance(module, MLSTM):
        module.to_query.weight.data *= 10  # |n . q| on either side of 1
    return module
