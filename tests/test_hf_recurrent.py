"""A state of one size in the cache of transformers: it decodes what a full pass says."""

import copy
import functools

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    DynamicCache,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    SmolLM3Config,
)

from aftermax import CATALOGUE, VectorQuantised, hf  # noqa: E402
from aftermax.hf.recurrent import RecurrentLayer, is_carried, layer_of, seen_tokens  # noqa: E402

from .hf_models import CACHE, IDS, LENGTH, LLAMA, NEWEST, VOCABULARY, text, tiny, tokens  # noqa: E402

LINEAR = [entry.name for entry in CATALOGUE if getattr(entry.system, "fixed_size", False)]
EXACT = 1e-6
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**LLAMA),
    "smollm3": lambda: SmolLM3Config(**LLAMA | {"num_hidden_layers": 4}),  # the fourth has no RoPE
    "olmo2": lambda: Olmo2Config(**LLAMA),
    "phi3": lambda: Phi3Config(**LLAMA),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=None),
}
KINDS = ["llama", "qwen3", "gpt2", "opt", "deepseek-v3", *CONFIGS]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def built(kind):
    if kind not in CONFIGS:
        return tiny(kind, "sdpa")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation="sdpa").eval()


def twins(kind="llama", name="linear", layers=None):
    """The same model with all keys, and with a state."""
    full = hf.convert(built(kind), name, layers=layers)
    return full, hf.make_recurrent(copy.deepcopy(full), layers)


@torch.no_grad()
def whole(model, ids, mask=None):
    """Logits of a full pass; positions as `generate` counts them, from the first real token."""
    mask = torch.ones_like(ids) if mask is None else mask
    mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    options = {} if type(model).__name__.startswith("OPT") else {"position_ids": places}
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits


@torch.no_grad()
def piecewise(model, ids, mask, sizes):
    cache, out, start = None, [], 0
    for size in sizes:
        end = start + size
        given = {} if cache is None else {CACHE: cache}
        step = model(
            input_ids=ids[:, start:end], attention_mask=mask[:, :end], use_cache=True, **given
        )
        cache, start = step.past_key_values, end
        out.append(step.logits)
    return torch.cat(out, 1), cache


def close(found, expected, bound=EXACT):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < bound * max(1, expected.abs().max())


@pytest.mark.parametrize("name", LINEAR)
def test_greedy_tokens_are_those_of_a_full_pass(name):
    full, recurrent = twins(name=name)
    inputs = text(padded=True)
    found = recurrent.generate(**inputs, **GREEDY)
    logits = whole(full, found, inputs["attention_mask"])[:, LENGTH - 1 : -1]
    logits[..., IDS["eos_token_id"]] = -torch.inf  # min_new_tokens
    assert torch.equal(found[:, LENGTH:], logits.argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_equal_the_whole(kind):
    full, recurrent = twins(kind)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    found, cache = piecewise(recurrent, tokens(), mask, (5, 1, 3, 1, 2))
    close(found, whole(full, tokens()))
    assert all(isinstance(layer, RecurrentLayer) for layer in cache.layers)
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_in_pieces(side, name):
    full, recurrent = twins(name=name)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if side != "right":
        mask[0, :4] = 0
    if side != "left":
        mask[1, 7:9] = 0  # the prompt ends there, and what is generated goes on behind it
    expected = full(input_ids=tokens(), attention_mask=mask, use_cache=False).logits
    found, cache = piecewise(recurrent, tokens(), mask, (3, 4, 2, 1, 2))
    close(found[mask.bool()], expected[mask.bool()])
    assert torch.equal(cache.layers[0].state.count, mask.sum(-1))


def test_codes_beyond_their_window_are_those_of_a_full_pass():
    """With a window that the prompt leaves, beams and all."""
    hf.register(few_codes=VectorQuantised(codes=5, window=3))
    full, recurrent = twins(name="few-codes")
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :4] = 0
    expected = full(input_ids=tokens(), attention_mask=mask, use_cache=False).logits
    found, cache = piecewise(recurrent, tokens(), mask, (3, 4, 2, 1, 2))
    close(found[mask.bool()], expected[mask.bool()])
    _, longer = piecewise(recurrent, tokens().repeat(1, 3), mask.repeat(1, 3), (5, 3 * LENGTH - 5))
    assert longer.layers[0].bytes == cache.layers[0].bytes
    inputs = text(padded=True)
    options = {**GREEDY, "num_beams": 3}
    assert torch.equal(recurrent.generate(**inputs, **options), full.generate(**inputs, **options))


def test_half_precision_sums_in_float32():
    full, recurrent = (model.bfloat16() for model in twins())
    mask = torch.ones_like(tokens())
    found, cache = piecewise(recurrent, tokens(), mask, (5, 1, 1, 5))
    expected = full(input_ids=tokens(), use_cache=False).logits
    assert found.dtype == torch.bfloat16
    close(found.float(), expected.float(), 1e-2)
    assert cache.layers[0].state.sums.dtype == torch.float32


def test_compiles_in_one_graph():
    _, recurrent = twins()
    mask = torch.ones_like(tokens())
    expected, _ = piecewise(recurrent, tokens(), mask, (LENGTH - 1, 1))
    compiled = torch.compile(recurrent, backend="eager", fullgraph=True)
    found, _ = piecewise(compiled, tokens(), mask, (LENGTH - 1, 1))
    close(found, expected)


@pytest.mark.parametrize("layers", [[0], [-1]], ids=["first", "last"])
@pytest.mark.parametrize("others", ["softmax", "lssar"])
def test_some_layers(layers, others):
    full = hf.convert(hf.convert(built("llama"), others), "linear", layers=layers)
    recurrent = hf.make_recurrent(copy.deepcopy(full), layers)
    inputs = text(padded=True)
    assert torch.equal(full.generate(**inputs, **GREEDY), recurrent.generate(**inputs, **GREEDY))
    mask = inputs["attention_mask"]
    expected, _ = piecewise(full, tokens(), mask, (LENGTH,))
    found, cache = piecewise(recurrent, tokens(), mask, (5, 1, 3, 3))
    close(found[mask.bool()], expected[mask.bool()])
    kinds = [isinstance(layer, RecurrentLayer) for layer in cache.layers]
    assert kinds == [layers == [0], layers == [-1]]
    assert [cache.get_seq_length(i) for i in range(2)] == [LENGTH, LENGTH]


def test_beams_and_chunks_and_many_samples():
    full, recurrent = twins()
    inputs, options = text(padded=True), GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    expected = full.generate(**inputs, **options)
    assert torch.equal(recurrent.generate(**inputs, **options), expected)
    expected = full.generate(**inputs, **GREEDY)
    chunked = recurrent.generate(**inputs, **GREEDY, prefill_chunk_size=5)
    assert torch.equal(chunked, expected)
    drawn = []
    for model in (full, recurrent):
        torch.manual_seed(0)
        options = GREEDY | {"do_sample": True, "num_return_sequences": 3}
        drawn.append(model.generate(**inputs, **options))
    assert torch.equal(*drawn)


def test_the_state_has_one_size():
    _, recurrent = twins()
    recurrent.config.max_position_embeddings = 4096
    sizes, cache = [], None
    ids = tokens()[:1, :10]
    with torch.no_grad():
        for i in range(2000):
            given = {} if cache is None else {CACHE: cache}
            out = recurrent(input_ids=ids, use_cache=True, **given)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            if i in (0, 10, 1999):
                held = [x for layer in cache.layers for x in vars(layer.state).values()]
                held = [x for x in held if isinstance(x, torch.Tensor)]
                assert all(x.untyped_storage().nbytes() == x.nbytes for x in held)
                assert sum(x.nbytes for x in held) == sum(layer.bytes for layer in cache.layers)
                sizes.append(sum(layer.bytes for layer in cache.layers))
    assert cache.get_seq_length() == 2009
    # two layers of two heads: 8 features by 8 values and a total, in float32; a count, two marks
    assert sizes == [2 * (2 * 8 * 9 * 4 + 8 + 2)] * 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(checkpointing):
    gradients = []
    for model in twins(name="cottention"):
        if checkpointing and hasattr(model.config, "aftermax_recurrent"):
            name = "activation" if NEWEST else "gradient"
            getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
        model.train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert any("aftermax_learned.m" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)
        assert gradient.abs().sum() > 0


def test_gradients_go_through_the_state():
    full, recurrent = twins(name="linear")
    ids, lost = tokens(), []
    lost.append(full(input_ids=ids, use_cache=False).logits[:, -4:].square().sum())
    first = recurrent(input_ids=ids[:, :8], use_cache=True)
    rest = recurrent(input_ids=ids[:, 8:], use_cache=True, **{CACHE: first.past_key_values})
    lost.append(rest.logits.square().sum())
    for x in lost:
        x.backward()
    for one, other in zip(full.parameters(), recurrent.parameters(), strict=True):
        close(other.grad, one.grad, 1e-5)


def test_saved_and_loaded(tmp_path):
    model = hf.convert(built("llama"), "cottention", layers=[-1], cache="recurrent")
    names = set(built("llama").state_dict())
    assert set(model.state_dict()) - names == {"model.layers.1.self_attn.aftermax_learned.m"}
    with torch.no_grad():
        model.model.layers[1].self_attn.aftermax_learned["m"].add_(1)
    model.save_pretrained(tmp_path)
    again = hf.load(tmp_path).eval()
    assert again.config.aftermax_recurrent == [1]
    assert [is_carried(layer.self_attn) for layer in again.model.layers] == [False, True]
    inputs = text(padded=True)
    assert torch.equal(again.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    other = hf.load(tmp_path, "linear", cache="recurrent")
    assert other.config.aftermax_recurrent == [0, 1]
    assert hf.load(tmp_path, "lssar").config.aftermax_recurrent == []


def test_made_recurrent_and_back():
    model = twins(name="normalised")[1]
    learned = model.model.layers[0].self_attn.aftermax_learned["w"]
    hf.make_recurrent(model, recurrent=False)
    assert model.model.layers[0].self_attn.aftermax_learned["w"] is learned
    cache = model(input_ids=tokens()).past_key_values
    assert cache.layers[0].keys.shape[-2] == LENGTH
    hf.make_recurrent(model)
    hf.convert(model, "lssar")
    assert model.config.aftermax_recurrent == []
    assert not any(is_carried(module) for module in model.modules())
    assert hf.check(model).ok


def test_what_was_distilled_stays():
    model, batches = built("llama"), [tokens(), tokens().flip(0)]
    hf.distil(model, batches, "cottention")
    learned = model.model.layers[0].self_attn.aftermax_learned["m"]
    assert learned.sub(0.5).abs().max() > 0
    hf.make_recurrent(model)
    assert model.model.layers[0].self_attn.aftermax_learned["m"] is learned
    assert all("state of" in layer.cache for layer in hf.check(model).layers)
    hf.distil(model, batches, "linear", layers=[1])
    kept = [layer.cache for layer in hf.check(model).layers]
    assert kept == ["a state of 522 bytes", "all keys and values"]
    assert model.config.aftermax_recurrent == [0]


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "StaticCache with StaticLayer: use a dynamic"),
        ({"assistant": True}, "take tokens back" if not NEWEST else "can be cropped"),
        ({"prompt_lookup_num_tokens": 2}, "take tokens back" if not NEWEST else "can be cropped"),
    ],
    ids=["static", "assistant", "lookup"],
)
def test_caches_that_cannot_be(options, message):
    _, recurrent = twins()
    if options.get("assistant"):
        options = {"assistant_model": built("qwen3")}
    ids = tokens()[:1].repeat(1, 2)  # which looking up finds again
    with pytest.raises(ValueError, match=message):
        recurrent.generate(input_ids=ids, do_sample=False, max_new_tokens=6, **options)


def test_what_was_summed_cannot_be_taken_back():
    _, recurrent = twins()
    _, cache = piecewise(recurrent, tokens(), torch.ones_like(tokens()), (LENGTH,))
    cache.crop(0 if NEWEST else LENGTH)
    with pytest.raises(ValueError, match="cannot take tokens back"):
        cache.crop(-1)


@torch.no_grad()
def test_what_was_summed_cannot_be_hidden_later():
    """... and a step that was refused leaves the cache as it was."""
    _, recurrent = twins()
    ids, mask = tokens(), torch.ones_like(tokens())
    expected, _ = piecewise(recurrent, ids, mask, (8, 2))
    _, cache = piecewise(recurrent, ids, mask, (8,))
    hidden = mask.clone()
    hidden[0, :4] = 0
    with pytest.raises(ValueError, match="neither hidden nor shown later"):
        recurrent(input_ids=ids[:, 8:10], attention_mask=hidden[:, :10], **{CACHE: cache})
    assert cache.get_seq_length() == 8
    found = recurrent(input_ids=ids[:, 8:10], attention_mask=mask[:, :10], **{CACHE: cache}).logits
    close(found, expected[:, 8:])


def test_a_cache_of_another_model():
    full, recurrent = twins()
    cache = full(input_ids=tokens()).past_key_values
    with pytest.raises(ValueError, match=f"holds {LENGTH} keys there, of another model"):
        recurrent(input_ids=tokens(), **{CACHE: cache})


def test_a_model_that_left_aftermax():
    _, recurrent = twins()
    recurrent.set_attn_implementation("sdpa")
    cache = recurrent(input_ids=tokens()).past_key_values
    with pytest.raises(ValueError, match="no longer runs an attention of aftermax"):
        recurrent(input_ids=tokens()[:, :1], **{CACHE: cache})
    recurrent.set_attn_implementation("aftermax-lssar")
    with pytest.raises(ValueError, match="needs all keys and values"):
        recurrent(input_ids=tokens())


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("llama", "lssar", r"LSSAR\(power=15\) needs all keys and values"),
        ("mistral-window", "linear", "DynamicSlidingWindowLayer, and a state has no window"),
        ("whisper", "linear", "only decoders that generate"),
    ],
)
def test_refused_with_the_reason(kind, name, reason):
    model = tiny(kind.removesuffix("-window"), "sdpa")
    with pytest.raises(ValueError, match=reason):
        hf.convert(model, name, cache="recurrent")
    assert model.config._attn_implementation == "sdpa"
    assert not any(is_carried(module) for module in model.modules())


def test_a_model_that_hides_its_cache_is_found_out():
    model = hf.convert(built("llama"), "linear")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    @functools.wraps(forward)
    def without(*args, aftermax_held=None, **kwargs):
        return forward(*args, **kwargs)

    attention.forward = without
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn: the model does not hand it"):
        hf.make_recurrent(model)
    assert not any(is_carried(module) for module in model.modules())


def test_gemma_where_it_has_no_window():
    full = hf.convert(tiny("gemma2", "eager"), "linear", layers=[1])
    recurrent = hf.make_recurrent(copy.deepcopy(full), [1])
    inputs = text(padded=True)
    assert torch.equal(full.generate(**inputs, **GREEDY), recurrent.generate(**inputs, **GREEDY))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn: .* needs all keys"):
        hf.make_recurrent(full, [0])


def test_words_that_are_none():
    with pytest.raises(ValueError, match="cache must be 'full' or 'recurrent', got 'state'"):
        hf.convert(built("llama"), "linear", cache="state")
    with pytest.raises(ValueError, match="convert it first"):
        hf.make_recurrent(built("llama"))


def test_masks_of_other_shapes():
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    assert seen_tokens(None, 5) is None
    assert seen_tokens(causal.clone(), 5) is None
    added = torch.zeros(1, 1, 5, 5).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert seen_tokens(added, 5) is None
    padded = causal & torch.tensor([True, True, True, False, False])
    assert seen_tokens(padded, 5).tolist() == [[True, True, True, False, False]]
    for mask, message in [
        (causal | True, "differs from query to query"),
        (causal & causal.flip(-1, -2), "differs from query to query"),
        (torch.randn(1, 1, 5, 5), "adds to the scores"),
        (causal.expand(1, 2, 5, 5), r"\(B, 1, 5, tokens so far\), got \(1, 2, 5, 5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            seen_tokens(mask.clone(), 5)


# ---- what is told ----


def test_check_says_what_decoding_keeps():
    full, recurrent = twins(name="cottention-value")
    report = hf.check(recurrent)
    assert report.ok
    assert [layer.cache for layer in report.layers] == ["a state of 1,034 bytes"] * 2
    assert report.layers[0].notes == ()
    assert "aftermax.hf.make_recurrent(model) keeps the state" in str(hf.check(full))
    windowed = str(hf.check(hf.convert(tiny("mistral", "sdpa"), "linear")))
    assert "values: its place in the cache is a DynamicSlidingWindowLayer" in windowed


def test_the_layer_as_transformers_knows_it():
    _, recurrent = twins()
    _, cache = piecewise(recurrent, tokens(), torch.ones_like(tokens()), (LENGTH,))
    layer = cache.layers[0]
    assert layer_of(cache, 0) is layer
    if NEWEST:
        assert isinstance(layer, transformers.cache_utils.LinearAttentionLayer)
        assert cache.has_previous_state(0)
        assert cache.get_recurrent_state(0) is layer.state.sums
        assert not cache.is_croppable
    before = layer.state
    cache.batch_repeat_interleave(2)
    assert torch.equal(layer.state.sums, before.sums.repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(layer.state.sums, before.sums)
    cache.reset()
    assert (layer.bytes, cache.get_seq_length()) == (0, 0)
    once = recurrent(input_ids=tokens(), **{CACHE: cache}).logits
    close(once, recurrent(input_ids=tokens(), **{CACHE: DynamicCache()}).logits)
    assert once.shape[-1] == VOCABULARY
