"""The small models of the lab: a decoder, a vision transformer, a dual encoder."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax.cache import can_all
from aftermax.lab.hashhop_work import HashHopWork
from aftermax.lab.outliers_work import OutliersWork
from aftermax.lab.vision_work import VisionWork
from aftermax.lab.work import Arm, Work
from aftermax.modules import Attention, GatedAttention

DecoderWork = Work | OutliersWork | HashHopWork


class SwiGLU(nn.Module):
    """(silu(x A) * x B) C with the hidden width at 8/3 (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = 8 * ((8 * width // 3 + 7) // 8)
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)
        self.to_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, -1)
        return self.to_out(F.silu(gate) * up)


class Branch(nn.Module):
    """x + scale * norm_after(layer(norm_before(x))); the norm after and the scale are options.

    The norm after the branch is "hybrid norm" (peri-LN, arXiv 2502.02732), which sigmoid attention
    wants; the scale is LayerScale (arXiv 2103.17239), initially 1e-4.
    """

    def __init__(self, layer: nn.Module, width: int, hybrid_norm: bool, layer_scale: bool):
        super().__init__()
        self.before = nn.RMSNorm(width)
        self.layer = layer
        self.after = nn.RMSNorm(width) if hybrid_norm else nn.Identity()
        self.scale = nn.Parameter(torch.full((width,), 1e-4)) if layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.layer(self.before(x)))

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        branch = self.after(branch)
        return x + (branch if self.scale is None else self.scale * branch)


class DecoderLM(nn.Module):
    """Pre-norm decoder with SwiGLU and tied embeddings; the attention is the arm's.

    `forward` gives hidden vectors and `logits` turns them into predictions, so that a caller who
    scores a few positions of a long window pays for those alone.
    """

    causal: ClassVar[bool] = True

    def __init__(self, work: DecoderWork, arm: Arm, vocabulary: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, work.width)
        options = {"hybrid_norm": arm.hybrid_norm, "layer_scale": arm.layer_scale}
        self.blocks = nn.ModuleList()
        for layer in range(work.layers):
            attend = self._attention(work, arm, layer)
            self.blocks.append(
                nn.Sequential(
                    Branch(attend, work.width, **options),
                    Branch(SwiGLU(work.width), work.width, **options),
                )
            )
        self.norm = nn.RMSNorm(work.width)
        _initialise(self, work.layers)
        if arm.entry.module is not None and not arm.gated:
            self._put_in(arm.entry.module, work, arm)

    def _options(self, work: DecoderWork, arm: Arm, layer: int) -> dict[str, Any]:
        return {
            "weights": arm.system_of(layer, work.layers, work.lengths[-1]),
            "kv_heads": work.kv_heads,
            "positions": arm.place,
            "causal": self.causal,
            "qk_norm": arm.qk_norm,
        }

    def _attention(self, work: DecoderWork, arm: Arm, layer: int) -> Attention:
        options = self._options(work, arm, layer)
        plain = Attention(work.width, work.heads, **options)
        if not arm.gated:
            return plain
        with torch.random.fork_rng([]):  # what is drawn after it is the same with a gate
            return GatedAttention(work.width, work.heads, **options)

    def _put_in(self, module: Callable[..., Any], work: DecoderWork, arm: Arm) -> None:
        """A paper's own layer in place of the plain ones. What both have starts the same, and so
        does all else in the model."""
        with torch.random.fork_rng([]):
            for layer, block in enumerate(self.blocks):
                own = module(work.width, work.heads, **self._options(work, arm, layer))
                _initialise(own, work.layers)
                plain, names = block[0].layer, own.state_dict()  # type: ignore[index]
                shared = {
                    name: x
                    for name, x in plain.state_dict().items()
                    if name in names and names[name].shape == x.shape
                }
                own.load_state_dict(shared, strict=False)
                block[0].layer = own  # type: ignore[index]

    @property
    def attentions(self) -> list[Attention]:
        return [block[0].layer for block in self.blocks]  # type: ignore[index]

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) tokens -> (B, T, width) hidden vectors."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed.weight)

    @property
    def can_truncate(self) -> bool:
        return can_all(self.attentions, "can_truncate")

    can_merge: ClassVar[bool] = False
    """What a layer above the first reads of a later piece has seen the earlier one."""

    def init_state(self, batch: int, start: int = 0) -> list:
        """The state before the first token: one for each layer."""
        return [attend.init_state(batch, start) for attend in self.attentions]

    def step(self, tokens: Tensor, state: list) -> tuple[Tensor, list]:
        """The next tokens (B, T): their hidden vectors, and the new state."""
        x, new = self.embed(tokens), []
        for block, held in zip(self.blocks, state, strict=True):
            attend, feed = block[0], block[1]  # type: ignore[index]
            out, held = attend.layer.step(attend.before(x), held)
            x = feed(attend.add(x, out))
            new.append(held)
        return self.norm(x), new


STARTS_ITSELF = {"learned", "gate", "mamba", "score"}
"""Parts of a model whose matrices start as they say themselves."""


def _initialise(model: nn.Module, layers: int) -> None:
    """Normal(0, 0.02), smaller where a branch ends: GPT-2's initialisation."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and not STARTS_ITSELF & set(name.split(".")):
            std = 0.02 / (2 * layers) ** 0.5 if "to_out" in name else 0.02
            nn.init.normal_(parameter, std=std)


class EncoderLM(DecoderLM):
    """The same blocks, in which every token sees all: for a masked language model."""

    causal = False


class VisionTransformer(nn.Module):
    """Pre-norm ViT (arXiv 2010.11929) with SwiGLU, learned places and mean pooling.

    The attention is the arm's: its paper's module for images where there is one, else the same
    module as in the decoder, which sees all patches.
    """

    def __init__(self, work: VisionWork, arm: Arm, channels: int, classes: int, seed: int):
        super().__init__()
        self.patch = work.patch
        self.to_patches = nn.Linear(channels * work.patch**2, work.width, bias=False)
        self.places = nn.Parameter(torch.empty(1, work.context, work.width))
        options = {"hybrid_norm": arm.hybrid_norm, "layer_scale": arm.layer_scale}
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    Branch(image_attention(work, arm, layer), work.width, **options),
                    Branch(SwiGLU(work.width), work.width, **options),
                )
                for layer in range(work.layers)
            )
        )
        self.norm = nn.RMSNorm(work.width)
        self.head = nn.Linear(work.width, classes)
        self._initialise(work.layers, seed)

    def _initialise(self, layers: int, seed: int) -> None:
        """As the decoder's. The numbers hang on a matrix's name, so that systems which have it
        start alike, whatever else they have."""
        matrices = {f"{n}.weight" for n, m in self.named_modules() if isinstance(m, nn.Linear)}
        for name, parameter in self.named_parameters():
            if name in matrices or name == "places":
                std = 0.02 / (2 * layers) ** 0.5 if "to_out" in name else 0.02
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                nn.init.normal_(parameter, std=std, generator=generator)
        nn.init.zeros_(self.head.bias)

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, S, S) images -> (B, T, width) patches in their places."""
        side = self.patch
        cut = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, h, side, w, side)
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.to_patches(patches) + self.places

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S) images -> (B, classes) logits."""
        return self.head(self.norm(self.blocks(self.embed(images))).mean(1))


def image_attention(work: VisionWork, arm: Arm, layer: int) -> nn.Module:
    """(B, T, width) -> the same, every patch of the grid in sight."""
    if arm.entry.image_module is not None:
        return arm.entry.image_module(work.width, heads=work.heads, grid=work.grid)
    attend = GatedAttention if arm.gated else Attention
    return attend(
        work.width,
        work.heads,
        weights=arm.system_of(layer, work.layers, work.context),
        positions="none",
        causal=False,
        qk_norm=arm.qk_norm,
    )


class DualEncoder(nn.Module):
    """Documents and labels as vectors whose products are scores: cos(f(x), g(y)) / temperature.

    Args:
        encode: texts, in whatever form it takes them, -> (B, width); any module.
        encode_labels: the same for labels; None = one encoder for both.
        width: of the vectors.
        hidden: of a residual layer after it, one for documents and one for labels; 0 = none.
        temperature: at the start; it is learned (Radford et al., arXiv 2103.00020).
        dropout: share of the numbers of a vector that are 0 in training.

    >>> words = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 1, 0]])  # texts as bags of five words
    >>> model = DualEncoder(nn.Linear(5, 8), 8)
    >>> (model.documents(words) @ model.labels(words).T).shape
    torch.Size([2, 2])
    """

    def __init__(
        self,
        encode: nn.Module,
        width: int,
        *,
        encode_labels: nn.Module | None = None,
        hidden: int = 0,
        temperature: float = 0.05,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.encode = encode
        self.encode_labels = encode_labels
        self.of_document, self.of_label = (
            Tower(width, hidden) if hidden else nn.Identity() for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.dropout = nn.Dropout(dropout)

    def documents(self, texts: Any) -> Tensor:
        """(B, width), of length 1 / temperature."""
        vectors = self.of_document(self.dropout(self.encode(texts)))
        return F.normalize(vectors, dim=-1) * self.log_scale.exp()

    def labels(self, texts: Any) -> Tensor:
        """(L, width), of length 1."""
        encode = self.encode if self.encode_labels is None else self.encode_labels
        return F.normalize(self.of_label(self.dropout(encode(texts))), dim=-1)


class Tower(nn.Module):
    """x' + B gelu(A x'), x' = x at length sqrt(d); B is 0 at the start."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.inner, self.to_out = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1) * x.shape[-1] ** 0.5
        return x + self.to_out(F.gelu(self.inner(x)))
