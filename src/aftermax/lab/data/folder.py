"""A folder that is there whole or not at all, whoever writes it and whenever they are stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_once(folder: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a new folder, which takes this name when it is whole.

    Nothing is done where the folder is there: its name stands for its content. Of several processes
    at it, the first to end wins, and the others find the same.
    """
    if folder.exists():
        return
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        write(scratch)
        with contextlib.suppress(OSError):
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
