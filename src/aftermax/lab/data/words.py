"""Documents -> a stream of words, the most frequent first in the vocabulary, split by document."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aftermax.lab.data.corpus import SPLITS, split_documents
from aftermax.lab.data.debian_packages import descriptions, has_lists
from aftermax.lab.data.folder import write_once
from aftermax.lab.data.sources import Document, read_documents

UNKNOWN, END = "<unknown>", "<end>"
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, eq=False)
class Words:
    """Word ids of each split, documents one after the other; an id is a rank in frequency."""

    folder: Path
    name: str
    digest: str
    vocabulary: tuple[str, ...]
    counts: Tensor  # int64 (V,), in the training split
    streams: dict[str, Tensor]  # int32 (N,)

    @classmethod
    def open(cls, folder: Path) -> Words:
        meta = json.loads((folder / "meta.json").read_text())
        held = load_file(folder / "words.safetensors")
        vocabulary = tuple((folder / "vocabulary.txt").read_text(encoding="utf-8").split("\n"))
        streams = {split: held[split] for split in SPLITS}
        return cls(folder, meta["name"], meta["digest"], vocabulary, held["counts"], streams)

    @cached_property
    def unknown(self) -> int:
        return self.vocabulary.index(UNKNOWN)

    def known(self, split: str) -> Tensor:
        """Places of the words that can be asked for."""
        return (self.streams[split] != self.unknown).nonzero()[:, 0]

    def random_windows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """(count, length) windows of the training stream whose last word is known."""
        stream = self.streams["train"]
        starts = torch.randint(0, len(stream) - length + 1, (2 * count,), generator=generator)
        known = stream[starts + length - 1] != self.unknown
        starts = torch.cat([starts[known], starts[~known]])[:count]
        return stream[starts[:, None] + torch.arange(length)].long()

    def held_out_windows(self, split: str, count: int, length: int) -> Tensor:
        """(count, length) windows, evenly spaced, whose last word is known."""
        stream = self.streams[split]
        last = self.known(split)
        last = last[last >= length - 1]
        if not len(last):
            raise ValueError(f"{self.name}: its {split} part has no word that training knows")
        chosen = last[torch.linspace(0, len(last) - 1, min(count, len(last))).long()]
        return stream[chosen[:, None] + torch.arange(1 - length, 1)].long()


def prepare(data: Path | None, least: int, shortest: int, out: Path) -> Words:
    """Read, split and number once; a later call with the same text opens what is there.

    Args:
        data: a text file or a folder of them; or a folder of apt's lists, of which the descriptions
            of packages are read; None = this machine's lists.
        least: a word that the training split has less often is unknown.
        shortest: words that each split must hold.
        out: folder of all data; this one gets a folder named by its digest.

    Raises:
        ValueError, OSError: before anything is kept, saying what is wrong with the data.
    """
    packages = data is None or has_lists(data)
    documents = _of_packages(data) if packages else _split(read_documents(data))
    digest = _digest(documents, least)
    folder = out / digest
    if not folder.exists():
        name = "Debian's package descriptions" if packages else str(data)
        splits = {split: [_words(d) for d in parts] for split, parts in documents.items()}
        for split, parts in splits.items():
            if (found := sum(map(len, parts))) < shortest:
                raise ValueError(
                    f"{name} is too short: its {split} part has {found} words, at least {shortest} "
                    "are needed"
                )
        meta = {"name": name, "digest": digest}
        write_once(folder, lambda scratch: _write(splits, least, meta, scratch))
    return Words.open(folder)


def _of_packages(lists: Path | None) -> dict[str, list[Document]]:
    found = descriptions(lists)
    return {split: found["test" if split == "validation" else split] for split in SPLITS}


def _split(documents: list[Document]) -> dict[str, list[Document]]:
    """By document; two documents of the same text stand in the same split."""
    first: dict[bytes, Document] = {}
    for document in documents:
        first.setdefault(document.text, document)
    return split_documents(list(first.values()))


def _words(document: Document) -> list[str]:
    return [*WORD.findall(document.text.decode(errors="replace").lower()), END]


def _write(splits: dict[str, list[list[str]]], least: int, meta: dict, folder: Path) -> None:
    seen = Counter(word for words in splits["train"] for word in words)
    rare = sum(count for count in seen.values() if count < least)
    counts = {word: count for word, count in seen.items() if count >= least} | {UNKNOWN: rare}
    vocabulary = sorted(counts, key=lambda word: (-counts[word], word))
    places = {word: place for place, word in enumerate(vocabulary)}
    unknown = places[UNKNOWN]
    tensors = {"counts": torch.tensor([counts[word] for word in vocabulary])}
    for split, parts in splits.items():
        ids = np.fromiter((places.get(w, unknown) for words in parts for w in words), np.int32)
        tensors[split] = torch.from_numpy(ids)
    save_file(tensors, folder / "words.safetensors")
    (folder / "vocabulary.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))


def _digest(splits: dict[str, list[Document]], least: int) -> str:
    content = hashlib.sha256(f"2 {least}".encode())
    for split, documents in splits.items():
        for document in documents:
            head = f"{split} {document.name} {len(document.text)}\n"
            content.update(head.encode() + document.text)
    return content.hexdigest()[:12]
