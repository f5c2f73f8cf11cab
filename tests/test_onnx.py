"""`torch.onnx.export` of every system and of whole models, run by onnxruntime at other lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import aftermax
from aftermax import CATALOGUE, Attention, Entry, RowMap, Visible
from aftermax.dense import as_system
from aftermax.moe import Experts

from .attention_cases import assert_within, truth
from .cases import F64, Case, case_of
from .linear_cases import DRAWS, EPS, TIMES, UNITS
from .native import normal

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

OPEN = torch.export.Dim.DYNAMIC
QUICK = ("lssar", "cosformer")
"""A row map and a linear system; an export takes seconds."""


def in_onnxruntime(module: nn.Module, example: tuple, open_dims: tuple):
    """The exported module, as a function of tensors: of its first result."""
    example = tuple(x.contiguous() for x in example)  # strides would be fixed with it
    program = torch.onnx.export(module.eval(), example, dynamic_shapes=open_dims, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]

    def run(*tensors: Tensor) -> Tensor:
        given = {name: x.numpy() for name, x in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return run


class Attend(nn.Module):
    """A system with what it learned."""

    def __init__(self, entry: Entry, learned: dict[str, Tensor]):
        super().__init__()
        self.entry, self.learned = entry, learned

    def forward(self, query, key, value, mask):
        return as_system(self.entry.system).attend(
            query,
            key,
            value,
            Visible(causal=self.entry.causal, mask=mask[:, None, None]),
            enable_gqa=True,
            **self.learned,
        )


def right_and_slack(entry: Entry, case: Case, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The reference in float64, and by how much float32 may miss it.

    For the row maps, as kernels may (attention_cases.py). For the others onnxruntime's rounding is
    one more draw of torch's own, which is measured on inputs moved by an eps (linear_cases.py).
    """
    exact = case.to(F64)
    if isinstance(entry.system, RowMap):
        visible = Visible(causal=True, mask=mask[:, None, None])
        upstream = torch.ones(*exact.query.shape[:3], exact.value.shape[-1], dtype=F64)
        known = truth(entry, exact, visible, upstream)
        return known.out, known.of_out
    random = torch.Generator().manual_seed(1)

    def nearly(x: Tensor) -> Tensor:
        return x * (1 + EPS * torch.randn(x.shape, generator=random))

    def run(case: Case) -> Tensor:
        return Attend(entry, case.learned)(case.query, case.key, case.value, mask)

    right = run(exact)
    square = torch.stack([(run(case.map(nearly)) - right) ** 2 for _ in range(DRAWS)]).mean(0)
    slack = TIMES * square.mean((-2, -1), keepdim=True).sqrt()
    return right, slack + UNITS * EPS * right.abs().amax((-2, -1), keepdim=True)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, marks=() if entry.name in QUICK else pytest.mark.slow, id=entry.name)
        for entry in CATALOGUE
        if entry.name != "singlepass-fixed"  # which has none: test_singlepass.py
    ],
)
def test_one_graph_of_a_system_serves_all_lengths(entry):
    """Grouped heads, padding, and lengths on either side of a chunk: to the rounding of float32,
    and 0 where a row sees nothing."""
    kv_heads = 4 if "grouped_queries" in entry.exceptions else 2

    def given(tokens: int, batch: int) -> tuple[Case, Tensor]:
        case = case_of(entry, batch=batch, kv_heads=kv_heads, tokens=tokens, seed=tokens)
        mask = torch.ones(batch, tokens, dtype=torch.bool)
        mask[0, : tokens // 3] = False
        return case._replace(learned=learned).to(torch.float32), mask

    learned = case_of(entry, kv_heads=kv_heads).learned
    case, mask = given(9, 2)
    run = in_onnxruntime(
        Attend(entry, case.learned),
        (*case[:3], mask),
        (*({0: OPEN, 2: OPEN},) * 3, {0: OPEN, 1: OPEN}),
    )
    for tokens, batch in ((9, 2), (70, 3)):
        case, mask = given(tokens, batch)
        got = run(*case[:3], mask)
        assert_within(got, *right_and_slack(entry, case, mask), f"{entry.name}, T = {tokens}")
        if entry.causal:
            assert (got[0, :, : tokens // 3] == 0).all()


def test_what_is_hidden_never_matters():
    entry = aftermax.find("lssar")
    case, mask = case_of(entry, tokens=9).to(torch.float32), torch.ones(2, 9, dtype=torch.bool)
    run = in_onnxruntime(Attend(entry, {}), (*case[:3], mask), ({}, {}, {}, {}))
    mask[:, 4] = False
    expected = run(*case[:3], mask)
    case.key[:, :, 4], case.value[:, :, 4] = torch.nan, torch.inf
    assert torch.equal(run(*case[:3], mask), expected)


@pytest.mark.parametrize("positions", ["rope", pytest.param("alibi", marks=pytest.mark.slow)])
def test_a_module_with_positions_and_padding(positions):
    attend = Attention(32, heads=4, kv_heads=2, positions=positions, qk_norm=True)
    seen = torch.arange(70).expand(3, 70) >= torch.tensor([[0], [5], [9]])
    x = torch.randn(3, 70, 32)
    run = in_onnxruntime(attend, (x[:2, :9], seen[:2, :9]), ({0: OPEN, 1: OPEN},) * 2)
    with torch.no_grad():
        expected = attend(x, seen)
    torch.testing.assert_close(run(x, seen), expected, rtol=0, atol=8 * EPS)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["softmax", "lssar", "transnormer"])
def test_a_hugging_face_model(attention):
    transformers = pytest.importorskip("transformers")
    from aftermax.hf import convert

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            config = transformers.LlamaConfig(
                vocab_size=97,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
            model = transformers.AutoModelForCausalLM.from_config(config)
            self.model = convert(model, attention)

        def forward(self, tokens, mask):
            return self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits

    model = Logits()
    tokens = torch.randint(97, (3, 70))
    seen = torch.arange(70).expand(3, 70) >= torch.tensor([[0], [5], [9]])
    example = (tokens[:2, :20], seen[:2, :20].long())
    run = in_onnxruntime(model, example, ({0: OPEN, 1: OPEN},) * 2)
    with torch.no_grad():
        expected = model(tokens, seen.long())
    got = run(tokens, seen.long())
    torch.testing.assert_close(got[seen], expected[seen], rtol=0, atol=32 * EPS)


class Rows(nn.Module):
    def forward(self, x):
        return aftermax.softmax(x, -1), aftermax.log_softmax(x, -1), aftermax.logsumexp(x, -1)


def test_softmax_over_rows():
    x = torch.randn(3, 50)
    run = in_onnxruntime(Rows(), (x[:, :9],), ({1: OPEN},))
    torch.testing.assert_close(run(x), x.softmax(-1), rtol=8 * EPS, atol=0)


def test_kernels_that_are_asked_for_by_name_are_refused():
    class Asked(nn.Module):
        def forward(self, x):
            return aftermax.attention(x, x, x, impl="cpu")

    with pytest.raises(torch.onnx.OnnxExporterError, match=r"No ONNX function .*aftermax"):
        torch.onnx.export(Asked().eval(), (torch.randn(1, 1, 4, 8),), verbose=False)


def test_the_kernels_are_back_after_an_export():
    x = torch.randn(1, 1, 4, 8)
    before = aftermax.explain(x, x, x)
    torch.onnx.export(Rows().eval(), (torch.randn(3, 9),), verbose=False)
    assert aftermax.explain(x, x, x) == before


def test_experts_are_one_graph_at_other_lengths():
    """Every expert on every token, as there are no queues; equal scores go to the lower number."""
    layer = Experts(8, 12, experts=4, renormalise=True)
    run = in_onnxruntime(layer, (normal(2, 5, 8),), ({1: OPEN},))
    for x in (normal(2, 9, 8, seed=1), torch.zeros(2, 3, 8)):
        assert_close(run(x), layer(x).detach(), rtol=0, atol=1e-6)
