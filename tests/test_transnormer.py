"""TransNormer: both tables of decay, its norm and angles, and the whole block against formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from aftermax import TransNormer, Visible
from aftermax.linear import TransNormerBlock
from aftermax.linear.transnormer import alibi_slopes, decay_rates, srms_norm

from .native import F32, F64, normal

CAUSAL = Visible(causal=True)

# ---- decay ----


def test_the_table_of_the_paper():
    first = decay_rates(8, 0, 4, "paper").tolist()
    assert first == [0, 1, 2, 3, 4, 5, 6, 7]
    assert decay_rates(8, 3, 4, "paper").tolist() == [x / 4 for x in first]
    for layer in range(24):
        rates = decay_rates(16, layer, 24, "paper")
        assert rates[0] == 0  # head 0 never decays
        assert (rates.diff() > 0).all()


def test_the_table_of_the_released_models():
    slopes = [2.0**-h for h in range(1, 9)]
    first = torch.tensor(slopes, dtype=F64) * (1 + 1e-5)
    assert_close(decay_rates(8, 0, 4), first, rtol=1e-15, atol=0)
    # in the last layer almost nothing decays, but no rate is 0
    last = torch.tensor(slopes, dtype=F64) * 1e-5
    assert_close(decay_rates(8, 3, 4), last, rtol=1e-9, atol=0)
    assert decay_rates(8, 3, 4).min() > 0
    # a single layer is a first one
    assert_close(decay_rates(8, 0, 1), first, rtol=1e-15, atol=0)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7, 12, 20, 24])
def test_slopes_between_powers_of_two_are_of_the_next_series(heads):
    power = 2 ** (heads.bit_length() - 1)
    own = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    # those of twice as many heads that `own` has not: its first, third, fifth ...
    between = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power, 2)]
    expected = own + between[: heads - power]
    assert alibi_slopes(heads) == pytest.approx(expected, rel=1e-15)
    assert len(set(expected)) == heads


def test_tables_and_layers_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="decay must be 'alibi' or 'paper', got 'none'"):
        TransNormer(decay="none")  # type: ignore[arg-type]
    for layer in (-1, 4):
        with pytest.raises(ValueError, match=f"layer {layer} is none of 4, counted from 0"):
            TransNormer(layer=layer, layers=4)
    assert TransNormer().placed(2, 4, longest=9) == TransNormer(layer=2, layers=4)


# ---- norm, angles ----


@given(factor=st.floats(1e-2, 1e6), seed=st.integers(0, 100))
def test_the_norm_forgets_the_size(factor, seed):
    x = normal(3, 16, seed=seed).to(F64)
    # but for the 1e-6 beside the mean of the squares
    allowed = 1e-6 / min(1, factor) ** 2 / x.square().mean(-1).min().item()
    assert_close(srms_norm(factor * x), srms_norm(x), rtol=allowed, atol=0)
    squares = srms_norm(factor * x).square().mean(-1)
    assert_close(squares, torch.ones(3, dtype=F64), rtol=2 * allowed, atol=0)
    assert_close(srms_norm(-x), -srms_norm(x), rtol=0, atol=0)


def test_the_norm_of_nothing_is_nothing():
    x = torch.zeros(2, 8, requires_grad=True)
    assert torch.equal(srms_norm(x), torch.zeros(2, 8))
    (gradient,) = torch.autograd.grad(srms_norm(x).sum(), x)
    assert gradient.isfinite().all()


def test_half_precision_is_normed_in_float32():
    x = torch.full((4,), 300.0, dtype=torch.float16)  # of which the square is above the largest
    assert torch.equal(srms_norm(x), torch.ones(4, dtype=torch.float16))


def naive_sum(query, key, value, rates, theta=None) -> Tensor:
    """sum_j silu(q) . silu(k) [cos theta (i - j)] e^(-rate (i - j)) v_j of (H, T, D), by loops."""
    out = torch.zeros(*query.shape[:2], value.shape[-1], dtype=query.dtype)
    q, k = (x / (1 + torch.exp(-x)) for x in (query, key))
    for h in range(query.shape[0]):
        for i in range(query.shape[1]):
            for j in range(i + 1):
                turned = 1 if theta is None else torch.cos(theta[h] * (i - j))
                weight = (q[h, i] * k[h, j] * turned).sum() * math.exp(-rates[h] * (i - j))
                out[h, i] += weight * value[h, j]
    return out


@pytest.mark.parametrize("decay", ["alibi", "paper"])
def test_angles_make_a_cosine_of_the_distance(decay):
    heads, tokens, width = 3, 30, 4
    query, key, value = (normal(1, heads, tokens, width, seed=s).to(F64) for s in range(3))
    system = TransNormer(decay, lrpe=True, layer=1, layers=4)
    theta = 2 * normal(heads, width, seed=3).to(F64)
    out = system.attend(query, key, value, CAUSAL, theta=theta)
    summed = naive_sum(query[0], key[0], value[0], decay_rates(heads, 1, 4, decay), theta)
    over = (summed.square().mean((0, 2), keepdim=True) + 1e-6).sqrt()
    assert_close(out[0], summed / over, rtol=1e-11, atol=1e-12)


def test_the_first_angles_run_over_all_channels():
    theta = TransNormer(lrpe=True).learned(2, 3, 5)["theta"]
    expected = torch.tensor([10000.0 ** (-2 * j / 6) for j in range(6)]).view(2, 3)
    assert_close(theta, expected)
    assert TransNormer().learned(2, 3, 5) == {}


def test_angles_far_out_keep_their_digits():
    # a position of a million turns its first channel a million radians, of which float32 has none
    # of the digits behind the point that decide the cosine
    system, far = TransNormer(lrpe=True), 1_000_000
    case = [normal(1, 2, 8, 4, seed=s) for s in range(3)]
    start = system.init_state(1, 2, 4, 4)
    late = type(start)(start.sums, start.count, start.flawed, far)
    here, _ = system.step(*case, start, CAUSAL)
    there, _ = system.step(*case, late, CAUSAL)
    assert_close(there, here, rtol=1e-4, atol=1e-5)


# ---- the block ----


def block_of(*, lrpe: bool, decay="alibi", dtype=F64, layer=1, layers=4) -> TransNormerBlock:
    torch.manual_seed(3)
    made = TransNormerBlock(
        12, heads=3, layer=layer, layers=layers, hidden=20, decay=decay, lrpe=lrpe
    )
    return made.to(dtype)


def naive_block(block: TransNormerBlock, x: Tensor, rates: Tensor) -> Tensor:
    """x <- x + GLA(SRMSNorm(x)), x <- x + SGLU(SRMSNorm(x)), as they stand in the paper."""

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    weights = dict(block.named_parameters())
    rows = []
    for tokens in x:  # (T, width)
        projected = norm(tokens) @ weights["attend.to_query_key_value_gate.weight"].T
        *heads, gate = projected.split(12, -1)
        heads = [h.view(-1, 3, 4).transpose(0, 1) for h in heads]
        summed = naive_sum(*heads, rates, weights.get("attend.learned.theta"))
        summed = summed.transpose(0, 1).flatten(1)  # the heads of a token side by side
        tokens = tokens + norm(summed) * gate @ weights["attend.to_out.weight"].T
        left, right = (norm(tokens) @ weights["feed.to_both.weight"].T).split(20, -1)
        rows.append(tokens + (left * right) @ weights["feed.to_out.weight"].T)
    return torch.stack(rows)


@pytest.mark.parametrize("decay", ["alibi", "paper"])
@pytest.mark.parametrize("lrpe", [False, True])
def test_the_block_is_its_formulas(lrpe, decay):
    block, x = block_of(lrpe=lrpe, decay=decay), normal(2, 15, 12).to(F64)
    expected = naive_block(block, x, decay_rates(3, 1, 4, decay))
    assert_close(block(x), expected, rtol=1e-11, atol=1e-12)


@given(cuts=st.lists(st.integers(0, 80), max_size=3).map(sorted), lrpe=st.booleans())
def test_step_by_step_is_the_whole_at_any_cut(cuts, lrpe):
    block, x = block_of(lrpe=lrpe), normal(2, 80, 12).to(F64)
    pieces, state = [], block.init_state(2)
    for first, end in zip([0, *cuts], [*cuts, 80], strict=True):
        piece, state = block.step(x[:, first:end], state)
        pieces.append(piece)
    assert state.length == 80
    assert_close(torch.cat(pieces, 1), block(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("lrpe", [False, True])
def test_padding_counts_for_nothing(lrpe):
    block, x = block_of(lrpe=lrpe), normal(2, 20, 12).to(F64)
    seen = torch.ones(2, 20, dtype=torch.bool)
    seen[0, :5] = seen[1, 17:] = False
    other = torch.where(seen[..., None], x, 100 * normal(2, 20, 12, seed=5).to(F64))
    expected = block(x, seen)
    assert_close(block(other, seen)[seen], expected[seen], rtol=0, atol=0)
    # decay and angles are of distances: what stands before a sequence does not move it
    assert_close(expected[0, 5:], block(x[:1, 5:])[0], rtol=1e-11, atol=1e-12)
    assert_close(expected[1, :17], block(x[1:, :17])[0], rtol=1e-11, atol=1e-12)
    first, state = block.step(other[:, :9], block.init_state(2), seen[:, :9])
    rest, state = block.step(other[:, 9:], state, seen[:, 9:])
    assert_close(torch.cat([first, rest], 1)[seen], expected[seen], rtol=1e-11, atol=1e-12)
    assert state.count.tolist() == [15, 17]


def test_the_state_does_not_grow():
    block, state = block_of(lrpe=True, dtype=F32), block_of(lrpe=True, dtype=F32).init_state(2)
    bytes_before = state.bytes
    for tokens in (1, 100, 1000):
        _, state = block.step(normal(2, tokens, 12), state)
        assert state.bytes == bytes_before
    assert state.sums.shape == (2, 3, 8, 4)


def test_nothing_is_learned_but_projections_and_angles():
    shapes = {name: tuple(x.shape) for name, x in block_of(lrpe=True).named_parameters()}
    assert shapes == {
        "attend.to_query_key_value_gate.weight": (48, 12),
        "attend.to_out.weight": (12, 12),
        "attend.learned.theta": (3, 4),
        "feed.to_both.weight": (40, 12),
        "feed.to_out.weight": (12, 20),
    }
    assert "attend.learned.theta" not in dict(block_of(lrpe=False).named_parameters())


def test_angles_are_in_the_first_layer_alone():
    for layer in range(4):
        block = TransNormerBlock(12, heads=3, layer=layer, layers=4)
        assert block.attend.system.lrpe == (layer == 0)
    # 8/3 of the width, up to a multiple of 128
    assert TransNormerBlock(96, heads=3).feed.to_out.weight.shape == (96, 256)
    assert TransNormerBlock(97, heads=1).feed.to_out.weight.shape == (97, 384)


def test_a_block_can_be_saved(tmp_path):
    block, x = block_of(lrpe=True), normal(2, 9, 12).to(F64)
    torch.save(block.state_dict(), tmp_path / "block.pt")
    other = TransNormerBlock(12, heads=3, layer=1, layers=4, hidden=20, lrpe=True).to(F64)
    assert not torch.allclose(other(x), block(x))
    other.load_state_dict(torch.load(tmp_path / "block.pt"))
    assert torch.equal(other(x), block(x))


def test_every_parameter_of_the_block_gets_a_gradient():
    block = block_of(lrpe=True)
    block(normal(2, 9, 12).to(F64)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert (parameter.grad != 0).any(), name


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width 12 is not divisible by 5 heads"):
        TransNormerBlock(12, heads=5)


def test_large_sums_are_normed_and_not_lost():
    query, value = 1e12 * torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    out = TransNormer().attend(query, query, value, Visible(causal=True))
    assert_close(out.square().mean((1, 3)), torch.ones(1, 5))
