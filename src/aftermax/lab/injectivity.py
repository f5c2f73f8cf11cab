"""Does a system tell its queries apart? Four tests of injectivity, and how often it confuses two.

Take the keys K, N of them in d dimensions, as given, and the row of weights as a function of the
query, A_K: R^d -> R^N. Where A_K(p) = A_K(q) for different p and q, no value whatever lets the
layer answer them differently: "semantic confusion" (Han et al., arXiv 2412.06590, InLine). There:

    softmax is injective if      N >= d + 1, rank K = d and 1 is not in the span of K's columns
    InLine is injective if       the same holds of phi(K), and phi is injective
    a row divided by its sum     knows phi(q) up to its length only: never injective

In one line each: two queries of one softmax row have K(p - q) constant over the keys, two of one
InLine row phi(K)(phi(p) - phi(q)); with [K, 1] of rank d + 1 that constant must be 0, and so must
the difference. `hypotheses` looks at the keys. InLine's default feature map, the identity, is
injective; relu is not, so that InLine with relu is not either. By the same argument (ours, not the
paper's) nothing that takes the cosine of its queries is: cosine softmax, LSSAR, Cottention; nor is
cosFormer, nor TransNormer, whose norm of the output removes the length of the row.

The tests, from the simplest to the strongest:

    collinear   rows of a q, for some a                          what forgets lengths fails
    colliding   rows of p and q, phi(q) = 2 phi(p)               the paper's figure 1
    inverse     the query, computed from its row                 a proof, for this q
    Jacobian    rank of dA/dq, which must be d                   for any smooth phi

The first two need a guess at what a system might confuse, the Jacobian does not; but it is local:
full rank says that there is no confusion near by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aftermax.attention import attention_weights
from aftermax.catalogue import find
from aftermax.dense import System
from aftermax.linear.elu import elu_plus_one
from aftermax.linear.inline import InLine
from aftermax.scores import inv_sqrt_dim
from aftermax.visible import Visible
from aftermax.weights import RowMap

BLOCK = 32
"""Queries that are looked at together."""


def rows(system: RowMap | System, queries: Tensor, keys: Tensor, **learned: Tensor) -> Tensor:
    """A_K(q) for each query: (M, d) and (N, d) -> (M, N).

    A query stands at the place of the last key and sees all of them: the next token of a decoder.
    Gradients are those of the queries alone. Systems that are no row map show their weights on
    one-hot values; what they do to the output besides (TransNormer's norm) is then in the row,
    which it is not for row maps (`attention_weights`).

    Args:
        **learned: what the system learns, for one head; initial values for what is left out.

    Raises:
        ValueError: for shapes that do not fit, and from systems that have no causal form.

    >>> import math
    >>> from aftermax import InLine, Softmax
    >>> queries, keys = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [math.log(3)]])
    >>> rows(Softmax(), queries, keys)
    tensor([[0.2500, 0.7500],
            [0.1000, 0.9000]])
    >>> rows(InLine(), queries, torch.tensor([[0.0], [1.0]]))
    tensor([[0.2500, 0.7500],
            [0.0000, 1.0000]])
    """
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            "queries and keys must be (M, d) and (N, d), got "
            f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    keys = keys.detach()
    return torch.cat([_rows(system, part, keys, learned) for part in queries.split(BLOCK)])


def _rows(system, queries: Tensor, keys: Tensor, learned: dict[str, Any]) -> Tensor:
    number, places = len(queries), len(keys)
    key = keys.expand(number, 1, -1, -1)
    if isinstance(system, RowMap):
        visible = Visible(causal=True, offset=places - 1)
        query = queries[:, None, None]
        weights = attention_weights(query, key, weights=system, attn_mask=visible, **learned)
        return weights[:, 0, 0]
    value = torch.eye(places, dtype=keys.dtype).expand(number, 1, -1, -1)
    query, visible = queries[:, None, None], Visible(causal=True)
    state = system.init_state(number, 1, keys.shape[1], places, dtype=keys.dtype)
    last = places - 1
    with torch.no_grad():  # the keys before it do not depend on the query
        before = key[:, :, :last].detach(), value[:, :, :last]
        _, state = system.step(before[0], *before, state, visible, **learned)
    here = key[:, :, last:], value[:, :, last:]
    return system.step(query, *here, state, visible, **learned)[0][:, 0, 0]


# ---- the hypotheses ----------------------------------------------------------------------------


class Hypotheses(NamedTuple):
    """What the propositions ask of the keys (of their features, where there is a feature map)."""

    keys: int
    width: int
    rank: int
    """of K: d where queries can be told apart by their scores."""
    rank_with_ones: int
    """of [K, 1]: d + 1 where 1 is not in the span besides."""

    @property
    def hold(self) -> bool:
        return self.rank == self.width and self.rank_with_ones == self.width + 1


def hypotheses(keys: Tensor) -> Hypotheses:
    """The ranks that decide. d keys are too few, however they lie: [K, 1] has d + 1 columns.

    >>> hypotheses(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).hold
    True
    >>> hypotheses(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]]))  # all on a line
    Hypotheses(keys=3, width=2, rank=2, rank_with_ones=2)
    """
    number, width = keys.shape
    rank = int(torch.linalg.matrix_rank(keys))
    return Hypotheses(number, width, rank, int(torch.linalg.matrix_rank(_with_ones(keys))))


# ---- the four tests ----------------------------------------------------------------------------


def collinear(
    system: RowMap | System,
    query: Tensor,
    keys: Tensor,
    factors: Sequence[float] = (0.5, 2.0, 4.0),
    **learned: Tensor,
) -> Tensor:
    """1. ||A_K(a q) - A_K(q)|| for each factor a > 0: (d,), (N, d) -> (factors,).

    0 where a system forgets the length of its queries.

    >>> from aftermax import CosineSoftmax, Softmax
    >>> query, keys = torch.tensor([3.0, 4.0]), torch.eye(2)
    >>> collinear(Softmax(), query, keys).count_nonzero()
    tensor(3)
    >>> collinear(CosineSoftmax(), query, keys)
    tensor([0., 0., 0.])
    """
    along = torch.stack([query, *(a * query for a in factors)])
    first, *others = rows(system, along, keys, **learned)
    return torch.stack([(other - first).norm() for other in others])


def colliding(
    system: RowMap | System,
    query: Tensor,
    keys: Tensor,
    matrix: Tensor,
    bias: Tensor,
    factor: float = 2.0,
) -> tuple[Tensor, float]:
    """2. The paper's figure 1: with phi(x) = relu(A x + b) before the system, p and q collide.

    q solves A q = factor (A p + b) - b, so that phi(q) = factor phi(p), though p and q are not
    collinear.

    Args:
        query: p, (d,). matrix: A, (d, d), not singular. bias: b, (d,).

    Returns:
        q, and ||A_phi(K)(phi(q)) - A_phi(K)(phi(p))||.
    """

    def features(x: Tensor) -> Tensor:
        return (x @ matrix.mT + bias).relu()

    other = torch.linalg.solve(matrix, factor * (matrix @ query + bias) - bias)
    first, second = rows(system, features(torch.stack([query, other])), features(keys))
    return other, float((first - second).norm())


def query_of_softmax(row: Tensor, keys: Tensor, scale: float | None = None) -> Tensor:
    """3. The query that softmax gave this row: q, of [sK, 1] (q, c) = log row.

    Raises:
        ValueError: where other queries have the same row (`hypotheses`).

    >>> keys, query = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0.7])
    >>> query_of_softmax((keys @ query).softmax(0), keys)
    tensor([0.7000])
    """
    _need(keys)
    scale = inv_sqrt_dim(keys.shape[1]) if scale is None else scale
    return (torch.linalg.pinv(_with_ones(scale * keys)) @ row.log())[:-1]


def query_of_inline(row: Tensor, keys: Tensor, scale: float | None = None) -> Tensor:
    """3. The query that InLine gave this row: least squares of (s/N) (K - mean K) q = row - 1/N.

    With a feature map, give the features of the keys: those of the query come back.

    Raises:
        ValueError: where other queries have the same row (`hypotheses`).
    """
    _need(keys)
    number, width = keys.shape
    scale = inv_sqrt_dim(width) if scale is None else scale
    target = (row - 1 / number) * (number / scale)
    return torch.linalg.lstsq(keys - keys.mean(0), target[:, None]).solution[:, 0]


def jacobian(system: RowMap | System, query: Tensor, keys: Tensor, **learned: Tensor) -> Tensor:
    """4. The singular values of dA_K/dq, largest first: (d,), (N, d) -> (min(d, N),).

    A direction of singular value 0 is one in which the query may move and the row does not.

    >>> from aftermax import Linear
    >>> values = jacobian(Linear(), torch.ones(2).double(), torch.eye(2).double())
    >>> bool(values[1] < 1e-15 * values[0])
    True
    """

    def row(query: Tensor) -> Tensor:
        return rows(system, query[None], keys, **learned)[0]

    derivative = torch.autograd.functional.jacobian(row, query)
    return torch.linalg.svdvals(derivative)  # type: ignore[arg-type]


def rank(singular_values: Tensor, tolerance: float | None = None) -> int:
    """How many are more than rounding, at a tolerance that is relative to the largest.

    None = 1000 eps: an exact 0 is found as some eps, and what is above is a matter of conditions.
    """
    if tolerance is None:
        tolerance = 1000 * torch.finfo(singular_values.dtype).eps
    return int((singular_values > tolerance * singular_values.max()).sum())


# ---- confusion ---------------------------------------------------------------------------------


def confusion(
    system: RowMap | System,
    queries: Tensor,
    keys: Tensor,
    tau_q: float = 0.5,
    tau_a: float = 1e-3,
    **learned: Tensor,
) -> float:
    """Of the pairs of queries that differ clearly, the share that gets the same row all the same.

        differ clearly    ||p - q|| > tau_q * (mean length of the queries)
        the same row      sum_j |A_K(p)_j - A_K(q)_j| / 2 < tau_a     (total variation)

    The paper counts such pairs over the images of ImageNet and does not print its thresholds: these
    are ours. What is not found among some queries may be there among others: linear attention with
    elu + 1 confuses no two of a random draw, and yet is not injective (`jacobian`).

    Returns:
        A share, NaN where no two queries differ clearly.

    >>> from aftermax import CosineSoftmax, Softmax
    >>> queries, keys = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.eye(2)
    >>> confusion(Softmax(), queries, keys)
    0.0
    >>> round(confusion(CosineSoftmax(), queries, keys), 2)  # one pair of three
    0.33
    """
    weights = rows(system, queries, keys, **learned)
    clear = torch.pdist(queries) > tau_q * queries.norm(dim=1).mean()
    same = torch.pdist(weights, p=1) / 2 < tau_a
    return float((clear & same).sum() / clear.sum())


def of_one_direction(query: Tensor, factors: Tensor) -> Tensor:
    """a q: what a system confuses that compares directions, or divides features of degree one."""
    return factors[:, None] * query


def of_one_positive_part(query: Tensor, factors: Tensor) -> Tensor:
    """relu(q) - a relu(-q): the negative elements alone differ, which relu features do not see."""
    return query.relu() - factors[:, None] * (-query).relu()


def of_one_elu_ray(query: Tensor, factors: Tensor) -> Tensor:
    """phi^-1(a phi(q)), phi = elu + 1: what linear attention confuses."""
    features = factors[:, None] * elu_plus_one(query)
    return torch.where(features > 1, features - 1, features.log())


FAMILIES = {
    "one direction": of_one_direction,
    "one positive part": of_one_positive_part,
    "one ray of elu + 1": of_one_elu_ray,
}
"""Queries that some system confuses: what they have in common -> how they are made."""

# ---- measured ----------------------------------------------------------------------------------


class Subject(NamedTuple):
    name: str
    """In the catalogue; its colour."""
    title: str
    system: RowMap | System
    family: str = "one direction"
    """Of `FAMILIES`: the queries whose rows are drawn, those that the system is likely to confuse.
    """


class Measured(NamedTuple):
    """What the figure shows of one system."""

    subject: Subject
    factors: tuple[float, ...]
    rows: Tensor
    """(factors, shown keys): of the subject's family, the keys in the order of their scores."""
    ratio: float
    """s_min / s_max of the Jacobian, the median over the queries; 0 where a direction is lost."""
    rank: int
    """of the Jacobian, the least of all queries."""
    confusion: dict[str, float]
    """For each of `FAMILIES` the share of confused pairs within it, mean over the queries."""


def subjects() -> tuple[Subject, ...]:
    """One for each way to keep or to lose a query: rows of a kind behave alike."""
    own = {"linear": "one ray of elu + 1"}
    names = ("softmax", "sigmoid", "inline", "lssar", "linear", "cosformer", "cottention")
    listed = [
        Subject(name, find(name).title, find(name).system, own.get(name, "one direction"))
        for name in (*names, "transnormer")
    ]
    relu = Subject("inline", "InLine with relu", InLine("relu"), "one positive part")
    return (*listed[:3], relu, *listed[3:])


def measure(subject: Subject, width: int = 32, keys: int = 197, queries: int = 8) -> Measured:
    """All that the figure shows, on Gaussian queries and keys in float64, seed 0.

    The sizes are those of the paper's models: a head of 32, the 14 x 14 tokens and one more of an
    image.
    """
    random = torch.Generator().manual_seed(0)
    key, query = (
        torch.randn(count, width, generator=random, dtype=torch.float64)
        for count in (keys, queries)
    )
    factors = (0.5, 1.0, 2.0, 4.0)
    some = (key @ query[0]).argsort(descending=True)[:: max(1, keys // 16)]
    line = FAMILIES[subject.family](query[0], torch.tensor(factors, dtype=torch.float64))
    along = rows(subject.system, line, key)
    found = [jacobian(subject.system, q, key) for q in query]
    lengths = torch.linspace(0.25, 2.5, 10, dtype=torch.float64)
    shares = {
        name: sum(confusion(subject.system, family(q, lengths), key) for q in query) / queries
        for name, family in FAMILIES.items()
    }
    ratios = torch.stack([values[-1] / values[0] for values in found])
    least = min(rank(values) for values in found)
    return Measured(subject, factors, along[:, some], float(ratios.median()), least, shares)


def _with_ones(keys: Tensor) -> Tensor:
    return torch.cat([keys, keys.new_ones(len(keys), 1)], 1)


def _need(keys: Tensor) -> None:
    found = hypotheses(keys)
    if not found.hold:
        raise ValueError(
            f"a row of these keys is that of many queries: [K, 1] needs rank d + 1 = "
            f"{found.width + 1}, and K {found.width}; they have {found.rank_with_ones} and "
            f"{found.rank} (keys {tuple(keys.shape)})"
        )
