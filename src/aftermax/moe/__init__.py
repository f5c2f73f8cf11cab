"""Edge-MoE: experts gated by task; fixed-point numbers, softmax in one pass, GELU as a table."""

from aftermax.moe.experts import Experts, Queues, dispatch, expert_layer
from aftermax.moe.fixed_layers import (
    Tally,
    fixed_add,
    fixed_attention,
    fixed_experts,
    fixed_gate,
    fixed_layer_norm,
    fixed_linear,
    fixed_patches,
    fixed_rms_norm,
)
from aftermax.moe.fixedpoint import (
    ACTIVATION,
    Fixed,
    SinglePass,
    multiply,
    recast,
    single_pass_softmax,
)
from aftermax.moe.gelu import fixed_gelu, gelu_delta, gelu_error, gelu_table, table_gelu
from aftermax.moe.routing import (
    Routing,
    TaskRouter,
    importance_loss,
    load,
    load_balance,
    load_loss,
    router_z_loss,
)

__all__ = [
    "ACTIVATION",
    "Experts",
    "Fixed",
    "Queues",
    "Routing",
    "SinglePass",
    "Tally",
    "TaskRouter",
    "dispatch",
    "expert_layer",
    "fixed_add",
    "fixed_attention",
    "fixed_experts",
    "fixed_gate",
    "fixed_gelu",
    "fixed_layer_norm",
    "fixed_linear",
    "fixed_patches",
    "fixed_rms_norm",
    "gelu_delta",
    "gelu_error",
    "gelu_table",
    "importance_loss",
    "load",
    "load_balance",
    "load_loss",
    "multiply",
    "recast",
    "router_z_loss",
    "single_pass_softmax",
    "table_gelu",
]
