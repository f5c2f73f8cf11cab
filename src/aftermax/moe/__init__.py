"""The arithmetic of Edge-MoE: fixed-point numbers, softmax in one pass, GELU as a table."""

from aftermax.moe.fixedpoint import (
    ACTIVATION,
    Fixed,
    SinglePass,
    multiply,
    recast,
    single_pass_softmax,
)
from aftermax.moe.gelu import fixed_gelu, gelu_delta, gelu_error, gelu_table, table_gelu

__all__ = [
    "ACTIVATION",
    "Fixed",
    "SinglePass",
    "fixed_gelu",
    "gelu_delta",
    "gelu_error",
    "gelu_table",
    "multiply",
    "recast",
    "single_pass_softmax",
    "table_gelu",
]
