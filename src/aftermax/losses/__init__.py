"""Losses over classes, over labels of which several are right, and a layer with its own step."""

from aftermax.losses.cross_entropy import cross_entropy
from aftermax.losses.decoupled import (
    coupled_softmax_loss,
    decoupled_softmax_loss,
    one_vs_all_loss,
)
from aftermax.losses.label_pool import cached_backward
from aftermax.losses.linear_cross_entropy import linear_cross_entropy
from aftermax.losses.positives import in_batch_masks, label_pool
from aftermax.losses.sharded import (
    gather_embeddings,
    gather_ids,
    global_mean,
    sharded_decoupled_softmax_loss,
    sharded_soft_topk_loss,
)
from aftermax.losses.softtopk import log_soft_topk, soft_topk, soft_topk_loss
from aftermax.losses.spherical import FactoredLinear
from aftermax.losses.zloss import (
    LogSphericalLoss,
    LogTaylorLoss,
    SphericalLoss,
    SquaredErrorLoss,
    ZScoreLoss,
    log_spherical_softmax_loss,
    log_taylor_softmax_loss,
    squared_error_loss,
    z_score_loss,
)

__all__ = [
    "FactoredLinear",
    "LogSphericalLoss",
    "LogTaylorLoss",
    "SphericalLoss",
    "SquaredErrorLoss",
    "ZScoreLoss",
    "cached_backward",
    "coupled_softmax_loss",
    "cross_entropy",
    "decoupled_softmax_loss",
    "gather_embeddings",
    "gather_ids",
    "global_mean",
    "in_batch_masks",
    "label_pool",
    "linear_cross_entropy",
    "log_soft_topk",
    "log_spherical_softmax_loss",
    "log_taylor_softmax_loss",
    "one_vs_all_loss",
    "sharded_decoupled_softmax_loss",
    "sharded_soft_topk_loss",
    "soft_topk",
    "soft_topk_loss",
    "squared_error_loss",
    "z_score_loss",
]
