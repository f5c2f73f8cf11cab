"""The tables of the comparison of rates, and what gates and truths have in common."""

from __future__ import annotations

from aftermax.lab.rates_claims import SAID
from aftermax.lab.report import tables
from aftermax.lab.results import Results


def claims(results: Results) -> str:
    """What the papers say beside what was measured."""
    return _written(*tables(results)[SAID])


def others(results: Results) -> str:
    """Every other table of the report."""
    shown = {title: table for title, table in tables(results).items() if title != SAID}
    return "\n\n".join(f"### {title}\n\n{_written(*table)}" for title, table in shown.items())


def _written(columns: list[str], rows: list) -> str:
    """Words stand to the left, numbers to the right."""
    words = [any(c.isalpha() for c in rows[0][i].text) for i in range(len(columns))]
    rule = "".join(f" {'---' if word else '--:'} |" for word in words)
    body = [f"| {' | '.join(cell.text for cell in row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(columns)} |", f"|{rule}", *body])
