"""Codes for keys: the nearest of S vectors, how they are found, and how they follow the keys.

A codebook is no parameter here: it is the running mean of the keys that chose each code
(van den Oord et al., arXiv 1711.00937, appendix A.1; Transformer-VQ, arXiv 2309.16354), which
begins with k-means and gives a code that nobody chooses to a key of the moment.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aftermax.blocks import no_autocast


def nearest(key: Tensor, codebook: Tensor) -> Tensor:
    """z = argmin_s ‖k - C_s‖², the first of those that are equally near.

    Args:
        key: (B, H, T, D).
        codebook: (H, S, D).

    Returns:
        int64 (B, H, T). No gradient: how it is passed on is the caller's matter. A key that is not
        finite gets some code.

    >>> nearest(torch.tensor([[[[0.2, 0.0], [0.9, 0.3]]]]), torch.eye(2)[None])
    tensor([[[0, 0]]])
    """
    key, codebook = key.detach(), codebook.detach()
    half_square = codebook.square().sum(-1) / 2  # (H, S)
    return (half_square[:, None] - key @ codebook.transpose(-1, -2)).argmin(-1)


def gathered(codebook: Tensor, codes: Tensor) -> Tensor:
    """C_z: (H, S, D) and int64 (B, H, T) -> (B, H, T, D).

    >>> gathered(torch.eye(2)[None], torch.tensor([[[1, 0, 1]]]))
    tensor([[[[0., 1.],
              [1., 0.],
              [0., 1.]]]])
    """
    heads, size, width = codebook.shape
    first = size * torch.arange(heads, device=codes.device)[:, None]
    flat = codebook.reshape(heads * size, width)
    return flat.index_select(0, (codes + first).flatten()).unflatten(0, codes.shape)


def start_of(size: int, width: int) -> Tensor:
    """(S, D): as if Gaussian and the same on every call, for keys of about unit variance.

    By a formula, not by a generator, which `torch.compile` does not take.

    >>> start = start_of(64, 32)
    >>> bool(start.mean().abs() < 0.05), round(start.std().item(), 1)
    (True, 1.0)
    """
    number = torch.arange(1, 2 * size * width + 1, dtype=torch.float64)
    uniform = (torch.sin(12.9898 * number.square()) * 43758.5453) % 1
    radius, turn = uniform.clamp_min(1e-9).reshape(2, size, width)
    return ((-2 * radius.log()).sqrt() * torch.cos(2 * math.pi * turn)).float()


def k_means(keys: Tensor, size: int, steps: int = 10) -> tuple[Tensor, Tensor]:
    """S means of keys (N, D), each of the keys that are nearest to it (Lloyd).

    Starts from S of the keys, drawn from torch's global generator: different ones, as far as there
    are any. A mean that loses its keys stays where it is.

    Returns:
        Means (S, D) and how many keys each has, float (S,).

    >>> means, counts = k_means(torch.tensor([[0.0], [0.1], [5.0], [5.3]]), 2)
    >>> means.flatten().sort().values, counts
    (tensor([0.0500, 5.1500]), tensor([2., 2.]))
    """
    if keys.ndim != 2 or not keys.shape[0]:
        raise ValueError(f"k-means needs keys (N, D), at least one, got {tuple(keys.shape)}")
    order = torch.randperm(keys.shape[0], device=keys.device)
    means = keys[order[torch.arange(size, device=keys.device) % len(order)]].clone()
    sums, counts = _sums(keys, means)
    for _ in range(steps):
        means = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), means)
        sums, counts = _sums(keys, means)
    return means, counts


def _sums(keys: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Of the keys nearest to each mean: their sum (S, D), and how many (S,)."""
    codes = nearest(keys[None, None], means[None])[0, 0]
    sums = torch.zeros_like(means).index_add(0, codes, keys)
    counts = keys.new_zeros(means.shape[0]).index_add(0, codes, keys.new_ones(len(codes)))
    return sums, counts


UNUSED = 1e-6
"""Count below which a code rests."""


class Diagnostics(NamedTuple):
    """How a codebook is used, for each of its heads."""

    perplexity: Tensor
    """(H,): exp of the entropy of the running counts; S where all codes are used alike."""
    dead: Tensor
    """int64 (H,): codes below the threshold of re-seeding, now."""
    reseeded: Tensor
    """int64 (H,): codes that were re-seeded so far."""


class Codebook(nn.Module):
    """A codebook (H, S, D) that follows the keys, all of it in buffers::

        n_s <- g n_s + (1 - g) #{j : z_j = s}
        m_s <- g m_s + (1 - g) sum_{z_j = s} k_j
        C_s  = m_s / n_s

    as the authors of Transformer-VQ have it (decay, and counts in keys of a batch), but that they
    divide by at least 0.01: where a batch holds few keys for each code, that draws codes to 0. A
    code that nobody uses (n_s below a millionth) stays where it is. Two things more are ours: the
    first keys that it `follow`s give its start, by k-means (they draw it), and
    a code whose count is below `dead` of the mean count goes to a random key of the batch, with the
    mean count. Random numbers come from torch's global generator.

    Args:
        heads, size, width: H, S, D.
        decay: g, 0.99 (Transformer-VQ).
        dead: share of the mean count below which a code is dead, 0.02, our choice; 0 = none is.
        k_means_steps: of the start, 10, our choice; 0 = none, the codes begin Gaussian.

    >>> book = Codebook(heads=1, size=4, width=2, decay=0.5)
    >>> book.follow(torch.randn(8, 1, 16, 2))
    >>> book.codes.shape, bool(book.diagnostics().perplexity > 3)
    (torch.Size([1, 4, 2]), True)
    """

    codes: Tensor
    sums: Tensor
    counts: Tensor
    reseeded: Tensor
    begun: Tensor

    def __init__(
        self,
        heads: int,
        size: int,
        width: int,
        *,
        decay: float = 0.99,
        dead: float = 0.02,
        k_means_steps: int = 10,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not 0 <= decay < 1 or not 0 <= dead < 1:
            raise ValueError(f"decay and dead are shares below 1, got {decay} and {dead}")
        if k_means_steps < 0:
            raise ValueError(f"k_means_steps must be at least 0, got {k_means_steps}")
        self.decay, self.dead, self.k_means_steps = decay, dead, k_means_steps
        codes = start_of(size, width).to(device=device, dtype=dtype).repeat(heads, 1, 1)
        self.register_buffer("codes", codes)
        wide = codes.to(torch.promote_types(codes.dtype, torch.float32))
        self.register_buffer("sums", wide.clone())
        self.register_buffer("counts", wide.new_ones(heads, size))
        whole = {"dtype": torch.int64, "device": codes.device}
        self.register_buffer("reseeded", torch.zeros(heads, **whole))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool, device=codes.device))

    def _apply(self, fn, recurse=True):
        """Running sums and counts stay in float32 or better, whatever the codes become: in half a
        count stops at 256 or 2048, and a step of 1 % is rounded away."""
        wide = {name: getattr(self, name) for name in ("sums", "counts")}
        super()._apply(fn, recurse)
        for name, before in wide.items():
            now = getattr(self, name)
            if now.dtype != torch.promote_types(now.dtype, torch.float32):
                setattr(self, name, before.to(device=now.device, dtype=torch.float32))
        return self

    @torch.compiler.disable
    @torch.no_grad()
    def begin(self, key: Tensor, seen: Tensor | None = None) -> None:
        """Place the codes by k-means of these keys, if none were followed before; as `follow`."""
        if key.is_meta or self.begun or not self.k_means_steps:
            return
        if not all(keys.shape[0] for keys in self._rows(key, seen)):
            return  # the first batch that has keys is the start
        with no_autocast(key.device):
            for head, keys in enumerate(self._rows(key, seen)):
                means, counts = k_means(keys, self.codes.shape[1], self.k_means_steps)
                self.counts[head] = counts
                self.sums[head] = means * counts.clamp_min(UNUSED)[:, None]
            self._revive(key, seen)
            self._divide()
            self.begun.fill_(True)

    @torch.compiler.disable
    @torch.no_grad()
    def follow(self, key: Tensor, seen: Tensor | None = None) -> None:
        """Take in the keys of a batch.

        Args:
            key: (B, H, T, D).
            seen: bool (B, T): padding teaches nothing. Nor do keys that are not finite.
        """
        if key.is_meta:
            return
        self.begin(key, seen)  # type: ignore[call-arg]
        if self.k_means_steps and not self.begun:
            return
        with no_autocast(key.device):
            for head, keys in enumerate(self._rows(key, seen)):
                sums, counts = _sums(keys, self.codes[head].to(keys.dtype))
                self.sums[head] = self.decay * self.sums[head] + (1 - self.decay) * sums
                self.counts[head] = self.decay * self.counts[head] + (1 - self.decay) * counts
            self._revive(key, seen)
            self._divide()
            self.begun.fill_(True)

    def diagnostics(self) -> Diagnostics:
        """Perplexity and dead codes, of the running counts."""
        share = self.counts / self.counts.sum(-1, keepdim=True)
        perplexity = torch.special.entr(share).sum(-1).exp()
        return Diagnostics(perplexity, self._is_dead().sum(-1), self.reseeded.clone())

    def _is_dead(self) -> Tensor:
        """bool (H, S)"""
        return self.counts < max(self.dead, 1e-12) * self.counts.mean(-1, keepdim=True)

    def _revive(self, key: Tensor, seen: Tensor | None) -> None:
        if not self.dead:
            return
        dead = self._is_dead()
        for head, keys in enumerate(self._rows(key, seen)):
            which = dead[head].nonzero()[:, 0]
            if not len(which) or not keys.shape[0]:
                continue
            drawn = torch.randperm(keys.shape[0], device=keys.device)
            chosen = keys[drawn[torch.arange(len(which), device=keys.device) % len(drawn)]]
            count = self.counts[head].mean()
            self.counts[head, which] = count
            self.sums[head, which] = chosen * count.clamp_min(UNUSED)
            self.reseeded[head] += len(which)

    def _divide(self) -> None:
        means = self.sums / self.counts.clamp_min(UNUSED)[..., None]
        used = (self.counts >= UNUSED)[..., None]
        self.codes.copy_(torch.where(used, means, self.codes.to(means.dtype)))

    def _rows(self, key: Tensor, seen: Tensor | None) -> list[Tensor]:
        """The keys (N, D) of each head, those alone that are seen and finite."""
        key = key.detach().to(self.sums.dtype)
        keep = key.isfinite().all(-1)
        if seen is not None:
            keep = keep & seen[:, None]
        return [key[:, head][keep[:, head]] for head in range(key.shape[1])]

    def extra_repr(self) -> str:
        heads, size, width = self.codes.shape
        return f"heads={heads}, size={size}, width={width}, decay={self.decay}, dead={self.dead}"
