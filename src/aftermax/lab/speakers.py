"""Models that speak, each with its tokens: a run of `aftermax compare`, a Hugging Face folder."""

from __future__ import annotations

import codecs
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import aftermax
from aftermax.dense import Dense
from aftermax.lab.data.corpus import Corpus
from aftermax.lab.models import DecoderLM
from aftermax.lab.trained import Trained
from aftermax.visible import Visible

LONGEST = 4
"""Bytes of a character, and so tokens that can be waited for until it is whole."""


class OfRun:
    """A decoder of the text task, through `init_state` and `step`.

    What the recall tasks put into the text has symbols of its own, which are no text: they are
    never chosen. The symbol that ends a document ends the text; an empty prompt begins after it.
    """

    def __init__(
        self, name: str, model: DecoderLM, corpus: Corpus, dtype: torch.dtype, impl: str | None
    ):
        self.name, self.model, self.corpus = name, model.to(dtype), corpus
        self.ends = frozenset({corpus.symbols.end})
        self.room: int | None = None
        for attend in model.attentions:
            attend.impl = impl
            if attend.slopes is not None:  # never rounded
                attend.slopes = attend.positions.slopes(attend.heads)
        self.state = model.init_state(1)
        self.bytes_of, self._encode = _byte_tokens(corpus)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @classmethod
    def open(cls, trained: Trained, dtype: torch.dtype, impl: str | None) -> OfRun:
        """Raises ValueError for a run of another task."""
        work = trained.run.work
        if work.task != "text":
            raise ValueError(
                f"{trained.name} is of the task {work.task}, whose models tell no next token of a "
                "text; `aftermax generate` takes runs of --task text, and Hugging Face folders"
            )
        model, corpus = trained.model(), trained.data()
        assert isinstance(model, DecoderLM)
        assert isinstance(corpus, Corpus)
        step, steps = trained.step, trained.run.steps
        unfinished = "" if step == steps else f" (step {step} of {steps})"
        return cls(trained.name + unfinished, model, corpus, dtype, impl)

    def encode(self, text: str) -> list[int]:
        return self._encode(text) if text else [self.corpus.symbols.end]

    @torch.inference_mode()
    def read(self, tokens: list[int]) -> Tensor:
        hidden, self.state = self.model.step(torch.tensor([tokens]), self.state)
        logits = self.model.logits(hidden[:, -1])[0].float()
        logits[self.corpus.symbols.end + 1 :] = -torch.inf
        return logits

    def write(self, token: int) -> str:
        return self.decoder.decode(self.bytes_of(token))

    def rest(self) -> str:
        return self.decoder.decode(b"", final=True)

    @property
    def state_bytes(self) -> int:
        return sum(held.bytes for held in self.state)

    def explain(self, tokens: int, held: int) -> str:
        attend = self.model.attentions[0]
        like = self.model.embed.weight
        query = like.new_zeros(1, attend.heads, tokens, attend.head_dim)
        system, impl = attend.system, attend.impl
        if not isinstance(system, Dense):
            if impl:
                return f"{impl}: asked for"
            key = query[:, : attend.kv_heads]
            return system.explain(query, key, key, Visible(causal=True))  # type: ignore[attr-defined]
        key = like.new_zeros(1, attend.kv_heads, held + tokens, attend.head_dim)
        return aftermax.explain(
            query,
            key,
            key,
            weights=system.weights,
            attn_mask=replace(attend.what_is_visible(None), offset=held),
            enable_gqa=True,
            impl=impl,
            **attend.learned,  # type: ignore[arg-type]
        )


def _byte_tokens(corpus: Corpus) -> tuple[Callable[[int], bytes], Callable[[str], list[int]]]:
    """The bytes of a token, and the tokens of a text."""
    model = corpus.folder / "tokenizer.json"
    if not model.exists():
        return lambda token: bytes([token]), lambda text: list(text.encode("utf-8", "replace"))
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(model))
    byte_of = byte_letters()
    return (
        lambda token: bytes(byte_of[character] for character in bpe.id_to_token(token) or ""),
        lambda text: bpe.encode(text.encode("utf-8", "replace").decode()).ids,
    )


def byte_letters() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as: printable ones stand for themselves, the
    others for the characters from U+0100 on, in order (GPT-2's).

    >>> letters = byte_letters()
    >>> letters["a"], letters["Ġ"]
    (97, 32)
    """
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): b for i, b in enumerate(others)}


class OfHuggingFace:
    """A causal language model of transformers, with its own cache."""

    def __init__(self, name: str, model: Any, tokenizer: Any):
        from aftermax.hf.check import look

        self.name, self.model, self.tokenizer = name, model.eval(), tokenizer
        self.seen = list(look(model)[0].values())
        self.room: int | None = getattr(model.config, "max_position_embeddings", None)
        ends = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
        lists = [end if isinstance(end, list) else [end] for end in ends if end is not None]
        self.ends = frozenset(token for tokens in lists for token in tokens)
        self.cache: Any = None
        takes = inspect.signature(model.forward).parameters
        self.kept = "cache" if "cache" in takes else "past_key_values"  # before transformers 5.24
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.text = Held(self._decode)

    @classmethod
    def open(cls, path: Path, attention: str | None, dtype: torch.dtype) -> OfHuggingFace:
        """Raises ValueError, OSError for folders that hold no such model."""
        try:
            from transformers import AutoTokenizer
            from transformers.utils import logging

            from aftermax.hf import load
        except ImportError as error:
            raise ValueError(f"{path} is a Hugging Face folder: {error}") from None
        logging.disable_progress_bar()
        options: dict[str, Any] = {}
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            files = sorted(file.name for file in path.glob("*.gguf"))
            if len(files) != 1:
                raise ValueError(
                    f"{path} holds no weights (safetensors, bin)"
                    + (f", and several GGUF files: {', '.join(files)}" if files else "")
                )
            options["gguf_file"] = files[0]
        model = load(path, attention, dtype=dtype, **options)
        if not hasattr(model, "generation_config") or model.get_output_embeddings() is None:
            raise ValueError(f"{path}: {type(model).__name__} is no causal language model")
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{path}: {type(model).__name__} reads one text, or sound, and writes another, and "
                "does not continue a prompt"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} holds no tokenizer that can be read: {error}") from None
        return cls(f"{path.name} ({type(model).__name__})", model, tokenizer)

    def _decode(self, tokens: list[int]) -> str:
        """Without cleaning up, which takes away spaces that are written already."""
        return self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def encode(self, text: str) -> list[int]:
        tokens = self.tokenizer(text)["input_ids"]
        if not tokens and self.tokenizer.bos_token_id is None:
            raise ValueError(f"{self.name} has no token that begins a text: give a --prompt")
        tokens = tokens or [self.tokenizer.bos_token_id]
        self.text.before = tokens[-LONGEST:]
        return tokens

    @torch.inference_mode()
    def read(self, tokens: list[int]) -> Tensor:
        options = {self.kept: self.cache, "use_cache": True, **self.last}
        out = self.model(input_ids=torch.tensor([tokens]), **options)
        self.cache = out[self.kept]
        return out.logits[0, -1].float()

    def write(self, token: int) -> str:
        return self.text.write(token)

    def rest(self) -> str:
        return self.text.rest()

    @property
    def state_bytes(self) -> int:
        return sum(_bytes_of(layer) for layer in getattr(self.cache, "layers", []))

    def explain(self, tokens: int, held: int) -> str:
        from aftermax.hf.masks import visible_of
        from aftermax.hf.recurrent import is_carried

        first = self.seen[0]
        if is_carried(first.module):  # the state stands for all that is held
            held = 0
        query = torch.zeros(1, first.heads, tokens, first.key_dim, dtype=self.model.dtype)
        key = query.new_zeros(1, first.heads, held + tokens, first.key_dim)
        value = query.new_zeros(1, first.heads, held + tokens, first.value_dim)
        visible = visible_of(None, tokens, held + tokens, causal=True)
        if not isinstance(first.system, Dense):
            return first.system.explain(query, key, value, visible)  # type: ignore[attr-defined]
        weights = first.system.weights
        return aftermax.explain(query, key, value, weights=weights, attn_mask=visible)


def _bytes_of(layer: Any) -> int:
    """Of a layer of a cache: one with a state knows, the others hold keys and values."""
    if hasattr(layer, "bytes"):
        return layer.bytes
    held = [x for x in vars(layer).values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in held)


class Held:
    """Tokens to text by a tokenizer that only knows to decode a list of them: what stands after
    the last whole character is held back, for as long as a character can be.

    >>> held = Held(lambda tokens: bytes(tokens).decode(errors="replace"))
    >>> [held.write(byte) for byte in "né".encode()]
    ['n', '', 'é']
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode = decode
        self.before: list[int] = []
        """Written; some tokens are decoded differently at the beginning of a text."""
        self.held: list[int] = []

    def write(self, token: int) -> str:
        self.held.append(token)
        text = self._text()
        if text.endswith("\ufffd") and len(self.held) < LONGEST:
            return ""
        return self._written(text)

    def rest(self) -> str:
        return self._written(self._text()) if self.held else ""

    def _text(self) -> str:
        return self.decode(self.before + self.held)[len(self.decode(self.before)) :]

    def _written(self, text: str) -> str:
        self.before, self.held = self.held, []
        return text
