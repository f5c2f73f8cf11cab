"""A model that `aftermax compare` trained, as a Hugging Face folder.

The lab's decoder is a Llama, with QK-norm a Qwen3, in everything but its attention's weights:
RMSNorm before each branch, SwiGLU, RoPE, tied embeddings. What comes out is one of these, with the
system that `aftermax.hf.load` finds in its config, and a tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from aftermax.hf import convert
from aftermax.hf.door import LEARNED
from aftermax.lab.data.corpus import Corpus
from aftermax.lab.models import Branch, DecoderLM
from aftermax.lab.speakers import byte_letters
from aftermax.lab.trained import Trained
from aftermax.lab.work import Arm, Work

END = "<|end|>"
"""Of a document; the token that ends a text."""


def save(trained: Trained, to: Path) -> PreTrainedModel:
    """Write a trained run as a folder that `aftermax.hf.load` and `AutoTokenizer` read.

    Raises:
        ValueError: for what no such model can be (see `of_decoder`), and for runs of another task.
    """
    run = trained.run
    if run.work.task != "text":
        raise ValueError(
            f"{trained.name} is of the task {run.work.task}, and not a decoder of text"
        )
    corpus, decoder = trained.data(), trained.model()
    assert isinstance(corpus, Corpus)
    assert isinstance(decoder, DecoderLM)
    model = of_decoder(decoder, run.work, run.work.arm(run.system), corpus.symbols.end)
    model.save_pretrained(to)
    tokenizer_of(corpus).save_pretrained(to)
    return model


def of_decoder(decoder: DecoderLM, work: Work, arm: Arm, end: int) -> PreTrainedModel:
    """The same function of tokens, as a model of transformers.

    LayerScale becomes part of the projections that it follows.

    Raises:
        ValueError: for positions other than RoPE, norms after the branches, and systems that differ
            from layer to layer or from their catalogue entry.
    """
    systems = {repr(attend.system) for attend in decoder.attentions}
    plain = {repr(arm.system_of(0, 1, work.lengths[-1])), repr(arm.entry.system)}
    problems = {
        f"its positions are {arm.positions}, and these models have RoPE": arm.positions != "rope",
        "it has norms after its branches": arm.hybrid_norm,
        "its heads have a gate": arm.gated,
        "its system is another in each layer": len(systems) > 1 or len(plain) > 1,
    }
    if any(problems.values()):
        told = "; ".join(problem for problem, there in problems.items() if there)
        raise ValueError(f"{arm.name} is no Llama and no Qwen3: {told}")
    config = _config(decoder, work, arm, end)
    kind: Any = Qwen3ForCausalLM if arm.qk_norm else LlamaForCausalLM
    model = kind._from_config(config, attn_implementation="sdpa")
    convert(model, arm.entry.name)
    weights = _weights(decoder)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    lost = [name for name in (*missing, *unexpected) if name != "lm_head.weight"]  # it is tied
    if lost:
        raise ValueError(f"{arm.name}: {', '.join(lost)} have no place in a {kind.__name__}")
    model.tie_weights()
    return model.eval()


def _config(decoder: DecoderLM, work: Work, arm: Arm, end: int) -> Any:
    attend = decoder.attentions[0]
    kind = Qwen3Config if arm.qk_norm else LlamaConfig
    return kind(
        vocab_size=decoder.embed.num_embeddings,
        hidden_size=work.width,
        intermediate_size=decoder.blocks[0][1].layer.to_out.in_features,  # type: ignore[index]
        num_hidden_layers=work.layers,
        num_attention_heads=attend.heads,
        num_key_value_heads=attend.kv_heads,
        head_dim=attend.head_dim,
        max_position_embeddings=max(work.lengths),
        rms_norm_eps=torch.finfo(torch.float32).eps,  # torch's own default
        tie_word_embeddings=True,
        bos_token_id=end,  # a document follows the end of another
        eos_token_id=end,
        pad_token_id=end,
    )


def _weights(decoder: DecoderLM) -> dict[str, Tensor]:
    """By the names of transformers."""
    found = {
        "model.embed_tokens.weight": decoder.embed.weight,
        "model.norm.weight": decoder.norm.weight,
    }
    for layer, block in enumerate(decoder.blocks):
        attention, feed = block[0], block[1]  # type: ignore[index]
        attend, swiglu, at = attention.layer, feed.layer, f"model.layers.{layer}"
        gate, up = swiglu.gate_and_up.weight.chunk(2)
        found |= {
            f"{at}.input_layernorm.weight": attention.before.weight,
            f"{at}.self_attn.q_proj.weight": attend.to_query.weight,
            f"{at}.self_attn.k_proj.weight": attend.to_key.weight,
            f"{at}.self_attn.v_proj.weight": attend.to_value.weight,
            f"{at}.self_attn.o_proj.weight": _scaled(attend.to_out, attention),
            f"{at}.post_attention_layernorm.weight": feed.before.weight,
            f"{at}.mlp.gate_proj.weight": gate,
            f"{at}.mlp.up_proj.weight": up,
            f"{at}.mlp.down_proj.weight": _scaled(swiglu.to_out, feed),
        }
        for name in ("query", "key"):
            norm = getattr(attend, f"{name}_norm")
            if not isinstance(norm, nn.Identity):
                found[f"{at}.self_attn.{name[0]}_norm.weight"] = norm.weight
        for name, learned in attend.learned.items():
            found[f"{at}.self_attn.{LEARNED}.{name}"] = learned
    return {name: x.detach() for name, x in found.items()}


def _scaled(last: nn.Linear, branch: Branch) -> Tensor:
    return last.weight if branch.scale is None else branch.scale[:, None] * last.weight


def tokenizer_of(corpus: Corpus) -> PreTrainedTokenizerFast:
    """The corpus's BPE, or its bytes, with the end of a document as the token that ends a text."""
    file = corpus.folder / "tokenizer.json"
    if file.exists():
        tokenizer = Tokenizer.from_file(str(file))
    else:
        tokenizer = Tokenizer(models.BPE(vocab=byte_letters(), merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore
    tokenizer.add_special_tokens([END])
    if tokenizer.token_to_id(END) != corpus.symbols.end:
        raise ValueError(f"{corpus.folder}: the tokenizer has another size than the tokens")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )
