"""A set of texts with labels so small that a test can write it and a model can learn it."""

import gzip
import json
import random
from pathlib import Path

THINGS = ("fox", "hen", "cow", "owl", "bee", "eel", "ant", "yak")


def write_set(folder: Path, documents: int = 120) -> Path:
    """Raw texts as the Extreme Classification Repository has them: a document names its labels,
    among words that say nothing."""
    chance = random.Random(0)
    folder.mkdir(parents=True)
    for split, count in (("trn", documents), ("tst", documents // 3)):
        lines = []
        for _ in range(count):
            labels = sorted(chance.sample(range(len(THINGS)), chance.randint(1, 3)))
            words = [THINGS[i] for i in labels] + chance.choices("abcdefgh", k=5)
            chance.shuffle(words)
            lines.append(json.dumps({"title": " ".join(words), "target_ind": labels}))
        _write(folder / f"{split}.json.gz", lines)
    _write(folder / "lbl.json.gz", [json.dumps({"title": f"a {thing}"}) for thing in THINGS])
    return folder


def _write(path: Path, lines: list[str]) -> None:
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
