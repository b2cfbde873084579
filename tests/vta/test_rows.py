"""Values of three axes: matrices where a MatMul reads them, maps where a convolution does, never both."""

from __future__ import annotations

import numpy as np
import pytest
from layer_nets import Graph, inputs_of, regions
from reference import run_qdq

import nestc
from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.targets.vta.layers import needs_rows, refusal
from nestc.targets.vta.rows import by_rows, row_values

CONFIG = VtaConfig()


def feed_forward(g: Graph, shape: tuple[int, int, int]) -> list[str]:
    """Two products with a bias and an activation between them, and the sum with what went in."""
    k = shape[2]
    x = g.real(g.input(shape), -5)
    bias = g.constant(np.linspace(-2, 2, 2 * k, dtype=np.float32).round(1).astype(np.float16).astype(np.float32))
    y = g.node("Relu", g.node("Add", g.node("MatMul", x, g.weight((k, 2 * k), -9, axis=1)), bias))
    y = g.node("MatMul", g.real(g.quantize(y, -4), -4), g.weight((2 * k, k), -10, axis=1))
    y = g.node("Add", g.real(g.quantize(y, -4), -4), g.real("x0", -5))
    return [g.quantize(y, -4)]


@pytest.mark.parametrize("shape", [(1, 5, 20), (1, 16, 16), (1, 20, 20), (2, 3, 16), (3, 20, 20)], ids=str)
def test_matrices_of_three_axes(shape: tuple[int, int, int]) -> None:
    graph = Graph()
    outputs = feed_forward(graph, shape)
    model = graph.model(*outputs)
    executable = nestc.compile(model, targets=["vta"])
    assert [part.device for part in executable.plan.partitions] == ["vta"]
    inputs = inputs_of(model, 0)
    found, expected = executable.run(inputs), run_qdq(model, inputs)
    np.testing.assert_array_equal(found[outputs[0]], expected[outputs[0]])
    assert found[outputs[0]].std() > 0.5


def test_a_convolution_of_the_same_value_is_told() -> None:
    graph = Graph()
    x = graph.input((1, 20, 20))
    product = graph.node("MatMul", graph.real(x, -5), graph.weight((20, 20), -9, axis=1))
    conv = graph.node("Conv", graph.real(x, -5), graph.weight((20, 20, 1), -9))
    model = graph.model(graph.quantize(product, -3), graph.quantize(conv, -3))
    with pytest.raises(TargetError, match=r"takes value 'x0' as channels and region r\d+_MatMul.* as rows of a matrix"):
        nestc.compile(model, targets=["vta"])


def test_only_what_shares_a_matrix_lies_in_rows() -> None:
    graph = Graph()
    outputs = feed_forward(graph, (1, 5, 20))
    other = graph.node("Conv", graph.real(graph.input((1, 20, 7)), -5), graph.weight((20, 20, 1), -9))
    found = regions(graph.model(*outputs, graph.quantize(other, -3)))
    names = row_values(found, lambda region: needs_rows(region, CONFIG))
    assert {"x0", outputs[0]} < names and "x1" not in names
    assert all(refusal(region, CONFIG) is None for region in found)


def test_what_differs_from_row_to_row_stays_as_it_is() -> None:
    graph = Graph()
    rows = graph.constant(np.arange(5, dtype=np.float32).reshape(1, 5, 1))
    y = graph.node("Add", graph.real(graph.input((1, 5, 20)), -5), rows)
    (region,) = regions(graph.model(graph.quantize(y, -3)))
    assert by_rows(region) is None and refusal(region, CONFIG) is None
    assert not needs_rows(region, CONFIG)
