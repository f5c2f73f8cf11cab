"""What a query may see: every kind of mask in one form, handed out a block of rows at a time.

`Visible` is a small description (causal, window, mask, ALiBi slopes). It never builds the whole
Tq x Tk matrix by itself: the dense walk asks it for the rows that it is about to compute. Systems
whose formula needs a length count the visible keys of each row from here (`count`), never from
`key.shape[-2]`: caches, padding and static allocation make that number wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aftermax.reference import onnx_export


class Rows(NamedTuple):
    """What one block of query rows may see, over one span of keys."""

    visible: Tensor
    """bool, broadcastable to (B, H, rows, keys); True = may be seen."""
    bias: Tensor | None
    """Additive term of the scores, broadcastable like `visible`; 0 where nothing is visible."""
    distance: Tensor
    """int64 (rows, keys): position of the query minus position of the key."""
    sequence: Tensor | None = None
    """(B, H, 1, 1): keys that any query of the sequence sees, for maps that ask for it."""


@dataclass(frozen=True)
class Visible:
    """What each query may see. The parts restrict together: a key must pass all of them.

    Args:
        causal: query i sees key j only if `j <= i + offset`. With `offset=0` this is SDPA's
            top-left alignment.
        offset: position of the first query among the keys (a cache's length before this call).
        window: only keys at a distance below `window` (positions) are seen; 1 = only itself.
        mask: SDPA's `attn_mask`, broadcastable to (B, H, Tq, Tk). Bool: True = may be seen.
            Float: added to the scores; `-inf`, and anything at or below half of the dtype's
            lowest number (Hugging Face writes `finfo.min`), means not visible.
        slopes: ALiBi slopes, one for each head (H,): `-slope * |distance|` is added to the scores
            (Press et al., arXiv 2108.12409).

    >>> cpu = torch.device("cpu")
    >>> Visible(causal=True, window=2).rows(0, 3, (0, 3), cpu, torch.float32).visible
    tensor([[[[ True, False, False],
              [ True,  True, False],
              [False,  True,  True]]]])
    """

    causal: bool = False
    offset: int = 0
    window: int | None = None
    mask: Tensor | None = None
    slopes: Tensor | None = None

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Raise ValueError where a part cannot belong to scores of shape (B, H, Tq, Tk)."""
        scores = (batch, heads, queries, keys)
        if self.mask is not None:
            shape = tuple(self.mask.shape)
            fits = len(shape) <= 4 and all(
                m in (1, s) for m, s in zip(reversed(shape), reversed(scores), strict=False)
            )
            if not fits:
                raise ValueError(
                    f"attn_mask of shape {shape} does not broadcast to (B, H, Tq, Tk) = {scores}"
                )
            if self.mask.dtype != torch.bool and not self.mask.is_floating_point():
                raise ValueError(f"attn_mask must be bool or floating point, got {self.mask.dtype}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (itself), got {self.window}")
        if self.slopes is not None and tuple(self.slopes.shape) != (heads,):
            raise ValueError(
                f"ALiBi slopes must have shape (H,) = ({heads},), got {tuple(self.slopes.shape)}"
            )

    def span(self, start: int, stop: int, keys: int) -> tuple[int, int]:
        """The keys [low, high) outside of which rows [start, stop) see nothing."""
        low, high = 0, keys
        if self.causal:
            high = min(high, self.offset + stop)
        if self.window is not None:
            low = max(low, self.offset + start - self.window + 1)
            high = min(high, self.offset + stop - 1 + self.window)
        low = min(low, keys)
        return low, max(low, high)

    def rows(
        self, start: int, stop: int, span: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> Rows:
        """The block of rows [start, stop) over the keys of `span`; `dtype` is the scores'."""
        low, high = span
        query_position = torch.arange(start + self.offset, stop + self.offset, device=device)
        key_position = torch.arange(low, high, device=device)
        distance = query_position[:, None] - key_position
        visible = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            visible = visible & (distance >= 0)
        if self.window is not None:
            visible = visible & (distance.abs() < self.window)
        visible, bias = visible[None, None], None

        if self.mask is not None:
            mask = _block_of(self.mask, start, stop, low, high)
            if mask.dtype == torch.bool:
                visible = visible & mask
            else:
                # NaN is not hidden by this: it shall be seen in the rows that it stands in
                visible = visible & ~(mask <= hidden_below(mask.dtype))
                bias = torch.where(visible, mask, 0).to(dtype)
        if self.slopes is not None:
            alibi = -self.slopes.to(dtype)[None, :, None, None] * distance.abs()
            bias = alibi if bias is None else bias + alibi
        return Rows(visible, bias, distance)

    def differs_by_query(self) -> bool:
        """Whether queries see different keys for another reason than causality."""
        if self.window is not None:
            return True
        mask = self.mask
        return mask is not None and mask.ndim > 1 and mask.shape[-2] > 1 and mask.stride(-2) != 0

    def seen_keys(self, system: str) -> Tensor | None:
        """The mask as bool, for systems to whose scores nothing can be added; None = all are seen.

        Raises:
            ValueError: for ALiBi slopes, and for a float mask that does more than hide keys.
        """
        if self.slopes is not None:
            raise ValueError(f"{system} has no scores that ALiBi slopes could be added to")
        mask = self.mask
        if mask is not None and mask.ndim > 1 and not self.differs_by_query():
            mask = mask[..., :1, :]  # where it was expanded, one row says all
        if mask is None or mask.dtype == torch.bool:
            return mask
        hidden = mask <= hidden_below(mask.dtype)
        only_hides = (hidden | (mask == 0)).all()
        problem = f"{system} has no scores that a mask could be added to: let it be 0, or -inf"
        if torch.compiler.is_compiling():
            torch.ops.aten._assert_async.msg(only_hides, problem)
        elif not only_hides:
            raise ValueError(problem)
        return ~hidden

    def seen_by_any(
        self, queries: int, keys: int, block: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """How many keys at least one query sees, (B|1, H|1, 1, 1), walked in blocks of rows."""
        seen = torch.zeros((1, 1, 1, keys), dtype=torch.bool, device=device)
        for start, stop in pieces(queries, block):
            rows = self.rows(start, stop, (0, keys), device, dtype)
            seen = seen | rows.visible.any(-2, keepdim=True)
        return seen.sum(-1, keepdim=True)


def pieces(rows: int, block: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of each block of rows, at least one; for ONNX one that holds them all.

    >>> list(pieces(5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    if onnx_export():  # one graph for all lengths has no loop over blocks
        yield 0, rows
        return
    for start in range(0, max(rows, 1), block):
        yield start, min(start + block, rows)


def hidden_below(dtype: torch.dtype) -> float:
    """The number up to which an additive mask of that dtype hides a key."""
    return torch.finfo(dtype).min / 2


def check_tokens(name: str, mask: Tensor, batch: int, tokens: int) -> None:
    """Raise ValueError for what is no bool mask of tokens (B, T)."""
    if mask.dtype != torch.bool or tuple(mask.shape) != (batch, tokens):
        raise ValueError(
            f"{name} must be bool of shape (B, T) = {(batch, tokens)}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )


def refuse_mask(visible: Visible) -> None:
    """Raise ValueError where a step, which is told of padding otherwise, is given a mask."""
    if visible.mask is not None:
        raise ValueError("step takes what later queries may see as `seen` (B, T), not as a mask")


def count(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """N_i, the number of keys that each row sees: (..., rows, keys) bool -> (..., rows, 1).

    >>> count(torch.tensor([[True, False], [True, True]]), torch.float32)
    tensor([[1.],
            [2.]])
    """
    return visible.sum(-1, keepdim=True).to(dtype)


def _block_of(mask: Tensor, start: int, stop: int, low: int, high: int) -> Tensor:
    """Rows and keys of a mask that may be broadcast (length 1) along either."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    if mask.shape[-2] > 1:
        mask = mask[:, :, start:stop]
    if mask.shape[-1] > 1:
        mask = mask[..., low:high]
    return mask
