"""KV groups replaced in Hugging Face models: cached equals whole, padding, beams, disk."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Qwen2Config

from aftermax import hf
from aftermax.hf.composite import CompositeLayer, MambaLayer
from aftermax.hybrid import Plan, plan_of, recency_ratio, uniform_ratio
from aftermax.hybrid.replace import cache_bytes

from .hf_models import CACHE, LENGTH, LLAMA, text, tiny, tokens

PLAN = Plan(((1,), (0, 1)), 2)
REPLACEMENTS = {"mamba": {}, "window": {"sinks": 1, "window": 3}, "linear": {}}
every_replacement = pytest.mark.parametrize("with_", REPLACEMENTS)


def model_of(kind: str = "llama"):
    if kind != "qwen2":
        return tiny(kind, "eager")
    torch.manual_seed(0)
    config = Qwen2Config(**{k: v for k, v in LLAMA.items() if k != "head_dim"})
    return AutoModelForCausalLM.from_config(config).eval()


def replaced(with_: str, kind: str = "llama"):
    return hf.replace_heads(model_of(kind), PLAN, with_, **REPLACEMENTS[with_])


@every_replacement
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_with_a_cache_the_logits_are_those_of_a_whole_pass(with_, kind, padded):
    model, given = replaced(with_, kind), text(padded)
    ids, mask = given["input_ids"], given["attention_mask"]
    place = (mask.cumsum(-1) - 1).clamp_min(0)
    whole = model(**given, position_ids=place, use_cache=False).logits
    cache, pieces = None, []
    for start, stop in ((0, 5), (5, 6), (6, LENGTH)):
        out = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=place[:, start:stop],
            **{CACHE: cache},
        )
        cache = out.past_key_values
        pieces.append(out.logits)
    real = mask.bool()
    assert_close(torch.cat(pieces, 1)[real], whole[real], rtol=1e-4, atol=1e-5)
    kinds = {"mamba": MambaLayer}.get(with_, CompositeLayer)
    assert [type(layer) for layer in cache.layers] == [kinds] * 2


@every_replacement
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_keeps_a_composite_cache_and_gives_what_it_gives_without(with_, beams):
    model = replaced(with_)
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "min_new_tokens": 6}
    cached = model.generate(**text(True), **options)
    plain = model.generate(**text(True), use_cache=False, **options)
    assert torch.equal(cached, plain)


@every_replacement
@torch.no_grad()
def test_the_cache_holds_the_bytes_of_the_formula(with_):
    model = replaced(with_)
    cache = model(tokens()).past_key_values
    sizes = REPLACEMENTS[with_] if with_ == "window" else {}
    for layer, groups in zip(cache.layers, PLAN.replaced, strict=True):
        expected = cache_bytes(LENGTH, 4, 2, 8, len(groups), with_, batch=2, **sizes)
        if with_ == "mamba" and len(groups) < 2:
            expected -= 2 * LENGTH  # transformers keeps its marks of padding elsewhere
        assert layer.bytes == expected


@torch.no_grad()
def test_a_window_as_wide_as_the_text_changes_nothing():
    model = model_of()
    before = model(**text(True)).logits
    hf.replace_heads(model, PLAN, "window", window=LENGTH)
    real = text(True)["attention_mask"].bool()
    assert_close(model(**text(True)).logits[real], before[real], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_models_own_scale_is_honoured():
    model = model_of()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.9
    before = model(tokens()).logits
    hf.replace_heads(model, PLAN, "window", window=LENGTH)
    assert_close(model(tokens()).logits, before, rtol=1e-4, atol=1e-5)
    cache = model(tokens()[:, :5]).past_key_values
    rest = model(tokens()[:, 5:], **{CACHE: cache}).logits
    assert_close(rest, before[:, 5:], rtol=1e-4, atol=1e-5)


@every_replacement
@torch.no_grad()
def test_a_folder_brings_back_what_was_saved(with_, tmp_path):
    model = replaced(with_, "qwen2")
    for parameter in model.parameters():
        parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    again = hf.load(tmp_path)
    assert_close(again(tokens()).logits, model(tokens()).logits)
    assert again.config.aftermax_replaced == model.config.aftermax_replaced
    assert hf.load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="loaded without device_map"):
        hf.load(tmp_path, device_map="cpu")


@torch.no_grad()
def test_a_folder_in_half_keeps_its_positions_and_how_it_ends(tmp_path):
    config = copy.deepcopy(tiny("llama", "eager").config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    hf.replace_heads(model, PLAN, "window")
    model.generation_config.eos_token_id = [5, 6]
    model.save_pretrained(tmp_path)
    again = hf.load(tmp_path)
    ids = torch.arange(LENGTH)[None] % LLAMA["vocab_size"]
    assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    frequencies = [m.model.rotary_emb.inv_freq for m in (again, model)]
    assert_close(*frequencies, rtol=0, atol=0)
    assert again.generation_config.eos_token_id == [5, 6]


@pytest.mark.parametrize("with_", ["mamba", "linear"])
def test_distillation_teaches_the_replaced_heads(with_):
    original = model_of()
    model = hf.replace_heads(copy.deepcopy(original), PLAN, with_)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    told = []
    errors = hf.distil_heads(
        model, original, [tokens()] * 40, learning_rate=1e-2, progress=lambda *x: told.append(x)
    )
    means = [sum(error.values()) / len(error) for error in errors]
    assert [len(error) for error in errors] == [2] * 40
    assert told[-1] == (40, means[-1])
    assert means[-1] < 0.7 * means[0]
    changed = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    names = ("mamba",) if with_ == "mamba" else ("q_proj", "k_proj", "v_proj")
    assert changed
    assert all(any(name in x for name in names) for x in changed)
    if with_ == "linear":  # of the group that stays nothing moved
        rows = model.model.layers[0].self_attn.k_proj.weight[:8]
        assert torch.equal(rows, original.model.layers[0].self_attn.k_proj.weight[:8])


def test_training_goes_on_through_all_that_is_left():
    model = replaced("mamba").train()
    model(tokens(), labels=tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("padded", [False, True])
def test_recency_is_of_the_queries_and_keys_that_attend(padded):
    model, shown = model_of("qwen3"), {}
    attend = torch.nn.functional.scaled_dot_product_attention
    found = hf.measure_recency(model, [text(padded)], 3, drop_sink=1)
    assert model.config._attn_implementation == "eager"
    assert found.mean.shape == (2, 4)
    assert found.baseline == uniform_ratio(LENGTH, 3, 1)
    model.set_attn_implementation("sdpa")

    def spy(query, key, value, *args, **kwargs):
        shown.setdefault(len(shown), (query, key))
        return attend(query, key, value, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = spy
    try:
        model(**text(padded), use_cache=False)
    finally:
        torch.nn.functional.scaled_dot_product_attention = attend
    seen = text(padded)["attention_mask"].bool()
    for layer, (query, key) in shown.items():
        ratios = recency_ratio(query, key, 3, drop_sink=1, seen=seen, scale=1 / math.sqrt(8))
        assert_close(found.mean[layer], ratios.mean(0))
        assert_close(found.sd[layer], ratios.std(0))
    plan = plan_of(found.mean, 0.5, kv_heads=2)
    assert plan.share == 0.5


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="for 2 layers of 4 KV heads, and the model has 2 of 2"):
        hf.replace_heads(model_of(), Plan(((0,), ()), 4))
    with pytest.raises(ValueError, match="replaced already"):
        hf.replace_heads(replaced("window"), PLAN)
    with pytest.raises(ValueError, match="a state has no window"):
        hf.replace_heads(tiny("mistral", "eager"), PLAN)
    with pytest.raises(ValueError, match="has no attention with q_proj"):
        hf.replace_heads(tiny("gpt2", "eager"), PLAN)
    with pytest.raises(ValueError, match="run a system of their own"):
        hf.measure_recency(replaced("window"), [tokens()], 3)
    with pytest.raises(ValueError, match="replace_heads comes first"):
        hf.distil_heads(model_of(), model_of(), [tokens()])


@every_replacement
def test_the_report_finds_no_attention_that_is_not_ours(with_):
    report = hf.check(replaced(with_))
    assert report.ok
    found = [layer.name for layer in report.layers]
    inner = ".attention" if with_ == "mamba" else ""
    assert f"model.layers.0.self_attn{inner}" in found
    if with_ != "mamba":
        assert report.layers[0].cache == "keys and values of 1 groups, the state of the others"
    assert len(found) == (1 if with_ == "mamba" else 2)  # all heads of layer 1 are replaced


@every_replacement
def test_tokens_cannot_be_taken_back(with_):
    cache = replaced(with_)(tokens()).past_key_values
    with pytest.raises(ValueError, match="cannot take tokens back"):
        cache.layers[0].crop(-2 if CACHE == "cache" else 3)
    assert cache.get_seq_length() == LENGTH
    cache.reset()
    assert cache.get_seq_length() == 0
