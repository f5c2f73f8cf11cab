"""Softmax in one pass over the scores: in floating point, and in the numbers of Edge-MoE::

    m_0 = -inf, t_0 = 0
    m_j = max(m_{j-1}, s_ij),   t_j = t_{j-1} exp(m_{j-1} - m_j) + exp(s_ij - m_j)
    w_ij = exp(s_ij - m_N) (1 / t_N)

    OnePassSoftmax        this, the online normaliser of Milakov & Gimelshein    arXiv 1805.02867
    FixedOnePassSoftmax   this in 32 bits, 10 of them before the point           arXiv 2305.18691

The first is softmax: another order of the same sum, and no other function. It is here so that the
walk itself can be read, differentiated and held to the laws; the kernels walk softmax like this, in
tiles, and so run it.

The second (Sarkar et al., Edge-MoE) is bit for bit that of `aftermax.moe.single_pass_softmax`. Its
weights are whole multiples of 2^-22: exponentials below that are 0, and a row sums to 1 up to some
1e-4. t has ten bits before the point and wraps at 512, so that a row of 512 equal scores is no
softmax: that is kept by `corrected=False`, which warns of such rows. The default keeps the sum in
as many bits as it takes, and lets scores beyond -512 and 512 rest at the edge of the format.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from aftermax import scores as score
from aftermax.entry import Entry, Laws
from aftermax.moe.fixedpoint import ACTIVATION, Fixed, check_single_pass, single_pass_softmax
from aftermax.reference import onnx_export
from aftermax.visible import Rows
from aftermax.weights.row_map import Fused, Lengths, RowMap
from aftermax.weights.softmax import softmax_weights


def one_pass_weights(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible keys of each row, one key after another.

    Args:
        scores: (..., rows, keys), bias already added.
        visible: bool, broadcastable to `scores`.

    Returns:
        Weights of the shape of `scores`; a row sums to 1, or to 0 where it sees nothing. Half
        precision is summed in float32: a sum of ones in bfloat16 would end at 256.

    >>> one_pass_weights(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    hidden, dtype = ~visible, scores.dtype
    scores = scores.to(torch.promote_types(dtype, torch.float32)).masked_fill(hidden, -math.inf)
    # the weights are the same for every m, and their derivative by it is 0
    fixed = scores.detach()
    maximum = torch.full_like(fixed[..., :1], -math.inf)
    total = torch.zeros_like(maximum)
    for s, of in zip(scores.split(1, -1), fixed.split(1, -1), strict=True):
        higher = torch.maximum(maximum, of)
        base = higher.masked_fill(higher == -math.inf, 0)  # nothing seen so far
        total = total * (maximum - base).exp() + (s - base).exp()
        maximum = higher
    base = maximum.masked_fill(maximum == -math.inf, 0)
    share = 1 / total.masked_fill(total == 0, 1)
    weights = ((scores - base).exp() * share).masked_fill(hidden, 0)  # so too is its gradient
    return weights.to(dtype)


def fixed_one_pass_weights(
    scores: Tensor, visible: Tensor, form: Fixed = ACTIVATION, corrected: bool = True
) -> Tensor:
    """The same in fixed point, on scores that are floating point before and weights that are after.

    Args:
        scores: (..., rows, keys), bias already added. They are cut towards minus infinity.
        visible: bool, broadcastable to `scores`.
        form: the paper's Q10.22; 0 to 26 bits of fraction.
        corrected: sums, differences and reciprocals in as many bits as they take, and scores
            beyond the format at its edge. False is the hardware: all of these wrap around.

    Returns:
        Weights in the dtype of `scores`, multiples of 2^-fraction. A row with a score that is not
        finite is NaN, one that sees nothing 0.

    The derivative of a staircase is 0 almost everywhere. The gradient here is that of softmax at
    the weights that were computed, w_j (g_j - sum_k w_k g_k), as if nothing had been cut.

    Warns:
        RuntimeWarning: with `corrected=False`, of rows that wrapped.

    Raises:
        ValueError: as `aftermax.moe.single_pass_softmax`.

    >>> fixed_one_pass_weights(torch.zeros(1, 3), torch.ones(1, 3).bool()) * 2**22
    tensor([[1398101., 1398101., 1398101.]])
    """
    hidden = ~visible
    scores = scores.masked_fill(hidden, 0)
    weights = torch.ops.aftermax.one_pass(scores, visible, form.width, form.integer, corrected)
    return weights.masked_fill(hidden, 0)


@torch.library.custom_op(
    "aftermax::one_pass",
    mutates_args=(),
    schema="(Tensor scores, Tensor visible, int width, int integer, bool corrected) -> Tensor",
)
def _one_pass(scores: Tensor, visible: Tensor, width: int, integer: int, corrected: bool) -> Tensor:
    form, visible = Fixed(width, integer), visible.expand(scores.shape)
    sound = scores.isfinite()
    values = scores.double().masked_fill(~sound, 0)
    if corrected:
        values = values.clamp(*form.decode(torch.tensor([form.lowest, form.highest])).tolist())
    if not scores.numel():
        return scores.new_empty(scores.shape)
    found = single_pass_softmax(form.encode(values), form, corrected, visible)
    wrapped_rows = found.wrapped
    if not corrected:  # a score may have wrapped before the unit saw it
        scaled = torch.ldexp(values, torch.tensor(form.fraction)).floor()
        wrapped_rows = wrapped_rows | ~form.fits(scaled).all(-1, keepdim=True)
    if wrapped := int(wrapped_rows.sum()):
        warnings.warn(
            f"{wrapped} of {wrapped_rows.numel()} rows went out of the range of {form}: their "
            "weights are those of the hardware, and no softmax (corrected=True has no such limit)",
            RuntimeWarning,
            stacklevel=2,
        )
    weights = form.decode(found.weights).to(scores.dtype)
    return weights.masked_fill(~sound.all(-1, keepdim=True), torch.nan).contiguous()


@_one_pass.register_fake
def _(scores: Tensor, visible: Tensor, width: int, integer: int, corrected: bool) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(output)


def _backward(ctx, upstream: Tensor):
    (weights,) = ctx.saved_tensors
    centred = upstream - (weights * upstream).sum(-1, keepdim=True)
    return weights * centred, None, None, None, None


_one_pass.register_autograd(_backward, setup_context=_keep)


@dataclass(frozen=True)
class OnePassSoftmax(RowMap):
    """softmax(scores), walked key by key with a running maximum and a running sum.

    The reference takes one step for each key, some microseconds each, and keeps as much as that for
    the backward pass; the kernels (`impl="cpu"`, the default where they can) are those of
    `Softmax`. For ONNX it is `Softmax` too, whose graph has no loop.
    """

    def weigh(self, scores: Tensor, rows: Rows, **learned: Tensor) -> Tensor:
        scores = score.add_bias(scores, rows.bias)
        walk = softmax_weights if onnx_export() else one_pass_weights
        return walk(scores, rows.visible)

    def fused(self, lengths: Lengths, **learned: Tensor) -> Fused:
        return Fused("softmax")


@dataclass(frozen=True)
class FixedOnePassSoftmax(RowMap):
    """The same in fixed-point numbers, cut after every step (Edge-MoE, arXiv 2305.18691).

    Args:
        width, integer: bits in all and before the point, the sign among them; 32 and 10 in the
            paper.
        corrected: without the paper's limit of 511 equal scores, see `fixed_one_pass_weights`.
            False is what the hardware does, and warns of rows that wrapped.

    No kernel and no form in ONNX: an emulation in int64, key by key. Queries, keys and values stay
    floating point; `aftermax.moe.fixed_layers` has the whole layer in integers. In the released
    sources each of four lanes starts at another key; here every row starts at its first.
    """

    width: int = ACTIVATION.width
    integer: int = ACTIVATION.integer
    corrected: bool = True

    def __post_init__(self):
        check_single_pass(self.form)

    @property
    def form(self) -> Fixed:
        return Fixed(self.width, self.integer)

    def weigh(self, scores: Tensor, rows: Rows, **learned: Tensor) -> Tensor:
        scores = score.add_bias(scores, rows.bias)
        return fixed_one_pass_weights(scores, rows.visible, self.form, self.corrected)


ONE_PASS = Entry(
    name="singlepass",
    title="softmax in one pass",
    system=OnePassSoftmax(),
    formula="exp(s − m) / t,  m and t kept from key to key",
    paper="Milakov & Gimelshein 2018",
    arxiv="1805.02867",
    score="dot / √d",
    positivity="exp",
    normaliser="running sum",
    walk="one pass",
    laws=Laws(rows_sum_to_one=True, rows_at_most_one=True, shift_invariant=True),
    claim="None about length: it is softmax, read once.",
)

FIXED_ONE_PASS = Entry(
    name="singlepass-fixed",
    title="softmax in one pass, Q10.22",
    system=FixedOnePassSoftmax(),
    formula="exp(s − m) (1 / t) in multiples of 2⁻²², cut after every step",
    paper="ours, after Sarkar et al. 2023 (Edge-MoE): no limit of 511 equal scores",
    arxiv="2305.18691",
    score="dot / √d",
    positivity="exp",
    normaliser="running sum",
    walk="one pass",
    exceptions={
        "gradients": "its gradient is that of softmax at its weights, not that of a staircase",
        "mask_gradients": "its gradient is that of softmax at its weights, not of a staircase",
        "key_order": "the sum is cut after every key, and its last bits tell their order",
        "kernel_equals_reference": "there is no kernel for it: it is an emulation",
    },
    claim="None about length; weights below 2⁻²² are 0, more of them in longer rows.",
    ours=True,
)
