"""A model in 8 bits, or fewer: what it loses when weights and activations are integers.

The recipe of Bondarenko et al. (arXiv 2306.12929), after training and without any repair::

    weights      q = clamp(round(w / s), -127, 127),      s = max|w| / 127           int8
    activations  q = clamp(round(x / s) + z, 0, 255),     s = (max x - min x) / 255  uint8

and with b bits up to 2^(b-1) - 1 and 2^b - 1; one s (and z) for each tensor. The ranges of the
activations are the least and the greatest value that calibration saw, 0 among them, and stay as
they are at every length. In integers are: the embedding (which is the head, too), the inputs and
the outputs of every linear layer, the stream after each branch, and what the head reads. Attention
weights, norms and logits stay in float, since no row of weights is ever written down. Theirs has
them in integers too, takes a running mean of the ranges (we: the outermost), and leaves the head of
OPT in float.

Scales, zero points and rounding are torchao's, with its observer: torch says itself that
`torch.ao.quantization` is deprecated and that torchao is where it goes on. Of torchao only the
arithmetic is used: its `Int8StaticActivationInt8WeightConfig` swaps linear layers alone and leaves
the stream, where the outliers are, in float; its export path (PT2E) takes a graph and the rules of
a backend, where a few modules with hooks say as much.
The product of integers is taken in floats that hold it exactly: 2^24 is more than 255 * 127 * 518.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax.lab.models import Branch, DecoderLM


@cache
def torchao() -> Any:
    """The functions of torchao that are used here.

    Raises:
        ValueError: where it is not installed.
    """
    logging.disable(logging.WARNING)  # it tells of GPU libraries that it does not find
    try:
        from torchao.quantization import quant_primitives
        from torchao.quantization.granularity import PerTensor
        from torchao.quantization.observer import AffineQuantizedMinMaxObserver
    except ImportError as error:
        raise ValueError(
            f"--task outliers needs torchao: pip install 'aftermax[quantise]' ({error})"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    return SimpleNamespace(
        quantize=quant_primitives.quantize_affine,
        dequantize=quant_primitives.dequantize_affine,
        choose=quant_primitives.choose_qparams_affine,
        mapping=quant_primitives.MappingType,
        observer=lambda bits: AffineQuantizedMinMaxObserver(
            quant_primitives.MappingType.ASYMMETRIC,
            torch.uint8,
            PerTensor(),
            quant_min=0,
            quant_max=2**bits - 1,
            eps=torch.finfo(torch.float32).eps,
            scale_dtype=torch.float32,
            zero_point_dtype=torch.int32,
        ),
    )


def integer_weights(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """int8 of the shape of `weight`, and the one scale: weight ~ scale * int8.

    >>> integer_weights(torch.tensor([[-2.54, 0.021, 1.0]]))
    (tensor([[-127,    1,   50]], dtype=torch.int8), tensor(0.0200))
    """
    ao, whole, top = torchao(), tuple(weight.shape), 2 ** (bits - 1) - 1
    scale, zero = ao.choose(weight, ao.mapping.SYMMETRIC, whole, torch.int8, -top, top)
    integers = ao.quantize(weight, whole, scale, zero, torch.int8, -top, top)
    return integers, scale.reshape(())  # which is (1,) or () by torchao's way through its code


class Grid(nn.Module):
    """The integers that one tensor of activations is written in: first watched, then fixed."""

    def __init__(self, bits: int = 8):
        super().__init__()
        self.top = 2**bits - 1
        self.observer = torchao().observer(bits)
        self.scale: Tensor | None = None
        self.zero: Tensor | None = None

    def fix(self) -> None:
        """From now on what was watched decides."""
        self.scale, self.zero = self.observer.calculate_qparams()

    def integers(self, x: Tensor) -> Tensor:
        """uint8 of the shape of `x`."""
        bounds = (torch.uint8, 0, self.top)
        return torchao().quantize(x, tuple(x.shape), self.scale, self.zero, *bounds)

    def forward(self, x: Tensor) -> Tensor:
        """`x` while it is watched, then what its integers stand for."""
        if self.scale is None:
            return self.observer(x.contiguous())
        whole, integers = tuple(x.shape), self.integers(x)
        bounds = (torch.uint8, 0, self.top)
        return torchao().dequantize(integers, whole, self.scale, self.zero, *bounds)


class IntegerLinear(nn.Module):
    """y = s_w s_x (q_w (q_x - z)) + b in integers; without activations in them, s_w q_w x + b."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, bits: int, activations: bool):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = integer_weights(linear.weight.detach(), bits)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.reads, self.gives = (Grid(bits), Grid(bits)) if activations else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        scale, reads = self.scale, self.reads
        if reads is not None and reads.scale is not None and reads.zero is not None:
            x, scale = reads.integers(x).float() - reads.zero, scale * reads.scale
        elif reads is not None:
            x = reads(x)
        out = scale * F.linear(x, self.weight.float())
        out = out if self.bias is None else out + self.bias
        return out if self.gives is None else self.gives(out)


def quantised(
    model: DecoderLM, calibration: Iterable[Tensor] | None = None, bits: int = 8
) -> DecoderLM:
    """A copy of the model with weights in int8, and activations in uint8 where there is
    calibration.

    Args:
        model: of the lab; it stays as it is.
        calibration: inputs to watch, one pass each; None leaves the activations in float.
        bits: 2 to 8, of both.
    """
    activations = calibration is not None
    copied = copy.deepcopy(model).eval()
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, IntegerLinear(child, bits, activations))
    with torch.no_grad():
        integers, scale = integer_weights(copied.embed.weight, bits)
        copied.embed.weight.copy_(scale * integers)
    if calibration is None:
        return copied
    for module in list(copied.modules()):
        if isinstance(module, Branch) or module in (copied.embed, copied.norm):
            module.add_module("grid", Grid(bits))
            module.register_forward_hook(lambda of, _, out: of.get_submodule("grid")(out))
    with torch.no_grad():
        for inputs in calibration:
            copied(inputs)
    for module in list(copied.modules()):
        if isinstance(module, Grid):
            module.fix()
    return copied
