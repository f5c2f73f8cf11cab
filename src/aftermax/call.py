"""One call of attention, checked: what every way to walk the sum is given."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from aftermax.visible import Visible
from aftermax.weights.row_map import RowMap


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of `aftermax.attention`, checked and completed."""

    query: Tensor  # (B, H, Tq, D)
    key: Tensor  # (B, Hkv, Tk, D)
    value: Tensor  # (B, Hkv, Tk, Dv)
    weights: RowMap
    visible: Visible
    scale: float
    learned: dict[str, Tensor]
    dropout_p: float = 0.0

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weights: RowMap,
        attn_mask: Tensor | Visible | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        dropout_p: float,
        learned: dict[str, Tensor],
    ) -> Call:
        check_weights(weights)
        if not 0 <= dropout_p <= 1:
            raise ValueError(f"dropout_p is a probability, got {dropout_p}")
        query, key, value = (four_dimensions(x) for x in (query, key, value))
        check_inputs(query, key, value, enable_gqa)
        visible = _visible_of(attn_mask, is_causal)
        batch, heads, queries, width = query.shape
        visible.check(batch, heads, queries, key.shape[-2])
        for name, x in {"attn_mask": visible.mask, "slopes": visible.slopes, **learned}.items():
            if x is not None and x.device != query.device:
                raise ValueError(f"{name} is on {x.device}, the query on {query.device}")
        return cls(
            query,
            key,
            value,
            weights,
            visible,
            weights.scale(width) if scale is None else scale,
            complete(
                type(weights).__name__,
                weights.learned(heads, value.shape[-1]),
                learned,
                query.device,
            ),
            dropout_p,
        )

    def tensors(self) -> list[Tensor]:
        """All that a gradient may be wanted of."""
        given = (self.query, self.key, self.value, self.visible.mask, self.visible.slopes)
        return [x for x in (*given, *self.learned.values()) if x is not None]

    def wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.tensors())


def check_weights(weights: object) -> None:
    """Raise TypeError for what is no row map, saying what would be one."""
    if not isinstance(weights, RowMap):
        raise TypeError(
            f"weights must be a row map such as LSSAR(), or find('lssar').system; got {weights!r}"
        )


def four_dimensions(x: Tensor) -> Tensor:
    if x.ndim == 4:
        return x
    if not 2 <= x.ndim <= 4:
        raise ValueError(
            f"query, key and value need two to four dimensions (B, H, T, D), got {tuple(x.shape)}"
        )
    return x.reshape((1,) * (4 - x.ndim) + tuple(x.shape))


@torch.no_grad()
def finite_rows(x: Tensor) -> Tensor:
    """bool (B, H, T): the rows of (B, H, T, D) that are finite."""
    return (x * 0).sum(-1) == 0  # NaN if one is not; an eighth of the time of isfinite


def check_inputs(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raise ValueError for (B, H, T, D) tensors that do not belong together."""
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(
            "query, key and value need one floating-point dtype, "
            f"got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query, key, value need one device, got {query.device}, {key.device}, {value.device}"
        )
    if (wrong := _misfit(query.shape, key.shape, value.shape, enable_gqa)) is not None:
        raise ValueError(
            f"{wrong}: query {tuple(query.shape)}, key {tuple(key.shape)},"
            f" value {tuple(value.shape)}"
        )


def _misfit(query: torch.Size, key: torch.Size, value: torch.Size, enable_gqa: bool) -> str | None:
    heads, key_heads = query[1], key[1]
    if key[:-1] != value[:-1] or key[0] != query[0]:
        return "key and value need the same (B, Hkv, Tk), and B is the query's"
    if query[-1] != key[-1]:
        return "query and key need one width D"
    if heads != key_heads and not enable_gqa:
        return f"heads differ ({heads} and {key_heads}): pass enable_gqa=True"
    if key_heads == 0 or heads % key_heads:
        return "grouped queries need H divisible by Hkv"
    return None


def _visible_of(attn_mask: Tensor | Visible | None, is_causal: bool) -> Visible:
    if isinstance(attn_mask, Visible):
        return dataclasses.replace(attn_mask, causal=True) if is_causal else attn_mask
    return Visible(causal=is_causal, mask=attn_mask)


def complete(
    name: str, initial: dict[str, Tensor], learned: dict[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """The learned tensors of the system of that name, with initial values for those left out."""
    if unknown := set(learned) - set(initial):
        has = ", ".join(sorted(initial)) or "none"
        raise TypeError(f"{name} learns no {', '.join(sorted(unknown))} (it learns: {has})")
    for key, tensor in learned.items():
        if tensor.shape != initial[key].shape:
            raise ValueError(
                f"{key} of {name} needs shape {tuple(initial[key].shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    left_out = {key: x.to(device) for key, x in initial.items() if key not in learned}
    return left_out | learned
