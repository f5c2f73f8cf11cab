"""What is asked of a trained model: loss and recall at each length, and why they come out so.

Every loss is on the same target tokens: the last T/2 of each held-out window, with ever more
context before them. Beside it stands the truncation baseline, in which every target has exactly the
last T tokens before it and no more: a system that loses to it does not use its longer context.

Beside what a model knows stands what it holds to go on from there: the bytes of its decode state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aftermax.attention import attention_weights
from aftermax.cache import Cache
from aftermax.dense import Dense
from aftermax.lab.data.corpus import Corpus
from aftermax.lab.data.recall import TASKS
from aftermax.lab.models import DecoderLM
from aftermax.lab.store import Row
from aftermax.lab.work import Work
from aftermax.modules import Attention

TOKENS_AT_ONCE = 2**14
"""Tokens of one forward pass in evaluation."""


def evaluate(model: DecoderLM, work: Work, corpus: Corpus, step: int) -> list[Row]:
    """All measures of a trained model, as rows."""
    windows = corpus.held_out_windows("validation", work.windows, work.lengths[-1] + 1)
    everywhere = _losses(model, windows, work.lengths[-1])
    rows = _buckets(everywhere.mean(0), work, step)
    for length in work.lengths:
        if length == work.lengths[-1]:
            losses = everywhere[:, -work.targets :]
        else:
            losses = _losses(model, windows[:, -length - 1 :], work.targets)
        rows.append(Row(step, length, "loss", losses.mean().item()))
        for name, share in _recall(model, corpus, work, length).items():
            rows.append(Row(step, length, name, share))
        for name, value in _diagnose(model, windows[:16, -length - 1 : -1], work.targets).items():
            rows.append(Row(step, length, name, value))
    rows += cache_rows(model, windows[:1, :-1], work.lengths, step)
    truncated = _truncated_loss(model, windows, work)
    return rows + [Row(step, length, "truncated_loss", truncated) for length in work.lengths]


@torch.no_grad()
def tuning_loss(model: DecoderLM, work: Work, corpus: Corpus) -> float:
    """Loss at the training length on the part that only the choice of learning rates sees."""
    windows = corpus.held_out_windows("tune", 4 * work.windows, work.context + 1)
    return _losses(model, windows, work.targets).mean().item()


@torch.no_grad()
def _losses(model: DecoderLM, windows: Tensor, targets: int) -> Tensor:
    """(count, targets) losses of the last `targets` tokens of (count, length + 1) windows."""
    out = []
    for part in windows.split(_at_once(windows)):
        logits = model.logits(model(part[:, :-1])[:, -targets:]).float()
        wanted = part[:, -targets:]
        out.append(F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none"))
    return torch.cat(out)


def _truncated_loss(model: DecoderLM, windows: Tensor, work: Work) -> float:
    """The same targets, each with the T tokens right before it as its only context."""
    ends = windows[:, -(work.context + work.targets) :]
    short = ends.unfold(1, work.context + 1, 1).flatten(0, 1)
    return _losses(model, short, 1).mean().item()


def _buckets(losses: Tensor, work: Work, step: int) -> list[Row]:
    """Mean loss of each part of the longest window: a row is the part that ends at `length`."""
    starts = (0, *work.lengths[:-1])
    return [
        Row(step, stop, "bucket_loss", losses[start:stop].mean().item())
        for start, stop in zip(starts, work.lengths, strict=True)
    ]


@torch.no_grad()
def _recall(model: DecoderLM, corpus: Corpus, work: Work, length: int) -> dict[str, float]:
    """Passkeys found whole and MQAR answers found, as shares; all get the same problems."""
    found = {}
    text = corpus.held_out_windows("validation", work.windows, work.lengths[-1] + 1, seed=1)
    for name, task in TASKS.items():
        generator = torch.Generator().manual_seed(length)
        problems = task(text[:, -length - 1 :], corpus.symbols, generator)
        right = []
        for tokens, asked in zip(
            problems.tokens.split(_at_once(problems.tokens)),
            problems.asked.split(_at_once(problems.tokens)),
            strict=True,
        ):
            hidden = model(tokens[:, :-1])
            answers = model.logits(hidden[asked]).argmax(-1) == tokens[:, 1:][asked]
            right.append(answers.view(len(tokens), -1))  # as many answers in each problem
        share = torch.cat(right).float()
        found[name] = (share.amin(1) if name == "passkey" else share).mean().item()
    return found


def cache_rows(
    model: DecoderLM, tokens: Tensor, lengths: Iterable[int], step: int
) -> Iterator[Row]:
    """`cache_bytes`, in all and for each token."""
    for length, held in cache_bytes(model, tokens, lengths).items():
        yield Row(step, length, "cache_bytes", held)
        yield Row(step, length, "cache_bytes_per_token", held / length)


@torch.no_grad()
def cache_bytes(model: DecoderLM, tokens: Tensor, lengths: Iterable[int]) -> dict[int, int]:
    """Bytes of the decode state, all layers together, after each of the (rising) lengths.

    Args:
        tokens: (1, T), read once, up to the last length: one sequence, whose state holds no more
            than a batch's does for each.
    """
    cache, found = Cache(model, len(tokens)), {}
    for length in lengths:
        cache.append(tokens[:, cache.length : length])
        found[length] = cache.bytes
    return found


def _diagnose(model: DecoderLM, tokens: Tensor, targets: int) -> dict[str, float]:
    """How sharp the last rows are."""
    rows = (tokens.shape[1] - targets, tokens.shape[1])
    return sharpness(model, tokens.split(_at_once(tokens)), rows)


@torch.no_grad()
def sharpness(
    model: Any, parts: Iterable[Tensor], rows: tuple[int, int] | None = None
) -> dict[str, float]:
    """How sharp rows are, over layers and heads, of |weights| made to sum to one.

    entropy: mean of -sum w ln w, in nats. effective_keys: mean of exp of it. first_mass: weight on
    the first token. row_mass: what |weights| summed to before. Nothing for systems whose weights
    are no row map.

    Args:
        model: with `embed` and `blocks`, as both models have them.
        parts: of the input, one pass each.
        rows: from and to; None = all.
    """
    collected = {"entropy": [], "effective_keys": [], "first_mass": [], "row_mass": []}
    for part in parts:
        for weights in layer_weights(model, part, rows):
            mass = weights.sum(-1, keepdim=True)
            share = weights / mass.clamp_min(1e-30)
            entropy = -torch.xlogy(share, share).sum(-1)
            collected["entropy"].append(entropy.mean((0, 2)))
            collected["effective_keys"].append(entropy.exp().mean((0, 2)))
            collected["first_mass"].append(share[..., 0].mean((0, 2)))
            collected["row_mass"].append(mass[..., 0].mean((0, 2)))
    return {name: torch.cat(values).mean().item() for name, values in collected.items() if values}


@torch.no_grad()
def layer_weights(
    model: Any, part: Tensor, rows: tuple[int, int] | None = None
) -> Iterator[Tensor]:
    """|weights| (B, H, rows, T) of each layer whose attention has a row map, in order."""
    x = model.embed(part)
    for block in model.blocks:
        attend = block[0].layer
        if isinstance(attend, Attention) and isinstance(attend.system, Dense):
            query, key, _ = attend.project(block[0].before(x), start=0)
            yield attention_weights(
                query,
                key,
                weights=attend.system.weights,
                rows=rows,
                attn_mask=attend.what_is_visible(None),
                enable_gqa=True,
                **attend.learned,  # type: ignore[arg-type]
            ).abs()
        x = block(x)


def _at_once(windows: Tensor) -> int:
    return max(1, TOKENS_AT_ONCE // windows.shape[1])
