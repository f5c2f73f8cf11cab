"""LongVQ: the system with a window that short sequences leave, its codebook, its memory."""

import copy
import dataclasses
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import Cache, LongVQAttention, VectorQuantised, Visible, auxiliary_loss, find
from aftermax.quantised import Codebook, DampedEMA
from aftermax.quantised.codebook import gathered, k_means, nearest

from .cases import EXACT, F64, Case, blocks_of, case_of, decode, distances, gradients
from .contract import LAWS, hold
from .weight_laws import DECLARED

ENTRY = find("longvq")
SMALL = dataclasses.replace(ENTRY, system=VectorQuantised(codes=5, window=3))
CAUSAL = Visible(causal=True)


@pytest.mark.parametrize("law", LAWS)
def test_every_law_holds_beyond_the_window(law):
    hold(SMALL, law)


@pytest.mark.parametrize("law", [law for law in DECLARED if getattr(ENTRY.laws, law)])
def test_what_is_declared_holds_beyond_the_window(law):
    DECLARED[law](SMALL)


# ---- against the dense sum over quantised keys -------------------------------------------------


def dense(case: Case, visible: Visible, window: int, seen=None) -> torch.Tensor:
    """Softmax over C_z, all pairs: near keys straight through to the key, others to their code."""
    codebook, bias = case.learned["codebook"], case.learned["window_bias"]
    groups = case.query.shape[1] // case.key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (case.key, case.value))
    codes = (key.detach()[:, :, :, None] - codebook.detach()[:, None]).square().sum(-1).argmin(-1)
    code = torch.stack([codebook[h][codes[:, h]] for h in range(codebook.shape[0])], 1)
    scale, distance = case.query.shape[-1] ** -0.5, distances(key.shape[2])
    near = distance.abs() < window
    at = bias[:, distance.abs().clamp(max=window - 1)]
    through = case.query @ (code + key - key.detach()).mT * scale + at
    scores = torch.where(near, through, case.query @ code.mT * scale)
    allowed = distance >= 0 if visible.causal else torch.ones_like(near)
    allowed = allowed if seen is None else allowed & seen[:, None, None]
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return weights.nan_to_num() @ value


@given(
    tokens=st.integers(1, 40),
    window=st.integers(1, 9),
    codes=st.integers(1, 9),
    kv_heads=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    rows=st.sampled_from([1, 300, 2**20]),
    seed=st.integers(0, 99),
)
def test_it_is_softmax_over_quantised_keys_forward_and_backward(
    tokens, window, codes, kv_heads, causal, rows, seed
):
    entry = dataclasses.replace(ENTRY, system=VectorQuantised(codes=codes, window=window))
    case = case_of(entry, tokens=tokens, kv_heads=kv_heads, value_width=5, seed=seed)
    case, visible = case.wanting_gradients(), Visible(causal=causal)
    expected = dense(case, visible, window)
    with blocks_of(rows):
        out = case.attend(entry, visible, enable_gqa=True)
    assert_close(out, expected, **EXACT)
    assert_close(gradients(out, case), gradients(expected, case), **EXACT)


@given(
    cuts=st.lists(st.integers(1, 29), unique=True).map(sorted),
    window=st.integers(1, 6),
    left=st.integers(0, 9),
    hole=st.integers(0, 29),
)
def test_streaming_is_the_dense_sum_with_padding(cuts, window, left, hole):
    entry = dataclasses.replace(ENTRY, system=VectorQuantised(codes=4, window=window))
    case = case_of(entry, tokens=30, kv_heads=2).wanting_gradients()
    seen = torch.ones(2, 30, dtype=torch.bool)
    seen[0, :left] = seen[1, hole] = False
    out = decode(entry, case, CAUSAL, cuts, seen)
    expected = dense(case, CAUSAL, window, seen)
    real = seen[:, None, :, None].expand_as(out)
    assert_close(out[real], expected[real], **EXACT)
    assert_close(gradients(out[real], case), gradients(expected[real], case), **EXACT)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_the_derivatives_for_the_codes_as_they_are(causal):
    system, visible = SMALL.system, Visible(causal=causal)
    case = case_of(SMALL, batch=1, heads=2, tokens=9, width=4, value_width=3).wanting_gradients()
    codes = nearest(case.key, case.learned["codebook"])

    def attend(query, value, codebook, window_bias):
        learned = {"codebook": codebook, "window_bias": window_bias}
        return system.attend(query, case.key.detach(), value, visible, codes=codes, **learned)

    leaves = (case.query, case.value, *case.learned.values())
    with blocks_of(100):
        assert torch.autograd.gradcheck(attend, leaves)
        assert torch.autograd.gradgradcheck(attend, leaves)


def test_a_key_has_the_gradient_of_its_quantised_self_from_its_window_alone():
    case = case_of(SMALL, tokens=9).wanting_gradients()
    out = case.attend(SMALL, CAUSAL)
    far = torch.autograd.grad(out[:, :, 6:].sum(), case.key, retain_graph=True)[0]
    assert far[:, :, :4].eq(0).all()  # 3 or more behind all of these queries
    assert far[:, :, 4:].abs().amax((0, 1, 3)).gt(0).all()
    book = torch.autograd.grad(out[:, :, 6:].sum(), case.learned["codebook"])[0]
    assert book.abs().sum() > 0


def test_a_codebook_may_be_one_for_each_key_head():
    case = case_of(SMALL, kv_heads=2).wanting_gradients()
    book = case.learned["codebook"][::2]
    shared = case._replace(learned=case.learned | {"codebook": book})
    each = case._replace(learned=case.learned | {"codebook": book.repeat_interleave(2, 0)})
    expected = each.attend(SMALL, CAUSAL, enable_gqa=True)
    assert_close(shared.attend(SMALL, CAUSAL, enable_gqa=True), expected, **EXACT)
    state = SMALL.system.init_state(2, 2, 8, 8, dtype=F64)
    options = {"enable_gqa": True, **shared.learned}
    out, state = SMALL.system.step(*shared[:3], state, CAUSAL, **options)
    assert_close(out, expected, **EXACT)
    assert state.sums.shape == (2, 2, 5, 8)


# ---- the state ---------------------------------------------------------------------------------


def read(case: Case, state, start: int, stop: int, seen=None):
    pieces = (x[:, :, start:stop] for x in case[:3])
    real = None if seen is None else seen[:, start:stop]
    return SMALL.system.step(*pieces, state, CAUSAL, real, enable_gqa=True, **case.learned)


def begin(start: int = 0):
    return SMALL.system.init_state(2, 2, 8, 5, start=start, dtype=F64)


@torch.no_grad()
@given(cut=st.integers(0, 12), flaw=st.sampled_from([None, 1, 9]), hole=st.integers(0, 11))
def test_two_pieces_read_apart_are_one(cut, flaw, hole):
    case = case_of(SMALL, tokens=14, kv_heads=2, value_width=5)
    seen = torch.ones(2, 14, dtype=torch.bool)
    seen[0, hole] = False
    if flaw is not None:
        case.key[1, 0, flaw] = torch.nan
    _, whole = read(case, begin(), 0, 12, seen)
    _, first = read(case, begin(), 0, cut, seen)
    _, second = read(case, begin(cut), cut, 12, seen)
    merged = SMALL.system.merge(first, second)
    assert (merged.length, merged.start) == (12, 0)
    for field in dataclasses.fields(merged):
        assert_close(getattr(merged, field.name), getattr(whole, field.name), **EXACT)
    expected, _ = read(case, whole, 12, 14)
    out, _ = read(case, merged, 12, 14)
    assert_close(out, expected, equal_nan=True, **EXACT)


def test_pieces_that_do_not_meet_are_refused():
    case = case_of(SMALL, kv_heads=2, value_width=5)
    _, first = read(case, begin(), 0, 4)
    _, second = read(case, begin(5), 5, 9)
    with pytest.raises(ValueError, match=r"ends at token 4.*read from 5"):
        SMALL.system.merge(first, second)


@torch.no_grad()
def test_a_state_is_of_one_size_and_holds_no_keys():
    case = case_of(SMALL, tokens=200, kv_heads=2, value_width=5)
    sizes, state = [], begin()
    for start, stop in ((0, 1), (1, 60), (60, 200)):
        _, state = read(case, state, start, stop)
        sizes.append(state.bytes)
    heads = 4  # of the codebook
    numbers = heads * (5 * 5 * 8 + 5 * 8 + 2 * 2 + 2 * 5 * 8 + 1) + 2 + 8
    assert sizes == [2 * numbers] * 3
    for x in (state.value, state.codes, state.seen):
        assert x.untyped_storage().nbytes() == x.nbytes, "no view of what was read"


@torch.no_grad()
def test_rows_of_a_state_go_on_where_they_came_from():
    case = case_of(SMALL, tokens=12, kv_heads=2, value_width=5)
    _, state = read(case, begin(), 0, 8)
    before = copy.deepcopy(state)
    out, _ = read(case, state, 8, 12)
    index = torch.tensor([1, 1, 0])
    beams = Case(*(x[index] for x in case[:3]), case.learned)
    assert_close(read(beams, state.reorder(index), 8, 12)[0], out[index], **EXACT)
    for field in dataclasses.fields(state):
        assert_close(getattr(state, field.name), getattr(before, field.name))


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dropout_p": 0.1}, ValueError, "cannot drop one"),
        ({"impl": "cpu"}, RuntimeError, "no kernel"),
        ({"impl": "gpu"}, ValueError, "none of"),
        ({"codes": torch.zeros(2, 4, 9)}, ValueError, r"int64 \(B, Hc, Tk\) = \(2, 4, 9\)"),
        ({"codebook": torch.zeros(4, 3, 8)}, ValueError, r"shape \(4, 5, 8\), got \(4, 3, 8\)"),
        ({"sink": torch.zeros(4)}, TypeError, "learns no sink"),
    ],
)
def test_what_attend_refuses(options, error, words):
    case = case_of(SMALL)
    with pytest.raises(error, match=words):
        SMALL.system.attend(*case[:3], CAUSAL, **options)


@pytest.mark.parametrize(
    "visible",
    [Visible(), Visible(causal=True, window=2), Visible(causal=True, slopes=torch.ones(4))],
    ids=["not causal", "window", "alibi"],
)
def test_what_step_refuses(visible):
    case = case_of(SMALL)
    state = SMALL.system.init_state(2, 4, 8, 8, dtype=F64)
    with pytest.raises(ValueError, match="told apart no longer"):
        SMALL.system.step(*case[:3], state, visible, **case.learned)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="codes >= 1 and window >= 1, got 0 and 64"):
        VectorQuantised(codes=0)


# ---- the codebook ------------------------------------------------------------------------------


def test_the_nearest_code_is_the_nearest():
    key, book = torch.randn(2, 3, 50, 4, dtype=F64), torch.randn(3, 7, 4, dtype=F64)
    codes = nearest(key, book)
    assert torch.equal(codes, torch.cdist(key, book).argmin(-1))
    chosen = (key - gathered(book, codes)).norm(dim=-1)
    assert_close(chosen, torch.cdist(key, book).amin(-1), **EXACT)


def test_k_means_finds_what_is_apart():
    centres = 10 * torch.eye(4, dtype=F64)
    keys = centres.repeat(25, 1) + 0.01 * torch.randn(100, 4, dtype=F64)
    # a start that draws one centre twice stays there: the tightest of several is the clusters
    drawn = [k_means(keys, 4)[0] for _ in range(9)]
    found = min(drawn, key=lambda means: torch.cdist(keys, means).amin(1).sum())
    assert torch.cdist(centres, found).amin(1).max() < 0.1


def test_the_codebook_is_the_running_mean_of_the_keys_that_chose_it():
    book = Codebook(1, 2, 1, decay=0.5, dead=0, k_means_steps=0, dtype=F64)
    book.sums[:] = book.codes[:] = torch.tensor([[[0.0], [4.0]]])
    key = torch.tensor([1.0, 3.0, 6.0], dtype=F64).reshape(1, 1, 3, 1)
    book.follow(key)
    assert_close(book.counts, torch.tensor([[1.0, 1.5]], dtype=F64))
    assert_close(book.sums, torch.tensor([[[0.5], [6.5]]], dtype=F64))
    assert_close(book.codes, book.sums / book.counts[..., None])


def test_padding_and_what_is_not_finite_teach_nothing():
    first, second = (Codebook(2, 4, 3, dtype=F64) for _ in range(2))
    key = torch.randn(2, 2, 9, 3, dtype=F64)
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[0, 5:] = False
    torch.manual_seed(1)
    first.follow(key, seen)
    key[0, :, 5:] = torch.nan
    torch.manual_seed(1)
    second.follow(key)
    for name, x in first.named_buffers():
        assert torch.equal(x, dict(second.named_buffers())[name]), name
    assert first.codes.isfinite().all()


def test_dead_codes_are_sown_anew_and_the_perplexity_says_so():
    keys = torch.randn(4, 1, 256, 8, dtype=F64)
    books = {dead: Codebook(1, 32, 8, dead=dead, k_means_steps=0, dtype=F64) for dead in (0, 0.02)}
    for book in books.values():
        book.sums[:, 8:] += 100  # where no key is
        book.codes.copy_(book.sums)
        for _ in range(500):
            book.follow(keys)
    assert books[0].diagnostics().perplexity < 9
    assert books[0].diagnostics().reseeded == 0
    found = books[0.02].diagnostics()
    assert found.perplexity > 16
    assert found.reseeded >= 24
    assert found.dead == 0


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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("offset", [-4, 0, 2, 17])
@pytest.mark.parametrize(("queries", "keys"), [(3, 20), (20, 3), (1, 30), (0, 5)])
def test_queries_may_stand_anywhere_among_the_keys(queries, keys, offset, causal):
    long, short = case_of(SMALL, tokens=keys), case_of(SMALL, tokens=queries, seed=1)
    case, visible = long._replace(query=short.query), Visible(causal=causal, offset=offset)
    pairs = dataclasses.replace(visible, mask=torch.zeros(keys, dtype=F64))  # pair by pair
    with blocks_of(300):
        out = case.attend(SMALL, visible)
    assert_close(out, case.attend(SMALL, pairs), **EXACT)


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
