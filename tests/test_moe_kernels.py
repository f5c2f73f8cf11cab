"""The experts on the CPU kernels: the reference in float64, forward and backward, at any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu
from torch.testing import assert_close

from aftermax import kernels
from aftermax.kernels.expert_ops import schemas
from aftermax.moe import Experts, Routing, TaskRouter, dispatch, expert_layer, table_gelu

from .native import BF16, F32, F64, INF, NAN, needs_kernels, normal

DTYPES = (F32, BF16)
NAMES = ("x", "weights", "w1", "b1", "w2", "b2")

# tokens, width, hidden, experts, k: around vectors, tiles and blocks, with experts that nobody has
SIZES = (
    (1, 1, 1, 1, 1),
    (1, 16, 32, 4, 2),
    (2, 3, 5, 2, 2),
    (2, 33, 1, 9, 1),
    (15, 7, 31, 3, 1),
    (16, 17, 33, 4, 4),
    (17, 64, 65, 5, 2),
    (63, 31, 48, 2, 1),
    (63, 48, 100, 16, 4),
    (257, 40, 67, 3, 2),
    (300, 24, 20, 1, 1),
    (9, 1030, 50, 2, 1),
    (9, 50, 1030, 2, 1),
)


def case(tokens, width, hidden, experts, k, *, dtype=F32, bias=True, padding=0.0, seed=0):
    """Tensors of NAMES, and an index (tokens, k)."""
    shapes = ((experts, hidden, width), (experts, hidden), (experts, width, hidden))
    scales = (width**-0.5, 1, hidden**-0.5, 1)
    w1, b1, w2, b2 = (
        normal(*shape, scale=scale, dtype=dtype, seed=seed + i)
        for i, (shape, scale) in enumerate(zip((*shapes, (experts, width)), scales, strict=True))
    )
    weights, index = normal(tokens, experts, seed=seed + 5).softmax(-1).topk(k)
    hidden_tokens = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < padding
    weights[hidden_tokens], index[hidden_tokens] = 0, -1
    x = normal(tokens, width, dtype=dtype, seed=seed + 6)
    return (x, weights, w1, b1 if bias else None, w2, b2 if bias else None), index


def run(tensors, index, towards, wanted=None, activation=gelu, **options):
    """The result, and the gradients of NAMES that are wanted; None for others."""
    wanted = wanted or [True] * len(NAMES)
    leaves = [
        None if t is None else t.detach().requires_grad_(w)
        for t, w in zip(tensors, wanted, strict=True)
    ]
    x, weights, w1, b1, w2, b2 = leaves
    logits = torch.zeros(len(x), len(w1))
    routing = Routing(weights, index, logits, logits)
    out = expert_layer(x, routing, w1, b1, w2, b2, activation, **options)
    if out.requires_grad:
        out.backward(towards)
    return [out.detach()] + [None if t is None else t.grad for t in leaves]


def check(tensors, index, wanted=None, **options):
    """The kernel against float64: errors are held against the sum of the sizes of what is added up
    (gelu(z) <= |z|, and its derivative is below 1.13)."""
    dtype = tensors[0].dtype
    towards = normal(*tensors[0].shape, dtype=dtype, seed=11)
    got = run(tensors, index, towards, wanted, impl="cpu", **options)
    wide = [None if t is None else t.double() for t in tensors]
    exact = run(wide, index, towards.double(), wanted, impl="reference", **options)
    sizes = [None if t is None else t.abs() for t in wide]
    bound = run(sizes, index, towards.double().abs(), wanted, lambda z: 1.13 * z, **options)
    half = torch.finfo(BF16).eps / 2
    rounded = dtype == BF16 and kernels.isa() == "avx512bf16"  # hidden vectors and their gradients
    for name, a, b, size in zip(("out", *NAMES), got, exact, bound, strict=True):
        if b is None:
            assert a is None, name
            continue
        assert a.dtype == (F32 if name == "weights" else dtype)
        error = (a.double() - b).abs()
        allowed = 4e-7 * size + 1e-37
        if dtype == BF16 and name != "weights":
            allowed = allowed + half * b.abs()
        if rounded:
            allowed = allowed + half * size
        assert (error <= allowed).all(), (name, float((error / allowed).max()))
    with torch.no_grad():
        assert torch.equal(run(tensors, index, None, [False] * 6, impl="cpu", **options)[0], got[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_every_size_equals_float64(body, size, dtype):
    for bias in (True, False):
        check(*case(*size, dtype=dtype, bias=bias))
    check(*case(*size, dtype=dtype, padding=0.3, seed=20))


@st.composite
def calls(draw):
    experts = draw(st.integers(1, 6))
    size = (draw(st.integers(0, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 70)), experts)
    k, dtype = draw(st.integers(1, experts)), draw(st.sampled_from(DTYPES))
    tensors, index = case(
        *size,
        k,
        dtype=dtype,
        bias=draw(st.booleans()),
        padding=draw(st.sampled_from((0.0, 0.3, 1.0))),
        seed=draw(st.integers(0, 10**6)),
    )
    limit = draw(st.sampled_from(({}, {"capacity": 1}, {"capacity": 3}, {"capacity_factor": 0.7})))
    wanted = draw(st.tuples(*[st.booleans()] * len(NAMES)))
    return (
        tensors,
        index,
        [w and t is not None for w, t in zip(wanted, tensors, strict=True)],
        limit,
    )


def test_any_call_equals_float64(body):
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(call=calls())
    def equals(call):
        tensors, index, wanted, limit = call
        check(tensors, index, wanted, **limit)

    equals()


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_may_be_wanted_alone(name):
    for dtype in DTYPES:
        check(*case(19, 20, 37, 4, 2, dtype=dtype), [n == name for n in NAMES])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_may_have_the_same_token_twice(body, dtype):
    tensors, _ = case(21, 9, 12, 3, 2, dtype=dtype)
    check(tensors, torch.arange(21)[:, None].expand(21, 2).remainder(3).contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_nobody_sees_never_matters(body, dtype):
    """Tokens without an expert, what comes back to them, and experts without a token."""
    tensors, index = case(33, 21, 35, 4, 2, dtype=dtype, padding=0.4)
    index = torch.where(index == 2, 1, index)
    towards = normal(33, 21, dtype=dtype)
    expected = run(tensors, index, towards, impl="cpu")
    unseen = index[:, 0] < 0
    assert unseen.any()
    for filler in (NAN, INF):
        x, weights, *layer = (t.clone() for t in tensors)
        x[unseen], weights[unseen] = filler, filler
        for t in layer:
            t[2] = filler
        back = towards.clone()
        back[unseen] = filler
        got = run((x, weights, *layer), index, back, impl="cpu")
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
    out, of_x, of_weights, *of_layer = expected
    assert not any(t[unseen].any() for t in (out, of_x, of_weights))
    assert not any(t[2].any() for t in of_layer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_seen_and_not_finite_spoils_its_own_tokens_alone(body, dtype):
    tensors, index = case(19, 8, 40, 5, 2, dtype=dtype)
    clean = run(tensors, index, None, [False] * 6, impl="cpu")[0]
    tensors[0][3, 5] = NAN
    out = run(tensors, index, None, [False] * 6, impl="cpu")[0]
    assert out[3].isnan().all()
    others = torch.arange(19) != 3
    assert torch.equal(out[others], clean[others])


@needs_kernels
@pytest.mark.parametrize("limit", [{}, {"capacity": 4}, {"capacity_factor": 0.5}])
def test_what_a_capacity_drops_is_what_dispatch_says(limit):
    tensors, index = case(40, 6, 7, 4, 2)
    queues = dispatch(index, 4, **limit)
    kept = index.masked_fill(queues.dropped, -1)
    towards = normal(40, 6)
    dropped = run(tensors, index, towards, impl="cpu", **limit)
    for a, b in zip(dropped, run(tensors, kept, towards, impl="cpu"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(body, dtype, set_threads):
    for size in ((129, 48, 200, 6, 2), (400, 20, 30, 1, 1), (3, 70, 90, 4, 4)):
        tensors, index = case(*size, dtype=dtype)
        towards, results = normal(*tensors[0].shape, dtype=dtype), []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(run(tensors, index, towards, impl="cpu"))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_are_of_no_consequence(dtype):
    (x, weights, w1, b1, w2, b2), index = case(23, 18, 35, 4, 2, dtype=dtype)
    ways = {
        "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
        "stepped": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "wide rows": lambda t: torch.nn.functional.pad(t, (3, 2))[..., 3:-2],
        "experts apart": lambda t: t.repeat_interleave(2, 0)[::2],
    }
    towards = normal(23, 18, dtype=dtype)
    expected = run((x, weights, w1, b1, w2, b2), index, towards, impl="cpu")
    for way in ways.values():
        moved = [way(t) for t in (x, weights, w1, b1, w2, b2)]
        got = run(moved, way(index), way(towards), impl="cpu")
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, rtol=0, atol=0)


@needs_kernels
def test_tokens_may_have_leading_dimensions_and_int32_index():
    layer, x = Experts(8, 12, experts=4, tasks=2), torch.randn(2, 3, 5, 8)
    whole, routing = layer(x, return_routing=True)
    flat = Routing(*(t.flatten(0, 2) for t in (routing.weights, routing.index.int())), *(
        t.flatten(0, 2) for t in (routing.probabilities, routing.logits)
    ))  # fmt: skip
    out = expert_layer(x.view(30, 8), flat, layer.w1, layer.b1, layer.w2, layer.b2, impl="cpu")
    assert torch.equal(out.view(x.shape), whole)


# ---- gelu ----------------------------------------------------------------------------------------


def _ulps(got: Tensor, exact: Tensor) -> float:
    ulp = torch.finfo(F32).eps * torch.exp2(exact.abs().clamp_min(2.0**-126).log2().floor())
    return float(((got.double() - exact).abs() / ulp).max())


def test_gelu_and_its_derivative_keep_their_digits_in_the_tail(body):
    x = torch.cat([torch.linspace(-12, 12, 40001), torch.logspace(-30, 0, 301)])[:, None]
    one = torch.ones(1, 1, 1)
    out, of_x, *_ = run(
        (x, torch.ones(len(x), 1), one, None, one, None),
        torch.zeros(len(x), 1).long(),
        torch.ones_like(x),
        impl="cpu",
    )
    wide = x.double().flatten()
    below = torch.special.erfc(-wide / 2**0.5) / 2  # 1 + erf has lost its digits there
    density = (-wide.square() / 2).exp() / (2 * torch.pi) ** 0.5
    assert _ulps(out.flatten(), wide * below) < 7
    assert _ulps(out[x > 1], (wide * below)[x.flatten() > 1]) < 2
    exact = below + wide * density
    off = (of_x.flatten().double() - exact).abs()
    assert (off <= 4e-7 * (below + wide.abs() * density)).all()


def test_gelu_far_out(body):
    x = torch.tensor([[-3e38], [-1e4], [-40.0], [-0.0], [0.0], [40.0], [1e4], [3e38], [INF], [NAN]])
    one = torch.ones(1, 1, 1)
    out = run(
        (x, torch.ones(len(x), 1), one, None, one, None),
        torch.zeros(len(x), 1).long(),
        None,
        [False] * 6,
        impl="cpu",
    )[0]
    assert_close(out, x.clamp_min(0), rtol=0, atol=0, equal_nan=True)


# ---- with torch ----------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("name", schemas())
def test_torch_finds_nothing_wrong_with_the_operator(name):
    operator = getattr(torch.ops.aftermax, name).default
    for dtype in DTYPES:
        for bias in (True, False):
            (x, weights, w1, b1, w2, b2), index = case(7, 5, 6, 3, 2, dtype=dtype, bias=bias)
            b1, b2 = (x.new_empty(0) if b is None else b for b in (b1, b2))
            call = (x, index, weights, w1, b1, w2, b2, 2, 0.0)
            if name.endswith("backward"):
                saved = torch.ops.aftermax.experts(*call)[1]
                wanted = (True, False, True, bias, True, bias)
                torch.library.opcheck(operator, (x, saved, *call, *wanted))
            else:
                graph = name == "experts"
                leaves = [t.requires_grad_(graph and t.is_floating_point()) for t in call[:7]]
                torch.library.opcheck(operator, (*leaves, *call[7:]))


@needs_kernels
def test_the_layer_is_one_graph():
    layer = Experts(12, 20, experts=4, impl="cpu")
    x = torch.randn(2, 5, 12, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for call in (layer, compiled):
        call(x).square().sum().backward()
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    twice = [p.grad.clone() for p in (x, *layer.parameters())]
    layer.zero_grad()
    x.grad = None
    layer(x).square().sum().backward()
    for both, once in zip(twice, (x, *layer.parameters()), strict=True):
        assert_close(both, 2 * once.grad)


@needs_kernels
def test_under_autocast_it_runs_in_bfloat16():
    layer, x = Experts(16, 24, experts=4), torch.randn(9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == F32
    assert torch.equal(out, out.bfloat16().float())
    assert_close(out, layer(x), rtol=2e-2, atol=2e-2)
    out.sum().backward()
    assert layer.w1.grad.dtype == F32


@needs_kernels
def test_gates_learn_through_the_kernel():
    layer = Experts(6, 9, experts=3, impl="cpu")
    other = Experts(6, 9, experts=3, impl="reference")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(7, 6)
    for one in (layer, other):
        one(x).square().sum().backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        assert_close(a.grad, b.grad)


# ---- which implementation ------------------------------------------------------------------------


@needs_kernels
def test_none_picks_the_kernel_where_it_can(monkeypatch):
    called = []

    def experts(*inputs):
        called.append(inputs[0].dtype)
        return torch.zeros_like(inputs[0])

    monkeypatch.setattr("aftermax.moe.experts.expert_ops.experts", experts)
    x = torch.randn(5, 8)
    Experts(8, 4, experts=3)(x)
    Experts(8, 4, experts=3, activation=torch.nn.GELU())(x)
    Experts(8, 4, experts=3, dtype=BF16)(x.bfloat16())
    assert called == [F32, F32, BF16]
    for dtype in (torch.float16, F64):
        Experts(8, 4, experts=3, dtype=dtype)(x.to(dtype))
    for order in ("token", "dense"):
        Experts(8, 4, experts=3, order=order)(x)
    Experts(8, 4, experts=3, impl="reference")(x)
    Experts(8, 4, experts=3, activation=table_gelu)(x)
    Experts(8, 4, experts=3, activation=torch.nn.GELU("tanh"))(x)
    assert len(called) == 3


@needs_kernels
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": "dense"}, "walks in the order 'expert', not 'dense'"),
        ({"activation": table_gelu}, "the exact gelu, not <function table_gelu"),
        ({"dtype": F64}, "float32 and bfloat16, not torch.float64"),
        ({"dtype": torch.float16}, "float32 and bfloat16, not torch.float16"),
    ],
)
def test_by_name_and_unable_says_why(options, says):
    layer = Experts(4, 6, experts=3, impl="cpu", **options)
    with pytest.raises(RuntimeError, match=f"impl='cpu', but .*{says}"):
        layer(torch.zeros(2, 4, dtype=layer.w1.dtype))


def test_errors_say_what_came():
    layer, x = Experts(4, 6, experts=3), torch.zeros(2, 4)
    weights = (layer.w1, layer.b1, layer.w2, layer.b2)
    with pytest.raises(ValueError, match="impl='gpu' is none of 'reference', 'cpu'"):
        expert_layer(x, layer.router(x), *weights, impl="gpu")
    with pytest.raises(ValueError, match=r"capacity 1 or capacity_factor 1\.0, not both"):
        expert_layer(x, layer.router(x), *weights, capacity=1, capacity_factor=1.0)
    routing = TaskRouter(4, 3)(x)
    for wrong in (3, -2):
        there = Routing(routing.weights, routing.index.fill_(wrong), routing.logits, routing.logits)
        with pytest.raises(ValueError, match="experts 0 to 2, or -1 for none"):
            expert_layer(x, there, *weights)


@needs_kernels
def test_the_operator_keeps_to_its_memory():
    (x, weights, w1, b1, w2, b2), index = case(5, 4, 6, 3, 2)
    op = torch.ops.aftermax.experts_forward.default
    call = [x, index, weights, w1, b1, w2, b2]
    for at, wrong in (
        (1, index + 1),
        (2, weights[:, :1]),
        (3, w1[:, :, :3]),
        (4, b1[:2]),
        (5, w2[:2]),
    ):
        other = [*call[:at], wrong, *call[at + 1 :]]
        with pytest.raises(RuntimeError, match="aftermax: experts"):
            op(*other, 0, 0.0)


@needs_kernels
def test_a_second_derivative_is_refused():
    tensors, index = case(5, 4, 6, 3, 2)
    logits = torch.zeros(5, 3)
    x = tensors[0].requires_grad_()
    out = expert_layer(x, Routing(tensors[1], index, logits, logits), *tensors[2:], impl="cpu")
    with pytest.raises(RuntimeError, match="impl='reference' has"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
