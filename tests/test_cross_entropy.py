"""cross_entropy: its formula, and torch's answers in float64, with gradients and special values."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import cross_entropy

from . import native
from .native import BF16, DTYPES, F16, F32, F64, INF, MAX, NAN, REDUCTIONS, needs_kernels

normal = functools.partial(native.normal, scale=2.0)


def classes(*shape, count, seed=0, ignored=None, share=0.0):
    random = torch.Generator().manual_seed(seed)
    target = torch.randint(count, shape, generator=random)
    return target.where(torch.rand(shape, generator=random) >= share, ignored or 0)


def truth(
    x,
    target,
    weight=None,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    lse_square_scale=0.0,
    reduction="mean",
):
    """torch's loss, and the square of logsumexp beside it: in the dtype of x."""
    loss = F.cross_entropy(
        x,
        target.to(x.dtype) if target.is_floating_point() else target,
        None if weight is None else weight.to(x.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    if not lse_square_scale:
        return loss
    square = lse_square_scale * x.logsumexp(1 if x.ndim > 1 else 0).square()
    if not target.is_floating_point():
        square = square.masked_fill(target == ignore_index, 0)
        counted = (target != ignore_index).sum()
    else:
        counted = square.numel()
    if reduction == "none":
        return loss + square
    return loss + (square.sum() / counted if reduction == "mean" else square.sum())


def assert_loss(got, exact, dtype):
    assert got.dtype == dtype
    assert got.shape == exact.shape
    rounding = 0.0 if dtype == F32 else torch.finfo(dtype).eps / 2
    assert_close(got.double(), exact, rtol=rounding + 1e-6, atol=1e-6, equal_nan=True)


def assert_gradient(got, exact, dtype, scale=1.0):
    """`scale` is the size of the terms: their difference may be next to nothing, its error not."""
    assert got.dtype == dtype
    rounding = 0.0 if dtype == F32 else torch.finfo(dtype).eps / 2
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    atol = 1e-6 * scale + step
    assert_close(got.double(), exact, rtol=rounding + 1e-6, atol=atol, equal_nan=True)


def terms_of(x, target, weight, g, ignore_index=-100, **options):
    """The size of the terms that a gradient of the loss adds up, at most."""
    lse = x.double().logsumexp(1 if x.ndim > 1 else 0).nan_to_num(0, 0, 0).abs().flatten()
    square = 2 * options.get("lse_square_scale", 0.0) * max(lse.tolist(), default=0.0)
    largest = 1.0 if weight is None else weight.max().item()
    if options["reduction"] == "mean" and not target.is_floating_point():
        counted = target[target != ignore_index]
        weights = counted.numel() if weight is None else weight[counted].sum().item()
        largest, square = largest / (weights or 1), square / max(1, counted.numel())
    return (largest + square) * max(g.double().abs().flatten().tolist(), default=0.0)


def check(x, target, weight=None, *, impl="cpu", reduction="mean", **options):
    """Loss and gradient equal torch's in float64."""
    options["reduction"] = reduction
    leaf, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    exact = truth(wide, target, weight, **options)
    got = cross_entropy(leaf, target, weight, impl=impl, **options)
    assert_loss(got, exact.detach(), x.dtype)
    assert_loss(cross_entropy(x.detach(), target, weight, impl=impl, **options), exact, x.dtype)
    g = normal(*exact.shape, scale=1.0, dtype=x.dtype, seed=9)
    got.backward(g)
    exact.backward(g.double())
    assert_gradient(leaf.grad, wide.grad, x.dtype, terms_of(x, target, weight, g, **options))


OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "all smooth": {"label_smoothing": 1.0},
    "square": {"lse_square_scale": 0.01},
    "all": {"label_smoothing": 0.3, "lse_square_scale": 0.1},
}


# the formula


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_is_its_formula_term_by_term(impl, reduction):
    x, s, z = normal(5, 7), 0.2, 0.3
    target = torch.tensor([3, -100, 0, 6, 3])
    w = torch.rand(7) + 0.5
    losses, squares, weights = [], [], []
    for row, t in zip(x.double(), target.tolist(), strict=True):
        if t == -100:
            losses.append(0.0)
            squares.append(0.0)
            continue
        lse = row.exp().sum().log()
        smooth = sum(w[k].item() * (lse - row[k]) for k in range(7)) * s / 7
        losses.append(((1 - s) * w[t].item() * (lse - row[t]) + smooth).item())
        squares.append(z * lse.item() ** 2)
        weights.append(w[t].item())
    expected = {
        "none": [a + b for a, b in zip(losses, squares, strict=True)],
        "sum": sum(losses) + sum(squares),
        "mean": sum(losses) / sum(weights) + sum(squares) / len(weights),
    }[reduction]
    got = cross_entropy(
        x, target, w, label_smoothing=s, lse_square_scale=z, reduction=reduction, impl=impl
    )
    assert_close(got.double(), torch.tensor(expected, dtype=F64), rtol=1e-6, atol=1e-7)


# against torch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_shape_and_reduction_equals_float64(body, options, dtype):
    for shape in ((7,), (1,), (4, 7), (3, 1), (1, 300), (3, 7, 5), (2, 7, 3, 4), (2, 130, 3)):
        count = shape[0] if len(shape) == 1 else shape[1]
        x = normal(*shape, dtype=dtype)
        target = classes(*shape[:1] * (len(shape) > 1), *shape[2:], count=count)
        weight = torch.rand(count, generator=torch.Generator().manual_seed(1)) + 0.1
        for reduction, w in itertools.product(REDUCTIONS, (None, weight)):
            check(x, target, w, reduction=reduction, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_reference_equals_float64(options):
    for shape in ((7,), (4, 7), (3, 7, 5)):
        count = shape[0] if len(shape) == 1 else 7
        target = classes(*shape[:1] * (len(shape) > 1), *shape[2:], count=count)
        for reduction, dtype in itertools.product(REDUCTIONS, DTYPES):
            x = normal(*shape, dtype=dtype)
            check(x, target, torch.rand(count), impl="reference", reduction=reduction, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_number_of_classes_equals_float64(body, options):
    for count in (1, 2, 3, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 32769, 70000):
        rows = 2 if count > 10000 else 5
        target = classes(rows, count=count)
        target[0], target[-1] = 0, count - 1
        for dtype, reduction in itertools.product(DTYPES, ("mean", "none")):
            x = normal(rows, count, dtype=dtype)
            check(x, target, reduction=reduction, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_strides_are_of_no_consequence(body, options):
    base = normal(6, 9, 8, dtype=F32)
    weight = torch.rand(9) + 0.1
    logits = {
        "transposed": base[:, :, 0].T.contiguous().T,
        "classes run slowest": base.permute(1, 0, 2).contiguous().permute(1, 0, 2),
        "classes run fastest": base.permute(0, 2, 1).contiguous().permute(0, 2, 1),
        "stepped": normal(12, 27, 4)[::2, ::3, ::2],
        "offset": normal(5, 10, 3)[1:, 1:, 1:],
        "expanded rows": base[:1, :, :1].expand(4, 9, 3),
        "expanded classes": base[:, :1].expand(6, 9, 8),
    }
    for x in logits.values():
        rows = (x.shape[0], *x.shape[2:])
        backwards = classes(*rows[::-1], count=9).permute(tuple(range(len(rows)))[::-1])
        for target in (classes(*rows, count=9), backwards):
            for reduction in REDUCTIONS:
                check(x, target, weight, reduction=reduction, **options)


@pytest.mark.parametrize("ignore_index", [-100, -1, 2, 255])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ignored_rows_count_for_nothing(impl, options, ignore_index):
    weight = torch.rand(7) + 0.1
    for shape in ((9, 7), (4, 7, 5)):
        rows = (shape[0], *shape[2:])
        target = classes(*rows, count=7, ignored=ignore_index, share=0.4)
        for reduction, w in itertools.product(REDUCTIONS, (None, weight)):
            x = normal(*shape)
            check(
                x, target, w, impl=impl, ignore_index=ignore_index, reduction=reduction, **options
            )


def test_an_ignored_row_may_hold_anything_at_no_gradient(body):
    # torch's gradient is NaN here: its softmax multiplies by 0 what it should leave out
    for options, flaw in itertools.product(OPTIONS.values(), (NAN, INF, -INF, 1e30)):
        x = normal(3, 7)
        x[1, 2:] = flaw
        clean = cross_entropy(x[::2], torch.tensor([1, 5]), **options)
        leaf = x.clone().requires_grad_()
        got = cross_entropy(leaf, torch.tensor([1, -100, 5]), **options)
        assert_close(got.detach(), clean)
        got.backward()
        assert torch.equal(leaf.grad[1], torch.zeros(7))
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_batch_that_is_all_ignored_is_nan_zero_or_zeros(impl, options):
    target = torch.full((3,), -100)
    for dtype, weight in itertools.product(DTYPES, (None, torch.rand(7))):
        for reduction in REDUCTIONS:
            x = normal(3, 7, dtype=dtype).requires_grad_()
            got = cross_entropy(x, target, weight, reduction=reduction, impl=impl, **options)
            if reduction == "mean":
                assert got.isnan()
                continue
            assert torch.equal(got, torch.zeros_like(got))
            got.sum().backward()
            assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_batch_of_nothing_is_as_torch_answers(impl, options):
    for shape in ((0, 7), (0, 7, 5), (3, 7, 0)):
        target = torch.empty(shape[0], *shape[2:], dtype=torch.int64)
        for reduction in REDUCTIONS:
            check(torch.empty(shape), target, impl=impl, reduction=reduction, **options)


def test_weights_may_be_zero(impl):
    x, target = normal(4, 5), torch.tensor([0, 1, 2, 3])
    for options, reduction in itertools.product(OPTIONS.values(), REDUCTIONS):
        weight = torch.tensor([0.0, 2.0, 0.0, 1.0, 3.0])
        check(x, target, weight, impl=impl, reduction=reduction, **options)
        check(x, target, torch.zeros(5), impl=impl, reduction=reduction, **options)


def test_weights_come_in_any_floating_dtype(impl):
    x, target = normal(4, 5), torch.tensor([0, 1, 2, 3])
    weight = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])
    expected = cross_entropy(x, target, weight, impl=impl)
    for dtype in (F64, BF16, F16):
        assert_close(cross_entropy(x, target, weight.to(dtype), impl=impl), expected)
    assert_close(cross_entropy(x, target, weight.repeat_interleave(2)[::2], impl=impl), expected)


# probabilities as targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_probabilities_as_targets_equal_float64(body, options, dtype):
    for shape in ((7,), (4, 7), (3, 7, 5), (2, 7, 3, 4), (0, 7)):
        count = shape[0] if len(shape) == 1 else 7
        x = normal(*shape, dtype=dtype)
        target = torch.softmax(normal(*shape, seed=1), 0 if len(shape) == 1 else 1)
        for reduction, weight in itertools.product(REDUCTIONS, (None, torch.rand(count) + 0.1)):
            check(x, target, weight, reduction=reduction, **options)


def test_probabilities_have_gradients_of_their_own(impl):
    x, target = normal(4, 7), torch.softmax(normal(4, 7, seed=1), 1)
    leaf, wide = target.clone().requires_grad_(), target.double().requires_grad_()
    cross_entropy(x, leaf, label_smoothing=0.1, impl=impl).backward()
    truth(x.double(), wide, label_smoothing=0.1).backward()
    assert_gradient(leaf.grad, wide.grad, F32)


def test_a_class_as_its_probability_is_the_class(impl):
    x, target = normal(4, 7), torch.tensor([0, 6, 3, 3])
    hot = F.one_hot(target, 7).float()
    for options in OPTIONS.values():
        got = cross_entropy(x, hot, impl=impl, **options)
        assert_close(got, cross_entropy(x, target, impl=impl, **options))


# special values


SPECIAL_ROWS = (
    (-INF, 0.0, 1.0, 2.0),
    (0.0, -INF, -INF, -INF),
    (-INF, -INF, -INF, -INF),
    (INF, 0.0, 1.0, 2.0),
    (0.0, INF, 1.0, 2.0),
    (INF, INF, 0.0, 0.0),
    (NAN, 0.0, 1.0, 2.0),
    (0.0, NAN, -INF, INF),
    (1e30, 0.0, -1e30, 1.0),
    (0.0, 1e30, 0.0, 0.0),
    (1e35, 0.0, 0.0, 1.0),
    (-MAX, -INF, -INF, -INF),
    (2e5, 2e5 - 1, 0.0, 0.0),
    (-2e5, -2e5 - 1, -INF, -INF),
    (1e-42, -1e-42, 0.0, 0.0),
    (100.0, -100.0, 0.0, -INF),
)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_special_values_are_torchs_in_float32(body, smoothing, weighted):
    # target 0 in all: at -inf among numbers it costs inf, and a row with +inf or NaN has no loss
    for length, dtype in itertools.product((4, 20, 133), DTYPES):
        x = torch.full((len(SPECIAL_ROWS), length), -3.0, dtype=dtype)
        x[:, :4] = torch.tensor(SPECIAL_ROWS).to(dtype)
        x[11:14, 4:] = -INF
        weight = torch.rand(length) + 0.1 if weighted else None
        target = torch.zeros(len(x), dtype=torch.int64)
        for order in (slice(None), torch.arange(length - 1, -1, -1)):
            leaf, single = x[:, order].requires_grad_(), x[:, order].float().requires_grad_()
            w = weight if weight is None else weight[order]
            at = target if isinstance(order, slice) else target + length - 1
            options = {"label_smoothing": smoothing, "reduction": "none"}
            got = cross_entropy(leaf, at, w, **options)
            expected = truth(single, at, w, **options)
            assert_special(got, expected.to(dtype))
            got.backward(torch.ones_like(got))
            expected.backward(torch.ones_like(expected))
            assert_special(leaf.grad, single.grad.to(dtype))


def assert_special(got, expected):
    info = torch.finfo(got.dtype)
    units = 4 if got.dtype == F32 else 1
    assert_close(got, expected, rtol=units * info.eps, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("level", [2e5, 1e9, 1e12, 1e30, MAX, -2e5, -1e9, -1e12, -1e30, -MAX])
def test_equal_logits_of_any_size_cost_the_logarithm_of_their_number(body, level):
    # a row that is masked whole by the lowest number is one of these
    for options in ({}, {"label_smoothing": 0.1}):
        x = torch.full((2, 8), level).requires_grad_()
        loss = cross_entropy(x, torch.tensor([0, 5]), **options)
        assert_close(loss.detach(), torch.tensor(8.0).log(), rtol=1e-6, atol=0)
        loss.backward()
        expected = torch.zeros(2, 8).requires_grad_()
        truth(expected, torch.tensor([0, 5]), **options).backward()
        assert_close(x.grad, expected.grad, rtol=1e-6, atol=1e-7)


def test_special_values_across_memory_are_those_in_a_row(body):
    x = torch.tensor(SPECIAL_ROWS)
    target = torch.zeros(len(x), dtype=torch.int64)
    for options in OPTIONS.values():
        along, across = x.clone().requires_grad_(), x.T.contiguous().requires_grad_()
        rows = cross_entropy(along, target, reduction="none", **options)
        columns = cross_entropy(across.T, target, reduction="none", **options)
        assert_close(columns, rows, equal_nan=True)
        rows.sum().backward()
        columns.sum().backward()
        assert_close(across.grad.T, along.grad, equal_nan=True)


def test_no_loss_is_below_zero(body):
    # where the target is nearly certain, the rounding of the sum is all there is
    for count in (1, 2, 50, 1000):
        x = normal(2000, count, scale=3.0)
        x[:, count // 2] += 60
        target = torch.full((2000,), count // 2)
        assert cross_entropy(x, target, reduction="none").min().item() >= 0


@st.composite
def calls(draw):
    """Logits of any strides, some of them special, and arguments that fit them."""
    rows, count = draw(st.integers(0, 5)), draw(st.integers(1, 140))
    more = draw(st.lists(st.integers(1, 3), max_size=2))
    sizes = [rows, count, *more]
    steps = [draw(st.integers(1, 2)) for _ in sizes]
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    order = draw(st.permutations(range(len(sizes))))
    memory = [sizes[d] * steps[d] for d in order]
    x = torch.randn(memory, generator=random) * draw(st.sampled_from((1.0, 30.0, 1e3)))
    x = x.masked_fill(torch.rand(memory, generator=random) < draw(st.sampled_from((0, 0.2))), -INF)
    x = x.permute([order.index(d) for d in range(len(sizes))])
    x = x[tuple(slice(None, None, s) for s in steps)]
    weight = torch.rand(count, generator=random) + 0.1 if draw(st.booleans()) else None
    target = torch.randint(count, (rows, *more), generator=random)
    ignored = torch.rand(target.shape, generator=random) < draw(st.sampled_from((0.0, 0.3)))
    options = {
        "ignore_index": draw(st.sampled_from((-100, 0, 10**6))),
        "label_smoothing": draw(st.sampled_from((0.0, 0.0, 0.1))),
        "lse_square_scale": draw(st.sampled_from((0.0, 0.0, 1e-3))),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
    }
    target = target.masked_fill(ignored, options["ignore_index"])
    return x.to(draw(st.sampled_from(DTYPES))), target, weight, options


def test_any_call_is_torchs(body):
    @settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(call=calls())
    def is_torchs(call):
        x, target, weight, options = call
        leaf, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
        got = cross_entropy(leaf, target, weight, **options)
        exact = truth(wide, target, weight, **options)
        rounded = exact.detach().to(x.dtype).double()  # infinite beyond what the dtype holds
        assert_loss(got.detach(), exact.detach().where(rounded.isfinite(), rounded), x.dtype)
        got.sum().backward()
        exact.sum().backward()
        # an ignored row of nothing but -inf has no gradient here, and torch's is NaN
        counts = (target != options["ignore_index"]).unsqueeze(1)
        scale = terms_of(x, target, weight, torch.ones(1), **options)
        assert_gradient(leaf.grad, wide.grad.where(counts, 0), x.dtype, scale)

    is_torchs()


# graphs


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_of_gradients_equal_float64(body, options, reduction):
    target, weight = torch.tensor([1, -100, 4]), torch.rand(5) + 0.1

    def second(loss, x, v):
        (first,) = torch.autograd.grad(loss, x, v, create_graph=True)
        w = normal(*x.shape, scale=1.0, seed=2).to(x.dtype)
        return first, *torch.autograd.grad(first, (x, v), w, allow_unused=True)

    for x in (normal(3, 5), normal(5, 3).T):
        x, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
        got = cross_entropy(x, target, weight, reduction=reduction, **options)
        exact = truth(wide, target, weight, reduction=reduction, **options)
        v = normal(*got.shape, scale=1.0, seed=1).requires_grad_()
        values = second(got, x, v)
        for a, b in zip(
            values, second(exact, wide, v.detach().double().requires_grad_()), strict=True
        ):
            assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


def test_gradients_of_gradients_over_several_dimensions_equal_float64(body):
    x = normal(2, 5, 3).requires_grad_()
    wide = x.detach().double().requires_grad_()
    target = torch.tensor([[1, -100, 4], [0, 0, 2]])
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.1}

    def penalty(loss, x):
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    got = penalty(cross_entropy(x, target, **options), x)
    exact = penalty(truth(wide, target, **options), wide)
    assert_close(got.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gradients_of_the_reference_are_the_derivatives(options):
    x, weight = normal(3, 4).double().requires_grad_(), torch.rand(4, dtype=F64)
    target = torch.tensor([1, -100, 3])

    def call(x):
        return cross_entropy(x, target, weight, impl="reference", **options)

    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


def test_a_second_backward_pass_gives_the_same(impl):
    x = normal(3, 5).requires_grad_()
    loss = cross_entropy(x, torch.tensor([1, 0, 4]), label_smoothing=0.1, impl=impl)
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, x)[0])


def test_logits_that_were_changed_are_not_used_for_their_gradient(impl):
    x = normal(3, 5).requires_grad_()
    logits = x * 1
    loss = cross_entropy(logits, torch.tensor([1, 0, 4]), impl=impl)
    if impl == "reference":
        return  # it keeps the log-softmax and not the logits
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_kernels
def test_two_threads_give_the_bits_of_one(body, set_threads):
    cases = (normal(1, 200_001), normal(3, 100_000), normal(301, 1000), normal(300, 301).T)
    for x in cases:
        target = classes(len(x), count=x.shape[1])
        for options in OPTIONS.values():
            results = []
            for threads in (1, 2):
                set_threads(threads)
                assert torch.get_num_threads() == threads
                leaf = x.detach().requires_grad_()
                loss = cross_entropy(leaf, target, **options)
                loss.backward()
                results.append((loss.detach(), leaf.grad))
            for one, two in zip(*results, strict=True):
                assert torch.equal(one, two)


# what is refused


def test_shapes_that_do_not_fit_are_refused():
    x = normal(3, 5)
    with pytest.raises(ValueError, match="input is a scalar"):
        cross_entropy(torch.tensor(1.0), torch.tensor(0))
    for target in (torch.zeros(4), torch.zeros(3, 1), torch.zeros(())):
        with pytest.raises(
            ValueError, match=r"target .* for input \(3, 5\); \(3,\) would be right"
        ):
            cross_entropy(x, target.long())
    with pytest.raises(ValueError, match=r"\(2, 3\) would be right"):
        cross_entropy(normal(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target \(3,\) holds probabilities"):
        cross_entropy(x, torch.rand(3))
    for target in (torch.zeros(3, dtype=torch.int64), torch.rand(3, 5)):
        for weight in (torch.rand(4), torch.rand(3, 5), torch.rand(())):
            with pytest.raises(ValueError, match=r"weight is .*5"):
                cross_entropy(x, target, weight)


def test_targets_that_are_no_classes_are_refused(impl):
    x = normal(3, 5)
    for wrong in (torch.int32, torch.uint8, torch.bool):
        with pytest.raises(ValueError, match="classes come as int64"):
            cross_entropy(x, torch.zeros(3).to(wrong), impl=impl)
    for wrong in (5, -1, 10**12, -(2**63)):
        for reduction in REDUCTIONS:
            with pytest.raises(IndexError, match="out of bounds"):
                cross_entropy(x, torch.tensor([0, wrong, 1]), reduction=reduction, impl=impl)
    with pytest.raises(IndexError, match="out of bounds"):
        cross_entropy(x, torch.tensor([0, -100, 1]), ignore_index=2, impl=impl)


def test_options_that_make_no_sense_are_refused():
    x, target = normal(3, 5), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="reduction='batch' is none of 'mean', 'sum', 'none'"):
        cross_entropy(x, target, reduction="batch")
    for smoothing in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=r"label_smoothing=.* is not within"):
            cross_entropy(x, target, label_smoothing=smoothing)
    for scale in (-1e-4, NAN):
        with pytest.raises(ValueError, match=r"lse_square_scale=.* is below 0"):
            cross_entropy(x, target, lse_square_scale=scale)
    with pytest.raises(ValueError, match="impl='gpu' is none of 'reference', 'cpu'"):
        cross_entropy(x, target, impl="gpu")


@needs_kernels
def test_the_kernel_says_what_it_does_not_take():
    target = torch.tensor([0, 1, 2])
    with pytest.raises(RuntimeError, match=r"impl='cpu', but .*float64"):
        cross_entropy(normal(3, 5).double(), target, impl="cpu")
    with pytest.raises(RuntimeError, match=r"impl='cpu', but .*meta"):
        cross_entropy(torch.empty(3, 5, device="meta"), target.to("meta"), impl="cpu")


def test_float64_goes_to_the_reference():
    x, target = normal(3, 5).double(), torch.tensor([0, 1, 2])
    assert_close(cross_entropy(x, target), F.cross_entropy(x, target), rtol=1e-14, atol=1e-14)
