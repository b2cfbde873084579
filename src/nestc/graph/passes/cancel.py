"""Merge neighbours that undo or repeat each other: transposes, views, casts, clamps."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nestc.graph.kinds import is_view
from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import Rewrite, ints, operand, producer, scalar

_EXACT = {
    ir.DataType.BOOL: 0,
    ir.DataType.UINT8: 8,
    ir.DataType.INT8: 8,
    ir.DataType.UINT16: 16,
    ir.DataType.INT16: 16,
    ir.DataType.INT32: 32,
    ir.DataType.INT64: 64,
}


class Cancel(Rewrite):
    """Two transposes become one or none, two views one or none, a cast that loses nothing is skipped, and Relu and
    Clip in a row become one Clip."""

    what = "pairs of operators merged or cancelled"

    def rewrite(self, node: ir.Node) -> bool:
        if node.op_type == "Transpose":
            return self.transposes(node)
        if is_view(node):
            return self.views(node)
        if node.op_type == "Cast":
            return self.casts(node)
        if node.op_type in {"Relu", "Clip"}:
            return self.clamps(node)
        return False

    def transposes(self, node: ir.Node) -> bool:
        before = producer(node.inputs[0], "Transpose")
        if before is None or before.inputs[0] is None or node.outputs[0].shape is None:
            return False
        rank = len(node.outputs[0].shape)
        first, second = (ints(item, "perm", range(rank)[::-1]) for item in (before, node))
        order = [first[axis] for axis in second]
        if order == list(range(rank)):
            self.replace(node.outputs[0], before.inputs[0])
        else:
            merged = self.insert(node, "Transpose", [before.inputs[0]], {"perm": order}, like=node.outputs[0])
            self.replace(node.outputs[0], merged)
        return True

    def views(self, node: ir.Node) -> bool:
        data = node.inputs[0]
        before = None if data is None else data.producer()
        shape = static_shape(node.outputs[0])
        if before is None or before.graph is not self.graph or not is_view(before) or shape is None or 0 in shape:
            return False
        source = before.inputs[0]
        if source is None or before.op_type == "Identity" or node.op_type == "Identity":
            return False
        if static_shape(source) == shape:
            self.replace(node.outputs[0], source)
            return True
        sizes = self.constant(np.array(shape, np.int64), f"{node.outputs[0].name}.shape")
        self.replace(node.outputs[0], self.insert(node, "Reshape", [source, sizes], like=node.outputs[0]))
        return True

    def casts(self, node: ir.Node) -> bool:
        """Cast(Cast(x)) is Cast(x) if the first one keeps every value of x."""
        before = producer(node.inputs[0], "Cast")
        source = None if before is None else before.inputs[0]
        if before is None or source is None or source.dtype is None:
            return False
        if not _lossless(source.dtype, before.outputs[0].dtype):
            return False
        node.replace_input_with(0, source)
        return True

    def clamps(self, node: ir.Node) -> bool:
        before = producer(node.inputs[0], "Relu", "Clip")
        limits, earlier = bounds(node), None if before is None else bounds(before)
        if before is None or limits is None or earlier is None or before.inputs[0] is None:
            return False
        low, high = max(limits[0], earlier[0]), min(limits[1], earlier[1])
        if low > high or max(earlier[0], limits[0]) > limits[1] or earlier[1] < limits[0]:
            return False
        data, dtype = before.inputs[0], node.outputs[0].dtype
        if dtype is None:
            return False
        if (low, high) == (0.0, np.inf):
            self.replace(node.outputs[0], self.insert(node, "Relu", [data], like=node.outputs[0]))
            return True
        name = node.outputs[0].name
        inputs: list[ir.Value | None] = [data]
        for bound, label, infinite in ((low, "min", -np.inf), (high, "max", np.inf)):
            element = np.array(bound if bound != infinite else 0, dtype.numpy())
            inputs.append(None if bound == infinite else self.constant(element, f"{name}.{label}", dtype))
        while inputs[-1] is None:
            inputs.pop()
        self.replace(node.outputs[0], self.insert(node, "Clip", inputs, like=node.outputs[0]))
        return True


def bounds(node: ir.Node) -> tuple[float, float] | None:
    """The constant limits of a Relu or Clip."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    limits: list[float] = []
    for index, infinite in ((1, -np.inf), (2, np.inf)):
        value = operand(node, index)
        limit = infinite if value is None else scalar(value)
        if limit is None or np.isnan(limit):
            return None
        limits.append(limit)
    return limits[0], limits[1]


def _lossless(source: ir.DataType, target: ir.DataType | None) -> bool:
    """Whether `target` can hold every value of `source`."""
    if target is None:
        return False
    if source == target:
        return True
    floats = {ir.DataType.FLOAT16: 11, ir.DataType.BFLOAT16: 8, ir.DataType.FLOAT: 24, ir.DataType.DOUBLE: 53}
    if source in floats and target in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return floats[source] <= floats[target]
    if source in _EXACT and target in floats:
        return _EXACT[source] <= floats[target]
    if source in _EXACT and target in _EXACT:
        signed = target.name.startswith("INT")
        wider = _EXACT[source] < _EXACT[target]
        return wider and (signed or not source.name.startswith("INT"))
    return False
