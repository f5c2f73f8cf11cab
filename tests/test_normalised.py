"""Normalised attention: the layer by its equation, whose normaliser reads the layer's input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import Normalised, Visible
from aftermax.linear import NormalisedAttention

from .native import F32, F64, normal


def layer(width: int = 8, **options) -> NormalisedAttention:
    torch.manual_seed(2)
    return NormalisedAttention(width, heads=2, **options).to(F64)


@pytest.mark.parametrize("key_dim", [None, 3, 16])
def test_the_layer_is_its_equation(key_dim):
    made, u = layer(key_dim=key_dim), normal(2, 11, 8).to(F64)
    query, key, value = (made.to_query(u), made.to_key(u), made.to_value(u))
    deep, wide = key_dim or 4, 4
    out = torch.zeros(2, 11, 8, dtype=F64)
    for b in range(2):
        for h in range(2):
            w = made.to_log_normaliser.weight[h]
            of_h, of_values = slice(h * deep, (h + 1) * deep), slice(h * wide, (h + 1) * wide)
            for i in range(11):
                for j in range(i + 1):
                    score = query[b, i, of_h] @ key[b, j, of_h] / torch.exp(w @ u[b, i])
                    out[b, i, of_values] = out[b, i, of_values] + score * value[b, j, of_values]
    assert_close(made(u), made.to_out(out), rtol=1e-11, atol=1e-12)


@given(cuts=st.lists(st.integers(0, 70), max_size=4).map(sorted))
def test_step_by_step_is_the_whole_at_any_cut(cuts):
    made, u = layer(), normal(2, 70, 8).to(F64)
    pieces, state = [], made.init_state(2)
    for first, end in zip([0, *cuts], [*cuts, 70], strict=True):
        piece, state = made.step(u[:, first:end], state)
        pieces.append(piece)
    assert state.sums.shape == (2, 2, 4, 4)
    assert_close(torch.cat(pieces, 1), made(u), rtol=1e-12, atol=1e-12)


def test_padding_counts_for_nothing_and_no_flaw_reaches_back():
    made, u = layer(), normal(2, 12, 8).to(F64)
    seen = torch.ones(2, 12, dtype=torch.bool)
    seen[0, :5] = False
    assert_close(made(u, seen)[0, 5:], made(u[:1, 5:])[0])
    clean, flawed = made(u), u.clone()
    flawed[0, 7] = torch.nan
    out = made(flawed)
    assert torch.equal(out[0, :7], clean[0, :7])
    assert out[0, 7:].isnan().all()
    assert torch.equal(out[1], clean[1])


def test_a_normaliser_beyond_float16_is_divided_by_in_float32():
    made = layer(width=8)
    with torch.no_grad():
        made.to_log_normaliser.weight.fill_(1.5)  # e^12 where u is 1
        made.to_query.weight.mul_(30)
        made.to_key.weight.mul_(30)
    u = torch.ones(1, 3, 8)
    right = made.float()(u)
    assert right.abs().max() > 0
    assert_close(made.half()(u.half()).float(), right, rtol=0.02, atol=1e-4)


def test_where_the_normaliser_reads_the_query_the_layer_is_the_system():
    made, u = layer(), normal(2, 30, 8).to(F64)
    w = normal(2, 4, seed=5).to(F64)
    with torch.no_grad():  # W u = w . q, q = W_q u
        made.to_log_normaliser.weight.copy_(
            (w[..., None] * made.to_query.weight.view(2, 4, 8)).sum(1)
        )
    heads = [
        project(u).unflatten(-1, (2, 4)).transpose(1, 2)
        for project in (made.to_query, made.to_key, made.to_value)
    ]
    out = Normalised().attend(*heads, Visible(causal=True), w=w)
    assert_close(made(u), made.to_out(out.transpose(1, 2).flatten(-2)), rtol=1e-11, atol=1e-12)


def test_the_layer_can_say_what_the_system_cannot():
    # the log of the system's normaliser is 0 wherever the query is, the layer's need not be
    made, u = layer(key_dim=1), normal(1, 1, 8).to(F64)
    with torch.no_grad():
        made.to_query.weight.zero_()
    assert (made.to_log_normaliser(u) != 0).all()
    queries = made.to_query(u).unflatten(-1, (2, 1)).transpose(1, 2)
    w = torch.ones(2, 1, dtype=F64)
    assert torch.equal((queries * w[:, None]).sum(-1), torch.zeros(1, 2, 1, dtype=F64))


def test_it_starts_as_unnormalised_linear_attention():
    query, key, value = (normal(1, 2, 20, 4, seed=s).to(F64) for s in range(3))
    assert_close(Normalised().learned(2, 4, 3), {"w": torch.zeros(2, 4)})
    out = Normalised().attend(query, key, value, Visible(causal=True))
    assert_close(out, (query @ key.mT).tril() @ value)


def test_every_parameter_gets_a_gradient_in_float32_too():
    made = layer().to(F32)
    out = made(normal(2, 70, 8))
    assert out.dtype == F32
    out.square().sum().backward()
    assert len(list(made.parameters())) == 5  # no bias
    for name, parameter in made.named_parameters():
        assert (parameter.grad != 0).any(), name


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width 9 is not divisible by 2 heads"):
        NormalisedAttention(9, heads=2)
