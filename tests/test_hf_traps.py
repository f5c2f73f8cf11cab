"""What a second reader found: results that were wrong with nothing said, and their like."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from aftermax import CATALOGUE, hf  # noqa: E402

from .hf_models import MODELS, tiny, tokens  # noqa: E402

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
