"""RecurFormer's claim, audited: are the heads that look near by those that can be replaced?

    python benchmarks/recurformer.py --models FOLDER --save docs/results/recurformer.json
    python benchmarks/recurformer.py --only smol --smol FOLDER --save docs/results/recurformer.json

Written down before anything was run:

    prediction  Of the KV groups of a model, replace a share by recency ratio: the top (RecurFormer,
                arXiv 2410.12850), random ones, or the bottom. With the same continued training
                recall ends as top >= random >= bottom, and bottom fails: it takes the heads that
                look things up. The same order without any training, where the replacement is a
                sliding window with sinks. The histogram of recency ratios has two humps.

A small decoder of ours (3 layers of 8 heads, 128 wide, RoPE, bytes) learns the standard library's
text and HashHop of one hop and of two (chain of thought) around it, so that answers stand further
back than the window. First 300 steps of short HashHop alone, without which no head that looks
things up forms in this budget; then both at once. Recall is the share of right answers among the
tokens that are asked for; text loss is in nats a byte. Sections:

    base        the models, one for each seed: recall, text loss, recency ratios of all heads
    window      the sliding window in place of heads, not trained
    linear      linear attention in their place, not trained and after continued training
    mamba       a Mamba block in their place, after a distillation of its heads and continued
                training of all weights; the same budget for each, and for the model unchanged
    asked       added after the others had been looked at, no prediction: the ratio over the tokens
                alone that ask, and the sliding window by the ranking that it gives
    smol        SmolLM2-135M: loss on text against the bytes of the cache, windows not trained

FOLDER of --models keeps the trained base models. What the file already holds is not run again.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from interleaved import Record, options_parser
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from aftermax import Cache
from aftermax.hybrid.recency import measure_recency, plan_of
from aftermax.hybrid.replace import distil_heads, replace_heads
from aftermax.lab.data.corpus import Corpus, prepare
from aftermax.lab.data.hashhop import token_problems
from aftermax.lab.models import DecoderLM
from aftermax.lab.work import Work

SECTIONS = ("base", "window", "linear", "mamba", "asked", "smol")
SEEDS = (0, 1, 2)
SHARES = (0.25, 0.5, 0.75)
PICKS = ("top", "random", "bottom")
CONTEXT, WINDOW, SINKS = 128, 16, 4
ASK, HASHES = 256, 32
KINDS = ((8, 1), (5, 2))
"""Chains and hops of the problems."""
SHORTEST = 40
"""Tokens that hold a problem and next to no text."""
ALPHA, DROP_SINK = 16, 1
"""Of the recency ratio."""
WORK = Work(layers=3, width=128, heads=8, context=CONTEXT, multiples=(1,))
SMOL_TOKENS, SMOL_WINDOWS, SMOL_ALPHA, SMOL_WINDOW = 1024, 3, 64, 64
SMOL_DISTIL, SMOL_STEPS, SMOL_TRAIN_TOKENS, SMOL_RATE = 32, 16, 512, 1e-4
RATE, CONTINUED_RATE, DISTIL_RATE = 3e-3, 1e-3, 3e-3


@dataclass(frozen=True)
class Budget:
    """Steps: of HashHop alone, of both, of distillation, of continued training."""

    first: int
    both: int
    distil: int
    continued: int


def main() -> None:
    parser = options_parser(__doc__, SECTIONS)
    parser.add_argument("--models", type=Path, default=Path("recurformer-models"))
    parser.add_argument("--smol", type=Path, help="a Hugging Face folder, or one with a GGUF file")
    parser.add_argument("--budget", type=float, default=1.0, help="factor of all numbers of steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, record = Console(), Record(options.save)
    scale = options.budget
    budget = Budget(*(round(scale * n) for n in (2000, 900, 40, 160)))
    about = {"budget": vars(budget), "context": CONTEXT, "window": WINDOW, "sinks": SINKS}
    if record.results.setdefault("about", about) != about:
        raise SystemExit(f"{options.save} was made with {record.results['about']}: another file")
    corpus = prepare(None, "bytes", 256, CONTEXT + 1, CONTEXT + 1, options.models / "corpus")
    if options.smol is not None and options.only in (None, "smol"):
        smol(options.smol, record, console)
    for seed in SEEDS if options.only != "smol" else ():
        model = base(seed, corpus, options.models, budget, record, console)
        bench = Bench(seed, model, corpus, budget, record, console)
        for section in ("window", "asked", "mamba", "linear"):
            if options.only in (None, section):
                bench.run(section)


# ---- data --------------------------------------------------------------------------------------


def short(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """HashHop alone: 2 to 6 chains of one hop."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    chains = int(torch.randint(2, 7, (1,), generator=generator))
    problems = token_problems(
        64, generator, chains=chains, hops=1, hashes=HASHES, first=ASK + 1, ask=ASK
    )
    return problems.around(torch.zeros(64, 0, dtype=torch.int64))


def mixed(corpus: Corpus, split: str, count: int, generator: torch.Generator, full: float = 1.0):
    """HashHop around text, half of it of one hop and half of two: tokens and what is asked.

    Args:
        full: share of the text that there is room for.
    """
    tokens = round(SHORTEST + full * (CONTEXT + 1 - SHORTEST))
    rows, asked = [], []
    for chains, hops in KINDS:
        problems = token_problems(
            count // 2, generator, chains=chains, hops=hops, hashes=HASHES, first=ASK + 1, ask=ASK,
            chain_of_thought=True,
        )  # fmt: skip
        room = tokens - problems.prompt.shape[1] - problems.completion.shape[1]
        text = corpus.random_windows(split, count // 2, room, generator)
        row, is_asked = problems.around(text)
        rows.append(row)
        asked.append(is_asked)
    return torch.cat(rows), torch.cat(asked)


def losses(model: DecoderLM, tokens: Tensor, asked: Tensor):
    """(of text, of answers, right answers): means over targets, the last a bool of all."""
    logits, target = model.logits(model(tokens[:, :-1])), tokens[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    each, text = each.view(target.shape), target < ASK
    of_text = each[text].mean() if text.any() else each.new_zeros(())
    return of_text, each[asked].mean(), (logits.argmax(-1) == target)[asked]


# ---- training and measuring --------------------------------------------------------------------


def train(
    model: DecoderLM, batches, steps: int, rate: float, warmup: int, until: float = 2.0
) -> float:
    """AdamW, cosine to a tenth; seconds of the processor.

    Args:
        until: share of right answers, smoothed, at which it ends before its time.
    """
    known = 0.0
    start = time.thread_time()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    for step in range(steps):
        fall = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warmup) * fall
        of_text, of_answers, right = losses(model, *batches(step))
        optimiser.zero_grad()
        (of_text + of_answers).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        known += 0.05 * (float(right.float().mean()) - known)
        if step % 100 == 99:
            print(step, float(of_text.detach()), float(of_answers.detach()), known, flush=True)
        if known >= until:
            break
    return time.thread_time() - start


@torch.no_grad()
def score(model: DecoderLM, corpus: Corpus) -> dict[str, float]:
    """On the same 128 held-out problems for all."""
    model.eval()
    tokens, asked = mixed(corpus, "validation", 128, torch.Generator().manual_seed(99))
    of_text, _, right = losses(model, tokens, asked)
    half = int(asked[:64].sum())
    model.train()
    return {
        "text": float(of_text),
        "recall": float(right.float().mean()),
        "recall_1": float(right[:half].float().mean()),
        "recall_2": float(right[half:].float().mean()),
    }


def base(
    seed: int, corpus: Corpus, folder: Path, budget: Budget, record: Record, console: Console
) -> DecoderLM:
    """The model of this seed, trained or read; and its line."""
    torch.manual_seed(seed)
    model = DecoderLM(WORK, WORK.arm("softmax"), ASK + 1 + HASHES)
    file = folder / f"base-{seed}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
    else:
        seconds = train(model, lambda step: short(seed, step), budget.first, RATE, 50, 0.9)
        seconds += train(
            model,
            lambda step: both(corpus, seed, step, min(1.0, step / (0.3 * budget.both))),
            budget.both,
            RATE,
            50,
        )
        save_file(model.state_dict(), file)
        console.print(f"base {seed}: {seconds:.0f} s")
    if seed not in [line["seed"] for line in record.lines("base")]:
        recency = measure(model, corpus)
        line = {"seed": seed, **score(model, corpus)}
        line |= {
            "recency": recency.mean.tolist(),
            "recency_sd": recency.sd.tolist(),
            "uniform": recency.baseline,
        }
        record.add("base", line, ("seed",))
        console.print(f"base {seed} {line}")
    return model


def both(corpus: Corpus, seed: int, step: int, full: float = 1.0):
    generator = torch.Generator().manual_seed(1_000_003 * seed + 100_000 + step)
    return mixed(corpus, "train", 24, generator, full)


def measure(model: DecoderLM, corpus: Corpus, where_asked: bool = False):
    """Recency over the split that is kept for choosing."""
    tokens, asked = mixed(corpus, "tune", 64, torch.Generator().manual_seed(7))
    only = [asked] if where_asked else None
    return measure_recency(model, [tokens[:, :-1]], ALPHA, drop_sink=DROP_SINK, asked=only)


# ---- the ablation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """The base model of a seed, and all that is done to copies of it."""

    seed: int
    model: DecoderLM
    corpus: Corpus
    budget: Budget
    record: Record
    console: Console

    def run(self, section: str) -> None:
        if section == "mamba":
            self.one(section, 0.0, "none")
        if section == "asked":
            self.ratios_where_asked()
        for share in SHARES:
            for pick in PICKS:
                self.one(section, share, pick)

    def ratios_where_asked(self) -> None:
        if self.seed not in [line["seed"] for line in self.record.lines("base_asked")]:
            ratios = measure(self.model, self.corpus, where_asked=True).mean.tolist()
            self.record.add("base_asked", {"seed": self.seed, "recency": ratios}, ("seed",))

    def ratios(self, section: str) -> Tensor:
        lines = self.record.lines("base_asked" if section == "asked" else "base")
        return torch.tensor(next(x["recency"] for x in lines if x["seed"] == self.seed))

    def one(self, section: str, share: float, pick: str) -> None:
        """A copy with these heads replaced: scored as it is, taught, trained on, scored again."""
        of = {"seed": self.seed, "share": share, "pick": pick}
        if any(of.items() <= line.items() for line in self.record.lines(section)):
            return
        start = time.thread_time()
        pupil = copy.deepcopy(self.model)
        line: dict = of
        if pick != "none":
            plan = plan_of(self.ratios(section), share, pick=pick, seed=self.seed)
            torch.manual_seed(self.seed)
            with_ = "window" if section == "asked" else section
            replace_heads(pupil, plan, with_, sinks=SINKS, window=WINDOW)
            line |= {"replaced": plan.replaced, "untrained": score(pupil, self.corpus)}
        line["cache"] = cache_bytes(pupil)
        if section == "mamba" and pick != "none":
            batches = [self.batch(-1 - n)[0][:, :-1] for n in range(self.budget.distil)]
            errors = distil_heads(pupil, self.model, batches, learning_rate=DISTIL_RATE)
            means = [sum(error.values()) / len(error) for error in errors]
            line |= {"missed": [means[0], means[-1]], "distilled": score(pupil, self.corpus)}
        if section == "mamba" or (section == "linear" and share == 0.5):
            train(pupil, self.batch, self.budget.continued, CONTINUED_RATE, 20)
            line["trained"] = score(pupil, self.corpus)
        line["seconds"] = time.thread_time() - start
        self.record.add(section, line, tuple(of))
        told = {k: f"{v['recall']:.3f}" for k, v in line.items() if isinstance(v, dict)}
        self.console.print(f"{section} {of} {told} {line['seconds']:.0f} s")

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Text and problems that no base model has seen."""
        return both(self.corpus, self.seed, 50_000 + step)


# ---- SmolLM2 -----------------------------------------------------------------------------------


def smol(folder: Path, record: Record, console: Console) -> None:
    """The same order in a pretrained model: windows without training, then Mamba with a little."""
    from conversion import Text, open_model  # which needs transformers

    from aftermax import hf

    model, tokenizer = open_model(folder)
    text = Text(tokenizer, None)
    kv_heads, start = model.config.num_key_value_heads, time.thread_time()
    if not record.lines("smol"):
        calibration = text.windows("tune", 4, SMOL_TOKENS)
        recency = hf.measure_recency(model, calibration, SMOL_ALPHA, drop_sink=DROP_SINK)
        plain = hf.measure_recency(model, calibration[:1], SMOL_ALPHA)
        line = {"with": "nothing", "share": 0.0, "pick": "none", **smol_score(model, text)}
        line |= {"recency": recency.mean.tolist(), "recency_sd": recency.sd.tolist()}
        line |= {"uniform": recency.baseline, "recency_with_sink": plain.mean.tolist()}
        line |= {"seconds": time.thread_time() - start}
        record.add("smol", line, ("with", "share", "pick"))
    ratios = torch.tensor(record.lines("smol")[0]["recency"])
    asked = [("window", share, pick) for share in SHARES for pick in PICKS]
    asked += [("window", 1.0, "top"), ("mamba", 0.25, "top"), ("mamba", 0.25, "bottom")]
    asked += [("none", 0.0, "none"), ("mamba", 0.25, "random")]
    for with_, share, pick in asked:
        of = {"with": with_, "share": share, "pick": pick}
        if any(of.items() <= line.items() for line in record.lines("smol")):
            continue
        start, line, pupil = time.thread_time(), dict(of), copy.deepcopy(model)
        if with_ != "none":
            plan = plan_of(ratios, share, kv_heads=kv_heads, pick=pick)
            torch.manual_seed(0)
            sizes = {"sinks": SINKS, "window": SMOL_WINDOW}
            hf.replace_heads(pupil, plan, with_, **sizes)
            line |= {"replaced": plan.replaced, **smol_score(pupil, text)}
        if with_ == "mamba":
            batches = text.drawn("train", SMOL_DISTIL, SMOL_TRAIN_TOKENS, 0)
            errors = hf.distil_heads(pupil, model, batches, learning_rate=DISTIL_RATE)
            means = [sum(error.values()) / len(error) for error in errors]
            line |= {"missed": [means[0], means[-1]], "distilled": smol_score(pupil, text)["loss"]}
        if with_ in ("mamba", "none"):
            smol_train(pupil, text.drawn("train", SMOL_STEPS, SMOL_TRAIN_TOKENS, 1))
            line["trained"] = smol_score(pupil, text)["loss"]
        line["seconds"] = time.thread_time() - start
        record.add("smol", line, tuple(of))
        console.print({k: v for k, v in line.items() if k != "replaced"})


def smol_train(model, batches: list[Tensor]) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=SMOL_RATE, weight_decay=0.0)
    model.train()
    for step, tokens in enumerate(batches):
        fall = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        for group in optimiser.param_groups:
            group["lr"] = SMOL_RATE * min(1.0, (step + 1) / 5) * fall
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


@torch.no_grad()
def smol_score(model, text) -> dict[str, float]:
    """Nats a token on held-out text, and the bytes of the cache after a window of it."""
    total, held, windows = 0.0, 0, text.windows("validation", SMOL_WINDOWS, SMOL_TOKENS)
    for window in windows:
        out = model(input_ids=window, use_cache=True)
        total += float(F.cross_entropy(out.logits[0, :-1], window[0, 1:]))
        held = sum(_bytes_of(layer) for layer in out.past_key_values.layers)
    return {"loss": total / len(windows), "cache": held}


def _bytes_of(layer) -> int:
    held = getattr(layer, "bytes", None)
    return held if held is not None else layer.keys.nbytes + layer.values.nbytes


@torch.no_grad()
def cache_bytes(model: DecoderLM) -> int:
    """What the model holds after one sequence of the length of the context."""
    cache = Cache(model)
    cache.append(torch.zeros(1, CONTEXT, dtype=torch.int64))
    return cache.bytes


if __name__ == "__main__":
    main()
