"""Pooling as layers, against the independent reference, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_nets import Graph, check, reasons

from nestc.targets.vta.layer import Maximum, Product, Shift

windows = st.tuples(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*[st.integers(0, 1)] * 4),
    st.tuples(st.integers(4, 9), st.integers(4, 9)),
)


@settings(deadline=None, max_examples=40)
@given(windows, st.integers(1, 40), st.integers(0, 1), st.booleans())
def test_maximum(window: tuple[tuple[int, ...], ...], channels: int, ceil_mode: int, real: bool) -> None:
    kernel, strides, pads, size = window
    assume(all(p < k for p, k in zip(pads, kernel * 2, strict=True)))
    graph = Graph(channels)
    x = graph.input((2, channels, *size))
    attributes = {"kernel_shape": kernel, "strides": strides, "pads": pads, "ceil_mode": ceil_mode}
    y = graph.node("MaxPool", x, **attributes)
    if real:  # with a tail that has another scale
        y = graph.quantize(graph.node("Relu", graph.real(y, -5)), -4)
    (layer,) = check(graph.model(y))
    assert sum(isinstance(step, Maximum) for step in layer.steps) == 1


@settings(deadline=None, max_examples=40)
@given(windows, st.integers(1, 40), st.integers(-7, -3), st.integers(-7, -2), st.booleans())
def test_average(window: tuple[tuple[int, ...], ...], channels: int, first: int, last: int, relu: bool) -> None:
    kernel, strides, pads, size = window
    assume(all(p < k for p, k in zip(pads, kernel * 2, strict=True)))
    graph = Graph(channels)
    x = graph.real(graph.input((1, channels, *size)), first)
    padded = int(any(pads))
    y = graph.node("AveragePool", x, kernel_shape=kernel, strides=strides, pads=pads, count_include_pad=padded)
    y = graph.node("Relu", y) if relu else y
    check(graph.model(graph.quantize(y, last)))


@pytest.mark.parametrize("size", [(7, 7), (1, 1), (8, 8), (4, 6), (13, 13), (14, 14), (17, 11), (3, 1)])
@pytest.mark.parametrize("exponents", [(-5, -5), (-4, -6), (-6, -4)])
def test_global_average(size: tuple[int, int], exponents: tuple[int, int]) -> None:
    graph = Graph()
    x = graph.real(graph.input((2, 20, *size)), exponents[0])
    y = graph.quantize(graph.node("GlobalAveragePool", x), exponents[1])
    (layer,) = check(graph.model(y))
    count = size[0] * size[1]
    products = sum(isinstance(step, Product) for step in layer.steps)
    assert products == 1 if count & (count - 1) == 0 else products <= 3


def test_a_mean_over_height_and_width() -> None:
    graph = Graph()
    x = graph.real(graph.input((1, 20, 5, 5)), -5)
    y = graph.quantize(graph.node("ReduceMean", x, graph.constant(np.array([2, 3])), keepdims=0), -6)
    check(graph.model(y))
    graph = Graph()
    x = graph.real(graph.input((1, 20, 5, 5)), -5)
    y = graph.quantize(graph.node("ReduceMean", x, graph.constant(np.array([1])), keepdims=1), -6)
    assert "not over the height and width" in reasons(graph.model(y))[0]


def test_averages_of_powers_of_two_are_shifts() -> None:
    graph = Graph()
    x = graph.real(graph.input((1, 20, 8, 8)), -5)
    (layer,) = check(graph.model(graph.quantize(graph.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), -5)))
    assert [int(step.amounts) for step in layer.steps if isinstance(step, Shift)] == [2]
    (product,) = [step for step in layer.steps if isinstance(step, Product)]
    assert set(np.unique(product.weights)) == {0, 1}


def test_windows_with_fewer_elements_at_the_border_are_refused() -> None:
    graph = Graph()
    x = graph.real(graph.input((1, 20, 8, 8)), -5)
    y = graph.node("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=0)
    assert "fewer elements at the border" in reasons(graph.model(graph.quantize(y, -5)))[0]


def test_a_last_window_beyond_the_padding_counts_fewer_elements() -> None:
    graph = Graph()
    x = graph.real(graph.input((1, 20, 6, 6)), -5)
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": 1}
    y = graph.node("AveragePool", x, **attributes)
    assert "fewer elements at the border" in reasons(graph.model(graph.quantize(y, -5)))[0]
