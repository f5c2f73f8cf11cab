"""What every linear system shares: which way a call takes, and what it refuses."""

import pytest
import torch
from torch.testing import assert_close

from aftermax import CATALOGUE, Visible
from aftermax.linear import CosFormer, Linear, Separable

from .cases import case_of

LINEAR = [entry for entry in CATALOGUE if isinstance(entry.system, Separable)]
every_linear = pytest.mark.parametrize("entry", LINEAR, ids=lambda entry: entry.name)


@every_linear
@pytest.mark.parametrize("offset", [0, 5])
def test_positions_begin_at_the_offset_whatever_way_is_taken(entry, offset):
    if entry.name == "cottention-value" and offset:
        pytest.skip("a value is divided by what its own token sees: queries must be the keys'")
    case, visible = case_of(entry), Visible(offset=offset)
    expected = case.attend(entry, visible, form="parallel")
    assert_close(case.attend(entry, visible), expected, rtol=1e-12, atol=1e-12)


@every_linear
def test_a_cache_seen_as_a_mask_is_the_state_of_the_walk(entry):
    """Queries that stand behind all keys but their own see what a state would hold."""
    if entry.name == "cottention-value":
        pytest.skip("a value is divided by what its own token sees: it needs as many queries")
    case = case_of(entry, tokens=9)
    whole = case.attend(entry, Visible(causal=True))
    last = case._replace(query=case.query[:, :, 6:])
    out = last.attend(entry, Visible(causal=True, offset=6))
    assert_close(out, whole[:, :, 6:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        (Visible(slopes=torch.ones(4)), "Linear has no scores that ALiBi slopes could be added"),
        (Visible(mask=torch.full((9, 9), 0.5)), "Linear has no scores that a mask could be added"),
    ],
)
def test_there_is_nothing_to_add_to(visible, message):
    case = case_of(LINEAR[0])
    with pytest.raises(ValueError, match=message):
        Linear().attend(*case[:3], visible)


def test_there_are_no_weights_to_drop():
    case = case_of(LINEAR[0])
    with pytest.raises(ValueError, match=r"Linear has no weights that dropout_p=0.1 could drop"):
        Linear().attend(*case[:3], Visible(causal=True), dropout_p=0.1)


def test_what_is_summed_cannot_be_forgotten():
    system, x = Linear(), torch.randn(1, 2, 3, 4)
    state = system.init_state(1, 2, 4, 4)
    with pytest.raises(ValueError, match="a sum forgets nothing"):
        system.step(x, x, x, state, Visible(causal=True, window=2))
    with pytest.raises(ValueError, match="as `seen`"):
        system.step(x, x, x, state, Visible(causal=True, mask=torch.ones(3, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"seen must be bool of shape \(B, T\) = \(1, 3\)"):
        system.step(x, x, x, state, Visible(causal=True), torch.ones(1, 2, dtype=torch.bool))


def test_a_learned_tensor_of_another_shape_says_so():
    case = case_of(LINEAR[2])
    with pytest.raises(ValueError, match=r"m of Cottention needs shape \(4,\), got \(3,\)"):
        LINEAR[2].system.attend(*case[:3], Visible(causal=True), m=torch.zeros(3))
    with pytest.raises(TypeError, match="Linear learns no m"):
        Linear().attend(*case[:3], Visible(causal=True), m=torch.zeros(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "nonsense"}, "form='nonsense' is none of 'parallel', 'chunked', 'recurrent'"),
        ({"impl": "nonsense"}, "impl='nonsense' is none of 'reference', 'cpu'"),
        ({"dropout_p": -1.0}, "dropout_p is a probability, got -1.0"),
    ],
)
@pytest.mark.parametrize("visible", [Visible(), Visible(causal=True), Visible(window=2)])
def test_names_that_are_none_raise_whatever_way_is_taken(options, message, visible):
    case = case_of(LINEAR[0])
    with pytest.raises(ValueError, match=message):
        Linear().attend(*case[:3], visible, **options)


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_a_form_that_does_not_run_is_not_passed_over(form):
    case = case_of(LINEAR[0])
    with pytest.raises(ValueError, match="but the call is not causal"):
        Linear().attend(*case[:3], Visible(), form=form)
    with pytest.raises(ValueError, match="but the visible keys differ from query to query"):
        Linear().attend(*case[:3], Visible(causal=True, window=2), form=form)


def test_an_expanded_mask_is_one_row():
    case, mask = case_of(LINEAR[0]), torch.zeros(9)
    mask[3] = -torch.inf
    visible = Visible(causal=True, mask=mask.expand(2, 4, 9, 9))
    assert not visible.differs_by_query()
    assert visible.seen_keys("this").shape == (2, 4, 1, 9)
    expected = case.attend(LINEAR[0], Visible(causal=True, mask=mask))
    assert torch.equal(case.attend(LINEAR[0], visible), expected)


def test_rows_of_far_negative_features_still_sum_to_one_with_gradients():
    x = torch.full((1, 1, 4, 4), -60.0, requires_grad=True)
    out = Linear().attend(x, x, torch.ones(1, 1, 4, 4), Visible(causal=True))
    assert_close(out, torch.ones_like(out))
    out.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("visible", "way"),
    [
        (Visible(), "reference: two matrix products"),
        (Visible(causal=True, window=3), "parallel, O(T^2): the visible keys differ from query"),
    ],
)
def test_it_says_which_way_it_takes(visible, way):
    x = torch.randn(1, 2, 9, 4)
    assert way in Linear().explain(x, x, x, visible)


def test_it_says_why_it_does_not_take_the_kernel():
    x = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    assert "chunked, O(T): " in Linear().explain(x, x, x, Visible(causal=True))


@pytest.mark.parametrize("impl", ["cpu"])
def test_the_kernel_asked_for_by_name_is_had_or_raises(impl):
    x = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="impl='cpu', but"):
        Linear().attend(x, x, x, Visible(causal=True), impl=impl)
    with pytest.raises(RuntimeError, match="impl='cpu', but the visible keys differ"):
        Linear().attend(x, x, x, Visible(causal=True, window=3), impl=impl)


def test_a_state_has_one_size():
    system, x = CosFormer(), torch.randn(2, 4, 7, 8)
    state = system.init_state(2, 4, 8, 8)
    size = state.bytes
    for _ in range(3):
        _, state = system.step(x, x, x, state, Visible(causal=True))
        assert state.bytes == size
    assert state.length == 21
    assert state.count.tolist() == [21, 21]
