"""Texts -> word ids: lower-cased words, and on request pairs of neighbours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from aftermax.lab.data.ragged import Ragged

WORD = re.compile(r"[^\W_]+(?:\+\+|#)?")
"""Letters and digits of any script; c++ and c# stay whole."""


def words_of(text: str) -> list[str]:
    """
    >>> words_of("GNU C++ library, v3 (libstdc++6)")
    ['gnu', 'c++', 'library', 'v3', 'libstdc++', '6']
    """
    return WORD.findall(text.lower())


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Words by falling frequency, then pairs of neighbours ("real time"): the place is the id."""

    words: list[str]
    pairs: np.ndarray  # int64, rising: first * len(words) + second

    @classmethod
    def of(
        cls,
        training: Sequence[list[str]],
        labels: Sequence[list[str]],
        rare: int,
        bigrams: int,
    ) -> Vocabulary:
        """The words of the training documents that `rare` or more texts have.

        The texts of labels count as texts too: a word that one document shares with a label tells
        something about both. What only labels have is left out, since no document leads there.

        Args:
            training, labels: texts as lists of words.
            bigrams: pairs are kept that so many training documents have; 0 is none.
        """
        seen = Counter(word for words in training for word in set(words))
        of_labels = Counter(word for words in labels for word in set(words))
        kept = [word for word, count in seen.items() if count + of_labels[word] >= rare]
        kept.sort(key=lambda word: (-seen[word], word))
        plain = cls(kept, np.empty(0, np.int64))
        if not bigrams:
            return plain
        places = plain._places
        found = [np.unique(plain._pairs([places.get(w, -1) for w in t])) for t in training]
        pairs, counts = np.unique(np.concatenate(found), return_counts=True)
        return cls(kept, pairs[counts >= bigrams])

    @cached_property
    def _places(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words) + len(self.pairs)

    @property
    def names(self) -> list[str]:
        count = max(1, len(self.words))
        pairs = [f"{self.words[p // count]} {self.words[p % count]}" for p in self.pairs.tolist()]
        return [*self.words, *pairs]

    def encode(self, texts: Sequence[list[str]]) -> Ragged:
        """The known words of each text in their order, and after them its known pairs."""
        rows = []
        for text in texts:
            ids = np.array([self._places.get(word, -1) for word in text], np.int64)
            row = ids[ids >= 0]
            if len(self.pairs):
                found = self._pairs(ids)
                places = np.searchsorted(self.pairs, found).clip(max=len(self.pairs) - 1)
                known = places[self.pairs[places] == found]
                row = np.concatenate((row, known + len(self.words)))
            rows.append(row.astype(np.int32))
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        values = np.concatenate(rows) if rows else np.empty(0, np.int32)
        return Ragged.by_lengths(torch.from_numpy(values), lengths)

    def _pairs(self, ids: np.ndarray | list[int]) -> np.ndarray:
        """Of neighbours that are both known."""
        ids = np.asarray(ids, np.int64)
        first, second = ids[:-1], ids[1:]
        return (first * len(self.words) + second)[(first >= 0) & (second >= 0)]
