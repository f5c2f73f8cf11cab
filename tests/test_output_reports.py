"""The reports of the tasks whose systems are output layers, labels and words."""

import html
import re

import pytest

from aftermax.lab import labels_page, plots, words_page
from aftermax.lab.draw import look
from aftermax.lab.imports import import_into
from aftermax.lab.labels_work import LabelsWork
from aftermax.lab.outputs import LABEL_OUTPUTS, WORD_OUTPUTS
from aftermax.lab.report import settings, tables, terminal_table, write_report
from aftermax.lab.results import Results
from aftermax.lab.store import Store
from aftermax.lab.words_work import WordsWork

from .lab_work import latest_results
from .test_report import Links, assert_drawn, assert_shown_in_a_browser, without

PAGES = {"labels": labels_page.PAGE, "words": words_page.PAGE}


@pytest.fixture(scope="module")
def out(output_comparison):
    return output_comparison[0]


@pytest.fixture(scope="module")
def results(out) -> Results:
    return latest_results(out)


def test_compare_says_what_it_read_what_it_took_and_what_came_out(output_comparison, results):
    out, said = output_comparison
    assert f"{results.work.task}: " in said
    for system in results.work.systems:
        assert re.search(rf"{system}: \S+ \(.*: \d.*, .*: \d.*\)", said)
        assert re.search(rf"{system} +\d+\.\d+ ", said)
    assert f"report: {out / 'report.html'}" in said


def test_every_phase_is_in_the_store(results):
    for system in results.work.systems:
        assert results.at(system, results.work.headline, 1).count == 3
        assert len(results.tuning[system]) >= 2
        assert results.cost(system, "peak_mebibytes") is not None
        assert results.at(system, "parameters", 1).sd == 0
    assert results.cost("softmax", "speed_ratio") == 1


def test_the_page_has_its_own_question_figures_and_numbers(out, results):
    page, said = (out / "report.html").read_text(encoding="utf-8"), PAGES[results.work.task]
    assert f"<h1>{said.question}</h1>" in html.unescape(page)
    figures = re.findall(r"<figure>\s*<svg.*?</svg>\s*<figcaption>(.*?)</figcaption>", page, re.S)
    assert [html.unescape(caption) for caption in figures] == [
        caption for _, caption in said.captions.values()
    ]
    assert list(said.captions) == list(plots.FIGURES[results.work.task])
    for title, (columns, rows) in tables(results).items():
        assert f"<h3>{html.escape(title)}</h3>" in page
        for cell in [*columns, *(cell.text for row in rows for cell in row)]:
            assert html.escape(cell) in page
    for value in [*settings(results).values(), *results.verdicts()]:
        assert value in html.unescape(page)
    links = Links()
    links.feed(page)
    assert [link for link in links.found if not link.startswith("#")] == []


def test_what_is_not_measured_yet_is_a_dash(results, tmp_path):
    half = without(results, lambda s, m, n: m in ("speed_ratio", "tokens_per_second", "R@100"))
    write_report(half, tmp_path / "half.html")
    assert "<td>–</td>" in (tmp_path / "half.html").read_text(encoding="utf-8")
    assert terminal_table(half).row_count == 4


def test_every_figure_stands_beside_the_page(out, results):
    for name in plots.FIGURES[results.work.task]:
        assert (out / "figures" / f"{name}.svg").read_text(encoding="utf-8").count("<path") > 10
        assert_drawn(out / "figures" / f"{name}.png")


def test_an_exported_work_is_imported_whole(out, results, tmp_path):
    with Store(out / "store.sqlite") as store, Store(tmp_path / "new.sqlite") as new:
        work = store.latest_work()
        store.export(work, tmp_path / "rows.parquet")
        taken = import_into(new, tmp_path / "rows.parquet")
        assert (taken.work, taken.incomplete, taken.foreign) == (work, 0, 0)
        assert Results.of_store(new, work) == results


def test_a_browser_shows_the_page_without_a_network(out, results, tmp_path):
    assert_shown_in_a_browser(out, len(PAGES[results.work.task].captions), tmp_path)


def test_every_output_layer_has_a_look_of_its_own():
    for work, outputs in ((LabelsWork(), LABEL_OUTPUTS), (WordsWork(), WORD_OUTPUTS)):
        looks = [look(work.arm(output.name)) for output in outputs]
        told = {(x["color"], x["marker"], x["linestyle"], x["markerfacecolor"]) for x in looks}
        assert len(told) == len(outputs)


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def verdicts(work, values) -> list[str]:
    held = {(s, m, 1): by_seed(*v) for (s, m), v in values.items()}
    return Results(work, "quick", {}, {}, held, {}, {}, {}).verdicts()


def test_verdicts_of_labels_compare_within_a_kind_of_layer():
    work = LabelsWork(systems=("softmax", "bce", "dual/infonce", "dual/decoupled"))
    values = {(s, "P@1"): (0.5, 0.6, 0.7) for s in work.systems}
    values["dual/decoupled", "P@1"] = (0.55, 0.65, 0.75)
    one, dual = verdicts(work, values)
    assert "against one-vs-all, softmax: P@1 not told apart (+0.0 ± 0.0 points)." in one
    assert "against dual encoder, InfoNCE: P@1 higher (+5.0 ± 0.0 points)." in dual
    assert verdicts(work, {key: value[:2] for key, value in values.items()}) == []


def test_verdicts_of_words_compare_with_the_first():
    work = WordsWork(systems=("softmax", "z-loss"))
    values = {
        ("softmax", "top1_error"): (0.8, 0.8, 0.8),
        ("z-loss", "top1_error"): (0.9, 0.9, 0.9),
        ("softmax", "top50_error"): (0.3, 0.4, 0.5),
        ("z-loss", "top50_error"): (0.3, 0.3, 0.55),
    }
    (said,) = verdicts(work, values)
    assert said.startswith("Z-loss (factored), against softmax, misses words: more (+10.0 ± 0.0")
    assert "at 1 guess, not told apart (" in said
    assert said.endswith("points) at 50 guesses.")
