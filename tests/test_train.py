"""The training loop: the same for every system, and the same numbers however often it stops."""

import math
import random

import pytest
import torch
from safetensors.torch import load_file

from aftermax.catalogue import CATALOGUE
from aftermax.lab import train as loop
from aftermax.lab.data.recall import TASKS
from aftermax.lab.store import Row, Store
from aftermax.lab.text import recall_rows
from aftermax.lab.train import batch, build, learning_rate, load, save, train

from .lab_work import open_store, prepared, run_of, tiny_work, write_texts

CAUSAL = [entry for entry in CATALOGUE if entry.causal]

STEPS = 12


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tiny_work(write_texts(tmp_path_factory.mktemp("train") / "texts"), steps=STEPS)


@pytest.fixture(scope="module")
def corpus(work):
    return prepared(work, work.data.parent)


@pytest.fixture(autouse=True)
def _rows_and_checkpoints_often(monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 3)
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 5)


def stop_at(step: int):
    """A `proceed` that is asked before each step and says no before this one."""
    asked = iter(range(step))
    return lambda: next(asked, None) is not None


def outcome(run, corpus, folder, *ways) -> tuple[list[Row], dict[str, torch.Tensor]]:
    """Rows and last checkpoint of a run that was stopped in these ways, then finished."""
    with open_store(folder, run) as store:
        for proceed in ways:
            assert not train(run, corpus, store, folder / "runs", proceed)
        assert train(run, corpus, store, folder / "runs")
        assert store.status(run.id) == "done"
        return store.rows(run.id), load_file(folder / "runs" / run.id / "checkpoint.safetensors")


def assert_same(left, right) -> None:
    """Bit for bit."""
    assert left[0] == right[0]
    assert left[1].keys() == right[1].keys()
    for name, tensor in left[1].items():
        assert torch.equal(tensor, right[1][name]), name


@pytest.fixture(scope="module")
def straight(work, corpus, tmp_path_factory):
    """What a run that nobody stops comes to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 3)
        return outcome(run_of(work, corpus), corpus, tmp_path_factory.mktemp("straight"))


# the same work for every system


def test_every_system_sees_the_same_data_in_the_same_order(work, corpus):
    runs = [run_of(work, corpus, system, learning_rate=r) for system, r in
            (("softmax", 1e-3), ("lssar/alibi", 3e-3))]  # fmt: skip
    for step in range(5):
        ours, theirs = (batch(run, corpus, step) for run in runs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_data_differs_from_step_to_step_and_seed_to_seed(work, corpus):
    runs = [run_of(work, corpus, seed=seed) for seed in (0, 1)]
    seen = [batch(run, corpus, step).tokens for run in runs for step in range(3)]
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_a_batch_is_text_with_recall_problems_in_its_first_rows(work, corpus):
    tokens, text, answers = batch(run_of(work, corpus), corpus, 0)
    recall = recall_rows(work)
    assert recall == 2
    assert tokens.shape == (work.batch, work.context + 1)
    assert text[recall:].all()
    assert answers[:recall].any(1).all()
    assert not answers[recall:].any()
    is_text = tokens[:, 1:] <= corpus.symbols.end
    assert torch.equal(text, is_text)
    assert not is_text[answers].any()


@pytest.mark.parametrize(("share", "rows"), [(0.0, 0), (0.25, 8), (0.5, 16)])
def test_recall_rows_are_as_many_of_each_kind(work, share, rows):
    assert recall_rows(tiny_work(work.data, batch=32, recall_share=share)) == rows
    assert rows % len(TASKS) == 0


@pytest.mark.parametrize("entry", CAUSAL, ids=lambda entry: entry.name)
def test_every_system_starts_from_the_same_weights(work, corpus, entry):
    ours = dict(build(run_of(work, corpus, entry.name), corpus)[0].named_parameters())
    softmax = dict(build(run_of(work, corpus, "softmax"), corpus)[0].named_parameters())
    shared = {n for n in ours.keys() & softmax.keys() if ours[n].shape == softmax[n].shape}
    assert len(shared) > 8  # of fewer heads there are fewer rows
    for name in shared:
        assert torch.equal(ours[name], softmax[name]), name


def test_another_seed_gives_other_weights(work, corpus):
    first, second = (build(run_of(work, corpus, seed=s), corpus)[0] for s in (0, 1))
    assert not torch.equal(first.embed.weight, second.embed.weight)


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine_to_a_tenth(work, corpus):
    run = run_of(tiny_work(work.data, steps=100, warmup=0.2), corpus, learning_rate=1.0)
    rates = [learning_rate(run, step) for step in range(101)]
    assert rates[0] == 1 / 20
    assert rates[9] == 10 / 20
    assert rates[19] == rates[20] == 1.0
    assert rates[40] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rates[60] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert sorted(rates[20:], reverse=True) == rates[20:]


def test_matrices_decay_and_vectors_and_what_a_system_learns_do_not(work, corpus):
    model, optimiser = build(run_of(work, corpus, "rela"), corpus)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, kept = ([names[id(p)] for p in g["params"]] for g in optimiser.param_groups)
    assert [g["weight_decay"] for g in optimiser.param_groups] == [0.1, 0.0]
    assert "embed.weight" in decayed
    assert not [n for n in decayed if "norm" in n or "learned" in n]
    assert any("learned" in n for n in kept)
    assert len(decayed) + len(kept) == len(names)


def test_the_reported_loss_is_that_of_the_text_alone(work, corpus):
    run = run_of(work, corpus)
    model, optimiser = build(run, corpus)
    data = batch(run, corpus, 0)
    with torch.no_grad():
        logits = model.logits(model(data.tokens[:, :-1]))
        by_hand = -logits.log_softmax(-1).gather(2, data.tokens[:, 1:, None])[data.text].mean()
    reported = loop.train_step(model, optimiser, data, run, 0)
    assert reported.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_it_learns(work, corpus, tmp_path):
    run = run_of(tiny_work(work.data, steps=60), corpus, learning_rate=1e-2)
    rows, _ = outcome(run, corpus, tmp_path)
    losses = [row.value for row in rows if row.measure == "train_loss"]
    assert losses[-1] < losses[0] - 1


# the same numbers however often it stops


@pytest.mark.parametrize("entry", CAUSAL, ids=lambda entry: entry.name)
def test_a_checkpoint_brings_everything_back(work, corpus, tmp_path, entry):
    run = run_of(work, corpus, entry.name)
    model, optimiser = build(run, corpus)
    for step in range(2):
        loop.train_step(model, optimiser, batch(run, corpus, step), run, step)
    save(tmp_path / "c.safetensors", model, optimiser, 2)
    state = torch.get_rng_state()
    torch.rand(10)
    other, its_optimiser = build(run_of(work, corpus, entry.name, seed=1), corpus)
    assert load(tmp_path / "c.safetensors", other, its_optimiser) == 2
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    for left, right in pairs:
        assert torch.equal(left, right)
        assert optimiser.state[left].keys() == its_optimiser.state[right].keys()
        for key, value in optimiser.state[left].items():
            assert torch.equal(value, its_optimiser.state[right][key])


@pytest.mark.parametrize("step", range(STEPS))
def test_stopped_once_before_any_step(work, corpus, tmp_path, straight, step):
    run = run_of(work, corpus)
    assert_same(outcome(run, corpus, tmp_path, stop_at(step)), straight)


@pytest.mark.parametrize("every", [1, 4, 100])
def test_the_time_between_checkpoints_does_not_matter(
    work, corpus, tmp_path, straight, monkeypatch, every
):
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", every)
    assert_same(outcome(run_of(work, corpus), corpus, tmp_path, stop_at(7)), straight)


@pytest.mark.parametrize("seed", range(4))
def test_stopped_again_and_again(work, corpus, tmp_path, straight, seed):
    chance = random.Random(seed)
    ways = [stop_at(chance.randint(0, 3)) for _ in range(4)]
    assert_same(outcome(run_of(work, corpus), corpus, tmp_path, *ways), straight)


class Killed(BaseException):
    """Nothing of ours is asked and nothing is cleaned up by hand: the process just ends."""


def killed_in(patch: pytest.MonkeyPatch, of, name: str, after: int) -> None:
    """Let a function end the process at its call number `after`, before or after its work."""
    whole, calls = getattr(of, name), iter(range(after + 1))

    def deadly(*args, **kwargs):
        if next(calls) == after // 2:
            if after % 2:
                whole(*args, **kwargs)
            raise Killed
        return whole(*args, **kwargs)

    patch.setattr(of, name, deadly)


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize(
    ("of", "name"),
    [(loop, "train_step"), (loop, "save"), (Store, "write"), (loop, "evaluate")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_killed_before_or_after_any_part(work, corpus, tmp_path, straight, of, name, after):
    """Most of all between a checkpoint and its rows: neither may be there without the other."""
    run = run_of(work, corpus)
    with pytest.MonkeyPatch.context() as patch, open_store(tmp_path, run) as store:
        killed_in(patch, of, name, after)
        try:
            train(run, corpus, store, tmp_path / "runs")
        except Killed:
            assert store.status(run.id) in ("running", "done")
    assert_same(outcome(run, corpus, tmp_path), straight)


def test_a_checkpoint_that_was_half_written_is_in_nobodys_way(work, corpus, tmp_path, straight):
    run = run_of(work, corpus)
    (tmp_path / "runs" / run.id).mkdir(parents=True)
    (tmp_path / "runs" / run.id / "checkpoint.part").write_bytes(b"half")
    assert_same(outcome(run, corpus, tmp_path), straight)


def test_a_finished_run_is_left_alone(work, corpus, tmp_path, straight):
    run = run_of(work, corpus)
    outcome(run, corpus, tmp_path)
    path = tmp_path / "runs" / run.id / "checkpoint.safetensors"
    made = path.stat().st_mtime_ns
    assert_same(outcome(run, corpus, tmp_path), straight)
    assert path.stat().st_mtime_ns == made


def test_two_processes_never_work_on_one_run(work, corpus, tmp_path):
    run = run_of(work, corpus)
    with open_store(tmp_path, run) as store, loop.alone(tmp_path / run.id):
        with pytest.raises(OSError, match=f"another process is at work on {run.id}"):
            train(run, corpus, store, tmp_path)
        assert store.rows(run.id) == []


def test_a_loss_that_is_no_number_ends_the_run_as_a_result(work, corpus, tmp_path):
    run = run_of(work, corpus, learning_rate=1e30)
    rows, _ = ([], None)
    with open_store(tmp_path, run) as store:
        assert train(run, corpus, store, tmp_path)
        assert store.status(run.id) == "done"
        assert store.progress() == {}
        rows = store.rows(run.id)
    assert [row.measure for row in rows] == ["diverged"]


def test_a_run_keeps_the_losses_that_it_had_before_it_diverged(work, corpus, tmp_path, monkeypatch):
    whole = loop.train_step

    def failing(model, optimiser, data, run, step):
        return whole(model, optimiser, data, run, step) * (math.nan if step > 6 else 1)

    monkeypatch.setattr(loop, "train_step", failing)
    run = run_of(work, corpus)
    with open_store(tmp_path, run) as store:
        assert train(run, corpus, store, tmp_path)
        rows = store.rows(run.id)
    assert [(r.step, r.measure) for r in rows] == [
        (3, "train_loss"), (6, "train_loss"), (9, "diverged"),
    ]  # fmt: skip


def test_a_search_run_is_judged_on_text_of_its_own(work, corpus, tmp_path, monkeypatch):
    asked = []
    whole = type(corpus).held_out_windows
    monkeypatch.setattr(
        type(corpus),
        "held_out_windows",
        lambda self, split, *rest, **more: asked.append(split) or whole(self, split, *rest, **more),
    )
    run = run_of(tiny_work(work.data, search_steps=6), corpus, kind="search")
    rows, _ = outcome(run, corpus, tmp_path)
    assert {(r.step, r.measure) for r in rows if r.measure != "train_loss"} == {(6, "tuning_loss")}
    assert set(asked) == {"tune"}
