"""Clipped softmax: the printed behaviour in length, the invariants, the gradient in closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import (
    ClippedSoftmax,
    NormalisedClippedSoftmax,
    Visible,
    attention,
    attention_weights,
)
from aftermax.weights import clipped_softmax_weights

F64 = torch.float64


def soft(n, rows=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, n, generator=generator, dtype=F64).softmax(-1)


def weigh(system, scores):
    """Rows of scores through a row map."""
    query = scores[None, None]
    key = torch.eye(scores.shape[-1], dtype=scores.dtype)[None, None]
    return attention_weights(query, key, weights=system, scale=1.0)[0, 0]


@pytest.mark.parametrize(
    ("n", "before", "zeros"), [(8, 0.83, 0.13), (32, 0.23, 0.59), (128, -2.18, 0.95)]
)
def test_a_fixed_gamma_drifts_with_the_length(n, before, zeros):
    """Logits ~ N(0, 1), trained at 128: the row's sum falls below 0, and all is clipped."""
    p = soft(n)
    assert (1.025 * p - 0.025).sum(-1).mean() == pytest.approx(before, abs=0.01)
    weights = weigh(ClippedSoftmax(), p.log())
    assert (weights == 0).double().mean() == pytest.approx(zeros, abs=0.03)


@given(st.integers(2, 300), st.floats(1, 1.5), st.floats(-3, 1))
def test_the_normalised_row_sums_to_beta_before_clipping(n, eta, beta):
    system = NormalisedClippedSoftmax(eta, beta)
    stretch, shift = system._rows(torch.tensor(float(n), dtype=F64))
    assert_close((stretch * soft(n) + shift).sum(-1), torch.full((200,), beta, dtype=F64))
    assert_close(stretch + shift, torch.tensor(eta, dtype=F64))  # p = 1 becomes eta
    assert_close(-shift / stretch * n, torch.tensor(n * (eta - beta) / (n * eta - beta), dtype=F64))


def test_a_row_of_one_key_keeps_it():
    for system in (ClippedSoftmax(), NormalisedClippedSoftmax()):
        assert_close(weigh(system, torch.zeros(1, 1)), torch.ones(1, 1))


def test_weights_reach_0_and_1():
    scores = torch.tensor([[0.0, 1.0, 12.0]])
    assert weigh(ClippedSoftmax(-0.1, 1.1), scores).tolist() == [[0.0, 0.0, 1.0]]
    # zeta = 1 comes near 1, as softmax does
    assert weigh(ClippedSoftmax(-0.1), scores)[0, :2].tolist() == [0.0, 0.0]


def test_with_gamma_0_it_is_softmax():
    x = torch.randn(1, 2, 9, 8, dtype=F64)
    assert_close(attention(x, x, x, weights=ClippedSoftmax(0.0)), attention(x, x, x))


def test_the_length_of_training_sets_gamma():
    assert ClippedSoftmax.for_length(128, alpha=3.2) == ClippedSoftmax(-0.025)
    assert ClippedSoftmax.for_length(512).gamma == -12 / 512


@pytest.mark.parametrize("system", [ClippedSoftmax(-0.1, 1.2), NormalisedClippedSoftmax(1.1, 0.9)])
def test_the_gradient_in_closed_form(system):
    """w = dp stretch where 0 < u < 1, ds = p (w - sum_j w_j p_j)."""
    scores = torch.randn(6, 7, dtype=F64, requires_grad=True)
    upstream = torch.randn(6, 7, dtype=F64)
    visible = torch.ones(6, 7, dtype=torch.bool).tril(1)
    if isinstance(system, ClippedSoftmax):
        stretch, shift = torch.tensor(system.zeta - system.gamma), torch.tensor(system.gamma)
    else:
        stretch, shift = system._rows(visible.sum(-1, keepdim=True).to(F64))
    clipped_softmax_weights(scores, visible, stretch, shift).backward(upstream)
    p = scores.detach().masked_fill(~visible, -torch.inf).softmax(-1)
    u = stretch * p + shift
    w = upstream * stretch * ((u > 0) & (u < 1) & visible)
    assert_close(scores.grad, p * (w - (w * p).sum(-1, keepdim=True)), check_dtype=False)
    assert ((u <= 0) & visible).any()


def test_scores_that_fall_over_the_tiles_of_the_kernel():
    """A later tile of lower scores must not raise what stands of earlier ones."""
    query = torch.full((1, 1, 3, 4), 5.0)
    key = torch.full((1, 1, 600, 4), -6.0)
    key[..., :200, :] = 6.0
    value = torch.randn(1, 1, 600, 4)
    for system in (ClippedSoftmax(-0.001), NormalisedClippedSoftmax()):
        out = attention(query, key, value, weights=system)
        exact = (x.double() for x in (query, key, value))
        assert_close(out.double(), attention(*exact, weights=system), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"gamma": 0.1}, {"zeta": 0.9}, {"gamma": float("nan")}], ids=str)
def test_numbers_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="hidden keys"):
        ClippedSoftmax(**wrong)


def test_normalised_numbers_that_cannot_be():
    with pytest.raises(ValueError, match="hidden keys"):
        NormalisedClippedSoftmax(eta=1.0, beta=1.1)
    with pytest.raises(ValueError, match="length"):
        ClippedSoftmax.for_length(0)


def test_a_hidden_key_weighs_nothing():
    x = torch.randn(1, 1, 5, 4)
    mask = torch.tensor([True, False, True, True, False])
    for system in (ClippedSoftmax(), NormalisedClippedSoftmax()):
        rows = attention_weights(x, x, weights=system, attn_mask=Visible(mask=mask))
        assert (rows[..., ~mask] == 0).all()
