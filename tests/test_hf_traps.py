"""What a second reader found: results that were wrong with nothing said, and their like."""

import threading

import pytest
import torch

transformers = pytest.importorskip("transformers")

from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import AttentionInterface  # noqa: E402

from aftermax import CATALOGUE, hf  # noqa: E402
from aftermax.hf.door import on_softmax, watched  # noqa: E402
from aftermax.hf.masks import visible_of  # noqa: E402

from .hf_models import CACHE, IDS, MODELS, NEWEST, SIZES, tiny, tokens  # noqa: E402

CAUSAL = [entry.name for entry in CATALOGUE if entry.causal]


@pytest.fixture(autouse=True, scope="module")
def _registered():
    hf.register()


@pytest.fixture
def compiling():
    """What one test has compiled counts against no other."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits_of(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


# ---- autocast: the Trainer's bf16=True ----


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_autocast_trains(kind, name):
    """RoPE and the norms of queries and keys give float32 there, beside bfloat16 values."""
    model = hf.convert(tiny(kind, "eager"), name).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=tokens(), labels=tokens())
    out.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("cache", ["full", "recurrent"])
def test_autocast_decodes(cache):
    model = hf.convert(tiny("llama", "eager"), "linear", cache=cache)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.generate(tokens(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert found.shape == (2, 15)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_autocast_softmax_is_that_of_sdpa(kind):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (
            logits_of(tiny(kind, name), input_ids=tokens()) for name in ("aftermax-softmax", "sdpa")
        )
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_autocast_compiles_in_one_graph(compiling):
    model = tiny("llama", "aftermax-lssar")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits_of(compiled, input_ids=tokens(), use_cache=False)
        expected = logits_of(model, input_ids=tokens())
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


# ---- masks ----


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("cache", ["full", "recurrent"])
def test_a_mask_that_is_written_to_is_looked_at_again(cache, inference):
    """A user's own of four dimensions goes through as it is, and may be used again."""
    model, ids = hf.convert(tiny("llama", "eager"), "linear", cache=cache), tokens()
    with torch.inference_mode(inference):
        mask = torch.ones(12, 12).tril().bool()[None, None].repeat(2, 1, 1, 1)
        before = model(input_ids=ids, attention_mask=mask).logits
        mask[..., 3] = False
        after = model(input_ids=ids, attention_mask=mask).logits
        expected = model(input_ids=ids, attention_mask=mask.clone()).logits
    assert not torch.equal(after[:, 4:], before[:, 4:])
    assert torch.equal(after, expected)


def nllb_moe():
    return transformers.NllbMoeForConditionalGeneration, transformers.NllbMoeConfig(
        vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_experts=2,
        max_position_embeddings=64, decoder_start_token_id=1, **IDS,
    )  # fmt: skip


def bigbird_pegasus():
    return transformers.BigBirdPegasusForCausalLM, transformers.BigBirdPegasusConfig(
        vocab_size=97, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        max_position_embeddings=64, **IDS,
    )  # fmt: skip


@pytest.mark.parametrize("made", [nllb_moe, bigbird_pegasus])
def test_decoders_whose_modules_say_that_they_are_not_causal(made):
    kind, config = made()
    eager = kind._from_config(config, attn_implementation="eager").eval()
    ours = kind._from_config(made()[1], attn_implementation="aftermax-softmax").eval()
    ours.load_state_dict(eager.state_dict())
    inputs = {"input_ids": tokens()}
    if config.is_encoder_decoder and made is nllb_moe:
        inputs["decoder_input_ids"] = tokens()
    expected, found = (logits_of(model, **inputs) for model in (eager, ours))
    assert (found - expected).abs().max() < 1e-6


# ---- check ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [k for k in ("llama", "gpt2", "whisper", "t5") if k in MODELS])
def test_check_finds_a_lost_mask_in_every_model_that_writes(kind, dtype):
    attend = AttentionInterface()["aftermax-softmax"]
    AttentionInterface.register(
        "aftermax-maskless",
        lambda module, q, k, v, mask, **options: attend(
            module, q, k, v, None, **(options | {"is_causal": False})
        ),
    )
    kind = MODELS[kind]
    model = kind.auto.from_config(kind.config(), attn_implementation="aftermax-maskless").to(dtype)
    assert any("mask is lost" in problem for problem in hf.check(model).problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MODELS)
def test_check_finds_nothing_where_there_is_nothing(kind, dtype):
    model = tiny(kind, MODELS[kind].softmax).to(dtype)
    assert hf.check(model).ok, str(hf.check(model))


@pytest.mark.skipif(not NEWEST, reason="not on the interface in transformers 4")
def test_check_of_an_encoder_with_a_head_for_next_tokens():
    """BERT's class for it without `is_decoder` sees all, with its own attention too."""
    config = transformers.BertConfig(**SIZES)
    model = transformers.BertLMHeadModel._from_config(config, attn_implementation="aftermax-lssar")
    assert hf.check(model).ok


def test_check_leaves_what_was_frozen():
    model = tiny("llama", "aftermax-softmax").train()
    model.model.layers[0].eval()
    hf.check(model)
    assert model.training
    assert not any(module.training for module in model.model.layers[0].modules())
    assert all(module.training for module in model.model.layers[1].modules())


def test_check_and_convert_of_a_compiled_model(compiling):
    compiled, model = tiny("llama", "aftermax-lssar"), hf.convert(tiny("llama", "eager"), "sigmoid")
    compiled.compile(backend="aot_eager")
    logits_of(compiled, input_ids=tokens())
    assert hf.check(compiled).ok
    assert hf.check(torch.compile(compiled, backend="aot_eager")).ok
    hf.convert(compiled, "sigmoid")
    found, expected = (logits_of(m, input_ids=tokens()) for m in (compiled, model))
    assert (found - expected).abs().max() < 1e-6


# ---- the door ----


def test_another_thread_goes_on_with_its_own_attention():
    """`convert` looks at a model on softmax; one that serves meanwhile must not notice."""
    model, found = tiny("llama", "aftermax-lssar"), []
    expected = logits_of(model, input_ids=tokens())
    with on_softmax(), watched() as seen:
        served = threading.Thread(target=lambda: found.append(logits_of(model, input_ids=tokens())))
        served.start()
        served.join()
    assert torch.equal(found[0], expected)
    assert not seen


@pytest.mark.parametrize("name", ["softmax", "lssar", "clipped-normalised", "scale-invariant"])
def test_t5_decodes_as_in_a_full_pass(name):
    """Its position bias comes beside the mask; distances are counted from the cache's length."""
    if "t5" not in MODELS:
        pytest.skip("T5 is not on the interface in this version")
    model, bias = tiny("t5", f"aftermax-{name}"), torch.randn(1, 4, 1, 9)
    self_attention = model.decoder.block[0].layer[0].SelfAttention
    attend = AttentionInterface()[f"aftermax-{name}"]
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    causal = torch.ones(9, 9).tril().bool()[None, None].repeat(2, 1, 1, 1)
    whole, _ = attend(
        self_attention, query, key, key, causal, position_bias=bias.expand(1, 4, 9, 9)
    )
    last, _ = attend(
        self_attention, query[:, :, -1:], key, key, causal[:, :, -1:], position_bias=bias
    )
    torch.testing.assert_close(last, whole[:, -1:])


@pytest.mark.parametrize("name", ["scale-invariant", "cosformer", "transnormer"])
def test_cross_attention_knows_no_distance(name):
    with pytest.raises(ValueError, match=r"distance.*nothing says where they stand"):
        logits_of(tiny("whisper", f"aftermax-{name}"), **MODELS["whisper"].inputs(False))


@pytest.mark.parametrize("name", ["linear", "lssar"])
def test_compiled_with_a_static_cache(name, compiling):
    model, ids = tiny("llama", f"aftermax-{name}"), tokens()
    compiled = torch.compile(model, backend="aot_eager")
    expected = logits_of(model, input_ids=ids)
    cache, pieces = transformers.StaticCache(config=model.config, max_cache_len=16), []
    for part in (slice(0, 8), slice(8, 9), slice(9, 12)):
        pieces.append(logits_of(compiled, input_ids=ids[:, part], **{CACHE: cache}))
    assert (torch.cat(pieces, 1) - expected).abs().max() < 2e-5


# ---- convert, load, distil ----


def randomised(model):
    """What the systems learn is no longer what it starts with."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "aftermax" in name:
                p.normal_()
    return model


@pytest.mark.parametrize("named", ["aftermax-lssar", "aftermax-sink", "sdpa"])
def test_layers_that_were_named_at_construction_come_back(named, tmp_path):
    model = randomised(hf.convert(tiny("llama", named), "sigmoid", layers=[0]))
    expected = [layer.system for layer in hf.check(model).layers]
    model.save_pretrained(tmp_path)
    again = hf.load(tmp_path).eval()
    assert [layer.system for layer in hf.check(again).layers] == expected
    hf.convert(again, "sink", layers=[1])  # and once more
    randomised(again).save_pretrained(tmp_path)
    found = logits_of(hf.load(tmp_path).eval(), input_ids=tokens())
    assert torch.equal(found, logits_of(again, input_ids=tokens()))


def test_check_says_when_what_is_saved_is_not_what_runs():
    model = hf.convert(tiny("llama", "eager"), "lssar")
    model.set_attn_implementation("aftermax-sigmoid")
    assert "brings back" in " ".join(hf.check(model).problems)


def test_a_folder_within_a_folder_and_torch_files(tmp_path):
    model = randomised(hf.convert(tiny("llama", "eager"), "sink"))
    expected = logits_of(model, input_ids=tokens())
    model.save_pretrained(tmp_path / "inner", max_shard_size="10KB")
    found = hf.load(tmp_path, subfolder="inner").eval()
    assert torch.equal(logits_of(found, input_ids=tokens()), expected)
    for file in (tmp_path / "inner").glob("*.safetensors*"):
        file.unlink()
    torch.save(model.state_dict(), tmp_path / "inner" / "pytorch_model.bin")
    found = hf.load(tmp_path / "inner").eval()
    assert torch.equal(logits_of(found, input_ids=tokens()), expected)


def test_the_models_own_sinks_are_the_parameters():
    """A second, unused one would stop DistributedDataParallel."""
    model = hf.convert(tiny("gpt-oss", "aftermax-sink"), "sink").train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "sink" in n)
    assert not any("aftermax" in name for name, _ in model.named_parameters())


class Bytes(torch.nn.Module):
    """A linear layer whose weights are stored as int8."""

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.nn.Parameter((linear.weight * 500).to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) / 500).T


def test_what_is_learned_is_no_integer():
    model = tiny("llama", "eager")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Bytes(getattr(layer.self_attn, name)))
    hf.convert(model, "sink")
    assert {p.dtype for n, p in model.named_parameters() if "aftermax" in n} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distil_in_half_precision(dtype):
    model = tiny("llama", "eager").to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(500)  # as large as outputs of trained models are
    found = hf.distil(model, [torch.randint(1, 97, (4, 64)) for _ in range(3)], "sink")
    assert all(0 < error < 2 for errors in found.errors for error in errors)
    assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())
    assert logits_of(model, input_ids=tokens()).dtype == dtype


def test_distil_leaves_what_was_frozen_frozen():
    model = tiny("llama", "eager").requires_grad_(False)
    hf.distil(model, [tokens()] * 2, "sink")
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learning
    assert all("aftermax_learned" in name for name in learning)


def test_a_model_without_numbers_goes_through():
    """On the device "meta", which autocast does not know."""
    x = torch.empty(1, 2, 5, 8, device="meta")
    out, _ = AttentionInterface()["aftermax-lssar"](torch.nn.Module(), x, x, x, None)
    assert out.shape == (1, 5, 2, 8)
    if NEWEST:  # before, Llama itself does not run there
        assert hf.check(tiny("llama", "aftermax-lssar").to("meta")).ok


def test_a_long_mask_is_looked_at_in_blocks():
    """... and not as a matrix of distances, eight bytes each."""
    mask = torch.ones(1, 1, 1000, 1000, dtype=torch.bool).tril()
    mask[..., :3] = False
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        said = visible_of(mask, 1000, 1000, causal=True)
    assert said.causal
    assert said.mask is not None
    assert said.mask.shape == (1, 1, 1, 1000)
    largest = max(event.cpu_memory_usage for event in profiled.events())
    assert largest < 2 * mask.nbytes
    wrong = mask.clone()
    wrong[0, 0, 700, 800] = True
    assert visible_of(wrong, 1000, 1000, causal=True).mask is wrong
