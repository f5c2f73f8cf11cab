"""Packages and what they depend on, from lists of apt that the tests write themselves."""

import bz2
import gzip
import lzma
import shutil
import subprocess

import pytest

from aftermax.lab.data import debian_packages as source
from aftermax.lab.data.debian_packages import (
    HOW_TO_FETCH,
    family,
    find,
    named,
    read,
    split_of,
    stanzas,
    unpack,
)
from aftermax.lab.data.labelled import SPLITS

RELEASE = "deb.example.org_debian_dists_bookworm"

# source packages of each split, and another of test, found by their hashes
OF_SPLIT = {
    split: next(f"tool{c}" for c in "abcdefghijklmnop" if split_of(f"tool{c}") == split)
    for split in SPLITS
}
FAR = next(f"far{c}" for c in "abcdefghijklmnop" if split_of(f"far{c}") == "test")


def stanza(name, depends="", *, source=None, tags="", recommends="", pre=""):
    fields = {
        "Package": name,
        "Source": source and f"{source} (1.2)",
        "Pre-Depends": pre,
        "Depends": depends,
        "Recommends": recommends,
        "Description": f"Tool {name}",
        "Description-md5": f"md5-{name}",
        "Tag": tags,
    }
    return "".join(f"{key}: {value}\n" for key, value in fields.items() if value)


def translation(name, text):
    lines = "\n".join(f" {line}" for line in text.split("\n"))
    return f"Package: {name}\nDescription-md5: md5-{name}\nDescription-en: Tool {name}\n{lines}\n"


PACKAGES = [
    stanza("one", "libc6 (>= 2.34), python3:any | python, one", source=OF_SPLIT["train"]),
    stanza(
        "two", "libc6, zlib1g [amd64], libc6 (<< 3)", source=OF_SPLIT["train"], pre="dpkg (>= 1)"
    ),
    stanza("three", "libc6, virtual-thing", source=OF_SPLIT["tune"], tags="use::a,\n role::b"),
    stanza("four", "python3, libc6", source=OF_SPLIT["test"], recommends="dpkg | apt, cron"),
    stanza("libc6", source="glibc"),
]
TEXTS = {
    "one": "First of all.\n.\nSecond paragraph with version 12.",
    "two": "Another one.",
    "three": "It counts to 3.",
    "four": "It writes.",
    "libc6": " ".join(f"word{i}" for i in range(60)),
}


def write(folder, packages=PACKAGES, texts=TEXTS, release=RELEASE):
    name = f"{release}_main_binary-amd64_Packages"
    (folder / name).write_text("\n".join(packages))
    held = "\n".join(translation(*item) for item in texts.items())
    packed = lzma.compress(held.encode())
    (folder / f"{release}_main_i18n_Translation-en.xz").write_bytes(packed)
    signed = (
        "-----BEGIN PGP SIGNED MESSAGE-----\n\nOrigin: Debian\nCodename: bookworm\nVersion: 12.9\n"
    )
    (folder / f"{release}_InRelease").write_text(f"{signed}Date: Sat, 11 Jul 2026 10:16:37 UTC\n")
    return folder


@pytest.fixture
def lists(tmp_path):
    folder = tmp_path / "lists"
    folder.mkdir()
    return write(folder)


def labels_of(held, split):
    return [[held.labels[i] for i in row] for row in held.splits[split].labels.lists()]


def test_dependencies_are_first_alternatives_without_versions(lists):
    held = read("dependencies", lists)
    assert labels_of(held, "train") == [["libc6", "python3"], ["dpkg", "libc6", "zlib1g"]]
    assert labels_of(held, "tune") == [["libc6", "virtual-thing"]]
    assert labels_of(held, "test") == [["libc6", "python3"]]


def test_tags_and_recommends(lists):
    tags = read("tags", lists)
    assert labels_of(tags, "tune") == [["role::b", "use::a"]]
    assert tags.label_texts == ["role b", "use a"]
    recommends = read("recommends", lists)
    assert labels_of(recommends, "test") == [["cron", "dpkg"]]


def test_texts_are_the_long_descriptions(lists):
    texts = read("dependencies", lists).splits["train"].texts
    assert texts[0] == "Tool one\nFirst of all.\n\nSecond paragraph with version 12."
    named_texts = read("dependencies", lists, names=True).splits["train"].texts
    assert named_texts[0] == f"one: {texts[0]}"


def test_the_text_of_a_label_is_its_package(lists):
    held = read("dependencies", lists)
    by_name = dict(zip(held.labels, held.label_texts, strict=True))
    start = " ".join(f"word{i}" for i in range(40))
    assert by_name["libc6"] == f"libc6 (libc): Tool libc6. {start}"
    assert by_name["virtual-thing"] == "virtual-thing (virtual thing)"
    assert by_name["dpkg"] == "dpkg"
    assert held.about["labels_with_a_description"] == 1


def test_what_the_release_says_of_itself(lists):
    held = read("dependencies", lists)
    assert held.name == "Debian bookworm: descriptions of packages, dependencies"
    assert held.about["release"] == {
        "lists": "dists_bookworm",
        "Origin": "Debian",
        "Codename": "bookworm",
        "Version": "12.9",
        "Date": "Sat, 11 Jul 2026 10:16:37 UTC",
    }


def test_one_source_and_its_versions_lie_in_one_split():
    assert family("gcc-12-cross") == family("gcc-9.3-cross") == "gcc--cross"
    assert family("7zip") == "zip"
    for name in ("gcc-{}", "boost1.{}", "llvm-toolchain-{}", "postgresql-{}"):
        assert len({split_of(name.format(version)) for version in range(9, 20)}) == 1


def test_the_splits_have_their_shares():
    names = ["".join(chr(97 + i // 26**p % 26) for p in range(4)) for i in range(20_000)]
    counts = {split: sum(split_of(name) == split for name in names) for split in SPLITS}
    for split, share in source.SHARES.items():
        assert counts[split] / len(names) == pytest.approx(share, abs=0.015)


def test_held_out_texts_that_training_has_are_left_out(tmp_path):
    packages = [
        *PACKAGES,
        stanza("twin", "libc6", source=OF_SPLIT["test"]).replace("Tool twin", "Tool one"),
        stanza("late", "libc6", source=FAR),
    ]
    texts = TEXTS | {
        "twin": TEXTS["one"].replace("12", "13"),  # numbers aside, the text of "one"
        "late": TEXTS["four"],
    }
    held = "\n".join(translation(*item) for item in texts.items())
    held = held.replace("Description-en: Tool twin", "Description-en: Tool one")
    held = held.replace("Description-en: Tool late", "Description-en: Tool four")
    write(tmp_path, packages)
    (tmp_path / f"{RELEASE}_main_i18n_Translation-en.xz").write_bytes(lzma.compress(held.encode()))
    found = read("dependencies", tmp_path)
    assert found.about["repeats_left_out"] == {"tune": 0, "test": 1}
    assert len(found.splits["test"].texts) == 2  # "four" and its equal within the split


def test_security_and_updates_are_left_aside_and_the_longest_release_is_taken(lists):
    for other in (f"{RELEASE}-security", f"{RELEASE}-updates"):
        write(lists, [*PACKAGES, stanza("newer", "libc6" * 999)], release=other)
    write(lists, PACKAGES[:1], release="deb.example.org_debian_dists_trixie")
    found = find(lists)
    assert found.release == RELEASE
    assert [path.name for path in found.packages] == [f"{RELEASE}_main_binary-amd64_Packages"]
    assert len(found.translations) == 1
    assert found.inrelease.name == f"{RELEASE}_InRelease"


def test_all_components_of_a_release_are_read(lists):
    extra = f"{RELEASE}_non-free-firmware"
    (lists / f"{extra}_binary-amd64_Packages.gz").write_bytes(
        gzip.compress(stanza("five", "libc6", source=OF_SPLIT["test"]).encode())
    )
    (lists / f"{extra}_i18n_Translation-en").write_text(translation("five", "Firmware."))
    assert read("dependencies", lists).splits["test"].texts == [
        "Tool five\nFirmware.",
        "Tool four\nIt writes.",
    ]


def test_prepared_and_the_same_however_compressed(lists, tmp_path):
    held = source.build("dependencies", tmp_path / "out", lists=lists, least=1)
    assert held.label_names == ["dpkg", "libc6", "python3", "zlib1g"]
    assert held.splits["tune"].labels.lists() == [[1]]
    packages = next(lists.glob("*_Packages"))
    packages.with_name(f"{packages.name}.bz2").write_bytes(bz2.compress(packages.read_bytes()))
    packages.unlink()
    again = source.build("dependencies", tmp_path / "out", lists=lists, least=1)
    assert again.digest == held.digest
    other = source.build("dependencies", tmp_path / "out", lists=lists, least=1, names=True)
    assert other.digest != held.digest


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, lzma.compress, bz2.compress])
def test_lists_that_python_unpacks(tmp_path, pack):
    endings = {gzip.compress: ".gz", lzma.compress: ".xz", bz2.compress: ".bz2"}
    path = tmp_path / f"deb_1.2_Packages{endings.get(pack, '')}"
    path.write_bytes(pack("Package: ä\n".encode()))
    assert unpack(path) == "Package: ä\n"


@pytest.mark.skipif(shutil.which("lz4") is None, reason="no lz4 here")
def test_lists_that_a_tool_unpacks(tmp_path, monkeypatch):
    plain, packed = tmp_path / "Packages", tmp_path / "Packages.lz4"
    plain.write_text("Package: a\n")
    subprocess.run(["lz4", "-q", str(plain), str(packed)], check=True)
    assert unpack(packed) == "Package: a\n"
    monkeypatch.setattr(source, "APT_HELPER", "/nowhere")
    assert unpack(packed) == "Package: a\n"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"Packages\.lz4 cannot be read: "):
        unpack(packed)


def test_a_list_without_its_tool(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "APT_HELPER", "/nowhere")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    path = tmp_path / "Packages.lz4"
    path.write_bytes(b"\4")
    with pytest.raises(ValueError, match="neither /nowhere nor lz4cat is here"):
        unpack(path)


def test_no_lists_say_how_to_get_them(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="has no lists of packages") as raised:
            read("tags", folder)
        assert HOW_TO_FETCH in str(raised.value)
    assert "apt-get -o Dir::State::lists=$PWD/apt-lists" in HOW_TO_FETCH


def test_lists_without_long_descriptions_say_how_to_get_them(lists):
    next(lists.glob("*Translation-en*")).unlink()
    with pytest.raises(FileNotFoundError, match="one-line descriptions alone") as raised:
        read("dependencies", lists)
    assert HOW_TO_FETCH in str(raised.value)


def test_lists_without_such_labels(tmp_path):
    write(tmp_path, [PACKAGES[0]])
    with pytest.raises(ValueError, match=r"none of the 1 packages .* has the field Tag"):
        read("tags", tmp_path)


def test_an_unknown_kind(lists):
    with pytest.raises(ValueError, match="kind is 'suggests'; one of 'tags', 'dependencies'"):
        read("suggests", lists)


def test_stanzas_keep_their_lines():
    text = "\n\nPackage: a\nDescription: x\n more\n .\n end\n\n\nPackage: b\n"
    assert list(stanzas(text)) == [
        {"Package": "a", "Description": "x\n more\n .\n end"},
        {"Package": "b"},
    ]


def test_names_with_their_words():
    assert named("python3-numpy") == "python3-numpy (python numpy)"
    assert named("lib32gcc-s1") == "lib32gcc-s1 (lib gcc s)"
    assert named("gcc") == "gcc"


def test_descriptions_of_a_family_stand_in_one_split_and_a_paragraph_once(lists):
    splits = source.descriptions(lists)
    texts = [p for docs in splits.values() for d in docs for p in d.text.decode().split("\n\n")]
    assert len(texts) == len(set(texts)) > 3
    names = [{d.name for d in docs} for docs in splits.values()]
    assert sum(map(len, names)) == len(set.union(*names))
