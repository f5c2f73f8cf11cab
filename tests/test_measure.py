"""What is asked of a trained model: each number against one that is computed by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from aftermax.catalogue import CATALOGUE, find
from aftermax.lab import cost, measure
from aftermax.lab.cost import peak_mebibytes, training_memory, training_speed
from aftermax.lab.data.recall import PAIRS
from aftermax.lab.measure import evaluate, tuning_loss

from .lab_work import model_of, prepared, run_of, tiny_work, write_texts


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    texts = write_texts(tmp_path_factory.mktemp("measure") / "texts")
    return tiny_work(texts, multiples=(1, 2, 4), windows=3)


@pytest.fixture(scope="module")
def corpus(work):
    return prepared(work, work.data.parent)


@pytest.fixture(scope="module")
def model(work, corpus):
    """Weights large enough that every token and its place matter."""
    made = model_of(work, vocabulary=corpus.symbols.total)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return made.eval()


@pytest.fixture(scope="module")
def rows(model, work, corpus):
    """(measure, length) -> value."""
    found = evaluate(model, work, corpus, 9)
    assert {row.step for row in found} == {9}
    values = {(row.measure, row.length): row.value for row in found}
    assert len(values) == len(found)
    return values


@pytest.fixture(scope="module")
def windows(work, corpus):
    """The held-out windows (count, longest + 1), which every system gets."""
    return corpus.held_out_windows("validation", work.windows, work.lengths[-1] + 1)


@torch.no_grad()
def loss_of(model, context: torch.Tensor, target: torch.Tensor) -> float:
    """- ln p(target | context) of a single token."""
    logits = model.logits(model(context[None]))[0, -1]
    return -(logits.double().log_softmax(0)[target]).item()


# loss


def test_every_measure_stands_at_every_length(rows, work):
    names = {"loss", "truncated_loss", "bucket_loss", "passkey", "mqar"}
    names |= {"entropy", "effective_keys", "first_mass", "row_mass"}
    names |= {"cache_bytes", "cache_bytes_per_token"}
    assert set(rows) == {(name, length) for name in names for length in work.lengths}


def test_the_targets_at_each_length_are_the_same_tokens(model, work, corpus, windows, monkeypatch):
    """Only the context before them grows."""
    asked, whole = [], measure._losses

    def noted(model, part, targets):
        asked.append((part, min(targets, work.targets)))
        return whole(model, part, targets)

    monkeypatch.setattr(measure, "_losses", noted)
    evaluate(model, work, corpus, 0)
    scored = windows[:, -work.targets :]
    at_lengths = [part for part, _ in asked if len(part) == work.windows]
    assert {part.shape[1] - 1 for part in at_lengths} == set(work.lengths)
    for part in at_lengths:
        assert torch.equal(part, windows[:, -part.shape[1] :])
        assert torch.equal(part[:, -work.targets :], scored)
    (truncated,) = [part for part, _ in asked if len(part) > work.windows]
    assert torch.equal(truncated[:, -1].view(work.windows, -1), scored)


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_the_loss_is_the_mean_over_the_last_half_context(rows, model, work, windows, multiple):
    length = multiple * work.context
    losses = [
        loss_of(model, window[-length - 1 : -back], window[-back])
        for window in windows
        for back in range(1, work.targets + 1)
    ]
    assert rows["loss", length] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_truncated_loss_gives_each_target_one_context_and_no_more(rows, model, work, windows):
    losses = []
    for window in windows:
        for back in range(1, work.targets + 1):
            place = window.shape[0] - back
            losses.append(loss_of(model, window[place - work.context : place], window[place]))
    by_hand = sum(losses) / len(losses)
    for length in work.lengths:
        assert rows["truncated_loss", length] == pytest.approx(by_hand, rel=1e-5)
    assert rows["loss", work.context] != pytest.approx(by_hand, rel=1e-5)


def test_buckets_are_the_parts_of_the_longest_window(rows, model, work, windows):
    with torch.no_grad():
        logits = model.logits(model(windows[:, :-1]))
    losses = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(0)
    start = 0
    for stop in work.lengths:
        assert rows["bucket_loss", stop] == pytest.approx(losses[start:stop].mean().item(), 1e-5)
        start = stop


def test_the_loss_does_not_depend_on_how_many_windows_are_read_at_once(
    rows, model, work, corpus, monkeypatch
):
    monkeypatch.setattr(measure, "TOKENS_AT_ONCE", 1)
    for row in evaluate(model, work, corpus, 9):
        assert row.value == pytest.approx(rows[row.measure, row.length], rel=1e-4), row


def test_the_tuning_loss_is_over_the_text_kept_for_it(model, work, corpus):
    windows = corpus.held_out_windows("tune", 4 * work.windows, work.context + 1)
    with torch.no_grad():
        logits = model.logits(model(windows[:, :-1]))[:, -work.targets :]
    by_hand = F.cross_entropy(logits.flatten(0, 1), windows[:, -work.targets :].flatten())
    assert tuning_loss(model, work, corpus) == pytest.approx(by_hand.item(), rel=1e-5)


# recall


class Copier:
    """Predicts what came after the last place of the present token: all that recall asks for."""

    def __init__(self, total: int, share: float = 1.0):
        self.total, self.share = total, share

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) tokens -> (B, T, 1) predictions."""
        out = torch.zeros_like(tokens)
        for row, prediction in zip(tokens.tolist(), out, strict=True):
            followed = {}
            for i, token in enumerate(row):
                prediction[i] = followed.get(token, 0)
                if i + 1 < len(row):
                    followed[token] = row[i + 1]
        late = torch.arange(tokens.shape[1]) >= tokens.shape[1] * self.share
        return out.masked_fill(late, 0)[..., None]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.one_hot(hidden[..., 0], self.total).float()


@pytest.mark.parametrize("multiple", [1, 4])
def test_a_model_that_copies_finds_everything(work, corpus, multiple):
    copier = Copier(corpus.symbols.total)
    found = measure._recall(copier, corpus, work, multiple * work.context)
    assert found == {"passkey": 1.0, "mqar": 1.0}


def test_a_model_that_never_answers_finds_nothing(work, corpus):
    silent = Copier(corpus.symbols.total, share=0)
    assert measure._recall(silent, corpus, work, work.context) == {"passkey": 0.0, "mqar": 0.0}


def test_a_passkey_counts_only_whole_and_each_mqar_answer_for_itself(work, corpus):
    """This one falls silent two tokens before the end: one answer of MQAR, two letters."""
    length = work.context
    nearly = Copier(corpus.symbols.total, share=1 - 2 / length)
    found = measure._recall(nearly, corpus, work, length)
    assert found["passkey"] == 0.0
    assert found["mqar"] == pytest.approx(1 - 1 / PAIRS)


# diagnostics


def test_uniform_rows_have_the_entropy_of_their_count(work, corpus, windows):
    """Queries of 0 make every score 0, so row i, which sees i + 1 keys, is 1 / (i + 1)."""
    uniform = model_of(work, "softmax/none", corpus.symbols.total)
    for attend in uniform.attentions:
        torch.nn.init.zeros_(attend.to_query.weight)
    found = measure._diagnose(uniform, windows[:, :48], targets=10)
    counts = range(39, 49)
    assert found["entropy"] == pytest.approx(sum(map(math.log, counts)) / 10, rel=1e-5)
    assert found["effective_keys"] == pytest.approx(sum(counts) / 10, rel=1e-5)
    assert found["first_mass"] == pytest.approx(sum(1 / n for n in counts) / 10, rel=1e-5)
    assert found["row_mass"] == pytest.approx(1, rel=1e-5)


def test_rows_that_see_one_key_have_an_entropy_of_nothing(work, corpus, windows):
    model = model_of(work, "softmax", corpus.symbols.total)
    found = measure._diagnose(model, windows[:, :1], targets=1)
    assert found == pytest.approx(
        {"entropy": 0, "effective_keys": 1, "first_mass": 1, "row_mass": 1}, abs=1e-6
    )


@pytest.mark.parametrize("system", ["rela", "sigmoid/alibi", "lssar", "relu-power"])
def test_every_kind_of_weights_is_made_to_sum_to_one_first(work, corpus, windows, system):
    model = model_of(work, system, corpus.symbols.total)
    found = measure._diagnose(model, windows, targets=10)
    assert 0 <= found["entropy"] <= math.log(windows.shape[1])
    assert 1 <= found["effective_keys"] <= windows.shape[1]
    assert 0 <= found["first_mass"] <= 1


# what is held


def test_keys_and_values_hold_as_much_for_each_token(rows, work):
    """Of one layer: two vectors of the width in float32, and a bool."""
    for length in work.lengths:
        assert rows["cache_bytes", length] == length * (2 * work.width * 4 + 1)
        assert rows["cache_bytes_per_token", length] == 2 * work.width * 4 + 1


def test_fewer_heads_of_keys_and_values_hold_less(work, corpus, windows):
    grouped = model_of(tiny_work(work.data, kv_heads=1), vocabulary=corpus.symbols.total)
    assert measure.cache_bytes(grouped, windows[:1], (10,)) == {10: 10 * (work.width * 4 + 1)}


@pytest.mark.parametrize("system", [e.name for e in CATALOGUE if e.causal])
def test_what_is_held_is_the_state_that_decoding_goes_on_from(work, corpus, windows, system):
    """Read in pieces or at once, the state is as large; one of one size stays as it is."""
    model = model_of(work, system, corpus.symbols.total)
    tokens = windows[:1, :60]
    found = measure.cache_bytes(model, tokens, (7, 30, 60))
    assert list(found) == [7, 30, 60]
    with torch.no_grad():
        _, state = model.step(tokens, model.init_state(1))
    assert found[60] == sum(held.bytes for held in state) > 0
    if find(system).walk == "linear":
        assert found[7] == found[60]


# cost


def test_the_peak_of_memory_is_what_a_call_adds():
    def allocate(mebibytes):
        return lambda: torch.ones(mebibytes * 2**18).sum().item()

    allocate(1)()
    assert peak_mebibytes(allocate(64)) == pytest.approx(64, abs=8)
    assert peak_mebibytes(lambda: None) == pytest.approx(0, abs=2)


def test_free_memory_that_is_resident_hides_nothing():
    held = [bytearray(100_000) for _ in range(1500)]  # small ones, of the heap
    del held[:-1]  # which the last one keeps as large as it was
    assert peak_mebibytes(lambda: torch.ones(64 * 2**18)) == pytest.approx(64, abs=8)


def test_speed_is_a_ratio_to_the_first_system(work, corpus, monkeypatch):
    """Time stands still but for the steps of the two systems: the second takes twice as long."""
    clock = SimpleNamespace(now=0.0)
    seconds = {"softmax": 1.0, "lssar": 2.0}

    def step(model, optimiser, data, run, number):
        clock.now += seconds[run.system]

    monkeypatch.setattr(cost, "train_step", step)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock.now)
    runs = [run_of(work, corpus, system) for system in seconds]
    found = {
        system: {row.measure: row.value for row in measured}
        for system, measured in training_speed(runs, corpus).items()
    }
    tokens = work.batch * work.context
    for system, ratio in (("softmax", 1.0), ("lssar", 0.5)):
        assert found[system] == {
            "tokens_per_second": tokens * ratio,
            "speed_ratio": ratio,
            "speed_ratio_low": ratio,
            "speed_ratio_high": ratio,
        }


def test_memory_is_measured_in_a_process_of_its_own(work, corpus):
    (row,) = training_memory(run_of(work, corpus), corpus)
    assert (row.measure, row.length) == ("peak_mebibytes", work.lengths[-1])
    assert 0 <= row.value < 500
