"""Drop upper and lower bounds that rounding to integers keeps by itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from nestc.graph.model import Model
from nestc.graph.passes.rewrite import array, only_use, operand
from nestc.quant.scheme import RANGES

_NAMES = {ir.DataType.UINT8: "uint8", ir.DataType.INT8: "int8", ir.DataType.INT16: "int16"}


def drop_saturated(quantized: Model) -> int:
    """Remove each Min and Max with a constant, of one use, whose bounds lie outside what the QuantizeLinear behind it
    can hold, in place; how many. Results stay the same to the bit, since that saturates."""
    dropped = 0
    for node in list(quantized.ir.graph):
        if node.op_type != "QuantizeLinear" or node.domain:
            continue
        span = _span(node)
        while span is not None and (front := _bound(operand(node, 0))) is not None:
            limit = array(operand(front, 1))
            assert limit is not None
            outside = limit.min() >= span[1] if front.op_type == "Min" else limit.max() <= span[0]
            if not outside:
                break
            node.replace_input_with(0, front.inputs[0])
            quantized.ir.graph.remove(front, safe=True)
            dropped += 1
    if dropped:
        common.RemoveUnusedNodesPass()(quantized.ir)
    return dropped


def _span(node: ir.Node) -> tuple[float, float] | None:
    """The real numbers that the lowest and the highest integer stand for; None unless one scale serves the tensor."""
    scale, zero = array(operand(node, 1)), array(operand(node, 2))
    dtype = node.outputs[0].dtype
    if scale is None or scale.size != 1 or dtype is None or dtype not in _NAMES:
        return None
    low, high = RANGES[_NAMES[dtype]]
    point = 0 if zero is None else int(zero.reshape(-1)[0])
    step = float(scale.reshape(-1)[0])
    return (low - point) * step, (high - point) * step


def _bound(value: ir.Value | None) -> ir.Node | None:
    """The Min or Max with a constant of float32 on the right that computes a value nobody else uses."""
    node = None if value is None else value.producer()
    if node is None or value is None or node.domain or node.op_type not in ("Min", "Max") or len(node.inputs) != 2:
        return None
    constant = array(operand(node, 1))
    usable = constant is not None and constant.size > 0 and bool(np.isfinite(constant).all()) and only_use(value)
    same = node.inputs[0] is not None and node.inputs[0].shape == value.shape
    return node if usable and same else None
