"""Remove operators that change nothing, and write others in their plainest form."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nestc.graph.kinds import is_constant, is_view
from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import Rewrite, array, ints, only_use, operand, scalar


class Simplify(Rewrite):
    """Drop no-ops; call a Transpose that moves only axes of size 1 a Reshape; give each Reshape a constant shape.

    Views (Squeeze, Unsqueeze, Flatten) keep their names, since a Region made of views costs nothing.
    """

    what = "operators removed or simplified"

    def rewrite(self, node: ir.Node) -> bool:
        kept = _same(node)
        if kept is not None and not (node.op_type == "Identity" and node.outputs[0].is_graph_output()):
            self.replace(node.outputs[0], kept)
            return True
        if node.op_type == "Transpose":
            return self.transpose_to_reshape(node)
        if node.op_type == "Reshape":
            return self.constant_shape(node)
        if node.op_type == "Sum":
            return self.sum_of_two(node)
        if node.op_type in {"Softmax", "LogSoftmax", "Hardmax"}:
            return self.between_views(node)
        if node.op_type == "Compress":
            return self.known_compress(node)
        return False

    def known_compress(self, node: ir.Node) -> bool:
        """Compress by a constant: what it keeps is known, so it is a Gather."""
        data, condition = node.inputs[0], array(node.inputs[1])
        if data is None or condition is None:
            return False
        axis = node.attributes.get_int("axis", None)
        if axis is None:
            flat = self.constant(np.array([-1], np.int64), f"{node.name}.shape")
            data = self.insert(node, "Reshape", [data, flat], like=data)
            data.shape = None
        kept = self.constant(np.flatnonzero(condition).astype(np.int64), f"{node.name}.kept")
        made = self.insert(node, "Gather", [data, kept], {"axis": axis or 0}, like=node.outputs[0])
        made.shape = None
        self.replace(node.outputs[0], made)
        return True

    def between_views(self, node: ir.Node) -> bool:
        """Flatten, Softmax over the last axis, Reshape back: what the conversion makes of Softmax before set 13."""
        result = node.outputs[0]
        before = None if node.inputs[0] is None else node.inputs[0].producer()
        source = None if before is None or not is_view(before) else before.inputs[0]
        after = next(iter(result.uses())).node if only_use(result) else None
        if source is None or after is None or not is_view(after) or after.graph is not self.graph:
            return False
        flat, full = static_shape(result), static_shape(source)
        if not flat or not full or full[-1] != flat[-1] or static_shape(after.outputs[0]) != full:
            return False
        if node.attributes.get_int("axis", -1) not in (-1, len(flat) - 1):
            return False
        made = self.insert(node, node.op_type, [source], {"axis": -1}, like=after.outputs[0])
        self.replace(after.outputs[0], made)
        return True

    def transpose_to_reshape(self, node: ir.Node) -> bool:
        data = node.inputs[0]
        shape = None if data is None else static_shape(data)
        if shape is None or data is None:
            return False
        order = ints(node, "perm", range(len(shape))[::-1])
        moved = [axis for axis in order if shape[axis] != 1]
        if moved != sorted(moved) or 0 in shape:
            return False
        target = [shape[axis] for axis in order]
        sizes = self.constant(np.array(target, np.int64), f"{node.outputs[0].name}.shape")
        result = self.insert(node, "Reshape", [data, sizes], like=node.outputs[0], shape=target)
        self.replace(node.outputs[0], result)
        return True

    def constant_shape(self, node: ir.Node) -> bool:
        """Replace a computed shape operand by the shape that inference has found."""
        shape = static_shape(node.outputs[0])
        known = operand(node, 1)
        if shape is None or known is None or 0 in shape:
            return False
        current = array(known)
        if current is not None and tuple(current.tolist()) == shape:
            return False
        sizes = self.constant(np.array(shape, np.int64), f"{node.outputs[0].name}.shape")
        node.replace_input_with(1, sizes)
        return True

    def sum_of_two(self, node: ir.Node) -> bool:
        """Sum of two is Add, which every target knows."""
        if len(node.inputs) != 2:
            return False
        self.replace(node.outputs[0], self.insert(node, "Add", list(node.inputs), like=node.outputs[0]))
        return True


def _same(node: ir.Node) -> ir.Value | None:
    """The operand that the node returns unchanged, if it does."""
    data = operand(node, 0)
    if data is None or not node.outputs:
        return None
    rule = _NO_OPS.get(node.op_type)
    return data if rule is not None and rule(node, data) else _neutral(node)


def _neutral(node: ir.Node) -> ir.Value | None:
    """For x*1, x/1, x+0, x-0: x, if the result has the shape of x. (x+0 makes -0 into 0, which equals it.)"""
    element = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0, "Pow": 1.0}.get(node.op_type)
    if element is None:
        return None
    choices = ((0, 1), (1, 0)) if node.op_type in {"Mul", "Add"} else ((0, 1),)
    for kept, other in choices:
        value = operand(node, kept)
        if value is None or not _all_equal(operand(node, other), element):
            continue
        shape = static_shape(value)
        if shape is not None and shape == static_shape(node.outputs[0]) and value.dtype == node.outputs[0].dtype:
            return value
    return None


def _all_equal(value: ir.Value | None, element: float) -> bool:
    if value is None or not is_constant(value) or value.const_value is None or value.dtype == ir.DataType.STRING:
        return False
    if value.const_value.size > 1 << 20 or value.const_value.size == 0:
        return False
    return bool(np.all(value.const_value.numpy() == element))


def _same_shape(node: ir.Node, data: ir.Value) -> bool:
    shape = static_shape(data)
    return shape is not None and shape == static_shape(node.outputs[0])


def _no_dropout(node: ir.Node, data: ir.Value) -> bool:
    mask_used = len(node.outputs) > 1 and bool(node.outputs[1].uses() or node.outputs[1].is_graph_output())
    training = operand(node, 2)
    return not mask_used and (training is None or scalar(training) == 0.0)


def _whole_slice(node: ir.Node, data: ir.Value) -> bool:
    steps = operand(node, 4)
    return _same_shape(node, data) and (steps is None or _all_equal(steps, 1.0))


def _identity_order(node: ir.Node, data: ir.Value) -> bool:
    rank = None if data.shape is None else len(data.shape)
    return rank is not None and ints(node, "perm", range(rank)[::-1]) == tuple(range(rank))


def _scales_of_one(node: ir.Node, data: ir.Value) -> bool:
    """Resizing to the same size copies in every mode but the cropping one."""
    mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    return _same_shape(node, data) and mode != "tf_crop_and_resize" and _all_equal(operand(node, 2), 1.0)


_NO_OPS = {
    "Identity": lambda node, data: True,
    "Dropout": _no_dropout,
    "Cast": lambda node, data: data.dtype is not None and data.dtype == node.attributes["to"].as_int(),
    "CastLike": lambda node, data: data.dtype is not None and data.dtype == node.outputs[0].dtype,
    "Reshape": _same_shape,
    "Flatten": _same_shape,
    "Expand": _same_shape,
    "Tile": _same_shape,
    "Squeeze": _same_shape,
    "Unsqueeze": _same_shape,
    "Pad": lambda node, data: _same_shape(node, data) and _all_equal(operand(node, 1), 0.0),
    "Slice": _whole_slice,
    "Transpose": _identity_order,
    "Resize": _scales_of_one,
    "Concat": lambda node, data: len(node.inputs) == 1,
    "Sum": lambda node, data: len(node.inputs) == 1,
    "Mean": lambda node, data: len(node.inputs) == 1,
    "Max": lambda node, data: len(node.inputs) == 1,
    "Min": lambda node, data: len(node.inputs) == 1,
    "Clip": lambda node, data: all(value is None for value in node.inputs[1:]),
}
