"""Which systems tell their queries apart: what is proved must be measured, and where a hypothesis
fails, so must the conclusion.

Sizes of the paper's models: 197 keys of width 32, float64. Where a bound is a number, it is
rounding (EXACT, of rows whose weights are below 1), a million times that where rows must differ, or
it follows from what stands beside it.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from aftermax import CATALOGUE, InLine, Linear, Normalised, RowMap, Softmax, find
from aftermax.lab import injectivity
from aftermax.linear.elu import elu_plus_one

from .cases import F64, case_of, natural, weights_of

KEYS, WIDTH, EXACT = 197, 32, 1e-14
INJECTIVE = {"softmax": Softmax(), "inline": InLine()}
SCALE_FREE = [e for e in CATALOGUE if e.laws.scale_free]


def gaussian(*shape: int, seed: int = 0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.fixture(scope="module")
def measured():
    """What the figure shows, at a small size."""
    subjects = injectivity.subjects()
    return [injectivity.measure(s, width=6, keys=17, queries=3) for s in subjects]


@pytest.fixture
def keys():
    return gaussian(KEYS, WIDTH, seed=1)


@pytest.fixture
def query():
    return gaussian(WIDTH, seed=2)


@pytest.mark.parametrize("entry", [e for e in CATALOGUE if e.causal], ids=lambda e: e.name)
def test_rows_are_the_last_rows_of_the_weights(entry):
    """The last query of a causal sequence sees all keys, whatever the queries before it."""
    case = case_of(entry, batch=1, heads=1)
    columns = 9 if not isinstance(entry.system, RowMap) else None
    expected = weights_of(entry, case, natural(entry), columns)[0, 0, -1:]
    rows = injectivity.rows(entry.system, case.query[0, 0, -1:], case.key[0, 0], **case.learned)
    assert_close(rows, expected, rtol=1e-12, atol=1e-12)


def test_many_queries_are_as_many_single_ones(keys):
    queries = gaussian(injectivity.BLOCK + 3, WIDTH)
    for system in (Softmax(), InLine()):
        together = injectivity.rows(system, queries, keys)
        assert together.shape == (len(queries), KEYS)
        for query, row in zip(queries[-4:], together[-4:], strict=True):
            assert_close(injectivity.rows(system, query[None], keys)[0], row, rtol=0, atol=EXACT)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(M, d\) and \(N, d\), got \(2, 3\) and \(5, 4\)"):
        injectivity.rows(Softmax(), gaussian(2, 3), gaussian(5, 4))


# ---- injective: softmax and InLine ---------------------------------------------------------------


@pytest.mark.parametrize("name", INJECTIVE)
def test_an_injective_system_tells_lengths_apart(name, query, keys):
    """Between a q and q some score differs from another by |a - 1| times what it did."""
    found = injectivity.collinear(INJECTIVE[name], query, keys, (0.5, 2.0, 4.0))
    assert (found > 1e6 * EXACT).all()
    assert found[2] > found[1]  # further along, further apart


@pytest.mark.parametrize("name", INJECTIVE)
def test_an_injective_system_has_a_jacobian_of_full_rank(name, query, keys):
    values = injectivity.jacobian(INJECTIVE[name], query, keys)
    assert values.shape == (WIDTH,)
    assert injectivity.rank(values) == WIDTH
    assert values[-1] / values[0] > 1e-3


def test_the_jacobian_of_inline_is_the_keys_less_their_mean(query, keys):
    """dA/dq = (s/N) (K - mean K), whatever the query."""
    expected = torch.linalg.svdvals(keys - keys.mean(0)) / (WIDTH**0.5 * KEYS)
    for at in (query, 5 * query):
        assert_close(injectivity.jacobian(InLine(), at, keys), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_a_query_is_found_from_its_row(scale, query, keys):
    options = {} if scale is None else {"scale": scale}
    scores = (WIDTH**-0.5 if scale is None else scale) * (keys @ query)
    found = injectivity.query_of_softmax(scores.softmax(0), keys, **options)
    assert_close(found, query, rtol=1e-12, atol=1e-12)
    row = (scores - scores.mean() + 1) / KEYS
    found = injectivity.query_of_inline(row, keys, **options)
    assert_close(found, query, rtol=1e-12, atol=1e-12)


def test_a_query_is_found_from_the_systems_own_rows(query, keys):
    softmax = injectivity.rows(Softmax(), query[None], keys)[0]
    inline = injectivity.rows(InLine(), query[None], keys)[0]
    assert_close(injectivity.query_of_softmax(softmax, keys), query, rtol=1e-11, atol=1e-11)
    assert_close(injectivity.query_of_inline(inline, keys), query, rtol=1e-11, atol=1e-11)
    leaky = InLine("leaky-relu")  # an injective feature map: its features come back
    row = injectivity.rows(leaky, query[None], keys)[0]
    features = torch.nn.functional.leaky_relu(torch.cat([query[None], keys]), 0.01)
    found = injectivity.query_of_inline(row, features[1:])
    assert_close(found, features[0], rtol=1e-10, atol=1e-10)


# ---- not injective: what divides by its sum or takes cosines -------------------------------------


@pytest.mark.parametrize("entry", SCALE_FREE, ids=lambda e: e.name)
def test_what_compares_directions_forgets_lengths(entry, query, keys):
    """Rank d - 1 at most: the direction of q itself is lost."""
    found = injectivity.collinear(entry.system, query, keys)
    assert found.max() < EXACT
    values = injectivity.jacobian(entry.system, query, keys)
    assert injectivity.rank(values) <= WIDTH - 1
    line = injectivity.of_one_direction(query, torch.linspace(0.5, 4, 6, dtype=F64))
    assert injectivity.confusion(entry.system, line, keys) == 1


def test_lengths_are_forgotten_by_those_that_say_so_and_by_cosformer(query, keys):
    """And no others. Rows are compared at small queries too, where LSSAR and sigmoids are alike."""
    forget = {
        entry.name
        for entry in CATALOGUE
        if entry.causal and injectivity.collinear(entry.system, query, keys).max() < EXACT
    }
    assert forget == {entry.name for entry in SCALE_FREE} | {"cosformer"}


def test_a_row_divided_by_its_sum_knows_its_features_up_to_their_length(query, keys):
    """Linear attention loses the ray of phi(q), exactly one direction of d."""
    ray = injectivity.of_one_elu_ray(query, torch.tensor([1.0, 0.4, 2.5], dtype=F64))
    assert_close(elu_plus_one(ray[2]), 2.5 * elu_plus_one(query), rtol=1e-12, atol=0)
    rows = injectivity.rows(Linear(), ray, keys)
    assert (rows - rows[0]).norm(dim=1).max() < EXACT
    assert injectivity.rank(injectivity.jacobian(Linear(), query, keys)) == WIDTH - 1
    for system in INJECTIVE.values():
        rows = injectivity.rows(system, ray, keys)
        assert (rows[1:] - rows[0]).norm(dim=1).min() > 1e6 * EXACT


def test_random_queries_do_not_show_that_linear_attention_is_not_injective(keys):
    """Why the Jacobian is the test: no two of a draw lie on one ray of features."""
    assert injectivity.confusion(Linear(), gaussian(40, WIDTH), keys) == 0


def test_the_papers_collision(query, keys):
    """phi = relu(A x + b): what divides by its sum takes p for q, though they are not collinear."""
    matrix, bias = gaussian(WIDTH, WIDTH, seed=3) / WIDTH**0.5, gaussian(WIDTH, seed=4)
    other, linear = injectivity.colliding(find("cosformer").system, query, keys, matrix, bias)
    assert torch.cosine_similarity(other, query, 0) < 0.99
    assert (other - query).norm() > 0.5 * query.norm()
    assert linear < EXACT
    for system in INJECTIVE.values():
        same, distance = injectivity.colliding(system, query, keys, matrix, bias)
        assert_close(same, other)
        assert distance > 1e6 * EXACT


# ---- every hypothesis is needed ------------------------------------------------------------------


def test_too_few_keys(query):
    """N keys give rows of N - 1 degrees of freedom: they add up to 1."""
    for count, expected in ((16, 15), (WIDTH, WIDTH - 1), (WIDTH + 1, WIDTH)):
        few = gaussian(count, WIDTH, seed=5)
        assert injectivity.hypotheses(few).hold is (count > WIDTH)
        for system in INJECTIVE.values():
            assert injectivity.rank(injectivity.jacobian(system, query, few)) == expected
    row = injectivity.rows(InLine(), query[None], gaussian(16, WIDTH))[0]
    with pytest.raises(ValueError, match=r"rank d \+ 1 = 33, and K 32; they have 16 and 16"):
        injectivity.query_of_inline(row, gaussian(16, WIDTH))
    with pytest.raises(ValueError, match="that of many queries"):
        injectivity.query_of_softmax(row.abs(), gaussian(16, WIDTH))


def test_ones_in_the_span_of_the_keys(query, keys):
    """Keys on the plane K u = 1: along u all scores grow alike, which neither row sees."""
    along = gaussian(WIDTH, seed=6)
    along /= along.norm()
    flat = keys + (1 - keys @ along)[:, None] * along
    assert_close(flat @ along, torch.ones(KEYS, dtype=F64))
    found = injectivity.hypotheses(flat)
    assert (found.rank, found.rank_with_ones, found.hold) == (WIDTH, WIDTH, False)
    for system in INJECTIVE.values():
        first, second = injectivity.rows(system, torch.stack([query, query + 3 * along]), flat)
        assert (first - second).norm() < EXACT
        assert injectivity.rank(injectivity.jacobian(system, query, flat)) == WIDTH - 1
    with pytest.raises(ValueError, match="that of many queries"):
        injectivity.query_of_softmax(first, flat)


def test_a_feature_map_that_is_not_injective(query, keys):
    """relu: queries that differ in a negative element collide, to the last bit; leaky relu's do
    not."""
    place = int(query.argmin())
    assert query[place] < 0
    other = query.clone()
    other[place] *= 3
    for kernel, differs in (("relu", False), ("leaky-relu", True), ("identity", True)):
        first, second = injectivity.rows(InLine(kernel), torch.stack([query, other]), keys)
        assert bool((first - second).norm() > 0) is differs
    values = injectivity.jacobian(InLine("relu"), query, keys)
    assert injectivity.rank(values) == int((query > 0).sum())
    family = injectivity.of_one_positive_part(query, torch.linspace(0.5, 5, 6, dtype=F64))
    assert injectivity.confusion(InLine("relu"), family, keys) == 1
    assert injectivity.confusion(InLine(), family, keys) == 0


def test_normalised_attention_is_injective_until_it_has_learned(query, keys):
    """t -> t exp(-t c) takes each value below its maximum twice: a q and b q with a e^-a = b e^-b
    have one row where w . q = 1, and at q itself the Jacobian is singular."""
    assert injectivity.rank(injectivity.jacobian(Normalised(), query, keys)) == WIDTH
    w = (query / query.square().sum())[None]
    assert injectivity.rank(injectivity.jacobian(Normalised(), query, keys, w=w)) == WIDTH - 1
    low, high, beyond = 0.5, 1.0, 4.0  # b e^-b falls from b = 1 on: halve what holds the second
    for _ in range(60):
        middle = (high + beyond) / 2
        above = middle * math.exp(-middle) > low * math.exp(-low)
        high, beyond = (middle, beyond) if above else (high, middle)
    first, second = injectivity.rows(
        Normalised(), torch.stack([low * query, high * query]), keys, w=w
    )
    assert_close(first, second, rtol=1e-12, atol=1e-12)


# ---- confusion -----------------------------------------------------------------------------------


def test_confusion_counts_the_pairs_that_differ_and_get_one_row():
    """By hand: lengths 1, 1, 3; mean 5/3. Cosines: the third is the first's direction."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]], dtype=F64)
    keys = torch.eye(2, dtype=F64)
    cosine = find("cosine").system
    assert injectivity.confusion(cosine, queries, keys) == pytest.approx(1 / 3)
    # above 2 / (5/3) = 1.2 mean lengths only the second and third are clearly apart
    assert injectivity.confusion(cosine, queries, keys, tau_q=1.25) == 0
    assert injectivity.confusion(cosine, queries, keys, tau_a=2) == 1  # no distance is above 1
    assert injectivity.confusion(Softmax(), queries, keys) == 0


def test_confusion_of_queries_that_do_not_differ_is_not_a_number():
    same = torch.ones(3, 2, dtype=F64)
    assert math.isnan(injectivity.confusion(Softmax(), same, torch.eye(2, dtype=F64)))


def test_what_the_figure_shows(measured):
    """Ranks and shares as they are proved for each kind."""
    injective = {"softmax", "sigmoid", "InLine"}
    for m in measured:
        title = m.subject.title
        assert m.rows.shape[0] == len(m.factors)
        one_row = (m.rows - m.rows[0]).abs().max() < EXACT
        if title in injective:
            assert m.rank == 6
            assert not any(m.confusion.values())
            assert not one_row
        elif title != "TransNormer":  # whose norm has an eps: nearly singular
            assert m.rank < 6
            assert max(m.confusion.values()) == m.confusion[m.subject.family] == 1
            assert one_row
    ratios = {m.subject.title: m.ratio for m in measured}
    assert ratios["TransNormer"] < 1e-4 < min(ratios[title] for title in injective)


def test_the_figure_has_a_dot_for_each_system(measured):
    plots = pytest.importorskip("aftermax.lab.plots")
    figure = plots.injectivity(measured)
    (dots,) = (axis for axis in figure.axes if axis.get_xlabel().startswith("smallest singular"))
    offsets = dots.collections[-1].get_offsets()
    assert len(offsets) == len(measured)
    for (ratio, _), m in zip(offsets.tolist(), measured, strict=True):
        assert ratio == pytest.approx(max(m.ratio, plots.RATIO_FLOOR))
    plots.plt.close(figure)
