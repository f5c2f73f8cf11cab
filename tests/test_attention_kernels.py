"""The kernels of attention: equal to the reference, on every body, for every mask and layout."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from aftermax import (
    LSSA,
    LSSAR,
    ClippedSoftmax,
    NormalisedClippedSoftmax,
    ReLA,
    ReLUPower,
    ScaleInvariantSoftmax,
    Sigmoid,
    Softmax,
    Visible,
    attention,
    find,
)
from aftermax.dense import as_system

from .attention_cases import (
    EPS,
    assert_right,
    assert_within,
    attend,
    every_entry,
    in_float64,
    problems,
    results,
    seen_in_float64,
    truth,
)
from .cases import Case, case_of, gradients
from .native import BF16, F16, F32, F64, bodies, needs_kernels, normal, rounded_weights, running

pytestmark = needs_kernels

drawn = {"suppress_health_check": list(HealthCheck)}


# equal to the reference


@every_entry
@settings(max_examples=25, **drawn)
@given(problem=problems(small=True))
def test_kernels_give_what_the_reference_gives(entry, problem):
    assert_right(entry, problem.case(entry, F32), problem.visible, bodies(), problem.scale)


@every_entry
@pytest.mark.slow
@settings(max_examples=300, **drawn)
@given(problem=problems())
def test_kernels_give_what_the_reference_gives_at_any_size(entry, problem):
    assert_right(entry, problem.case(entry, F32), problem.visible, bodies(), problem.scale)


@every_entry
@settings(max_examples=12, **drawn)
@given(problem=problems(small=True))
def test_half_precision_is_float32_with_its_result_rounded(entry, problem):
    """And where a body multiplies bfloat16 in pairs, with its weights rounded as well."""
    for dtype in (BF16, F16):
        case = problem.case(entry, dtype)
        visible = seen_in_float64(problem.visible)
        shape = (*case.query.shape[:3], case.value.shape[-1])
        upstream = torch.zeros(shape, dtype=F64)
        right = truth(entry, in_float64(case), visible, upstream, problem.scale)
        eps = torch.finfo(dtype).eps
        for name in bodies():
            with running(name):
                out = attend(entry, case, problem.visible, scale=problem.scale)
                before = right.of_out + rounded_weights(dtype, right.spread)
            # half an ulp of a normal number, or half a step of the subnormals
            rounding = eps / 2 * (right.out.abs() + before) + torch.finfo(dtype).tiny * eps / 2
            assert out.dtype == dtype
            assert_within(out, right.out, before + rounding, f"{dtype} on {name}")


class Recorded(TorchDispatchMode):
    """Keeps the arguments and results of the operator of that name."""

    def __init__(self, name):
        super().__init__()
        self.operator, self.calls = getattr(torch.ops.aftermax, name).default, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is self.operator:
            self.calls.append((args, out))
        return out


@every_entry
@settings(max_examples=8, **drawn)
@given(problem=problems(small=True))
def test_half_gradients_are_float32s_of_the_stored_result(entry, problem):
    """grad . out is of the result as it was rounded; with that the gradients of half precision are
    those of float32, rounded: here the operator itself is given the same numbers in float32."""
    for dtype in (BF16, F16):
        for name in bodies():
            with running(name), Recorded("attention_backward") as recorded:
                results(entry, problem.case(entry, dtype), problem.visible, scale=problem.scale)
                ((args, got),) = recorded.calls
                wide = [x.float() if torch.is_tensor(x) and x.dtype == dtype else x for x in args]
                expected = torch.ops.aftermax.attention_backward(*wide)
            for x, y in zip(got, expected, strict=True):
                # twice an ulp: float32 may come to the other side of a tie in another order
                slack = torch.finfo(x.dtype).eps * y.abs() + torch.finfo(x.dtype).tiny
                if y.numel():
                    slack = slack + 16 * EPS * y.abs().amax()
                assert_within(x, y.to(F64), slack.to(F64), f"{dtype} on {name}")


def test_grouped_heads_of_half_precision_lie_as_the_query_does():
    # outputs and gradients keep "tokens before heads", so that a projection behind needs no copy
    x = normal(2, 9, 4, 16, dtype=BF16).transpose(1, 2).requires_grad_()
    out = attention(x, x, x, impl="cpu")
    assert out.transpose(1, 2).is_contiguous()
    with Recorded("attention_backward") as recorded:
        out.sum().backward()
    ((_, grads),) = recorded.calls
    for grad in grads[:3]:
        assert grad.transpose(1, 2).is_contiguous()


# what is not finite


TOKENS = 150  # more than one tile of keys, more than one block of rows


def flawed_case(entry, **sizes):
    return case_of(entry, batch=2, tokens=TOKENS, kv_heads=2, width=16, **sizes).to(F32)


@every_entry
def test_hidden_keys_never_matter_whatever_they_hold(entry, body):
    seen = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    seen[..., 60:70] = seen[..., -15:] = False
    hidden = ~seen[0, 0, 0, :, None]
    case = flawed_case(entry)
    for visible in (
        Visible(mask=seen),
        Visible(causal=True, mask=torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)),
    ):
        expected = results(entry, case, visible)
        for flaw in (torch.nan, torch.inf, torch.finfo(F32).max):
            flawed = case._replace(
                key=case.key.masked_fill(hidden, flaw), value=case.value.masked_fill(hidden, flaw)
            )
            got = results(entry, flawed, visible)
            assert_close(got, expected, rtol=0, atol=0)


@every_entry
def test_later_keys_never_matter_and_rows_that_see_a_flaw_are_nan(entry, body):
    case = flawed_case(entry)
    for flaw in (torch.nan, torch.inf):
        flawed = case.map(lambda x: x.clone())
        flawed.key[1, :, 131, 3] = flaw
        flawed.value[0, :, 66, 0] = flaw
        flawed.query[0, :, 30, 1] = flaw
        poisoned = torch.zeros(2, 1, TOKENS, 1, dtype=torch.bool)
        poisoned[1, :, 131:] = poisoned[0, :, 66:] = poisoned[0, :, 30] = True
        visible = Visible(causal=True)
        expected = attend(entry, case, visible)
        out = attend(entry, flawed, visible)
        assert_close(out, expected.masked_fill(poisoned, torch.nan), rtol=0, atol=0, equal_nan=True)

        sound = ~poisoned.expand_as(out)
        each = []
        for one in (flawed, case):
            leaves = one.wanting_gradients()
            each.append(gradients(attend(entry, leaves, visible)[sound], leaves))
        assert_close(*each, rtol=1e-5, atol=1e-5)


@every_entry
def test_what_is_nan_is_nan_in_the_reference_too(entry, body):
    case = flawed_case(entry)
    random = torch.Generator().manual_seed(0)
    for flaw in (torch.nan, -torch.inf):
        flawed = case.map(lambda x: x.clone())
        for x in flawed[:3]:
            x[torch.rand(x.shape, generator=random) < 2e-4] = flaw
        mask = torch.rand(2, 1, TOKENS, TOKENS, generator=random) < 0.1
        mask[:, :, 7] = False
        for visible in (Visible(mask=mask), Visible(causal=True, window=20)):
            got, expected = (
                results(entry, flawed, visible, impl=impl) for impl in ("cpu", "reference")
            )
            for x, y in zip(got, expected, strict=True):
                assert torch.equal(x.isnan(), y.isnan())
            assert 0 < got[0].isnan().float().mean() < 1


@every_entry
def test_rows_that_see_nothing_are_zero_and_so_are_their_gradients(entry, body):
    for empty in (slice(60, 70), slice(None)):
        case = flawed_case(entry)
        case.query[:, :, empty] = torch.nan
        mask = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
        mask[:, :, empty] = False
        for visible in (Visible(mask=mask), Visible(causal=True, mask=mask)):
            out, of_query, *others = results(entry, case, visible)
            for x in (out, of_query):
                assert torch.equal(x[:, :, empty], torch.zeros_like(x[:, :, empty]))
            assert all(x.isfinite().all() for x in (out, of_query, *others))


# the same bits


@every_entry
@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(700, 700, True), (1, 5000, False), (129, 700, False)]
)
def test_threads_and_runs_change_no_bit(entry, queries, keys, causal, set_threads):
    case = case_of(entry, batch=1, heads=2, tokens=max(queries, keys), width=16).to(F32)
    case = case._replace(query=case.query[:, :, :queries])
    mask = None if causal else torch.rand(1, 1, 1, keys) < 0.8
    for dtype in (F32, BF16):
        call = case._replace(**{n: x.to(dtype) for n, x in zip(case._fields, case[:3])})  # noqa: B905
        runs = []
        for threads in (1, 2, 2, 5):
            set_threads(threads)
            runs.append(results(entry, call, Visible(causal=causal, mask=mask)))
        for other in runs[1:]:
            assert_close(other, runs[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["softmax", "lssar", "rela"])
def test_threads_change_no_bit_on_any_body(name, body, set_threads):
    entry = find(name)
    case = case_of(entry, batch=2, heads=4, kv_heads=2, tokens=300, width=8).to(F32)
    runs = []
    for threads in (1, 2):
        set_threads(threads)
        runs.append(results(entry, case, Visible(causal=True)))
    assert_close(*runs, rtol=0, atol=0)


# extreme scores


def exact_scores(entry, factor, tokens=70):
    """A case whose scores are factor times 0, +-1, +-2 or +-3 (for cosines 0 or +-1), exactly."""
    case = case_of(entry, batch=1, heads=2, tokens=tokens, width=8).to(F32)
    query, key = torch.zeros_like(case.query), torch.zeros_like(case.key)
    query[..., 0] = 1
    key[..., 0] = torch.randint(-3, 4, (tokens,), generator=torch.Generator().manual_seed(0))
    return case._replace(query=query, key=key), float(torch.tensor(factor, dtype=F32))


def summed(entry, case, visible, out, **options):
    """What the terms of each result sum to in absolute value: of the result itself, if a norm
    follows the sum."""
    if entry.system.mixes_heads:
        return out.abs().amax(-1, keepdim=True).expand_as(out)
    case = in_float64(case._replace(value=case.value.abs()))
    if isinstance(entry.system, ClippedSoftmax | NormalisedClippedSoftmax):
        # what is clipped is a difference, of a weight and a number that is larger in long rows
        options |= {"attn_mask": visible, "enable_gqa": True, "impl": "reference"}
        return 4 * attention(*case[:3], weights=Softmax(), **options)
    return attend(entry, case, visible, impl="reference", **options)


@every_entry
@pytest.mark.parametrize("factor", [30.0, 1e4, -1e4, 3e5, -3e5, 1e30])
def test_extreme_scores_give_what_they_give_in_float64(entry, factor, body):
    if factor == 1e30 and isinstance(entry.system, ReLA):
        pytest.skip("the square of such a row is beyond float32, in the norm that follows")
    case, scale = exact_scores(entry, factor)
    visible = Visible(causal=True)
    out = attend(entry, case, visible, scale=scale)
    exact = attend(entry, in_float64(case), visible, impl="reference", scale=scale)
    # a row whose scores are all far below has no ln(1 + e^s) in float32: it may be 0 there
    lost = out.eq(0) & (entry.positivity == "softplus")
    # the greatest number of units is that of a power: LSSAR raises to the 15th
    slack = 64 * EPS * summed(entry, case, visible, exact, scale=scale)
    assert_within(out, exact.where(~lost, 0), slack, body)


@every_entry
@pytest.mark.parametrize("factor", [1e4, -1e4, 3e5, 1e30])
def test_extreme_scores_leave_gradients_finite(entry, factor, body):
    if factor == 1e30 and entry.positivity == "relu":
        pytest.skip("the gradients of such weights are beyond float32")
    case, scale = exact_scores(entry, factor)
    case = case.map(lambda x: x.detach().requires_grad_())
    out = attend(entry, case, Visible(causal=True), scale=scale)
    for gradient in gradients(out, case):
        assert gradient.isfinite().all()


@every_entry
@pytest.mark.parametrize("bias", [0.0, 50.0, -50.0, 1e4, -1e4, 3e5, 1e30])
def test_equal_scores_give_equal_weights(entry, bias, body):
    if entry.name == "scale-invariant" or (entry.positivity == "relu" and bias > 1e5):
        pytest.skip("has no equal scores, or no finite norm of them")
    case = case_of(entry, batch=1, heads=2, tokens=70, width=8).to(F32)
    case = case._replace(key=torch.zeros_like(case.key))
    visible = Visible(causal=True, mask=torch.full((70,), bias))
    out = attend(entry, case, visible)
    exact = attend(entry, in_float64(case), seen_in_float64(visible), impl="reference")
    if entry.positivity == "softplus" and bias < -100:
        assert out.isfinite().all()  # ln(1 + e^s) is 0 in float32
    else:
        # the score of a sigmoid is off by an eps of itself, and no sum cancels what that does
        units = 16 + abs(bias) * (entry.name == "sigmoid" and abs(bias) < 100)
        slack = units * EPS * summed(entry, case, seen_in_float64(visible), exact)
        assert_within(out, exact, slack, body)


@pytest.mark.parametrize("weights", [LSSA(), LSSAR(), LSSAR(3)], ids=repr)
@pytest.mark.parametrize("score", [-20.0, -80.0, -90.0, -100.0, -120.0, -1e4])
def test_far_keys_leave_a_row_of_softplus_finite(weights, score, body):
    # all that a row sees lies far below, as a window of ALiBi may do it
    q = torch.zeros(1, 1, 1, 8)
    k, v = torch.zeros(1, 1, 5, 8), normal(1, 1, 5, 8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.full((5,), score)
    out = attention(*leaves, weights=weights, attn_mask=mask, impl="cpu")
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.isfinite().all()
    assert out.isfinite().all()
    # below -87 float32 holds no e^s of full precision: a body may take it for 0
    if score > -87 or out.any():
        assert_close(out, v.mean(2, keepdim=True), rtol=16 * EPS, atol=16 * EPS)


@pytest.mark.parametrize("sink", [-1e30, -1e4, -60.0, 0.0, 60.0, 1e4, 1e10, 1e30])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_sinks_of_any_size_take_their_share(sink, scale, body):
    entry, (q, k, v) = find("sink"), (normal(1, 2, 70, 8, seed=s) for s in range(3))
    case = Case(q, k, v, {"sink": torch.tensor([sink, 0.3])})
    got = results(entry, case, Visible(causal=True), scale=scale)
    expected = results(entry, in_float64(case), Visible(causal=True), scale=scale, impl="reference")
    # scores of some 10 scale, each off by an eps of itself
    size = 32 * scale
    for x, y in zip(got, expected, strict=True):
        assert_close(x.double(), y, rtol=4 * size * EPS, atol=4 * size * EPS * (1 + y.abs().max()))


@pytest.mark.parametrize("n", [1, 10**6, 10**18])
def test_sigmoids_of_any_bias_are_right(n, body):
    entry = dataclasses.replace(find("sigmoid"), system=Sigmoid(n))
    case = case_of(entry, batch=1, heads=2, tokens=70, width=8).to(F32)
    for mask in (None, torch.linspace(-1e4, 1e4, 70), torch.linspace(-90, 90, 70)):
        visible = Visible(causal=True, mask=mask)
        out = attend(entry, case, visible)
        exact = attend(entry, in_float64(case), seen_in_float64(visible), impl="reference")
        # a score of 100 is off by 100 eps, and its sigmoid by that share of itself
        slack = 200 * EPS * summed(entry, case, seen_in_float64(visible), exact)
        # weights below the normal numbers may count as 0
        slack = slack + torch.finfo(F32).tiny * case.value.abs().sum().item()
        assert_within(out, exact, slack, body)


@pytest.mark.parametrize("keys", [1, 2, 3, 4, 5, 200])
@pytest.mark.parametrize("weights", [LSSAR(), LSSAR(1), LSSAR(2.5)], ids=repr)
def test_flat_rows_take_the_weights_of_softplus(keys, weights, body):
    q, one, v = normal(1, 2, 9, 16), normal(1, 2, 1, 16, seed=1), normal(1, 2, keys, 5, seed=2)
    leaves = [x.requires_grad_() for x in (q, one, v)]
    out = attention(q, one.expand(1, 2, keys, 16), v, weights=weights, impl="cpu")
    assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=8 * EPS, atol=8 * EPS)
    of_query, of_key, of_value = torch.autograd.grad(out.sum(), leaves)
    assert_close(of_value, torch.full_like(of_value, 9 / keys), rtol=8 * EPS, atol=8 * EPS)
    # all keys are one and the same: no direction of it, or of the query, changes anything
    size = v.abs().sum().item() * 9
    for gradient in (of_query, of_key):
        assert gradient.abs().max() <= 32 * EPS * size


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_rows_of_three_keys_and_less_have_no_threshold(tokens, body):
    for name in ("lssar", "lssar-log"):
        entry = find(name)
        case = case_of(entry, batch=1, heads=2, tokens=tokens, width=16).to(F32)
        assert_right(entry, case, Visible(causal=True), [body])


MAPS_BESIDE = {
    "sigmoid of one length": ("sigmoid", Sigmoid(1024)),
    "sigmoid of the sequence": ("sigmoid", Sigmoid("sequence")),
    "lssar 3": ("lssar", LSSAR(3)),
    "lssar 2.5": ("lssar", LSSAR(2.5)),
    "relu squared": ("relu-power", ReLUPower(2)),
    "relu 2.5": ("relu-power", ReLUPower(2.5)),
    "rela without norm": ("relu-power", ReLA(norm="none")),
    "scale-invariant 2": ("scale-invariant", ScaleInvariantSoftmax(2.0)),
}


@pytest.mark.parametrize("name", MAPS_BESIDE)
def test_maps_with_other_constants_give_what_the_reference_gives(name, body):
    base, weights = MAPS_BESIDE[name]
    entry = dataclasses.replace(find(base), system=weights)
    case = case_of(entry, kv_heads=2, tokens=140, width=24, value_width=17).to(F32)
    padding = torch.arange(140) < torch.tensor([140, 60])[:, None]
    for visible in (Visible(causal=True), Visible(mask=padding[:, None, None])):
        assert_right(entry, case, visible, [body])


# decoding


@every_entry
@pytest.mark.parametrize(("queries", "keys"), [(1, 1000), (1, 5000), (2, 3001), (4, 1025)])
def test_few_queries_meet_long_caches(entry, queries, keys, body):
    case = case_of(entry, batch=1, heads=2, kv_heads=1, tokens=keys, width=16).to(F32)
    case = case._replace(query=case.query[:, :, -queries:])
    assert_right(entry, case, Visible(causal=True, offset=keys - queries), [body])


FAR = {
    "rising": (-40.0, -3.0, 20.0, 60.0),
    "falling": (60.0, 20.0, -3.0, -40.0),
    "one above": (0.0, 1.0, 300.0, -2.0),
    "hidden": (-torch.inf, 0.0, -torch.inf, 1.0),
    "beyond a pair": (0.0, 3e5, -3e5, 3e5),
    "beyond a pair, falling": (3e5, -3e5, 0.0, 2.0),
    "below a pair": (-3e5, -3e5, -4e5, -3e5),
    "far and hidden": (-torch.inf, -3e5, -torch.inf, 1e30),
}
"""What the keys of four parts of a long row have added to their scores."""


@pytest.mark.parametrize("added", FAR)
@pytest.mark.parametrize(
    "weights",
    [
        Softmax(),
        ClippedSoftmax(-1e-4, 1.1),
        ClippedSoftmax(-0.01),
        NormalisedClippedSoftmax(),
        NormalisedClippedSoftmax(1.2, 0.4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("group", [1, 3])
def test_parts_of_a_long_row_meet_at_one_exponent(weights, added, group, body):
    """Decoding sums the parts of a row by themselves: what one of them has left in its strip must
    be brought to what the whole row is, be it far above or below."""
    keys, random = 4 * 4 * 128, torch.Generator().manual_seed(0)  # as few_queries.h parts them
    query, key = torch.zeros(2, group, 1, 8), torch.zeros(2, 1, keys, 8)
    query[..., 0] = 1
    key[..., 0] = torch.randint(-3, 4, (keys,), generator=random)  # scores that float32 holds
    value = normal(2, 1, keys, 6, seed=1)
    mask = torch.tensor(FAR[added]).repeat_interleave(keys // 4)
    options = {"weights": weights, "scale": 1.0, "enable_gqa": True}
    out = attention(query, key, value, attn_mask=mask, impl="cpu", **options)
    exact = [x.double() for x in (query, key, value)]
    options["impl"] = "reference"
    right = attention(*exact, attn_mask=mask.double(), **options)
    # a weight is off by an eps of the softmax that it was made of
    stretch = attention(
        *exact[:2], exact[2].abs(), attn_mask=mask.double(), **options | {"weights": Softmax()}
    )
    assert_within(out, right, 32 * EPS * stretch, body)


@pytest.mark.parametrize("weights", [Softmax(), ClippedSoftmax(-1e-4), LSSAR()], ids=repr)
def test_a_flaw_in_one_part_of_a_long_row_spoils_what_sees_it(weights, body):
    query, key, value = normal(1, 2, 3, 8), normal(1, 2, 2048, 8), normal(1, 2, 2048, 6, seed=2)
    key[0, 0, 700], value[0, 1, 1300, 2] = torch.nan, torch.inf
    sees = torch.ones(2, 3, 2048, dtype=torch.bool)
    sees[0, 1, 700] = sees[1, 2, 1300] = False
    out = attention(query, key, value, attn_mask=sees, weights=weights, impl="cpu")
    flawed = torch.tensor([[True, False, True], [True, True, False]])
    assert torch.equal(out.isnan().all(-1)[0], flawed)
    assert out[0][~flawed].isfinite().all()


@every_entry
def test_cached_decoding_equals_the_whole_sequence(entry):
    tokens, system = 140, as_system(entry.system)
    case = case_of(entry, batch=2, kv_heads=2, tokens=tokens, width=16).to(F32)
    upstream = torch.zeros(2, 4, tokens, 16, dtype=F64)
    right = truth(entry, in_float64(case), Visible(causal=True), upstream)
    for name in bodies():
        with running(name):
            state, pieces = system.init_state(2, 2, 16, 16), []
            for start, stop in itertools.pairwise((0, 100, 101, *range(104, tokens + 1))):
                x = (x[:, :, start:stop] for x in case[:3])
                options = {"enable_gqa": True, "impl": "cpu", **case.learned}
                piece, state = system.step(*x, state, Visible(causal=True), **options)
                pieces.append(piece)
        assert_within(torch.cat(pieces, 2), right.out, right.of_out, f"decoded on {name}")
