"""Random graphs of quantizers and operators that move elements: the passes change no integer of the results."""

from __future__ import annotations

import numpy as np
import onnx
from graph_support import run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from nestc.graph import pipeline
from nestc.importers.onnx import load

SCALES = (0.5, 0.25, 0.3, 0.07)
ZEROS = (0, 3, 128, 255)
STEPS = ("quantize", "pool", "transpose", "slice", "pad", "relu", "clip", "concat", "reshape", "upsample", "negate")


class Graph:
    """A graph that grows from one uint8 image; `values` are the float tensors so far, all of rank 4."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.integers: list[str] = []

    def constant(self, array: np.ndarray) -> str:
        name = f"k{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def parameters(self, choice: int) -> list[str]:
        scale, zero = np.float32(SCALES[choice % 4]), np.uint8(ZEROS[choice // 4 % 4])
        return [self.constant(scale), self.constant(zero)]

    def op(self, op_type: str, inputs: list[str], shape: tuple[int, ...], **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        self.shapes[name] = shape
        return name

    def quantized(self, x: str, choice: int) -> str:
        parameters = self.parameters(choice)
        q = self.op("QuantizeLinear", [x, *parameters], self.shapes[x])
        self.integers.append(q)
        return self.op("DequantizeLinear", [q, *parameters], self.shapes[x])

    def step(self, kind: str, x: str, other: str, choice: int) -> str:
        shape = self.shapes[x]
        n, c, h, w = shape
        if kind == "quantize":
            return self.quantized(x, choice)
        if kind == "pool" and min(h, w) > 1:
            return self.op("MaxPool", [x], (n, c, h - 1, w - 1), kernel_shape=[2, 2])
        if kind == "transpose":
            return self.op("Transpose", [x], (n, h, w, c), perm=[0, 2, 3, 1])
        if kind == "slice" and h > 1:
            ends = [self.constant(np.array([k], np.int64)) for k in (1, h, 2)]
            return self.op("Slice", [x, *ends], (n, c, h - 1, w))
        if kind == "pad" and max(shape) < 12:
            pads = self.constant(np.array([0, 0, 1, 0, 0, 0, 0, 2], np.int64))
            number = self.constant(np.float32((0.0, 0.5, 1.3, -2.0)[choice % 4]))
            return self.op("Pad", [x, pads, number], (n, c, h + 1, w + 2))
        if kind == "relu":
            return self.op("Relu", [x], shape)
        if kind == "clip":
            bounds = [self.constant(np.float32(number)) for number in ((0, 6), (-1, 2.2), (0, 100), (1, 3))[choice % 4]]
            return self.op("Clip", [x, *bounds], shape)
        if kind == "concat" and self.shapes[other][2:] == shape[2:] and c + self.shapes[other][1] < 20:
            return self.op("Concat", [x, other], (n, c + self.shapes[other][1], h, w), axis=1)
        if kind == "reshape":
            return self.op("Reshape", [x, self.constant(np.array([n, h, c, w], np.int64))], (n, h, c, w))
        if kind == "upsample" and max(shape) < 12:
            scales = self.constant(np.array([1, 1, 2, 1], np.float32))
            modes = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "mode": "nearest"}
            return self.op("Resize", [x, "", scales], (n, c, 2 * h, w), **modes)
        if kind == "negate":
            return self.op("Neg", [x], shape)
        return x

    def model(self, outputs: list[str]) -> onnx.ModelProto:
        image = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 3, 4, 5])
        given = [helper.make_tensor_value_info(name, TensorProto.UINT8, self.shapes[name]) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", [image], given, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


choices = st.integers(0, 15)
steps = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 3), st.integers(0, 3), choices), min_size=2, max_size=10
)


@settings(max_examples=40, deadline=None)
@given(steps, choices, choices, st.integers(0, 1 << 16))
def test_integers_stay_the_same(made: list[tuple[str, int, int, int]], first: int, last: int, seed: int) -> None:
    graph = Graph()
    graph.shapes["x"] = (1, 3, 4, 5)
    values = [graph.op("DequantizeLinear", ["x", *graph.parameters(first)], (1, 3, 4, 5))]
    for kind, which, other, choice in made:
        values.append(graph.step(kind, values[-1 - which % len(values)], values[-1 - other % len(values)], choice))
    graph.quantized(values[-1], last)
    outputs = sorted({graph.integers[-1], graph.integers[len(graph.integers) // 2]})
    model = load(graph.model(outputs))
    inputs = {"x": np.random.default_rng(seed).integers(0, 256, (1, 3, 4, 5), dtype=np.uint8)}
    expected = run(model, inputs, literal=True)
    found = run(pipeline.optimize(model), inputs, literal=True)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
