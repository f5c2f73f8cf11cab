"""LongVQ: the damped memory, and the layer with its gates and its codebook."""

import copy
import dataclasses
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import Cache, LongVQAttention, Visible, auxiliary_loss, find
from aftermax.quantised import Codebook, DampedEMA

from .cases import EXACT, F64, Case
from .longvq_cases import CAUSAL, SMALL, dense

# ---- the damped memory -------------------------------------------------------------------------


def memory_by_hand(memory: DampedEMA, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Token by token, as arXiv 2209.10655 writes it."""
    out = torch.zeros_like(x)
    runs = [(slice(0, 6), range(x.shape[1]))]
    if memory.bidirectional:
        runs.append((slice(6, 12), reversed(range(x.shape[1]))))
    for part, order in runs:
        alpha, delta = memory.alpha[part, :, 0].sigmoid(), memory.delta[part, :, 0].sigmoid()
        h = torch.zeros(x.shape[0], 6, memory.dims, dtype=x.dtype)
        for t in order:
            token = torch.where(seen[:, t, None], x[:, t], 0)
            h = (1 - alpha * delta) * h + delta * memory.beta[part, :, 0] * token[..., None]
            out[:, t] += (memory.gamma[part, :, 0] * h).sum(-1) / memory.dims**0.5
    out = out + memory.omega * x
    return out * out.sigmoid()


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(importlib.import_module("aftermax.quantised.ema"), "CHUNK", 7)


@pytest.mark.parametrize("both", [False, True])
def test_convolutions_in_chunks_are_the_recurrence(both, short_chunks):
    memory = DampedEMA(6, dims=3, bidirectional=both, dtype=F64)
    x = torch.randn(2, 25, 6, dtype=F64, requires_grad=True)
    seen = torch.rand(2, 25) < 0.8
    out, expected = memory(x, seen), memory_by_hand(memory, x, seen)
    assert_close(out, expected, **EXACT)
    leaves = [x, *memory.parameters()]
    upstream = torch.randn_like(out)
    got, wanted = (torch.autograd.grad(y, leaves, upstream) for y in (out, expected))
    assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@torch.no_grad()
@given(cuts=st.lists(st.integers(1, 29), unique=True).map(sorted))
def test_a_memory_is_read_in_any_pieces_and_joined(cuts):
    torch.manual_seed(0)
    memory, x = DampedEMA(6, dims=3, dtype=F64), torch.randn(2, 30, 6, dtype=F64)
    whole, last = memory.step(x, memory.init_state(2))
    assert_close(memory(x), whole, **EXACT)
    rows, state, joined = [], memory.init_state(2), memory.init_state(2)
    for start, stop in zip([0, *cuts], [*cuts, 30], strict=True):
        piece, state = memory.step(x[:, start:stop], state)
        rows.append(piece)
        apart = memory.step(x[:, start:stop], memory.init_state(2, start))[1]
        joined = memory.merge(joined, apart)
    assert_close(torch.cat(rows, 1), whole, **EXACT)
    for found in (state, joined):
        assert_close(found.h, last.h, **EXACT)
        assert found.length == 30
    assert state.bytes == 2 * 6 * 3 * 8
    assert_close(state.reorder(torch.tensor([1])).h, last.h[1:], **EXACT)


def test_what_is_not_finite_is_felt_from_there_on_and_by_its_channel_alone(short_chunks):
    memory, x = DampedEMA(6, dims=3, dtype=F64), torch.randn(2, 25, 6, dtype=F64)
    clean = memory(x)
    x[1, 9, 2] = torch.inf
    out = memory(x)
    expected = clean.clone()
    expected[1, 9:, 2] = torch.nan
    assert_close(out, expected, equal_nan=True, **EXACT)
    first, state = memory.step(x[:, :11], memory.init_state(2))
    rest, _ = memory.step(x[:, 11:], state)
    assert_close(torch.cat([first, rest], 1), expected, equal_nan=True, **EXACT)


def test_a_memory_of_both_ends_has_no_step():
    memory = DampedEMA(4, bidirectional=True)
    with pytest.raises(ValueError, match="later tokens change earlier rows"):
        memory.step(torch.zeros(1, 2, 4), memory.init_state(1))


# ---- the layer ---------------------------------------------------------------------------------


def layer(seed: int = 0, **options) -> LongVQAttention:
    torch.manual_seed(seed)
    options = {"weights": SMALL.system, "kv_heads": 2, "memory_dims": 3, "dtype": F64} | options
    return LongVQAttention(16, heads=4, **options).eval()


def inputs(length: int = 14, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, length, 16, generator=generator, dtype=F64)


def test_the_layer_is_what_its_formulas_say():
    attend, x = layer(kv_heads=4), inputs()
    m = attend.memory(x)

    def heads(y):
        return y.reshape(2, 14, 4, 4).transpose(1, 2)

    def normed(y):
        return y / (y.square().mean(-1, keepdim=True) + torch.finfo(F64).eps).sqrt()

    silu = torch.nn.functional.silu
    z = heads(silu(m @ attend.to_key.weight.T))
    query = normed(attend.gain["query"] * z + attend.shift["query"])
    key = normed(attend.gain["key"] * z + attend.shift["key"])
    value = heads(silu(x @ attend.to_value.weight.T))
    learned = {"codebook": attend.codebook.codes, "window_bias": attend.learned["window_bias"]}
    o = dense(Case(query, key, value, learned), CAUSAL, 3).transpose(1, 2).flatten(-2)
    r, u = silu(attend.to_reset(m)), attend.to_update(m).sigmoid()
    better = silu(attend.to_hidden(m) + (r * o) @ attend.to_out.weight.T)
    assert_close(x + attend(x), u * better + (1 - u) * x, **EXACT)


@torch.no_grad()
@given(
    cuts=st.lists(st.integers(1, 13), unique=True).map(sorted),
    left=st.integers(0, 4),
    hole=st.integers(0, 13),
    rope=st.booleans(),
)
def test_the_layer_read_in_pieces_is_the_layer_read_whole(cuts, left, hole, rope):
    attend, x = layer(positions="rope" if rope else "none"), inputs()
    seen = torch.ones(2, 14, dtype=torch.bool)
    seen[0, :left] = seen[1, hole] = False
    state, rows = attend.init_state(2), []
    for start, stop in zip([0, *cuts], [*cuts, 14], strict=True):
        out, state = attend.step(x[:, start:stop], state, seen[:, start:stop])
        rows.append(out)
    assert_close(torch.cat(rows, 1)[seen], attend(x, seen)[seen], **EXACT)
    assert state.length == 14


@pytest.mark.parametrize("causal", [True, False])
def test_padding_of_the_layer_is_not_seen(causal):
    attend, x = layer(causal=causal), inputs()
    real = torch.ones(2, 14, dtype=torch.bool)
    real[0, 9:] = False
    real[1, :4] = False
    out = attend(x, real)
    x[~real] = torch.nan
    assert torch.equal(attend(x, real)[real], out[real])
    assert_close(attend(x, Visible(causal, mask=real[:, None, None]))[real], out[real], **EXACT)
    assert_close(out[:1, :9], attend(x[:1, :9]), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 2, 7, 13])
def test_a_second_piece_of_the_layer_joins_when_it_has_the_memory_of_the_first(cut):
    attend, x = layer(), inputs()
    _, whole = attend.step(x[:, :13], attend.init_state(2))
    _, first = attend.step(x[:, :cut], attend.init_state(2))
    _, memory = attend.memory.step(x[:, :cut], attend.memory.init_state(2))
    _, second = attend.step(x[:, cut:13], attend.init_state(2, cut, memory))
    merged = attend.merge(first, second)
    assert_close(attend.step(x[:, 13:], merged)[0], attend(x)[:, 13:], **EXACT)
    assert merged.bytes == whole.bytes
    _, apart = attend.step(x[:, cut:13], attend.init_state(2, cut))
    with pytest.raises(ValueError, match="without the memory of the first"):
        attend.merge(first, apart)
    with pytest.raises(ValueError, match="begins with a memory of as much"):
        attend.init_state(2, cut + 1, memory)


@torch.no_grad()
def test_the_cache_of_the_layer():
    attend, x = layer(), inputs(40)
    cache, whole = Cache(attend, batch=2), attend(x)
    assert (cache.can_truncate, cache.can_merge) == (False, False)
    cache.append(x[:, :9])
    size, before = cache.bytes, cache.snapshot()
    cache.append(x[:, :25])
    assert cache.bytes == size
    cache.restore(before)
    cache.reorder(torch.tensor([1, 1, 0]))
    assert_close(cache.append(x[[1, 1, 0], 9:]), whole[[1, 1, 0], 9:], **EXACT)


def test_the_codebook_follows_in_training_alone_and_after_the_pass():
    attend, x = layer().train(), inputs(200)
    before = attend.codebook.codes.clone()
    torch.manual_seed(1)
    attend(x).sum().backward()  # no buffer that the backward pass needs was changed
    assert not torch.equal(attend.codebook.codes, before)
    again = layer().train()
    torch.manual_seed(1)
    first = again(x)
    for name, buffer in again.named_buffers():
        assert torch.equal(buffer, attend.get_buffer(name)), name
    after = again.codebook.codes.clone()
    assert not torch.equal(again(x), first)  # k-means was the start, and the mean has moved
    again.eval()
    held = again.codebook.codes.clone()
    assert torch.equal(again(x), again(x))
    again.train().step(x[:, :9], again.init_state(2))
    assert torch.equal(again.codebook.codes, held)
    assert not torch.equal(held, after)


def test_the_commitment_is_given_once_and_pulls_keys_to_codes():
    attend, x = layer(commitment=0.5).train(), inputs(60)
    seen = torch.ones(2, 60, dtype=torch.bool)
    seen[0, 20:] = False
    attend(x, seen)
    loss = attend.auxiliary_loss()
    assert 0 < loss < 0.5
    assert torch.autograd.grad(loss, attend.gain["key"])[0].abs().sum() > 0
    assert attend.auxiliary_loss() == 0
    attend.eval()(x)
    assert attend.auxiliary_loss() == 0
    fixed = layer(commitment=0.5, decay=0.0, dead=0, k_means_steps=0).train()
    codes = fixed.codebook.codes.clone()
    fixed(x, seen)
    key = fixed.project(torch.where(seen[..., None], x, 0), 0)[1].transpose(1, 2)[seen]
    missed = torch.stack([torch.cdist(key[:, h], codes[h]).amin(-1) for h in range(2)])
    assert_close(fixed.auxiliary_loss(), 0.5 * missed.square().mean() / 4, **EXACT)


def test_a_layer_in_training_is_copied_without_its_loss():
    attend = layer().train()
    attend(inputs())
    other = copy.deepcopy(attend)
    assert other.auxiliary_loss() == 0
    assert attend.auxiliary_loss() > 0
    other.load_state_dict(attend.state_dict())
    assert torch.equal(other.eval()(inputs()), attend.eval()(inputs()))


def test_every_parameter_of_the_layer_learns():
    attend = layer().train()
    attend(inputs(30)).square().sum().backward()
    for name, parameter in attend.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_codes_of_gaussian_keys_are_used():
    torch.manual_seed(0)
    book = Codebook(2, 64, 16)
    for _ in range(50):
        book.follow(torch.randn(4, 2, 256, 16))
    assert (book.diagnostics().perplexity > 32).all()


def test_the_layer_compiles_for_evaluation():
    attend, x = layer().float(), inputs().float()
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), attend(x))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"weights": find("linear").system}, TypeError, "attends with a VectorQuantised"),
        ({"window": 3}, ValueError, "window=3 and dropout=0.0"),
        ({"dropout": 0.1}, ValueError, "dropout=0.1"),
        ({"positions": "alibi"}, ValueError, "tell the keys of a code apart"),
        ({"commitment": -1.0}, ValueError, "at least 0, got -1.0"),
        ({"decay": 1.0}, ValueError, "shares below 1"),
    ],
)
def test_what_the_layer_refuses(options, error, words):
    with pytest.raises(error, match=words):
        layer(**options)


def test_a_view_must_be_as_causal_as_the_memory():
    with pytest.raises(ValueError, match=r"the memory is causal.*causal=False"):
        layer()(inputs(), Visible())
    with pytest.raises(ValueError, match="needs a causal module"):
        layer(causal=False).step(inputs(), None)


def test_a_decoder_trains_its_codebooks_and_adds_their_loss():
    from aftermax.lab import text
    from aftermax.lab.models import DecoderLM
    from aftermax.lab.work import Run, Work, arm

    work = dataclasses.replace(Work(), layers=2, recall_share=0.0)
    torch.manual_seed(0)
    model = DecoderLM(work, arm("longvq", work), vocabulary=290).train()
    assert all(isinstance(attend, LongVQAttention) for attend in model.attentions)
    before = [attend.codebook.codes.clone() for attend in model.attentions]
    tokens = torch.randint(290, (3, 101))  # more keys than codes
    real = torch.ones(3, 100, dtype=torch.bool)
    loss, reported = text.loss(
        model, text.Batch(tokens, real, ~real), Run(work, "longvq", 0, 1e-3, "train", "")
    )
    assert reported < loss < reported + 0.25
    assert auxiliary_loss(model) == 0
    for attend, codes in zip(model.attentions, before, strict=True):
        assert not torch.equal(attend.codebook.codes, codes)
    model.eval()
    with torch.no_grad():
        whole = model(tokens)
        first, state = model.step(tokens[:, :9], model.init_state(3))
        rest, _ = model.step(tokens[:, 9:], state)
    assert_close(torch.cat([first, rest], 1), whole, rtol=1e-4, atol=1e-4)


def test_a_stopped_training_goes_on_with_its_codebooks(tmp_path):
    from aftermax.lab import text, train
    from aftermax.lab.models import DecoderLM
    from aftermax.lab.work import Run, Work, arm

    work = dataclasses.replace(Work(), layers=1, recall_share=0.0)
    run = Run(work, "longvq", 0, 1e-3, "train", "")
    real = torch.ones(3, 100, dtype=torch.bool)
    batches = [text.Batch(torch.randint(290, (3, 101)), real, ~real) for _ in range(4)]

    def made():
        model = DecoderLM(work, arm("longvq", work), vocabulary=290).train()
        return model, train.make_optimiser(model, run)

    model, optimiser = made()
    for step in range(2):
        train.train_step(model, optimiser, batches[step], run, step)
    train.save(tmp_path / "held", model, optimiser, 2)
    for step in (2, 3):
        train.train_step(model, optimiser, batches[step], run, step)
    again, other = made()
    assert train.load(tmp_path / "held", again, other) == 2
    for step in (2, 3):
        train.train_step(again, other, batches[step], run, step)
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name


def test_codes_do_not_shrink_where_a_batch_holds_few_keys():
    torch.manual_seed(0)
    book = Codebook(1, 64, 2, decay=0.9)
    for _ in range(200):
        book.follow(torch.randn(1, 1, 4, 2) + 10)
    assert book.codes.norm(dim=-1).min() > 9
