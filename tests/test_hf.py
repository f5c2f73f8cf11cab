"""Through the door of transformers: law 13, and the traps of masks, caches and arguments."""

import copy
import functools

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig  # noqa: E402

from aftermax import (  # noqa: E402
    CATALOGUE,
    LSSAR,
    find,
    hf,
)
from aftermax.dense import Dense  # noqa: E402
from aftermax.hf.masks import visible_of  # noqa: E402

from .hf_models import (  # noqa: E402
    CACHE,
    MODELS,
    NEWEST,
    NOT_ON_THE_INTERFACE,
    build,
    causal_models,
    tiny,
    tokens,
)

CAUSAL = [entry.name for entry in CATALOGUE if entry.causal]
NOT_CAUSAL = [entry.name for entry in CATALOGUE if not entry.causal]

EXACT = 1e-6
"""Of float32 logits, whose size is about 1: where they are larger, of their size."""

STEPWISE = [name for name in CAUSAL if name != "cottention-value"]
"""Cottention's value form divides each value by what its own token sees: a query of the past that
a cache of keys and values does not hold."""


@pytest.fixture(autouse=True, scope="module")
def _registered():
    hf.register()


def logits_of(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def real(inputs, logits):
    """The rows of real tokens: what stands at padding has no meaning."""
    mask = inputs.get("attention_mask")
    return logits if mask is None or mask.shape[1] != logits.shape[1] else logits[mask.bool()]


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left-padded"])
@pytest.mark.parametrize("kind", MODELS)
def test_softmax_equals_eager(kind, padded):
    eager, ours, inputs = *build(kind, "eager", MODELS[kind].softmax), MODELS[kind].inputs(padded)
    if padded and "attention_mask" not in inputs:
        pytest.skip("takes no padding")
    expected, found = logits_of(eager, inputs), logits_of(ours, inputs)
    assert real(inputs, found).shape == real(inputs, expected).shape
    expected, found = real(inputs, expected), real(inputs, found)
    assert (found - expected).abs().max() < EXACT * max(1, expected.abs().max())
    assert found.isfinite().all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", causal_models())
def test_greedy_tokens_equal_eager(kind, cache):
    eager, ours = build(kind, "eager", MODELS[kind].softmax)
    inputs = MODELS[kind].inputs(padded=kind not in ("t5", "whisper"))
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    if cache == "static" and kind == "deepseek-v3" and not NEWEST:
        pytest.skip("transformers 4 has no static cache for values of another width than the keys")
    if cache == "static":
        options["cache_implementation"] = "static"
        for model in (eager, ours):
            model.generation_config.disable_compile = True
    inputs.pop("decoder_input_ids", None)
    expected, found = eager.generate(**inputs, **options), ours.generate(**inputs, **options)
    assert torch.equal(expected, found)


def test_beam_search_equals_eager():
    eager, ours = build("llama", "eager", "aftermax-softmax")
    inputs = MODELS["llama"].inputs(padded=True)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "min_new_tokens": 6}
    assert torch.equal(eager.generate(**inputs, **options), ours.generate(**inputs, **options))


@pytest.mark.parametrize("name", STEPWISE)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_cached_equals_full(kind, name):
    """At every split, with left padding, by pieces and token by token (law 6)."""
    model = tiny(kind, f"aftermax-{name}")
    inputs = MODELS[kind].inputs(padded=True)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    whole = real(inputs, logits_of(model, inputs))
    pieces, past, start = [], None, 0
    for length in (5, 4, 1, 1, 1):
        part = slice(start, start + length)
        with torch.no_grad():
            out = model(
                input_ids=inputs["input_ids"][:, part],
                attention_mask=inputs["attention_mask"][:, : start + length],
                position_ids=inputs["position_ids"][:, part],
                use_cache=True,
                **{CACHE: past},
            )
        pieces.append(out.logits)
        past, start = out.past_key_values, start + length
    together = real(inputs, torch.cat(pieces, 1))
    assert (together - whole).abs().max() < 2e-5 * max(1, whole.abs().max())


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_changes_nothing(name):
    """The real tokens of a padded row are what they are alone, on either side."""
    model = tiny("llama", f"aftermax-{name}")
    alone = tokens()[:1, :8]
    expected = logits_of(model, {"input_ids": alone})[0]
    for left in (True, False):
        ids, mask = torch.ones(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
        place = slice(4, 12) if left else slice(0, 8)
        ids[0, place], mask[0] = alone[0], 0
        mask[0, place] = 1
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        found = logits_of(model, inputs)[0, place]
        assert (found - expected).abs().max() < 2e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_change_nothing(name):
    model = tiny("llama", f"aftermax-{name}")
    ids = tokens()
    whole, part = (logits_of(model, {"input_ids": x}) for x in (ids, ids[:, :5]))
    assert (whole[:, :5] - part).abs().max() < 2e-5 * max(1, whole.abs().max())


@pytest.mark.parametrize("name", ["softmax", "lssar", "sigmoid", "linear"])
def test_packed_sequences_do_not_meet(name):
    model = tiny("llama", f"aftermax-{name}")
    first, second = tokens()[:1, :5], tokens()[1:, :7]
    ids = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    for alone, place in ((first, slice(0, 5)), (second, slice(5, 12))):
        expected = logits_of(model, {"input_ids": alone})
        assert (packed[:, place] - expected).abs().max() < 2e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("form", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", ["softmax", "lssar", "linear"])
def test_a_mask_of_four_dimensions(name, form):
    """A user's own, bool or additive, goes through as it is."""
    model, ids = tiny("llama", f"aftermax-{name}"), tokens()
    visible = torch.ones(12, 12).tril().bool()
    visible[:, 3] = False
    visible[3, 3] = True
    mask = visible[None, None].expand(2, 1, 12, 12)
    given = mask if form == torch.bool else torch.where(mask, 0.0, torch.finfo(form).min)
    found = logits_of(model, {"input_ids": ids, "attention_mask": given.clone()})
    other = ids.clone()
    other[:, 3] = 1
    moved = logits_of(model, {"input_ids": other, "attention_mask": given.clone()})
    keep = torch.arange(12) != 3
    assert torch.equal(found[:, keep], moved[:, keep])
    if name == "softmax":
        eager = tiny("llama", "eager")
        additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        expected = logits_of(eager, {"input_ids": ids, "attention_mask": additive})
        assert (found - expected).abs().max() < EXACT


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_system_that_is_not_causal_says_so(name):
    with pytest.raises(ValueError, match="causal"):
        logits_of(tiny("llama", f"aftermax-{name}"), {"input_ids": tokens()})


@pytest.mark.parametrize("name", [entry.name for entry in CATALOGUE])
@pytest.mark.parametrize("kind", sorted({"bert", "vit"} & set(MODELS)))
def test_encoders_run_every_system(kind, name):
    model, inputs = tiny(kind, f"aftermax-{name}"), MODELS[kind].inputs(False)
    out = logits_of(model, inputs)
    assert out.isfinite().all()
    assert not torch.equal(out, logits_of(tiny(kind, "aftermax-relu-power"), inputs)) or (
        name == "relu-power"
    )


@pytest.mark.parametrize("name", ["softmax", "lssar", "sink", "linear"])
def test_gradient_checkpointing_changes_no_gradient(name):
    model, gradients = hf.convert(tiny("llama", "eager"), name), []
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.zero_grad()
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter in gradients[0]:
        torch.testing.assert_close(gradients[1][parameter], gradients[0][parameter])


@pytest.mark.parametrize("name", ["softmax", "lssar", "linear"])
def test_compiles_in_one_graph(name):
    model, ids = tiny("llama", f"aftermax-{name}"), tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(input_ids=ids, use_cache=False).logits
    assert (found - logits_of(model, {"input_ids": ids})).abs().max() < 2e-5


def test_static_cache_compiled_decode():
    model = tiny("llama", "aftermax-lssar")
    options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    inputs = MODELS["llama"].inputs(padded=True)
    expected = model.generate(**inputs, **options)
    model.generation_config.disable_compile = True
    found = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(expected, found)


def test_weights_are_returned_where_they_are_asked_for():
    eager, ours = build("llama", "eager", "aftermax-softmax")
    inputs = {"input_ids": tokens(), "output_attentions": True}
    with torch.no_grad():
        expected = eager(**inputs).attentions
        if transformers.__version__ < "5":
            with pytest.warns(UserWarning, match="output_attentions"):
                found = ours(**inputs).attentions
        else:
            found = ours(**inputs).attentions
    assert len(found) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_soft_capping_is_refused_with_the_reason():
    model = tiny("gemma2-capped", "aftermax-softmax")
    with pytest.raises(ValueError, match="softcap"):
        logits_of(model, {"input_ids": tokens()})
    assert "softcap" in " ".join(hf.check(model).problems)


def test_sinks_are_refused_but_by_the_sink():
    with pytest.raises(ValueError, match=r"sinks.*aftermax-sink"):
        logits_of(tiny("gpt-oss", "aftermax-lssar"), {"input_ids": tokens()})


def test_position_bias_is_refused_without_scores():
    if "t5" not in MODELS:
        pytest.skip("T5 is not on the interface in this version")
    inputs = MODELS["t5"].inputs(False)
    with pytest.raises(ValueError, match="position_bias"):
        logits_of(tiny("t5", "aftermax-linear"), inputs)


def test_scaling_is_taken_as_given():
    """Gemma's query_pre_attn_scalar and OPT's 1.0 reach the scores, and not the cosine systems."""
    x = torch.randn(1, 2, 5, 8)
    attend = AttentionInterface()["aftermax-softmax"]
    module = torch.nn.Module()
    given, _ = attend(module, x, x, x, None, scaling=1.0)
    expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True, scale=1.0)
    torch.testing.assert_close(given, expected.transpose(1, 2))
    cosine = AttentionInterface()["aftermax-lssar"]
    torch.testing.assert_close(
        *(cosine(module, x, x, x, None, scaling=s)[0] for s in (1.0, 0.1)), rtol=0, atol=0
    )


def test_what_none_means():
    """Whisper's encoder and cross-attention: all is seen, where the module is not causal."""
    assert not visible_of(None, 3, 7, causal=False).causal
    assert visible_of(None, 3, 3, causal=True).causal
    assert visible_of(None, 1, 7, causal=True).offset == 6
    last = torch.ones(1, 1, 1, 7, dtype=torch.bool)
    assert not visible_of(last, 1, 7, causal=False).causal


@pytest.mark.parametrize("window", [None, 3])
def test_a_causal_mask_is_said_without_its_matrix(window):
    """... so that the kernels skip what is hidden; with padding on the left, and after a cache."""
    for start, length in ((0, 12), (5, 4)):
        rows = torch.arange(start, start + length)[:, None]
        distance = rows - torch.arange(start + length)
        visible = (distance >= 0) & (distance < (window or 99))
        seen = torch.arange(start + length) >= torch.tensor([[3], [0]])
        mask = visible[None, None] & seen[:, None, None]
        said = visible_of(mask, length, start + length, causal=True, window=window)
        assert said.causal
        assert (said.offset, said.window) == (start, window)
        whole = said.rows(0, length, (0, start + length), mask.device, torch.float32).visible
        assert torch.equal(whole.expand_as(mask), mask)
    odd = mask.clone()
    odd[0, 0, 2, 4] = ~odd[0, 0, 2, 4]
    assert torch.equal(visible_of(odd, 4, 9, causal=True).mask, odd)


def test_registered_names_are_safe():
    names = hf.register(sharp_one=LSSAR(power=30))
    assert "aftermax-sharp-one" in names
    assert len(names) == len(CATALOGUE) + 1
    with pytest.raises(ValueError, match="flash"):
        hf.register(flash=LSSAR())
    with pytest.raises(TypeError, match="row map"):
        hf.register(nothing=3)


def test_a_system_of_ones_own():
    hf.register(sharp=LSSAR(power=30))
    found = logits_of(tiny("llama", "aftermax-sharp"), {"input_ids": tokens()})
    assert not torch.equal(
        found, logits_of(tiny("llama", "aftermax-lssar"), {"input_ids": tokens()})
    )


@pytest.mark.parametrize("kind", MODELS)
def test_check_finds_every_layer(kind):
    report = hf.check(tiny(kind, MODELS[kind].softmax))
    assert report.ok, str(report)
    assert len(report.layers) == MODELS[kind].attentions
    assert all(layer.system for layer in report.layers)


@pytest.mark.parametrize("kind", NOT_ON_THE_INTERFACE)
def test_check_finds_a_model_that_never_calls(kind):
    model = AutoModelForCausalLM.from_config(
        NOT_ON_THE_INTERFACE[kind](), attn_implementation="aftermax-lssar"
    )
    report = hf.check(model)
    assert not report.ok
    assert "interface" in " ".join(report.problems) or "run" in " ".join(report.problems)
    with pytest.raises(ValueError):
        report.raise_for_problems()
    with pytest.raises(ValueError, match="interface"):
        hf.convert(model, "lssar")


def test_check_finds_a_lost_mask():
    """The trap of a function that is registered without its mask."""
    attend = functools.partial(AttentionInterface()["aftermax-softmax"].func, system=Dense(LSSAR()))
    AttentionInterface.register(
        "aftermax-maskless", lambda *a, **k: attend(*a, **k, is_causal=False)
    )
    model = AutoModelForCausalLM.from_config(
        MODELS["llama"].config(), attn_implementation="aftermax-maskless"
    )
    report = hf.check(model.eval())
    assert any("mask is lost" in problem for problem in report.problems)


def test_check_finds_what_does_not_decode():
    problems = hf.check(tiny("llama", "aftermax-cottention-value")).problems
    assert len(problems) == 1
    assert "does not decode from a cache" in problems[0]


def test_check_says_what_decoding_keeps():
    report = hf.check(tiny("llama", "aftermax-linear"))
    assert report.ok
    assert "keeps all keys and values" in str(report)


def test_convert_makes_what_is_learned_parameters(tmp_path):
    model = tiny("llama", "sdpa")
    hf.convert(model, "sink")
    sinks = [p for n, p in model.named_parameters() if n.endswith("aftermax_learned.sink")]
    assert [tuple(p.shape) for p in sinks] == [(4,), (4,)]
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in sinks)
    with torch.no_grad():
        for p in sinks:
            p.add_(torch.randn(4))
    expected = logits_of(model, {"input_ids": tokens()})
    model.save_pretrained(tmp_path)
    again = hf.load(tmp_path)
    assert again.config._attn_implementation == "aftermax-sink"
    assert torch.equal(logits_of(again.eval(), {"input_ids": tokens()}), expected)
    plain = hf.load(tmp_path, "softmax").eval()
    assert not torch.equal(logits_of(plain, {"input_ids": tokens()}), expected)


def test_convert_some_layers(tmp_path):
    model = tiny("llama", "eager")
    before = logits_of(model, {"input_ids": tokens()})
    hf.convert(model, "lssar", layers=[-1])
    assert [layer.system for layer in hf.check(model).layers] == [
        str(find("softmax").system),
        str(find("lssar").system),
    ]
    some = logits_of(model, {"input_ids": tokens()})
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(hf.load(tmp_path).eval(), {"input_ids": tokens()}), some)
    hf.convert(model, "softmax")
    after = logits_of(model, {"input_ids": tokens()})
    assert (after - before).abs().max() < EXACT
    assert (some - before).abs().max() > 1e-4
    with pytest.raises(ValueError, match="no layer 7"):
        hf.convert(model, "lssar", layers=[7])


def test_convert_that_fails_changes_nothing():
    model = hf.convert(tiny("llama", "eager"), "sink")
    before = logits_of(model, {"input_ids": tokens()})
    with pytest.raises(ValueError, match="causal"):
        hf.convert(model, "soft")
    with pytest.raises(ValueError, match="no system is called"):
        hf.convert(model, "softmaxx")
    assert model.config._attn_implementation == "aftermax-sink"
    assert torch.equal(logits_of(model, {"input_ids": tokens()}), before)


def test_distil_mends_layer_by_layer():
    torch.manual_seed(0)
    model = tiny("llama", "eager")
    frozen = copy.deepcopy(model.state_dict())
    batches = [torch.randint(1, 97, (4, 24)) for _ in range(20)]
    found = hf.distil(model, batches, "lssa", layers=[0])
    assert len(found.layers) == 1
    assert found.mean(slice(-5, None)) < 0.9 * found.mean(slice(5))
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, frozen[n])}
    assert changed
    assert all(name.startswith("model.layers.0.self_attn.") for name in changed)


def test_distil_of_all_layers_is_that_system(tmp_path):
    model = tiny("llama", "eager")
    hf.distil(model, [tokens()] * 2, "log-n")
    assert hf.check(model).ok
    assert model.config._attn_implementation == "aftermax-log-n"
    expected = logits_of(model, {"input_ids": tokens()})
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(hf.load(tmp_path).eval(), {"input_ids": tokens()}), expected)


def test_distil_interrupted_leaves_the_model():
    model = tiny("llama", "eager")
    before = logits_of(model, {"input_ids": tokens()})

    def stop(done, error):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.distil(model, [tokens()] * 3, "lssar", progress=stop)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits_of(model, {"input_ids": tokens()}), before)


def test_a_fresh_config_takes_every_name():
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    for name in hf.register():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=name)
        assert model.config._attn_implementation == name


def test_loss_equals_that_of_transformers():
    ours, theirs = (tiny("llama", "eager") for _ in range(2))
    ours.loss_function = hf.causal_lm_loss
    labels = tokens().clone()
    labels[0, :5] = -100
    for options in ({}, {"num_items_in_batch": torch.tensor(30)}, {"num_items_in_batch": 30}):
        gradients = []
        for model in (ours, theirs):
            model.zero_grad()
            loss = model(input_ids=tokens(), labels=labels, **options).loss
            loss.backward()
            gradients.append((loss.detach(), model.lm_head.weight.grad.clone()))
        torch.testing.assert_close(gradients[0], gradients[1])
    with pytest.raises(ValueError, match="labels"):
        hf.causal_lm_loss(torch.zeros(1, 2, 3), None)
