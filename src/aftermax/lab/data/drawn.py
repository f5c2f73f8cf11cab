"""What is drawn, not read: there is nothing to prepare but a name for what the generator makes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aftermax.lab.data.folder import write_once


@dataclass(frozen=True)
class Drawn:
    folder: Path
    """Of the task's own, for what it need not do twice."""
    name: str
    digest: str


def keep(out: Path, name: str, some: Any) -> Drawn:
    """The digest is of some draws: another generator, or other random numbers, is other data."""
    digest = hashlib.sha256(json.dumps(some).encode()).hexdigest()[:12]
    folder = out / digest
    write_once(folder, lambda new: (new / "meta.json").write_text(json.dumps({"digest": digest})))
    return opened(folder, name)


def opened(folder: Path, name: str) -> Drawn:
    return Drawn(folder, name, json.loads((folder / "meta.json").read_text())["digest"])
