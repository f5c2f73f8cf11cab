"""Redraw the figures of README and docs, and rewrite their tables, from `docs/results`.

    aftermax compare standard
    aftermax export --to docs/results/standard.parquet
    aftermax compare standard --task vision --out aftermax-images
    aftermax export --out aftermax-images --to docs/results/vision.parquet
    python benchmarks/rows.py --save docs/results/rows.json
    python benchmarks/attention.py --save docs/results/attention.json
    python benchmarks/closeness.py --save docs/results/closeness.json
    python benchmarks/curvature.py --save docs/results/curvature.json
    python benchmarks/experts.py --save docs/results/experts_speed.json
    python benchmarks/fixed_point.py --save docs/results/fixed_point.json
    python benchmarks/linear.py --save docs/results/linear.json
    python benchmarks/longvq.py --save docs/results/longvq.json
    python benchmarks/mqar.py --save docs/results/mqar.json
    python benchmarks/needle.py --save docs/results/needle.json
    python benchmarks/hardware.py --save docs/results/hardware.json
    python benchmarks/in_context.py --save docs/results/in_context.json
    python benchmarks/output.py --save docs/results/output.json
    python benchmarks/soft_topk.py --save docs/results/soft_topk.json
    python benchmarks/label_trees.py --save docs/results/label_trees.json
    python benchmarks/recurformer.py --save docs/results/recurformer.json
    python benchmarks/regression.py --save docs/results/regression.json
    python benchmarks/sparsek.py --save docs/results/sparsek.json
    aftermax compare standard --task labels --out aftermax-tags
    aftermax export --out aftermax-tags --to docs/results/labels_tags.parquet
    aftermax compare standard --task words --out aftermax-words
    aftermax export --out aftermax-words --to docs/results/words.parquet
    aftermax compare standard --task outliers --out aftermax-outliers
    aftermax export --out aftermax-outliers --to docs/results/outliers.parquet
    aftermax compare standard --task outliers --learning-rates 0.002 --out aftermax-outliers
    aftermax export --out aftermax-outliers --to docs/results/outliers_one_rate.parquet
    aftermax compare full --task rates --out aftermax-rates
    aftermax export --out aftermax-rates --to docs/results/rates.parquet
    aftermax compare standard --task experts --out aftermax-experts
    aftermax export --out aftermax-experts --to docs/results/experts.parquet
    (docs/multitask.md has the commands of experts_icons, experts_unbalanced, experts_untrained)
    make figures

What stands between `<!-- name -->` and `<!-- /name -->` in README.md and docs/*.md is written here;
with `--check` nothing is written, and a text that does not follow from the results is an error.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import closeness_results
import experts_results
import hardware_results
import hf_results
import in_context_results
import kernel_results
import label_sets
import labels_results
import linear_results
import longvq_results
import matplotlib
import multitask_results
import outlier_results
import output_results
import rate_results
import recurformer_results
import regression_results
import sparsek_results
import studies
import torch
from matplotlib import pyplot as plt

from aftermax import CATALOGUE, Cache, OfSystem
from aftermax.lab import plots
from aftermax.lab.report import settings, tables
from aftermax.lab.results import Results

DOCS = Path(__file__).parent
RESULTS = DOCS / "results" / "standard.parquet"
IMAGES = DOCS / "results" / "vision.parquet"
WORDS = DOCS / "results" / "words.parquet"
OUTLIERS = DOCS / "results" / "outliers.parquet"
OUTLIERS_ONE_RATE = DOCS / "results" / "outliers_one_rate.parquet"
RATES = DOCS / "results" / "rates.parquet"
ALIBI = "Flat loss to 16x (3.281 -> 3.270), but the needle is lost (2505.17083)."
"""Published of softmax with ALiBi, which is no entry of its own."""
PAGES = (
    DOCS.parent / "README.md",
    DOCS / "results.md",
    DOCS / "systems.md",
    DOCS / "kernels.md",
    DOCS / "attention_kernels.md",
    DOCS / "linear.md",
    DOCS / "longvq.md",
    DOCS / "output.md",
    DOCS / "images.md",
    DOCS / "multitask.md",
    DOCS / "labels.md",
    DOCS / "huggingface.md",
    DOCS / "serving.md",
    DOCS / "outliers.md",
    DOCS / "recurformer.md",
    DOCS / "regression.md",
    DOCS / "sparsek.md",
    DOCS / "fixed_memory.md",
    DOCS / "needle.md",
    DOCS / "regression_theory.md",
    DOCS / "rates.md",
    DOCS / "in_context.md",
    DOCS / "experts.md",
    DOCS / "hardware.md",
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
        formula = entry.formula.replace("|", "\\|")
        lines.append(f"| `{entry.name}` | {formula} | {' | '.join(words)} | {entry.paper}{link} |")
    return "\n".join(lines)


def caches() -> str:
    """What each system keeps of a sequence, and what can be done with it."""
    lines = [
        "| system | after 500 tokens | after 2,000 | take back | join |",
        "| --- | --: | --: | --- | --- |",
    ]
    for entry in CATALOGUE:
        if not entry.causal:
            continue
        reader = OfSystem(entry.system, kv_heads=2, key_dim=32, value_dim=32)
        cache, sizes = Cache(reader), []
        random = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            for tokens in (500, 1500):
                cache.append(*(torch.randn(1, 2, tokens, 32, generator=random) for _ in range(3)))
                sizes.append(f"{cache.bytes / 1024:.0f}")
        flags = ("yes" if can else "no" for can in (cache.can_truncate, cache.can_merge))
        lines.append(f"| {entry.title} | {' | '.join((*sizes, *flags))} |")
    return "\n".join(lines)


def measured(path: Path, block: Callable[[], str]) -> Callable[[Results], str]:
    return lambda _: block() if path.exists() else "Not measured yet."


def machine_of(path: Path) -> Callable[[Results], str]:
    return measured(path, lambda: kernel_results.machine(path))


def blocks(
    prefix: str, path: Path, named: Mapping[str, Callable[[], str]]
) -> dict[str, Callable[[Results], str]]:
    """PREFIX-NAME for each of what one file of results gives."""
    return {f"{prefix}-{name}": measured(path, block) for name, block in named.items()}


def compared(path: Path, block: Callable[[Results], str]) -> Callable[[Results], str]:
    """From the rows of another comparison."""
    return lambda _: block(Results.of_parquet(path)) if path.exists() else "Not measured yet."


BLOCKS: dict[str, Callable[[Results], str]] = {
    "attention-summary": measured(kernel_results.ATTENTION, kernel_results.attention_summary),
    "attention-targets": measured(kernel_results.ATTENTION, kernel_results.attention_targets),
    "attention-products": measured(kernel_results.ATTENTION, kernel_results.attention_products),
    "attention-memory": measured(kernel_results.ATTENTION, kernel_results.attention_memory_table),
    "attention-machine": measured(
        kernel_results.ATTENTION, lambda: kernel_results.machine(kernel_results.ATTENTION)
    ),
    "attention-figures": measured(
        kernel_results.ATTENTION,
        lambda: (
            "![Speed of every system over T, as a ratio to SDPA](figures/attention_lengths.png)\n\n"
            "![Extra memory over T](figures/attention_memory.png)"
        ),
    ),
    "closeness-slopes": measured(closeness_results.CLOSENESS, closeness_results.slopes),
    "closeness-ratios": measured(closeness_results.CLOSENESS, closeness_results.ratios),
    "closeness-search": measured(closeness_results.CLOSENESS, closeness_results.search),
    "closeness-machine": machine_of(closeness_results.CLOSENESS),
    "curvature-proof": measured(closeness_results.CURVATURE, closeness_results.proof),
    "experts-machine": machine_of(experts_results.SPEED),
    **blocks(
        "experts",
        experts_results.SPEED,
        {
            "summary": experts_results.experts_summary,
            "speed": experts_results.experts_speed,
            "lengths": experts_results.experts_lengths,
            "bytes": experts_results.experts_bytes,
            "kept": experts_results.experts_kept,
        },
    ),
    **blocks(
        "fixed",
        experts_results.FIXED_POINT,
        {
            "gelu": experts_results.gelu_table,
            "softmax": experts_results.fixed_softmax,
            "equal": experts_results.equal_scores,
        },
    ),
    "linear-targets": measured(linear_results.LINEAR, linear_results.linear_targets),
    "linear-exponents": measured(linear_results.LINEAR, linear_results.linear_exponents),
    "linear-crossing": measured(linear_results.LINEAR, linear_results.linear_crossing),
    "linear-decode": measured(linear_results.LINEAR, linear_results.linear_decode),
    "linear-machine": measured(
        linear_results.LINEAR, lambda: kernel_results.machine(linear_results.LINEAR)
    ),
    "caches": lambda _: caches(),
    "sparsek-machine": machine_of(sparsek_results.SPARSEK),
    **blocks(
        "sparsek",
        sparsek_results.SPARSEK,
        {
            "time": sparsek_results.sparsek_time,
            "fits": sparsek_results.sparsek_fits,
            "decode": sparsek_results.sparsek_decode,
            "selection": sparsek_results.sparsek_selection,
        },
    ),
    "longvq-machine": machine_of(longvq_results.LONGVQ),
    **blocks(
        "longvq",
        longvq_results.LONGVQ,
        {
            "recall": longvq_results.longvq_recall,
            "gap": longvq_results.longvq_largest_gap,
            "time": longvq_results.longvq_time,
            "state": longvq_results.longvq_state,
            "perplexity": longvq_results.longvq_perplexity,
        },
    ),
    "soft-topk-operators": measured(labels_results.SOFT_TOPK, labels_results.soft_topk_operators),
    "soft-topk-lengths": measured(labels_results.SOFT_TOPK, labels_results.soft_topk_lengths),
    "soft-topk-machine": measured(
        labels_results.SOFT_TOPK, lambda: kernel_results.machine(labels_results.SOFT_TOPK)
    ),
    "label-losses": measured(labels_results.SOFT_TOPK, labels_results.label_losses),
    "label-cache": measured(labels_results.SOFT_TOPK, labels_results.label_cache),
    "output-steps": measured(output_results.OUTPUT, output_results.output_steps),
    "output-flat": measured(output_results.OUTPUT, output_results.output_flat),
    "output-repairs": measured(output_results.OUTPUT, output_results.output_repairs),
    "output-memory": measured(output_results.OUTPUT, output_results.output_memory),
    "output-topk": measured(output_results.OUTPUT, output_results.output_topk),
    "output-drift": measured(output_results.OUTPUT, output_results.output_drift),
    "output-machine": measured(
        output_results.OUTPUT, lambda: kernel_results.machine(output_results.OUTPUT)
    ),
    "hf-door": measured(hf_results.DOOR, hf_results.door),
    "hf-machine": machine_of(hf_results.DOOR),
    "hf-decode": measured(hf_results.DECODE, hf_results.decode),
    **{
        f"hf-{name}{of}": measured(path, functools.partial(table, path))
        for of, path in {"": hf_results.CONVERSION, "-lab": hf_results.LAB}.items()
        for name, table in {
            "posthoc": hf_results.posthoc,
            "distilled": hf_results.distilled,
        }.items()
    },
    **blocks("hardware", hardware_results.HARDWARE, hardware_results.BLOCKS),
    "injectivity": lambda _: studies.injectivity_table(),
    "mqar": lambda _: studies.mqar_page(),
    "recurformer-base": measured(recurformer_results.RECURFORMER, recurformer_results.base),
    "recurformer-recall": measured(
        recurformer_results.RECURFORMER, lambda: recurformer_results.ablation("recall")
    ),
    "recurformer-text": measured(
        recurformer_results.RECURFORMER, lambda: recurformer_results.ablation("text")
    ),
    "recurformer-orders": measured(recurformer_results.RECURFORMER, recurformer_results.orders),
    "recurformer-smol": measured(recurformer_results.RECURFORMER, recurformer_results.smol),
    "recurformer-machine": machine_of(recurformer_results.RECURFORMER),
    "regression-machine": machine_of(regression_results.REGRESSION),
    **blocks(
        "regression",
        regression_results.REGRESSION,
        {
            "cases": regression_results.cases,
            "losses": regression_results.losses,
            "minima": regression_results.minima,
            "times": regression_results.times,
            "batches": regression_results.batches,
        },
    ),
    "needle": lambda _: studies.needle_page(),
    **blocks("in-context", in_context_results.IN_CONTEXT, in_context_results.BLOCKS),
    "row-targets": lambda _: kernel_results.row_targets(("avx512",)),
    "row-targets-all": lambda _: kernel_results.row_targets(("avx512", "avx2")),
    "row-algorithms": lambda _: kernel_results.row_algorithms(),
    "row-memory": lambda _: kernel_results.row_memory(),
    "row-machine": lambda _: kernel_results.machine(kernel_results.ROWS),
    "label-summary": label_sets.summary,
    "label-tags": compared(label_sets.TAGS, label_sets.label_set),
    "label-tags-verdicts": compared(label_sets.TAGS, verdicts),
    "label-tags-sentences": compared(label_sets.TAGS_SENTENCES, label_sets.label_set),
    "label-dependencies": compared(label_sets.DEPENDENCIES, label_sets.label_set),
    "label-dependencies-verdicts": compared(label_sets.DEPENDENCIES, verdicts),
    "label-settings": compared(label_sets.TAGS, settings_list),
    "word-summary": compared(WORDS, output_results.word_summary),
    "word-tables": compared(WORDS, all_tables),
    "word-verdicts": compared(WORDS, verdicts),
    "word-settings": compared(WORDS, settings_list),
    "outlier-tables": compared(OUTLIERS, all_tables),
    "outlier-verdicts": compared(OUTLIERS, verdicts),
    "outlier-settings": compared(OUTLIERS, settings_list),
    "outlier-one-rate": compared(OUTLIERS_ONE_RATE, outlier_results.one_rate),
    "outlier-one-rate-verdicts": compared(OUTLIERS_ONE_RATE, verdicts),
    "rate-claims": compared(RATES, rate_results.claims),
    "rate-tables": compared(RATES, rate_results.others),
    "rate-settings": compared(RATES, settings_list),
    "multitask-reach": measured(
        multitask_results.STANDARD, lambda: multitask_results.reach(multitask_results.STANDARD)
    ),
    "multitask-use": measured(multitask_results.UNBALANCED, multitask_results.use),
    "multitask-fixed": measured(multitask_results.STANDARD, multitask_results.fixed),
    "multitask-icons": measured(multitask_results.ICONS, multitask_results.icons),
    "multitask-verdicts": compared(multitask_results.STANDARD, verdicts),
    "multitask-tables": compared(multitask_results.STANDARD, all_tables),
    "multitask-settings": compared(multitask_results.STANDARD, settings_list),
    "image-tables": compared(IMAGES, all_tables),
    "image-verdicts": compared(IMAGES, verdicts),
    "image-settings": compared(IMAGES, settings_list),
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
            ours["multitask_images"] = multitask_results.figure()
            if studies.MQAR.exists():
                ours["mqar"] = plots.mqar(studies.mqar_study())
            if studies.NEEDLE.exists():
                ours["needle"] = plots.needle(studies.needle_study())
            if in_context_results.IN_CONTEXT.exists():
                ours["in_context"] = in_context_results.figure()
                ours["in_context_sizes"] = in_context_results.sizes_figure()
                ours["in_context_systems"] = in_context_results.systems_figure()
            if kernel_results.ATTENTION.exists():
                ours["attention_lengths"] = kernel_results.attention_lengths()
                ours["attention_memory"] = kernel_results.attention_memory()
            if recurformer_results.RECURFORMER.exists():
                ours["recurformer"] = recurformer_results.figure()
            if closeness_results.CLOSENESS.exists():
                ours["closeness"] = closeness_results.slope_figure()
            if regression_results.REGRESSION.exists():
                ours["regression"] = regression_results.figure()
            if linear_results.LINEAR.exists():
                ours["linear_lengths"] = linear_results.linear_lengths()
            if sparsek_results.SPARSEK.exists():
                ours["sparsek_lengths"] = sparsek_results.sparsek_figure()
            if longvq_results.LONGVQ.exists():
                ours["longvq_recall"] = longvq_results.longvq_recall_figure()
            if output_results.OUTPUT.exists():
                ours["output_steps"] = output_results.output_figure()
        plots.save(ours, DOCS / "figures")
        plt.close("all")
        others = {
            "image": IMAGES,
            "label": label_sets.TAGS,
            "word": WORDS,
            "outlier": OUTLIERS,
            "rate": RATES,
            "multitask": multitask_results.STANDARD,
        }
        for kind, path in others.items():
            if path.exists():
                drawn = plots.draw(Results.of_parquet(path))
                named = {f"{kind}_{name}": figure for name, figure in drawn.items()}
                plots.save(named, DOCS / "figures")
                plt.close("all")
        plots.save(plots.draw(results), DOCS / "figures")


if __name__ == "__main__":
    main()
