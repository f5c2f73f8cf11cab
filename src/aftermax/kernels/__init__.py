"""The compiled kernels: found, loaded and asked about here.

The library is one file next to this one. Without it (a checkout that was not built) everything runs
on the reference, and `absent()` says why. `AFTERMAX_ISA` = avx512bf16, avx512, avx2 or portable
forces the body of that name; a name that this processor cannot run raises when aftermax is
imported. `AFTERMAX_LIBRARY` names another library file (the sanitized build, say).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

ISAS = ("avx512bf16", "avx512", "avx2", "portable")
"""The bodies that the library may hold, best first."""

_FILES = ("libaftermax.so", "libaftermax.dylib")


def absent() -> str | None:
    """Why there are no compiled kernels, or None where there are.

    >>> absent() is None or "reference" in absent()
    True
    """
    return _absent


def isa() -> str:
    """The body in use: one of `ISAS`.

    Raises:
        RuntimeError: where there are no kernels.
    """
    return loaded().am_isa().decode()


def use_isa(name: str) -> None:
    """Switch to another body. For tests and measurements; not while a kernel runs.

    Raises:
        ValueError: for a name that is none of `ISAS`.
        RuntimeError: where this processor, this build or the whole library lacks it.
    """
    if name not in ISAS:
        raise ValueError(f"no kernels are called {name!r}; there are {', '.join(ISAS)}")
    if loaded().am_use_isa(name.encode()) != 0:
        raise RuntimeError(f"this processor (or this build) cannot run the {name} kernels")


def loaded() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError(f"there are no compiled kernels here: {_absent}")
    return _library


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    here = Path(__file__).parent
    forced = os.environ.get("AFTERMAX_LIBRARY")
    candidates = [Path(forced)] if forced else [here / name for name in _FILES]
    found = [file for file in candidates if file.exists()]
    if not found:
        where = candidates[0] if forced else here
        return None, f"no library at {where}; `pip install .` builds it, the reference runs without"
    # the torch library that registers operators; its file stands beside torch's own
    torch_file = Path(torch.__file__).parent / "lib" / f"libtorch_cpu{found[0].suffix}"
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return None, f"{found[0].name} does not load ({error}); the reference runs without"
    try:
        library.am_register.restype = library.am_isa.restype = ctypes.c_char_p
    except AttributeError:
        return None, f"{found[0]} is no library of aftermax; the reference runs without"
    problem = library.am_register(str(torch_file).encode())
    if problem is not None:
        return None, f"{problem.decode()}; the reference runs without"
    return library, None


_library, _absent = _load()

if _library is not None:
    from aftermax.kernels import ops

    ops.define()

_forced = os.environ.get("AFTERMAX_ISA")
if _forced:
    use_isa(_forced)
