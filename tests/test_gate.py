"""Gated attention: its formulas, its start, cached == full."""

import pytest
import torch
from torch.testing import assert_close

from aftermax import LSSAR, Attention, GatedAttention, find
from aftermax.gate import GATES, Gate

F64 = torch.float64


def by_hand(gate, x):
    """sigmoid(g) of each token and head, written out."""
    batch, tokens, width = x.shape
    part = width // gate.heads
    logits = torch.zeros(batch, tokens, gate.heads, dtype=x.dtype)
    for h in range(gate.heads):
        own = x[..., h * part : (h + 1) * part]
        if gate.kind in ("token", "average"):
            logits[..., h] = own @ gate.weight[h]
        elif gate.kind == "mlp":
            hidden = (own @ gate.inner[h].T + gate.inner_bias[h]).relu()
            logits[..., h] = hidden @ gate.weight[h]
        elif gate.kind == "all":
            logits[..., h] = x @ gate.weight[h]
        logits[..., h] = logits[..., h] + gate.bias[h]
    if gate.kind == "average":
        logits = logits.mean(1, keepdim=True).expand_as(logits)
    return logits.sigmoid()


@pytest.mark.parametrize("kind", GATES)
def test_gates_are_their_formulas(kind):
    gate = Gate(24, 3, kind=kind, open_at_start=0.25, dtype=F64)
    x = torch.randn(2, 5, 24, dtype=F64)
    assert_close(gate(x).expand(2, 3, 5, 1), by_hand(gate, x).transpose(1, 2)[..., None])
    assert_close(gate(torch.zeros_like(x)).mean().item(), 0.25, atol=0.1, rtol=0)
    x.requires_grad_()
    assert torch.autograd.gradcheck(gate, (x,))


def test_narrow_heads_have_an_mlp_too():
    """Of a part of 2, a quarter is no hidden number at all."""
    gate, x = Gate(8, 4, kind="mlp", dtype=F64), torch.randn(2, 5, 8, dtype=F64)
    assert_close(gate(x), by_hand(gate, x).transpose(1, 2)[..., None])


@pytest.mark.parametrize("name", ["softmax", "lssar", "linear", "sink"])
@pytest.mark.parametrize("kind", [kind for kind in GATES if kind != "average"])
def test_cached_equals_full(kind, name):
    attend = GatedAttention(24, 3, gate=kind, weights=find(name).system, qk_norm=True, dtype=F64)
    x = torch.randn(2, 9, 24, dtype=F64)
    whole, state, pieces = attend(x), attend.init_state(2), []
    for part in x.split([4, 1, 3, 1], 1):
        out, state = attend.step(part, state)
        pieces.append(out)
    assert_close(torch.cat(pieces, 1), whole)


def test_an_open_gate_is_plain_attention():
    gated = GatedAttention(24, 3, weights=LSSAR(), gate="head", dtype=F64)
    plain = Attention(24, 3, weights=LSSAR(), dtype=F64)
    plain.load_state_dict(gated.state_dict(), strict=False)
    with torch.no_grad():
        gated.gate.bias.fill_(100.0)
    x = torch.randn(2, 5, 24, dtype=F64)
    assert_close(gated(x), plain(x))


def test_a_gate_that_looks_ahead_needs_a_module_that_does():
    with pytest.raises(ValueError, match="looks ahead"):
        GatedAttention(24, 3, gate="average")
    assert (
        GatedAttention(24, 3, gate="average", causal=False)(torch.randn(1, 4, 24)).isfinite().all()
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "each"}, "one of"),
        ({"open_at_start": 1.0}, "between"),
        ({"heads": 5}, "equal part"),
    ],
    ids=str,
)
def test_gates_that_cannot_be(wrong, said):
    with pytest.raises(ValueError, match=said):
        Gate(**({"width": 24, "heads": 3} | wrong))
