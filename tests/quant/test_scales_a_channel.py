"""Scales and shifts a channel that no convolution took in: quantized as convolutions, as they were where they stay float."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from quant_nets import parsed

import nestc
from nestc.quant.prepare import prepare

PREACTIVATION = """
<ir_version: 8, opset_import: ["": 17]>
net (float[N, 3, 8, 8] x) => (float[N, 4] y)
<float[16, 3, 3, 3] w0, float[16, 16, 3, 3] w1, float[16, 16, 3, 3] w2, float[16, 4] w3,
 float[16] s1, float[16] b1, float[16] m1, float[16] v1, float[16] s2, float[16] b2, float[16] m2, float[16] v2>
{
  a = Conv <pads=[1, 1, 1, 1]> (x, w0)
  n = BatchNormalization (a, s1, b1, m1, v1)
  r = Relu (n)
  c = Conv <pads=[1, 1, 1, 1]> (r, w1)
  s = Add (a, c)
  o = BatchNormalization (s, s2, b2, m2, v2)
  q = Relu (o)
  d = Conv <pads=[1, 1, 1, 1]> (q, w2)
  t = Add (s, d)
  g = GlobalAveragePool (t)
  f = Flatten (g)
  y = MatMul (f, w3)
}
"""


def preactivation(spread: float = 1.0) -> nestc.Model:
    """Two pre-activation blocks; scales of channels differ by `spread` (standard deviation of their logarithm)."""
    generator = np.random.default_rng(3)
    weights = {
        "w0": generator.standard_normal((16, 3, 3, 3)) / 5,
        "w1": generator.standard_normal((16, 16, 3, 3)) / 12,
        "w2": generator.standard_normal((16, 16, 3, 3)) / 12,
        "w3": generator.standard_normal((16, 4)),
    }
    for index in (1, 2):
        weights[f"s{index}"] = np.exp(spread * generator.standard_normal(16))
        weights[f"b{index}"] = generator.standard_normal(16)
        weights[f"m{index}"] = generator.standard_normal(16)
        weights[f"v{index}"] = generator.uniform(0.5, 2.0, 16)
    return parsed(PREACTIVATION, **{name: values.astype(np.float32) for name, values in weights.items()})


def batches(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return [{"x": generator.standard_normal((4, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def outputs(model: nestc.Model, data: list[dict[str, np.ndarray]]) -> np.ndarray:
    """The model's results in ONNX Runtime."""
    proto = ir.to_proto(model.ir)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.concatenate([np.asarray(session.run(None, batch)[0]) for batch in data])


def sqnr(exact: np.ndarray, rounded: np.ndarray) -> float:
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - rounded).sum()))


def operators(model: nestc.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.ir.graph)


def test_they_are_prepared_as_convolutions_with_the_same_results() -> None:
    model, data = preactivation(), batches(2, seed=1)
    prepared = prepare(model)
    assert operators(prepared)["Conv"] == 5
    assert not {"BatchNormalization", "Mul"} & set(operators(prepared))
    np.testing.assert_allclose(outputs(prepared, data), outputs(model, data), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scheme", "least"), [("int8", 25.0), ("int8-symmetric", 25.0), ("int8-pow2", 20.0)])
def test_they_are_computed_on_integers(scheme: str, least: float) -> None:
    model, data = preactivation(spread=0.7), batches(8, seed=1)
    quantized = nestc.quantize(model, nestc.calibrate(model, data), scheme, data=data)
    assert operators(quantized)["Conv"] == 5 and not operators(quantized)["Mul"]
    biases = [
        node.inputs[2].producer() for node in quantized.ir.graph if node.op_type == "Conv" and len(node.inputs) > 2
    ]
    assert all(front is not None and front.op_type == "DequantizeLinear" for front in biases)
    unseen = batches(4, seed=2)
    assert sqnr(outputs(model, unseen), outputs(quantized, unseen)) > least


@pytest.mark.parametrize("scheme", ["bf16", "weight-int8"])
def test_schemes_without_integer_products_leave_them_elementwise(scheme: str) -> None:
    model, data = preactivation(), batches(2, seed=1)
    quantized = nestc.quantize(model, nestc.calibrate(model, data), scheme)
    assert operators(quantized)["Conv"] == 3 and operators(quantized)["Mul"] == 2


def test_one_that_stays_float_is_elementwise_and_says_why() -> None:
    model, data = preactivation(), batches(2, seed=1)
    name = next(node.name or "" for node in prepare(model).ir.graph if node.attributes.get_int("group", 1) == 16)
    quantized = nestc.quantize(model, nestc.calibrate(model, data), "int8", overrides={name: "float"})
    assert operators(quantized)["Conv"] == 4 and operators(quantized)["Mul"] == 1
    (product,) = (node for node in quantized.ir.graph if node.op_type == "Mul")
    assert product.metadata_props["nestc.reason"] == f"float by the override {name!r}"


def test_one_that_reaches_no_product_is_not_rounded() -> None:
    model = parsed(
        """<ir_version: 8, opset_import: ["": 17]>
        net (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) <float[2, 2, 1, 1] w, float[2, 1, 1] s>
        { a = Conv (x, w)  r = Relu (a)  m = Mul (r, s)  y = Sigmoid (m) }""",
        w=np.float32([[[[1.0]], [[2.0]]], [[[0.5]], [[-1.0]]]]),
        s=np.float32([[[1.0]], [[3.0]]]),
    )
    data = [{"x": np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32)}]
    quantized = nestc.quantize(model, nestc.calibrate(model, data), "int8")
    assert operators(quantized)["Conv"] == 1 and operators(quantized)["Mul"] == 1
