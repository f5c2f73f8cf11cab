"""Rows of several lengths, the vocabulary, and the prepared form of texts with many labels."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from torch.testing import assert_close

from aftermax.lab.data import labelled
from aftermax.lab.data.labelled import (
    SPLITS,
    LabelledTexts,
    Raw,
    Source,
    cut,
    inverse_propensities,
    prepare,
)
from aftermax.lab.data.ragged import Ragged
from aftermax.lab.data.vocabulary import words_of

LISTS = st.lists(st.lists(st.integers(0, 50), max_size=6), max_size=8)

TRAIN = Raw(
    Ragged.of([[0, 1], [1], [3, 1], [0], [4]]),
    ["red fox runs", "Red hen", "red fox, red den", "a lone hen", "nothing known"],
    forbidden=torch.tensor([[0, 1], [0, 4]]),
)
TUNE = Raw(Ragged.of([[1, 0], [2]]), ["fox den", "hen"])
TEST = Raw(
    Ragged.of([[2], [4, 1], [0]]),
    ["fox", "the red unknown", ""],
    forbidden=torch.tensor([[0, 1], [2, 1], [1, 0], [1, 0], [1, 3]]),
)
SOURCE = Source(
    "toy",
    ["fox", "hen", "den", "wolf", "owl"],
    {"train": TRAIN, "tune": TUNE, "test": TEST},
    ["fox", "hen that runs", "", "alone", "alone"],
    about={"from": "nowhere"},
)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Labels seen twice: fox and hen."""
    return prepare(SOURCE, tmp_path_factory.mktemp("toy"))


# rows of several lengths


@given(LISTS)
def test_rows_survive(lists):
    rows = Ragged.of(lists)
    assert rows.lists() == lists
    assert rows.lengths.tolist() == [len(row) for row in lists]
    assert rows.owners.tolist() == [i for i, row in enumerate(lists) for _ in row]
    assert [rows.row(i).tolist() for i in range(rows.size)] == lists


@given(LISTS.filter(len), st.data())
def test_chosen_rows(lists, data):
    order = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=10))
    taken = Ragged.of(lists).rows(torch.tensor(order, dtype=torch.int64))
    assert taken.lists() == [lists[i] for i in order]
    assert taken.values.dtype == taken.offsets.dtype == torch.int64


@given(LISTS, st.integers(0, 7))
def test_padded_rows(lists, longest):
    width = min(longest, max(map(len, lists), default=0))
    expected = [(row[:width] + [-7] * width)[:width] for row in lists]
    padded = Ragged.of(lists).padded(fill=-7, longest=longest)
    assert padded.shape == (len(lists), width)
    assert padded.tolist() == expected


@given(LISTS)
def test_values_that_are_kept(lists):
    rows = Ragged.of(lists)
    even = [[value for value in row if value % 2 == 0] for row in lists]
    assert rows.kept(rows.values % 2 == 0).lists() == even


# what is kept and what is dropped


def test_labels_seen_once_are_dropped_with_what_only_they_label(held):
    assert held.label_names == ["fox", "hen"]
    assert held.labels == 2
    assert held.splits["train"].labels.lists() == [[0, 1], [1], [1], [0]]
    assert held.splits["tune"].labels.lists() == [[0, 1]]
    assert held.splits["test"].labels.lists() == [[1], [0]]
    assert held.about["dropped"] == {
        "labels": 3,
        "documents": {"train": 1, "tune": 1, "test": 1},
        "pairs": {"train": 2, "tune": 1, "test": 2},
    }
    assert held.about["documents"] == {"train": 4, "tune": 1, "test": 2}
    assert held.about["from"] == "nowhere"
    assert held.frequencies.tolist() == [2, 3]


def test_texts_stay_with_their_documents(held):
    assert held.splits["test"].texts == ["the red unknown", ""]
    assert held.splits["train"].texts[3] == "a lone hen"
    assert held.label_texts == ["fox", "hen that runs"]


def test_forbidden_pairs_are_renumbered(held):
    assert held.forbidden.tolist() == [[0, 0], [1, 1]]
    assert held.splits["train"].forbidden.tolist() == [[0, 1]]
    assert held.splits["tune"].forbidden.shape == (0, 2)


def test_all_labels_stay_on_request(tmp_path):
    held = prepare(SOURCE, tmp_path, least=0)
    assert held.labels == 5
    assert held.about["labels_never_in_training"] == 1
    assert held.splits["test"].labels.lists() == [[2], [1, 4], [0]]


def test_an_empty_split_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"train has 5 documents, and none has a label that 9"):
        prepare(SOURCE, tmp_path, least=9)
    assert not list(tmp_path.iterdir())


# words


def test_the_vocabulary_has_words_of_two_texts(held):
    # "runs" is in one document and one label; "lone", "a", "den" in one text of training alone,
    # "that" in a label alone
    assert held.words == ["red", "fox", "hen", "runs"]
    assert held.unigrams == held.vocabulary == 4
    assert held.splits["train"].tokens.lists() == [[0, 1, 3], [0, 2], [0, 1, 0], [2]]
    assert held.splits["test"].tokens.lists() == [[0], []]
    assert held.label_tokens.lists() == [[1], [2, 3]]


def test_pairs_of_neighbours(tmp_path):
    held = prepare(SOURCE, tmp_path, bigrams=2)
    assert held.words == ["red", "fox", "hen", "runs", "red fox"]
    assert (held.unigrams, held.vocabulary) == (4, 5)
    # "hen that" has an unknown word, "red den" and "fox, red" stand in one document alone
    assert held.splits["train"].tokens.lists() == [[0, 1, 3, 4], [0, 2], [0, 1, 0, 4], [2]]
    assert held.label_tokens.lists() == [[1], [2, 3]]


def test_a_pair_has_nothing_unknown_between(tmp_path):
    texts = ["red x1 fox", "red x2 fox", "fox hen", "fox hen"]
    raw = Raw(Ragged.of([[0]] * 4), texts)
    held = prepare(Source("toy", ["a"], dict.fromkeys(SPLITS, raw)), tmp_path, bigrams=1)
    assert held.words == ["fox", "hen", "red", "fox hen"]


def test_words_of_any_script():
    assert words_of("Ünïcode_text: C++11, C#, naïve—日本語 2.5") == [
        *("ünïcode", "text", "c++", "11", "c#", "naïve", "日本語", "2", "5")
    ]


def test_idf_and_tfidf_are_those_of_scikit_learn(tmp_path):
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(12)]
    texts = [" ".join(random.choice(words, random.integers(1, 9))) for _ in range(30)]
    raw = Raw(Ragged.of([[0]] * 30), texts)
    held = prepare(Source("toy", ["a"], dict.fromkeys(SPLITS, raw)), tmp_path)
    theirs = TfidfVectorizer(sublinear_tf=True, vocabulary=held.words, token_pattern=r"\w+")
    expected = theirs.fit_transform(texts)
    assert_close(held.idf, torch.from_numpy(theirs.idf_).float())
    rows, values = held.features(held.splits["train"].tokens)
    assert rows.lists() == [sorted(row.indices.tolist()) for row in expected]
    dense = torch.zeros(30, 12)
    dense[rows.owners, rows.values] = values
    assert_close(dense, torch.from_numpy(expected.toarray()).float())


# on disk


def test_opened_again_it_is_the_same(held):
    again = LabelledTexts.open(held.folder)
    for split in SPLITS:
        for one, other in zip(held.splits[split].tokens, again.splits[split].tokens, strict=True):
            assert torch.equal(one, other)
        assert again.splits[split].texts == held.splits[split].texts
        assert len(again.splits[split]) == held.about["documents"][split]
    assert again.digest == held.digest == held.folder.name
    assert torch.equal(again.inverse_propensities, held.inverse_propensities)


def test_a_second_call_opens_what_is_there(held, monkeypatch):
    monkeypatch.setattr(labelled, "_write", None)
    assert prepare(SOURCE, held.folder.parent).folder == held.folder


def test_the_digest_hangs_on_content_and_settings(held, tmp_path):
    other_text = {**SOURCE.splits, "tune": TUNE._replace(texts=["fox den", "hens"])}
    moved = {**SOURCE.splits, "tune": TUNE._replace(labels=Ragged.of([[1], [0, 2]]))}
    digests = [
        held.digest,
        prepare(SOURCE, tmp_path, bigrams=1).digest,
        prepare(SOURCE, tmp_path, rare=1).digest,
        prepare(SOURCE, tmp_path, least=1).digest,
        prepare(replace(SOURCE, splits=other_text), tmp_path).digest,
        prepare(replace(SOURCE, splits=moved), tmp_path).digest,
        prepare(replace(SOURCE, label_texts=None), tmp_path).digest,
        prepare(replace(SOURCE, counted=("train", "tune")), tmp_path).digest,
    ]
    assert len(set(digests)) == len(digests)
    assert prepare(replace(SOURCE, about={}), tmp_path).digest == held.digest


def test_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "_write_lines", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(SOURCE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_texts_of_labels(tmp_path):
    held = prepare(replace(SOURCE, label_texts=None), tmp_path)
    assert held.label_tokens is None
    assert held.label_texts is None
    assert held.words == ["red", "fox", "hen"]


def test_the_meta_file_is_readable(held):
    meta = json.loads((held.folder / "meta.json").read_text())
    assert meta["about"] == held.about
    assert meta["propensity"] == [0.55, 1.5]


def test_propensities_of_the_splits_that_are_counted(tmp_path):
    held = prepare(replace(SOURCE, counted=("train", "tune"), propensity=(0.6, 2.6)), tmp_path)
    expected = inverse_propensities(torch.tensor([3, 4]), 5, 0.6, 2.6)
    assert torch.equal(held.inverse_propensities, expected)
    assert held.frequencies.tolist() == [2, 3]


def test_propensities_of_few_documents_are_one():
    assert inverse_propensities(torch.tensor([0, 1]), 2, 0.55, 1.5).tolist() == [1, 1]


def test_a_cut_keeps_each_document_whole():
    rest, taken = cut(TRAIN, 0.4, seed=0)
    assert (rest.labels.size, taken.labels.size) == (3, 2)
    both = list(
        zip(rest.texts + taken.texts, rest.labels.lists() + taken.labels.lists(), strict=True)
    )
    whole = list(zip(TRAIN.texts, TRAIN.labels.lists(), strict=True))
    assert sorted(both) == sorted(whole)
    assert len(rest.forbidden) + len(taken.forbidden) == 2
    part = rest if TRAIN.texts[0] in rest.texts else taken
    assert part.forbidden.tolist() == [[part.texts.index(TRAIN.texts[0]), y] for y in (1, 4)]
