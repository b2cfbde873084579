"""Write the operators on quantized tensors as dequantize, compute, quantize, the one quantized form of later passes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nestc.graph.passes.rewrite import Rewrite, array, operand


class IntegerOperators(Rewrite):
    """QLinearConv and QLinearMatMul become Conv and MatMul between DequantizeLinear and QuantizeLinear.

    A QLinearMatMul whose scales go with rows and columns of a batch of matrices stays: QuantizeLinear cannot say them.
    """

    what = "integer operators written with DequantizeLinear and QuantizeLinear"

    def rewrite(self, node: ir.Node) -> bool:
        if node.op_type == "QLinearConv":
            return self.convolution(node)
        if node.op_type == "QLinearMatMul":
            return self.product(node)
        return False

    def convolution(self, node: ir.Node) -> bool:
        x_scale, w_scale = node.inputs[1], node.inputs[4]
        if x_scale is None or w_scale is None:
            return False
        data = self.real(node, *node.inputs[0:3], label="x")
        weight = self.real(node, *node.inputs[3:6], label="w", axis=0)
        inputs = [data, weight]
        bias = operand(node, 8)
        if bias is not None:
            inputs.append(self.real(node, bias, self.product_of(node, x_scale, w_scale), None, label="bias", axis=0))
        return self.finish(node, "Conv", inputs, node.inputs[6], node.inputs[7])

    def product(self, node: ir.Node) -> bool:
        inputs: list[ir.Value] = []
        for label, first, along in (("a", 0, 2), ("b", 3, 1)):
            data, scale = node.inputs[first], node.inputs[first + 1]
            if data is None or scale is None or scale.shape is None or data.shape is None:
                return False
            axis = 0
            if len(scale.shape) == 1 and scale.shape[0] != 1:
                axis = max(len(data.shape) - along, 0)  # one scale a row of the first, a column of the second factor
            elif len(scale.shape) > 1:
                return False
            inputs.append(self.real(node, *node.inputs[first : first + 3], label=label, axis=axis))
        return self.finish(node, "MatMul", inputs, node.inputs[6], node.inputs[7])

    def real(
        self,
        node: ir.Node,
        data: ir.Value | None,
        scale: ir.Value | None,
        zero_point: ir.Value | None,
        *,
        label: str,
        axis: int = 0,
    ) -> ir.Value:
        """The float tensor that `data` stands for."""
        assert data is not None and scale is not None
        name = f"{node.outputs[0].name}.{label}"
        given = [data, scale] if zero_point is None else [data, scale, zero_point]
        many = scale.shape is not None and len(scale.shape) == 1
        return self.insert(
            node, "DequantizeLinear", given, {"axis": axis} if many else None, like=data, dtype=scale.dtype, name=name
        )

    def product_of(self, node: ir.Node, x_scale: ir.Value, w_scale: ir.Value) -> ir.Value:
        """The scale of the bias; both factors have one element, or the second one a channel."""
        first, second = array(x_scale), array(w_scale)
        name = f"{node.outputs[0].name}.bias_scale"
        if first is None or second is None:
            return self.insert(node, "Mul", [x_scale, w_scale], like=w_scale, name=name)
        return self.constant(np.multiply(first.reshape(()), second), name, w_scale.dtype)

    def finish(
        self, node: ir.Node, op_type: str, inputs: list[ir.Value], scale: ir.Value | None, zero_point: ir.Value | None
    ) -> bool:
        """The operator itself on floats, and its result quantized, in place of `node`."""
        assert scale is not None
        result = node.outputs[0]
        value = self.insert(node, op_type, inputs, like=result, dtype=scale.dtype, name=f"{result.name}.real")
        made = value.producer()
        assert made is not None
        made.attributes.update(node.attributes)
        made.name = node.name
        self.replace(result, self.insert(node, "QuantizeLinear", [value, scale, zero_point], like=result))
        return True
