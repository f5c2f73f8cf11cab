"""Row maps: scores -> weights. One file for each paper: the pure function, its value object."""

from aftermax.weights.clipped import (
    ClippedSoftmax,
    NormalisedClippedSoftmax,
    clipped_softmax_weights,
)
from aftermax.weights.rela import ReLA, ReLUPower, relu_weights, rms_norm_heads
from aftermax.weights.row_map import RowMap
from aftermax.weights.sigmoid import Sigmoid, sigmoid_weights
from aftermax.weights.singlepass import (
    FixedOnePassSoftmax,
    OnePassSoftmax,
    fixed_one_pass_weights,
    one_pass_weights,
)
from aftermax.weights.softmax import (
    CosineSoftmax,
    ScaleInvariantSoftmax,
    Softmax,
    SoftmaxOne,
    SoftmaxSink,
    softmax_sink_weights,
    softmax_weights,
)
from aftermax.weights.softplus import LSSA, LSSAR, LSSARLog, lssa_weights, lssar_weights

__all__ = [
    "LSSA",
    "LSSAR",
    "ClippedSoftmax",
    "CosineSoftmax",
    "FixedOnePassSoftmax",
    "LSSARLog",
    "NormalisedClippedSoftmax",
    "OnePassSoftmax",
    "ReLA",
    "ReLUPower",
    "RowMap",
    "ScaleInvariantSoftmax",
    "Sigmoid",
    "Softmax",
    "SoftmaxOne",
    "SoftmaxSink",
    "clipped_softmax_weights",
    "fixed_one_pass_weights",
    "lssa_weights",
    "lssar_weights",
    "one_pass_weights",
    "relu_weights",
    "rms_norm_heads",
    "sigmoid_weights",
    "softmax_sink_weights",
    "softmax_weights",
]
