"""Decoding of a small Llama from a state of one size, against all keys and values.

    python benchmarks/hf_decode.py --save docs/results/hf_decode.json

After a prompt of 100 and of 8,000 tokens, the time of one token more, and the bytes of the cache.
Contenders: softmax on transformers' sdpa and through aftermax's door, both with all keys and
values; linear attention (elu + 1) through the door with all keys, and with its state alone
(`convert(..., cache="recurrent")`).

The wide shape of `benchmarks/hf.py` (12 layers of 384, six query heads on two key heads of 64), and
the same with six key heads. Each round is 16 tokens, by which the caches of keys grow; one
sequence, one thread, thread time, one process, interleaved in shuffled order; ratios are medians
within rounds. Weights are random: time does not hang on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import transformers
from interleaved import Record, need_kernels, options_parser, ratio, time_rounds
from rich.console import Console
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from aftermax import hf

SECTIONS = ("decode",)
POSITIONS = (100, 8000)
NEW = 16
STATE = "linear, a state"
VOCABULARY = 8192
CACHE = "cache" if int(transformers.__version__.split(".")[0]) >= 5 else "past_key_values"


def main() -> None:
    parser = options_parser(__doc__, SECTIONS)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    need_kernels()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    record, console = Record(options.save), Console()
    record.results["transformers"] = transformers.__version__
    for kv_heads in (2, 6):
        models = contenders(kv_heads)
        for position in POSITIONS:
            line = {"kv_heads": kv_heads, "position": position}
            line["parameters"] = models[STATE].num_parameters()
            line |= measured(models, position, options.rounds)
            record.add("decode", line, ("kv_heads", "position"))
            console.print(line)


def contenders(kv_heads: int) -> dict[str, torch.nn.Module]:
    def build():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=12, num_attention_heads=6,
            num_key_value_heads=kv_heads, intermediate_size=1024, tie_word_embeddings=True,
            max_position_embeddings=2 * POSITIONS[-1],
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()

    return {
        "sdpa": build(),
        "softmax, all keys": hf.convert(build(), "softmax"),
        "linear, all keys": hf.convert(build(), "linear"),
        STATE: hf.convert(build(), "linear", cache="recurrent"),
    }


@torch.no_grad()
def measured(models: dict, position: int, rounds: int) -> dict:
    prompt = torch.randint(VOCABULARY, (1, position), generator=torch.Generator().manual_seed(0))
    held, runs = {}, {}
    for name, model in models.items():
        cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
        held[name] = size(cache)
        runs[name] = decoding(model, cache)
    seconds = time_rounds(runs, rounds, clock=time.thread_time)
    return {
        "cache bytes": held,
        "tokens per second": {n: NEW / sorted(s)[len(s) // 2] for n, s in seconds.items()},
        "sdpa over": {n: ratio(seconds["sdpa"], s) for n, s in seconds.items() if n != "sdpa"},
    }


def size(cache: DynamicCache) -> int:
    return sum(
        layer.bytes if hasattr(layer, "bytes") else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
    )


def decoding(model, cache: DynamicCache) -> Callable[[], None]:
    token = torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def run() -> None:
        for _ in range(NEW):
            model(input_ids=token, use_cache=True, **{CACHE: cache})

    return run


if __name__ == "__main__":
    main()
