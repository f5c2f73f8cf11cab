"""`softmax_regression` and `minimize`: fits with a certificate, or words that say what is missing.

The papers (2304.10411, 2305.00660) prove their Newton method from a start that is already near, for
weights w that make the problem convex. Here nothing is assumed: see `minimize` for what is done and
what is checked at the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from aftermax.regression.blocks import Kind, SoftmaxBlock, gram
from aftermax.regression.descent import (
    CONVERGED,
    EXHAUSTED,
    Plan,
    Walk,
    at_rounding,
    descend,
    expand,
    reach,
)
from aftermax.regression.objective import Expansion, MatrixForm, Normalised, Objective, Rescaled

Method = Literal["auto", "lm", "newton", "cg", "thorough"]
DENSE = 2000
"""Unknowns up to which matrices are formed where `method` does not say."""
FAR = 20.0
"""Logits by which a point further out differs, when a minimum at infinity is looked for."""
BRIEF = Plan(switch=False, max_iterations=20)


@dataclass(frozen=True, eq=False)
class Fit:
    """What `minimize` found: tensors with the leading dimensions of the problems.

    Args:
        x: (..., d), or (..., d1, d2) of the matrix form.
        loss: the objective there, regularisers included.
        gradient_norm: ||gradient||_2.
        iterations: steps tried, of all paths that led to x.
        smallest_eigenvalue: of the Hessian at x, the certificate: above 0 x is a strict local
            minimum. A direction that changes no logit (more columns than rows, a constant column)
            makes it 0 without harm. Beyond 2000 unknowns it is a Lanczos value, which the true one
            lies below.
        converged: no step promises more than the dtype can tell, and nothing below speaks against
            it.
        unbounded: no minimum is at a finite place, as far as the dtype tells: the loss is as low or
            lower `FAR` logits further out.
        non_convex: the Hessian at x has an eigenvalue that is clearly negative: x is no minimum.
        out_of_steps: `max_iterations` was reached.

    `status` says the same in words.
    """

    x: Tensor
    loss: Tensor
    gradient_norm: Tensor
    iterations: Tensor
    smallest_eigenvalue: Tensor
    converged: Tensor
    unbounded: Tensor
    non_convex: Tensor
    out_of_steps: Tensor

    @property
    def statuses(self) -> list[str]:
        """A sentence for each problem, leading dimensions flattened."""
        flags = (self.converged, self.unbounded, self.non_convex, self.out_of_steps)
        columns = (flag.flatten().tolist() for flag in flags)
        return [_words(*each) for each in zip(*columns, strict=True)]

    @property
    def status(self) -> str:
        """The sentence of one problem; of several each sentence with how often it is said."""
        counts = Counter(self.statuses)
        if len(self.statuses) == 1:
            return self.statuses[0]
        return "; ".join(f"{count} {words}" for words, count in counts.most_common())


def _words(converged: bool, unbounded: bool, non_convex: bool, out_of_steps: bool) -> str:
    if unbounded:
        return (
            "unbounded: the loss is as low or lower further out, this path leads to infinity"
            " (or beyond this dtype); a ridge or a weight gives it a minimum"
        )
    if converged:
        return "converged"
    if non_convex:
        return "not a minimum: the Hessian has a negative eigenvalue there"
    if out_of_steps:
        return "max_iterations reached"
    return "stuck: no step lowers the loss, and the gradient is not 0 (or the loss not finite)"


def softmax_regression(
    A: Tensor,
    b: Tensor,
    weight: Tensor | float | None = None,
    ridge: float = 0.0,
    x0: Tensor | None = None,
    method: Method = "auto",
    objective: Literal["softmax"] | Kind = "softmax",
    tolerance: float = 0.0,
    max_iterations: int = 300,
) -> Fit:
    """The x that minimises 1/2 ||softmax(A x) - b||^2 + 1/2 ||w * A x||^2 + ridge/2 ||x||^2.

    A fit of x to a distribution b over the rows of A (2304.10411); with `objective="exp"`, "cosh"
    or "sinh" of the rescaled form (2305.00660). For the matrix form and for targets that are no
    distribution call `minimize` with the objective.

    Args:
        A: (..., n, d), floating; leading dimensions are problems, solved at once, each with its
            own damping and end. float64 is what the figures of docs/regression.md are of.
        b: (..., n), b >= 0 and sum b <= 1, as the papers have it.
        weight: the papers' w, (..., n) or one number for all rows.
        ridge: >= 0.
        x0, method, tolerance, max_iterations: as of `minimize`.

    Returns:
        `Fit`.

    Raises:
        ValueError: shapes and dtypes that do not fit; entries that are not finite; a negative b,
            or one that sums to more than 1.

    >>> A = torch.randn(3, 50, 4, dtype=torch.float64)
    >>> x = torch.randn(3, 4, dtype=torch.float64)
    >>> fit = softmax_regression(A, torch.softmax((A @ x.unsqueeze(-1)).squeeze(-1), -1))
    >>> fit.status, torch.allclose(fit.x, x)
    ('3 converged', True)
    """
    if objective not in ("softmax", *get_args(Kind)):
        raise ValueError(
            f"objective must be 'softmax' or one of {get_args(Kind)}, got {objective!r}"
        )
    if not (weight is None or (isinstance(weight, Tensor) and weight.ndim)):
        number = float(weight)  # of numpy, too
        weight = torch.full_like(b, number) if number else None
    if objective == "softmax":
        problem: Objective = Normalised(A, b, weight, ridge)
    else:
        problem = Rescaled(A, b, weight, ridge, objective)
    _refuse_what_has_no_solver(problem)
    _refuse_infinite(A=A, b=b)
    over = b.sum(-1).max().item() - 1
    if b.min() < 0 or over > 4 * b.shape[-1] * torch.finfo(b.dtype).eps:
        raise ValueError(
            "softmax_regression needs b >= 0 with a sum of at most 1 along its last dimension, got"
            f" b {tuple(b.shape)} with a least entry of {b.min().item():g} and a largest sum of"
            f" {1 + over:.9g}; minimize(Normalised(A, b)) takes any b"
        )
    return minimize(problem, x0, method, tolerance, max_iterations)


@torch.no_grad()
def minimize(
    objective: Objective,
    x0: Tensor | None = None,
    method: Method = "auto",
    tolerance: float = 0.0,
    max_iterations: int = 300,
) -> Fit:
    """A local minimum of an objective, from x0 downhill. Nothing is differentiated through: x has
    no graph, whatever the data require.

    Args:
        objective: `Normalised`, `Rescaled` or `MatrixForm`; all its problems are solved at once.
        x0: where to begin, of the shape of x; None is 0. (0 is already a minimum of the rescaled
            sinh, see there, and a point without slope of cosh, which is even: give an x0 there.)
        method: one of those below.
        tolerance: relative; a problem has converged when the next step promises to take less than
            this off its loss. 0 is as far as the dtype tells.
        max_iterations: steps tried on a path.

    The methods:

    - "lm": Levenberg-Marquardt on the Gauss-Newton matrix. Best where the fit is nearly exact;
      converges slowly where it is not.
    - "newton": on the Hessian. The fewest steps where a regulariser makes the problem convex;
      without one it finds worse minima than "lm".
    - "auto": "lm" till a step takes less than 1% off the loss, then "newton". Beyond 2000 unknowns
      it is "cg".
    - "cg": "auto" with conjugate gradients, on products of O(n d) alone.
    - "thorough": "auto" from x0 with four dampings, from light to heavy, and (of a softmax) with
      three from the minimum of the cross-entropy, which is convex; the least loss is kept. Without
      a regulariser a target that no x fits has many minima.

    At the end a last Newton step is kept if it makes the gradient smaller; if the Hessian shows
    negative curvature, x leaves along it and walks on, three times at most. Then the verdicts of
    `Fit`. A problem is called unbounded

    - if its residual is 0 to rounding though b has entries of 0, which no softmax reaches, or if
      exp(A x) has shrunk until the loss underflows;
    - or if the loss has no curvature along the last step (or along x - x0) and twenty steps from
      `FAR` logits further out find it no higher, at least half as far away. Where the walk ended
      at `max_iterations` a millionth of the loss is asked for instead.

    Problems with ridge > 0, or with weights that are all above 0, have a minimum.

    Raises:
        ValueError: entries that are not finite, an x0 or a method that does not fit.

    >>> A1, A2 = torch.randn(2, 6, 3, dtype=torch.float64)
    >>> X = torch.randn(3, 3, dtype=torch.float64)
    >>> fit = minimize(MatrixForm(A1, A2, (A1 @ X @ A2.T).softmax(-1)))
    >>> fit.status, torch.allclose(fit.x, X)
    ('converged', True)
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if max_iterations < 1 or not 0 <= tolerance < 1:
        raise ValueError(
            "minimize needs max_iterations >= 1 and 0 <= tolerance < 1, got"
            f" {max_iterations} and {tolerance}"
        )
    _refuse_what_has_no_solver(objective)
    _refuse_infinite(**{name: t for name, t in vars(objective).items() if isinstance(t, Tensor)})
    flat, batch = objective.flat(), objective.batch
    x = _start(objective, x0).reshape(batch.numel(), math.prod(objective.unknowns))
    cg = method == "cg" or (method in ("auto", "thorough") and x.shape[1] > DENSE)
    plan = Plan.of(method, tolerance, max_iterations, cg)
    start = x
    walk = _several(flat, x, plan) if method == "thorough" else _once(flat, x, plan, 0.1)
    walk.x = _polish(flat, walk.x)
    spectrum = _spectrum(flat, walk.x)
    for _ in range(3):
        if _escape(flat, walk, spectrum, plan) is None:
            break
        walk.x = _polish(flat, walk.x)
        spectrum = _spectrum(flat, walk.x)
    found = _verdict(flat, start, walk, spectrum)
    shaped = {name: value.reshape(batch) for name, value in found.items() if name != "x"}
    return Fit(x=walk.x.reshape(*batch, *objective.unknowns), **shaped)


# ---- before ------------------------------------------------------------------------------------


def _refuse_what_has_no_solver(objective: Objective) -> None:
    if objective.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"softmax regression is solved in float32 or float64, got {objective.dtype}"
        )
    if not objective.batch.numel():
        raise ValueError(
            "softmax regression needs at least one problem, got a batch of"
            f" {tuple(objective.batch)}"
        )


def _refuse_infinite(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        wrong = int((~t.isfinite()).sum())
        if wrong:
            raise ValueError(
                f"softmax regression needs finite numbers, got {name} {tuple(t.shape)} with"
                f" {wrong} that are nan or infinite"
            )


def _start(objective: Objective, x0: Tensor | None) -> Tensor:
    shape = (*objective.batch, *objective.unknowns)
    if x0 is None:
        data = next(v for v in vars(objective).values() if isinstance(v, Tensor))
        return data.new_zeros(shape)
    try:
        x = x0.expand(shape)
    except RuntimeError:
        raise ValueError(f"x0 must be {shape} or broadcast to it, got {tuple(x0.shape)}") from None
    if x0.dtype != objective.dtype:
        raise ValueError(f"x0 must be {objective.dtype} as the data, got {x0.dtype}")
    _refuse_infinite(x0=x0)
    return x.clone()


# ---- paths -------------------------------------------------------------------------------------


def _once(flat: Objective, x: Tensor, plan: Plan, damping: float) -> Walk:
    return descend(flat, x, plan, torch.full_like(x[:, 0], damping))


def _several(flat: Objective, x: Tensor, plan: Plan) -> Walk:
    """Some paths for each problem, in one batch; the one that ends lowest."""
    starts = [(x, damping) for damping in (1e-3, 0.1, 10.0, 1e3)]
    if isinstance(expand(flat, x)._block, SoftmaxBlock):
        convex = _cross_entropy(flat, x)
        starts += [(convex, damping) for damping in (1e-3, 0.1, 10.0)]
    count, size = len(starts), len(x)
    damping = torch.cat([torch.full_like(x[:, 0], mu) for _, mu in starts])
    tiled = flat.select(torch.arange(size).repeat(count))
    walk = descend(tiled, torch.cat([start for start, _ in starts]), plan, damping)
    losses = expand(tiled, walk.x).value.reshape(count, size).nan_to_num(nan=math.inf)
    best = losses.argmin(0) * size + torch.arange(size)
    iterations = walk.iterations.reshape(count, size).sum(0)
    return Walk(walk.x[best], walk.step[best], iterations, walk.end[best])


def _cross_entropy(flat: Objective, x: Tensor) -> Tensor:
    """Near the minimum of -sum b log softmax(A x), which is convex: thirty damped steps."""
    mu = torch.full_like(x[:, 0], 1e-2)
    target = flat.B if isinstance(flat, MatrixForm) else flat.b  # pyright: ignore
    mass = target.sum(-1, keepdim=True)

    def loss(x: Tensor) -> Tensor:
        s = flat.logits(x.reshape(len(x), *flat.unknowns))
        return flat._total(mass * s.logsumexp(-1, keepdim=True) / s.shape[-1] - target * s)

    for _ in range(30):
        at = expand(flat, x)
        block = at._block
        assert isinstance(block, SoftmaxBlock)
        gradient = flat._pull(mass * block.f - target).flatten(1)
        root = (block.f * mass).sqrt().unsqueeze(-1)
        matrix = flat._matrix(lambda a, block=block, root=root: gram(root * block._centred(a)))
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal.add_((mu * diagonal.mean(1)).unsqueeze(1))
        factor, info = torch.linalg.cholesky_ex(matrix)
        p = torch.cholesky_solve(-gradient.unsqueeze(2), factor).squeeze(2)
        taken = (info == 0) & (loss(x + p) <= loss(x))
        x = torch.where(taken.unsqueeze(1), x + p, x)
        mu = torch.where(taken, mu / 10, mu * 10).clamp(1e-10, 1e10)
        if bool(((p.abs() <= 1e-4 * (1 + x.abs())).all(1)).all()):
            break
    return x


# ---- after -------------------------------------------------------------------------------------


@dataclass
class Spectrum:
    """Of the Hessians: the smallest eigenvalue, a vector of it, the largest magnitude."""

    smallest: Tensor
    vector: Tensor
    largest: Tensor

    @property
    def negative(self) -> Tensor:
        """Clearly: beyond what rounding makes of a 0."""
        return self.smallest < -1e-2 * torch.finfo(self.smallest.dtype).eps ** 0.5 * self.largest


def _spectrum(flat: Objective, x: Tensor) -> Spectrum:
    at = expand(flat, x)
    if x.shape[1] > DENSE:
        return _lanczos(lambda v: at.hessian_product(v.reshape(at.x.shape)).flatten(1), x)
    matrix = at.hessian
    broken = ~matrix.isfinite().flatten(1).all(1)
    values, vectors = torch.linalg.eigh(matrix.masked_fill(broken[:, None, None], 0))
    smallest = values[:, 0].masked_fill(broken, math.nan)
    return Spectrum(smallest, vectors[:, :, 0], values.abs().amax(1))


def _lanczos(product: Callable[[Tensor], Tensor], x: Tensor, steps: int = 80) -> Spectrum:
    """With every vector made orthogonal to all before it, twice; where a problem has none left, it
    goes on from another at random, as the rest of the batch is not at its end with it."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x)

    def apart(y: Tensor) -> Tensor:
        for q in 2 * basis:
            y = y - (q * y).sum(1, keepdim=True) * q
        return y

    v = drawn()
    basis, images = [v / v.norm(dim=1, keepdim=True)], []
    for _ in range(min(steps, x.shape[1])):
        images.append(product(basis[-1]))
        y = apart(images[-1])
        least = 1e4 * torch.finfo(x.dtype).eps * images[0].norm(dim=1, keepdim=True)
        over = y.norm(dim=1, keepdim=True) <= least
        if bool(over.any()):
            y = torch.where(over, apart(drawn()), y)
        basis.append(y / y.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny))
    q, image = torch.stack(basis[: len(images)], 2), torch.stack(images, 2)
    small = q.mT @ image
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    return Spectrum(values[:, 0], (q @ vectors[:, :, :1]).squeeze(2), values.abs().amax(1))


def _escape(flat: Objective, walk: Walk, spectrum: Spectrum, plan: Plan) -> Tensor | None:
    """Leaves saddles along the direction of negative curvature; the problems that did so."""
    index = spectrum.negative.nonzero().squeeze(1)
    if not len(index):
        return None
    of, x, v = flat.select(index), walk.x[index], spectrum.vector[index]
    value = expand(of, x).value
    v = v / reach(of, v).clamp(min=torch.finfo(x.dtype).tiny).unsqueeze(1)
    lowest, best = value.clone(), x.clone()
    for pace in (1.0, -1.0, 0.1, -0.1, 0.01, -0.01):
        trial = x + pace * v
        there = expand(of, trial).value
        lower = there < lowest
        lowest = torch.where(lower, there, lowest)
        best = torch.where(lower.unsqueeze(1), trial, best)
    left = lowest < value
    if not bool(left.any()):
        return None
    index = index[left]
    again = descend(flat.select(index), best[left], plan, torch.full_like(value[left], 1e-3))
    walk.x[index], walk.step[index], walk.end[index] = again.x, again.step, again.end
    walk.iterations[index] += again.iterations
    return index


def _polish(flat: Objective, x: Tensor) -> Tensor:
    """One undamped Newton step where it makes the gradient smaller and the loss no larger."""
    if x.shape[1] > DENSE:
        return x
    at = expand(flat, x)
    gradient = at.gradient.flatten(1)
    factor, info = torch.linalg.cholesky_ex(at.hessian)
    p = torch.cholesky_solve(-gradient.unsqueeze(2), factor).squeeze(2)
    there = expand(flat, x + p)
    better = (info == 0) & (there.gradient.flatten(1).norm(dim=1) < gradient.norm(dim=1))
    better &= there.value <= at.value * (1 + 4 * torch.finfo(x.dtype).eps)
    return torch.where(better.unsqueeze(1), x + p, x)


def _verdict(flat: Objective, start: Tensor, walk: Walk, spectrum: Spectrum) -> dict[str, Tensor]:
    at = expand(flat, walk.x)
    unbounded = _unbounded(flat, at, start, walk)
    non_convex = spectrum.negative & ~unbounded
    converged = ((walk.end == CONVERGED) | _at_rest(flat, at, walk)) & ~non_convex & ~unbounded
    return {
        "x": walk.x,
        "loss": at.value,
        "gradient_norm": at.gradient.flatten(1).norm(dim=1),
        "iterations": walk.iterations,
        "smallest_eigenvalue": spectrum.smallest,
        "converged": converged,
        "unbounded": unbounded,
        "non_convex": non_convex,
        "out_of_steps": (walk.end == EXHAUSTED) & ~converged,
    }


def _at_rest(flat: Objective, at: Expansion, walk: Walk) -> Tensor:
    """Where a walk ended early: whether Newton's step, too, promises less than the dtype tells.

    Gauss-Newton steps go on promising where the residual is not 0, and lower the loss no more."""
    early = walk.end != CONVERGED
    if walk.x.shape[1] > DENSE or not bool(early.any()):
        return torch.zeros_like(early)
    gradient = at.gradient.flatten(1).unsqueeze(2)
    factor, info = torch.linalg.cholesky_ex(at.hessian)
    promise = (gradient * torch.cholesky_solve(gradient, factor)).sum((1, 2)) / 2
    return early & (info == 0) & (promise <= torch.finfo(walk.x.dtype).eps * at.value)


def _unbounded(flat: Objective, at: Expansion, start: Tensor, walk: Walk) -> Tensor:
    """Whether a minimum at infinity is what was walked to."""
    if flat.ridge or (flat.weight is not None and bool((flat.weight != 0).all())):
        return torch.zeros(len(walk.x), dtype=torch.bool, device=walk.x.device)
    softmax = isinstance(at._block, SoftmaxBlock)
    target = flat.B if isinstance(flat, MatrixForm) else flat.b  # pyright: ignore
    exact, eps = at_rounding(flat, at), torch.finfo(walk.x.dtype).eps
    if softmax:
        found = exact & (target == 0).flatten(1).any(1)
    else:  # alpha^2 times a loss that is not 0 has underflown
        least, all_small = torch.finfo(walk.x.dtype).tiny, (at.logits < math.log(eps)).flatten(1)
        found = (at.value <= least) & all_small.all(1) & (flat.kind == "exp")  # pyright: ignore
    # no entry of f or u has come near its limit before the logits have gone some way
    s = at.logits if softmax else torch.cat([at.logits, torch.zeros_like(at.logits[..., :1])], -1)
    spread = (s.amax(-1) - s.amin(-1)).reshape(len(found), -1).amax(1)
    suspects = ((spread > -math.log(eps) / 3) & ~exact).nonzero().squeeze(1)
    if not len(suspects):
        return found
    of, x, value = flat.select(suspects), walk.x[suspects], at.value[suspects]
    size, walking = of._total(at.fitted[suspects].square()), walk.end[suspects] == EXHAUSTED
    here = expand(of, x)
    for away in (walk.step[suspects], x - start[suspects]):
        v = away / reach(of, away).clamp(min=torch.finfo(x.dtype).tiny).unsqueeze(1)
        bend = (v * here.hessian_product(v.reshape(here.x.shape)).flatten(1)).sum(1)
        flat_there = (bend.abs() <= eps**0.5 * size) & (reach(of, v) > 0.5)
        for i in (flat_there | walking).nonzero().squeeze(1).tolist():
            one, lot = of.select(torch.tensor([i])), torch.ones_like(value[:1])
            far = descend(one, x[i : i + 1] + FAR * v[i : i + 1], BRIEF, lot / 10).x
            gone = bool(reach(one, far - x[i : i + 1]) > FAR / 2)
            most = value[i] * (1 + 16 * eps) if flat_there[i] else value[i] * 1e-6
            found[suspects[i]] |= gone & (expand(one, far).value[0] <= most)
    return found
