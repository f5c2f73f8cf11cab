"""Where what decodes meets autocast, no tokens, no sequences, no data, and small dtypes."""

import pytest
import torch
from torch.testing import assert_close

from aftermax import (
    Attention,
    Cache,
    LongVQAttention,
    OfSystem,
    RecurFormer,
    RecurFormerAttention,
    SinkWindow,
    Softmax,
    SparseK,
    VectorQuantised,
    Visible,
    kernels,
    sparsek,
)
from aftermax.hybrid import Plan
from aftermax.hybrid.replace import replace_heads
from aftermax.quantised import Codebook
from aftermax.sparse import SparseKAttention

MODULES = {
    "attention": lambda **kw: Attention(16, heads=4, **kw),
    "sparsek": lambda **kw: SparseKAttention(16, heads=4, weights=SparseK(k=2, window=2), **kw),
    "longvq": lambda **kw: LongVQAttention(
        16, heads=4, weights=VectorQuantised(codes=8, window=4), **kw
    ),
    "recurformer": lambda **kw: RecurFormerAttention(16, heads=4, **kw),
}


@pytest.mark.parametrize("name", MODULES)
def test_under_autocast_pieces_are_the_whole(name):
    attend, x = MODULES[name]().eval(), torch.randn(2, 9, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole, cache = attend(x), Cache(attend, 2)
        pieces = torch.cat([cache.append(x[:, :4]), cache.append(x[:, 4:])], 1)
    assert_close(pieces, whole, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 3, 16)])
def test_no_tokens_and_no_sequences(name, shape):
    attend, x = MODULES[name]().eval(), torch.randn(shape)
    assert attend(x).shape == shape
    cache = Cache(attend, shape[0])
    assert cache.append(x).shape == shape
    assert cache.length == shape[1]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_on_the_device_meta(name, training):
    attend = MODULES[name](device="meta").train(training)
    x = torch.randn(2, 5, 16, device="meta")
    assert attend(x).shape == x.shape
    if not training and name != "sparsek":  # which holds as many scores as have p > 0
        assert attend.step(x, attend.init_state(2))[0].shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_codebook_counts_every_key_in_half(dtype):
    keys = torch.randn(8, 1, 4096, 2).to(dtype) + 1
    book = Codebook(1, 4, 2, decay=0.0, dtype=dtype)
    for one in (book, Codebook(1, 4, 2, decay=0.0).to(dtype)):
        one.follow(keys)
        assert one.counts.sum() == 8 * 4096
        assert one.codes.dtype == dtype
        assert one.codes.isfinite().all()
    again = Codebook(1, 4, 2, dtype=dtype)
    again.load_state_dict(book.state_dict())
    assert_close(again.counts, book.counts, rtol=0, atol=0)


def test_a_batch_of_padding_is_no_start_of_a_codebook():
    book, keys = Codebook(1, 4, 2), torch.randn(2, 1, 50, 2) + 9
    before = book.codes.clone()
    book.follow(keys, torch.zeros(2, 50, dtype=torch.bool))
    assert_close(book.codes, before, rtol=0, atol=0)
    assert not book.begun
    book.follow(keys)
    assert book.begun
    assert (book.codes > 4).all()


@pytest.mark.parametrize("key_dim", [3, 4])  # as many as heads, too
@pytest.mark.parametrize("place", ["dense", "other"])
def test_what_no_head_learned_for_itself_goes_whole_to_both_sides(key_dim, place):
    selecting = SparseK(k=2, window=1)
    system = RecurFormer(**{place: selecting})
    x, causal = torch.randn(1, 4, 6, key_dim), Visible(causal=True)
    learned = {n: torch.randn_like(p) for n, p in system.learned(4, key_dim, key_dim).items()}
    out = system.attend(x, x, x, causal, **learned)
    plain = {name.removeprefix("other_"): p for name, p in learned.items()}
    heads = slice(0, 2) if place == "dense" else slice(2, 4)
    assert_close(out[:, heads], selecting.attend(x, x, x, causal, **plain)[:, heads])
    RecurFormerAttention(16, heads=4, weights=selecting)(torch.randn(1, 6, 16))


def test_readers_that_hold_tensors_meet_by_their_values():
    def cache(slope, start=0):
        visible = Visible(causal=True, slopes=torch.full((2,), slope))
        return Cache(OfSystem(Softmax(), 2, 4, 4, visible=visible), start=start)

    x, first = torch.randn(1, 2, 3, 4), cache(0.5)
    later, other = cache(0.5, start=3), cache(0.25, start=3)
    for one in (first, later, other):
        one.append(x, x, x)
    with pytest.raises(ValueError, match="different readers"):
        first.merge(other)
    first.merge(later)
    assert first.length == 6


def test_the_rank_of_a_block_is_told_from_outside():
    model = torch.nn.Sequential(Attention(16, heads=4))
    replaced = replace_heads(model, Plan(((0,),), 4), rank=3)
    assert replaced[0].mamba.rank == 3


@pytest.mark.skipif(kernels.absent() is not None, reason="no kernels here")
@pytest.mark.parametrize("query", [-1, 4, 10**12])
def test_a_score_that_leaves_at_no_query_is_refused(query):
    grad, ones = torch.ones(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.int64)
    leaves = torch.tensor([[0, query, 1]])
    with pytest.raises(RuntimeError, match="not there"):
        torch.ops.aftermax.thresholds_backward(grad, ones, ones, leaves, 0)


def test_the_slopes_of_a_sink_window_are_as_exact_as_the_scores():
    system, x = SinkWindow(sinks=1, window=2), torch.randn(2, 4, 9, 4, dtype=torch.float64)
    slopes = torch.tensor([0.5, 0.3, 0.1, 0.03])
    walked = system.attend(x, x, x, Visible(causal=True, slopes=slopes))
    everything = torch.ones(9, 9, dtype=torch.bool)  # a mask for each query: no walk
    pairs = system.attend(x, x, x, Visible(causal=True, slopes=slopes, mask=everything))
    assert_close(walked, pairs, rtol=1e-12, atol=1e-12)


def test_what_is_truncated_is_let_go():
    cache, x = Cache(OfSystem(Softmax(), 2, 4, 4)), torch.randn(1, 2, 100, 4)
    cache.append(x, x, x)
    cache.truncate(10)
    held = (cache.state.key, cache.state.value, cache.state.seen)
    assert sum(part.untyped_storage().nbytes() for part in held) == cache.bytes


def test_sparsek_of_no_scores_is_nothing():
    assert sparsek(torch.randn(3, 0), 2).shape == (3, 0)


@pytest.mark.parametrize("given", [{"other_codebook": (2, 4, 4)}, {"other_codes": (1, 2, 6)}])
def test_what_is_not_learned_for_all_heads_is_refused_by_both_sides(given):
    system = RecurFormer(other=VectorQuantised(codes=4, window=2), replaced=(0,))
    query, key = torch.randn(1, 4, 6, 4), torch.randn(1, 2, 6, 4)
    tensors = {name: torch.randn(shape) for name, shape in given.items()}
    with pytest.raises(ValueError, match="for all 4 heads"):
        system.attend(query, key, key, Visible(causal=True), enable_gqa=True, **tensors)
