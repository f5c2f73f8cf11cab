"""Text on this machine: Python's own standard library, or a file or folder of the reader's."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", ".git"}
"""Folders that are not the library's text: other people's packages, test data, compiled files."""


@dataclass(frozen=True)
class Document:
    name: str
    text: bytes


def read_documents(data: Path | None) -> list[Document]:
    """The documents of `data`, in the order of their names; of the standard library for None.

    Raises:
        FileNotFoundError, PermissionError: with the path in question.
        ValueError: where no text is found.
    """
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts)]
    elif data.is_dir():
        root = data
        paths = [
            p
            for p in data.rglob("*")
            if p.is_file() and not SKIPPED & set(p.relative_to(root).parts)
        ]
    elif data.exists():
        root, paths = data.parent, [data]
    else:
        raise FileNotFoundError(f"--data {data}: there is no such file or folder")

    documents = []
    for path in sorted(paths, key=lambda p: p.relative_to(root).as_posix()):
        text = _read(path)
        if text:
            documents.append(Document(path.relative_to(root).as_posix(), text))
    if not documents:
        where = "holds no text"
        if data is not None and data.is_file():
            where = "is not text (UTF-8)" if data.stat().st_size else "is empty"
        raise ValueError(f"--data {root if data is None else data} {where}")
    return documents


def _read(path: Path) -> bytes:
    """The bytes of a text file, b"" for what is not text."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise PermissionError(f"--data: {path} cannot be read: {error.strerror}") from error
    if b"\0" in text[:8192]:
        return b""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return b""
    return text
