"""Each pass for quantized models on a small graph: what it becomes, and that ONNX Runtime computes the same.

ONNX Runtime runs with its optimizations off, so that each operator computes what ONNX defines for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import pytest
from graph_support import assert_same, feeds, parse, run, text

from nestc.graph import pipeline
from nestc.graph.model import Model
from nestc.graph.passes.fold_constants import LiftConstants
from nestc.graph.passes.implied_clamps import ImpliedClamps
from nestc.graph.passes.integer_moves import IntegerMoves
from nestc.graph.passes.integer_operators import IntegerOperators
from nestc.graph.passes.own_dequantize import NarrowViews, OwnDequantize
from nestc.graph.passes.quantized_weights import DequantizeWeights, QuantizeWeights
from nestc.graph.passes.rewrite import Rewrite
from nestc.graph.qdq import Quantization


@dataclass
class Case:
    """A graph, the pass, and the text of the graph after it (`same`: the pass must leave it alone).

    Scales s = 0.5, t = 0.25 and zero points z = 3, o = 0 (uint8) and i = 0 (int8) are known to every graph.
    `within` is by how much results may differ, in units of the scale (0: not at all).
    """

    name: str
    step: type[Rewrite]
    graph: str
    after: str = ""
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    same: bool = False
    within: float = 0.0


COMMON = {
    "s": np.float32(0.5),
    "t": np.float32(0.25),
    "z": np.uint8(3),
    "o": np.uint8(0),
    "i": np.int8(0),
}
WEIGHTS = {
    "w": np.array([[[[1]]], [[[-2]]]], np.int8),
    "ws": np.array([0.5, 0.125], np.float32),
    "wz": np.array([0, 0], np.int8),
    "b": np.array([40, -8], np.int32),
}
MATRIX = {"w": np.array([[1, -2], [3, 4]], np.int8), "ws": np.array([0.5, 0.25], np.float32)}

CASES = [
    Case(
        "a quantized convolution",
        IntegerOperators,
        "g (uint8[1,1,2,2] x) => (uint8[1,2,2,2] y) { y = QLinearConv(x, s, z, w, ws, wz, t, o, b) }",
        "y.x = DequantizeLinear(x, 0.5, 3.0)\n"
        "y.w = DequantizeLinear([[[[1.0]]], [[[-2.0]]]], [0.5, 0.125], [0.0, 0.0]) {axis=0}\n"
        "y.bias = DequantizeLinear([40.0, -8.0], [0.25, 0.0625]) {axis=0}\n"
        "y.real = Conv(y.x, y.w, y.bias)\n"
        "y = QuantizeLinear(y.real, 0.25, 0.0)",
        WEIGHTS,
    ),
    Case(
        "a quantized product with a scale a column",
        IntegerOperators,
        "g (uint8[3,2] x) => (uint8[3,2] y) { y = QLinearMatMul(x, s, z, w, ws, k, t, z) }",
        "y.a = DequantizeLinear(x, 0.5, 3.0)\n"
        "y.b = DequantizeLinear([[1.0, -2.0], [3.0, 4.0]], [0.5, 0.25], [0.0, 1.0]) {axis=1}\n"
        "y.real = MatMul(y.a, y.b)\n"
        "y = QuantizeLinear(y.real, 0.25, 3.0)",
        {**MATRIX, "k": np.array([0, 1], np.int8)},
    ),
    Case(
        "float weights that are quantized at run time are weights of integers",
        QuantizeWeights,
        """g (float[3,2] x) => (float[3,2] y) {
            q = QuantizeLinear<axis=1>(f, ws, k)  d = DequantizeLinear<axis=1>(q, ws, k)  y = MatMul(x, d) }""",
        "d = DequantizeLinear([[2.0, 127.0], [0.0, -127.0]], [0.5, 0.25], [0.0, 1.0]) {axis=1}\ny = MatMul(x, d)",
        {
            "f": np.array([[1.1, 99], [0.25, -32]], np.float32),
            "k": np.array([0, 1], np.int8),
            "ws": MATRIX["ws"],
        },
    ),
    Case(
        "weights of 4 bits",
        QuantizeWeights,
        "g (float[3,2] x) => (float[3,2] y) { q = QuantizeLinear<output_dtype=22>(f, s)"
        " d = DequantizeLinear(q, s)  y = MatMul(x, d) }",
        "d = DequantizeLinear([[2.0, 7.0], [0.0, -8.0]], 0.5)\ny = MatMul(x, d)",
        {"f": np.array([[1.1, 99], [0.25, -32]], np.float32)},
    ),
    Case(
        "a weight stays as integers for a product, not for others, and not beside a float activation",
        DequantizeWeights,
        """g (float[1,1,2,2] x, float[2,2] v) => (float[1,2,2,2] y, float[2,2] u, float[2,2] r) {
            d = DequantizeLinear<axis=0>(w, ws)  y = Conv(x, d)
            e = DequantizeLinear(m, s)  u = MatMul(v, e)  r = Mul(v, e) }""",
        "y = Conv(x, [[[[0.5]]], [[[-0.25]]]])\n"
        "e = DequantizeLinear([[1.0, -2.0], [3.0, 4.0]], 0.5)\nu = MatMul(v, e)\nr = Mul(v, [[0.5, -1.0], [1.5, 2.0]])",
        {"w": WEIGHTS["w"], "ws": WEIGHTS["ws"], "m": MATRIX["w"]},
    ),
    Case(
        "weights and bias stay as integers beside a quantized activation",
        DequantizeWeights,
        """g (uint8[1,1,2,2] x) => (float[1,2,2,2] y) {
            a = DequantizeLinear(x, s, z)  d = DequantizeLinear<axis=0>(w, ws)
            e = DequantizeLinear<axis=0>(b, ws)  y = Conv(a, d, e) }""",
        weights={name: WEIGHTS[name] for name in ("w", "ws", "b")},
        same=True,
    ),
    Case(
        "an elementwise operator has the weight as floats",
        DequantizeWeights,
        """g (uint8[3,2] x) => (float[3,2] y) {
            a = DequantizeLinear(x, s, z)  d = DequantizeLinear<axis=0>(w, ws)  y = Add(a, d) }""",
        "a = DequantizeLinear(x, 0.5, 3.0)\ny = Add(a, [1.0, -0.5])",
        {"w": np.array([2, -2], np.int8), "ws": MATRIX["ws"]},
    ),
    Case(
        "each consumer has its own dequantizer",
        OwnDequantize,
        "g (uint8[4] x) => (float[4] y, float[4] u) { d = DequantizeLinear(x, s, z)  y = Relu(d)  u = Add(d, d) }",
        "d.DequantizeLinear = DequantizeLinear(x, 0.5, 3.0)\n"
        "d.DequantizeLinear.1 = DequantizeLinear(x, 0.5, 3.0)\n"
        "d = DequantizeLinear(x, 0.5, 3.0)\n"
        "y = Relu(d)\nu = Add(d.DequantizeLinear, d.DequantizeLinear.1)",
    ),
    Case(
        "but two that would dequantize each element many times share one",
        OwnDequantize,
        """g (uint8[4] x, float[3,4] v) => (float[4] y, float[3,4] u, float[3,4] w) {
            d = DequantizeLinear(x, s, z)  y = Exp(d)  u = Add(d, v)  w = Mul(v, d) }""",
        "d.DequantizeLinear = DequantizeLinear(x, 0.5, 3.0)\nd = DequantizeLinear(x, 0.5, 3.0)\n"
        "y = Exp(d.DequantizeLinear)\nu = Add(d, v)\nw = Mul(v, d)",
    ),
    Case(
        "each consumer widens bfloat16 itself",
        OwnDequantize,
        "g (float[4] x) => (float[4] y, float[4] u) { n = Cast<to=16>(x)  d = Cast<to=1>(n)  y = Relu(d)  u = Exp(d) }",
        "n = Cast(x) {to=16}\nd.Cast = Cast(n) {to=1}\nd = Cast(n) {to=1}\ny = Relu(d)\nu = Exp(d.Cast)",
    ),
    Case(
        "a view of widened numbers",
        NarrowViews,
        "g (float[2,2] x) => (float[1,4] y, float[2,2] f) "
        "{ n = Cast<to=16>(x)  d = Cast<to=1>(n)  e = Flatten<axis=0>(d)  f = Exp(d)  y = Relu(e) }",
        "n = Cast(x) {to=16}\nd = Cast(n) {to=1}\ne.narrow = Flatten(n) {axis=0}\ne.Cast = Cast(e.narrow) {to=1}\n"
        "f = Exp(d)\ny = Relu(e.Cast)",
    ),
    Case(
        "quantizing what was dequantized by the same numbers",
        IntegerMoves,
        "g (uint8[4] x) => (uint8[4] y) { d = DequantizeLinear(x, s, z)  y = QuantizeLinear(d, s, z) }",
        "y = Identity(x)",
    ),
    Case(
        "but not by others",
        IntegerMoves,
        "g (uint8[4] x) => (uint8[4] y) { d = DequantizeLinear(x, s, z)  y = QuantizeLinear(d, t, z) }",
        same=True,
    ),
    Case(
        "movements and a maximum between integers",
        IntegerMoves,
        """g (uint8[1,4,4,4] x) => (uint8[1,4,1,5] y) {
            d = DequantizeLinear(x, s, z)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(d)
            t1 = Transpose<perm=[0,2,3,1]>(m)  one = Constant<value=int64[1] {1}>()
            zero = Constant<value=int64[1] {0}>()  two = Constant<value=int64[1] {2}>()
            c = Slice(t1, zero, one, one)  e = Transpose<perm=[0,3,1,2]>(c)
            p = Constant<value=int64[8] {0,0,0,1,0,0,0,2}>()  h = Constant<value_float=1.0>()
            f = Pad(e, p, h)  y = QuantizeLinear(f, s, z) }""",
        "m.integer = MaxPool(x) {kernel_shape=(2, 2), strides=(2, 2)}\n"
        "t1.integer = Transpose(m.integer) {perm=(0, 2, 3, 1)}\n"
        "c.integer = Slice(t1.integer, [0.0], [1.0], [1.0])\n"
        "e.integer = Transpose(c.integer) {perm=(0, 3, 1, 2)}\n"
        "y = Pad(e.integer, p, 5.0)",
    ),
    Case(
        "padding with a number that no integer stands for",
        IntegerMoves,
        """g (uint8[2] x) => (uint8[4] y) {
            d = DequantizeLinear(x, s, z)  p = Constant<value=int64[2] {1,1}>()  h = Constant<value_float=0.3>()
            f = Pad(d, p, h)  y = QuantizeLinear(f, s, z) }""",
        # Quantizing above the Pad is right, whatever it pads with, and meets the dequantizer there.
        "y = Pad(x, [1.0, 1.0], 4.0)",
    ),
    Case(
        "the parts of a Split, one of them not quantized again",
        IntegerMoves,
        """g (uint8[4] x) => (uint8[2] y, float[2] u) {
            d = DequantizeLinear(x, s, z)  a, b = Split<num_outputs=2>(d)
            y = QuantizeLinear(a, s, z)  u = Relu(b) }""",
        "y, b.integer = Split(x) {num_outputs=2}\n"
        "b.DequantizeLinear = DequantizeLinear(b.integer, 0.5, 3.0)\nu = Relu(b.DequantizeLinear)",
    ),
    Case(
        "a concatenation of equal scales, and one of different ones",
        IntegerMoves,
        """g (uint8[2] x, uint8[2] v) => (uint8[4] y, uint8[4] u) {
            a = DequantizeLinear(x, s, z)  b = DequantizeLinear(v, s, z)  c = Concat<axis=0>(a, b)
            y = QuantizeLinear(c, s, z)
            e = DequantizeLinear(v, t, o)  f = Concat<axis=0>(a, e)  u = QuantizeLinear(f, s, z) }""",
        "y = Concat(x, v) {axis=0}\n"
        "e = DequantizeLinear(v, 0.25, 0.0)\n"
        "e.QuantizeLinear = QuantizeLinear(e, 0.5, 3.0)\n"
        "u = Concat(x, e.QuantizeLinear) {axis=0}",
    ),
    Case(
        "the quantizer of a pooled value goes to whoever computed it",
        IntegerMoves,
        """g (float[1,1,4,4] x) => (uint8[1,1,8] y) {
            e = Exp(x)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(e)
            n = Constant<value=float[4] {1.0,1.0,1.0,2.0}>()
            r = Resize<mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric">(m, , n)
            k = Constant<value=int64[3] {1,1,8}>()  v = Reshape(r, k)  y = QuantizeLinear(v, s, z) }""",
        "e = Exp(x)\n"
        "e.QuantizeLinear = QuantizeLinear(e, 0.5, 3.0)\n"
        "m.integer = MaxPool(e.QuantizeLinear) {kernel_shape=(2, 2), strides=(2, 2)}\n"
        "r.integer = Resize(m.integer, , [1.0, 1.0, 1.0, 2.0])"
        " {coordinate_transformation_mode=asymmetric, mode=nearest, nearest_mode=floor}\n"
        "y = Reshape(r.integer, [1.0, 1.0, 8.0])",
    ),
    Case(
        "but not if somebody else uses that value, or the pooled one",
        IntegerMoves,
        """g (float[4,4] x) => (uint8[16] y, float[4,4] u, float[4,4] v) {
            e = Exp(x)  n = Constant<value=int64[1] {16}>()  r = Reshape(e, n)  y = QuantizeLinear(r, s, z)
            u = Relu(e)  v = Neg(e) }""",
        same=True,
    ),
    Case(
        "a mean is no movement",
        IntegerMoves,
        """g (uint8[1,1,4,4] x) => (uint8[1,1,2,2] y) {
            d = DequantizeLinear(x, s, z)  m = AveragePool<kernel_shape=[2,2], strides=[2,2]>(d)
            y = QuantizeLinear(m, s, z) }""",
        same=True,
    ),
    Case(
        "clamps between equal scales",
        IntegerMoves,
        """g (uint8[4] x) => (uint8[4] y) {
            l = Constant<value_float=1.0>()  h = Constant<value_float=6.1>()
            d = DequantizeLinear(x, s, z)  c = Clip(d, l, h)  y = QuantizeLinear(c, s, z) }""",
        "y = Clip(x, 5.0, 15.0)",
    ),
    Case(
        "the place of the largest integer",
        IntegerMoves,
        "g (uint8[4,3] x) => (int64[4,1] y) { d = DequantizeLinear(x, s, z)  y = ArgMax<axis=1>(d) }",
        "y = ArgMax(x) {axis=1}",
    ),
    Case(
        "a weight is turned with its scales",
        IntegerMoves,
        """g (float[3,2] x) => (float[3,2] y) {
            d = DequantizeLinear<axis=0>(w, ws)  e = Transpose(d)  y = MatMul(x, e) }""",
        "e.DequantizeLinear = DequantizeLinear([[1.0, 3.0], [-2.0, 4.0]], [0.5, 0.25]) {axis=1}\n"
        "y = MatMul(x, e.DequantizeLinear)",
        MATRIX,
    ),
    Case(
        "a weight in blocks is turned with its scales",
        IntegerMoves,
        """g (float[3,4] x) => (float[3,2] y) {
            d = DequantizeLinear<axis=1, block_size=2>(w, ws)  e = Transpose(d)  y = MatMul(x, e) }""",
        "e.DequantizeLinear = DequantizeLinear(e.integer, [[0.5, 1.0], [0.25, 2.0]]) {axis=0, block_size=2}\n"
        "y = MatMul(x, e.DequantizeLinear)",
        {
            "w": np.array([[1, -2, 3, 4], [5, 6, -7, 8]], np.int8),
            "ws": np.array([[0.5, 0.25], [1.0, 2.0]], np.float32),
        },
    ),
    Case(
        "a view of a weight keeps the axis of its scales",
        IntegerMoves,
        """g (uint8[1,1,2,2] x) => (float[1,2,2,2] y) {
            a = DequantizeLinear(x, s, z)  d = DequantizeLinear<axis=0>(w, ws)
            n = Constant<value=int64[4] {2,1,1,1}>()  e = Reshape(d, n)  y = Conv(a, e) }""",
        "a = DequantizeLinear(x, 0.5, 3.0)\n"
        "e.DequantizeLinear = DequantizeLinear([[[[1.0]]], [[[-2.0]]]], [0.5, 0.25]) {axis=0}\n"
        "y = Conv(a, e.DequantizeLinear)",
        {"w": np.array([1, -2], np.int8), "ws": MATRIX["ws"]},
    ),
    Case(
        "clamps that saturation implies",
        ImpliedClamps,
        """g (float[4] x) => (uint8[4] y, uint8[4] v, uint8[4] u) {
            l = Constant<value_float=0.0>()  h = Constant<value_float=127.5>()
            a = Relu(x)  y = QuantizeLinear(a, s, o)
            c = Clip(x, l, h)  v = QuantizeLinear(c, s, o)
            e = Relu(x)  u = QuantizeLinear(e, s, z) }""",
        "y = QuantizeLinear(x, 0.5, 0.0)\nv = QuantizeLinear(x, 0.5, 0.0)\n"
        "e = Relu(x)\nu = QuantizeLinear(e, 0.5, 3.0)",
    ),
    Case(
        "clamps that cut nothing of what was dequantized",
        ImpliedClamps,
        """g (uint8[4] x) => (float[4] y, float[4] u) {
            d = DequantizeLinear(x, s, o)  a = Relu(d)  y = Exp(a)
            e = DequantizeLinear(x, s, z)  b = Relu(e)  u = Neg(b) }""",
        "d = DequantizeLinear(x, 0.5, 0.0)\ny = Exp(d)\ne = DequantizeLinear(x, 0.5, 3.0)\nb = Relu(e)\nu = Neg(b)",
    ),
]


def build(case: Case) -> Model:
    used = {name: value for name, value in COMMON.items() if name not in case.weights}
    model = parse(case.graph, **case.weights, **used)
    LiftConstants()(model.ir)
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pass(case: Case) -> None:
    model = build(case)
    before, shown = run(model, inputs := feeds(model), literal=True), text(model)
    notes: list[str] = []
    modified = case.step(notes)(model.ir).modified
    assert text(model) == (shown if case.same else case.after)
    assert modified is not case.same
    assert bool(notes) is modified
    found = run(model, inputs, literal=True)
    for a, b in zip(before, found, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(b.astype(np.float64), a.astype(np.float64), rtol=1e-6, atol=case.within)
    assert not case.step()(model.ir).modified  # once is enough


def test_all_passes_together_leave_integers_between_two_convolutions() -> None:
    graph = """g (uint8[1,2,8,8] x) => (uint8[1,2,2,2] y) {
        a = DequantizeLinear(x, s, o)  d = DequantizeLinear<axis=0>(w, ws)
        c = Conv<kernel_shape=[1,1]>(a, d)  r = Relu(c)  q = QuantizeLinear(r, t, o)  e = DequantizeLinear(q, t, o)
        m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(e)  n = QuantizeLinear(m, t, o)  f = DequantizeLinear(n, t, o)
        g = DequantizeLinear<axis=0>(w, ws)
        h = Conv<kernel_shape=[1,1], strides=[2,2]>(f, g)  y = QuantizeLinear(h, s, z) }"""
    weights = {"w": np.array([1, 2, -3, 4], np.int8).reshape(2, 2, 1, 1), "ws": MATRIX["ws"]}
    model = parse(graph, **weights, **{name: COMMON[name] for name in "stzo"})
    optimized = pipeline.optimize(model)
    weights = ["DequantizeLinear"] * 2
    between = ["QuantizeLinear", "MaxPool", "DequantizeLinear"]
    found = [node.op_type for node in optimized.ir.graph]
    assert found == [*weights[:1], "DequantizeLinear", *weights[1:], "Conv", *between, "Conv", "QuantizeLinear"]
    inputs = feeds(model)
    assert_same(run(model, inputs, literal=True), run(optimized, inputs, literal=True), 0)


@pytest.mark.parametrize("dtype", ["UINT8", "INT8", "INT16", "UINT16", "INT4", "UINT4"])
def test_the_numpy_meaning_is_that_of_onnx_runtime(dtype: str) -> None:
    kind = ir.DataType[dtype]
    low, high = Quantization(kind, np.float32(1), np.int64(0)).limits
    zero_point = np.array((low + high) // 2 + 1)
    x = np.linspace(-1.3, 1.3, 4001).astype(np.float32) * np.float32(high - low)
    scale = np.float32(0.7)
    constants = {"s": scale, "z": zero_point.astype(kind.numpy())}
    model = parse(
        "g (float[4001] x) => (float[4001] y) { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }",
        **constants,
    )
    parameters = Quantization(kind, scale, zero_point)
    (expected,) = run(model, {"x": x}, literal=True)
    np.testing.assert_array_equal(parameters.dequantize(parameters.quantize(x)), expected)
