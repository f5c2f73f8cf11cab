"""What a second reader found: results that were wrong with nothing said, and their like."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from aftermax import CATALOGUE, hf  # noqa: E402

from .hf_models import IDS, tiny, tokens  # noqa: E402

CAUSAL = [entry.name for entry in CATALOGUE if entry.causal]


@pytest.fixture(autouse=True, scope="module")
def _registered():
    hf.register()


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


def test_autocast_compiles_in_one_graph():
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
