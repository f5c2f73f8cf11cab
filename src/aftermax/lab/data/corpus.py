"""Documents -> tokens on disk, split by file, read through a memory map."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aftermax.lab.data.folder import write_once
from aftermax.lab.data.sources import Document, read_documents

SPLITS = {"validation": 0.08, "tune": 0.04, "train": 0.88}
"""Shares of the bytes: what is reported, what the learning rate is chosen by, what is learned."""

PLACES, DIGITS = 5, 10
"""A passkey's places, and the digits that each place has of its own."""
LETTERS = 32
"""Symbols that the keys and values of MQAR are made of."""


@dataclass(frozen=True)
class Symbols:
    """Token ids after the text's own: the end of a document, and the symbols of the recall tasks.

    The tasks have symbols of their own so that they are the same task under bytes and BPE.
    """

    text: int

    @property
    def end(self) -> int:
        return self.text

    @property
    def mark(self) -> int:
        return self.text + 1

    @property
    def digits(self) -> int:
        """The first digit of the first place."""
        return self.text + 2

    @property
    def letters(self) -> int:
        """The first of them."""
        return self.digits + PLACES * DIGITS

    @property
    def total(self) -> int:
        return self.letters + LETTERS


@dataclass(frozen=True)
class Corpus:
    """Tokenised splits in a folder. Cheap to open; every worker opens its own."""

    folder: Path
    name: str
    digest: str
    symbols: Symbols

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        meta = json.loads((folder / "meta.json").read_text())
        return cls(folder, meta["name"], meta["digest"], Symbols(meta["text"]))

    def tokens(self, split: str) -> np.ndarray:
        return np.memmap(self.folder / f"{split}.tokens", dtype=np.uint16, mode="r")

    def documents(self, split: str) -> list[tuple[int, int]]:
        """[start, stop) of each document in the split's tokens, without its end symbol."""
        return json.loads((self.folder / f"{split}.documents.json").read_text())

    def random_windows(self, split: str, count: int, length: int, generator) -> Tensor:
        """(count, length) int64 windows from anywhere in a split, across documents."""
        tokens = self.tokens(split)
        starts = torch.randint(0, len(tokens) - length + 1, (count,), generator=generator)
        windows = np.stack([tokens[s : s + length] for s in starts.tolist()])
        return torch.from_numpy(windows.astype(np.int64))

    def held_out_windows(self, split: str, count: int, length: int, seed: int = 0) -> Tensor:
        """(count, length) windows that each lie inside one document, the same for every caller."""
        tokens = self.tokens(split)
        rooms = [(a, b) for a, b in self.documents(split) if b - a >= length]
        if not rooms:
            longest = max(b - a for a, b in self.documents(split))
            need, remedy = "one context", "give longer texts"
            if split == "validation":
                need, remedy = "the longest evaluation", "ask for smaller --multiples"
            raise ValueError(
                f"no {split} document of {self.name} has the {length} tokens that {need} needs "
                f"(the longest has {longest}); {remedy}"
            )
        generator = torch.Generator().manual_seed(seed)
        places = torch.tensor([b - a - length + 1 for a, b in rooms], dtype=torch.float64)
        chosen = torch.multinomial(places, count, replacement=True, generator=generator)
        shift = torch.rand(count, generator=generator, dtype=torch.float64) * places[chosen]
        starts = [
            rooms[c][0] + int(s) for c, s in zip(chosen.tolist(), shift.tolist(), strict=True)
        ]
        return torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64))


def prepare(
    data: Path | None,
    tokenizer: Literal["bytes", "bpe"],
    vocabulary: int,
    shortest: int,
    longest: int,
    out: Path,
) -> Corpus:
    """Read, split and tokenise once; a later call with the same text opens what is there.

    Args:
        data, tokenizer, vocabulary: as in `Work`.
        shortest: tokens that each split must hold at least (one training window).
        longest: tokens that one held-out document must hold at least (one evaluation window).
        out: folder of all corpora; this one gets a folder named by its digest.

    Raises:
        ValueError, OSError: before anything is kept, saying what is wrong with the data.
    """
    documents = read_documents(data)
    digest = _digest(documents, tokenizer, vocabulary)
    folder = out / digest

    def write(scratch: Path) -> None:
        _write(documents, data, digest, tokenizer, vocabulary, scratch)
        _check(Corpus.open(scratch), shortest, longest)

    write_once(folder, write)
    corpus = Corpus.open(folder)
    _check(corpus, shortest, longest)
    return corpus


def _check(corpus: Corpus, shortest: int, longest: int) -> None:
    for split in SPLITS:
        if len(corpus.tokens(split)) < shortest:
            raise ValueError(
                f"{corpus.name} is too short: its {split} part has {len(corpus.tokens(split))} "
                f"tokens, one context needs {shortest}"
            )
    corpus.held_out_windows("tune", 1, shortest)
    corpus.held_out_windows("validation", 1, longest)


def _write(documents, data, digest, tokenizer, vocabulary, folder: Path) -> None:
    splits = split_documents(documents)
    encode, text_vocabulary, model = _tokenizer(tokenizer, vocabulary, splits["train"])
    symbols = Symbols(text_vocabulary)
    counts = {}
    for split, parts in splits.items():
        stream, places, position = [], [], 0
        for part in parts:
            ids = encode(part.text)
            places.append((position, position + len(ids)))
            stream.append(np.append(ids, symbols.end).astype(np.uint16))
            position += len(ids) + 1
        (np.concatenate(stream) if stream else np.empty(0, np.uint16)).tofile(
            folder / f"{split}.tokens"
        )
        (folder / f"{split}.documents.json").write_text(json.dumps(places))
        counts[split] = position
    if model is not None:
        (folder / "tokenizer.json").write_text(model)
    size = sum(len(d.text) for d in documents)
    meta = {
        "name": "the Python standard library" if data is None else str(data),
        "digest": digest,
        "text": text_vocabulary,
        "tokenizer": tokenizer,
        "files": len(documents),
        "bytes": size,
        "tokens": counts,
        "bytes_per_token": size / max(1, sum(counts.values())),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))


def split_documents(documents: list[Document]) -> dict[str, list[Document]]:
    """By file, in an order that a digest of the names decides; few files are cut in pieces.

    One file is cut into three regions instead, so that a single text can be used.
    """
    if len(documents) < 3:
        return _cut(documents)
    order = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).hexdigest())
    total = sum(len(d.text) for d in documents)
    splits: dict[str, list[Document]] = {}
    for split, share in list(SPLITS.items())[:-1]:
        splits[split] = [order.pop()]
        while len(order) > 2 and sum(len(d.text) for d in splits[split]) < share * total:
            splits[split].append(order.pop())
    splits["train"] = order
    return splits


def _cut(documents: list[Document]) -> dict[str, list[Document]]:
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        start, share = 0, 0.0
        for split in reversed(SPLITS):
            share += SPLITS[split]
            stop = _between_characters(document.text, round(share * len(document.text)))
            splits[split].append(Document(f"{document.name}:{split}", document.text[start:stop]))
            start = stop
    return splits


def _between_characters(text: bytes, place: int) -> int:
    """The first place from this one on that is not within a UTF-8 character."""
    while place < len(text) and text[place] & 0xC0 == 0x80:
        place += 1
    return place


def _digest(documents: list[Document], tokenizer: str, vocabulary: int) -> str:
    content = hashlib.sha256(f"1 {tokenizer} {vocabulary if tokenizer == 'bpe' else 256}".encode())
    for document in documents:
        content.update(f"{document.name} {len(document.text)}\n".encode() + document.text)
    return content.hexdigest()[:12]


def _tokenizer(kind: str, vocabulary: int, train: list[Document]):
    """(bytes -> ids, number of ids, serialised model or None)."""
    if kind == "bytes":
        return lambda text: np.frombuffer(text, np.uint8).astype(np.uint16), 256, None
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not 256 <= vocabulary <= 65000:
        raise ValueError(f"a BPE vocabulary has 256 to 65000 tokens, got {vocabulary}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator((d.text.decode() for d in train), trainer)

    def encode(text: bytes) -> np.ndarray:
        return np.array(bpe.encode(text.decode(errors="replace")).ids, np.uint16)

    return encode, bpe.get_vocab_size(), bpe.to_str()
