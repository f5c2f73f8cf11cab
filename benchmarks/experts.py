"""A layer of experts against what else walks over them, and the bytes of weights that each reads.

    make bench-experts
    python benchmarks/experts.py --save docs/results/experts_speed.json

Sections:
    speed   a layer, forward and with the backward pass, at three sizes (that of Edge-MoE, ViT-S and
            ViT-B with 16 experts), in float32 and bfloat16, against
              grouped_mm  torch.nn.functional.grouped_mm on sorted tokens
              loop        over the experts that were chosen, with index_add_, as Mixtral in
                          Hugging Face
              dense       every expert on every token, in two batched products
              token       one (token, choice) after another
              reference   our own layer in plain torch
    bytes   of the weights that each order reads: counted from the same routing, which is no
            measurement of the traffic
    lengths the same against grouped_mm by the number of tokens, ViT-S
    kept    with the backward pass against grouped_mm, where the allocator keeps its memory: glibc
            maps large gradients anew at every step, and both pay for the fresh pages

The gate is left out: all begin with the same experts and weights. There are no biases, which
grouped_mm does not take. Contenders run in one process, interleaved, in shuffled order; ratios are
medians within rounds, after a check that all give the same numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from interleaved import (
    OURS,
    Contenders,
    Record,
    fastest,
    multipliers,
    need_kernels,
    options_parser,
    ratio,
    time_rounds,
)
from rich.console import Console
from torch import Tensor
from torch.nn.functional import gelu, grouped_mm, linear, one_hot

from aftermax.moe import Experts, Routing, TaskRouter, expert_layer

SECTIONS = ("speed", "bytes", "lengths", "kept")
ROUNDS = 9
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's mallopt: above which sizes memory goes back, and is mapped by itself."""


@dataclass(frozen=True)
class Size:
    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int

    @property
    def operations(self) -> int:
        """Of the forward pass."""
        return 4 * self.tokens * self.top_k * self.width * self.hidden

    def layer(self) -> Experts:
        return Experts(self.width, self.hidden, self.experts, self.top_k, bias=False, device="meta")


SIZES = (
    Size("Edge-MoE", 129, 192, 384, 16, 2),
    Size("ViT-S", 129, 384, 1536, 16, 4),
    Size("ViT-B", 257, 768, 3072, 16, 2),
)
TOKENS = (16, 64, 256, 1024, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---- the contenders ------------------------------------------------------------------------------

Layer = Callable[[Tensor, Routing, Tensor, Tensor], Tensor]


def by_grouped_mm(x: Tensor, routing: Routing, w1: Tensor, w2: Tensor) -> Tensor:
    of, order = routing.index.flatten().sort(stable=True)
    ends = torch.searchsorted(of, torch.arange(len(w1)), right=True).int()
    hidden = gelu(grouped_mm(x[order // routing.top_k], w1.mT, offs=ends))
    y = grouped_mm(hidden, w2.mT, offs=ends)
    # each pair back to its place, then the choices of a token summed
    pairs = torch.empty_like(y).index_copy(0, order, y).view(*routing.index.shape, -1)
    return torch.einsum("tk,tkd->td", routing.weights.to(x.dtype), pairs)


def by_loop(x: Tensor, routing: Routing, w1: Tensor, w2: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    weights = routing.weights.to(x.dtype)
    chosen = one_hot(routing.index, len(w1)).permute(2, 1, 0)
    for expert in chosen.sum((1, 2)).nonzero().flatten().tolist():
        choice, token = torch.where(chosen[expert])
        y = linear(gelu(linear(x[token], w1[expert])), w2[expert])
        out.index_add_(0, token, y * weights[token, choice, None])
    return out


def by_dense(x: Tensor, routing: Routing, w1: Tensor, w2: Tensor) -> Tensor:
    weights = torch.zeros(len(x), len(w1), dtype=x.dtype)
    weights = weights.scatter(1, routing.index, routing.weights.to(x.dtype))
    y = gelu(x @ w1.mT) @ w2.mT  # (E, tokens, D)
    return torch.einsum("te,etd->td", weights, y)


def ours(order: str, impl: str | None) -> Layer:
    return lambda x, routing, w1, w2: expert_layer(
        x, routing, w1, None, w2, None, order=order, impl=impl
    )


LAYERS: dict[str, Layer] = {
    OURS: ours("expert", "cpu"),
    "grouped_mm": by_grouped_mm,
    "loop": by_loop,
    "dense": by_dense,
    "token": ours("token", "reference"),
    "reference": ours("expert", "reference"),
}
"""All give the same numbers."""


@dataclass(frozen=True, eq=False)
class Given:
    """What every contender gets."""

    x: Tensor
    routing: Routing
    w1: Tensor
    w2: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, size: Size, dtype: torch.dtype, gradients: bool) -> Given:
        torch.manual_seed(0)
        x = torch.randn(size.tokens, size.width)
        with torch.no_grad():
            routing = TaskRouter(size.width, size.experts, top_k=size.top_k)(x)
        w1 = torch.randn(size.experts, size.hidden, size.width) / size.width**0.5
        w2 = torch.randn(size.experts, size.width, size.hidden) / size.hidden**0.5
        x, w1, w2 = (t.to(dtype).requires_grad_(gradients) for t in (x, w1, w2))
        weights = routing.weights.requires_grad_(gradients)
        routing = Routing(weights, routing.index, routing.probabilities, routing.logits)
        return cls(x, routing, w1, w2, torch.randn(size.tokens, size.width).to(dtype))

    def run(self, layer: Layer) -> Tensor:
        return layer(self.x, self.routing, self.w1, self.w2)

    def train(self, layer: Layer) -> tuple[Tensor, ...]:
        """The gradients, in tensors of their own each time, as a step sees them."""
        inputs = (self.x, self.routing.weights, self.w1, self.w2)
        return torch.autograd.grad(self.run(layer), inputs, self.gradient)


def contenders(given: Given, way: str, names: tuple[str, ...]) -> Contenders:
    run = given.run if way == "forward" else given.train
    for name in names:  # half precision: the peers round what lies between the products
        torch.testing.assert_close(
            run(LAYERS[name]),
            run(LAYERS["reference"]),
            rtol=0.1 if given.x.dtype == torch.bfloat16 else 1e-4,
            atol=0.1 if given.x.dtype == torch.bfloat16 else 1e-3,
        )
    return {name: lambda name=name: run(LAYERS[name]) for name in names}


# ---- sections ------------------------------------------------------------------------------------


def compare(size: Size, dtype: str, way: str, names: tuple[str, ...]) -> dict:
    given = Given.of(size, DTYPES[dtype], way == "both")
    timed = contenders(given, way, names)
    # enough of a round that the clock and a switch do not matter, not so much that it takes minutes
    operations = size.operations * (3 if way == "both" else 1)
    repeats = max(1, min(20, round(2e9 / operations)))
    bound, products = multipliers(
        "multiply_adds" if dtype == "float32" else "multiply_pairs", operations
    )
    if products:
        timed["bound"] = bound
    with torch.set_grad_enabled(way == "both"):
        seconds = time_rounds(timed, ROUNDS, repeats)
    peer = fastest(seconds, (OURS, "bound", "reference"))
    line = {
        "fastest": peer,
        "peers": {name: ratio(seconds[name], seconds[OURS]) for name in names if name != OURS},
    }
    if products:
        in_a_call = [taken * operations / products for taken in seconds["bound"]]
        line["of_bound"] = {name: ratio(in_a_call, seconds[name])["ratio"] for name in (OURS, peer)}
    return line


def speed(record: Record, console: Console, threads: list[int]) -> None:
    for count in threads:
        torch.set_num_threads(count)
        for size in SIZES:
            for dtype in DTYPES:
                for way in ("forward", "both"):
                    about = {"size": size.name, "dtype": dtype, "way": way, "threads": count}
                    line = about | compare(size, dtype, way, tuple(LAYERS))
                    record.add("speed", line, tuple(about))
                    console.print(line)


def lengths(record: Record, console: Console, threads: list[int]) -> None:
    for count in threads:
        torch.set_num_threads(count)
        for tokens in TOKENS:
            size = Size("ViT-S", tokens, 384, 1536, 16, 4)
            for way in ("forward", "both"):
                about = {"tokens": tokens, "way": way, "threads": count}
                line = about | compare(size, "float32", way, (OURS, "grouped_mm"))
                record.add("lengths", line, tuple(about))
                console.print(line)


def kept(record: Record, console: Console, threads: list[int]) -> None:
    """Last: glibc has no way back to its own choice."""
    libc = ctypes.CDLL(None)
    if not all(libc.mallopt(option, 1 << 30) for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)):
        console.print("this allocator does not let itself be told")
        return
    for count in threads:
        torch.set_num_threads(count)
        for size in SIZES:
            for dtype in DTYPES:
                about = {"size": size.name, "dtype": dtype, "threads": count}
                line = about | compare(size, dtype, "both", (OURS, "grouped_mm"))
                record.add("kept", line, tuple(about))
                console.print(line)


def weight_bytes(record: Record, console: Console, threads: list[int]) -> None:
    for size in SIZES:
        routing, layer = Given.of(size, torch.float32, False).routing, size.layer()
        orders = ("token", "expert", "dense")
        line = {
            "size": size.name,
            "tokens": size.tokens,
            "queues": layer.dispatch(routing).lengths.tolist(),
            "bytes": {order: layer.weight_bytes(routing, order) for order in orders},
        }
        record.add("bytes", line, ("size",))
        console.print(line)


def main() -> None:
    options = options_parser(__doc__ or "", SECTIONS).parse_args()
    need_kernels()
    record, console = Record(options.save), Console()
    runs = {"speed": speed, "bytes": weight_bytes, "lengths": lengths, "kept": kept}
    for name, run in runs.items():
        if options.only in (None, name):
            console.print(f"[bold]{name}[/]")
            run(record, console, options.threads)


if __name__ == "__main__":
    main()
