"""A vision transformer in Edge-MoE's numbers: every step against rational arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from aftermax.moe import (
    ACTIVATION,
    Experts,
    Fixed,
    Tally,
    fixed_add,
    fixed_attention,
    fixed_experts,
    fixed_gate,
    fixed_gelu,
    fixed_layer_norm,
    fixed_linear,
    fixed_patches,
    fixed_rms_norm,
)
from aftermax.moe.fixedpoint import (
    ATTENTION_BIAS,
    BIAS,
    LINEAR_WEIGHT,
    NORM_WEIGHT,
    PATCH_WEIGHT,
    PIXEL,
)

SIZES = st.sampled_from([0.01, 1.0, 20.0, 500.0])
SEEDS = st.integers(0, 10**6)


def drawn(form: Fixed, *shape: int, size: float = 1.0, seed: int = 0) -> Tensor:
    """Raw values of a format: normal ones, and here and there the ends of the format."""
    random = torch.Generator().manual_seed(seed)
    x = size * torch.randn(shape, generator=random, dtype=torch.float64)
    raw = form.encode(x.abs() if not form.signed else x)
    ends = torch.tensor([form.lowest, form.highest])
    which = torch.randint(2, shape, generator=random)
    return torch.where(torch.rand(shape, generator=random) < 0.02, ends[which], raw)


# ---- by hand: rational numbers, one after another, into registers --------------------------------


def value(raw: int | Tensor, form: Fixed = ACTIVATION) -> Fraction:
    return int(raw) * Fraction(2) ** -form.fraction


def values(raw: Tensor, form: Fixed = ACTIVATION) -> list[Fraction]:
    return [value(r, form) for r in raw]


def cut(x: Fraction) -> Fraction:
    """Into a register: 22 bits behind the point, towards minus infinity; 10 before it."""
    raw = math.floor(x * 2**22) % 2**32
    return Fraction(raw - 2**32 if raw >= 2**31 else raw, 2**22)


def exp(x: Fraction) -> Fraction:
    if x > 0:
        return Fraction(0)
    with localcontext(prec=60):
        decimal = (Decimal(x.numerator) / Decimal(x.denominator)).exp()
        return Fraction(math.floor(decimal * 2**22), 2**22)


def root(x: Fraction) -> Fraction:
    return Fraction(math.isqrt(math.floor(x * 2**44)), 2**22)


def dot(xs: list[Fraction], ys: list[Fraction], start: Fraction = Fraction(0)) -> Fraction:
    total = start
    for x, y in zip(xs, ys, strict=True):
        total = cut(total + x * y)
    return total


def online(scores: list[Fraction]) -> tuple[Fraction, Fraction]:
    """The maximum and the sum."""
    maximum, total = Fraction(-512), Fraction(0)
    for s in scores:
        gap = maximum - s
        power = exp(cut(-abs(gap)))
        if gap < 0:
            total, maximum = cut(cut(total * power) + 1), s
        else:
            total = cut(total + power)
    return maximum, total


def attended(qs, ks, vs, scale: Fraction, query: int) -> list[Fraction]:
    """One row of attention as the sources walk it."""
    n, scores = len(ks), []
    for k in ks:
        score = Fraction(0)
        for i in range(0, len(k), 8):
            score = cut(score + cut(dot(qs[query][i : i + 8], k[i : i + 8]) * scale))
        scores.append(score)
    order = [(query % 4 + j) % n for j in range(n)]
    maximum, total = online([scores[j] for j in order])
    share = cut(Fraction(math.floor(2**22 / total), 2**22)) if total else Fraction(1)
    out = [Fraction(0)] * len(vs[0])
    for j in order:
        weight = cut(exp(cut(scores[j] - maximum)) * share)
        out = [cut(o + cut(v * weight)) for o, v in zip(out, vs[j], strict=True)]
    return out


def rows(raw: Tensor) -> Iterator[list[Fraction]]:
    return (values(row) for row in raw)


# ---- the layers ----------------------------------------------------------------------------------


@given(SIZES, SEEDS, st.sampled_from([BIAS, ATTENTION_BIAS]), st.booleans())
def test_a_linear_layer_cuts_every_product(size, seed, bias_form, gelu):
    x, w = drawn(ACTIVATION, 3, 7, size=size, seed=seed), drawn(LINEAR_WEIGHT, 4, 7, seed=seed)
    b = drawn(bias_form, 4, seed=seed)
    found = fixed_linear(x, w, b, bias_form=bias_form, gelu=gelu)
    for row, out in zip(rows(x), found, strict=True):
        for of, bias, y in zip(w, b, out, strict=True):
            wanted = dot(row, values(of, LINEAR_WEIGHT), cut(value(bias, bias_form)))
            wanted_raw = torch.tensor(int(wanted * 2**22))
            assert int(y) == int(fixed_gelu(wanted_raw) if gelu else wanted_raw)


@given(SEEDS, st.sampled_from([PATCH_WEIGHT, Fixed(16, 2), Fixed(16, 5)]))
def test_patches_are_bytes_and_their_place_is_added(seed, form):
    pixels, w = drawn(PIXEL, 5, 12, seed=seed), drawn(form, 3, 12, size=0.2, seed=seed)
    b, places = drawn(BIAS, 3, seed=seed), drawn(ACTIVATION, 6, 3, seed=seed)
    found = fixed_patches(pixels, w, b, places, weight_form=form)
    assert torch.equal(found[0], places[0])
    for patch, place, out in zip(pixels, places[1:], found[1:], strict=True):
        for of, bias, at, y in zip(w, b, place, out, strict=True):
            wanted = dot(values(patch, PIXEL), values(of, form), value(bias, BIAS))
            assert value(y) == cut(wanted + value(at))


@given(SIZES, SEEDS, st.booleans())
def test_a_norm_is_that_of_the_sources(size, seed, constant):
    x = drawn(ACTIVATION, 3, 6, size=size, seed=seed)
    if constant:  # where cutting decides
        x = x[:, :1] + drawn(ACTIVATION, 3, 6, size=1e-4, seed=seed) // 8
        x = ACTIVATION.wrap(x)
    g, b = drawn(NORM_WEIGHT, 6, seed=seed), drawn(BIAS, 6, seed=seed)
    tally = Tally()
    found = fixed_layer_norm(x, g, b, tally=tally)
    of_rms = fixed_rms_norm(x, g, eps=1e-3)
    one_of, rootless = cut(Fraction(1, 6)), 0
    for row, out, other in zip(rows(x), found, of_rms, strict=True):
        shares = [cut(x * one_of) for x in row]
        mean, square = cut(sum(shares, Fraction(0))), dot(row, shares)
        variance = cut(square - cut(mean * mean) + cut(Fraction(1e-6)))
        rootless += variance <= 0
        r = cut(1 / root(variance)) if variance > 0 else Fraction(0)
        alone = cut(square + cut(Fraction(1e-3)))
        by = cut(1 / root(alone)) if alone > 0 else Fraction(0)
        for x_i, g_i, b_i, y, z in zip(
            row, values(g, NORM_WEIGHT), values(b, BIAS), out, other, strict=True
        ):
            assert value(y) == cut(cut(cut(cut(x_i - mean) * r) * g_i) + b_i)
            assert value(z) == cut(cut(x_i * by) * g_i)
    assert tally.wrapped["root"] == rootless


@given(st.integers(1, 11), st.sampled_from([3, 8, 20]), SIZES, SEEDS)
def test_attention_is_that_of_the_sources(tokens, width, size, seed):
    """Scaled by blocks of eight, summed from key i mod 4 on."""
    q, k, v = (drawn(ACTIVATION, tokens, width, size=size, seed=seed + i) for i in range(3))
    v = v[:, :2]
    scale = cut(Fraction(1 / math.sqrt(width)))
    found = fixed_attention(q, k, v)
    lists = [list(rows(x)) for x in (q, k, v)]
    for i in range(tokens):
        assert values(found[i]) == attended(*lists, scale, i)


def test_the_order_of_the_keys_is_that_of_the_lane():
    """The last bits of the sum tell that query 1 began at key 1, and not at key 0."""
    random = torch.Generator().manual_seed(0)
    q, k = (ACTIVATION.encode(torch.randn(40, 8, generator=random)) for _ in range(2))
    v = ACTIVATION.encode(100 * torch.ones(40, 1))
    whole = fixed_attention(q, k, v)
    shifted = fixed_attention(q, k.roll(1, 0), v)
    assert not torch.equal(whole, shifted)
    turned = fixed_attention(q.roll(1, 0), k.roll(1, 0), v)  # lane 1 where lane 0 was, and its keys
    same = [i for i in range(40) if i % 4 != 3]
    assert torch.equal(turned[1:][same[:-1]], whole[same[:-1]])


@given(SIZES, SEEDS, st.integers(1, 4))
def test_a_gate_divides_and_sorts(size, seed, top_k):
    x, gate = drawn(ACTIVATION, 5, 6, size=size, seed=seed), drawn(LINEAR_WEIGHT, 4, 6, seed=seed)
    gate[2] = gate[0]  # a tie
    index, weights = fixed_gate(x, gate, top_k)
    for row, chosen, shares in zip(rows(x), index.tolist(), weights, strict=True):
        scores = [dot(row, values(g, LINEAR_WEIGHT)) for g in gate]
        maximum, total = online(scores)
        assert chosen == sorted(range(4), key=lambda e: (-scores[e], e))[:top_k]
        for e, share in zip(chosen, shares, strict=True):
            assert value(share) == cut(exp(cut(scores[e] - maximum)) / total)


@given(st.sampled_from([0.1, 1.0, 30.0]), SEEDS)
def test_experts_are_weighted_and_cut(size, seed):
    x = drawn(ACTIVATION, 5, 4, size=size, seed=seed)
    w1, w2 = drawn(LINEAR_WEIGHT, 3, 6, 4, seed=seed), drawn(LINEAR_WEIGHT, 3, 4, 6, seed=seed + 1)
    b1, b2 = drawn(BIAS, 3, 6, seed=seed), drawn(BIAS, 3, 4, seed=seed)
    index, weights = fixed_gate(x, drawn(LINEAR_WEIGHT, 3, 4, seed=seed), 2)
    found = fixed_experts(x, index, weights, w1, b1, w2, b2)
    for t in range(5):
        wanted = [Fraction(0)] * 4
        for e, weight in zip(index[t].tolist(), values(weights[t]), strict=True):
            hidden = fixed_linear(x[t : t + 1], w1[e], b1[e], gelu=True)
            y = fixed_linear(hidden, w2[e], b2[e])[0]
            wanted = [cut(o + cut(weight * v)) for o, v in zip(wanted, values(y), strict=True)]
        assert values(found[t]) == wanted


# ---- near the layers that they stand for, and what is told ---------------------------------------


def test_near_floating_point_where_nothing_wraps():
    random = torch.Generator().manual_seed(0)

    def encoded(form: Fixed, *shape: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
        raw = form.encode(size * torch.randn(shape, generator=random))
        return raw, form.decode(raw)

    x, exact = encoded(ACTIVATION, 2, 9, 32)
    w, of_w = encoded(LINEAR_WEIGHT, 32, 32, size=0.2)
    b, of_b = encoded(BIAS, 32)
    tally = Tally()
    found = ACTIVATION.decode(fixed_linear(x, w, b, tally=tally))
    wanted = torch.nn.functional.linear(exact, of_w, of_b)
    # each of 32 products is cut by less than a unit
    assert ((wanted - found) >= 0).all()
    assert ((wanted - found) < 33 * 2.0**-22).all()
    g, of_g = encoded(NORM_WEIGHT, 32)
    normed = ACTIVATION.decode(fixed_layer_norm(x, g, b, tally=tally))
    wanted = torch.nn.functional.layer_norm(exact, (32,), of_g, of_b, 1e-6)
    assert_close(normed, wanted, rtol=0, atol=1e-4)
    attended = ACTIVATION.decode(fixed_attention(x, x, x, tally=tally))
    wanted = torch.nn.functional.scaled_dot_product_attention(exact, exact, exact)
    assert_close(attended, wanted, rtol=0, atol=1e-4)
    assert sum(tally.wrapped.values()) == 0
    assert set(tally.kept) == {"linear", "norm", "root", "scores", "softmax", "values"}


def test_a_layer_of_experts_is_near_its_own():
    torch.manual_seed(0)
    layer = Experts(16, 32, experts=4, tasks=2).double()
    x = ACTIVATION.encode(torch.randn(3, 7, 16))
    gates = [LINEAR_WEIGHT.encode(g) for g in layer.router.gates.detach()]
    w1, w2 = (LINEAR_WEIGHT.encode(w.detach()) for w in (layer.w1, layer.w2))
    b1, b2 = (BIAS.encode(b.detach()) for b in (layer.b1, layer.b2))
    for task, gate in enumerate(gates):
        index, weights = fixed_gate(x, gate)
        found = ACTIVATION.decode(fixed_experts(x, index, weights, w1, b1, w2, b2))
        wanted, routing = layer(ACTIVATION.decode(x), task, return_routing=True)
        assert torch.equal(index, routing.index)
        assert_close(found, wanted, rtol=0, atol=2e-3)


def test_what_wraps_is_counted():
    tally = Tally()
    large = ACTIVATION.encode(torch.full((1, 4), 400.0))
    assert ACTIVATION.decode(fixed_add(large, large, tally=tally)).tolist() == [[-224.0] * 4]
    assert (tally.kept["residual"], tally.wrapped["residual"]) == (4, 4)
    same = torch.zeros(2, 5, dtype=torch.int64)
    one, nothing = NORM_WEIGHT.encode(torch.ones(5)), torch.zeros(5, dtype=torch.int64)
    fixed_layer_norm(same, one, nothing, tally=tally)
    assert tally.wrapped["norm"] == 2  # 1 / sqrt(eps) is 1024
    fixed_layer_norm(same, one, nothing, eps=0, tally=tally)
    assert tally.wrapped["root"] == 2
    fixed_attention(same.new_zeros(600, 1), same.new_zeros(600, 1), same.new_zeros(600, 1))
    zeros = same.new_zeros(600, 1)
    fixed_attention(zeros, zeros, zeros, tally=tally)
    assert tally.wrapped["softmax"] == 600
    corrected = Tally()
    fixed_attention(zeros, zeros, zeros, corrected=True, tally=corrected)
    assert corrected.wrapped["softmax"] == 0


def test_shapes_and_numbers_that_do_not_fit():
    x, w = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x must have 5 in dimension -1, got \(2, 3\)"):
        fixed_linear(x, w)
    with pytest.raises(ValueError, match="bias must have 4"):
        fixed_linear(x.new_zeros(2, 5), w, x.new_zeros(3))
    with pytest.raises(ValueError, match="int64"):
        fixed_linear(x.new_zeros(2, 5), w + 2**15)
    with pytest.raises(ValueError, match="int64"):
        fixed_layer_norm(x + 2**31, x[0], x[0])
    with pytest.raises(ValueError, match="places must have 3 in dimension -2"):
        fixed_patches(x, x, x[:1, 0], x.new_zeros(2, 2))
    with pytest.raises(ValueError, match="1 to the 4 experts"):
        fixed_gate(x.new_zeros(2, 5), w, 5)
    with pytest.raises(ValueError, match=r"weight must be \(outputs, inputs\), got \(5,\)"):
        fixed_linear(x.new_zeros(2, 5), w[0])
    with pytest.raises(ValueError, match="key must have 3 in dimension -1"):
        fixed_attention(x, w, w)
    with pytest.raises(ValueError, match="value must have 2 in dimension -2"):
        fixed_attention(x, x, w)
    with pytest.raises(ValueError, match=r"a key to see, got \(0, 3\)"):
        fixed_attention(x, x[:0], x[:0])
    w1, w2 = x.new_zeros(2, 4, 3), x.new_zeros(2, 3, 4)
    with pytest.raises(ValueError, match="experts 0 to 1, or -1 for none, got 2 to 2"):
        fixed_experts(x, x[:, :1] + 2, x[:, :1], w1, None, w2, None)
    with pytest.raises(ValueError, match="are -2147483648 to 2147483647, got 0 to 2147483648"):
        ACTIVATION.decode(torch.tensor([0, 2**31]))
    with pytest.raises(ValueError, match="finite, got infinity or NaN"):
        ACTIVATION.encode(torch.tensor([0.0, torch.inf]))
