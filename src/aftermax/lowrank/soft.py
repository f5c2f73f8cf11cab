"""SOFT: a Gaussian kernel in place of softmax, through a few landmarks. No row is normalised.

Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity", arXiv 2110.11945 (NeurIPS 2021),
and "Softmax-free Linear Transformers", arXiv 2207.03341 (SOFT++), both for images::

    kappa(x, y) = exp(-|x - y|^2 / (2 sqrt(d)))
    A = kappa(L, L),   L = f(K), m landmarks pooled from the keys
    SOFT      out = kappa(Q, L) A^-1 (kappa(L, K) V)
    SOFT++    out = kappa(Q, L) D^-1/2 A^-1 D^-1/2 (kappa(L, K) V),   D = diag(A 1)

read from right to left, T x m and m x m at most. The papers have Q = K (there is no projection of
the keys), so that the whole is symmetric and positive semi-definite; with other queries it is the
ordinary Nystroem form of the same kernel, and that extension is ours.

The pseudo-inverse is twenty Newton steps (`newton.py`). The papers invert A; the first authors'
code inverts A + 0.01 I, and so do we by default (`ridge`): it bounds the smallest singular value,
so that two landmarks that coincide do no harm, float32 stays sound however many steps are taken,
and the backward pass, which is that of an inverse, has one. The price is a bias: a direction of A
with eigenvalue s is kept with the share s / (s + ridge). `ridge=0` is the papers' equation, and
what the code of SOFT++ does.

Landmarks mix all positions, so that there is no causal form and no state to decode with.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aftermax import scores
from aftermax.blocks import no_autocast
from aftermax.call import check_inputs
from aftermax.entry import Entry, Laws
from aftermax.lowrank.newton import check_newton, newton_inverse
from aftermax.visible import Visible, check_tokens


def soft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor,
    *,
    filled: Tensor | None = None,
    scale: float | None = None,
    newton: int = 20,
    ridge: float = 0.01,
    normalised: bool = False,
) -> Tensor:
    """kappa(Q, L) A^-1 (kappa(L, K) V), right to left; see the head of this file.

    Args:
        query: (..., Tq, D).
        key, value: (..., Tk, D), (..., Tk, Dv). A key whose value is 0 adds nothing.
        landmarks: (..., m, D).
        filled: bool (..., m, 1), the landmarks that there are; the others change nothing.
        scale: s in kappa(x, y) = exp(-s ‖x - y‖^2 / 2); None = 1 / sqrt(D).
        newton, ridge, normalised: as in `SOFT`.

    Returns:
        (..., Tq, Dv).

    >>> x = torch.randn(5, 4, dtype=torch.float64)
    >>> out = soft_attention(x, x, x, x, ridge=0.0, newton=40)  # all tokens are landmarks
    >>> torch.allclose(out, scores.gaussian(x, x, 0.5) @ x)
    True
    """
    scale = scores.inv_sqrt_dim(query.shape[-1]) if scale is None else scale
    to_landmarks = scores.gaussian(query, landmarks, scale)
    from_landmarks = scores.gaussian(key, landmarks, scale).transpose(-1, -2)
    among = scores.gaussian(landmarks, landmarks, scale)
    if filled is not None:
        from_landmarks = from_landmarks * filled
        among = among * (filled & filled.transpose(-1, -2))
    # kappa(x, x) = 1, without the rounding of |x - x|; and an empty landmark is a row of I
    among = among.masked_fill(torch.eye(among.shape[-1], dtype=torch.bool, device=key.device), 1)

    inverse = newton_inverse(among, newton, ridge)
    summed = from_landmarks @ value
    if not normalised:
        return to_landmarks @ (inverse @ summed)
    root = among.sum(-1, keepdim=True).rsqrt()
    return to_landmarks @ (root * (inverse @ (root * summed)))


@dataclass(frozen=True)
class SOFT:
    """SOFT, and SOFT++ with `normalised=True`, as a system.

    The landmarks are means of the visible keys, in order: the key of rank r among the n that are
    visible belongs to segment floor(r m / n), with m = min(landmarks, n). Up to `landmarks` keys
    each is its own landmark, and nothing is approximated but the inverse. For an image, whose
    papers pool in two dimensions, see `SOFTAttention`.

    Args:
        landmarks: 49 in all stages of the paper (ImageNet accuracy of its smallest network with 36,
            49, 64, 81: 79.0, 79.3, 79.3, 78.9).
        newton: steps of the inverse, 20 (algorithm 2), which suffice where landmarks are apart:
            `newton_inverse(..., return_residual=True)` tells. With 49 landmarks and the default
            ridge 30 always do, since norm_1(A) <= 49 and (1 - 1.8 (0.01 / 49)^2)^(2^30) = e^-80.
        ridge: added to the diagonal of A, 0.01 as in the authors' code; the papers have none. See
            the head of this file.
        normalised: D^-1/2 on both sides of the inverse (SOFT++).

    Half precision is computed in float32. A key mask, (B|1, H|1, 1, Tk), is the only thing that a
    query may be told not to see.

    >>> x = torch.randn(1, 2, 100, 8)
    >>> SOFT().attend(x, x, x, Visible()).shape
    torch.Size([1, 2, 100, 8])
    """

    landmarks: int = 49
    newton: int = 20
    ridge: float = 0.01
    normalised: bool = False

    def __post_init__(self):
        if self.landmarks < 1:
            raise ValueError(f"SOFT needs landmarks >= 1, got {self.landmarks}")
        check_newton(self.newton, self.ridge)

    def learned(self, heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        """Nothing: all is in the projections."""
        return {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Visible,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        dropout_p: float = 0.0,
        impl: str | None = None,
        **learned: Tensor,
    ) -> Tensor:
        """(B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv) -> (B, H, Tq, Dv).

        A row that sees nothing is 0. A visible key or value that is not finite turns every row of
        its head into NaN, since each landmark reaches all rows; a query, its own row.

        Args:
            visible: nothing but a mask that is the same for all queries.
            scale: s in kappa(x, y) = exp(-s ‖x - y‖^2 / 2); None = 1 / sqrt(D).
            enable_gqa: allow Hkv to be a divisor of H.
            dropout_p: must be 0: the weights that it would fall on are never there.
            impl: None or "reference".

        Raises:
            ValueError: for a causal call, a window, a mask that differs by query or that does more
                than hide keys, ALiBi, dropout, and inputs that do not fit.
            RuntimeError: for impl="cpu"; there is no kernel.
            TypeError: for learned tensors; there are none.
        """
        _check_call(dropout_p, impl, learned)
        check_inputs(query, key, value, enable_gqa)
        batch, heads, queries, _ = query.shape
        kv_heads, keys = key.shape[1], key.shape[2]
        visible.check(batch, heads, queries, keys)
        seen = _key_mask(visible, keys, query.device)
        if seen.shape[1] > 1 and kv_heads < heads:
            # a mask for each query head, where heads share their keys: then they share no landmarks
            key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
            kv_heads = heads
        dtype = query.dtype
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        query, key, value = (x.to(compute) for x in (query, key, value))

        sound_key = (key.isfinite().all(-1) & value.isfinite().all(-1))[..., None]
        sound_query = query.isfinite().all(-1, keepdim=True)
        flawed_head = (seen & ~sound_key).any(-2, keepdim=True)
        poisoned = _grouped(seen.any(-2, keepdim=True) & ~sound_query, kv_heads) | flawed_head
        query = _grouped(torch.where(sound_query, query, 0), kv_heads)
        key, value = (torch.where(seen & sound_key, x, 0) for x in (key, value))
        with no_autocast(query.device):
            landmarks, filled = pooled_in_order(key, seen, self.landmarks)
            out = soft_attention(
                query,
                key,
                value,
                landmarks,
                filled=filled,
                scale=scale,
                newton=self.newton,
                ridge=self.ridge,
                normalised=self.normalised,
            )
        out = out.masked_fill(poisoned, torch.nan)
        return out.reshape(batch, heads, queries, value.shape[-1]).to(dtype)

    def init_state(self, batch: int, kv_heads: int, key_dim: int, value_dim: int, **factory):
        raise ValueError(_NOT_CAUSAL)

    def step(self, query, key, value, state, visible: Visible, seen=None, **options):
        raise ValueError(_NOT_CAUSAL)


def pooled_in_order(key: Tensor, seen: Tensor, landmarks: int) -> tuple[Tensor, Tensor]:
    """Means of the visible keys over segments of their rank: landmarks, and which there are.

    Args:
        key: (B, H, Tk, D), 0 where it is not seen.
        seen: bool (B|1, H|1, Tk, 1).
        landmarks: the largest number of segments.

    Returns:
        (B, H, m, D) and bool (B|1, H|1, m, 1), with m enough for all that there are.
    """
    # what is compiled or exported may meet any length, and has room for all of them
    compiling = torch.compiler.is_compiling()
    slots = landmarks if compiling else max(1, min(landmarks, key.shape[-2]))
    seen = seen.transpose(-1, -2)
    count = seen.sum(-1, keepdim=True)
    filled = count.clamp_max(landmarks)
    rank = seen.cumsum(-1) - 1
    segment = rank * filled // count.clamp_min(1)
    slot = torch.arange(slots, device=key.device)[:, None]
    member = ((segment == slot) & seen).to(key.dtype)
    share = member / member.sum(-1, keepdim=True).clamp_min(1)
    return share @ key, slot < filled


_NOT_CAUSAL = "SOFT is not causal: its landmarks mix all positions, so that no token comes after"


def _check_call(dropout_p: float, impl: str | None, learned: dict[str, Tensor]) -> None:
    if dropout_p:
        raise ValueError(
            f"SOFT takes no dropout, got dropout_p={dropout_p}: it never has the weights whole"
        )
    if impl == "cpu":
        raise RuntimeError("impl='cpu', but SOFT has no kernel")
    if impl not in (None, "reference"):
        raise ValueError(f"impl={impl!r} is none of 'reference', 'cpu'")
    if learned:
        raise TypeError(f"SOFT learns no {', '.join(sorted(learned))} (it learns: none)")


def _key_mask(visible: Visible, keys: int, device: torch.device) -> Tensor:
    """bool (B|1, H|1, Tk, 1): the keys that are seen, by all queries alike."""
    if visible.causal:
        raise ValueError(_NOT_CAUSAL)
    if visible.differs_by_query():
        what = f"window={visible.window}"
        if visible.window is None:
            assert visible.mask is not None
            what = f"a mask of shape {tuple(visible.mask.shape)}"
        raise ValueError(
            "SOFT pools the keys once for all queries: it takes a mask (B|1, H|1, 1, Tk), "
            f"got {what}"
        )
    seen = visible.seen_keys("SOFT")
    if seen is None:
        return torch.ones(1, 1, keys, 1, dtype=torch.bool, device=device)
    if seen.device != device:
        raise ValueError(f"attn_mask is on {seen.device}, the query on {device}")
    seen = seen.reshape((1,) * (4 - seen.ndim) + tuple(seen.shape))
    return seen.expand(-1, -1, -1, keys).transpose(-1, -2)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, Tq, X) -> (B, Hkv, H / Hkv * Tq, X): the queries that share a key head as one."""
    batch, heads, queries, width = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * queries, width)


class SOFTAttention(nn.Module):
    """The papers' attention for images: queries are keys, and landmarks are pooled on the grid.

    Args:
        width: of the tokens, in and out.
        heads: H.
        grid: (h, w), the tokens being rows of an image one after the other; None = a sequence, with
            means over its order as in `SOFT`.
        ratio: a landmark for each ratio x ratio tokens of the grid (8, 4, 2, 1 in the papers'
            stages, 49 landmarks in each). None = as many as `landmarks` allows, in the proportions
            of the grid; 7 x 7 where it is square.
        landmarks: at most so many, where there is no `ratio`.
        pooling: "average", the mean (the default of 2110.11945), or "conv", what the authors' code
            has: a convolution with kernel and stride `ratio`, shared by the heads, then LayerNorm
            and GELU, after which a landmark is no mean of queries any more.
        value_conv: kernel size of a depth-wise convolution of the values, one for each head, that
            is added to the result; it is in the authors' code (9, 5, 3 in their first three stages)
            and not in the equations. 0 = none.
        newton, ridge, normalised: as in `SOFT`.
        head_dim: width of a head; None = width / heads.
        bias: of the three projections. The authors' have one; our other modules have none.

    Shapes: `forward` takes (B, T, width), T = h * w, and returns the same. The authors' networks
    have softmax in their last stage, where the grid is 7 x 7: that is no part of this module.

    >>> attend = SOFTAttention(32, heads=4, grid=(8, 8), ratio=2)
    >>> attend(torch.randn(2, 64, 32)).shape
    torch.Size([2, 64, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        grid: tuple[int, int] | None = None,
        ratio: int | None = None,
        landmarks: int = 49,
        pooling: Literal["average", "conv"] = "average",
        value_conv: int = 0,
        newton: int = 20,
        ridge: float = 0.01,
        normalised: bool = False,
        head_dim: int | None = None,
        bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if heads < 1 or (head_dim is None and width % heads):
            raise ValueError(f"width {width} is not divisible by {heads} heads; give head_dim")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        _check_pooling(grid, ratio, pooling, value_conv)
        self.heads, self.head_dim = heads, head_dim or width // heads
        self.grid, self.ratio, self.pooling = grid, ratio, pooling
        self.system = SOFT(landmarks, newton, ridge, normalised)

        inner = heads * self.head_dim
        self.to_query = nn.Linear(width, inner, bias, **factory)
        self.to_value = nn.Linear(width, inner, bias, **factory)
        self.to_out = nn.Linear(inner, width, bias, **factory)
        self.landmark_conv = self.landmark_norm = self.value_conv = None
        if pooling == "conv":
            assert ratio is not None
            self.landmark_conv = nn.Conv2d(
                self.head_dim, self.head_dim, ratio, stride=ratio, bias=False, **factory
            )
            self.landmark_norm = nn.LayerNorm(self.head_dim, **factory)
        if value_conv:
            self.value_conv = nn.Conv2d(
                heads, heads, value_conv, padding="same", groups=heads, bias=False, **factory
            )

    @property
    def cells(self) -> tuple[int, int] | None:
        """(rows, columns) of the grid of landmarks."""
        if self.grid is None:
            return None
        height, width = self.grid
        if self.ratio is not None:
            return height // self.ratio, width // self.ratio
        most = self.system.landmarks
        if height * width <= most:
            return height, width
        rows = max(1, min(height, most, math.isqrt(most * height // width)))
        return rows, min(width, most // rows)

    def forward(self, x: Tensor, visible: Tensor | Visible | None = None) -> Tensor:
        """(B, T, width) -> (B, T, width).

        Args:
            visible: for a sequence, as in `Attention`: None, a bool (B, T) mask of the tokens that
                may be seen, or a `Visible`. On a grid all tokens are seen: None.
        """
        if x.ndim != 3 or x.shape[-1] != self.to_query.in_features:
            raise ValueError(f"expected (B, T, {self.to_query.in_features}), got {tuple(x.shape)}")
        # the kernel's 1 / sqrt(d), half of it in each vector, as the authors' convolution has it
        query = self._split(self.to_query(x)) * self.head_dim**-0.25
        value = self._split(self.to_value(x))
        if self.grid is None:
            out = self.system.attend(query, query, value, _visible_of(x, visible), scale=1.0)
        else:
            out = self._attend_on_grid(query, value, visible)
        return self.to_out(out.transpose(1, 2).flatten(-2))

    def _attend_on_grid(self, query: Tensor, value: Tensor, visible) -> Tensor:
        assert self.grid is not None
        tokens = self.grid[0] * self.grid[1]
        if query.shape[-2] != tokens:
            raise ValueError(f"a grid of {self.grid} has {tokens} tokens, got {query.shape[-2]}")
        if visible is not None:
            raise ValueError("landmarks of a grid are pooled from all tokens: visible must be None")
        dtype = query.dtype
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        landmarks = self.pooled(query).to(compute)
        with no_autocast(query.device):
            x = query.to(compute)
            out = soft_attention(
                x,
                x,
                value.to(compute),
                landmarks,
                scale=1.0,
                newton=self.system.newton,
                ridge=self.system.ridge,
                normalised=self.system.normalised,
            ).to(dtype)
        if self.value_conv is None:
            return out
        # a kernel for each head, the same for all of its channels
        image = value.unflatten(-2, self.grid).permute(0, 4, 1, 2, 3)
        near = self.value_conv(image.flatten(0, 1)).unflatten(0, (image.shape[0], -1))
        return out + near.flatten(-2).permute(0, 2, 3, 1)

    def pooled(self, query: Tensor) -> Tensor:
        """The landmarks, (B, H, m, D), of queries (B, H, h * w, D) on the grid."""
        assert self.grid is not None
        image = query.flatten(0, 1).unflatten(1, self.grid).permute(0, 3, 1, 2)
        if self.landmark_conv is not None and self.landmark_norm is not None:
            tokens = self.landmark_conv(image).flatten(-2).transpose(1, 2)
            tokens = nn.functional.gelu(self.landmark_norm(tokens))
        else:
            wide = image if image.dtype == torch.float64 else image.float()
            tokens = nn.functional.adaptive_avg_pool2d(wide, self.cells)
            tokens = tokens.flatten(-2).transpose(1, 2)
        return tokens.unflatten(0, query.shape[:2])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        where = f"landmarks={self.cells}, pooling={self.pooling!r}"
        return f"{self.system}, heads={self.heads}, grid={self.grid}, {where}"


def _visible_of(x: Tensor, visible: Tensor | Visible | None) -> Visible:
    if visible is None or isinstance(visible, Visible):
        return visible or Visible()
    check_tokens("visible as a mask of tokens", visible, *x.shape[:2])
    return Visible(mask=visible[:, None, None])


def _check_pooling(
    grid: tuple[int, int] | None, ratio: int | None, pooling: str, value_conv: int
) -> None:
    if pooling not in ("average", "conv"):
        raise ValueError(f"pooling must be 'average' or 'conv', got {pooling!r}")
    if value_conv < 0 or (value_conv and value_conv % 2 == 0):
        raise ValueError(f"value_conv must be 0 or an odd kernel size, got {value_conv}")
    if grid is None:
        if ratio is not None or pooling == "conv" or value_conv:
            raise ValueError(
                "ratio, pooling='conv' and value_conv are of two dimensions and need grid=(h, w); "
                f"got grid=None, ratio={ratio}, pooling={pooling!r}, value_conv={value_conv}"
            )
        return
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be (h, w) of at least 1 each, got {grid}")
    if pooling == "conv" and ratio is None:
        raise ValueError("pooling='conv' needs ratio, its kernel and stride; got None")
    if ratio is not None and (ratio < 1 or grid[0] % ratio or grid[1] % ratio):
        raise ValueError(f"ratio must divide both sides of the grid {grid}, got {ratio}")


def small_image_attention(
    width: int, heads: int, *, grid: tuple[int, int], normalised: bool = False
) -> SOFTAttention:
    """SOFTAttention with the paper's 49 landmarks, but no more than a quarter of the tokens: on a
    grid of 8 x 8 there would be little left to pool."""
    landmarks = max(1, min(49, grid[0] * grid[1] // 4))
    return SOFTAttention(width, heads, grid=grid, landmarks=landmarks, normalised=normalised)


_CACHED = (
    "cached_decode",
    "cached_padding",
    "cache_steps",
    "cache_rollback",
    "cache_rows",
    "cache_merge",
)

_EXCEPTIONS = {
    "masks": "landmarks are pooled once for all queries, which must see the same keys",
    "biases": "its kernel is no function of scores that a term could be added to",
    "mask_gradients": "its kernel is no function of scores that a term could be added to",
    "later_keys": "it has no causal form: landmarks mix all positions",
    "prefix": "it has no causal form: landmarks mix all positions",
    **dict.fromkeys(_CACHED, "it has no causal form, hence nothing to decode with"),
    "key_order": "beyond 49 keys the landmarks are means of neighbours",
    "length_aware": "no term added to a score could push a key away",
}

ENTRY = Entry(
    name="soft",
    title="SOFT",
    system=SOFT(),
    formula="κ(Q, L) κ(L, L)⁻¹ κ(L, K), κ(x, y) = exp(−|x − y|² / 2√d)",
    paper="Lu et al. 2021",
    arxiv="2110.11945",
    score="|q − k|² / 2√d",
    positivity="exp",
    normaliser="none",
    walk="landmarks",
    laws=Laws(non_negative=False),
    exceptions=_EXCEPTIONS,
    causal=False,
    image_module=small_image_attention,
    claim="For images: 83.3 on ImageNet-1K at 87 M parameters; no claim about length.",
)

NORMALISED = Entry(
    name="soft-norm",
    title="SOFT++",
    system=SOFT(normalised=True),
    formula="κ(Q, L) D^−½ κ(L, L)⁻¹ D^−½ κ(L, K), D = diag(κ(L, L) 1)",
    paper="Lu et al. 2022",
    arxiv="2207.03341",
    score="|q − k|² / 2√d",
    positivity="exp",
    normaliser="landmark degrees",
    walk="landmarks",
    laws=Laws(non_negative=False),
    exceptions=_EXCEPTIONS,
    causal=False,
    image_module=functools.partial(small_image_attention, normalised=True),
    claim="For images, dense prediction as well: 83.4 on ImageNet-1K; no claim about length.",
)
