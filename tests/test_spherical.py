"""FactoredLinear is a dense layer under SGD: its losses, gradients and weights, step by step."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from aftermax import (
    FactoredLinear,
    LogSphericalLoss,
    LogTaylorLoss,
    SquaredErrorLoss,
    ZScoreLoss,
    log_spherical_softmax_loss,
    log_taylor_softmax_loss,
    squared_error_loss,
    z_score_loss,
)
from aftermax.losses import spherical

from .native import BF16, F32, F64, REDUCTIONS

# each member with its dense loss, and a learning rate at which 1,000 steps stay finite
MEMBERS = {
    "z": (ZScoreLoss(), z_score_loss, 2.0),
    "z, sharp": (ZScoreLoss(1.0, 0.0), lambda *x, **o: z_score_loss(*x, a=1.0, b=0.0, **o), 2.0),
    "taylor": (LogTaylorLoss(), log_taylor_softmax_loss, 0.2),
    "spherical": (LogSphericalLoss(), log_spherical_softmax_loss, 0.05),
    "squared error": (SquaredErrorLoss(), squared_error_loss, 0.02),
}
members = pytest.mark.parametrize(("member", "dense", "lr"), MEMBERS.values(), ids=MEMBERS.keys())


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def pair(classes, width, *, dtype=F64, bias=False, seed=0, **options):
    """A layer and the `torch.nn.Linear` of the same weights, rows that share an offset."""
    linear = nn.Linear(width, classes, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(0.3 * normal(classes, width, seed=seed) + 0.1)
    return FactoredLinear.from_linear(linear, **options), linear


def batch(random, rows, width, classes, labels):
    """Hidden vectors that are not centred, and Zipf targets: many twice in a batch, some padded."""
    hidden = torch.randn(rows, width, generator=random, dtype=F64).relu() + 0.1
    target = (classes ** torch.rand(rows, labels, generator=random)).long() - 1
    if labels > 1:
        padding = torch.rand(rows, labels, generator=random) < 0.3
        padding[:, 0] = False
        target = target.where(~padding, -1)
    return hidden, target


def weight_error(layer, linear):
    error = (layer.weight - linear.weight.detach()).abs().max()
    if linear.bias is not None:
        error = torch.maximum(error, (layer.bias - linear.bias.detach()).abs().max())
    return (error / linear.weight.detach().abs().max()).item()


def invariants(layer):
    """How far what is maintained lies from what V and U say, relative."""
    weight = layer._dense()
    mean = weight.mean(0)
    gram = (weight - mean).T @ (weight - mean)
    eye = torch.eye(layer.U.shape[0], dtype=layer.U.dtype)
    return {
        "gram": ((layer.gram - gram).norm() / gram.norm()).item(),
        "mean": ((layer.mean - mean).norm() / weight.norm(dim=1).mean()).item(),
        "inverse": (layer.U @ layer.U_inverse - eye).norm().item(),
    }


@members
@pytest.mark.parametrize("labels", [1, 4])
def test_a_thousand_steps_are_those_of_dense_sgd(member, dense, lr, labels):
    """Batches of other sizes than the last, decay, clipping, accumulation, a new rate each step."""
    layer, linear = pair(300, 12, bias=labels > 1, loss=member)
    sgd = torch.optim.SGD(linear.parameters(), lr=lr)
    random = torch.Generator().manual_seed(1)
    clipped = 0
    for step in range(1000):
        for part in range(2 if step % 10 == 9 else 1):
            rows = int(torch.randint(1, 31, (), generator=random))  # on both sides of the width
            hidden, target = batch(random, rows, 12, 300, labels)
            of_layer, of_linear = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
            share = 0.5 if part else 1.0
            loss = share * layer(of_layer, target)
            exact = share * dense(linear(of_linear), target)
            assert_close(loss, exact, rtol=1e-9, atol=1e-12)
            loss.backward()
            exact.backward()
            scale = float(of_linear.grad.abs().max())
            assert_close(of_layer.grad, of_linear.grad, rtol=1e-9, atol=1e-9 * scale)
        max_norm, decay = (0.3 if step % 3 == 0 else None), (1e-2 if step % 2 else 0.0)
        norm = nn.utils.get_total_norm([p.grad for p in linear.parameters()])
        assert_close(layer.grad_norm(), norm.item(), rtol=1e-9, atol=1e-12)
        if max_norm is not None:
            clipped += norm.item() > max_norm
            nn.utils.clip_grad_norm_(linear.parameters(), max_norm)
        sgd.param_groups[0].update(lr=lr * (0.2 + 0.8 * (step % 7) / 7), weight_decay=decay)
        sgd.step()
        sgd.zero_grad()
        layer.step(sgd.param_groups[0]["lr"], weight_decay=decay, max_norm=max_norm)
    assert clipped > 10
    assert weight_error(layer, linear) < 1e-9
    assert all(error < 1e-9 for error in invariants(layer).values()), invariants(layer)


@given(
    classes=st.integers(1, 40),
    width=st.integers(1, 9),
    rows=st.integers(1, 12),
    labels=st.integers(1, 3),
    bias=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    member=st.sampled_from(sorted(MEMBERS)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_two_steps_at_any_size(classes, width, rows, labels, bias, reduction, member, seed):
    loss, dense, lr = MEMBERS[member]
    layer, linear = pair(classes, width, bias=bias, seed=seed, loss=loss)
    sgd = torch.optim.SGD(linear.parameters(), lr=lr / 10)
    random = torch.Generator().manual_seed(seed)
    for _ in range(2):
        hidden, target = batch(random, rows, width, classes, labels)
        weights = torch.rand(rows, generator=random, dtype=F64)
        ours = layer(hidden, target, reduction=reduction)
        exact = dense(linear(hidden), target, reduction=reduction)
        assert ours.shape == exact.shape
        assert_close(ours, exact, rtol=1e-9, atol=1e-10)
        if reduction == "none":
            ours, exact = (weights * ours).sum(), (weights * exact).sum()
        if exact.isfinite() and exact.requires_grad:
            ours.backward()
            exact.backward()
            sgd.step()
            sgd.zero_grad()
            layer.step(lr / 10)
    assert weight_error(layer, linear) < 1e-8


@members
def test_hidden_gradient_is_that_of_finite_differences(member, dense, lr):
    layer, _ = pair(30, 4, loss=member)
    hidden = normal(2, 3, 4, seed=3).requires_grad_()
    target = torch.randint(30, (2, 3, 2))
    assert torch.autograd.gradcheck(lambda h: layer(h, target, reduction="none"), hidden)


def test_the_z_score_moves_neither_the_mean_row_nor_along_the_weights():
    """The column sums of W stay, <h, dL/dh> = 0, and ||W||^2 grows by lr^2 ||g||^2."""
    layer, _ = pair(200, 10)
    before, mean = layer.weight.square().sum(), layer.weight.mean(0)
    hidden = normal(6, 10).requires_grad_()
    layer(hidden, torch.arange(6)).backward()
    assert (hidden.grad * hidden).sum(1).abs().max() < 1e-15
    norm = layer.grad_norm()
    layer.step(3.0)
    assert_close(layer.weight.square().sum(), before + 9 * norm**2, rtol=1e-12, atol=0)
    assert_close(layer.weight.mean(0), mean, rtol=0, atol=1e-14)


def test_any_loss_of_the_moments_will_do():
    class Margin:
        def from_moments(self, mean, variance, chosen, classes):
            return (1 - (chosen - mean)).relu() + 0.1 * variance.sqrt()

    layer, linear = pair(50, 6, loss=Margin())
    hidden, target = normal(9, 6), torch.arange(9)
    layer(hidden, target).backward()
    logits = linear(hidden)
    variance, mean = torch.var_mean(logits, 1, correction=0, keepdim=True)
    chosen = logits.gather(1, target[:, None])
    Margin().from_moments(mean, variance, chosen, 50).mean().backward()
    layer.step(0.5)
    assert_close(layer.weight, linear.weight - 0.5 * linear.weight.grad, rtol=0, atol=1e-14)


def test_in_a_loop_of_a_network_of_ones_own():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 8), nn.ReLU()).double()
    twin = copy.deepcopy(body)
    layer, linear = pair(60, 8)
    assert list(layer.parameters()) == []
    ours = torch.optim.Adam(body.parameters(), lr=1e-2)
    exact = torch.optim.Adam(twin.parameters(), lr=1e-2)
    sgd = torch.optim.SGD(linear.parameters(), lr=2.0)
    for step in range(50):
        x, target = normal(2, 4, 5, seed=step), torch.randint(20, (2, 4))
        ours.zero_grad()
        layer(body(x), target).backward()
        ours.step()
        layer.step(2.0)
        exact.zero_grad()
        sgd.zero_grad()
        z_score_loss(linear(twin(x)).movedim(-1, 1), target).backward()
        exact.step()
        sgd.step()
    assert weight_error(layer, linear) < 1e-9
    for p, q in zip(body.parameters(), twin.parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=1e-9)


def test_only_a_backward_pass_to_all_leaves_reaches_the_weights():
    """As for parameters: torch.autograd.grad accumulates nothing, a retained graph twice."""
    layer, linear = pair(20, 4)
    hidden, target = normal(3, 4).requires_grad_(), torch.tensor([0, 1, 2])
    before = layer.weight
    loss = layer(hidden, target)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="no loss of this layer went backward"):
        layer.step(1.0)
    loss.backward(inputs=[hidden], retain_graph=True)
    with pytest.raises(RuntimeError, match="no loss of this layer went backward"):
        layer.grad_norm()
    loss.backward(retain_graph=True)
    loss.backward()
    layer.step(0.5)
    z_score_loss(linear(hidden.detach()), target).backward()
    assert_close(layer.weight, before - linear.weight.grad, rtol=0, atol=1e-14)
    with pytest.raises(RuntimeError, match="no loss of this layer went backward"):
        layer.step(1.0)  # a second time
    with torch.no_grad():
        assert not layer(hidden, target).requires_grad


def test_hidden_vectors_need_no_gradient():
    layer, linear = pair(20, 4)
    hidden, target = normal(3, 4), torch.tensor([0, 1, 2])
    layer(hidden, target).backward()
    z_score_loss(linear(hidden), target).backward()
    layer.step(1.0)
    assert_close(layer.weight, linear.weight - linear.weight.grad, rtol=0, atol=1e-14)


def test_beneath_a_compiled_loss():
    layer, linear = pair(20, 4)
    hidden, target = normal(3, 4), torch.tensor([0, 1, 2])
    compiled = torch.compile(lambda h: layer(2 * h, target), backend="aot_eager")
    compiled(hidden).backward()
    z_score_loss(linear(2 * hidden), target).backward()
    layer.step(1.0)
    assert_close(layer.weight, linear.weight - linear.weight.grad, rtol=0, atol=1e-14)


def test_one_buffer_for_all_hidden_vectors():
    layer, linear = pair(20, 4)
    buffer, target = torch.empty(3, 4, dtype=F64), torch.tensor([0, 1, 2])
    for seed in (1, 2):
        buffer.copy_(normal(3, 4, seed=seed))
        layer(buffer, target).backward()
        z_score_loss(linear(buffer), target).backward()
    layer.step(1.0)
    assert_close(layer.weight, linear.weight - linear.weight.grad, rtol=0, atol=1e-14)


def test_weights_that_changed_in_between():
    layer, _ = pair(20, 4)
    hidden, target = normal(3, 4), torch.tensor([0, 1, 2])
    early = layer(hidden, target)
    layer(hidden, target).backward()
    layer.step(1.0)
    with pytest.raises(RuntimeError, match="between the loss and its backward pass"):
        early.backward()
    layer(hidden, target).backward()
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="loaded or moved"):
        layer.step(1.0)
    layer.zero_grad()
    with pytest.raises(RuntimeError, match="no loss of this layer"):
        layer.step(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    layer, _ = pair(20, 4)
    before = copy.deepcopy(layer.state_dict())
    hidden, target = normal(3, 4), torch.tensor([0, 1, 2])
    (value * layer(hidden, target)).backward()
    with pytest.raises(RuntimeError, match="nothing was changed"):
        layer.step(1.0)
    for name, part in layer.state_dict().items():
        assert part.equal(before[name])


def test_rows_without_a_label_do_not_matter():
    layer, linear = pair(20, 4)
    hidden, target = normal(4, 4), torch.tensor([3, -100, 5, -100])
    hidden[1] = math.nan
    hidden.requires_grad_()
    each = layer(hidden, target, reduction="none")
    assert each[[1, 3]].eq(0).all()
    loss = layer(hidden, target)
    kept = hidden.detach()[[0, 2]]
    exact = z_score_loss(linear(kept), target[[0, 2]])
    assert_close(loss, exact)
    assert_close(layer(hidden, target.where(target > 0, 7), ignore_index=7), exact)
    loss.backward()
    exact.backward()
    assert hidden.grad[[1, 3]].eq(0).all()
    layer.step(1.0)
    assert_close(layer.weight, linear.weight - linear.weight.grad, rtol=0, atol=1e-14)


def test_a_batch_of_nothing():
    layer, _ = pair(20, 4)
    assert layer(normal(0, 4), torch.zeros(0, dtype=torch.int64)).isnan()
    before = layer.weight
    layer(normal(2, 4), torch.full((2,), -100), reduction="sum").backward()
    assert layer.grad_norm() == 0
    layer.step(1.0, weight_decay=0.1)
    assert_close(layer.weight, 0.9 * before, rtol=1e-14, atol=0)


def train(layer, steps, lr, seed=0, rows=8):
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        hidden, target = batch(random, rows, layer.in_features, layer.out_features, 1)
        layer(hidden.to(layer.V.dtype), target).backward()
        layer.step(lr, weight_decay=1e-3)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_state_goes_on_bit_for_bit(dtype):
    layer, _ = pair(100, 6, dtype=dtype, loss=SquaredErrorLoss())
    train(layer, 150, 0.05)  # through inversions, and in float32 through repairs
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = FactoredLinear(6, 100, loss=SquaredErrorLoss(), dtype=dtype)
    other.load_state_dict(torch.load(file))
    twin = copy.deepcopy(layer)
    for each in (layer, other, twin):
        train(each, 150, 0.05, seed=1)
    for name, part in layer.state_dict().items():
        assert part.equal(other.state_dict()[name]), name
        assert part.equal(twin.state_dict()[name]), name


def test_a_copy_takes_its_own_gradient_along():
    layer, _ = pair(20, 4)
    hidden = 2 * normal(3, 4).requires_grad_()  # no leaf
    layer(hidden, torch.tensor([0, 1, 2])).backward()
    twin = copy.deepcopy(layer)
    layer.step(1.0)
    twin.step(1.0)
    assert twin.weight.equal(layer.weight)


class Repairs:
    """Counts them."""

    def __init__(self, monkeypatch):
        self.count, repair = 0, FactoredLinear._repair

        def counted(layer):
            self.count += 1
            repair(layer)

        monkeypatch.setattr(FactoredLinear, "_repair", counted)


def test_squared_error_ruins_u_unless_it_is_repaired(monkeypatch):
    repairs = Repairs(monkeypatch)
    held, _ = pair(300, 12, dtype=F32, loss=SquaredErrorLoss())
    left, _ = pair(300, 12, dtype=F32, loss=SquaredErrorLoss(), condition_limit=math.inf)
    twin, _ = pair(300, 12, dtype=F64, loss=SquaredErrorLoss())
    for layer in (held, twin):
        train(layer, 1000, 0.05)
    assert repairs.count > 10
    assert_close(held.weight.double(), twin.weight, rtol=0, atol=3e-6)
    assert all(error < 1e-5 for error in invariants(held).values()), invariants(held)
    try:
        train(left, 1000, 0.05)
    except (RuntimeError, torch.linalg.LinAlgError):
        return  # it did not even stay finite
    assert (left.weight.double() - twin.weight).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("member", "lr"), [(ZScoreLoss(), 1.0), (SquaredErrorLoss(), 0.02)])
def test_float32_holds_for_a_hundred_thousand_steps(member, lr):
    layer, _ = pair(200, 8, dtype=F32, loss=member)
    twin, _ = pair(200, 8, dtype=F64, loss=member)
    for each in (layer, twin):
        train(each, 100_000, lr)
    error = (layer.weight.double() - twin.weight).norm() / twin.weight.norm()
    assert error < 2e-5
    assert all(error < 1e-4 for error in invariants(layer).values()), invariants(layer)


def test_a_repair_changes_no_weight():
    values = torch.linspace(0.6, 1.5, 9, dtype=F64)
    values[0], values[5] = 1e-3, 40.0  # two bad ones: moved by themselves
    many = values.clone().index_fill_(0, torch.tensor([1, 2, 3]), 1e-5)  # V is multiplied out
    left, right = (torch.linalg.qr(normal(9, 9, seed=s))[0] for s in (1, 2))
    for bad in (values, many, 1e-9 * values):
        layer, _ = pair(50, 9)
        layer.U.copy_(left @ bad.diag() @ right)
        layer.mean.zero_()  # beside which the smallest of these weights could not be told
        layer.refresh()
        before = layer.weight
        layer._repair()
        assert_close(layer.weight, before, rtol=0, atol=1e-14 * float(before.abs().max()))
        repaired = torch.linalg.svdvals(layer.U)
        assert repaired.max() / repaired.min() < 4
        assert repaired.min() > 2.0**-22
        assert all(error < 1e-13 for error in invariants(layer).values())


@pytest.mark.parametrize("rows", [1, 6])
def test_a_step_that_makes_u_singular(rows):
    """lr scale |h|^2 = 1: W loses a direction, which no W = V U with a U^-1 could do."""
    layer, linear = pair(40, 5, loss=SquaredErrorLoss())
    hidden = torch.zeros(rows, 5, dtype=F64)
    hidden[0, 2] = 1.0
    target = torch.arange(rows)
    for module, loss in ((layer, SquaredErrorLoss()), (linear, None)):
        out = module(hidden, target, reduction="sum") if loss else None
        (out if loss else squared_error_loss(module(hidden), target, reduction="sum")).backward()
    layer.step(0.5)  # 2 lr |h|^2 = 1
    exact = linear.weight - 0.5 * linear.weight.grad
    assert exact[rows + 1 :, 2].abs().max() < 1e-15
    assert_close(layer.weight, exact, rtol=0, atol=1e-13)
    assert all(error < 1e-13 for error in invariants(layer).values()), invariants(layer)


def test_decay_of_many_steps_does_not_carry_u_away():
    layer, _ = pair(30, 4)
    before = layer.weight
    none = torch.full((1,), -100)
    for _ in range(400):  # 0.9^400 = 5e-19
        layer(normal(1, 4), none, reduction="sum").backward()
        layer.step(1.0, weight_decay=0.1)
    assert 2.0**-30 < layer.U.norm() < 2.0**30
    assert_close(layer.weight, 0.9**400 * before, rtol=1e-10, atol=0)


@given(
    classes=st.integers(1, 60),
    rows=st.integers(0, 5),
    data=st.data(),
    dtype=st.sampled_from([F32, F64]),
)
@settings(max_examples=40, deadline=None)
def test_topk_is_the_dense_topk(classes, rows, data, dtype):
    layer, _ = pair(classes, 5, dtype=dtype, seed=data.draw(st.integers(0, 9)))
    k = data.draw(st.integers(1, classes))
    hidden = normal(rows, 5, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spherical, "BLOCK_BYTES", data.draw(st.sampled_from([8, 100, 2**24])))
        patch.setattr(spherical, "MOST_ROWS", data.draw(st.sampled_from([2, 1024])))
        got = layer.topk(hidden, k)
    dense = layer.logits(hidden)
    assert_close(got.values, dense.topk(k).values)
    assert_close(dense.gather(1, got.indices), got.values)
    assert all(len(set(row)) == k for row in got.indices.tolist())


def test_topk_with_ties_and_other_shapes():
    linear = nn.Linear(2, 9, bias=False, dtype=F64)
    linear.weight.detach().copy_(torch.tensor([[0.0, 1, 1, 1, 2, 1, 0, 2, -1]]).T.expand(9, 2))
    layer = FactoredLinear.from_linear(linear)
    top = layer.topk(torch.ones(3, 1, 2, dtype=F64), 4)
    assert top.values.shape == top.indices.shape == (3, 1, 4)
    assert_close(top.values, torch.tensor([4.0, 4, 2, 2], dtype=F64).expand(3, 1, 4))
    for row in top.indices.flatten(0, 1).tolist():
        assert set(row[:2]) == {4, 7}
        assert set(row[2:]) <= {1, 2, 3, 5}
    assert layer.topk(torch.ones(2, dtype=F64), 2).values.shape == (2,)


@pytest.mark.parametrize("bias", [False, True])
def test_to_and_from_a_linear_layer(bias):
    layer, _ = pair(30, 4, bias=bias)
    train(layer, 100, 0.5)
    there = layer.to_linear()
    assert there.weight.is_leaf
    assert there.weight.requires_grad
    hidden = normal(3, 2, 4)
    assert_close(there(hidden), layer.logits(hidden))
    back = FactoredLinear.from_linear(there)
    assert_close(back.weight, layer.weight, rtol=0, atol=1e-14)
    assert (back.bias is None) == (not bias)
    if bias:
        assert_close(back.bias, layer.bias, rtol=0, atol=1e-14)
    assert all(error < 1e-13 for error in invariants(back).values())


def test_begins_as_torch_does():
    torch.manual_seed(5)
    linear = nn.Linear(7, 40, bias=False)
    torch.manual_seed(5)
    assert_close(FactoredLinear(7, 40).weight, linear.weight.detach())


def test_dtypes():
    layer, _ = pair(30, 4, dtype=F32)
    hidden, target = normal(5, 4, dtype=F32), torch.arange(5)
    exact = layer(hidden, target)
    assert_close(layer.double()(hidden.double(), target), exact.double(), rtol=1e-6, atol=0)
    assert layer.age.dtype == torch.int64
    layer.float()
    rough = hidden.to(BF16).requires_grad_()
    loss = layer(rough, target)
    assert loss.dtype == F32
    loss.backward()
    assert rough.grad.dtype == BF16
    with torch.autocast("cpu", dtype=BF16):
        assert_close(layer(rough, target), loss, rtol=0, atol=0)
        layer.step(1.0)
    with pytest.raises(ValueError, match="converted to torch"):
        layer.bfloat16()(rough, target)


def test_a_large_common_row_costs_no_digits():
    """With q/C - mean^2 the variance of these logits would be negative in float32."""
    linear = nn.Linear(8, 500, bias=False)
    with torch.no_grad():
        linear.weight.add_(1000.0 / 8)
    layer = FactoredLinear.from_linear(linear)
    hidden, target = normal(6, 8, dtype=F32), torch.arange(6)
    exact = z_score_loss(hidden.double() @ linear.weight.double().T, target, reduction="none")
    got = layer(hidden, target, reduction="none")
    assert_close(got.double(), exact, rtol=1e-4, atol=0)


def test_refresh_makes_anew_what_is_kept():
    layer, _ = pair(40, 5)
    train(layer, 30, 0.5)
    kept = {name: part.clone() for name, part in layer.state_dict().items()}
    for part in (layer.gram, layer.U_inverse):
        part.mul_(1.1)
    layer.refresh()
    for name in ("gram", "U_inverse", "offset", "mean"):
        assert_close(layer.state_dict()[name], kept[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda f, h, t: FactoredLinear(0, 5), ValueError, "at least 1"),
        (lambda f, h, t: FactoredLinear(3, 5, dtype=BF16), ValueError, "float32 and float64"),
        (lambda f, h, t: FactoredLinear(3, 5, condition_limit=1.0), ValueError, "can have 4"),
        (lambda f, h, t: f(h[:, :3], t), ValueError, r"\(..., 4\) would be right"),
        (lambda f, h, t: f(h, t[:2]), ValueError, r"\(3,\) would be right, or \(3, K\)"),
        (lambda f, h, t: f(h[0], t[:, None]), ValueError, r"\(\) would be right, or \(K,\)"),
        (lambda f, h, t: f(h, t[:, None, None]), ValueError, "would be right"),
        (lambda f, h, t: f(h.float(), t), ValueError, "must agree"),
        (lambda f, h, t: f(h, t.int()), ValueError, "int64"),
        (lambda f, h, t: f(h, t + 18), IndexError, "20 is out of bounds for 20"),
        (lambda f, h, t: f(h, t - 1), IndexError, "-1 is out of bounds"),
        (lambda f, h, t: f(h, t, reduction="all"), ValueError, "none of"),
        (lambda f, h, t: f.topk(h, 21), ValueError, "1 to 20"),
        (lambda f, h, t: f.topk(h, 0), ValueError, "1 to 20"),
        (lambda f, h, t: f.step(-1.0), ValueError, "at least"),
        (lambda f, h, t: f.step(1.0, weight_decay=1.0), ValueError, "below 1"),
        (lambda f, h, t: f.step(1.0, max_norm=0.0), ValueError, "above 0"),
    ],
)
def test_errors(call, error, words):
    layer, _ = pair(20, 4)
    with pytest.raises(error, match=words):
        call(layer, normal(3, 4), torch.tensor([0, 1, 2]))
