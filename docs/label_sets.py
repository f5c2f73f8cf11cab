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


def summary(_: Results) -> str:
    """The sets side by side: each loss on the dual encoder, the best one-vs-all layer, the tree."""
    sets = {
        "tags": TAGS,
        "tags, sentence encoder too": TAGS_SENTENCES,
        "dependencies, sentence encoder too": DEPENDENCIES,
    }
    held = {name: Results.of_parquet(path) for name, path in sets.items() if path.exists()}
    if not held:
        return "Not measured yet."
    shown = ("P@1", "PSP@5", "R@100")
    titles = [f"{name}: {', '.join(shown)}" for name in held]
    lines = [f"| | {' | '.join(titles)} |", f"| --- |{' --: |' * len(held)}"]
    for system in ("dual/infonce", "dual/bce", "dual/decoupled", "dual/soft-topk"):
        title = next(a.title for r in held.values() for a in r.arms if a.name == system)
        lines.append(f"| {title} | {' | '.join(_three(r, system, shown) for r in held.values())} |")
    best = [_best_one_vs_all(results) for results in held.values()]
    cells = [_three(r, b, shown) + f" ({b})" for r, b in zip(held.values(), best, strict=True)]
    lines.append(f"| best one-vs-all | {' | '.join(cells)} |")
    trees = []
    for results in held.values():
        runs = [run for run in tree_runs(results.data["digest"]) if run["tree"] == "Parabel"]
        means = [100 * statistics.mean(run[m] for run in runs) for m in shown] if runs else []
        trees.append(", ".join(f"{mean:.1f}" for mean in means) or "–")
    lines.append(f"| *omikuji, Parabel* (words alone) | {' | '.join(trees)} |")
    ratios = [_ratio(results, one) for results, one in zip(held.values(), best, strict=True)]
    lines.append(f"| parameters, one-vs-all over dual | {' | '.join(ratios)} |")
    return "\n".join(lines)


def _three(results: Results, system: str, measures: tuple[str, ...]) -> str:
    return ", ".join(f"{100 * _spread(results, system, m).mean:.1f}" for m in measures)


def _best_one_vs_all(results: Results) -> str:
    names = [arm.name for arm in results.arms if not arm.name.startswith("dual/")]
    return max(names, key=lambda name: _spread(results, name, "P@1").mean)


def _ratio(results: Results, one_vs_all: str) -> str:
    """Of all parameters, and of those that are there for the labels alone."""
    whole, own = (
        _spread(results, one_vs_all, m).mean / _spread(results, "dual/decoupled", m).mean
        for m in ("parameters", "label_parameters")
    )
    return f"{whole:.2f}x; for labels alone {own:.0f}x"


def _spread(results: Results, system: str, measure: str) -> Spread:
    found = results.at(system, measure, 1)
    assert found is not None, f"{system} has no {measure}"
    return found


def _trees(digest: str) -> list[str]:
    """Rows of the trees on the set with this digest; mean and deviation of the runs."""
    lines, runs = [], tree_runs(digest)
    for tree in dict.fromkeys(run["tree"] for run in runs):
        own = [run for run in runs if run["tree"] == tree]
        cells = []
        for measure in MEASURES:
            found = spread({i: run[measure] for i, run in enumerate(own)})
            assert found is not None
            cells.append(found.times(100).text(1))
        size = statistics.mean(run["model_bytes"] for run in own) / 2**20
        told = f"{size:.1f} MiB" if size else "–"
        lines.append(f"| *{TREE_TITLES[tree]}* | {' | '.join(cells)} | {told} | – | – |")
    return lines


def tree_runs(digest: str) -> list[dict]:
    sets = json.loads(TREES.read_text())["sets"]
    return [run for held in sets if held["digest"] == digest for run in held["runs"]]
