"""InLine: its rows, its two forms, the queries that relu confuses, and the local residual."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from aftermax import InLine, Visible
from aftermax.linear import InLineAttention
from aftermax.linear.inline import KERNELS

from .native import BF16, F16, F64, normal

CAUSAL = Visible(causal=True)
VIEWS = pytest.mark.parametrize("visible", [Visible(), CAUSAL], ids=["all", "causal"])


def inputs(tokens: int = 40, width: int = 8) -> list[Tensor]:
    return [normal(1, 2, tokens, width, seed=s).to(F64) for s in range(3)]


def weights_of(system: InLine, query: Tensor, key: Tensor, visible: Visible) -> Tensor:
    one_hot = torch.eye(key.shape[2], dtype=F64).expand(*key.shape[:3], -1)
    return system.attend(query, key, one_hot, visible)


def by_rows(kernel: str, query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """w_ij = (s/N) q_i . k_j - (s/N^2) q_i . sum_s k_s + 1/N, row by row."""
    query, key = KERNELS[kernel](query), KERNELS[kernel](key)
    out = query.new_zeros(*query.shape[:3], key.shape[2])
    for i in range(query.shape[2]):
        number = i + 1 if causal else key.shape[2]
        scores = query[:, :, i, None] @ key[:, :, :number].mT / math.sqrt(query.shape[-1])
        row = scores / number - scores.sum(-1, keepdim=True) / number**2 + 1 / number
        out[:, :, i, :number] = row[:, :, 0]
    return out


@VIEWS
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_rows_and_the_linear_form_are_one(kernel, visible):
    query, key, value = inputs()
    weights = by_rows(kernel, query, key, visible.causal)
    assert_close(weights.sum(-1), torch.ones(1, 2, 40, dtype=F64))
    out = InLine(kernel).attend(query, key, value, visible)
    assert_close(out, weights @ value, rtol=1e-12, atol=1e-13)
    assert_close(weights_of(InLine(kernel), query, key, visible), weights, rtol=1e-12, atol=1e-13)


@given(seed=st.integers(0, 1000), size=st.sampled_from([0.0, 1e-3, 1.0, 1e3]))
def test_rows_sum_to_one_whatever_the_size_of_a_query(seed, size):
    query, key = (normal(1, 2, 30, 8, seed=seed + s).to(F64) for s in range(2))
    for visible in (Visible(), CAUSAL):
        sums = weights_of(InLine(), size * query, key, visible).sum(-1)
        assert_close(sums, torch.ones(1, 2, 30, dtype=F64), rtol=0, atol=1e-12 * max(1, size))


def test_some_weights_are_negative():
    query, key, _ = inputs(197, 32)
    negative = (weights_of(InLine(), query, key, Visible()) < 0).to(F64).mean().item()
    # w N - 1 = s q . (k - mean k) is about N(0, 1) here: below -1 in 16 of 100 cases
    assert negative == pytest.approx(0.5 * math.erfc(math.sqrt(0.5)), abs=0.03)
    # a query of nothing sees all alike
    flat = weights_of(InLine(), 0 * query, key, Visible())
    assert_close(flat, torch.full_like(flat, 1 / 197))


@VIEWS
def test_relu_confuses_queries_and_the_identity_does_not(visible):
    query, key, _ = inputs()
    other = query.clone()
    query[..., 3], other[..., 3] = -0.5, -2.0
    relu = (weights_of(InLine("relu"), x, key, visible) for x in (query, other))
    assert torch.equal(*relu)
    for kernel in ("identity", "leaky-relu", "exp"):
        one, two = (weights_of(InLine(kernel), x, key, visible) for x in (query, other))
        # a single key has all the weight, whoever asks
        assert ((one - two).abs().amax(-1) > 1e-6)[:, :, visible.causal :].all()


def test_the_length_of_a_query_is_not_lost():
    query, key, _ = inputs()
    once = weights_of(InLine(), query, key, Visible())
    twice = weights_of(InLine(), 2 * query, key, Visible())
    # what is not uniform doubles
    assert_close(twice - 1 / 40, 2 * (once - 1 / 40), rtol=1e-11, atol=1e-13)


def test_kernels_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match=r"kernel must be one of identity, relu, .*'gelu'"):
        InLine("gelu")  # type: ignore[arg-type]


# ---- the local residual ----


def module(**options) -> InLineAttention:
    torch.manual_seed(2)
    return InLineAttention(12, heads=3, **options).to(F64)


def global_part(made: InLineAttention, x: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """What InLine itself gives, and the values: (B, T, width) each."""
    query, key, value = made.to_query_key_value(x).chunk(3, -1)
    heads = [h.unflatten(-1, (3, 4)).transpose(1, 2) for h in (query, key, value)]
    weights = by_rows("identity", heads[0], heads[1], causal)
    return (weights @ heads[2]).transpose(1, 2).flatten(-2), value


@pytest.mark.parametrize("leading", [0, 1, 2])
@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (4, 1), (1, 1)])
def test_the_residual_on_a_grid_is_a_loop_over_neighbours(grid, leading):
    made, (rows, columns) = module(grid=grid, leading=leading), grid
    x = normal(2, leading + rows * columns, 12).to(F64)
    out, value = global_part(made, x, causal=False)
    # nine weights for each channel of each image, of its mean token, a class token included
    of_mean = made.to_weights(x.mean(1)[..., None])[..., 0].unflatten(1, (12, 3, 3))
    for r in range(rows):
        for c in range(columns):
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    if not (0 <= r + down < rows and 0 <= c + right < columns):
                        continue
                    near = value[:, leading + (r + down) * columns + c + right]
                    weight = of_mean[:, :, 1 + down, 1 + right]
                    out[:, leading + r * columns + c] += weight * near
    assert_close(made(x), made.to_out(out), rtol=1e-11, atol=1e-12)


def test_a_class_token_has_no_residual_but_is_part_of_the_mean():
    made, x = module(grid=(2, 3), leading=1), normal(1, 7, 12).to(F64)
    out, _ = global_part(made, x, causal=False)
    assert_close(made(x)[:, 0], made.to_out(out)[:, 0], rtol=1e-11, atol=1e-12)
    assert not torch.allclose(made(x)[:, 1:], made.to_out(out)[:, 1:])
    weights = []
    made.to_weights.register_forward_hook(lambda _, given, __: weights.append(given[0][..., 0]))
    made(x)
    assert_close(weights, [x.mean(1)])


@pytest.mark.parametrize("window", [1, 2, 4, 9])
def test_the_causal_residual_is_a_loop_over_the_last_tokens(window):
    made, x = module(causal=True, window=window), normal(2, 7, 12).to(F64)
    out, value = global_part(made, x, causal=True)
    for i in range(7):
        mean = x[:, : i + 1].mean(1)  # so far
        weights = made.to_weights(mean[..., None])[..., 0].unflatten(1, (12, window))
        for back in range(min(window, i + 1)):
            out[:, i] = out[:, i] + weights[:, :, back] * value[:, i - back]
    assert_close(made(x), made.to_out(out), rtol=1e-11, atol=1e-12)


def test_later_tokens_change_nothing_of_the_causal_module():
    made, x = module(causal=True), normal(2, 70, 12).to(F64)
    whole = made(x)
    for tokens in (1, 2, 5, 64, 69):
        assert_close(made(x[:, :tokens]), whole[:, :tokens], rtol=1e-12, atol=1e-13)
    later = x.clone()
    later[:, 30:] = torch.nan
    assert_close(made(later)[:, :30], whole[:, :30], rtol=1e-12, atol=1e-13)


@given(cuts=st.lists(st.integers(0, 70), max_size=4).map(sorted), window=st.integers(1, 6))
def test_step_by_step_is_the_whole_at_any_cut(cuts, window):
    made, x = module(causal=True, window=window), normal(2, 70, 12).to(F64)
    pieces, state = [], made.init_state(2)
    for first, end in zip([0, *cuts], [*cuts, 70], strict=True):
        piece, state = made.step(x[:, first:end], state)
        pieces.append(piece)
    assert state.length == 70
    assert state.values.shape == (2, window - 1, 12)
    assert_close(torch.cat(pieces, 1), made(x), rtol=1e-11, atol=1e-12)


def test_padding_is_no_token():
    made, x = module(causal=True), normal(2, 20, 12).to(F64)
    seen = torch.ones(2, 20, dtype=torch.bool)
    seen[0, :6] = seen[1, 17:] = False
    other = torch.where(seen[..., None], x, 100 * normal(2, 20, 12, seed=5).to(F64))
    expected = made(x, seen)
    assert_close(made(other, seen)[seen], expected[seen], rtol=0, atol=0)
    # before a sequence and behind it, it is as if it were not there
    assert_close(expected[0, 6:], made(x[:1, 6:])[0], rtol=1e-11, atol=1e-12)
    assert_close(expected[1, :17], made(x[1:, :17])[0], rtol=1e-11, atol=1e-12)
    first, state = made.step(other[:, :9], made.init_state(2), seen[:, :9])
    rest, state = made.step(other[:, 9:], state, seen[:, 9:])
    assert_close(torch.cat([first, rest], 1)[seen], expected[seen], rtol=1e-11, atol=1e-12)
    assert state.system.count.tolist() == [14, 17]


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_mean_so_far_of_half_precision_is_summed_in_float32(dtype):
    made, tokens = module(causal=True).to(dtype), 700
    x = (1 + normal(1, tokens, 12)).to(dtype)  # whose sum has no more digits from 256 tokens on
    means = []
    made.to_weights.register_forward_pre_hook(lambda _, given: means.append(given[0].mT))
    pieces, state = [], made.init_state(1)
    for few in x.split(5, 1):
        piece, state = made.step(few, state)
        pieces.append(piece)
    in_steps = torch.cat(means, 1)
    number = torch.arange(1, tokens + 1, dtype=F64)[:, None]
    exact = x.to(F64).cumsum(1) / number
    # half an ulp of the mean, and float32's share of the sums
    allowed = 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5
    assert in_steps.dtype == pieces[0].dtype == dtype
    assert ((in_steps.to(F64) - exact).abs() <= allowed).all()
    made(x)
    assert ((means[-1].to(F64) - exact).abs() <= allowed).all()


def test_the_mean_so_far_does_not_leave_float16():
    made = module(causal=True).to(F16)
    state = made.init_state(1)
    state = dataclasses.replace(
        state,
        system=dataclasses.replace(state.system, count=torch.tensor([70_000]), length=70_000),
        tokens=torch.full_like(state.tokens, 70_000),
    )
    out, _ = made.step(torch.ones(1, 1, 12, dtype=F16), state)
    assert out.isfinite().all()


@pytest.mark.parametrize("options", [{"grid": (3, 4), "leading": 1}, {"causal": True}])
def test_every_parameter_gets_a_gradient(options):
    made = module(**options)
    made(normal(2, 13, 12).to(F64)).square().sum().backward()
    for name, parameter in made.named_parameters():
        assert (parameter.grad != 0).any(), name


def test_what_does_not_fit_says_so():
    with pytest.raises(ValueError, match="width 12 is not divisible by 5 heads"):
        InLineAttention(12, heads=5, causal=True)
    for options in ({}, {"grid": (3, 4), "causal": True}):
        with pytest.raises(ValueError, match="needs a grid, or causal=True without; got grid="):
            InLineAttention(12, heads=3, **options)
    with pytest.raises(ValueError, match="window must be at least 1"):
        InLineAttention(12, heads=3, causal=True, window=0)
    made = module(grid=(3, 4), leading=1)
    with pytest.raises(ValueError, match=r"expected 1 \+ 3 x 4 tokens, got \(2, 12, 12\)"):
        made(torch.zeros(2, 12, 12, dtype=F64))
    with pytest.raises(ValueError, match="a grid has no padding"):
        made(torch.zeros(2, 13, 12, dtype=F64), torch.ones(2, 13, dtype=torch.bool))
    with pytest.raises(ValueError, match="on a grid has no state"):
        made.init_state(2)
