"""The one small language model: what every arm shares, and that it decodes as it trains."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from aftermax import CATALOGUE
from aftermax.lab.models import Branch

from .lab_work import model_of, tiny_work

WORK = dataclasses.replace(tiny_work(None), layers=2)
ARMS = (
    "softmax",
    "lssar/alibi",
    "scale-invariant/p-rope",
    "rela",
    "sink/none",
    "sigmoid/hybrid/layerscale",
    "softmax/bare",
)


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 290, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def shaken(model):
    """Every parameter off its initial value, which may hide it (a scale of 1e-4, a gate of 0)."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


@pytest.mark.parametrize("kv_heads", [None, 1])
@pytest.mark.parametrize("system", ARMS)
@torch.no_grad()
def test_token_by_token_is_all_at_once(system, kv_heads):
    model = shaken(model_of(dataclasses.replace(WORK, kv_heads=kv_heads), system))
    whole = model(tokens())
    state, pieces = model.init_state(2), []
    for part in tokens().split([5, 1, 1, 3, 1, 1], 1):
        hidden, state = model.step(part, state)
        pieces.append(hidden)
    assert_close(torch.cat(pieces, 1), whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("system", ARMS)
@torch.no_grad()
def test_no_token_sees_a_later_one(system):
    model, changed = shaken(model_of(WORK, system)), tokens()
    changed[:, 7:] += 1
    assert_close(model(changed)[:, :7], model(tokens())[:, :7], atol=0, rtol=0)


def test_embeddings_are_tied():
    """One matrix turns tokens into vectors and vectors into predictions."""
    model = model_of(WORK)
    matrices = [n for n, p in model.named_parameters() if 290 in p.shape]
    assert matrices == ["embed.weight"]
    hidden = torch.randn(1, 3, 16)
    assert_close(model.logits(hidden), hidden @ model.embed.weight.T)


def branches(model) -> list[Branch]:
    return [module for module in model.modules() if isinstance(module, Branch)]


def test_norms_after_and_scales_are_there_when_asked_for():
    plain, rich = model_of(WORK, "sigmoid"), model_of(WORK, "sigmoid/hybrid/layerscale")
    for branch in branches(plain):
        assert branch.scale is None
        assert isinstance(branch.after, torch.nn.Identity)
    for branch in branches(rich):
        assert torch.equal(branch.scale, torch.full((16,), 1e-4))
        assert isinstance(branch.after, torch.nn.RMSNorm)
    assert len(branches(plain)) == len(branches(rich)) == 2 * WORK.layers


def test_a_work_asks_for_all_what_a_trait_asks_for_one():
    everyone = dataclasses.replace(WORK, hybrid_norm=True, layer_scale=True)
    for_one = model_of(WORK, "cosine/hybrid/layerscale")
    assert [n for n, _ in model_of(everyone, "cosine").named_parameters()] == [
        n for n, _ in for_one.named_parameters()
    ]


def test_queries_and_keys_are_normed_where_their_length_counts():
    def normed(system, **changes):
        model = model_of(dataclasses.replace(WORK, **changes), system)
        return any("query_norm" in name for name, _ in model.named_parameters())

    assert normed("softmax")
    assert not normed("softmax/bare")
    assert not normed("cosine")
    assert not normed("softmax", qk_norm=False)


@pytest.mark.parametrize(
    "entry",
    [entry for entry in CATALOGUE if entry.causal and entry.module is None],
    ids=lambda entry: entry.name,
)
def test_systems_differ_in_size_only_by_what_they_learn_of_their_own(entry):
    def sizes(system):
        own = ("learned", "query_norm", "key_norm")
        parameters = model_of(WORK, system).named_parameters()
        return {n: tuple(p.shape) for n, p in parameters if not any(word in n for word in own)}

    own = ".layer." if entry.module else "nothing"  # a paper's own layer has its own parts
    ours, softmax = (
        {n: x for n, x in sizes(s).items() if own not in n} for s in (entry.name, "softmax")
    )
    assert ours == softmax


def test_the_initial_loss_is_that_of_knowing_nothing():
    model = model_of(WORK)
    with torch.no_grad():
        logits = model.logits(model(tokens()))
    assert logits.log_softmax(-1).mean().item() == pytest.approx(-5.67, abs=0.05)


def test_branch_ends_begin_smaller_the_more_layers_there_are():
    deep = dataclasses.replace(WORK, layers=8, width=64)
    out = [p for n, p in model_of(deep).named_parameters() if "to_out" in n]
    into = [p for n, p in model_of(deep).named_parameters() if "to_query" in n]
    assert torch.cat([p.flatten() for p in into]).std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.cat([p.flatten() for p in out]).std().item() == pytest.approx(0.005, rel=0.05)
