"""Recall problems: the answer stands in the context, once asked for, among text of no concern."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aftermax.lab.data.corpus import Symbols
from aftermax.lab.data.recall import ASKED, PAIRS, TASKS, TRAINING_TASKS, Problems

SYMBOLS = Symbols(256)
every_task = pytest.mark.parametrize("task", TASKS)
problems = given(
    count=st.integers(1, 5), length=st.integers(48, 300), seed=st.integers(0, 2**32 - 1)
)


def haystack(count: int, length: int) -> torch.Tensor:
    """Text (count, length + 1) whose tokens are known by their places."""
    return (torch.arange(length + 1) % 256).expand(count, -1).contiguous()


def made(task: str, count: int, length: int, seed: int) -> Problems:
    generator = torch.Generator().manual_seed(seed)
    return TASKS[task](haystack(count, length), SYMBOLS, generator)


def followers(tokens: list[int], asked: list[bool]) -> list[tuple[int, list[int]]]:
    """(answer, what followed the earlier places of the token that asks for it), for each target."""
    out = []
    for i in (i for i, is_asked in enumerate(asked) if is_asked):
        before = [tokens[j + 1] for j in range(i) if tokens[j] == tokens[i]]
        out.append((tokens[i + 1], before))
    return out


@every_task
@problems
def test_every_answer_stands_in_the_context_and_nothing_contradicts_it(task, count, length, seed):
    """What asks stood before, and was always followed by what is the answer now."""
    tokens, asked, _ = made(task, count, length, seed)
    for row, mask in zip(tokens.tolist(), asked.tolist(), strict=True):
        for answer, before in followers(row, mask):
            assert before
            assert set(before) == {answer}


@every_task
@problems
def test_what_is_no_symbol_is_the_haystack(task, count, length, seed):
    tokens, asked, text = made(task, count, length, seed)
    is_text = tokens < SYMBOLS.text
    assert torch.equal(tokens[is_text], haystack(count, length)[is_text])
    assert torch.equal(text, is_text[:, 1:])
    assert not (text & asked).any()
    assert (tokens < SYMBOLS.total).all()
    assert (tokens != SYMBOLS.end).all()


@every_task
@problems
def test_shapes_are_those_of_a_training_batch(task, count, length, seed):
    tokens, asked, text = made(task, count, length, seed)
    assert (tokens.shape, tokens.dtype) == ((count, length + 1), torch.int64)
    for mask in (asked, text):
        assert (mask.shape, mask.dtype) == ((count, length), torch.bool)


@every_task
@problems
def test_the_same_generator_gives_the_same_problems(task, count, length, seed):
    first, second = made(task, count, length, seed), made(task, count, length, seed)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_task
def test_another_generator_gives_others_and_the_text_stays_as_it_was(task):
    text = haystack(4, 64)
    drawn = [TASKS[task](text, SYMBOLS, torch.Generator().manual_seed(s)).tokens for s in (0, 1)]
    assert not torch.equal(*drawn)
    assert torch.equal(text, haystack(4, 64))


@problems
def test_a_passkey_stands_once_before_it_is_asked_for_at_the_end(count, length, seed):
    tokens, asked, _ = made("passkey", count, length, seed)
    width = int(asked[0].sum())
    for row, mask in zip(tokens, asked, strict=True):
        marks = (row == SYMBOLS.mark).nonzero().flatten().tolist()
        assert len(marks) == 2
        assert marks[1] == length - width
        assert mask.nonzero().flatten().tolist() == list(range(length - width, length))
        first, second = (row[m : m + width + 1] for m in marks)
        assert torch.equal(first, second)
        assert len(set(first.tolist())) == width + 1
        assert (row >= SYMBOLS.text).sum() == 2 * (width + 1)


def test_passkeys_stand_at_every_depth():
    tokens = made("passkey", 400, 48, 0).tokens
    first = (tokens == SYMBOLS.mark).float().argmax(1)
    assert first.min() == 0
    assert first.unique().numel() > 30


@problems
def test_mqar_asks_for_each_of_its_own_pairs_once(count, length, seed):
    tokens, asked, _ = made("mqar", count, length, seed)
    question = length + 1 - 2 * PAIRS
    for row, mask in zip(tokens.tolist(), asked.tolist(), strict=True):
        places = [i for i in range(question) if row[i] >= SYMBOLS.text]
        assert len(places) == 2 * PAIRS
        pairs = {row[i]: row[i + 1] for i in places[::2]}
        assert len(pairs) == len(set(pairs.values())) == PAIRS
        assert not set(pairs) & set(pairs.values())
        assert {row[i]: row[i + 1] for i in range(question, length, 2)} == pairs
        assert [i for i, is_asked in enumerate(mask) if is_asked] == list(
            range(question, length, 2)
        )


def test_mqar_puts_pairs_everywhere():
    tokens = made("mqar", 400, 48, 0).tokens
    question = 49 - 2 * PAIRS
    places = (tokens[:, :question] >= SYMBOLS.text).any(0)
    assert places[: question - 1].all()


def test_training_asks_again_and_again_for_the_same_pairs():
    _, task = TRAINING_TASKS
    tokens = task(haystack(400, 48), SYMBOLS, torch.Generator().manual_seed(0)).tokens
    asked = tokens[:, 49 - 2 * ASKED :: 2]
    assert asked.shape[1] == ASKED
    assert {len(set(row)) for row in asked.tolist()} >= {3, PAIRS}
