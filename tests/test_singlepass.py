"""Softmax in one pass: what is its own. The laws are in test_contract.py, the integers of the unit
in test_moe_arithmetic.py."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import aftermax
from aftermax import FixedOnePassSoftmax, OnePassSoftmax, Softmax, Visible, attention
from aftermax.moe import ACTIVATION, Fixed, single_pass_softmax
from aftermax.weights import fixed_one_pass_weights, one_pass_weights, softmax_weights

from .native import needs_kernels, normal

F32, F64 = torch.float32, torch.float64
UNIT = 2.0**-22


def rows(n=9, count=6, scale=3.0, seed=0):
    scores = normal(count, n, scale=scale, dtype=F64, seed=seed)
    visible = torch.rand(count, n, generator=torch.Generator().manual_seed(seed)) < 0.7
    visible[0] = False
    return scores, visible


# ---- floating point ------------------------------------------------------------------------------


@given(st.integers(1, 60), st.sampled_from([0.0, 1.0, 30.0, 1e4]), st.integers(0, 1000))
def test_it_is_softmax_and_so_is_its_gradient(n, scale, seed):
    scores, visible = rows(n, scale=scale, seed=seed)
    upstream = normal(*scores.shape, dtype=F64, seed=seed + 1)
    found = []
    for weigh in (one_pass_weights, softmax_weights):
        leaf = scores.clone().requires_grad_()
        weights = weigh(leaf, visible)
        found.append((weights.detach(), torch.autograd.grad(weights, leaf, upstream)[0]))
    # scores of 1e4 are themselves rounded to 1e-12
    assert_close(found[0], found[1], rtol=1e-12, atol=1e-12 + 1e-15 * scale)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_neither_order_overflows(order):
    """A new maximum at every step, or at the first alone."""
    scores = torch.linspace(-1e4, 1e4, 700, dtype=F64)[None]
    scores = scores if order == "rising" else scores.flip(-1)
    found = one_pass_weights(scores, torch.ones_like(scores, dtype=torch.bool))
    assert_close(found, scores.softmax(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_rows_of_half_precision_sum_to_one(dtype):
    scores = torch.zeros(1, 4096, dtype=dtype)
    found = one_pass_weights(scores, torch.ones_like(scores, dtype=torch.bool))
    assert found.dtype == dtype
    assert found.double().sum() == 1  # each 2^-12


def test_what_overflowed_is_not_a_number_as_in_softmax():
    scores = torch.tensor([[0.0, torch.inf], [0.0, torch.nan], [0.0, -torch.inf]])
    seen = torch.ones_like(scores, dtype=torch.bool)
    expected = softmax_weights(scores, seen)
    assert_close(one_pass_weights(scores, seen), expected, equal_nan=True, rtol=0, atol=0)


@needs_kernels
def test_its_kernel_is_that_of_softmax():
    x = normal(2, 3, 40, 16)
    assert "kernels" in aftermax.explain(x, x, x, weights=OnePassSoftmax())
    found, softmax = (
        attention(x, x, x, weights=w, is_causal=True) for w in (OnePassSoftmax(), Softmax())
    )
    assert torch.equal(found, softmax)


# ---- fixed point ---------------------------------------------------------------------------------


@given(st.integers(1, 40), st.sampled_from([0.0, 1.0, 30.0]), st.booleans(), st.integers(0, 1000))
def test_its_weights_are_those_of_the_unit(n, scale, corrected, seed):
    """Of the keys that are visible, and of no others: they never come to it."""
    scores, visible = rows(n, scale=scale, seed=seed)
    found = fixed_one_pass_weights(scores, visible, corrected=corrected)
    for row, seen, weights in zip(scores, visible, found, strict=True):
        assert (weights[~seen] == 0).all()
        if seen.any():
            unit = single_pass_softmax(ACTIVATION.encode(row[seen]), corrected=corrected)
            assert_close(weights[seen], ACTIVATION.decode(unit.weights), rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 100, 511, 1500])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_how_far_it_is_from_softmax(n, scale):
    scores, visible = rows(n, count=30, scale=scale)
    found = fixed_one_pass_weights(scores, visible)
    exact = softmax_weights(scores, visible)
    assert float((found - exact).abs().max()) < 1e-4
    # a weight is the product of two numbers that are cut by up to a unit, times their sum
    seen = visible.any(-1)
    assert float((found.sum(-1)[seen] - 1).abs().max()) < (2 * n + 600) * UNIT
    assert (found / UNIT == (found / UNIT).round()).all()


def test_the_gradient_is_that_of_softmax_at_its_weights():
    scores, visible = rows()
    upstream = normal(*scores.shape, dtype=F64, seed=1)
    leaf = scores.clone().requires_grad_()
    weights = fixed_one_pass_weights(leaf, visible)
    (gradient,) = torch.autograd.grad(weights, leaf, upstream)
    w = weights.detach()
    assert_close(gradient, w * (upstream - (w * upstream).sum(-1, keepdim=True)), rtol=0, atol=0)
    exact = scores.clone().requires_grad_()
    (of_softmax,) = torch.autograd.grad(softmax_weights(exact, visible), exact, upstream)
    assert_close(gradient, of_softmax, rtol=0, atol=1e-4)


@pytest.mark.parametrize("equal", [511, 512, 600])
def test_the_hardware_ends_at_511_equal_scores_and_says_so(equal):
    scores = torch.zeros(2, equal)
    seen = torch.ones_like(scores, dtype=torch.bool)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        hardware = fixed_one_pass_weights(scores, seen, corrected=False)
    mended = fixed_one_pass_weights(scores, seen)
    assert_close(mended, torch.full_like(scores, 1 / equal), rtol=0, atol=UNIT)
    if equal < 512:
        assert not said
        assert_close(hardware, mended, rtol=0, atol=2 * UNIT)
    else:
        assert "2 of 2 rows went out of the range" in str(said[0].message)
        assert float((hardware - mended).abs().max()) > 1e-3


def test_hidden_keys_are_not_among_the_511():
    scores, seen = torch.zeros(1, 2000), torch.arange(2000)[None] % 4 == 0
    found = fixed_one_pass_weights(scores, seen, corrected=False)  # a warning would be an error
    assert_close(found[seen], torch.full((500,), 1 / 500), rtol=0, atol=2 * UNIT)


def test_scores_beyond_the_format_rest_at_its_edge_or_wrap():
    scores = torch.tensor([[600.0, 0.0, -2000.0]])
    seen = torch.ones_like(scores, dtype=torch.bool)
    assert fixed_one_pass_weights(scores, seen).tolist() == [[1.0, 0.0, 0.0]]
    # 600 is -424 in ten bits, -2000 is 48
    with pytest.warns(RuntimeWarning, match="1 of 1 rows went out of the range"):
        hardware = fixed_one_pass_weights(scores, seen, corrected=False)
    assert hardware.tolist() == [[0.0, 0.0, 1.0]]
    # what is hidden never comes to the unit: no warning, which would be an error
    fixed_one_pass_weights(scores, scores.abs() < 500, corrected=False)


def test_what_is_not_finite_turns_its_row_into_nan():
    scores = torch.tensor([[0.0, torch.inf], [0.0, torch.nan], [torch.nan, 0.0]])
    seen = torch.tensor([[True, True], [True, True], [False, True]])
    found = fixed_one_pass_weights(scores, seen)
    assert found[:2].isnan().all()
    assert found[2].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fewer_bits_are_further_off(dtype):
    x = normal(1, 2, 30, 16, dtype=F64).to(dtype)
    exact = attention(x.double(), x.double(), x.double())
    errors = []
    for width in (32, 24, 18):
        out = attention(x, x, x, weights=FixedOnePassSoftmax(width))
        assert out.dtype == dtype
        errors.append(float((out - exact).abs().max()))
    assert errors[0] < 1e-4 + torch.finfo(dtype).eps * float(exact.abs().max())
    assert errors[2] > 0.02
    assert errors[0] < errors[2]
    assert errors[1] < errors[2]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="signed format of 0 to 26 bits"):
        FixedOnePassSoftmax(32, 2)
    with pytest.raises(ValueError, match="1 to 32 bits"):
        FixedOnePassSoftmax(40, 10)
    x = normal(1, 1, 3, 4)
    with pytest.raises(RuntimeError, match="no kernel for FixedOnePassSoftmax"):
        attention(x, x, x, weights=FixedOnePassSoftmax(), impl="cpu")


def test_onnx_has_no_such_walk():
    pytest.importorskip("onnxscript")

    class Asked(torch.nn.Module):
        def forward(self, x):
            return attention(x, x, x, weights=FixedOnePassSoftmax())

    with pytest.raises(torch.onnx.OnnxExporterError, match=r"No ONNX function .*aftermax"):
        torch.onnx.export(Asked().eval(), (normal(1, 1, 4, 8),), verbose=False)


def test_torch_takes_the_operator():
    scores = normal(2, 3, 5, dtype=F64).requires_grad_()
    visible = torch.ones(5, dtype=torch.bool)
    arguments = (scores, visible, 32, 10, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.aftermax.one_pass, arguments, test_utils=tests)


def test_rows_that_see_nothing_and_calls_of_nothing():
    for weights in (OnePassSoftmax(), FixedOnePassSoftmax(), FixedOnePassSoftmax(corrected=False)):
        x = normal(1, 2, 5, 4, dtype=F64).requires_grad_()
        out = attention(x, x, x, weights=weights, attn_mask=Visible(mask=torch.zeros(5) > 0))
        assert (out == 0).all()
        out.sum().backward()
        assert (x.grad == 0).all()
        assert attention(x[:, :, :0], x, x, weights=weights).shape == (1, 2, 0, 4)
        assert attention(x[:0], x[:0], x[:0], weights=weights).shape == (0, 2, 5, 4)


def test_a_form_is_the_catalogues():
    assert FixedOnePassSoftmax().form == ACTIVATION == Fixed(32, 10)
    assert aftermax.find("singlepass-fixed").system.corrected
