"""Let a convolution or pooling do the zero padding that a Pad before it does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import Rewrite, array, ints, operand, producer, scalar


class FusePad(Rewrite):
    """Pad with zeros goes into Conv, into MaxPool where the padding cannot win, and into AveragePool where that counts
    what is padded anyhow."""

    what = "paddings fused into convolutions and poolings"

    def rewrite(self, node: ir.Node) -> bool:
        pad = producer(operand(node, 0), "Pad")
        if node.op_type not in {"Conv", "MaxPool", "AveragePool"} or pad is None or pad.inputs[0] is None:
            return False
        shape = static_shape(pad.outputs[0])
        added = _spatial_padding(pad)
        automatic = node.attributes.get_string("auto_pad", "NOTSET") not in {"NOTSET", "VALID"}
        if added is None or shape is None or automatic:
            return False
        spatial = len(shape) - 2
        own = ints(node, "pads", (0,) * (2 * spatial))
        if not self.legal(node, pad, own):
            return False
        node.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, added, strict=True)])
        node.attributes.pop("auto_pad", None)
        if node.op_type == "AveragePool":
            node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
        node.replace_input_with(0, pad.inputs[0])
        return True

    def legal(self, node: ir.Node, pad: ir.Node, own: tuple[int, ...]) -> bool:
        fill = 0.0 if operand(pad, 2) is None else scalar(operand(pad, 2))
        if node.op_type == "Conv":
            return fill == 0.0
        if node.attributes.get_int("ceil_mode", 0):
            return False  # the size of the last window follows other rules once padding is the pooling's own
        if node.op_type == "AveragePool":
            counted = node.attributes.get_int("count_include_pad", 0) == 1
            return fill == 0.0 and (counted or not any(own)) and self.within(node, pad)
        single = len(node.outputs) == 1 or not node.outputs[1].uses()
        lowest = fill == -np.inf or (fill == 0.0 and _not_negative(pad.inputs[0]))
        # A window of padding alone would give the lowest number in place of the padding's value.
        return single and lowest and self.within(node, pad)

    def within(self, node: ir.Node, pad: ir.Node) -> bool:
        """Whether no window lies in the padding alone, which ONNX forbids of a pooling's own padding."""
        added = _spatial_padding(pad)
        kernel = ints(node, "kernel_shape")
        own = ints(node, "pads", (0,) * (2 * len(kernel)))
        dilated = any(step != 1 for step in ints(node, "dilations"))
        return (
            added is not None
            and not dilated
            and all(a + b < size for a, b, size in zip(added, own, (*kernel, *kernel), strict=True))
        )


def _spatial_padding(pad: ir.Node) -> tuple[int, ...] | None:
    """Zeros put before each spatial axis, then after each, if nothing else is padded and nothing is cut off."""
    shape, amounts = static_shape(pad.outputs[0]), array(operand(pad, 1))
    if pad.attributes.get_string("mode", "constant") != "constant":
        return None
    if shape is None or amounts is None or len(shape) < 3:
        return None
    rank = len(shape)
    chosen = array(operand(pad, 3))
    axes = range(rank) if chosen is None else [int(axis) % rank for axis in chosen]
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        before[axis], after[axis] = int(amounts[place]), int(amounts[place + len(axes)])
    if any(before[:2]) or any(after[:2]) or min(before + after) < 0:
        return None
    return (*before[2:], *after[2:])


def _not_negative(value: ir.Value | None) -> bool:
    """Whether a value is known to have no negative element."""
    source = producer(value, "Relu", "Sigmoid", "Clip", "Softmax", "Abs", "MaxPool", "HardSigmoid")
    if source is None:
        return False
    if source.op_type == "Clip":
        low = scalar(operand(source, 1))
        return low is not None and low >= 0.0
    return source.op_type != "MaxPool" or _not_negative(source.inputs[0])
