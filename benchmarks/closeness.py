"""The theory of softmax regression, measured: bounds, slopes, a search for what is not proved.

    make bench-closeness
    python benchmarks/closeness.py --save docs/results/closeness.json

Everything is float64 and seeded; the whole takes about a minute of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aftermax.lab.grid import machine
from aftermax.regression import (
    closeness_report,
    gradient_step_logits,
    linear_attention_update,
    softmax_attention_update,
    softmax_head_logits,
    softmax_hessian,
)

BETAS = tuple(10 ** (-k / 2) for k in range(9))
TASKS = 20
ROWS, COLUMNS = 25, 20
LEARNING_RATE = 0.018 * ROWS**2
"""Where the step size goes that is learned on such tasks."""
RADII = (1, 2, 4, 8)
CLASSES = (2, 3, 5, 10, 20)
STARTS = 64


def task(seed: int, n: int = ROWS, d: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A and queries Gaussian, b a softmax of A, and an x to move."""
    random = torch.Generator().manual_seed(seed)
    A, queries = (torch.randn(n, d, generator=random, dtype=torch.float64) for _ in range(2))
    truth, x = (torch.randn(d, generator=random, dtype=torch.float64) / d**0.5 for _ in range(2))
    return A, (A @ truth).softmax(-1), queries, x


def slopes() -> dict[str, Any]:
    """Error of one and two softmax heads beside the step of gradient descent, over beta."""

    def predictions(seed: int, beta: float, heads: int) -> float:
        A, b, queries, _ = task(seed)
        wanted = gradient_step_logits(A, b, queries, LEARNING_RATE).softmax(-1)
        found = softmax_head_logits(A, b, queries, LEARNING_RATE, beta, heads).softmax(-1)
        return float((found - wanted).norm() / wanted.norm())

    def updates(seed: int, beta: float, heads: int) -> float:
        A, b, _, x = task(seed)
        wanted = linear_attention_update(A, b, x, LEARNING_RATE)
        found = softmax_attention_update(A, b, x, LEARNING_RATE, beta, heads)
        return float((found - wanted).norm() / wanted.norm())

    def line(error: Callable[[int, float, int], float], heads: int) -> dict[str, Any]:
        errors = [[error(seed, beta, heads) for seed in range(TASKS)] for beta in BETAS]
        medians = [statistics.median(row) for row in errors]
        # from 1e-2 to 1e-4, where neither higher orders nor rounding matter
        steep = math.log10(medians[4] / medians[8]) / math.log10(BETAS[4] / BETAS[8])
        return {"heads": heads, "errors": errors, "slope": steep}

    return {
        "betas": BETAS,
        "predictions": [line(predictions, heads) for heads in (1, 2)],
        "updates": [line(updates, heads) for heads in (1, 2)],
    }


def ratios() -> list[dict[str, float]]:
    """Largest shift per move over random problems of norm R, and what bounds it."""
    lines = []
    for radius in RADII:
        found = {"step": 0.0, "update": 0.0, "distance": [], "cosine": []}
        for seed in range(300):
            A, b, _, x = task(seed, 50, 5)
            A = A * radius / torch.linalg.matrix_norm(A, 2)
            x = x * radius / x.norm()
            report = closeness_report(A, x, b, step=0.01)
            found["step"] = max(found["step"], report.step.ratio)
            found["update"] = max(found["update"], report.update.ratio)
            found["distance"].append(report.distance)
            found["cosine"].append(report.cosine)
        lines.append(
            {
                "radius": radius,
                "step": found["step"],
                "update": found["update"],
                "sharp": radius / 2,
                "paper": math.exp(radius**2 + math.log(50)),
                "distance": statistics.median(found["distance"]),
                "cosine": statistics.median(found["cosine"]),
            }
        )
    return lines


def search() -> list[dict[str, float]]:
    """The largest derivatives that gradient ascent finds, from many starts, for n classes."""
    lines = []
    for n in CLASSES:
        random = torch.Generator().manual_seed(n)
        target = torch.eye(n, dtype=torch.float64)[0]
        identity = torch.eye(n, dtype=torch.float64)

        def curvature(z: Tensor, _: Tensor, target=target, identity=identity) -> Tensor:
            return torch.linalg.eigvalsh(softmax_hessian(identity, target, z))

        def third(z: Tensor, u: Tensor, target=target) -> Tensor:
            """Along u / norm(u)."""
            u = u / u.norm(dim=-1, keepdim=True)
            f = z.softmax(-1)
            w = u - (f * u).sum(-1, keepdim=True)
            v, k = ((f * w**power).sum(-1, keepdim=True) for power in (2, 3))
            first, second = f * w, f * (w**2 - v)
            last = f * (w**3 - 3 * v * w - k)
            return (3 * first * second + (f - target) * last).sum(-1)

        lines.append(
            {
                "classes": n,
                "least": -ascend(lambda z, u: -curvature(z, u)[..., 0], n, random),
                "largest": ascend(lambda z, u: curvature(z, u)[..., -1], n, random),
                "third": ascend(lambda z, u: third(z, u).abs(), n, random),
            }
        )
    return lines


def ascend(of: Callable[[Tensor, Tensor], Tensor], n: int, random: torch.Generator) -> float:
    z, u = (
        (2 * torch.randn(STARTS, n, generator=random, dtype=torch.float64)).requires_grad_()
        for _ in range(2)
    )
    optimiser = torch.optim.Adam([z, u], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 800)
    for _ in range(800):
        optimiser.zero_grad()
        (-of(z, u).sum()).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return float(of(z, u).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path, default=Path("build/closeness.json"))
    save = parser.parse_args().save
    torch.set_num_threads(1)
    found = {"machine": machine(), "tasks": TASKS, "learning_rate": LEARNING_RATE}
    for name, measure in (("slopes", slopes), ("ratios", ratios), ("search", search)):
        found[name] = measure()
        print(f"{name}: done", flush=True)
    for line in found["slopes"]["predictions"] + found["slopes"]["updates"]:
        print(f"{line['heads']} heads: error falls as beta^{line['slope']:.3f}")
    for line in found["ratios"] + found["search"]:
        print("  ".join(f"{key} {value:.6g}" for key, value in line.items()))
    save.parent.mkdir(parents=True, exist_ok=True)
    save.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
