"""Scales and shifts a channel as depthwise 1x1 convolutions, the form that is computed on integers, and back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nestc.graph.kinds import is_constant
from nestc.graph.model import static_shape
from nestc.graph.passes.fold_affine import Affine, affine_of, channels_of
from nestc.graph.passes.rewrite import Rewrite, array, ints, only_use, operand

_MAPS = frozenset({"Add", "BatchNormalization", "Div", "Mul", "Sub"})


class AffineToConvolution(Rewrite):
    """Mul, Div, Add, Sub and BatchNormalization in a row that no convolution took in become one depthwise 1x1 Conv.

    For images in float32 (rank 4), and only where channels have scales of their own: a plain number is cheaper as it
    is. Not for inputs of the model, whose three channels fill no vector. Quantized, a Conv has a scale for the weight
    of each channel and adds its bias to int32 sums, whereas the constant of a Mul is rounded with one scale for all.
    """

    what = "scales and shifts a channel written as depthwise convolutions"

    def rewrite(self, node: ir.Node) -> bool:
        index = _data_index(node)
        data = None if index is None else node.inputs[index]
        if index is None or data is None or data.shape is None or len(data.shape) != 4 or data.is_graph_input():
            return False
        channels = channels_of(data)
        affine = None if channels is None else affine_of(node, index, channels)
        if channels is None or affine is None or node.outputs[0].dtype != ir.DataType.FLOAT:
            return False
        last = node
        while (after := _next(last)) is not None and (more := affine_of(*after, channels)) is not None:
            affine, last = Affine(affine.scale * more.scale, affine.shift * more.scale + more.shift), after[0]
        if np.all(affine.scale == affine.scale[0]):
            return False
        weight, bias = (each.astype(np.float32) for each in (affine.scale, affine.shift))
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            return False
        result = last.outputs[0]
        inputs = [data, self.constant(weight.reshape(-1, 1, 1, 1), f"{result.name}.weight")]
        if np.any(bias):
            inputs.append(self.constant(bias, f"{result.name}.bias"))
        self.replace(result, self.insert(last, "Conv", inputs, {"group": channels}, like=result))
        return True


class ConvolutionToAffine(Rewrite):
    """A depthwise 1x1 convolution in float32 with constant weights becomes Mul and Add, which fuse with more."""

    what = "depthwise 1x1 convolutions written as Mul and Add"

    def rewrite(self, node: ir.Node) -> bool:
        data, bias_value = operand(node, 0), operand(node, 2)
        if not is_affine(node) or data is None:
            return False
        weight, bias = array(node.inputs[1]), array(bias_value)
        if weight is None or weight.dtype != np.float32 or (bias_value is not None and bias is None):
            return False
        result, name = node.outputs[0], node.outputs[0].name
        made = self.insert(node, "Mul", [data, self.constant(weight.reshape(-1, 1, 1), f"{name}.scale")], like=result)
        parts = [made]
        if bias is not None:
            made = self.insert(node, "Add", [made, self.constant(bias.reshape(-1, 1, 1), f"{name}.shift")], like=result)
            parts.append(made)
        for front in (part.producer() for part in parts):
            assert front is not None
            front.metadata_props.update(node.metadata_props)  # why it stayed float
        self.replace(result, made)
        return True


def is_affine(node: ir.Node) -> bool:
    """Whether the node is a Conv that only scales and shifts each channel of an image: depthwise, of one pixel."""
    weight = operand(node, 1)
    shape = None if weight is None or node.op_type != "Conv" or node.domain else static_shape(weight)
    if shape is None or len(shape) != 4 or shape[1:] != (1, 1, 1) or node.attributes.get_int("group", 1) != shape[0]:
        return False
    return not any(ints(node, "pads")) and set(ints(node, "strides")) <= {1}


def _data_index(node: ir.Node) -> int | None:
    """The operand of a possible map that is no constant; None for other nodes, or if that is not clear."""
    if node.domain or node.op_type not in _MAPS:
        return None
    if node.op_type == "BatchNormalization":
        return 0
    varying = [index for index, value in enumerate(node.inputs) if value is not None and not is_constant(value)]
    return varying[0] if len(varying) == 1 and len(node.inputs) == 2 else None


def _next(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The map that alone reads a node's result, and as which operand."""
    value = node.outputs[0]
    if not only_use(value):
        return None
    user = next(iter(value.uses())).node
    index = _data_index(user)
    return None if index is None or user.inputs[index] is not value or user.graph is not node.graph else (user, index)
