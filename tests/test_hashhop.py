"""HashHop: what is asked for is found by hops through the prompt, and only so."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aftermax.lab.data.hashhop import TokenProblems, chains_for, text_problem, token_problems


def links_of(prompt: str) -> dict[str, str]:
    return dict(line.split(" = ") for line in prompt.split("\n"))


@given(
    hops=st.integers(1, 4), chains=st.integers(1, 9), length=st.integers(2, 8),
    thinking=st.booleans(), seed=st.integers(0, 2**32 - 1), queries=st.integers(1, 9),
)  # fmt: skip
def test_every_answer_is_found_by_so_many_hops(hops, chains, length, thinking, seed, queries):
    queries = min(queries, chains)
    characters = chains * (2 * length + 3) * hops
    problem = text_problem(
        characters, queries=queries, hops=hops, hash_length=length, chain_of_thought=thinking,
        seed=seed,
    )  # fmt: skip
    links = links_of(problem.prompt)
    assert len(links) == chains * hops == len(problem.prompt.split("\n"))
    hashes = {x.strip("'") for pair in links.items() for x in pair}
    assert len(hashes) == chains * (hops + 1)
    head, *answers = problem.completion.split("\n")[1:]
    assert head == f"CoT={thinking}"
    assert len(problem.targets) == chains
    assert len({answer.split(" = ")[0] for answer in answers}) == len(answers) == queries
    for answer in answers:
        first, told = answer.split(" = ", 1)
        way = [first]
        for _ in range(hops):
            way.append(links[way[-1]])
        assert way[-1] == f"'{way[-1][1:-1]}'"  # quotes end a chain
        way[-1] = way[-1][1:-1]
        expected = " = ".join(way[1:]) if thinking else way[-1]
        assert told == f"'{expected}'"
        assert problem.targets[first] == expected


@given(
    hops=st.integers(1, 3), chains=st.integers(1, 8), spare=st.integers(0, 5),
    thinking=st.booleans(), seed=st.integers(0, 2**32 - 1), queries=st.integers(1, 8),
)  # fmt: skip
def test_tokens_are_chains_too(hops, chains, spare, thinking, seed, queries):
    hashes, queries = chains * (hops + 1) + spare, min(queries, chains)
    problems = token_problems(
        3, torch.Generator().manual_seed(seed), chains=chains, hops=hops, hashes=hashes, first=50,
        queries=queries, chain_of_thought=thinking,
    )  # fmt: skip
    answer = hops if thinking else 1
    assert problems.prompt.shape == (3, 2 * chains * hops)
    assert problems.completion.shape == (3, 1 + queries * (1 + answer))
    assert int(problems.is_answer.sum()) == 3 * queries * answer
    for prompt, completion, is_answer in zip(
        problems.prompt.tolist(), problems.completion.tolist(), problems.is_answer.tolist(),
        strict=True,
    ):  # fmt: skip
        links = dict(zip(prompt[::2], prompt[1::2], strict=True))
        assert len(links) == chains * hops
        assert set(links) | set(links.values()) <= set(range(50, 50 + hashes))
        assert completion[0] == 50 + hashes
        firsts = set(links) - set(links.values())
        for q in range(queries):
            at = 1 + q * (1 + answer)
            way = [completion[at]]
            assert way[0] in firsts
            for _ in range(hops):
                way.append(links[way[-1]])
            assert completion[at + 1 : at + 1 + answer] == (way[1:] if thinking else way[-1:])
            assert is_answer[at : at + 1 + answer] == [False] + [True] * answer


def test_around_a_text_the_targets_that_are_asked_are_the_answers():
    problems = token_problems(
        2, torch.Generator().manual_seed(0), chains=2, hops=1, hashes=8, first=256
    )
    text = torch.arange(5).expand(2, -1)
    tokens, asked = problems.around(text)
    assert torch.equal(tokens[:, 4:9], text)
    assert asked.shape == (2, tokens.shape[1] - 1)
    targets = tokens[:, 1:][asked]
    assert torch.equal(targets, problems.completion[problems.is_answer])
    assert isinstance(problems, TokenProblems)


def test_the_same_seed_is_the_same_problem_and_another_is_another():
    asked = {"queries": 3, "hops": 2, "hash_length": 8}
    assert text_problem(500, seed=1, **asked) == text_problem(500, seed=1, **asked)
    assert text_problem(500, seed=1, **asked) != text_problem(500, seed=2, **asked)


def test_the_chains_that_fill_a_context_are_counted_as_in_the_original():
    assert chains_for(1_000_000, 2, 16) == -(-1_000_000 // 70)
    problem = text_problem(2000, queries=1, hops=2, hash_length=16)
    assert 2000 <= len(problem.prompt) <= 2000 * 1.2


def test_errors_say_what_was_asked():
    drawn = torch.Generator()
    with pytest.raises(ValueError, match="queries must be 1 to the 3 chains of the problem, got 4"):
        text_problem(100, queries=4, hops=1, hash_length=16)
    with pytest.raises(ValueError, match="hops must be at least 1, got 0"):
        token_problems(1, drawn, chains=2, hops=0, hashes=9)
    with pytest.raises(ValueError, match="3 chains of 2 hops need 9 different hashes, got 8"):
        token_problems(1, drawn, chains=3, hops=2, hashes=8)
    with pytest.raises(ValueError, match="hash_length=1 are too many"):
        text_problem(200, queries=1, hops=1, hash_length=1)
