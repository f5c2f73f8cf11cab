"""The dense walk: every visible key of every query, never T x T whole.

`attention` mirrors `torch.nn.functional.scaled_dot_product_attention` and takes a row map. There
are two ways to walk the sum: the compiled kernels (`fused.py`) and the reference (`blocks.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from aftermax import blocks, fused
from aftermax.call import Call, four_dimensions
from aftermax.visible import Visible
from aftermax.weights.row_map import RowMap
from aftermax.weights.softmax import Softmax

IMPLS = ("reference", "cpu")
"""The ways to walk the sum."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    weights: RowMap = Softmax(),  # noqa: B008, a frozen value
    attn_mask: Tensor | Visible | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    impl: str | None = None,
    **learned: Tensor,
) -> Tensor:
    """out_i = sum_j w_ij v_j, where row i of the weights is a row map of the scores of query i.

    Args:
        query: (..., H, Tq, D), at most four dimensions, as in SDPA.
        key: (..., Hkv, Tk, D).
        value: (..., Hkv, Tk, Dv); Dv may differ from D.
        weights: the row map, from `aftermax.weights`; softmax by default.
        attn_mask: bool (True = may be seen) or additive float, broadcastable to (B, H, Tq, Tk), or
            a `Visible`, which also knows windows, offsets and ALiBi without a Tq x Tk tensor. Hide
            keys with False, `-inf` or `finfo.min`: a key at -1e4 or -1e9 counts as seen, which
            softmax cannot tell, but the systems that count the keys of a row can.
        is_causal: query i sees keys j <= i (top-left alignment, as SDPA). Unlike SDPA it may be
            combined with a mask: a key must pass both.
        scale: factor of the inner product; by default the row map's own (1/sqrt(D) for the dot
            product systems, ln(D) for the cosine systems).
        enable_gqa: allow Hkv to be a divisor of H (query head h reads key head h // (H / Hkv)).
        dropout_p: dropout on the weights, always active when above 0, as in SDPA.
        impl: "reference" (plain torch, on every device) or "cpu" (the compiled kernels); None picks
            the kernels where they can do what is asked (`aftermax.explain` says why not). What is
            asked for by name and cannot be had raises.
        **learned: the tensors that the row map learns (`weights.learned(H, Dv)` names them and
            gives their initial values, which are used for those left out).

    Returns:
        (..., H, Tq, Dv) in the dtype of `query`. Half precision is computed in float32; the kernels
        multiply bfloat16 as it is and add in float32, where the processor can (their weights are
        then rounded to bfloat16, as in other fused kernels). A row that sees nothing is 0. A query,
        key or value that is not finite turns the rows that see it into NaN and touches no other
        row, forward or backward.

    Raises:
        ValueError: for shapes, masks, dtypes, devices or an `impl` that do not fit.
        RuntimeError: for an `impl` that cannot do what is asked, and where a gradient of a gradient
            is asked of the kernels.
        TypeError: for a learned parameter that the row map does not have.

    >>> q = k = v = torch.eye(2)[None, None]
    >>> attention(q, k, v, weights=Softmax(), is_causal=True)
    tensor([[[[1.0000, 0.0000],
              [0.3302, 0.6698]]]])
    """
    lead = query.shape[:-2]
    call = Call.of(
        query, key, value, weights, attn_mask, is_causal, scale, enable_gqa, dropout_p, learned
    )
    out = fused.attend(call) if _uses_kernels(call, impl) else blocks.attend(call)
    return out if query.ndim == 4 else out.reshape(*lead, *out.shape[-2:])


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    weights: RowMap = Softmax(),  # noqa: B008, a frozen value
    rows: tuple[int, int] | None = None,
    attn_mask: Tensor | Visible | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **learned: Tensor,
) -> Tensor:
    """The weights themselves, for looking at: (B, H, rows, Tk), in float32 or float64.

    Args:
        rows: [start, stop) of the query rows that are wanted; all of them by default. The matrix of
            these rows is built whole.

    The other arguments are those of `attention`. What a row map does after the sum (`finish`) is
    not in the weights, and what it learns for that is not used.

    Raises:
        ValueError: as `attention`, and for rows that there are not.

    >>> q = k = torch.zeros(1, 1, 3, 4)
    >>> attention_weights(q, k, is_causal=True, rows=(1, 2))
    tensor([[[[0.5000, 0.5000, 0.0000]]]])
    """
    query, key = four_dimensions(query), four_dimensions(key)
    value = key.new_zeros((*key.shape[:-1], 1))
    learned = {name: x for name, x in learned.items() if not _is_for_finish(weights, name)}
    call = Call.of(
        query, key, value, weights, attn_mask, is_causal, scale, enable_gqa, 0.0, learned
    )
    walk = blocks.Walk.of(call)
    start, stop = rows if rows is not None else (0, query.shape[-2])
    if not 0 <= start <= stop <= query.shape[-2]:
        raise ValueError(f"rows {rows} do not lie within the {query.shape[-2]} query rows")
    low, high = call.visible.span(start, stop, key.shape[-2])
    seen = walk.rows(start, stop, (low, high))
    with blocks.no_autocast(query.device):
        block = walk.weights_of(start, stop, seen, (low, high))
    block = block.masked_fill(walk.poisoned(start, stop, seen, (low, high)), torch.nan)
    return torch.nn.functional.pad(block, (low, key.shape[-2] - high))


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    weights: RowMap = Softmax(),  # noqa: B008, a frozen value
    attn_mask: Tensor | Visible | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    impl: str | None = None,
    **learned: Tensor,
) -> str:
    """Which way `attention` goes for the same arguments, and if it is the reference, why.

    Raises:
        ValueError, RuntimeError, TypeError: as `attention`.

    >>> x = torch.zeros(1, 1, 3, 4)
    >>> explain(x, x, x, dropout_p=0.1)
    'reference: the kernels have no dropout'
    """
    call = Call.of(
        query, key, value, weights, attn_mask, is_causal, scale, enable_gqa, dropout_p, learned
    )
    if _uses_kernels(call, impl):
        return fused.description(call)
    reason = "asked for" if impl == "reference" else fused.refusal(call)
    return f"reference: {reason}"


def _uses_kernels(call: Call, impl: str | None) -> bool:
    if impl not in (None, *IMPLS):
        raise ValueError(f"impl={impl!r} is none of {', '.join(map(repr, IMPLS))}")
    if impl == "reference":
        return False
    refusal = fused.refusal(call)
    if impl == "cpu" and refusal not in (None, fused.EMPTY):
        raise RuntimeError(f"attention: impl='cpu', but {refusal}")
    return refusal is None


def _is_for_finish(weights: RowMap, name: str) -> bool:
    """Whether this is learned of the summed rows: its shape then follows the value's width."""
    narrow, wide = (weights.learned(1, width).get(name) for width in (1, 2))
    return narrow is not None and wide is not None and narrow.shape != wide.shape
