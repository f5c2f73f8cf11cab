"""Output layers: hidden vectors in; a loss, or the best classes, out.

Each has `loss(hidden, targets)`, where targets are (B, K) int64 that -1 fills up, and the loss is
the mean over the examples of the mean over the classes of each (BCE: of the sum over all classes);
and `ranker(k)`, which makes (B, k) classes, best first, of hidden vectors. Classes may come in any
order; `counts` says how often training has each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax.losses import (
    FactoredLinear,
    LogTaylorLoss,
    ZScoreLoss,
    coupled_softmax_loss,
    decoupled_softmax_loss,
    label_pool,
    linear_cross_entropy,
    one_vs_all_loss,
    soft_topk_loss,
)

if TYPE_CHECKING:
    from aftermax.lab.labels_work import LabelsWork
    from aftermax.lab.outputs import OutputArm
    from aftermax.lab.words_work import WordsWork


class Head(nn.Module, ABC):
    """An output layer that ranks by a score of every class."""

    @abstractmethod
    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor: ...

    @abstractmethod
    def scores(self, hidden: Tensor) -> Tensor:
        """(B, classes)."""

    def ranker(self, k: int) -> Callable[[Tensor], Tensor]:
        """What turns hidden vectors into their k best classes; the weights are those of now."""
        return lambda hidden: self.scores(hidden).topk(k).indices


class Softmax(Head):
    """Cross-entropy of all classes, one for each example; training never has the logits whole."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(classes))

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, self.weight, targets[:, 0], self.bias)

    def scores(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


class Adaptive(Head):
    """torch's adaptive softmax over the classes in the order of their frequency.

    The frequent ones, up to 2,000, stand in the head; the rest in two clusters of a quarter and a
    sixteenth of the width, the first of which ends at 10,000 or a third of all.
    """

    def __init__(self, width: int, counts: Tensor):
        super().__init__()
        classes = len(counts)
        if classes < 3:
            raise ValueError(f"adaptive softmax needs 3 classes or more, got {classes}")
        cutoffs = sorted({min(2000, max(1, classes // 10)), min(10000, max(2, classes // 3))})
        narrower = min(4.0, width**0.5)  # the last cluster keeps one number at least
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(
            width, classes, cutoffs, div_value=narrower, head_bias=True
        )
        by_frequency = counts.argsort(descending=True, stable=True)
        self.register_buffer("rank", by_frequency.argsort())
        self.rank: Tensor

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        rows, classes, share = pairs(targets)
        return -(self.softmax(hidden[rows], self.rank[classes]).output * share).sum()

    def scores(self, hidden: Tensor) -> Tensor:
        return self.softmax.log_prob(hidden)[:, self.rank]


class Hierarchical(Head):
    """p(class) = p(group) p(class | group): about sqrt(D) groups of sqrt(D), by frequency."""

    def __init__(self, width: int, counts: Tensor, sparse: bool):
        super().__init__()
        self.width, self.classes = width, len(counts)
        self.size = math.ceil(self.classes**0.5)
        groups = math.ceil(self.classes / self.size)
        self.group = nn.Linear(width, groups)
        # a row holds the weights of a group's classes, so that one look-up finds them
        self.member = nn.Embedding(groups, self.size * width, sparse=sparse)
        nn.init.normal_(self.member.weight, std=width**-0.5)
        by_frequency = counts.argsort(descending=True, stable=True)
        self.register_buffer("rank", by_frequency.argsort())
        self.rank: Tensor

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        rows, classes, share = pairs(targets)
        rank, hidden = self.rank[classes], hidden[rows]
        group, place = rank // self.size, rank % self.size
        weight = self.member(group).view(-1, self.size, self.width)
        inner = (weight @ hidden[..., None])[..., 0].masked_fill(self._beyond(group), -math.inf)
        outer = F.cross_entropy(self.group(hidden), group, reduction="none")
        return ((outer + F.cross_entropy(inner, place, reduction="none")) * share).sum()

    def scores(self, hidden: Tensor) -> Tensor:
        weight = self.member.weight.view(-1, self.width)
        inner = (hidden @ weight.T).view(len(hidden), -1, self.size)
        every = torch.arange(inner.shape[1])
        inner = inner.masked_fill(self._beyond(every), -math.inf).log_softmax(-1)
        scores = self.group(hidden).log_softmax(-1)[..., None] + inner
        return scores.flatten(1)[:, self.rank]

    def _beyond(self, group: Tensor) -> Tensor:
        """(N, size): places of the last group that no class has."""
        return group[:, None] * self.size + torch.arange(self.size) >= self.classes


class Sampled(Head):
    """Softmax over each example's class and classes drawn for the whole batch.

    The draws, with replacement, follow the frequency to the power 3/4. The score of a drawn class
    is less the logarithm of how often it is to be expected among the draws, so that the sum under
    the logarithm is right in the mean, and the loss is softmax's in the limit of many draws (Bengio
    & Senecal 2008). A drawn class that is a target of the example counts for nothing.
    """

    def __init__(self, width: int, counts: Tensor, samples: int, sparse: bool):
        super().__init__()
        self.samples = samples
        self.weight = nn.Embedding(len(counts), width, sparse=sparse)
        self.bias = nn.Embedding(len(counts), 1, sparse=sparse)
        nn.init.normal_(self.weight.weight, std=width**-0.5)
        nn.init.zeros_(self.bias.weight)
        share = counts.clamp_min(1).double() ** 0.75
        share = share / share.sum()
        self.register_buffer("cumulative", share.cumsum(0))
        self.register_buffer("log_expected", (share * samples).log().float())
        self.cumulative: Tensor
        self.log_expected: Tensor

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        rows, classes, share = pairs(targets)
        drawn = torch.searchsorted(self.cumulative, torch.rand(self.samples, dtype=torch.float64))
        drawn = drawn.clamp_max(len(self.cumulative) - 1)
        negative = hidden @ self.weight(drawn).T + self.bias(drawn)[:, 0] - self.log_expected[drawn]
        hit = (targets[:, :, None] == drawn).any(1)
        negative = negative.masked_fill(hit, -math.inf)
        positive = (hidden[rows] * self.weight(classes)).sum(-1) + self.bias(classes)[:, 0]
        scores = torch.cat([positive[:, None], negative[rows]], 1)
        return ((scores.logsumexp(1) - positive) * share).sum()

    def scores(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.weight.T + self.bias.weight[:, 0]


class Factored(Head):
    """A loss of the spherical family on W = V U, which is trained by steps of its own."""

    def __init__(self, width: int, classes: int, loss: ZScoreLoss | LogTaylorLoss):
        super().__init__()
        self.layer = FactoredLinear(width, classes, bias=True, loss=loss)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.layer(hidden, targets)

    def scores(self, hidden: Tensor) -> Tensor:
        return self.layer.logits(hidden)

    def ranker(self, k: int) -> Callable[[Tensor], Tensor]:
        return lambda hidden: self.layer.topk(hidden, k).indices


Rule = Callable[[Tensor, Tensor], Tensor]
"""(scores (B, L), positives (B, K)) -> the loss."""


class OneVsAll(Head):
    """A vector and a bias for each label, and a loss of all the scores."""

    def __init__(self, width: int, rule: Rule, prior: Tensor):
        super().__init__()
        self.rule = rule
        self.weight = nn.Parameter(torch.randn(len(prior), width) / width**0.5)
        self.bias = nn.Parameter(prior.clone())

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.rule(self.scores(hidden), targets)

    def scores(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


class Dual(Head):
    """The vector of a label is what `labels(ids)` makes of its text; a bias is all that it has of
    its own.

    Args:
        every: the loss is over all labels, else over those of the batch.
    """

    def __init__(self, labels: Callable[[Tensor | None], Tensor], rule: Rule, prior: Tensor,
                 every: bool):  # fmt: skip
        super().__init__()
        self.labels, self.rule, self.every = labels, rule, every
        self.bias = nn.Parameter(prior.clone())

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self.every:
            return self.rule(self.scores(hidden), targets)
        pool, targets = label_pool(targets)
        return self.rule(hidden @ self.labels(pool).T + self.bias[pool], targets)

    def scores(self, hidden: Tensor) -> Tensor:
        return hidden @ self.labels(None).T + self.bias

    def ranker(self, k: int) -> Callable[[Tensor], Tensor]:
        vectors = self.labels(None)  # once for all documents
        return lambda hidden: (hidden @ vectors.T + self.bias).topk(k).indices


def pairs(targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, class and share of each target; the shares of a batch are 1 in all, of a row alike."""
    rows, places = (targets >= 0).nonzero(as_tuple=True)
    held = (targets >= 0).sum(1)
    share = 1 / (held[rows] * (held > 0).sum())
    return rows, targets[rows, places], share


def _binary_sum(scores: Tensor, positives: Tensor) -> Tensor:
    """A share of a step that labels by the thousand divide would be lost in AdamW's epsilon."""
    return scores.shape[1] * one_vs_all_loss(scores, positives)


def parameters(model: nn.Module) -> int:
    """What the model has learned: its parameters, and the weight of a factored layer."""
    own = sum(parameter.numel() for parameter in model.parameters())
    factored = [m for m in model.modules() if isinstance(m, FactoredLinear)]
    return own + sum((m.in_features + m.has_bias) * m.out_features for m in factored)


def of_words(arm: OutputArm, work: WordsWork, counts: Tensor, sparse: bool) -> Head:
    """The output layer of an arm for words with these counts."""
    width, classes = work.width, len(counts)
    a, b = arm.values or (work.a, work.b)
    made: dict[str, Callable[[], Head]] = {
        "softmax": lambda: Softmax(width, classes),
        "adaptive": lambda: Adaptive(width, counts),
        "hierarchical": lambda: Hierarchical(width, counts, sparse),
        "sampled": lambda: Sampled(width, counts, work.samples, sparse),
        "z-loss": lambda: Factored(width, classes, ZScoreLoss(a, b)),
        "log-taylor": lambda: Factored(width, classes, LogTaylorLoss()),
    }
    return made[arm.entry.name]()


def of_labels(
    output: str,
    work: LabelsWork,
    counts: Tensor,
    documents: int,
    labels: Callable[[Tensor | None], Tensor],
) -> Head:
    """The output layer of that name for labels with these counts among so many documents.

    Args:
        labels: ids (None = all) -> vectors (N, width), for a dual encoder.
    """
    loss = output.removeprefix("dual/")
    share = (counts + 0.5) / (documents + 1)
    # what is known of a label before its text: AdamW would be long on the way to it
    prior = share.logit() if loss == "bce" else share.log()
    if not work.prior:
        prior = torch.zeros_like(prior)
    if output.startswith("dual/"):
        return Dual(labels, rule(loss, work), prior, work.negatives == "all")
    made: dict[str, Callable[[], Head]] = {
        "sampled": lambda: Sampled(work.width, counts, work.samples, sparse=False),
        "adaptive": lambda: Adaptive(work.width, counts),
        "z-loss": lambda: Factored(work.width, len(counts), ZScoreLoss(work.a, work.b)),
    }
    if loss in made:
        return made[loss]()
    return OneVsAll(work.width, rule(loss, work), prior)


def rule(loss: str, work: LabelsWork) -> Rule:
    """The loss of that name."""
    rules: dict[str, Rule] = {
        "softmax": coupled_softmax_loss,
        "infonce": coupled_softmax_loss,
        "bce": _binary_sum,
        "decoupled": decoupled_softmax_loss,
        "decoupled-one": partial(decoupled_softmax_loss, sample=1),
        "soft-topk": partial(soft_topk_loss, k=work.k, alpha=work.alpha),
    }
    return rules[loss]
