"""Convolutions and matrix products as layers, against the independent reference, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_nets import Graph, check, reasons

from nestc.runtime.vta.config import PRESETS, VtaConfig
from nestc.targets.vta.layer import Clip, Init, Product, Shift

CONFIGS = [VtaConfig(), PRESETS["1x32x32"], VtaConfig(log_batch=1)]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Graph, str]:
    """A random convolution with its activation and quantization; the result is int8."""
    graph = Graph(draw(st.integers(0, 1 << 20)))
    group, width, each = draw(st.tuples(st.integers(1, 20), st.integers(1, 18), st.integers(1, 5)))
    if draw(st.booleans()):
        group, each = 1, draw(st.integers(1, 40))
    elif draw(st.booleans()):
        width = 1  # depthwise, perhaps with a multiplier
    ins, outs = group * width, group * each
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilations, strides = (draw(st.tuples(st.integers(1, n), st.integers(1, n))) for n in (2, 3))
    pads = draw(st.tuples(*[st.integers(0, 2)] * 4))
    sizes = [
        max(draw(st.integers(1, 9)), d * (k - 1) + 1 - before - after)
        for d, k, before, after in zip(dilations, kernel, pads[:2], pads[2:], strict=True)
    ]
    powers = np.asarray(draw(st.lists(st.integers(-11, -7), min_size=outs, max_size=outs)))
    weight_exponents = powers if draw(st.booleans()) else int(powers[0])
    x_exponent = draw(st.integers(-6, -3))
    x = graph.real(graph.input((draw(st.integers(1, 2)), ins, *sizes)), x_exponent)
    largest = draw(st.sampled_from([127, 40, 5, 0]))
    operands = [x, graph.weight((outs, width, *kernel), weight_exponents, largest=largest)]
    if draw(st.booleans()):
        operands.append(graph.bias(np.asarray(weight_exponents) + x_exponent, outs))
    y = graph.node("Conv", *operands, kernel_shape=kernel, strides=strides, dilations=dilations, pads=pads, group=group)
    y = activation(graph, y, draw(st.sampled_from(["", "Relu", "Clip"])))
    return graph, graph.quantize(y, draw(st.integers(-14, 0)))


def activation(graph: Graph, y: str, kind: str) -> str:
    if not kind:
        return y
    bounds = [graph.constant(np.float32(bound)) for bound in (0.0, 6.0)] if kind == "Clip" else []
    return graph.node(kind, y, *bounds)


@settings(deadline=None, max_examples=40)
@given(convolutions(), st.sampled_from(CONFIGS), st.integers(0, 1000))
def test_random_convolutions(made: tuple[Graph, str], config: VtaConfig, seed: int) -> None:
    graph, y = made
    (layer,) = check(graph.model(y), config, seed)
    assert isinstance(layer.steps[0], Init)
    (product,) = [step for step in layer.steps if isinstance(step, Product)]
    assert product.weights.dtype == np.int8 and product.weights.shape[2:] == (config.block, config.block)
    assert list(product.pairs) == sorted(product.pairs)
    for shift in (step for step in layer.steps if isinstance(step, Shift)):
        assert shift.amounts.ndim == 0 or shift.amounts.min() >= 0  # the hardware has no left shift by vectors


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2))
def test_convolutions_of_one_axis(ins: int, outs: int, kernel: int, stride: int, pad: int) -> None:
    graph = Graph()
    x = graph.real(graph.input((2, ins, 11)), -5)
    y = graph.node("Conv", x, graph.weight((outs, ins, kernel), -9), strides=[stride], pads=[pad, pad])
    check(graph.model(graph.quantize(y, -4)))


def test_a_depthwise_convolution_has_only_diagonal_blocks() -> None:
    graph = Graph()
    x = graph.real(graph.input((1, 40, 6, 6)), -5)
    y = graph.node("Conv", x, graph.weight((40, 1, 3, 3), -8), group=40, pads=[1] * 4)
    (layer,) = check(graph.model(graph.quantize(y, -4)))
    (product,) = [step for step in layer.steps if isinstance(step, Product)]
    assert product.pairs == ((0, 0), (1, 1), (2, 2))
    assert all((block == np.diag(np.diagonal(block))).all() for block in product.weights.reshape(-1, 16, 16))
    assert not product.weights[2, :, 8:].any()  # lanes behind the last channel


def test_shifts_of_small_weights_are_made_equal() -> None:
    graph = Graph()
    x = graph.real(graph.input((1, 16, 4, 4)), -5)
    weights = graph.random.integers(-30, 31, (16, 16, 1, 1)).astype(np.int8)
    weights[3] = 0  # the shift of a channel without weights is free
    exponents = np.array([-9, -8, -7, 5] * 4)
    exponents[[7, 11, 15]] = -9
    y = graph.node("Conv", x, graph.parameter(weights, exponents), graph.bias(exponents - 5, 16, 90))
    (layer,) = check(graph.model(graph.quantize(y, -4)))
    (shift,) = [step for step in layer.steps if isinstance(step, Shift)]
    assert shift.amounts.shape == () and int(shift.amounts) == 10


def test_bounds_that_hold_anyway_are_not_checked() -> None:
    graph = Graph()
    x = graph.real(graph.input((1, 8, 4, 4)), -5)
    y = graph.node("Conv", x, graph.weight((8, 1, 1, 1), -8), group=8)
    (layer,) = check(graph.model(graph.quantize(y, -5)))
    assert not [step for step in layer.steps if isinstance(step, Clip)]
    graph = Graph()
    x = graph.real(graph.input((1, 8, 4, 4)), -5)
    y = graph.node("Relu", graph.node("Conv", x, graph.weight((8, 1, 1, 1), -8), group=8))
    (layer,) = check(graph.model(graph.quantize(y, -5)))
    assert [step for step in layer.steps if isinstance(step, Clip)] == [Clip(0, None)]


def test_a_float_bias_is_exact() -> None:
    graph = Graph()
    x = graph.real(graph.input((1, 8, 4, 4)), -5)
    bias = graph.constant(graph.random.normal(size=20).astype(np.float32))
    y = graph.node("Conv", x, graph.weight((20, 8, 1, 1), -8), bias)
    check(graph.model(graph.quantize(y, -4)))


@pytest.mark.parametrize("transposed", [0, 1])
@settings(deadline=None, max_examples=10)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans())
def test_gemm(transposed: int, m: int, k: int, n: int, bias: bool, relu: bool) -> None:
    graph = Graph(k)
    x = graph.real(graph.input((m, k)), -5)
    powers = np.array([-8 - i % 3 for i in range(n)])
    weights = graph.weight((n, k) if transposed else (k, n), powers, axis=0 if transposed else 1)
    extra = [graph.bias(powers - 5, n)] if bias else []
    y = graph.node("Gemm", x, weights, *extra, transB=transposed)
    y = graph.node("Relu", y) if relu else y
    check(graph.model(graph.quantize(y, -2)))


def test_matmul_with_a_bias_behind_it() -> None:
    graph = Graph()
    x = graph.real(graph.input((3, 20)), -5)
    y = graph.node("MatMul", x, graph.weight((20, 33), -8))
    y = graph.node("Add", y, graph.bias(-13, 33))
    check(graph.model(graph.quantize(y, -2)), optimised=True)


def test_what_is_refused_has_a_reason() -> None:
    graph = Graph()
    x, w = (graph.real(graph.input((1, 8, 4, 4)), -5) for _ in range(2))
    y = graph.quantize(graph.node("Conv", x, w), -4)
    assert "are not constant" in reasons(graph.model(y))[0]

    graph = Graph()
    x = graph.real(graph.input((1, 8, 4, 4, 4)), -5)
    y = graph.quantize(graph.node("Conv", x, graph.weight((8, 8, 1, 1, 1), -9)), -4)
    assert "neither a matrix nor a map" in reasons(graph.model(y))[0]

    graph = Graph()
    x = graph.real(graph.input((1, 8, 4, 4)), -5)
    y = graph.quantize(graph.node("Conv", x, graph.constant(np.ones((8, 8, 1, 1), np.float32))), -4)
    assert "are not quantized" in reasons(graph.model(y))[0]

    graph = Graph()
    x = graph.real(graph.input((1, 8, 4, 4)), -5)
    scale = graph.constant(np.float32(0.1))
    w = graph.node("DequantizeLinear", graph.constant(np.ones((8, 8, 1, 1), np.int8)), scale)
    y = graph.quantize(graph.node("Conv", x, w), -4)
    assert "scale 0.1 of " in reasons(graph.model(y))[0] and "int8-pow2" in reasons(graph.model(y))[0]

    graph = Graph()
    x = graph.real(graph.input((4, 8)), -5)
    y = graph.quantize(graph.node("Gemm", x, graph.weight((4, 8), -8), transA=1), -4)
    assert "transposed" in reasons(graph.model(y))[0]

    graph = Graph()
    x = graph.real(graph.input((2, 4, 8)), -5)
    y = graph.quantize(graph.node("MatMul", x, graph.weight((2, 8, 8), -8)), -4)
    assert "matrices of two axes" in reasons(graph.model(y))[0]


def test_sums_beyond_32_bits_are_refused() -> None:
    graph = Graph()
    x = graph.real(graph.input((1, 16, 1, 1)), -5)
    bias = graph.parameter(np.full(16, (1 << 31) - 1000, np.int32), -13)
    y = graph.node("Conv", x, graph.weight((16, 16, 1, 1), -8), bias)
    assert "32 bits" in reasons(graph.model(graph.quantize(y, -4)))[0]
