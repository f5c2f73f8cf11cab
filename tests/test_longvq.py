"""LongVQ: the system, with a window that short sequences leave, its state and its codebook."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import VectorQuantised, Visible
from aftermax.quantised import Codebook
from aftermax.quantised.codebook import gathered, k_means, nearest

from .cases import EXACT, F64, Case, blocks_of, case_of, decode, gradients
from .contract import LAWS, hold
from .longvq_cases import CAUSAL, ENTRY, SMALL, dense
from .weight_laws import DECLARED


@pytest.mark.parametrize("law", LAWS)
def test_every_law_holds_beyond_the_window(law):
    hold(SMALL, law)


@pytest.mark.parametrize("law", [law for law in DECLARED if getattr(ENTRY.laws, law)])
def test_what_is_declared_holds_beyond_the_window(law):
    DECLARED[law](SMALL)


# ---- against the dense sum over quantised keys -------------------------------------------------


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
