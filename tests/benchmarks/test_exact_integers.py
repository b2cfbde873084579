"""The exact reference of quantized graphs, beside ONNX Runtime, which rounds only halves otherwise."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper

NETS = {
    "a convolution a channel, with a sum": """
        a = DequantizeLinear(x, s0, z)  w = DequantizeLinear<axis=0>(wq, sw)  b = DequantizeLinear<axis=0>(bq, sb)
        c = Conv<pads=[1,0,1,2], strides=[2,1], dilations=[1,2]>(a, w, b)  r = Clip(c, low, high)
        q = QuantizeLinear(r, s1, z)  d = DequantizeLinear(q, s1, z)  w2 = DequantizeLinear(wd, s0)
        e = Conv<group=8>(d, w2)  t = Add(d, e)  u = Relu(t)  y = QuantizeLinear(u, s2, z) """,
    "pools and a product": """
        a = DequantizeLinear(x, s0, z)  m = MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(a)
        v = AveragePool<kernel_shape=[2,2], pads=[0,0,0,0]>(m)  q = QuantizeLinear(v, s0, z)
        d = DequantizeLinear(q, s0, z)  g = GlobalAveragePool(d)  f = Flatten(g)
        h = QuantizeLinear(f, s2, z)  k = DequantizeLinear(h, s2, z)  w = DequantizeLinear<axis=0>(wg, sw)
        p = Gemm<transB=1>(k, w, bg)  y = QuantizeLinear(p, s1, z) """,
    "a concatenation of different scales, cut and padded": """
        a = DequantizeLinear(x, s0, z)  b = DequantizeLinear(x, s2, z)  c = Concat<axis=1>(a, b)
        p = Pad(c, pads)  n = Sub(p, one)  o = Min(n, column)  i, j = Split<axis=1>(o, halves)
        k = Mul(i, factor)  l = Max(k, j)  y = QuantizeLinear(l, s1, z) """,
}


def constants() -> dict[str, np.ndarray]:
    random = np.random.default_rng(4)
    scales = np.exp2(random.integers(-9, -4, 8)).astype(np.float32)
    return {
        "s0": np.float32(0.0625), "s1": np.float32(0.25), "s2": np.float32(0.03125), "z": np.int8(0), "sw": scales,
        "sb": scales / 16, "low": np.float32(-0.3), "high": np.float32(3.1), "one": np.float32(0.7),
        "wq": random.integers(-128, 128, (8, 4, 3, 3)).astype(np.int8),
        "bq": random.integers(-5000, 5000, 8).astype(np.int32),
        "wd": random.integers(-128, 128, (8, 1, 1, 1)).astype(np.int8),
        "wg": random.integers(-128, 128, (8, 4)).astype(np.int8),
        "bg": random.standard_normal(8).astype(np.float32),
        "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2]), "halves": np.array([4, 4]),
        "column": random.uniform(0, 1, (8, 1, 1)).astype(np.float32), "factor": np.float32(1.5),
    }  # fmt: skip


@pytest.mark.parametrize("text", NETS.values(), ids=NETS)
def test_values_are_those_of_onnx_but_for_halves(text: str) -> None:
    from exact_integers import ExactGraph

    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (int8[2,4,9,7] x) => (int8[] y) {{{text}}}'
    )
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in constants().items() if name in used
    )
    del model.graph.output[:]
    rounded = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    real = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in (*rounded, *real))
    x = np.random.default_rng(1).integers(-128, 128, (2, 4, 9, 7)).astype(np.int8)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results = dict(zip((*rounded, *real), map(np.asarray, session.run(None, {"x": x})), strict=True))

    given = {"x": x}
    scales = {node.output[0]: node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for name, source in zip(rounded, real, strict=True):
        (found,) = ExactGraph(model).run([name], given).values()
        quotient = results[source].astype(np.float64) / constants()[scales[name]]
        np.testing.assert_array_equal(found, np.clip(np.floor(quotient + 0.5), -128, 127).astype(np.int8))
        off = found.astype(int) - results[name].astype(int)
        halves = quotient - np.floor(quotient) == 0.5
        assert set(np.unique(off)) <= {0, 1} and not np.any(off[~halves])
        given[name] = results[name]  # the next stage from the same integers


def test_halves_go_up() -> None:
    from exact_integers import ExactGraph

    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21]> g (int8[6] x) => (int8[6] y) <float one = {1}, float four = {4}, int8 z = {0}>
        { a = DequantizeLinear(x, one, z)  y = QuantizeLinear(a, four, z) }"""
    )
    x = np.array([-10, -6, -2, 2, 6, 127], np.int8)
    np.testing.assert_array_equal(ExactGraph(model).run(["y"], {"x": x})["y"], [-2, -1, 0, 1, 2, 32])


@pytest.mark.parametrize(
    "text, reason",
    [
        ("y = Sigmoid(x)", "Sigmoid .* has no exact reference"),
        ("y = Relu(t)", "'t' is neither computed nor given"),
        ("a = DequantizeLinear(x, s, z)  y = QuantizeLinear(a, s, z)", "no power of two"),
    ],
)
def test_what_it_cannot_do_is_said(text: str, reason: str) -> None:
    from exact_integers import ExactGraph

    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (int8[6] x) => (int8[6] y) <float s = {{3}}, int8 z = {{0}}> {{{text}}}'
    )
    with pytest.raises(ValueError, match=reason):
        ExactGraph(model).run(["y"], {"x": np.zeros(6, np.int8)})
