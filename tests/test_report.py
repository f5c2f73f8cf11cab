"""The report: one page that needs nothing but itself, and says all that was measured."""

import dataclasses
import html
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from aftermax.lab import plots
from aftermax.lab.report import tables, terminal_table, write_report
from aftermax.lab.results import Results
from aftermax.lab.text_page import CAPTIONS

from .lab_work import latest_results

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def out(comparison) -> Path:
    return comparison[0]


@pytest.fixture(scope="module")
def page(out) -> str:
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results(out) -> Results:
    return latest_results(out)


def without(results: Results, dropped) -> Results:
    """As if some values had never been measured."""
    values = {key: by for key, by in results.values.items() if not dropped(*key)}
    return dataclasses.replace(results, values=values)


# from the command line


def test_compare_prints_a_table_and_the_place_of_the_report(comparison, results):
    out, said = comparison
    assert f"report: {out / 'report.html'}" in said
    assert "loss (nats per token)" in said
    for system in results.work.systems:
        assert re.search(rf"{system} +\d\.\d\d +\d\.\d\d", said), system


def test_compare_says_which_rates_were_tried_and_taken(comparison, results):
    for system in results.work.systems:
        assert re.search(rf"{system}: \S+ \(.*0.001: \d.*, 0.003: \d.*\)", comparison[1])


def test_every_phase_is_in_the_store(results):
    assert set(results.tuning) == set(results.rates) == set(results.work.systems)
    for system in results.work.systems:
        assert results.at(system, "loss", 2).count == 3
        assert len(results.tuning[system]) >= 2  # more where the best lay at an edge
        assert results.cost(system, "peak_mebibytes") is not None
    assert results.cost("softmax", "speed_ratio") == 1


# the page


class Links(HTMLParser):
    """All that a browser would fetch or run."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        self.found += [value for name, value in attrs if name in names]
        self.found += [name for name, _ in attrs if name.startswith("on")]


def test_the_page_refers_to_nothing_outside_itself(page):
    links = Links()
    links.feed(page)
    assert not {"script", "link", "iframe", "object", "embed", "base", "img"} & set(links.tags)
    assert [link for link in links.found if not link.startswith("#")] == []
    assert "@import" not in page
    assert all(place.startswith("#") for place in re.findall(r"url\(\s*['\"]?(.)", page))


def test_the_page_holds_each_figure_with_its_caption(page):
    figures = re.findall(r"<figure>\s*<svg.*?</svg>\s*<figcaption>(.*?)</figcaption>", page, re.S)
    assert [html.unescape(caption) for caption in figures] == [c for _, c in CAPTIONS.values()]
    assert set(CAPTIONS) == set(plots.RESULT_FIGURES)


def test_every_local_reference_has_its_target(page):
    targets = set(re.findall(r'\bid="([^"]+)"', page))
    wanted = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted
    assert wanted <= targets


def test_the_page_says_how_to_run_it_again_and_on_what_it_ran(page, results):
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    for value in (
        f"aftermax compare {results.preset}",
        results.machine["processor"],
        f"torch {results.machine['torch']}",
        results.data["digest"],
        "40 steps of 4 x 48 tokens",
        "the best of 0.001, 0.003, and one beyond where the best lies at an edge, by 4-step runs",
        "0, 1, 2",
    ):
        assert value in text


def test_the_page_has_every_number_of_every_table(page, results):
    for title, (columns, rows) in tables(results).items():
        assert f"<h3>{html.escape(title)}</h3>" in page
        for cell in [*columns, *(cell.text for row in rows for cell in row)]:
            assert html.escape(cell) in page


def test_the_page_says_in_words_what_three_seeds_bear_out(page, results):
    assert results.verdicts()
    for sentence in results.verdicts():
        assert sentence in html.unescape(page)


def test_below_three_seeds_the_page_says_that_nothing_is_said(results, tmp_path):
    values = {key: {s: v for s, v in by.items() if s < 1} for key, by in results.values.items()}
    one = dataclasses.replace(
        results, work=dataclasses.replace(results.work, seeds=(0,)), values=values
    )
    write_report(one, tmp_path / "one.html")
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert "Nothing is said in words" in page
    assert "1 seed," in page


def test_what_a_reader_brings_is_text_on_the_page_not_markup(results, tmp_path):
    named = dataclasses.replace(results, data=results.data | {"name": "<script>alert(1)</script>"})
    write_report(named, tmp_path / "page.html")
    assert "<script>" not in (tmp_path / "page.html").read_text(encoding="utf-8")


# numbers in tables


def test_the_best_of_a_column_is_marked_once(results):
    columns, rows = tables(results)["Loss on the same targets (nats per token)"]
    for i in range(1, len(columns)):
        best = [row[i].text for row in rows if row[i].best]
        assert best == [min(row[i].text for row in rows)]


def test_nothing_is_best_where_all_are_alike(results):
    alike = {key: dict.fromkeys(by, 1.0) for key, by in results.values.items()}
    for _, rows in tables(dataclasses.replace(results, values=alike)).values():
        assert not any(cell.best for row in rows for cell in row)


@pytest.mark.parametrize(
    "dropped",
    [
        lambda system, measure, length: measure in ("speed_ratio", "peak_mebibytes"),
        lambda system, measure, length: system == "lssar",
        lambda system, measure, length: system == "lssar" and length == 96,
        lambda system, measure, length: measure == "effective_keys",
        lambda system, measure, length: measure == "cache_bytes" and system == "lssar",
    ],
    ids=["costs", "a system", "a length", "a diagnostic", "bytes of one system"],
)
def test_what_is_not_measured_yet_is_a_dash_or_left_out(results, tmp_path, dropped):
    write_report(without(results, dropped), tmp_path / "half.html")
    page = (tmp_path / "half.html").read_text(encoding="utf-8")
    absent = dropped("lssar", "loss", 48)
    assert ("<td>–</td>" in page) is not absent
    assert ("<td>LSSAR (p = 15)</td>" in page) is not absent
    for table in terminal_table(without(results, dropped)).renderables:
        assert table.row_count == (2 if absent else 3)


def test_a_store_of_before_has_no_bytes_and_is_shown_all_the_same(results, tmp_path):
    old = without(results, lambda system, measure, length: measure.startswith("cache_bytes"))
    write_report(old, tmp_path / "old.html")
    page = (tmp_path / "old.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == len(CAPTIONS) - 1
    assert not (tmp_path / "figures" / "cache.svg").exists()
    title = "Decode state (bytes per token held)"
    assert set(tables(results)) - set(tables(old)) == {title}
    assert title not in page
    (new_loss, new_recall), (old_loss, old_recall) = (
        [[c.header for c in t.columns] for t in terminal_table(r).renderables]
        for r in (results, old)
    )
    assert new_loss == [*old_loss, "state 2x"]
    assert new_recall == old_recall


def test_bytes_are_shown_without_the_spread_that_they_have_not(results):
    columns, rows = tables(results)["Decode state (bytes per token held)"]
    assert columns == ["system", "1x", "2x", "KiB in all at 2x"]
    each = 2 * results.work.width * 4 + 1  # one layer of keys and values, and what is real
    for row in rows:
        assert [cell.text for cell in row[1:]] == [f"{each}", f"{each}", f"{96 * each / 1024:.1f}"]
        assert not any(cell.best for cell in row)  # all are alike
    half = {
        key: dict.fromkeys(by, 64.5) if key[:2] == ("lssar", "cache_bytes_per_token") else by
        for key, by in results.values.items()
    }
    _, rows = tables(dataclasses.replace(results, values=half))[
        "Decode state (bytes per token held)"
    ]
    assert [cell.text for row in rows for cell in row if cell.best] == ["64", "64"]


def test_without_a_measured_run_there_is_no_report(results, tmp_path):
    with pytest.raises(ValueError, match="no system has a measured run"):
        write_report(without(results, lambda *_: True), tmp_path / "none.html")
    assert list(tmp_path.iterdir()) == []


# figures


@pytest.mark.parametrize("name", CAPTIONS)
def test_every_figure_stands_beside_the_page_as_svg_and_png(out, name):
    assert (out / "figures" / f"{name}.svg").read_text(encoding="utf-8").count("<path") > 20
    assert_drawn(out / "figures" / f"{name}.png")


def assert_drawn(path: Path) -> None:
    """More than one colour, in more than a corner."""
    pixels = np.asarray(Image.open(path).convert("L"))
    ink = pixels < 200
    assert ink.mean() > 0.005
    assert ink.any(0).mean() > 0.3
    assert ink.any(1).mean() > 0.3


def test_figures_are_the_same_bytes_for_the_same_numbers(results, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        write_report(results, folder / "report.html")
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in folders
    )
    assert first == second


def test_no_figure_stays_open(results, tmp_path):
    write_report(results, tmp_path / "report.html")
    assert plt.get_fignums() == []


def test_the_figure_of_row_maps_needs_no_results(tmp_path):
    figure = plots.row_maps()
    plots.save({"row_maps": figure}, tmp_path)
    plt.close(figure)
    assert_drawn(tmp_path / "row_maps.png")


# in a browser


def test_a_browser_shows_the_page_without_a_network(out, tmp_path):
    assert_shown_in_a_browser(out, len(CAPTIONS), tmp_path)


def assert_shown_in_a_browser(out: Path, count: int, tmp_path: Path) -> None:
    """The report of a folder, offline: so many figures, no request, no complaint."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser on the path (looked for {', '.join(BROWSERS)})")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    complaints, requests = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(QUIET))
        context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("requestfailed", lambda request: complaints.append(request.url))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto((out / "report.html").as_uri())
        assert tab.title().startswith("aftermax")
        figures = tab.locator("figure svg")
        assert figures.count() == count
        for i in range(figures.count()):
            box = figures.nth(i).bounding_box()
            assert box["width"] > 300
            assert box["height"] > 90
            assert figures.nth(i).locator("path").count() > 20
            figures.nth(i).screenshot(path=tmp_path / f"{i}.png")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tab.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert complaints == []
    assert requests == [(out / "report.html").as_uri()]
    for path in tmp_path.glob("*.png"):
        assert_drawn(path)
