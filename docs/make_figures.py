"""Redraw the figures of README and docs, and rewrite their tables, from `docs/results`.

    aftermax compare standard
    aftermax export --to docs/results/standard.parquet
    aftermax compare standard --task vision --out aftermax-images
    aftermax export --out aftermax-images --to docs/results/vision.parquet
    python benchmarks/rows.py --save docs/results/rows.json
    python benchmarks/attention.py --save docs/results/attention.json
    python benchmarks/linear.py --save docs/results/linear.json
    python benchmarks/mqar.py --save docs/results/mqar.json
    make figures

What stands between `<!-- name -->` and `<!-- /name -->` in README.md and docs/*.md is written here;
with `--check` nothing is written, and a text that does not follow from the results is an error.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import kernel_results
import labels_results
import linear_results
import matplotlib
import studies
from matplotlib import pyplot as plt

from aftermax import CATALOGUE
from aftermax.lab import plots
from aftermax.lab.report import settings, tables
from aftermax.lab.results import Results

DOCS = Path(__file__).parent
RESULTS = DOCS / "results" / "standard.parquet"
IMAGES = DOCS / "results" / "vision.parquet"
ALIBI = "Flat loss to 16x (3.281 -> 3.270), but the needle is lost (2505.17083)."
"""Published of softmax with ALiBi, which is no entry of its own."""
PAGES = (
    DOCS.parent / "README.md",
    DOCS / "results.md",
    DOCS / "systems.md",
    DOCS / "kernels.md",
    DOCS / "attention_kernels.md",
    DOCS / "linear.md",
    DOCS / "images.md",
    DOCS / "labels.md",
)


def loss_table(results: Results) -> str:
    """What the papers claim beside what was measured."""
    last = results.work.multiples[-1]
    passkey = f"passkey 1x, 4x, {last}x"
    lines = [
        f"| system | 1x | 4x | {last}x | last T only | {passkey} | speed | published |",
        "| --- | --: | --: | --: | --: | --: | --: | --- |",
    ]
    for entry in results.arms:
        cells = [_spread(results, entry.name, "loss", m) for m in (1, 4, last)]
        cells.append(_spread(results, entry.name, "truncated_loss", 1))
        shares = [results.at(entry.name, "passkey", m) for m in (1, 4, last)]
        cells.append(", ".join("–" if s is None else f"{100 * s.mean:.0f}%" for s in shares))
        ratio = results.cost(entry.name, "speed_ratio")
        cells.append("–" if ratio is None else f"{ratio:.2f}")
        claim = ALIBI if entry.name == "softmax/alibi" else entry.entry.claim
        lines.append(f"| {entry.title} | {' | '.join(cells)} | {claim} |")
    return "\n".join(lines)


def verdicts(results: Results) -> str:
    return "\n".join(f"- {sentence}" for sentence in results.verdicts())


def all_tables(results: Results) -> str:
    """Every table of the report, in Markdown."""
    parts = []
    for title, (columns, rows) in tables(results).items():
        head = f"| {' | '.join(columns)} |\n| --- |{' --: |' * (len(columns) - 1)}"
        body = "\n".join(
            f"| {' | '.join(f'**{c.text}**' if c.best else c.text for c in row)} |" for row in rows
        )
        parts.append(f"### {title}\n\n{head}\n{body}")
    return "\n\n".join(parts)


def settings_list(results: Results) -> str:
    return "\n".join(f"- **{key}**: {value}" for key, value in settings(results).items())


def systems_table(results: Results) -> str:
    """The catalogue with its five words and its source."""
    lines = [
        "| name | weights | score | positivity | normaliser | reweight | walk | source |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in CATALOGUE:
        link = f", [{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else ""
        words = (entry.score, entry.positivity, entry.normaliser, entry.reweight, entry.walk)
        lines.append(
            f"| `{entry.name}` | {entry.formula} | {' | '.join(words)} | {entry.paper}{link} |"
        )
    return "\n".join(lines)


def of_attention(block: Callable[[], str]) -> Callable[[Results], str]:
    return lambda _: block() if kernel_results.ATTENTION.exists() else "Not measured yet."


def of_linear(block: Callable[[], str]) -> Callable[[Results], str]:
    return lambda _: block() if linear_results.LINEAR.exists() else "Not measured yet."


def of_labels(block: Callable[[], str]) -> Callable[[Results], str]:
    return lambda _: block() if labels_results.SOFT_TOPK.exists() else "Not measured yet."


def of_images(block: Callable[[Results], str]) -> Callable[[Results], str]:
    return lambda _: block(Results.of_parquet(IMAGES)) if IMAGES.exists() else "Not measured yet."


BLOCKS: dict[str, Callable[[Results], str]] = {
    "attention-summary": of_attention(kernel_results.attention_summary),
    "attention-targets": of_attention(kernel_results.attention_targets),
    "attention-products": of_attention(kernel_results.attention_products),
    "attention-memory": of_attention(kernel_results.attention_memory_table),
    "attention-machine": of_attention(lambda: kernel_results.machine(kernel_results.ATTENTION)),
    "attention-figures": of_attention(
        lambda: (
            "![Speed of every system over T, as a ratio to SDPA](figures/attention_lengths.png)\n\n"
            "![Extra memory over T](figures/attention_memory.png)"
        )
    ),
    "linear-targets": of_linear(linear_results.linear_targets),
    "linear-exponents": of_linear(linear_results.linear_exponents),
    "linear-crossing": of_linear(linear_results.linear_crossing),
    "linear-decode": of_linear(linear_results.linear_decode),
    "linear-machine": of_linear(lambda: kernel_results.machine(linear_results.LINEAR)),
    "soft-topk-operators": of_labels(labels_results.soft_topk_operators),
    "soft-topk-lengths": of_labels(labels_results.soft_topk_lengths),
    "soft-topk-machine": of_labels(lambda: kernel_results.machine(labels_results.SOFT_TOPK)),
    "label-losses": of_labels(labels_results.label_losses),
    "label-cache": of_labels(labels_results.label_cache),
    "injectivity": lambda _: studies.injectivity_table(),
    "mqar": lambda _: studies.mqar_page(),
    "row-targets": lambda _: kernel_results.row_targets(("avx512",)),
    "row-targets-all": lambda _: kernel_results.row_targets(("avx512", "avx2")),
    "row-algorithms": lambda _: kernel_results.row_algorithms(),
    "row-memory": lambda _: kernel_results.row_memory(),
    "row-machine": lambda _: kernel_results.machine(kernel_results.ROWS),
    "image-tables": of_images(all_tables),
    "image-verdicts": of_images(verdicts),
    "image-settings": of_images(settings_list),
    "loss-table": loss_table,
    "verdicts": verdicts,
    "all-tables": all_tables,
    "settings": settings_list,
    "systems": systems_table,
}


def rewritten(text: str, results: Results) -> str:
    """The page with every marked block made anew."""
    for name, block in BLOCKS.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if marked.search(text):
            new = f"{block(results)}\n"
            text = marked.sub(lambda found, new=new: found[1] + new + found[2], text)
    return text


def _spread(results: Results, system: str, measure: str, multiple: int) -> str:
    spread = results.at(system, measure, multiple)
    return "–" if spread is None else spread.text(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    results = Results.of_parquet(RESULTS)
    for page in PAGES:
        text = page.read_text()
        new = rewritten(text, results)
        if options.check and new != text:
            raise SystemExit(f"{page.name} does not follow from {RESULTS.name}: run `make figures`")
        if not options.check:
            page.write_text(new)
    if not options.check:
        matplotlib.use("agg")
        with plt.style.context(plots.STYLE):
            ours = {"row_maps": plots.row_maps(), "row_lengths": kernel_results.row_lengths()}
            ours["injectivity"] = plots.injectivity(studies.injectivity_measured())
            ours["soft_conditioning"] = studies.soft_conditioning()
            if studies.MQAR.exists():
                ours["mqar"] = plots.mqar(studies.mqar_study())
            if kernel_results.ATTENTION.exists():
                ours["attention_lengths"] = kernel_results.attention_lengths()
                ours["attention_memory"] = kernel_results.attention_memory()
            if linear_results.LINEAR.exists():
                ours["linear_lengths"] = linear_results.linear_lengths()
        if IMAGES.exists():
            drawn = plots.draw(Results.of_parquet(IMAGES))
            ours |= {f"image_{name}": figure for name, figure in drawn.items()}
        plots.save(ours | plots.draw(results), DOCS / "figures")


if __name__ == "__main__":
    main()
