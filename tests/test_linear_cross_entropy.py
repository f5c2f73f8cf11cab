"""linear_cross_entropy: F.cross_entropy of F.linear in float64, in the memory of some blocks."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import cross_entropy, linear_cross_entropy

from .linear_layer import OPTIONS, assert_near, check, largest, layer, truth
from .native import DTYPES, F16, F32, F64, INF, NAN, REDUCTIONS, needs_kernels, normal

# rows, width, classes: small primes, and around tiles, panels, blocks and segments
SIZES = (
    (1, 1, 1),
    (1, 3, 2),
    (2, 5, 7),
    (3, 1, 13),
    (7, 11, 5),
    (31, 17, 37),
    (5, 64, 127),
    (8, 65, 128),
    (9, 63, 129),
    (127, 16, 130),
    (128, 32, 64),
    (129, 33, 300),
    (257, 13, 31),
    (6, 256, 511),
    (6, 257, 513),
    (17, 300, 512),
    (3, 19, 1025),
    (130, 31, 1100),
)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_every_size_equals_float64(body, size):
    rows, width, count = size
    class_weight = torch.rand(count, generator=torch.Generator().manual_seed(1)) + 0.1
    for bias, (i, reduction) in itertools.product((False, True), enumerate(REDUCTIONS)):
        call = layer(rows, width, count, bias=bias)
        check(*call, reduction=reduction)
        options = list(OPTIONS.values())[i + 1 + bias]
        check(*call, reduction=reduction, class_weight=class_weight, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_option_equals_float64(impl, dtype, options):
    for size in ((5, 7, 11), (130, 33, 140)):
        class_weight = torch.rand(size[2]) + 0.1
        for bias, reduction in itertools.product((False, True), REDUCTIONS):
            call = layer(*size, dtype=dtype, bias=bias, ignored=0.3)
            for w in (None, class_weight):
                check(*call, impl=impl, class_weight=w, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_body_takes_every_dtype(body, dtype):
    for size in ((5, 7, 11), (130, 33, 140), (9, 40, 1200)):
        for bias, reduction in itertools.product((False, True), REDUCTIONS):
            call = layer(*size, dtype=dtype, bias=bias, ignored=0.2)
            check(*call, reduction=reduction, label_smoothing=0.1, lse_square_scale=1e-3)


@st.composite
def calls(draw):
    rows, width = draw(st.integers(0, 40)), draw(st.integers(1, 40))
    count = draw(st.integers(1, 300))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 10**6))
    share = draw(st.sampled_from((0.0, 0.3, 1.0)))
    options = {
        "ignore_index": -100,
        "label_smoothing": draw(st.sampled_from((0.0, 0.1))),
        "lse_square_scale": draw(st.sampled_from((0.0, 1e-3))),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "class_weight": torch.rand(count) + 0.1 if draw(st.booleans()) else None,
    }
    call = layer(
        rows, width, count, dtype=dtype, bias=draw(st.booleans()), ignored=share, seed=seed
    )
    return call, options, draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))


def test_any_call_equals_float64(body):
    @settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(call=calls())
    def equals(call):
        (hidden, weight, target, bias), options, wanted = call
        if not any(w for w, t in zip(wanted, (hidden, weight, bias), strict=True) if t is not None):
            wanted = (True, False, False)
        if not (target != -100).any() and options["reduction"] == "mean":
            options["reduction"] = "sum"  # the mean of nothing has a test of its own
        check(hidden, weight, target, bias, wanted=wanted, **options)

    equals()


def test_strides_are_of_no_consequence(body):
    hidden, weight, target, bias = layer(23, 17, 140, ignored=0.2)
    strided = {
        "transposed": (hidden.T.contiguous().T, weight.T.contiguous().T),
        "stepped": (hidden.repeat_interleave(2, 1)[:, ::2], weight.repeat_interleave(3, 1)[:, ::3]),
        "stepped rows": (hidden.repeat_interleave(2, 0)[::2], weight.repeat_interleave(2, 0)[::2]),
        "wide rows": (F.pad(hidden, (3, 2))[:, 3:-2], F.pad(weight, (1, 5))[:, 1:-5]),
    }
    targets = target.repeat_interleave(2)[::2]
    for h, w in strided.values():
        assert torch.equal(h, hidden)
        assert torch.equal(w, weight)
        for reduction in REDUCTIONS:
            check(h, w, targets, bias.repeat_interleave(2)[::2], reduction=reduction)
    for reduction in REDUCTIONS:  # rows that lie in one place
        check(hidden[:1].expand(23, 17), weight[:1].expand(140, 17), target, reduction=reduction)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 4), (0,), (2, 0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_come_in_any_shape(impl, lead, reduction):
    if reduction == "mean" and 0 in lead:
        pytest.skip("the mean of nothing has a test of its own")
    _, weight, _, bias = layer(1, 5, 7)
    hidden = normal(*lead, 5)
    target = torch.randint(7, lead, generator=torch.Generator().manual_seed(0))
    check(hidden, weight, target, bias, impl=impl, reduction=reduction)


def test_batch_and_time_may_be_swapped(impl):
    hidden, target = normal(4, 3, 5).transpose(0, 1), torch.arange(12).reshape(4, 3).T % 7
    _, weight, _, bias = layer(1, 5, 7)
    for reduction in REDUCTIONS:
        check(hidden, weight, target, bias, impl=impl, reduction=reduction)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("ignored", ["none", "some", "first", "last", "all but one"])
def test_ignored_rows_count_for_nothing(impl, ignored, options):
    hidden, weight, target, bias = layer(9, 5, 7)
    away = {
        "none": [],
        "some": [1, 4, 5],
        "first": [0, 1, 2],
        "last": [6, 7, 8],
        "all but one": [0, 1, 2, 3, 5, 6, 7, 8],
    }[ignored]
    for ignore_index in (-100, -1, 3):
        marked = target.clone()
        marked[away] = ignore_index
        for reduction in REDUCTIONS:
            option = {**options, "ignore_index": ignore_index, "reduction": reduction}
            check(hidden, weight, marked, bias, impl=impl, **option)
            check(hidden, weight, marked, bias, impl=impl, class_weight=torch.rand(7) + 1, **option)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_batch_that_is_all_ignored_is_nan_zero_or_zeros(impl, options):
    for dtype, rows in itertools.product(DTYPES, (0, 3)):
        tensors = layer(rows, 5, 7, dtype=dtype)
        target = torch.full((rows,), -100)
        for reduction in REDUCTIONS:
            leaves = [tensors[i].detach().requires_grad_() for i in (0, 1, 3)]
            loss = linear_cross_entropy(
                leaves[0], leaves[1], target, leaves[2], reduction=reduction, impl=impl, **options
            )
            if reduction == "mean":
                assert loss.isnan()
                continue
            assert torch.equal(loss, torch.zeros_like(loss))
            loss.sum().backward()
            for leaf in leaves:
                assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_an_ignored_row_may_hold_anything_at_no_gradient(body):
    hidden, weight, target, bias = layer(5, 7, 140)
    target[2] = -100
    for flaw, reduction in itertools.product((NAN, INF, 1e30), REDUCTIONS):
        results = []
        for fill in (0.0, flaw):
            leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
            with torch.no_grad():
                leaves[0][2] = fill
            loss = linear_cross_entropy(
                leaves[0], leaves[1], target, leaves[2], reduction=reduction, label_smoothing=0.1
            )
            loss.sum().backward()
            results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
        for clean, flawed in zip(*results, strict=True):
            assert torch.equal(clean, flawed)
            assert clean.isfinite().all()


# special values


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_flaw_spoils_the_rows_that_see_it_and_no_other(body, reduction):
    hidden, weight, target, bias = layer(5, 7, 140)
    for flaw in (NAN, INF):
        spoilt = hidden.clone()
        spoilt[3, 2] = flaw
        for grad in (False, True):
            leaf = spoilt.clone().requires_grad_(grad)
            loss = linear_cross_entropy(leaf, weight, target, bias, reduction=reduction)
            if reduction != "none":
                assert loss.isnan()
                continue
            assert loss[3].isnan()
            clean = linear_cross_entropy(hidden, weight, target, bias, reduction=reduction)
            assert_close(loss.detach()[:3], clean[:3])


def test_a_bias_of_minus_infinity_takes_a_class_away(body):
    hidden, weight, target, bias = layer(5, 7, 300)
    away = torch.ones(300, dtype=torch.bool)
    away[target] = False
    away[100:140] = True  # where it takes whole vectors, and a target or two
    bias = bias.masked_fill(away, -INF)
    for reduction, options in itertools.product(REDUCTIONS, ({}, {"lse_square_scale": 0.1})):
        check(hidden, weight, target, bias, reduction=reduction, **options)
        kept = target[bias[target] > -INF]
        check(hidden[: len(kept)], weight, kept, bias, reduction=reduction, **options)


@pytest.mark.parametrize("level", [1e3, 1e5, 2e5, 1e6, 1e15, 1e20, 1e25, 1e30, 1e35])
def test_logits_may_be_as_large_as_float32_lets_them(body, level):
    # one logit above the others by itself: the loss is 0, or what lies between two of them
    hidden = torch.tensor([[level], [level], [-level]])
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    target = torch.tensor([0, 1, 0])
    for grad in (False, True):
        leaf = hidden.clone().requires_grad_(grad)
        loss = linear_cross_entropy(leaf, weight, target, reduction="none")
        assert_close(loss.detach(), torch.tensor([0.0, level, 2 * level]))
        total = linear_cross_entropy(leaf, weight, target, reduction="sum")
        assert_close(total.detach(), torch.tensor(3 * level))
        if grad:
            total.backward()
            assert_close(leaf.grad, torch.tensor([[0.0], [1.0], [-2.0]]))


# gradients


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)))
def test_only_the_gradients_that_are_wanted_are_made(impl, wanted):
    if not any(wanted):
        hidden, weight, target, bias = layer(9, 5, 140)
        assert not linear_cross_entropy(hidden, weight, target, bias, impl=impl).requires_grad
        return
    for size in ((9, 5, 7), (130, 40, 300)):
        for reduction in REDUCTIONS:
            check(*layer(*size), impl=impl, wanted=wanted, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_backward_pass_gives_the_same(impl, reduction):
    hidden, weight, target, bias = layer(130, 33, 300, ignored=0.2)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    options = {"reduction": reduction, "label_smoothing": 0.1, "lse_square_scale": 1e-3}
    loss = linear_cross_entropy(hidden, weight, target, bias, impl=impl, **options)
    g = normal(*loss.shape, seed=7)
    first = torch.autograd.grad(loss, leaves, g, retain_graph=True)
    kept = [f.clone() for f in first]
    second = torch.autograd.grad(loss, leaves, g, retain_graph=True)
    doubled = torch.autograd.grad(loss, leaves, 2 * g)
    for a, b, c, d in zip(first, kept, second, doubled, strict=True):
        assert torch.equal(a, b)  # nobody wrote into it since
        assert_close(c, a, rtol=1e-5, atol=1e-6 * largest(a))
        assert_close(d, 2 * a, rtol=1e-5, atol=1e-6 * largest(a))


def test_a_graph_that_is_gone_says_so(impl):
    hidden, weight, target, _ = layer(5, 7, 11)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, impl=impl)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@needs_kernels
def test_a_layer_that_was_changed_is_not_used_for_its_gradient():
    hidden, weight, target, _ = layer(5, 7, 11)
    hidden.requires_grad_()
    for reduction in REDUCTIONS:
        kept = weight.clone()
        loss = linear_cross_entropy(hidden, kept, target, reduction=reduction, impl="cpu").sum()
        kept.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_follows_the_gradient_of_the_loss(impl, dtype):
    # a loss is divided where gradients accumulate, and multiplied by 2^16 where float16 is trained
    hidden, weight, target, bias = layer(40, 17, 50, dtype=dtype)
    for factor, reduction in itertools.product((0.0, 1 / 3, -1.0, 7.0), ("mean", "sum")):
        leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
        wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
        g = torch.tensor(factor, dtype=dtype)
        call = (leaves[0], leaves[1], target, leaves[2])
        linear_cross_entropy(*call, reduction=reduction, impl=impl).backward(g)
        truth(wide[0], wide[1], target, wide[2], reduction=reduction).backward(g.double())
        for leaf, exact in zip(leaves, wide, strict=True):
            assert_near(leaf.grad, exact.grad, dtype, largest(exact.grad))


def test_a_scaled_loss_saves_what_float16_cannot_hold(impl):
    # the reason to scale a loss: gradients of the weight are about 1e-8 here, which float16 has not
    hidden, weight, target, bias = layer(64, 16, 4000, dtype=F16)
    hidden, bias = hidden * 1e-3, bias * 0.01
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    scale = 2.0**15
    loss = linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], impl=impl)
    (loss.float() * scale).backward()
    (truth(wide[0], wide[1], target, wide[2]) * scale).backward()
    for leaf, exact in zip(leaves, wide, strict=True):
        assert_near(leaf.grad, exact.grad, F16, largest(exact.grad))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_of_gradients_equal_float64(body, options, reduction):
    hidden, weight, target, bias = layer(4, 3, 5)
    target[1] = -100
    option = {**options, "reduction": reduction, "class_weight": torch.rand(5) + 0.1}

    def second(function, dtype, *tensors):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        loss = function(leaves[0], leaves[1], target, leaves[2], **option)
        v = normal(*loss.shape, seed=5).to(dtype).requires_grad_()
        first = torch.autograd.grad(loss, leaves, v, create_graph=True)
        penalty = sum(f.square().sum() for f in first)
        return *first, *torch.autograd.grad(penalty, (*leaves, v), allow_unused=True)

    got = second(linear_cross_entropy, F32, hidden, weight, bias)
    exact = second(truth, F64, hidden, weight, bias)
    for a, b in zip(got, exact, strict=True):
        assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_gradients_of_the_reference_are_the_derivatives(monkeypatch, options, reduction):
    monkeypatch.setattr("aftermax.reference.BLOCK_LOGITS", 10)  # two rows in a block
    hidden, weight, target, bias = (t.double() for t in layer(5, 3, 5))
    target = target.long()
    target[1] = -100
    option = {**options, "reduction": reduction, "class_weight": torch.rand(5, dtype=F64)}

    def call(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, target, bias, impl="reference", **option)

    leaves = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_cross_entropy_of_the_layer(impl, options):
    hidden, weight, target, bias = layer(9, 5, 7, ignored=0.3)
    for reduction in REDUCTIONS:
        option = {**options, "reduction": reduction, "impl": impl}
        got = linear_cross_entropy(hidden, weight, target, bias, **option)
        assert_close(got, cross_entropy(F.linear(hidden, weight, bias), target, **option))


# threads and memory


@needs_kernels
def test_threads_do_not_change_a_bit(body, set_threads):
    for size, reduction in itertools.product(((5, 7, 11), (300, 33, 1500)), REDUCTIONS):
        hidden, weight, target, bias = layer(*size, ignored=0.1)
        results = []
        for threads in (1, 2, 5):
            set_threads(threads)
            assert torch.get_num_threads() == threads
            leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
            call = (leaves[0], leaves[1], target, leaves[2])
            loss = linear_cross_entropy(*call, reduction=reduction, label_smoothing=0.1)
            loss.sum().backward()
            results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
        for one, two, five in zip(*results, strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one, five)


MEMORY = """
import pathlib, resource, sys
import torch
from torch.nn.functional import cross_entropy, linear
from aftermax import linear_cross_entropy

how, rows, width, count = sys.argv[1], *map(int, sys.argv[2:])
gradients = how.endswith("gradients")

def call(rows, count):
    hidden = torch.randn(rows, width, requires_grad=gradients)
    weight = torch.randn(count, width, requires_grad=gradients)
    target = torch.randint(count, (rows,))
    if how.startswith("whole"):
        loss = cross_entropy(linear(hidden, weight), target)
    else:
        loss = linear_cross_entropy(hidden, weight, target, impl="cpu")
    if gradients:
        loss.backward()

def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # where the other one begins with what the parent had
        line = next(l for l in status.read_text().splitlines() if l.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

call(4, 1000)  # what is loaded and started at the first call
before = peak()
call(rows, count)
print((peak() - before) / (4 * rows * count))
"""


def share_of_the_logits(how, rows, width, count):
    """What a call adds to the memory of its process, in matrices of logits."""
    command = [sys.executable, "-c", MEMORY, how, str(rows), str(width), str(count)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout)


@needs_kernels
def test_the_logits_are_never_whole():
    pytest.importorskip("resource")
    size = (1024, 16, 20000)
    # the measure sees a matrix where there is one
    assert share_of_the_logits("whole", *size) > 0.8
    assert share_of_the_logits("ours", *size) < 1 / 3


@needs_kernels
def test_the_logits_are_never_whole_where_gradients_are_made():
    # a quarter of the rows at a time where they are few, 20 million logits where they are many
    pytest.importorskip("resource")
    for size in ((1024, 16, 20000), (5120, 16, 20000)):
        assert share_of_the_logits("ours, gradients", *size) < 1 / 3


# what is refused


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, target, bias = layer(3, 5, 7)
    right = r"\(\.\.\., D\) and \(C, D\) would be right"
    for h, w in (
        (torch.tensor(1.0), weight),
        (hidden, weight[0]),
        (hidden, weight[None]),
        (hidden, weight[:, :4]),
        (hidden, weight.T),
    ):
        with pytest.raises(ValueError, match=right):
            linear_cross_entropy(h, w, target)
    for t in (target[:2], target[None], target[:, None], torch.rand(3, 7)):
        with pytest.raises(ValueError, match=r"target .* for hidden \(3, 5\); \(3,\) would be"):
            linear_cross_entropy(hidden, weight, t)
    for b in (bias[:6], bias[None], bias[0]):
        with pytest.raises(ValueError, match=r"bias is .*; \(7,\) would be right"):
            linear_cross_entropy(hidden, weight, target, b)
    for w in (torch.rand(6), torch.rand(1, 7), torch.rand(())):
        with pytest.raises(ValueError, match=r"weight is .* each of 7 classes"):
            linear_cross_entropy(hidden, weight, target, class_weight=w)


def test_dtypes_that_do_not_agree_are_refused():
    hidden, weight, target, bias = layer(3, 5, 7)
    with pytest.raises(ValueError, match=r"weight is .*bfloat16.* hidden .*float32"):
        linear_cross_entropy(hidden, weight.bfloat16(), target)
    with pytest.raises(ValueError, match=r"bias is .*float64.* hidden .*float32"):
        linear_cross_entropy(hidden, weight, target, bias.double())
    for wrong in (torch.int32, F32):
        with pytest.raises(ValueError, match="classes come as int64"):
            linear_cross_entropy(hidden, weight, target.to(wrong))


def test_options_that_make_no_sense_are_refused():
    hidden, weight, target, _ = layer(3, 5, 7)
    with pytest.raises(ValueError, match="reduction='batch' is none of"):
        linear_cross_entropy(hidden, weight, target, reduction="batch")
    with pytest.raises(ValueError, match="label_smoothing=2 is not within"):
        linear_cross_entropy(hidden, weight, target, label_smoothing=2)
    with pytest.raises(ValueError, match="lse_square_scale=-1 is below 0"):
        linear_cross_entropy(hidden, weight, target, lse_square_scale=-1)
    with pytest.raises(ValueError, match="impl='cpu-online' is none of"):
        linear_cross_entropy(hidden, weight, target, impl="cpu-online")


def test_targets_that_are_no_classes_are_refused(impl):
    hidden, weight, target, _ = layer(3, 5, 7)
    for wrong, reduction in itertools.product((7, -1, 10**12, -(2**63)), REDUCTIONS):
        target[1] = wrong
        for leaf in (hidden, hidden.clone().requires_grad_()):
            with pytest.raises(IndexError, match="out of bounds"):
                linear_cross_entropy(leaf, weight, target, reduction=reduction, impl=impl)


@needs_kernels
def test_the_kernel_says_what_it_does_not_take():
    hidden, weight, target, _ = layer(3, 5, 7)
    with pytest.raises(RuntimeError, match=r"impl='cpu', but .*float64"):
        linear_cross_entropy(hidden.double(), weight.double(), target, impl="cpu")
    with pytest.raises(RuntimeError, match=r"impl='cpu', but .*meta"):
        linear_cross_entropy(hidden.to("meta"), weight.to("meta"), target.to("meta"), impl="cpu")


def test_float64_goes_to_the_reference():
    hidden, weight, target, bias = (t.double() for t in layer(3, 5, 7))
    got = linear_cross_entropy(hidden, weight, target.long(), bias)
    assert_close(got, truth(hidden, weight, target.long(), bias), rtol=1e-14, atol=1e-14)


def test_a_layer_without_width_is_its_bias(impl):
    _, _, target, bias = layer(3, 5, 7)
    hidden, weight = torch.empty(3, 0), torch.empty(7, 0)
    check(hidden, weight, target, bias, impl=impl, wanted=(False, False, True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_layer_without_classes_has_no_loss(reduction):
    # every row has to be ignored there; the kernel once divided by the number of classes
    hidden = torch.randn(2, 18, requires_grad=True)
    target = torch.full((2,), -100)
    loss = linear_cross_entropy(hidden, torch.empty(0, 18), target, reduction=reduction)
    loss.sum().backward()
    assert torch.isnan(loss).all() if reduction == "mean" else not loss.any()
    assert not hidden.grad.any()
