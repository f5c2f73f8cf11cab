"""cosFormer: what a horizon that follows the length does to the past, and the sign of weights."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from aftermax import CosFormer, Visible
from aftermax.linear.cosformer import cos_features

from .native import F32, F64, normal

CAUSAL = Visible(causal=True)


def inputs(tokens: int, dtype=F64) -> list[torch.Tensor]:
    return [normal(1, 2, tokens, 16, seed=s).to(dtype) for s in range(3)]


def change_of_prefix(system: CosFormer, short: int, long: int) -> float:
    """How far, relative to themselves, later tokens move the outputs of the first `short`."""
    whole = system.attend(*inputs(long), CAUSAL)[:, :, :short]
    alone = system.attend(*(x[:, :, :short] for x in inputs(long)), CAUSAL)
    return ((whole - alone).norm() / whole.norm()).item()


@pytest.mark.parametrize(("short", "long"), [(20, 40), (64, 257)])
def test_a_horizon_that_follows_the_length_changes_the_past(short, long):
    # by 10 and 7 per cent on these numbers
    assert 0.05 < change_of_prefix(CosFormer(horizon="length"), short, long) < 0.15
    assert change_of_prefix(CosFormer(horizon=long), short, long) < 1e-14
    assert change_of_prefix(CosFormer(), short, long) < 1e-14


def test_the_length_of_the_call_is_the_authors_horizon():
    case = inputs(30)
    by_length = CosFormer(horizon="length").attend(*case, CAUSAL)
    assert_close(by_length, CosFormer(horizon=30).attend(*case, CAUSAL), rtol=0, atol=0)


def test_a_horizon_that_follows_the_length_has_no_state():
    system = CosFormer(horizon="length")
    state = system.init_state(1, 2, 16, 16)
    with pytest.raises(ValueError, match="needs a fixed horizon to go on from a state"):
        system.step(*inputs(3), state, CAUSAL)


def test_more_tokens_than_the_horizon_are_refused():
    system = CosFormer(horizon=8)
    assert system.attend(*inputs(8), CAUSAL).shape == (1, 2, 8, 16)
    with pytest.raises(ValueError, match="cosFormer with horizon 8 was given 9 tokens"):
        system.attend(*inputs(9), CAUSAL)
    with pytest.raises(ValueError, match="cosFormer with horizon 8 was given 9 tokens"):
        system.attend(*inputs(9), Visible())
    _, state = system.step(*inputs(6), system.init_state(1, 2, 16, 16, dtype=F64), CAUSAL)
    system.step(*inputs(2), state, CAUSAL)
    with pytest.raises(ValueError, match="cosFormer with horizon 8 was given 9 tokens"):
        system.step(*inputs(3), state, CAUSAL)


def test_features_multiply_to_the_cosine_of_the_distance():
    horizon = 10
    query, key = inputs(25)[:2]
    place = torch.arange(25, dtype=F64)
    weights = cos_features(query, place, horizon) @ cos_features(key, place, horizon).mT
    distance = place[:, None] - place
    bare = query.relu() @ key.relu().mT
    assert_close(weights, bare * torch.cos(math.pi / 2 * distance / horizon))
    # within the horizon none is negative, at it all are 0, and beyond it none is positive
    some = bare > 0
    assert (weights[some & (distance.abs() < horizon)] > 0).all()
    at = weights[some & (distance.abs() == horizon)] / bare.max()
    assert_close(at, torch.zeros_like(at), rtol=0, atol=1e-15)
    beyond = (distance.abs() > horizon) & (distance.abs() <= 2 * horizon)
    assert (weights[some & beyond] < 0).all()
    half_as_far_again = distance == 1.5 * horizon
    ratio = (weights / bare)[some & half_as_far_again]
    assert_close(ratio, torch.full_like(ratio, -math.sqrt(0.5)))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("visible", [Visible(), CAUSAL])
def test_a_query_that_relu_leaves_nothing_of_gives_zero(visible, dtype):
    query, key, value = inputs(70, dtype)
    query[:, 0, 40] = -query[:, 0, 40].abs()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = CosFormer().attend(*leaves, visible)
    assert torch.equal(out[:, 0, 40], torch.zeros_like(out[:, 0, 40]))
    assert (out[:, 1] != 0).any(-1).all()
    of_query, *others = torch.autograd.grad(out.square().sum(), leaves)
    assert all(x.isfinite().all() for x in (of_query, *others))
    # nor does anything pull it out of there
    assert torch.equal(of_query[:, 0, 40], torch.zeros_like(query[:, 0, 40]))


def test_a_row_of_almost_nothing_is_divided_by_the_floor():
    query, key, value = inputs(5)
    tiny = 1e-9 * query.abs()
    out = CosFormer().attend(tiny, key.abs(), value, Visible())
    weights = cos_features(tiny, torch.arange(5.0), 4096) @ (
        cos_features(key.abs(), torch.arange(5.0), 4096).mT
    )
    assert weights.sum(-1).max() < 1e-6
    assert_close(out, weights @ value / 1e-6, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("horizon", [0, -3, 2.5, "short"])
def test_horizons_that_make_no_sense_are_refused(horizon):
    with pytest.raises(
        ValueError, match=f"cosFormer needs horizon >= 1 or 'length', got {horizon!r}"
    ):
        CosFormer(horizon=horizon)


def test_a_model_says_its_longest_input():
    placed = CosFormer().placed(layer=1, layers=4, longest=300)
    assert dataclasses.asdict(placed) == {"horizon": 300}
