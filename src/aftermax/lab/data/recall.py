"""Recall tasks in a haystack of real text: passkey, and multi-query associative recall (MQAR).

Loss that stays flat does not show that a model uses a long context (ALiBi's does, and ALiBi
forgets). These tasks do: the answer stands somewhere before, at a distance that grows with the
length, among text that has nothing to do with it.

    passkey   ... text ... MARK 4 1 5 9 2 ... text ... MARK -> 4 1 5 9 2
    MQAR      ... k1 v1 ... text ... k2 v2 ... text ... | k2 -> v2, k1 -> v1, k2 -> v2 ...

Each place of a passkey has ten digits of its own, so that finding one is a single look-up, which
a small model learns in hundreds of steps. MQAR (after Arora et al., Zoology, arXiv 2312.04927, here
with the pairs scattered in text) takes two: which key came before, then where it stood. A model
that has not learned the second step picks one of the values that it sees, and is right once in
PAIRS.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from aftermax.lab.data.corpus import DIGITS, LETTERS, PLACES, Symbols

PAIRS, ASKED = 4, 8
"""Key-value pairs of an MQAR problem, and the questions about them in training."""


class Problems(NamedTuple):
    tokens: Tensor  # int64 (count, length + 1): inputs are [:, :-1], targets [:, 1:]
    asked: Tensor  # bool (count, length): the targets that are answers
    text: Tensor  # bool (count, length): the targets that are still the haystack's text


def passkey(text: Tensor, symbols: Symbols, generator: torch.Generator) -> Problems:
    """A passkey at a random depth of each text (count, length + 1), asked for at its end."""
    tokens = text.clone()
    count, total = tokens.shape
    digits = torch.randint(DIGITS, (count, PLACES), generator=generator)
    digits += symbols.digits + DIGITS * torch.arange(PLACES)
    needle = torch.cat([torch.full((count, 1), symbols.mark), digits], 1)
    width = needle.shape[1]
    question = total - width
    depth = torch.randint(0, question - width + 1, (count,), generator=generator)
    tokens.scatter_(1, depth[:, None] + torch.arange(width), needle)
    tokens[:, question:] = needle
    asked = torch.zeros(count, total - 1, dtype=torch.bool)
    asked[:, question:] = True  # target t is token t + 1: the digits after the mark
    return Problems(tokens, asked, _untouched(text, tokens))


def mqar(
    text: Tensor, symbols: Symbols, generator: torch.Generator, asked: int | None = None
) -> Problems:
    """Key-value pairs scattered in each text (count, length + 1), asked for at its end.

    None asks for each pair once: an answer that was given already would stand near by, however
    long the context is. A number asks so many questions, pairs drawn again and again.
    """
    tokens = text.clone()
    count, total = tokens.shape
    half = LETTERS // 2  # the first half of the letters are keys, the others values
    keys = _distinct(count, half, PAIRS, generator) + symbols.letters
    values = _distinct(count, half, PAIRS, generator) + symbols.letters + half
    question = total - 2 * (asked or PAIRS)
    slots = 2 * _distinct(count, question // 2, PAIRS, generator)
    tokens.scatter_(1, slots, keys).scatter_(1, slots + 1, values)
    if asked is None:
        order = _distinct(count, PAIRS, PAIRS, generator)
    else:
        order = torch.randint(PAIRS, (count, asked), generator=generator)
    tokens[:, question::2] = keys.gather(1, order)
    tokens[:, question + 1 :: 2] = values.gather(1, order)
    answers = torch.zeros(count, total - 1, dtype=torch.bool)
    answers[:, question::2] = True
    return Problems(tokens, answers, _untouched(text, tokens))


def _untouched(text: Tensor, tokens: Tensor) -> Tensor:
    return (text == tokens)[:, 1:]


def _distinct(count: int, of: int, take: int, generator: torch.Generator) -> Tensor:
    """(count, take) numbers below `of`, different within a row, in random order."""
    return torch.rand(count, of, generator=generator).argsort(1)[:, :take]


TASKS = {"passkey": passkey, "mqar": mqar}
"""What is scored."""
TRAINING_TASKS = (passkey, partial(mqar, asked=ASKED))
"""What is learned from: the same problems, with more questions."""
