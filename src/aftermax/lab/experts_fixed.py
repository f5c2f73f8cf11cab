"""A trained `MultiTaskVisionTransformer` in the numbers of Edge-MoE: the same weights, bit for bit.

The layers are those of `aftermax.moe.fixed_layers`. What the sources have not is computed in the
same formats: the last norm and the heads (theirs run elsewhere), and QK-norm.

Weights are cut to 14, 11 or 16 bits of fraction, as the sources read them. One that does not fit
its format is taken at the format's edge, or with `saturate=False` wraps, as theirs would. Pixels
are bytes, worth a 256th each: images from 0 to 1 are rounded to 255ths, and mean, deviation and
256/255 go into the weights of the patches, which their format ends at 1/2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax.dense import Dense
from aftermax.lab.multitask import MLP, MultiTaskVisionTransformer
from aftermax.modules import Attention
from aftermax.moe import (
    ACTIVATION,
    Experts,
    Fixed,
    Tally,
    fixed_add,
    fixed_attention,
    fixed_experts,
    fixed_gate,
    fixed_layer_norm,
    fixed_linear,
    fixed_patches,
    fixed_rms_norm,
    table_gelu,
)
from aftermax.moe.fixedpoint import (
    ATTENTION_BIAS,
    BIAS,
    LINEAR_WEIGHT,
    NORM_WEIGHT,
    PATCH_WEIGHT,
    PIXEL,
)
from aftermax.positions import NoPositions
from aftermax.weights import FixedOnePassSoftmax, OnePassSoftmax, Softmax

Moments = float | Tensor | Sequence[float]


@dataclass(frozen=True, eq=False)
class Emulated:
    """What an emulation gives.

    Args:
        logits: as the model's, in float64.
        tally: numbers that went into a register and those that wrapped, by the step.
        clipped: numbers of the model that did not fit their format, by its name.
        parameters: all of them.
    """

    logits: Tensor
    tally: Tally
    clipped: Counter[str]
    parameters: int

    def told(self) -> str:
        """What did not fit, in a line."""
        wrapped = {step: n for step, n in sorted(self.tally.wrapped.items()) if n}
        steps = ", ".join(f"{step} {n} of {self.tally.kept[step]}" for step, n in wrapped.items())
        forms = ", ".join(f"{name} {n}" for name, n in sorted(self.clipped.items()) if n)
        return f"wrapped: {steps or 'nothing'}; outside of their format: {forms or 'no weights'}"


def emulate(
    model: MultiTaskVisionTransformer,
    images: Tensor,
    task: str | int,
    *,
    mean: Moments = 0.0,
    sd: Moments = 1.0,
    saturate: bool = True,
    corrected: bool = False,
    patch_form: Fixed = PATCH_WEIGHT,
    at_once: int = 64,
) -> Emulated:
    """The answers of one task, all in fixed point.

    Args:
        model: on softmax, ungated, with the exact gelu or its table. It is read, not changed.
        images: (B, C, h, w) from 0 to 1, before mean and deviation.
        task: as the model takes it.
        mean, sd: of each channel, with which the model's images were normed.
        saturate: weights outside of their format rest at its edge; otherwise they wrap.
        corrected: softmax without its limit of 511 tokens of equal scores.
        patch_form: of the weights of the patches. The published one ends at 1/2, which a weight
            divided by a small deviation may pass; `Fixed(16, 2)` ends at 2.
        at_once: images in memory together.

    Raises:
        ValueError: for images outside of 0 to 1, and for what a model has that these numbers have
            no unit for.

    >>> from aftermax.lab.multitask import Shape, Target
    >>> shape = Shape((8, 8), 4, 1, 16, layers=2, heads=2, hidden=32, odd_hidden=16, experts=4)
    >>> model = MultiTaskVisionTransformer(shape, [Target("class", 3)])
    >>> images = torch.rand(5, 1, 8, 8)
    >>> found = emulate(model, images, "class", mean=0.5, sd=0.25)
    >>> bool((found.logits - model((images - 0.5) / 0.25, "class")).abs().max() < 1e-2)
    True
    >>> found.told()
    'wrapped: nothing; outside of their format: no weights'
    """
    numbers = _Numbers(saturate)
    tower = _Tower(model, numbers, mean, sd, corrected, patch_form)
    tally = Tally()
    parts = [tower.answers(part, task, tally) for part in images.split(at_once)]
    return Emulated(torch.cat(parts), tally, numbers.clipped, numbers.parameters)


def refusal(model: MultiTaskVisionTransformer) -> str | None:
    """Why a model has no form in these numbers, or None where it has one.

    >>> from aftermax import Sigmoid
    >>> from aftermax.lab.multitask import Shape, Target
    >>> shape = Shape((8, 8), 4, 1, 16, layers=2, heads=2, hidden=32, odd_hidden=16, experts=4)
    >>> asked = [Target("class", 3)]
    >>> refusal(MultiTaskVisionTransformer(shape, asked))
    >>> refusal(MultiTaskVisionTransformer(shape, asked, Sigmoid()))
    "in these numbers there is softmax in one pass alone, and a layer has Sigmoid(n='row'): ..."
    """
    try:
        for block in model.blocks:
            _check_attention(block.attend)  # type: ignore[arg-type]
            if isinstance(block.feed, Experts):
                _check_experts(block.feed)
    except ValueError as error:
        return str(error)
    return None


def beside(
    logits: Tensor,
    emulated: Emulated,
    answers: Tensor,
    scores: Callable[[Tensor, Tensor], Mapping[str, float]],
    name: str = "fixed",
) -> dict[str, float]:
    """What the numbers do to the answers of one task.

    Args:
        logits: of the model itself.
        emulated: of the same images and task.
        answers: what is right.
        scores: (logits, answers) -> measures by name, as `aftermax.lab.experts.scores`.
        name: that the measures begin with.

    Returns:
        Each score of the emulation; "same", the share of answers (the largest logit, or the sign of
        a pixel's) that are the model's; "error", the root mean square of what logits are off by;
        "wrapped" and "clipped", counts of numbers.
    """
    found = dict(scores(emulated.logits.float(), answers))
    both = logits.double(), emulated.logits
    first, second = (x.argmax(1) if logits.ndim == 2 else x > 0 for x in both)
    found |= {
        "same": (first == second).double().mean().item(),
        "error": (both[0] - both[1]).square().mean().sqrt().item(),
        "wrapped": float(sum(emulated.tally.wrapped.values())),
        "clipped": float(sum(emulated.clipped.values())),
    }
    return {f"{name}_{key}": value for key, value in found.items()}


class _Numbers:
    """Floating point into formats, with what does not fit counted."""

    def __init__(self, saturate: bool):
        self.saturate = saturate
        self.clipped: Counter[str] = Counter()
        self.parameters = 0

    def raw(self, name: str, x: Tensor, form: Fixed) -> Tensor:
        x = x.detach().double()
        low, high = form.decode(torch.tensor([form.lowest, form.highest])).tolist()
        outside = (x < low) | (x >= high + 2.0**-form.fraction)
        self.clipped[name] += int(outside.sum())
        self.parameters += x.numel()
        return form.encode(x.clamp(low, high) if self.saturate else x)


class _Tower:
    """The model's numbers in fixed point, and its walk."""

    def __init__(
        self,
        model: MultiTaskVisionTransformer,
        numbers: _Numbers,
        mean: Moments,
        sd: Moments,
        corrected: bool,
        patch_form: Fixed,
    ):
        self.model, self.patch_form = model, patch_form
        shape = model.shape
        mean, sd = (
            torch.as_tensor(m).double().reshape(-1, 1).expand(shape.channels, shape.patch**2)
            for m in (mean, sd)
        )
        weight = model.to_patches.weight.detach().double()
        per_pixel = weight / sd.flatten()
        bias = model.to_patches.bias.detach().double() - per_pixel @ mean.flatten()
        places = model.places[0].detach().double().clone()
        places[0] += model.class_token[0, 0].detach()
        scale = 2**PIXEL.fraction / PIXEL.highest
        self.patches = (
            numbers.raw("patch weights", per_pixel * scale, patch_form),
            numbers.raw("biases", bias, BIAS),
            numbers.raw("places", places, ACTIVATION),
        )
        self.blocks = [
            (
                _norm(block.before_attend, numbers),  # type: ignore[arg-type]
                _Attention(block.attend, numbers, corrected),  # type: ignore[arg-type]
                _norm(block.before_feed, numbers),  # type: ignore[arg-type]
                _feed(block.feed, numbers),  # type: ignore[arg-type]
            )
            for block in model.blocks
        ]
        self.norm = _norm(model.norm, numbers)
        self.heads = {name: _Linear(head, numbers) for name, head in model.heads.items()}  # type: ignore[arg-type]

    def answers(self, images: Tensor, task: str | int, tally: Tally) -> Tensor:
        """(B, C, h, w) -> float64 logits."""
        model, shape = self.model, self.model.shape
        number = model._number(task)
        target = model.targets[model.tasks[number]]
        form = self.patch_form
        x = fixed_patches(self.pixels(images), *self.patches, weight_form=form, tally=tally)
        for before_attend, attend, before_feed, feed in self.blocks:
            x = fixed_add(x, attend(before_attend(x, tally), tally), tally=tally)
            x = fixed_add(x, feed(before_feed(x, tally), tally, number), tally=tally)
        x = self.norm(x, tally)
        x = x[:, 1:] if target.dense else x[:, 0]
        logits = ACTIVATION.decode(self.heads[target.name](x, tally))
        if not target.dense:
            return logits
        return F.fold(logits.mT, shape.image, shape.patch, stride=shape.patch)

    def pixels(self, images: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, patches, C * pixels) bytes."""
        shape = self.model.shape
        if images.shape[1:] != (shape.channels, *shape.image):
            raise ValueError(
                f"images must be (B, {shape.channels}, {shape.image[0]}, {shape.image[1]}), "
                f"got {tuple(images.shape)}"
            )
        if images.numel() and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"images must lie from 0 to 1, got {images.min():g} to {images.max():g}; mean and "
                "deviation are given beside them"
            )
        whole = (images.double() * PIXEL.highest).round()
        return F.unfold(whole, shape.patch, stride=shape.patch).mT.long()


class _Linear:
    def __init__(
        self, layer: nn.Linear, numbers: _Numbers, form: Fixed = BIAS, name: str = "biases"
    ):
        self.form = form
        self.weight = numbers.raw("linear weights", layer.weight, LINEAR_WEIGHT)
        self.bias = None if layer.bias is None else numbers.raw(name, layer.bias, form)

    def __call__(self, x: Tensor, tally: Tally, gelu: bool = False) -> Tensor:
        return fixed_linear(x, self.weight, self.bias, gelu=gelu, bias_form=self.form, tally=tally)


def _norm(layer: nn.LayerNorm, numbers: _Numbers):
    weight = numbers.raw("norm weights", layer.weight, NORM_WEIGHT)
    bias = numbers.raw("biases", layer.bias, BIAS)
    return lambda x, tally: fixed_layer_norm(x, weight, bias, layer.eps, tally=tally)


class _Attention:
    def __init__(self, layer: Attention, numbers: _Numbers, corrected: bool):
        _check_attention(layer)
        self.layer, self.corrected = layer, corrected
        self.query, self.key, self.value, self.out = (
            _Linear(of, numbers, ATTENTION_BIAS, "attention biases")
            for of in (layer.to_query, layer.to_key, layer.to_value, layer.to_out)
        )
        self.norms = [
            numbers.raw("norm weights", norm.weight, NORM_WEIGHT)
            if isinstance(norm, nn.RMSNorm)
            else None
            for norm in (layer.query_norm, layer.key_norm)
        ]
        self.eps = getattr(layer.query_norm, "eps", None) or torch.finfo(torch.float32).eps

    def __call__(self, x: Tensor, tally: Tally) -> Tensor:
        width, repeats = self.layer.head_dim, self.layer.heads // self.layer.kv_heads
        q, k, v = (
            of(x, tally).unflatten(-1, (-1, width)).transpose(1, 2)
            for of in (self.query, self.key, self.value)
        )
        q, k = (
            x if gain is None else fixed_rms_norm(x, gain, self.eps, tally=tally)
            for x, gain in zip((q, k), self.norms, strict=True)
        )
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        scale = self.layer.scale
        out = fixed_attention(q, k, v, scale, corrected=self.corrected, tally=tally)
        return self.out(out.transpose(1, 2).flatten(-2), tally)


def _feed(layer: MLP | Experts, numbers: _Numbers):
    if isinstance(layer, MLP):
        inner, to_out = _Linear(layer.inner, numbers), _Linear(layer.to_out, numbers)
        return lambda x, tally, task: to_out(inner(x, tally, gelu=True), tally)
    _check_experts(layer)
    gates = numbers.raw("gates", layer.router.gates, LINEAR_WEIGHT)
    w1, w2 = (numbers.raw("linear weights", w, LINEAR_WEIGHT) for w in (layer.w1, layer.w2))
    b1, b2 = (None if b is None else numbers.raw("biases", b, BIAS) for b in (layer.b1, layer.b2))

    def through(x: Tensor, tally: Tally, task: int) -> Tensor:
        index, weights = fixed_gate(x, gates[task], layer.router.top_k, tally=tally)
        return fixed_experts(x, index, weights, w1, b1, w2, b2, tally=tally)

    return through


def _check_attention(layer: Attention) -> None:
    """Raise ValueError for attention that the hardware has no unit for."""
    system = layer.system.weights if isinstance(layer.system, Dense) else layer.system
    kinds = (Softmax(), OnePassSoftmax())
    if system not in kinds and not isinstance(system, FixedOnePassSoftmax):
        raise ValueError(
            f"in these numbers there is softmax in one pass alone, and a layer has {system!r}: its "
            "formula has no published form in them"
        )
    if type(layer) is not Attention:
        raise ValueError(f"a layer is a {type(layer).__name__}, whose gate has no unit here")
    if layer.causal or layer.window is not None:
        raise ValueError("a layer hides tokens (causal or window), and the unit lets all be seen")
    if type(layer.positions) is not NoPositions:
        raise ValueError(
            f"a layer has positions of its own ({layer.positions}), and the unit knows of none"
        )


def _check_experts(layer: Experts) -> None:
    if layer.activation not in (F.gelu, table_gelu):
        raise ValueError("experts have another activation than gelu, for which there is no table")
    if layer.capacity is not None or layer.capacity_factor is not None:
        raise ValueError("experts have a capacity, and the unit drops no token")
    if layer.router.renormalise:
        raise ValueError("the gate renormalises, and the unit keeps the weights among all experts")
