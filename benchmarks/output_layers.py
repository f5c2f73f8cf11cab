"""Training steps of output layers: the loss, its gradient of the hidden vectors, the update.

Every contender is a function without arguments that makes one whole step on the next batch, and
leaves the gradient of the hidden vectors behind. All that have one share one dense weight, so that
a million classes fit beside one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aftermax import FactoredLinear, linear_cross_entropy, softmax

WIDTH, BATCH, RATE = 256, 128, 0.1
DENSE = "log-softmax, autograd and SGD"
BY_HAND = "log-softmax, by hand"
FUSED = "linear_cross_entropy, SGD"
ADAPTIVE = "adaptive softmax, SGD"
SAMPLED = "sampled softmax, {} samples, SGD"
FACTORED = "factored Z-loss"
SAMPLES = (1024, 8192)
CUTOFFS = (4000, 40_000, 200_000)
"""Of the adaptive softmax: those below the number of classes."""

Step = Callable[[], None]


def zipf(classes: int, *shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Classes by rank, P(k) = log((k + 2) / (k + 1)) / log(C + 1): Zipf's law, nearly."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (((classes + 1) ** uniform).long() - 1).clamp(0, classes - 1)


def log_zipf(target: Tensor, classes: int) -> Tensor:
    """log P of `zipf`."""
    return ((target + 2.0) / (target + 1.0)).log().div(math.log(classes + 1)).log()


def batches(classes: int, count: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden vectors as a network's last ReLU gives them, and Zipf targets; over and over."""
    random = torch.Generator().manual_seed(0)
    return cycle(
        [
            (
                torch.randn(BATCH, WIDTH, generator=random).relu_().requires_grad_(),
                zipf(classes, BATCH, generator=random),
            )
            for _ in range(count)
        ]
    )


def weight_of(classes: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(classes, WIDTH).uniform_(-(WIDTH**-0.5), WIDTH**-0.5))


def sgd_step(loss: Callable[[Tensor, Tensor], Tensor], parameters: list, classes: int) -> Step:
    """As a training loop writes it."""
    optimiser, data = torch.optim.SGD(parameters, lr=RATE), batches(classes)

    def step() -> None:
        hidden, target = next(data)
        hidden.grad = None
        optimiser.zero_grad()
        loss(hidden, target).backward()
        optimiser.step()
        optimiser.zero_grad()  # the weight is shared

    return step


def by_hand(weight: Tensor, classes: int) -> Step:
    """The least that log-softmax can do with matrices: three products, one buffer of logits."""
    data = batches(classes)
    logits, rows = torch.empty(BATCH, classes), torch.arange(BATCH)

    @torch.no_grad()
    def step() -> None:
        hidden, target = next(data)
        torch.mm(hidden, weight.T, out=logits)
        softmax(logits, 1, out=logits)
        logits[rows, target] -= 1
        hidden.grad = logits @ weight / BATCH
        weight.addmm_(logits.T, hidden, alpha=-RATE / BATCH)

    return step


def sampled_loss(weight: Tensor, classes: int, samples: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Sampled softmax: logits of samples less the log of their expected count (1412.2007).

    One set of samples, drawn by Zipf's law, for the whole batch; a sample that is the target of a
    row is hidden from it, and the target itself stands in the sum as it is. The rows come out of
    the weight with a sparse gradient.
    """
    random = torch.Generator().manual_seed(1)

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        drawn = zipf(classes, samples, generator=random)
        rows = F.embedding(torch.cat([target, drawn]), weight, sparse=True)
        own, others = rows[: len(target)], rows[len(target) :]
        right = (hidden * own).sum(1)
        wrong = hidden @ others.T - log_zipf(drawn, classes) - math.log(samples)
        wrong = wrong.masked_fill(target[:, None] == drawn, -torch.inf)
        logits = torch.cat([right[:, None], wrong], 1)
        return F.cross_entropy(logits, torch.zeros_like(target))

    return loss


def factored(layer: FactoredLinear) -> Step:
    data = batches(layer.out_features)

    def step() -> None:
        hidden, target = next(data)
        hidden.grad = None
        layer(hidden, target).backward()
        layer.step(RATE)

    return step


def names() -> list[str]:
    return [DENSE, BY_HAND, FUSED, ADAPTIVE, *(SAMPLED.format(n) for n in SAMPLES), FACTORED]


def step_of(name: str, classes: int, weight: nn.Parameter | None = None) -> Step:
    """The step of a contender, on that weight if it has a dense one."""
    if name == FACTORED:
        return factored(FactoredLinear(WIDTH, classes))
    if name == ADAPTIVE:
        cutoffs = [at for at in CUTOFFS if at < classes]
        model = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, classes, cutoffs)
        return sgd_step(lambda h, t: model(h, t).loss, list(model.parameters()), classes)
    weight = weight_of(classes) if weight is None else weight
    if name == BY_HAND:
        return by_hand(weight, classes)
    losses = {
        DENSE: lambda h, t: F.cross_entropy(F.linear(h, weight), t),
        FUSED: lambda h, t: linear_cross_entropy(h, weight, t),
    } | {SAMPLED.format(n): sampled_loss(weight, classes, n) for n in SAMPLES}
    return sgd_step(losses[name], [weight], classes)
