"""The dense walk: every visible key of every query, in blocks of rows, never T x T whole.

`attention` mirrors `torch.nn.functional.scaled_dot_product_attention` and takes a row map. It walks
blocks of query rows; one block's scores exist at a time, and where gradients are wanted each block
is checkpointed, so that the backward pass builds one block's scores at a time as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aftermax.visible import Rows, Visible
from aftermax.weights.row_map import RowMap
from aftermax.weights.softmax import Softmax

BLOCK_SCORES = 2**20
"""Scores that one block may hold, over batch, heads, rows and keys: 4 MiB in float32."""

IMPLS = ("reference",)
"""The ways to walk the sum that this build has."""


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
        impl: "reference", or None to pick. What is asked for and absent raises.
        **learned: the tensors that the row map learns (`weights.learned(H, Dv)` names them and
            gives their initial values, which are used for those left out).

    Returns:
        (..., H, Tq, Dv) in the dtype of `query`. Half precision is computed in float32. A row that
        sees nothing is 0. A query, key or value that is not finite turns the rows that see it into
        NaN and touches no other row, forward or backward.

    Raises:
        ValueError: for shapes, masks, dtypes, devices or an `impl` that do not fit.
        TypeError: for a learned parameter that the row map does not have.

    >>> q = k = v = torch.eye(2)[None, None]
    >>> attention(q, k, v, weights=Softmax(), is_causal=True)
    tensor([[[[1.0000, 0.0000],
              [0.3302, 0.6698]]]])
    """
    check_weights(weights)
    resolve_impl(impl)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is a probability, got {dropout_p}")
    lead = query.shape[:-2]
    query, key, value = (_four_dimensions(x) for x in (query, key, value))
    walk = _Walk.of(query, key, value, weights, attn_mask, is_causal, scale, enable_gqa, learned)
    blocks = list(walk.blocks())
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in walk.tensors())
    out = []
    with _no_autocast(query.device):
        # from the last block, the largest under causality: what it frees holds all others, where
        # ever larger blocks would each find the freed memory too small and leave it in pieces
        for start, stop in reversed(blocks):
            if needs_grad and len(blocks) > 1:
                out.append(checkpoint(walk.out, start, stop, dropout_p, use_reentrant=False))
            else:
                out.append(walk.out(start, stop, dropout_p))
    out.reverse()
    joined = out[0] if len(out) == 1 else torch.cat(out, -2)
    return joined.reshape(*lead, *joined.shape[-2:])


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
    query, key = _four_dimensions(query), _four_dimensions(key)
    value = key.new_zeros((*key.shape[:-1], 1))
    unused = {name: x for name, x in learned.items() if _is_for_finish(weights, name)}
    learned = {name: x for name, x in learned.items() if name not in unused}
    walk = _Walk.of(query, key, value, weights, attn_mask, is_causal, scale, enable_gqa, learned)
    start, stop = rows if rows is not None else (0, query.shape[-2])
    if not 0 <= start <= stop <= query.shape[-2]:
        raise ValueError(f"rows {rows} do not lie within the {query.shape[-2]} query rows")
    low, high = walk.visible.span(start, stop, key.shape[-2])
    seen = walk.rows(start, stop, (low, high))
    with _no_autocast(query.device):
        block = walk.weights_of(start, stop, seen, (low, high))
    block = block.masked_fill(walk.poisoned(start, stop, seen, (low, high)), torch.nan)
    return torch.nn.functional.pad(block, (low, key.shape[-2] - high))


def check_weights(weights: object) -> None:
    """Raise TypeError for what is no row map, saying what would be one."""
    if not isinstance(weights, RowMap):
        raise TypeError(
            f"weights must be a row map such as LSSAR(), or find('lssar').system; got {weights!r}"
        )


def resolve_impl(impl: str | None) -> str:
    """The name of the walk that `impl` picks; None picks the best that this build has."""
    if impl is None:
        return IMPLS[-1]
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not in this build; it has {', '.join(IMPLS)}")
    return impl


@dataclasses.dataclass(frozen=True)
class _Walk:
    """One call, checked and prepared: what all of its blocks share."""

    query: Tensor  # (B, H, Tq, D), as given: each block prepares its own rows
    key: Tensor  # (B, Hkv, Tk, D), prepared
    value: Tensor  # (B, Hkv, Tk, Dv)
    flawed_key: Tensor  # bool (B, H, 1, Tk): key or value not finite, and set to 0 above
    scale: float
    weights: RowMap
    visible: Visible
    sequence: Tensor | None
    learned: dict[str, Tensor]
    dtype: torch.dtype

    @classmethod
    def of(
        cls, query, key, value, weights, attn_mask, is_causal, scale, enable_gqa, learned
    ) -> _Walk:
        _check_inputs(query, key, value, enable_gqa)
        visible = _visible_of(attn_mask, is_causal)
        batch, heads, queries, width = query.shape
        visible.check(batch, heads, queries, key.shape[-2])
        learned = _complete(weights, learned, heads, value.shape[-1], query.device)

        dtype = query.dtype
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        query, key, value = (x.to(compute) for x in (query, key, value))
        key_is_sound = (key.isfinite().all(-1) & value.isfinite().all(-1))[..., None]
        key = weights.prepare(torch.where(key_is_sound, key, 0))
        value = torch.where(key_is_sound, value, 0)
        scale = weights.scale(width) if scale is None else scale
        flawed_key = ~key_is_sound.transpose(-1, -2).repeat_interleave(heads // key.shape[1], 1)

        walk = cls(query, key, value, flawed_key, scale, weights, visible, None, learned, dtype)
        if not weights.needs_sequence_count:
            return walk
        counted = visible.seen_by_any(
            queries, key.shape[-2], walk.block_rows(), query.device, compute
        )
        return dataclasses.replace(walk, sequence=counted)

    def tensors(self) -> list[Tensor]:
        """All that a gradient may be wanted of."""
        given = (self.query, self.key, self.value, self.visible.mask, self.visible.slopes)
        return [x for x in (*given, *self.learned.values()) if x is not None]

    def block_rows(self) -> int:
        batch, heads = self.query.shape[:2]
        return max(1, BLOCK_SCORES // max(1, batch * heads * self.key.shape[-2]))

    def blocks(self) -> Iterator[tuple[int, int]]:
        queries, block = self.query.shape[-2], self.block_rows()
        for start in range(0, max(queries, 1), block):
            yield start, min(start + block, queries)

    def rows(self, start: int, stop: int, span: tuple[int, int]) -> Rows:
        rows = self.visible.rows(start, stop, span, self.query.device, self.query.dtype)
        return rows._replace(sequence=self.sequence)

    def weights_of(self, start: int, stop: int, rows: Rows, span: tuple[int, int]) -> Tensor:
        """(B, H, rows, keys of the span)."""
        key = self.key[:, :, span[0] : span[1]]
        query = torch.where(self.sound_query(start, stop), self.query[:, :, start:stop], 0)
        query = self.weights.prepare(query) * self.scale
        scores = _matmul_grouped(query, key.transpose(-1, -2))
        if span[0] == span[1]:
            return scores  # no keys, no weights
        return self.weights.weigh(scores, rows, **self.learned)

    def out(self, start: int, stop: int, dropout_p: float) -> Tensor:
        """Rows [start, stop) of the result, (B, H, rows, Dv), in the caller's dtype."""
        span = self.visible.span(start, stop, self.key.shape[-2])
        rows = self.rows(start, stop, span)
        weights = self.weights_of(start, stop, rows, span)
        if dropout_p > 0:
            weights = torch.nn.functional.dropout(weights, dropout_p)
        out = _matmul_grouped(weights, self.value[:, :, span[0] : span[1]])
        out = self.weights.finish(out, **self.learned)
        poisoned = self.poisoned(start, stop, rows, span)
        if self.weights.mixes_heads:
            poisoned = poisoned.any(1, keepdim=True)
        return out.masked_fill(poisoned, torch.nan).to(self.dtype)

    def sound_query(self, start: int, stop: int) -> Tensor:
        """bool (B, H, rows, 1): the queries that are finite."""
        return self.query[:, :, start:stop].isfinite().all(-1, keepdim=True)

    def poisoned(self, start: int, stop: int, rows: Rows, span: tuple[int, int]) -> Tensor:
        """(B, H, rows, 1): the rows that see what is not finite."""
        flawed = self.flawed_key[..., span[0] : span[1]] | ~self.sound_query(start, stop)
        return (rows.visible & flawed).any(-1, keepdim=True)


def _no_autocast(device: torch.device):
    """Autocast would compute the products in half precision, which `_Walk` has just left."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _is_for_finish(weights: RowMap, name: str) -> bool:
    """Whether this is learned of the summed rows: its shape then follows the value's width."""
    narrow, wide = (weights.learned(1, width).get(name) for width in (1, 2))
    return narrow is not None and wide is not None and narrow.shape != wide.shape


def _four_dimensions(x: Tensor) -> Tensor:
    if not 2 <= x.ndim <= 4:
        raise ValueError(
            f"query, key and value need two to four dimensions (B, H, T, D), got {tuple(x.shape)}"
        )
    return x.reshape((1,) * (4 - x.ndim) + tuple(x.shape))


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(
            "query, key and value need one floating-point dtype, "
            f"got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query, key, value need one device, got {query.device}, {key.device}, {value.device}"
        )
    if key.shape[:-1] != value.shape[:-1] or key.shape[0] != query.shape[0]:
        raise ValueError(
            f"key and value need the same (B, Hkv, Tk), and B is the query's: {shapes}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key need one width D: {shapes}")
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads and not enable_gqa:
        raise ValueError(f"heads differ ({heads} and {key_heads}): pass enable_gqa=True. {shapes}")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"grouped queries need H divisible by Hkv: {shapes}")


def _visible_of(attn_mask: Tensor | Visible | None, is_causal: bool) -> Visible:
    if isinstance(attn_mask, Visible):
        return dataclasses.replace(attn_mask, causal=True) if is_causal else attn_mask
    return Visible(causal=is_causal, mask=attn_mask)


def _complete(
    weights: RowMap, learned: dict, heads: int, value_dim: int, device
) -> dict[str, Tensor]:
    """The learned tensors, with initial values for those left out."""
    initial = weights.learned(heads, value_dim)
    if unknown := set(learned) - set(initial):
        has = ", ".join(sorted(initial)) or "none"
        raise TypeError(
            f"{type(weights).__name__} learns no {', '.join(sorted(unknown))} (it learns: {has})"
        )
    for name, tensor in learned.items():
        if tensor.shape != initial[name].shape:
            raise ValueError(
                f"{name} of {type(weights).__name__} needs shape {tuple(initial[name].shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    return {name: tensor.to(device) for name, tensor in initial.items()} | learned


def _matmul_grouped(left: Tensor, right: Tensor) -> Tensor:
    """(B, H, R, X) @ (B, Hkv, X, Y), the heads of `right` shared in groups, not copied."""
    batch, heads, rows, inner = left.shape
    groups = right.shape[1]
    if heads == groups:
        return left @ right
    left = left.reshape(batch, groups, heads // groups * rows, inner)
    return (left @ right).reshape(batch, heads, rows, right.shape[-1])
