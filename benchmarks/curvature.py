"""How far norm(softmax(z) - b)^2 / 2 curves, for any number of classes: a proof by computer.

    python benchmarks/curvature.py --save docs/results/curvature.json

What is shown: for b >= 0 with sum(b) <= 1 every eigenvalue of the Hessian B lies between -0.24042
and 0.30815. Two classes attain -0.240409 and 0.308117. It takes a minute.

**One form.** u^T B u is linear in b, and b = 0 is no worse than one of b = e_k (the difference
f_k (V - w_k^2), w = u less its mean and V its variance under f, has the sum 0 over k). So b = e_k.
Let p = f_k, q = 1 - p, g_i = f_i / q the shares of the other classes, shift u so that
sum g_i y_i = 0 for y_i = u_i of the others, D = u_k, G = sum g_i^2. Then::

    u^T B u = q^2 (p (3p - 1)(1 + G) D^2 + (p - q G) sum g_i y_i^2 + 2 sum g_i^2 y_i^2
                   - 4 p D sum g_i^2 y_i)

and the square of the norm, freed from the shift, is min over c of (D - c)^2 + sum (y_i - c)^2.

**Any number of classes.** bound norm(u)^2 - s u^T B u (s = 1 above, -1 below, bound > 0) is, but
for what has D alone, a sum of g_i times a form in (y_i, c, D) that depends on g_i: the integral of
it over a measure that has the mass g_i at g_i. It cannot be negative if for each (p, G) the form is
positive at every g in (0, 1], once multiples of what is known of the measure are added: a linear
form theta(c, D) times y, as sum g_i y_i = 0, and a quadratic form eta(c, D) times g - G. Measures
also allow a part of a class. Below that costs nothing; above it does where the class is large. So
classes with more than `HEAVY` of the rest, two at most, stand outside of the measure, and a
quadratic form W(y_1, .., c, D) moves to the others what they can spare.

**Every point.** p, the shares of the heavy ones, G and g are cut into boxes. 1 / g is convex and
above its tangents; with a tangent in its place the matrix is affine in g and G. In p and the shares
it differs from the interpolation of its values at the corners by width^2 / 8 times its second
derivative at most. So it is positive where its least eigenvalue at every corner exceeds that.
Eigenvalues are float64, and have to exceed it by 1e-9, twenty times their rounding at the least.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from aftermax.lab.grid import machine

Array = NDArray[np.float64]
Box = tuple[tuple[float, float], ...]
"""p, what tells the heavy classes, and G of the measure, each from .. to."""

LOWER, UPPER = -0.24042, 0.30815
HEAVY = 0.36
"""Share of the rest above which a class stands alone: three such cannot be."""
LEAST = 1e-9
"""What an eigenvalue must exceed beyond the bound on what lies between the corners."""
SMALLEST = 1e-4
"""Width of a box that is not cut any further."""
FREE, STEEP = 200.0, 10.0
"""Largest multipliers, and largest of g - G, which spreads within a box."""
TEMPERATURES = (50, 200, 1000, 5000, 20000, 100000)
"""At which the least eigenvalue over the grid is smoothed while multipliers are sought."""


@dataclass(frozen=True)
class Proved:
    bound: float
    heavy: int
    """Classes that stand alone."""
    boxes: int
    smallest: float
    """Width of the smallest box."""


class Form:
    """The quadratic forms in (y, y_1 .., c, D) of one bound, with `heavy` classes apart."""

    def __init__(self, bound: float, heavy: int):
        self.sign, self.bound, self.heavy = np.sign(bound), abs(bound), heavy
        self.size = heavy + 3
        outer = range(1, self.size)
        self.linear = np.array([_symmetric(self.size, 0, i) for i in outer])
        self.quadratic = np.array(
            [_symmetric(self.size, i, j) for i in outer for j in outer if i <= j]
        )

    def of_measure(self, p, shares: Sequence, G, g, inverse) -> Array:
        """bound / g (y - c)^2 - s q^2 ((p - q G) y^2 + 2 g y^2 - 4 p D g y)."""
        q, c, D = 1 - p, self.size - 2, self.size - 1
        total = self._total(shares, G)
        out = np.zeros((*np.broadcast(p, G, g, inverse).shape, self.size, self.size))
        out[..., 0, 0] = self.bound * inverse - self.sign * q**2 * (p - q * total + 2 * g)
        out[..., 0, c] = out[..., c, 0] = -self.bound * inverse
        out[..., c, c] = self.bound * inverse
        out[..., 0, D] = out[..., D, 0] = self.sign * 2 * q**2 * p * g
        return out

    def apart(self, p: float, shares: Sequence, G: float) -> Array:
        """What belongs to no g: D, and the heavy classes."""
        q, c, D = 1 - p, self.size - 2, self.size - 1
        total = self._total(shares, G)
        out = np.zeros((self.size, self.size))
        out[c, c] = self.bound * (1 + self.heavy)
        out[c, D] = out[D, c] = -self.bound
        out[D, D] = self.bound - self.sign * q**2 * p * (3 * p - 1) * (1 + total)
        for i, h in enumerate(shares, 1):
            out[i, i] = self.bound - self.sign * q**2 * h * (p - q * total + 2 * h)
            out[i, c] = out[c, i] = -self.bound
            out[i, D] = out[D, i] = self.sign * 2 * q**2 * p * h**2
        return out

    def _total(self, shares: Sequence, G):
        """Sum of all squared shares; G is the mean of g over the measure."""
        return sum(h**2 for h in shares) + (1 - sum(shares)) * G

    def with_multipliers(self, x: Array, measure: Array, apart: Array, shares, g, G):
        """Both forms, of which neither may be negative; with no heavy class they are one."""
        theta, eta, moved = self.unpack(x)
        measure = measure + theta + (g - G)[..., None, None] * eta
        if not self.heavy:
            return measure + apart, None
        rest = apart - (1 - sum(shares)) * moved
        for i, h in enumerate(shares, 1):  # sum g y = 0 has their h y
            rest[i] += h * theta[0]
            rest[:, i] += h * theta[0]
        return measure + moved, rest[1:, 1:]

    def unpack(self, x: Array) -> tuple[Array, Array, Array]:
        linear, quadratic = len(self.linear), len(self.quadratic)
        return (
            np.tensordot(x[:linear], self.linear, 1),
            np.tensordot(x[linear : linear + quadratic], self.quadratic, 1),
            np.tensordot(x[linear + quadratic :], self.quadratic, 1) if self.heavy else 0.0,
        )

    def start(self) -> Array:
        """theta = bound c; W a little of everything."""
        theta, eta = np.zeros(len(self.linear)), np.zeros(len(self.quadratic))
        theta[-2] = self.bound
        moved = [0.1 * float(np.trace(e) > 0) for e in self.quadratic] if self.heavy else []
        return np.concatenate([theta, eta, moved])

    def ranges(self) -> list[tuple[float, float]]:
        linear, quadratic = len(self.linear), len(self.quadratic)
        largest = [FREE] * linear + [STEEP] * quadratic
        return [(-x, x) for x in largest + [FREE] * (quadratic if self.heavy else 0)]


def _symmetric(size: int, i: int, j: int) -> Array:
    out = np.zeros((size, size))
    out[i, j] = out[j, i] = 1
    return out


def multipliers(form: Form, centre: Sequence[float], top: float, near: Array | None) -> Array:
    """Those with the largest least eigenvalue at a point, on a grid of g. A proof may use any."""
    p, *told, G = centre
    shares = shares_of(told)
    g = top * np.concatenate([[1e-4], np.geomspace(0.005, 0.58, 14), np.linspace(0.6, 1, 25)])
    measure, apart = form.of_measure(p, shares, G, g, 1 / g), form.apart(p, shares, G)

    def smoothed(x: Array, temperature: float) -> tuple[float, Array]:
        """A soft minimum of the eigenvalues, negated, and its gradient."""
        one, other = form.with_multipliers(x, measure, apart, shares, g, G)
        values, vectors = np.linalg.eigh(one)
        least, at = values[:, 0], vectors[:, :, 0]
        if other is not None:
            values, vectors = np.linalg.eigh(other)
            least = np.append(least, values[0])
            alone = np.append(0, vectors[:, 0])
        weights = np.exp(-temperature * (least - least.min()))
        value = least.min() - np.log(weights.sum()) / temperature
        weights /= weights.sum()
        outer = np.einsum("g,gi,gj->ij", weights[: len(g)], at, at)
        tilted = np.einsum("g,gi,gj->ij", weights[: len(g)] * (g - G), at, at)
        by_theta = np.einsum("aij,ij->a", form.linear, outer)
        gradient = [by_theta, np.einsum("aij,ij->a", form.quadratic, tilted)]
        if other is not None:
            reach = sum(h * alone[i] for i, h in enumerate(shares, 1))
            by_theta += weights[-1] * 2 * reach * alone[1:]
            outer -= weights[-1] * (1 - sum(shares)) * np.outer(alone, alone)
            gradient.append(np.einsum("aij,ij->a", form.quadratic, outer))
        return -value, -np.concatenate(gradient)

    def least(x: Array) -> float:
        one, other = form.with_multipliers(x, measure, apart, shares, g, G)
        value = np.linalg.eigvalsh(one)[:, 0].min()
        return value if other is None else min(value, np.linalg.eigvalsh(other)[0])

    best, found = -np.inf, form.start()
    for x in (form.start(), near):
        if x is None or best > 0.02:
            continue
        for temperature in TEMPERATURES:
            x = minimize(smoothed, x, (temperature,), "L-BFGS-B", jac=True, bounds=form.ranges()).x
            if (value := least(x)) > best:
                best, found = value, x
    return found


def shares_of(told: Sequence[float]) -> tuple[float, ...]:
    """Of the heavy classes: h itself, or h and what the two leave to the rest."""
    return tuple(told) if len(told) < 2 else (told[0], 1 - told[0] - told[1])


def shown(form: Form, box: Box, x: Array, top: float) -> bool:
    """Whether both forms are positive in the whole box, for every g up to `top`."""
    p, *told, _ = box
    # 36 and 12 are above the row sums of second derivatives, by p and by what tells the shares
    between = (36 * _width(p) ** 2 + 12 * sum(_width(h) ** 2 for h in told)) / 8
    corners = [(p, shares_of(h), G) for p, *h, G in itertools.product(*box)]
    knots = top * np.append(0, np.geomspace(0.01, 1, 25))
    for _ in range(6):
        g, inverse = _ends_and_tangents(knots)
        least = np.inf
        for p, shares, G in corners:
            measure, apart = form.of_measure(p, shares, G, g, inverse), form.apart(p, shares, G)
            one, other = form.with_multipliers(x, measure, apart, shares, g, G)
            least = np.minimum(least, np.linalg.eigvalsh(one)[..., 0].min(0))
            if other is not None and np.linalg.eigvalsh(other)[0] < between + LEAST:
                return False
        bad = np.flatnonzero(least < between + LEAST)
        if not len(bad):
            return True
        knots = np.sort(np.append(knots, (knots[bad] + knots[bad + 1]) / 2))
    return False


def _ends_and_tangents(knots: Array) -> tuple[Array, Array]:
    """Both ends of each interval of g, (2, intervals), and what 1 / g is above, affine in g."""
    ends = np.stack([knots[:-1], knots[1:]])
    middle = ends.mean(0)
    inverse = 2 / middle - ends / middle**2
    inverse[:, 0] = 1 / knots[1]  # down to g = 0
    return ends, inverse


def prove(bound: float, heavy: int = 0) -> Proved:
    """Cut p, the heavy shares and G into boxes until the bound is shown in each.

    Raises:
        RuntimeError: where a box of width `SMALLEST` is not shown: the bound may be wrong.
    """
    form = Form(bound, heavy)
    highest = HEAVY if bound > 0 else 1.0
    told = ((), ((HEAVY, 1.0),), ((HEAVY, 1 - HEAVY), (0.0, 1 - 2 * HEAVY)))[heavy]
    stack: list[tuple[Box, Array | None]] = [(((0.0, 1.0), *told, (0.0, highest)), None)]
    boxes, smallest = 0, 1.0
    while stack:
        box, near = stack.pop()
        p, *told, (low, high) = box
        top = min(highest, _largest_of_the_rest(told))
        if low > top or _outside(told):
            continue
        box = (p, *told, (low, min(high, top)))
        found = multipliers(form, [(a + b) / 2 for a, b in box], top, near)
        if shown(form, box, found, top):
            boxes, smallest = boxes + 1, min(smallest, _width(p))
            continue
        # G last: multipliers for much of it are not steep in g - G, and hold further
        widths = [*map(_width, box[:-1]), _width(box[-1]) / 4]
        longest = widths.index(max(widths))
        a, b = box[longest]
        if b - a < SMALLEST:
            raise RuntimeError(f"{bound} is not shown for p, shares and G in {box}")
        for half in ((a, (a + b) / 2), ((a + b) / 2, b)):
            stack.append(((*box[:longest], half, *box[longest + 1 :]), found))
    return Proved(bound, heavy, boxes, smallest)


def _largest_of_the_rest(told: Sequence[tuple[float, float]]) -> float:
    if not told:
        return 1.0
    left = 1 - told[0][0] if len(told) == 1 else told[1][1]
    return max(left, 1e-3)  # more than there is does no harm, and 1 / g stays moderate


def _outside(told: Sequence[tuple[float, float]]) -> bool:
    """No two heavy classes, the larger first, are in the box."""
    if len(told) < 2:
        return False
    (a, b), (left, most) = told
    return 1 - a - left < HEAVY or 1 - b - most > b


def _width(side: tuple[float, float]) -> float:
    return side[1] - side[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path)
    save = parser.parse_args().save
    began, proofs = time.perf_counter(), []
    for bound, heavy in ((LOWER, 0), (UPPER, 0), (UPPER, 1), (UPPER, 2)):
        proofs.append(prove(bound, heavy))
        print(f"{bound:+.5f}, {heavy} classes apart: shown in {proofs[-1].boxes} boxes", flush=True)
    seconds = time.perf_counter() - began
    print(f"the curvature lies between {LOWER} and {UPPER}: {seconds:.0f} s")
    if save:
        text = {"machine": machine(), "proofs": [asdict(p) for p in proofs]}
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
