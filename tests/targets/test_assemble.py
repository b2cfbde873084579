"""Programs put together: what several regions need is made once."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import nestc


def projections(count: int, rows: int = 128, size: int = 512) -> onnx.ModelProto:
    """`count` products of one value by weights of their own, joined."""
    random = np.random.default_rng(0)
    weights = [(random.standard_normal((size, size)) / np.sqrt(size)).astype(np.float32) for _ in range(count)]
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(count)]
    nodes.append(helper.make_node("Sum", [f"y{i}" for i in range(count)], ["y"]))
    graph = helper.make_graph(
        nodes,
        "projections",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, rows, size))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, rows, size))],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("threads", [1, 2])
def test_sums_of_inputs_are_made_once_for_all_projections(threads: int) -> None:
    model = projections(3)
    exe = nestc.compile(model, targets=["cpu"], threads=threads)
    x = np.random.default_rng(1).standard_normal((1, 128, 512)).astype(np.float32)
    kernels = [row["symbol"].rsplit("_", 1)[0] for row in exe.profile(x, runs=1)]
    assert kernels.count("strassen") == 3
    assert kernels.count("strassen_inputs") == 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    found = exe(x)
    np.testing.assert_allclose(np.asarray(found).reshape(expected.shape), expected, rtol=0, atol=1e-4)
