"""aftermax: softmax, and everything after it."""

# query, key, value -> out
from aftermax.attention import attention, attention_weights, explain

# one cache for all of them
from aftermax.cache import Cache, OfSystem

# what there is
from aftermax.catalogue import CATALOGUE, Entry, find

# the same with projections, positions and a cache
from aftermax.dense import Dense, KeyValues, System

# the same as h_i = Lambda_i h_{i-1} + B_i u_i, y_i = C_i h_i + D_i u_i
from aftermax.dynamics import DynamicalSystem, as_dynamical_system

# heads of several kinds in one layer
from aftermax.hybrid import MambaHeads, RecurFormer, RecurFormerAttention, SinkWindow

# the same with a state of one size, and the modules of its papers
from aftermax.linear import (
    CosFormer,
    Cottention,
    InLine,
    InLineAttention,
    Linear,
    LinearState,
    Normalised,
    NormalisedAttention,
    TransNormer,
    TransNormerBlock,
)

# logits -> loss; hidden -> loss
from aftermax.losses import (
    FactoredLinear,
    LogSphericalLoss,
    LogTaylorLoss,
    SquaredErrorLoss,
    ZScoreLoss,
    cached_backward,
    coupled_softmax_loss,
    cross_entropy,
    decoupled_softmax_loss,
    gather_embeddings,
    gather_ids,
    global_mean,
    in_batch_masks,
    label_pool,
    linear_cross_entropy,
    log_soft_topk,
    log_spherical_softmax_loss,
    log_taylor_softmax_loss,
    one_vs_all_loss,
    sharded_decoupled_softmax_loss,
    sharded_soft_topk_loss,
    soft_topk,
    soft_topk_loss,
    squared_error_loss,
    z_score_loss,
)

# through landmarks
from aftermax.lowrank import SOFT, SOFTAttention
from aftermax.modules import Attention, GatedAttention, auxiliary_loss
from aftermax.positions import ALiBi, NoPositions, RoPE

# over the codes of keys
from aftermax.quantised import CodeState, LongVQAttention, VectorQuantised

# over one dimension of anything
from aftermax.rows import log_softmax, logsumexp, softmax

# the keys that are worth it
from aftermax.sparse import SparseK, SparseKAttention, SparseKState, Threshold
from aftermax.sparse.operator import sparsek

# which release this is
from aftermax.version import __version__

# what a query may see
from aftermax.visible import Visible

# scores -> weights: what `weights=` takes
from aftermax.weights import (
    LSSA,
    LSSAR,
    ClippedSoftmax,
    CosineSoftmax,
    FixedOnePassSoftmax,
    LSSARLog,
    NormalisedClippedSoftmax,
    OnePassSoftmax,
    ReLA,
    ReLUPower,
    RowMap,
    ScaleInvariantSoftmax,
    Sigmoid,
    Softmax,
    SoftmaxOne,
    SoftmaxSink,
)

__all__ = [
    "CATALOGUE",
    "LSSA",
    "LSSAR",
    "SOFT",
    "ALiBi",
    "Attention",
    "Cache",
    "ClippedSoftmax",
    "CodeState",
    "CosFormer",
    "CosineSoftmax",
    "Cottention",
    "Dense",
    "DynamicalSystem",
    "Entry",
    "FactoredLinear",
    "FixedOnePassSoftmax",
    "GatedAttention",
    "InLine",
    "InLineAttention",
    "KeyValues",
    "LSSARLog",
    "Linear",
    "LinearState",
    "LogSphericalLoss",
    "LogTaylorLoss",
    "LongVQAttention",
    "MambaHeads",
    "NoPositions",
    "Normalised",
    "NormalisedAttention",
    "NormalisedClippedSoftmax",
    "OfSystem",
    "OnePassSoftmax",
    "ReLA",
    "ReLUPower",
    "RecurFormer",
    "RecurFormerAttention",
    "RoPE",
    "RowMap",
    "SOFTAttention",
    "ScaleInvariantSoftmax",
    "Sigmoid",
    "SinkWindow",
    "Softmax",
    "SoftmaxOne",
    "SoftmaxSink",
    "SparseK",
    "SparseKAttention",
    "SparseKState",
    "SquaredErrorLoss",
    "System",
    "Threshold",
    "TransNormer",
    "TransNormerBlock",
    "VectorQuantised",
    "Visible",
    "ZScoreLoss",
    "__version__",
    "as_dynamical_system",
    "attention",
    "attention_weights",
    "auxiliary_loss",
    "cached_backward",
    "coupled_softmax_loss",
    "cross_entropy",
    "decoupled_softmax_loss",
    "explain",
    "find",
    "gather_embeddings",
    "gather_ids",
    "global_mean",
    "in_batch_masks",
    "label_pool",
    "linear_cross_entropy",
    "log_soft_topk",
    "log_softmax",
    "log_spherical_softmax_loss",
    "log_taylor_softmax_loss",
    "logsumexp",
    "one_vs_all_loss",
    "sharded_decoupled_softmax_loss",
    "sharded_soft_topk_loss",
    "soft_topk",
    "soft_topk_loss",
    "softmax",
    "sparsek",
    "squared_error_loss",
    "z_score_loss",
]
