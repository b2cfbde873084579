"""Loop and Scan on the host against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from nestc.bundle.artifact import Artifact
from nestc.runtime.host import HostDevice

MODELS = {
    "scalars, and a condition that ends it": """
        g (int64 n, float x) => (float y, float[k] all) {
            y, all = Loop (n, , x) <body = b (int64 i, bool c, float a) => (bool go, float d, float e) {
                one = Constant<value_float = 1.0>()  d = Add(a, one)  e = Identity(a)
                most = Constant<value_float = 4.5>()  go = Less(d, most) }> }""",
    "matrices, and a value of the graph outside": """
        g (int64 n, float[2,3] x) => (float[2,3] y, float[k,2,3] all) {
            w = Constant<value_float = 0.5>()
            y, all = Loop (n, , x) <body = b (int64 i, bool c, float[2,3] a) => (bool go, float[2,3] d, float[2,3] e) {
                d = Mul(a, w)  e = Add(a, w)  go = Identity(c) }> }""",
    "another axis and direction": """
        g (float[3] s, float[3,4] x) => (float[3] y, float[3,4] all) {
            y, all = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [1],
                scan_output_axes = [1], scan_output_directions = [1],
                body = b (float[3] a, float[3] r) => (float[3] d, float[3] e) { d = Add(a, r)  e = Mul(a, r) }> (s, x) }""",
}
FEEDS = {
    "n": lambda n: np.array(n, np.int64),
    "x": lambda n: np.linspace(0, 1, 12, dtype=np.float32),
    "s": lambda n: np.ones(3, np.float32),
}


@pytest.mark.parametrize("what", MODELS)
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_as_onnxruntime(what: str, steps: int) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {MODELS[what]}')
    feeds: dict[str, np.ndarray] = {}
    for info in model.graph.input:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        feeds[info.name] = np.resize(FEEDS[info.name](steps), shape)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    program = HostDevice().load(Artifact("host-onnx", {"model.onnx": model.SerializeToString()}, {}, {}), 1)
    found, _ = program(list(feeds.values()), [None] * 2)
    for want, got in zip(session.run(None, feeds), found, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
