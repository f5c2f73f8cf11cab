"""A unit as Verilog."""

from __future__ import annotations

from amaranth.back import verilog as backend
from amaranth.lib import wiring


def verilog(unit: wiring.Component, name: str) -> str:
    """Verilog of a unit, as a module `name` with `clk` and `rst`.

    Members of a stream are ports such as `scores__payload`, `scores__valid` and `scores__ready`.

    >>> from aftermax.hdl import TableGelu, verilog
    >>> "module table_gelu(" in verilog(TableGelu(), "table_gelu")
    True
    """
    return backend.convert(unit, name=name, emit_src=False, strip_internal_attrs=True)
