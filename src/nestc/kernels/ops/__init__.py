"""Rules of the generic lowering by topic; a rule defines an operator's outputs in a `compute.Body`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nestc.errors import UnsupportedOp
from nestc.graph.region import Op
from nestc.kernels.compute import Body
from nestc.kernels.elementwise import ELEMENTWISE
from nestc.kernels.ops import linear, loss, make, move, normal, reduction, roi, sample, scan, select, signal, window

Rule = Callable[[Body, Op], None]


def _elementwise_only(body: Body, op: Op) -> None:
    """For forms of elementwise operators that are not elementwise after all."""
    raise UnsupportedOp(f"{op.op_type} (node {op.name!r}) has no generated code in this form")


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise_only),
    **move.RULES,
    **make.RULES,
    **select.RULES,
    **reduction.RULES,
    **linear.RULES,
    **window.RULES,
    **normal.RULES,
    **scan.RULES,
    **loss.RULES,
    **roi.RULES,
    **sample.RULES,
    **signal.RULES,
}
"""Every operator of ONNX's own domain that the generic family knows."""
