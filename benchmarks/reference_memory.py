"""Peak memory of the blocked reference, forward and backward, against the whole matrix.

    python benchmarks/reference_memory.py [--tokens 8192] [--heads 8] [--head-dim 64]

Each system is measured in a process of its own: the peak of resident memory above what the process
held before the call, so that the result and the gradients count (4 T H D floats) and the inputs do
not. "whole" is softmax written with the T x T matrix; SDPA is torch's fused kernel.
"""

from __future__ import annotations

import argparse
import platform

import torch

import aftermax
from aftermax.lab.cost import in_own_process, peak_mebibytes
from aftermax.lab.grid import machine


def measure(name: str, tokens: int, heads: int, head_dim: int) -> float:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, tokens, head_dim, requires_grad=True) for _ in range(3)
    )

    def run() -> None:
        if name == "SDPA":
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True
            )
        elif name == "whole":
            hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            scores = query @ key.transpose(-1, -2) / head_dim**0.5
            out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
        else:
            system = aftermax.find(name).system
            out = aftermax.attention(query, key, value, weights=system, is_causal=True)
        out.sum().backward()

    return peak_mebibytes(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--whole", action="store_true", help="also the T x T matrix (gigabytes)")
    options = parser.parse_args()
    shape = (options.tokens, options.heads, options.head_dim)
    about = machine()
    print(f"{about['processor']}, torch {about['torch']}, Python {platform.python_version()}")
    print(f"T = {shape[0]}, H = {shape[1]}, D = {shape[2]}, float32, causal, forward and backward")
    print("peak extra memory in MiB:")
    row_maps = (e for e in aftermax.CATALOGUE if isinstance(e.system, aftermax.RowMap))
    names = [entry.name for entry in row_maps if entry.walk == "dense"] + ["SDPA"]
    for name in names + (["whole"] if options.whole else []):
        print(f"  {name:16} {in_own_process(measure, name, *shape):7.0f}", flush=True)


if __name__ == "__main__":
    main()
