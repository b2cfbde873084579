"""Sizes that are taken where the batch is left open."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from nestc.graph.bind import bind_batch
from nestc.importers.onnx import load


def _model(shape: list[int | str | None]) -> onnx.ModelProto:
    node = helper.make_node("Relu", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph([node], "small", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("shape", "bound", "said"),
    [
        (["N", 3], (1, 3), "N = 1"),
        ([None, 3], (1, 3), "the first axis of 'x' = 1"),
        ([2, 3], (2, 3), ""),
        (["N", "T"], ("N", "T"), ""),
        (["N", "N"], ("N", "N"), ""),
    ],
)
def test_only_first_axes_become_one(shape: list[int | str | None], bound: tuple[int | str, ...], said: str) -> None:
    model, words = bind_batch(load(_model(shape)))
    assert (model.inputs["x"][1], words) == (bound, said)
