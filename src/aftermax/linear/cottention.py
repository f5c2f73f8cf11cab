"""Cottention: cosines as weights, and a learned power of the count of keys in place of a sum.

Mongaras et al., "Cottention: Linear Transformers With Cosine Attention", arXiv 2409.18747::

    out_i = sum_j cos(q_i, k_j) v_j / N_i^sigmoid(m),    m one number for each head, initially 0.5

N_i counts the keys that row i sees. That divisor is the row's ("row"), as the paper writes it for
the bidirectional model. The authors' causal code divides the value instead, v_j / N_j^sigmoid(m),
by the count at its own place ("value", `scale_side`): the released GPT was trained so. Their
comment calls the two the same; they are not. With "value" the first token weighs a thousand times
1000^-0.62, or 1, wherever the query stands, and the thousandth 0.014.

Weights may be negative and have no sum. Only directions are compared, of queries as of keys, so
that the weights do not tell a q and 2 q apart. A vector of zeros has no direction: its weights are
0 (the authors' norm has a floor of 1e-12).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aftermax.entry import Entry, Laws
from aftermax.linear.elu import EXCEPTIONS
from aftermax.linear.separable import Places, Separable, Separated
from aftermax.linear.walk import repeated
from aftermax.scores import cosine


@dataclass(frozen=True)
class Cottention(Separable):
    """Cosines, scaled by the count of keys.

    Args:
        scale_side: "row" (the paper's formula, the default) or "value" (the authors' causal code);
            see the head of this file.

    >>> from aftermax import Visible
    >>> x = torch.tensor([[3.0, 4.0]]).expand(1, 1, 4, 2)
    >>> Cottention().attend(x, x, x, Visible(causal=True), m=torch.full((1,), 100.0))[0, 0, 3]
    tensor([3., 4.])
    """

    scale_side: Literal["row", "value"] = "row"

    def __post_init__(self):
        if self.scale_side not in ("row", "value"):
            raise ValueError(f"scale_side must be 'row' or 'value', got {self.scale_side!r}")

    def learned(self, heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        return {"m": torch.full((heads,), 0.5)}

    @property
    def count_enters_sums(self) -> bool:
        return self.scale_side == "value"

    def separate(self, query, key, value, places: Places, scale, **learned: Tensor) -> Separated:
        query, key = cosine(query), cosine(key)
        if scale is not None:
            query = scale * query
        power = torch.sigmoid(learned["m"].to(query.dtype))[:, None]
        if self.scale_side == "row":
            divisor = places.count.clamp_min(1) ** power
            return Separated(query / divisor[..., None], key, value, divisor=divisor)
        if places.of_keys is None:
            raise ValueError(
                "cottention with scale_side='value' divides a value by what its own token sees: a"
                " causal call, or a mask that differs by query, needs the queries of all keys from"
                f" offset 0 on; got {query.shape[2]} queries and {key.shape[2]} keys"
            )
        heads, kv_heads = query.shape[1], key.shape[1]
        # the power is that of the query's head
        key, value = (repeated(x, heads // kv_heads) for x in (key, value))
        return Separated(query, key, value / (places.of_keys.clamp_min(1) ** power)[..., None])


def _entry(
    name: str, title: str, scale_side: Literal["row", "value"], formula: str, **exceptions: str
) -> Entry:
    return Entry(
        name=name,
        title=title,
        system=Cottention(scale_side),
        formula=formula,
        paper="Mongaras et al. 2024",
        arxiv="2409.18747",
        score="cosine",
        positivity="none",
        normaliser=f"N^σ(m) of the {scale_side}",
        walk="linear",
        laws=Laws(non_negative=False, scale_free=True, length_aware=True),
        exceptions=EXCEPTIONS | exceptions,
        claim="Behind softmax by its own figures (11.6 against 10.3), in constant memory.",
    )


ROW = _entry("cottention", "Cottention", "row", "cos(q, k) / N_i^σ(m)")
VALUE = _entry(
    "cottention-value",
    "Cottention (value side)",
    "value",
    "cos(q, k) / N_j^σ(m)",
    key_order="a value is divided by what its own token sees, so that a mask has its order",
)
