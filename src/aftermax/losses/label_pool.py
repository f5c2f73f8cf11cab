"""Gradients through more labels than memory holds activations for: gradient caching.

A loss of a batch against all labels needs the embeddings of all labels at once, but not their
activations. arXiv:2101.06983 (GradCache), as arXiv:2310.10636 uses it for label pools: encode in
chunks without a graph; take the loss and its gradient with respect to the embeddings; encode each
chunk again, with a graph, and send its share of that gradient back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

Encoder = Callable[[Any], Tensor]

Tower = Tensor | tuple[Encoder, Sequence[Any]]


def cached_backward(loss: Callable[..., Tensor], *towers: Tower) -> Tensor:
    """``loss(*embeddings)``, backpropagated to the parameters of all towers, a chunk at a time.

    The gradients are added to `.grad`, and are those of plain autograd over::

        loss(*(torch.cat([encode(chunk) for chunk in chunks]) for encode, chunks in towers))

    also with dropout: each chunk is encoded the second time with the random numbers of the first.

    Memory: all embeddings and their gradients, what `loss` keeps, and the activations of one chunk.
    Time: the encoder forward twice and backward once over each chunk, where plain autograd goes
    forward once; about a third more.

    Args:
        loss: from the embeddings, one tensor for each tower, to a scalar. Parameters that it uses
            itself (a learned temperature) get their gradient too.
        towers: each a pair (encode, chunks): `encode(chunk)` gives the embeddings of a chunk,
            (n, D), and `chunks` is a sequence that is walked twice. Or a tensor: embeddings that
            have a graph already, for a tower that is small enough (the queries of the batch).

    Returns:
        The loss, detached.

    Raises:
        ValueError: for a loss that is no scalar, no tower, or a tower without chunks.
        RuntimeError: where gradients are switched off, or an encoder gives another shape the second
            time.

    What must not happen between the two times: a change of the encoder. Modules that keep running
    statistics (BatchNorm) see every chunk twice, and chunk by chunk. Random numbers are those of
    torch, on the CPU and on the devices of the tensors in a chunk; others (numpy's) are not put
    back. Autocast holds for both passes where it is entered around the call; scaling a loss
    (GradScaler) belongs into `loss`.

    >>> from aftermax import decoupled_softmax_loss
    >>> encoder = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1))
    >>> queries, labels, target = torch.randn(2, 4), torch.randn(100, 4), torch.tensor([[3], [71]])
    >>> def loss(queries, labels):
    ...     return decoupled_softmax_loss(queries @ labels.T / 0.05, target)
    >>> value = cached_backward(loss, encoder(queries), (encoder, labels.split(25)))
    >>> encoder[0].weight.grad.shape
    torch.Size([8, 4])
    """
    if not towers:
        raise ValueError("cached_backward: no towers; embeddings or (encode, chunks) are right")
    if not torch.is_grad_enabled():
        raise RuntimeError("cached_backward within no_grad: it is there for the gradients")
    held = [_Kept(t) if isinstance(t, Tensor) else _Cached(*t) for t in towers]
    leaves = [tower.embeddings().detach().requires_grad_() for tower in held]
    value = loss(*leaves)
    if value.ndim:
        raise ValueError(
            f"cached_backward: the loss is of shape {tuple(value.shape)}; a scalar would be right"
        )
    value.backward()
    for tower, leaf in zip(held, leaves, strict=True):
        if leaf.grad is not None:
            tower.backward(leaf.grad)
    return value.detach()


class _Kept:
    """Embeddings with the graph that they came with, if any."""

    def __init__(self, embeddings: Tensor):
        self.given = embeddings

    def embeddings(self) -> Tensor:
        return self.given

    def backward(self, grad: Tensor) -> None:
        if self.given.requires_grad:
            self.given.backward(grad)


class _Cached:
    """A tower that is encoded twice."""

    def __init__(self, encode: Encoder, chunks: Sequence[Any]):
        if len(chunks) == 0:
            raise ValueError("cached_backward: a tower without chunks")
        self.encode, self.chunks = encode, chunks
        self.states: list[_RandomState] = []
        self.shapes: list[torch.Size] = []

    @torch.no_grad()
    def embeddings(self) -> Tensor:
        pieces = []
        for chunk in self.chunks:
            self.states.append(_RandomState(chunk))
            pieces.append(self.encode(chunk))
        self.shapes = [piece.shape for piece in pieces]
        return torch.cat(pieces)

    def backward(self, grad: Tensor) -> None:
        parts = grad.split([len(shape) and shape[0] for shape in self.shapes])
        for chunk, part, state in zip(self.chunks, parts, self.states, strict=True):
            with torch.random.fork_rng(devices=state.devices):  # what comes after goes on from here
                state.restore()
                piece = self.encode(chunk)
            if piece.shape != part.shape:
                raise RuntimeError(
                    f"cached_backward: a chunk of embeddings was {tuple(part.shape)} at first, and"
                    f" {tuple(piece.shape)} again"
                )
            if piece.requires_grad:
                piece.backward(part)


class _RandomState:
    """Where the generators of the CPU and of a chunk's devices stand."""

    def __init__(self, chunk: Any):
        self.cpu = torch.get_rng_state()
        self.devices, self.on_devices = get_device_states(chunk)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.on_devices)
