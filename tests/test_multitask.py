"""The multi-task vision transformer: what a task changes, what an answer reads, FLOPs."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from aftermax import Visible, attention
from aftermax.catalogue import CATALOGUE, find
from aftermax.lab.multitask import M3VIT, MultiTaskVisionTransformer, Shape, Target
from aftermax.moe import Experts

SMALL = Shape((8, 12), 4, 3, width=16, layers=4, heads=2, hidden=64, odd_hidden=32, experts=4)
CLASS, MASK = Target("class", 5), Target("mask", 1, dense=True)


def model_of(system="softmax", shape=SMALL, targets=(CLASS, MASK), **options):
    return MultiTaskVisionTransformer(shape, targets, find(system).system, **options)


def images_of(count=3, shape=SMALL) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, shape.channels, *shape.image, generator=generator)


def test_even_layers_are_dense_and_odd_ones_have_experts():
    kinds = [isinstance(block.feed, Experts) for block in model_of().blocks]
    assert kinds == [False, True, False, True]
    assert len(model_of().experts) == 2
    dense = model_of(shape=dataclasses.replace(SMALL, experts=0, odd_hidden=48))
    assert [block.feed.inner.out_features for block in dense.blocks] == [64, 48, 64, 48]


def test_the_published_shape():
    assert (M3VIT.grid, M3VIT.tokens) == ((8, 16), 129)
    shape = dataclasses.replace(M3VIT, layers=2)
    model = MultiTaskVisionTransformer(shape, [CLASS, MASK])
    names = dict(model.named_parameters())
    assert names["blocks.1.feed.w1"].shape == (16, 384, 192)
    assert names["blocks.1.feed.router.gates"].shape == (2, 16, 192)
    assert names["blocks.0.feed.inner.weight"].shape == (768, 192)
    assert names["blocks.0.attend.to_query.bias"].shape == (192,)
    assert {block.before_feed.eps for block in model.blocks} == {1e-6}


def test_a_block_by_hand():
    """Softmax attention and the MLP, written out."""
    model = model_of().double()
    block, x = model.blocks[0], model.embed(images_of().double())
    normed = torch.nn.functional.layer_norm(
        x, (16,), block.before_attend.weight, block.before_attend.bias, 1e-6
    )
    attend = block.attend
    query, key, value = (
        part(normed).unflatten(-1, (2, 8)).transpose(1, 2)
        for part in (attend.to_query, attend.to_key, attend.to_value)
    )
    heads = attention(query, key, value, attn_mask=Visible(causal=False), impl="reference")
    x = x + attend.to_out(heads.transpose(1, 2).flatten(-2))
    normed = torch.nn.functional.layer_norm(
        x, (16,), block.before_feed.weight, block.before_feed.bias, 1e-6
    )
    inner = torch.nn.functional.gelu(block.feed.inner(normed))
    expected = x + block.feed.to_out(inner)
    found, routing = block(model.embed(images_of().double()), 0)
    assert_close(found, expected)
    assert routing is None


def test_a_patch_is_a_square_of_the_image_in_reading_order():
    model = model_of()
    with torch.no_grad():
        for part in (model.places, model.class_token, model.to_patches.bias):
            part.zero_()
    image = torch.zeros(1, 3, 8, 12)
    image[0, 2, 5, 10] = 1.0  # row 1 of the second row of patches, column 2 of the third
    expected = torch.zeros(1, 7, 16)
    expected[0, 1 + 5] = model.to_patches.weight[:, 2 * 16 + 1 * 4 + 2]
    assert_close(model.embed(image), expected)


def test_a_patch_answers_for_its_own_pixels():
    model = model_of(targets=[CLASS, Target("parts", 2, dense=True)])
    tokens, _ = model.tower(images_of(), "parts")
    logits = model(images_of(), "parts")
    assert logits.shape == (3, 2, 8, 12)
    own = model.heads["parts"](tokens[:, 1 + 4])  # the fifth patch: rows 4 to 7, columns 4 to 7
    assert_close(logits[:, :, 4:8, 4:8], own.unflatten(1, (2, 4, 4)))
    assert_close(
        model(images_of(), "class"), model.heads["class"](model.tower(images_of(), 0)[0][:, 0])
    )


def test_a_task_is_its_gates_and_its_head():
    """With the gates of one task in the place of the other's, the towers are the same."""
    model = model_of()
    first, routings = model.tower(images_of(), "class")
    second, others = model.tower(images_of(), "mask")
    assert not torch.equal(first, second)
    assert len(routings) == len(others) == 2
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for layer in model.experts:
            layer.router.gates[1] = layer.router.gates[0]
    assert torch.equal(model.tower(images_of(), "mask")[0], first)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"blocks.{i}.feed.router.gates" for i in (1, 3)}


@pytest.mark.parametrize("experts", [4, 0])
def test_all_tasks_at_once_are_each_by_itself(experts):
    model = model_of(shape=dataclasses.replace(SMALL, experts=experts)).double()
    images = images_of().double()
    found = model.ask_all(images)
    assert [*found] == ["class", "mask"]
    for task, (logits, routings) in found.items():
        alone, others = model(images, task, return_routing=True)
        assert_close(logits, alone)
        assert len(routings) == len(others)
        for ours, theirs in zip(routings, others, strict=True):
            assert torch.equal(ours.index, theirs.index)
            assert_close(ours.probabilities, theirs.probabilities)


def test_a_step_of_one_task_leaves_the_gates_and_the_head_of_the_other():
    model = model_of()
    model(images_of(), "mask").square().mean().backward()
    for layer in model.experts:
        assert layer.router.gates.grad[0].abs().sum() == 0
        assert layer.router.gates.grad[1].abs().sum() > 0
    assert model.heads["class"].weight.grad is None
    assert model.heads["mask"].weight.grad is not None
    assert model.to_patches.weight.grad.abs().sum() > 0


def test_without_experts_the_tower_is_the_same_for_every_task():
    model = model_of(shape=dataclasses.replace(SMALL, experts=0))
    assert torch.equal(model.tower(images_of(), 0)[0], model.tower(images_of(), 1)[0])
    assert model(images_of(), "mask", return_routing=True)[1] == []


@pytest.mark.parametrize("system", [entry.name for entry in CATALOGUE])
def test_every_system_sees_all_and_starts_from_the_same_weights(system):
    model = model_of(system, seed=3)
    softmax = dict(model_of(seed=3).named_parameters())
    shared = {n: p for n, p in model.named_parameters() if "learned" not in n}
    assert shared.keys() == softmax.keys()
    for name, parameter in shared.items():
        assert torch.equal(parameter, softmax[name]), name
    images = images_of()
    before = model(images, "class")
    images[:, :, -4:, -4:] += 1  # the last patch, to the class token before it
    assert ((model(images, "class") - before).abs().amax(1) > 0).all()
    model(images, "mask").sum().backward()
    assert torch.isfinite(model.places.grad).all()


def test_another_seed_and_other_experts_give_other_weights_and_the_rest_stays():
    first, second = dict(model_of().named_parameters()), dict(model_of(seed=1).named_parameters())
    drawn = [n for n, p in first.items() if p.ndim > 1]
    assert not any(torch.equal(first[n], second[n]) for n in drawn)
    dense = dict(model_of(shape=dataclasses.replace(SMALL, experts=0)).named_parameters())
    both = [n for n in first if n in dense and n in drawn]
    assert "blocks.3.attend.to_query.weight" in both
    assert all(torch.equal(first[n], dense[n]) for n in both)


def test_the_weights_of_a_layer_may_be_given_by_its_number():
    asked = []

    def of_layer(layer):
        asked.append(layer)
        return find("softmax").system

    MultiTaskVisionTransformer(SMALL, [CLASS], of_layer)
    assert asked == [0, 1, 2, 3]


@pytest.mark.parametrize("target", [CLASS, MASK, Target("parts", 3, dense=True)])
@pytest.mark.parametrize("odd_hidden", [64, 96])
@torch.no_grad()
def test_flops_are_those_that_torch_counts(target, odd_hidden):
    """Dense towers, attention by the reference: torch sees every product of it."""
    shape = dataclasses.replace(SMALL, experts=0, odd_hidden=odd_hidden)
    model = MultiTaskVisionTransformer(shape, [target])
    for block in model.blocks:
        block.attend.impl = "reference"
    with FlopCounterMode(display=False) as counted:
        model(images_of(1), target.name)
    assert counted.get_total_flops() == shape.flops(target)


@torch.no_grad()
def test_flops_of_experts_are_those_of_what_was_chosen():
    """Token by token, which torch counts."""
    model = model_of()
    for block in model.blocks:
        block.attend.impl = "reference"
    for layer in model.experts:
        layer.order = "token"
    with FlopCounterMode(display=False) as counted:
        model(images_of(1), "class")
    assert counted.get_total_flops() == SMALL.flops(CLASS)


def test_flops_by_hand():
    tokens, d = 7, 16
    layer = 8 * tokens * d * d + 4 * tokens * tokens * d
    mlp, experts = 4 * tokens * d * 64, 2 * tokens * d * 4 + 2 * 4 * tokens * d * 32
    patches = 2 * 6 * 48 * d
    assert SMALL.flops(CLASS) == patches + 4 * layer + 2 * mlp + 2 * experts + 2 * d * 5
    linear = 8 * tokens * d * d + 4 * tokens * d * 8
    dense = 2 * 6 * d * 16
    assert SMALL.flops(MASK, linear=True) == patches + 4 * linear + 2 * mlp + 2 * experts + dense


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dataclasses.replace(SMALL, patch=5), "patch must divide the image's sides, got 5"),
        (lambda: model_of(targets=[]), r"targets need names that differ, got \[\]"),
        (lambda: model_of(targets=[CLASS, CLASS]), "targets need names that differ, got"),
        (lambda: model_of()(images_of()[:, :1], "class"), r"must be \(B, 3, 8, 12\), got \(3, 1,"),
        (
            lambda: model_of()(images_of(), "depth"),
            "one of class, mask, or its number, got 'depth'",
        ),
        (lambda: model_of()(images_of(), 2), "got 2"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
