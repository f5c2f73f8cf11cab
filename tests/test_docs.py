"""README and docs say what the results say."""

import importlib.util
import re
from pathlib import Path

import pytest

from aftermax import CATALOGUE
from aftermax.lab.results import Results

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def maker():
    """docs/make_figures.py, which is a script and not on the path."""
    spec = importlib.util.spec_from_file_location("make_figures", ROOT / "docs/make_figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(maker):
    return Results.of_parquet(maker.RESULTS)


def test_every_marked_block_follows_from_the_results(maker, results):
    for page in maker.PAGES:
        text = page.read_text()
        assert maker.rewritten(text, results) == text, f"{page.name}: run `make figures`"


def test_every_block_stands_in_a_page_once_opened_and_closed(maker):
    pages = "".join(page.read_text() for page in maker.PAGES)
    for name in maker.BLOCKS:
        assert len(re.findall(f"<!-- {name} -->", pages)) >= 1
        assert pages.count(f"<!-- {name} -->") == pages.count(f"<!-- /{name} -->")


def test_every_picture_and_page_that_is_linked_exists(maker):
    for page in maker.PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_names_every_system():
    text = (ROOT / "README.md").read_text()
    for entry in CATALOGUE:
        assert f"`{entry.name}`" in text


def test_the_standard_results_have_three_seeds_of_every_system(results):
    for system in results.work.systems:
        for multiple in results.work.multiples:
            spread = results.at(system, "loss", multiple)
            assert spread is not None
            assert spread.count >= 3
