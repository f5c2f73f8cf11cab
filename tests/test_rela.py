"""Rectified weights: ReLA's norms, its gradient in closed form, null attention."""

import pytest
import torch
from torch.testing import assert_close

from aftermax import ReLA, ReLUPower, attention, attention_weights
from aftermax.weights import relu_weights, rms_norm_heads

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def learned_of(weights: ReLA, heads: int, width: int) -> dict[str, torch.Tensor]:
    names = weights.learned(heads, width)
    return {name: 1 + 0.3 * normal(heads, width, seed=len(name)) for name in names}


def test_the_norm_of_the_heads_is_the_norm_of_their_concatenation():
    out, gain = normal(2, 3, 5, 4), normal(3, 4, seed=1)
    joined = out.transpose(1, 2).flatten(-2)  # (B, T, H * Dv)
    expected = torch.nn.functional.rms_norm(joined, (12,), gain.flatten(), 1e-6)
    got = rms_norm_heads(out, gain, 1e-6).transpose(1, 2).flatten(-2)
    assert_close(got, expected, rtol=1e-13, atol=1e-14)


def test_the_norm_variants_build_on_each_other():
    q, k, v = (normal(2, 3, 6, 4, seed=s) for s in range(3))
    gated = learned_of(ReLA("gated"), 3, 4)
    bare = attention(q, k, v, weights=ReLA("none"))
    assert_close(bare, (q @ k.transpose(-1, -2) / 2).relu() @ v)
    normed = attention(q, k, v, weights=ReLA("rms"), gain=gated["gain"])
    assert_close(normed, rms_norm_heads(bare, gated["gain"], 1e-6))
    gate = torch.sigmoid(gated["gate"][:, None] * bare)
    assert_close(attention(q, k, v, weights=ReLA(), **gated), normed * gate)


def test_what_each_variant_learns():
    assert set(ReLA("gated").learned(2, 4)) == {"gain", "gate"}
    assert set(ReLA("rms").learned(2, 4)) == {"gain"}
    assert ReLA("none").learned(2, 4) == {}
    start = ReLA("gated").learned(2, 4)
    assert torch.equal(start["gain"], torch.ones(2, 4))
    assert torch.equal(start["gate"], torch.zeros(2, 4))


def test_one_active_head_sets_the_scale_of_all():
    q, k, v = (normal(1, 2, 4, 4, seed=s) for s in range(3))
    louder = v.clone()
    louder[:, 0] *= 100
    quiet = attention(q, k, v, weights=ReLA("rms"))[:, 1]
    beside = attention(q, k, louder, weights=ReLA("rms"))[:, 1]
    assert (beside.abs() < 0.1 * quiet.abs()).all()


def test_the_gradient_is_the_closed_form():
    heads, tokens, width, eps = 2, 7, 4, 1e-6
    q, k, v = (normal(1, heads, tokens, width, seed=s).requires_grad_() for s in range(3))
    learned = {x: y.requires_grad_() for x, y in learned_of(ReLA(), heads, width).items()}
    dy = normal(1, heads, tokens, width, seed=5)
    out = attention(q, k, v, weights=ReLA(), is_causal=True, **learned)
    leaves = (q, k, v, learned["gain"], learned["gate"])
    got = torch.autograd.grad(out, leaves, dy)

    with torch.no_grad():
        g, w = (learned[name][:, None] for name in ("gain", "gate"))
        s = q @ k.transpose(-1, -2) * width**-0.5
        p = s.relu().tril()
        o = p @ v
        r = (o.square().mean((1, 3), keepdim=True) + eps).sqrt()
        oh, t = o / r, torch.sigmoid(w * o)
        h = dy * g * t
        do = (h - oh * (h * oh).mean((1, 3), keepdim=True)) / r + dy * g * oh * t * (1 - t) * w
        ds = (s > 0).tril() * (do @ v.transpose(-1, -2)) * width**-0.5
        expected = (
            ds @ k,
            ds.transpose(-1, -2) @ q,
            p.transpose(-1, -2) @ do,
            (dy * oh * t).sum((0, 2)),
            (dy * g * oh * t * (1 - t) * o).sum((0, 2)),
        )
    assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("norm", ["gated", "rms", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_null_attention_is_zero_and_leaks_no_gradient(norm, dtype):
    # every score is negative: nothing is attended to, though everything is visible
    q = torch.ones(1, 2, 3, 4, dtype=dtype, requires_grad=True)
    k = torch.full((1, 2, 5, 4), -1.0, dtype=dtype, requires_grad=True)
    v = torch.ones(1, 2, 5, 4, dtype=dtype, requires_grad=True)
    out = attention(q, k, v, weights=ReLA(norm))
    assert torch.equal(out, torch.zeros_like(out))
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_half_of_the_weights_are_zero_at_initialisation():
    q, k = normal(1, 4, 128, 64), normal(1, 4, 128, 64, seed=1)
    weights = attention_weights(q, k, weights=ReLA())
    # scores of one row share a query, but their signs are fair coins: 65 536 of them
    assert (weights == 0).to(F64).mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("power", [1, 2, 3, 1.5, 70])
def test_powers_of_rectified_scores(power):
    scores = torch.tensor([[-1.0, 0.0, 0.5, 1.5, 9.0]], dtype=F64)
    visible = torch.tensor([[True, True, True, True, False]])
    expected = torch.tensor([[0.0, 0.0, 0.5**power, 1.5**power, 0.0]], dtype=F64)
    assert_close(relu_weights(scores, visible, power), expected, rtol=1e-13, atol=0)


def test_relu_power_divides_by_what_the_row_sees():
    q, k = normal(1, 1, 6, 4), normal(1, 1, 6, 4, seed=1)
    weights = attention_weights(q, k, weights=ReLUPower(2), is_causal=True)
    counts = torch.arange(1, 7, dtype=F64)[:, None]
    expected = (q @ k.transpose(-1, -2) / 2).relu().tril() ** 2 / counts
    assert_close(weights, expected, rtol=1e-13, atol=0)


def test_constants_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="rela needs norm = 'gated', 'rms' or 'none', got 'layer'"):
        ReLA("layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"relu-power needs power >= 1, got 0\.5"):
        ReLUPower(0.5)
