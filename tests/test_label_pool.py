"""Gradient caching: equal to plain autograd, with less memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from aftermax import cached_backward, decoupled_softmax_loss, soft_topk_loss

from .native import F64

EXACT = {"rtol": 1e-14, "atol": 1e-15}


def tower(width=6, dropout=0.3):
    return nn.Sequential(
        nn.Linear(5, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, width), nn.Dropout(dropout)
    ).double()


def both(loss, parameters, towers):
    """(loss, gradients, the next random number) of plain autograd and of the cached way."""
    results = []
    for way in ("plain", "cached"):
        torch.manual_seed(7)
        for p in parameters:
            p.grad = None
        made = towers()
        if way == "plain":
            value = loss(
                *(
                    t if isinstance(t, torch.Tensor) else torch.cat([t[0](c) for c in t[1]])
                    for t in made
                )
            )
            value.backward()
        else:
            value = cached_backward(loss, *made)
            assert not value.requires_grad
        results.append((value.detach(), [p.grad for p in parameters], torch.rand(())))
    return results


@given(
    labels=st.integers(1, 23),
    chunk=st.integers(1, 8),
    query_chunk=st.one_of(st.none(), st.integers(1, 4)),
    soft=st.booleans(),
    shared=st.booleans(),
)
def test_it_is_plain_autograd_with_dropout_on(labels, chunk, query_chunk, soft, shared):
    torch.manual_seed(0)
    query_tower = tower()
    label_tower = query_tower if shared else tower()
    scale = nn.Parameter(torch.tensor(3.0, dtype=F64))
    queries, texts = torch.randn(4, 5, dtype=F64), torch.randn(labels, 5, dtype=F64)
    positives = torch.rand(4, labels) < 0.4

    def loss(f, g):
        scores = scale * f @ g.T
        if soft:
            return soft_topk_loss(scores, positives, k=2)
        return decoupled_softmax_loss(scores, positives)

    def towers():
        if query_chunk is None:
            first = query_tower(queries)
        else:
            first = (query_tower, queries.split(query_chunk))
        return first, (label_tower, texts.split(chunk))

    parameters = [scale, *query_tower.parameters(), *label_tower.parameters()]
    (plain, right, after), (cached, got, then) = both(loss, parameters, towers)
    assert_close(cached, plain, **EXACT)
    for a, b in zip(got, right, strict=True):
        assert_close(a, b, **EXACT)
    assert after == then


def test_chunks_of_any_kind_and_embeddings_of_any_shape():
    table = nn.Embedding(20, 4).double()
    chunks = [{"ids": torch.arange(3), "drop": 0.5}, {"ids": torch.arange(3, 8), "drop": 0.0}]

    def encode(chunk):
        return nn.functional.dropout(table(chunk["ids"]), chunk["drop"]).reshape(-1, 2, 2)

    def loss(g):
        return (g[:, 0] @ g[:, 1].T).square().sum()

    (plain, (right,), _), (cached, (got,), _) = both(
        loss, [table.weight], lambda: ((encode, chunks),)
    )
    assert_close((cached, got), (plain, right), **EXACT)


def test_gradients_are_added():
    encoder, texts = tower(dropout=0), torch.randn(8, 5, dtype=F64)
    for _ in range(2):
        cached_backward(lambda g: g.square().sum(), (encoder, texts.split(3)))
    twice = encoder[0].weight.grad.clone()
    encoder.zero_grad()
    cached_backward(lambda g: g.square().sum(), (encoder, texts.split(3)))
    assert_close(twice, 2 * encoder[0].weight.grad)


def test_embeddings_without_a_graph_are_constants():
    encoder, fixed = tower(dropout=0), torch.randn(3, 6, dtype=F64)
    texts = torch.randn(8, 5, dtype=F64)
    cached_backward(lambda f, g: (f @ g.T).logsumexp(1).sum(), fixed, (encoder, texts.split(3)))
    assert encoder[0].weight.grad.abs().sum() > 0
    assert fixed.grad is None


def test_only_one_chunk_is_held_with_a_graph():
    held = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            held[-1] += 1
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            held[-1] -= 1
            return grad

    weight = nn.Parameter(torch.ones(5, 2))

    def encode(chunk):
        held.append(held[-1] if held else 0)
        out = chunk @ weight
        return Spy.apply(out) if torch.is_grad_enabled() else out

    texts = torch.randn(40, 5)
    cached_backward(lambda g: g.square().sum(), (encode, texts.split(4)))
    assert max(held) <= 1
    assert held[-1] == 0


def test_what_does_not_fit_is_said():
    encoder, texts = tower(), torch.randn(8, 5, dtype=F64)
    with pytest.raises(ValueError, match="no towers"):
        cached_backward(lambda: torch.zeros(()))
    with pytest.raises(ValueError, match="without chunks"):
        cached_backward(lambda g: g.sum(), (encoder, []))
    with pytest.raises(ValueError, match=r"shape \(8,\)"):
        cached_backward(lambda g: g.sum(1), (encoder, texts.split(3)))
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        cached_backward(lambda g: g.sum(), (encoder, texts.split(3)))
    calls = iter(range(9))
    with pytest.raises(RuntimeError, match=r"\(8, 6\) at first, and \(7, 6\) again"):
        cached_backward(lambda g: g.sum(), (lambda x: encoder(x[next(calls) :]), [texts]))
