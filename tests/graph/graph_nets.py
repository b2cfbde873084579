"""Small networks as exporters write them, built here so that the tests need no files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Builds an ONNX model node by node; `call` returns the name of the new value."""

    def __init__(self, opset: int = 17, seed: int = 0) -> None:
        self.opset = opset
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def weight(self, *shape: int, scale: float | None = None) -> str:
        fan = int(np.prod(shape[1:])) or 1
        values = self.random.standard_normal(shape) * (scale if scale is not None else 1 / np.sqrt(fan))
        return self.constant(values.astype(np.float32))

    def constant(self, values: Any, dtype: Any = None) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def call(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{op_type.lower()}_{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        node = helper.make_node(op_type, inputs, names, name=f"n{len(self.nodes)}_{op_type}", **attributes)
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def output(self, value: str, dtype: int = TensorProto.FLOAT) -> None:
        self.outputs.append(helper.make_tensor_value_info(value, dtype, None))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "net", self.inputs, self.outputs, self.weights)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    def norm(self, x: str, channels: int) -> str:
        """A BatchNormalization with random statistics."""
        scale, bias = self.weight(channels, scale=0.2), self.weight(channels, scale=0.5)
        mean = self.weight(channels, scale=0.3)
        variance = self.constant(self.random.uniform(0.5, 2.0, channels).astype(np.float32))
        return self.call("BatchNormalization", x, scale, bias, mean, variance, epsilon=1e-3)

    def conv(self, x: str, out: int, into: int, size: int, stride: int = 1, groups: int = 1) -> str:
        pad = size // 2
        return self.call(
            "Conv",
            x,
            self.weight(out, into // groups, size, size),
            strides=[stride, stride],
            pads=[pad] * 4,
            group=groups,
            kernel_shape=[size, size],
        )


def resnet() -> onnx.ModelProto:
    """Conv, norm, Relu, a maximum pool, a residual block, one with a projection, mean, Gemm (opset 11)."""
    b = Builder(11, 1)
    x = b.input("image", ["N", 3, 32, 32])
    x = b.call("Relu", b.norm(b.conv(x, 8, 3, 7, 2), 8))
    x = b.call("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = b.call("Relu", b.norm(b.conv(x, 8, 8, 3), 8))
    x = b.call("Relu", b.call("Add", b.norm(b.conv(y, 8, 8, 3), 8), x))
    y = b.norm(b.conv(b.call("Relu", b.norm(b.conv(x, 16, 8, 3, 2), 16)), 16, 16, 3), 16)
    x = b.call("Relu", b.call("Add", y, b.norm(b.conv(x, 16, 8, 1, 2), 16)))
    shape = b.call("Shape", b.call("GlobalAveragePool", x))
    batch = b.call("Unsqueeze", b.call("Gather", shape, b.constant(np.array(0, np.int64)), axis=0), axes=[0])
    flat = b.call("Reshape", b.call("GlobalAveragePool", x), b.call("Concat", batch, b.ints(-1), axis=0))
    b.output(b.call("Gemm", flat, b.weight(10, 16), b.weight(10), transB=1))
    return b.model()


def mobilenet() -> onnx.ModelProto:
    """Inverted residuals with Clip(0, 6), squeeze-and-excitation, and a HardSwish in parts (opset 13)."""
    b = Builder(13, 2)
    x = b.input("image", [1, 3, 24, 24])

    def hard_swish(value: str) -> str:
        gate = b.call("Clip", b.call("Add", value, b.number(3.0)), b.number(0.0), b.number(6.0))
        return b.call("Div", b.call("Mul", value, gate), b.number(6.0))

    x = hard_swish(b.norm(b.conv(x, 8, 3, 3, 2), 8))
    y = b.call("Clip", b.norm(b.conv(x, 16, 8, 1), 16), b.number(0.0), b.number(6.0))
    y = b.call("Clip", b.norm(b.conv(y, 16, 16, 3, 1, 16), 16), b.number(0.0), b.number(6.0))
    squeezed = b.call("ReduceMean", y, axes=[2, 3], keepdims=1)
    gate = b.call("Relu", b.conv(squeezed, 4, 16, 1))
    gate = b.call("Sigmoid", b.conv(gate, 16, 4, 1))
    y = b.norm(b.conv(b.call("Mul", y, gate), 8, 16, 1), 8)
    x = b.call("Add", x, y)
    x = b.call("Dropout", x)
    x = hard_swish(b.norm(b.conv(x, 24, 8, 1), 24))
    x = b.call("Flatten", b.call("GlobalAveragePool", x))
    b.output(b.call("Softmax", b.call("Gemm", x, b.weight(24, 5), b.weight(5)), axis=1))
    return b.model()


def transformer() -> onnx.ModelProto:
    """A pre-norm encoder block as PyTorch wrote it before LayerNormalization and Gelu were operators (opset 14)."""
    b = Builder(14, 3)
    tokens, width, heads = 6, 16, 4
    ids = b.input("ids", [2, tokens], TensorProto.INT64)
    x = b.call("Gather", b.weight(20, width, scale=1.0), ids)
    x = b.call("Add", x, b.weight(1, tokens, width, scale=0.1))

    def norm(value: str) -> str:
        centred = b.call("Sub", value, b.call("ReduceMean", value, axes=[-1]))
        variance = b.call("ReduceMean", b.call("Pow", centred, b.number(2.0)), axes=[-1])
        scaled = b.call("Div", centred, b.call("Sqrt", b.call("Add", variance, b.number(1e-5))))
        return b.call("Add", b.call("Mul", scaled, b.weight(width, scale=1.0)), b.weight(width))

    def linear(value: str, out: int, into: int) -> str:
        return b.call("Add", b.call("MatMul", value, b.weight(into, out, scale=0.3)), b.weight(out))

    def split(value: str, order: list[int]) -> str:
        shaped = b.call("Reshape", value, b.ints(2, tokens, heads, width // heads))
        return b.call("Transpose", shaped, perm=order)

    y = norm(x)
    q, k, v = (linear(y, width, width) for _ in range(3))
    scores = b.call("MatMul", split(q, [0, 2, 1, 3]), split(k, [0, 2, 3, 1]))
    scores = b.call("Div", scores, b.number(2.0))
    mask = b.constant(np.triu(np.full((tokens, tokens), -1e4, np.float32), 1))
    weights = b.call("Softmax", b.call("Add", scores, mask), axis=-1)
    mixed = b.call("Transpose", b.call("MatMul", weights, split(v, [0, 2, 1, 3])), perm=[0, 2, 1, 3])
    x = b.call("Add", x, linear(b.call("Reshape", mixed, b.ints(0, 0, width)), width, width))
    h = linear(norm(x), 2 * width, width)
    erf = b.call("Erf", b.call("Div", h, b.number(np.sqrt(2.0))))
    h = b.call("Mul", b.call("Mul", h, b.call("Add", erf, b.number(1.0))), b.number(0.5))
    x = b.call("Add", x, linear(h, width, 2 * width))
    b.output(norm(x))
    return b.model()


def llama() -> onnx.ModelProto:
    """RMS normalization, rotary embedding, a gated unit with Swish, attention without a mask (opset 17)."""
    b = Builder(17, 4)
    x = b.input("x", [1, 5, 16])

    def norm(value: str) -> str:
        mean = b.call("ReduceMean", b.call("Pow", value, b.number(2.0)), axes=[-1])
        root = b.call("Sqrt", b.call("Add", mean, b.number(1e-6)))
        return b.call("Mul", b.weight(16, scale=1.0), b.call("Mul", value, b.call("Reciprocal", root)))

    def rotate(value: str, cos: str, sin: str) -> str:
        low = b.call("Slice", value, b.ints(0), b.ints(4), b.ints(3))
        high = b.call("Slice", value, b.ints(4), b.ints(2**31), b.ints(3))
        turned = b.call("Concat", b.call("Neg", high), low, axis=3)
        return b.call("Add", b.call("Mul", value, cos), b.call("Mul", turned, sin))

    y = norm(x)

    def head() -> str:
        shaped = b.call("Reshape", b.call("MatMul", y, b.weight(16, 16)), b.ints(1, 5, 2, 8))
        return b.call("Transpose", shaped, perm=[0, 2, 1, 3])

    heads = [head() for _ in range(3)]
    angle = np.arange(5)[:, None] * 0.5 ** np.arange(8)
    cos, sin = b.constant(np.cos(angle).astype(np.float32)), b.constant(np.sin(angle).astype(np.float32))
    q, k = rotate(heads[0], cos, sin), rotate(heads[1], cos, sin)
    scale = b.number(8**-0.25)
    k = b.call("Transpose", k, perm=[0, 1, 3, 2])
    scores = b.call("MatMul", b.call("Mul", q, scale), b.call("Mul", k, scale))
    mixed = b.call("MatMul", b.call("Softmax", scores, axis=-1), heads[2])
    mixed = b.call("Reshape", b.call("Transpose", mixed, perm=[0, 2, 1, 3]), b.ints(1, 5, 16))
    x = b.call("Add", x, b.call("MatMul", mixed, b.weight(16, 16)))
    y = norm(x)
    gate = b.call("MatMul", y, b.weight(16, 32))
    gate = b.call("Mul", gate, b.call("Sigmoid", gate))
    x = b.call("Add", x, b.call("MatMul", b.call("Mul", gate, b.call("MatMul", y, b.weight(16, 32))), b.weight(32, 16)))
    b.output(norm(x))
    return b.model()


def channels_last() -> onnx.ModelProto:
    """A network of TensorFlow as its converter writes it: a pair of transposes around every convolution (opset 13)."""
    b = Builder(13, 5)
    x = b.input("image", [1, 16, 16, 3])

    def nchw(value: str) -> str:
        return b.call("Transpose", value, perm=[0, 3, 1, 2])

    def nhwc(value: str) -> str:
        return b.call("Transpose", value, perm=[0, 2, 3, 1])

    def six(value: str) -> str:
        return b.call("Min", b.call("Max", value, b.number(0.0)), b.number(6.0))

    x = six(b.call("Add", nhwc(b.conv(nchw(x), 8, 3, 3, 2)), b.weight(8)))
    y = six(b.call("Add", nhwc(b.conv(nchw(x), 8, 8, 3)), b.weight(8)))
    x = b.call("Add", x, y)
    padded = b.call("Pad", x, b.ints(0, 1, 1, 0, 0, 1, 1, 0))
    z = nhwc(b.call("Conv", nchw(padded), b.weight(8, 8, 3, 3), strides=[2, 2], kernel_shape=[3, 3]))
    x = b.call("Concat", z, nhwc(b.conv(nchw(x), 4, 8, 1, 2)), axis=3)
    x = b.call("ReduceMean", x, axes=[1, 2], keepdims=0)
    b.output(b.call("Softmax", b.call("MatMul", x, b.weight(12, 7)), axis=-1))
    return b.model()


def shuffle() -> onnx.ModelProto:
    """Channel split, shuffle, several outputs, LSTM, TopK and an If with a constant condition (opset 16)."""
    b = Builder(16, 6)
    x = b.input("x", [2, 8, 6, 6])
    left, right = b.call("Split", x, b.ints(4, 4), outputs=2, axis=1)
    right = b.call("Relu", b.norm(b.conv(right, 4, 4, 3), 4))
    x = b.call("Concat", left, right, axis=1)
    x = b.call("Transpose", b.call("Reshape", x, b.ints(2, 2, 4, 6, 6)), perm=[0, 2, 1, 3, 4])
    x = b.call("Reshape", x, b.ints(2, 8, 36))
    x = b.call("Transpose", x, perm=[2, 0, 1])
    forward = b.call("LSTM", x, b.weight(1, 20, 8), b.weight(1, 20, 5), b.weight(1, 40), outputs=3, hidden_size=5)
    sequence, hidden = forward[0], forward[1]
    sequence = b.call("Tanh", b.call("Squeeze", sequence, b.ints(1)))
    values, places = b.call("TopK", sequence, b.ints(2), outputs=2, axis=-1)
    then = helper.make_graph([helper.make_node("Neg", [hidden], ["negated"])], "then", [], [_any("negated")])
    other = helper.make_graph([helper.make_node("Abs", [hidden], ["absolute"])], "else", [], [_any("absolute")])
    chosen = b.call("If", b.constant(np.array(True)), then_branch=then, else_branch=other)
    b.output(values)
    b.output(places, TensorProto.INT64)
    b.output(b.call("Identity", chosen))
    return b.model()


def _any(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


NETS = {
    "resnet": resnet,
    "mobilenet": mobilenet,
    "transformer": transformer,
    "llama": llama,
    "channels_last": channels_last,
    "shuffle": shuffle,
}
"""Name -> function that builds the model."""
