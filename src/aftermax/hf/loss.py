"""The output softmax of a Hugging Face decoder on our kernels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from aftermax.losses import cross_entropy


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy of the next token: `model.loss_function = causal_lm_loss`.

    The loss of transformers without its float32 copy of the logits: `aftermax.cross_entropy` reads
    them as they are and adds in float32.

    Args:
        logits: (B, T, vocabulary).
        labels: (B, T), the tokens themselves; each logit row is compared with the next one.
        num_items_in_batch: what the sum is divided by, as the Trainer gives it when it accumulates
            gradients; None = the mean over what counts.
        ignore_index: labels that count for nothing.
        shift_labels: (B, T), labels that are shifted already.

    Raises:
        ValueError: where there are no labels.

    >>> import torch
    >>> tokens = torch.tensor([[0, 1, 1]])
    >>> causal_lm_loss(torch.zeros(1, 3, 4), tokens)
    tensor(1.3863)
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("causal_lm_loss needs labels, or shift_labels")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows = logits.flatten(0, -2)
    target = shift_labels.to(logits.device).flatten()
    if num_items_in_batch is None:
        return cross_entropy(rows, target, ignore_index=ignore_index)
    total = cross_entropy(rows, target, ignore_index=ignore_index, reduction="sum")
    return total / num_items_in_batch
