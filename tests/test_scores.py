"""Scores: what is compared."""

import torch

from aftermax.scores import cosine


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
