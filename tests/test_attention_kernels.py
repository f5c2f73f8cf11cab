"""The kernels of attention: equal to the reference, on every body, for every mask and layout."""

import pytest
import torch

from aftermax.kernels.attention_ops import MAPS, schemas

from .native import F32, needs_kernels, normal

NOTHING = torch.empty(0)


def operator_call(map="softmax", *, batch=2, heads=4, kv_heads=2, queries=5, keys=7, **changed):
    """The tensors and options of torch.ops.aftermax.attention, some of them changed."""
    tensors = {
        "query": normal(batch, heads, queries, 8),
        "key": normal(batch, kv_heads, keys, 8, seed=1),
        "value": normal(batch, kv_heads, keys, 6, seed=2),
        **dict.fromkeys(("mask", "slopes", "distance", "row_scale", "row_bias"), NOTHING),
        **dict.fromkeys(("row_weight", "row_power", "count", "sink"), NOTHING),
    }
    options = {
        "map": MAPS.index(map),
        "cosine": False,
        "causal": False,
        "offset": 0,
        "window": 0,
        "hidden_below": torch.finfo(F32).min / 2,
        "zero": queries - 1,
        "scale": 8**-0.5,
        "power": 1.0,
    }
    call = tensors | options
    assert call.keys() >= changed.keys()
    return tuple((call | changed).values())


# what torch asks of operators


def per_row(call, low, high):
    batch, heads, queries = call[0].shape[:3]
    return torch.linspace(low, high, batch * heads * queries).reshape(batch, heads, queries)


def operator_calls():
    plain = operator_call()
    counts = torch.full((2, 4, 5), 7.0)
    across = normal(2, 5, 4, 8).transpose(1, 2)  # tokens before heads
    mask = normal(2, 1, 5, 7, seed=3) > 0
    leaves = {
        "query": normal(2, 4, 5, 8).requires_grad_(),
        "key": normal(2, 2, 7, 8, seed=1).requires_grad_(),
        "value": normal(2, 2, 7, 6, seed=2).requires_grad_(),
    }
    return {
        "plain": plain,
        "leaves": operator_call(**leaves),
        "scaled, with a sink": operator_call(
            **leaves,
            row_scale=per_row(plain, 0.5, 2).requires_grad_(),
            sink=torch.tensor([0.0, 1.0, -1.0, 3.0]).requires_grad_(),
        ),
        "tokens first, masked": operator_call(query=across, mask=mask, causal=True, offset=2),
        "float mask, slopes, window": operator_call(
            mask=normal(1, 4, 1, 7), slopes=torch.rand(4), window=3
        ),
        "distances": operator_call(distance=torch.rand(2, 5 - 1 + 7)),
        "half": operator_call(**{name: x.detach().half() for name, x in leaves.items()}),
        "sigmoid": operator_call("sigmoid", row_bias=per_row(plain, -3, 0)),
        "relu": operator_call("relu", row_weight=per_row(plain, 0.1, 1), power=2.0),
        "softplus": operator_call("softplus", cosine=True),
        "lssar": operator_call("lssar", count=counts, row_power=per_row(plain, 1, 5)),
        "clipped": operator_call(
            "clipped", row_weight=per_row(plain, 1, 2), row_bias=per_row(plain, -0.1, 0), **leaves
        ),
    }


def operator_samples(name):
    if name == "count_visible":
        mask = normal(2, 1, 5, 7) > 0
        return [
            (mask, True, 1, 3, 0.0, 2, 1, 5, 7),
            (normal(1, 1, 1, 7), False, 0, 0, -0.5, 1, 1, 5, 7),
        ]
    calls = list(operator_calls().values())
    if name == "attention":
        return calls
    calls = [
        tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in call) for call in calls
    ]
    if name == "attention_forward":
        return calls
    samples = []
    for call in calls:
        out, stats, extra = torch.ops.aftermax.attention(*call)
        samples.append((torch.randn_like(out), out, stats, extra, *call))
    return samples


@pytest.mark.parametrize("name", schemas())
@needs_kernels
def test_torch_finds_nothing_wrong_with_the_operator(name):
    operator = getattr(torch.ops.aftermax, name).default
    for sample in operator_samples(name):
        torch.library.opcheck(operator, sample)
