"""The operators of attention: what torch asks of them, compilers, and which way a call goes."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from aftermax import (
    LSSA,
    LSSAR,
    RowMap,
    Sigmoid,
    Softmax,
    SoftmaxSink,
    Visible,
    attention,
    explain,
    find,
)
from aftermax.kernels.attention_ops import MAPS, schemas

from .attention_cases import EPS, ROW_MAPS, attend, every_entry
from .cases import Case, case_of, gradients
from .native import BF16, F16, F32, needs_kernels, normal

pytestmark = needs_kernels

NOTHING = torch.empty(0)


def operator_call(map="softmax", *, batch=2, heads=4, kv_heads=2, queries=5, keys=7, **changed):
    """The tensors and options of torch.ops.aftermax.attention, some of them changed."""
    tensors = {
        "query": normal(batch, heads, queries, 8),
        "key": normal(batch, kv_heads, keys, 8, seed=1),
        "value": normal(batch, kv_heads, keys, 6, seed=2),
        **dict.fromkeys(("mask", "slopes", "distance", "row_scale", "row_bias"), NOTHING),
        **dict.fromkeys(("row_weight", "row_power", "count", "sink"), NOTHING),
    }
    options = {
        "map": MAPS.index(map),
        "cosine": False,
        "causal": False,
        "offset": 0,
        "window": 0,
        "hidden_below": torch.finfo(F32).min / 2,
        "zero": queries - 1,
        "scale": 8**-0.5,
        "power": 1.0,
    }
    call = tensors | options
    assert call.keys() >= changed.keys()
    return tuple((call | changed).values())


# what torch asks of operators


def per_row(call, low, high):
    batch, heads, queries = call[0].shape[:3]
    return torch.linspace(low, high, batch * heads * queries).reshape(batch, heads, queries)


def operator_calls():
    plain = operator_call()
    counts = torch.full((2, 4, 5), 7.0)
    across = normal(2, 5, 4, 8).transpose(1, 2)  # tokens before heads
    mask = normal(2, 1, 5, 7, seed=3) > 0
    leaves = {
        "query": normal(2, 4, 5, 8).requires_grad_(),
        "key": normal(2, 2, 7, 8, seed=1).requires_grad_(),
        "value": normal(2, 2, 7, 6, seed=2).requires_grad_(),
    }
    return {
        "plain": plain,
        "leaves": operator_call(**leaves),
        "scaled, with a sink": operator_call(
            **leaves,
            row_scale=per_row(plain, 0.5, 2).requires_grad_(),
            sink=torch.tensor([0.0, 1.0, -1.0, 3.0]).requires_grad_(),
        ),
        "tokens first, masked": operator_call(query=across, mask=mask, causal=True, offset=2),
        "float mask, slopes, window": operator_call(
            mask=normal(1, 4, 1, 7), slopes=torch.rand(4), window=3
        ),
        "distances": operator_call(distance=torch.rand(2, 5 - 1 + 7)),
        "half": operator_call(**{name: x.detach().half() for name, x in leaves.items()}),
        "sigmoid": operator_call("sigmoid", row_bias=per_row(plain, -3, 0)),
        "relu": operator_call("relu", row_weight=per_row(plain, 0.1, 1), power=2.0),
        "softplus": operator_call("softplus", cosine=True),
        "lssar": operator_call("lssar", count=counts, row_power=per_row(plain, 1, 5)),
        "clipped": operator_call(
            "clipped", row_weight=per_row(plain, 1, 2), row_bias=per_row(plain, -0.1, 0), **leaves
        ),
    }


def operator_samples(name):
    if name == "count_visible":
        mask = normal(2, 1, 5, 7) > 0
        return [
            (mask, True, 1, 3, 0.0, 2, 1, 5, 7),
            (normal(1, 1, 1, 7), False, 0, 0, -0.5, 1, 1, 5, 7),
        ]
    calls = list(operator_calls().values())
    if name == "attention":
        return calls
    calls = [
        tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in call) for call in calls
    ]
    if name == "attention_forward":
        return calls
    samples = []
    for call in calls:
        out, stats, extra = torch.ops.aftermax.attention(*call)
        samples.append((torch.randn_like(out), out, stats, extra, *call))
    return samples


@pytest.mark.parametrize("name", schemas())
@needs_kernels
def test_torch_finds_nothing_wrong_with_the_operator(name):
    operator = getattr(torch.ops.aftermax, name).default
    for sample in operator_samples(name):
        torch.library.opcheck(operator, sample)


# the map that no entry has yet


def clipped(call, stretch, bias):
    """min(max(stretch softmax(s) + bias, 0), 1) in float64, with its weighted sum of the values."""
    q, k, v = (x.double() for x in call[:3])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (stretch[..., None] * p + bias[..., None]).clamp(0, 1) @ v


@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (70, 150), (1, 1), (130, 3), (2, 1000)])
def test_the_clipped_softmax_is_its_formula(queries, keys, body):
    leaves = {
        "query": normal(2, 4, queries, 8, scale=2.0).requires_grad_(),
        "key": normal(2, 2, keys, 8, seed=1).requires_grad_(),
        "value": normal(2, 2, keys, 6, seed=2).requires_grad_(),
    }
    plain = operator_call(queries=queries, keys=keys)
    # weights below 0, above 1 and between, in every row that has so many
    stretch, bias = per_row(plain, 1.5, 6), per_row(plain, -0.4, -1 / (keys + 1))
    rows = {"row_weight": stretch, "row_bias": bias}
    call = operator_call("clipped", queries=queries, keys=keys, **rows, **leaves)
    out, *_ = torch.ops.aftermax.attention(*call)
    expected = clipped(call, stretch.double(), bias.double())
    upstream = normal(*out.shape, seed=5)
    got = torch.autograd.grad(out, list(leaves.values()), upstream)
    right = torch.autograd.grad(expected, list(leaves.values()), upstream.double())
    # scores of 10 off by an eps of themselves, stretched by 6; the sums of terms of size 1
    alone = torch.ops.aftermax.attention_forward(*call)
    for x, y in zip((out, alone, *got), (expected, expected, *right), strict=True):
        assert_close(x.double(), y.double(), rtol=60 * EPS, atol=60 * EPS * y.abs().max().item())


# compilers and transforms


class Module(torch.nn.Module):
    def __init__(self, weights, visible, **options):
        super().__init__()
        self.weights, self.visible, self.options = weights, visible, options

    def forward(self, query, key, value, *learned):
        names = self.weights.learned(query.shape[1], value.shape[-1])
        named = dict(zip(names, learned, strict=True))
        return attention(
            query, key, value, weights=self.weights, attn_mask=self.visible, impl="cpu", **named
        )


COMPILED = ("softmax", "lssar")  # each other one takes some seconds


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(e, id=e.name, marks=[] if e.name in COMPILED else pytest.mark.slow)
        for e in ROW_MAPS
    ],
)
def test_torch_compile_takes_sizes_that_change_forward_and_backward(entry):
    torch._dynamo.reset()
    module = Module(entry.system, Visible(causal=True))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, tokens in ((2, 9), (3, 131)):
        case = case_of(entry, batch=batch, tokens=tokens).to(F32).wanting_gradients()
        out, expected = compiled(*case.leaves), module(*case.leaves)
        assert_close(out, expected, rtol=1e-6, atol=1e-6)
        each = (gradients(out, case), gradients(expected, case))
        assert_close(*each, rtol=1e-5, atol=1e-5)


def test_torch_export_takes_the_kernels():
    entry = find("lssar")
    module = Module(entry.system, Visible(causal=True))
    case, other = (case_of(entry, tokens=20, seed=s).to(F32) for s in (0, 1))
    exported = torch.export.export(module, tuple(case.leaves))
    assert "aftermax.attention" in str(exported.graph)
    assert_close(exported.module()(*other.leaves), module(*other.leaves), rtol=0, atol=0)


@every_entry
def test_activation_checkpoints_change_no_gradient(entry):
    case = case_of(entry, tokens=70).to(F32).wanting_gradients()

    def call(*leaves):
        named = dict(zip(case.learned, leaves[3:], strict=True))
        return attend(entry, Case(*leaves[:3], named), Visible(causal=True))

    plain = gradients(call(*case.leaves), case)
    kept = gradients(checkpoint(call, *case.leaves, use_reentrant=False), case)
    assert_close(kept, plain, rtol=0, atol=0)


def test_a_gradient_of_a_gradient_is_refused():
    q = normal(1, 2, 9, 8).requires_grad_()
    out = attention(q, q, q, impl="cpu")
    with pytest.raises(RuntimeError, match=r"create_graph=True.*impl='reference' has"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
    reference = attention(q, q, q, impl="reference")
    (first,) = torch.autograd.grad(reference.sum(), q, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), q)[0].isfinite().all()


def test_autocast_changes_nothing_of_what_it_is_given():
    q = normal(1, 2, 70, 16)
    for dtype in (F32, BF16, F16):
        x = q.to(dtype)
        expected = attention(x, x, x)
        with torch.autocast("cpu", BF16):
            assert explain(x, x, x).startswith("cpu")
            assert_close(attention(x, x, x), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_transforms_run_on_the_reference():
    x, v = normal(3, 2, 9, 8), normal(3, 2, 9, 8, seed=1)
    said = []

    def call(x):
        said.append(explain(x, x, x))
        return attention(x, x, x, is_causal=True)

    out = torch.func.vmap(call)(x)
    assert_close(out, attention(x, x, x, is_causal=True), rtol=1e-5, atol=1e-6)
    _, tangent = torch.func.jvp(call, (x,), (v,))
    (gradient,) = torch.autograd.grad(call(x.requires_grad_()).sum(), x)
    assert_close(tangent.sum(), (gradient * v).sum(), rtol=1e-4, atol=1e-4)
    assert said[:2] == ["reference: " + TRANSFORMS] * 2
    assert said[2].startswith("cpu: Softmax on the ")


# which way, and why


class Halves(RowMap):
    """A row map of someone else, which no kernel knows."""

    def weigh(self, scores, rows, **learned):
        return rows.visible * torch.full_like(scores, 0.5)


TRANSFORMS = "the kernels know no torch.func transforms and no forward-mode derivatives"
X = torch.zeros(1, 2, 3, 4)
REFUSED = {
    "dropout": (X, {"dropout_p": 0.1}, "the kernels have no dropout"),
    "float64": (
        X.double(),
        {},
        "the kernels take float32, bfloat16 and float16, not torch.float64",
    ),
    "another device": (X.to("meta"), {}, "the query is on meta, not on the CPU"),
    "a mask that learns": (
        X,
        {"attn_mask": torch.zeros(3, 3, requires_grad=True)},
        "the kernels have no gradient for attn_mask",
    ),
    "slopes that learn": (
        X,
        {"attn_mask": Visible(slopes=torch.ones(2, requires_grad=True))},
        "the kernels have no gradient for the ALiBi slopes",
    ),
    "a map without a kernel": (X, {"weights": Halves()}, "there is no kernel for Halves"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_cannot_do_says_why(case):
    x, options, reason = REFUSED[case]
    assert explain(x, x, x, **options) == f"reference: {reason}"
    with pytest.raises(RuntimeError) as refused:
        attention(x, x, x, impl="cpu", **options)
    assert str(refused.value) == f"attention: impl='cpu', but {reason}"
    assert attention(x, x, x, **options).shape == x.shape


@every_entry
def test_every_entry_runs_on_the_kernels(entry, body):
    name = type(entry.system).__name__
    for dtype in (F32, BF16, F16):
        x = X.to(dtype)
        assert explain(x, x, x, weights=entry.system) == f"cpu: {name} on the {body} kernels"
    assert explain(X, X, X, weights=entry.system, impl="reference") == "reference: asked for"


def test_a_mask_that_learns_needs_no_gradient_where_none_is_wanted():
    mask = torch.zeros(3, 3, requires_grad=True)
    with torch.no_grad():
        assert explain(X, X, X, attn_mask=mask).startswith("cpu")


def test_the_kernels_are_what_is_used_where_nothing_is_asked_for():
    q = normal(1, 2, 70, 16)
    for weights in (Softmax(), SoftmaxSink(), LSSAR()):
        asked = attention(q, q, q, weights=weights, impl="cpu")
        assert torch.equal(attention(q, q, q, weights=weights), asked)


# what users and their subclasses may do


@pytest.mark.parametrize("queries", [70, 1])
@pytest.mark.parametrize("score", [2e5, 1e7, 1e9, 1e20, 3e30])
def test_a_score_far_above_all_tiles_before_takes_the_row(score, queries, body):
    leaves = [normal(1, 1, n, 8, seed=n).requires_grad_() for n in (queries, 300, 300)]
    mask = torch.zeros(300)
    mask[200] = score
    out = attention(*leaves, attn_mask=mask, impl="cpu")
    assert_close(out, leaves[2][:, :, 200:201].expand_as(out), rtol=8 * EPS, atol=8 * EPS)
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("queries", "keys", "offset"), [(3, 5, -1), (20, 30, -4), (1, 5, -5), (3, 5, -9)]
)
@every_entry
def test_a_negative_offset_is_a_position_as_any_other(entry, queries, keys, offset, body):
    case = Case(*(normal(1, 2, n, 8, seed=n) for n in (queries, keys, keys)), {})
    for causal in (False, True):
        visible = Visible(causal=causal, offset=offset)
        expected = attend(entry, case, visible, impl="reference")
        assert_close(attend(entry, case, visible), expected, rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("queries", [20, 1])
@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e-40])
def test_tiny_vectors_leave_cosines_finite(size, queries, body):
    leaves = [normal(1, 1, n, 8, seed=n) for n in (queries, 20, 20)]
    leaves[0][:, :, -1] *= size
    leaves[1][:, :, 5] *= size
    leaves = [x.requires_grad_() for x in leaves]
    out = attention(*leaves, weights=LSSA(), impl="cpu")
    assert out.isfinite().all()
    if size == 1e-30:  # its direction is still one of float32
        exact = attention(*(x.double() for x in leaves), weights=LSSA())
        assert_close(out.double(), exact, rtol=64 * EPS, atol=64 * EPS)


def test_a_class_that_changes_the_formula_does_not_run_its_parents_kernel():
    class Hot(Softmax):
        def weigh(self, scores, rows, **learned):
            return super().weigh(10 * scores, rows, **learned)

    class Longer(Softmax):
        prepare = staticmethod(lambda vectors: 3 * vectors)

    class Renamed(Softmax):
        pass

    x = normal(1, 2, 5, 8)
    for weights in (Hot(), Longer()):
        assert "no kernel for" in explain(x, x, x, weights=weights)
        with pytest.raises(RuntimeError, match="there is no kernel for"):
            attention(x, x, x, weights=weights, impl="cpu")
        assert not torch.allclose(attention(x, x, x, weights=weights), attention(x, x, x))
    assert explain(x, x, x, weights=Renamed()).startswith("cpu: Renamed")


def test_a_constant_of_the_kernels_that_wants_a_gradient_raises():
    class Learned(Sigmoid):
        def weigh(self, scores, rows, **learned):
            raise NotImplementedError

        def fused(self, lengths, **learned):
            bias = torch.zeros(1, 1, 1, requires_grad=True)
            return dataclasses.replace(super().fused(lengths), row_bias=bias)

    x = normal(1, 2, 5, 8)
    with pytest.raises(RuntimeError, match="no gradient for row_bias of Learned"):
        attention(x, x, x, weights=Learned())


def test_nothing_from_above_is_no_gradient():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x = normal(1, 2, 5, 8).requires_grad_()
    (Stop.apply(attention(x, x, x, impl="cpu")).sum() + x.sum()).backward()
    assert_close(x.grad, torch.ones_like(x))


def test_no_queries_are_no_error_for_who_insists_on_the_kernels():
    x = normal(1, 2, 5, 8)
    assert explain(x[:, :, :0], x, x) == "reference: there is nothing to compute"
    assert attention(x[:, :, :0], x, x, impl="cpu").shape == (1, 2, 0, 8)
    assert attention(x[:0], x[:0], x[:0], impl="cpu").shape == (0, 2, 5, 8)


@every_entry
def test_the_kernels_hold_under_another_default_device(entry):
    case = case_of(entry, tokens=5).to(F32)
    mask = torch.ones(5, 5, dtype=torch.bool)
    for visible in (Visible(causal=True), Visible(mask=mask)):
        expected = attend(entry, case, visible)
        with torch.device("meta"):
            got = attend(entry, case, visible)
        assert_close(got, expected, rtol=0, atol=0)


def test_an_expanded_mask_stays_small():
    x = normal(4, 4, 64, 8)
    mask = normal(64, 64).to(BF16)

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.bytes = max(self.bytes, out.untyped_storage().nbytes())
            return out

    with Largest() as largest:
        out = attention(x, x, x, attn_mask=mask.expand(4, 4, 64, 64), impl="cpu")
    assert largest.bytes <= max(4 * mask.numel(), 4 * out.numel())
    assert_close(out, attention(x, x, x, attn_mask=mask.float(), impl="cpu"), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["softmax", "lssar", "scale-invariant"])
def test_one_graph_serves_all_lengths(name):
    entry, graphs = find(name), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: attend(entry, Case(x, x, x, {}), Visible(causal=True)),
        backend=count,
        dynamic=True,
        fullgraph=True,
    )
    for tokens in range(20, 31):
        x = normal(1, 2, tokens, 8)
        assert_close(compiled(x), attend(entry, Case(x, x, x, {}), Visible(causal=True)))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["softmax", "lssar", "scale-invariant"])
def test_export_takes_a_length_that_changes(name):
    module = Module(find(name).system, Visible(causal=True))
    case = case_of(find(name), tokens=40).to(F32)
    of_tokens = {2: torch.export.Dim("tokens", min=2, max=1024)}
    shapes = [of_tokens] * len(case.leaves)
    exported = torch.export.export(module, tuple(case.leaves), dynamic_shapes=shapes).module()
    for tokens in (40, 77, 300):
        other = case_of(find(name), tokens=tokens, seed=tokens).to(F32)
        assert_close(exported(*other.leaves), module(*other.leaves), rtol=0, atol=0)
