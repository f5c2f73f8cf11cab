"""The task of experts: one vision transformer for several questions, dense or with experts.

An image is a picture on a piece of a photograph; every question is asked of every image, and the
tower runs once for each (its gates, its head), as in M3ViT. The loss is the sum over questions of

    cross-entropy of the answers + balance * mean over layers of the load-balancing loss

Measured are answers on a test split that no run and no choice has seen: the share that is right,
and for questions of pixels the intersection over union of what is a yes and of what should be one,
over all pixels of the test together. What a model reads of its weights for one image is counted, no
measured traffic. What a model on softmax answers in the fixed-point numbers of Edge-MoE is measured
beside it, on the first images of the test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aftermax.lab.data.pictures import DENSE, Asked, Pictures
from aftermax.lab.data.pictures import prepare as prepare_pictures
from aftermax.lab.experts_fixed import beside, emulate, refusal
from aftermax.lab.experts_work import ExpertsArm, ExpertsWork
from aftermax.lab.measure import TOKENS_AT_ONCE
from aftermax.lab.multitask import MultiTaskVisionTransformer, Shape, Target
from aftermax.lab.store import Row
from aftermax.lab.work import Run
from aftermax.moe import Routing, load, load_balance
from aftermax.moe.fixedpoint import LINEAR_WEIGHT, PATCH_WEIGHT

MEMORY_BATCHES = 4
"""Batches of the step whose memory is measured."""
FIXED_IMAGES = 256
"""Of the test split, that are answered in Edge-MoE's numbers as well."""
IN_USE = 0.1
"""Of an even share of the choices: an expert that gets less is not in use for a question."""


def prepare(work: ExpertsWork, out: Path) -> Pictures:
    found = prepare_pictures(work.pictures, work.data, work.image_size, work.split, out)
    for question in work.questions:
        found.outputs(question)  # what cannot be asked is said before anything is trained
    return found


def open_data(folder: Path) -> Pictures:
    return Pictures.open(folder)


def about(pictures: Pictures) -> dict:
    counts = {split: len(held.labels) for split, held in pictures.splits.items()}
    own = {k: pictures.meta[k] for k in ("classes", "families", "repeated", "size")}
    return {"name": pictures.name, "digest": pictures.digest, "images": counts, **own}


def told(about: dict) -> str:
    counts = ", ".join(f"{n} {split}" for split, n in reversed(about["images"].items()))
    left_out = f"; {about['repeated']} repeated left out" if about["repeated"] else ""
    size = f"{about['size']} x {about['size']}"
    return f"images: {about['name']}, {size}, {len(about['classes'])} classes ({counts}{left_out})"


def shape(work: ExpertsWork, arm: ExpertsArm) -> Shape:
    """The sizes of an arm's model."""
    width, heads = work.width, work.heads
    if arm.feed == "large":  # heads stay as wide
        width, heads = width * 3 // 2, heads * 3 // 2
    experts = work.experts if arm.feed == "experts" else 0
    odd = {"experts": work.expert_hidden, "wide": work.experts * work.expert_hidden}
    return Shape(
        (work.image_size, work.image_size),
        work.patch,
        3,
        width,
        work.layers,
        heads,
        hidden=work.hidden * width,
        odd_hidden=odd.get(arm.feed, work.hidden) * width,
        experts=experts,
        top_k=work.top_k,
    )


def model(run: Run[ExpertsWork], pictures: Pictures) -> MultiTaskVisionTransformer:
    work, arm = run.work, run.arm
    return MultiTaskVisionTransformer(
        shape(work, arm),
        [Target(q, pictures.outputs(q), q in DENSE) for q in arm.questions],
        lambda layer: arm.system_of(layer, work.layers, work.context),
        qk_norm=arm.qk_norm,
        gated=arm.gated,
        seed=run.seed,
    )


def batch(run: Run[ExpertsWork], pictures: Pictures, generator: torch.Generator) -> Asked:
    """The same for every system; the images as the model takes them."""
    work = run.work
    asked = pictures.random(work.batch, work.shift, work.mirror, generator)
    return Asked(pictures.normed(asked.images), asked.answers)


def loss(
    model: MultiTaskVisionTransformer, data: Asked, run: Run[ExpertsWork]
) -> tuple[Tensor, Tensor]:
    parts, balances = [], []
    for question, (logits, routings) in model.ask_all(data.images).items():
        parts.append(answer_loss(logits, data.answers[question]))
        if routings:
            balances.append(torch.stack([load_balance(r) for r in routings]).mean())
    told = torch.stack(parts).sum()
    return told + run.work.balance * sum(balances), told


def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy: of classes (B, C) and (B,); or of pixels (B, 1, S, S) and (B, S, S)."""
    if logits.ndim == 2:
        return F.cross_entropy(logits.float(), answers)
    return F.binary_cross_entropy_with_logits(logits[:, 0].float(), answers)


def scores(logits: Tensor, answers: Tensor) -> dict[str, float]:
    """loss and accuracy of answers, and of pixels iou: of a whole split at once.

    Whatever gave the logits: the model, or an emulation of it in other numbers.

    >>> two = torch.tensor([[[[1.0, 1.0], [-1.0, -1.0]]]])
    >>> found = scores(two, torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))
    >>> found["accuracy"], found["iou"]
    (0.75, 0.5)
    """
    found = {"loss": answer_loss(logits, answers).item()}
    if logits.ndim == 2:
        right = logits.argmax(1) == answers
        return found | {"accuracy": right.float().mean().item()}
    yes, should = logits[:, 0] > 0, answers > 0.5
    union = (yes | should).sum().item()
    iou = (yes & should).sum().item() / union if union else 1.0
    return found | {"accuracy": (yes == should).float().mean().item(), "iou": iou}


@torch.no_grad()
def answered(
    model: MultiTaskVisionTransformer, images: Tensor, question: str
) -> tuple[Tensor, list[Routing]]:
    """Logits and routings (on one image after another) of many normed images."""
    at_once = max(1, TOKENS_AT_ONCE // model.shape.tokens)
    parts = [model(part, question, return_routing=True) for part in images.split(at_once)]
    logits = torch.cat([own for own, _ in parts])
    layers = zip(*(routings for _, routings in parts), strict=True)
    joined = [
        Routing(*(torch.cat([getattr(r, k) for r in layer]) for k in
                  ("weights", "index", "probabilities", "logits")))
        for layer in layers
    ]  # fmt: skip
    return logits, joined


def evaluate(
    model: MultiTaskVisionTransformer, work: ExpertsWork, pictures: Pictures, step: int
) -> list[Row]:
    """Of each question the scores on the test split and the FLOPs; parameters; the experts."""
    asked = pictures.held_out("test")
    images = pictures.normed(asked.images)
    found: dict[str, float] = {}
    linear = getattr(model.blocks[0].attend.system, "fixed_size", False)  # type: ignore[union-attr]
    has_fixed = refusal(model) is None
    routed: dict[str, list[Routing]] = {}
    for question, target in model.targets.items():
        logits, routed[question] = answered(model, images, question)
        for name, value in scores(logits, asked.answers[question]).items():
            found[f"{question}_{name}"] = value
        found[f"{question}_flops"] = model.shape.flops(target, linear)
        if has_fixed:
            found |= in_fixed_point(model, pictures, asked, question, logits)
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    found["bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.experts:
        found |= used(model, routed)
    return [Row(step, work.context, measure, value) for measure, value in found.items()]


def in_fixed_point(
    model: MultiTaskVisionTransformer,
    pictures: Pictures,
    asked: Asked,
    question: str,
    logits: Tensor,
) -> dict[str, float]:
    """QUESTION_fixed_.. in the published formats; QUESTION_fixed_patches_.. where the weights of
    patches may pass 1/2 (they have two bits before the point, as all others); QUESTION_float_..
    the model's own scores of the same images."""
    mean, sd = pictures.moments
    images, right = asked.images[:FIXED_IMAGES], asked.answers[question][:FIXED_IMAGES]
    logits = logits[:FIXED_IMAGES]
    found = {f"float_{name}": value for name, value in scores(logits, right).items()}
    for name, form in {"fixed": PATCH_WEIGHT, "fixed_patches": LINEAR_WEIGHT}.items():
        fixed = emulate(model, images, question, mean=mean, sd=sd, patch_form=form)
        found |= beside(logits, fixed, right, scores, name)
    return {f"{question}_{name}": value for name, value in found.items()}


def used(model: MultiTaskVisionTransformer, routed: dict[str, list[Routing]]) -> dict[str, float]:
    """What experts are used for, from the routing of many images by each question.

    QUESTION_bytes_expert, QUESTION_bytes_token: of the experts' matrices that one image reads, all
    layers together, in either order; a mean over images. QUESTION_experts: in use, a mean over
    layers; QUESTION_bytes_held: of those, what a device holds that answers this question alone.
    QUESTION_share_LAYER_EXPERT: of the choices. same_choices: experts that two questions both send
    a token to, as a share of k; a mean over pairs of questions, layers and tokens, by chance k / E.
    shared_use: sum over experts of the smaller of two questions' shares; 1 where they use the same.
    """
    found: dict[str, float] = {}
    shares: dict[str, Tensor] = {}
    one = model.experts[0].weight_bytes(1, "token") // model.shape.top_k
    for question, routings in routed.items():
        tokens = model.shape.tokens
        found[f"{question}_bytes_token"] = sum(
            e.weight_bytes(tokens, "token") for e in model.experts
        )
        visited = [chosen(routing).any(1).sum(1).double().mean().item() for routing in routings]
        found[f"{question}_bytes_expert"] = one * sum(visited)
        counts = torch.stack([load(routing) for routing in routings]).double()
        share = shares[question] = counts / counts.sum(1, keepdim=True)
        in_use = (share >= IN_USE / share.shape[1]).sum(1)
        found[f"{question}_experts"] = in_use.double().mean().item()
        found[f"{question}_bytes_held"] = in_use.sum().item() * one
        for layer, expert in itertools.product(*map(range, share.shape)):
            found[f"{question}_share_{layer}_{expert}"] = share[layer, expert].item()
    pairs = list(itertools.combinations(routed, 2))
    if pairs:
        same = [
            (chosen(a) & chosen(b)).sum(-1).double().mean().item() / a.top_k
            for one, other in pairs
            for a, b in zip(routed[one], routed[other], strict=True)
        ]
        found["same_choices"] = sum(same) / len(same)
        least = [torch.minimum(shares[one], shares[other]).sum(1).mean() for one, other in pairs]
        found["shared_use"] = torch.stack(least).mean().item()
    return found


def chosen(routing: Routing) -> Tensor:
    """bool (..., tokens, experts): where a token goes."""
    experts = torch.arange(routing.experts)
    return (routing.index.unsqueeze(-1) == experts).any(-2)


@torch.no_grad()
def tuning_loss(model: MultiTaskVisionTransformer, work: ExpertsWork, pictures: Pictures) -> float:
    """Summed over the questions that the model is asked."""
    asked = pictures.held_out("tune")
    images = pictures.normed(asked.images)
    return sum(
        answer_loss(answered(model, images, question)[0], asked.answers[question]).item()
        for question in model.tasks
    )


def largest_step(
    run: Run[ExpertsWork], model: MultiTaskVisionTransformer, pictures: Pictures
) -> Callable[[], object]:
    """Of several batches at once: what one takes is held already since the step before."""
    generator = torch.Generator().manual_seed(0)
    asked = pictures.random(MEMORY_BATCHES * run.work.batch, 0, False, generator)
    data = Asked(pictures.normed(asked.images), asked.answers)
    return lambda: loss(model, data, run)[0].backward()
