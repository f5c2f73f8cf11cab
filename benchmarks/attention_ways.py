"""What stands against each other in attention.py: the shape of a call, and the ways to run it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from interleaved import Contenders
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import aftermax
from aftermax import Visible
from aftermax.scores import cosine
from aftermax.visible import Rows
from aftermax.weights.softmax import distance_scale_and_shift

Way = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query, key, value) -> out."""


@dataclass(frozen=True)
class Shape:
    tokens: int
    queries: int | None = None  # as many as tokens
    heads: int = 8
    kv_heads: int = 8
    width: int = 64
    dtype: torch.dtype = torch.float32
    causal: bool = False
    backward: bool = False

    @property
    def operations(self) -> float:
        forward = 4 * self.heads * (self.queries or self.tokens) * self.tokens * self.width
        return forward * (3.5 if self.backward else 1) * (0.5 if self.causal else 1)

    @property
    def words(self) -> str:
        """float32, forward and backward, causal"""
        words = [str(self.dtype).removeprefix("torch."), "forward"]
        words[1] += " and backward" if self.backward else ""
        if self.queries is None:
            words.append("causal" if self.causal else "full")
        return ", ".join(words)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        query, key, value = (
            torch.randn(1, heads, count, self.width).to(self.dtype).requires_grad_(self.backward)
            for heads, count in (
                (self.heads, self.queries or self.tokens),
                (self.kv_heads, self.tokens),
                (self.kv_heads, self.tokens),
            )
        )
        return query, key, value

    def contenders(self, ways: dict[str, Way]) -> Contenders:
        """The ways on the same inputs; with a backward pass where one is asked for."""
        inputs = self.inputs()
        grad = torch.randn_like(inputs[0])

        def run(way: Way) -> Callable[[], object]:
            if not self.backward:
                return lambda: way(*inputs)
            return lambda: torch.autograd.grad(way(*inputs), inputs, grad)

        return {name: run(way) for name, way in ways.items()}


# ---- ways --------------------------------------------------------------------------------------


def ours(name: str, shape: Shape) -> Way:
    """The kernels; a call that they cannot do raises."""
    return lambda q, k, v: aftermax.attention(
        q,
        k,
        v,
        weights=aftermax.find(name).system,
        is_causal=shape.causal,
        enable_gqa=shape.heads != shape.kv_heads,
        impl="cpu",
    )


def sdpa(shape: Shape) -> dict[str, Way]:
    """torch's own; heads that share keys also with the keys repeated, which may be faster."""
    group = shape.heads // shape.kv_heads
    attend = F.scaled_dot_product_attention
    if group == 1:
        return {"SDPA": lambda q, k, v: attend(q, k, v, is_causal=shape.causal)}
    return {
        "SDPA, enable_gqa": lambda q, k, v: attend(
            q, k, v, is_causal=shape.causal, enable_gqa=True
        ),
        "SDPA, keys repeated": lambda q, k, v: attend(
            q,
            k.repeat_interleave(group, 1),
            v.repeat_interleave(group, 1),
            is_causal=shape.causal,
        ),
    }


def eager(name: str, shape: Shape) -> Way:
    """The formula on the whole T x T matrix at once: as printed where that is here."""
    return as_printed(name, shape) if name in PRINTED else as_reference(name, shape)


def as_reference(name: str, shape: Shape) -> Way:
    """The reference's formula, which is safe at both ends, and slower for that."""
    system, rows = aftermax.find(name).system, seen(shape.tokens, shape.causal)
    learned = system.learned(shape.heads, shape.width)
    scale = system.scale(shape.width)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = system.prepare(query) * scale @ system.prepare(key).transpose(-1, -2)
        return system.finish(system.weigh(scores, rows, **learned) @ value, **learned)

    return attend


@functools.cache
def seen(tokens: int, causal: bool) -> Rows:
    whole = 0, tokens, (0, tokens)
    return Visible(causal=causal).rows(*whole, torch.device("cpu"), torch.float32)


PRINTED = {"softmax": None, "lssa": None, "lssar": 15}
"""Their power, where they have one."""


def as_printed(name: str, shape: Shape) -> Way:
    """Softmax, LSSA and LSSAR (arXiv 2501.13428) as one would type them in."""
    power, tokens = PRINTED[name], shape.tokens
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    n = torch.arange(1.0, tokens + 1)[:, None] if shape.causal else torch.tensor(float(tokens))
    offset = (n > 3).float()
    scale = math.log(shape.width) * n.log()

    def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2) / shape.width**0.5
        if shape.causal:
            scores = scores.masked_fill(hidden, -math.inf)
        return scores.softmax(-1) @ value

    def softplus(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        f = F.softplus(scale * (query @ key.transpose(-1, -2)))
        if shape.causal:
            f = f.masked_fill(hidden, 0)
        weights = f / f.sum(-1, keepdim=True)
        if power is not None:
            r = (weights * n - offset).relu() ** power
            weights = r / r.sum(-1, keepdim=True)
        return weights @ value

    return softmax if name == "softmax" else softplus


def flex(name: str, tokens: int) -> Way | None:
    """FlexAttention, causal, compiled for that length; None where it cannot say the formula.

    It is a softmax of changed scores. On a CPU it infers only, and returns no logsumexp, which a
    sink could be made of.
    """
    system = aftermax.find(name).system
    log_n = torch.arange(1.0, tokens + 1).log()
    learned = system.learned(8, 64)
    stretch, shift = distance_scale_and_shift(torch.arange(tokens), 10.0, torch.float32)
    changes = {
        "softmax": None,
        "log-n": lambda s, b, h, i, j: s * learned["s"][h] * log_n[i],
        "cosine": lambda s, b, h, i, j: s * log_n[i],
        "scale-invariant": lambda s, b, h, i, j: s * stretch[i - j] + shift[i - j],
    }
    if name not in changes:
        return None
    past = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device="cpu")
    prepare = cosine if name == "cosine" else lambda x: x

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = flex_attention(
            prepare(query),
            prepare(key),
            value,
            score_mod=changes[name],
            block_mask=past,
            scale=system.scale(query.shape[-1]),
        )
        assert isinstance(out, Tensor)
        return out

    return torch.compile(attend, dynamic=False, fullgraph=True)
