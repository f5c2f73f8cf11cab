"""The soft top-k operator, and the loss on it: which k labels would be picked, smoothly.

y_j = sigmoid(alpha (s_j + t)) with the one t for which sum_j y_j = k. arXiv:2310.10636 takes it for
a loss over the k labels at the head of a ranking; the operator is older (it credits T. Ahle).

The threshold. Take any set T of labels, m of them, and write the condition as

    A + max(m - k, 0) = B + max(k - m, 0),   A = sum over the rest of sigmoid(z_j),
                                             B = sum over T of sigmoid(-z_j)

with z_j = alpha (s_j + t). Newton's method runs on the difference of the logarithms of both sides,
within a bracket. T is the k largest scores (for large k those beyond a quantile), so that where the
scores lie far apart, A and B are tiny, and still exact, where the sum itself has rounded to k long
ago; there the difference is a straight line, and one step ends it. The authors halve a bracket 32
times, which in float32 leaves t open wherever the sum is flat. z is kept as alpha (s_j - c) + d
with c the k-th largest score: exact near the threshold, however large the scores and alpha.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aftermax import rows as row_maps
from aftermax.losses import positives as marks

FEW = 256
"""Up to this k the largest scores are taken out by torch.topk; beyond, by a quantile."""

CHUNK = 128
"""Scores whose largest stands for them in the search for the largest of a row."""

SAMPLE = 1024
"""Scores of a row that its quantile is guessed from. It changes the number of steps alone."""

GUESSED_STEPS = 12
"""After so many, the k-th largest takes the place of the guess."""

MOST_STEPS = 200


def soft_topk(
    scores: Tensor,
    k: float | Tensor,
    *,
    alpha: float = 1.0,
    dim: int = -1,
    visible: Tensor | None = None,
) -> Tensor:
    """y_j = sigmoid(alpha (s_j + t)), with t such that sum_j y_j = k along `dim`

    As alpha grows, y becomes 1 at the k largest scores and 0 elsewhere; labels that tie for the
    last places share them. The gradient is in closed form: with v_j = y_j (1 - y_j),
    dy_j / ds_i = alpha v_j ([i = j] - v_i / sum v), and dy_j / dk = v_j / sum v.

    Args:
        scores: any shape and strides. float64 is exact to about 1e-12; half precision is computed
            in float32 and rounded once.
        k: how many, 0 < k <= n; any real number. Or a tensor that broadcasts to the shape of scores
            without `dim`, one k for each row; it may want a gradient.
        alpha: sharpness, > 0, in units of 1 / scores. Scores that hold a temperature already,
            <f, g> / tau, and alpha are one number together: alpha / tau.
        dim: the dimension to choose along.
        visible: bool that broadcasts to scores, True = may be seen. What is hidden, or -inf, gives
            0 and takes no gradient, and n is how many a row sees besides: where that is k or less,
            all of them are 1.

    Returns:
        The shape and dtype of scores. A row that holds NaN is NaN, and so is one with more than k
        scores of +inf; fewer are 1.

    Raises:
        ValueError: for a k, alpha or `visible` that does not fit.
        IndexError: for a `dim` out of range.

    Differentiable any number of times; within `torch.compile` (fullgraph) once. `torch.func`
    transforms do not reach inside.

    >>> soft_topk(torch.tensor([3.0, 1.0, 1.0, -2.0]), 2)
    tensor([0.8920, 0.5277, 0.5277, 0.0527])
    >>> soft_topk(torch.tensor([3.0, 1.0, 1.0, -2.0]), 2, alpha=20)
    tensor([1.0000e+00, 5.0000e-01, 5.0000e-01, 8.7565e-27])
    """
    return _operator("soft_topk", scores, k, alpha, dim, visible, log=False)


def log_soft_topk(
    scores: Tensor,
    k: float | Tensor,
    *,
    alpha: float = 1.0,
    dim: int = -1,
    visible: Tensor | None = None,
) -> Tensor:
    """log y_j of `soft_topk`, exact where y_j is too small for a float. Arguments as there.

    What is hidden gives -inf, and takes no gradient.

    >>> log_soft_topk(torch.tensor([1000.0, 0.0, 0.0, -1000.0]), 1)
    tensor([    0.0000,  -500.3466,  -500.3466, -1500.3466])
    """
    return _operator("log_soft_topk", scores, k, alpha, dim, visible, log=True)


def soft_topk_loss(
    scores: Tensor,
    positives: Tensor,
    *,
    k: float | str = 5,
    alpha: float = 2.0,
    visible: Tensor | None = None,
    sample: int | None = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """loss_i = -1/|P| sum_{p in P} log sigmoid(alpha (s_p + t)), sum_j sigmoid(alpha (s_j + t)) = k

    It asks that the positives be among the first k, in no order, and does not care which negatives
    take the places that are left. The scores are read in blocks of rows; the backward pass makes
    one tensor of their size, the gradient.

    Args:
        scores, positives, visible, reduction, generator: as `decoupled_softmax_loss`.
        k: how many places there are, or "positives": as many as the row has positives. 5 is the
            authors' default. Where a row has more than k positives, the loss cannot reach 0.
        alpha: as `soft_topk`. 2 is the authors' default, for scores over their temperature.
        sample: at most so many positives of a row, drawn anew with each call; the others take no
            places. None takes all. The authors draw k (`sample=5`).

    Returns:
        As `decoupled_softmax_loss`. A row without positives, or that sees k labels or fewer, gives
        0 and takes no gradient.

    Raises:
        As `decoupled_softmax_loss`; ValueError for k or alpha. More places than labels are not an
        error here: whoever is seen has one.

    >>> scores = torch.tensor([[4.0, 2.0, 1.0, -1.0]])
    >>> soft_topk_loss(scores, torch.tensor([[0, 3]]), k=2)
    tensor(2.5067)
    """
    name = "soft_topk_loss"
    marks.checked(name, scores, positives, visible, reduction, sample)
    by_positives = k == "positives"
    if not by_positives and (isinstance(k, str) or not 0 < k < math.inf):
        raise ValueError(f"{name}: k={k!r}; a number above 0, or 'positives', would be right")
    _check_alpha(name, alpha)
    wide = torch.promote_types(scores.dtype, torch.float32)

    def places(chosen: Tensor) -> Tensor:
        if by_positives:
            return chosen.sum(1).clamp_min(1).to(wide)
        return scores.new_full((len(scores),), float(k), dtype=wide)

    if torch.compiler.is_compiling():
        known, seen = marks.as_mask(scores, positives, visible)
        chosen = marks.sampled(known, sample, generator)
        picked = _traced(scores.to(wide), seen & (chosen | ~known), places(chosen), alpha)
    else:
        found = marks.by_index(name, scores, positives, visible, sample, generator)
        chosen = found.chosen
        picked = _Picked.apply(scores, places(chosen), visible, found.index, found.others, alpha)
    each = torch.where(chosen, F.logsigmoid(torch.where(chosen, picked, 0)), 0)
    rows = -(marks.shares(chosen, each.dtype) * each).sum(1)
    return marks.reduced(rows, chosen.any(1), reduction, scores.dtype)


def _operator(
    name: str,
    scores: Tensor,
    k: float | Tensor,
    alpha: float,
    dim: int,
    visible: Tensor | None,
    log: bool,
) -> Tensor:
    shape = tuple(scores.shape)
    if scores.ndim == 0 or not scores.is_floating_point():
        raise ValueError(f"{name}: scores {shape} of {scores.dtype}; (..., n) of floats are right")
    if not -scores.ndim <= dim < scores.ndim:
        raise IndexError(f"{name}: dim={dim} of scores {shape}")
    _check_alpha(name, alpha)
    if visible is not None:
        if visible.dtype != torch.bool or not marks.broadcasts(visible.shape, scores.shape):
            raise ValueError(
                f"{name}: visible {tuple(visible.shape)} of {visible.dtype} for scores {shape};"
                " bool that broadcasts to them would be right (True = may be seen)"
            )
        visible = _rows(visible.expand(shape).movedim(dim, -1))
    moved = scores.movedim(dim, -1)
    labels, outer = moved.shape[-1], moved.shape[:-1]
    _check_k(name, k, labels, outer, tuple(scores.shape))
    wide = torch.promote_types(scores.dtype, torch.float32)
    places = torch.as_tensor(k, dtype=wide, device=scores.device).expand(outer).reshape(-1)
    if torch.compiler.is_compiling():
        seen = torch.ones_like(_rows(moved), dtype=torch.bool) if visible is None else visible
        z = _traced(_rows(moved).to(wide), seen, places, alpha)
        y = (F.logsigmoid(z) if log else z.sigmoid()).to(scores.dtype)
    else:
        y = _SoftTopK.apply(_rows(moved), places, visible, alpha, log)
    return y.reshape(moved.shape).movedim(-1, dim)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check_alpha(name: str, alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise ValueError(f"{name}: alpha={alpha}; a finite number above 0 would be right")


def _check_k(
    name: str, k: float | Tensor, labels: int, outer: torch.Size, shape: tuple[int, ...]
) -> None:
    given = k
    if isinstance(k, Tensor):
        if not marks.broadcasts(k.shape, outer):
            raise ValueError(
                f"{name}: k {tuple(k.shape)} for scores {shape}; a number, or a tensor that"
                f" broadcasts to {tuple(outer)}, would be right"
            )
        if k.numel() == 0 or torch.compiler.is_compiling():
            return
        low, high = (x.item() for x in k.detach().aminmax())
        given = f"{low:g} to {high:g}"
    else:
        low = high = k
    if not (low > 0 and high <= labels) and math.prod(shape):
        raise ValueError(
            f"{name}: k={given} of {labels} (scores {shape}); 0 < k <= {labels} would be right"
        )


# ---- the threshold -----------------------------------------------------------------------------


class Split(NamedTuple):
    """A row cut in two; all but the first two are (R, 1)."""

    rest: Tensor
    """(R, n), alpha (s_j - centre), -inf for what is in T or hidden."""
    top: Tensor
    """(R, any), -alpha (s_j - centre) of T, filled up with -inf."""
    centre: Tensor
    taken: Tensor
    """How many are in T."""
    low: Tensor
    high: Tensor
    """The shift lies between them."""


def threshold(block: Tensor, k: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """centre c and shift d, (R, 1) each: y_j = sigmoid(alpha (s_j - c) + d) sums to k in each row.

    Args:
        block: (R, n) float32 or float64, -inf where hidden; it may be written over.
        k: (R,), above 0. In rows with no more than k finite scores the shift is the largest float:
            all of them become 1.
    """
    big = torch.finfo(block.dtype).max / 4
    k, count = k[:, None], _finite(block)
    full = k >= count
    if bool(full.all()):
        return torch.zeros_like(k), torch.full_like(k, big)
    # beyond the middle, those that are not picked are picked: 1 - sigmoid(z) = sigmoid(-z)
    turned = (2 * k > count) & ~full
    if bool(turned.any()):
        k = torch.where(turned, count - k, k)
        flipped = torch.where(block == -torch.inf, block, -block)
        block = torch.where(turned, flipped, block)
    k = k.masked_fill(full, 0.5)  # an easy row that stops no other
    most = math.ceil(k.max().item())
    if most <= FEW:
        found = _solved(_few(block, k, alpha, most), k, full, big, MOST_STEPS)
    else:
        found = _solved(_many(block, k, count, alpha, False), k, full, big, GUESSED_STEPS)
        if found is None:
            found = _solved(_many(block, k, count, alpha, True), k, full, big, MOST_STEPS)
    assert found is not None
    centre, shift = (torch.where(turned, -x, x) for x in found)
    return centre.masked_fill(full, 0), shift.masked_fill(full, big)


def _finite(block: Tensor) -> Tensor:
    """How many are not hidden, (R, 1)."""
    rows, labels = block.shape
    if labels and bool((block.amin(1) > -torch.inf).all()):
        return block.new_full((rows, 1), labels)
    return (block != -torch.inf).sum(1, keepdim=True).to(block.dtype)


def _solved(
    split: Split, k: Tensor, full: Tensor, big: float, most_steps: int
) -> tuple[Tensor, Tensor] | None:
    """centre and shift; None where `most_steps` below MOST_STEPS do not end it."""
    rest, top, centre, taken, low, high = split
    spare, short = (taken - k).clamp_min(0), (k - taken).clamp_min(0)
    of_rest, of_top = (row_maps.logsumexp(x, 1, keepdim=True) for x in (rest, top))
    low, high = low.clamp(-big, big), high.clamp(-big, big)
    guess = torch.minimum(k.log() - of_rest, (of_top - of_rest) / 2)
    shift = torch.where(guess.isfinite(), guess, (low + high) / 2).clamp(min=low, max=high)
    best_of_rest, best_of_top = (x.amax(1, keepdim=True) for x in (rest, top))
    scratch = torch.empty_like(rest), torch.empty_like(top)
    eps = torch.finfo(rest.dtype).eps
    for _ in range(most_steps):
        left, left_slope = _side(
            rest, shift, best_of_rest + shift, of_rest + shift, spare, scratch[0]
        )
        right, right_slope = _side(
            top, -shift, best_of_top - shift, of_top - shift, short, scratch[1]
        )
        off = left - right
        low, high = torch.where(off < 0, shift, low), torch.where(off > 0, shift, high)
        new = shift - off / (left_slope + right_slope)
        new = torch.where((new >= low) & (new <= high), new, (low + high) / 2)
        step, shift = (new - shift).abs(), torch.where(off == 0, shift, new)
        # the error after a step is about its square
        near = (step <= eps**0.6) | (step <= 4 * eps * shift.abs()) | ~(off.abs() > 0)
        if bool((near | full).all()):
            break
    else:
        if most_steps < MOST_STEPS:
            return None
    return centre, shift


def _side(
    x: Tensor, shift: Tensor, largest: Tensor, logarithm: Tensor, extra: Tensor, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """log(sum sigmoid(x + shift) + extra) and its slope.

    Where the `largest` of x + shift lies so low that every sigmoid is e^(x + shift) to rounding,
    the `logarithm` of their sum takes its place. Elsewhere what lies lower still adds nothing, and
    is kept from becoming numbers that processors are slow with.
    """
    low = math.log(torch.finfo(x.dtype).eps)
    far = (largest <= low) & (extra == 0)
    if bool(far.all()):
        return logarithm, torch.ones_like(logarithm)
    y = torch.add(x, shift, out=scratch).clamp_min_(2.5 * low).sigmoid_()
    total = y.sum(1, keepdim=True)
    slope = total - y.square_().sum(1, keepdim=True)
    whole = total.add_(extra)
    return torch.where(far, logarithm, whole.log()), (slope / whole).masked_fill_(far, 1)


def _few(block: Tensor, k: Tensor, alpha: float, most: int) -> Split:
    """T is the ceil(k) largest."""
    labels = block.shape[1]
    values, indices = _largest(block, most)
    taken = k.ceil()
    inside = torch.arange(values.shape[1], device=block.device) < taken
    centre = values.gather(1, taken.long() - 1)
    top = (values - centre).mul_(-alpha).masked_fill_(~inside, -torch.inf)
    rest = block.scatter_(1, indices, values.masked_fill(inside, -torch.inf))
    rest.sub_(centre).mul_(alpha)
    second = rest.amax(1, keepdim=True)
    low = torch.logit(k / labels) + top[:, :1]
    high = torch.maximum((2 * k).log() - second, (2 * k).log())
    high = torch.where(taken > k, torch.logit(k / taken), high)
    return Split(rest, top, centre, taken, low, high)


def _largest(block: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """topk. The largest of a long row lie in the chunks with the largest maxima."""
    rows, labels = block.shape
    chunks = labels // CHUNK
    if chunks < 4 * most:
        return block.topk(min(most, labels), 1)
    whole = chunks * CHUNK
    best = block[:, :whole].unflatten(1, (chunks, CHUNK)).amax(2).topk(most, 1).indices
    at = (best[..., None] * CHUNK + torch.arange(CHUNK, device=block.device)).flatten(1)
    if whole < labels:
        left = torch.arange(whole, labels, device=block.device).expand(rows, -1)
        at = torch.cat((at, left), 1)
    values, within = block.gather(1, at).topk(most, 1)
    return values, at.gather(1, within)


def _many(block: Tensor, k: Tensor, count: Tensor, alpha: float, exact: bool) -> Split:
    """T is what lies above the k-th largest, or above a guess of it."""
    hidden = block == -torch.inf
    step = 1 if exact else max(1, block.shape[1] // SAMPLE)
    some = block[:, ::step].sort(1, descending=True).values
    seen = (some != -torch.inf).sum(1, keepdim=True)
    at = (k.ceil() - 1 if exact else k / count * seen).long()
    at = torch.minimum(at, (seen - 1).clamp_min(0))
    centre = torch.where(seen > 0, some.gather(1, at), block.amax(1, keepdim=True))
    x = (block - centre).mul_(alpha)
    above = x >= 0
    ratio = torch.logit(k / count)
    low = ratio - x.amax(1, keepdim=True)
    high = ratio - x.masked_fill(hidden, torch.inf).amin(1, keepdim=True)
    rest = x.masked_fill(above, -torch.inf)
    top = x.neg_().masked_fill_(~above, -torch.inf)
    taken = above.sum(1, keepdim=True).to(k.dtype)
    return Split(rest, top, centre, taken, low, high)


@torch.library.custom_op(
    "aftermax::soft_topk_threshold",
    mutates_args=(),
    schema="(Tensor scores, Tensor k, float alpha) -> (Tensor, Tensor)",
)
def _threshold_op(scores: Tensor, k: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    centre, shift = k.new_empty((len(scores), 1)), k.new_empty((len(scores), 1))
    for rows in marks.blocks(scores):
        centre[rows], shift[rows] = threshold(scores[rows].clone(), k[rows], alpha)
    return centre, shift


@_threshold_op.register_fake
def _(scores: Tensor, k: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return k.new_empty((len(scores), 1)), k.new_empty((len(scores), 1))


def _traced(x: Tensor, seen: Tensor, k: Tensor, alpha: float) -> Tensor:
    """alpha (s + t), with its first derivatives, as torch.compile can follow it."""
    fixed = torch.where(seen, x, -torch.inf).detach()
    centre, shift = torch.ops.aftermax.soft_topk_threshold(fixed, k.detach(), alpha)
    depth = -(alpha * (fixed - centre) + shift).abs()
    small = depth.sigmoid()
    v = small * (1 - small)
    total = v.sum(1, keepdim=True)
    q = torch.where(_lost(total, shift), depth.softmax(1), v / torch.where(total > 0, total, 1))
    # the threshold's value is known: what is added is 0, and has its gradient
    moved = torch.where(q > 0, q * (x - x.detach()), 0).sum(1, keepdim=True)
    by_k = (k - k.detach())[:, None] / torch.where(total > 0, total, torch.inf)
    z = alpha * (x - centre) + (shift - alpha * moved + by_k)
    return torch.where(seen, z, -torch.inf)


# ---- derivatives -------------------------------------------------------------------------------


def _hidden(
    scores: Tensor, rows: slice, visible: Tensor | None, *out: Tensor, into: Tensor | None = None
) -> Tensor:
    """A block in float32 at least, -inf where it is hidden; in the memory of `into` if that is."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    if into is None or into.dtype != wide:
        block = scores[rows].to(wide, copy=True)
    else:
        block = into.copy_(scores[rows])
    index = out if out else (torch.empty((len(scores), 0)),) * 2
    marks.hide(block, rows, visible, *index)
    return block


def _inner(block: Tensor, centre: Tensor, shift: Tensor, alpha: float) -> Tensor:
    """alpha (s - c) + d over the block."""
    return block.sub_(centre).mul_(alpha).add_(shift)


def _slopes(z: Tensor) -> Tensor:
    """v = y (1 - y), without loss where y is nearly 1."""
    small = z.abs().neg_().sigmoid_()
    return small.mul_(1 - small)


def _portions(z: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """v / sum v, and sum v (R, 1); 0 in rows where all is 1."""
    v = _slopes(z)
    total = v.sum(1, keepdim=True)
    q = v.div_(torch.where(total > 0, total, 1))
    lost = _lost(total, shift)
    if bool(lost.any()):  # so far out v is e^-|z|
        q = torch.where(lost, row_maps.softmax(z.abs().neg_(), 1), q)
    return q, total


def _lost(total: Tensor, shift: Tensor) -> Tensor:
    """Rows whose v are all too small for floats, but not those where all is 1."""
    info = torch.finfo(total.dtype)
    return (total < info.tiny * 1e6) & (shift < info.max / 4)


class _SoftTopK(torch.autograd.Function):
    """y, or log y, of (R, n)."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, k: Tensor, visible: Tensor | None, alpha: float, log: bool
    ) -> Tensor:
        out = torch.empty_like(scores, memory_format=torch.contiguous_format)
        centre, shift = k.new_empty((2, len(scores), 1))
        for rows in marks.blocks(scores):
            block = _hidden(scores, rows, visible)
            centre[rows], shift[rows] = threshold(block, k[rows], alpha)
            z = _hidden(scores, rows, visible, into=out[rows])
            y = _inner(z, centre[rows], shift[rows], alpha)
            y = F.logsigmoid(y) if log else y.sigmoid_()
            if log or z.dtype != out.dtype:
                out[rows] = y
        ctx.save_for_backward(scores, k, visible, centre, shift)
        ctx.alpha, ctx.log = alpha, log
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        scores, k, visible, centre, shift = ctx.saved_tensors
        if torch.is_grad_enabled():
            of_scores, of_k = _graph(ctx, grad)
            return of_scores, of_k, None, None, None
        out, of_k = torch.empty_like(scores), torch.empty_like(k)
        for rows in marks.blocks(scores):
            z = _inner(_hidden(scores, rows, visible), centre[rows], shift[rows], ctx.alpha)
            q, total = _portions(z, shift[rows])
            if ctx.log:
                idle = z == -torch.inf
                own = z.neg_().sigmoid_().mul_(grad[rows]).masked_fill_(idle, 0)
                mean = own.sum(1, keepdim=True)  # over all, times sum v
                of_k[rows] = (mean / total).squeeze(1).masked_fill(total.squeeze(1) == 0, 0)
                out[rows] = own.sub_(q.mul_(mean)).mul_(ctx.alpha)
            else:
                g = grad[rows].to(q.dtype, copy=True)
                mean = (q * g).sum(1, keepdim=True)
                if not bool(mean.isfinite().all()):  # such as that of log y where y is 0
                    g = torch.where(q > 0, g, 0)
                    mean = (q * g).sum(1, keepdim=True)
                of_k[rows] = mean.squeeze(1)
                out[rows] = g.sub_(mean).mul_(q).mul_(total).mul_(ctx.alpha)
        return out, of_k, None, None, None


def _graph(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient, written in terms of y, which has derivatives itself."""
    scores, k, visible, _, _ = ctx.saved_tensors
    y = _SoftTopK.apply(scores, k, visible, ctx.alpha, False).to(k.dtype)
    q, total = _portions_of(y)
    if ctx.log:
        hidden = scores == -torch.inf if visible is None else ~visible | (scores == -torch.inf)
        own = torch.where(hidden, 0, (1 - y) * grad)
        mean = own.sum(1, keepdim=True)
        of_k = mean / torch.where(total > 0, total, 1)
        return (ctx.alpha * (own - q * mean)).to(scores.dtype), of_k.squeeze(1)
    g = torch.where(q > 0, grad, 0)
    mean = (q * g).sum(1, keepdim=True)
    return (ctx.alpha * total * q * (g - mean)).to(scores.dtype), mean.squeeze(1)


def _portions_of(y: Tensor) -> tuple[Tensor, Tensor]:
    v = y * (1 - y)
    total = v.sum(1, keepdim=True)
    return v / torch.where(total > 0, total, 1), total


class _Picked(torch.autograd.Function):
    """alpha (s_p + t) at the columns of `index` (B, K); those of `out` take no place."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        k: Tensor,
        visible: Tensor | None,
        index: Tensor,
        out: Tensor,
        alpha: float,
    ) -> Tensor:
        centre, shift = k.new_empty((2, len(scores), 1))
        for rows in marks.blocks(scores):
            block = _hidden(scores, rows, visible, index, out)
            centre[rows], shift[rows] = threshold(block, k[rows], alpha)
        ctx.save_for_backward(scores, k, visible, index, out, centre, shift)
        ctx.alpha = alpha
        return _inner(scores.gather(1, index).to(k.dtype), centre, shift, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        scores, k, visible, index, out, centre, shift = ctx.saved_tensors
        none = (None,) * 5
        if torch.is_grad_enabled():
            seen = torch.zeros_like(scores, dtype=torch.int8)
            seen = seen.scatter_add(1, index, out.to(torch.int8)) == 0
            seen = seen if visible is None else seen & visible
            y = _SoftTopK.apply(scores, k, seen, ctx.alpha, False).to(k.dtype)
            q, _ = _portions_of(y)
            own = torch.zeros_like(y).scatter_add(1, index, grad)
            return (ctx.alpha * (own - q * grad.sum(1, keepdim=True))).to(scores.dtype), *none
        of_scores = torch.empty_like(scores)
        for rows in marks.blocks(scores):
            block = _hidden(scores, rows, visible, index, out)
            q, _ = _portions(_inner(block, centre[rows], shift[rows], ctx.alpha), shift[rows])
            total = grad[rows].sum(1, keepdim=True)
            q = torch.where(total == 0, 0, q.mul_(-total))
            of_scores[rows] = q.scatter_add_(1, index[rows], grad[rows]).mul_(ctx.alpha)
        return of_scores, *none
