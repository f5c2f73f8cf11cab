"""Rotary and linear positions: what they promise about distances."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import ALiBi, NoPositions, RoPE


@given(
    i=st.integers(0, 5000),
    j=st.integers(0, 5000),
    shift=st.integers(0, 100_000),
    fraction=st.sampled_from([0.25, 0.5, 1.0]),
)
def test_rotary_scores_depend_on_the_distance_alone(i, j, shift, fraction):
    rope = RoPE(fraction=fraction)
    random = torch.Generator().manual_seed(i)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=random, dtype=torch.float64)

    def score(start):
        return (rope.rotate(query, start + i) * rope.rotate(key, start + j)).sum()

    assert_close(score(shift), score(0), rtol=0, atol=1e-9)


def test_rotation_turns_halves_as_pairs_by_the_printed_angles():
    x = torch.randn(1, 1, 4, 6, dtype=torch.float64)
    turned = RoPE(base=100.0).rotate(x, 2)
    for token in range(4):
        for pair in range(3):
            angle = (token + 2) * 100.0 ** (-2 * pair / 6)
            a, b = x[0, 0, token, pair], x[0, 0, token, pair + 3]
            assert_close(
                turned[0, 0, token, pair],
                a * math.cos(angle) - b * math.sin(angle),
                rtol=0,
                atol=1e-12,
            )
            assert_close(
                turned[0, 0, token, pair + 3],
                b * math.cos(angle) + a * math.sin(angle),
                rtol=0,
                atol=1e-12,
            )


def test_rotation_keeps_lengths_and_leaves_position_zero():
    x = torch.randn(2, 3, 5, 8)
    turned = RoPE().rotate(x, 0)
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_the_lowest_frequencies_of_p_rope_stay_still():
    x = torch.randn(1, 1, 3, 16)
    turned = RoPE(fraction=0.25).rotate(x, 7)
    still = [*range(2, 8), *range(10, 16)]
    assert torch.equal(turned[..., still], x[..., still])
    assert (turned[..., [0, 1, 8, 9]] != x[..., [0, 1, 8, 9]]).all()
    assert torch.equal(RoPE(fraction=0).rotate(x, 7), x)


def test_a_piece_is_rotated_as_in_the_whole():
    x = torch.randn(1, 2, 9, 4)
    whole = RoPE().rotate(x, 3)
    assert torch.equal(RoPE().rotate(x[:, :, 4:], 7), whole[:, :, 4:])


def test_angles_are_right_at_a_million():
    x = torch.tensor([1.0, 0.0])[None, None, None]
    turned = RoPE().rotate(x, 10**6)
    assert_close(turned.flatten(), torch.tensor([math.cos(10**6), math.sin(10**6)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rotated_in_float32_and_rounded_once(dtype):
    x = torch.randn(1, 1, 6, 8).to(dtype)
    turned = RoPE().rotate(x, 1000)
    assert turned.dtype == dtype
    assert torch.equal(turned, RoPE().rotate(x.float(), 1000).to(dtype))


def test_rotary_errors():
    with pytest.raises(ValueError, match="RoPE turns pairs and needs an even head width, got 5"):
        RoPE().rotate(torch.zeros(1, 1, 1, 5), 0)
    with pytest.raises(ValueError, match=r"fraction is a share of the frequencies, .* got 1\.5"):
        RoPE(fraction=1.5)


def test_alibi_slopes_are_the_papers():
    # the paper's example: 8 heads have 1/2, 1/4, ..., 1/256
    assert_close(ALiBi().slopes(8), torch.tensor([2.0**-h for h in range(1, 9)]))
    assert ALiBi().slopes(12)[[5, 11]].tolist() == [2.0**-4, 2.0**-8]


def test_no_positions_do_nothing():
    x = torch.randn(1, 1, 3, 5)
    assert NoPositions().rotate(x, 9) is x
    assert NoPositions().slopes(4) is None
    assert RoPE().slopes(4) is None
    assert ALiBi().rotate(x, 9) is x
