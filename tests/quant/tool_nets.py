"""A small mobile network and a transformer's MLP with outliers, and how the tests of accuracy tools run them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime
from qdq_support import HEAD
from quant_nets import parsed

import nestc
from nestc.graph.quiet import quiet
from nestc.quant.choose import choose
from nestc.quant.derive import derive
from nestc.quant.observe import observe
from nestc.quant.prepare import prepare
from nestc.quant.profile import Profile
from nestc.quant.run import Runner
from nestc.quant.scheme import scheme_named
from nestc.quant.tools import Context

MOBILE = """
mobile (float[2, 3, 9, 9] x) => (float[2, 5] y) {
  zero = Constant <value_float = 0.0> ()
  six = Constant <value_float = 6.0> ()
  a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
  a6 = Clip (a, zero, six)
  d = Conv <group = 8, strides = [2, 2], pads = [1, 1, 1, 1]> (a6, w2, b2)
  d6 = Clip (d, zero, six)
  p = Conv (d6, w3, b3)
  e = Conv (p, w4, b4)
  r = Relu (e)
  q = Conv (r, w5)
  s = Add (p, q)
  g = GlobalAveragePool (s)
  f = Flatten (g)
  y = Gemm <transB = 1> (f, w6, b6)
}
"""

STACK = """
stack (float[2, 3, 9, 9] x) => (float[2, 4, 9, 9] y) {
  a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
  r = Relu (a)
  d = Conv <group = 8, pads = [1, 1, 1, 1]> (r, w2, b2)
  s = Relu (d)
  y = Conv (s, w3, b3)
}
"""

MLP = """
mlp (float[2, 4, 16] x) => (float[2, 4, 8] y) {
  n = LayerNormalization <axis = -1> (x, scale, shift)
  a = MatMul (n, w1)
  ab = Add (a, b1)
  h = Gelu (ab)
  y = MatMul (h, w2)
}
"""


def mobile(seed: int = 0, spread: float = 8.0) -> nestc.Model:
    """Convolutions, depthwise and residual, with ReLU6; channels differ in range by up to `spread`."""
    random = np.random.default_rng(seed)
    shapes = {
        "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "b2": (8,), "w3": (4, 8, 1, 1), "b3": (4,),
        "w4": (6, 4, 1, 1), "b4": (6,), "w5": (4, 6, 1, 1), "w6": (5, 4), "b6": (5,),
    }  # fmt: skip
    weights = {name: (random.standard_normal(shape) * 0.6).astype(np.float32) for name, shape in shapes.items()}
    for name in ("w1", "w2", "w4"):
        factor = spread ** random.uniform(-0.5, 0.5, weights[name].shape[0])
        weights[name] *= factor.astype(np.float32).reshape(-1, 1, 1, 1)
    return parsed(f"{HEAD} {MOBILE}", **weights)


def stack(seed: int = 0, spread: float = 8.0) -> nestc.Model:
    """Three convolutions, the second depthwise; channels between them differ in range by up to `spread`."""
    random = np.random.default_rng(seed)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "b2": (8,), "w3": (4, 8, 1, 1), "b3": (4,)}
    weights = {name: (random.standard_normal(shape) * 0.5).astype(np.float32) for name, shape in shapes.items()}
    first, second = (spread ** random.uniform(-0.5, 0.5, 8).astype(np.float32) for _ in range(2))
    weights["w1"] *= first.reshape(-1, 1, 1, 1)
    weights["b1"] *= first
    weights["w2"] *= (second / first).reshape(-1, 1, 1, 1)
    weights["b2"] *= second
    weights["w3"] /= second.reshape(1, -1, 1, 1)
    return parsed(f"{HEAD} {STACK}", **weights)


def mlp(seed: int = 0) -> nestc.Model:
    """A normalization with two channels thirty times larger than the others, and two products."""
    random = np.random.default_rng(seed)
    scale = np.ones(16, np.float32)
    scale[[3, 11]] = 30.0
    weights = {"w1": (16, 24), "b1": (24,), "w2": (24, 8)}
    drawn = {name: (random.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in weights.items()}
    return parsed(f"{HEAD} {MLP}", scale=scale, shift=(0.1 * random.standard_normal(16)).astype(np.float32), **drawn)


def reference(model: nestc.Model) -> Runner:
    """A compiler for the quantizer: ONNX Runtime, exact between QuantizeLinear and DequantizeLinear."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    with quiet("onnx_ir"):
        made = ir.to_proto(model.ir).SerializeToString()
    session = onnxruntime.InferenceSession(
        made, options, providers=["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
    )
    names = [each.name for each in session.get_outputs()]

    def run(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {each.name: batch[each.name] for each in session.get_inputs()}
        return dict(zip(names, map(np.asarray, session.run(names, given)), strict=True))

    return run


def data(model: nestc.Model, count: int = 24, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Normally distributed inputs; those of images are smooth, as photographs are."""
    random = np.random.default_rng(seed)

    def drawn(shape: list[int]) -> np.ndarray:
        values = random.standard_normal(shape)
        if len(shape) == 4:
            for axis in (2, 3):
                values = (values + np.roll(values, 1, axis) + np.roll(values, 2, axis)) / 1.7
        return values.astype(np.float32)

    ((name, (_, shape)),) = model.inputs.items()
    return [{name: drawn([int(size) for size in shape])} for _ in range(count)]


def results(model: nestc.Model, batches: list[dict[str, np.ndarray]]) -> np.ndarray:
    """The first output over all batches, float64."""
    run, name = reference(model), next(iter(model.outputs))
    return np.concatenate([run(batch)[name] for batch in batches]).astype(np.float64)


def ready(
    model: nestc.Model, scheme: str, method: str = "minmax", weights: bool = False
) -> tuple[nestc.Model, Profile, Context]:
    """A prepared model, its profile and the context that tools get, with `weights` in the stage of that name."""
    prepared = prepare(model)
    batches = data(model)
    profile = observe(prepared, batches, reference, method)
    assignment = choose(prepared, scheme_named(scheme), None, profile)
    parameters = derive(prepared, profile, assignment) if weights else None
    again = lambda changed: observe(changed, batches, reference, method)  # noqa: E731
    return prepared, profile, Context(assignment, parameters, None, batches, reference, again)
