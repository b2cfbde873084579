"""Small float models for the tests of the quantizer."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

import nestc

CHAIN = """
<ir_version: 8, opset_import: ["": 17]>
chain (float[N, 3, 8, 8] x) => (float[N, 5] y)
<float[6, 3, 3, 3] w1, float[6] b1, float[6] scale, float[6] shift, float[6] mean, float[6] var, float[6, 6, 1, 1] w2,
 float[6, 5] w3>
{
  a = Conv <pads=[1, 1, 1, 1]> (x, w1, b1)
  n = BatchNormalization (a, scale, shift, mean, var)
  r = Relu (n)
  c = Conv (r, w2)
  s = Add (c, r)
  g = GlobalAveragePool (s)
  f = Flatten (g)
  y = MatMul (f, w3)
}
"""


def chain(seed: int = 0) -> nestc.Model:
    """Two convolutions, a residual, an average and a product; input x float32 [N, 3, 8, 8], output y [N, 5]."""
    model = onnx.parser.parse_model(CHAIN)
    generator = np.random.default_rng(seed)
    shapes = {"w1": (6, 3, 3, 3), "b1": (6,), "scale": (6,), "shift": (6,), "mean": (6,), "w2": (6, 6, 1, 1)}
    for name, shape in {**shapes, "w3": (6, 5)}.items():
        values = generator.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    var = generator.uniform(0.5, 2.0, 6).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(var, "var"))
    onnx.checker.check_model(model)
    return nestc.load(model)


def parsed(text: str, **weights: np.ndarray) -> nestc.Model:
    """A model from ONNX's text form with its initializers."""
    model = onnx.parser.parse_model(text)
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.checker.check_model(model)
    return nestc.load(model)


def batches(count: int, size: int = 4, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Normally distributed inputs of `chain`."""
    generator = np.random.default_rng(seed)
    return [{"x": generator.standard_normal((size, 3, 8, 8)).astype(np.float32)} for _ in range(count)]
