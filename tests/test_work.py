"""The work: what can be asked for, what cannot, and what gives a run its name."""

import dataclasses
import json
from pathlib import Path

import pytest

from aftermax.lab.work import PRESETS, Run, Work, arm

BASE = Work()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ()}, "systems must not be empty"),
        ({"systems": ("softmax", "lssar", "softmax")}, "one of the systems stands twice"),
        ({"systems": ("softmaxx",)}, "no system is called 'softmaxx'; the catalogue has softmax,"),
        ({"seeds": ()}, "seeds must not be empty"),
        ({"seeds": (0, 1, 0)}, "one of the seeds stands twice in 0 1 0"),
        ({"learning_rates": (1e-3, 1e-3)}, "one of the learning_rates stands twice"),
        ({"multiples": (2, 4)}, r"multiples must rise and begin with 1, got \(2, 4\)"),
        ({"multiples": (1, 4, 4)}, "multiples must rise"),
        ({"multiples": ()}, "multiples must rise"),
        ({"width": 97}, "width / heads must be a whole even number, got 97 / 3"),
        ({"width": 9}, "width / heads must be a whole even number, got 9 / 3"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"kv_heads": 2}, "kv_heads must divide heads, got 2 and 3"),
        ({"kv_heads": 0}, "kv_heads must divide heads, got 0 and 3"),
        ({"recall_share": 1.0}, "recall_share is a share of the batch below 1, got 1.0"),
        ({"context": 32}, "a context of at least 48 tokens, got 32"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"threads": -1}, "threads must be at least 1, got -1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_before_anything_runs(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


def test_an_arm_is_a_system_with_traits():
    plain, rich = arm("softmax", BASE), arm("sigmoid/alibi/hybrid/layerscale/bare", BASE)
    assert (plain.positions, plain.qk_norm, plain.hybrid_norm, plain.layer_scale) == (
        "rope", True, False, False,
    )  # fmt: skip
    assert (rich.positions, rich.qk_norm, rich.hybrid_norm, rich.layer_scale) == (
        "alibi", False, True, True,
    )  # fmt: skip
    assert rich.entry.name == "sigmoid"
    assert not arm("cosine", BASE).qk_norm  # it normalises by itself


def test_an_arm_takes_from_the_work_what_its_name_leaves_open():
    work = dataclasses.replace(BASE, positions="none", layer_scale=True, qk_norm=False)
    taken = arm("softmax", work)
    assert (taken.positions, taken.layer_scale, taken.qk_norm) == ("none", True, False)
    assert arm("softmax/rope", work).positions == "rope"


def test_titles_of_the_standard_arms_differ():
    titles = [arm(name, PRESETS["standard"]).title for name in PRESETS["standard"].systems]
    assert len(set(titles)) == len(titles)
    assert arm("softmax/alibi", BASE).title.endswith("ALiBi")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("softmax/fast", "softmax/fast: no trait fast; there are rope, p-rope, alibi, none, bare"),
        ("softmax/rope/alibi", "names 2 position encodings; give one"),
    ],
)
def test_a_trait_that_cannot_be_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        arm(name, BASE)


def test_settings_are_json_and_give_the_work_back():
    settings = json.loads(json.dumps(dataclasses.replace(BASE, data=Path("a/b")).settings()))
    assert settings["data"] == "a/b"
    assert settings["systems"] == list(BASE.systems)


def run_of(**changes) -> Run:
    fields = {"system": "softmax", "seed": 0, "learning_rate": 1e-3, "kind": "train"}
    return Run(**{"work": BASE, "data_digest": "d"} | fields | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"systems": ("softmax", "cosine")},
        {"seeds": (0, 1)},
        {"learning_rates": (1e-3, 2e-3)},
        {"data": Path("the/same/text/elsewhere")},
        {"search_steps": 7},
    ],
    ids=str,
)
def test_what_other_runs_do_is_no_part_of_a_runs_name(changes):
    """So that a work with one more system or seed takes over the runs that are done."""
    assert run_of(work=dataclasses.replace(BASE, **changes)).id == run_of().id


@pytest.mark.parametrize(
    "changes",
    [
        {"system": "softmax/alibi"},
        {"seed": 1},
        {"learning_rate": 2e-3},
        {"kind": "search"},
        {"data_digest": "e"},
        {"work": dataclasses.replace(BASE, steps=7)},
        {"work": dataclasses.replace(BASE, windows=7)},
        {"work": dataclasses.replace(BASE, multiples=(1, 2))},
        {"work": dataclasses.replace(BASE, threads=2)},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_what_changes_a_runs_numbers_changes_its_name(changes):
    assert run_of(**changes).id != run_of().id


def test_a_runs_name_is_a_folders_name():
    assert run_of(system="softmax/alibi").id.startswith("softmax+alibi-train0-")
    assert "/" not in run_of(system="sigmoid/hybrid/none").id
