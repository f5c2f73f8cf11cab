"""torch.compile, torch.func, and what torch asks of operators."""

import pytest
import torch
from torch.testing import assert_close

from aftermax import cross_entropy, linear_cross_entropy, log_softmax, logsumexp, softmax
from aftermax.kernels import attention_ops, expert_ops, linear_ops, ops, selection_ops

from .native import needs_kernels
from .row_cases import normal

ELSEWHERE = {
    name
    for family in (attention_ops, expert_ops, linear_ops, selection_ops)
    for name in family.schemas()
}

# parts of torch that are imported at their first use warn of other parts of torch
ignores_what_torch_imports = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def _hidden_loss(x):
    weight = torch.linspace(-1, 1, 5 * x.shape[1]).reshape(5, -1)
    target = torch.arange(x.shape[0]) % 5
    return linear_cross_entropy(x, weight, target, label_smoothing=0.1)


COMPILED = {
    "softmax": lambda x: softmax(x, 1),
    "softmax, two-pass": lambda x: softmax(x, 0, impl="cpu-two-pass", empty="zero"),
    "log_softmax": lambda x: log_softmax(x, -1),
    "logsumexp": lambda x: logsumexp(x, 1),
    "logsumexp of all": lambda x: logsumexp(x, (0, 1), keepdim=True),
    "cross_entropy": lambda x: cross_entropy(x, torch.arange(x.shape[0]), lse_square_scale=1e-2),
    "cross_entropy, rows": lambda x: cross_entropy(x, torch.arange(x.shape[0]), reduction="none"),
    "linear_cross_entropy": _hidden_loss,
}


def compiles(function, **options):
    """The compiled function gives what the plain one gives, forward and backward."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, **options)
    for x in (normal(4, 9), normal(4, 9, seed=1)):
        plain, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, got = function(plain), compiled(traced)
        assert_close(got, expected, rtol=1e-6, atol=1e-6)
        assert not compiled(x).requires_grad
        assert_close(compiled(x), expected.detach(), rtol=1e-6, atol=1e-6)
        g = normal(*expected.shape, seed=2)
        expected.backward(g)
        got.backward(g)
        assert_close(traced.grad, plain.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", COMPILED)
@needs_kernels
def test_torch_compile_takes_the_calls_whole(name):
    compiles(COMPILED[name], backend="aot_eager")


@needs_kernels
def test_torch_compile_takes_sizes_that_change():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: softmax(x, 1) * logsumexp(x, 0), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for shape in ((4, 9), (5, 7), (3, 100)):
        x = normal(*shape)
        assert_close(compiled(x), softmax(x, 1) * logsumexp(x, 0))


@needs_kernels
def test_torch_compile_takes_out():
    def call(x, out):
        softmax(x, 1, out=out)
        return out + 1

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x, out = normal(4, 9), torch.empty(4, 9)
    assert_close(compiled(x, out), softmax(x, 1) + 1)
    assert_close(out, softmax(x, 1))


@pytest.mark.parametrize("name", COMPILED)
@ignores_what_torch_imports
def test_torch_func_and_forward_mode_differentiate_the_calls(name):
    # the kernels know neither, so these run on the reference
    if "two-pass" in name:
        pytest.skip("an algorithm of the kernels")
    function = COMPILED[name]
    x, v = normal(4, 9), normal(4, 9, seed=1)
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)

    close = {"rtol": 1e-5, "atol": 1e-5}
    assert_close(torch.func.grad(lambda x: function(x).sum())(x), gradient, **close)
    both = torch.func.vmap(function)(torch.stack([x, v]))
    assert_close(both, torch.stack([value.detach(), function(v)]), **close)
    assert_close(torch.func.jacrev(function)(x), torch.func.jacfwd(function)(x), **close)
    _, tangent = torch.func.jvp(function, (x,), (v,))
    assert_close(tangent.sum(), (gradient * v).sum(), **close)
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(x, v))
        assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent, **close)


@pytest.mark.slow
@ignores_what_torch_imports
@pytest.mark.parametrize("name", COMPILED)
@needs_kernels
def test_the_default_compiler_takes_the_calls_whole(name):
    # its cache on disk knows an operator by its name, and not what that gave when it was filled
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        compiles(COMPILED[name])


def shift_and_rest(lse):
    """A logsumexp as the backward operators take it: in two parts, of which the first may be 0."""
    return torch.stack([torch.zeros_like(lse), lse], 1)


def operator_samples():
    x, y = normal(3, 5), softmax(normal(3, 5), 1)
    leaf, across = normal(3, 5).requires_grad_(), normal(5, 3).T.requires_grad_()
    target, weight, none = torch.tensor([0, 4, -100]), torch.rand(5), torch.empty(0)
    bias = torch.rand(5).requires_grad_()
    hidden, matrix = normal(3, 2).requires_grad_(), normal(5, 2).requires_grad_()
    plain = (hidden.detach(), matrix.detach(), bias.detach(), target, weight)
    lse = shift_and_rest(x.double().logsumexp(1))
    mean, rows = (-100, 0.1, 1e-3, 0), (-100, 0.0, 0.0, 2)
    linear_lse = shift_and_rest((plain[0] @ plain[1].T + plain[2]).double().logsumexp(1))
    return {
        "softmax": [(leaf, 1, False, 0, 0, 0), (across, 0, True, 1, 3, 1), (x, -1, False, 0, 0, 0)],
        "softmax_forward": [(x, 1, False, 0, 0, 0), (x.T, 1, True, 0, 2, 2)],
        "softmax_out": [
            (x, torch.empty(3, 5), 1, False, 0, 0, 0),
            (x, torch.empty(5, 3).T, 0, True, 0, 4, 0),
        ],
        "softmax_backward": [(x, y, 1, False), (x.T, y.T, 0, True)],
        "logsumexp": [(leaf, 1), (across, -2), (x, 0), (torch.tensor(1.0), 0)],
        "logsumexp_backward": [(torch.rand(3), x, lse, 1)],
        "cross_entropy": [
            (leaf, target, weight, 1, *mean),
            (across, torch.arange(3), none, 1, *rows),
            (x, target, none, 1, *mean),
        ],
        "cross_entropy_backward": [
            (torch.tensor(1.0), x, target, weight, lse, 1, *mean),
            (torch.rand(3), x, target, none, lse, 1, *rows),
        ],
        "cross_entropy_inplace": [(x, target, weight, 1, *mean)],
        "cross_entropy_backward_": [
            (torch.tensor(1.0), x.clone(), target, weight, lse, 1, *mean),
            (torch.rand(3), x.T.contiguous().T, target, none, lse, 1, *rows),
        ],
        "linear_cross_entropy": [
            (hidden, matrix, bias, target, weight, *mean),
            (hidden, matrix, none, target, none, *rows),
            (*plain, *mean),
        ],
        "linear_cross_entropy_backward": [
            (torch.tensor(1.0), *plain, linear_lse, *mean, True, True, True),
            (torch.rand(3), *plain, linear_lse, *rows, False, True, False),
        ],
        "linear_cross_entropy_gradients": [
            (*plain, *mean, True, True, True),
            (*plain, *mean, True, False, False),
        ],
    }


# those of attention, of experts, of the linear walk and of selection are checked in
# test_attention_operators.py, test_moe_kernels.py, test_linear_walk.py and test_sparsek.py
@pytest.mark.parametrize("name", [name for name in ops.TABLE if name not in ELSEWHERE])
@needs_kernels
def test_torch_finds_nothing_wrong_with_the_operator(name):
    samples = operator_samples()[name]
    for sample in samples:
        torch.library.opcheck(getattr(torch.ops.aftermax, name).default, sample)
