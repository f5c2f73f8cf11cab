"""Sigmoid attention: which n is in the bias, and what mass a row has."""

import math

import pytest
import torch
from torch.testing import assert_close

from aftermax import Sigmoid, Visible, attention, attention_weights
from aftermax.weights import sigmoid_weights

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def biases_of(weights: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The b in sigmoid(s + b), read back from the weights."""
    return torch.logit(weights) - scores


def test_n_of_the_row_is_what_the_row_sees():
    q, k = normal(1, 1, 5, 4), normal(1, 1, 5, 4, seed=1)
    weights = attention_weights(q, k, weights=Sigmoid(), is_causal=True)
    biases = biases_of(weights, q @ k.transpose(-1, -2) / 2)[0, 0]
    for i in range(5):
        assert_close(biases[i, : i + 1], torch.full((i + 1,), -math.log(i + 1), dtype=F64))


def test_n_of_the_sequence_is_one_for_all_rows_and_each_batch_row_has_its_own():
    q, k = normal(2, 1, 6, 4), normal(2, 1, 6, 4, seed=1)
    real = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    real[0, ..., :2] = False  # four real tokens, padding on the left
    real[1, ..., 5:] = False  # five, on the right
    visible = Visible(causal=True, mask=real)
    weights = attention_weights(q, k, weights=Sigmoid("sequence"), attn_mask=visible)
    biases = biases_of(weights, q @ k.transpose(-1, -2) / 2)[:, 0]
    for b, n in enumerate((4, 5)):
        for i in range(6):
            for j in range(i + 1):
                if real[b, 0, 0, j]:
                    assert biases[b, i, j].item() == pytest.approx(-math.log(n))
                else:
                    assert weights[b, 0, i, j] == 0


def test_a_constant_n_is_the_same_at_every_length():
    q, k = normal(1, 1, 7, 4), normal(1, 1, 7, 4, seed=1)
    weights = attention_weights(q, k, weights=Sigmoid(2048))
    biases = biases_of(weights, q @ k.transpose(-1, -2) / 2)
    assert_close(biases, torch.full_like(biases, -math.log(2048)))


@pytest.mark.parametrize(("n", "changes"), [("row", False), (6, False), ("sequence", True)])
def test_only_the_sequence_count_lets_a_later_token_change_earlier_rows(n, changes):
    q, k, v = (normal(1, 2, 6, 4, seed=s) for s in range(3))
    whole = attention(q, k, v, weights=Sigmoid(n), is_causal=True)[:, :, :4]
    shorter = attention(*(x[:, :, :4] for x in (q, k, v)), weights=Sigmoid(n), is_causal=True)
    assert torch.allclose(whole, shorter, rtol=1e-12, atol=1e-12) != changes


@pytest.mark.parametrize("length", [256, 4096])
def test_the_mass_of_a_row_is_near_the_square_root_of_e_at_initialisation(length):
    # E[exp(s)] of Gaussian queries and keys, of which sigmoid(s - ln n) is 1/n in the limit
    width, rows = 64, 256
    expected = (1 - 1 / width) ** (-width / 2)
    q, k = normal(1, 1, rows, width), normal(1, 1, length, width, seed=1)
    mass = attention_weights(q, k, weights=Sigmoid()).sum(-1)
    # below by what sigmoid bends, E[exp(2 s)] / n, about 8 / n; and by the chance of the draw
    assert mass.mean().item() == pytest.approx(expected, abs=8 / length + 0.06)
    unbiased = attention_weights(q, k, weights=Sigmoid(1)).sum(-1)
    assert unbiased.mean().item() == pytest.approx(length / 2, rel=0.02)


def test_early_rows_get_next_to_nothing_under_a_constant_n():
    q, k = normal(1, 1, 1024, 64), normal(1, 1, 1024, 64, seed=1)
    mass = attention_weights(q, k, weights=Sigmoid(1024), is_causal=True).sum(-1)[0, 0]
    assert mass[:16].max() < 0.1
    assert 1.4 < mass[-64:].mean() < 1.9


def test_the_weights_are_exact_where_sigmoid_saturates():
    scores = torch.tensor([[-800.0, -40.0, 0.0, 800.0]], dtype=F64)
    weights = sigmoid_weights(scores, torch.ones(1, 4, dtype=torch.bool), 0.0)
    expected = torch.tensor([[0.0, math.exp(-40) / (1 + math.exp(-40)), 0.5, 1.0]], dtype=F64)
    assert_close(weights, expected, rtol=1e-14, atol=0)


def test_the_gradient_is_elementwise():
    q, k, v = (normal(1, 1, 5, 4, seed=s).requires_grad_() for s in range(3))
    d_out = normal(1, 1, 5, 4, seed=9)
    out = attention(q, k, v, weights=Sigmoid(5))
    p = attention_weights(q, k, weights=Sigmoid(5))
    d_s = (d_out @ v.transpose(-1, -2)) * p * (1 - p)
    expected = (d_s @ k / 2, d_s.transpose(-1, -2) @ q / 2, p.transpose(-1, -2) @ d_out)
    assert_close(torch.autograd.grad(out, (q, k, v), d_out), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", ["rows", 0, -3, 2.5, None])
def test_an_n_that_is_no_length_is_refused(n):
    with pytest.raises(ValueError, match=r"sigmoid needs n = 'row', 'sequence' or a length >= 1"):
        Sigmoid(n)
