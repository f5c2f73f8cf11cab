"""The one cache, through modules and decoders. What every system keeps stands in cache_laws.py."""

import pytest
import torch
from torch.testing import assert_close

from aftermax import (
    LSSAR,
    Attention,
    Cache,
    InLineAttention,
    NormalisedAttention,
    OfSystem,
    TransNormerBlock,
)
from aftermax.lab.models import DecoderLM
from aftermax.lab.work import Work, arm
from aftermax.linear import CosFormer, Cottention

from .cases import F64

EXACT = {"rtol": 1e-11, "atol": 1e-11}

MODULES = {
    "attention": lambda: Attention(16, heads=2, weights=LSSAR()),
    "alibi": lambda: Attention(16, heads=4, kv_heads=2, positions="alibi"),
    "cosformer": lambda: Attention(16, heads=2, weights=CosFormer(), positions="none"),
    "inline": lambda: InLineAttention(16, heads=2, causal=True),
    "normalised": lambda: NormalisedAttention(16, heads=2),
    "transnormer": lambda: TransNormerBlock(16, heads=2),
}


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    return MODULES[request.param]().to(F64)


def test_pieces_rows_and_snapshots_of_a_module(module):
    x = torch.randn(2, 9, 16, dtype=F64)
    whole = module(x)
    cache = Cache(module, batch=2)
    assert_close(cache.append(x[:, :4]), whole[:, :4], **EXACT)
    before = cache.snapshot()
    cache.append(torch.randn(2, 3, 16, dtype=F64))
    cache.restore(before)
    assert_close(cache.step(x[:, 4]), whole[:, 4], **EXACT)
    cache.reorder(torch.tensor([1, 1, 0]))
    assert_close(cache.append(x[[1, 1, 0], 5:]), whole[[1, 1, 0], 5:], **EXACT)
    assert cache.length == 9
    assert cache.bytes > 0


@pytest.mark.parametrize(("middle", "end"), [(0, 4), (4, 4), (4, 5), (4, 9), (6, 8)])
def test_two_pieces_of_a_module_join(module, middle, end):
    x = torch.randn(2, 11, 16, dtype=F64)
    first, second = Cache(module, batch=2), Cache(module, batch=2, start=middle)
    first.append(x[:, :middle])
    second.append(x[:, middle:end])
    first.merge(second)
    assert_close(first.append(x[:, end:]), module(x)[:, end:], **EXACT)


def test_a_decoder_is_a_reader_too():
    work = Work(layers=2)
    torch.manual_seed(0)
    for name, can in (("lssar", True), ("transnormer", False)):
        model = DecoderLM(work, arm(name, work), vocabulary=290).to(F64)
        tokens = torch.randint(290, (2, 9))
        whole = model(tokens)
        cache = Cache(model, batch=2)
        cache.append(tokens[:, :5])
        assert (cache.can_truncate, cache.can_merge, cache.length) == (can, False, 5)
        cache.reorder(torch.tensor([1, 0]))
        assert_close(cache.step(tokens[[1, 0], 5]), whole[[1, 0], 5], **EXACT)
        if can:
            cache.truncate(3)
            assert_close(cache.append(tokens[[1, 0], 3:]), whole[[1, 0], 3:], **EXACT)


def test_padding_before_a_later_piece_is_no_secret():
    """Where a value holds the number of tokens before it, a piece that was read apart is wrong if
    there was padding: which is said."""
    reader = OfSystem(Cottention("value"), 2, 4, 4, dtype=F64)
    x = torch.randn(1, 2, 5, 4, dtype=F64)
    first, second = Cache(reader), Cache(reader, start=5)
    first.append(x, x, x, seen=torch.tensor([[False, True, True, True, True]]))
    second.append(x, x, x)
    with pytest.raises(ValueError, match="padding"):
        first.merge(second)


def test_what_is_no_reader_is_refused():
    with pytest.raises(TypeError, match="no init_state and no step"):
        Cache(torch.nn.Linear(2, 2))
    assert not Cache(OfSystem(LSSAR(), 1, 2, 2)).state.length
