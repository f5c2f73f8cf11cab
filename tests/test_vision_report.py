"""The report of the vision task: a comparison whose axis is no length."""

import dataclasses
import html
import re

import pytest

from aftermax.lab import plots
from aftermax.lab.imports import import_into
from aftermax.lab.report import settings, tables, terminal_table, write_report
from aftermax.lab.results import Results
from aftermax.lab.store import Store
from aftermax.lab.vision_page import CAPTIONS
from aftermax.lab.vision_work import VisionWork

from .lab_work import latest_results
from .test_report import Links, assert_drawn, assert_shown_in_a_browser, without

NEVER_SEEN = "Images never seen (the test split)"


@pytest.fixture(scope="module")
def out(image_comparison):
    return image_comparison[0]


@pytest.fixture(scope="module")
def page(out) -> str:
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results(out) -> Results:
    return latest_results(out)


def test_compare_says_what_it_read_what_it_took_and_what_came_out(image_comparison, results):
    out, said = image_comparison
    assert "images: scikit-learn's digits, 8 x 8, grey, 10 classes (1078 train, " in said
    for system in results.work.systems:
        assert re.search(rf"{system}: \S+ \(.*0.003: \d.*, 0.01: \d.*\)", said)
        assert re.search(rf"{system} +\d\d?\.\d\d ± \d+\.\d\d +\d\.\d\d\d ± ", said)
    assert f"report: {out / 'report.html'}" in said


def test_every_phase_is_in_the_store(results):
    assert results.work.task == "vision"
    for system in results.work.systems:
        assert results.at(system, "accuracy", 1).count == results.at(system, "loss", 1).count == 3
        assert len(results.tuning[system]) >= 2
        assert len(results.curves[system]) == 3
        assert results.cost(system, "peak_mebibytes") is not None
    assert results.cost("softmax", "speed_ratio") == 1


def test_the_page_has_its_own_question_figures_and_numbers(page, results):
    assert "<h1>Which attention tells images apart?</h1>" in page
    assert "1078 images of 10 classes, 4 patches each" in page
    figures = re.findall(r"<figure>\s*<svg.*?</svg>\s*<figcaption>(.*?)</figcaption>", page, re.S)
    assert [html.unescape(caption) for caption in figures] == [c for _, c in CAPTIONS.values()]
    assert list(CAPTIONS) == list(plots.FIGURES["vision"])
    for title, (columns, rows) in tables(results).items():
        assert f"<h3>{html.escape(title)}</h3>" in page
        for cell in [*columns, *(cell.text for row in rows for cell in row)]:
            assert html.escape(cell) in page
    for value in [*settings(results).values(), *results.verdicts()]:
        assert value in html.unescape(page)
    text = re.sub(r"<(style|svg).*?</\1>|<[^>]+>", " ", page, flags=re.S)
    assert "tokens" not in text
    assert "times that length" not in text


def test_the_page_refers_to_nothing_outside_itself(page):
    links = Links()
    links.feed(page)
    assert not {"script", "link", "iframe", "object", "embed", "base", "img"} & set(links.tags)
    assert [link for link in links.found if not link.startswith("#")] == []


def test_the_highest_accuracy_and_the_lowest_loss_are_marked(results):
    values = {("softmax", "accuracy", 4): {0: 0.9}, ("sigmoid/hybrid", "accuracy", 4): {0: 0.8}}
    values |= {("softmax", "loss", 4): {0: 2.0}, ("sigmoid/hybrid", "loss", 4): {0: 1.0}}
    _, rows = tables(dataclasses.replace(results, values=values))[NEVER_SEEN]
    assert [[cell.text for cell in row[1:]] for row in rows] == [
        ["90.00", "2.000"], ["80.00", "1.000"],
    ]  # fmt: skip
    assert [[cell.best for cell in row[1:]] for row in rows] == [[True, False], [False, True]]


def verdicts(loss, accuracy, systems=("softmax", "cosine"), baseline="softmax") -> list[str]:
    other = next(name for name in systems if name != baseline)
    values = {
        (baseline, "loss", 16): {0: 1.0, 1: 1.1, 2: 0.9},
        (baseline, "accuracy", 16): {0: 0.9, 1: 0.91, 2: 0.89},
        (other, "loss", 16): dict(enumerate(loss)),
        (other, "accuracy", 16): dict(enumerate(accuracy)),
    }
    work = VisionWork(systems=systems, patch=2, seeds=(0, 1, 2))
    return Results(work, "quick", {}, {}, values, {}, {}, {}).verdicts()


def test_verdicts_are_paired_by_seed_against_softmax():
    (said,) = verdicts([0.5, 0.6, 0.4], [0.95, 0.96, 0.94])
    assert said.startswith("cosine softmax: ")
    assert "lower loss (-0.500 ± 0.000 nats) than softmax" in said
    assert said.endswith("accuracy higher (+5.0 ± 0.0 points).")
    (said,) = verdicts([1.0, 1.3, 0.8], [0.85, 0.86, 0.84])
    assert "not told apart (" in said
    assert said.endswith("accuracy lower (-5.0 ± 0.0 points).")
    (said,) = verdicts([2.0, 2.1, 1.9], [0.9, 0.92, 0.88])
    assert "higher loss (+1.000" in said
    assert "accuracy not told apart (" in said
    assert verdicts([1.0, 1.1], [0.9, 0.9]) == []


def test_without_softmax_the_first_system_is_what_others_are_compared_with():
    (said,) = verdicts([0.5, 0.6, 0.4], [0.95, 0.96, 0.94], ("sigmoid", "cosine"), "sigmoid")
    assert said.startswith("cosine softmax: ")
    assert "than sigmoid;" in said


@pytest.mark.parametrize(
    "dropped",
    [
        lambda system, measure, length: measure in ("speed_ratio", "peak_mebibytes"),
        lambda system, measure, length: system == "sigmoid/hybrid",
        lambda system, measure, length: measure in ("effective_keys", "entropy"),
        lambda system, measure, length: system == "softmax" and measure == "accuracy",
    ],
    ids=["costs", "a system", "diagnostics", "an accuracy"],
)
def test_what_is_not_measured_yet_is_a_dash_or_left_out(results, tmp_path, dropped):
    half = without(results, dropped)
    write_report(half, tmp_path / "half.html")
    page = (tmp_path / "half.html").read_text(encoding="utf-8")
    gone = dropped("sigmoid/hybrid", "loss", 4)
    assert ("<td>–</td>" in page) is not gone
    assert terminal_table(half).row_count == (1 if gone else 2)


@pytest.mark.parametrize("name", CAPTIONS)
def test_every_figure_stands_beside_the_page(out, name):
    assert (out / "figures" / f"{name}.svg").read_text(encoding="utf-8").count("<path") > 10
    assert_drawn(out / "figures" / f"{name}.png")


def test_an_exported_work_of_images_is_imported_whole(out, results, tmp_path):
    with Store(out / "store.sqlite") as store, Store(tmp_path / "new.sqlite") as new:
        work = store.latest_work()
        store.export(work, tmp_path / "rows.parquet")
        taken = import_into(new, tmp_path / "rows.parquet")
        assert (taken.work, taken.incomplete, taken.foreign) == (work, 0, 0)
        assert Results.of_store(new, work) == results


def test_a_browser_shows_the_page_without_a_network(out, tmp_path):
    assert_shown_in_a_browser(out, len(CAPTIONS), tmp_path)
