"""Small seeded networks, what ONNX Runtime's quantizer makes of them, and running them there."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)


class Net:
    """An ONNX graph that grows by one operator at a time; weights are drawn from a seeded generator."""

    def __init__(self, seed: int, opset: int) -> None:
        self.random = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, name: str, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, *shape: int, spread: float) -> str:
        return self.constant(name, (self.random.standard_normal(shape) * spread).astype(np.float32))

    def op(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], output, **attributes))
        return output

    def conv(self, x: str, output: str, channels: tuple[int, int], kernel: int, stride: int = 1, group: int = 1) -> str:
        fan = channels[0] // group * kernel * kernel
        inputs = [
            x,
            self.weight(f"{output}_w", channels[1], channels[0] // group, kernel, kernel, spread=(2 / fan) ** 0.5),
            self.weight(f"{output}_b", channels[1], spread=0.1),
        ]
        return self.op("Conv", inputs, output, strides=[stride] * 2, pads=[kernel // 2] * 4, group=group)

    def model(self, inputs: Mapping[str, tuple[int, ...]], output: str, shape: tuple[int, ...]) -> onnx.ModelProto:
        given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in inputs.items()]
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "net", given, [result], self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)
        onnx.checker.check_model(proto)
        return proto


def vision() -> onnx.ModelProto:
    """Convolutions of all kinds, a residual sum, a concatenation of different ranges, pools, upsampling, a classifier."""
    net = Net(1, 17)
    net.constant("zero", np.float32(0))
    net.constant("six", np.float32(6))
    net.constant("twice", np.array([1, 1, 2, 2], np.float32))
    x = net.op("Relu", [net.conv("x", "c1", (3, 16), 3, 2)], "r1")
    x = net.op("MaxPool", [x], "p1", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    y = net.op("Clip", [net.conv(x, "c2", (16, 32), 1), "zero", "six"], "r2")
    y = net.op("Clip", [net.conv(y, "c3", (32, 32), 3, group=32), "zero", "six"], "r3")
    x = net.op("Add", [x, net.conv(y, "c4", (32, 16), 1)], "a1")
    y = net.op("Relu", [net.conv(x, "c5", (16, 8), 3)], "r5")
    z = net.op("Sigmoid", [net.conv(x, "c6", (16, 24), 1)], "s6")
    x = net.op("Concat", [y, z], "k1", axis=1)
    # Of nine, since the mean of an even count is often a tie, which falls as the order of a float sum has it.
    x = net.op("AveragePool", [x], "p2", kernel_shape=[3, 3], strides=[2, 2])
    modes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    x = net.op("Resize", [x, "", "twice"], "u1", **modes)
    x = net.op("GlobalAveragePool", [net.conv(x, "c7", (32, 32), 3)], "g1")
    x = net.op("Flatten", [x], "f1")
    weights = [net.weight("wy", 10, 32, spread=0.3), net.weight("by", 10, spread=0.1)]
    net.op("Gemm", [x, *weights], "y", transB=1)
    return net.model({"x": (1, 3, 32, 32)}, "y", (1, 10))


def text() -> onnx.ModelProto:
    """A layer of a transformer: products of activations, softmax, normalization, Gelu."""
    net = Net(2, 20)
    net.constant("heads", np.array([1, 12, 4, 8], np.int64))
    net.constant("joined", np.array([1, 12, 32], np.int64))
    net.constant("root", np.float32(8**0.5))
    parts: list[str] = []
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        x = net.op("MatMul", ["x", net.weight(f"w{name}", 32, 32, spread=0.2)], f"{name}1")
        x = net.op("Add", [x, net.weight(f"b{name}", 32, spread=0.1)], f"{name}2")
        x = net.op("Reshape", [x, "heads"], f"{name}3")
        parts.append(net.op("Transpose", [x], f"{name}4", perm=order))
    x = net.op("Div", [net.op("MatMul", parts[:2], "s1"), "root"], "s2")
    x = net.op("MatMul", [net.op("Softmax", [x], "s3", axis=-1), parts[2]], "s4")
    x = net.op("Reshape", [net.op("Transpose", [x], "s5", perm=[0, 2, 1, 3]), "joined"], "s6")
    x = net.op("Add", [net.op("MatMul", [x, net.weight("wo", 32, 32, spread=0.2)], "o1"), "x"], "o2")
    gains = [net.constant("gain", np.ones(32, np.float32)), net.constant("shift", np.zeros(32, np.float32))]
    x = net.op("LayerNormalization", [x, *gains], "n1")
    x = net.op("Gelu", [net.op("MatMul", [x, net.weight("w1", 32, 64, spread=0.2)], "f1")], "f2")
    net.op("MatMul", [x, net.weight("w2", 64, 32, spread=0.15)], "y")
    return net.model({"x": (1, 12, 32)}, "y", (1, 12, 32))


def exported() -> onnx.ModelProto:
    """As PyTorch exports training with quantization: weights are floats that the graph quantizes, biases are floats."""
    net = Net(3, 17)

    def activation(x: str, scale: float, zero: int) -> str:
        parameters = [net.constant(f"{x}_s", np.float32(scale)), net.constant(f"{x}_z", np.int8(zero))]
        q = net.op("QuantizeLinear", [x, *parameters], f"{x}_q")
        return net.op("DequantizeLinear", [q, *parameters], f"{x}_d")

    def weight(name: str, *shape: int) -> str:
        values = (net.random.standard_normal(shape) * 0.3).astype(np.float32)
        scales = np.abs(values).max(axis=tuple(range(1, len(shape)))) / np.float32(127)
        parameters = [net.constant(f"{name}_s", scales), net.constant(f"{name}_z", np.zeros(shape[0], np.int8))]
        q = net.op("QuantizeLinear", [net.constant(name, values), *parameters], f"{name}_q", axis=0)
        return net.op("DequantizeLinear", [q, *parameters], f"{name}_d", axis=0)

    x = activation("x", 0.03, 3)
    inputs = [x, weight("w1", 8, 3, 3, 3), net.weight("b1", 8, spread=0.1)]
    x = activation(net.op("Relu", [net.op("Conv", inputs, "c1", pads=[1] * 4)], "r1"), 0.05, -128)
    x = net.op("MaxPool", [x], "p1", kernel_shape=[2, 2], strides=[2, 2])
    inputs = [x, weight("w2", 8, 8, 1, 1), net.weight("b2", 8, spread=0.1)]
    y = activation(net.op("Conv", inputs, "c2"), 0.08, 10)
    x = activation(net.op("Relu", [net.op("Add", [x, y], "a1")], "r2"), 0.07, -128)
    x = activation(net.op("ReduceMean", [x], "m1", axes=[2, 3], keepdims=0), 0.023, -128)
    turned = net.op("Transpose", [weight("w3", 10, 8)], "w3_t", perm=[1, 0])
    x = net.op("MatMul", [x, turned], "f1")
    net.op("Add", [x, net.weight("b3", 10, spread=0.1)], "y")
    return net.model({"x": (1, 3, 8, 8)}, "y", (1, 10))


NETS = {"vision": vision, "text": text}


def feeds(proto: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    """Seeded numbers for every input of a network."""
    random = np.random.default_rng(seed)
    sizes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in proto.graph.input}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}


class _Batches(CalibrationDataReader):
    def __init__(self, proto: onnx.ModelProto) -> None:
        self.left = [feeds(proto, 100 + seed) for seed in range(8)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def quantized(
    net: str,
    folder: Path,
    kind: str,
    activations: str = "QUInt8",
    weights: str = "QInt8",
    per_channel: bool = True,
    symmetric: bool = False,
) -> onnx.ModelProto:
    """The network quantized by ONNX Runtime; `kind` is QDQ, QOperator or dynamic."""
    proto = NETS[net]()
    source, target = folder / "float.onnx", folder / "quantized.onnx"
    onnx.save(proto, source)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "dynamic":
                quantize_dynamic(source, target, weight_type=QuantType[weights], per_channel=per_channel)
            else:
                quantize_static(
                    source,
                    target,
                    _Batches(proto),
                    quant_format=QuantFormat[kind],
                    per_channel=per_channel,
                    activation_type=QuantType[activations],
                    weight_type=QuantType[weights],
                    extra_options={"ActivationSymmetric": symmetric},
                )
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load(target)


_ZERO_POINTS = {
    "QuantizeLinear": 2,
    "QGemm": 8,
    "QLinearAdd": 7,
    "QLinearAveragePool": 4,
    "QLinearConcat": 1,
    "QLinearConv": 7,
    "QLinearGlobalAveragePool": 4,
    "QLinearMatMul": 7,
    "QLinearMul": 7,
    "QLinearSigmoid": 4,
    "QLinearSoftmax": 4,
}
"""Operators whose result is a quantized tensor: which input is its zero point."""


def cut(proto: onnx.ModelProto, known: Mapping[str, np.ndarray]) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The exposed model with every quantized tensor read from a new input instead, and those inputs' values.

    So each tensor is computed from the same integers as the reference's, and a tie that falls to the other side in one
    tensor does not spread to the next.
    """
    model = exposed(proto)
    given = {value.name for value in proto.graph.output}
    places = {name: f"{name}.given" for node in model.graph.node for name in node.output[:1] if _integers(known, name)}
    places = {name: place for name, place in places.items() if name not in given}
    for node in model.graph.node:
        node.input[:] = [places.get(name, name) for name in node.input]
    for name, place in places.items():
        kind = helper.np_dtype_to_tensor_dtype(known[name].dtype)
        model.graph.input.append(helper.make_tensor_value_info(place, kind, known[name].shape))
    del model.graph.value_info[:]
    return model, {place: known[name] for name, place in places.items()}


def _integers(known: Mapping[str, np.ndarray], name: str) -> bool:
    return name in known and known[name].dtype.kind in "iu"


def exposed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every quantized tensor among its outputs."""
    model = onnx.ModelProto.FromString(proto.SerializeToString())
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    given = {value.name for value in model.graph.output}
    for node in model.graph.node:
        place = _ZERO_POINTS.get(node.op_type)
        if place is None or len(node.input) <= place or node.input[0] in types or node.output[0] in given:
            continue  # no tensor, a weight, or shown already
        model.graph.output.append(helper.make_tensor_value_info(node.output[0], types[node.input[place]], None))
    return model


def reference(proto: onnx.ModelProto, inputs: Mapping[str, np.ndarray], literal: bool = False) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes, with its fusions into integer kernels, or operator by operator if `literal`.

    Without the option set here its products of uint8 and int8 saturate on x86 machines that lack VNNI.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    if literal:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(None, dict(inputs))), strict=True))
