"""The task of HashHop: chains of hashes in a context, followed from their first link to their end.

The problems are those of `aftermax.lab.data.hashhop`, a token for each hash. A problem fills its
length: the shuffled lines, a mark that says how many hops are asked for, and every chain's first
hash with its answer. Training problems have two chains up to as many as the training length holds:
with the longest alone the models of the lab learned nothing in their budget. Whoever follows a
chain at one length and not at another loses it among more of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aftermax.lab.data.drawn import Drawn, keep, opened
from aftermax.lab.data.hashhop import token_problems
from aftermax.lab.hashhop_work import HashHopWork
from aftermax.lab.measure import TOKENS_AT_ONCE, cache_rows
from aftermax.lab.models import DecoderLM
from aftermax.lab.store import Row
from aftermax.lab.work import Run

NAME = "HashHop"
TUNING_SEED, SCORED_SEED = 2**31, 2**32
"""Of the problems that no run is trained on."""
MEMORY_BATCH = 16
"""Problems of the step whose memory is measured."""


def prepare(work: HashHopWork, out: Path) -> Drawn:
    some = [problems(work, hops, 2, 4, torch.Generator().manual_seed(0))[0] for hops in work.hops]
    return keep(out, NAME, [x.tolist() for x in some])


def open_data(folder: Path) -> Drawn:
    return opened(folder, NAME)


def about(drawn: Drawn) -> dict:
    return {"name": drawn.name, "digest": drawn.digest}


def told(about: dict) -> str:
    return f"problems: {about['name']}, drawn anew in every step"


def model(run: Run[HashHopWork], _: Drawn) -> DecoderLM:
    return DecoderLM(run.work, run.arm, run.work.hashes + max(run.work.hops))


Batch = list[tuple[Tensor, Tensor]]
"""For each of the hops, tokens (B, T + 1) and bool (B, T): the targets that are answers."""


def problems(
    work: HashHopWork, hops: int, chains: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens (count, T + 1) and bool (count, T): of the targets, what is answered."""
    made = token_problems(
        count,
        generator,
        chains=chains,
        hops=hops,
        hashes=work.hashes,
        ask=work.hashes + hops - 1,
        chain_of_thought=work.chain_of_thought,
    )
    return made.around(made.prompt[:, :0])


def batch(run: Run[HashHopWork], _: Drawn, generator: torch.Generator) -> Batch:
    """As many tokens of each of the hops, or a little less, in problems of a random size."""
    work, parts = run.work, []
    for hops in work.hops:
        most = work.chains(hops, work.context)
        chains = int(torch.randint(2, most + 1, (), generator=generator))
        tokens = work.batch * work.context // len(work.hops)
        count = tokens // work.tokens(hops, chains)
        parts.append(problems(work, hops, chains, count, generator))
    return parts


def loss(model: DecoderLM, data: Batch, run: Run[HashHopWork]) -> tuple[Tensor, Tensor]:
    """Nats a token of an answer, the mean over the hops."""
    mean = torch.stack([_answers(model, *part)[0] for part in data]).mean()
    return mean, mean


def _answers(model: DecoderLM, tokens: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of the answers, and bool (answers,): which of their tokens are right."""
    hidden, wanted = model(tokens[:, :-1])[asked], tokens[:, 1:][asked]
    logits = model.logits(hidden).float()
    return F.cross_entropy(logits, wanted), logits.argmax(-1) == wanted


@torch.no_grad()
def evaluate(model: DecoderLM, work: HashHopWork, _: Drawn, step: int) -> list[Row]:
    """At each length: loss, and for each of the hops the chains that are followed to their end.

    An answer is right where every token of it is, each after the right ones before it: that is when
    greedy decoding writes it.
    """
    rows = []
    for length in work.lengths:
        losses = []
        for hops in work.hops:
            mean, right = _scored(model, work, hops, length, SCORED_SEED)
            losses.append(mean)
            rows.append(Row(step, length, f"hops{hops}", right))
        rows.append(Row(step, length, "loss", sum(losses) / len(losses)))
    generator = torch.Generator().manual_seed(SCORED_SEED)
    tokens = torch.randint(work.hashes, (1, work.lengths[-1]), generator=generator)
    return [*rows, *cache_rows(model, tokens, work.lengths, step)]


@torch.no_grad()
def tuning_loss(model: DecoderLM, work: HashHopWork, _: Drawn) -> float:
    losses = [_scored(model, work, h, work.context, TUNING_SEED)[0] for h in work.hops]
    return sum(losses) / len(losses)


def _scored(
    model: DecoderLM, work: HashHopWork, hops: int, length: int, seed: int
) -> tuple[float, float]:
    """Loss, and share of the answers that are right, on problems that are the same for all."""
    generator = torch.Generator().manual_seed(seed + 1000 * length + hops)
    tokens, asked = problems(work, hops, work.chains(hops, length), work.scored, generator)
    at_once = max(1, TOKENS_AT_ONCE // length)
    found = [
        _answers(model, *part)
        for part in zip(tokens.split(at_once), asked.split(at_once), strict=True)
    ]
    right = torch.cat([whole for _, whole in found])
    of_answer = hops if work.chain_of_thought else 1
    total = sum(mean.item() * len(whole) for mean, whole in found)
    return total / len(right), right.view(-1, of_answer).all(1).float().mean().item()


def largest_step(run: Run[HashHopWork], model: DecoderLM, _: Drawn) -> Callable[[], object]:
    """Of problems of the longest length."""
    work, hops = run.work, run.work.hops[0]
    generator = torch.Generator().manual_seed(0)
    chains = work.chains(hops, work.lengths[-1])
    data = [problems(work, hops, chains, MEMORY_BATCH, generator)]
    return lambda: loss(model, data, run)[0].backward()
