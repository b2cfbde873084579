"""Pooling over regions of interest against ONNX Runtime (`onnx.reference` has none)."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

import nestc


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_max_roi_pool(scale: float) -> None:
    node = helper.make_node("MaxRoiPool", ["x", "rois"], ["y"], pooled_shape=[3, 2], spatial_scale=scale)
    graph = helper.make_graph(
        [node],
        "roi",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 9, 11]),
            helper.make_tensor_value_info("rois", TensorProto.FLOAT, [4, 5]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 3, 3, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.random.default_rng(0).standard_normal((2, 3, 9, 11)).astype(np.float32)
    # The whole picture, a part, one beyond the border, and one that lies outside and so has empty cells.
    rois = np.array([[0, 0, 0, 10, 8], [1, 2, 3, 7, 5], [0, 5, 5, 30, 9], [1, 25, 25, 28, 28]], np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    exe = nestc.compile(model)
    assert exe.fallback_ops == {}
    np.testing.assert_array_equal(exe(x, rois), session.run(None, {"x": x, "rois": rois})[0])
