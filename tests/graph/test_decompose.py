"""Composite operators replaced by the functions that define them compute the same in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from graph_support import assert_same, feeds, parse, run

from nestc.errors import UnsupportedOp
from nestc.graph import pipeline, regions
from nestc.graph.decompose import expand, expandable

GRAPHS = {
    "LayerNormalization": "g (float[2,3,4] x) => (float[2,3,4] y) { y = LayerNormalization<epsilon=0.01>(x, w, b) }",
    "Celu": "g (float[2,3,4] x) => (float[2,3,4] y) { y = Celu<alpha=0.5>(x) }",
    "Gelu": 'g (float[2,3,4] x) => (float[2,3,4] y) { y = Gelu<approximate="tanh">(x) }',
    "HardSwish": "g (float[2,3,4] x) => (float[2,3,4] y) { y = HardSwish(x) }",
    "LogSoftmax": "g (float[2,3,4] x) => (float[2,3,4] y) { y = LogSoftmax(x) }",
    "GroupNormalization": "g (float[2,4,3] x) => (float[2,4,3] y) { y = GroupNormalization<num_groups=2>(x, w, b) }",
    "PRelu": "g (float[2,3,4] x) => (float[2,3,4] y) { y = PRelu(x, b) }",
}


@pytest.mark.parametrize("op_type", GRAPHS)
def test_definition(op_type: str) -> None:
    weights = {"w": np.array([1, 2, 3, 4], np.float32), "b": np.array([0.5, 0.25, 0.125, 1], np.float32)}
    text = GRAPHS[op_type]
    model = parse(text, **{name: array for name, array in weights.items() if f" {name}" in text})
    (node,) = model.ir.graph
    assert expandable(node)
    assert node.name is not None
    expanded = expand(model, [node.name])
    assert op_type not in {each.op_type for each in expanded.ir.graph}
    assert all(
        value.shape is not None and value.shape.is_static() for each in expanded.ir.graph for value in each.outputs
    )
    assert len({each.name for each in expanded.ir.graph}) == len(expanded.ir.graph)
    assert_same(run(model, inputs := feeds(model)), run(expanded, inputs))
    assert [each.op_type for each in model.ir.graph] == [op_type]


def test_attention_with_a_mask_and_only_the_named_node() -> None:
    graph = """g (float[1,2,3,4] q, float[1,2,3,4] k, float[3,3] m) => (float[1,2,3,4] y) {
        a = Attention<scale=0.3>(q, k, k, m)  y = Attention<is_causal=1>(a, k, q) }"""
    model = parse(graph)
    first, second = model.ir.graph
    assert first.name is not None and second.name is not None
    expanded = expand(model, [second.name])
    assert [node.op_type for node in expanded.ir.graph].count("Attention") == 1
    expanded = expand(expanded, [first.name])
    assert "Attention" not in {node.op_type for node in expanded.ir.graph}
    inputs = feeds(model)
    assert_same(run(model, inputs), run(expanded, inputs))
    assert_same(run(model, inputs), run(regions.form(pipeline.optimize(expanded)), inputs))


def test_an_operator_without_a_definition() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Tanh(x) }")
    (node,) = model.ir.graph
    assert not expandable(node)
    with pytest.raises(UnsupportedOp, match=r"operator Tanh .* has no definition by simpler operators"):
        expand(model, [node.name or ""])
    with pytest.raises(ValueError, match="no node 'nothing'"):
        expand(model, ["nothing"])


def test_mean_variance_normalization_never_reaches_a_region() -> None:
    model = parse("g (float[2,3,4,5] x) => (float[2,3,4,5] y) { y = MeanVarianceNormalization(x) }")
    optimized = pipeline.optimize(model)
    assert "MeanVarianceNormalization" not in {node.op_type for node in optimized.ir.graph}
    x = feeds(model)["x"].astype(np.float64)
    wanted = (x - x.mean((0, 2, 3), keepdims=True)) / (x.std((0, 2, 3), keepdims=True) + 1e-9)
    assert_same([wanted.astype(np.float32)], run(regions.form(optimized), feeds(model)))
