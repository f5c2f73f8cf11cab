"""Mixers as linear dynamical systems: the paper's table by hand, its lemmas, what has no form."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.testing import assert_close

from aftermax import (
    CATALOGUE,
    LSSAR,
    Attention,
    Entry,
    InLine,
    InLineAttention,
    Linear,
    Softmax,
    as_dynamical_system,
    dynamics,
)
from aftermax.dynamics import MLSTM, RGLRU, S6, SSD, QuasiLSTM
from aftermax.dynamics.systems import monomials
from aftermax.linear.elu import elu_plus_one
from aftermax.linear.separable import Separable, Separated, divided

from .dynamics_by_hand import F64, HEAD, LENGTH, TABLE, WIDTH, Plain, attend_with, made, normal

EXACT = {"rtol": 1e-12, "atol": 1e-12}


# ---- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name):
    make, by_hand, size = TABLE[name]
    module, x = made(make), normal(LENGTH, WIDTH, seed=3)
    form = as_dynamical_system(module, x, gauge="output" if name == "mLSTM" else "state")
    with torch.no_grad():
        decay, into, out_of, skip = by_hand(module, x)
        own = module(x[None])[0]
    assert form.state_dim == size * HEAD == decay.shape[1]
    got = form.dense()
    assert_close(got.Lambda[1:], decay[1:], **EXACT)  # the first meets h_0 = 0
    assert_close(got.B, into, **EXACT)
    assert_close(got.C, out_of, **EXACT)
    assert (got.D is None) is (skip is None)
    if skip is not None:
        assert_close(got.D, skip, **EXACT)

    # the recurrence by hand, and Phi as it is defined, from what is written by hand alone
    state, rows = torch.zeros(decay.shape[1], dtype=F64), []
    phi = torch.zeros(LENGTH, LENGTH, out_of.shape[1], WIDTH, dtype=F64)
    for i in range(LENGTH):
        state = decay[i] * state + into[i] @ x[i]
        rows.append(out_of[i] @ state + (0 if skip is None else skip[i] @ x[i]))
        for j in range(i + 1):
            phi[i, j] = out_of[i] * decay[j + 1 : i + 1].prod(0) @ into[j]
        phi[i, i] += 0 if skip is None else skip[i]
    rows = torch.stack(rows)
    assert_close(form.run(), rows, **EXACT)
    assert_close(form.phi(), phi, **EXACT)
    assert_close(torch.einsum("ijod,jd->io", form.phi(), x), rows, **EXACT)
    assert_close(rows if form.after is None else form.after(rows), own, **EXACT)
    assert form.check() < 1e-12
    assert form.truncation_error == 0


# ---- forms that come by themselves -------------------------------------------------------------


@dataclass(frozen=True)
class Stranger(Separable):
    """All that a system may do at once: decay, a learned divisor, a sum, values with a factor."""

    totals: ClassVar[bool] = True
    decays: ClassVar[bool] = True

    def learned(self, heads, key_dim, value_dim):
        return {"m": torch.full((heads,), 0.3)}

    def separate(self, query, key, value, places, scale, **learned):
        divisor = 1 + learned["m"].exp()[:, None] * places.count
        query = query.square() / divisor[..., None]
        rate = torch.linspace(0.1, 0.4, query.shape[1])
        factor = 1 / (1 + places.key.to(value))[:, None]
        return Separated(query, key.square(), value * factor, rate=rate, divisor=divisor)

    def finish(self, out, total, **learned):
        return divided(out, total, 0.01)


@dataclass(frozen=True)
class Gated(Plain):
    """What follows the sum is learned, and not linear."""

    def learned(self, heads, key_dim, value_dim):
        return {"gate": torch.ones(heads, value_dim)}

    def finish(self, out, total, **learned):
        return out * torch.sigmoid(learned["gate"][:, None] * out)


SEPARABLE = [e for e in CATALOGUE if isinstance(e.system, Separable)]
SYSTEMS = {e.name: e.system for e in SEPARABLE} | {
    "plain": Plain(),
    "stranger": Stranger(),
    "gated": Gated(),
}


@pytest.mark.parametrize("gauge", ["state", "output"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_linear_system_has_its_form(name, gauge):
    for options in (
        {"heads": 3, "head_dim": 2},
        {"heads": 4, "kv_heads": 2, "positions": "rope", "qk_norm": True, "scale": 0.7},
    ):
        module = attend_with(SYSTEMS[name], **options)
        form = as_dynamical_system(module, normal(1, LENGTH, WIDTH, seed=4), gauge=gauge)
        assert form.check() < 1e-12
        assert (form.after is not None) is (name.startswith("transnormer") or name == "gated")
        assert_close(torch.einsum("ijod,jd->io", form.phi(), form.u), form.run(), **EXACT)
        features, values = module.system.state_shape(module.head_dim, module.head_dim)
        assert form.state_dim == module.heads * features * (values - module.system.totals)


@pytest.mark.parametrize("make", [lambda: SSD(6, heads=3), lambda: MLSTM(6, heads=2)])
@pytest.mark.parametrize("gauge", ["state", "output"])
def test_mixers_of_several_heads(make, gauge):
    form = as_dynamical_system(made(make), normal(LENGTH, WIDTH), gauge=gauge)
    assert form.check() < 1e-12


MODULES = {name: lambda s=system: attend_with(s, heads=2) for name, system in SYSTEMS.items()} | {
    name: make for name, (make, *_) in TABLE.items() if not isinstance(make(), Attention)
}
HISTORY = {"linear", "cosformer", "inline", "stranger", "mLSTM"}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("gauge", ["state", "output"])
def test_context_tells_what_the_coefficients_depend_on(name, gauge):
    module, x = made(MODULES[name]), normal(LENGTH, WIDTH, seed=5)
    other = x.clone()
    other[1] = normal(WIDTH, seed=6)
    form, changed = (as_dynamical_system(module, y, gauge=gauge) for y in (x, other))
    assert form.context == ("history" if name in HISTORY else "step")
    same = all(
        # Lambda_2 has the normaliser of token 1 in it
        torch.allclose(a[3:], b[3:], rtol=1e-12, atol=0)
        for a, b in zip(form.dense()[:3], changed.dense()[:3], strict=True)
    )
    assert same is (form.context == "step")


def test_other_inputs_meet_the_same_coefficients():
    form = as_dynamical_system(attend_with(Linear()), normal(LENGTH, WIDTH))
    u, v = normal(LENGTH, WIDTH, seed=7), normal(LENGTH, WIDTH, seed=8)
    assert_close(torch.einsum("ijod,jd->io", form.phi(), u), form.run(u), **EXACT)
    assert_close(form.run(u - 2 * v), form.run(u) - 2 * form.run(v), **EXACT)
    with pytest.raises(ValueError, match=r"u must be \(L, d\) = \(7, 6\)"):
        form.run(u[:3])


def test_no_token_comes_from_the_future():
    phi = as_dynamical_system(attend_with(InLine()), normal(LENGTH, WIDTH)).phi()
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    assert (phi[later] == 0).all()
    assert (phi[~later] != 0).any((-2, -1)).all()


@pytest.mark.parametrize("name", MODULES)
def test_the_form_stays_as_it_is_when_the_module_learns(name):
    module, x = made(MODULES[name]), normal(LENGTH, WIDTH)
    form = as_dynamical_system(module, x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
        x.add_(1)
    assert form.check() < 1e-12
    assert not form.run().requires_grad


def test_float32():
    form = as_dynamical_system(attend_with(Linear()).float(), normal(LENGTH, WIDTH).float())
    assert form.run().dtype == form.phi().dtype == torch.float32
    assert form.check() < 1e-5


def test_check_raises_where_the_form_is_off():
    form = as_dynamical_system(attend_with(Linear()), normal(LENGTH, WIDTH))
    off = dataclasses.replace(form, own=form.own + 0.01)
    with pytest.raises(AssertionError, match=r"off its mixer's own output by 0\.0"):
        off.check()
    assert off.check(tolerance=0.5) > 1e-3
    with pytest.raises(AssertionError, match="by nan"):
        dataclasses.replace(form, own=form.own * math.nan).check()


# ---- softmax -----------------------------------------------------------------------------------


def test_the_error_of_cut_softmax_falls_and_its_state_grows():
    module, x = attend_with(Softmax(), heads=1, head_dim=5), normal(12, WIDTH, seed=9)
    forms = [as_dynamical_system(module, x, taylor_degree=p) for p in range(9)]
    sizes = [form.state_dim / 5 for form in forms]
    assert sizes == [math.comb(5 + p, p) for p in range(9)]
    assert sizes[1:5] == [6, 21, 56, 126]
    assert sizes[6] == 462
    errors = [form.truncation_error for form in forms]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[8] < 1e-6
    for form in forms:
        assert form.check() < 1e-12  # against the truncated attention
        difference = form.run() - module(x[None])[0]
        measured = difference.norm() / module(x[None]).norm()
        assert form.truncation_error == pytest.approx(measured.item(), rel=1e-9)
        assert form.context == "history"


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("gauge", ["state", "output"])
def test_cut_softmax_by_hand(degree, gauge):
    options = {"heads": 2, "kv_heads": 1, "head_dim": 2, "positions": "rope", "scale": 0.2}
    module, x = attend_with(Softmax(), **options), normal(LENGTH, WIDTH, seed=10)
    form = as_dynamical_system(module, x, taylor_degree=degree, gauge=gauge)
    with torch.no_grad():
        query, key, value = module.project(x[None], 0)
        scores = 0.2 * query @ key.mT
        weights = (1 + scores + (scores**2 / 2 if degree == 2 else 0)).tril()
        weights = (weights / weights.sum(-1, keepdim=True))[0]
        expected = module.to_out((weights @ value[0]).transpose(0, 1).flatten(1))
    assert_close(form.run(), expected, **EXACT)
    w_value = module.to_value.weight.detach()
    w_out = module.to_out.weight.detach().unflatten(1, (2, 2))
    phi = torch.einsum("hij,ohv,vd->ijod", weights, w_out, w_value)
    assert_close(form.phi(), phi, **EXACT)


def test_monomials_multiply_to_the_series():
    x, y = normal(3, 4), normal(3, 4, seed=1)
    for degree in range(6):
        s = (x * y).sum(-1)
        series = sum(s**r / math.factorial(r) for r in range(degree + 1))
        assert_close((monomials(x, degree) * monomials(y, degree)).sum(-1), series, **EXACT)


@pytest.mark.parametrize("gauge", ["state", "output"])
def test_softmax_with_a_place_for_each_token_is_exact(gauge):
    module = attend_with(Softmax(), heads=4, kv_heads=2, positions="rope")
    form = as_dynamical_system(module, normal(LENGTH, WIDTH), exact_horizon=True, gauge=gauge)
    assert form.state_dim == 4 * LENGTH * HEAD
    assert form.truncation_error == 0
    assert form.check() < 1e-12
    assert form.context == "history"


def test_a_normaliser_that_a_state_cannot_be_divided_by():
    module, x = attend_with(Softmax()), normal(LENGTH, WIDTH, scale=150.0)
    assert as_dynamical_system(module, x, exact_horizon=True, gauge="output").check() < 1e-12
    with pytest.raises(ValueError, match=r"normaliser is 0 or not finite.*take gauge='output'"):
        as_dynamical_system(module, x, exact_horizon=True)


# ---- the lemmas --------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [32, 128, 512])
def test_softmax_has_features_without_end(points):
    """Lemma 1: no finite features give exp(q . k); elu + 1 has as many as the head is wide.

    exp(q . k) is exp(-|q - k|^2 / 2) with rows and columns multiplied: of one rank, which rounding
    hides in the first (512 points: about 500 of it).
    """
    x = normal(points, 5)

    def rank(gram):
        return torch.linalg.matrix_rank(gram, rtol=1e-10).item()

    assert rank(torch.exp(-(x[:, None] - x).square().sum(-1) / 2)) == points
    assert rank(elu_plus_one(x) @ elu_plus_one(x).T) == 5
    assert rank(monomials(x, 2) @ monomials(x, 2).T) == min(points, math.comb(7, 2))


def test_a_larger_state_can_do_what_a_smaller_one_does():
    """Lemma 2: features that nothing is written to change nothing."""
    form = as_dynamical_system(attend_with(Linear()), normal(LENGTH, WIDTH))
    extra = normal(LENGTH, 1, 3, seed=11)

    def padded(factors, by):
        return factors._replace(features=torch.cat([factors.features, by], -1))

    larger = dataclasses.replace(
        form,
        Lambda=torch.cat([form.Lambda.expand(-1, -1, HEAD, -1), extra[..., None]], 2),
        B=padded(form.B, torch.zeros_like(extra)),
        C=padded(form.C, extra),
    )
    assert larger.state_dim == form.state_dim + 3 * HEAD
    assert_close(larger.phi(), form.phi(), **EXACT)
    assert larger.check() < 1e-12


@pytest.mark.parametrize("name", ["linear", "normalised", "cottention", "cosformer"])
def test_only_phi_is_free_of_the_gauge(name):
    """Lemma 3: eta in Lambda and B or in C is one map; Lambda above 1 is no growth."""
    module, x = attend_with(SYSTEMS[name]), normal(LENGTH, WIDTH, seed=12, scale=3.0)
    state, output = (as_dynamical_system(module, x, gauge=g) for g in ("state", "output"))
    assert_close(state.phi(), output.phi(), **EXACT)
    assert (output.Lambda == 1).all()
    if name == "cottention":  # its normaliser only grows
        assert (state.Lambda[1:] < 1).all()
    else:
        assert state.Lambda.max() > 1.5
        assert state.Lambda[1:].min() < 0.7

    # any other change of coordinates, h -> T_i h
    change = normal(LENGTH, 1, state.B.features.shape[-1], seed=13).exp()
    before = torch.cat([torch.ones_like(change[:1]), change[:-1]])
    moved = dataclasses.replace(
        state,
        Lambda=state.Lambda * (change / before)[..., None],
        B=state.B._replace(features=state.B.features * change),
        C=state.C._replace(features=state.C.features / change),
    )
    assert_close(moved.phi(), state.phi(), **EXACT)
    assert moved.check() < 1e-12


def test_the_decay_of_s6_is_a_reversed_sigmoid():
    """Lemma 4: exp(-a softplus(x)) = sigmoid(-x)^a."""
    module, x = made(lambda: S6(WIDTH, state=3)), normal(LENGTH, WIDTH)
    form = as_dynamical_system(module, x)
    with torch.no_grad():
        reversed_sigmoid = torch.sigmoid(-module.to_delta(x))[:, None]  # (L, 1, width)
        expected = reversed_sigmoid ** module.log_minus_a.mT.exp()
    assert_close(form.Lambda[:, 0], expected, **EXACT)
    # and with it comes the coupling of what is forgotten and what is written
    delta = -torch.log(form.Lambda[:, 0, :1]) / module.log_minus_a.mT.exp()[:1]
    assert_close(form.B.gate, delta.detach(), **EXACT)


def test_s6_that_forgets_nothing_is_linear_attention():
    """Lemma 5, with A = 0 and Delta = 1, for values that are the inputs."""
    module = made(lambda: S6(HEAD, state=HEAD))
    attention = Attention(HEAD, 1, weights=Plain(), positions="none").double()
    with torch.no_grad():
        module.log_minus_a.fill_(-math.inf)
        module.to_delta[0].weight.zero_()
        module.to_delta[1].bias.fill_(math.log(math.e - 1))
        module.skip.zero_()
        attention.to_key.weight.copy_(module.to_b.weight)
        attention.to_query.weight.copy_(module.to_c.weight)
        for layer in (attention.to_value, attention.to_out):
            layer.weight.copy_(torch.eye(HEAD))
    x = normal(LENGTH, HEAD)
    assert_close(module(x[None]), attention(x[None]), **EXACT)
    forms = [as_dynamical_system(m, x) for m in (module, attention)]
    assert (forms[0].Lambda == 1).all()
    for ours, theirs in zip(forms[0].dense()[:3], forms[1].dense()[:3], strict=True):
        assert_close(ours, theirs, **EXACT)


def test_the_reversed_gate_of_the_quasi_lstm():
    module, x = made(lambda: QuasiLSTM(WIDTH, reversed_sigmoid=True)), normal(LENGTH, WIDTH)
    assert QuasiLSTM(WIDTH, reversed_sigmoid=True).alpha == 1
    assert QuasiLSTM(WIDTH).alpha is None
    with torch.no_grad():
        module.alpha.fill_(-1)  # rectified: nothing is forgotten
    assert (as_dynamical_system(module, x).Lambda == 1).all()


def test_steps_and_decays_start_as_their_authors_have_them():
    with torch.no_grad():
        for module in (S6(256), SSD(256, heads=256)):
            bias = module.to_delta[1].bias if isinstance(module, S6) else module.to_delta.bias
            steps = torch.nn.functional.softplus(bias)
            assert (steps > 0.99e-3).all()
            assert (steps < 0.101).all()
        assert_close(S6(2, state=4).log_minus_a.exp()[0], torch.arange(1.0, 5.0))
        slowest = RGLRU(256).logit.sigmoid() ** 8
    assert (slowest > 0.899).all()
    assert (slowest < 0.9991).all()


# ---- what has no form --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [e for e in CATALOGUE if e not in SEPARABLE and e.name != "softmax"],
    ids=lambda e: e.name,
)
def test_row_maps_have_no_form(entry: Entry):
    with pytest.raises(ValueError, match=r"only Softmax\(\) has a form|no causal form|no known"):
        as_dynamical_system(
            attend_with(entry.system, causal=entry.causal), normal(LENGTH, WIDTH), taylor_degree=2
        )


class Whole(Plain):
    """A system that sees all tokens or nothing."""


class Turning(Plain):
    def separate(self, query, key, value, places, scale, **learned):
        return Separated(query, key, value.roll(1, -1))


REFUSED = {
    "causal=False sees later tokens": lambda: attend_with(Linear(), causal=False),
    "window=3 forgets a token": lambda: attend_with(Linear(), window=3),
    "ALiBi adds to the scores": lambda: attend_with(Linear(), positions="alibi"),
    "bias=True makes values affine": lambda: attend_with(Linear(), bias=True),
    "features without end: give either": lambda: attend_with(Softmax()),
    "takes an aftermax.Attention.*got InLineAttention": lambda: InLineAttention(
        WIDTH, 2, causal=True
    ).double(),
    "takes an aftermax.Attention.*got Linear": Linear,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason):
    with pytest.raises(ValueError, match=reason):
        as_dynamical_system(REFUSED[reason](), normal(LENGTH, WIDTH))


def test_systems_without_a_causal_form_are_refused(monkeypatch):
    entry = dataclasses.replace(SEPARABLE[0], name="whole", system=Whole(), causal=False)
    monkeypatch.setattr(dynamics.systems, "CATALOGUE", (*CATALOGUE, entry))
    with pytest.raises(ValueError, match="Whole has no causal form"):
        as_dynamical_system(attend_with(Whole()), normal(LENGTH, WIDTH))


def test_values_that_are_turned_are_refused():
    with pytest.raises(ValueError, match="Turning does more to a value than multiply it"):
        as_dynamical_system(attend_with(Turning()), normal(LENGTH, WIDTH))


def test_options_that_do_not_belong_are_refused():
    x = normal(LENGTH, WIDTH)
    for module in (attend_with(Linear()), made(lambda: RGLRU(WIDTH))):
        for options in ({"taylor_degree": 2}, {"exact_horizon": True}):
            with pytest.raises(ValueError, match=r"are for softmax: .* has a finite state"):
                as_dynamical_system(module, x, **options)
    softmax = attend_with(Softmax())
    with pytest.raises(ValueError, match="give either taylor_degree=p"):
        as_dynamical_system(softmax, x, taylor_degree=2, exact_horizon=True)
    with pytest.raises(ValueError, match="taylor_degree must be at least 0, got -1"):
        as_dynamical_system(softmax, x, taylor_degree=-1)
    with pytest.raises(ValueError, match="gauge must be 'state' or 'output', got 'input'"):
        as_dynamical_system(softmax, x, gauge="input")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got LSSAR\(power=15\), whose weights"):
        as_dynamical_system(attend_with(LSSAR()), x, exact_horizon=True)


def test_inputs_that_do_not_fit_are_refused():
    module = attend_with(Linear())
    for shape in ((2, LENGTH, WIDTH), (WIDTH,), (0, WIDTH)):
        with pytest.raises(ValueError, match="x must be one sequence"):
            as_dynamical_system(module, normal(*shape))
    with pytest.raises(ValueError, match=r"expected \(B, T, 6\), got \(1, 7, 5\)"):
        as_dynamical_system(module, normal(LENGTH, 5))
    for mixer in (S6(4), SSD(4), QuasiLSTM(4), RGLRU(4), MLSTM(4)):
        with pytest.raises(ValueError, match=r"expected \(B, T, 4\), got \(1, 7, 5\)"):
            mixer(torch.zeros(1, 7, 5))
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.float32"):
        as_dynamical_system(module, torch.zeros(LENGTH, WIDTH))
    for wrong in (lambda: SSD(6, heads=4), lambda: MLSTM(6, heads=4)):
        with pytest.raises(ValueError, match="width 6 is not divisible by 4 heads"):
            wrong()
