"""Remove Relu and Clip where the range of the quantized tensor beside them has the same effect."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nestc.graph.passes.cancel import bounds
from nestc.graph.passes.rewrite import Rewrite, only_use, operand
from nestc.graph.qdq import Quantization, dequantized, quantization


class ImpliedClamps(Rewrite):
    """Relu or Clip before QuantizeLinear goes if saturation cuts as much; after DequantizeLinear if nothing is cut.

    Exact, since quantizing never changes the order of two numbers: all below the lower bound become what the bound
    becomes, which is the smallest integer.
    """

    what = "clamps implied by a quantized range removed"

    def rewrite(self, node: ir.Node) -> bool:
        limits = bounds(node) if node.op_type in {"Relu", "Clip"} else None
        data, result = operand(node, 0), node.outputs[0]
        if limits is None or data is None or limits[0] > limits[1]:
            return False
        if not self.before(result, limits) and not self.after(data, limits):
            return False
        self.replace(result, data)
        return True

    def before(self, result: ir.Value, limits: tuple[float, float]) -> bool:
        """Whether the one user of the result is a QuantizeLinear that saturates at these limits, or sooner."""
        if not only_use(result):
            return False
        user, index = next(iter(result.uses()))
        if user.op_type != "QuantizeLinear" or index != 0:
            return False
        parameters = quantization(user)
        return parameters is not None and np.array_equal(_quantized(parameters, limits), _ends(parameters))

    def after(self, data: ir.Value, limits: tuple[float, float]) -> bool:
        """Whether all numbers that the DequantizeLinear before can give lie within the limits."""
        parameters = quantization(dequantized(data))
        if parameters is None or parameters.block or data.is_graph_output():
            return False
        low, high = ((end - parameters.zero_point).astype(np.float32) * parameters.scale for end in parameters.limits)
        return bool(np.all(low >= limits[0]) and np.all(high <= limits[1]))


def _quantized(parameters: Quantization, limits: tuple[float, float]) -> np.ndarray:
    shape = parameters.scale.shape
    plain = Quantization(parameters.dtype, parameters.scale, parameters.zero_point)
    return np.stack([plain.quantize(np.full(shape, limit, np.float32)) for limit in limits]).astype(np.int64)


def _ends(parameters: Quantization) -> np.ndarray:
    return np.stack([np.full(parameters.scale.shape, end, np.int64) for end in parameters.limits])
