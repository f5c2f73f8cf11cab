"""Texts -> vectors: a weighted bag of words, a small transformer, or a sentence encoder of others.

A reader makes from a prepared set what its encoder takes, so that each encoder reads texts in a
form of its own.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aftermax.lab.data.labelled import LabelledTexts
from aftermax.lab.data.ragged import Ragged
from aftermax.lab.models import Branch, SwiGLU
from aftermax.modules import Attention

if TYPE_CHECKING:
    from aftermax.lab.labels_work import LabelsWork


class Reader(Protocol):
    """The texts of a set in the form that one encoder takes."""

    def documents(self, split: str, rows: Tensor) -> Any: ...
    def labels(self, rows: Tensor | None = None) -> Any:
        """Of all labels, or of some."""
        ...

    def encoder(self, work: LabelsWork) -> nn.Module:
        """What it makes -> (B, width), before the first step."""
        ...


def reader(work: LabelsWork, held: LabelledTexts) -> Reader:
    """As `work.encoder` says."""
    if work.encoder == "transformer":
        return TokenReader(held, work.words)
    if work.sentences is None:
        return BagReader(held)
    vectors = VectorReader(held, work.sentences)
    return vectors if work.encoder == work.sentences else BothReader(BagReader(held), vectors)


class Bag(NamedTuple):
    """Words of each text with their weights, as `torch.nn.functional.embedding_bag` takes them."""

    words: Tensor  # int64 (N,)
    starts: Tensor  # int64 (B,)
    weights: Tensor  # float32 (N,)


class BagReader:
    """TF-IDF, rows of length one; or the values that the set came with."""

    def __init__(self, held: LabelledTexts):
        self.vocabulary = held.vocabulary
        self.splits = {
            split: held.features(documents.tokens, documents.weights)
            for split, documents in held.splits.items()
        }
        tokens = held.label_tokens
        self.of_labels = None if tokens is None else held.features(tokens)

    def documents(self, split: str, rows: Tensor) -> Bag:
        return _bag(*self.splits[split], rows)

    def labels(self, rows: Tensor | None = None) -> Bag:
        words, weights = _given(self.of_labels)
        return _bag(words, weights, torch.arange(words.size) if rows is None else rows)

    def encoder(self, work: LabelsWork) -> BagEncoder:
        return BagEncoder(self.vocabulary, work.width, work.word_dropout)


def _bag(words: Ragged, weights: Tensor, rows: Tensor) -> Bag:
    places, lengths = words.places(rows)
    return Bag(words.values[places].long(), lengths.cumsum(0) - lengths, weights[places])


class BagEncoder(nn.Module):
    """x = sum_w weight_w e_w over the words of a text, dropped at random in training."""

    def __init__(self, vocabulary: int, width: int, dropout: float):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(vocabulary, width) / width**0.5)
        self.dropout = dropout

    def forward(self, bag: Bag) -> Tensor:
        """-> (B, width)."""
        weights = bag.weights
        if self.training and self.dropout:
            weights = weights * (torch.rand_like(weights) >= self.dropout)
        return F.embedding_bag(
            bag.words, self.embed, bag.starts, mode="sum", per_sample_weights=weights
        )


class TokenReader:
    """The first words of each text, -1 after its end."""

    def __init__(self, held: LabelledTexts, context: int):
        if any(documents.weights is not None for documents in held.splits.values()):
            raise ValueError(
                f"{held.name} has bags of features, and no texts that a transformer could read; "
                "--encoder bag takes it"
            )
        self.held, self.context = held, context

    def documents(self, split: str, rows: Tensor) -> Tensor:
        return self.held.splits[split].tokens.padded(rows, longest=self.context)

    def labels(self, rows: Tensor | None = None) -> Tensor:
        return _given(self.held.label_tokens).padded(rows, longest=self.context)

    def encoder(self, work: LabelsWork) -> TransformerEncoder:
        return TransformerEncoder(
            self.held.vocabulary, work.width, work.layers, work.heads, work.word_dropout
        )


class TransformerEncoder(nn.Module):
    """Pre-norm encoder with RoPE, softmax attention, SwiGLU and mean pooling, from scratch."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.embed = nn.Embedding(vocabulary + 1, width, padding_idx=vocabulary)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.dropout = dropout
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                Branch(layer, width, hybrid_norm=False, layer_scale=False)
                for layer in (
                    Attention(width, heads, causal=False, qk_norm=True),
                    SwiGLU(width),
                )
            )
            for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) words, -1 = none -> (B, width)."""
        there = tokens >= 0
        if self.training and self.dropout:
            there = there & (torch.rand(tokens.shape) >= self.dropout)
        x = self.embed(tokens.where(there, self.embed.num_embeddings - 1))
        for attend, feed in self.blocks:  # type: ignore[misc]
            x = attend.add(x, attend.layer(attend.before(x), there))
            x = feed(x)
        seen = there[..., None]
        return (self.norm(x) * seen).sum(1) / seen.sum(1).clamp_min(1)


class VectorReader:
    """What a sentence encoder makes of each text, once; the encoder itself stays as it is."""

    def __init__(self, held: LabelledTexts, encoder: str):
        self.vectors = load_file(_encoded(held, encoder))
        self.width = self.vectors["train"].shape[1]

    def documents(self, split: str, rows: Tensor) -> Tensor:
        return self.vectors[split][rows]

    def labels(self, rows: Tensor | None = None) -> Tensor:
        vectors = _given(self.vectors.get("labels"))
        return vectors if rows is None else vectors[rows]

    def encoder(self, work: LabelsWork) -> nn.Linear:
        return nn.Linear(self.width, work.width)


class BothReader:
    """The words of a text, and what a sentence encoder makes of it."""

    def __init__(self, words: BagReader, sentences: VectorReader):
        self.words, self.sentences = words, sentences

    def documents(self, split: str, rows: Tensor) -> tuple[Bag, Tensor]:
        return self.words.documents(split, rows), self.sentences.documents(split, rows)

    def labels(self, rows: Tensor | None = None) -> tuple[Bag, Tensor]:
        return self.words.labels(rows), self.sentences.labels(rows)

    def encoder(self, work: LabelsWork) -> SumEncoder:
        return SumEncoder(self.words.encoder(work), self.sentences.encoder(work))


class SumEncoder(nn.Module):
    """The sum of what two encoders make of the two forms of a text."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, texts: tuple[Any, Any]) -> Tensor:
        return self.first(texts[0]) + self.second(texts[1])


def encode_once(held: LabelledTexts, encoder: str) -> None:
    """The vectors of all texts by a model of sentence-transformers, kept beside the set.

    Raises:
        ValueError: where the set has no texts, or the library or the model is not there.
    """
    path = _encoded(held, encoder)
    if path.exists():
        return
    if held.splits["train"].texts is None:
        raise ValueError(f"{held.name} has no texts for {encoder} to read; --encoder bag takes it")
    model = _sentence_transformer(encoder)
    texts = {split: documents.texts for split, documents in held.splits.items()}
    texts["labels"] = held.label_texts
    vectors = {
        name: model.encode(given, convert_to_tensor=True, show_progress_bar=True).float().cpu()
        for name, given in texts.items()
        if given is not None
    }
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    save_file(vectors, scratch)
    scratch.replace(path)


def _sentence_transformer(encoder: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore
    except ImportError as error:
        raise ValueError(
            f"--encoder {encoder} needs sentence-transformers: pip install 'aftermax[sentences]' "
            f"({error}); bag and transformer need nothing"
        ) from None
    try:
        return SentenceTransformer(encoder, device="cpu", local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--encoder {encoder}: neither bag nor transformer, and no model of "
            f"sentence-transformers on this disk ({str(error).splitlines()[0]})"
        ) from None


def _encoded(held: LabelledTexts, encoder: str) -> Path:
    name = hashlib.sha256(encoder.encode()).hexdigest()[:12]
    return held.folder / f"encoded-{name}.safetensors"


def _given(of_labels: Any) -> Any:
    if of_labels is None:
        raise ValueError("these labels have no texts, which a dual encoder reads them by")
    return of_labels
