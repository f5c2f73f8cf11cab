"""Softmax regression in context: tasks, one gradient step, and a layer that could learn to take it.

Li et al., "The Closeness of In-Context Learning and Weight Shifting for Softmax Regression", arXiv
2304.13276, after von Oswald et al., "Transformers learn in-context by gradient descent", arXiv
2212.07677. A task is a softmax regression of its own, without noise::

    A, A'  (n, d), standard normal;  x (d,) ~ N(0, I / d);  b = softmax(A x),  b' = softmax(A' x)

Given A, b and A', what is b'? An answer is made of n logits l, and costs n/2 |softmax(l) - b'|^2.

**Gradient descent** on L(x) = |softmax(A x) - b|^2 / 2 from x = 0. Its first step of size eta is
x_1 = s A^T (n b - 1) with s = eta / n^2, so that l = A' x_1 is linear in b; `rate` is s, here and
below.

**The layer** reads the tokens [a_i; n b_i - 1], i = 1 .. n, and one token [a'; 0]: self-attention
over n + 1 tokens, one layer, one head of width d + 1, no positions, no biases, no norm. What it
writes into the last channel of the last token is the logit of a'. The n queries of a task are n
such sequences, told apart by a mask: a query sees the n tokens of the data and itself, not the
others. Computed are the rows of the queries alone: the rows of the data are read by nobody.

With keys a_i, values n b_i - 1 and scores times beta, softmax attention is one gradient step but
for O(beta): near 0 softmax is linear. Linear self-attention, `Products`, is one exactly. Beta may
have either sign, with values of the other: the first order is the same, the rest is not
(`Layer.temperature`, `Layer.set_to_step`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax.catalogue import find
from aftermax.linear.separable import Places, Separable, Separated
from aftermax.linear.walk import both_ways
from aftermax.modules import Attention
from aftermax.regression import softmax_gradient
from aftermax.visible import Visible

FIRST_RATE = 0.02
"""Where a step size that is learned starts, in units of n^2: near the best at n = 25, d = 20."""


class Tasks(NamedTuple):
    """Regressions, (B, n, d) and (B, n) each."""

    data: Tensor
    """A."""
    target: Tensor
    """b."""
    queries: Tensor
    """A'."""
    answers: Tensor
    """b'."""


def draw(
    count: int,
    rows: int,
    width: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tasks:
    """Tasks; what is drawn is the same in every dtype.

    >>> made = draw(2, 5, 3, torch.Generator().manual_seed(0))
    >>> made.data.shape, made.answers.shape
    (torch.Size([2, 5, 3]), torch.Size([2, 5]))
    """
    both = torch.randn(count, 2 * rows, width, generator=generator).to(dtype)
    weights = torch.randn(count, width, 1, generator=generator).to(dtype) / width**0.5
    data, queries = both[:, :rows], both[:, rows:]
    target, answers = ((x @ weights)[..., 0].softmax(-1) for x in (data, queries))
    return Tasks(data, target, queries, answers)


def loss_of(logits: Tensor, answers: Tensor) -> Tensor:
    """n/2 |softmax(l) - b'|^2, a mean over tasks: the factor n makes it a number that does not
    vanish as n grows."""
    gap = logits.softmax(-1) - answers
    return logits.shape[-1] / 2 * gap.square().sum(-1).mean()


# ---- gradient descent ----------------------------------------------------------------------------


def descend(data: Tensor, target: Tensor, rates: Sequence[float]) -> Tensor:
    """x (B, d) after gradient steps from 0, of sizes n^2 times the rates.

    >>> made = draw(1, 5, 3, torch.Generator().manual_seed(0))
    >>> by_hand = 0.1 * made.data.mT @ (5 * made.target - 1)[..., None]
    >>> torch.allclose(descend(made.data, made.target, [0.1]), by_hand[..., 0])
    True
    """
    x = torch.zeros_like(data[:, 0])
    for rate in rates:
        x = x - rate * data.shape[1] ** 2 * softmax_gradient(data, target, x)
    return x


def logits_of(weights: Tensor, queries: Tensor) -> Tensor:
    """A' x: (B, d), (B, n, d) -> (B, n)."""
    return (queries @ weights[..., None])[..., 0]


def best_rates(tasks: Tasks, steps: int) -> list[float]:
    """Of gradient steps, chosen one after the other: that at which so many steps cost the least on
    these tasks, given those before it."""
    x, rates = torch.zeros_like(tasks.data[:, 0]), []
    for _ in range(steps):
        way = -softmax_gradient(tasks.data, tasks.target, x) * tasks.data.shape[1] ** 2
        before, along = logits_of(x, tasks.queries), logits_of(way, tasks.queries)
        rates.append(best_factor(before, along, tasks.answers))
        x = x + rates[-1] * way
    return rates


def best_factor(before: Tensor, along: Tensor, answers: Tensor) -> float:
    """r at which the logits `before + r along` cost the least: the best of e^-13 to e^-1 by factors
    of 1.5, then golden sections around it down to 0.1%."""

    def cost(log_factor: float) -> float:
        found = loss_of(before + math.exp(log_factor) * along, answers)
        return float(found) if found.isfinite() else math.inf

    apart = math.log(1.5)
    middle = min((-13 + apart * i for i in range(31)), key=cost)
    low, high = middle - apart, middle + apart
    golden = (5**0.5 - 1) / 2
    while high - low > 1e-3:
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if cost(left) < cost(right) else (left, high)
    return math.exp((low + high) / 2)


class GradientStep(nn.Module):
    """One step whose size is learned: `forward` gives the logits of tasks, (B, n)."""

    def __init__(self, rate: float = FIRST_RATE):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def forward(self, tasks: Tasks) -> Tensor:
        signal = len(tasks.target[0]) * tasks.target - 1
        weights = self.rate * (tasks.data.mT @ signal[..., None])
        return logits_of(weights[..., 0], tasks.queries)


# ---- the layer -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Products(Separable):
    """Linear self-attention, out_i = sum_j (q_i . k_j) v_j / N_i: no feature map, no scale, no sum
    that would divide it; the count is a constant here."""

    def separate(
        self, query: Tensor, key: Tensor, value: Tensor, places: Places, scale, **learned: Tensor
    ) -> Separated:
        return Separated(query / places.count.clamp_min(1)[..., None], key, value)


class Layer(Attention):
    """Self-attention of one head over [data; query]; `forward` gives the logits of tasks, (B, n).

    Args:
        width: d, of the data; the tokens have one channel more.
        options: of `aftermax.Attention`: `weights`, `qk_norm`, `impl`.
    """

    def __init__(self, width: int, **options):
        super().__init__(width + 1, 1, positions="none", causal=False, **options)

    def forward(self, tasks: Tasks) -> Tensor:  # type: ignore[override]
        rows = tasks.data.shape[1]
        signal = (rows * tasks.target - 1)[..., None]
        tokens = torch.cat([torch.cat([tasks.data, signal], -1), F.pad(tasks.queries, (0, 1))], 1)
        query, key, value = self.project(tokens, start=0)
        return self._join(self.read(query[:, :, rows:], key, value))[..., -1]

    def read(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, 1, m, D) queries over n + m keys, the last m of which are their own."""
        queries = query.shape[2]
        of_data = torch.ones(queries, key.shape[2] - queries, dtype=torch.bool)
        mask = torch.cat([of_data, torch.eye(queries, dtype=torch.bool)], 1)
        return self.system.attend(query, key, value, Visible(mask=mask), **self._options())

    def temperature(self) -> float:
        """Factor of a_i . a' in the scores that 1 / sqrt(d + 1) scales: the mean over channels of
        the diagonal of W_Q^T W_K, with the gains of a QK norm. Its sign tells two ways apart in
        which a layer can do the same: values of one sign, or of the other."""
        product = self.to_query.weight * self.to_key.weight
        for norm in (self.query_norm, self.key_norm):
            if not isinstance(norm, nn.Identity):
                product = product * norm.weight[:, None]
        return float(product.detach().sum(0)[:-1].mean()) / self.head_dim**0.5

    def set_to_step(self, temperature: float, rate: float, rows: int) -> Layer:
        """The weights of one gradient step of size rate n^2: keys a_i, queries a' times the
        temperature, values n b_i - 1. It is the step as far as n + 1 weights are
        (1 + temperature scores) / (n + 1). Returns itself."""
        of_data = torch.eye(self.head_dim).to(self.to_key.weight)
        of_data[-1, -1] = 0
        of_signal = torch.eye(self.head_dim).to(of_data) - of_data
        with torch.no_grad():
            self.to_query.weight.copy_(temperature * self.head_dim**0.5 * of_data)
            self.to_key.weight.copy_(of_data)
            self.to_value.weight.copy_(of_signal)
            self.to_out.weight.copy_(rate * (rows + 1) / temperature * of_signal)
        return self


class LinearLayer(Layer):
    """`Layer` with `Products`, in O(n): what all queries see is summed once."""

    def __init__(self, width: int, **options):
        super().__init__(width, weights=Products(), **options)

    def read(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = key.shape[2] - query.shape[2]
        of_data = both_ways(query, key[:, :, :rows], value[:, :, :rows]).out
        own = (query * key[:, :, rows:]).sum(-1, keepdim=True) * value[:, :, rows:]
        return (of_data + own) / (rows + 1)


# ---- the arms ------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """What is trained."""

    title: str
    entry: str = ""
    """Of the catalogue; "" where it is none."""
    qk_norm: bool = False


def _of(*names: str) -> dict[str, Arm]:
    return {name: Arm(find(name).title, name) for name in names}


ARMS: dict[str, Arm] = {
    "gd": Arm("one gradient step, learned size"),
    "products": Arm("linear self-attention"),
    **_of("softmax", "log-n", "cosine", "lssa", "lssar", "sigmoid", "relu-power", "rela"),
    **_of("linear", "inline", "normalised"),
    "softmax/qk-norm": Arm("softmax, QK norm", "softmax", qk_norm=True),
    "log-n/qk-norm": Arm("log-n softmax, QK norm", "log-n", qk_norm=True),
}
"""Systems of the catalogue that need no positions and no order, one of each kind."""


def model_of(arm: str, width: int, start: float = 1.0) -> nn.Module:
    """A new model of the present random state: all layers begin with the same projections, those of
    `nn.Linear` times `start`."""
    made = ARMS[arm]
    if arm == "gd":
        return GradientStep()
    if arm == "products":
        layer = LinearLayer(width)
    else:
        layer = Layer(width, weights=find(made.entry).system, qk_norm=made.qk_norm)
    with torch.no_grad():
        for projection in (layer.to_query, layer.to_key, layer.to_value, layer.to_out):
            projection.weight.mul_(start)
    return layer


# ---- what is measured ----------------------------------------------------------------------------


class Answer(NamedTuple):
    """Of an in-context learner, on tasks."""

    logits: Tensor
    """(B, n)."""
    sensitivities: Tensor
    """(B, n, d): the derivative of the logit of a query by that query."""


class Measures(NamedTuple):
    """How well a learner answers, and how near it is to one gradient step."""

    loss: float
    prediction: float
    """sqrt(sum |p - p*|^2 / sum |p* - 1/n|^2) over tasks, p = softmax(l); of uniform answers 1."""
    model: float
    """sqrt(sum |s - s*|^2 / sum |s*|^2) over queries and tasks, s the sensitivities."""
    cosine: float
    """Mean of cos(s, s*) over queries and tasks."""


def answer(model: Callable[[Tasks], Tensor], tasks: Tasks) -> Answer:
    """With the sensitivities, by autograd: a logit depends on its own query alone, so that one
    backward pass has all of them."""
    queries = tasks.queries.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(tasks._replace(queries=queries))
        (sensitivities,) = torch.autograd.grad(logits.sum(), queries)
    return Answer(logits.detach(), sensitivities)


def answer_of(weights: Tensor, tasks: Tasks) -> Answer:
    """Of linear logits A' x, x (B, d): their sensitivities are x itself."""
    return Answer(logits_of(weights, tasks.queries), weights[:, None].expand_as(tasks.queries))


def measure(given: Answer, reference: Answer, answers: Tensor) -> Measures:
    """Against the reference, which is one gradient step. Where a sensitivity is 0 its cosine is."""
    p, expected = given.logits.softmax(-1), reference.logits.softmax(-1)
    s, of_step = given.sensitivities, reference.sensitivities
    uniform = 1 / answers.shape[-1]
    return Measures(
        float(loss_of(given.logits, answers)),
        float((p - expected).norm() / (expected - uniform).norm()),
        float((s - of_step).norm() / of_step.norm()),
        float(F.cosine_similarity(s, of_step, -1).mean()),
    )
