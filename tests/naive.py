"""Every equation of the catalogue as its paper prints it: the oracle that the library must equal.

Nothing here is shared with the library, nothing is stable, masked or fast. A row's equation is
handed the keys that the row sees and no others, so that a key that is not visible does not exist
and N is simply how many there are. float64 throughout.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .naive_sparsek import sparsek


class Row(NamedTuple):
    """One query and the N keys that it sees."""

    query: Tensor  # (D,)
    keys: Tensor  # (N, D)
    bias: Tensor  # (N,) additive mask and ALiBi
    distance: Tensor  # (N,) position of the query minus position of the key
    scale: float | None  # in place of the equation's own factor of the inner product
    learned: dict[str, Tensor]  # of this head
    head: int
    heads: int
    counts: Tensor  # (N,) how many keys the token of each key sees itself

    @property
    def n(self) -> int:
        return self.keys.shape[0]

    def dot(self) -> Tensor:
        scale = 1 / math.sqrt(self.query.shape[0]) if self.scale is None else self.scale
        return scale * (self.keys @ self.query)

    def length_scaled_cosine(self) -> Tensor:
        """ln(d) ln(N) cos(q, k)."""
        query = self.query / self.query.norm()
        keys = self.keys / self.keys.norm(dim=1, keepdim=True)
        scale = math.log(self.query.shape[0]) if self.scale is None else self.scale
        return scale * math.log(self.n) * (keys @ query)


def _softmax(scores: Tensor) -> Tensor:
    return torch.exp(scores) / torch.exp(scores).sum()


def softmax(row: Row) -> Tensor:
    """arXiv 1706.03762, equation 1."""
    return _softmax(row.dot() + row.bias)


def log_n(row: Row) -> Tensor:
    """arXiv 2501.19399: n^(s z_i) / sum_j n^(s z_j)."""
    power = row.learned["s"] * row.dot()
    return row.n**power * torch.exp(row.bias) / (row.n**power * torch.exp(row.bias)).sum()


def cosine(row: Row) -> Tensor:
    """Stage 1 of arXiv 2501.13428 with exp in place of softplus."""
    return _softmax(row.length_scaled_cosine() + row.bias)


def scale_invariant(row: Row) -> Tensor:
    """arXiv 2505.17083: a_t S + m_t with alpha = beta = e^0.5, tau = 10."""
    alpha = beta = math.exp(0.5)
    tau = 10
    t = row.distance.abs().to(torch.float64)
    a_squared = 2 * (torch.log(t / tau + 1) - math.log(alpha) + beta / alpha)
    m = -a_squared + beta / alpha
    return _softmax(torch.sqrt(a_squared) * row.dot() + m + row.bias)


def softmax_one(row: Row) -> Tensor:
    """Miller 2023: exp(x_i) / (1 + sum_j exp(x_j))."""
    e = torch.exp(row.dot() + row.bias)
    return e / (1 + e.sum())


def sink(row: Row) -> Tensor:
    """gpt-oss: one more logit, softmax over all, its column dropped."""
    logits = torch.cat([row.dot() + row.bias, row.learned["sink"].reshape(1)])
    return _softmax(logits)[:-1]


def clipped(row: Row) -> Tensor:
    """arXiv 2306.12929, equation 4, with gamma = -0.025 and zeta = 1."""
    gamma, zeta = -0.025, 1
    return torch.clip((zeta - gamma) * _softmax(row.dot() + row.bias) + gamma, 0, 1)


def clipped_normalised(row: Row) -> Tensor:
    """arXiv 2402.12102: p = 1 becomes eta = 1.03, and the row sums to beta = 1 before clipping."""
    eta, beta, p = 1.03, 1, _softmax(row.dot() + row.bias)
    if row.n == 1:
        return p
    gamma = (beta - eta) / (row.n - 1)
    return torch.clip((eta - gamma) * p + gamma, 0, 1)


def _softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def lssa(row: Row) -> Tensor:
    """arXiv 2501.13428, stage 1."""
    f = _softplus(row.length_scaled_cosine() + row.bias)
    return f / f.sum()


def _reweighted(row: Row, power: float) -> Tensor:
    """arXiv 2501.13428, stage 2: R = relu(A N - O)^p, l1-normalised; O = 0 in the first 3 rows."""
    n = row.n
    offset = 0 if n <= 3 else 1
    r = torch.relu(lssa(row) * n - offset) ** power
    return r / r.sum()


def lssar(row: Row) -> Tensor:
    """The paper's power for long contexts."""
    return _reweighted(row, 15)


def lssar_log(row: Row) -> Tensor:
    """The same with p = 2 ln N, at least 1."""
    return _reweighted(row, max(1, 2 * math.log(row.n)))


def sigmoid(row: Row) -> Tensor:
    """arXiv 2409.04431: sigma(s + b), b = -ln n, n the keys of this row."""
    return 1 / (1 + torch.exp(-(row.dot() + row.bias - math.log(row.n))))


def relu(row: Row) -> Tensor:
    """arXiv 2104.07012: the weights of ReLA, before its norm."""
    return torch.relu(row.dot() + row.bias)


def relu_over_n(row: Row) -> Tensor:
    """arXiv 2309.08586: relu(s) / n."""
    return torch.relu(row.dot() + row.bias) / row.n


def one_pass(row: Row) -> Tensor:
    """arXiv 1805.02867, algorithm 3."""
    x = row.dot() + row.bias
    m, d = x.new_tensor(-math.inf), x.new_tensor(0.0)
    for j in range(row.n):
        before, m = m, max(m, x[j])
        d = d * torch.exp(before - m) + torch.exp(x[j] - m)
    return torch.exp(x - m) / d


def fixed_one_pass(row: Row) -> Tensor:
    """arXiv 2305.18691 in whole numbers, units of 2^-22; the sum unbounded, 1 / sum in 32 bits."""
    unit = 2**22

    def exp(units: int) -> int:
        with decimal.localcontext(prec=50):
            return math.floor((decimal.Decimal(units) / unit).exp() * unit)

    units = [math.floor(float(s) * unit) for s in row.dot() + row.bias]
    units = [min(max(s, -512 * unit), 512 * unit - 1) for s in units]
    m, t = units[0], unit
    for s in units[1:]:
        t = t * exp(m - s) // unit + unit if s > m else t + exp(s - m)
        m = max(m, s)
    share = 2**10 * unit * unit // t
    weights = [exp(s - m) * share // (2**10 * unit) for s in units]
    return torch.tensor(weights, dtype=torch.float64) / unit


def vector_quantised(row: Row) -> Tensor:
    """arXiv 2404.11163: softmax over the nearest of the codes, with a bias for the near."""
    codebook, bias = row.learned["codebook"], row.learned["window_bias"]
    scores = []
    for j in range(row.n):
        chosen = min(range(len(codebook)), key=lambda s: ((row.keys[j] - codebook[s]) ** 2).sum())
        far = abs(int(row.distance[j]))
        scores.append(codebook[chosen] @ row.query)
        scale = 1 / math.sqrt(row.query.shape[0]) if row.scale is None else row.scale
        scores[j] = scale * scores[j] + (bias[far] if far < len(bias) else 0)
    return _softmax(torch.stack(scores) + row.bias)


def elu_plus_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, torch.exp(x))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def times(row: Row, weights: Tensor) -> Tensor:
    """Linear systems have no scale of their own: one that is given multiplies the weights."""
    return weights if row.scale is None else row.scale * weights


def linear(row: Row) -> Tensor:
    """arXiv 2006.16236, equation 5."""
    weights = times(row, elu_plus_one(row.keys) @ elu_plus_one(row.query))
    return weights / weights.sum()


def cosformer(row: Row) -> Tensor:
    """arXiv 2202.08791, equation 10, with M = 4096 and the authors' floor."""
    near = torch.cos(math.pi / 2 * row.distance.double() / 4096)
    weights = times(row, (torch.relu(row.keys) @ torch.relu(row.query)) * near)
    return weights / max(float(weights.sum()), 1e-6)


def cottention(row: Row) -> Tensor:
    """arXiv 2409.18747: cos / n^sigma(m)."""
    cosines = row.keys @ row.query / (row.keys.norm(dim=1) * row.query.norm())
    return times(row, cosines) / row.n ** torch.sigmoid(row.learned["m"])


def cottention_value(row: Row) -> Tensor:
    """The authors' causal code: v_j / n_j^sigma(m), n_j the keys that token j sees, or
    1 where it sees none."""
    cosines = row.keys @ row.query / (row.keys.norm(dim=1) * row.query.norm())
    return times(row, cosines) / row.counts.clamp_min(1) ** torch.sigmoid(row.learned["m"])


def transnormer(row: Row) -> Tensor:
    """arXiv 2307.14995: silu(q) . silu(k) exp(-rate |i - j|), the rate of the only layer that
    there is, with the slopes 2^(-8 (h + 1) / H)."""
    rate = 2 ** (-8 * (row.head + 1) / row.heads) * (1 + 1e-5)
    decay = torch.exp(-rate * row.distance.abs().double())
    return times(row, silu(row.keys) @ silu(row.query)) * decay


def transnormer_lrpe(row: Row) -> Tensor:
    """The same, each element turned by theta (i - j)."""
    rate = 2 ** (-8 * (row.head + 1) / row.heads) * (1 + 1e-5)
    decay = torch.exp(-rate * row.distance.abs().double())
    turned = torch.cos(row.learned["theta"] * row.distance[:, None])
    return times(row, (silu(row.keys) * silu(row.query) * turned).sum(1)) * decay


def inline(row: Row) -> Tensor:
    """arXiv 2412.06590, equation 4, with the factor s/N of the authors' code."""
    products = row.dot() / row.n
    return products - products.sum() / row.n + 1 / row.n


def normalised(row: Row) -> Tensor:
    """arXiv 2405.15731, equation 21, with the query for the input of the layer."""
    return times(row, row.keys @ row.query) / torch.exp(row.learned["w"] @ row.query)


def dense(weigh: Callable[[Row], Tensor], finish: Callable | None = None) -> Callable[..., Tensor]:
    """out_i = sum_j w_ij v_j with the weights of one row's equation; grouped heads by index."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor,
        *,
        distance: Tensor,
        bias: Tensor | None = None,
        scale: float | None = None,
        learned: dict[str, Tensor],
    ) -> Tensor:
        """visible and bias (B, H, Tq, Tk), distance (Tq, Tk), learned tensors (H, ...)."""
        batch, heads, queries, _ = query.shape
        group = heads // key.shape[1]
        bias = torch.zeros(visible.shape, dtype=query.dtype) if bias is None else bias
        out = query.new_zeros(batch, heads, queries, value.shape[-1])
        for b in range(batch):
            for h in range(heads):
                for i in range(queries):
                    sees = visible[b, h, i]
                    if not sees.any():
                        continue
                    row = Row(
                        query[b, h, i],
                        key[b, h // group, sees],
                        bias[b, h, i, sees],
                        distance[i, sees],
                        scale,
                        {name: parameter[h] for name, parameter in learned.items()},
                        h,
                        heads,
                        visible[b, h].sum(1)[sees],
                    )
                    out[b, h, i] = weigh(row) @ value[b, h // group, sees]
        return out if finish is None else finish(out, **learned)

    return attend


def rms_norm(out: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    """g * y / sqrt(mean(y^2) + eps), the mean over the concatenated heads of a token."""
    normed = torch.empty_like(out)
    batch, _, queries, _ = out.shape
    for b in range(batch):
        for i in range(queries):
            y = out[b, :, i].flatten()
            normed[b, :, i] = gain * out[b, :, i] / torch.sqrt((y * y).sum() / len(y) + eps)
    return normed


def srms_norm(out: Tensor, **_: Tensor) -> Tensor:
    return rms_norm(out, torch.ones(()))


def gated_rms_norm(out: Tensor, gain: Tensor, gate: Tensor) -> Tensor:
    """ReLA-g: the norm times sigma(w * y)."""
    return rms_norm(out, gain) / (1 + torch.exp(-gate[:, None] * out))


def soft(normalised: bool, landmarks: int = 49, ridge: float = 0.01) -> Callable[..., Tensor]:
    """arXiv 2110.11945 and 2207.03341 (normalised), inverted outright, the ridge added to A."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor,
        *,
        distance: Tensor,
        bias: Tensor | None = None,
        scale: float | None = None,
        learned: dict[str, Tensor],
    ) -> Tensor:
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale

        def kappa(x: Tensor, y: Tensor) -> Tensor:
            return torch.exp(-scale * ((x - y) ** 2).sum() / 2)

        def matrix(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
            return torch.stack([torch.stack([kappa(x, y) for y in ys]) for x in xs])

        batch, heads, queries, _ = query.shape
        group = heads // key.shape[1]
        out = query.new_zeros(batch, heads, queries, value.shape[-1])
        for b in range(batch):
            for h in range(heads):
                sees = visible[b, h, 0]
                keys, values = list(key[b, h // group, sees]), value[b, h // group, sees]
                m = min(landmarks, len(keys))
                segments: list[list[Tensor]] = [[] for _ in range(m)]
                for rank, k in enumerate(keys):
                    segments[rank * m // len(keys)].append(k)
                pooled = [sum(segment) / len(segment) for segment in segments]
                a = matrix(pooled, pooled)
                inverse = torch.linalg.inv(a + ridge * torch.eye(m, dtype=a.dtype))
                if normalised:
                    d = torch.diag(a.sum(1) ** -0.5)
                    inverse = d @ inverse @ d
                out[b, h] = (
                    matrix(list(query[b, h]), pooled) @ inverse @ matrix(pooled, keys) @ values
                )
        return out

    return attend


def side_by_side(first: Callable[..., Tensor], second: Callable[..., Tensor]):
    """arXiv 2410.12850: the first half of the KV groups, rounded up, and the others."""

    def attend(query, key, value, visible, *, bias=None, **options) -> Tensor:
        kv_heads = key.shape[1]
        group = query.shape[1] // kv_heads
        outs = []
        for g in range(kv_heads):
            mine = slice(g * group, (g + 1) * group)
            walk = first if g < math.ceil(kv_heads / 2) else second
            part = None if bias is None else bias[:, mine]
            outs.append(
                walk(
                    query[:, mine], key[:, g : g + 1], value[:, g : g + 1], visible[:, mine],
                    bias=part, **options,
                )
            )  # fmt: skip
        return torch.cat(outs, 1)

    return attend


NAIVE: dict[str, Callable[..., Tensor]] = {
    "softmax": dense(softmax),
    "log-n": dense(log_n),
    "cosine": dense(cosine),
    "scale-invariant": dense(scale_invariant),
    "softmax-one": dense(softmax_one),
    "sink": dense(sink),
    "clipped": dense(clipped),
    "clipped-normalised": dense(clipped_normalised),
    "lssa": dense(lssa),
    "lssar": dense(lssar),
    "lssar-log": dense(lssar_log),
    "sigmoid": dense(sigmoid),
    "rela": dense(relu, gated_rms_norm),
    "rela-rms": dense(relu, rms_norm),
    "relu-power": dense(relu_over_n),
    "linear": dense(linear),
    "cosformer": dense(cosformer),
    "cottention": dense(cottention),
    "cottention-value": dense(cottention_value),
    "transnormer": dense(transnormer, srms_norm),
    "transnormer-lrpe": dense(transnormer_lrpe, srms_norm),
    "inline": dense(inline),
    "normalised": dense(normalised),
    "sparsek": sparsek(16, 16),
    "recurformer": side_by_side(dense(softmax), dense(linear)),
    "soft": soft(normalised=False),
    "soft-norm": soft(normalised=True),
    "longvq": dense(vector_quantised),
    "singlepass": dense(one_pass),
    "singlepass-fixed": dense(fixed_one_pass),
}
"""Name of the entry -> (query, key, value, visible, *, distance, bias, scale, learned) -> out."""
