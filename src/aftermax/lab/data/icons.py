"""Icons of Debian's themes, from their packages: the picture, its kind, what it is named.

A theme keeps an icon in a folder for each size and context (actions, apps, devices, ..). Here each
name of a context gives one picture, and names that belong together are one *family*, by which
splits go: the same name in any theme, the same without its digits, and names of which one is a link
to the other or holds the same pixels. So no picture of the test was learned in another size, under
another name or in the hand of another theme.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

PACKAGES = (
    "elementary-xfce-icon-theme",
    "faenza-icon-theme",
    "gnome-icon-theme",
    "mate-icon-theme",
    "oxygen-icon-theme",
    "tango-icon-theme",
)
"""Themes of PNG that Debian has: 80 MB."""

CONTEXTS = {
    **{
        name: name
        for name in (
            *("actions", "apps", "categories", "devices", "emblems", "emotes"),
            *("mimetypes", "places", "status"),
        )
    },
    "mimes": "mimetypes",
}
"""Folders that are read -> the context of the icon naming specification that they are."""

NAME = r"/(?P<name>[^/]+)\.png"
PLACES = (
    re.compile(rf".*/(?P<size>\d+)x\d+/(?P<context>[a-z]+){NAME}"),
    re.compile(rf".*/(?P<context>[a-z]+)/(?P<size>\d+){NAME}"),
)

HOW_TO_FETCH = f"""\
    apt-get download {" ".join(PACKAGES)}
in an empty folder of your own (no root is needed, nothing is installed; apt-get update first where
apt has no lists), then give that folder as --data"""


@dataclass(frozen=True)
class Icon:
    context: str
    name: str
    pixels: np.ndarray  # uint8 (size, size, 4)


def fetch(folder: Path, packages: Iterable[str] = PACKAGES) -> Path:
    """Have apt put the packages into a folder, those that are not there yet; the folder.

    Raises:
        ValueError: where apt cannot, with what it says and the command to try by hand.
    """
    missing = [name for name in packages if not any(folder.glob(f"{name}_*.deb"))]
    if not missing:
        return folder
    if shutil.which("apt-get") is None:
        raise ValueError(
            f"icons come from Debian's packages, and there is no apt-get here; on Debian or Ubuntu,"
            f"\n{HOW_TO_FETCH}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # a package is there whole or not
        done = subprocess.run(
            ["apt-get", "download", *missing], cwd=scratch, capture_output=True, check=False
        )
        if done.returncode:
            problem = done.stderr.decode(errors="replace").strip().splitlines()
            raise ValueError(
                f"apt-get download {' '.join(missing)}: {problem[-1] if problem else 'failed'}. "
                f"By hand:\n{HOW_TO_FETCH}"
            )
        for package in packages_of(Path(scratch)):
            package.replace(folder / package.name)
    return folder


def packages_of(folder: Path) -> list[Path]:
    """The package files of a folder, by name."""
    return sorted(folder.glob("*.deb"))


def read(packages: Iterable[Path], size: int) -> tuple[list[Icon], dict[str, str]]:
    """Every icon once, and the family of every name.

    Args:
        size: side in pixels wanted. Of the sizes of an icon the smallest that has it is taken, or
            else the largest, and drawn in it.

    Raises:
        ValueError: for a file that is no package, or where no tool here opens one.
    """
    best: dict[tuple[str, str, str], tuple[int, bytes]] = {}
    links: list[tuple[str, str]] = []
    for package in packages:
        theme = package.name.split("_")[0]
        for path, content, target in _members(package):
            found = next((m for place in PLACES if (m := place.fullmatch(path))), None)
            if found is None or found["context"] not in CONTEXTS:
                continue
            if target is not None:
                links.append((found["name"], PurePosixPath(target).stem))
                continue
            key, own = (theme, CONTEXTS[found["context"]], found["name"]), int(found["size"])
            if key not in best or _nearer(own, best[key][0], size):
                best[key] = own, content
    icons, names = [], defaultdict(list)
    for (_, context, name), (_, content) in sorted(best.items()):
        icon = Icon(context, name, drawn(content, size))
        icons.append(icon)
        names[hashlib.sha256(icon.pixels.tobytes()).digest()].append(name)
    same = [(alike[0], other) for alike in names.values() for other in alike[1:]]
    return icons, families({icon.name for icon in icons}, [*links, *same])


def families(names: Iterable[str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Each name -> the first name of its family: names without digits, joined by the pairs.

    >>> families(["battery-040", "battery-060", "open", "gtk-open", "x"], [("open", "gtk-open")])
    {'battery-040': 'battery-', 'battery-060': 'battery-', 'open': 'gtk-open',
     'gtk-open': 'gtk-open', 'x': 'x'}
    """
    above: dict[str, str] = {}

    def root(stem: str) -> str:
        while (next_ := above.get(stem, stem)) != stem:
            stem = next_
        return stem

    for pair in pairs:
        first, second = sorted(root(_stem(name)) for name in pair)
        above[second] = first
    return {name: root(_stem(name)) for name in names}


def drawn(content: bytes, size: int) -> np.ndarray:
    """A PNG as (size, size, 4), its transparent pixels black.

    Raises:
        OSError: where it cannot be read.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return resized(image.convert("RGBA"), size)


def resized(image, size: int) -> np.ndarray:
    """An RGBA image as (size, size, 4): by the mean of what a pixel covers, weighted by alpha."""
    from PIL import Image

    if image.size != (size, size):
        way = Image.Resampling.BOX if min(image.size) > size else Image.Resampling.BILINEAR
        image = image.resize((size, size), way)  # Pillow multiplies by alpha, and divides after
    pixels = np.array(image, np.uint8)
    pixels[pixels[..., 3] == 0] = 0
    return pixels


def versions(packages: Iterable[Path]) -> Mapping[str, str]:
    """Package -> version, as the files are named.

    >>> versions([Path("tango-icon-theme_0.8.90-11_all.deb")])
    {'tango-icon-theme': '0.8.90-11'}
    """
    parts = (path.name.replace("%3a", ":").split("_") for path in packages)
    return {name: version for name, version, *_ in parts}


def _stem(name: str) -> str:
    return re.sub(r"\d+", "", name)


def _nearer(size: int, than: int, wanted: int) -> bool:
    if min(size, than) >= wanted:
        return size < than
    return size > than


def _members(package: Path) -> Iterator[tuple[str, bytes, str | None]]:
    """Path, content and, of a link, what it points to."""
    if shutil.which("dpkg-deb") is None:
        raise ValueError(f"{package} is opened by dpkg-deb, which is not here")
    done = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", str(package)], capture_output=True, check=False
    )
    if done.returncode:
        raise ValueError(
            f"{package} is no Debian package: {done.stderr.decode(errors='replace').strip()}"
        )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as held:
        for member in held:
            if member.issym() or member.islnk():
                yield member.name, b"", member.linkname
            elif member.isfile() and member.name.endswith(".png"):
                content = held.extractfile(member)
                assert content is not None
                yield member.name, content.read(), None
