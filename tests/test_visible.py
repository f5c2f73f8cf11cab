"""What a query may see, in every form in which a caller can say it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aftermax import Visible
from aftermax.visible import count

CPU = torch.device("cpu")


def whole(visible: Visible, queries: int, keys: int) -> torch.Tensor:
    rows = visible.rows(0, queries, (0, keys), CPU, torch.float64)
    return rows.visible.expand(*rows.visible.shape[:2], queries, keys)


@given(
    causal=st.booleans(),
    offset=st.integers(0, 5),
    window=st.none() | st.integers(1, 6),
    queries=st.integers(1, 7),
    keys=st.integers(0, 9),
)
def test_positions_decide_what_is_seen(causal, offset, window, queries, keys):
    seen = whole(Visible(causal=causal, offset=offset, window=window), queries, keys)
    for i in range(queries):
        for j in range(keys):
            distance = i + offset - j
            allowed = not causal or distance >= 0
            allowed = allowed and (window is None or abs(distance) < window)
            assert bool(seen[0, 0, i, j]) == allowed


@given(
    causal=st.booleans(),
    offset=st.integers(0, 5),
    window=st.none() | st.integers(1, 4),
    start=st.integers(0, 6),
    length=st.integers(1, 3),
    keys=st.integers(0, 9),
)
def test_nothing_is_seen_outside_of_the_span(causal, offset, window, start, length, keys):
    visible = Visible(causal=causal, offset=offset, window=window)
    low, high = visible.span(start, start + length, keys)
    assert 0 <= low <= high <= keys
    seen = whole(visible, start + length, keys)[0, 0, start:]
    assert not seen[:, :low].any()
    assert not seen[:, high:].any()
    block = visible.rows(start, start + length, (low, high), CPU, torch.float64)
    assert torch.equal(block.visible[0, 0], seen[:, low:high])


def test_the_span_of_a_window_is_no_longer_than_the_window_asks():
    assert Visible(causal=True, window=3).span(10, 14, 100) == (8, 14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_float_mask_hides_at_the_lowest_number_and_adds_elsewhere(dtype):
    lowest = torch.finfo(dtype).min
    mask = torch.tensor([0.0, -3.0, lowest, -torch.inf, 2.0, lowest * 0.75], dtype=dtype)
    rows = Visible(mask=mask).rows(0, 1, (0, 6), CPU, torch.float64)
    assert rows.visible.flatten().tolist() == [True, True, False, False, True, False]
    assert rows.bias is not None
    assert rows.bias.flatten().tolist() == [0.0, -3.0, 0.0, 0.0, 2.0, 0.0]


def test_ten_thousand_below_is_a_bias_not_a_mask():
    rows = Visible(mask=torch.tensor([-1e4, 0.0])).rows(0, 1, (0, 2), CPU, torch.float32)
    assert rows.visible.all()


@pytest.mark.parametrize(
    "shape", [(4, 5), (5,), (1, 1), (3, 4, 5), (1, 4, 1), (2, 1, 1, 5), (2, 3, 4, 5)]
)
def test_blocks_of_a_broadcast_mask_are_blocks_of_the_whole(shape):
    mask = torch.rand(shape) < 0.5
    Visible(mask=mask).check(2, 3, 4, 5)
    expected = mask.expand(2, 3, 4, 5)[:, :, 1:3, 2:5]
    rows = Visible(mask=mask).rows(1, 3, (2, 5), CPU, torch.float32)
    assert torch.equal(rows.visible.expand(2, 3, 2, 3), expected)


def test_alibi_falls_with_distance_on_both_sides():
    slopes = torch.tensor([0.5, 0.25])
    rows = Visible(slopes=slopes, offset=1).rows(0, 1, (0, 3), CPU, torch.float32)
    assert rows.bias is not None
    assert rows.bias[0, :, 0].tolist() == [[-0.5, 0.0, -0.5], [-0.25, 0.0, -0.25]]


def test_alibi_and_a_float_mask_add_up():
    visible = Visible(slopes=torch.tensor([1.0]), mask=torch.tensor([[0.5, 0.0, -torch.inf]]))
    rows = visible.rows(0, 1, (0, 3), CPU, torch.float32)
    assert rows.bias is not None
    assert rows.bias.flatten()[:2].tolist() == [0.5, -1.0]
    assert rows.visible.flatten().tolist() == [True, True, False]


def test_distance_is_query_minus_key():
    rows = Visible(offset=4).rows(0, 2, (3, 6), CPU, torch.float32)
    assert rows.distance.tolist() == [[1, 0, -1], [2, 1, 0]]


def test_count_is_of_visible_keys():
    seen = torch.tensor([[[True, False, True], [False, False, False]]])
    assert count(seen, torch.float64).tolist() == [[[2.0], [0.0]]]


@given(block=st.integers(1, 8), causal=st.booleans())
def test_keys_that_any_row_sees_are_counted_once(block, causal):
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, ..., 2] = False
    mask[1, ..., :3, 4] = False
    visible = Visible(causal=causal, mask=mask)
    seen = visible.seen_by_any(5, 7, block, CPU, torch.float32)
    # causal: keys 5 and 6 lie past the last of the five queries
    assert seen.flatten().tolist() == ([4, 5] if causal else [6, 7])


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        (
            Visible(mask=torch.ones(3, 4).bool()),
            r"attn_mask of shape \(3, 4\) does not broadcast to \(B, H, Tq, Tk\) = \(1, 2, 3, 5\)",
        ),
        (Visible(mask=torch.ones(1, 1, 1, 3, 5).bool()), "does not broadcast"),
        (
            Visible(mask=torch.ones(3, 5).int()),
            r"attn_mask must be bool or floating point, got torch\.int32",
        ),
        (Visible(window=0), r"window must be at least 1 \(itself\), got 0"),
        (
            Visible(slopes=torch.ones(3)),
            r"ALiBi slopes must have shape \(H,\) = \(2,\), got \(3,\)",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_came(visible, message):
    with pytest.raises(ValueError, match=message):
        visible.check(1, 2, 3, 5)
