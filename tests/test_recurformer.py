"""RecurFormer: which heads run what, heads replaced in a trained model, and the cache counted."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from aftermax import (
    LSSA,
    ALiBi,
    Attention,
    Cache,
    GatedAttention,
    Linear,
    OfSystem,
    RecurFormer,
    RecurFormerAttention,
    ScaleInvariantSoftmax,
    SinkWindow,
    Softmax,
    SoftmaxSink,
    Visible,
    find,
)
from aftermax.hybrid import HybridState, Plan, plan_of
from aftermax.hybrid.replace import cache_bytes, distil_heads, replace_heads, share_saved
from aftermax.lab.models import DecoderLM
from aftermax.lab.work import Work

from .cases import EXACT, F64, case_of, masked_views, plain_views
from .contract import LAWS
from .naive import NAIVE, dense, linear, side_by_side, softmax

WINDOW = SinkWindow(sinks=2, window=3)


def near_and_first(visible: torch.Tensor) -> torch.Tensor:
    """What a window of 3 with 2 sinks leaves of it."""
    tokens = visible.shape[-1]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    first = torch.zeros_like(visible)
    for place in visible.nonzero().tolist():
        b, h, i, j = place
        first[b, h, i, j] = visible[b, h, i, : j + 1].sum() <= 2
    return visible & (first | (distance.abs() < 3))


def naive_window(query, key, value, visible, **options):
    return dense(softmax)(query, key, value, near_and_first(visible), **options)


# ---- the window --------------------------------------------------------------------------------

WINDOW_ENTRY = dataclasses.replace(
    find("softmax"),
    name="sink-window",
    system=WINDOW,
    exceptions={
        "later_keys": "its windows forget: which rows see a flaw is tested here",
        "flaw_of_one_head": "its windows forget: which rows see a flaw is tested here",
        "hidden_keys_do_not_count": "hidden keys leave the place of a sink to others",
        "key_order": "a window has an order",
        "half_precision": "blocks of rows go through the kernels, which are tested by themselves",
        "kernel_equals_reference": "the walk is of calls of attention, which have kernels",
    },
)


@pytest.mark.parametrize("law", [x for x in LAWS if x not in WINDOW_ENTRY.exceptions])
def test_the_window_keeps_the_laws(law, monkeypatch):
    monkeypatch.setitem(NAIVE, "sink-window", naive_window)
    LAWS[law](WINDOW_ENTRY)


@given(
    tokens=st.integers(1, 90), sinks=st.integers(0, 5), window=st.integers(1, 20),
    left=st.integers(0, 8),
)  # fmt: skip
def test_a_walk_in_blocks_sees_what_a_mask_shows(tokens, sinks, window, left):
    case = case_of(find("softmax"), tokens=tokens, kv_heads=2)
    left = min(left, tokens - 1)
    seen = torch.ones(2, tokens, dtype=torch.bool)
    seen[0, :left] = False
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    first = seen & (seen.cumsum(-1) <= sinks)
    mask = seen[:, None] & (distance >= 0) & (first[:, None] | (distance < window))
    expected = case.attend(find("softmax"), Visible(mask=mask[:, None]), enable_gqa=True)
    system = SinkWindow(sinks, window)
    visible = Visible(causal=True, mask=seen[:, None, None])
    out = system.attend(*case[:3], visible, enable_gqa=True)
    assert_close(out, expected, **EXACT)


def test_a_flaw_is_seen_within_the_window_and_in_a_sink_for_ever():
    case = case_of(find("softmax"))
    for token, rows in ((1, range(1, 9)), (5, range(5, 8))):
        flawed = case.map(torch.clone)
        flawed.key[:, :, token] = math.nan
        out = WINDOW.attend(*flawed[:3], Visible(causal=True))
        assert [i for i in range(9) if out[:, :, i].isnan().all()] == list(rows)
        assert int(out.isnan().any(-1).all(1).all(0).sum()) == len(rows)


def test_alibi_and_a_sink_that_is_learned_go_through_the_walk():
    case = case_of(find("sink"), tokens=9)
    slopes = torch.tensor([0.5, 0.2, 0.1, 0.0], dtype=F64)
    system = SinkWindow(2, 3, SoftmaxSink())
    walked = system.attend(*case[:3], Visible(causal=True, slopes=slopes), **case.learned)
    mask = near_and_first(plain_views(2, 4, 9)["causal"].seen)
    expected = case.attend(find("sink"), Visible(mask=mask, slopes=slopes))
    assert_close(walked, expected, **EXACT)


def test_a_window_holds_its_sinks_and_its_last_tokens():
    reader = OfSystem(SinkWindow(4, 16), kv_heads=2, key_dim=8, value_dim=5)
    cache = Cache(reader, batch=3)
    for tokens in (1, 5, 30):
        x = torch.randn(3, 2, tokens, 8)
        cache.append(x, x, x[..., :5])
        kept = min(cache.length, 15)
        assert cache.bytes == 3 * (2 * (4 + kept) * 13 * 4 + 4 * 8 + kept)


def test_maps_that_a_window_cannot_serve_are_refused():
    with pytest.raises(ValueError, match="does not know what ScaleInvariantSoftmax"):
        SinkWindow(weights=ScaleInvariantSoftmax())
    with pytest.raises(ValueError, match="got -1 and 64"):
        SinkWindow(sinks=-1)


# ---- two systems side by side ------------------------------------------------------------------


@pytest.mark.parametrize("other", [Linear(), WINDOW, LSSA()], ids=repr)
@pytest.mark.parametrize("replaced", [(), (0,), (1, 3), (0, 1, 2, 3)])
def test_each_head_gives_what_its_system_gives(other, replaced):
    case = case_of(find("softmax"), heads=8, kv_heads=4, value_width=3)
    both = RecurFormer(Softmax(), other, replaced=replaced)
    out = both.attend(*case[:3], Visible(causal=True), enable_gqa=True)
    for groups, system in ((set(range(4)) - set(replaced), Softmax()), (replaced, other)):
        alone = RecurFormer(system, system).attend(*case[:3], Visible(causal=True), enable_gqa=True)
        heads = [2 * g + i for g in sorted(groups) for i in range(2)]
        assert_close(out[:, heads], alone[:, heads], **EXACT)


def test_masks_and_learned_numbers_follow_their_heads():
    case = case_of(find("sink"))
    mask = masked_views(2, 4, 9)["bool mask"].seen
    both = RecurFormer(SoftmaxSink(), SoftmaxSink(), replaced=(0, 2))
    learned = {"sink": case.learned["sink"], "other_sink": case.learned["sink"]}
    assert set(both.learned(4, 8, 8)) == set(learned)
    out = both.attend(*case[:3], Visible(mask=mask), **learned)
    assert_close(out, case.attend(find("sink"), Visible(mask=mask)), **EXACT)


@pytest.mark.parametrize(
    ("other", "truncates"), [(LSSA(), True), (Linear(), False), (WINDOW, False)]
)
def test_it_can_what_both_can(other, truncates):
    both = RecurFormer(Softmax(), other, replaced=(1,))
    assert both.can_truncate is truncates
    assert both.can_merge
    case = case_of(find("softmax"), kv_heads=2)
    whole = both.attend(*case[:3], Visible(causal=True), enable_gqa=True)
    reader = OfSystem(both, 2, 8, 8, dtype=F64)
    first, second = Cache(reader, 2), Cache(reader, 2, start=4)
    first.append(*(x[:, :, :4] for x in case[:3]))
    second.append(*(x[:, :, 4:7] for x in case[:3]))
    first.merge(second)
    rest = first.append(*(x[:, :, 7:] for x in case[:3]))
    assert_close(rest, whole[:, :, 7:], **EXACT)
    if truncates:
        first.truncate(4)
        rest = first.append(*(x[:, :, 4:] for x in case[:3]))
        assert_close(rest, whole[:, :, 4:], **EXACT)


def test_the_naive_equation_is_of_halves():
    assert RecurFormer().groups(4) == ((0, 1), (2, 3))
    case = case_of(find("recurformer"), kv_heads=3, heads=3)
    naive = side_by_side(dense(softmax), dense(linear))
    view = plain_views(2, 3, 9)["causal"]
    distance = torch.arange(9)[:, None] - torch.arange(9)
    expected = naive(*case[:3], view.seen, distance=distance, learned={})
    assert_close(case.attend(find("recurformer"), view.visible), expected, **EXACT)


# ---- a Mamba block beside the heads ------------------------------------------------------------

OPTIONS = st.fixed_dictionaries(
    {
        "kv_heads": st.sampled_from([2, 4]),
        "qk_norm": st.booleans(),
        "positions": st.sampled_from(["rope", "alibi", "none"]),
        "weights": st.sampled_from([Softmax(), SoftmaxSink(), LSSA()]),
        "window": st.sampled_from([None, 3]),
        "bias": st.booleans(),
    }
)


@given(options=OPTIONS, replaced=st.sets(st.integers(0, 1)), left=st.integers(0, 4))
def test_the_module_reads_piece_by_piece_what_it_reads_at_once(options, replaced, left):
    torch.manual_seed(0)
    attend = RecurFormerAttention(16, 4, replaced=sorted(replaced), dtype=F64, **options)
    x = torch.randn(2, 11, 16, dtype=F64)
    seen = torch.ones(2, 11, dtype=torch.bool)
    seen[1, :left] = False
    whole, cache = attend(x, seen), Cache(attend, batch=2)
    pieces = [cache.append(x[:, a:b], seen=seen[:, a:b]) for a, b in ((0, 2), (2, 3), (3, 11))]
    out = torch.cat(pieces, 1)
    assert_close(out[seen], whole[seen], **EXACT)
    later = x.clone()
    later[:, 8:] += 1
    assert_close(attend(later, seen)[:, :8][seen[:, :8]], whole[:, :8][seen[:, :8]], **EXACT)


def test_heads_stand_in_their_old_places():
    torch.manual_seed(0)
    attend = Attention(16, 4, kv_heads=2, positions=ALiBi(), weights=SoftmaxSink())
    x = torch.randn(2, 7, 16)
    model = nn.Sequential(copy.deepcopy(attend))
    replace_heads(model, Plan(((0,),), 2))
    new = model[0]
    with torch.no_grad():
        query, key, value = attend.project(x, 0)
        old = attend.system.attend(
            query, key, value, attend.what_is_visible(None), **attend._options()
        )
        heads = new.heads_out(x)
        assert_close(heads[:, 2:], old[:, 2:])
        assert_close(heads[:, :2], new.mamba(x))
        assert torch.equal(new.to_out.weight, attend.to_out.weight)
    values = attend.to_value.weight[:4]
    assert torch.equal(new.mamba.to_in.weight[:8], torch.cat([values, values]))


def test_gradients_reach_all_that_is_left():
    attend = RecurFormerAttention(16, 4, kv_heads=2, qk_norm=True, weights=SoftmaxSink())
    attend(torch.randn(2, 7, 16)).square().sum().backward()
    for name, parameter in attend.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_from_the_catalogue_a_decoder_gets_the_block():
    work = Work(layers=2, width=32, heads=4)
    model = DecoderLM(work, work.arm("recurformer"), 50)
    assert [type(layer) for layer in model.attentions] == [RecurFormerAttention] * 2
    assert model.attentions[0].replaced == (2, 3)
    decay = model.attentions[0].mamba.log_minus_a.exp()  # not drawn over by the decoder's own
    assert_close(decay, torch.arange(1.0, 17).expand(16, -1))
    tokens = torch.randint(50, (2, 9))
    cache = Cache(model, batch=2)
    pieces = [cache.append(tokens[:, :4]), cache.append(tokens[:, 4:])]
    assert_close(torch.cat(pieces, 1), model(tokens))


# ---- heads of a trained model ------------------------------------------------------------------


def decoder(**options) -> DecoderLM:
    torch.manual_seed(0)
    work = Work(layers=2, width=32, heads=4, kv_heads=2, **options)
    return DecoderLM(work, work.arm("softmax"), 50)


PLAN = Plan(((1,), (0, 1)), 2)


@pytest.mark.parametrize("with_", ["mamba", "window", "linear"])
def test_a_decoder_with_replaced_heads_decodes_as_it_reads(with_):
    model, tokens = decoder(), torch.randint(50, (2, 30))
    before = model(tokens)
    replace_heads(model, PLAN, with_, **({} if with_ != "window" else {"window": 5}))
    whole, cache = model(tokens), Cache(model, batch=2)
    pieces = [cache.append(tokens[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 30))]
    assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, before, atol=1e-3)
    assert cache.bytes == sum(
        cache_bytes(30, 4, 2, 8, len(groups), with_, batch=2, window=5) for groups in PLAN.replaced
    )
    picked = cache.snapshot()
    cache.reorder(torch.tensor([1, 1, 0]))
    again = cache.append(tokens[[1, 1, 0]][:, :3])
    cache.restore(picked)
    assert_close(again[2:], cache.append(tokens[:, :3])[:1])


def test_a_window_as_wide_as_the_text_changes_nothing():
    model, tokens = decoder(), torch.randint(50, (2, 30))
    before = model(tokens)
    assert_close(replace_heads(model, PLAN, "window", window=30)(tokens), before)


def test_an_empty_plan_changes_nothing():
    model, tokens = decoder(), torch.randint(50, (2, 9))
    before = model(tokens)
    replace_heads(model, Plan(((), ()), 2))
    assert torch.equal(model(tokens), before)
    assert type(model.attentions[0]) is Attention


@pytest.mark.parametrize("with_", ["mamba", "linear"])
def test_distillation_teaches_the_replaced_heads_alone(with_):
    original = decoder()
    model = replace_heads(copy.deepcopy(original), PLAN, with_)
    kept = model.attentions[0].to_query.weight[:16].clone()
    out = model.attentions[0].to_out.weight.clone()
    batches = [torch.randint(50, (4, 24))] * 40
    told = []
    errors = distil_heads(
        model, original, batches, learning_rate=1e-2, progress=lambda n, e: told.append((n, e))
    )
    assert [set(error) for error in errors] == [{"blocks.0.0.layer", "blocks.1.0.layer"}] * 40
    means = [sum(error.values()) / 2 for error in errors]
    assert told[-1] == (40, means[-1])
    assert means[-1] < 0.7 * means[0]
    assert torch.equal(model.attentions[0].to_query.weight[:16], kept)
    assert torch.equal(model.attentions[0].to_out.weight, out)


def test_a_replaced_model_is_trained_on_and_saved_as_any():
    model = replace_heads(decoder(), PLAN)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    other = replace_heads(decoder(), PLAN)
    other.load_state_dict(state)
    tokens = torch.randint(50, (2, 9))
    assert torch.equal(other(tokens), model(tokens))


def test_the_cache_of_the_paper_is_counted_as_it_was_derived():
    """Llama-2-7B at 90 %, expand 1, fp16: 512 MiB become 55.7 at 1024 tokens, 2 GiB 209 at 4096."""
    llama = {"heads": 32, "kv_heads": 32, "head_dim": 128}
    shares = [share_saved(n, share=0.9, **llama) for n in (1024, 4096, 65536)]
    assert [round(100 * share, 1) for share in shares] == [89.1, 89.8, 90.0]
    qwen = {"heads": 28, "kv_heads": 4, "head_dim": 128}
    shares = [share_saved(n, share=0.9, **qwen) for n in (1024, 4096, 65536)]
    assert [round(100 * share, 1) for share in shares] == [83.8, 88.5, 89.9]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_cache_are_the_formula_of_it(kv_heads, dtype):
    attend = Attention(32, 4, kv_heads=kv_heads, dtype=dtype)
    element = torch.finfo(dtype).bits // 8
    for with_ in ("mamba", "window", "linear"):
        for count in range(kv_heads + 1):
            model = nn.Sequential(copy.deepcopy(attend))
            plan = Plan((tuple(range(count)),), kv_heads)
            layer = replace_heads(model, plan, with_, sinks=2, window=6)[0]
            cache = Cache(layer, batch=3)
            for tokens in (1, 4, 20):
                cache.append(torch.randn(3, tokens, 32, dtype=dtype))
                expected = cache_bytes(
                    cache.length, 4, kv_heads, 8, count, with_, batch=3, element=element, sinks=2,
                    window=6,
                )  # fmt: skip
                assert cache.bytes == expected


def test_states_are_values_and_know_their_parts():
    attend = RecurFormerAttention(16, 4, replaced=(0,))
    state = attend.init_state(2, start=5)
    assert isinstance(state, HybridState)
    assert (state.length, len(state.parts)) == (5, 2)
    assert not attend.can_truncate
    assert not attend.can_merge
    with pytest.raises(ValueError, match="convolution with the last of the first"):
        attend.merge(state, state)


def test_errors_say_what_was_asked():
    with pytest.raises(ValueError, match="for 1 layers of 2 KV heads, and the model has 2 of 2"):
        replace_heads(decoder(), Plan(((0,),), 2))
    with pytest.raises(ValueError, match="with_ must be one of mamba, window, linear, got 'rnn'"):
        replace_heads(decoder(), PLAN, "rnn")
    with pytest.raises(ValueError, match="window has no expand"):
        replace_heads(decoder(), PLAN, "window", expand=2)
    model = nn.Sequential(GatedAttention(16, 4))
    with pytest.raises(ValueError, match="0 is a GatedAttention"):
        replace_heads(model, Plan(((0,),), 4))
    with pytest.raises(ValueError, match="replace_heads comes first"):
        distil_heads(decoder(), decoder(), [])
    with pytest.raises(ValueError, match="needs causal=True"):
        RecurFormerAttention(16, 4, causal=False)
    with pytest.raises(ValueError, match="4 KV heads have not"):
        RecurFormerAttention(16, 4, replaced=(4,))
    with pytest.raises(ValueError, match="causal but for padding"):
        RecurFormerAttention(16, 4)(torch.zeros(1, 3, 16), Visible(causal=True, window=2))
    assert plan_of(torch.rand(2, 4), 0.5, kv_heads=2).share == 0.5
