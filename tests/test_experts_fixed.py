"""A whole model in Edge-MoE's numbers: near its own, what did not fit, what has no unit."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from aftermax import FixedOnePassSoftmax, OnePassSoftmax, Sigmoid, Softmax
from aftermax.lab.experts_fixed import beside, emulate, refusal
from aftermax.lab.multitask import MultiTaskVisionTransformer, Shape, Target
from aftermax.modules import Attention
from aftermax.moe import Experts, Fixed

SHAPE = Shape((8, 12), 4, 3, 24, layers=4, heads=2, hidden=48, odd_hidden=24, experts=4)
TARGETS = [Target("class", 5), Target("mask", 1, dense=True), Target("parts", 2, dense=True)]
MEAN, SD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.3, 0.25, 0.2])


def model_of(**options) -> MultiTaskVisionTransformer:
    """Weights large enough to matter."""
    model = MultiTaskVisionTransformer(SHAPE, TARGETS, **options)
    with torch.no_grad():
        random = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random)
        # what is divided by a deviation must fit a format that ends at 1/2
        model.to_patches.weight *= 0.1
    return model.double().eval()


def pictures(count: int = 3) -> torch.Tensor:
    whole = torch.randint(256, (count, 3, 8, 12), generator=torch.Generator().manual_seed(2))
    return whole.double() / 255


def answers(model, images, task):
    with torch.no_grad():
        return model((images - MEAN[:, None, None]) / SD[:, None, None], task)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"weights": OnePassSoftmax()}], ids=str)
@pytest.mark.parametrize("task", ["class", "mask", "parts"])
def test_it_answers_as_the_model_does(task, options):
    model, images = model_of(**options), pictures()
    found, wanted = emulate(model, images, task, mean=MEAN, sd=SD), answers(model, images, task)
    assert found.logits.shape == wanted.shape
    # weights have 14 bits of fraction, norms 11, and their errors add up over 48 terms
    assert float(wanted.std()) > 0.3
    assert_close(found.logits, wanted, rtol=0, atol=0.02)
    assert found.told() == "wrapped: nothing; outside of their format: no weights"
    number = model.tasks.index(task)
    assert torch.equal(emulate(model, images, number, mean=MEAN, sd=SD).logits, found.logits)


def test_weights_that_are_numbers_of_their_formats_leave_little_to_err():
    model, images = model_of(), pictures()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fits = 2.0**11 if "norm" in name or "before" in name else 2.0**9
            parameter.copy_((parameter * fits).floor() / fits)
        model.to_patches.weight.mul_(255 / 256)  # whose factor is then whole
    found = emulate(model, images, "class").logits
    with torch.no_grad():
        wanted = model(images, "class")
    # table and cuts are left
    assert_close(found, wanted, rtol=0, atol=2e-3)


def test_images_are_bytes_and_batches_are_no_information():
    model, images = model_of(), pictures(5)
    found = emulate(model, images, "class", at_once=2).logits
    assert torch.equal(found, emulate(model, images, "class").logits)
    near = (images + 0.4 / 255).clamp_max(1)
    assert torch.equal(found, emulate(model, near, "class").logits)
    with pytest.raises(ValueError, match=r"images must lie from 0 to 1, got -0.5 to"):
        emulate(model, images - 0.5, "class")
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 8, 12\), got \(5, 3, 8, 8\)"):
        emulate(model, images[..., :8], "class")


def test_weights_outside_of_their_format_rest_at_its_edge_or_wrap():
    model, images = model_of(), pictures()
    with torch.no_grad():
        model.heads["class"].weight[0, 0] = 5.0
        model.blocks[0].before_attend.weight[3] = 100.0
    found = emulate(model, images, "class")
    assert found.clipped["linear weights"] == 1
    assert found.clipped["norm weights"] == 1
    assert "outside of their format: linear weights 1, norm weights 1" in found.told()
    assert found.parameters > 10_000
    wrapped = emulate(model, images, "class", saturate=False)
    assert wrapped.clipped == found.clipped
    with torch.no_grad():
        model.heads["class"].weight[0, 0] = 2 - 2.0**-14
        model.blocks[0].before_attend.weight[3] = 16 - 2.0**-11
    assert torch.equal(emulate(model, images, "class").logits, found.logits)
    with torch.no_grad():
        model.heads["class"].weight[0, 0] = 1.0  # 5 less 4
        model.blocks[0].before_attend.weight[3] = 4.0  # 100 less 3 times 32
    assert torch.equal(emulate(model, images, "class").logits, wrapped.logits)


def test_patches_may_have_weights_of_another_format():
    model, images = model_of(), pictures()
    with torch.no_grad():
        model.to_patches.weight *= 20
    wanted = answers(model, images, "class")
    published = emulate(model, images, "class", mean=MEAN, sd=SD)
    assert published.clipped["patch weights"] > 10
    wider = emulate(model, images, "class", mean=MEAN, sd=SD, patch_form=Fixed(16, 4))
    assert wider.clipped["patch weights"] == 0
    off = [float((found.logits - wanted).abs().max()) for found in (published, wider)]
    assert off[1] < off[0] / 3


def test_activations_that_wrap_are_counted():
    model, images = model_of(), pictures()
    with torch.no_grad():
        model.places[0, 3] = 400.0
        model.blocks[0].attend.to_out.bias[:] = 60.0
        model.blocks[0].feed.to_out.bias[:] = 15.0
        model.blocks[1].attend.to_out.bias[:] = 60.0
    found = emulate(model, images, "class")
    assert found.tally.wrapped["residual"] >= 3 * 24
    assert "residual" in found.told()


def test_long_rows_need_the_corrected_softmax():
    shape = Shape((24, 24), 1, 1, 8, layers=1, heads=1, hidden=8, odd_hidden=8, experts=0)
    model = MultiTaskVisionTransformer(shape, [Target("class", 2)]).double()
    with torch.no_grad():
        model.blocks[0].attend.to_query.weight.zero_()  # 577 equal scores
    images = pictures(1)[:, :1, :1, :1].expand(1, 1, 24, 24)
    hardware = emulate(model, images, "class")
    ours = emulate(model, images, "class", corrected=True)
    assert hardware.tally.wrapped["softmax"] == 577
    assert ours.tally.wrapped["softmax"] == 0
    with torch.no_grad():
        assert_close(ours.logits, model(images, "class"), rtol=0, atol=5e-3)


def _with_attention(**options):
    model = model_of()
    model.blocks[2].attend = Attention(24, 2, **{"positions": "none", "causal": False} | options)
    return model


def _with_experts(**options):
    model = model_of()
    model.blocks[1].feed = Experts(24, 24, 4, tasks=3, **options)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: model_of(weights=Sigmoid()), "softmax in one pass alone, and a layer has Sigmoid"),
        (lambda: model_of(weights=Softmax("log_n")), "no published form"),
        (lambda: model_of(gated=True), "GatedAttention, whose gate has no unit"),
        (lambda: _with_attention(causal=True), "hides tokens"),
        (lambda: _with_attention(positions="rope"), "positions of its own"),
        (lambda: _with_attention(positions="alibi"), "positions of its own"),
        (lambda: _with_experts(activation=F.silu), "another activation than gelu"),
        (lambda: _with_experts(capacity=3), "drops no token"),
        (lambda: _with_experts(renormalise=True), "renormalises"),
    ],
)
def test_what_has_no_unit_is_refused_with_the_reason(make, reason):
    model = make()
    with pytest.raises(ValueError, match=reason) as refused:
        emulate(model, pictures(), "class")
    assert refusal(model) == str(refused.value)
    assert refusal(model_of()) is None


def test_what_the_numbers_do_to_the_answers():
    model, images = model_of(), pictures(6)
    wanted = answers(model, images, "class")
    found = emulate(model, images, "class", mean=MEAN, sd=SD)
    told = beside(wanted, found, wanted.argmax(1), lambda x, y: {"accuracy": 0.5, "of": len(y)})
    assert told["fixed_accuracy"] == 0.5
    assert told["fixed_of"] == 6
    assert told["fixed_same"] == 1
    error = (wanted - found.logits).square().mean().sqrt()
    assert told["fixed_error"] == pytest.approx(float(error))
    assert told["fixed_wrapped"] == told["fixed_clipped"] == 0
    other = wanted.clone()
    other[0] = -other[0]
    assert beside(other, found, other, lambda *_: {})["fixed_same"] == pytest.approx(5 / 6)
    mask = emulate(model, images, "mask", mean=MEAN, sd=SD)
    pixels = mask.logits.clone()
    pixels[0, 0, 0, 0] *= -1
    told = beside(pixels, mask, pixels, lambda *_: {})
    assert told["fixed_same"] == pytest.approx(1 - 1 / pixels.numel())


def test_a_task_that_there_is_not():
    with pytest.raises(ValueError, match="task must be one of class, mask, parts"):
        emulate(model_of(), pictures(), "colour")


def test_the_fixed_softmax_of_the_catalogue_is_one_it_knows():
    model, images = model_of(weights=FixedOnePassSoftmax()), pictures()
    found = emulate(model, images, "class", mean=MEAN, sd=SD)
    assert_close(found.logits, answers(model, images, "class"), rtol=0, atol=0.02)
