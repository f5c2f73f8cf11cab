"""A vision transformer for several tasks, with experts in every other layer: M3ViT's shape.

    Liang et al., "M3ViT", arXiv 2210.14793, and Sarkar et al., "Edge-MoE", arXiv 2305.18691

Patches and a class token, learned places, pre-norm blocks (LayerNorm, eps 1e-6, exact GELU)::

    x <- x + attention(norm(x))
    x <- x + feed(norm(x))        feed: an MLP in layers 0, 2, ..; experts in layers 1, 3, ..

A task is a gate in each layer of experts, and a head. All else is shared, and the tower runs once
for each task that is asked for. Published are 12 layers of width 192 with 3 heads, MLPs of 768 and
16 experts of 384, the best two for each token, on 129 tokens (an image of 128 x 256).

The authors' tower ends in heads of its own for each data set (a decoder of convolutions for dense
tasks). Here every head is one matrix after a last norm, so that what is compared is the tower.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax.modules import Attention, GatedAttention
from aftermax.moe import Experts, Routing
from aftermax.weights import RowMap, Softmax

EPS = 1e-6
"""Of every LayerNorm."""


@dataclass(frozen=True)
class Target:
    """What a task asks for: one answer for an image, or one for each of its pixels.

    Args:
        name: of the task.
        outputs: logits of an answer; 1 is a yes or no.
        dense: for each pixel.
    """

    name: str
    outputs: int
    dense: bool = False


@dataclass(frozen=True)
class Shape:
    """The sizes of the model.

    Args:
        image: height and width in pixels, multiples of `patch`.
        patch: side in pixels.
        channels: of the image.
        width: of a token, D.
        layers, heads: of the tower, and of attention.
        hidden: of the MLPs, H.
        odd_hidden: of each expert in the odd layers, or of the MLPs there where `experts` is 0.
        experts: E, in the odd layers; 0 = none.
        top_k: experts of a token, k.

    >>> M3VIT.tokens, M3VIT.flops(Target("class", 10)) / 1e9
    (129, 1.565442816)
    """

    image: tuple[int, int]
    patch: int
    channels: int
    width: int
    layers: int
    heads: int
    hidden: int
    odd_hidden: int
    experts: int = 16
    top_k: int = 2

    def __post_init__(self):
        if self.patch < 1 or any(side < 1 or side % self.patch for side in self.image):
            raise ValueError(f"patch must divide the image's sides, got {self.patch}, {self.image}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """T: the patches, and the class token before them."""
        return self.patches + 1

    def flops(self, target: Target, linear: bool = False) -> int:
        """Active FLOPs of an image and a task: a multiplication and an addition are two.

        Products of matrices alone, as `torch.utils.flop_counter` counts, with N patches, T = N + 1
        tokens, p^2 pixels in a patch and d = D / heads::

            patches         2 N C p^2 D
            each layer      8 T D^2 + 4 T^2 D    (4 T D d instead of 4 T^2 D of a linear system)
            each MLP        4 T D H
            each experts    2 T D E + 4 k T D H  (the gate, and what it chose)
            head            2 D outputs, or 2 N D p^2 outputs

        Args:
            target: of the task.
            linear: attention keeps a state of d x d for each head in place of T x T weights. A
                system of wider features (cosFormer's are twice as many) takes more than is counted.
        """
        tokens, d, area = self.tokens, self.width, self.patch**2
        mixing = 4 * tokens * d * (d // self.heads if linear else tokens)
        odd = self.layers // 2
        chosen = self.top_k if self.experts else 1
        head = 2 * d * target.outputs
        return (
            2 * self.patches * self.channels * area * d
            + self.layers * (8 * tokens * d * d + mixing)
            + (self.layers - odd) * 4 * tokens * d * self.hidden
            + odd * (2 * tokens * d * self.experts + chosen * 4 * tokens * d * self.odd_hidden)
            + (self.patches * area * head if target.dense else head)
        )


M3VIT = Shape((128, 256), 16, 3, width=192, layers=12, heads=3, hidden=768, odd_hidden=384)
"""Edge-MoE's, as released."""


class MLP(nn.Module):
    """W2 gelu(W1 x + b1) + b2, with the exact gelu."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.inner, self.to_out = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(F.gelu(self.inner(x)))


class Block(nn.Module):
    """Attention and feed-forward, each added to what came in."""

    def __init__(self, width: int, attend: nn.Module, feed: MLP | Experts):
        super().__init__()
        self.before_attend, self.attend = nn.LayerNorm(width, eps=EPS), attend
        self.before_feed, self.feed = nn.LayerNorm(width, eps=EPS), feed

    def forward(self, x: Tensor, task: int | Tensor) -> tuple[Tensor, Routing | None]:
        x = x + self.attend(self.before_attend(x))
        fed = self.before_feed(x)
        if isinstance(self.feed, Experts):
            out, routing = self.feed(fed, task, return_routing=True)
            return x + out, routing
        return x + self.feed(fed), None


class MultiTaskVisionTransformer(nn.Module):
    """One tower, a gate and a head for each task.

    Args:
        shape: its sizes.
        targets: of the tasks, in the order of their gates.
        weights: the attention of a layer: a row map or a `System`, or a function of the layer's
            number that gives one.
        qk_norm: as in `aftermax.Attention`. The published model has none.
        gated: `aftermax.GatedAttention` in place of `Attention`.
        seed: of the weights. A matrix's numbers hang on seed and name alone, so that models which
            share it start alike. Linear layers begin as ViT's, normal(0, 0.02), smaller where a
            branch ends; experts and gates as `Experts` says: they are weighted by about 1/E at the
            start, and would hardly learn from numbers as small. Places begin at 0.3, about what
            a patch is: at ViT's 0.02 a place is lost beside its patch, and hundreds of steps pass
            before digits are told apart.

    Attention has biases, as published, sees all tokens and knows of no places but those added to
    the patches.

    >>> shape = Shape((8, 8), 4, 1, 16, layers=2, heads=2, hidden=64, odd_hidden=32, experts=4)
    >>> asked = [Target("class", 10), Target("ink", 1, dense=True)]
    >>> model = MultiTaskVisionTransformer(shape, asked)
    >>> images = torch.randn(3, 1, 8, 8)
    >>> model(images, task="class").shape, model(images, task="ink").shape
    (torch.Size([3, 10]), torch.Size([3, 1, 8, 8]))
    >>> logits, [routing] = model(images, task="ink", return_routing=True)
    >>> routing.index.shape  # of the one layer with experts; four patches and the class token
    torch.Size([3, 5, 2])
    """

    def __init__(
        self,
        shape: Shape,
        targets: Sequence[Target],
        weights: Any = Softmax(),  # noqa: B008, a frozen value
        *,
        qk_norm: bool = False,
        gated: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        names = [target.name for target in targets]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"targets need names that differ, got {names}")
        self.shape, self.targets = shape, {target.name: target for target in targets}
        width = shape.width
        self.to_patches = nn.Linear(shape.channels * shape.patch**2, width)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.places = nn.Parameter(torch.empty(1, shape.tokens, width))
        attention = GatedAttention if gated else Attention
        self.blocks = nn.ModuleList(
            Block(
                width,
                attention(
                    width,
                    shape.heads,
                    weights=_of_layer(weights, layer),
                    positions="none",
                    causal=False,
                    qk_norm=qk_norm,
                    bias=True,
                ),
                self._feed(layer),
            )
            for layer in range(shape.layers)
        )
        self.norm = nn.LayerNorm(width, eps=EPS)
        area = shape.patch**2
        self.heads = nn.ModuleDict(
            {t.name: nn.Linear(width, t.outputs * (area if t.dense else 1)) for t in targets}
        )
        self._initialise(seed)

    def _feed(self, layer: int) -> MLP | Experts:
        shape = self.shape
        if layer % 2 == 0:
            return MLP(shape.width, shape.hidden)
        if not shape.experts:
            return MLP(shape.width, shape.odd_hidden)
        return Experts(
            shape.width, shape.odd_hidden, shape.experts, shape.top_k, tasks=len(self.targets)
        )

    def _initialise(self, seed: int) -> None:
        def drawn(name: str) -> int:
            return zlib.crc32(f"{seed} {name}".encode())

        for name, part in self.named_modules():
            if isinstance(part, nn.Linear):
                ends = "to_out" in name
                std = 0.02 / (2 * self.shape.layers) ** 0.5 if ends else 0.02
                generator = torch.Generator().manual_seed(drawn(name))
                nn.init.normal_(part.weight, std=std, generator=generator)
                if part.bias is not None and "gate" not in name:  # a gate's opens it
                    nn.init.zeros_(part.bias)
            elif isinstance(part, Experts):
                with torch.random.fork_rng([]):
                    torch.manual_seed(drawn(name))
                    part.reset_parameters()
        for name, std in {"class_token": 0.02, "places": 0.3}.items():
            generator = torch.Generator().manual_seed(drawn(name))
            nn.init.normal_(getattr(self, name), std=std, generator=generator)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, in the order of the gates."""
        return tuple(self.targets)

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, h, w) images -> (B, T, width): the class token, then patches row by row, placed.

        A patch is read channel by channel, each row by row.
        """
        shape, side = self.shape, self.shape.patch
        if images.shape[1:] != (shape.channels, *shape.image):
            raise ValueError(
                f"images must be (B, {shape.channels}, {shape.image[0]}, {shape.image[1]}), "
                f"got {tuple(images.shape)}"
            )
        cut = images.unflatten(3, (-1, side)).unflatten(
            2, (-1, side)
        )  # (B, C, rows, s, columns, s)
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        token = self.class_token.expand(len(images), -1, -1)
        return torch.cat([token, self.to_patches(patches)], 1) + self.places

    def tower(self, images: Tensor, task: str | int) -> tuple[Tensor, list[Routing]]:
        """(B, C, h, w) -> (B, T, width) after the last norm, and the routing of each layer that has
        experts."""
        return self._through(self.embed(images), self._number(task))

    def _through(self, x: Tensor, task: int | Tensor) -> tuple[Tensor, list[Routing]]:
        routings = []
        for block in self.blocks:
            x, routing = block(x, task)
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings

    def forward(
        self, images: Tensor, task: str | int, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        """The answers of one task.

        Args:
            images: (B, channels, height, width), floating point.
            task: its name, or its place among the targets.
            return_routing: also the `Routing` of each layer that has experts.

        Returns:
            logits (B, outputs), of the class token; or (B, outputs, height, width) where the target
            is dense: each patch gives those of its own pixels.

        Raises:
            ValueError: for images of another shape, or a task that there is not.
        """
        tokens, routings = self.tower(images, task)
        logits = self._answer(tokens, self.tasks[self._number(task)])
        return (logits, routings) if return_routing else logits

    def ask_all(self, images: Tensor) -> dict[str, tuple[Tensor, list[Routing]]]:
        """Logits and routings of every task, as `forward` gives them, in one pass.

        With experts the tower has each image once for each task. Without them it is the same for
        all tasks, and has it once.
        """
        x, tasks = self.embed(images), self.tasks
        if not self.experts:
            tokens, _ = self._through(x, 0)
            return {task: (self._answer(tokens, task), []) for task in tasks}
        numbers = torch.arange(len(tasks), device=x.device).repeat_interleave(len(x))
        tokens, routings = self._through(x.repeat(len(tasks), 1, 1), numbers)
        parts = {}
        for number, task in enumerate(tasks):
            own = slice(number * len(x), (number + 1) * len(x))
            parts[task] = self._answer(tokens[own], task), [_of(r, own) for r in routings]
        return parts

    def _answer(self, tokens: Tensor, task: str) -> Tensor:
        target, head = self.targets[task], self.heads[task]
        if target.dense:
            side = self.shape.patch
            cut = head(tokens[:, 1:]).unflatten(2, (target.outputs, side, side))
            cut = cut.unflatten(1, self.shape.grid)  # (B, rows, columns, outputs, side, side)
            return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return head(tokens[:, 0])

    def _number(self, task: str | int) -> int:
        tasks = self.tasks
        if task in tasks:
            return tasks.index(task)  # type: ignore[arg-type]
        if isinstance(task, int) and 0 <= task < len(tasks):
            return task
        raise ValueError(f"task must be one of {', '.join(tasks)}, or its number, got {task!r}")

    @property
    def experts(self) -> list[Experts]:
        """Of the layers that have some."""
        return [block.feed for block in self.blocks if isinstance(block.feed, Experts)]  # type: ignore[misc]


def _of(routing: Routing, images: slice) -> Routing:
    parts = (routing.weights, routing.index, routing.probabilities, routing.logits)
    return Routing(*(part[images] for part in parts))


def _of_layer(weights: Any, layer: int) -> Any:
    """A function of the layer's number is no system, and a system may be callable."""
    return weights if isinstance(weights, RowMap) or hasattr(weights, "attend") else weights(layer)
