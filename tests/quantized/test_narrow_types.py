"""Integers of 16 and 4 bits, and scales that go with blocks, run in native code and give what ONNX defines."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from quantized_nets import reference

import nestc
from nestc.driver import explain

RANDOM = np.random.default_rng(5)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def check(text: str, inputs: Mapping[str, np.ndarray], tolerance: float = 1e-5, **weights: np.ndarray) -> None:
    """The same outputs as ONNX Runtime's operators one by one, and nothing for the host to do.

    `tolerance` is that of floats, relative to the largest of a tensor.
    """
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["":21]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    plan, _ = explain(proto)
    assert plan.fallback_ops == {}
    expected, found = reference(proto, inputs, literal=True), nestc.compile(proto).run(inputs)
    for name, wanted in expected.items():
        assert found[name].dtype == wanted.dtype
        scale = np.abs(wanted.astype(np.float64)).max()
        exact = wanted.dtype.kind in "iu"
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=0 if exact else tolerance * scale)


@pytest.mark.parametrize(
    ("dtype", "zero"),
    [
        ("int16", np.int16(5)),
        ("uint16", np.uint16(30000)),
        ("int4", ml_dtypes.int4(1)),
        ("uint4", ml_dtypes.uint4(7)),
    ],
)
def test_tensors_of_16_and_4_bits(dtype: str, zero: np.generic) -> None:
    text = """g (float[3,40] x) => (float[3,40] y, float[3,8] u) {
        q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z)
        r = DequantizeLinear(q, s, z)  u = MatMul(r, w) }"""
    check(text, {"x": floats(3, 40)}, s=np.array(0.3, np.float32), z=np.array(zero), w=floats(40, 8))


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4, np.int8])
def test_weights_in_blocks(dtype: type) -> None:
    weight = RANDOM.integers(0, 7, (64, 24)).astype(dtype)
    inputs = {"x": floats(5, 64)}
    text = """g (float[5,64] x) => (float[5,24] y) {
        d = DequantizeLinear<axis=0, block_size=32>(w, s)  y = MatMul(x, d) }"""
    check(text, inputs, w=weight, s=np.abs(floats(2, 24)))
    text = """g (float[5,64] x) => (float[5,24] y) {
        d = DequantizeLinear<axis=1, block_size=32>(w, s, z)  t = Transpose(d)  y = MatMul(x, t) }"""
    turned, zeros = np.ascontiguousarray(weight.T), RANDOM.integers(0, 7, (24, 2)).astype(dtype)
    check(text, inputs, w=turned, s=np.abs(floats(24, 2)), z=zeros)


def test_activations_in_blocks() -> None:
    text = """g (float[5,64] x) => (int8[5,64] q, float[5,64] y) {
        q = QuantizeLinear<axis=1, block_size=32, output_dtype=3>(x, s)
        y = DequantizeLinear<axis=1, block_size=32>(q, s) }"""
    check(text, {"x": floats(5, 64)}, s=np.abs(floats(5, 2)))


def test_scales_of_half_precision() -> None:
    text = """g (float16[4,16] x) => (float16[4,8] y, float16[2,16] u) {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
        e = DequantizeLinear<axis=1>(w, ws)  y = MatMul(d, e)
        i = Constant<value=int64[1] {0}>()  j = Constant<value=int64[1] {2}>()  u = Slice(d, i, j) }"""
    weight = RANDOM.integers(-100, 100, (16, 8)).astype(np.int8)
    scales = np.abs(floats(8) * np.float32(0.01)).astype(np.float16)
    inputs = {"x": floats(4, 16).astype(np.float16)}
    check(text, inputs, 2e-3, s=np.array(0.05, np.float16), z=np.array(128, np.uint8), w=weight, ws=scales)


def test_weights_of_8_bit_floats() -> None:
    text = """g (float[4,16] x) => (float[4,8] y) { d = DequantizeLinear(w, s)  y = MatMul(x, d) }"""
    weight = floats(16, 8).astype(ml_dtypes.float8_e4m3fn)
    check(text, {"x": floats(4, 16)}, s=np.array(0.5, np.float32), w=weight)


def test_a_scale_that_is_computed() -> None:
    text = """g (float[4,16] x, float[1] m) => (float[4,8] y, uint8[4,16] q) {
        k = Constant<value=int64[1] {0}>()  s = Squeeze(m, k)
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
        e = DequantizeLinear<axis=1>(w, ws)  y = MatMul(d, e) }"""
    weight = RANDOM.integers(-100, 100, (16, 8)).astype(np.int8)
    inputs = {"x": floats(4, 16), "m": np.array([0.05], np.float32)}
    check(text, inputs, z=np.array(128, np.uint8), w=weight, ws=np.abs(floats(8)))
