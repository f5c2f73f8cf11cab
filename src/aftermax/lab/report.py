"""The report: one HTML file that opens from disk, its figures inside it, its numbers in tables."""

from __future__ import annotations

import io
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import pyplot as plt
from rich.console import RenderableType

from aftermax.lab import (
    experts_page,
    hashhop_page,
    labels_page,
    outliers_page,
    plots,
    rates_page,
    text_page,
    vision_page,
    words_page,
)
from aftermax.lab.page import Page, Tables
from aftermax.lab.results import Results

PAGES: dict[str, Page] = {
    "text": text_page.PAGE,
    "vision": vision_page.PAGE,
    "labels": labels_page.PAGE,
    "words": words_page.PAGE,
    "outliers": outliers_page.PAGE,
    "hashhop": hashhop_page.PAGE,
    "experts": experts_page.PAGE,
    "rates": rates_page.PAGE,
}
"""By task."""


def write_report(results: Results, path: Path) -> None:
    """Write the HTML, and SVG and PNG of every figure in `figures/` beside it."""
    if not results.arms:
        raise ValueError("no system has a measured run: none is finished, or each diverged")
    page = PAGES[results.work.task]
    figures = plots.draw(results)
    plots.save(figures, path.parent / "figures")
    shown = [(name, *page.captions[name], _svg(figure)) for name, figure in figures.items()]
    for figure in figures.values():
        plt.close(figure)
    environment = Environment(
        loader=PackageLoader("aftermax.lab", "."), autoescape=True, undefined=StrictUndefined
    )
    written = environment.get_template("report.html.jinja").render(
        page=page,
        results=results,
        figures=shown,
        tables=tables(results),
        verdicts=results.verdicts(),
        settings=settings(results),
    )
    scratch = path.with_suffix(".part")
    scratch.write_text(written, encoding="utf-8")
    scratch.replace(path)


def tables(results: Results) -> Tables:
    return PAGES[results.work.task].tables(results)


def settings(results: Results) -> dict[str, str]:
    return PAGES[results.work.task].settings(results)


def terminal_table(results: Results) -> RenderableType:
    return PAGES[results.work.task].terminal(results)


def _svg(figure) -> Markup:
    """The figure as an inline element, without the XML head."""
    buffer = io.StringIO()
    with plt.style.context(plots.STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])
