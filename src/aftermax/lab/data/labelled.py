"""Texts (or bags of features) with many labels each -> three splits on disk, in one form."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aftermax.lab.data.folder import write_once
from aftermax.lab.data.ragged import Ragged
from aftermax.lab.data.vocabulary import Vocabulary, words_of

SPLITS = ("train", "tune", "test")
"""What is learned, what settings are chosen by, what is reported."""

NO_PAIRS = torch.empty(0, 2, dtype=torch.int64)


class Raw(NamedTuple):
    """One split, as a source reads it: texts, or features with their values."""

    labels: Ragged
    """Ids of the source's labels."""
    texts: list[str] | None = None
    features: Ragged | None = None
    weights: Tensor | None = None
    """float32, one for each value of `features`."""
    forbidden: Tensor = NO_PAIRS
    """int64 (M, 2): (document, label) pairs that no ranking is asked about."""

    def rows(self, kept: Tensor) -> Raw:
        """These documents alone."""
        renumbered = torch.full((self.labels.size,), -1, dtype=torch.int64)
        renumbered[kept] = torch.arange(len(kept))
        forbidden = torch.stack((renumbered[self.forbidden[:, 0]], self.forbidden[:, 1]), 1)
        features = weights = None
        if self.features is not None and self.weights is not None:
            weights = self.weights[self.features.places(kept)[0]]
            features = self.features.rows(kept)
        return Raw(
            self.labels.rows(kept),
            None if self.texts is None else [self.texts[i] for i in kept.tolist()],
            features,
            weights,
            forbidden[forbidden[:, 0] >= 0],
        )


@dataclass(frozen=True, eq=False)
class Source:
    """What a reader of some format hands over."""

    name: str
    labels: list[str]
    """Their names."""
    splits: dict[str, Raw]
    label_texts: list[str] | None = None
    features: int = 0
    """How many there are, where the documents are bags of features."""
    propensity: tuple[float, float] = (0.55, 1.5)
    """(A, B), see `inverse_propensities`."""
    counted: tuple[str, ...] = ("train",)
    """Splits that the label frequencies of the propensities are counted in."""
    about: dict = field(default_factory=dict)
    """What else to say of it; not part of the digest."""


@dataclass(frozen=True, eq=False)
class Documents:
    """One split of a prepared set; document i has tokens row i and labels row i."""

    tokens: Ragged
    """Ids of words in the order of the text, then of pairs where the set has them; or features."""
    weights: Tensor | None
    """float32, a value for each of `tokens.values`, where the set came as features."""
    labels: Ragged
    """Ids, rising within a row; no row is empty."""
    forbidden: Tensor
    """int64 (M, 2), sorted: (document, label) pairs to take out of a ranking before it is scored
    (an item that is its own label, and the like)."""
    file: Path | None
    """Its texts, a JSON string on each line."""

    def __len__(self) -> int:
        return self.labels.size

    @cached_property
    def texts(self) -> list[str] | None:
        """Read when first asked for; None where the set has none."""
        return None if self.file is None else _read_lines(self.file)


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """A prepared set, from its folder."""

    folder: Path
    name: str
    digest: str
    about: dict
    """Counts of documents, labels, pairs; what was dropped; what the source says of itself."""
    vocabulary: int
    """Token ids are below it."""
    unigrams: int
    """Ids from here on are pairs of neighbouring words."""
    idf: Tensor
    """float32 (vocabulary,): log((1 + N) / (1 + documents with it)) + 1 over the training split."""
    labels: int
    label_tokens: Ragged | None
    """Of each label's text, by the vocabulary of the documents; None where there are no texts. A
    row may be empty."""
    splits: dict[str, Documents]
    frequencies: Tensor
    """int64 (labels,): training documents that bear each label."""
    inverse_propensities: Tensor
    """float64 (labels,)."""

    @classmethod
    def open(cls, folder: Path) -> LabelledTexts:
        meta = json.loads((folder / "meta.json").read_text())
        held = load_file(folder / "documents.safetensors")

        def ragged(name: str) -> Ragged | None:
            if f"{name}.values" not in held:
                return None
            return Ragged(held[f"{name}.values"], held[f"{name}.offsets"])

        splits = {}
        for split in SPLITS:
            tokens, labels = ragged(f"{split}.tokens"), ragged(f"{split}.labels")
            assert tokens is not None
            assert labels is not None
            texts = folder / f"{split}.texts.jsonl"
            splits[split] = Documents(
                tokens,
                held.get(f"{split}.weights"),
                labels,
                held[f"{split}.forbidden"],
                texts if texts.exists() else None,
            )
        counted = [splits[split].labels for split in meta["counted"]]
        count = meta["labels"]
        return cls(
            folder,
            meta["name"],
            meta["digest"],
            meta["about"],
            meta["vocabulary"],
            meta["unigrams"],
            held["idf"],
            count,
            ragged("label_tokens"),
            splits,
            label_frequencies([splits["train"].labels], count),
            inverse_propensities(
                label_frequencies(counted, count),
                sum(labels.size for labels in counted),
                *meta["propensity"],
            ),
        )

    @property
    def forbidden(self) -> Tensor:
        """Of the test split."""
        return self.splits["test"].forbidden

    @cached_property
    def words(self) -> list[str] | None:
        """The words of the ids; None for features."""
        file = self.folder / "words.jsonl"
        return _read_lines(file) if file.exists() else None

    @cached_property
    def label_names(self) -> list[str]:
        return _read_lines(self.folder / "labels.jsonl")

    @cached_property
    def label_texts(self) -> list[str] | None:
        file = self.folder / "label_texts.jsonl"
        return _read_lines(file) if file.exists() else None

    def features(self, tokens: Ragged, weights: Tensor | None = None) -> tuple[Ragged, Tensor]:
        """TF-IDF: (1 + ln count) idf of each token that a row has, rows of length one.

        Args:
            tokens: rows of ids.
            weights: values that the set came with; they are summed and take the place of TF-IDF.

        Returns:
            Ids, rising within a row, each once, and float32 values for them.
        """
        keys = tokens.owners * self.vocabulary + tokens.values
        distinct, which = keys.unique(return_inverse=True)
        owners, ids = distinct // self.vocabulary, distinct % self.vocabulary
        given = torch.ones(len(keys)) if weights is None else weights
        values = torch.zeros(len(distinct)).index_add_(0, which, given)
        if weights is None:
            values = (1 + values.log()) * self.idf[ids]
        norms = torch.zeros(tokens.size).index_add_(0, owners, values.square()).sqrt()
        lengths = torch.bincount(owners, minlength=tokens.size)
        return Ragged.by_lengths(ids, lengths), values / norms.clamp_min(1e-30)[owners]


def label_frequencies(rows: Iterable[Ragged], labels: int) -> Tensor:
    """int64 (labels,): documents that bear each."""
    total = torch.zeros(labels, dtype=torch.int64)
    for held in rows:
        total += torch.bincount(held.values, minlength=labels)
    return total


def inverse_propensities(frequencies: Tensor, documents: int, a: float, b: float) -> Tensor:
    """1 / p_l = 1 + C (n_l + B)^-A,  C = (ln N - 1) (B + 1)^A.

    Jain, Prabhu, Varma, "Extreme Multi-label Loss Functions" (KDD 2016), section 5: how probable it
    is that a label which is right was noted. The authors' (A, B) are (0.5, 0.4) for Wikipedia,
    (0.6, 2.6) for Amazon, (0.55, 1.5) elsewhere. C is taken as 0 where N < e.

    Args:
        frequencies: n, (labels,): documents that bear each label.
        documents: N.

    Returns:
        float64 (labels,).

    >>> inverse_propensities(torch.tensor([1, 100]), 1000, 0.55, 1.5)
    tensor([6.9078, 1.7704], dtype=torch.float64)
    """
    c = max(0.0, math.log(max(1, documents)) - 1) * (b + 1) ** a
    return 1 + c * (frequencies.double() + b) ** -a


def prepare(
    source: Source, out: Path, *, least: int = 2, rare: int = 2, bigrams: int = 0
) -> LabelledTexts:
    """Tokenise and write once; a later call with the same content opens what is there.

    Args:
        source: from `debian_packages.read` or `xmc.read`, or your own.
        out: folder of all data; this one gets a folder named by its digest.
        least: labels are kept that so many training documents bear. Documents left with none are
            dropped from every split. 0 keeps labels that training never shows.
        rare: words are kept that so many training documents and label texts have.
        bigrams: pairs of neighbouring words are kept that so many training documents have; 0: none.

    Raises:
        ValueError: where a split would be empty, saying what was dropped.

    >>> import tempfile
    >>> raw = Raw(Ragged.of([[0], [0, 1]]), ["a red fox", "one red hen"])
    >>> source = Source("toy", ["animal", "bird"], dict.fromkeys(SPLITS, raw))
    >>> held = prepare(source, Path(tempfile.mkdtemp()))
    >>> held.label_names, held.words, held.about["dropped"]["labels"]
    (['animal'], ['red'], 1)
    """
    digest = _digest(source, least, rare, bigrams)
    folder = out / digest
    write_once(folder, lambda scratch: _write(source, digest, least, rare, bigrams, scratch))
    return LabelledTexts.open(folder)


def cut(raw: Raw, share: float, seed: int) -> tuple[Raw, Raw]:
    """(the rest, `share` of the documents), chosen at random by the seed; both in their order."""
    order = torch.randperm(raw.labels.size, generator=torch.Generator().manual_seed(seed))
    count = round(share * raw.labels.size)
    return raw.rows(order[count:].sort().values), raw.rows(order[:count].sort().values)


def _write(source: Source, digest: str, least: int, rare: int, bigrams: int, folder: Path) -> None:
    splits, label_ids, dropped = _kept(source, least)
    label_texts = source.label_texts and [source.label_texts[i] for i in label_ids]
    tensors: dict[str, Tensor] = {}
    names = None

    def put(name: str, rows: Ragged) -> None:
        tensors[f"{name}.values"] = rows.values.int()
        tensors[f"{name}.offsets"] = rows.offsets.clone()

    if splits["train"].texts is None:
        size = unigrams = source.features
        for split, raw in splits.items():
            if raw.features is None or raw.weights is None:
                raise ValueError(f"{source.name}: {split} has neither texts nor features")
            put(f"{split}.tokens", raw.features)
            tensors[f"{split}.weights"] = raw.weights.float()
    else:
        words = {
            split: [words_of(text) for text in raw.texts or ()] for split, raw in splits.items()
        }
        of_labels = [words_of(text) for text in label_texts or ()]
        vocabulary = Vocabulary.of(words["train"], of_labels, rare, bigrams)
        size, unigrams, names = len(vocabulary), len(vocabulary.words), vocabulary.names
        for split, texts in words.items():
            put(f"{split}.tokens", vocabulary.encode(texts))
        if label_texts is not None:
            put("label_tokens", vocabulary.encode(of_labels))
    for split, raw in splits.items():
        put(f"{split}.labels", raw.labels)
        tensors[f"{split}.forbidden"] = raw.forbidden.unique(dim=0)
    training = Ragged(tensors["train.tokens.values"], tensors["train.tokens.offsets"])
    tensors["idf"] = _idf(training, size)
    meta = {
        "name": source.name,
        "digest": digest,
        "labels": len(label_ids),
        "vocabulary": size,
        "unigrams": unigrams,
        "propensity": source.propensity,
        "counted": source.counted,
        "about": _counts(splits, tensors, len(label_ids), size, dropped) | source.about,
    }
    save_file(tensors, folder / "documents.safetensors")
    _write_lines(folder / "labels.jsonl", [source.labels[i] for i in label_ids])
    _write_lines(folder / "label_texts.jsonl", label_texts)
    _write_lines(folder / "words.jsonl", names)
    for split, raw in splits.items():
        _write_lines(folder / f"{split}.texts.jsonl", raw.texts)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))


def _kept(source: Source, least: int) -> tuple[dict[str, Raw], list[int], dict]:
    """The splits in new label ids, the old id of each new one, and what is gone."""
    seen = label_frequencies([source.splits["train"].labels], len(source.labels))
    new = torch.full((len(source.labels),), -1, dtype=torch.int64)
    label_ids = (seen >= least).nonzero()[:, 0]
    new[label_ids] = torch.arange(len(label_ids))
    splits, dropped = {}, {"labels": len(source.labels) - len(label_ids)}
    documents, pairs = {}, {}
    for split in SPLITS:
        raw = source.splits[split]
        mapped = Ragged(new[raw.labels.values.long()], raw.labels.offsets)
        labels = _sorted(mapped.kept(mapped.values >= 0), len(label_ids))
        forbidden = torch.stack((raw.forbidden[:, 0], new[raw.forbidden[:, 1]]), 1)
        raw = raw._replace(labels=labels, forbidden=forbidden[forbidden[:, 1] >= 0])
        rows = (labels.lengths > 0).nonzero()[:, 0]
        splits[split] = raw.rows(rows)
        documents[split] = labels.size - len(rows)
        pairs[split] = len(mapped.values) - len(labels.values)
        if not len(rows):
            raise ValueError(
                f"{source.name}: {split} has {labels.size} documents, and none has a label that"
                f" {least} or more training documents bear ({len(label_ids)} of"
                f" {len(source.labels)} labels are kept)"
            )
    return splits, label_ids.tolist(), dropped | {"documents": documents, "pairs": pairs}


def _sorted(rows: Ragged, labels: int) -> Ragged:
    """Each label of a row once, rising."""
    keys = (rows.owners * max(1, labels) + rows.values).unique()
    owners = keys // max(1, labels)
    lengths = torch.bincount(owners, minlength=rows.size)
    return Ragged.by_lengths(keys - owners * max(1, labels), lengths)


def _idf(training: Ragged, size: int) -> Tensor:
    distinct = _sorted(Ragged(training.values.long(), training.offsets), size)
    bearing = torch.bincount(distinct.values, minlength=size)
    return (((1 + training.size) / (1 + bearing.double())).log() + 1).float()


def _counts(
    splits: dict[str, Raw], tensors: dict[str, Tensor], labels: int, size: int, dropped: dict
) -> dict:
    documents = {split: raw.labels.size for split, raw in splits.items()}
    pairs = {split: len(raw.labels.values) for split, raw in splits.items()}
    seen = label_frequencies([splits["train"].labels], labels)
    return {
        "documents": documents,
        "labels": labels,
        "pairs": pairs,
        "labels_per_document": sum(pairs.values()) / sum(documents.values()),
        "tokens_per_document": len(tensors["train.tokens.values"]) / documents["train"],
        "vocabulary": size,
        "labels_never_in_training": int((seen == 0).sum()),
        "forbidden": len(tensors["test.forbidden"]),
        "dropped": dropped,
    }


def _digest(source: Source, least: int, rare: int, bigrams: int) -> str:
    settings = (source.name, source.features, source.propensity, source.counted)
    content = hashlib.sha256(f"1 {settings} {least} {rare} {bigrams}".encode())
    for texts in (source.labels, source.label_texts):
        _add_texts(content, texts)
    for split in SPLITS:
        raw = source.splits[split]
        _add_texts(content, raw.texts)
        tensors = [*raw.labels, *(raw.features or ()), raw.weights, raw.forbidden]
        for tensor in tensors:
            if tensor is not None:
                content.update(f"{split} {tuple(tensor.shape)} {tensor.dtype}".encode())
                content.update(tensor.contiguous().numpy().tobytes())
    return content.hexdigest()[:12]


def _add_texts(content, texts: list[str] | None) -> None:
    for text in texts or ():
        data = text.encode(errors="surrogatepass")
        content.update(len(data).to_bytes(8, "little") + data)
    content.update(b"-" if texts is None else b"+")


def _write_lines(file: Path, lines: list[str] | None) -> None:
    if lines is not None:
        with file.open("w", encoding="ascii") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)


def _read_lines(file: Path) -> list[str]:
    with file.open(encoding="ascii") as stream:
        return [json.loads(line) for line in stream]
