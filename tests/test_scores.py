"""Scores: what is compared."""

import torch

from aftermax.scores import cosine, gaussian


def test_a_vector_without_direction_stays_zero_and_has_a_small_gradient():
    vectors = torch.zeros(2, 4, requires_grad=True)
    directed = cosine(vectors)
    directed.sum().backward()
    assert torch.equal(directed, torch.zeros(2, 4))
    assert torch.equal(vectors.grad, torch.ones(2, 4))


def test_other_vectors_have_length_one_whatever_their_size():
    vectors = torch.randn(5, 8, dtype=torch.float64) * 10.0 ** torch.arange(-10, 15, 5)[:, None]
    length = cosine(vectors).norm(dim=-1)
    torch.testing.assert_close(length, torch.ones(5, dtype=torch.float64), atol=1e-14, rtol=0)


def test_the_gaussian_kernel_sees_differences_alone():
    x = torch.randn(9, 8, dtype=torch.float64)
    y = torch.randn(7, 8, dtype=torch.float64)
    expected = torch.exp(-0.35 * (x[:, None] - y).square().sum(-1))
    torch.testing.assert_close(gaussian(x, y, 0.7), expected, atol=1e-14, rtol=0)
    far = gaussian(x.float() + 1024, y.float() + 1024, 0.7)
    moved = gaussian((x.float() + 1024) - 1024, (y.float() + 1024) - 1024, 0.7)
    torch.testing.assert_close(far, moved, atol=1e-5, rtol=0)


def test_the_gaussian_kernel_has_its_derivatives_where_vectors_are_equal():
    # |x - y|^2 is then rounded to either side of 0
    x = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    y = x.detach()
    direction = torch.randn(50, 8, dtype=torch.float64)

    def second(kernel: torch.Tensor) -> torch.Tensor:
        (first,) = torch.autograd.grad(kernel.sum(), x, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), x)[0]

    kernel = gaussian(x, y, 0.5)
    assert kernel.max() <= 1
    exact = torch.exp(-0.25 * (x[:, None] - y).square().sum(-1))
    torch.testing.assert_close(second(kernel), second(exact), atol=1e-12, rtol=0)
