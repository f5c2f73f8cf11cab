"""HashHop: chains of random hashes, told as shuffled pairs, asked for by their first link.

    d = e    a = b    b = 'c'    e = 'f'    ...    a = 'c'    d = 'f'

Hashes hold no meaning and cannot be compressed, so that the context must be looked up in, and with
`hops` above 1 looked up in again for what was found. The task, its lines, and the number of chains
that fill so many characters are those of magic.dev's generator (2024), by which alone RecurFormer
(arXiv 2410.12850) was evaluated. Two forms of it:

    `text_problem`   characters, as theirs: hashes of letters, "=", quotes around the end of a chain
    `token_problems` a batch of token ids, one id for each hash: for models that learn in minutes

Theirs may draw one hash twice, and then asks what has two answers; here all that a problem holds
are different. They shuffle the order of the questions and throw the shuffled copy away, so that
questions stand in the order in which chains were made; here the order is random.
"""

from __future__ import annotations

import math
import random
import string
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

LETTERS = string.ascii_letters


@dataclass(frozen=True)
class TextProblem:
    """One problem in characters."""

    prompt: str
    completion: str
    targets: dict[str, str]
    """First hash of a chain -> what is answered, without quotes; of every chain."""


def chains_for(characters: int, hops: int, hash_length: int) -> int:
    """Chains whose lines fill so many characters: ceil(characters / ((2 length + 3) hops)).

    >>> chains_for(1000, hops=2, hash_length=16)
    15
    """
    _check(hops, characters=characters, hash_length=hash_length)
    return math.ceil(characters / ((2 * hash_length + 3) * hops))


def text_problem(
    characters: int,
    *,
    queries: int,
    hops: int,
    hash_length: int = 16,
    chain_of_thought: bool = False,
    seed: int = 0,
) -> TextProblem:
    """A problem of about so many characters.

    Args:
        characters: of the prompt, in lines "h1 = h2" of 2 `hash_length` + 3 characters, as they
            count (a line with its "=", spaces, quotes and end has 4 to 6 more than its hashes).
        queries: chains that are asked for.
        hops: lines that a chain has; the last one has its value in quotes.
        hash_length: letters of a hash.
        chain_of_thought: an answer is the whole chain, "h2 = h3", and not its end alone.

    Raises:
        ValueError: for numbers below 1, more queries than chains, and hashes too short to differ.

    >>> problem = text_problem(30, queries=1, hops=2, hash_length=2, chain_of_thought=True)
    >>> print(problem.prompt)
    Gn = 'VZ'
    vn = 'Av'
    RN = vn
    oN = Gn
    Op = yE
    yE = 'VA'
    >>> print(problem.completion)
    Hops=2
    CoT=True
    oN = 'Gn = VZ'
    """
    chains = chains_for(characters, hops, hash_length)
    if not 1 <= queries <= chains:
        raise ValueError(f"queries must be 1 to the {chains} chains of the problem, got {queries}")
    needed = chains * (hops + 1)
    if needed > len(LETTERS) ** hash_length // 2:
        raise ValueError(f"{needed} different hashes of hash_length={hash_length} are too many")
    generator = random.Random(seed)
    hashes: dict[str, None] = {}  # in the order in which they were drawn
    while len(hashes) < needed:
        hashes["".join(generator.choices(LETTERS, k=hash_length))] = None
    drawn = list(hashes)
    rows = [drawn[i * (hops + 1) : (i + 1) * (hops + 1)] for i in range(chains)]

    lines = [f"{a} = {b}" for row in rows for a, b in pairwise(row[:-1])]
    lines += [f"{row[-2]} = '{row[-1]}'" for row in rows]
    generator.shuffle(lines)
    targets = {row[0]: " = ".join(row[1:]) if chain_of_thought else row[-1] for row in rows}
    asked = generator.sample(list(targets), queries)
    answers = [f"{first} = '{targets[first]}'" for first in asked]
    completion = "\n".join([f"Hops={hops}", f"CoT={chain_of_thought}", *answers])
    return TextProblem("\n".join(lines), completion, targets)


@dataclass(frozen=True)
class TokenProblems:
    """Problems in token ids."""

    prompt: Tensor
    """int64 (count, 2 chains hops): the pairs, shuffled, each two ids."""
    completion: Tensor
    """int64 (count, 1 + queries (1 + answer)): `ask`, then each question with its answer."""
    is_answer: Tensor
    """bool, as `completion`: the ids that the context holds the answer for."""

    def around(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt before a text (count, n), the completion after it, and what is asked.

        Returns:
            tokens int64 (count, length), and bool (count, length - 1): of the targets
            `tokens[:, 1:]`, those that are answers.
        """
        tokens = torch.cat([self.prompt, text, self.completion], 1)
        before = torch.zeros_like(tokens[:, : self.prompt.shape[1] + text.shape[1] - 1])
        return tokens, torch.cat([before.bool(), self.is_answer], 1)


def token_problems(
    count: int,
    generator: torch.Generator,
    *,
    chains: int,
    hops: int,
    hashes: int,
    first: int = 0,
    ask: int | None = None,
    queries: int | None = None,
    chain_of_thought: bool = False,
) -> TokenProblems:
    """Problems in which a hash is one token and a line is two: "h1 h2", without sign or end.

    Args:
        count: of problems.
        chains, hops: chains of a problem, and lines of a chain.
        hashes: ids that hashes are drawn from, `first` to `first + hashes - 1`; all that one
            problem holds are different, so that there must be chains (hops + 1) at least.
        ask: the id that parts questions from what is before; None = `first + hashes`.
        queries: chains that are asked for, each once; None = all.
        chain_of_thought: an answer is the whole chain, and not its end alone.

    Raises:
        ValueError: for numbers below 1, more queries than chains, and too few hashes.

    >>> drawn = torch.Generator().manual_seed(0)
    >>> problems = token_problems(1, drawn, chains=2, hops=2, hashes=9, chain_of_thought=True)
    >>> problems.prompt, problems.completion
    (tensor([[6, 0, 3, 4, 8, 6, 2, 3]]), tensor([[9, 2, 3, 4, 8, 6, 0]]))
    """
    _check(hops, count=count, chains=chains)
    queries = chains if queries is None else queries
    if not 1 <= queries <= chains:
        raise ValueError(f"queries must be 1 to the {chains} chains of a problem, got {queries}")
    links = hops + 1
    if chains * links > hashes:
        raise ValueError(
            f"{chains} chains of {hops} hops need {chains * links} different hashes, got {hashes}"
        )
    drawn = torch.rand(count, hashes, generator=generator).argsort(1)[:, : chains * links]
    rows = (drawn + first).unflatten(1, (chains, links))  # (count, chains, links)
    pairs = torch.stack([rows[..., :-1], rows[..., 1:]], -1).flatten(1, 2)  # (count, lines, 2)
    order = torch.rand(pairs.shape[:2], generator=generator).argsort(1)
    prompt = pairs.gather(1, order[..., None].expand_as(pairs)).flatten(1)

    order = torch.rand(count, chains, generator=generator).argsort(1)[:, :queries]
    asked = rows.gather(1, order[..., None].expand(-1, -1, links))
    if not chain_of_thought:
        asked = asked[..., [0, -1]]
    is_answer = torch.ones_like(asked, dtype=torch.bool)
    is_answer[..., 0] = False
    mark = torch.full((count, 1), first + hashes if ask is None else ask)
    return TokenProblems(
        prompt,
        torch.cat([mark, asked.flatten(1)], 1),
        torch.cat([torch.zeros(count, 1, dtype=torch.bool), is_answer.flatten(1)], 1),
    )


def _check(hops: int, **numbers: int) -> None:
    for name, number in {"hops": hops, **numbers}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
