"""LongVQ with a window that short sequences leave, and the dense sum that it must equal."""

from __future__ import annotations

import dataclasses

import torch

from aftermax import VectorQuantised, Visible, find

from .cases import Case, distances

ENTRY = find("longvq")
SMALL = dataclasses.replace(ENTRY, system=VectorQuantised(codes=5, window=3))
CAUSAL = Visible(causal=True)


def dense(case: Case, visible: Visible, window: int, seen=None) -> torch.Tensor:
    """Softmax over C_z, all pairs: near keys straight through to the key, others to their code."""
    codebook, bias = case.learned["codebook"], case.learned["window_bias"]
    groups = case.query.shape[1] // case.key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (case.key, case.value))
    codes = (key.detach()[:, :, :, None] - codebook.detach()[:, None]).square().sum(-1).argmin(-1)
    code = torch.stack([codebook[h][codes[:, h]] for h in range(codebook.shape[0])], 1)
    scale, distance = case.query.shape[-1] ** -0.5, distances(key.shape[2])
    near = distance.abs() < window
    at = bias[:, distance.abs().clamp(max=window - 1)]
    through = case.query @ (code + key - key.detach()).mT * scale + at
    scores = torch.where(near, through, case.query @ code.mT * scale)
    allowed = distance >= 0 if visible.causal else torch.ones_like(near)
    allowed = allowed if seen is None else allowed & seen[:, None, None]
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return weights.nan_to_num() @ value
