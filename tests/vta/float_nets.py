"""Small float networks with the blocks of well-known ones, for the tests that quantize, compile and run a whole model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import nestc

SIZE = 24


class Net:
    """A network under construction on an input [1, 3, 24, 24]; values are names, `channels` knows their axis 1."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.channels = {"x": 3}

    def node(self, op: str, *inputs: str, channels: int | None = None, **attributes: Any) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n_{name}", **attributes))
        self.channels[name] = self.channels[inputs[0]] if channels is None else channels
        return name

    def constant(self, values: np.ndarray) -> str:
        name = f"k{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
        return name

    def conv(self, x: str, channels: int, kernel: int, stride: int = 1, groups: int = 1, gain: float = 1.4) -> str:
        """A convolution that keeps the size, or divides it by the stride."""
        fan_in = self.channels[x] // groups
        shape = (channels, fan_in, kernel, kernel)
        # Channels of different sizes, so that scales a channel differ.
        spread = np.exp(0.7 * self.random.standard_normal((channels, 1, 1, 1)))
        weight = self.constant(self.random.standard_normal(shape) * gain * spread / np.sqrt(fan_in * kernel**2))
        bias = self.constant(self.random.standard_normal(channels) / 4)
        return self.node(
            "Conv", x, weight, bias, channels=channels, group=groups, pads=[kernel // 2] * 4, strides=[stride] * 2
        )

    def relu(self, x: str) -> str:
        return self.node("Relu", x)

    def relu6(self, x: str) -> str:
        return self.node("Clip", x, self.constant(np.float32(0)), self.constant(np.float32(6)))

    def norm(self, x: str) -> str:
        """A batch normalization."""
        count = self.channels[x]
        scale, shift, mean = (self.random.standard_normal(count) for _ in range(3))
        parameters = (np.exp(scale / 2), shift / 2, mean / 2, np.exp(self.random.standard_normal(count) / 2))
        return self.node("BatchNormalization", x, *map(self.constant, parameters))

    def finish(self, x: str) -> nestc.Model:
        """The model, with a mean over places and a classifier behind `x`."""
        flat = self.node("Flatten", self.node("GlobalAveragePool", x))
        weight = self.constant(self.random.standard_normal((10, self.channels[x])))
        y = self.node("Gemm", flat, weight, self.constant(np.zeros(10)), transB=1)
        ends = (
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
            [helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, 10])],
        )
        graph = helper.make_graph(self.nodes, "net", *ends, self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(proto)
        return nestc.load(proto)


def residual() -> nestc.Model:
    """Basic blocks, one with a convolution in its shortcut, behind a max pooling."""
    net = Net(1)
    x = net.node("MaxPool", net.relu(net.conv("x", 20, 7, 2)), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for channels, stride in ((20, 1), (40, 2)):
        y = net.conv(net.relu(net.conv(x, channels, 3, stride)), channels, 3, gain=0.7)
        x = net.relu(net.node("Add", y, x if stride == 1 else net.conv(x, channels, 1, stride)))
    return net.finish(x)


def bottleneck() -> nestc.Model:
    """1x1, 3x3 and 1x1 convolutions with a sum."""
    net = Net(2)
    x = net.relu(net.conv("x", 48, 3, 2))
    for stride in (1, 2):
        y = net.relu(net.conv(net.relu(net.conv(x, 12, 1)), 12, 3, stride))
        y = net.conv(y, 48, 1, gain=0.7)
        x = net.relu(net.node("Add", y, x if stride == 1 else net.conv(x, 48, 1, stride)))
    return net.finish(x)


def inverted_residual() -> nestc.Model:
    """Depthwise convolutions between 1x1 ones, with ReLU6; sums without an activation."""
    net = Net(3)
    x = net.relu6(net.conv("x", 12, 3, 2))
    for stride in (1, 2):
        y = net.relu6(net.conv(x, 40, 1))
        y = net.conv(net.relu6(net.conv(y, 40, 3, stride, groups=40)), 12 * stride, 1)
        x = net.node("Add", x, y) if stride == 1 else y
    return net.finish(net.relu6(net.conv(x, 33, 1)))


def preactivation() -> nestc.Model:
    """Batch normalizations behind sums, in which no convolution can take them in."""
    net = Net(4)
    x = net.conv("x", 18, 3, 2)
    for channels, stride in ((18, 1), (36, 2)):
        before = net.relu(net.norm(x))
        y = net.conv(net.relu(net.norm(net.conv(before, channels, 3, stride))), channels, 3, gain=0.7)
        x = net.node("Add", y, x if stride == 1 else net.conv(before, channels, 1, stride))
    return net.finish(net.relu(net.norm(x)))


def efficient_lite() -> nestc.Model:
    """Blocks of EfficientNet-Lite: 5x5 depthwise convolutions, no squeezing."""
    net = Net(5)
    x = net.relu6(net.conv("x", 16, 3, 2))
    for channels, stride in ((24, 2), (24, 1)):
        y = net.relu6(net.conv(x, 6 * net.channels[x], 1))
        y = net.conv(net.relu6(net.conv(y, net.channels[y], 5, stride, groups=net.channels[y])), channels, 1)
        x = net.node("Add", y, x) if stride == 1 else y
    return net.finish(x)


def concatenations() -> nestc.Model:
    """A fire module, an inception block with pooling, and a grouped convolution."""
    net = Net(6)
    x = net.relu(net.conv("x", 16, 3, 2))
    narrow = net.relu(net.conv(x, 9, 1))
    x = net.node("Concat", net.relu(net.conv(narrow, 20, 1)), net.relu(net.conv(narrow, 20, 3)), channels=40, axis=1)
    pooled = net.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    largest = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    sides = net.relu(net.conv(pooled, 12, 1)), net.conv(x, 20, 3, 2, groups=4), largest
    return net.finish(net.node("Concat", *sides, channels=72, axis=1))


NETS = {
    make.__name__: make
    for make in (residual, bottleneck, inverted_residual, preactivation, efficient_lite, concatenations)
}
