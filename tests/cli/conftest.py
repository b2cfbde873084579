"""Small models written with onnx.helper, and a way to call the command line in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


def write(path: Path, nodes, inputs, outputs, weights=()) -> Path:
    """Write a model of these parts; inputs and outputs are (name, element type, shape)."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    """relu(x @ w + b), x: float32 [2, 4], w and b of ones."""
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    weights = [("w", np.ones((4, 3), np.float32)), ("b", np.ones(3, np.float32))]
    return write(
        tmp_path / "mlp.onnx", nodes, [("x", TensorProto.FLOAT, [2, 4])], [("y", TensorProto.FLOAT, [2, 3])], weights
    )


@pytest.fixture
def open_mlp(tmp_path: Path) -> Path:
    """The same with a batch of open size."""
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    weights = [("w", np.ones((4, 3), np.float32)), ("b", np.ones(3, np.float32))]
    return write(
        tmp_path / "open.onnx",
        nodes,
        [("x", TensorProto.FLOAT, ["batch", 4])],
        [("y", TensorProto.FLOAT, ["batch", 3])],
        weights,
    )
