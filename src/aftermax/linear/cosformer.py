"""cosFormer: w_ij = relu(q_i) . relu(k_j) cos(pi/2 (i - j)/M), each row divided by its sum.

Qin et al., "cosFormer: Rethinking Softmax in Attention", arXiv 2202.08791. As cos(a - b) = cos a
cos b + sin a sin b, the weights separate into features of twice the width::

    phi(x)_i = [relu(x) sin(pi i / 2M), relu(x) cos(pi i / 2M)]
    out_i = sum_j w_ij v_j / max(sum_j w_ij, 1e-6)

M must be at least the number of tokens: further apart than M, weights turn negative. The authors'
code takes M = the length of the current call. Then a later token changes every earlier output (by 7
and 10 per cent on the tests' random data), and no state can be carried on; that is the formula's
variant `horizon="length"`. Here M is fixed by default, so that decoding never changes the past.

A query that relu leaves nothing of sees nothing: its sum is 0, and so is its row (as in the
authors' code). The length of a query is lost in the division: the weights do not tell a q and 2 q
apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aftermax.entry import Entry, Laws
from aftermax.linear.elu import EXCEPTIONS
from aftermax.linear.separable import LinearState, Places, Separable, Separated, divided

FLOOR = 1e-6
"""The least that a row's sum is divided by; the authors'."""


def cos_features(x: Tensor, position: Tensor, horizon: float) -> Tensor:
    """relu(x) turned by its position: (..., T, D) -> (..., T, 2 D).

    >>> cos_features(torch.ones(2, 1), torch.tensor([0.0, 2.0]), 4.0)
    tensor([[0.0000, 1.0000],
            [0.7071, 0.7071]])
    """
    angle = (position * (math.pi / 2 / horizon))[:, None]
    x = x.relu()
    return torch.cat([x * angle.sin().to(x.dtype), x * angle.cos().to(x.dtype)], -1)


@dataclass(frozen=True)
class CosFormer(Separable):
    """relu features, re-weighted by the cosine of the distance.

    Args:
        horizon: M, the largest number of tokens that there may be; 4096 by default (ours: the paper
            has M >= n, its code M = n). "length" takes the tokens of each call, as the authors do:
            a sequence cannot then be decoded piece by piece.

    >>> from aftermax import Visible
    >>> x = torch.ones(1, 1, 3, 2)
    >>> CosFormer(horizon=8).attend(x, x, x, Visible(causal=True))[0, 0, 2]
    tensor([1., 1.])
    """

    totals: ClassVar[bool] = True
    horizon: int | Literal["length"] = 4096

    def __post_init__(self):
        whole = isinstance(self.horizon, int) and self.horizon >= 1
        if self.horizon != "length" and not whole:
            raise ValueError(f"cosFormer needs horizon >= 1 or 'length', got {self.horizon!r}")

    def placed(self, layer: int, layers: int, longest: int) -> CosFormer:
        """The same in a model whose longest input is known, which is the paper's M."""
        return replace(self, horizon=longest)

    def state_shape(self, key_dim: int, value_dim: int) -> tuple[int, int]:
        return 2 * key_dim, value_dim + 1

    def separate(self, query, key, value, places: Places, scale, **learned: Tensor) -> Separated:
        tokens = places.tokens
        horizon = tokens if self.horizon == "length" else self.horizon
        if tokens > horizon:
            raise ValueError(
                f"cosFormer with horizon {horizon} was given {tokens} tokens: weights further apart"
                " than the horizon are negative"
            )
        query = cos_features(query, places.query, horizon)
        key = cos_features(key, places.key, horizon)
        return Separated(query if scale is None else scale * query, key, value)

    def finish(self, out, total, **learned: Tensor) -> Tensor:
        return divided(out, total, FLOOR)

    @property
    def can_merge(self) -> bool:
        return self.horizon != "length"

    def step(self, query, key, value, state: LinearState, visible, seen=None, **options):
        if self.horizon == "length":
            raise ValueError("cosFormer needs a fixed horizon to go on from a state, got 'length'")
        return super().step(query, key, value, state, visible, seen, **options)


ENTRY = Entry(
    name="cosformer",
    title="cosFormer",
    system=CosFormer(),
    formula="relu(q)·relu(k) cos(π(i − j)/2M) / Σ",
    paper="Qin et al. 2022",
    arxiv="2202.08791",
    score="relu(q)·relu(k)",
    positivity="relu",
    normaliser="row sum",
    reweight="cos of distance",
    walk="linear",
    laws=Laws(rows_at_most_one=True),
    exceptions=EXCEPTIONS | {"key_order": "its weights depend on the distance of the tokens"},
    claim="Equal to softmax or better (WikiText-103); "
    "others report worse (27.06 against 24.78, 2405.17381).",
    positions="none",
)
