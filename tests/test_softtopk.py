"""The soft top-k operator and its loss: the threshold, its limits, precision, derivatives."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import log_soft_topk, soft_topk, soft_topk_loss
from aftermax.losses import threshold

from . import label_cases
from .label_cases import cases, columns, sets, sigmoid
from .native import BF16, F16, F32, F64, INF, NAN


def naive(scores, k, alpha):
    """Of a list, in Python's floats: y."""
    if k >= len(scores):
        return [1.0] * len(scores)
    centre = sorted(scores)[-math.ceil(k)]
    moved = [s - centre for s in scores]
    t = label_cases.threshold(moved, k, alpha)
    return [sigmoid(alpha * (s + t)) for s in moved]


def gradient(function, *inputs, upstream=None):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(torch.ones_like(out) if upstream is None else upstream.to(out.dtype))
    return [leaf.grad for leaf in leaves]


# the operator


@settings(max_examples=100)
@given(
    n=st.integers(1, 300),
    where=st.floats(0, 1),
    real=st.sampled_from((0.0, 0.5, 1e-3)),
    scale=st.sampled_from((0.0, 1e-3, 1.0, 30.0, 1e4)),
    alpha=st.sampled_from((0.1, 1.0, 2.0, 1e3)),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_its_equation(n, where, real, scale, alpha, ties, seed):
    k = max(1, round(where * n)) - real
    scores = scale * torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    if ties and scale:
        scores = (scores / scale).round() * scale
    y = soft_topk(scores, k, alpha=alpha)
    right = torch.tensor(naive(scores.tolist(), k, alpha), dtype=F64)
    assert_close(y, right, rtol=0, atol=2e-12)
    assert abs(math.fsum(y.tolist()) - k) <= 1e-12 * n


@pytest.mark.parametrize("n", [1, 2, 5, 127, 128, 2000, 40_000])
def test_every_k_from_1_to_n(n):
    scores = 3 * torch.randn(n, dtype=F64)
    for k in (
        range(1, n + 1) if n < 200 else (1, 2, 64, 256, 257, n // 3, n // 2, n - 300, n - 1, n)
    ):
        y = soft_topk(scores, k, alpha=2)
        assert abs(math.fsum(y.tolist()) - k) < 1e-11 * n
        assert (y[scores.argsort()].diff() >= 0).all()
    assert (y == 1).all()


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("k", [1, 3, 300, 700, 999])
def test_a_large_alpha_picks_the_largest(dtype, k):
    scores = torch.randperm(1000).to(dtype)
    for alpha in (1e3, 1e8, 1e30):
        y = soft_topk(scores, k, alpha=alpha)
        assert_close(y, (scores >= 1000 - k).to(dtype))


@pytest.mark.parametrize("alpha", [1.0, 1e6])
@pytest.mark.parametrize(("n", "tied", "above"), [(10, 3, 2), (1000, 700, 100), (1000, 10, 600)])
def test_ties_share_what_is_left(n, tied, above, alpha):
    scores = torch.cat(
        (torch.full((above,), 50.0), torch.zeros(tied), torch.full((n - above - tied,), -50.0))
    )
    k = above + tied // 2
    y = soft_topk(scores, k, alpha=alpha)
    assert_close(y[above : above + tied], torch.full((tied,), (k - above) / tied))
    assert_close(soft_topk(torch.zeros(n), k, alpha=alpha), torch.full((n,), k / n))


def test_k_of_each_row_and_any_dimension():
    scores, k = (
        torch.randn(3, 40, 2, dtype=F64),
        torch.tensor([[1, 2.5], [39.5, 40], [20, 7]]).double(),
    )
    y = soft_topk(scores, k, dim=1)
    assert_close(y.sum(1), k)
    for i in range(3):
        for j in range(2):
            assert_close(y[i, :, j], soft_topk(scores[i, :, j], k[i, j].item()))
    assert_close(
        soft_topk(scores, torch.tensor([1.0, 2.0]), dim=1).sum((0, 1)),
        torch.tensor([3.0, 6]).double(),
    )


@given(n=st.integers(1, 9), rows=st.integers(1, 4), k=st.integers(1, 9), seed=st.integers(0, 999))
def test_what_is_hidden_never_matters(n, rows, k, seed):
    k, random = min(k, n), torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, n, dtype=F64, generator=random)
    visible = torch.rand(rows, n, generator=random) < 0.6
    poison = torch.tensor([NAN, INF, -INF, 1e300], dtype=F64)
    dirty = torch.where(visible, scores, poison[torch.randint(4, (rows, n), generator=random)])
    upstream = torch.where(visible, torch.rand(rows, n, generator=random), NAN)
    for function in (soft_topk, log_soft_topk):
        call = functools.partial(function, k=k, alpha=2.0, visible=visible)
        y, (slope,) = call(dirty), gradient(call, dirty, upstream=upstream)
        assert (slope[~visible] == 0).all()
        for i, seen in enumerate(visible):
            rest = scores[i][seen]
            assert (y[i][~seen] == (-INF if function is log_soft_topk else 0)).all()
            if seen.sum() <= k:
                assert (y[i][seen] == (0 if function is log_soft_topk else 1)).all()
                assert (slope[i] == 0).all()
            else:
                alone = functools.partial(function, k=k, alpha=2.0)
                assert_close(y[i][seen], alone(rest))
                (right,) = gradient(alone, rest, upstream=upstream[i][seen])
                assert_close(slope[i][seen], right)


def test_a_gap_that_floats_cannot_bridge_has_its_threshold_in_the_middle():
    """Where the sum has rounded to k long ago, and any threshold in the gap would fit it."""
    scores = torch.tensor([900.0, 800.0, 0.0, -7.0])
    log_y = log_soft_topk(scores, 2)
    # a + e^-7 a = b + e^-100 b with a = e^(d), b = e^(-800 - d)
    assert_close(
        log_y[2:].double(),
        torch.tensor([-400 - math.log1p(math.exp(-7)) / 2, 0])
        .double()
        .index_put(
            (torch.tensor(1),), torch.tensor(-407 - math.log1p(math.exp(-7)) / 2, dtype=F64)
        ),
    )
    (slope,) = gradient(lambda s: log_soft_topk(s, 2)[2], scores)
    # half of the mass of v lies on either side: 1 - 1/2 for itself, -1/2 for the last that is in
    assert_close(
        slope,
        torch.tensor(
            [0, -0.5, 1 - 0.5 / (1 + math.exp(-7)), -0.5 * math.exp(-7) / (1 + math.exp(-7))]
        ),
    )


def test_a_row_with_nan_spoils_itself_alone():
    scores = torch.randn(3, 9)
    scores[1, 4] = NAN
    y = soft_topk(scores, 3)
    assert y[1].isnan().any()
    assert_close(y[::2], soft_topk(scores[::2], 3))


def test_plus_infinity_takes_a_place():
    scores = torch.randn(9, dtype=F64)
    scores[4] = INF
    y = soft_topk(scores, 3)
    assert y[4] == 1
    rest = torch.arange(9) != 4
    assert_close(y[rest], soft_topk(scores[rest], 2))
    (slope,) = gradient(lambda s: soft_topk(s, 3), scores, upstream=torch.rand(9))
    assert slope[4] == 0
    assert slope.isfinite().all()


def test_empty_shapes():
    assert soft_topk(torch.zeros(0, 5), 3).shape == (0, 5)
    assert soft_topk(torch.zeros(3, 0), 1).shape == (3, 0)


def test_few_steps(monkeypatch):
    count, side = [0], threshold._side

    def counted(*inputs):
        count[0] += 1
        return side(*inputs)

    monkeypatch.setattr(threshold, "_side", counted)
    for scale in (0.1, 1, 4, 20, 1000):
        for k in (1, 5, 100, 1000):
            count[0] = 0
            soft_topk(scale * torch.randn(1, 20_000), k, alpha=2)
            assert count[0] / 2 <= 16 + 12 * (k > 256)


# precision


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("n", "k"), [(50, 5), (50, 45), (20_000, 5), (20_000, 1000)])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_it_is_computed_in_float32_at_least(dtype, n, k, scale):
    scores = (scale * torch.randn(2, n)).to(dtype)
    step = 0.0 if dtype == F32 else torch.finfo(dtype).eps / 2
    tiny = 0.0 if dtype == F32 else torch.finfo(dtype).tiny
    y, right = soft_topk(scores, k), soft_topk(scores.double(), k)
    assert y.dtype == dtype
    assert_close(y.double(), right, rtol=step + 2e-5, atol=1e-9 + tiny)
    upstream = torch.randn(2, n).to(dtype)
    (slope,) = gradient(lambda s: soft_topk(s, k), scores, upstream=upstream)
    (exact,) = gradient(lambda s: soft_topk(s, k), scores.double(), upstream=upstream)
    assert slope.dtype == dtype
    assert_close(
        slope.double(), exact, rtol=step + 1e-4, atol=1e-5 * exact.abs().max() + tiny + 1e-37
    )


# derivatives


@pytest.mark.parametrize("function", [soft_topk, log_soft_topk])
@pytest.mark.parametrize("k", [1, 2.5, 5, 6])
def test_derivatives_of_first_and_second_order(function, k):
    scores = torch.randn(2, 6, dtype=F64, requires_grad=True)
    call = functools.partial(function, k=k, alpha=1.5)
    assert torch.autograd.gradcheck(call, scores)
    assert torch.autograd.gradgradcheck(call, scores)


@pytest.mark.parametrize("function", [soft_topk, log_soft_topk])
def test_derivatives_by_k(function):
    scores = torch.randn(2, 6, dtype=F64, requires_grad=True)
    k = torch.tensor([1.3, 4.8], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (scores, k))
    assert torch.autograd.gradgradcheck(function, (scores, k))


def test_gradients_of_a_row_sum_to_nothing_also_where_all_is_saturated():
    scores = 1e4 * torch.randn(4, 50, dtype=F64)
    for function in (soft_topk, log_soft_topk):
        upstream = torch.rand(4, 50)
        (slope,) = gradient(lambda s, f=function: f(s, 7), scores, upstream=upstream)
        assert slope.isfinite().all()
        assert_close(slope.sum(1), torch.zeros(4, dtype=F64), atol=1e-12, rtol=0)


# the loss


def naive_loss(scores, positives, visible, k, alpha):
    rows = []
    for s, (true, false) in zip(scores.tolist(), sets(scores, positives, visible), strict=True):
        y = naive([s[j] for j in (*true, *false)], len(true) if k == "positives" else k, alpha)
        each = [-math.log(max(y[i], 5e-324)) for i in range(len(true))]
        rows.append(sum(each) / len(each) if each else 0.0)
    return torch.tensor(rows, dtype=F64)


@given(case=cases(), k=st.sampled_from((1, 2, 3.5, "positives")), alpha=st.sampled_from((0.5, 2.0)))
def test_the_loss_is_its_formula(case, k, alpha):
    scores, positives, visible = case
    scores = scores / 8
    rows = soft_topk_loss(scores, positives, k=k, alpha=alpha, visible=visible, reduction="none")
    right = naive_loss(scores, positives, visible, k, alpha)
    assert_close(rows, right, rtol=1e-10, atol=1e-11)


@given(case=cases(), k=st.sampled_from((1, 2, "positives")))
def test_its_gradient_is_that_of_the_operator(case, k):
    scores, positives, visible = case
    true = [t for t, _ in sets(scores, positives, visible)]
    places = torch.tensor([max(1, len(t)) if k == "positives" else k for t in true])

    def by_operator(s):
        log_y = log_soft_topk(s, places.clamp(max=s.shape[1]), alpha=2.0, visible=visible)
        return torch.stack(
            [-log_y[i, t].mean() if t else log_y.new_zeros(()) for i, t in enumerate(true)]
        )

    upstream = torch.rand(len(scores))
    call = functools.partial(
        soft_topk_loss, positives=positives, k=k, visible=visible, reduction="none"
    )
    (got,) = gradient(call, scores, upstream=upstream)
    if any(true):
        (right,) = gradient(by_operator, scores, upstream=upstream)
    else:
        right = torch.zeros_like(scores)
    assert_close(got, right, rtol=1e-9, atol=1e-11)


def test_derivatives_of_the_loss():
    scores = torch.randn(3, 6, dtype=F64, requires_grad=True)
    positives = torch.tensor([[0, 1, 5], [3, -1, -1], [-1, -1, -1]])
    visible = torch.rand(3, 6) < 0.8
    visible[0] = True
    for k in (2, "positives"):
        call = functools.partial(soft_topk_loss, positives=positives, k=k, visible=visible)
        assert torch.autograd.gradcheck(call, scores)
        assert torch.autograd.gradgradcheck(call, scores)


def test_a_sample_takes_the_others_out():
    scores, positives = torch.randn(1, 8, dtype=F64), torch.tensor([[1, 4, 6]])
    each = []
    for pair in ([1, 4], [1, 6], [4, 6]):
        visible = torch.ones(1, 8).bool()
        visible[0, [p for p in (1, 4, 6) if p not in pair]] = False
        each.append(soft_topk_loss(scores, torch.tensor([pair]), k=2, visible=visible).item())
    seen = {round(soft_topk_loss(scores, positives, k=2, sample=2).item(), 9) for _ in range(64)}
    assert seen == {round(x, 9) for x in each}


@pytest.mark.parametrize("content", [0.0, NAN, INF])
def test_rows_without_positives_give_0(content):
    scores, positives = torch.randn(3, 9), columns(torch.eye(3, 9).bool())
    scores[1], positives[1] = content, -1
    (slope,) = gradient(lambda s: soft_topk_loss(s, positives), scores)
    assert (slope[1] == 0).all()
    assert_close(soft_topk_loss(scores, positives), soft_topk_loss(scores[::2], positives[::2]))


@pytest.mark.parametrize("k", [2, 9])
def test_it_compiles_as_one_graph(k):
    torch._dynamo.reset()
    scores, positives, upstream = torch.randn(3, 9), torch.rand(3, 9) < 0.3, torch.randn(3, 9)
    visible = torch.rand(3, 9) < 0.8
    scores[~visible] = NAN
    upstream[~visible] = NAN
    for function, g in (
        (functools.partial(soft_topk, k=k, visible=visible), upstream),
        (functools.partial(log_soft_topk, k=k, visible=visible), upstream),
        (functools.partial(soft_topk_loss, positives=positives, k=k, visible=visible), None),
        (
            functools.partial(soft_topk_loss, positives=positives, k="positives", visible=visible),
            None,
        ),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_close(compiled(scores), function(scores))
        assert_close(gradient(compiled, scores, upstream=g), gradient(function, scores, upstream=g))


def test_the_operator_of_the_threshold():
    inputs = torch.randn(3, 9), torch.tensor([1.0, 4.5, 9.0]), 2.0
    torch.library.opcheck(torch.ops.aftermax.soft_topk_threshold, inputs)


# errors


def test_what_does_not_fit_is_said():
    scores = torch.randn(3, 4)
    for k in (0, -1, 5, NAN):
        with pytest.raises(ValueError, match="of 4"):
            soft_topk(scores, k)
    with pytest.raises(ValueError, match="k=1 to 5 of 4"):
        soft_topk(scores, torch.tensor([1, 5, 2]))
    with pytest.raises(ValueError, match=r"k \(2,\) for scores \(3, 4\)"):
        soft_topk(scores, torch.tensor([1, 2]))
    for alpha in (0, -1, INF, NAN):
        with pytest.raises(ValueError, match="alpha="):
            soft_topk(scores, 2, alpha=alpha)
        with pytest.raises(ValueError, match="alpha="):
            soft_topk_loss(scores, torch.eye(3, 4).bool(), alpha=alpha)
    with pytest.raises(ValueError, match=r"visible \(3,\)"):
        soft_topk(scores, 2, visible=torch.ones(3).bool())
    with pytest.raises(IndexError, match="dim=2"):
        soft_topk(scores, 2, dim=2)
    with pytest.raises(ValueError, match="scores"):
        soft_topk(torch.arange(4), 2)
    with pytest.raises(ValueError, match="k='all'"):
        soft_topk_loss(scores, torch.eye(3, 4).bool(), k="all")


PEAKED = ([100.0, 50.0, 0.0, -30.0], [20.0, -20.0, 0.0, -1.0], [1000.0, 0.0, 0.0, -1000.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", PEAKED)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_gradient_is_the_same_when_a_graph_of_it_is_wanted(row, k, dtype):
    scores = torch.tensor([row], dtype=dtype, requires_grad=True)
    weight = torch.arange(1, 5, dtype=dtype)
    ways = {
        "value": lambda: (soft_topk(scores, k, alpha=2.0) * weight).sum(),
        "log": lambda: (log_soft_topk(scores, k, alpha=2.0) * weight).sum(),
        "loss": lambda: soft_topk_loss(scores, torch.tensor([[1, 3]]), k=k, alpha=2.0),
    }
    for name, way in ways.items():
        (plain,) = torch.autograd.grad(way(), scores)
        (graph,) = torch.autograd.grad(way(), scores, create_graph=True)
        assert_close(graph.detach(), plain, msg=lambda said, name=name: f"{name}: {said}")
