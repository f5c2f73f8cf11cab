"""The Mamba block: its formula spelt out, its scan in every form, its state, its padding."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax.dynamics import S6
from aftermax.hybrid import mamba
from aftermax.hybrid.mamba import MambaHeads, MambaState, selective_scan

from .cases import EXACT, F64


def parts(batch=2, tokens=37, channels=3, states=4, seed=0):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=F64)

    return (
        normal(batch, tokens, channels),
        normal(batch, tokens, channels).exp() / 4,
        -normal(channels, states).exp(),
        normal(batch, tokens, states),
        normal(batch, tokens, states),
        normal(batch, channels, states),
    )


def block(width=6, heads=2, head_dim=4, seed=0, **options):
    torch.manual_seed(seed)
    made = MambaHeads(width, heads, head_dim, dtype=F64, **options)
    with torch.no_grad():  # off the initial values that may hide a factor
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def by_hand(m: MambaHeads, x: torch.Tensor) -> torch.Tensor:
    """One sequence (T, width) -> (T, heads head_dim), number by number."""
    inner = m.to_in.weight @ x.T  # (2 C, T)
    u_raw, z = inner[: m.channels].T, inner[m.channels :].T
    state = torch.zeros(m.channels, m.states, dtype=F64)
    out = []
    for t in range(len(x)):
        u = torch.zeros(m.channels, dtype=F64)
        for c in range(m.channels):
            total = m.taps_bias[c]
            for k in range(m.conv):
                past = t - (m.conv - 1) + k
                total = total + (m.taps[c, k] * u_raw[past, c] if past >= 0 else 0)
            u[c] = total / (1 + torch.exp(-total))
        r, b, c_t = (m.to_parts.weight @ u).split([m.rank, m.states, m.states])
        delta = torch.log(1 + torch.exp(m.to_delta.weight @ r + m.to_delta.bias))
        for c in range(m.channels):
            a = -torch.exp(m.log_minus_a[c])
            state[c] = torch.exp(delta[c] * a) * state[c] + delta[c] * u[c] * b
        y = state @ c_t + m.skip * u
        out.append(m.to_out.weight @ (y * z[t] / (1 + torch.exp(-z[t]))))
    return torch.stack(out)


@torch.no_grad()
def test_it_is_the_formula_written_out_number_by_number():
    m, x = block(expand=2), torch.randn(2, 9, 6, dtype=F64)
    out = m(x).transpose(1, 2).flatten(-2)
    for b in range(2):
        assert_close(out[b], by_hand(m, x[b]), **EXACT)


@torch.no_grad()
def test_the_scan_is_the_mixer_of_the_dynamics():
    torch.manual_seed(0)
    s6, x = S6(4, state=3).double(), torch.randn(2, 11, 4, dtype=F64)
    a = -s6.log_minus_a.exp()
    y, _ = selective_scan(
        x, s6.step_sizes(x), a, s6.to_b(x), s6.to_c(x), torch.zeros(2, 4, 3, dtype=F64)
    )
    assert_close(y + s6.skip * x, s6(x), **EXACT)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 50])
def test_the_chunked_scan_is_the_loop_with_its_gradients(tokens):
    found = []
    for form in ("chunked", "recurrent"):
        leaves = [x.requires_grad_() for x in parts(tokens=tokens)]
        y, state = selective_scan(*leaves, form=form)
        random = torch.Generator().manual_seed(1)
        loss = (y * torch.randn(y.shape, generator=random, dtype=F64)).sum()
        loss = loss + (state * torch.randn(state.shape, generator=random, dtype=F64)).sum()
        found.append((y, state, torch.autograd.grad(loss, leaves)))
    assert_close(found[0], found[1], **EXACT)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(mamba, "CHUNK", 3)
    leaves = [x.requires_grad_() for x in parts(batch=1, tokens=7, channels=2, states=2)]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, form="chunked"), leaves)


def test_float32_errs_by_its_rounding_over_a_long_scan():
    exact, _ = selective_scan(*parts(tokens=500))
    y, _ = selective_scan(*(x.float() for x in parts(tokens=500)))
    assert ((y.double() - exact).abs().max() / exact.abs().max()) < 1e-5


def test_a_large_step_forgets_all_and_overflows_nowhere():
    u, delta, a, b, c, state = parts(tokens=20)
    y, last = selective_scan(u, delta * 1e6, a, b, c, state)
    assert y.isfinite().all()
    assert_close(last, (delta[:, -1] * 1e6 * u[:, -1])[..., None] * b[:, -1, None], **EXACT)


@given(cuts=st.lists(st.integers(1, 19), unique=True).map(sorted))
def test_piece_by_piece_equals_the_whole(cuts):
    m, x = block(), torch.randn(2, 20, 6, dtype=F64, generator=torch.Generator().manual_seed(3))
    whole, state, out = m(x), m.init_state(2), []
    for start, stop in zip([0, *cuts], [*cuts, 20], strict=True):
        piece, state = m.step(x[:, start:stop], state)
        out.append(piece)
    assert_close(torch.cat(out, 2), whole, **EXACT)
    assert state.length == 20


@given(
    left=st.integers(0, 6),
    hole=st.booleans(),
    cut=st.integers(1, 11),
    flaw=st.sampled_from([9.0, math.nan]),
)
def test_padding_counts_for_nothing_whatever_it_holds(left, hole, cut, flaw):
    m, x = block(), torch.randn(2, 12, 6, dtype=F64, generator=torch.Generator().manual_seed(3))
    seen = torch.ones(2, 12, dtype=torch.bool)
    seen[0, :left], seen[1, 7] = False, not hole
    whole = m(x, seen)
    assert_close(whole[:1, :, left:], m(x[:1, left:]), **EXACT)
    flawed = x.masked_fill(~seen[..., None], flaw)
    first, state = m.step(flawed[:, :cut], m.init_state(2), seen[:, :cut])
    rest, _ = m.step(flawed[:, cut:], state, seen[:, cut:])
    assert_close(torch.cat([first, rest], 2), whole, **EXACT)


def test_no_tokens_change_nothing():
    m = block()
    _, state = m.step(torch.randn(2, 3, 6, dtype=F64), m.init_state(2))
    out, same = m.step(torch.zeros(2, 0, 6, dtype=F64), state)
    assert out.shape == (2, 2, 0, 4)
    assert same is state


def test_later_tokens_change_nothing_before_them():
    m, x = block(), torch.randn(1, 12, 6, dtype=F64)
    other = x.clone()
    other[:, 8:] = torch.nan
    assert_close(m(other)[:, :, :8], m(x)[:, :, :8], rtol=0, atol=0)


def test_a_state_is_a_value_in_float32_that_beams_can_pick_from():
    m = block().to(torch.bfloat16)
    x = torch.randn(3, 5, 6).to(torch.bfloat16)
    _, state = m.step(x, m.init_state(3))
    assert state.sums.dtype == torch.float32
    assert state.bytes == 3 * 8 * (16 * 4 + 3 * 2)
    before = state.sums.clone()
    m.step(x, state)
    assert torch.equal(state.sums, before)
    picked = state.reorder(torch.tensor([2, 0, 0, 1]))
    assert isinstance(picked, MambaState)
    assert torch.equal(picked.sums, state.sums[[2, 0, 0, 1]])
    assert torch.equal(picked.recent, state.recent[[2, 0, 0, 1]])
    assert not m.can_truncate
    assert not m.can_merge


def test_it_starts_from_the_values_of_the_heads():
    m, weight = MambaHeads(6, 2, 4), torch.randn(8, 6)
    m.start_from_values(weight)
    assert torch.equal(m.to_in.weight[:8], weight)
    assert torch.equal(m.to_out.weight, torch.eye(8))
    with pytest.raises(ValueError, match="expand is 2"):
        MambaHeads(6, 2, 4, expand=2).start_from_values(weight)


def test_initial_steps_and_decays_are_the_authors():
    m = MambaHeads(6, 8, 16)
    delta = torch.nn.functional.softplus(m.to_delta.bias)
    assert (delta >= 0.9999e-3).all()
    assert (delta <= 0.10001).all()
    assert_close(-m.log_minus_a.exp()[0], -torch.arange(1.0, 17))
    assert m.rank == 8


def test_errors_say_what_was_asked():
    u, delta, a, b, c, state = parts()
    with pytest.raises(ValueError, match=r"b and c \(B, T, N\).*\(2, 37, 3\), \(2, 36, 3\)"):
        selective_scan(u, delta[:, 1:], a, b, c, state)
    with pytest.raises(ValueError, match="form must be 'chunked' or 'recurrent', got 'fast'"):
        selective_scan(u, delta, a, b, c, state, form="fast")
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        MambaHeads(6, 0, 4)
    with pytest.raises(ValueError, match=r"expected \(B, T, 6\), got \(2, 3, 5\)"):
        block()(torch.zeros(2, 3, 5, dtype=F64))
    with pytest.raises(ValueError, match="batch of 1, the input of 2"):
        block().step(torch.zeros(2, 3, 6, dtype=F64), block().init_state(1))
