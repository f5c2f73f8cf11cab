"""The task of outliers: masks, measures, integers, the loop over both models, the report."""

import dataclasses
import html
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

from aftermax.lab import outliers as task
from aftermax.lab import plots
from aftermax.lab import train as loop
from aftermax.lab.data.corpus import Corpus
from aftermax.lab.imports import import_into
from aftermax.lab.models import DecoderLM, EncoderLM
from aftermax.lab.outliers import Tokens
from aftermax.lab.outliers_page import CAPTIONS
from aftermax.lab.outliers_work import PRESETS, OutliersWork
from aftermax.lab.quantise import Grid, IntegerLinear, integer_weights, quantised
from aftermax.lab.report import settings as settings_of
from aftermax.lab.report import tables, terminal_table, write_report
from aftermax.lab.results import Results
from aftermax.lab.store import Store
from aftermax.lab.tasks import work_of
from aftermax.lab.train import train
from aftermax.lab.work import Run

from .lab_work import latest_results, open_store, write_texts
from .test_report import assert_drawn, without

TINY = OutliersWork(
    systems=("encoder/softmax", "decoder/softmax"),
    **{"layers": 2, "width": 16, "heads": 2, "context": 16, "multiples": (1, 2)},
    **{"steps": 6, "batch": 8, "windows": 3, "calibration": 2},
)
MODELS = ("encoder", "decoder")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("text")
    return task.prepare(dataclasses.replace(TINY, data=write_texts(folder / "in")), folder / "out")


def run_of(corpus, system="decoder/softmax", **changes) -> Run:
    given = {"seed": 0, "learning_rate": 3e-3, "kind": "train"} | changes
    return Run(TINY, system, data_digest=corpus.digest, **given)


def model_of(corpus, system="decoder/softmax") -> DecoderLM:
    return loop.build(run_of(corpus, system), corpus)[0].eval()


# the work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ("softmax",)}, "softmax does not say in which model; ask for encoder/"),
        ({"systems": ("encoder/",)}, "does not say in which model"),
        ({"systems": ("decoder/soft",)}, "soft has no causal form, which a decoder needs"),
        ({"systems": ("encoder/softmax/what",)}, "no trait what; there are rope, p-rope, alibi"),
        ({"systems": ("encoder/softmax/bare/qk-norm",)}, "asks for QK-norm and for none"),
        ({"masked": 0.0}, "masked is a share of the tokens between 0 and 1, got 0.0"),
        ({"multiples": (2, 1)}, "multiples must rise and begin with 1"),
        ({"context": 4}, "context must be at least 8 tokens, got 4"),
        ({"calibration": 0}, "calibration must be at least 1, got 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_settings_give_the_work_back_and_titles_say_the_model():
    work = dataclasses.replace(TINY, data=Path("a/b"))
    assert work.settings()["task"] == "outliers"
    assert work_of(work.settings()) == work
    arm = work.arm("encoder/log-n/qk-norm/alibi")
    assert (arm.title, arm.qk_norm, arm.positions) == (
        "log-n softmax (SSMax) · QK-norm, ALiBi, encoder", True, "alibi",
    )  # fmt: skip
    assert not work.arm("encoder/softmax").qk_norm


def test_both_models_of_every_system_are_in_the_presets():
    for work in PRESETS.values():
        kinds = [{s.split("/", 1)[1] for s in work.systems if s.startswith(m)} for m in MODELS]
        assert kinds[0] == kinds[1]
        assert 2 * len(kinds[0]) == len(work.systems)
        assert "softmax" in kinds[0], "what the sentences compare with"


# what is read and what is asked


def test_separators_are_ends_and_marks(corpus):
    found = task.separators(corpus)
    ids = {i for i in range(256) if found[i]}
    assert ids == {ord(c) for c in "\n.,;:"}
    assert found[corpus.symbols.end]
    assert not found[Tokens.of(corpus).begin]


def test_separators_of_a_bpe_vocabulary_may_be_longer_than_a_character(tmp_path):
    text = "".join(f"a{i}:\n    word.\n" for i in range(400))
    (tmp_path / "in.txt").write_text(text)
    work = dataclasses.replace(TINY, data=tmp_path / "in.txt", tokenizer="bpe", vocabulary=300)
    held = task.prepare(work, tmp_path / "out")
    found = task.separators(held)
    assert 1 < found.sum() < 40
    share = found[torch.from_numpy(held.tokens("train").astype("int64"))].float().mean()
    assert 0.05 < share < 0.7


def test_a_decoder_is_asked_for_the_next_token_of_each():
    asked = task.asked_of_decoder(torch.tensor([[5, 6, 7]]), Tokens(256))
    assert asked.inputs.tolist() == [[257, 5, 6]]
    assert asked.targets.tolist() == [[5, 6, 7]]
    assert asked.scored.all()


def test_an_encoder_is_asked_for_a_share_as_bert_is():
    ids, generator = Tokens(256), torch.Generator().manual_seed(0)
    tokens = torch.randint(200, (200, 500), generator=generator)
    asked = task.asked_of_encoder(tokens, ids, 0.15, generator)
    assert (asked.inputs[:, 0] == ids.begin).all()
    assert not asked.scored[:, 0].any()
    assert asked.scored[:, 1:].float().mean().item() == pytest.approx(0.15, abs=0.005)
    inputs, targets = asked.inputs[asked.scored], asked.targets[asked.scored]
    assert (inputs == ids.mask).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert (inputs == targets).float().mean().item() == pytest.approx(0.1, abs=0.01)
    kept = ~asked.scored[:, 1:]
    assert torch.equal(asked.inputs[:, 1:][kept], tokens[:, 1:][kept])
    assert asked.inputs.max() <= ids.mask


@pytest.mark.parametrize("encoder", [True, False])
def test_every_length_scores_the_same_tokens(corpus, encoder):
    found = dict(task.held_out(encoder, TINY, corpus, "validation", 5, 32))
    assert list(found) == [16, 32]
    short, long = found[16], found[32]
    assert short.scored.any()
    assert torch.equal(short.targets[short.scored], long.targets[long.scored])
    assert torch.equal(short.inputs[:, 1:], long.inputs[:, -15:])
    for data in (short, long):
        assert (data.inputs[:, 0] == Tokens.of(corpus).begin).all()
        assert not data.scored[:, : -15 if encoder else -8].any()


def test_an_encoder_sees_what_follows_and_a_decoder_does_not(corpus):
    for system, sees in (("encoder/softmax", True), ("decoder/softmax", False)):
        model = model_of(corpus, system)
        assert type(model) is (EncoderLM if sees else DecoderLM)
        tokens = torch.randint(256, (2, 12))
        changed = tokens.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 256
        with torch.no_grad():
            moved = (model(tokens) - model(changed))[:, 0].abs().max() > 0
        assert bool(moved) is sees


def test_both_models_read_the_same_windows_and_start_from_the_same_weights(corpus):
    runs = [run_of(corpus, system) for system in ("encoder/softmax", "decoder/lssar")]
    first, second = (loop.batch(run, corpus, 3) for run in runs)
    assert torch.equal(first.targets, second.targets)
    for (name, p), (_, q) in zip(
        model_of(corpus, "encoder/softmax").named_parameters(),
        model_of(corpus).named_parameters(),
        strict=True,
    ):
        assert torch.equal(p, q), name


def test_a_gate_moves_no_other_weight_at_the_start(corpus):
    gated = dict(model_of(corpus, "decoder/softmax/gated").named_parameters())
    plain = dict(model_of(corpus, "decoder/softmax").named_parameters())
    own = {name for name in gated if name not in plain}
    assert own == {f"blocks.{i}.0.layer.gate.{x}" for i in (0, 1) for x in ("weight", "bias")}
    for name, parameter in plain.items():
        assert torch.equal(gated[name], parameter), name
    width = TINY.width // TINY.heads
    assert gated["blocks.0.0.layer.gate.weight"].std() > 0.2 * width**-0.5


def test_clipped_softmax_takes_the_training_length_and_flat_rows_live(corpus):
    """A row that is all 0 has no gradient, and rows are flat at the start."""
    model = model_of(corpus, "encoder/clipped")
    assert model.attentions[0].system.weights.gamma == pytest.approx(-0.9 / TINY.context)
    task.loss(model, loop.batch(run_of(corpus, "encoder/clipped"), corpus, 0), None)[0].backward()
    assert model.attentions[0].to_query.weight.grad.abs().max() > 0


# the measures


def kurtosis_by_hand(numbers: list[float]) -> float:
    n, mean = len(numbers), sum(numbers) / len(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / (n - 1)
    return sum((x - mean) ** 4 for x in numbers) / n / (variance**2 + 1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6), st.integers(2, 6))
def test_inf_norm_and_kurtosis_are_of_a_sequence(seed, rows, tokens, width):
    x = torch.randn(
        rows, tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    for i, row in enumerate(x.flatten(1).tolist()):
        assert task.inf_norm(x)[i].item() == max(map(abs, row))
        assert task.kurtosis(x)[i].item() == pytest.approx(kurtosis_by_hand(row), rel=1e-9)


@torch.no_grad()
def test_outliers_are_of_what_each_branch_adds_and_of_the_stream(corpus):
    model, chance = model_of(corpus), torch.Generator().manual_seed(1)
    inputs = torch.randint(256, (3, 12), generator=chance)
    tensors, x = {}, model.embed(inputs)
    for i, (attend, feed) in enumerate(model.blocks):
        for kind, branch in (("attention", attend), ("feed", feed)):
            added = branch.layer(branch.before(x))
            x = x + added
            tensors[f"{kind}{i}"], tensors[f"stream{i}{kind}"] = added, x
    norms = {name: task.inf_norm(t).mean().item() for name, t in tensors.items()}
    tails = [task.kurtosis(t).mean().item() for t in tensors.values()]
    found = task.outliers(model, task.Asked(inputs, inputs, inputs > 0))
    assert found["inf_norm"] == pytest.approx(max(norms.values()), rel=1e-5)
    assert found["kurtosis"] == pytest.approx(sum(tails) / len(tails), rel=1e-4)
    assert found["max_kurtosis"] == pytest.approx(max(tails), rel=1e-4)
    for kind in ("attention", "feed", "stream"):
        own = max(value for name, value in norms.items() if name.startswith(kind))
        assert found[f"inf_norm_{kind}"] == pytest.approx(own, rel=1e-5)
    assert not model.blocks[0][0]._forward_hooks, "what was watched is left as it was"


@pytest.mark.parametrize("model", MODELS)
def test_where_attention_rests_with_equal_weights(corpus, model):
    """Keys of 0 give every visible key the same weight."""
    net, marked = model_of(corpus, f"{model}/softmax"), task.separators(corpus)
    for attend in net.attentions:
        torch.nn.init.zeros_(attend.to_key.weight)
    inputs = torch.tensor([[Tokens.of(corpus).begin, 97, 46, 97, 10, 97, 98, 99]])
    found = task.attention_mass(net, inputs, marked, (4, 8))
    rows = range(4, 8)
    seen = [8 if model == "encoder" else i + 1 for i in rows]
    assert found["first_mass"] == pytest.approx(sum(1 / n for n in seen) / 4)
    assert found["separator_mass"] == pytest.approx(sum(2 / n for n in seen) / 4)
    assert found["separator_share"] == pytest.approx(found["separator_mass"])
    assert found["row_mass"] == pytest.approx(1)


def test_a_system_without_rows_of_weights_rests_nowhere(corpus):
    model, marked = model_of(corpus, "encoder/linear"), task.separators(corpus)
    assert task.attention_mass(model, torch.randint(256, (2, 8)), marked, (4, 8)) == {}


# integers


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]), st.floats(1e-3, 1e3))
def test_weights_in_integers_are_those_written_by_hand(seed, bits, size):
    weight = size * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    integers, scale = integer_weights(weight, bits)
    top = 2 ** (bits - 1) - 1
    by_hand = weight.double().abs().max() / top
    assert integers.dtype == torch.int8
    assert integers.abs().max() == top
    assert scale.item() == pytest.approx(by_hand.item(), rel=1e-6)
    exact = (weight.double() / scale.double()).clamp(-top, top)
    assert (integers.double() - exact).abs().max() <= 0.5 + 1e-4


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]), st.floats(-3, 3))
def test_activations_in_integers_are_those_written_by_hand(seed, bits, shift):
    chance = torch.Generator().manual_seed(seed)
    seen = [torch.randn(2, n, 6, generator=chance) + shift for n in (4, 3)]
    grid, top = Grid(bits), 2**bits - 1
    for part in seen:
        assert torch.equal(grid(part), part)  # watched, and left alone
    grid.fix()
    numbers = torch.cat([part.flatten() for part in seen]).double()
    low, high = min(numbers.min().item(), 0.0), max(numbers.max().item(), 0.0)
    scale = (high - low) / top
    zero = min(max(-round(low / scale), 0), top)
    assert grid.scale.item() == pytest.approx(scale, rel=1e-6)
    assert grid.zero.item() == zero
    beyond = 3 * torch.randn(2, 5, 6, generator=chance) + shift
    integers = grid.integers(beyond)
    assert integers.dtype == torch.uint8
    exact = (beyond.double() / scale + zero).clamp(0, top)
    assert (integers.double() - exact).abs().max() <= 0.5 + 1e-4
    assert_close(grid(beyond).double(), scale * (integers.double() - zero), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_in_integers_is_the_product_of_integers(bias):
    chance = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(40, 6, bias)
    layer, x = IntegerLinear(linear, 8, True), torch.randn(3, 5, 40, generator=chance) + 0.3
    layer(x)
    layer.reads.fix()
    q = layer.reads.integers(x).long() - layer.reads.zero.long()
    products = q @ layer.weight.long().T  # exact
    out = products.double() * layer.scale.double() * layer.reads.scale.double()
    out = out + linear.bias.double() if bias else out
    layer.gives = None
    with torch.no_grad():
        assert_close(layer(x).double(), out, rtol=1e-5, atol=1e-6)
        assert_close(layer(x), linear(x), rtol=0, atol=0.05)


@torch.no_grad()
def test_a_model_in_integers_holds_integers_and_the_plain_one_stays(corpus):
    model = model_of(corpus)
    before = {name: p.clone() for name, p in model.named_parameters()}
    inputs = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(0))
    weights_alone, both = quantised(model), quantised(model, [inputs])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    for copy in (weights_alone, both):
        own = [m for m in copy.modules() if isinstance(m, IntegerLinear)]
        assert len(own) == len(linears) > 0
        assert not [m for m in copy.modules() if isinstance(m, torch.nn.Linear)]
        for linear, layer in zip(linears, own, strict=True):
            assert_close(layer.scale * layer.weight, linear.weight, rtol=0, atol=layer.scale.item())
    grids = [m for m in both.modules() if isinstance(m, Grid)]
    assert len(grids) == 2 * len(linears) + 2 * len(model.blocks) + 2
    assert all(grid.scale is not None for grid in grids)
    assert not [m for m in weights_alone.modules() if isinstance(m, Grid)]
    plain, eight, four = (
        m.logits(m(inputs)) for m in (model, both, quantised(model, [inputs], bits=4))
    )
    assert 0 < (eight - plain).norm() < 0.1 * plain.norm()
    assert (four - plain).norm() > 2 * (eight - plain).norm()


@torch.no_grad()
def test_an_outlier_costs_all_others_their_digits(corpus):
    """What the task is about: a channel that nothing reads is large, and only W8A8 minds."""
    model = model_of(corpus)
    inputs = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(0))
    attend = model.blocks[0][0]
    for linear in (attend.layer.to_query, attend.layer.to_key, attend.layer.to_value):
        linear.weight[:, 0] = 0

    def lost() -> list[float]:
        plain = model(inputs)
        copies = quantised(model), quantised(model, [inputs])
        return [((copy(inputs) - plain).norm() / plain.norm()).item() for copy in copies]

    weights_before, both_before = lost()
    attend.before.weight[0] = 5000
    weights, both = lost()
    assert weights == pytest.approx(weights_before, rel=1e-3)
    assert both > 3 * both_before


def test_without_torchao_the_extra_is_named(monkeypatch):
    from aftermax.lab import quantise

    quantise.torchao.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"needs torchao: pip install 'aftermax\[quantise\]'"):
        quantise.torchao()
    quantise.torchao.cache_clear()


# the one loop


def outcome(corpus, run, folder, *ways):
    """Rows and last checkpoint of a run that was stopped in these ways, then finished."""
    with open_store(folder, run) as store:
        for step in ways:
            asked = iter(range(step))
            proceed = lambda asked=asked: next(asked, None) is not None  # noqa: E731
            assert not train(run, corpus, store, folder / "runs", proceed)
        assert train(run, corpus, store, folder / "runs")
        return store.rows(run.id), load_file(folder / "runs" / run.id / "checkpoint.safetensors")


@pytest.mark.parametrize("model", MODELS)
def test_resumed_is_uninterrupted_bit_for_bit(corpus, tmp_path, monkeypatch, model):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    run = run_of(corpus, f"{model}/softmax-one")
    straight = outcome(corpus, run, tmp_path / "a")
    resumed = outcome(corpus, run, tmp_path / "b", 2, 0, 3)
    assert resumed[0] == straight[0]
    for name, tensor in straight[1].items():
        assert torch.equal(resumed[1][name], tensor), name
    measures = {row.measure for row in straight[0]}
    assert measures >= {"loss", "w8_loss", "w8a8_loss", "w8a8_damage", "w4a4_loss", "inf_norm"}
    assert measures >= {"kurtosis", "max_kurtosis", "first_mass", "separator_mass"}
    assert {row.length for row in straight[0] if row.measure == TINY.final} == {16, 32}


def test_an_encoder_learns_what_is_masked(corpus):
    run = dataclasses.replace(
        run_of(corpus, "encoder/softmax", learning_rate=1e-2),
        work=dataclasses.replace(TINY, steps=60),
    )
    model, optimiser = loop.build(run, corpus)
    losses = [
        loop.train_step(model, optimiser, loop.batch(run, corpus, step), run, step).item()
        for step in range(60)
    ]
    assert sum(losses[-10:]) / 10 < losses[0] - 1.5


# the report


@pytest.fixture(scope="module")
def results(outlier_comparison) -> Results:
    return latest_results(outlier_comparison[0])


def test_compare_says_what_it_read_what_it_took_and_what_came_out(outlier_comparison, results):
    out, said = outlier_comparison
    assert re.search(r"text: .*, 0\.0 million tokens, \d+% separators", said)
    for system in results.work.systems:
        assert re.search(rf"{system} +\d\.\d\d\d +-?\d\.\d\d\d\d ", said)
    assert "encoder, at the training length" in said
    assert f"report: {out / 'report.html'}" in said


def test_every_phase_is_in_the_store(results):
    for system in results.work.systems:
        for multiple in (1, 2):
            for measure in ("loss", "w8a8_loss", "inf_norm", "kurtosis", "first_mass"):
                assert results.at(system, measure, multiple).count == 3
        assert results.cost(system, "peak_mebibytes") is not None


def test_the_page_has_its_own_question_figures_and_numbers(outlier_comparison, results):
    page = html.unescape((outlier_comparison[0] / "report.html").read_text(encoding="utf-8"))
    assert "<h1>Which attention leaves no outliers, and survives 8 bits?</h1>" in page
    figures = re.findall(r"<figure>\s*<svg.*?</svg>\s*<figcaption>(.*?)</figcaption>", page, re.S)
    assert figures == [caption for _, caption in CAPTIONS.values()]
    assert list(CAPTIONS) == list(plots.FIGURES["outliers"])
    made = tables(results)
    assert sum(title.startswith("Encoder: ") for title in made) == 6
    for title, (columns, rows) in made.items():
        assert f"<h3>{title}</h3>" in page
        for cell in [*columns, *(cell.text for row in rows for cell in row)]:
            assert cell in page
    for value in [*settings_of(results).values(), *results.verdicts()]:
        assert value in page


@pytest.mark.parametrize("name", CAPTIONS)
def test_every_figure_stands_beside_the_page(outlier_comparison, name):
    assert_drawn(outlier_comparison[0] / "figures" / f"{name}.png")


def test_what_is_not_measured_yet_is_a_dash_or_left_out(results, tmp_path):
    """One model, without its costs, and without what one line of a figure is drawn from."""
    gone = ("speed_ratio", "separator_share")
    half = without(results, lambda s, m, n: s.startswith("encoder") or m in gone)
    write_report(half, tmp_path / "half.html")
    assert "<td>–</td>" in (tmp_path / "half.html").read_text(encoding="utf-8")
    assert len(terminal_table(half).renderables) == 1


def test_an_exported_work_is_imported_whole(outlier_comparison, results, tmp_path):
    with (
        Store(outlier_comparison[0] / "store.sqlite") as store,
        Store(tmp_path / "new.sqlite") as new,
    ):
        work = store.latest_work()
        store.export(work, tmp_path / "rows.parquet")
        taken = import_into(new, tmp_path / "rows.parquet")
        assert (taken.work, taken.incomplete, taken.foreign) == (work, 0, 0)
        assert Results.of_store(new, work) == results


def test_verdicts_are_paired_by_seed_against_softmax_of_the_same_model():
    work = dataclasses.replace(
        TINY, systems=("encoder/softmax", "encoder/lssar", "decoder/lssar"), seeds=(0, 1, 2)
    )
    values = {}
    for name, norms in (("softmax", (10, 12, 8)), ("lssar", (5, 6, 4))):
        values["encoder/" + name, "inf_norm", 16] = dict(enumerate(norms))
        values["encoder/" + name, "kurtosis", 16] = {0: 3.0, 1: 4.0, 2: norms[0]}
        values["encoder/" + name, "loss", 16] = {0: 1.0, 1: 1.1, 2: 1.2}
        values["encoder/" + name, "w8a8_damage", 16] = {i: n / 1000 for i, n in enumerate(norms)}
    values["decoder/lssar", "loss", 16] = {0: 1.0, 1: 1.0, 2: 1.0}
    (said,) = Results(work, "quick", {}, {}, values, {}, {}, {}).verdicts()
    assert said.startswith("LSSAR (p = 15), encoder, against softmax, encoder: ")
    assert "inf norm lower x0.50 (0.50 to 0.50)" in said
    assert "kurtosis not told apart x0.79 (" in said
    assert "loss not told apart (+0.0000 ± 0.0000 nats)" in said
    assert "what W8A8 adds lower (-0.0050 ± 0.0025 nats)" in said
