"""The compiled kernels as a part that may be missing, or told which body to run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aftermax import kernels, softmax
from aftermax.kernels import ops

from .native import needs_kernels


def python(code, **environment):
    """A fresh interpreter with these environment variables: its exit code, what it printed."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("AFTERMAX_")}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return run.returncode, run.stdout + run.stderr


def runs_here(name):
    before = kernels.isa()
    try:
        kernels.use_isa(name)
    except RuntimeError:
        return False
    kernels.use_isa(before)
    return True


# which body


@pytest.mark.parametrize("name", kernels.ISAS)
@needs_kernels
def test_the_environment_forces_a_body(name):
    code = """
import torch
from aftermax import kernels, softmax
print(kernels.isa(), softmax(torch.zeros(4), impl="cpu").tolist())
"""
    status, printed = python(code, AFTERMAX_ISA=name)
    if runs_here(name):
        assert (status, printed) == (0, f"{name} [0.25, 0.25, 0.25, 0.25]\n")
    else:
        assert status != 0
        assert f"RuntimeError: this processor (or this build) cannot run the {name}" in printed


@needs_kernels
def test_the_environment_cannot_ask_for_a_body_that_there_is_not():
    status, printed = python("import aftermax", AFTERMAX_ISA="sse9")
    assert status != 0
    assert "no kernels are called 'sse9'; there are avx512bf16, avx512, avx2, portable" in printed


@needs_kernels
def test_a_body_is_switched_to_by_its_name():
    before = kernels.isa()
    assert before in kernels.ISAS
    results = []
    x = torch.randn(3, 100)
    try:
        for name in filter(runs_here, kernels.ISAS):
            kernels.use_isa(name)
            assert kernels.isa() == name
            results.append(softmax(x, impl="cpu"))
    finally:
        kernels.use_isa(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=0)


@needs_kernels
def test_the_best_body_that_runs_is_the_default():
    best = next(filter(runs_here, kernels.ISAS))
    status, printed = python("from aftermax import kernels; print(kernels.isa())")
    assert (status, printed.strip()) == (0, best)


@needs_kernels
def test_the_portable_body_runs_everywhere():
    assert runs_here("portable")


@needs_kernels
def test_a_body_that_there_is_not_leaves_the_one_in_use():
    before = kernels.isa()
    for name in ("neon", "", "AVX2", "avx2 "):
        with pytest.raises(ValueError, match=f"no kernels are called '{name}'; there are avx512"):
            kernels.use_isa(name)
    assert kernels.isa() == before


# without a library


REFERENCE_ALONE = """
import pytest, torch
import aftermax
from aftermax import kernels

print(kernels.absent())
x, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
assert aftermax.explain(x, x, x) == f"reference: {kernels.absent()}"
assert torch.equal(aftermax.attention(x, x, x), aftermax.attention(x, x, x, impl="reference"))
leaf = x.clone().requires_grad_()
assert torch.equal(aftermax.softmax(x, 1), torch.softmax(x, 1))
assert torch.equal(aftermax.log_softmax(x, 1), torch.log_softmax(x, 1))
assert torch.equal(aftermax.logsumexp(x, 1), torch.logsumexp(x, 1))
aftermax.cross_entropy(leaf, target).backward()
aftermax.linear_cross_entropy(leaf, torch.randn(7, 5), target).backward()
out = torch.empty(3, 5)
assert aftermax.softmax(x, 1, out=out, impl="reference") is out
for call in (
    lambda: aftermax.softmax(x, 1, impl="cpu"),
    lambda: aftermax.log_softmax(x, 1, impl="cpu-two-pass"),
    lambda: aftermax.logsumexp(x, 1, impl="cpu"),
    lambda: aftermax.cross_entropy(x, target, impl="cpu"),
    lambda: aftermax.linear_cross_entropy(x, torch.randn(7, 5), target, impl="cpu"),
    lambda: aftermax.attention(x, x, x, impl="cpu"),
    kernels.isa,
    lambda: kernels.use_isa("portable"),
):
    with pytest.raises(RuntimeError) as refused:
        call()
    assert kernels.absent() in str(refused.value), refused.value
with pytest.raises(ValueError, match="no kernels are called"):
    kernels.use_isa("neon")
"""


def test_without_a_library_everything_runs_on_the_reference(tmp_path):
    nowhere = tmp_path / "libaftermax.so"
    status, printed = python(REFERENCE_ALONE, AFTERMAX_LIBRARY=str(nowhere))
    assert status == 0, printed
    assert printed.startswith(f"no library at {nowhere}; `pip install .` builds it")


def test_a_file_that_is_no_library_is_none(tmp_path):
    file = tmp_path / "libaftermax.so"
    file.write_text("not a library")
    status, printed = python(REFERENCE_ALONE, AFTERMAX_LIBRARY=str(file))
    assert status == 0, printed
    assert "libaftermax.so does not load" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="names a library as Linux does")
def test_a_library_of_others_is_none():
    other = Path(torch.__file__).parent / "lib" / "libc10.so"
    status, printed = python(REFERENCE_ALONE, AFTERMAX_LIBRARY=str(other))
    assert status == 0, printed
    assert "the reference runs without" in printed


def test_a_body_that_is_forced_needs_a_library(tmp_path):
    status, printed = python(
        "import aftermax", AFTERMAX_ISA="portable", AFTERMAX_LIBRARY=str(tmp_path / "none.so")
    )
    assert status != 0
    assert "RuntimeError: there are no compiled kernels here: no library at" in printed


# the operators


@needs_kernels
def test_every_operator_of_the_table_has_a_kernel_for_the_cpu():
    for name in ops.TABLE:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aftermax::{name}", "CPU")


@needs_kernels
def test_an_operator_refuses_what_the_calls_never_pass():
    x = torch.randn(3, 5)
    call = torch.ops.aftermax
    target, none = torch.tensor([0, 1, 2]), torch.empty(0)
    with pytest.raises(RuntimeError, match="dim is out of range"):
        call.softmax(x, 2, False, 0, 0, 0)
    with pytest.raises(RuntimeError, match="no such algorithm"):
        call.softmax(x, 1, False, 0, 9, 0)
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16"):
        call.softmax(x.double(), 1, False, 0, 0, 0)
    with pytest.raises(RuntimeError, match="differ in shape"):
        call.softmax_out(x, torch.empty(3, 4), 1, False, 0, 0, 0)
    with pytest.raises(RuntimeError, match="out has another dtype than the input"):
        call.softmax_out(x, torch.empty(3, 5).half(), 1, False, 0, 0, 0)
    with pytest.raises(RuntimeError, match="grad does not fit"):
        call.logsumexp_backward(torch.rand(4), x, torch.rand(3).double(), 1)
    with pytest.raises(RuntimeError, match="lse does not fit"):
        call.logsumexp_backward(torch.rand(3), x, torch.rand(3), 1)
    with pytest.raises(RuntimeError, match="target must be contiguous int64"):
        call.cross_entropy(x, target[:2], none, 1, -100, 0.0, 0.0, 0)
    with pytest.raises(RuntimeError, match="weight must be contiguous float32"):
        call.cross_entropy(x, target, torch.rand(4), 1, -100, 0.0, 0.0, 0)


MANY_DIMS = """
import torch
from aftermax import log_softmax, logsumexp, softmax

for dims in (62, 64, 65, 80):
    x = torch.randn(*[1] * (dims - 2), 3, 5)
    for function, truth in (
        (softmax, torch.softmax), (log_softmax, torch.log_softmax), (logsumexp, torch.logsumexp)
    ):
        for dim in (-1, -2):
            try:
                got = function(x, dim)
            except RuntimeError:
                assert dims > 64  # most of torch stops there
            else:
                torch.testing.assert_close(got.squeeze(), truth(x.squeeze(), dim))
print("right")
"""


@needs_kernels
def test_any_number_of_dimensions_is_taken_or_refused():
    # in a process of its own: what is written beyond its place need not end in an error
    assert python(MANY_DIMS) == (0, "right\n")
