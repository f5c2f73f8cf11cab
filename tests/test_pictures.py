"""Pictures on photographs: what is taken once, what stays together, what is asked, by hand."""

import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aftermax.lab.data import icons, pictures
from aftermax.lab.data.pictures import COLOURS, STRIPS, Pictures, dominant, edges, pieces, prepare
from aftermax.lab.experts_work import ExpertsWork

SIZE = 8


def drawing(seed: int, side: int = 16) -> Image.Image:
    """A square of one colour with noise in it, transparent around."""
    chance = np.random.default_rng(seed)
    pixels = np.zeros((side, side, 4), np.uint8)
    middle = slice(side // 4, 3 * side // 4)
    pixels[middle, middle] = chance.integers(0, 256, 4)
    pixels[middle, middle, :3] ^= chance.integers(0, 8, (side // 2, side // 2, 3), dtype=np.uint8)
    pixels[middle, middle, 3] = 255
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    held = io.BytesIO()
    image.save(held, "png")
    return held.getvalue()


def theme(path: Path, files: dict[str, bytes | str]) -> Path:
    """What `dpkg-deb --fsys-tarfile` writes of a package; a string is a link."""
    with tarfile.open(path, "w") as held:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./usr/share/icons/{name}")
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                held.addfile(member)
            else:
                member.size = len(content)
                held.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def packages(monkeypatch):
    """Packages that are plain archives, so that no dpkg is needed."""
    run = subprocess.run

    def unpacked(command, **options):
        if command[0] != "dpkg-deb":
            return run(command, **options)
        return subprocess.CompletedProcess(command, 0, Path(command[-1]).read_bytes(), b"")

    monkeypatch.setattr(icons.subprocess, "run", unpacked)
    monkeypatch.setattr(icons.shutil, "which", lambda name: name)


# icons


def test_an_icon_is_taken_once_in_the_nearest_size(tmp_path, packages):
    files = {f"T/{side}x{side}/actions/go.png": png(drawing(side, side)) for side in (8, 16, 32)}
    files |= {"T/actions/24/back.png": png(drawing(1, 24)), "T/scalable/actions/go.svg": b"<svg/>"}
    files |= {"T/16x16/panel/tray.png": png(drawing(2)), "T/16x16/mimes/text.png": png(drawing(3))}
    found, _ = icons.read([theme(tmp_path / "t_1_all.deb", files)], 16)
    assert [(icon.context, icon.name) for icon in found] == [
        ("actions", "back"), ("actions", "go"), ("mimetypes", "text"),
    ]  # fmt: skip
    assert np.array_equal(found[1].pixels, icons.resized(drawing(16, 16), 16))
    small, _ = icons.read([tmp_path / "t_1_all.deb"], 64)
    assert np.array_equal(small[1].pixels, icons.resized(drawing(32, 32), 64))


def test_names_that_are_one_picture_are_one_family(tmp_path, packages):
    same = png(drawing(7))
    first = {
        "A/16x16/actions/open.png": same,
        "A/16x16/actions/gtk-open.png": "open.png",
        "A/16x16/status/level-10.png": png(drawing(1)),
        "A/16x16/status/level-20.png": png(drawing(2)),
        "A/16x16/places/alone.png": png(drawing(3)),
    }
    second = {
        "B/16x16/actions/gtk-open.png": png(drawing(4)),
        "B/16x16/apps/folder.png": same,
        "B/16x16/places/alone.png": png(drawing(5)),
    }
    parts = [theme(tmp_path / f"{n}_1_all.deb", f) for n, f in (("a", first), ("b", second))]
    found, family = icons.read(parts, 16)
    assert len(found) == 7
    assert family["open"] == family["gtk-open"] == family["folder"]
    assert family["level-10"] == family["level-20"]
    assert len({*family.values()}) == 3


def test_chains_of_pairs_join():
    found = icons.families("abcde", [("a", "b"), ("c", "d"), ("d", "b")])
    assert found == {"a": "a", "b": "a", "c": "a", "d": "a", "e": "e"}


def test_packages_are_fetched_once_by_apt_itself(tmp_path, monkeypatch):
    asked = []

    def download(command, cwd, **_):
        asked.append(command)
        for name in command[2:]:
            (Path(cwd) / f"{name}_1_all.deb").write_bytes(b"")
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(icons.shutil, "which", lambda name: name)
    monkeypatch.setattr(icons.subprocess, "run", download)
    icons.fetch(tmp_path / "p", ["x-icons", "y-icons"])
    icons.fetch(tmp_path / "p", ["x-icons", "z-icons"])
    assert asked == [
        ["apt-get", "download", "x-icons", "y-icons"],
        ["apt-get", "download", "z-icons"],
    ]
    assert [path.name for path in icons.packages_of(tmp_path / "p")] == [
        "x-icons_1_all.deb", "y-icons_1_all.deb", "z-icons_1_all.deb",
    ]  # fmt: skip
    assert len([*(tmp_path / "p").iterdir()]) == 3


def test_without_apt_or_where_it_fails_the_command_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(icons.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="there is no apt-get here"):
        icons.fetch(tmp_path)
    monkeypatch.setattr(icons.shutil, "which", lambda name: name)
    failed = subprocess.CompletedProcess([], 100, b"", b"E: first\nE: no such package")
    monkeypatch.setattr(icons.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"E: no such package\. By hand:\n +apt-get download"):
        icons.fetch(tmp_path)
    (tmp_path / "bad_1_all.deb").write_bytes(b"no package")
    with pytest.raises(ValueError, match=r"bad_1_all\.deb is no Debian package"):
        icons.read([tmp_path / "bad_1_all.deb"], 16)


# what is asked


def test_edges_by_hand():
    """A bright square: Sobel's gradient at a corner, on a side, inside it."""
    image = torch.zeros(1, 3, 6, 6)
    image[:, :, 2:5, 2:5] = 0.3
    # on a side 4/8 of the step, at a corner pixel 3/8 both ways; at the pixel that only touches a
    # corner 1/8 both ways: 0.3 * sqrt(2) / 8 = 0.053
    expected = torch.zeros(6, 6)
    expected[1:6, 1:6] = 1
    for row, column in ((1, 1), (1, 5), (5, 1), (5, 5), (3, 3)):
        expected[row, column] = 0
    assert torch.equal(edges(image)[0], expected)
    assert edges(torch.full((1, 3, 6, 6), 0.7)).sum() == 0  # a border is no edge


def test_brightness_weighs_the_colours():
    image = torch.zeros(1, 3, 4, 4)
    image[:, 2, :, 2:] = 1.0  # blue counts 0.114, half of which is below EDGE
    assert edges(image).sum() == 0
    image[:, 1, :, 2:] = 1.0
    assert edges(image).sum() == 8


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        ((10, 20, 30), "black"), ((120, 125, 118), "grey"), ((250, 250, 245), "white"),
        ((220, 30, 20), "red"), ((240, 200, 30), "yellow"), ((30, 160, 40), "green"),
        ((40, 200, 210), "cyan"), ((40, 60, 200), "blue"), ((200, 40, 190), "magenta"),
        ((220, 20, 60), "red"),
    ],
)  # fmt: skip
def test_the_name_of_a_colour(colour, name):
    pixels = np.full((3, 3, 4), 255, np.uint8)
    pixels[..., :3] = colour
    assert COLOURS[dominant(pixels)] == name


def test_the_dominant_colour_is_counted_by_alpha():
    pixels = np.zeros((1, 4, 4), np.uint8)
    pixels[0, :3] = (255, 0, 0, 80)
    pixels[0, 3] = (0, 0, 255, 255)
    assert COLOURS[dominant(pixels)] == "blue"
    pixels[0, :3, 3] = 90
    assert COLOURS[dominant(pixels)] == "red"


# a set


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Pictures:
    return prepare("digits", None, SIZE, 0, tmp_path_factory.mktemp("digits"))


def test_digits_are_ink_on_pieces_of_photographs(digits):
    counts = {name: len(held.labels) for name, held in digits.splits.items()}
    assert sum(counts.values()) == 1797
    assert counts["test"] == pytest.approx(0.25 * 1797, abs=10)
    asked = digits.held_out("test")
    assert asked.images.shape == (counts["test"], 3, SIZE, SIZE)
    assert asked.answers["mask"].shape == asked.answers["edges"].shape == (counts["test"], 8, 8)
    from sklearn.datasets import load_digits

    ink, labels = load_digits(return_X_y=True)
    known = {row.round().astype(np.uint8).tobytes(): label for row, label in
             zip(ink * 255 / 16, labels, strict=True)}  # fmt: skip
    held = digits.splits["test"]
    for pixels, label, mask in zip(held.pixels, held.labels, asked.answers["mask"], strict=True):
        assert known[pixels[3].reshape(64).numpy().tobytes()] == label
        assert torch.equal(mask, (pixels[3] >= 128).float())
    again = digits.held_out("test")
    assert torch.equal(again.images, asked.images)


def test_no_picture_and_no_piece_of_a_photograph_is_in_two_splits(digits):
    seen = [{p.numpy().tobytes() for p in held.pixels} for held in digits.splits.values()]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 1797
    assert [*STRIPS.values()] == [(0.0, 0.56), (0.56, 0.78), (0.78, 1.0)]
    for held in digits.splits.values():
        assert len(held.backs) == 2
    widths = [sum(held.backs[i].shape[2] for held in digits.splits.values()) for i in (0, 1)]
    assert widths == [320, 320]


def test_where_there_is_no_ink_there_is_the_photograph(digits):
    held = digits.splits["test"]
    asked = digits.held_out("test")
    generator = torch.Generator().manual_seed(0)
    torch.rand((len(held.labels), 3, 1, 1), generator=generator)  # the ink
    back = pieces(held.backs, len(held.labels), SIZE, generator)
    clear = (held.pixels[:, 3:] == 0).expand(-1, 3, -1, -1)
    assert torch.equal(asked.images[clear], back[clear])
    inked = held.pixels[:, 3] == 255
    assert inked.any()
    for image, ink in zip(asked.images, inked, strict=True):
        assert len(image[:, ink].T.unique(dim=0)) == (1 if ink.any() else 0)


def test_a_batch_hangs_on_its_generator_alone(digits):
    one, two, other = (
        digits.random(16, 2, True, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one.images, two.images)
    assert not torch.equal(one.images, other.images)
    assert one.answers["class"].unique().numel() > 3
    assert 0.05 < one.answers["mask"].mean() < 0.6


def test_masks_move_and_turn_with_their_pictures(digits):
    held = digits.splits["train"]
    asked = digits.random(40, 2, True, torch.Generator().manual_seed(3))
    wide = torch.nn.functional.pad((held.pixels[:, 3] >= 128).float(), (2,) * 4)
    every = [wide[:, y : y + SIZE, x : x + SIZE] for y in range(5) for x in range(5)]
    plain = 0
    for mask, label in zip(asked.answers["mask"], asked.answers["class"], strict=True):
        straight = torch.stack([(part == mask).flatten(1).all(1) for part in every]).any(0)
        turned = torch.stack([(part == mask.flip(1)).flatten(1).all(1) for part in every]).any(0)
        assert label in held.labels[straight | turned]
        plain += bool(straight.any())
    assert 5 < plain < 40


def test_the_split_hangs_on_its_seed_alone_and_a_set_is_prepared_once(digits, tmp_path):
    again, other = (prepare("digits", None, SIZE, seed, tmp_path) for seed in (0, 1))
    assert again.digest == digits.digest != other.digest
    held = prepare("digits", None, SIZE, 0, tmp_path)
    assert held.folder == again.folder
    assert len([*tmp_path.iterdir()]) == 2
    assert held.normed(held.held_out("train").images).mean().item() == pytest.approx(0, abs=1e-5)


def test_icons_of_a_family_stay_together(tmp_path, packages, monkeypatch):
    monkeypatch.setattr(pictures, "LEAST", 4)
    files, seed = {}, 0
    for context in ("actions", "places"):
        for name in "abcdefghijkl":
            for theme_name in "XY":
                seed += 1
                files[f"{theme_name}/16x16/{context}/{context}-{name}.png"] = png(drawing(seed))
    files["X/16x16/apps/few.png"] = png(drawing(100))
    files["X/16x16/actions/empty.png"] = png(Image.new("RGBA", (16, 16)))
    both = {"x": {}, "y": {}}
    for name, content in files.items():
        both[name[0].lower()][name] = content
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in both.items():
        theme(folder / f"{name}-theme_1.0_all.deb", content)
    found = prepare("icons", folder, 16, 0, tmp_path / "out")
    assert found.classes == ("actions", "places")
    assert found.meta["packages"] == {"x-theme": "1.0", "y-theme": "1.0"}
    assert found.meta["families"] == {"test": 6, "tune": 4, "train": 14}
    assert [len(held.labels) for held in found.splits.values()] == [12, 8, 28]
    assert (found.outlined, found.outputs("colour")) == (True, 9)


def folder_of(path: Path, clear: bool, counts=(8, 7)) -> Path:
    seed = 0
    for name, count in zip(("one", "two"), counts, strict=False):
        (path / name).mkdir(parents=True)
        (path / name / "notes.txt").write_text("no image")
        for i in range(count):
            seed += 1
            image = drawing(seed)
            (image if clear else image.convert("RGB")).save(path / name / f"{name}{i}.png")
    return path


def test_a_folder_with_alpha_has_masks_and_one_without_has_none(tmp_path):
    clear = prepare("digits", folder_of(tmp_path / "clear", True), 16, 0, tmp_path / "out")
    assert clear.outputs("mask") == 1
    assert clear.held_out("train").answers["mask"].mean().item() == pytest.approx(0.25)
    opaque = prepare("digits", folder_of(tmp_path / "opaque", False), 16, 0, tmp_path / "out")
    assert (opaque.outputs("class"), opaque.outputs("edges"), opaque.outputs("colour")) == (2, 1, 9)
    with pytest.raises(ValueError, match=r"no transparency .* masks.*--questions class edges"):
        opaque.outputs("mask")
    asked, held = opaque.held_out("test"), opaque.splits["test"]
    assert torch.equal(asked.images, held.pixels[:, :3].float() / 255)
    assert held.backs == ()


def test_the_same_pixels_in_a_folder_are_taken_once(tmp_path):
    folder = folder_of(tmp_path / "in", True)
    for i in range(3):
        Image.open(folder / "one" / "one0.png").save(folder / "two" / f"again{i}.png")
    found = prepare("digits", folder, 16, 0, tmp_path / "out")
    assert found.meta["repeated"] == 3
    assert sum(len(held.labels) for held in found.splits.values()) == 15


def test_images_of_two_classes_may_be_numbered_alike(tmp_path):
    folder = folder_of(tmp_path / "in", True)
    for name in ("one", "two"):
        for i, path in enumerate(sorted((folder / name).glob("*.png"))):
            path.rename(path.with_name(f"{i}.png"))
    found = prepare("digits", folder, 16, 0, tmp_path / "out")
    assert sum(found.meta["families"].values()) == 15
    assert all(set(held.labels.tolist()) == {0, 1} for held in found.splits.values())


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (lambda path: path / "nowhere", 16, "there is no such folder"),
        (lambda path: folder_of(path / "in", True, (8,)), 16, "has images of 1 classes"),
        (lambda path: folder_of(path / "in", True, (8, 2)), 16, "class two has 2 different"),
        (lambda path: folder_of(path / "in", True), 100, "pieces of up to 70 pixels for the tune"),
    ],
)
def test_what_cannot_be_prepared_is_refused(tmp_path, make, size, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare("digits", make(tmp_path), size, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_asked_is_refused(digits):
    work = ExpertsWork(questions=("class", "edges"), systems=("experts/softmax",))
    with pytest.raises(ValueError, match="of class, edges; leave the model out of --systems"):
        work.arm("experts/softmax/alone-mask")
    with pytest.raises(ValueError, match="there is no task depth; there are class, colour, mask"):
        digits.outputs("depth")
    with pytest.raises(ValueError, match="has no colours of its own"):
        digits.outputs("colour")
