"""Small quantized networks, with power-of-two scales, written as ONNX with QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Net:
    """A graph under construction; values are int8, each with the exponent of its scale."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.generator = np.random.default_rng(3)
        self.exponents: dict[str, int] = {}

    def constant(self, name: str, array: np.ndarray) -> str:
        """An initializer."""
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def input(self, name: str, shape: list[int | str], exponent: int = -5) -> str:
        """An int8 input."""
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT8, shape))
        self.exponents[name] = exponent
        return name

    def output(self, name: str, shape: list[int | str]) -> None:
        """An int8 output."""
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.INT8, shape))

    def real(self, name: str) -> str:
        """The dequantized value; each reader has a node of its own."""
        result = f"{name}.real{len(self.nodes)}"
        scale = self.constant(f"{result}.scale", np.float32(2.0 ** self.exponents[name]))
        zero = self.constant(f"{result}.zero", np.int8(0))
        self.nodes.append(helper.make_node("DequantizeLinear", [name, scale, zero], [result]))
        return result

    def quantize(self, real: str, name: str, exponent: int) -> str:
        """Quantize a value under a new name."""
        scale = self.constant(f"{name}.scale", np.float32(2.0**exponent))
        zero = self.constant(f"{name}.zero", np.int8(0))
        self.nodes.append(helper.make_node("QuantizeLinear", [real, scale, zero], [name]))
        self.exponents[name] = exponent
        return name

    def parameter(self, name: str, array: np.ndarray, exponents: np.ndarray) -> str:
        """A dequantized constant with one scale an element of axis 0."""
        scale = self.constant(f"{name}.scale", (2.0**exponents).astype(np.float32))
        zero = self.constant(f"{name}.zero", np.zeros(exponents.shape, array.dtype))
        inputs = [self.constant(f"{name}.q", array), scale, zero]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [name], axis=0))
        return name

    def conv(self, x: str, name: str, ins: int, outs: int, size: int = 3, stride: int = 1, relu: bool = True) -> str:
        """A convolution that keeps its size but for the stride, perhaps Relu, and QuantizeLinear."""
        weights = self.generator.integers(-127, 128, (outs, ins, size, size)).astype(np.int8)
        powers = np.array([-9 - number % 2 for number in range(outs)])
        bias = self.generator.integers(-2000, 2000, outs).astype(np.int32)
        w = self.parameter(f"{name}.w", weights, powers)
        b = self.parameter(f"{name}.b", bias, powers + self.exponents[x])
        pad = size // 2
        attributes = {"kernel_shape": [size, size], "strides": [stride, stride], "pads": [pad] * 4}
        self.nodes.append(helper.make_node("Conv", [self.real(x), w, b], [f"{name}.sum"], **attributes))
        real = f"{name}.sum"
        if relu:
            self.nodes.append(helper.make_node("Relu", [real], [f"{name}.relu"]))
            real = f"{name}.relu"
        return self.quantize(real, name, -4)

    def add(self, a: str, b: str, name: str) -> str:
        """A sum and QuantizeLinear."""
        self.nodes.append(helper.make_node("Add", [self.real(a), self.real(b)], [f"{name}.sum"]))
        return self.quantize(f"{name}.sum", name, -3)

    def pool(self, x: str, name: str) -> str:
        """Maximum pooling of the integers, 2 x 2."""
        attributes = {"kernel_shape": [2, 2], "strides": [2, 2]}
        self.nodes.append(helper.make_node("MaxPool", [x], [name], **attributes))
        self.exponents[name] = self.exponents[x]
        return name

    def save(self, path: Path) -> Path:
        """Write the model."""
        graph = helper.make_graph(self.nodes, "small", self.inputs, self.outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def residual(path: Path, batch: int | str = 1) -> Path:
    """Two convolutions, a residual sum, a maximum pool and a last convolution, all int8 from input to output."""
    net = Net()
    x = net.input("x", [batch, 20, 8, 8])
    a = net.conv(x, "a", 20, 24)
    b = net.conv(a, "b", 24, 24, relu=False)
    c = net.add(a, b, "c")
    y = net.conv(net.pool(c, "p"), "y", 24, 10, size=1, relu=False)
    net.output(y, [batch, 10, 4, 4])
    return net.save(path)
