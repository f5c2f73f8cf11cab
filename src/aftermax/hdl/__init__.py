"""The softmax and the GELU of Edge-MoE as circuits, described in Amaranth.

Each equals the integers of `aftermax.moe` bit for bit. `verilog` writes one for any tool; what they
are, what they were compared with and how large they are: docs/hardware.md.
"""

try:
    import amaranth as _  # noqa: F401
except ImportError as error:  # the base install is the library alone
    raise ImportError(
        f"aftermax.hdl needs Amaranth: pip install 'aftermax[hdl]' ({error})"
    ) from None

from aftermax.hdl.emit import verilog
from aftermax.hdl.exponential import Exponential
from aftermax.hdl.gelu import NearestGelu, PolynomialGelu, TableGelu
from aftermax.hdl.reciprocal import Reciprocal
from aftermax.hdl.softmax import OnePassSoftmax, ThreePassSoftmax

__all__ = [
    "Exponential",
    "NearestGelu",
    "OnePassSoftmax",
    "PolynomialGelu",
    "Reciprocal",
    "TableGelu",
    "ThreePassSoftmax",
    "verilog",
]
