"""Tiny models of transformers, one for each way in which attention is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MptConfig,
    OPTConfig,
    Qwen3Config,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

transformers.utils.logging.set_verbosity_error()

NEWEST = int(transformers.__version__.split(".")[0]) >= 5
CACHE = "cache" if NEWEST else "past_key_values"
"""The argument of forward."""
VOCABULARY, LENGTH = 97, 12
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **IDS,
}
LLAMA = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)


def text(padded: bool) -> dict:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def text_and_text(padded: bool) -> dict:
    return text(padded) | {"decoder_input_ids": tokens()}


def sound_and_text(padded: bool) -> dict:
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(2, 8, 20, generator=generator)
    return {"input_features": features, "decoder_input_ids": tokens()}


def pixels(padded: bool) -> dict:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))}


@dataclass(frozen=True)
class Kind:
    config: Callable
    auto: type = AutoModelForCausalLM
    inputs: Callable[[bool], dict] = text
    attentions: int = 2
    softmax: str = "aftermax-softmax"
    """The name under which its own attention is had."""


MODELS = {
    "gpt2": Kind(
        lambda: GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS)
    ),
    "opt": Kind(
        lambda: OPTConfig(
            vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=64, **IDS,
        )
    ),
    "llama": Kind(lambda: LlamaConfig(**LLAMA)),
    "mistral": Kind(lambda: MistralConfig(**LLAMA, sliding_window=3)),
    "qwen3": Kind(lambda: Qwen3Config(**LLAMA)),
    "gemma2": Kind(
        lambda: Gemma2Config(**LLAMA, attn_logit_softcapping=None, sliding_window=5)
    ),
    "gpt-oss": Kind(
        lambda: GptOssConfig(
            **LLAMA, num_local_experts=2, num_experts_per_tok=1, sliding_window=5,
            rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        softmax="aftermax-sink",
    ),
    "deepseek-v3": Kind(
        lambda: DeepseekV3Config(
            **SIZES, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1, n_shared_experts=1,
        )
    ),
    "whisper": Kind(
        lambda: WhisperConfig(
            vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
            decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=10, max_target_positions=32,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, **IDS,
        ),
        AutoModelForSpeechSeq2Seq,
        sound_and_text,
        attentions=6,
    ),
    "vit": Kind(
        lambda: ViTConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            image_size=16, patch_size=4,
        ),
        AutoModelForImageClassification,
        pixels,
    ),
}  # fmt: skip
"""Built on the attention interface in every version that is supported."""

SINCE_5 = {
    "bert": Kind(lambda: BertConfig(**SIZES), AutoModelForMaskedLM),
    "t5": Kind(
        lambda: T5Config(
            vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        ),
        AutoModelForSeq2SeqLM,
        text_and_text,
        attentions=6,
    ),
    "modernbert": Kind(
        lambda: ModernBertConfig(
            **SIZES, local_attention=4, cls_token_id=1, sep_token_id=2, decoder_bias=False
        ),
        AutoModelForMaskedLM,
    ),
}  # fmt: skip
if NEWEST:
    MODELS |= SINCE_5

CAPPED = Kind(lambda: Gemma2Config(**LLAMA))
NOT_ON_THE_INTERFACE = {
    "bloom": lambda: BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, **IDS),
    "mpt": lambda: MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=32),
}


def causal_models() -> list[str]:
    return [name for name in MODELS if name not in ("bert", "vit", "modernbert")]


def tiny(kind: str, implementation: str):
    """The same weights for every implementation."""
    model = CAPPED if kind == "gemma2-capped" else MODELS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = model.auto.from_config(model.config(), attn_implementation="eager")
    if implementation == "eager":
        return built.eval()
    config = copy.deepcopy(model.config())
    other = model.auto.from_config(config, attn_implementation=implementation)
    other.load_state_dict(built.state_dict())
    return other.eval()


def build(kind: str, *implementations: str) -> list:
    return [tiny(kind, implementation) for implementation in implementations]
