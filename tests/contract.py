"""The laws that bind every entry of the catalogue, whatever kind of system it is.

A law talks to a system through the methods of `aftermax.System` alone (`attend`, `init_state`,
`step`, `learned`), so that a linear, sparse or recurrent system meets the same laws as a row map.
Law 10, what the weights are like, stands in weight_laws.py.

What a system cannot keep its entry declares, `exceptions={law: reason}`; `hold` then skips that law
aloud, and a declared name that is no law is an error.

Where a law says "equal" and both sides walk the same arithmetic, the tolerance is rounding in
float64 (`EXACT`). No law is tested at a looser tolerance than its docstring states.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from aftermax import Entry, RecurFormer, RowMap, Visible
from aftermax.linear import Separable

from .attention_cases import assert_right
from .cache_laws import CACHE_LAWS
from .cases import (
    EXACT,
    F64,
    Case,
    View,
    biased_views,
    blocks_of,
    case_of,
    chunks_of,
    decode,
    distances,
    gradients,
    masked_views,
    natural,
    plain_and_natural,
    plain_views,
)
from .linear_cases import assert_right as assert_linear
from .naive import NAIVE
from .native import bodies, rounded_weights, running
from .weight_laws import law_hidden_keys_do_not_count, law_length_aware


def hold(entry: Entry, law: str) -> None:
    """Hold the entry to the law, or skip it with the reason that the entry declares."""
    if unknown := set(entry.exceptions) - set(LAWS):
        raise AssertionError(f"{entry.name} excepts itself from no law: {', '.join(unknown)}")
    if law in entry.exceptions:
        pytest.skip(f"{entry.name} cannot keep {law}: {entry.exceptions[law]}")
    LAWS[law](entry)


def _equals_naive(entry: Entry, views: Callable[..., dict[str, View]], **options) -> None:
    naive, heads, tokens = NAIVE[entry.name], 4, 9
    for name, view in views(2, heads, tokens).items():
        if view.visible.causal and not entry.causal:
            continue
        for kv_heads, value_width in ((4, 8), (2, 5)):
            case = case_of(entry, kv_heads=kv_heads, value_width=value_width, tokens=tokens)
            out = case.attend(entry, view.visible, enable_gqa=True, **options)
            expected = naive(
                *case[:3],
                view.seen,
                distance=distances(tokens),
                bias=view.bias,
                learned=case.learned,
                **options,
            )
            assert_close(out, expected, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def law_equation(entry: Entry) -> None:
    """1. It equals its equation written naively, to 1e-12: whole, causal, padded, with grouped
    heads, with a value width of its own, and with a scale given."""
    _equals_naive(entry, plain_views)
    _equals_naive(entry, plain_views, scale=0.7)


def law_masks(entry: Entry) -> None:
    """1. It equals its equation under windows and masks that hide, to 1e-12."""
    _equals_naive(entry, masked_views)


def law_biases(entry: Entry) -> None:
    """1. It equals its equation with terms added to its scores, by a mask or ALiBi, to 1e-12."""
    _equals_naive(entry, biased_views)


def law_gradients(entry: Entry) -> None:
    """2. Its gradients, those of what it learns included, are the derivatives (gradcheck), and
    so are the gradients of the gradients."""
    case = case_of(entry, batch=1, heads=2, tokens=5, width=4, value_width=3).wanting_gradients()

    def attend(query, key, value, *learned):
        named = dict(zip(case.learned, learned, strict=True))
        return Case(query, key, value, named).attend(entry, natural(entry))

    assert torch.autograd.gradcheck(attend, case.leaves)
    assert torch.autograd.gradgradcheck(attend, case.leaves)


def law_mask_gradients(entry: Entry) -> None:
    """2. The gradients of an additive mask and of ALiBi slopes are the derivatives."""
    case = case_of(entry, batch=1, heads=2, tokens=5, width=4)
    mask = biased_views(1, 2, 5)["float mask"].bias.requires_grad_()
    slopes = torch.tensor([0.3, 0.1], dtype=F64, requires_grad=True)

    def attend(mask, slopes):
        return case.attend(entry, Visible(causal=entry.causal, mask=mask, slopes=slopes))

    assert torch.autograd.gradcheck(attend, (mask, slopes))


def law_invisible_keys(entry: Entry) -> None:
    """3. A key that is not visible never matters: with NaN, inf or the largest number in its key,
    its value or both, outputs and gradients are those of the clean call, bit for bit, in one block
    and in many."""
    last_two = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    last_two[..., -2:] = False
    views = {
        "masked": Visible(mask=last_two),
        "as it is used, masked": Visible(causal=entry.causal, mask=last_two),
        "float mask": Visible(mask=torch.zeros(last_two.shape).masked_fill(~last_two, -torch.inf)),
    }
    hidden = torch.zeros(9, 1, dtype=torch.bool)
    hidden[-2:] = True
    for scores, visible in ((s, v) for s in (2**21, 150) for v in views.values()):
        with blocks_of(scores):
            clean = case_of(entry).wanting_gradients()
            expected = clean.attend(entry, visible)
            expected_gradients = gradients(expected, clean)
            for flaw in (torch.nan, torch.inf, -torch.inf, torch.finfo(F64).max):
                for which in ("key", "value", "both"):
                    flawed = clean.map(lambda x: x.detach())
                    if which != "value":
                        flawed = flawed._replace(key=flawed.key.masked_fill(hidden, flaw))
                    if which != "key":
                        flawed = flawed._replace(value=flawed.value.masked_fill(hidden, flaw))
                    flawed = flawed.wanting_gradients()
                    out = flawed.attend(entry, visible)
                    assert_close(out, expected, rtol=0, atol=0)
                    assert_close(gradients(out, flawed), expected_gradients, rtol=0, atol=0)


def law_later_keys(entry: Entry) -> None:
    """3. A later token never matters to an earlier row of a causal call, even if it is NaN, forward
    and backward, in one block and in many; the rows that see it are NaN, each and whole."""
    for scores, flaw in ((s, f) for s in (2**21, 150) for f in (torch.nan, torch.inf)):
        with blocks_of(scores):
            clean = case_of(entry).wanting_gradients()
            flawed = clean.map(lambda x: x.detach())
            flawed.key[1, :, 5] = flaw
            flawed.value[0, :, 6, 0] = flaw
            flawed.query[0, :, 3, 1] = flaw
            flawed = flawed.wanting_gradients()
            out = flawed.attend(entry, Visible(causal=True))
            expected = clean.attend(entry, Visible(causal=True))

            poisoned = torch.zeros(2, 1, 9, 1, dtype=torch.bool)
            poisoned[1, :, 5:] = poisoned[0, :, 6:] = poisoned[0, :, 3] = True
            assert_close(out, expected.masked_fill(poisoned, torch.nan), equal_nan=True, **EXACT)

            sound = ~poisoned.expand_as(out)
            assert_close(gradients(out[sound], flawed), gradients(expected[sound], clean), **EXACT)


def law_flaw_of_one_head(entry: Entry) -> None:
    """3. A visible NaN in one key head poisons the rows of the query heads that read it, and of
    every head where the system mixes heads; no number that NaN went into looks sound."""
    case = case_of(entry, kv_heads=2)
    flawed = case.map(lambda x: x.clone())
    flawed.key[0, 1, 4, 2] = torch.nan
    poisoned = torch.zeros(2, 4, 9, 1, dtype=torch.bool)
    first = 4 if entry.causal else 0
    poisoned[0, 2:, first:] = True
    if getattr(entry.system, "mixes_heads", False):
        poisoned[0, :, first:] = True
    out = flawed.attend(entry, natural(entry), enable_gqa=True)
    expected = case.attend(entry, natural(entry), enable_gqa=True)
    assert_close(out, expected.masked_fill(poisoned, torch.nan), equal_nan=True, **EXACT)


def law_empty_rows(entry: Entry) -> None:
    """4. A row that sees nothing gives 0 and finite gradients, even if its own query is NaN, and
    even if no row sees anything. Where the queries of a sequence must see the same keys, the rows
    are those of a whole sequence."""
    by_row = "masks" not in entry.exceptions
    some = (slice(None), slice(None), slice(2, 4)) if by_row else (slice(1, 2),)
    for scores in (2**21, 150):
        for empty in (some, ...):
            case = case_of(entry)
            case.query[empty] = torch.nan
            case = case.wanting_gradients()
            mask = torch.ones(2, 1, 9 if by_row else 1, 9, dtype=torch.bool)
            mask[empty] = False
            for visible in (
                Visible(mask=mask),
                Visible(causal=entry.causal, mask=mask),
                Visible(mask=torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)),
            ):
                with blocks_of(scores):
                    out = case.attend(entry, visible)
                    assert torch.equal(out[empty], torch.zeros_like(out[empty]))
                    assert out.isfinite().all()
                    for gradient in gradients(out, case):
                        assert gradient.isfinite().all()


def law_prefix(entry: Entry) -> None:
    """5. Prefix consistency: tokens added at the end never change earlier causal outputs."""
    long = case_of(entry, tokens=11)
    whole = long.attend(entry, Visible(causal=True))
    for tokens in range(1, 11):
        query, key, value = (x[:, :, :tokens] for x in long[:3])
        out = Case(query, key, value, long.learned).attend(entry, Visible(causal=True))
        assert_close(out, whole[:, :, :tokens], **EXACT)


TOKENS = 10
CUTS = st.lists(st.integers(1, TOKENS - 1), unique=True).map(sorted)


def law_cached_decode(entry: Entry) -> None:
    """6. Decoding with a cache equals the full pass, however the tokens are cut into pieces."""

    @given(cuts=CUTS)
    def equal(cuts: list[int]) -> None:
        case = case_of(entry, tokens=TOKENS, kv_heads=2, value_width=5)
        whole = case.attend(entry, Visible(causal=True), enable_gqa=True)
        assert_close(decode(entry, case, Visible(causal=True), cuts), whole, **EXACT)

    equal()


def law_cached_padding(entry: Entry) -> None:
    """6. So it does with padding on the left, on the right or anywhere, told by `seen`: at every
    real token the cache gives what the full pass gives, and the padding counts for nothing."""

    @given(cuts=CUTS, left=st.integers(0, 4), right=st.integers(0, 4), hole=st.booleans())
    def equal(cuts: list[int], left: int, right: int, hole: bool) -> None:
        case = case_of(entry, tokens=TOKENS)
        seen = torch.ones(2, TOKENS, dtype=torch.bool)
        seen[0, :left] = False
        seen[1, TOKENS - right :] = False
        seen[:, 5] = not hole
        whole = case.attend(entry, Visible(causal=True, mask=seen[:, None, None]))
        out = decode(entry, case, Visible(causal=True), cuts, seen)
        real = seen[:, None, :, None].expand_as(out)
        assert_close(out[real], whole[real], **EXACT)

    equal()


def law_walks(entry: Entry) -> None:
    """7. One sum, however it is walked: whole, in blocks and chunks of any size, in every form and
    token by token give the same outputs and the same gradients."""
    case = case_of(entry, kv_heads=2).wanting_gradients()
    whole = case.attend(entry, natural(entry), enable_gqa=True)
    expected = gradients(whole, case)

    def same(out: Tensor) -> None:
        assert_close(out, whole, **EXACT)
        assert_close(gradients(out, case), expected, **EXACT)

    for scores in (1, 150, 400):
        with blocks_of(scores):
            same(case.attend(entry, natural(entry), enable_gqa=True))
    if isinstance(entry.system, Separable):
        for form in ("parallel", "recurrent", "chunked"):
            for tokens in (1, 4, 9, 64):
                with chunks_of(tokens):
                    same(case.attend(entry, natural(entry), enable_gqa=True, form=form))
    if entry.causal:
        same(decode(entry, case, Visible(causal=True), list(range(1, 9))))


def law_batch_mates(entry: Entry) -> None:
    """8. A sequence never depends on those that share its batch, not even on NaN in them."""
    for visible in plain_and_natural(entry):
        case = case_of(entry, batch=3)
        together = case.attend(entry, visible)
        for b in range(3):
            query, key, value = (x[b : b + 1] for x in case[:3])
            alone = Case(query, key, value, case.learned).attend(entry, visible)
            assert_close(together[b : b + 1], alone, **EXACT)
        for x in case[:3]:
            x[1] = torch.nan
        assert_close(case.attend(entry, visible)[::2], together[::2], rtol=0, atol=0)


def law_key_order(entry: Entry) -> None:
    """8. Where the call is not causal, the order of the keys is no information: keys, values and
    mask permuted together change nothing, and permuted queries permute the rows."""
    case = case_of(entry)
    order = torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])
    mask = masked_views(2, 4, 9)["bool mask"].seen
    for visible, permuted in (
        (Visible(), Visible()),
        (Visible(mask=mask), Visible(mask=mask[..., order])),
    ):
        out = case.attend(entry, visible)
        keys = case._replace(key=case.key[:, :, order], value=case.value[:, :, order])
        assert_close(keys.attend(entry, permuted), out, **EXACT)
    queries = case._replace(query=case.query[:, :, order])
    assert_close(queries.attend(entry, Visible()), case.attend(entry, Visible())[:, :, order])


def law_head_independence(entry: Entry) -> None:
    """8. A head never depends on another: it alone, with its share of what is learned for each,
    gives what it gives among the others."""
    case = case_of(entry)
    out = case.attend(entry, natural(entry))
    for h in range(4):
        query, key, value = (x[:, h : h + 1] for x in case[:3])
        learned = {name: x[h : h + 1] if len(x) == 4 else x for name, x in case.learned.items()}
        alone = Case(query, key, value, learned).attend(entry, natural(entry))
        assert_close(alone, out[:, h : h + 1], **EXACT)


def law_grouped_queries(entry: Entry) -> None:
    """9. Grouped queries equal repeated key and value heads, outputs and gradients; the value's
    width is free."""
    for kv_heads, value_width in ((1, 8), (2, 8), (2, 3), (4, 11)):
        case = case_of(entry, kv_heads=kv_heads, value_width=value_width).wanting_gradients()
        grouped = case.attend(entry, natural(entry), enable_gqa=True)
        repeated = case._replace(
            key=case.key.repeat_interleave(4 // kv_heads, 1),
            value=case.value.repeat_interleave(4 // kv_heads, 1),
        ).attend(entry, natural(entry))
        assert grouped.shape == (2, 4, 9, value_width)
        assert_close(grouped, repeated, **EXACT)
        assert_close(gradients(grouped, case), gradients(repeated, case), **EXACT)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compute a system: the reference, or a body of the kernels."""

    options: dict[str, str]
    body: str | None = None

    def chosen(self):
        return running(self.body) if self.body else contextlib.nullcontext()


def ways(entry: Entry) -> list[Way]:
    """All that there are here. A system that is no row map has but its own."""
    if not isinstance(entry.system, RowMap | Separable | RecurFormer):
        return [Way({})]
    kernels = [] if "kernel_equals_reference" in entry.exceptions else bodies()
    return [Way({"impl": "reference"}), *(Way({"impl": "cpu"}, name) for name in kernels)]


HALF_SLACK = 1e-5
"""Float32 error of an output of size 1 that law 11 allows on top of the rounding of the result.

A score is off by about lambda * D * 2^-24, some 1e-5 for the sharpest of the systems (lambda =
ln 64 ln 33 = 15); LSSAR multiplies a relative error by its power. Scores in bf16 would be off by
1e-2, and the outputs of LSSAR by 1e-1: thousands of times the slack.
"""


def law_half_precision(entry: Entry) -> None:
    """11. On half-precision inputs it errs from float64 on the same inputs by the rounding of the
    result (half an ulp) and `HALF_SLACK`, forward; backward, by the rounding of the gradient, on
    the scale of the largest.

    The kernels keep no more of a result than was rounded, and the gradients of scores contain
    grad . out: there as much again is allowed backward. Where a kernel multiplies bfloat16 in pairs
    it rounds its weights w to bfloat16 as well, by half an ulp (eps / 2) of each, which is
    eps / 2 sum_j w_ij |v_j| of the result at most."""
    for dtype in (torch.bfloat16, torch.float16):
        ulp = torch.finfo(dtype).eps
        rounded = case_of(entry, tokens=33, width=64).to(dtype)
        exact = rounded.to(F64).wanting_gradients()
        expected = exact.attend(entry, natural(entry))
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        exacts = torch.autograd.grad(expected, exact.leaves, upstream.to(F64))
        spread = _spread(entry, exact)
        for way in ways(entry):
            with way.chosen():
                half = rounded.wanting_gradients()
                out = half.attend(entry, natural(entry), **way.options)
                halves = torch.autograd.grad(out, half.leaves, upstream)
                allowed = 0.51 * ulp * expected.abs() + HALF_SLACK
                if way.body is not None:
                    allowed = allowed + rounded_weights(dtype, spread)
            assert out.dtype == dtype
            assert ((out.to(F64) - expected).abs() <= allowed).all(), way
            of_rows = isinstance(entry.system, RowMap | RecurFormer)
            roundings = 2 if way.body and of_rows else 1
            for got, wanted in zip(halves, exacts, strict=True):
                assert got.dtype == dtype
                fits = wanted.abs() <= torch.finfo(dtype).max  # what does not is inf
                assert got[fits].isfinite().all()
                error = (got.to(F64) - wanted)[fits].abs().max()
                assert error <= roundings * 0.51 * ulp * wanted[fits].abs().max(), way


def _spread(entry: Entry, case: Case) -> Tensor:
    """sum_j w_ij |v_j|. What follows the sum (`finish`) is done on values that were not rounded."""
    system = getattr(entry.system, "dense", entry.system)
    if not isinstance(system, RowMap) or type(system).finish is not RowMap.finish:
        return torch.zeros((), dtype=F64)
    return case._replace(value=case.value.abs()).attend(entry, natural(entry)).detach()


def law_autocast(entry: Entry) -> None:
    """11. Under autocast it still accumulates in float32: the result is what it is outside."""
    for dtype in (torch.bfloat16, torch.float32):
        case = case_of(entry, tokens=33, width=64).to(dtype)
        for way in ways(entry):
            with way.chosen():
                expected = case.attend(entry, natural(entry), **way.options)
                with torch.autocast("cpu", torch.bfloat16):
                    out = case.attend(entry, natural(entry), **way.options)
            assert_close(out, expected, rtol=0, atol=0)


class _Attend(torch.nn.Module):
    """The system as a module, which export asks for."""

    def __init__(self, entry: Entry, names: list[str], visible: Visible):
        super().__init__()
        self.entry, self.names, self.visible = entry, names, visible

    def forward(self, query, key, value, *learned):
        named = dict(zip(self.names, learned, strict=True))
        return Case(query, key, value, named).attend(self.entry, self.visible)


def law_compiles(entry: Entry) -> None:
    """12. torch.compile takes it whole (fullgraph), forward and backward, with equal results,
    in one block and in several.

    Float64 runs on the reference, in plain torch; the operators that the kernels register are held
    to what torch asks of them in test_row_operators.py and test_attention_operators.py."""
    case = case_of(entry, tokens=6).wanting_gradients()
    module = _Attend(entry, list(case.learned), natural(entry))
    expected = module(*case.leaves)
    for scores in (2**21, 150):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with blocks_of(scores):
            out = compiled(*case.leaves)
            assert_close(out, expected, **EXACT)
            got = gradients(out, case)
        assert_close(got, gradients(module(*case.leaves), case), **EXACT)


def law_exports(entry: Entry) -> None:
    """12. torch.export takes it; the exported program gives equal results on other numbers."""
    case, other = case_of(entry, tokens=6), case_of(entry, tokens=6, seed=1)
    module = _Attend(entry, list(case.learned), natural(entry))
    exported = torch.export.export(module, tuple(case.leaves)).module()
    assert_close(exported(*other.leaves), module(*other.leaves), **EXACT)


def law_kernel_equals_reference(entry: Entry) -> None:
    """14. The kernels, on every body that runs here, give in float32 what the reference gives in
    float64, outputs and the gradients of everything, to the rounding of float32 that
    attention_cases.py and linear_cases.py derive: over several tiles, grouped heads, windows, masks
    and caches."""
    if not bodies():
        pytest.skip("no kernels here")
    padding = torch.ones(2, 1, 1, 150, dtype=torch.bool)
    padding[0, ..., -70:] = padding[1, ..., :3] = False
    views = {
        (150, 150): (Visible(), Visible(causal=True, window=40), Visible(mask=padding)),
        (5, 150): (Visible(causal=True, offset=145, mask=padding),),
        (67, 33): (Visible(slopes=torch.linspace(0.01, 0.2, 4)),),
    }
    check = assert_right
    if isinstance(entry.system, Separable):
        views = {(150, 150): (Visible(), Visible(causal=True), Visible(causal=True, mask=padding))}
        check = assert_linear
    elif not isinstance(entry.system, RowMap):
        pytest.skip(f"{entry.name} has no kernels")
    for (queries, keys), visibles in views.items():
        case = case_of(entry, kv_heads=2, tokens=max(queries, keys), width=24, value_width=17)
        query, key, value = case.query[:, :, :queries], case.key[:, :, :keys], case.value
        case = case._replace(query=query, key=key, value=value[:, :, :keys]).to(torch.float32)
        for visible in visibles:
            check(entry, case, visible, bodies())


LAWS: dict[str, Callable[[Entry], None]] = {
    "equation": law_equation,
    "masks": law_masks,
    "biases": law_biases,
    "gradients": law_gradients,
    "mask_gradients": law_mask_gradients,
    "invisible_keys": law_invisible_keys,
    "later_keys": law_later_keys,
    "flaw_of_one_head": law_flaw_of_one_head,
    "empty_rows": law_empty_rows,
    "prefix": law_prefix,
    "cached_decode": law_cached_decode,
    "cached_padding": law_cached_padding,
    **CACHE_LAWS,
    "walks": law_walks,
    "batch_mates": law_batch_mates,
    "key_order": law_key_order,
    "head_independence": law_head_independence,
    "grouped_queries": law_grouped_queries,
    "hidden_keys_do_not_count": law_hidden_keys_do_not_count,
    "length_aware": law_length_aware,
    "half_precision": law_half_precision,
    "autocast": law_autocast,
    "compiles": law_compiles,
    "exports": law_exports,
    "kernel_equals_reference": law_kernel_equals_reference,
}
"""The laws that bind all, by the names that `Entry.exceptions` uses."""
