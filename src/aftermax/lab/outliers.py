"""The task of outliers: a masked and a causal language model, what stands out in them, 8 bits.

Every window begins with a token of its own, as BERT's and OPT's do; it is the first token that
attention may rest on. The measures are those of Bondarenko et al. (arXiv 2306.12929, and its code).
Over the numbers x of one sequence in one tensor, all tokens and channels alike::

    inf norm   max |x|
    kurtosis   mean((x - mean)^4) / (std^4 + 1e-6), with std unbiased: 3 for a normal law

each a mean over sequences. The tensors are, in every layer, what attention and what the
feed-forward adds to the stream, and the stream after each. Of the inf norm the largest tensor
counts; of the kurtosis the mean over tensors, and the largest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aftermax.lab.data.corpus import Corpus
from aftermax.lab.data.corpus import prepare as prepare_corpus
from aftermax.lab.measure import TOKENS_AT_ONCE, layer_weights
from aftermax.lab.models import DecoderLM, EncoderLM
from aftermax.lab.outliers_work import OutliersWork
from aftermax.lab.quantise import quantised, torchao
from aftermax.lab.store import Row
from aftermax.lab.work import Run

SEPARATORS = "\n.,;:"
"""Characters that end or part something. A token of these alone (and blanks) is a separator, and so
is the end of a document."""
WATCHED = 16
"""Windows whose attention weights are looked at."""
MEMORY_BATCH = 64
"""Windows of the step whose memory is measured."""


def prepare(work: OutliersWork, out: Path) -> Corpus:
    torchao()  # what is missing is said before anything is trained
    return prepare_corpus(
        work.data, work.tokenizer, work.vocabulary, work.context, work.lengths[-1], out
    )


def open_data(folder: Path) -> Corpus:
    return Corpus.open(folder)


def about(corpus: Corpus) -> dict:
    size = sum(len(corpus.tokens(split)) for split in ("train", "tune", "validation"))
    held = torch.from_numpy(corpus.tokens("validation").astype("int64"))
    share = separators(corpus)[held].float().mean().item()
    return {"name": corpus.name, "digest": corpus.digest, "tokens": size, "separators": share}


def told(about: dict) -> str:
    size, share = about["tokens"] / 1e6, about["separators"]
    return f"text: {about['name']}, {size:.1f} million tokens, {share:.0%} separators"


def model(run: Run[OutliersWork], corpus: Corpus) -> DecoderLM:
    build = EncoderLM if run.arm.model == "encoder" else DecoderLM
    return build(run.work, run.arm, Tokens.of(corpus).total)


class Tokens(NamedTuple):
    """Ids of this task: the text's, the end of a document, begin, mask."""

    text: int

    @classmethod
    def of(cls, corpus: Corpus) -> Tokens:
        return cls(corpus.symbols.text)

    @property
    def begin(self) -> int:
        return self.text + 1

    @property
    def mask(self) -> int:
        return self.text + 2

    @property
    def total(self) -> int:
        return self.text + 3


def separators(corpus: Corpus) -> Tensor:
    """bool (ids,): the tokens that are separators."""
    ids = Tokens.of(corpus)
    vocabulary = corpus.folder / "tokenizer.json"
    if vocabulary.exists():
        from tokenizers import Tokenizer

        reader = Tokenizer.from_str(vocabulary.read_text())
        texts = [reader.decode([i]) for i in range(ids.text)]
    else:
        texts = [chr(i) for i in range(ids.text)]
    found = torch.zeros(ids.total, dtype=torch.bool)
    for i, text in enumerate(texts):
        kept = text.strip(" \t")
        found[i] = bool(kept) and set(kept) <= {*SEPARATORS, " ", "\t"}
    found[corpus.symbols.end] = True
    return found


class Asked(NamedTuple):
    """What a model reads, and what it is asked for."""

    inputs: Tensor  # int64 (B, T), the first of each row the begin token
    targets: Tensor  # int64 (B, T)
    scored: Tensor  # bool (B, T)


def asked_of_decoder(tokens: Tensor, ids: Tokens) -> Asked:
    """The next token, of every token."""
    begin = tokens.new_full((len(tokens), 1), ids.begin)
    inputs = torch.cat([begin, tokens[:, :-1]], 1)
    return Asked(inputs, tokens, torch.ones_like(tokens, dtype=torch.bool))


def asked_of_encoder(
    tokens: Tensor, ids: Tokens, share: float, generator: torch.Generator
) -> Asked:
    """A share of the tokens: 80% of them masked, 10% another token, 10% as they are (BERT's)."""
    scored = torch.rand(tokens.shape, generator=generator) < share
    way = torch.rand(tokens.shape, generator=generator)
    other = torch.randint(ids.text, tokens.shape, generator=generator)
    inputs = tokens.masked_fill(scored & (way < 0.8), ids.mask)
    inputs = torch.where(scored & (way >= 0.8) & (way < 0.9), other, inputs)
    return begun(Asked(inputs, tokens, scored), ids)


def begun(asked: Asked, ids: Tokens) -> Asked:
    """With the first token replaced by the begin token, which no one is asked for."""
    inputs, scored = asked.inputs.clone(), asked.scored.clone()
    inputs[:, 0], scored[:, 0] = ids.begin, False
    return Asked(inputs, asked.targets, scored)


def batch(run: Run[OutliersWork], corpus: Corpus, generator: torch.Generator) -> Asked:
    work = run.work
    tokens = corpus.random_windows("train", work.batch, work.context, generator)
    return _asked(run.arm.model == "encoder", work, corpus, tokens, generator)


def _asked(
    encoder: bool, work: OutliersWork, corpus: Corpus, tokens: Tensor, generator: torch.Generator
) -> Asked:
    ids = Tokens.of(corpus)
    if encoder:
        return asked_of_encoder(tokens, ids, work.masked, generator)
    return asked_of_decoder(tokens, ids)


def loss(model: DecoderLM, data: Asked, run: Run[OutliersWork]) -> tuple[Tensor, Tensor]:
    mean = _losses(model, data).mean()
    return mean, mean


def _losses(model: DecoderLM, data: Asked) -> Tensor:
    logits = model.logits(model(data.inputs)[data.scored]).float()
    return F.cross_entropy(logits, data.targets[data.scored], reduction="none")


def held_out(
    encoder: bool, work: OutliersWork, corpus: Corpus, split: str, count: int, length: int
) -> Iterator[tuple[int, Asked]]:
    """(length, what is asked) for each length of the work up to `length`, of the same tokens.

    Scored are a decoder's last half of a context, and what is masked in an encoder's last whole
    one; the masks are the same at every length.
    """
    windows = corpus.held_out_windows(split, count, length)
    whole = _asked(encoder, work, corpus, windows, torch.Generator().manual_seed(0))
    last = work.context - 1 if encoder else work.context // 2
    for at in work.lengths:
        if at > length:
            return
        part = begun(Asked(*(x[:, -at:] for x in whole)), Tokens.of(corpus))
        scored = part.scored.clone()
        scored[:, :-last] = False
        yield at, Asked(part.inputs, part.targets, scored)


@torch.no_grad()
def mean_loss(model: DecoderLM, data: Asked) -> float:
    return torch.cat([_losses(model, part) for part in _parts(data)]).mean().item()


def _parts(data: Asked) -> Iterator[Asked]:
    at_once = max(1, TOKENS_AT_ONCE // data.inputs.shape[1])
    yield from map(Asked._make, zip(*(x.split(at_once) for x in data), strict=True))


def tuning_loss(model: DecoderLM, work: OutliersWork, corpus: Corpus) -> float:
    given = held_out(not model.causal, work, corpus, "tune", 4 * work.windows, work.context)
    return mean_loss(model, next(given)[1])


def evaluate(model: DecoderLM, work: OutliersWork, corpus: Corpus, step: int) -> list[Row]:
    """At every length: the loss in float and in 8 bits, outliers, where attention rests.

    Four bits are beside the papers' eight: a small model that eight do not hurt shows there which
    of two has the harder activations.
    """
    encoder = not model.causal
    in_bits = {
        "w8": quantised(model),
        "w8a8": quantised(model, calibration(encoder, work, corpus)),
        "w4a4": quantised(model, calibration(encoder, work, corpus), bits=4),
    }
    marked, rows = separators(corpus), []
    for length, data in held_out(
        encoder, work, corpus, "validation", work.windows, work.lengths[-1]
    ):
        plain = mean_loss(model, data)
        found = {"loss": plain}
        for name, other in in_bits.items():
            found[f"{name}_loss"] = mean_loss(other, data)
            found[f"{name}_damage"] = found[f"{name}_loss"] - plain
        found |= outliers(model, data)
        last = (length - work.context // 2, length)
        found |= attention_mass(model, data.inputs[:WATCHED], marked, last)
        rows += [Row(step, length, name, value) for name, value in found.items()]
    return rows


def calibration(encoder: bool, work: OutliersWork, corpus: Corpus) -> Iterator[Tensor]:
    """Batches of training text at the training length, the same for every run of a model."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(work.calibration):
        tokens = corpus.random_windows("train", work.batch, work.context, generator)
        yield _asked(encoder, work, corpus, tokens, generator).inputs


def inf_norm(x: Tensor) -> Tensor:
    """(B,) max |x| of each sequence.

    >>> inf_norm(torch.tensor([[[1.0, -3.0], [2.0, 0.0]]]))
    tensor([3.])
    """
    return x.flatten(1).abs().amax(1)


def kurtosis(x: Tensor) -> Tensor:
    """(B,) kurtosis of each sequence, tokens and channels together; 3 for a normal law.

    >>> kurtosis(torch.tensor([[[1.0, -1.0], [1.0, -1.0]]]))  # std unbiased: (1 / (4 / 3))^2
    tensor([0.5625])
    """
    x = x.flatten(1)
    std = x.std(1)
    return (x - x.mean(1, keepdim=True)).pow(4).mean(1) / (std.pow(4) + 1e-6)


@torch.no_grad()
def outliers(model: DecoderLM, data: Asked) -> dict[str, float]:
    """inf_norm, kurtosis, max_kurtosis, and the inf norm of each kind of tensor."""
    norms, tails = defaultdict(list), defaultdict(list)

    def watch(name: str) -> Callable[..., None]:
        def hook(_, __, out: Tensor) -> None:
            norms[name].append(inf_norm(out))
            tails[name].append(kurtosis(out))

        return hook

    hooks = []
    for layer, block in enumerate(model.blocks):
        for kind, branch in zip(("attention", "feed"), block, strict=True):  # type: ignore[call-overload]
            hooks.append(branch.layer.register_forward_hook(watch(f"{kind} {layer}")))
            hooks.append(branch.register_forward_hook(watch(f"stream {layer} {kind}")))
    try:
        for part in _parts(data):
            model(part.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    norm = {name: torch.cat(values).mean().item() for name, values in norms.items()}
    tail = [torch.cat(values).mean().item() for values in tails.values()]
    kinds = {
        f"inf_norm_{kind}": max(value for name, value in norm.items() if name.startswith(kind))
        for kind in ("attention", "feed", "stream")
    }
    overall = {"inf_norm": max(norm.values()), "kurtosis": sum(tail) / len(tail)}
    return overall | {"max_kurtosis": max(tail)} | kinds


@torch.no_grad()
def attention_mass(
    model: DecoderLM, inputs: Tensor, marked: Tensor, rows: tuple[int, int]
) -> dict[str, float]:
    """Where rows of |weights|, made to sum to one, rest: a mean over layers, heads and rows.

    first_mass: on the begin token. separator_mass: on separators, wherever they stand.
    separator_share: what that would be if all visible keys had the same weight. row_mass: what
    |weights| summed to before. top_first_mass: of the head that rests most on the begin token.
    """
    seen = torch.ones(inputs.shape[1], inputs.shape[1])
    seen = (seen.tril() if model.causal else seen)[rows[0] : rows[1]]
    found = defaultdict(list)
    for part in inputs.split(max(1, TOKENS_AT_ONCE // inputs.shape[1])):
        at = marked[part].float()
        uniform = at @ (seen / seen.sum(1, keepdim=True)).T
        for weights in layer_weights(model, part, rows):
            mass = weights.sum(-1)
            share = weights / mass[..., None].clamp_min(1e-30)
            # a row of zeros, which rests nowhere, counts in the means as 0
            found["first_mass"].append(share[..., 0].mean((0, 2)))
            found["separator_mass"].append((share @ at[:, None, :, None])[..., 0].mean((0, 2)))
            found["separator_share"].append(uniform.mean().expand(share.shape[1]))
            found["row_mass"].append(mass.mean((0, 2)))
    if not found:  # no row map
        return {}
    means: dict[str, float] = {name: torch.cat(v).mean().item() for name, v in found.items()}
    return means | {"top_first_mass": torch.cat(found["first_mass"]).max().item()}


def largest_step(run: Run[OutliersWork], model: Any, corpus: Corpus) -> Callable[[], object]:
    """A step of the longest length."""
    work, generator = run.work, torch.Generator().manual_seed(0)
    tokens = corpus.random_windows("train", MEMORY_BATCH, work.lengths[-1], generator)
    data = _asked(run.arm.model == "encoder", work, corpus, tokens, generator)
    return lambda: loss(model, data, run)[0].backward()
