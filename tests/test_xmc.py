"""The repository's forms: each read from small files written here, and what is wrong is told."""

import gzip
import json

import numpy as np
import pytest
import scipy.sparse
from torch.testing import assert_close

from aftermax.lab.data import xmc
from aftermax.lab.data.labelled import SPLITS

TRAIN = [[0, 2], [1], [2], [0], [1, 2], [0], [0, 1], [2], [1], [0]]
TEST = [[2], [0, 1]]
TEXTS = {"trn": [f"red fox number{i}" for i in range(10)], "tst": ["a red hen", "fox\u2028den"]}
FEATURES = {"trn": [{i % 4: i + 0.5, 4: 1.5} for i in range(10)], "tst": [{0: 2.0}, {}]}
ROWS = {"trn": TRAIN, "tst": TEST}


def bag(split, header="{points} 5 3"):
    lines = [header.format(points=len(ROWS[split]))]
    for labels, features in zip(ROWS[split], FEATURES[split], strict=True):
        held = " ".join(f"{f}:{v}" for f, v in features.items())
        lines.append(f"{','.join(map(str, labels))} {held}")
    return "\n".join(lines) + "\n"


def matrix(rows, columns):
    held = [" ".join(f"{c}:{v}" for c, v in row.items()) for row in rows]
    return "\n".join([f"{len(rows)} {columns}", *held]) + "\n"


def label_matrix(split):
    return matrix([dict.fromkeys(labels, 1) for labels in ROWS[split]], 3)


def objects(split):
    pairs = zip(ROWS[split], TEXTS[split], strict=True)
    return "".join(
        json.dumps({"title": t, "content": "", "target_ind": y}) + "\n" for y, t in pairs
    )


def write_json(folder):
    for split in ROWS:
        (folder / f"{split}.json.gz").write_bytes(gzip.compress(objects(split).encode()))
    names = [
        {"uid": "x", "title": "dog"},
        {"uid": "y", "title": "", "content": "of cats"},
        {"uid": 7},
    ]
    lines = "\n".join(map(json.dumps, names)) + "\n"
    (folder / "lbl.json.gz").write_bytes(gzip.compress(lines.encode()))


def write_text(folder):
    (folder / "raw_data").mkdir()
    for split in ROWS:
        (folder / f"{split}_X_Y.txt").write_text(label_matrix(split))
        lines = "\n".join(TEXTS[split]) + "\n"
        (folder / "raw_data" / f"{split}_X.txt").write_text(lines, encoding="utf-8")
    (folder / "raw_data" / "Y.txt").write_text("dog\ncat\nhen\n")


def write_features(folder):
    for split in ROWS:
        rows = [[int(c in labels) for c in range(3)] for labels in ROWS[split]]
        held = scipy.sparse.csr_matrix(np.array(rows))
        scipy.sparse.save_npz(folder / f"Y.{split}.npz", held)
        (folder / f"{split}_X_Xf.txt").write_text(matrix(FEATURES[split], 5))


def write_bag(folder):
    (folder / "train.txt").write_text(bag("trn"))
    (folder / "test.txt").write_text(bag("tst"))


WRITERS = {
    "json": write_json,
    "text": write_text,
    "features": write_features,
    "bag": write_bag,
}


@pytest.fixture(params=WRITERS)
def form(request):
    return request.param


@pytest.fixture
def folder(form, tmp_path):
    WRITERS[form](tmp_path)
    return tmp_path


def test_every_form_gives_the_same_labels(folder, form):
    assert xmc.layout(folder) == form
    source = xmc.read(folder, tune=0.2)
    assert source.splits["test"].labels.lists() == TEST
    held = [source.splits[split].labels.lists() for split in ("train", "tune")]
    assert [len(rows) for rows in held] == [8, 2]
    assert sorted(held[0] + held[1]) == sorted(TRAIN)


def test_texts_or_features_follow_their_labels(folder, form):
    source = xmc.read(folder, tune=0.3, seed=1)
    parts = [source.splits[split] for split in ("train", "tune")]
    labels = [row for raw in parts for row in raw.labels.lists()]
    if form in ("json", "text"):
        order = [int(text.removeprefix("red fox number")) for raw in parts for text in raw.texts]
        assert source.splits["test"].texts == TEXTS["tst"]  # a line ends with a newline alone
    else:
        order = [int(value) for raw in parts for value in raw.weights[::2].tolist()]
        kept = [row for raw in parts for row in raw.features.lists()]
        assert kept == [[i % 4, 4] for i in order]
        assert source.splits["test"].features.lists() == [[0], []]
    assert sorted(order) == list(range(10))
    assert [TRAIN[i] for i in order] == labels


def test_the_seed_decides_what_tunes(folder):
    chosen = [xmc.read(folder, tune=0.5, seed=s).splits["tune"].labels.lists() for s in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_names_and_texts_of_labels(folder, form):
    source = xmc.read(folder)
    expected = {
        "json": (["dog", "y", "7"], ["dog", "of cats", ""]),
        "text": (["dog", "cat", "hen"], ["dog", "cat", "hen"]),
        "features": (["0", "1", "2"], None),
        "bag": (["0", "1", "2"], None),
    }
    assert (source.labels, source.label_texts) == expected[form]


def test_a_prepared_set_keeps_every_label_and_counts_the_whole_training_file(folder, tmp_path):
    held = xmc.build(folder, tmp_path / "out", tune=0.2)
    assert held.labels == 3
    assert sum(len(held.splits[split]) for split in SPLITS) == 12
    c = (np.log(10) - 1) * 2.5**0.55
    counts = np.array([5, 4, 4])
    assert_close(held.inverse_propensities.numpy(), 1 + c * (counts + 1.5) ** -0.55)
    assert held.frequencies.sum() < counts.sum()  # of the training split alone


def test_values_come_as_they_are(tmp_path):
    write_bag(tmp_path)
    held = xmc.build(tmp_path, tmp_path / "out")
    test = held.splits["test"]
    assert (held.vocabulary, held.words, test.texts) == (5, None, None)
    assert test.weights.tolist() == [2.0]
    rows, values = held.features(test.tokens, test.weights)
    assert rows.lists() == [[0], []]
    assert values.tolist() == [1.0]


def test_pairs_that_are_not_asked_about(folder):
    (folder / "filter_labels_test.txt").write_text("1 0\n0 2\n")
    (folder / "trn_filter_labels.txt").write_text("".join(f"{i} {i % 3}\n" for i in range(10)))
    source = xmc.read(folder, tune=0.3)
    assert source.splits["test"].forbidden.tolist() == [[1, 0], [0, 2]]
    assert sum(len(source.splits[split].forbidden) for split in ("train", "tune")) == 10


def test_a_row_without_labels(tmp_path):
    write_bag(tmp_path)
    lines = "4 5 3\n 0:1\n0,2 1:1\n0:2.5 3:1\n1 \n"
    (tmp_path / "test.txt").write_text(lines)
    raw = xmc.read(tmp_path).splits["test"]
    assert raw.labels.lists() == [[], [0, 2], [], [1]]
    assert raw.features.lists() == [[0], [1], [0, 3], []]
    assert xmc.build(tmp_path, tmp_path / "out").about["dropped"]["documents"]["test"] == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("red fox", "begins with 'red fox'"),
        ("3 5 3\n0 1:1\n", "has 1 rows; its first line says 3"),
        ("1 5 3\n0 1:1 2\n", r"line 2: '1:1 2'; 3:0\.5 14:1\.0 would be right"),
        ("1 5 3\n0 9:1\n", "columns 9 to 9; 0 to 4 are there"),
        ("1 5 3\nx 1:1\n", "labels 'x'; 3,14,15 would be right"),
        ("1 5 3\n7 1:1\n", "labels 7 to 7 in a set of 3"),
    ],
)
def test_a_bag_that_is_wrong(tmp_path, text, problem):
    write_bag(tmp_path)
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(ValueError, match=problem):
        xmc.read(tmp_path)


def test_texts_and_labels_must_match(tmp_path):
    write_text(tmp_path)
    (tmp_path / "raw_data" / "tst_X.txt").write_text("alone\n")
    with pytest.raises(ValueError, match=r"tst_X\.txt has 1 texts for 2 rows of labels"):
        xmc.read(tmp_path)
    (tmp_path / "raw_data" / "tst_X.txt").write_text("one\ntwo\n")
    (tmp_path / "raw_data" / "Y.txt").write_text("dog\n")
    with pytest.raises(ValueError, match=r"Y\.txt has 1 labels; 3 were expected"):
        xmc.read(tmp_path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [("{", "line 1 is not JSON"), ('{"title": "a"}', "line 1 has no target_ind"), ("3", "no JSON")],
)
def test_json_that_is_wrong(tmp_path, line, problem):
    write_json(tmp_path)
    (tmp_path / "trn.json").write_text(line + "\n")
    with pytest.raises(ValueError, match=problem):
        xmc.read(tmp_path)


def test_forbidden_pairs_out_of_range(tmp_path):
    write_bag(tmp_path)
    (tmp_path / "filter_labels_test.txt").write_text("5 0\n")
    with pytest.raises(ValueError, match=r"pairs up to \(5, 0\); there are 2 documents and 3"):
        xmc.read(tmp_path)


def test_an_unknown_folder_says_what_was_looked_for(tmp_path):
    (tmp_path / "readme.md").touch()
    with pytest.raises(FileNotFoundError, match="no set in a form of") as raised:
        xmc.read(tmp_path)
    for name in ("trn.json", "trn_X_Y.txt", "Y.trn.npz", "train.txt", "readme.md"):
        assert name in str(raised.value)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        xmc.read(tmp_path / "absent")


def test_the_share_that_tunes(tmp_path):
    write_bag(tmp_path)
    with pytest.raises(ValueError, match=r"tune is 1\.5"):
        xmc.read(tmp_path, tune=1.5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LF-AmazonTitles-1.3M", (0.6, 2.6)),
        ("LF-Wikipedia-500K", (0.5, 0.4)),
        ("LF-WikiSeeAlso-320K", (0.55, 1.5)),
        ("EURLex-4K", (0.55, 1.5)),
        ("AmazonCat-13K", (0.55, 1.5)),
    ],
)
def test_propensities_by_the_name_of_the_set(tmp_path, name, expected):
    folder = tmp_path / name
    folder.mkdir()
    write_bag(folder)
    assert xmc.read(folder).propensity == expected
    assert xmc.read(folder, propensity=(0.1, 0.2)).propensity == (0.1, 0.2)


def test_the_digest_hangs_on_the_content(folder, tmp_path):
    first, again, other = (
        xmc.build(folder, tmp_path / "out", seed=seed).digest for seed in (0, 0, 1)
    )
    assert first == again != other
