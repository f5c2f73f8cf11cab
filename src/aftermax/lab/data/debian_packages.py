"""A real set of texts with many labels from apt's own lists: what a package says -> what it needs.

Any Debian or Ubuntu machine has them: each package's description, and beside it the packages that
it depends on (some ten thousand labels with a text of their own), or its tags (some hundred).

Splits go by *family*: the source package without the digits of its name (gcc-11 and gcc-12 are one,
gcc-12-cross is another). What is built from one source shares text and dependencies, and so
do the versions of one source; split by package, the test would be learned by heart. What remains,
a held-out text that an earlier split has word for word (numbers aside), is left out.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from aftermax.lab.data.labelled import SPLITS, LabelledTexts, Raw, Source, prepare
from aftermax.lab.data.ragged import Ragged
from aftermax.lab.data.sources import Document
from aftermax.lab.data.vocabulary import words_of

Kind = Literal["tags", "dependencies", "recommends"]

FIELDS: dict[str, tuple[str, ...]] = {
    "tags": ("Tag",),
    "dependencies": ("Pre-Depends", "Depends"),
    "recommends": ("Recommends",),
}

SHARES = {"train": 0.65, "tune": 0.10, "test": 0.25}
"""Of the families; the shares of documents are near them."""

SYSTEM_LISTS = Path("/var/lib/apt/lists")

APT_HELPER = "/usr/lib/apt/apt-helper"

LABEL_WORDS = 40
"""How much of a package's long description goes into the text of a label."""

HOW_TO_FETCH = """\
    mkdir -p apt-lists/partial apt-cache/archives/partial
    apt-get -o Dir::State::lists=$PWD/apt-lists -o Dir::Cache=$PWD/apt-cache \\
        -o Acquire::Languages=en update
(no root is needed and the system's own lists stay as they are), then give the folder apt-lists as
`lists` (on the command line: --data apt-lists)"""

PACKAGES = re.compile(
    r"(?P<release>(?:.+_)?dists_[^_]+)_(?P<component>.+)_binary-(?P<machine>[^_]+)_Packages"
    r"(?P<packing>\.\w+)?"
)
POCKET = re.compile(r"dists_[^_]+-(security|updates|backports|proposed)\b")
"""Changes from week to week, and has the same packages once more."""


class Package(NamedTuple):
    name: str
    source: str
    summary: str
    description: str
    fields: dict[str, str]

    @property
    def text(self) -> str:
        return f"{self.summary}\n{self.description}".strip()


@dataclass(frozen=True)
class Lists:
    """Files of one release on one architecture."""

    release: str
    """As the names of its files begin: archive and release."""
    packages: tuple[Path, ...]
    translations: tuple[Path, ...]
    inrelease: Path | None


def build(
    kind: Kind,
    out: Path,
    *,
    lists: Path | None = None,
    names: bool = False,
    least: int = 2,
    bigrams: int = 0,
) -> LabelledTexts:
    """`prepare` of what `read` finds. The same lists give the same digest, however compressed."""
    return prepare(read(kind, lists, names=names), out, least=least, bigrams=bigrams)


def read(kind: Kind, lists: Path | None = None, *, names: bool = False) -> Source:
    """The set with these labels.

    Args:
        kind: "dependencies" (Pre-Depends and Depends), "recommends" (Recommends), of which the
            first alternative counts and the version does not; or "tags" (debtags; Ubuntu's lists
            have few or none).
        lists: folder of apt's lists; None is the system's. Of several releases or architectures the
            one with the longest lists is taken; security and updates are left aside.
        names: put the name of the package before its description.

    Raises:
        ValueError: for another kind, or lists without any such labels.
        FileNotFoundError: where there are no lists, or none with long descriptions, with the
            commands that fetch them.
    """
    if kind not in FIELDS:
        raise ValueError(f"kind is {kind!r}; one of {', '.join(map(repr, FIELDS))} would be right")
    found = find(SYSTEM_LISTS if lists is None else lists)
    packages = _packages(found)
    of_package = {p.name: sorted(set(_labels(kind, p)) - {p.name}) for p in packages}
    labelled = [p for p in packages if of_package[p.name]]
    if not labelled:
        raise ValueError(
            f"none of the {len(packages)} packages of {found.release} has the field"
            f" {' or '.join(FIELDS[kind])}, which {kind} are read from"
        )
    parts, repeats = _without_repeats(labelled)
    label_names = sorted({label for p in labelled for label in of_package[p.name]})
    ids = {label: i for i, label in enumerate(label_names)}
    splits = {
        split: Raw(
            Ragged.of([ids[label] for label in of_package[p.name]] for p in part),
            [f"{named(p.name)}: {p.text}" if names else p.text for p in part],
        )
        for split, part in parts.items()
    }
    by_name = {p.name: p for p in packages}
    texts = [_label_text(kind, label, by_name.get(label)) for label in label_names]
    about = {
        "release": _release(found),
        "packages": len(packages),
        "families": len({family(p.source) for p in labelled}),
        "repeats_left_out": repeats,
        "labels_with_a_description": sum(label in by_name for label in label_names),
    }
    title = about["release"].get("Codename", found.release.rpartition("_")[2])
    origin = about["release"].get("Origin", "Debian")
    what = "descriptions with names" if names else "descriptions"
    return Source(
        f"{origin} {title}: {what} of packages, {kind}", label_names, splits, texts, about=about
    )


def has_lists(folder: Path) -> bool:
    """Whether these are apt's."""
    return any(folder.glob("*_Packages*"))


def descriptions(lists: Path | None = None) -> dict[str, list[Document]]:
    """The descriptions as running text, by split: of a family all in one, each paragraph once.

    What is built from one source says much in the same words; a paragraph that training has would
    be learned by heart.

    Raises:
        As `read`.
    """
    packages = _packages(find(SYSTEM_LISTS if lists is None else lists))
    of_split = {split: [p for p in packages if split_of(p.source) == split] for split in SPLITS}
    seen: set[str] = set()
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for split, parts in of_split.items():
        for package in parts:
            new = [text for text in package.text.split("\n\n") if text.strip() not in seen]
            seen |= {text.strip() for text in new}
            if new:
                splits[split].append(Document(package.name, "\n\n".join(new).encode()))
    return splits


def find(folder: Path) -> Lists:
    """The lists of one release in a folder.

    Raises:
        FileNotFoundError: as `read`.
    """
    groups: dict[tuple[str, str], list[Path]] = {}
    components: dict[str, set[str]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = PACKAGES.fullmatch(path.name)
        if name and not POCKET.search(name["release"]):
            groups.setdefault((name["release"], name["machine"]), []).append(path)
            components.setdefault(name["release"], set()).add(name["component"])
    if not groups:
        raise FileNotFoundError(
            f"{folder} has no lists of packages (files named ..._dists_..._Packages). To get them"
            f" into a folder of your own:\n{HOW_TO_FETCH}"
        )
    release, _ = chosen = max(groups, key=lambda key: sum(p.stat().st_size for p in groups[key]))
    wanted = re.compile(
        rf"{re.escape(release)}_({'|'.join(map(re.escape, components[release]))})"
        r"_i18n_Translation-en(\.\w+)?"
    )
    translations = tuple(sorted(p for p in folder.iterdir() if wanted.fullmatch(p.name)))
    if not translations:
        raise FileNotFoundError(
            f"{folder} has one-line descriptions alone (no {release}_..._i18n_Translation-en;"
            f' images of containers set Acquire::Languages "none"). To get the long ones into a'
            f" folder of your own:\n{HOW_TO_FETCH}"
        )
    signed = [folder / f"{release}_{name}" for name in ("InRelease", "Release")]
    return Lists(
        release,
        tuple(groups[chosen]),
        translations,
        next((path for path in signed if path.exists()), None),
    )


def unpack(path: Path) -> str:
    """A list as text, whatever apt keeps it in.

    Raises:
        ValueError: for what neither Python nor a tool on this machine can read.
    """
    own: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.decompress,
        ".xz": lzma.decompress,
        ".lzma": lzma.decompress,
        ".bz2": bz2.decompress,
    }
    packing = path.suffix if path.suffix in (*own, ".lz4", ".zst") else ""
    if packing in own:
        data = own[packing](path.read_bytes())
    elif not packing:
        data = path.read_bytes()
    else:
        tool = {".lz4": "lz4cat", ".zst": "zstdcat"}[packing]
        if Path(APT_HELPER).exists():
            command = [APT_HELPER, "cat-file", str(path)]
        elif shutil.which(tool):
            command = [tool, str(path)]
        else:
            raise ValueError(
                f"{path} is compressed with {packing[1:]}, and neither {APT_HELPER} nor {tool} is"
                f" here to read it; install {packing[1:]}, or unpack the list by hand"
            )
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            problem = done.stderr.decode(errors="replace").strip()
            raise ValueError(f"{path} cannot be read: {problem}")
        data = done.stdout
    return data.decode(errors="replace")


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """Of a list in Debian's form (deb822): the fields of each paragraph, lines joined by newlines.

    >>> next(stanzas("Package: a\\nTag: x::y,\\n z::w\\n\\nPackage: b"))
    {'Package': 'a', 'Tag': 'x::y,\\n z::w'}
    """
    for paragraph in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.split("\n"):
            if line[:1] in (" ", "\t"):
                fields[name] = f"{fields.get(name, '')}\n{line}"
            elif line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            yield fields


def family(source: str) -> str:
    """A source package's name without its digits, by which the splits go.

    >>> family("gcc-12"), family("boost1.74"), family("linux-signed-amd64")
    ('gcc-', 'boost', 'linux-signed-amd')
    """
    return re.sub(r"\d+(\.\d+)*", "", source)


def split_of(source: str) -> str:
    """The split of a source package: a hash of its family, so that it never changes.

    >>> split_of("llvm-toolchain-14") == split_of("llvm-toolchain-15")
    True
    """
    place = int(hashlib.sha256(family(source).encode()).hexdigest()[:8], 16) / 2**32
    if place < SHARES["train"]:
        return "train"
    return "tune" if place < SHARES["train"] + SHARES["tune"] else "test"


def named(package: str) -> str:
    """The name of a package, and the words in it, since a bag of words sees no parts of words.

    >>> named("libboost-filesystem1.74.0")
    'libboost-filesystem1.74.0 (boost filesystem)'
    """
    parts = re.findall(r"[a-z]+", package.lower())
    apart = [part[3:] if part.startswith("lib") and len(part) > 4 else part for part in parts]
    return f"{package} ({' '.join(apart)})" if apart and apart != [package] else package


def _packages(lists: Lists) -> list[Package]:
    """By name; the first of each name."""
    long = {}
    for path in lists.translations:
        for fields in stanzas(unpack(path)):
            long[fields.get("Description-md5")] = fields.get("Description-en", "")
    packages: dict[str, Package] = {}
    for path in lists.packages:
        for fields in stanzas(unpack(path)):
            name = fields.get("Package", "")
            if not name or name in packages:
                continue
            described = long.get(fields.get("Description-md5")) or fields.get("Description", "")
            summary, _, rest = described.partition("\n")
            lines = [line[1:] for line in rest.split("\n")]
            description = "\n".join("" if line.strip() == "." else line for line in lines)
            source = fields.get("Source", name).split(" ")[0]
            held = {f: fields[f] for of_kind in FIELDS.values() for f in of_kind if f in fields}
            packages[name] = Package(name, source, summary, description, held)
    return [packages[name] for name in sorted(packages)]


def _labels(kind: Kind, package: Package) -> Iterator[str]:
    for item in ",".join(package.fields.get(f, "") for f in FIELDS[kind]).split(","):
        label = item.strip()
        if kind != "tags":  # "python3:any (>= 3.9) | python" -> "python3"
            label = re.split(r"[|(:\[]", label, maxsplit=1)[0].strip()
        if label:
            yield label


def _label_text(kind: Kind, label: str, package: Package | None) -> str:
    if kind == "tags":
        return re.sub(r"\W+", " ", label)
    if package is None:
        return named(label)
    start = " ".join(package.description.split()[:LABEL_WORDS])
    return f"{named(label)}: {package.summary}. {start}"


def _without_repeats(packages: list[Package]) -> tuple[dict[str, list[Package]], dict[str, int]]:
    """The splits, and how many held-out documents are left out.

    Those are the documents whose words, numbers aside, an earlier split has too.
    """
    parts: dict[str, list[Package]] = {split: [] for split in SPLITS}
    for package in packages:
        parts[split_of(package.source)].append(package)
    seen: set[tuple[str, ...]] = set()
    left_out = {}
    for split, part in parts.items():
        texts = [tuple(w for w in words_of(p.text) if not w.isdigit()) for p in part]
        parts[split] = [p for p, words in zip(part, texts, strict=True) if words not in seen]
        left_out[split] = len(part) - len(parts[split])
        seen.update(texts)
    return parts, {split: left_out[split] for split in SPLITS[1:]}


def _release(lists: Lists) -> dict[str, str]:
    """What the signed file says: the set changes when the release does."""
    wanted = ("Origin", "Codename", "Version", "Date")
    about = {"lists": lists.release[lists.release.index("dists_") :]}  # whatever the mirror
    if lists.inrelease is not None:
        for line in lists.inrelease.read_text(errors="replace").splitlines():
            name, colon, value = line.partition(": ")
            if colon and name in wanted:
                about.setdefault(name, value.strip())
    return about
