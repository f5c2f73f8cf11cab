"""Text from a model, token by token: one that `aftermax compare` trained, or a Hugging Face folder.

Reading is `read`: the tokens that are new, after all that the state holds. A model of the lab keeps
what its system keeps (`init_state`, `step`): a linear one a state of one size, the others keys and
values. A Hugging Face model keeps its own cache.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

import torch
from rich.console import Console
from torch import Tensor

from aftermax.lab.speakers import OfHuggingFace, OfRun
from aftermax.lab.trained import find

PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Control characters, which a terminal would obey, as the pictures that Unicode has of them."""


class Language(Protocol):
    """A model with its tokens."""

    name: str
    ends: frozenset[int]
    """Tokens after which there is nothing more to say."""
    room: int | None
    """Tokens that the model can hold; None = any number."""

    def encode(self, text: str) -> list[int]: ...

    def read(self, tokens: list[int]) -> Tensor:
        """The next tokens, after what was read before: logits (V,), float32, of what follows."""
        ...

    def write(self, token: int) -> str:
        """The characters that are whole now."""
        ...

    def rest(self) -> str:
        """What is left of a character that was never whole."""
        ...

    @property
    def state_bytes(self) -> int: ...

    def explain(self, tokens: int, held: int) -> str:
        """Which way attention goes for so many new tokens, after so many that are held."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits x.

    p = softmax(x / temperature) over the `top_k` largest logits; of these the likeliest whose sum
    is `top_p` at least (nucleus sampling, Holtzman et al., arXiv 1904.09751). At temperature 0 it
    is the largest logit, the first of equals.

    Args:
        seed: of the draws; the same seed draws the same tokens.

    Raises:
        ValueError: for numbers out of range.

    >>> logits = torch.tensor([1.0, 3.0, 2.0])
    >>> Sampling(temperature=0).choose(logits, torch.Generator())
    1
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a probability above 0, got {self.top_p}")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        values, tokens = logits.topk(min(self.top_k or len(logits), len(logits)))  # falling
        p = ((values - values[0]) / self.temperature).softmax(0)  # finite, however cold it is
        before = p.cumsum(0) - p
        p = p.masked_fill(before >= self.top_p, 0)
        return int(tokens[torch.multinomial(p, 1, generator=generator)])


@dataclass
class Spent:
    """What a generation took."""

    prompt: int = 0
    """Tokens."""
    prompt_seconds: float = 0.0
    new: int = 0
    read: int = 0
    """Of the new tokens, those that were read again for the next one."""
    seconds: float = 0.0
    """Of reading and choosing those."""
    end: str = ""


def generate(
    language: Language, prompt: str, sampling: Sampling, count: int, spent: Spent
) -> Iterator[str]:
    """Pieces of text, as soon as they are whole; `spent` is filled on the way.

    Raises:
        ValueError: for a prompt that the model has no room for, and for a model that gives NaN.
    """
    tokens = language.encode(prompt)
    if language.room is not None and len(tokens) >= language.room:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens, and {language.name} has room for {language.room}"
        )
    generator = torch.Generator().manual_seed(sampling.seed)
    began = time.perf_counter()
    logits = language.read(tokens)
    spent.prompt, spent.prompt_seconds = len(tokens), time.perf_counter() - began
    spent.end = "as many tokens as were asked for"
    for left in reversed(range(count)):
        began = time.perf_counter()
        if logits.isnan().any():
            raise ValueError(f"{language.name} gives NaN after {spent.prompt + spent.new} tokens")
        token = sampling.choose(logits, generator)
        if token in language.ends:
            spent.end = "the model ended the text"
            break
        spent.new += 1
        yield language.write(token)
        if left and spent.prompt + spent.new == language.room:
            spent.end = f"the model's room of {language.room} tokens is full"
            break
        if left:
            logits = language.read([token])
            spent.read += 1
            spent.seconds += time.perf_counter() - began
    yield language.rest()


def main(
    model: Path,
    prompt: str,
    *,
    run: str | None = None,
    system: str | None = None,
    attention: str | None = None,
    max_new_tokens: int,
    sampling: Sampling,
    dtype: str = "float32",
    threads: int | None = None,
    impl: str | None = None,
) -> None:
    """`aftermax generate`: text to standard output, what it took to standard error.

    Raises:
        ValueError, OSError: for what cannot be.
        SystemExit: 130 after Ctrl-C, 141 where no one reads the text any more.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    language = open_language(model, run, system, attention, getattr(torch, dtype), impl)
    if prompt == "-":
        prompt = sys.stdin.read()
    spent, code = Spent(), 0
    try:
        show(generate(language, prompt, sampling, max_new_tokens, spent), sys.stdout)
    except KeyboardInterrupt:
        spent.end, code = "Ctrl-C", 130
        with contextlib.suppress(BrokenPipeError):
            show(iter([language.rest()]), sys.stdout)
    except BrokenPipeError:
        spent.end, code = "no one reads any more", 141
        # what Python would flush at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    report(language, spent, dtype, Console(stderr=True))
    if code:
        raise SystemExit(code)


def open_language(
    path: Path,
    run: str | None,
    system: str | None,
    attention: str | None,
    dtype: torch.dtype,
    impl: str | None,
) -> OfRun | OfHuggingFace:
    """What the path holds, ready to read.

    Raises:
        ValueError, OSError: saying what there is instead.
    """
    if path.is_dir() and ((path / "config.json").exists() or any(path.glob("*.gguf"))):
        if run or system or impl:
            raise ValueError(
                f"{path} is a Hugging Face folder: --run, --system and --impl are of what "
                "`aftermax compare` trains; --attention says what a model there runs"
            )
        return OfHuggingFace.open(path, attention, dtype)
    trained = find(path, run, system)
    if attention is not None:
        raise ValueError(
            f"{trained.name} runs what it was trained with; --attention is of Hugging Face folders"
        )
    return OfRun.open(trained, dtype, impl)


def show(pieces: Iterator[str], to: TextIO) -> None:
    """Each piece at once. A terminal gets no control characters, and a line of its own after it."""
    terminal, last = to.isatty(), "\n"
    try:
        for piece in pieces:
            if piece:
                text = piece.translate(PICTURES) if terminal else piece
                encoding = to.encoding or "utf-8"
                to.write(text.encode(encoding, "replace").decode(encoding))
                to.flush()
                last = text[-1]
    finally:
        if terminal and last != "\n":
            to.write("\n")
            to.flush()


def report(language: Language, spent: Spent, dtype: str, console: Console) -> None:
    """Speed, the ways that attention went, and the state."""
    held = spent.prompt + spent.read
    prompt, new = language.explain(spent.prompt, 0), language.explain(1, held)
    lines = [
        f"{language.name}, {dtype}, threads: {torch.get_num_threads()}",
        f"prompt: {_speed(spent.prompt, spent.prompt_seconds)}; {prompt}",
        f"new:    {_speed(spent.read, spent.seconds)}; {new}",
        f"state:  {language.state_bytes / 1024:,.1f} KiB after {held:,} tokens",
        f"end:    {spent.end} ({spent.new:,} new)",
    ]
    for line in lines:
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def _speed(tokens: int, seconds: float) -> str:
    rate = f"{tokens / seconds:,.0f} tokens/s" if tokens and seconds else "not measured"
    return f"{tokens:,} token{'s' * (tokens != 1)} in {seconds:.3g} s, {rate}"
