"""Mixtures of experts: their formula, derivatives, fits, and the distances of the task of rates."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax.lab import rates_mixture
from aftermax.lab.rates_fit import Anchor, fit
from aftermax.lab.rates_losses import (
    Minimisers,
    Population,
    distance,
    expert_gaps,
    found,
    gaugeless,
    matched,
    nearest,
    quadrature,
    search,
    shares,
    to_truth,
    voronoi,
)
from aftermax.lab.rates_mixture import EXPERTS, OFFSET, Mixture

EVERY = [
    Mixture(gate, expert, dim, partial)
    for gate, expert, dim, partial in itertools.product(
        ("softmax", "sigmoid"), EXPERTS, (1, 2), (False, True)
    )
]
every = pytest.mark.parametrize(
    "mixture", EVERY, ids=lambda m: f"{m.gate}-{m.expert}-{m.dim}{'-partial' * m.partial}"
)
OWN = [m for m in EVERY if m.dim == 2 and not m.partial]
own = pytest.mark.parametrize("mixture", OWN, ids=lambda m: f"{m.gate}-{m.expert}")


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


# the formula


def by_hand(mixture: Mixture, atoms: list[list[float]], x: list[float]) -> float:
    scores, experts = [], []
    for atom in atoms:
        numbers, d = iter(atom), mixture.dim
        score = sum(next(numbers) * x[i] * x[j] for i in range(d) for j in range(i, d))
        if not mixture.partial:
            score += sum(next(numbers) * x[i] for i in range(d))
        scores.append(score + next(numbers))
        u = sum(next(numbers) * x[i] for i in range(d)) + next(numbers)
        value = {"linear": u, "polynomial": u * u, "tanh": math.tanh(u), "offset": 3 + math.tanh(u)}
        experts.append(value[mixture.expert])
        assert not list(numbers)
    if mixture.gate == "softmax":
        total = sum(math.exp(s) for s in scores)
        gates = [math.exp(s) / total for s in scores]
    else:
        gates = [1 / (1 + math.exp(-s)) for s in scores]
    return sum(g * h for g, h in zip(gates, experts, strict=True))


@every
def test_a_mixture_is_its_formula(mixture):
    atoms, x = draw(3, mixture.size), uniform(5, mixture.dim)
    naive = [by_hand(mixture, atoms.tolist(), row) for row in x.tolist()]
    assert_close(mixture(atoms, x), torch.tensor(naive, dtype=torch.float64))


@every
def test_the_jacobian_is_that_of_autograd(mixture):
    atoms, x = draw(2, 3, mixture.size), uniform(7, mixture.dim)
    f, j = mixture.jacobian(atoms, x)
    assert_close(f, mixture(atoms, x))
    for b in range(2):
        exact = torch.func.jacrev(lambda a: mixture(a, x))(atoms[b]).flatten(1).T
        assert_close(j[b], exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_over_samples_are_those_of_the_jacobian_however_they_are_cut(weighted, monkeypatch):
    mixture = Mixture("sigmoid", "tanh", 2)
    atoms, x, y = draw(4, 2, mixture.size), uniform(300, 2), draw(300)
    weight = uniform(300).abs() if weighted else None
    w = torch.full((300,), 1 / 300, dtype=torch.float64) if weight is None else weight
    f, j = mixture.jacobian(atoms, x)
    for numbers in (2**18, 1):
        monkeypatch.setattr(rates_mixture, "CHUNK_NUMBERS", numbers)
        loss, gradient, gram = mixture.normal(atoms, x, y, weight)
        assert_close(loss, ((f - y).square() * w).sum(-1))
        assert_close(gradient, torch.einsum("bpn,bn->bp", j, (f - y) * w))
        assert_close(gram, torch.einsum("bpn,n,bqn->bpq", j, w, j))


def test_an_offset_is_a_softmax_s_own_constant_and_no_sigmoid_s():
    x = uniform(9, 2)
    for gate, same in (("softmax", True), ("sigmoid", False)):
        plain, offset = (Mixture(gate, expert, 2) for expert in ("tanh", "offset"))
        atoms = draw(3, plain.size)
        gap = offset(atoms, x) - plain(atoms, x) - OFFSET
        assert bool((gap.abs() < 1e-12).all()) is same


# least squares


@own
def test_without_noise_the_truth_is_found_again(mixture):
    """Of as many atoms as there are: where a softmax sees no difference, up to that."""
    truth, x = draw(2, mixture.size, seed=3, scale=0.7), uniform(400, 2)
    start = truth + 0.1 * draw(4, 2, mixture.size, seed=1)
    done = fit(mixture, start, x, mixture(truth, x), steps=300, tolerance=1e-14)
    assert done.loss.max() < 1e-20
    again = matched(mixture, done.atoms, truth[None], torch.ones(mixture.size).double())[:, 0]
    assert distance(mixture, done.atoms, again).max() < 1e-6


@given(seed=st.integers(0, 10_000), case=st.sampled_from(OWN), box=st.floats(0.3, 3))
def test_no_fit_ends_above_its_start_or_out_of_its_box(seed, case, box):
    x, y = uniform(60, 2, seed=seed), draw(60, seed=seed + 1)
    start = box * uniform(3, 3, case.size, seed=seed + 2)
    done = fit(case, start, x, y, box=box, steps=12)
    before = (case(start, x) - y).square().mean(-1)
    assert (done.loss <= before).all()
    assert_close(done.loss, (case(done.atoms, x) - y).square().mean(-1))
    assert done.atoms.abs().max() <= box


def test_at_its_end_the_gradient_points_out_of_the_box_or_is_none():
    mixture = Mixture("sigmoid", "tanh")
    x = uniform(200, 1)
    y = 0.9 * (2 * x[:, 0]).tanh() - 0.3 * x[:, 0].square() + 0.1 * draw(200)
    done = fit(mixture, draw(6, 2, mixture.size), x, y, box=1.0, steps=500, tolerance=1e-14)
    best = done.loss.argmin()
    assert done.converged[best]
    gradient = mixture.normal(done.atoms[best][None], x, y).gradient[0]
    flat = done.atoms[best].flatten()
    held = flat.abs() == 1.0
    assert 0 < held.sum() < len(flat)
    assert (gradient[held] * flat[held] < 0).all()  # lower outside
    assert gradient[~held].abs().max() < 1e-5


def test_a_start_s_fit_is_its_own_whatever_stands_beside_it():
    mixture = Mixture("softmax", "tanh", 2)
    x, y, start = uniform(100, 2), draw(100), draw(5, 2, mixture.size)
    together = fit(mixture, start, x, y, steps=30)
    for b in range(5):
        alone = fit(mixture, start[b : b + 1], x, y, steps=30)
        assert_close(alone.loss[0], together.loss[b])


def test_an_anchor_is_a_ridge_around_it():
    mixture = Mixture("sigmoid", "tanh")
    x, y = uniform(80, 1), draw(80)
    at = draw(1, 2, mixture.size, scale=0.5)
    metric = torch.tensor([1.0, 1, 1, 4, 4], dtype=torch.float64)
    done = fit(mixture, at, x, y, steps=300, tolerance=1e-15, anchor=Anchor(at, metric, 0.1))
    free = done.atoms.clone().requires_grad_()
    loss = (mixture(free, x) - y).square().mean() + 0.1 * (metric * (free - at).square()).sum()
    loss.backward()
    assert free.grad is not None
    assert free.grad.abs().max() < 1e-6
    assert_close(done.loss, (mixture(done.atoms, x) - y).square().mean(-1))


# distances


def test_quadrature_knows_the_moments():
    for dim in (1, 2):
        x, weight = quadrature(dim)
        assert_close(weight.sum(), torch.tensor(1.0, dtype=torch.float64))
        for power in (2, 4, 10):
            exact = torch.full((dim,), 1 / (power + 1), dtype=torch.float64)
            assert_close((x**power * weight[:, None]).sum(0), exact)


@own
def test_finer_quadrature_says_the_same(mixture):
    atoms = 1.5 * uniform(20, 3, mixture.size)
    truth = 1.2 * uniform(2, mixture.size, seed=1)
    errors = []
    for count in (None, 40):
        x, weight = quadrature(2, count)
        population = Population(x, weight, mixture(truth, x))
        errors.append(population.misfit(mixture, atoms).sqrt())
    assert_close(errors[0], errors[1], rtol=0, atol=2e-7)


@own
def test_what_is_matched_is_the_same_function_in_another_order(mixture):
    """Up to order, up to the sign of an even expert, and up to a softmax's common score."""
    atoms = draw(4, 3, mixture.size)
    turned = atoms[:, [2, 0, 1]].clone()
    if mixture.g.even:
        turned[:, 1, mixture.scores :] *= -1
    if mixture.gate == "softmax":
        turned[..., : mixture.scores] += draw(mixture.scores)
    metric = torch.ones(mixture.size, dtype=torch.float64)
    for b in range(4):
        near = matched(mixture, atoms[b : b + 1], turned, metric, 2)
        assert near.shape == (1, 2, 3, mixture.size)
        assert distance(mixture, atoms[b : b + 1], near[:, 0]) < 1e-12
        assert distance(mixture, atoms[b : b + 1], near[:, 1]) > 1e-3
        x = uniform(8, 2)
        assert_close(mixture(near[0, 0], x), mixture(atoms[b], x))
        assert_close(mixture(gaugeless(mixture, atoms[b]), x), mixture(atoms[b], x))


@own
def test_at_the_truth_with_an_atom_split_every_distance_is_nothing(mixture):
    truth = draw(2, mixture.size)
    split = truth[[0, 1, 1]].clone()
    c = mixture.scores - 1
    if mixture.gate == "softmax":
        split[1:, c] -= math.log(2)
    else:
        split[1:, c] = torch.logit(truth[1, c].sigmoid() / 2)
    atoms = split[None]
    x, weight = quadrature(2)
    share = shares(mixture, atoms, Population(x, weight, mixture(truth, x)))
    assert_close(share.sum(-1), torch.ones(1, dtype=torch.float64))
    for value in (
        voronoi(mixture, atoms, truth),
        to_truth(mixture, atoms, truth, share),
        found(mixture, atoms, truth),
    ):
        assert value.abs().max() < 1e-12


def test_the_voronoi_loss_is_of_order_one_where_an_atom_is_fitted_by_one_and_two_where_split():
    mixture = Mixture("sigmoid", "tanh")
    truth = torch.tensor([[0.0, 0, 0, 1, 0], [0.0, 0, 0, -1, 0]], dtype=torch.float64)
    c = math.log((1 / 4) / (3 / 4))  # half of sigmoid(0)
    for step in (0.1, 0.01):
        single = truth.clone()
        single[0, 3] += step
        assert float(voronoi(mixture, single[None], truth)) == pytest.approx(step / 2)
        split = truth[[0, 0, 1]].clone()
        split[:2, 2] = c
        split[0, 3] += step
        split[1, 3] -= step
        assert float(voronoi(mixture, split[None], truth)) == pytest.approx(step**2 / 2)


def test_an_expert_that_is_even_has_two_signs_and_one_distance():
    mixture = Mixture("sigmoid", "polynomial")
    a = torch.tensor([[[0.0, 0, 0, 1, 0.5]]], dtype=torch.float64)
    b = a * torch.tensor([1.0, 1, 1, -1, -1], dtype=torch.float64)
    assert float(expert_gaps(mixture, a, b)) == 0
    other = Mixture("sigmoid", "tanh")
    assert float(expert_gaps(other, a, b)) == pytest.approx(2 * math.sqrt(1.25))


# minimisers


def population_of(mixture: Mixture, truth: torch.Tensor) -> Population:
    x, weight = quadrature(mixture.dim)
    return Population(x, weight, mixture(truth, x))


def test_a_search_keeps_what_is_least_once():
    """As many atoms as there are, and a sigmoid: the truth alone, whatever the order."""
    mixture = Mixture("sigmoid", "offset")
    truth = torch.tensor([[1.0, -1, 0.3, 1, 0.4], [-1.0, 1, -0.2, -1, 0.8]], dtype=torch.float64)
    population = population_of(mixture, truth)
    start = torch.cat([truth, truth.flip(0), truth + 0.05]).view(3, 2, 5)
    best = search(mixture, population, start, 1.5)
    assert best.misfit < 1e-20
    assert best.share == 1
    assert len(best.atoms) == 1
    metric = torch.ones(5, dtype=torch.float64)
    near = matched(mixture, best.atoms, truth[None], metric)[:, 0]
    assert distance(mixture, best.atoms, near) < 1e-3


def test_the_nearest_minimiser_lies_on_the_set_and_nearer_than_what_the_search_had():
    """Two linear experts behind constant gates are one: a continuum of minimisers."""
    mixture = Mixture("sigmoid", "linear")
    truth = torch.tensor([[0.0, 0, 0, 1, 0.4]], dtype=torch.float64)
    population = population_of(mixture, truth)
    best = search(mixture, population, 1.5 * uniform(40, 2, 5), 1.5)
    assert best.misfit < 1e-15
    atoms = best.atoms[:1] + 0.05 * draw(3, 2, 5, seed=2)
    metric = torch.ones(5, dtype=torch.float64)
    near = nearest(mixture, atoms, population, best, 1.5, metric)
    assert (population.misfit(mixture, near.atoms) <= best.bar).all()
    assert near.reached.any()
    away = distance(mixture, atoms, near.atoms)
    pooled = distance(mixture, atoms, matched(mixture, atoms, best.atoms, metric)[:, 0])
    assert (away <= pooled + 1e-12).all()
    assert (away < 0.9 * pooled).any()


def test_where_the_minimiser_is_one_point_it_is_the_nearest_from_anywhere_near():
    mixture = Mixture("sigmoid", "offset", 2)
    truth = torch.tensor([[1.2, -1.2, 1.2, 1.2, -1.2, -1.0, 1.2, 0.8, 0.4]], dtype=torch.float64)
    population = population_of(mixture, truth)
    best = search(mixture, population, 1.5 * uniform(24, 2, 9), 1.5)
    assert len(best.atoms) == 1
    assert best.misfit == pytest.approx(1.4e-4, rel=0.05)  # one atom too many cannot vanish
    near = nearest(
        mixture, best.atoms + 0.02, population, best, 1.5, torch.ones(9, dtype=torch.float64)
    )
    assert near.reached.all()
    assert not near.below.any()
    assert distance(mixture, near.atoms, best.atoms) < 1e-3


def test_one_that_is_no_best_one_does_not_count():
    mixture = Mixture("sigmoid", "offset", 2)
    truth = torch.tensor([[1.2, -1.2, 1.2, 1.2, -1.2, -1.0, 1.2, 0.8, 0.4]], dtype=torch.float64)
    population = population_of(mixture, truth)
    best = search(mixture, population, 1.5 * uniform(24, 2, 9), 1.5)
    strict = Minimisers(best.atoms, best.misfit / 2, best.share)
    near = nearest(
        mixture, best.atoms + 0.02, population, strict, 1.5, torch.ones(9, dtype=torch.float64)
    )
    assert not near.reached.any()
    assert distance(mixture, near.atoms, best.atoms) < 1e-12  # the pool's, as it is
