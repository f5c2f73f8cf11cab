"""Data sets in the forms of the Extreme Classification Repository, as folders hold them.

    json      trn.json, tst.json [, lbl.json]: a JSON object on each line, of which `title`,
              `content` and `target_ind` are read (and `uid`, for a label without a title)
    text      trn_X.txt, tst_X.txt (a text on each line) [, Y.txt: the labels' texts], and the
              labels: trn_X_Y.txt, tst_X_Y.txt, or Y.trn.npz, Y.tst.npz (as SciPy writes them)
    features  trn_X_Xf.txt, tst_X_Xf.txt, and the labels as above
    bag       train.txt, test.txt: "points features labels", then "l1,l2 f:v f:v" on each line

Each may be compressed (.gz) and may stand in a folder `raw`, `raw_data` or `raw_text` below. A
sparse matrix in text begins with "rows columns" and has "column:value column:value" on each line.
Pairs that are not asked about, "document label" on each line, come as filter_labels_test.txt and
filter_labels_train.txt (or tst_filter_labels.txt, trn_filter_labels.txt).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aftermax.lab.data.labelled import NO_PAIRS, LabelledTexts, Raw, Source, cut, prepare
from aftermax.lab.data.ragged import Ragged

Layout = Literal["json", "text", "features", "bag"]

FOLDERS = ("", "raw", "raw_data", "raw_text")

LABELS = (("trn_X_Y.txt", "Y.trn.npz"), ("tst_X_Y.txt", "Y.tst.npz"))

LAYOUTS: dict[Layout, tuple[tuple[str, ...], ...]] = {
    "json": (("trn.json", "trn.raw.json"), ("tst.json", "tst.raw.json")),
    "text": (("trn_X.txt",), ("tst_X.txt",), *LABELS),
    "features": (("trn_X_Xf.txt",), ("tst_X_Xf.txt",), *LABELS),
    "bag": (("train.txt",), ("test.txt",)),
}
"""What each needs, each file with its names; the first layout that a folder has is read."""

FORBIDDEN = (
    ("filter_labels_train.txt", "trn_filter_labels.txt"),
    ("filter_labels_test.txt", "tst_filter_labels.txt"),
)


def build(
    folder: Path,
    out: Path,
    *,
    tune: float = 0.1,
    seed: int = 0,
    least: int = 0,
    bigrams: int = 0,
    propensity: tuple[float, float] | None = None,
) -> LabelledTexts:
    """`prepare` of what `read` finds. All labels are kept, so that figures compare with others'."""
    source = read(folder, tune=tune, seed=seed, propensity=propensity)
    return prepare(source, out, least=least, bigrams=bigrams)


def read(
    folder: Path,
    *,
    tune: float = 0.1,
    seed: int = 0,
    propensity: tuple[float, float] | None = None,
) -> Source:
    """A set in one of the forms above; its training file is cut in train and tune.

    Args:
        folder: the set's own; its name is the set's name.
        tune: share of the training file that is held out to choose settings by.
        seed: chooses those documents.
        propensity: (A, B) of `labelled.inverse_propensities`; None is the repository's: (0.6, 2.6)
            for Amazon's items, (0.5, 0.4) for Wikipedia's categories (WikiLSHTC, Wikipedia,
            WikiTitles), (0.55, 1.5) for the rest (AmazonCat among them). Label frequencies are
            counted over the whole training file.

    Raises:
        FileNotFoundError: for a folder in none of the forms, saying which files were looked for.
        ValueError: for a file that is not as it should be, with the line.
    """
    form = layout(folder)
    if not 0 < tune < 1:
        raise ValueError(f"tune is {tune}; a share between 0 and 1 would be right")
    files = [find(folder, names) for names in LAYOUTS[form]]
    reader = {"json": _json, "text": _text, "features": _features, "bag": _bag}[form]
    (train, test), labels, features = reader(folder, [file for file in files if file])
    names, texts = _label_texts(folder, labels)
    train, test = (
        raw._replace(
            forbidden=_forbidden(folder, pairs, _limit(raw.labels, labels, folder), labels)
        )
        for pairs, raw in zip(FORBIDDEN, (train, test), strict=True)
    )
    rest, held_out = cut(train, tune, seed)
    return Source(
        folder.resolve().name,
        names,
        {"train": rest, "tune": held_out, "test": test},
        texts,
        features,
        propensity or _propensity(folder.resolve().name),
        ("train", "tune"),
        {"layout": form},
    )


def layout(folder: Path) -> Layout:
    """The form that a folder's set is in.

    Raises:
        FileNotFoundError: for none.
    """
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "there is no such folder"
        raise FileNotFoundError(f"{folder}: {problem}; give the folder of a set")
    for form, files in LAYOUTS.items():
        if all(find(folder, names) for names in files):
            return form
    wanted = "\n".join(
        f"    {form:9} " + ", ".join(" or ".join(names) for names in files)
        for form, files in LAYOUTS.items()
    )
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    raise FileNotFoundError(
        f"{folder} holds no set in a form of the Extreme Classification Repository. Looked for"
        f" (also with .gz, and in {', '.join(FOLDERS[1:])}):\n{wanted}\nThe folder has: {there}"
    )


def find(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first file of these names, plain or compressed, in the folder or one of `FOLDERS`."""
    for below in FOLDERS:
        for name in names:
            for path in (folder / below / name, folder / below / f"{name}.gz"):
                if path.is_file():
                    return path
    return None


Parts = tuple[tuple[Raw, Raw], int, int]
"""(train, test), the number of labels, the number of features (0 for texts)."""


def _json(folder: Path, files: list[Path]) -> Parts:
    parts = []
    for file in files:
        labels, texts = [], []
        for number, item in _objects(file):
            if "target_ind" not in item:
                raise ValueError(f"{file}, line {number} has no target_ind: {sorted(item)}")
            labels.append(item["target_ind"])
            texts.append(_text_of(item))
        parts.append(Raw(Ragged.of(labels), texts))
    named = find(folder, ("lbl.json", "lbl.raw.json"))
    return (parts[0], parts[1]), sum(1 for _ in _lines(named)) if named else _most(parts), 0


def _text(folder: Path, files: list[Path]) -> Parts:
    texts = [[line for _, line in _lines(file)] for file in files[:2]]
    labels, count = _label_rows(files[2:])
    for file, held, rows in zip(files, texts, labels, strict=False):
        if len(held) != rows.size:
            raise ValueError(f"{file} has {len(held)} texts for {rows.size} rows of labels")
    return (Raw(labels[0], texts[0]), Raw(labels[1], texts[1])), count, 0


def _features(folder: Path, files: list[Path]) -> Parts:
    labels, count = _label_rows(files[2:])
    held, widths = zip(*(_matrix(file) for file in files[:2]), strict=True)
    for file, (features, _), rows in zip(files, held, labels, strict=False):
        if features.size != rows.size:
            raise ValueError(f"{file} has {features.size} rows for {rows.size} rows of labels")
    train, test = (Raw(rows, None, *h) for rows, h in zip(labels, held, strict=True))
    return (train, test), count, max(widths)


def _bag(folder: Path, files: list[Path]) -> Parts:
    parts, sizes = [], []
    for file in files:
        lines = _lines(file)
        points, features, labels = _header(file, lines, 3, "points features labels")
        rows, own = [], []
        for number, line in lines:
            first, _, rest = line.partition(" ")
            if ":" in first:  # a row without labels, and without the space before it
                first, rest = "", line
            try:
                own.append([int(label) for label in first.split(",") if label])
            except ValueError:
                raise ValueError(
                    f"{file}, line {number}: labels {first[:40]!r}; 3,14,15 would be right"
                ) from None
            rows.append(_entries(file, number, rest, features))
        held = _stack(file, rows, points)
        parts.append(Raw(Ragged.of(own), None, *held))
        sizes.append((features, labels))
    return (parts[0], parts[1]), max(s[1] for s in sizes), max(s[0] for s in sizes)


def _label_rows(files: list[Path]) -> tuple[list[Ragged], int]:
    rows, counts = [], []
    for file in files:
        if file.suffix == ".npz":
            held, columns = _scipy(file)
        else:
            (held, values), columns = _matrix(file)
            held = held.kept(values != 0)
        rows.append(held)
        counts.append(columns)
    return rows, max(counts)


def _scipy(file: Path) -> tuple[Ragged, int]:
    with np.load(file) as held:
        if held["format"].item() not in (b"csr", "csr"):
            raise ValueError(f"{file} holds a matrix in another form than csr")
        values = torch.from_numpy(held["indices"].astype(np.int32))
        return Ragged(values, torch.from_numpy(held["indptr"].astype(np.int64))), int(
            held["shape"][1]
        )


def _matrix(file: Path) -> tuple[tuple[Ragged, Tensor], int]:
    lines = _lines(file)
    points, columns = _header(file, lines, 2, "rows columns")
    rows = [_entries(file, number, line, columns) for number, line in lines]
    return _stack(file, rows, points), columns


def _entries(file: Path, number: int, line: str, columns: int) -> np.ndarray:
    """float64 (2 x entries,): column, value, column, value."""
    try:
        row = np.array(line.replace(":", " ").split(), np.float64)
    except ValueError:
        row = np.empty(1)
    if len(row) % 2 or line.count(":") * 2 != len(row):
        raise ValueError(f"{file}, line {number}: {line[:60]!r}; 3:0.5 14:1.0 would be right")
    if len(row) and not (row[::2].min() >= 0 and row[::2].max() < columns):
        raise ValueError(
            f"{file}, line {number}: columns {row[::2].min():.0f} to {row[::2].max():.0f};"
            f" 0 to {columns - 1} are there by the first line"
        )
    return row


def _stack(file: Path, rows: list[np.ndarray], points: int) -> tuple[Ragged, Tensor]:
    if len(rows) != points:
        raise ValueError(f"{file} has {len(rows)} rows; its first line says {points}")
    lengths = torch.tensor([len(row) // 2 for row in rows], dtype=torch.int64)
    whole = np.concatenate(rows) if rows else np.empty(0)
    columns = torch.from_numpy(whole[::2].astype(np.int32))
    return Ragged.by_lengths(columns, lengths), torch.from_numpy(whole[1::2].astype(np.float32))


def _header(file: Path, lines: Iterator[tuple[int, str]], count: int, form: str) -> list[int]:
    _, line = next(lines, (0, ""))
    numbers = line.split()
    if len(numbers) != count or not all(n.isdigit() for n in numbers):
        raise ValueError(f'{file} begins with {line[:60]!r}; "{form}" would be right')
    return [int(n) for n in numbers]


def _label_texts(folder: Path, labels: int) -> tuple[list[str], list[str] | None]:
    """Names and texts, where the folder has them; else numbers."""
    if (file := find(folder, ("lbl.json", "lbl.raw.json"))) is not None:
        items = [item for _, item in _objects(file)]
        names = [str(item.get("title") or item.get("uid", i)) for i, item in enumerate(items)]
        texts = [_text_of(item) for item in items]
    elif (file := find(folder, ("Y.txt", "lbl.txt"))) is not None:
        names = texts = [line for _, line in _lines(file)]
    else:
        return [str(label) for label in range(labels)], None
    if len(names) != labels:
        raise ValueError(f"{file} has {len(names)} labels; {labels} were expected")
    return names, texts


def _forbidden(folder: Path, names: tuple[str, ...], documents: int, labels: int) -> Tensor:
    file = find(folder, names)
    numbers = [line.split() for _, line in _lines(file)] if file else []
    numbers = [pair for pair in numbers if pair]
    if not numbers:
        return NO_PAIRS
    try:
        pairs = torch.tensor([[int(float(n)) for n in pair] for pair in numbers])
    except ValueError:
        pairs = torch.empty(0)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f'{file} should have "document label" on each line')
    if (pairs < 0).any() or (pairs >= torch.tensor([documents, labels])).any():
        raise ValueError(
            f"{file} has pairs up to {tuple(pairs.max(0).values.tolist())}; there are {documents}"
            f" documents and {labels} labels"
        )
    return pairs


def _limit(rows: Ragged, labels: int, folder: Path) -> int:
    """Rows, once their labels are known to be within range."""
    if len(rows.values) and not (rows.values.min() >= 0 and rows.values.max() < labels):
        raise ValueError(
            f"{folder}: labels {rows.values.min()} to {rows.values.max()} in a set of {labels}"
        )
    return rows.size


def _most(parts: list[Raw]) -> int:
    return max(int(p.labels.values.max()) + 1 for p in parts if len(p.labels.values))


def _text_of(item: dict) -> str:
    return "\n".join(str(item[key]) for key in ("title", "content") if item.get(key))


def _objects(file: Path) -> Iterator[tuple[int, dict]]:
    for number, line in _lines(file):
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from None
        if not isinstance(item, dict):
            raise ValueError(f"{file}, line {number} is no JSON object: {line[:60]!r}")
        yield number, item


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered from 1; a line ends with a newline and nothing else."""
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            yield number, line.decode(errors="replace").rstrip("\r\n")


def _propensity(name: str) -> tuple[float, float]:
    """
    >>> _propensity("LF-AmazonTitles-131K"), _propensity("AmazonCat-13K")
    ((0.6, 2.6), (0.55, 1.5))
    """
    if re.search("amazon(?!cat)", name, re.IGNORECASE):
        return 0.6, 2.6
    if re.search("wiki(lshtc|pedia|titles)", name, re.IGNORECASE):
        return 0.5, 0.4
    return 0.55, 1.5
