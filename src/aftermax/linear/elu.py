"""Linear attention: w_ij = phi(q_i) . phi(k_j) / sum_j phi(q_i) . phi(k_j), phi = elu + 1.

Katharopoulos et al., "Transformers are RNNs", arXiv 2006.16236: the baseline of the family.
Dividing by the sum forgets the length of phi(q), so that the weights do not tell all queries apart
(InLine's Proposition 2, arXiv 2412.06590).

The authors add 1e-6 to the sum; here a row is divided by its own sum, and adds up to 1, as long as
one of its keys has a feature that float32 holds (an element above -100).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aftermax.entry import Entry, Laws
from aftermax.linear.separable import Places, Separable, Separated, divided


def elu_plus_one(x: Tensor) -> Tensor:
    """x + 1 above 0, else e^x: positive, to the last digit, where elu(x) + 1 rounds to 0.

    >>> import torch
    >>> elu_plus_one(torch.tensor([-40.0, 0.0, 1.0]))
    tensor([4.2484e-18, 1.0000e+00, 2.0000e+00])
    """
    return x.clamp_max(0).exp() + x.relu()


@dataclass(frozen=True)
class Linear(Separable):
    """Positive features, and each row divided by its sum.

    >>> import torch
    >>> from aftermax import Visible
    >>> x = torch.ones(1, 1, 3, 2)
    >>> Linear().attend(x, x, x, Visible(causal=True))[0, 0, 2]
    tensor([1., 1.])
    """

    totals: ClassVar[bool] = True

    def separate(self, query, key, value, places: Places, scale, **learned: Tensor) -> Separated:
        # the length of phi(q) is lost in the division: lifted first, it does not underflow
        lift = query.detach().amax(-1, keepdim=True).clamp_max(0)
        query = (query.clamp_max(0) - lift).exp() + query.relu()
        return Separated(query if scale is None else scale * query, elu_plus_one(key), value)

    def finish(self, out, total, **learned: Tensor) -> Tensor:
        return divided(out, total)


EXCEPTIONS = {
    "biases": "its weights are products of features: there is no score to add to",
    "mask_gradients": "its weights are products of features: there is no score to add to",
    "length_aware": "hiding keys by a large negative term needs a score to add it to",
}
"""What no linear system can do."""

ENTRY = Entry(
    name="linear",
    title="linear (elu + 1)",
    system=Linear(),
    formula="φ(q)·φ(k) / Σ, φ = elu + 1",
    paper="Katharopoulos et al. 2020",
    arxiv="2006.16236",
    score="φ(q)·φ(k)",
    positivity="elu + 1",
    normaliser="row sum",
    walk="linear",
    laws=Laws(rows_sum_to_one=True, rows_at_most_one=True),
    exceptions=EXCEPTIONS,
    claim="None about length; the baseline of the linear family.",
    positions="none",
)
