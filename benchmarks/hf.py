"""A Llama of 22 to 25 million parameters through the door, against transformers' own attention.

    python benchmarks/hf.py --save docs/results/hf.json

Sections:
    step      forward and backward over 2,048 tokens
    prefill   2,048 tokens in, one token out
    generate  2,048 tokens in, 64 tokens out, greedy, with a dynamic cache

Contenders: eager, sdpa (what transformers picks), flex is left out (it has no gradient on CPU), and
softmax and LSSAR through aftermax's door; in `step` also softmax with `causal_lm_loss` in place of
transformers' loss. Two shapes: wide (12 layers of 384) and deep (24 of 256, the shape that
MobileLLM, arXiv 2402.14905, finds better at such sizes); head width 64, three query heads (wide) or
two (deep) to a key head, vocabulary 8,192, tied.

One thread, thread time, one process, interleaved in shuffled order; ratios are medians within
rounds. Weights are random: time does not hang on them.
"""

from __future__ import annotations

import time

import torch
import transformers
from interleaved import Record, need_kernels, options_parser, ratio, time_rounds
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from aftermax import hf

SECTIONS = ("step", "prefill", "generate")
SHAPES = {
    "wide": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
             "num_key_value_heads": 2, "intermediate_size": 1024},
    "deep": {"hidden_size": 256, "num_hidden_layers": 24, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 768},
}  # fmt: skip
TOKENS, NEW = 2048, 64
NAMES = ("eager", "sdpa", "aftermax-softmax", "aftermax-lssar")
WITH_LOSS = "aftermax-softmax and loss"


def main() -> None:
    parser = options_parser(__doc__, SECTIONS)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    need_kernels()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    hf.register()
    record, console = Record(options.save), Console()
    record.results["transformers"] = transformers.__version__
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            models = {name: build(shape, name, dtype) for name in NAMES}
            models[WITH_LOSS] = build(shape, "aftermax-softmax", dtype)
            models[WITH_LOSS].loss_function = hf.causal_lm_loss
            for section in SECTIONS if options.only is None else (options.only,):
                line = {"shape": shape, "dtype": str(dtype).removeprefix("torch.")}
                line["parameters"] = models["sdpa"].num_parameters()
                line |= measured(section, models, options.rounds)
                record.add(section, line, ("shape", "dtype"))
                console.print(section, line)


def build(shape: str, name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, max_position_embeddings=4096, tie_word_embeddings=True, **SHAPES[shape]
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=dtype)


def measured(section: str, models: dict, rounds: int) -> dict:
    tokens = torch.randint(8192, (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def step(model):
        model.train()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad()

    def generate(model, count):
        model.eval()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )

    run = {
        "step": step,
        "prefill": lambda model: generate(model, 1),
        "generate": lambda model: generate(model, NEW),
    }[section]
    contenders = {
        name: lambda model=model: run(model)
        for name, model in models.items()
        if section == "step" or name != WITH_LOSS
    }
    seconds = time_rounds(contenders, rounds, clock=time.thread_time)
    return {
        "seconds": {name: sorted(taken)[len(taken) // 2] for name, taken in seconds.items()},
        "sdpa over": {
            name: ratio(seconds["sdpa"], taken) for name, taken in seconds.items() if name != "sdpa"
        },
    }


if __name__ == "__main__":
    main()
