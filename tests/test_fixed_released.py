"""The emulation against the released sources of Edge-MoE themselves.

The sources (Sarkar et al., github.com/sharc-lab/Edge-MoE, commit 984b23b) were compiled with the
public ap_fixed types of their tool's vendor. What is not public was written anew: vectors and
streams, and exp, reciprocal and root as the exact ones, cut. Their top_k was made to keep its best
where the next score is smaller. They were given the numbers of `drawn`, in their own sizes, for a
layer with an MLP and one with experts; kept are digests of what came out.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from aftermax.moe import (
    ACTIVATION,
    Fixed,
    Tally,
    fixed_add,
    fixed_attention,
    fixed_experts,
    fixed_gate,
    fixed_layer_norm,
    fixed_linear,
    fixed_patches,
)
from aftermax.moe.fixedpoint import (
    ATTENTION_BIAS,
    BIAS,
    LINEAR_WEIGHT,
    NORM_WEIGHT,
    PATCH_WEIGHT,
    PIXEL,
)

TOKENS, WIDTH, HEADS, EXPERTS = 129, 192, 3, 16
RELEASED = {
    0.5: {
        "patches": "893389a8ccc6dea2",
        "layer 0": "85f754be25ef5164",
        "layer 1": "7c0071bb5df643c8",
    },
    16.0: {
        "patches": "893389a8ccc6dea2",
        "layer 0": "840d456d947bf744",
        "layer 1": "1b3b50023ab43878",
    },
}
"""Of the activations (129, 192) as int64, little end first: with scores that stay in their format,
and with attention biases so large that one in fifty does not."""


def drawn(name: str, *shape: int, size: float = 1.0, middle: float = 0.0) -> Tensor:
    """Even numbers of 16 bits from -size to size, around a middle: exact in float32."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    x = torch.arange(torch.Size(shape).numel()) + seed
    for factor in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    x = (x ^ (x >> 16)) & 0xFFFF
    return (middle + size * ((x - 2**15).double() / 2**15)).reshape(shape)


def digest(raw: Tensor) -> str:
    return hashlib.sha256(raw.contiguous().numpy().astype("<i8").tobytes()).hexdigest()[:16]


class Layer:
    """The numbers of a layer, by the names of the released files."""

    def __init__(self, number: int, bias: float):
        self.number, self.bias = number, bias

    def raw(self, name: str, form: Fixed, *shape: int, **how) -> Tensor:
        return form.encode(drawn(f"l{self.number}_{name}", *shape, **how))

    def norm(self, x: Tensor, which: int, tally: Tally) -> Tensor:
        weight = self.raw(f"norm{which}_weight", NORM_WEIGHT, WIDTH, size=0.5, middle=1.0)
        bias = self.raw(f"norm{which}_bias", BIAS, WIDTH, size=0.25)
        return fixed_layer_norm(x, weight, bias, tally=tally)

    def attend(self, x: Tensor, tally: Tally) -> Tensor:
        form = {"bias_form": ATTENTION_BIAS, "tally": tally}
        weights = self.raw("qkv_weight", LINEAR_WEIGHT, 3, WIDTH, WIDTH, size=0.25)
        biases = self.raw("qkv_bias", ATTENTION_BIAS, 3, WIDTH, size=self.bias)
        q, k, v = (
            fixed_linear(x, w, b, **form).unflatten(-1, (HEADS, -1)).transpose(0, 1)
            for w, b in zip(weights, biases, strict=True)
        )
        out = fixed_attention(q, k, v, tally=tally).transpose(0, 1).flatten(1)
        weight = self.raw("attn_proj_weight", LINEAR_WEIGHT, WIDTH, WIDTH, size=0.125)
        bias = self.raw("attn_proj_bias", ATTENTION_BIAS, WIDTH)
        return fixed_linear(out, weight, bias, **form)

    def feed(self, x: Tensor, tally: Tally) -> Tensor:
        if self.number % 2 == 0:
            w1 = self.raw("fc1_weight", LINEAR_WEIGHT, 4 * WIDTH, WIDTH, size=0.125)
            b1 = self.raw("fc1_bias", BIAS, 4 * WIDTH)
            w2 = self.raw("fc2_weight", LINEAR_WEIGHT, WIDTH, 4 * WIDTH, size=0.125)
            b2 = self.raw("fc2_bias", BIAS, WIDTH)
            return fixed_linear(
                fixed_linear(x, w1, b1, gelu=True, tally=tally), w2, b2, tally=tally
            )
        gate = self.raw("w_gate", LINEAR_WEIGHT, EXPERTS, WIDTH, size=0.125)
        index, weights = fixed_gate(x, gate, tally=tally)
        w1 = self.raw("htoh4_weight", LINEAR_WEIGHT, EXPERTS, 2 * WIDTH, WIDTH, size=0.125)
        b1 = self.raw("htoh4_bias", BIAS, EXPERTS, 2 * WIDTH)
        w2 = self.raw("h4toh_weight", LINEAR_WEIGHT, EXPERTS, WIDTH, 2 * WIDTH, size=0.125)
        b2 = self.raw("h4toh_bias", BIAS, EXPERTS, WIDTH)
        return fixed_experts(x, index, weights, w1, b1, w2, b2, tally=tally)


@pytest.mark.parametrize("bias", [0.5, 16.0])
def test_two_layers_are_those_of_the_released_sources(bias):
    tally = Tally()
    image = PIXEL.encode(drawn("image", 3, 128, 256, size=0.498046875, middle=0.498046875))
    cut = image.unflatten(2, (-1, 16)).unflatten(1, (-1, 16))  # (C, rows, 16, columns, 16)
    pixels = cut.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
    x = fixed_patches(
        pixels,
        PATCH_WEIGHT.encode(drawn("patch_embed_weight", WIDTH, 768, size=0.0625)),
        BIAS.encode(drawn("patch_embed_bias", WIDTH)),
        ACTIVATION.encode(drawn("pos_embed", TOKENS, WIDTH, size=4.0)),
        tally=tally,
    )
    found = {"patches": digest(x)}
    for number in (0, 1):
        layer = Layer(number, bias)
        x = fixed_add(x, layer.attend(layer.norm(x, 1, tally), tally), tally=tally)
        x = fixed_add(x, layer.feed(layer.norm(x, 2, tally), tally), tally=tally)
        found[f"layer {number}"] = digest(x)
    assert found == RELEASED[bias]
    assert (tally.wrapped["scores"] > 0) == (bias > 1)
