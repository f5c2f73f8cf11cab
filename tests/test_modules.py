"""The attention module: what it adds to the function, and what a module must be able to do."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aftermax import (
    CATALOGUE,
    LSSAR,
    ALiBi,
    Attention,
    ReLA,
    RoPE,
    RowMap,
    Sigmoid,
    Softmax,
    SoftmaxSink,
    Visible,
    attention,
)
from aftermax.modules import evaluating
from aftermax.state import tensors_of

every_entry = pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
every_row_map = pytest.mark.parametrize(
    "entry", [e for e in CATALOGUE if isinstance(e.system, RowMap)], ids=lambda entry: entry.name
)
every_position = pytest.mark.parametrize("positions", ["rope", "p-rope", "alibi", "none"])


def module_of(weights=LSSAR(), seed: int = 0, **options) -> Attention:  # noqa: B008, frozen
    torch.manual_seed(seed)
    return Attention(16, heads=4, weights=weights, dtype=torch.float64, **options)


def tokens(batch: int = 2, length: int = 8, seed: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 16, generator=random, dtype=torch.float64)


def decode(attend: Attention, x: torch.Tensor, cuts: list[int], seen=None) -> torch.Tensor:
    state, out = attend.init_state(len(x)), []
    for start, stop in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        real = None if seen is None else seen[:, start:stop]
        piece, state = attend.step(x[:, start:stop], state, real)
        out.append(piece)
    return torch.cat(out, 1)


# what it computes


@every_row_map
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_projections_positions_and_the_function(entry, kv_heads):
    attend, x = module_of(entry.system, kv_heads=kv_heads), tokens()

    def heads(linear):
        return linear(x).reshape(2, 8, -1, 4).transpose(1, 2)

    out = attention(
        RoPE().rotate(heads(attend.to_query), 0),
        RoPE().rotate(heads(attend.to_key), 0),
        heads(attend.to_value),
        weights=entry.system,
        is_causal=True,
        enable_gqa=True,
        **attend.learned,
    )
    assert_close(attend(x), attend.to_out(out.transpose(1, 2).reshape(2, 8, 16)))


def test_grouped_queries_are_repeated_heads():
    grouped, full = module_of(kv_heads=2), module_of()
    state = grouped.state_dict()
    for name in ("to_key.weight", "to_value.weight"):
        per_head = state[name].reshape(2, 4, 16)
        state[name] = per_head.repeat_interleave(2, 0).reshape(16, 16)
    full.load_state_dict(state)
    assert_close(grouped(tokens()), full(tokens()))


def test_qk_norm_makes_queries_and_keys_of_unit_mean_square():
    attend = module_of(qk_norm=True, positions="none")
    query, key, _ = attend.project(100 * tokens(), start=0)
    for vectors in (query, key):
        assert_close(vectors.square().mean(-1), torch.ones(2, 4, 8, dtype=torch.float64))
    assert attend.query_norm.weight.shape == (4,)


@every_position
def test_without_order_there_is_no_position(positions):
    # rotating and biasing by index differences: moving the whole sequence changes nothing
    attend, x = module_of(positions=positions), tokens()
    pad = torch.zeros(2, 5, 16, dtype=torch.float64)
    real = torch.tensor([False] * 5 + [True] * 8).expand(2, 13)
    assert_close(attend(torch.cat([pad, x], 1), real)[:, 5:], attend(x))


def test_alibi_adds_the_papers_slopes():
    attend, x = module_of(Softmax(), positions="alibi"), tokens()
    query, key, value = attend.project(x, start=0)
    i = torch.arange(8)
    bias = -ALiBi().slopes(4)[:, None, None].double() * (i[:, None] - i).abs()
    out = attention(query, key, value, attn_mask=bias, is_causal=True)
    assert_close(attend(x), attend.to_out(out.transpose(1, 2).flatten(-2)))


def test_a_window_hides_what_is_further_back():
    attend, x = module_of(window=3), tokens()
    changed = x.clone()
    changed[:, 2] += 1
    rows = (attend(changed) - attend(x)).abs().amax((0, 2))
    assert rows[[0, 1, 5, 6, 7]].eq(0).all()
    assert rows[[2, 3, 4]].gt(0).all()


def test_not_causal_sees_both_ways_and_takes_a_visible():
    both, causal, x = module_of(causal=False), module_of(), tokens()
    assert not torch.allclose(both(x), causal(x))
    assert_close(both(x, Visible(causal=True)), causal(x))
    assert_close(causal(x, Visible()), both(x))


def test_a_visible_keeps_the_modules_slopes():
    attend, x = module_of(positions="alibi"), tokens()
    assert_close(attend(x, Visible(causal=True)), attend(x))


def test_padding_is_not_seen():
    attend, x = module_of(causal=False), tokens()
    real = torch.tensor([[True] * 6 + [False] * 2, [False] * 3 + [True] * 5])
    out = attend(x, real)
    x[~real] = torch.nan
    assert_close(attend(x, real)[real], out[real], rtol=0, atol=0)
    assert_close(out[:1, :6], attend(x[:1, :6]))


def test_dropout_is_of_training_alone():
    attend, x = module_of(dropout=0.5), tokens()
    assert not torch.equal(attend(x), attend(x))
    attend.eval()
    assert torch.equal(attend(x), attend(x))


# the cache


@every_position
@pytest.mark.parametrize("window", [None, 3])
@given(cuts=st.lists(st.integers(1, 7), unique=True).map(sorted))
def test_a_cache_gives_the_full_pass_at_any_cut(positions, window, cuts):
    attend = module_of(positions=positions, window=window, kv_heads=2, qk_norm=True)
    assert_close(decode(attend, tokens(), cuts), attend(tokens()), rtol=1e-12, atol=1e-12)


@every_position
@given(
    cuts=st.lists(st.integers(1, 7), unique=True).map(sorted),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
)
def test_a_cache_gives_the_full_pass_with_padding(positions, cuts, left, right):
    attend, x = module_of(positions=positions), tokens()
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, :left] = False
    real[1, 8 - right :] = False
    out = decode(attend, x, cuts, real)
    assert_close(out[real], attend(x, real)[real], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_state_is_a_value():
    attend, x = module_of(), tokens()
    _, held = attend.step(x[:, :4], attend.init_state(2))
    before = copy.deepcopy(held)
    first, longer = attend.step(x[:, 4:6], held)
    again, _ = attend.step(x[:, 4:6], held)
    assert torch.equal(first, again)
    for name, x in tensors_of(before).items():
        assert torch.equal(getattr(held, name), x)
    assert (held.length, longer.length) == (4, 6)


def test_a_state_knows_its_size():
    attend, x = module_of(kv_heads=2), tokens()
    seen = torch.tensor([[True, True, False], [True, False, False]])
    _, state = attend.step(x[:, :3], attend.init_state(2), seen)
    assert state.length == 3
    assert state.count.tolist() == [2, 1]
    # two tensors of 2 x 2 heads x 3 tokens x 4 numbers of 8 bytes, and a byte for each token
    assert state.bytes == 2 * (2 * 2 * 3 * 4 * 8) + 2 * 3


def test_a_cache_of_half_the_heads_is_half_as_large():
    sizes = {}
    for kv_heads in (2, 4):
        attend = module_of(kv_heads=kv_heads)
        _, state = attend.step(tokens(), attend.init_state(2))
        sizes[kv_heads] = state.key.numel()
    assert sizes[4] == 2 * sizes[2]


# what a module must be able to do


@every_entry
def test_what_is_learned_is_registered_and_trained(entry):
    system = entry.system
    if entry.name == "sparsek":  # which must have something to choose
        system = dataclasses.replace(system, k=2, window=2)
    attend = module_of(system, causal=entry.causal)
    learned = attend.system.learned(4, 4, 4)
    names = {name for name, _ in attend.named_parameters()}
    assert {f"learned.{name}" for name in learned} <= names
    attend(tokens()).square().sum().backward()
    for name, parameter in attend.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@every_entry
def test_a_state_dict_and_a_copy_carry_everything(entry):
    positions = "rope" if "biases" in entry.exceptions else "alibi"
    options = {"causal": entry.causal, "positions": positions, "qk_norm": True}
    attend, x = module_of(entry.system, **options), tokens()
    with torch.no_grad():
        for parameter in attend.parameters():
            parameter.add_(0.1)
    other = module_of(entry.system, seed=9, **options)
    assert not torch.equal(other(x), attend(x))
    other.load_state_dict(attend.state_dict())
    assert torch.equal(other(x), attend(x))
    assert torch.equal(copy.deepcopy(attend)(x), attend(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [Softmax("log_n"), LSSAR(), SoftmaxSink(), ReLA()], ids=repr)
@every_position
def test_half_precision(weights, positions, dtype):
    made = Attention(16, 4, weights=weights, positions=positions, qk_norm=True, dtype=dtype)
    moved = module_of(weights, positions=positions, qk_norm=True).to(dtype)
    for attend in (made, moved):
        out = attend(tokens().to(dtype))
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert {parameter.dtype for parameter in attend.parameters()} == {dtype}
        assert decode(attend, tokens().to(dtype), [1, 5]).dtype == dtype


@pytest.mark.parametrize("weights", [Softmax("log_n"), LSSAR(), SoftmaxSink(), ReLA()], ids=repr)
@every_position
def test_autocast(weights, positions):
    attend = module_of(weights, positions=positions, qk_norm=True).float()
    x = tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(x)
    out.float().sum().backward()
    # three roundings of inputs, weights and outputs to bf16 lie between the two
    assert (out - attend(x)).norm() < 0.05 * attend(x).norm()


@every_position
def test_a_device_may_be_given(positions):
    attend = Attention(16, 4, weights=ReLA(), positions=positions, qk_norm=True, device="meta")
    held = [*attend.parameters(), *attend.buffers()]
    assert {tensor.device.type for tensor in held} == {"meta"}
    x = torch.zeros(2, 8, 16, device="meta")
    assert attend(x).shape == (2, 8, 16)
    out, state = attend.step(x, attend.init_state(2))
    assert out.shape == (2, 8, 16)
    assert state.key.device.type == "meta"


@pytest.mark.parametrize("weights", [LSSAR(), Softmax("log_n"), Sigmoid("sequence")], ids=repr)
def test_it_compiles_whole(weights):
    torch._dynamo.reset()
    attend = module_of(weights, positions="p-rope", kv_heads=2, window=4)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    x = tokens()
    assert_close(compiled(x), attend(x), rtol=1e-12, atol=1e-12)
    state = attend.init_state(2)
    step = torch.compile(attend.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for start in (0, 3):
            out, _ = step(x[:, start : start + 3], state)
            expected, state = attend.step(x[:, start : start + 3], state)
            assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_head_dim_is_free():
    attend = Attention(16, heads=3, head_dim=10)
    assert attend(torch.zeros(1, 4, 16)).shape == (1, 4, 16)
    assert attend.to_query.weight.shape == (30, 16)


def test_it_prints_what_it_is():
    shown = repr(module_of(LSSAR(3), kv_heads=2))
    assert "LSSAR(power=3)" in shown
    assert "heads=4, kv_heads=2" in shown
    assert "RoPE(base=10000.0, fraction=1.0)" in shown


# what is refused, and how it is said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "width 16 is not divisible by 5 heads; give head_dim"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads must divide heads, got 3 and 4"),
        ({"heads": 4, "kv_heads": 0}, "kv_heads must divide heads, got 0 and 4"),
        ({"heads": 4, "positions": "sin"}, "positions must be one of rope, p-rope, .* got 'sin'"),
        ({"heads": 4, "window": 0}, "window must be at least 1"),
        ({"heads": 4, "dropout": 2.0}, "dropout.* is a probability, got 2.0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"heads": 4, "head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"heads": 4, "head_dim": 3, "positions": "rope"}, "even head width, got 3"),
    ],
)
def test_a_module_that_cannot_be_is_refused_when_made(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(16, **options)


def test_tokens_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected \(B, T, 16\), got \(2, 8, 15\)"):
        module_of()(tokens()[..., :15])
    with pytest.raises(ValueError, match=r"expected \(B, T, 16\), got \(8, 16\)"):
        module_of()(tokens()[0])


def test_a_step_needs_a_causal_module():
    attend = module_of(causal=False)
    with pytest.raises(ValueError, match="step needs a causal module"):
        attend.step(tokens(), attend.init_state(2))


@pytest.mark.parametrize("shape", [(8,), (2, 7), (2, 8, 8)])
def test_padding_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"visible .* bool of shape \(B, T\) = \(2, 8\), got"):
        module_of()(tokens(), torch.ones(shape, dtype=torch.bool))


def test_padding_of_zeros_and_ones_is_refused_not_added():
    with pytest.raises(ValueError, match=r"must be bool .* got torch\.float32 of shape \(2, 8\)"):
        module_of()(tokens(), torch.ones(2, 8))


def test_seen_that_does_not_fit_is_refused():
    attend = module_of()
    for seen in (torch.ones(2, 7).bool(), torch.ones(2, 1).bool(), torch.ones(2, 8)):
        with pytest.raises(
            ValueError, match=r"seen must be bool of shape \(B, T\) = \(2, 8\), got"
        ):
            attend.step(tokens(), attend.init_state(2), seen)


def test_a_model_that_was_looked_at_is_in_the_modes_it_was_in():
    model = torch.nn.Sequential(module_of(), module_of())
    model.train()
    model[1].eval()
    with contextlib.suppress(RuntimeError), evaluating(model):
        assert not model[0].training
        raise RuntimeError("stop")
    assert model[0].training
    assert not model[1].training
    assert not model[1].to_out.training
