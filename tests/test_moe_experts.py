"""Experts gated by task: routing, queues, the layer in three orders, and what balances it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from aftermax.moe import (
    Experts,
    Routing,
    TaskRouter,
    dispatch,
    expert_layer,
    importance_loss,
    load,
    load_balance,
    load_loss,
    router_z_loss,
    table_gelu,
)

from .native import needs_kernels

F64 = torch.float64
SEEDS = st.integers(0, 10**6)
ORDERS = ("expert", "token", "dense")


@st.composite
def routings(draw, most_tokens: int = 9, padding: bool = True) -> Routing:
    """Any: distinct experts for each token, experts that nobody has, some that all have."""
    tokens, experts = draw(st.integers(0, most_tokens)), draw(st.integers(1, 6))
    k = draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    logits = torch.randn(tokens, experts, generator=generator, dtype=F64)
    if draw(st.booleans()):
        logits[:, draw(st.integers(0, experts - 1))] += 100  # one that all choose
    weights, index = logits.softmax(-1).topk(k)
    if padding:
        hidden = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0, 0.3, 1]))
        weights[hidden], index[hidden] = 0, -1
    return Routing(weights, index, logits.softmax(-1), logits)


def parameters(experts: int, width: int = 4, hidden: int = 3, **of) -> list[Tensor]:
    shapes = ((experts, hidden, width), (experts, hidden), (experts, width, hidden))
    of = {"dtype": F64, **of}
    return [torch.randn(shape, **of) for shape in (*shapes, (experts, width))]


def by_hand(x: Tensor, routing: Routing, w1, b1, w2, b2, dropped: Tensor | None = None) -> Tensor:
    """The equation, token by token."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for c, e in enumerate(routing.index[t].tolist()):
            if e >= 0 and (dropped is None or not dropped[t, c]):
                hidden = torch.nn.functional.gelu(w1[e] @ x[t] + b1[e])
                out[t] += routing.weights[t, c] * (w2[e] @ hidden + b2[e])
    return out


def with_weights(routing: Routing, weights: Tensor) -> Routing:
    return Routing(weights, routing.index, routing.probabilities, routing.logits)


def picked(routing: Routing, rows) -> Routing:
    of = (routing.weights, routing.index, routing.probabilities, routing.logits)
    return Routing(*(t[rows] for t in of))


# ---- routing -------------------------------------------------------------------------------------


@given(st.data(), SEEDS)
def test_the_chosen_keep_their_weight_among_all(data, seed):
    experts = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, experts))
    torch.manual_seed(seed)
    router, x = TaskRouter(4, experts, top_k=k, dtype=F64), torch.randn(2, 5, 4, dtype=F64)
    routing = router(x)
    scores = x @ router.gates[0].T
    assert_close(routing.probabilities, scores.softmax(-1))
    best = scores.softmax(-1).topk(k)
    assert_close(routing.weights, best.values)
    assert torch.equal(routing.index, best.indices)
    router.renormalise = True
    again = router(x)
    assert torch.equal(again.index, routing.index)
    assert_close(again.weights, scores.topk(k).values.softmax(-1))


def test_equal_scores_go_to_the_lower_expert():
    routing = TaskRouter(4, experts=40, top_k=3)(torch.zeros(50, 4))
    assert torch.equal(routing.index, torch.arange(3).expand(50, 3))


def test_scores_decide_where_probabilities_are_rounded_to_zero():
    router = TaskRouter(1, experts=3, top_k=3)
    router.gates.data = torch.tensor([[[-500.0], [0.0], [-400.0]]])
    routing = router(torch.ones(1, 1))
    assert routing.index.tolist() == [[1, 2, 0]]
    assert routing.weights.tolist() == [[1, 0, 0]]


def test_gates_of_tasks_are_apart():
    router, x = TaskRouter(4, experts=5, tasks=3, dtype=F64), torch.randn(3, 7, 4, dtype=F64)
    mixed = router(x, task=torch.tensor([2, 0, 2]))
    for row, task in enumerate((2, 0, 2)):
        alone = router(x[row], task)
        assert torch.equal(mixed.index[row], alone.index)
        assert_close(mixed.weights[row], alone.weights)
    mixed.weights.square().sum().backward()
    moved = router.gates.grad.abs().amax((1, 2)) > 0
    assert moved.tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_routed_in_float32(dtype):
    router, x = TaskRouter(16, experts=8, dtype=dtype), torch.randn(20, 16).to(dtype)
    wide = copy.deepcopy(router).float()(x.float())
    for routing in (router(x), _in_autocast(copy.deepcopy(router).float(), x.float())):
        assert torch.equal(routing.index, wide.index)
        assert torch.equal(routing.weights, wide.weights)


def _in_autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        return module(x)


# ---- queues --------------------------------------------------------------------------------------


@given(routings(), st.none() | st.integers(1, 4))
def test_queues_are_the_choices_by_expert_and_token(routing, capacity):
    queues = dispatch(routing.index, routing.experts, capacity)
    bounds = queues.offsets.tolist()
    assert len(bounds) == routing.experts + 1
    assert bounds[0] == 0
    assert bounds[-1] == len(queues.token)
    dropped = torch.zeros_like(queues.dropped)
    for expert in range(routing.experts):
        wanted = (routing.index == expert).nonzero().tolist()
        here = slice(*bounds[expert : expert + 2])
        pairs = zip(queues.token[here].tolist(), queues.choice[here].tolist(), strict=True)
        assert [list(pair) for pair in pairs] == wanted[:capacity]
        for token, choice in wanted[capacity:] if capacity else []:
            dropped[token, choice] = True
    assert torch.equal(queues.dropped, dropped)


@given(routings(), st.floats(0.1, 8))
def test_a_capacity_factor_is_a_capacity(routing, factor):
    choices = int((routing.index >= 0).sum())
    queues = dispatch(routing.index, routing.experts, capacity_factor=factor)
    capacity = math.ceil(choices * factor / routing.experts)
    if choices:
        same = dispatch(routing.index, routing.experts, capacity)
        assert torch.equal(queues.offsets, same.offsets)
        assert torch.equal(queues.dropped, same.dropped)
    assert not dispatch(routing.index, routing.experts).dropped.any()


# ---- the layer -----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(routings(), SEEDS, st.none() | st.integers(1, 3))
def test_three_orders_are_the_equation_forward_and_backward(routing, seed, capacity):
    torch.manual_seed(seed)
    tensors = [torch.randn(len(routing.index), 4, dtype=F64), *parameters(routing.experts)]
    tensors = [t.requires_grad_() for t in (*tensors, routing.weights.clone())]
    x, *weights, shares = tensors
    routing = with_weights(routing, shares)
    dropped = dispatch(routing.index, routing.experts, capacity).dropped
    expected = by_hand(x, routing, *weights, dropped)
    towards = torch.randn_like(expected)
    wanted = _gradients(expected, tensors, towards)
    for order in ORDERS:
        out = expert_layer(x, routing, *weights, order=order, capacity=capacity)
        assert_close(out, expected, rtol=1e-12, atol=1e-12)
        for gradient, right in zip(_gradients(out, tensors, towards), wanted, strict=True):
            assert_close(gradient, right, rtol=1e-12, atol=1e-12)


def _gradients(out: Tensor, of: list[Tensor], towards: Tensor) -> list[Tensor]:
    """Zeros where nothing was routed, and the loop by hand has no graph."""
    if not out.requires_grad:
        return [torch.zeros_like(t) for t in of]
    return list(torch.autograd.grad(out, of, towards, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", [torch.nn.functional.gelu, torch.tanh])
def test_gradients_are_those_of_differences(order, activation):
    router = TaskRouter(3, experts=3, dtype=F64)
    x = torch.randn(4, 3, dtype=F64)
    routing = router(x, seen=torch.tensor([True, True, False, True]))
    tensors = (x, routing.weights.detach(), *parameters(3, width=3, hidden=2))

    def layer(x, shares, *weights):
        return expert_layer(x, with_weights(routing, shares), *weights, activation, order)

    assert torch.autograd.gradcheck(layer, [t.requires_grad_() for t in tensors])


def test_gradients_reach_the_gates_through_the_layer():
    layer = Experts(3, 2, experts=4, dtype=F64)
    x = torch.randn(2, 5, 3, dtype=F64)

    def of_gate(gates):
        return torch.func.functional_call(layer, {"router.gates": gates}, (x,))

    assert torch.autograd.gradcheck(of_gate, layer.router.gates.detach().requires_grad_())


@given(routings(), SEEDS)
def test_tokens_may_come_in_any_order(routing, seed):
    torch.manual_seed(seed)
    x, weights = torch.randn(len(routing.index), 4, dtype=F64), parameters(routing.experts)
    moved = torch.randperm(len(x))
    out = expert_layer(x, routing, *weights)
    assert_close(expert_layer(x[moved], picked(routing, moved), *weights), out[moved])


@pytest.mark.parametrize("order", ORDERS)
def test_sequences_are_independent_without_a_capacity(order):
    layer = Experts(4, 6, experts=5, tasks=2, order=order, dtype=F64)
    x, tasks = torch.randn(3, 7, 4, dtype=F64), torch.tensor([1, 0, 1])
    whole = layer(x, tasks)
    for row, task in enumerate(tasks.tolist()):
        assert_close(layer(x[row], task), whole[row])


@pytest.mark.parametrize("capacity_factor", [None, 0.7])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("filler", [0.0, math.nan, math.inf])
def test_padding_never_matters(order, filler, capacity_factor):
    layer = Experts(4, 6, experts=5, order=order, capacity_factor=capacity_factor, dtype=F64)
    x = torch.randn(2, 6, 4, dtype=F64)
    seen = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    x[~seen] = filler
    x.requires_grad_()
    out, routing = layer(x, seen=seen, return_routing=True)
    short, alone = layer(x[seen], return_routing=True)
    assert_close(out[seen], short)
    assert not out[~seen].any()
    assert torch.equal(routing.seen, seen)
    assert not routing.weights[~seen].any()
    losses = [
        torch.stack([loss(r) for loss in (load_balance, importance_loss, load_loss, router_z_loss)])
        for r in (routing, alone)
    ]
    assert_close(*losses)
    gradients = [
        torch.autograd.grad(o.square().sum() + loss.sum(), (x, *layer.parameters()))
        for o, loss in zip((out, short), losses, strict=True)
    ]
    for padded, right in zip(*gradients, strict=True):
        assert_close(padded, right)
    assert not gradients[0][0][~seen].any()


@pytest.mark.parametrize("order", ORDERS)
def test_an_expert_that_nobody_chose_never_matters(order):
    layer = Experts(4, 6, experts=3, order=order, dtype=F64)
    x = torch.randn(5, 4, dtype=F64).abs().requires_grad_()
    layer.router.gates.data[0, 1] = -10  # positive tokens have a low score here
    before = layer(x).detach()
    layer.w1.data[1], layer.b2.data[1] = math.inf, math.nan
    out, routing = layer(x, return_routing=True)
    assert not (routing.index == 1).any()
    assert_close(out, before)
    if order != "dense":  # which computes, and differentiates, what it then leaves out
        out.sum().backward()
        assert all(p.grad.isfinite().all() for p in (x, *layer.parameters()))


def test_all_padding_is_zero_with_gradients():
    layer, x = Experts(4, 6, experts=3), torch.full((1, 5, 4), math.nan)
    out, routing = layer(x, seen=torch.zeros(1, 5, dtype=torch.bool), return_routing=True)
    losses = [f(routing) for f in (load_balance, importance_loss, load_loss, router_z_loss)]
    (out.sum() + sum(losses)).backward()
    assert not out.any()
    assert torch.stack(losses).tolist() == [0, 0, 0, 0]
    assert not any(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(order, dtype):
    layer = Experts(16, 8, experts=4, order=order, impl="reference", dtype=dtype)
    x = torch.randn(9, 16).to(dtype)
    wide = copy.deepcopy(layer).float()
    assert torch.equal(layer(x), wide(x.float()).to(dtype))


@pytest.mark.parametrize("order", ORDERS)
def test_under_autocast_only_the_products_are_rounded(order):
    layer, x = Experts(16, 8, experts=4, order=order), torch.randn(9, 16)
    out = _in_autocast(layer, x)
    assert out.dtype == torch.float32
    assert_close(out, layer(x), rtol=2e-2, atol=2e-2)
    out.sum().backward()


def test_one_expert_is_an_mlp_and_begins_as_one():
    layer = Experts(300, 200, experts=1, top_k=1, activation=table_gelu)
    x = torch.randn(2, 5, 300)
    hidden = table_gelu(torch.nn.functional.linear(x, layer.w1[0], layer.b1[0]))
    assert_close(layer(x), torch.nn.functional.linear(hidden, layer.w2[0], layer.b2[0]))
    for ours, fan_in in ((layer.w1, 300), (layer.b1, 300), (layer.w2, 200), (layer.b2, 200)):
        assert 0.95 < float(ours.detach().abs().max()) * math.sqrt(fan_in) <= 1


def test_without_biases_the_layer_is_linear_in_its_second_matrix():
    layer, x = Experts(4, 6, experts=3, bias=False, dtype=F64), torch.randn(5, 4, dtype=F64)
    assert [name for name, _ in layer.named_parameters()] == ["w1", "w2", "router.gates"]
    before = layer(x)
    layer.w2.data *= 2
    assert_close(layer(x), 2 * before)


def test_dense_order_is_one_graph():
    layer, x = Experts(4, 6, experts=3, order="dense", capacity=2), torch.randn(2, 5, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close(compiled(x), layer(x))


def test_a_call_keeps_nothing():
    layer = Experts(4, 6, experts=3)
    before = set(layer.__dict__)
    layer(torch.randn(2, 5, 4))
    assert set(layer.__dict__) == before
    copy.deepcopy(layer)


# ---- balance -------------------------------------------------------------------------------------


@given(routings())
def test_balance_losses_by_hand(routing):
    rows = [t for t in range(len(routing.index)) if routing.index[t, 0] >= 0]
    experts, k = routing.experts, routing.top_k
    probability, logit = routing.probabilities.tolist(), routing.logits.tolist()
    counts, importance, mean, smooth = ([0.0] * experts for _ in range(4))
    z = 0.0
    for t in rows:
        for weight, e in zip(routing.weights[t].tolist(), routing.index[t].tolist(), strict=True):
            counts[e] += 1
            importance[e] += weight
        z += math.log(sum(math.exp(s) for s in logit[t])) ** 2 / len(rows)
        for e in range(experts):
            mean[e] += probability[t][e] / len(rows)
            others = sorted((s for i, s in enumerate(logit[t]) if i != e), reverse=True)
            gap = (logit[t][e] - others[k - 1]) * experts if k < experts else math.inf
            smooth[e] += math.erfc(-gap / math.sqrt(2)) / 2
    share = [c / max(len(rows) * k, 1) for c in counts]
    balance = experts * sum(f * p for f, p in zip(share, mean, strict=True))
    assert load(routing).tolist() == counts
    assert_close(float(load_balance(routing)), balance)
    assert_close(float(router_z_loss(routing)), z)
    assert_close(float(importance_loss(routing)), _cv2(importance))
    assert_close(float(load_loss(routing)), _cv2(smooth))
    assert_close(float(load_loss(routing, noise=0)), _cv2(counts))
    assert_close(float(load_loss(routing, noise=1e-12)), _cv2(counts))


def _cv2(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2 if mean else 0.0


@pytest.mark.parametrize("loss", [load_balance, importance_loss, load_loss, router_z_loss])
def test_losses_have_the_gradients_of_differences(loss):
    router, x = TaskRouter(3, experts=4, dtype=F64), torch.randn(5, 3, dtype=F64)

    def of_gates(gates):
        return loss(torch.func.functional_call(router, {"gates": gates}, (x,)))

    assert torch.autograd.gradcheck(of_gates, router.gates.detach().requires_grad_())


def test_balance_goes_from_one_to_the_number_of_experts():
    even = torch.eye(4, dtype=F64) * 100
    for logits, balance, unevenness in ((even, 1.0, 0.0), (even[:1].expand(4, 4), 4.0, 3.0)):
        weights, index = logits.softmax(-1).topk(1)
        routing = Routing(weights, index, logits.softmax(-1), logits)
        assert_close(float(load_balance(routing)), balance)
        assert_close(float(importance_loss(routing)), unevenness)
        assert_close(float(load_loss(routing)), unevenness)


def test_balance_may_fall_below_one():
    probabilities = torch.tensor([[0.51, 0.49]] * 3 + [[0.0, 1.0]] * 2, dtype=F64)
    weights, index = probabilities.topk(1)
    routing = Routing(weights, index, probabilities, probabilities.log())
    assert_close(float(load_balance(routing)), 2 * (0.6 * 0.306 + 0.4 * 0.694))
    assert float(load_balance(routing)) < 1


# ---- bytes ---------------------------------------------------------------------------------------


def test_bytes_of_the_published_size():
    layer, x = Experts(192, 384, experts=16), torch.randn(129, 192)
    _, routing = layer(x, return_routing=True)
    assert layer.weight_bytes(routing, "token") == layer.weight_bytes(129, "token") == 152_174_592
    assert layer.weight_bytes(routing, "expert") == layer.weight_bytes(129, "expert") == 9_437_184
    assert layer.weight_bytes(routing, "dense") == 9_437_184


def test_bytes_count_what_is_routed():
    layer = Experts(4, 6, experts=8, capacity=3, dtype=torch.bfloat16)
    _, routing = layer(torch.zeros(5, 4, dtype=torch.bfloat16), return_routing=True)  # all to 0, 1
    matrix = 2 * 4 * 6 * 2
    times = [layer.weight_bytes(routing, order) // matrix for order in ORDERS]
    assert times == [2, 6, 8]


# ---- with torch ----------------------------------------------------------------------------------


def test_a_layer_of_no_tokens_has_gradients():
    """Those of a sum are one number at every place: no row of them is whole."""
    layer = Experts(4, 6, experts=3)
    for x in (torch.zeros(0, 4), torch.zeros(4, 0).mT, torch.zeros(2, 0, 4)):
        x = x.requires_grad_()
        layer(x).sum().backward()
        assert x.grad.shape == x.shape
    assert not layer.w1.grad.any()


@needs_kernels
def test_autocast_casts_what_differs():
    """As behind a linear layer: tokens in bfloat16, weights in float32."""
    layer, x = Experts(16, 24, experts=4), torch.randn(9, 16).bfloat16()
    routing = layer.router(x)
    parameters = (layer.w1, layer.b1, layer.w2, layer.b2)
    half = [p.bfloat16() for p in parameters]
    with torch.autocast("cpu", torch.bfloat16):
        out = expert_layer(x, routing, *parameters, impl="cpu")
    assert torch.equal(out, expert_layer(x, routing, *half, impl="cpu"))
    out.sum().backward()
    assert layer.w1.grad.dtype == torch.float32


def test_a_capacity_beyond_all_numbers_is_none():
    index = torch.tensor([[0], [0], [2]])
    assert dispatch(index, 3, capacity_factor=1e300).lengths.tolist() == [2, 0, 1]


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: TaskRouter(4, 3, top_k=4), "top_k must be 1 to the 3 experts, got 4"),
        (lambda: TaskRouter(4, 3, tasks=0), "tasks must be at least 1, got 0"),
        (lambda: Experts(4, 0, 3), "hidden must be at least 1, got 0"),
        (lambda: TaskRouter(4, 3)(torch.zeros(2, 5)), r"\(\.\.\., tokens, 4\).*\(2, 5\)"),
        (lambda: TaskRouter(4, 3)(torch.zeros(2, 4), task=1), "task must be 0 to 0, got 1"),
        (
            lambda: TaskRouter(4, 3)(torch.zeros(2, 5, 4), torch.zeros(5).long()),
            r"integers of shape \(2,\) for x \(2, 5, 4\), got torch.int64 of shape \(5,\)",
        ),
        (
            lambda: TaskRouter(4, 3)(torch.zeros(2, 5, 4), torch.tensor([0, 7])),
            r"tasks must be 0 to 0, got \[0, 7\]",
        ),
        (
            lambda: TaskRouter(4, 3)(torch.zeros(2, 5, 4), seen=torch.ones(5).bool()),
            r"seen must be bool of shape \(2, 5\), got torch.bool of shape \(5,\)",
        ),
        (lambda: dispatch(torch.tensor([[3]]), 3), "experts 0 to 2, or -1 for none, got 3 to 3"),
        (lambda: dispatch(torch.tensor([[-2]]), 3), "got -2 to -2"),
        (lambda: dispatch(torch.zeros(3), 3), r"integers \(tokens, k\), got torch.float32"),
        (lambda: dispatch(torch.tensor([[0]]), 3, 1, 1.0), "capacity 1 or capacity_factor 1.0"),
        (lambda: dispatch(torch.tensor([[0]]), 3, 0), "capacity must be above 0, got 0"),
        (lambda: dispatch(torch.tensor([[0]]), 3, 2.5), "capacity must be whole, got 2.5"),
        (lambda: Experts(4, 6, 3, order="each")(torch.zeros(2, 4)), "order must be one of"),
        (lambda: Experts(4, 6, 3).weight_bytes(2, "each"), "order must be one of"),
        (lambda: load_loss(TaskRouter(4, 3)(torch.zeros(2, 4)), -1), "noise must be 0 or more"),
    ],
)
def test_errors_say_what_came(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_shapes_that_do_not_fit():
    x, routing = (
        torch.zeros(5, 4, dtype=F64),
        TaskRouter(4, 3, dtype=F64)(torch.zeros(5, 4).to(F64)),
    )
    w1, b1, w2, b2 = parameters(3)
    for wrong, says in (
        ((x[:4], routing, w1, b1, w2, b2), r"routing.index must be \(4, 2\)"),
        ((x[:, :2], routing, w1, b1, w2, b2), r"x must be \(5, 4\)"),
        ((x, routing, w1[:2], b1, w2, b2), r"routing.logits must be \(5, 2\)"),
        ((x, routing, w1, b2, w2, b2), r"b1 must be \(3, 3\).* got \(3, 4\)"),
        ((x, routing, w1, b1, w1, b2), r"w2 must be \(3, 4, 3\).* got \(3, 3, 4\)"),
        ((x, routing, w1, b1, w2, b1), r"b2 must be \(3, 4\)"),
        ((x, routing, w1[0], b1, w2, b2), r"w1 \(experts, H, D\), got \(5, 4\) and \(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=says):
            expert_layer(*wrong)
    with pytest.raises(ValueError, match=r"a routing has .* got \(5, 1\), \(5, 2\)"):
        with_weights(routing, routing.weights[:, :1])
