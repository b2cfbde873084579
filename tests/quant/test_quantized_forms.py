"""Other forms of operators in int8: near float, and ours as ONNX Runtime computes them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qdq_support import calibrated, lines, net, quantized, run, samples

import nestc

FORMS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "transposed convolution": (
        "g (float[1,4,5,5] x) => (float[1,3,11,11] y) { y = ConvTranspose <strides=[2,2]> (x, w, b) }",
        {"w": (4, 3, 3, 3), "b": (3,)},
    ),
    "transposed convolution of groups": (
        "g (float[1,4,5,5] x) => (float[1,6,7,7] y) { y = ConvTranspose <group=2> (x, w, b) }",
        {"w": (4, 3, 3, 3), "b": (6,)},
    ),
    "depthwise convolution": (
        "g (float[1,8,6,6] x) => (float[1,8,6,6] y) { y = Conv <group=8, pads=[1,1,1,1]> (x, w, b) }",
        {"w": (8, 1, 3, 3), "b": (8,)},
    ),
    "convolution in one dimension": (
        "g (float[2,4,16] x) => (float[2,6,7] y) { y = Conv <strides=[2]> (x, w) }",
        {"w": (6, 4, 3)},
    ),
    "scaled Gemm of a transposed weight": (
        "g (float[3,8] x) => (float[3,5] y) { y = Gemm <transB=1, alpha=0.5, beta=2.0> (x, w, b) }",
        {"w": (5, 8), "b": (5,)},
    ),
    "Gemm with one bias for all": (
        "g (float[3,8] x) => (float[3,5] y) { y = Gemm (x, w, b) }",
        {"w": (8, 5), "b": (1,)},
    ),
    "Gemm with a bias a row": (
        "g (float[3,8] x) => (float[3,5] y) { y = Gemm (x, w, b) }",
        {"w": (8, 5), "b": (3, 1)},
    ),
    "matrix by vector": ("g (float[3,8] x) => (float[3] y) { y = MatMul (x, w) }", {"w": (8,)}),
    "a constant on the left": ("g (float[8,3] x) => (float[5,3] y) { y = MatMul (w, x) }", {"w": (5, 8)}),
    "a batch of weights": ("g (float[2,3,8] x) => (float[2,3,5] y) { y = MatMul (x, w) }", {"w": (2, 8, 5)}),
    "two activations": (
        "g (float[2,3,8] x, float[2,8,4] z) => (float[2,3,4] y) { y = MatMul (x, z) }",
        {},
    ),
    "attention written out": (
        """g (float[2,6,8] x) => (float[2,6,8] y) {
            q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)  t = Transpose <perm=[0,2,1]> (k)
            s = MatMul (q, t)  p = Softmax (s)  y = MatMul (p, v) }""",
        {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8)},
    ),
    "moves of many kinds": (
        """g (float[1,4,8,8] x) => (float[1,2,4,4] y) {
            a = Conv (x, w1)  b, c = Split <axis=1, num_outputs=2> (a)
            starts = Constant <value=int64[2] {1,1}> ()  ends = Constant <value=int64[2] {7,7}> ()
            axes = Constant <value=int64[2] {2,3}> ()  d = Slice (b, starts, ends, axes)
            pads = Constant <value=int64[8] {0,0,1,1,0,0,1,1}> ()  e = Pad (d, pads)
            f = SpaceToDepth <blocksize=2> (e)  i = Transpose <perm=[0,1,3,2]> (f)  y = Conv (i, w2) }""",
        {"w1": (4, 4, 1, 1), "w2": (2, 8, 1, 1)},
    ),
    "constants among activations": (
        """g (float[1,2,4,4] x) => (float[1,2,4,4] y) {
            a = Conv (x, w1)  n = Tanh (a)  m = Mul (a, k)  s = Add (m, n)  c = Concat <axis=1> (s, k)
            y = Conv (c, w2) }""",
        {"w1": (2, 2, 1, 1), "k": (1, 2, 4, 4), "w2": (2, 4, 1, 1)},
    ),
    "a gate": (
        """g (float[1,4,4,4] x) => (float[1,4,4,4] y) {
            a = Conv (x, w1)  r = HardSwish (a)  p = GlobalAveragePool (r)  q = Conv (p, w2)  u = Relu (q)
            v = Conv (u, w3)  s = Sigmoid (v)  m = Mul (r, s)  y = Conv (m, w4) }""",
        {"w1": (4, 4, 1, 1), "w2": (2, 4, 1, 1), "w3": (4, 2, 1, 1), "w4": (4, 4, 1, 1)},
    ),
    "means and enlarged maps": (
        """g (float[1,4,4,4] x) => (float[1,4,8,8] y) {
            a = Conv (x, w1)  p = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (a)
            s = Constant <value_floats=[1.0, 1.0, 2.0, 2.0]> ()
            u = Resize <mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"> (p, , s)
            y = Conv (u, w2) }""",
        {"w1": (4, 4, 1, 1), "w2": (4, 4, 1, 1)},
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", ["int8", "int8-pow2"])
def test_forms(form: str, scheme: str) -> None:
    graph, shapes = FORMS[form]
    model = net(graph, **shapes)
    made = nestc.quantize(model, calibrated(model), scheme)
    assert any(node.op_type == "QuantizeLinear" for node in made.ir.graph)
    inputs = samples(model)[1]
    expected = run(made, inputs)["y"]
    real = run(model, inputs)["y"]
    assert np.square(real - expected).sum() < np.square(real).sum() * (0.003 if scheme == "int8" else 0.03)
    ours = nestc.compile(made, threads=1).run(inputs)["y"]
    # A sum that falls between two integers may round otherwise, which later products carry on.
    close = np.isclose(ours, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))
    assert close.mean() > 0.9 and np.abs(ours - expected).max() <= 0.03 * np.abs(expected).max()


def test_open_dimensions_stay_open() -> None:
    model = net("g (float[N,8] x) => (float[N,5] y) { h = Gemm (x, w1, b1)  r = Relu (h)  y = Gemm (r, w2) }",
        w1=(8, 8), b1=(8,), w2=(8, 5))  # fmt: skip
    batches = [{"x": np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)}]
    made = nestc.quantize(model, nestc.calibrate(model, batches))
    assert [value.shape for value in made.ir.graph.outputs] == [value.shape for value in model.ir.graph.outputs]
    assert "r_QuantizeLinear:uint8 = QuantizeLinear(r, r_scale, r_zero_point:uint8)" in lines(made)
    for size in (1, 3):
        x = {"x": batches[0]["x"][:size]}
        np.testing.assert_allclose(nestc.compile(made).run(x)["y"], run(made, x)["y"], atol=1e-4)


def test_weights_shared_by_two_nodes_are_stored_once() -> None:
    model = net("""g (float[2,4] x, float[2,4] z) => (float[2,4] y) {
        a = MatMul (x, w)  b = MatMul (z, w)  y = Add (a, b) }""", w=(4, 4))  # fmt: skip
    made = quantized(model)
    kinds = [value.dtype for value in made.ir.graph.initializers.values()]
    assert kinds.count(ir.DataType.INT8) == 2  # the weight and its zero points
