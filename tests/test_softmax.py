"""Softmax and its relatives: sinks, log n, scale invariance."""

import math

import pytest
import torch
from torch.testing import assert_close

from aftermax import ScaleInvariantSoftmax, Softmax, SoftmaxOne, SoftmaxSink, attention_weights
from aftermax.scores import cosine, log_count
from aftermax.weights import softmax_sink_weights, softmax_weights
from aftermax.weights.softmax import distance_scale_and_shift

F64 = torch.float64
EXACT = {"rtol": 1e-14, "atol": 1e-15}


def row(*scores: float) -> torch.Tensor:
    return torch.tensor([scores], dtype=F64)


def all_of(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


def test_softmax_is_exact_and_does_not_overflow():
    scores = row(1000.0, 999.0, -1000.0)
    e = math.exp(-1)
    expected = row(1 / (1 + e), e / (1 + e), 0.0)
    assert_close(softmax_weights(scores, all_of(scores)), expected, **EXACT)


def test_softmax_of_an_empty_row_is_zero_with_zero_gradient():
    scores = torch.randn(2, 3, dtype=F64, requires_grad=True)
    visible = torch.tensor([[True, True, False], [False, False, False]])
    weights = softmax_weights(scores, visible)
    assert weights[1].tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad(weights[:, 0].sum(), scores)
    assert gradient[1].tolist() == [0, 0, 0]
    assert gradient[0, 2] == 0
    assert gradient[0, 0] > 0


def test_a_sink_is_one_more_key_of_value_zero():
    scores, sink = row(0.3, -1.2, 2.0), torch.tensor([[0.7]], dtype=F64)
    expected = torch.cat([scores, sink], -1).softmax(-1)[:, :3]
    assert_close(softmax_sink_weights(scores, all_of(scores), sink), expected, **EXACT)


def test_softmax_one_is_a_sink_of_zero():
    scores = row(0.3, -1.2, 2.0)
    expected = scores.exp() / (1 + scores.exp().sum())
    assert_close(softmax_sink_weights(scores, all_of(scores), row(0.0)), expected, **EXACT)
    q, k = torch.randn(2, 1, 2, 4, 3, dtype=F64)
    ones = attention_weights(q, k, weights=SoftmaxOne())
    assert_close(attention_weights(q, k, weights=SoftmaxSink()), ones, **EXACT)


def test_a_sink_does_not_overflow_at_either_end():
    visible = torch.ones(1, 2, dtype=torch.bool)
    assert softmax_sink_weights(row(900.0, 900.0), visible, row(0.0)).tolist() == [[0.5, 0.5]]
    assert softmax_sink_weights(row(-900.0, -900.0), visible, row(0.0)).tolist() == [[0.0, 0.0]]
    assert softmax_sink_weights(row(1.0, 1.0), visible, row(900.0)).tolist() == [[0.0, 0.0]]


def test_a_sink_that_falls_away_leaves_softmax():
    q, k = torch.randn(2, 1, 2, 4, 3, dtype=F64)
    sink = torch.full((2,), -1e4, dtype=F64)
    weights = attention_weights(q, k, weights=SoftmaxSink(), sink=sink)
    assert_close(weights, attention_weights(q, k), **EXACT)


def test_the_gradient_of_a_sink_is_minus_what_the_row_gives_away():
    scores = torch.tensor([[0.3, -1.2]], dtype=F64)
    sink = torch.tensor([[0.5]], dtype=F64, requires_grad=True)
    weights = softmax_sink_weights(scores, all_of(scores), sink)
    (gradient,) = torch.autograd.grad(weights.sum(), sink)
    given = weights.sum().detach()
    assert_close(gradient, (-given * (1 - given)).reshape(1, 1), **EXACT)


def test_log_n_is_n_to_the_power_of_the_score():
    q, k = torch.randn(2, 1, 2, 6, 3, dtype=F64)
    s = torch.tensor([0.168, 0.43], dtype=F64)
    weights = attention_weights(q, k, weights=Softmax("log_n"), is_causal=True, s=s)
    scores = q @ k.transpose(-1, -2) / math.sqrt(3)
    for i in range(6):
        powers = (i + 1) ** (s[:, None] * scores[0, :, i, : i + 1])
        expected = powers / powers.sum(-1, keepdim=True)
        assert_close(weights[0, :, i, : i + 1], expected, rtol=1e-13, atol=1e-15)


def test_log_n_starts_at_one_over_the_mean_logarithm():
    logs = torch.arange(1, 1025, dtype=F64).log()
    assert abs(1 / logs.mean().item() - Softmax("log_n").s) < 5e-4


def test_the_count_of_an_empty_row_has_logarithm_zero():
    visible = torch.tensor([[False, False, False], [True, False, False], [True, True, True]])
    assert log_count(visible, F64).flatten().tolist() == [0.0, 0.0, math.log(3)]


def test_a_query_meets_itself_with_its_plain_score():
    stretch, shift = distance_scale_and_shift(torch.zeros(1, dtype=torch.int64), 10.0, F64)
    assert stretch.item() == 1.0
    assert shift.item() == 0.0


@pytest.mark.parametrize("tau", [1.0, 10.0, 300.0])
def test_scale_and_shift_are_as_printed(tau):
    alpha = beta = math.exp(0.5)
    distance = torch.tensor([0, 1, 5, 100, 65536])
    stretch, shift = distance_scale_and_shift(distance, tau, F64)
    for t, a, m in zip(distance.tolist(), stretch.tolist(), shift.tolist(), strict=True):
        a_squared = 2 * (math.log(t / tau + 1) - math.log(alpha) + beta / alpha)
        assert a**2 == pytest.approx(a_squared, rel=1e-14)
        assert m == pytest.approx(-a_squared + beta / alpha, rel=1e-14, abs=1e-15)


def test_scale_invariance_gives_each_octave_of_distance_a_similar_share():
    # the paper's property: with Gaussian scores E[exp(a s + m)] falls like tau / (t + tau), so that
    # its sum over an octave far beyond tau tends to a constant
    distance = torch.arange(1, 2**16)
    stretch, shift = distance_scale_and_shift(distance, 10.0, F64)
    expected = (stretch**2 / 2 + shift).exp()
    octaves = [expected[2**i - 1 : 2 ** (i + 1) - 1].sum().item() for i in range(10, 16)]
    assert max(octaves) / min(octaves) < 1.01


def test_a_cosine_of_nothing_is_zero():
    assert cosine(torch.zeros(2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_constants_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="scale_rule must be None or 'log_n', got 'log'"):
        Softmax("log")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tau is a length in positions .* got 0"):
        ScaleInvariantSoftmax(tau=0)
