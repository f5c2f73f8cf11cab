"""Softmax regression: steps to the minimum, and time and loss against scipy's least_squares.

    python benchmarks/regression.py --save docs/results/regression.json

Five parts, all in float64 on one thread, from x = 0:
- `cases`: exact targets at three sizes, and targets that no x fits with w^2 = 1e-3; eight seeds;
  gradient descent with the safe step beside.
- `curves`: the loss step by step of one exact target and one other.
- `peers`: 100 random problems against `least_squares` (trf and lm, with the analytic Jacobian and
  without, at its defaults and at tolerances of 1e-15), contenders interleaved.
- `minima`: of a thousand other seeds those whose target no x fits and nothing regularises: who
  finds the lowest minimum. (The paths of `thorough` were chosen on seeds below 600.)
- `batch`: problems of one size, all at once against one after the other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
import scipy
import torch
from interleaved import OURS, Record, options_parser, ratio, time_rounds
from rich.console import Console
from rich.table import Table
from scipy.optimize import OptimizeResult, least_squares
from torch import Tensor

from aftermax.regression import Fit, Normalised, minimize
from aftermax.regression.descent import Plan, descend

SECTIONS = ("cases", "curves", "peers", "minima", "batch")
CASES = ((200, 20, 1.0), (200, 20, 3.0), (50, 40, 3.0))
SEEDS, DESCENTS = 8, 3000
THOROUGH = f"{OURS}, thorough"
EPS = torch.finfo(torch.float64).eps


# ---- problems ----------------------------------------------------------------------------------


def normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def case(n: int, d: int, scale: float, exact: bool, seed: int) -> tuple[Normalised, Tensor]:
    """A ~ scale N(0, 1/d), x ~ N(0, 1); without an exact target b = softmax(2 N(0, 1))."""
    random = torch.Generator().manual_seed(seed)
    A, x = scale * normal(random, n, d) / math.sqrt(d), normal(random, d)
    if exact:
        return Normalised(A, (A @ x).softmax(0)), x
    b = (2 * normal(random, n)).softmax(0)
    return Normalised(A, b, weight=torch.full_like(b, math.sqrt(1e-3))), x


def random_problem(seed: int) -> tuple[Normalised, dict]:
    """One of the hundred: sizes, scale, target and regulariser drawn from a few."""
    random = torch.Generator().manual_seed(seed)

    def pick(values: tuple) -> float:
        return values[int(torch.randint(len(values), (1,), generator=random))]

    n, d = pick((10, 30, 100, 300)), pick((2, 5, 15, 40))
    scale, exact = pick((1.0, 3.0, 6.0)), pick((True, False))
    strength, kind = pick((0.0, 0.0, 1e-3, 1e-1)), pick(("weight", "ridge"))
    A, x = scale * normal(random, n, d) / math.sqrt(d), normal(random, d)
    b = (A @ x).softmax(0) if exact else (2 * normal(random, n)).softmax(0)
    weight = torch.full_like(b, math.sqrt(strength)) if strength and kind == "weight" else None
    ridge = strength if kind == "ridge" else 0.0
    told = {"seed": seed, "n": n, "d": d, "scale": scale, "exact": exact}
    told |= {"regulariser": kind if strength else None, "strength": strength}
    return Normalised(A, b, weight, ridge), told


# ---- gradient descent --------------------------------------------------------------------------


def gradient_descent(problem: Normalised, steps: int) -> tuple[Tensor, list[float]]:
    """With the step 1 / (0.3082 ||A||^2 + regularisers): what the Hessian's norm allows."""
    norm = torch.linalg.matrix_norm(problem.A, 2).square()
    weight = 0.0 if problem.weight is None else problem.weight.square().max()
    pace = 1 / (norm * (0.3082 + weight) + problem.ridge)
    x = torch.zeros(problem.unknowns, dtype=problem.dtype)
    losses = []
    for _ in range(steps):
        at = problem.at(x)
        losses.append(float(at.value))
        x = x - pace * at.gradient
    return x, losses


def cases(record: Record, console: Console, _: int) -> None:
    table = Table("target", "n", "d", "scale", "method", "steps", "loss", "x-error", "gradient")
    for n, d, scale in CASES:
        for exact in (True, False):
            made = [case(n, d, scale, exact, seed) for seed in range(SEEDS)]
            for method in ("gradient descent", "lm", "newton", "auto"):
                lines = []
                for problem, x in made:
                    if method == "gradient descent":
                        found, losses = gradient_descent(problem, DESCENTS)
                        at, steps = problem.at(found), len(losses)
                        end = (float(at.value), float(at.gradient.norm()), found)
                    else:
                        fit = minimize(problem, method=method)
                        end = (float(fit.loss), float(fit.gradient_norm), fit.x)
                        steps = int(fit.iterations)
                    error = float((end[2] - x).norm() / x.norm())
                    lines.append({"steps": steps, "loss": end[0], "gradient": end[1]})
                    lines[-1]["error"] = error
                line = {"exact": exact, "n": n, "d": d, "scale": scale, "method": method}
                line["seeds"] = lines
                record.add("cases", line, ("exact", "n", "d", "scale", "method"))
                worst = {key: max(one[key] for one in lines) for key in lines[0]}
                cells = (str(n), str(d), f"{scale:g}", method, _steps(lines))
                last = (f"{worst['loss']:.1e}", f"{worst['error']:.1e}", f"{worst['gradient']:.1e}")
                table.add_row("exact" if exact else "other", *cells, *last)
    console.print(table)


def _steps(lines: list[dict]) -> str:
    steps = [line["steps"] for line in lines]
    return f"{min(steps)} to {max(steps)}"


def curves(record: Record, console: Console, _: int) -> None:
    n, d, scale = CASES[1]
    for exact in (True, False):
        problem, _x = case(n, d, scale, exact, 0)
        least = 0.0 if exact else float(minimize(problem, method="thorough").loss)
        flat, start = problem.flat(), torch.zeros(1, d, dtype=torch.float64)
        for method in ("lm", "newton", "auto"):
            losses = []
            for steps in range(61):
                plan = Plan.of(method, 0.0, max(steps, 1), False)
                x = descend(flat, start, plan, start[:, 0] + 0.1).x if steps else start
                losses.append(float(flat.value(x)))
                if losses[-1] - least < 1e-17:
                    break
            line = {"exact": exact, "method": method, "least": least, "losses": losses}
            record.add("curves", line, ("exact", "method"))
        _, losses = gradient_descent(problem, DESCENTS)
        kept = sorted({round(DESCENTS ** (i / 60)) - 1 for i in range(61)})  # as a log axis shows
        line = {"exact": exact, "method": "gradient descent", "least": least, "steps": kept}
        line["losses"] = [losses[i] for i in kept]
        record.add("curves", line, ("exact", "method"))
    console.print("curves kept")


# ---- scipy -------------------------------------------------------------------------------------


def scipy_way(problem: Normalised, method: str, analytic: bool, tight: bool) -> Callable:
    """least_squares as one would write it for this loss: residuals f - b, w A x, sqrt(ridge) x."""
    A, b = problem.A.numpy(), problem.b.numpy()
    weight = None if problem.weight is None else problem.weight.numpy()
    root = math.sqrt(problem.ridge)
    below = root * np.eye(A.shape[1])
    weighed = None if weight is None else weight[:, None] * A

    def fitted(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s = A @ x
        e = np.exp(s - s.max())
        return e / e.sum(), s

    def residuals(x: np.ndarray) -> np.ndarray:
        f, s = fitted(x)
        parts = [f - b]
        if weight is not None:
            parts.append(weight * s)
        if root:
            parts.append(root * x)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def jacobian(x: np.ndarray) -> np.ndarray:
        f, _ = fitted(x)
        parts = [f[:, None] * (A - f @ A)]
        if weighed is not None:
            parts.append(weighed)
        if root:
            parts.append(below)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    options: dict = {"jac": jacobian if analytic else "2-point", "method": method}
    if tight:
        options |= {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15, "max_nfev": 20_000}
    start = np.zeros(A.shape[1])

    def run() -> OptimizeResult:
        return least_squares(residuals, start, **options)

    return run


def scipy_ways(problem: Normalised) -> dict[str, Callable[[], OptimizeResult]]:
    rows = problem.A.shape[0] * (1 + (problem.weight is not None))
    rows += problem.A.shape[1] * (problem.ridge > 0)
    ways = {}
    for method in ("trf", "lm"):
        if method == "lm" and rows < problem.A.shape[1]:
            continue  # which scipy refuses
        for analytic in (True, False):
            for tight in (True, False):
                name = f"{method}, {'analytic' if analytic else 'differences'}"
                name += f", {'1e-15' if tight else 'defaults'}"
                ways[name] = scipy_way(problem, method, analytic, tight)
    return ways


def compared(problem: Normalised, ours: Fit, theirs: np.ndarray) -> dict:
    """A loss of theirs beside ours: lower, equal or higher, and whether it is another minimum.

    Equal is within 1e-12 of the loss, or within the loss of a residual that is 32 units in the last
    place of b: less than that exp and the sum of a softmax do not tell. Another minimum is where
    our solver, begun at their x, ends at another loss.
    """
    x = torch.from_numpy(theirs)
    loss, our_loss = float(problem.value(x)), float(ours.loss)
    floor = (32 * EPS) ** 2 / 2 * float(problem.b.square().sum())
    told = "equal"
    if our_loss > loss * (1 + 1e-12) + floor:
        told = "ours higher"
    elif loss > our_loss * (1 + 1e-12) + floor:
        told = "ours lower"
    settled = float(minimize(problem, x0=x).loss)
    other = abs(settled - our_loss) > 1e-6 * our_loss + floor
    return {"told": told, "other_minimum": other}


def peers(record: Record, console: Console, rounds: int) -> None:
    counts: dict[tuple[str, str], int] = {}
    ratios: dict[str, list[float]] = {}
    for seed in range(100):
        problem, line = random_problem(seed)
        ways: dict[str, Callable] = {
            OURS: lambda problem=problem: minimize(problem),
            THOROUGH: lambda problem=problem: minimize(problem, method="thorough"),
        }
        ways |= scipy_ways(problem)
        fits = {name: ways[name]() for name in (OURS, THOROUGH)}
        seconds = time_rounds(ways, rounds, repeats=3)
        line["statuses"] = {name: fit.status for name, fit in fits.items()}
        line["losses"] = {name: float(fit.loss) for name, fit in fits.items()}
        line["steps"] = int(fits[OURS].iterations)
        line["ways"] = {}
        for name, way in ways.items():
            about: dict = {"ratio": ratio(seconds[name], seconds[OURS])["ratio"]}
            about["ms"] = 1e3 * statistics.median(seconds[name])
            if name not in fits:
                x = way().x
                about |= {own: compared(problem, fit, x) for own, fit in fits.items()}
                for own in fits:
                    told = about[own]["told"]
                    if told != "equal" and about[own]["other_minimum"]:
                        told += ", another minimum"
                    key = (f"{own} | {name}", told)
                    counts[key] = counts.get(key, 0) + 1
            ratios.setdefault(name, []).append(about["ratio"])
            line["ways"][name] = about
        record.add("peers", line, ("seed",))
    table = Table("way", "median time / ours", "quartiles")
    for name, all_of_it in ratios.items():
        low, middle, high = statistics.quantiles(all_of_it, n=4)
        table.add_row(name, f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
    console.print(table)
    for (of, told), count in sorted(counts.items()):
        console.print(f"{of}: {told}: {count}")


def minima(record: Record, console: Console, _: int) -> None:
    lines = []
    for seed in range(1000, 2000):
        problem, told = random_problem(seed)
        if told["exact"] or told["regulariser"] or told["d"] >= told["n"]:
            continue
        losses = {
            OURS: float(minimize(problem).loss),
            THOROUGH: float(minimize(problem, method="thorough").loss),
        }
        for method in ("trf", "lm"):
            losses[method] = float(scipy_way(problem, method, True, True)().cost)
        lines.append(losses)
    ways = list(lines[0])
    for way in ways:
        for other in ways:
            lower = sum(line[way] < line[other] * (1 - 1e-9) for line in lines)
            line = {"way": way, "other": other, "problems": len(lines), "lower": lower}
            record.add("minima", line, ("way", "other"))
            console.print(line)


def batch(record: Record, console: Console, rounds: int) -> None:
    for size in (1, 10, 100, 1000):
        for n, d in ((100, 15), (300, 40)):
            random = torch.Generator().manual_seed(0)
            A = normal(random, size, n, d) / math.sqrt(d)
            b = (A @ normal(random, size, d, 1)).squeeze(2).softmax(1)
            every = Normalised(A, b)
            kept = [scipy_way(Normalised(*two), "lm", True, True) for two in zip(A, b, strict=True)]
            ways = {OURS: lambda every=every: minimize(every)}
            ways["lm"] = lambda kept=kept: [way() for way in kept]
            seconds = time_rounds(ways, max(3, rounds // 2))
            line: dict = {"problems": size, "n": n, "d": d} | ratio(seconds["lm"], seconds[OURS])
            line["us_a_problem"] = 1e6 * statistics.median(seconds[OURS]) / size
            line["loss"] = float(minimize(every).loss.max())
            record.add("batch", line, ("problems", "n", "d"))
            console.print(line)


def main() -> None:
    parser = options_parser(__doc__ or "", SECTIONS)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record, console = Record(options.save), Console(width=140)
    record.results["scipy"] = scipy.__version__
    for section in SECTIONS:
        if options.only in (None, section):
            globals()[section](record, console, options.rounds)


if __name__ == "__main__":
    main()
