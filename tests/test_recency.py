"""The recency ratio: against the matrix written out, its baseline, its ranking, over a model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import LSSAR, Attention
from aftermax.hybrid import (
    Plan,
    measure_recency,
    of_groups,
    plan_of,
    rank_heads,
    recency_ratio,
    uniform_ratio,
)
from aftermax.hybrid import recency as module
from aftermax.lab.models import DecoderLM
from aftermax.lab.work import Work

from .cases import EXACT, F64


def pair(heads=4, kv_heads=2, tokens=23, seed=0):
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, tokens, 6, generator=random, dtype=F64)
    return query, torch.randn(2, kv_heads, tokens, 6, generator=random, dtype=F64)


def by_the_matrix(query, key, near, drop_sink, seen):
    """The n x n matrix of one sequence without its padding; then the sums."""
    ratios = torch.empty(query.shape[:2], dtype=F64)
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            q, k = query[b, h, seen[b]], key[b, h // group, seen[b]]
            n = len(q)
            scores = q @ k.T / math.sqrt(q.shape[1])
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
            scores[:, :drop_sink] = -math.inf
            found = []
            for i in range(near + drop_sink, n):
                row = torch.exp(scores[i]) / torch.exp(scores[i]).sum()
                found.append(row[i - near + 1 : i + 1].sum())
            ratios[b, h] = torch.stack(found).mean()
    return ratios


@given(
    near=st.integers(1, 8), drop_sink=st.integers(0, 3), block=st.sampled_from([1, 200, 2**20]),
    left=st.integers(0, 6), hole=st.booleans(), kv_heads=st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_it_is_the_sum_over_the_matrix(near, drop_sink, block, left, hole, kv_heads):
    query, key = pair(kv_heads=kv_heads)
    seen = torch.ones(2, 23, dtype=torch.bool)
    seen[0, :left], seen[1, 9] = False, not hole
    flawed = key.masked_fill(~seen[:, None, :, None], 1e9)
    expected = by_the_matrix(query, key, near, drop_sink, seen)
    before = module.BLOCK_SCORES
    module.BLOCK_SCORES = block
    try:
        found = recency_ratio(query, flawed, near, drop_sink=drop_sink, seen=seen)
    finally:
        module.BLOCK_SCORES = before
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(("window", "drop_sink"), [(16, 0), (64, 0), (0.1, 0), (64, 4), (1, 1)])
def test_a_head_that_looks_at_all_alike_has_the_baseline(window, drop_sink):
    zeros = torch.zeros(1, 1, 300, 2, dtype=F64)
    found = recency_ratio(zeros, zeros, window, drop_sink=drop_sink)
    assert_close(float(found), uniform_ratio(300, window, drop_sink), rtol=1e-12, atol=0)


def test_the_baseline_is_what_was_derived():
    assert [round(uniform_ratio(1024, w), 3) for w in (16, 64, 0.1)] == [0.066, 0.184, 0.255]
    for tokens in (500, 5000, 20000):  # 0.1 ln(10) / 0.9 in the limit
        assert uniform_ratio(tokens, 0.1) == pytest.approx(math.log(10) / 9, abs=0.003)


def test_a_sink_hides_a_head_that_looks_near_by():
    """Nine tenths on the first token, the rest on the last two: far by RR, near by RR without."""
    query = torch.zeros(1, 1, 40, 40, dtype=F64)
    key = torch.eye(40, dtype=F64)[None, None]
    for i in range(1, 40):
        query[0, 0, i, [i - 1, i]] = 100.0 * math.sqrt(40)
    query[..., 0] = (100 + math.log(18)) * math.sqrt(40)
    assert float(recency_ratio(query, key, 2)) == pytest.approx(0.1, abs=0.01)
    assert float(recency_ratio(query, key, 2, drop_sink=1)) > 0.999


def test_only_the_queries_that_ask_may_count():
    query, key = pair(kv_heads=4)
    asked = torch.zeros(2, 23, dtype=torch.bool)
    asked[0, 9], asked[1, 17], asked[:, 1] = True, True, True  # token 1 sees no more than 4
    found = recency_ratio(query, key, 4, asked=asked)
    for b, i in ((0, 9), (1, 17)):
        scores = (query[b, :, i, None] @ key[b, :, : i + 1].mT)[:, 0] / math.sqrt(6)
        assert_close(found[b], scores.softmax(-1)[:, -4:].sum(-1), **EXACT)
    model, x = Attention(8, heads=2), torch.randn(2, 23, 8)
    whole = measure_recency(model, [x, x], 4)
    some = measure_recency(model, [x, x], 4, asked=[asked, asked])
    assert some.sequences == 4
    assert not torch.allclose(some.mean, whole.mean, atol=1e-4)


def test_alibi_makes_heads_near_sighted():
    query, key = pair(kv_heads=4)
    slopes = torch.tensor([8.0, 1.0, 0.1, 0.0])
    found = recency_ratio(query, key, 4, slopes=slopes)
    plain = recency_ratio(query, key, 4)
    assert (found[:, 0] > 0.99).all()
    assert_close(found[:, 3], plain[:, 3], **EXACT)


def test_groups_are_ranked_by_mean_or_by_their_most_far_sighted_head():
    ratios = torch.tensor([[0.9, 0.3, 0.5, 0.6], [0.1, 0.2, 0.8, 0.9]])
    assert_close(of_groups(ratios, 2, "min"), torch.tensor([[0.3, 0.5], [0.1, 0.8]]))
    assert rank_heads(ratios, kv_heads=2) == [(1, 1), (0, 0), (0, 1), (1, 0)]
    assert rank_heads(ratios, kv_heads=2, how="min") == [(1, 1), (0, 1), (0, 0), (1, 0)]
    assert rank_heads(ratios, kv_heads=2, groups=False)[:3] == [(0, 0), (1, 3), (1, 2)]


def test_heads_chosen_one_by_one_free_few_groups():
    """Qwen2-7B: 28 heads on 4 groups; 90 % of the heads hold 41 % of the groups whole."""
    freed = {0.9: [], 0.75: [], 0.5: []}
    for share, found in freed.items():
        for seed in range(400):
            ratios = torch.rand(1, 28, generator=torch.Generator().manual_seed(seed))
            chosen = {h for _, h in rank_heads(ratios, groups=False)[: round(share * 28)]}
            found.append(sum(all(7 * g + i in chosen for i in range(7)) for g in range(4)) / 4)
    assert [round(sum(x) / 400, 1) for x in freed.values()] == [0.4, 0.1, 0.0]


def test_plans_take_the_top_the_bottom_or_random_groups():
    ratios = torch.arange(16.0).view(4, 4) / 16
    assert plan_of(ratios, 0.25).replaced == ((), (), (), (0, 1, 2, 3))
    assert plan_of(ratios, 0.25, pick="bottom").replaced == ((0, 1, 2, 3), (), (), ())
    assert plan_of(ratios, 0.25, per_layer=True).replaced == ((3,),) * 4
    random = [plan_of(ratios, 0.5, pick="random", seed=seed) for seed in (0, 0, 1)]
    assert random[0] == random[1] != random[2]
    assert [plan.share for plan in random] == [0.5] * 3
    assert plan_of(ratios, 0.5, kv_heads=2) == Plan(((), (), (0, 1), (0, 1)), 2)


def test_over_a_model_it_is_the_ratio_of_its_queries_and_keys():
    torch.manual_seed(0)
    work = Work(layers=2, width=32, heads=4, kv_heads=2)
    model = DecoderLM(work, work.arm("softmax"), 50).train()
    tokens = torch.randint(50, (5, 40))
    found = measure_recency(model, [tokens[:2], tokens[2:]], 4, drop_sink=1)
    assert model.training
    assert (found.sequences, found.baseline) == (5, uniform_ratio(40, 4, 1))
    x, block = model.embed(tokens), model.blocks[0]
    with torch.no_grad():
        query, key, _ = block[0].layer.project(block[0].before(x), 0)
    first = recency_ratio(query, key, 4, drop_sink=1)
    assert_close(found.mean[0], first.mean(0))
    assert_close(found.sd[0], first.std(0))


def test_what_was_watched_is_as_it_was_even_after_an_error():
    attend = Attention(8, heads=2)
    system = attend.system
    with pytest.raises(ValueError, match="leave no query"):
        measure_recency(attend, [torch.zeros(1, 4, 8)], 64)
    assert attend.system is system


def test_errors_say_what_was_asked():
    query, key = pair()
    with pytest.raises(ValueError, match=r"window=23 and drop_sink=0 leave no query .*23 tokens"):
        recency_ratio(query, key, 23)
    with pytest.raises(ValueError, match=r"\(2, 4, 23, 6\) and \(2, 2, 22, 6\)"):
        recency_ratio(query, key[:, :, 1:], 4)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        recency_ratio(query, key, 1.5)
    with pytest.raises(ValueError, match="not of"):
        measure_recency(Attention(8, heads=2, weights=LSSAR()), [torch.zeros(1, 9, 8)], 2)
    with pytest.raises(ValueError, match="causal but for padding"):
        measure_recency(Attention(8, heads=2, window=3), [torch.zeros(1, 9, 8)], 2)
    with pytest.raises(ValueError, match="layer 1 has the groups 0 to 1"):
        Plan(((0,), (2,)), 2)
