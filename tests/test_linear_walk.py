"""The walk of the linear family: its kernel against the recurrence in float64, and its state.

By how much float32 may miss a number is `UNITS` eps of the sum of the absolute values of its terms.
Output and state are linear in each of query, key, value and state, so that this sum is the same
walk of the absolute values, and for the gradients that walk's own gradients.
"""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from aftermax.kernels.linear_ops import schemas
from aftermax.linear import both_ways, walk
from aftermax.linear.walk import CHUNK, FORMS

from .attention_cases import EPS, LAYOUTS, TIMES, assert_within, laid_out
from .cases import chunks_of
from .native import BF16, F16, F32, F64, bodies, needs_kernels, normal, running

UNITS = TIMES * math.sqrt(CHUNK / 12)
"""Of eps. A chunk's terms are added in one lane, one after another: so many roundings of at most
half an eps, evenly spread, which makes sqrt(1/12) of an eps each; and the largest of many results
lies `TIMES` as far out. Products, decays and the sum over the chunks are few beside them."""


class Walk(NamedTuple):
    """The tensors of a walk, and whether it has totals."""

    query: Tensor
    key: Tensor
    value: Tensor
    state: Tensor
    rate: Tensor | None
    totals: bool

    @property
    def leaves(self) -> list[Tensor]:
        return list(self[:4])

    def map(self, change) -> "Walk":
        return self._replace(
            **{name: change(x) for name, x in zip(self._fields, self.leaves, strict=False)}
        )

    def run(self, **options) -> list[Tensor]:
        """out, state, and the totals if there are any."""
        walked = walk(*self[:3], rate=self.rate, state=self.state, totals=self.totals, **options)
        return [x for x in (walked.out, walked.state, walked.total) if x is not None]

    def run_and_differentiate(self, upstream: list[Tensor], **options) -> list[Tensor]:
        leaves = self.map(lambda x: x.detach().requires_grad_())
        results = leaves.run(**options)
        of = torch.autograd.grad(results, leaves.leaves, upstream, materialize_grads=True)
        return [*results, *of]


def drawn(
    *, batch=1, heads=2, kv_heads=None, tokens=9, width=8, value_width=6, rates=(), totals=False,
    seed=0,
) -> Walk:  # fmt: skip
    """Gaussian tensors in float32, with one rate for each head if there are any."""
    kv_heads = kv_heads or heads
    rate = torch.tensor(rates) if rates else None
    return Walk(
        normal(batch, heads, tokens, width, seed=seed),
        normal(batch, kv_heads, tokens, width, seed=seed + 1),
        normal(batch, kv_heads, tokens, value_width, seed=seed + 2),
        normal(batch, heads if rates else kv_heads, width, value_width + totals, seed=seed + 3),
        rate,
        totals,
    )


NAMES = ("out", "state", "total", "query", "key", "value", "state before")


def assert_right(case: Walk, names: list[str]) -> None:
    """Results and gradients on the bodies of these names, against the recurrence in float64."""
    exact = case.map(lambda x: x.to(F64))
    upstream = [normal(*x.shape, seed=9 + i) for i, x in enumerate(exact.run())]
    wide = [x.to(F64) for x in upstream]
    right = exact.run_and_differentiate(wide, form="recurrent")
    sizes = exact.map(torch.abs).run_and_differentiate([x.abs() for x in wide], form="recurrent")
    which = [name for name in NAMES if case.totals or name != "total"]
    for name in names:
        with running(name):
            got = case.run_and_differentiate(upstream, impl="cpu")
        for what, x, y, size in zip(which, got, right, sizes, strict=True):
            assert x.dtype == F32
            assert_within(x, y, UNITS * EPS * size, f"{what} on {name}")


RAGGED = (1, 2, 63, 64, 65, 128, 129, 257, 300)


@st.composite
def walks(draw) -> Walk:
    heads, kv_heads = draw(st.sampled_from(((1, 1), (2, 2), (4, 2), (3, 1))))
    case = drawn(
        batch=draw(st.integers(1, 2)),
        heads=heads,
        kv_heads=kv_heads,
        tokens=draw(st.one_of(st.sampled_from(RAGGED), st.integers(1, 300))),
        width=draw(st.integers(1, 70)),
        value_width=draw(st.integers(1, 70)),
        # as they are in use: none, little, one token's memory
        rates=draw(
            st.one_of(
                st.just([]),
                st.lists(
                    st.one_of(st.sampled_from((0.0, 8.0)), st.floats(0, 8, width=32)),
                    min_size=heads,
                    max_size=heads,
                ),
            )
        ),
        totals=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )
    return case._replace(
        **{
            name: laid_out(getattr(case, name), draw(st.sampled_from(LAYOUTS)))
            for name in ("query", "key", "value")
        }
    )


@needs_kernels
@given(case=walks())
def test_the_kernel_is_the_recurrence_in_float64(case):
    assert_right(case, bodies())


@pytest.mark.parametrize("rates", [[], [0.0, 8.0]])
@pytest.mark.parametrize("tokens", RAGGED)
def test_the_kernel_is_the_recurrence_at_the_edges_of_chunks(tokens, rates, body):
    assert_right(drawn(tokens=tokens, width=9, value_width=17, rates=rates, totals=True), [body])


@needs_kernels
@pytest.mark.parametrize("rates", [[], [0.01, 0.5, 2.0, 8.0]])
def test_any_number_of_threads_gives_the_same_bits(rates, set_threads):
    case = drawn(batch=3, heads=4, kv_heads=4 if rates else 2, tokens=150, rates=rates)
    upstream = [normal(*x.shape) for x in case.run()]
    set_threads(1)
    expected = case.run_and_differentiate(upstream, impl="cpu")
    for threads in (2, 3, 5, 16):
        set_threads(threads)
        got = case.run_and_differentiate(upstream, impl="cpu")
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


# ---- the state is a value ----


def piecewise(case: Walk, cuts: list[int], **options) -> list[Tensor]:
    """out, state and totals of the walk in pieces, cut at these tokens."""
    pieces, state = [], case.state
    for first, end in zip([0, *cuts], [*cuts, case.query.shape[2]], strict=True):
        part = case.map(lambda x, a=first, b=end: x[:, :, a:b])._replace(state=state)
        out, state, *total = part.run(**options)
        pieces.append((out, *total))
    out, *total = (torch.cat(x, 2) for x in zip(*pieces, strict=True))
    return [out, state, *total]


CUTS = st.lists(st.integers(0, 150), max_size=4).map(sorted)
DECAYS = st.sampled_from(([], [0.0, 0.3], [0.05, 8.0]))


@given(cuts=CUTS, rates=DECAYS, form=st.sampled_from((*FORMS, None)), totals=st.booleans())
def test_a_state_handed_on_is_the_whole_in_float64(cuts, rates, form, totals):
    case = drawn(tokens=150, rates=rates, totals=totals).map(lambda x: x.to(F64))
    got = piecewise(case, cuts, form=form)
    assert_close(got, case.run(form="recurrent"), rtol=1e-12, atol=1e-12)


@given(cuts=CUTS, rates=DECAYS, totals=st.booleans())
def test_a_state_handed_on_is_the_whole_in_float32(cuts, rates, totals):
    case = drawn(tokens=150, rates=rates, totals=totals)
    exact = case.map(lambda x: x.to(F64))
    sizes = exact.map(torch.abs).run()
    got = piecewise(case, cuts)
    for x, y, size in zip(got, exact.run(), sizes, strict=True):
        assert_within(x, y, UNITS * EPS * size, f"pieces {cuts}")


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_half_precision_is_summed_in_float32(dtype, impl):
    case = drawn(tokens=100).map(lambda x: x.to(dtype))
    out, state = case.run(impl=impl)
    assert out.dtype == state.dtype == F32
    assert torch.equal(out, case.map(lambda x: x.float()).run(impl=impl)[0])


@pytest.mark.parametrize("rates", [[], [0.5, 2.0]])
@pytest.mark.parametrize("form", [*FORMS, None])
def test_no_tokens_change_no_state(form, rates):
    case = drawn(tokens=0, rates=rates, totals=True)
    out, state, total = case.run(form=form)
    assert out.shape == (1, 2, 0, 6)
    assert total.shape == (1, 2, 0)
    assert torch.equal(state, case.state)
    got = case.run_and_differentiate([out, state, total], form=form)
    assert torch.equal(got[-1], state)  # the gradient of the state is that of the new one


# ---- decay ----


def naive_powers(query: Tensor, key: Tensor, value: Tensor, rate: float) -> Tensor:
    """As one would write it down: kv_t = kv_{t-1} + g^-t k v^T, out_t = g^t q^T kv_t."""
    t = torch.arange(1, query.shape[0] + 1, dtype=query.dtype)
    sums = (torch.exp(rate * t)[:, None, None] * key[:, :, None] * value[:, None]).cumsum(0)
    return torch.exp(-rate * t)[:, None] * (query[:, None] @ sums)[:, 0]


@pytest.mark.parametrize("rate", [0.5, 1.0, 7.0])
def test_powers_of_their_own_overflow_where_the_walk_is_exact(rate, impl):
    tokens = 400
    case = drawn(heads=1, tokens=tokens, rates=[rate])
    q, k, v = (x[0, 0] for x in case[:3])
    bad = ~naive_powers(q, k, v, rate).isfinite().all(-1)
    # g^-t is above the largest float32 from here on, and with the largest product of a key and a
    # value in front of it, and the sum so far, a little before
    overflow = math.log(torch.finfo(F32).max) / rate
    largest = (k.abs().amax() * v.abs().amax()).item() / (1 - math.exp(-rate))
    first = int(bad.nonzero()[0]) + 1
    assert overflow - math.log(largest) / rate - 1 <= first <= overflow + 1
    assert bad[first - 1 :].all()

    case = case._replace(state=torch.zeros_like(case.state))
    exact = case.map(lambda x: x.to(F64))
    sizes = exact.map(torch.abs).run()
    for x, y, size in zip(case.run(impl=impl), exact.run(form="recurrent"), sizes, strict=True):
        assert_within(x, y, UNITS * EPS * size, "the walk")


WAYS = [*(("reference", form) for form in FORMS), ("cpu", "chunked")]


def can(impl: str, form: str) -> dict[str, str]:
    if impl == "cpu" and not bodies():
        pytest.skip("no kernels here")
    return {"impl": impl, "form": form}


@pytest.mark.parametrize(("impl", "form"), WAYS)
def test_a_decay_that_underflows_leaves_the_token_itself(impl, form):
    case = drawn(tokens=130, rates=[1e4, 1e4])
    upstream = [torch.ones_like(x) for x in case.run()]
    out, state, *gradients = case.run_and_differentiate(upstream, **can(impl, form))
    assert_close(out, (case.query * case.key).sum(-1, keepdim=True) * case.value)
    assert_close(state, case.key[:, :, -1, :, None] * case.value[:, :, -1, None])
    assert all(x.isfinite().all() for x in gradients)
    assert torch.equal(gradients[-1], torch.zeros_like(case.state))


# ---- gradients of the chunked reference, by hand ----


@pytest.mark.parametrize("rates", [[], [0.0, 0.7]])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_gradients_of_chunks_are_the_derivatives_and_so_are_theirs(tokens, rates):
    case = drawn(tokens=tokens, width=2, value_width=3, rates=rates, totals=True)
    case = case.map(lambda x: x.to(F64).requires_grad_())

    def results(*leaves):
        given = case._replace(**dict(zip(case._fields, leaves, strict=False)))
        return tuple(given.run(form="chunked"))

    with chunks_of(2):
        assert torch.autograd.gradcheck(results, case.leaves)
        assert torch.autograd.gradgradcheck(results, case.leaves)


# ---- both ways ----


@pytest.mark.parametrize("totals", [False, True])
@pytest.mark.parametrize("rates", [[], [0.0, 0.1, 1.0, 8.0]])
def test_both_ways_is_every_token_by_its_distance(rates, totals):
    case = drawn(heads=4, kv_heads=2, tokens=70, rates=rates, totals=totals)
    leaves = [x.to(F64).requires_grad_() for x in case[:3]]
    walked = both_ways(*leaves, rate=case.rate, totals=totals)
    query, key, value = (x.repeat_interleave(4 // x.shape[1], 1) for x in leaves)
    place = torch.arange(70, dtype=F64)
    rate = torch.zeros(4) if case.rate is None else case.rate
    decay = torch.exp(-rate.to(F64)[:, None, None] * (place[:, None] - place).abs())
    weights = query @ key.mT * decay
    expected = [weights @ value] + [weights.sum(-1)] * totals
    got = [walked.out] + ([] if walked.total is None else [walked.total])
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    upstream = [normal(*x.shape, seed=9 + i).to(F64) for i, x in enumerate(expected)]
    both = (torch.autograd.grad(x, leaves, upstream) for x in (got, expected))
    assert_close(*both, rtol=1e-12, atol=1e-12)


def test_both_ways_in_float32_misses_it_by_rounding(impl):
    case = drawn(heads=2, tokens=150, rates=[0.01, 2.0])
    exact = [x.to(F64) for x in case[:3]]
    got = both_ways(*case[:3], rate=case.rate, impl=impl).out
    right = both_ways(*exact, rate=case.rate).out
    # the token itself is there twice and taken off once
    size = both_ways(*(x.abs() for x in exact), rate=case.rate).out
    own = (exact[0] * exact[1]).abs().sum(-1, keepdim=True) * exact[2].abs()
    assert_within(got, right, UNITS * EPS * (size + 2 * own), "both ways")


def test_both_ways_without_decay_takes_other_queries_than_keys():
    query, key, value = normal(1, 2, 3, 4), normal(1, 2, 7, 4), normal(1, 2, 7, 5)
    assert_close(both_ways(query, key, value).out, query @ key.mT @ value)


# ---- memory ----


@pytest.mark.parametrize("rates", [[], [0.1, 2.0]])
def test_no_more_is_kept_for_the_backward_pass_than_the_inputs(impl, rates):
    for tokens in (300, 3000):
        case = drawn(tokens=tokens, rates=rates).map(lambda x: x.requires_grad_())
        kept = {}

        def pack(x: Tensor, kept=kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            case.run(impl=impl)
        given = [*case.leaves, torch.zeros(2)]  # and a rate
        assert 0 < sum(kept.values()) <= sum(x.untyped_storage().nbytes() for x in given)


# ---- operators, compilers ----


def operator_samples(name: str) -> list[tuple]:
    samples = []
    nothing = torch.empty(0)
    for rates, totals, kv_heads in (([], False, 1), ([0.1, 2.0], True, 2), ([], True, 2)):
        case = drawn(tokens=70, kv_heads=kv_heads, rates=rates, totals=totals)
        if totals and rates:
            case = case._replace(query=laid_out(case.query, "tokens first"))
        if name == "linear_walk" and not totals:
            case = case.map(lambda x: x.requires_grad_())
        rate = nothing if case.rate is None else case.rate
        call = (*case[:3], rate, case.state, totals)
        if name == "linear_walk_backward":
            results = torch.ops.aftermax.linear_walk(*call)
            call = (*(torch.randn_like(x) for x in results), *call)
        samples.append(call)
    return samples


@needs_kernels
@pytest.mark.parametrize("name", schemas())
def test_torch_finds_nothing_wrong_with_the_operator(name):
    operator = getattr(torch.ops.aftermax, name).default
    for sample in operator_samples(name):
        torch.library.opcheck(operator, sample)


REFUSED_BY_OPERATOR = {
    "the walk is for float32": {"query": torch.zeros(1, 2, 9, 8, dtype=F64)},
    "query, key and value do not fit each other": {"key": torch.zeros(1, 2, 8, 8)},
    "heads without a width": {
        "query": torch.zeros(1, 2, 9, 0),
        "key": torch.zeros(1, 2, 9, 0),
        "state": torch.zeros(1, 2, 0, 6),
    },
    "there must be one rate for each head": {"rate": torch.zeros(3)},
    r"the state must be contiguous \(B, Hkv, D, Dv\)": {"state": torch.zeros(1, 2, 8, 7)},
}


@needs_kernels
@pytest.mark.parametrize("message", REFUSED_BY_OPERATOR)
def test_the_operator_checks_what_it_is_given(message):
    case = drawn(rates=[0.1, 0.2])._replace(**REFUSED_BY_OPERATOR[message])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.aftermax.linear_walk(*case[:3], case.rate, case.state, False)


class Module(torch.nn.Module):
    def forward(self, query, key, value, state, rate):
        walked = walk(query, key, value, rate=rate, state=state, totals=True, impl="cpu")
        return walked.out, walked.total, walked.state


@needs_kernels
def test_torch_compile_takes_the_kernel_forward_and_backward():
    torch._dynamo.reset()
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (70, 131):
        case = drawn(tokens=tokens, rates=[0.1, 2.0], totals=True)
        case = case.map(lambda x: x.requires_grad_())
        got, expected = compiled(*case.leaves, case.rate), Module()(*case.leaves, case.rate)
        assert_close(got, expected, rtol=0, atol=0)
        upstream = [normal(*x.shape, seed=9 + i) for i, x in enumerate(expected)]
        both = (torch.autograd.grad(x, case.leaves, upstream) for x in (got, expected))
        assert_close(*both, rtol=0, atol=0)


@needs_kernels
def test_torch_export_takes_the_kernel():
    case, other = (drawn(tokens=70, rates=[0.1, 2.0], totals=True, seed=s) for s in (0, 9))
    exported = torch.export.export(Module(), (*case.leaves, case.rate))
    assert "aftermax.linear_walk" in str(exported.graph)
    given = (*other.leaves, other.rate)
    assert_close(exported.module()(*given), Module()(*given), rtol=0, atol=0)


@needs_kernels
def test_a_gradient_of_a_gradient_is_refused():
    case = drawn(tokens=70).map(lambda x: x.requires_grad_())
    with pytest.raises(RuntimeError, match=r"create_graph=True.*impl='reference' has"):
        torch.autograd.grad(case.run(impl="cpu")[0].sum(), case.query, create_graph=True)
    out = case.run(impl="reference")[0]
    (first,) = torch.autograd.grad(out.sum(), case.query, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), case.key)[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_transforms_run_on_the_reference():
    case = drawn(batch=3, tokens=70, rates=[0.1, 2.0])

    def call(q, k, v):
        return walk(q[None], k[None], v[None], rate=case.rate).out[0]

    whole = walk(*case[:3], rate=case.rate, impl="reference").out
    assert_close(torch.func.vmap(call)(*case[:3]), whole)
    with pytest.raises(RuntimeError, match=r"the kernel knows no torch\.func transforms"):
        torch.func.vmap(lambda x: walk(x[None], x[None], x[None], impl="cpu").out)(case.key)


# ---- what is refused ----

X = torch.zeros(1, 2, 3, 4)
INVALID = {
    "a form": ({"form": "sideways"}, r"form='sideways' is none of 'parallel', 'chunked'"),
    "an impl": ({"impl": "triton"}, r"impl='triton' is none of 'reference', 'cpu'"),
    "no heads": (
        {"query": X[0]},
        r"query, key and value must be \(B, H, T, D\): query \(2, 3, 4\)",
    ),
    "fewer values": ({"value": X[:, :, :2]}, r"key and value need the same \(B, Hkv, T\)"),
    "another batch": ({"query": torch.zeros(2, 2, 3, 4)}, r"B is the query's"),
    "another width": ({"query": torch.zeros(1, 2, 3, 5)}, "query and key need one T and one D"),
    "fewer queries": ({"query": X[:, :, :2]}, "query and key need one T and one D"),
    "heads left over": ({"query": torch.zeros(1, 3, 3, 4)}, "H must be divisible by Hkv"),
    "no heads of keys": ({"key": X[:, :0], "value": X[:, :0]}, "H must be divisible by Hkv"),
    "rates": ({"rate": torch.zeros(3)}, r"rate must be \(H,\) = \(2,\), got \(3,\)"),
    "a rate that learns": ({"rate": torch.zeros(2, requires_grad=True)}, "rate is a constant"),
    "a state": (
        {"state": torch.zeros(1, 2, 4, 5)},
        r"state must be \(1, 2, 4, 4\), got \(1, 2, 4, 5\)",
    ),
    "a state of no dimensions": (
        {"state": torch.zeros(())},
        r"state must be \(1, 2, 4, 4\), got \(\)",
    ),
    "a state of no heads": (
        {"state": torch.zeros(1, 0, 4, 4)},
        r"state must be \(1, 2, 4, 4\), got \(1, 0, 4, 4\)",
    ),
    "a state without its totals": ({"state": X.mT @ X, "totals": True}, r"state must be .* 4, 5\)"),
}


@pytest.mark.parametrize("which", INVALID)
def test_what_does_not_fit_says_so(which):
    options, message = INVALID[which]
    with pytest.raises(ValueError, match=message):
        walk(**{"query": X, "key": X, "value": X} | options)


# it has neither forms nor states, and with no rate takes other queries than keys
BOTH_WAYS = [
    (which, decays)
    for which, (options, _) in INVALID.items()
    for decays in (False, True)
    if not options.keys() & {"form", "state"} and (decays or which != "fewer queries")
]


@pytest.mark.parametrize(("which", "decays"), BOTH_WAYS)
def test_both_ways_refuses_the_same(which, decays):
    options, message = INVALID[which]
    given = {"query": X, "key": X, "value": X} | options
    if decays:
        given.setdefault("rate", torch.zeros(given["query"].shape[1]))
    with pytest.raises(ValueError, match=message):
        both_ways(**given)


@needs_kernels
def test_what_the_kernel_cannot_do_says_why():
    for form in ("parallel", "recurrent"):
        with pytest.raises(RuntimeError, match=f"the kernel walks in chunks, not {form}"):
            walk(X, X, X, form=form, impl="cpu")
    x = X.double()
    with pytest.raises(RuntimeError, match=r"walk: impl='cpu', but .* not in torch\.float64"):
        walk(x, x, x, impl="cpu")
    x = X.to("meta")
    with pytest.raises(RuntimeError, match="the query is on meta, not on the CPU"):
        walk(x, x, x, impl="cpu")


@needs_kernels
def test_no_tokens_are_no_error_for_who_insists_on_the_kernel():
    x = X[:, :, :0]
    assert walk(x, x, x, impl="cpu").out.shape == (1, 2, 0, 4)
