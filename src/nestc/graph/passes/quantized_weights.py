"""Keep weights as integers where the arithmetic wants them, and as floats where it does not."""

from __future__ import annotations

import onnx_ir as ir

from nestc.graph.kinds import is_constant
from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import Rewrite
from nestc.graph.qdq import dequantized, quantization

_PRODUCTS = frozenset({"MatMul", "Gemm"})
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})


class QuantizeWeights(Rewrite):
    """QuantizeLinear of a weight becomes a weight of integers."""

    what = "weights quantized"

    def rewrite(self, node: ir.Node) -> bool:
        data, parameters = node.inputs[0] if node.inputs else None, quantization(node)
        if node.op_type != "QuantizeLinear" or parameters is None or data is None or not is_constant(data):
            return False
        tensor, shape = data.const_value, static_shape(data)
        if tensor is None or shape is None:
            return False
        name = f"{node.outputs[0].name}.weight"
        integers = self.later(lambda: parameters.quantize(tensor.numpy()), parameters.dtype, shape, name)
        self.replace(node.outputs[0], integers)
        return True


class DequantizeWeights(Rewrite):
    """DequantizeLinear of a weight becomes a weight of floats, except for users that compute with the integers.

    Those are Conv and ConvTranspose with a dequantized activation, and MatMul and Gemm whatever their activation is
    (weights are then read in a quarter of the bytes or less). Elementwise operators compute in float32 registers.
    """

    what = "quantized weights written as floats"

    def rewrite(self, node: ir.Node) -> bool:
        data, result, parameters = node.inputs[0] if node.inputs else None, node.outputs[0], quantization(node)
        if node.op_type != "DequantizeLinear" or parameters is None or data is None or not is_constant(data):
            return False
        tensor, shape = data.const_value, static_shape(data)
        if tensor is None or shape is None:
            return False
        floats = [(user, index) for user, index in result.uses() if not _wanted(user, result)]
        if not floats and not result.is_graph_output():
            return False
        name = f"{result.name}.weight"
        weight = self.later(lambda: parameters.dequantize(tensor.numpy()), ir.DataType.FLOAT, shape, name)
        if result.is_graph_output():
            self.replace(result, weight)
            return True
        for user, index in floats:
            user.replace_input_with(index, weight)
        return True


def _wanted(user: ir.Node, weight: ir.Value) -> bool:
    """Whether `user` computes with the integers that `weight` is dequantized from."""
    others = [value for value in user.inputs if value is not None and value is not weight]
    activations = [value for value in others if not is_constant(value) and not _is_weight(value)]
    if user.domain:
        return False
    if user.op_type in _PRODUCTS and weight in user.inputs[:2]:
        return True
    convolved = user.op_type in _WEIGHTED and bool(activations)
    return convolved and all(dequantized(value) is not None for value in activations)


def _is_weight(value: ir.Value) -> bool:
    """Whether a value is dequantized from a constant."""
    source = dequantized(value)
    return source is not None and is_constant(source.inputs[0])
