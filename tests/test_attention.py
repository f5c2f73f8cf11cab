"""The call: what it shares with SDPA, what it refuses, and how it walks."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.testing import assert_close

from aftermax import (
    LSSAR,
    Dense,
    ReLA,
    ReLUPower,
    Sigmoid,
    Softmax,
    SoftmaxSink,
    Visible,
    attention,
    attention_weights,
)

from .cases import blocks_of
from .native import needs_kernels, rounded_weights


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# softmax is SDPA


@st.composite
def sdpa_calls(draw):
    """Shapes and masks that SDPA takes, with rows that see nothing among them."""
    batch, heads, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    queries, keys = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    value_width, seed = draw(st.integers(1, 9)), draw(st.integers(0, 10**6))
    mask_shape = (
        draw(st.sampled_from([1, batch])),
        draw(st.sampled_from([1, heads])),
        draw(st.sampled_from([1, queries])),
        keys,
    )
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(mask_shape, generator=random) < 0.6
    kind = draw(st.sampled_from(["none", "causal", "bool", "float", "lowest"]))
    q = torch.randn(batch, heads, queries, width, generator=random, dtype=torch.float64)
    k = torch.randn(batch, heads, keys, width, generator=random, dtype=torch.float64)
    v = torch.randn(batch, heads, keys, value_width, generator=random, dtype=torch.float64)
    additive = torch.randn(mask_shape, generator=random, dtype=torch.float64)
    masks = {
        "none": None,
        "causal": None,
        "bool": mask,
        "float": additive.masked_fill(~mask, -torch.inf),
        "lowest": additive.masked_fill(~mask, torch.finfo(torch.float64).min),
    }
    return (q, k, v), masks[kind], kind, mask, draw(st.none() | st.floats(0.1, 2.0))


@settings(max_examples=80)
@given(call=sdpa_calls())
def test_softmax_equals_sdpa_in_float64(call):
    (q, k, v), attn_mask, kind, seen, scale = call
    options = {"attn_mask": attn_mask, "is_causal": kind == "causal", "scale": scale}
    out = attention(q, k, v, **options)
    expected = sdpa(q, k, v, **options)
    if attn_mask is not None:
        # SDPA leaves NaN, or a uniform row under the lowest number, where nothing is seen; we 0
        sees = seen.expand(*q.shape[:3], k.shape[-2]).any(-1, keepdim=True)
        expected = expected.where(sees, 0)
    assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask_is", ["bool", "-inf", "lowest"])
def test_softmax_equals_sdpa_in_every_dtype(dtype, mask_is, impl):
    q, k, v = (normal(2, 3, 17, 16, seed=s, dtype=dtype) for s in range(3))
    mask = (normal(2, 1, 17, 17, seed=3) < 0.5) | torch.eye(17, dtype=torch.bool)
    hidden = -torch.inf if mask_is == "-inf" else torch.finfo(dtype).min
    attn_mask = mask if mask_is == "bool" else torch.zeros((), dtype=dtype).where(mask, hidden)
    attn_mask = attn_mask if mask_is == "bool" else attn_mask.to(dtype)
    out = attention(q, k, v, attn_mask=attn_mask, impl=impl)
    q, k, v = (x.double() for x in (q, k, v))
    exact = sdpa(q, k, v, attn_mask=mask)
    assert out.dtype == dtype
    allowed = 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6
    if impl == "cpu":
        allowed = allowed + rounded_weights(dtype, sdpa(q, k, v.abs(), attn_mask=mask))
    assert ((out.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize(("queries", "keys"), [(3, 7), (7, 3), (1, 5), (5, 1), (4, 4)])
def test_is_causal_is_aligned_at_the_top_left(queries, keys):
    q, k, v = normal(1, 2, queries, 4), normal(1, 2, keys, 4), normal(1, 2, keys, 4, seed=1)
    out = attention(q, k, v, is_causal=True)
    assert_close(out, sdpa(q, k, v, is_causal=True))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_two_three_and_four_dimensions(lead):
    q, k, v = normal(*lead, 5, 4), normal(*lead, 6, 4, seed=1), normal(*lead, 6, 3, seed=2)
    out = attention(q, k, v)
    assert out.shape == (*lead, 5, 3)
    assert_close(out, sdpa(q, k, v))


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_grouped_queries_are_sdpas(kv_heads):
    q, k, v = normal(2, 6, 5, 4), normal(2, kv_heads, 5, 4), normal(2, kv_heads, 5, 4, seed=1)
    out = attention(q, k, v, enable_gqa=True, is_causal=True)
    assert_close(out, sdpa(q, k, v, enable_gqa=True, is_causal=True))


def test_is_causal_and_a_mask_restrict_together():
    q, mask = normal(1, 1, 4, 4), torch.tensor([True, False, True, True])
    both = mask & torch.ones(4, 4, dtype=torch.bool).tril()
    assert_close(attention(q, q, q, attn_mask=mask, is_causal=True), sdpa(q, q, q, both))
    told = Visible(mask=mask)
    assert_close(attention(q, q, q, attn_mask=told, is_causal=True), sdpa(q, q, q, both))


# empty sides


@pytest.mark.parametrize("weights", [Softmax(), LSSAR(), ReLA(), Sigmoid("sequence")])
@pytest.mark.parametrize("causal", [True, False])
def test_no_keys_give_zeros_with_gradients(weights, causal):
    q = normal(2, 2, 3, 4).requires_grad_()
    k, v = normal(2, 2, 0, 4).requires_grad_(), normal(2, 2, 0, 5).requires_grad_()
    out = attention(q, k, v, weights=weights, is_causal=causal)
    assert torch.equal(out, torch.zeros(2, 2, 3, 5))
    out.sum().backward()
    assert q.grad is not None
    assert torch.equal(q.grad, torch.zeros_like(q))


@pytest.mark.parametrize("weights", [Softmax(), LSSAR(), ReLA(), Sigmoid("sequence")])
def test_no_queries_give_no_rows(weights):
    out = attention(normal(2, 4, 0, 4), normal(2, 4, 3, 4), normal(2, 4, 3, 5), weights=weights)
    assert out.shape == (2, 4, 0, 5)


def test_no_batch_gives_no_batch():
    empty = normal(0, 2, 3, 4)
    assert attention(empty, empty, empty).shape == (0, 2, 3, 4)


# blocks


@pytest.mark.parametrize("weights", [Softmax(), LSSAR(), SoftmaxSink(), ReLUPower(2)], ids=repr)
@pytest.mark.parametrize("tokens", [1, 2, 63, 65])
def test_block_size_changes_neither_values_nor_gradients(weights, tokens):
    results = []
    learned = {name: x.double() for name, x in weights.learned(2, 4).items()}
    mask = normal(1, 1, tokens, tokens, dtype=torch.float64).masked_fill(
        normal(1, 1, tokens, tokens, seed=5) > 1, -torch.inf
    )
    for scores in (2**21, 1, 2 * tokens * 7, 2 * tokens * 64):
        leaves = [normal(1, 2, tokens, 4, seed=s, dtype=torch.float64) for s in range(3)]
        leaves += [mask.clone(), *(x.clone() for x in learned.values())]
        q, k, v, m, *own = (x.requires_grad_() for x in leaves)
        with blocks_of(scores):
            out = attention(
                q, k, v, weights=weights, attn_mask=m, is_causal=True,
                **dict(zip(learned, own, strict=True)),
            )  # fmt: skip
            grads = torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True)
        results.append((out, *grads))
    for other in results[1:]:
        assert_close(other, results[0], rtol=1e-12, atol=1e-12)


def test_no_tensor_of_queries_times_keys_is_ever_built():
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                biggest = max(biggest, out.numel())
            return out

    q = normal(1, 1, 200, 4).requires_grad_()
    with blocks_of(2000), Watch():
        attention(q, q, q, weights=LSSAR(), is_causal=True, impl="reference").sum().backward()
    assert biggest <= 2000


def test_no_block_is_kept_for_the_backward_pass():
    saved = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.numel())
        return x

    q = normal(1, 1, 200, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with blocks_of(2000):
            attention(q, q, q, weights=LSSAR(), is_causal=True, impl="reference")
        in_blocks, saved = sum(saved), []
        attention(q, q, q, weights=LSSAR(), is_causal=True, impl="reference")
    assert in_blocks < 200 * 200 / 2 < sum(saved)


@needs_kernels
@pytest.mark.parametrize("weights", [Softmax(), LSSAR(), ReLA()], ids=repr)
def test_the_kernels_keep_some_numbers_of_each_row_for_the_backward_pass(weights):
    saved = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.numel())
        return x

    rows, width = 200, 4
    q = normal(1, 1, rows, width).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(q, q, q, weights=weights, is_causal=True, impl="cpu")
    # query, key, value, out, a second sum; stats, counts and scales; what the norm of ReLA keeps
    assert sum(saved) <= rows * (10 * width + 10)


# in a process of its own, whose peak nothing else has raised before
MEMORY = """
import pathlib, resource, sys
import torch
from aftermax import attention, find

how, tokens, width = sys.argv[1], *map(int, sys.argv[2:])

def call(tokens):
    q, k, v = (torch.randn(1, 1, tokens, width, requires_grad=True) for _ in range(3))
    if how == "whole":
        out = (q @ k.transpose(-1, -2)).softmax(-1) @ v
    else:
        out = attention(q, k, v, weights=find(how).system, is_causal=True, impl="cpu")
    out.sum().backward()

def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # where the other one begins with what the parent had
        line = next(l for l in status.read_text().splitlines() if l.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

call(64)  # what is loaded and started at the first call
before = peak()
call(tokens)
print((peak() - before) / (4 * tokens**2))
"""


def share_of_the_scores(how: str, tokens: int, width: int) -> float:
    """What a call adds to the memory of its process, in matrices of scores."""
    command = [sys.executable, "-c", MEMORY, how, str(tokens), str(width)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@needs_kernels
def test_the_scores_are_never_whole_in_the_kernels():
    pytest.importorskip("resource")
    # the measure sees a matrix where there is one
    assert share_of_the_scores("whole", 4096, 16) > 0.8
    for name in ("softmax", "lssar"):
        assert share_of_the_scores(name, 4096, 16) < 1 / 4


# dropout


def test_dropout_keeps_the_mean_and_drops_its_share():
    ones = torch.ones(1, 1, 40_000, 1)
    torch.manual_seed(0)
    # one key of value 1 for each row: the output is the weight, dropped or stretched
    out = attention(torch.zeros(1, 1, 40_000, 1), ones[:, :, :1], ones[:, :, :1], dropout_p=0.3)
    kept = out > 0
    assert_close(out[kept], torch.full_like(out[kept], 1 / 0.7))
    # four standard deviations of a mean of 40 000 coins
    assert abs(kept.float().mean().item() - 0.7) < 4 * (0.3 * 0.7 / 40_000) ** 0.5


def test_dropout_repeats_under_its_seed_in_blocks_and_backward():
    q = normal(1, 2, 20, 4, dtype=torch.float64).requires_grad_()

    def once(seed: int):
        torch.manual_seed(seed)
        with blocks_of(200):
            out = attention(q, q, q, dropout_p=0.5)
            return out, torch.autograd.grad(out.sum(), q)[0]

    first, again, other = once(1), once(1), once(2)
    assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0], other[0])

    # the recomputed block must drop what the forward pass dropped
    direction = normal(1, 2, 20, 4, seed=3, dtype=torch.float64)
    torch.manual_seed(1)
    with blocks_of(200), torch.no_grad():
        ahead = attention(*(q + 1e-6 * direction,) * 3, dropout_p=0.5).sum()
        torch.manual_seed(1)
        behind = attention(*(q - 1e-6 * direction,) * 3, dropout_p=0.5).sum()
    assert_close((ahead - behind) / 2e-6, (first[1] * direction).sum(), rtol=1e-6, atol=1e-6)


def test_dropout_of_all_is_zero():
    q = normal(1, 1, 4, 4)
    assert torch.equal(attention(q, q, q, dropout_p=1.0), torch.zeros_like(q))


# the weights themselves


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rows", [None, (0, 1), (4, 7), (8, 9), (3, 3)])
def test_rows_of_the_weights_are_rows_of_the_whole(window, rows):
    q, k, v = (normal(2, h, 9, 8, seed=h, dtype=torch.float64) for h in (4, 2, 2))
    visible = Visible(causal=True, window=window)
    options = {"weights": LSSAR(3), "attn_mask": visible, "enable_gqa": True}
    weights = attention_weights(q, k, rows=rows, **options)
    start, stop = rows or (0, 9)
    assert weights.shape == (2, 4, stop - start, 9)
    assert_close(weights, attention_weights(q, k, **options)[:, :, start:stop])
    out = weights @ v.repeat_interleave(2, 1)
    assert_close(out, attention(q, k, v, **options)[:, :, start:stop])


def test_weights_show_what_is_not_finite_and_no_more():
    q, k = normal(1, 1, 4, 4), normal(1, 1, 4, 4, seed=1)
    k[0, 0, 2] = torch.nan
    weights = attention_weights(q, k, is_causal=True)
    assert weights[0, 0, 2:].isnan().all()
    assert_close(weights[0, 0, :2].sum(-1), torch.ones(2))


def test_weights_take_all_that_the_system_learns():
    q, gain = normal(1, 2, 4, 4), torch.full((2, 6), 2.0)
    plain = attention_weights(q, q, weights=ReLA())
    assert torch.equal(attention_weights(q, q, weights=ReLA(), gain=gain), plain)


@pytest.mark.parametrize("rows", [(2, 6), (-1, 2), (3, 2)])
def test_weights_of_rows_that_there_are_not(rows):
    q = normal(1, 1, 5, 4)
    with pytest.raises(ValueError, match="do not lie within the 5 query rows"):
        attention_weights(q, q, rows=rows)


# what is learned


def test_what_is_learned_may_be_left_out():
    q, weights = normal(1, 2, 4, 4), Softmax("log_n")
    given_s = attention(q, q, q, weights=weights, s=torch.full((2,), 0.168))
    assert torch.equal(attention(q, q, q, weights=weights), given_s)
    assert not torch.equal(attention(q, q, q, weights=weights, s=torch.ones(2)), given_s)


def test_dense_refuses_a_mask_where_it_wants_seen():
    system, x = Dense(Softmax()), normal(1, 1, 2, 4)
    visible = Visible(causal=True, mask=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="as `seen` \\(B, T\\), not as a mask"):
        system.step(x, x, x, system.init_state(1, 1, 4, 4), visible)


# what is refused, and how it is said

Q = torch.zeros(2, 4, 5, 8)
REFUSED = {
    "one dimension": ((torch.zeros(3),) * 3, {}, r"two to four dimensions .* got \(3,\)"),
    "five dimensions": ((Q[None],) * 3, {}, r"two to four dimensions .* got \(1, 2, 4, 5, 8\)"),
    "dtypes differ": (
        (Q, Q.double(), Q),
        {},
        r"one floating-point dtype, got torch\.float32, torch\.float64, torch\.float32",
    ),
    "whole numbers": ((Q.int(),) * 3, {}, r"one floating-point dtype, got torch\.int32"),
    "devices differ": ((Q, Q.to("meta"), Q), {}, r"one device, got cpu, meta, cpu"),
    "widths differ": (
        (Q, Q[..., :7], Q),
        {},
        r"one width D: query \(2, 4, 5, 8\), key \(2, 4, 5, 7\), value \(2, 4, 5, 8\)",
    ),
    "keys without values": (
        (Q, Q, Q[:, :, :4]),
        {},
        r"same \(B, Hkv, Tk\).* key \(2, 4, 5, 8\), value \(2, 4, 4, 8\)",
    ),
    "batches differ": ((Q, Q[:1], Q[:1]), {}, r"B is the query's: query \(2, 4, 5, 8\), key \(1,"),
    "heads differ": (
        (Q, Q[:, :2], Q[:, :2]),
        {},
        r"heads differ \(4 and 2\): pass enable_gqa=True",
    ),
    "heads do not divide": (
        (Q, Q[:, :3], Q[:, :3]),
        {"enable_gqa": True},
        r"need H divisible by Hkv: query \(2, 4, 5, 8\), key \(2, 3, 5, 8\)",
    ),
    "no key heads": ((Q, Q[:, :0], Q[:, :0]), {"enable_gqa": True}, "need H divisible by Hkv"),
    "mask too long": (
        (Q, Q, Q),
        {"attn_mask": torch.ones(5, 6).bool()},
        r"attn_mask of shape \(5, 6\) does not broadcast .* = \(2, 4, 5, 5\)",
    ),
    "mask of integers": (
        (Q, Q, Q),
        {"attn_mask": torch.ones(5, 5).int()},
        "attn_mask must be bool or floating point, got torch.int32",
    ),
    "unknown impl": ((Q, Q, Q), {"impl": "cuda"}, "impl='cuda' is none of 'reference', 'cpu'"),
    "dropout": ((Q, Q, Q), {"dropout_p": 1.5}, r"dropout_p is a probability, got 1\.5"),
    "learned shape": (
        (Q, Q, Q),
        {"weights": SoftmaxSink(), "sink": torch.zeros(3)},
        r"sink of SoftmaxSink needs shape \(4,\), got \(3,\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_what_came(case):
    tensors, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        attention(*tensors, **options)


def test_what_a_system_does_not_learn_is_refused():
    with pytest.raises(TypeError, match=r"Softmax learns no sink \(it learns: none\)"):
        attention(Q, Q, Q, sink=torch.zeros(4))
    with pytest.raises(TypeError, match=r"ReLA learns no sink \(it learns: gain, gate\)"):
        attention(Q, Q, Q, weights=ReLA(), sink=torch.zeros(4))


def test_meta_tensors_give_shapes():
    meta = Q.to("meta")
    assert attention(meta, meta, meta[..., :3], weights=LSSAR()).shape == (2, 4, 5, 3)
