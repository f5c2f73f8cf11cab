"""LSSA and LSSAR: the stable form against the printed one, and the gradient in closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import LSSA, LSSAR, LSSARLog, attention, attention_weights
from aftermax.weights import lssa_weights, lssar_weights

from .native import rounded_weights

F64 = torch.float64
WIDTH, LENGTH, POWER = 64, 1024, 15


def literal(scores: torch.Tensor, visible: torch.Tensor, power: float, eps: float) -> torch.Tensor:
    """The two stages as they are printed, and as public code types them in."""
    f = torch.nn.functional.softplus(scores) * visible
    n = visible.sum(-1, keepdim=True)
    a = f / (f.sum(-1, keepdim=True) + eps)
    r = torch.relu(a * n - (n > 3).to(f.dtype)) * visible
    return r**power / ((r**power).sum(-1, keepdim=True) + eps)


def scores_of(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query and key (T, D), ln(d) ln(N_i) cos (T, T), visible, in float64 of float16 inputs.

    Rounded to float16 first, so that every dtype below starts from the same numbers.
    """
    random = torch.Generator().manual_seed(0)
    q = torch.randn(LENGTH, WIDTH, generator=random, dtype=F64)
    if name == "random":
        k = torch.randn(LENGTH, WIDTH, generator=random, dtype=F64)
    elif name == "nearly uniform":
        k = torch.randn(1, WIDTH, generator=random, dtype=F64)
        k = k + 0.005 * torch.randn(LENGTH, WIDTH, generator=random, dtype=F64)
    else:  # one match, the rest anti-aligned
        q = torch.ones(LENGTH, WIDTH, dtype=F64)
        k = -torch.ones(LENGTH, WIDTH, dtype=F64)
        k[0] = 1
    q, k = q.half().to(F64), k.half().to(F64)
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    n = visible.sum(-1, keepdim=True).to(F64)
    cosines = torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).T
    return q, k, math.log(WIDTH) * n.log() * cosines, visible


INPUTS = ("nearly uniform", "random", "one match")


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("power", [1, 3, 15])
def test_the_stable_form_is_the_printed_one_in_float64(name, power):
    *_, scores, visible = scores_of(name)
    stable = lssar_weights(scores, visible, power)
    assert_close(stable, literal(scores, visible, power, eps=0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "dtype", "broken"),
    [
        # r^15 underflows, or drowns in eps: the row's weights sum to nothing
        ("nearly uniform", torch.float32, 1000),
        # r^15 overflows where r > 2.09
        ("random", torch.float16, 900),
        # r^15 overflows where r > 370
        ("one match", torch.float32, 600),
    ],
)
def test_the_printed_form_breaks_where_the_stable_one_does_not(name, dtype, broken):
    *_, scores, visible = scores_of(name)
    scores = scores.to(dtype)
    sums = literal(scores, visible, POWER, eps=1e-8).double().sum(-1)
    wrong = ~((sums - 1).abs() < 0.1)  # NaN is wrong too
    assert wrong.sum() >= broken
    stable = lssar_weights(scores.float(), visible, POWER).sum(-1)
    assert_close(stable, torch.ones(LENGTH), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_is_finite_and_right_in_every_dtype(name, dtype, impl):
    q, k, *_ = scores_of(name)
    v = torch.randn(LENGTH, 16, dtype=F64).half().to(F64)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, weights=LSSAR(), is_causal=True, impl=impl)
    q, k, v = (x.detach().to(F64) for x in leaves)
    exact = attention(q, k, v, weights=LSSAR(), is_causal=True)
    # float32 scores of some 30 are off by 1e-6 of themselves; a nearly uniform row leaves a few
    # thousandths of them above its mean, and the power multiplies what is left of the digits
    float32_error = {"nearly uniform": 2e-3, "random": 2e-5, "one match": 1e-6}[name]
    allowed = 0.51 * torch.finfo(dtype).eps * exact.abs() + float32_error
    if impl == "cpu":
        spread = attention(q, k, v.abs(), weights=LSSAR(), is_causal=True)
        allowed = allowed + rounded_weights(dtype, spread)
    assert ((out.to(F64) - exact).abs() <= allowed).all()
    for gradient in torch.autograd.grad(out.float().square().sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("power", [1, 3, 15])
@pytest.mark.parametrize(("n", "width"), [(2, 4), (37, 8), (130, 64)])
def test_the_gradient_is_the_closed_form(power, n, width):
    random = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=F64)

    visible = torch.ones(n, n, dtype=torch.bool).tril()
    count = visible.sum(-1, keepdim=True).to(F64)
    lam = math.log(width) * count.log()
    q, k, v, d_out = normal(n, width), normal(n, width), normal(n, 5), normal(n, 5)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    out = attention(q, k, v, weights=LSSAR(power), is_causal=True)
    got = torch.autograd.grad(out, (q, k, v), d_out)

    with torch.no_grad():
        q_norm, k_norm = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
        q_hat, k_hat = q / q_norm, k / k_norm
        s = lam * (q_hat @ k_hat.T)
        f = torch.log1p(s.exp()) * visible
        o = (count > 3).to(F64)
        r = torch.relu(f - o * f.sum(-1, keepdim=True) / count) * visible
        m = r.amax(-1, keepdim=True)
        x = r / m
        z = (x**power).sum(-1, keepdim=True)
        p = x**power / z
        d_p, big_d = d_out @ v.T, (d_out * (p @ v)).sum(-1, keepdim=True)
        g = power * x ** (power - 1) / (m * z) * (d_p - big_d) * (r > 0)
        d_f = (g - o * g.sum(-1, keepdim=True) / count) * visible
        d_s = lam * d_f * torch.sigmoid(s)
        d_q_hat, d_k_hat = d_s @ k_hat, d_s.T @ q_hat
        d_q = (d_q_hat - (d_q_hat * q_hat).sum(-1, keepdim=True) * q_hat) / q_norm
        d_k = (d_k_hat - (d_k_hat * k_hat).sum(-1, keepdim=True) * k_hat) / k_norm
    assert_close(got, (d_q, d_k, p.T @ d_out), rtol=1e-10, atol=1e-11)


@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_the_weights_do_not_change_with_the_size_of_f(factor, seed):
    # of scores below, softplus is exp: a shift of the scores is then a factor of f
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 20, generator=random, dtype=F64) - 60
    visible = torch.ones(3, 20, dtype=torch.bool)
    shifted = lssar_weights(scores + math.log(factor), visible, 15)
    assert_close(shifted, lssar_weights(scores, visible, 15), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("power", [1, 3, 15, 2.5])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_flat_row_falls_back_to_lssa(power, n, dtype):
    scores = torch.full((1, n), 3.7, dtype=dtype, requires_grad=True)
    visible = torch.ones(1, n, dtype=torch.bool)
    weights = lssar_weights(scores, visible, power)
    assert_close(weights, lssa_weights(scores, visible))
    assert_close(weights, torch.full_like(weights, 1 / n))
    (gradient,) = torch.autograd.grad(weights[0, 0], scores)
    assert gradient.isfinite().all()


def test_rounding_noise_is_not_sharpened():
    noise = torch.randn(1, 500, dtype=F64) * 1e-9
    weights = lssar_weights(3.7 + noise, torch.ones(1, 500, dtype=torch.bool), 15)
    assert_close(weights, torch.full_like(weights, 1 / 500), rtol=1e-6, atol=0)


@pytest.mark.parametrize("weights", [LSSAR(), LSSAR(2.5), LSSARLog()], ids=repr)
def test_rows_that_are_flat_up_to_rounding_have_finite_gradients(weights):
    one = torch.randn(1, 2, 1, 16)
    for tokens in range(1, 60):
        q, v = torch.randn(1, 2, tokens, 16, requires_grad=True), torch.randn(1, 2, tokens, 16)
        out = attention(q, one.expand_as(q), v, weights=weights, impl="reference")
        (gradient,) = torch.autograd.grad(out.sum(), q)
        assert gradient.isfinite().all()


def test_the_first_three_rows_have_no_threshold():
    scores = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=F64).expand(4, 4)
    visible = torch.ones(4, 4, dtype=torch.bool).tril()
    weights = lssar_weights(scores, visible, 2)
    f = torch.log1p(scores[0].exp())
    for i in range(3):
        assert_close(weights[i, : i + 1], f[: i + 1] ** 2 / (f[: i + 1] ** 2).sum())
    above = (f - f.mean()).relu()
    assert_close(weights[3], above**2 / (above**2).sum())
    assert weights[3, 0] == 0
    assert weights[2, 0] > 0


def test_a_key_below_the_mean_gets_no_weight_but_a_gradient():
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=F64, requires_grad=True)
    weights = lssar_weights(scores, torch.ones(1, 4, dtype=torch.bool), 3)
    (gradient,) = torch.autograd.grad(weights[0, 2], scores)
    assert weights[0, :2].tolist() == [0, 0]
    assert (gradient[0, :2] != 0).all()


def test_softplus_is_exact_at_both_ends():
    scores = torch.tensor([[-500.0, -40.0, 0.0, 40.0, 500.0]], dtype=F64)
    weights = lssa_weights(scores, torch.ones(1, 5, dtype=torch.bool))
    f = [math.exp(-500), math.exp(-40), math.log(2), 40 + math.exp(-40), 500.0]
    expected = torch.tensor([f], dtype=F64) / sum(f)
    assert_close(weights, expected, rtol=1e-14, atol=0)


def test_lssa_is_lssar_with_no_threshold_and_power_one():
    q, k = torch.randn(2, 1, 1, 3, 8, dtype=F64)
    lssa = attention_weights(q, k, weights=LSSA(), is_causal=True)
    assert_close(attention_weights(q, k, weights=LSSAR(1), is_causal=True), lssa)


def test_the_power_of_lssar_log_is_that_of_its_row():
    q, k = torch.randn(2, 1, 1, 40, 16, dtype=F64)
    weights = attention_weights(q, k, weights=LSSARLog(), is_causal=True)
    for i in (0, 1, 2, 5, 39):
        power = max(1.0, 2 * math.log(i + 1))
        constant = attention_weights(q, k, weights=LSSAR(power), is_causal=True, rows=(i, i + 1))
        assert_close(weights[:, :, i : i + 1], constant, rtol=1e-11, atol=1e-13)


def test_the_scale_replaces_the_logarithm_of_the_width():
    q, k = torch.randn(2, 1, 1, 9, 16, dtype=F64)
    own = attention_weights(q, k, weights=LSSAR())
    assert_close(attention_weights(q, k, weights=LSSAR(), scale=math.log(16)), own)
    assert not torch.allclose(attention_weights(q, k, weights=LSSAR(), scale=16**-0.5), own)


@pytest.mark.parametrize("power", [0.5, 0, -1, math.nan])
def test_powers_below_one_are_refused(power):
    with pytest.raises(ValueError, match=f"lssar needs power >= 1, got {power}"):
        LSSAR(power)


@pytest.mark.parametrize("factor", [0, -2.0, math.nan])
def test_factors_that_do_not_grow_are_refused(factor):
    with pytest.raises(ValueError, match=f"lssar-log needs factor > 0, got {factor}"):
        LSSARLog(factor)
