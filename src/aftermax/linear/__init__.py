"""Separable weights: a feature map and a walk; the state is a value."""

from aftermax.linear.cosformer import CosFormer
from aftermax.linear.cottention import Cottention
from aftermax.linear.elu import Linear
from aftermax.linear.inline import InLine, InLineAttention
from aftermax.linear.normalised import Normalised, NormalisedAttention
from aftermax.linear.separable import LinearState, Separable
from aftermax.linear.transnormer import TransNormer, TransNormerBlock
from aftermax.linear.walk import Walked, both_ways, walk

__all__ = [
    "CosFormer",
    "Cottention",
    "InLine",
    "InLineAttention",
    "Linear",
    "LinearState",
    "Normalised",
    "NormalisedAttention",
    "Separable",
    "TransNormer",
    "TransNormerBlock",
    "Walked",
    "both_ways",
    "walk",
]
