"""The task of HashHop: its sizes, its batches, its scores, and the report."""

import dataclasses
import html
import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from aftermax.lab import hashhop as task
from aftermax.lab import plots
from aftermax.lab import train as loop
from aftermax.lab.hashhop_page import CAPTIONS
from aftermax.lab.hashhop_work import PRESETS, HashHopWork
from aftermax.lab.imports import import_into
from aftermax.lab.report import settings, tables, terminal_table, write_report
from aftermax.lab.results import Results
from aftermax.lab.store import Store
from aftermax.lab.tasks import work_of
from aftermax.lab.work import Run

from .lab_work import latest_results
from .test_report import Links, assert_drawn, without

TINY = HashHopWork(
    systems=("softmax", "linear"),
    **{"layers": 1, "width": 16, "heads": 2, "steps": 6, "batch": 8, "scored": 5},
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return task.prepare(TINY, tmp_path_factory.mktemp("hashhop"))


def run_of(drawn, work=TINY, system="softmax") -> Run:
    return Run(work, system, 0, 3e-3, "train", drawn.digest)


# the work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hops": (2, 1)}, r"hops must rise and begin with 1 or more, got \(2, 1\)"),
        ({"hops": ()}, "hops must rise"),
        ({"multiples": (2, 4)}, "multiples must rise and begin with 1"),
        ({"context": 14}, "two chains of 2 hops need a context of 15 tokens, got 14"),
        (
            {"multiples": (1, 8)},
            "256 tokens of 1-hop chains hold 126 different hashes, got hashes=64",
        ),
        ({"batch": 1}, "a batch has a problem of each of the hops, got 1"),
        ({"kv_heads": 3}, "kv_heads must divide heads, got 3 and 2"),
        ({"systems": ("soft",)}, "soft has no causal form"),
        ({"scored": 0}, "scored must be at least 1, got 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("name", PRESETS)
def test_settings_are_read_back(name):
    assert work_of(PRESETS[name].settings()) == PRESETS[name]


@pytest.mark.parametrize("thought", [True, False])
def test_a_problem_fills_its_length_with_as_many_chains_as_there_is_room_for(thought):
    work = dataclasses.replace(TINY, chain_of_thought=thought)
    for hops in work.hops:
        for length in work.lengths:
            chains = work.chains(hops, length)
            tokens, asked = task.problems(work, hops, chains, 3, torch.Generator().manual_seed(0))
            assert tokens.shape == (3, work.tokens(hops, chains))
            assert tokens.shape[1] <= length < work.tokens(hops, chains + 1)
            assert asked.sum().item() == 3 * chains * (hops if thought else 1)
            assert tokens.max() == work.hashes + hops - 1  # the mark


# batches


def test_a_batch_has_every_number_of_hops_in_problems_of_one_size(drawn):
    run, sizes = run_of(drawn), set()
    for step in range(30):
        data = loop.batch(run, drawn, step)
        assert len(data) == len(TINY.hops)
        for hops, (tokens, asked) in zip(TINY.hops, data, strict=True):
            each = TINY.batch * TINY.context // len(TINY.hops)
            assert each - tokens.shape[1] < tokens.numel() <= each
            chains = asked[0].sum().item() // hops
            assert 2 <= chains <= TINY.chains(hops, TINY.context)
            sizes.add((hops, chains))
    assert {chains for hops, chains in sizes if hops == 1} == set(range(2, 8))
    assert_close(loop.batch(run, drawn, 29), data, rtol=0, atol=0)


def test_what_is_learned_from_is_the_answers_alone(drawn):
    run = run_of(drawn)
    model, _ = loop.build(run, drawn)
    data = loop.batch(run, drawn, 0)
    reported = task.loss(model, data, run)[1].item()
    by_hand = []
    for tokens, asked in data:
        logits = model.logits(model(tokens[:, :-1]))
        each = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        by_hand.append((each * asked).sum() / asked.sum())
    assert reported == pytest.approx((sum(by_hand) / 2).item(), rel=1e-5)


# scores


class Follower:
    """Tells what stood after the token in the lines, `until` hops long, then no hash any more."""

    def __init__(self, work: HashHopWork, until: int):
        self.work, self.until = work, until

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) tokens -> (B, T, 1) predictions."""
        out = torch.full_like(tokens, self.work.hashes)
        for row, told in zip(tokens.tolist(), out, strict=True):
            mark = next(i for i, token in enumerate(row) if token >= self.work.hashes)
            lines = dict(zip(row[:mark:2], row[1:mark:2], strict=True))
            hops, firsts = row[mark] - self.work.hashes + 1, set(lines) - set(lines.values())
            for i in range(mark + 1, len(row)):
                since = next(n for n in range(i - mark) if row[i - n] in firsts)
                if since < self.until:
                    told[i] = lines.get(row[i], self.work.hashes)
            assert hops in self.work.hops
        return out[..., None]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.one_hot(hidden[..., 0], self.work.hashes + 2).float()


def test_who_follows_every_line_finds_all_ends_and_who_stops_early_none():
    for length in TINY.lengths:
        for hops in TINY.hops:
            for until in (0, 1, 2):
                _, right = task._scored(Follower(TINY, until), TINY, hops, length, 7)
                assert right == float(until >= hops)


def test_every_measure_stands_at_every_length(drawn):
    model, _ = loop.build(run_of(drawn), drawn)
    rows = task.evaluate(model, TINY, drawn, 6)
    names = {"hops1", "hops2", "loss", "cache_bytes", "cache_bytes_per_token"}
    assert {(r.measure, r.length) for r in rows} == {(n, x) for n in names for x in TINY.lengths}
    held = {r.length: r.value for r in rows if r.measure == "cache_bytes_per_token"}
    assert set(held.values()) == {2 * TINY.width * 4 + 1}


def test_scores_do_not_hang_on_how_many_problems_are_read_at_once(drawn, monkeypatch):
    model, _ = loop.build(run_of(drawn), drawn)
    rows = task.evaluate(model, TINY, drawn, 6)
    monkeypatch.setattr(task, "TOKENS_AT_ONCE", 1)
    for row, other in zip(rows, task.evaluate(model, TINY, drawn, 6), strict=True):
        assert row.value == pytest.approx(other.value, rel=1e-5)


def test_tuning_has_problems_of_its_own(drawn):
    asked = []

    class Noted(Follower):
        def __call__(self, tokens):
            asked.append(tokens)
            return super().__call__(tokens)

    task.tuning_loss(Noted(TINY, 2), TINY, drawn)
    tuned = [t.tolist() for tokens in asked for t in tokens]
    asked.clear()
    for hops in TINY.hops:
        task._scored(Noted(TINY, 2), TINY, hops, TINY.context, task.SCORED_SEED)
    assert not any(t.tolist() in tuned for tokens in asked for t in tokens)


def test_the_digest_is_of_what_is_drawn(drawn, tmp_path):
    assert task.prepare(TINY, tmp_path).digest == drawn.digest
    assert task.open_data(drawn.folder) == drawn
    other = dataclasses.replace(TINY, hashes=100)
    assert task.prepare(other, tmp_path).digest != drawn.digest


# the report


@pytest.fixture(scope="module")
def out(hashhop_comparison):
    return hashhop_comparison[0]


@pytest.fixture(scope="module")
def results(out) -> Results:
    return latest_results(out)


def test_compare_says_what_it_did(hashhop_comparison, results):
    out, said = hashhop_comparison
    assert "problems: HashHop, drawn anew in every step" in said
    assert "chains followed (%) of hops @ length" in said
    for system in results.work.systems:
        assert re.search(rf"{system} +\d+ +\d+ +\d+ +\d+ +\d+ +\d\.\d\d", said), system
    assert f"report: {out / 'report.html'}" in said


def test_the_page_has_its_own_question_figures_and_numbers(out, results):
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h1>Which attention follows a chain through its context?</h1>" in page
    figures = re.findall(r"<figure>\s*<svg.*?</svg>\s*<figcaption>(.*?)</figcaption>", page, re.S)
    assert [html.unescape(caption) for caption in figures] == [c for _, c in CAPTIONS.values()]
    assert list(CAPTIONS) == list(plots.FIGURES["hashhop"])
    assert "Chains of 2 hops followed, of 4, 9, 18 in a problem" in tables(results)
    for title, (columns, rows) in tables(results).items():
        assert f"<h3>{html.escape(title)}</h3>" in page
        for cell in [*columns, *(cell.text for row in rows for cell in row)]:
            assert html.escape(cell) in page
    for value in [*settings(results).values(), *results.verdicts()]:
        assert value in html.unescape(page)
    links = Links()
    links.feed(page)
    assert [link for link in links.found if not link.startswith("#")] == []


@pytest.mark.parametrize("name", CAPTIONS)
def test_every_figure_stands_beside_the_page(out, name):
    assert_drawn(out / "figures" / f"{name}.png")


@pytest.mark.parametrize(
    "dropped",
    [
        lambda system, measure, length: measure in ("speed_ratio", "peak_mebibytes"),
        lambda system, measure, length: system == "linear",
        lambda system, measure, length: measure == "hops2" and system == "linear",
        lambda system, measure, length: measure == "cache_bytes_per_token" and system == "linear",
    ],
    ids=["costs", "a system", "a number of hops", "bytes of one system"],
)
def test_what_is_not_measured_yet_is_a_dash_or_left_out(results, tmp_path, dropped):
    half = without(results, dropped)
    write_report(half, tmp_path / "half.html")
    page = (tmp_path / "half.html").read_text(encoding="utf-8")
    gone = dropped("linear", "loss", 32)
    assert ("<td>–</td>" in page) is not gone
    assert terminal_table(half).row_count == (1 if gone else 2)


def test_verdicts_are_paired_by_seed_against_softmax():
    values = {}
    for hops, length, share in ((1, 32, 0.1), (1, 128, -0.2), (2, 32, 0.0), (2, 128, 0.0)):
        values["softmax", f"hops{hops}", length] = {0: 0.5, 1: 0.6, 2: 0.7}
        values["linear", f"hops{hops}", length] = {s: 0.5 + s / 10 + share for s in range(3)}
    values["linear", "hops2", 128] = {0: 0.9, 1: 0.5, 2: 0.6}
    for system in TINY.systems:
        values[system, "loss", 32] = {0: 1.0}
    work = dataclasses.replace(TINY, seeds=(0, 1, 2))
    (said,) = Results(work, "quick", {}, {}, values, {}, {}, {}).verdicts()
    assert said.startswith("linear (elu + 1), against softmax, follows chains: ")
    assert "1 hop at 1x more (+10.0 ± 0.0 points), 1 hop at 4x fewer (-20.0 ± 0.0 points)" in said
    assert "2 hops at 4x not told apart (" in said


def test_an_exported_work_is_imported_whole(out, results, tmp_path):
    with Store(out / "store.sqlite") as store, Store(tmp_path / "new.sqlite") as new:
        work = store.latest_work()
        store.export(work, tmp_path / "rows.parquet")
        taken = import_into(new, tmp_path / "rows.parquet")
        assert (taken.work, taken.incomplete, taken.foreign) == (work, 0, 0)
        assert Results.of_store(new, work) == results
