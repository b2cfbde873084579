"""Layers of every family through the whole target: compiled, simulated, and equal to the reference in every bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from layer_nets import Graph, inputs_of
from reference import run_qdq

import nestc

RESULT = Callable[[Graph], list[str]]


def flattened(g: Graph) -> list[str]:
    y = g.node("Flatten", g.input((1, 20, 4, 5)))
    return [g.quantize(g.node("Gemm", g.real(y, -5), g.weight((400, 10), -9)), -3)]


def normalized_sum(g: Graph) -> list[str]:
    shape = (1, 20, 6, 6)
    y = g.node("Conv", g.real(g.input(shape), -5), g.weight((20, 20, 1, 1), -9))
    y = g.node("Add", g.real(g.quantize(y, -4), -4), g.real(g.input(shape), -5))
    scale, shift = (np.linspace(a, 1.7, 20, dtype=np.float32).reshape(20, 1, 1) for a in (0.3, -0.8))
    y = g.node("Add", g.node("Mul", y, g.constant(scale)), g.constant(shift))
    return [g.quantize(g.node("Relu", y), -5)]


def split(g: Graph) -> list[str]:
    return g.node("Split", g.input((1, 40, 3, 3)), g.constant(np.array([20, 12, 8])), outputs=3, axis=1)


def padded(g: Graph) -> list[str]:
    return [g.node("Pad", g.input((1, 20, 4, 5)), g.constant(np.array([0, 5, 1, 2, 0, 0, 3, 0])))]


def concatenated(g: Graph) -> list[str]:
    parts = [g.real(g.input((1, channels, 3, 5)), power) for channels, power in ((20, -5), (16, -7), (7, -4))]
    return [g.quantize(g.node("Concat", *parts, axis=1), -5)]


def averaged(g: Graph) -> list[str]:
    x = g.input((1, 40, 7, 7))
    windows = {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}
    y = g.quantize(g.node("AveragePool", g.real(x, -5), **windows), -5)
    return [y, g.quantize(g.node("GlobalAveragePool", g.real(y, -5)), -6)]


def maximum(g: Graph) -> list[str]:
    y = g.node("MaxPool", g.input((2, 40, 9, 9)), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    return [g.quantize(g.node("GlobalMaxPool", g.real(y, -5)), -3)]


def grouped(g: Graph) -> list[str]:
    y = g.node("Conv", g.real(g.input((1, 24, 9, 9)), -5), g.weight((48, 1, 3, 3), -8), group=24, strides=[2, 2])
    y = g.real(g.quantize(y, -4), -4)
    y = g.node("Conv", y, g.weight((30, 16, 3, 3), -8), group=3, pads=[2, 0, 1, 1], dilations=[1, 2])
    return [g.quantize(y, -2)]


def one_axis(g: Graph) -> list[str]:
    y = g.node("Conv", g.real(g.input((2, 10, 30)), -5), g.weight((20, 10, 3), -8), pads=[1, 1], strides=[2])
    return [g.quantize(y, -4)]


def difference(g: Graph) -> list[str]:
    a, b = (g.real(g.input((2, 20, 3, 4)), power) for power in (-3, -9))
    return [g.quantize(g.node("Sub", a, b), -4)]


@pytest.mark.parametrize(
    "build",
    [flattened, normalized_sum, split, padded, concatenated, averaged, maximum, grouped, one_axis, difference],
)
def test_the_machine_gives_the_bits_of_the_reference(build: RESULT) -> None:
    graph = Graph()
    outputs = build(graph)
    model = graph.model(*outputs)
    inputs = inputs_of(model, 0)
    executable = nestc.compile(model, targets=["vta"])
    assert [part.device for part in executable.plan.partitions] == ["vta"]
    found, expected = executable.run(inputs), run_qdq(model, inputs)
    for name in outputs:
        np.testing.assert_array_equal(found[name], expected[name])
        assert found[name].std() > 0.5
