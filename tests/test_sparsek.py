"""SparseK: the laws at a k and a window that leave something out, and what is special."""

import dataclasses

import entmax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import LSSAR, Cache, SparseK, SparseKAttention, Visible, kernels, sparsek
from aftermax.sparse import chunks, stream
from aftermax.sparse.sparsek import ENTRY

from .cases import case_of, gradients
from .contract import LAWS, hold
from .linear_cases import assert_right
from .naive import NAIVE
from .naive_sparsek import sparsek as naive
from .native import bodies

SMALL = {
    "kv": SparseK(k=2, window=2),
    "v": SparseK(k=3, window=1, couple="v"),
    "log": SparseK(k=2, window=0, couple="log"),
    "raw": SparseK(k=2, window=2, normalise=False),
    "left out": SparseK(k=2, window=2, linear=True),
}


SLOW_LAWS = ("compiles", "exports", "gradients")
"""For which one coupling stands for the others."""


@pytest.mark.parametrize(
    ("name", "law"),
    [
        pytest.param(name, law, id=f"{name}-{law}")
        for name in SMALL
        for law in LAWS
        if name == "left out" or law not in SLOW_LAWS
    ],
)
def test_law_of_a_small_selection(name, law, monkeypatch):
    system = SMALL[name]
    given = (system.k, system.window, system.couple, system.normalise, system.linear)
    monkeypatch.setitem(NAIVE, ENTRY.name, naive(*given))
    hold(dataclasses.replace(ENTRY, system=system), law)


F64 = torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-12}


# ---- the operator ----


@given(
    rows=st.integers(1, 4),
    m=st.integers(1, 40),
    k=st.integers(1, 40),
    size=st.sampled_from([0.1, 1, 6]),
)
def test_the_operator_is_the_budget_projection_of_entmax(rows, m, k, size):
    random = torch.Generator().manual_seed(1000 * m + k)
    scores = size * torch.randn(rows, m, generator=random, dtype=F64)
    if k > m:  # where entmax gives what does not sum to its budget
        assert torch.equal(sparsek(scores, k), torch.ones_like(scores))
        return
    theirs = entmax.budget_bisect(scores, budget=k, n_iter=100)
    assert_close(sparsek(scores, k), theirs, **EXACT)
    assert_close(sparsek(scores, k).sum(-1), torch.full((rows,), float(k), dtype=F64), **EXACT)
    if k == 1:
        assert_close(sparsek(scores, k), entmax.sparsemax(scores), **EXACT)


def test_its_gradients_and_that_of_k_are_the_derivatives():
    torch.manual_seed(0)
    scores = torch.randn(3, 7, dtype=F64, requires_grad=True)
    k = torch.tensor([1.5, 2.0, 4.2], dtype=F64, requires_grad=True)
    mask = torch.rand(3, 7) < 0.9
    assert torch.autograd.gradcheck(lambda z, k: sparsek(z, k, mask), (scores, k))
    assert torch.autograd.gradgradcheck(lambda z, k: sparsek(z, k, mask), (scores, k))
    hard = torch.tensor([5.0, 3.0, 1.0], requires_grad=True)  # all p are 0 or 1
    sparsek(hard, 2).sum().backward()
    assert torch.equal(hard.grad, torch.zeros(3))


def test_equal_scores_share_and_others_are_none():
    assert_close(
        sparsek(torch.tensor([1.0, 1, 1, 1, 0, 0, 0]), 2), torch.tensor([0.5] * 4 + [0.0] * 3)
    )
    masked = sparsek(torch.tensor([9.0, 1, 0.5]), 1, torch.tensor([False, True, True]))
    assert_close(masked, torch.tensor([0, 0.75, 0.25]))
    assert sparsek(torch.tensor([torch.nan, 1, 2]), 1).isnan().all()
    assert sparsek(torch.zeros(3, 0), 2).shape == (3, 0)
    moved = torch.randn(4, 5, 6)
    assert_close(sparsek(moved, 2, dim=1), sparsek(moved.movedim(1, -1), 2).movedim(-1, 1))


def test_the_operator_keeps_its_digits_far_from_zero():
    scores = torch.randn(50, 3000)
    exact = sparsek(scores.double(), 64)
    assert (sparsek(scores, 64) - exact).abs().max() < 1e-6
    far = sparsek((scores.double() + 1000).float(), 64)
    assert (far - exact).abs().max() < 2e-4  # an eps of 1000 and what three eps make of tau


@pytest.mark.parametrize("k", [0, -1.0, torch.tensor([1.0, 0.0])])
def test_no_k_that_is_not_above_zero(k):
    with pytest.raises(ValueError, match="k must be above 0"):
        sparsek(torch.zeros(2, 3), k)


# ---- thresholds of all prefixes ----

LAWS_OF_SCORES = {
    "gaussian": lambda z: z,
    "ties": lambda z: (2 * z).round(),
    "alike": lambda z: 1e-3 * z,
    "rising": lambda z: z + 0.1 * torch.arange(z.shape[-1]),
    "falling": lambda z: z - 0.1 * torch.arange(z.shape[-1]),
    "far apart": lambda z: 10 * z,
}


@pytest.fixture(params=["kernels", "python"])
def way(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(kernels, "_absent", "taken away by the test")
    elif kernels.absent():
        pytest.skip("no kernels here")
    return request.param


@pytest.mark.parametrize("law", LAWS_OF_SCORES)
@pytest.mark.parametrize("k", [1, 3, 8, 2.5])
def test_each_prefix_has_the_threshold_of_its_own(way, law, k):
    torch.manual_seed(0)
    tokens = 60
    scores = LAWS_OF_SCORES[law](torch.randn(2, tokens, dtype=F64))
    low = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    p = sparsek(scores[:, None].expand(-1, tokens, -1), k, low)
    found = stream.lives(scores, k, top=3)
    now = torch.arange(tokens)[:, None]
    one = low & (now < found.leaves_ones[:, None])
    there = low & (now < found.leaves_support[:, None])
    walked = (scores[:, None] - found.tau[..., None]).clamp(0, 1).masked_fill(~there, 0)
    assert_close(walked, p, **EXACT)
    assert_close(p[one], torch.ones_like(p[one]), **EXACT)
    assert torch.equal((there & ~one).sum(-1), found.fractions)
    top = low & (now < found.leaves_top[:, None])
    ranked = (scores[:, None] - torch.where(low, 0.0, torch.inf)).flip(-1)
    largest = ranked.argsort(dim=-1, descending=True, stable=True)[..., :3]
    expected = torch.zeros_like(top).scatter(-1, tokens - 1 - largest, True) & low
    assert torch.equal(top, expected)


def test_a_one_becomes_a_fraction_before_a_fraction_is_dropped(way):
    found = stream.lives(torch.tensor([[0.0, 0.5]], dtype=F64), 1, top=1)
    assert found.tau[0].tolist() == [-1.0, -0.25]
    assert found.leaves_support.tolist() == [[2, 2]]


def test_a_walk_that_goes_on_from_what_is_carried(way):
    torch.manual_seed(0)
    scores = torch.randn(3, 50, dtype=F64)
    whole = stream.lives(scores, 4, top=4)
    first = stream.lives(scores[:, :30], 4, top=4)
    for row in range(3):
        kept = scores[row, :30][first.leaves_support[row] == 30].sort(descending=True).values
        rest = torch.cat([kept, scores[row, 30:]])[None]
        found = stream.lives(rest, 4, top=4, carried=len(kept))
        assert_close(found.tau[0], whole.tau[row, 30:], **EXACT)
        assert torch.equal(found.fractions[0], whole.fractions[row, 30:])


def test_the_gradient_of_the_thresholds_is_the_derivative(way):
    torch.manual_seed(0)
    scores = torch.randn(2, 12, dtype=F64, requires_grad=True)
    low = torch.ones(12, 12, dtype=torch.bool).tril()

    def p(z):
        found = stream.lives(z, 3, top=3)
        one = low & (torch.arange(12)[:, None] < found.leaves_ones[:, None])
        fraction = (z[:, None] - found.tau[..., None]).clamp(0, 1)
        return torch.where(one, 1.0, fraction).masked_fill(~low, 0)

    assert torch.autograd.gradcheck(p, scores)
    assert torch.autograd.gradgradcheck(p, scores)


@pytest.mark.skipif(kernels.absent() is not None, reason="no kernels here")
def test_the_operators_are_what_torch_asks_of_them():
    scores = torch.randn(2, 9, dtype=F64, requires_grad=True)
    torch.library.opcheck(torch.ops.aftermax.thresholds.default, (scores, 3.0, 3, 2, 0))
    found = stream.lives(scores, 3, top=3, carried=2)
    given = (found.fractions, found.leaves_ones, found.leaves_support, 2)
    grad = torch.ones_like(found.tau)
    torch.library.opcheck(torch.ops.aftermax.thresholds_backward.default, (grad, *given))
    start, stop = torch.tensor([[0, 1, 3]]), torch.tensor([[2, 4, 3]])
    torch.library.opcheck(torch.ops.aftermax.spans.default, (start, stop, 2, 2, 2))


@given(seed=st.integers(0, 10**6), block=st.integers(1, 9))
def test_spans_are_the_same_on_both_ways(seed, block):
    random = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 40, (3, 12), generator=random)
    stop = (start + torch.randint(-3, 20, (3, 12), generator=random)).clamp(max=40)
    blocks = -(-40 // block)
    found = stream.spans(start, stop, block, blocks)
    for row in range(3):
        for b in range(blocks):
            there = (start[row] < stop[row]) & (start[row] < (b + 1) * block)
            there = (there & (stop[row] > b * block)).nonzero().flatten().tolist()
            assert [j for j in found[row, b].tolist() if j >= 0] == there


def test_a_cap_on_what_is_remembered_is_told(way):
    scores = 1e-3 * torch.randn(2, 200, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = stream.lives(scores, 4, top=4, cap=20)
    assert found.capped.tolist() == [1, 1]
    assert ((found.leaves_support == 200).sum(-1) <= 20).all()
    assert (found.fractions <= 20).all()
    assert stream.lives(10 * scores / 1e-3, 4, top=4, cap=20).capped.tolist() == [0, 0]


# ---- the walk ----


def attended(system, case, form=None, impl=None, dtype=F64, **options):
    case = case.to(dtype).wanting_gradients()
    visible = Visible(causal=True)
    out = system.attend(
        *case[:3], visible, enable_gqa=True, form=form, impl=impl, **case.learned, **options
    )
    return [out.detach(), *gradients(out, case)]


@pytest.mark.parametrize("couple", ["kv", "v", "log"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("few", [0, 16])
def test_chunks_of_any_size_are_the_pairs(monkeypatch, couple, chunk, few):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    monkeypatch.setattr(chunks, "FEW", few)
    monkeypatch.setattr(chunks, "GATHERED", 2000)  # several groups
    for window, k, linear in ((0, 3, False), (4, 5, True)):
        system = SparseK(k=k, window=window, couple=couple, linear=linear)
        entry = dataclasses.replace(ENTRY, system=system)
        case = case_of(entry, tokens=70, kv_heads=2, value_width=5)
        pairs = attended(system, case, "dense")
        for got, expected in zip(attended(system, case, "chunked"), pairs, strict=True):
            assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("couple", ["kv", "v", "log"])
def test_the_kernels_give_what_the_reference_gives(couple):
    """In float32, outputs and all gradients, to what rounded inputs make of them."""
    if kernels.absent():
        pytest.skip("no kernels here")
    system = SparseK(k=20, window=16, couple=couple, linear=True)
    entry = dataclasses.replace(ENTRY, system=system)
    case = case_of(entry, tokens=400, kv_heads=2, width=16).to(torch.float32)
    assert_right(entry, case, Visible(causal=True), bodies())


def test_scores_that_are_given_have_gradients():
    torch.manual_seed(0)
    system = SparseK(k=2, window=1)
    query, key, value = (torch.randn(1, 2, 9, 4, dtype=F64) for _ in range(3))
    scores = torch.randn(1, 2, 9, dtype=F64, requires_grad=True)

    def attend(scores, form):
        return system.attend(
            query, key, value, Visible(causal=True), scores=scores, form=form, score_scale=SCALE
        )

    for form in ("dense", "chunked"):
        assert torch.autograd.gradcheck(lambda z, form=form: attend(z, form), scores)
    assert_close(attend(scores, "dense"), attend(scores, "chunked"), **EXACT)
    with pytest.raises(ValueError, match="scores must be"):
        attend(scores[:, :1], None)


SCALE = torch.ones(1, dtype=F64)


def test_a_cache_holds_k_and_w_pairs_and_those_of_the_largest_scores():
    torch.manual_seed(0)
    system = SparseK(k=3, window=4, normalise=False)
    key = torch.randn(1, 1, 300, 2)
    scores = torch.randn(1, 1, 300)
    state, sizes = system.init_state(1, 1, 2, 2), []
    for i in range(0, 300, 10):
        piece = (key[:, :, i : i + 10],) * 3
        visible = Visible(causal=True)
        _, state = system.step(*piece, state, visible, scores=scores[:, :, i : i + 10])
        sizes.append((state.slot_key.shape[2], state.ring_key.shape[2]))
    assert sizes[1:] == [(3, 4)] * 29
    best = scores[0, 0, :296].topk(3).indices
    assert state.slot_position[0, 0].tolist() == best.tolist()
    assert torch.equal(state.slot_key[0, 0], key[0, 0, best])
    assert state.bytes < 1000


def test_a_capped_state_says_so_and_stays_small():
    torch.manual_seed(0)
    system = SparseK(k=2, window=0, normalise=False, max_support=8)
    x = torch.randn(1, 1, 200, 4)
    state = system.init_state(1, 1, 4, 4)
    close = 1e-4 * torch.randn(1, 1, 200)
    _, state = system.step(x, x, x, state, Visible(causal=True), scores=close)
    assert state.capped.all()
    assert state.support.shape[-1] <= 8
    whole = SparseK(k=2, window=0, normalise=False)
    _, state = whole.step(x, x, x, whole.init_state(1, 1, 4, 4), Visible(causal=True), scores=close)
    assert not state.capped.any()
    assert state.support.shape[-1] > 100


def test_what_cannot_be_is_said():
    x = torch.randn(1, 2, 4, 4)
    causal = Visible(causal=True)
    for wrong in (
        {"k": 0, "window": 1},
        {"k": 1, "window": -1},
        {"k": 4, "window": 1, "max_support": 3},
    ):
        with pytest.raises(ValueError, match="at least"):
            SparseK(**wrong)
    with pytest.raises(ValueError, match="couple must be one of kv, v, log"):
        SparseK(k=1, window=1, couple="k")
    system = SparseK(k=1, window=1)
    with pytest.raises(ValueError, match="form='chunked', but the call is not causal"):
        system.attend(x, x, x, Visible(), form="chunked")
    with pytest.raises(RuntimeError, match="impl='cpu', but"):
        system.attend(x, x, x, Visible(), impl="cpu")
    with pytest.raises(ValueError, match="with its own window"):
        system.step(x, x, x, system.init_state(1, 2, 4, 4), Visible(causal=True, window=3))
    with pytest.raises(ValueError, match="no dropout"):
        system.step(x, x, x, system.init_state(1, 2, 4, 4), causal, dropout_p=0.1)
    with pytest.raises(ValueError, match="the state is of"):
        system.step(x, x, x, system.init_state(2, 2, 4, 4), causal)
    with pytest.raises(TypeError, match="SparseKAttention needs"):
        SparseKAttention(8, heads=2, weights=LSSAR())
    with pytest.raises(ValueError, match="score must be"):
        SparseKAttention(8, heads=2, weights=system, score="deep")


def test_the_module_learns_what_to_keep():
    """One token in 22 carries what the last one is asked for: the gradient alone finds out."""
    torch.manual_seed(0)
    system = SparseK(k=2, window=1)
    attend = SparseKAttention(16, heads=2, weights=system, positions="none")
    optimiser = torch.optim.Adam(attend.parameters(), lr=1e-2)
    mark = torch.zeros(16)
    mark[0] = 3
    for _ in range(350):
        x = torch.randn(32, 24, 16)
        place = torch.randint(0, 22, (32,))
        x[:, :, 0] = 0
        x[torch.arange(32), place] += mark
        loss = (attend(x)[:, -1] - x[torch.arange(32), place]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    _, state = attend.step(x, attend.init_state(32))
    kept = (state.slot_position == place[:, None, None]).any(-1).float().mean()
    assert kept > 0.9


@pytest.mark.parametrize("score", ["linear", "mlp"])
def test_the_module_reads_on_where_it_stopped(score):
    torch.manual_seed(0)
    for system in (SparseK(k=3, window=2), SparseK(k=3, window=2, normalise=False, linear=True)):
        attend = SparseKAttention(16, heads=4, kv_heads=2, weights=system, score=score).to(F64)
        for factor in attend.learned.values():
            factor.data.fill_(0.7)
        x = torch.randn(2, 19, 16, dtype=F64)
        whole = attend(x)
        cache = Cache(attend, batch=2)
        pieces = [cache.append(x[:, :7]), *(cache.step(x[:, i])[:, None] for i in range(7, 19))]
        assert_close(torch.cat(pieces, 1), whole, **EXACT)
        if cache.can_merge:
            first, second = Cache(attend, batch=2), Cache(attend, batch=2, start=9)
            first.append(x[:, :9])
            second.append(x[:, 9:15])
            first.merge(second)
            assert_close(first.append(x[:, 15:]), whole[:, 15:], **EXACT)
