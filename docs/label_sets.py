"""The task of labels on Debian's packages (docs/results/labels_*.parquet), and trees beside it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from aftermax.lab.results import Results, Spread, spread

RESULTS = Path(__file__).parent / "results"
TAGS = RESULTS / "labels_tags.parquet"
TAGS_SENTENCES = RESULTS / "labels_tags_sentences.parquet"
DEPENDENCIES = RESULTS / "labels_dependencies.parquet"
TREES = RESULTS / "label_trees.json"
TREE_TITLES = {
    "popularity": "the most frequent labels",
    "PLT": "napkinXC, label tree",
    "Parabel": "omikuji, Parabel",
}
MEASURES = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5", "nDCG@5", "R@10", "R@100")


def label_set(results: Results) -> str:
    """Every output layer on one set, then the label trees on the same documents."""
    lines = [
        f"| | {' | '.join(MEASURES)} | parameters | of them for labels | speed |",
        f"| --- |{' --: |' * (len(MEASURES) + 3)}",
    ]
    best = {m: max(_spread(results, arm.name, m).mean for arm in results.arms) for m in MEASURES}
    for arm in results.arms:
        cells = []
        for measure in MEASURES:
            found = _spread(results, arm.name, measure)
            text = found.times(100).text(1)
            cells.append(f"**{text}**" if found.mean == best[measure] else text)
        for measure in ("parameters", "label_parameters"):
            cells.append(f"{_spread(results, arm.name, measure).mean:,.0f}")
        ratio = results.cost(arm.name, "speed_ratio")
        cells.append("–" if ratio is None else f"{ratio:.2f}")
        lines.append(f"| {arm.title} | {' | '.join(cells)} |")
    return "\n".join([*lines, *_trees(results.data["digest"])])


def _spread(results: Results, system: str, measure: str) -> Spread:
    found = results.at(system, measure, 1)
    assert found is not None, f"{system} has no {measure}"
    return found


def _trees(digest: str) -> list[str]:
    """Of the set with this digest; mean and deviation of the runs."""
    if not TREES.exists():
        return []
    lines = []
    for held in json.loads(TREES.read_text())["sets"]:
        if held["digest"] != digest:
            continue
        for tree in dict.fromkeys(run["tree"] for run in held["runs"]):
            runs = [run for run in held["runs"] if run["tree"] == tree]
            cells = []
            for measure in MEASURES:
                found = spread({i: run[measure] for i, run in enumerate(runs)})
                assert found is not None
                cells.append(found.times(100).text(1))
            size = statistics.mean(run["model_bytes"] for run in runs) / 2**20
            size_told = f"{size:.1f} MiB" if size else "–"
            lines.append(f"| *{TREE_TITLES[tree]}* | {' | '.join(cells)} | {size_told} | – | – |")
    return lines
