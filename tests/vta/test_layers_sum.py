"""Sums, scales and requantization as layers, against the independent reference, bit for bit."""

from __future__ import annotations

from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_nets import Graph, check, reasons

from nestc.targets.vta.layer import Add, Clip, Init, Maximum, Product, Shift
from nestc.targets.vta.layers_fit import Line, digits_of, fit
from nestc.targets.vta.layers_steps import add_constant


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 40), st.integers(-9, -2), st.integers(-9, -2), st.integers(-9, 0), st.integers(-9, 0),
    st.booleans(), st.booleans(), st.sampled_from(["Add", "Sub"]),
)  # fmt: skip
def test_a_convolution_and_a_residual(
    channels: int, inner: int, other: int, last: int, back: int, relu: bool, swapped: bool, op: str
) -> None:
    """The convolution is rounded and clipped to int8 with a scale of its own before anything is added."""
    graph = Graph(channels)
    shape = (1, channels, 5, 5)
    x = graph.real(graph.input(shape), -5)
    y = graph.node("Conv", x, graph.weight((channels, channels, 3, 3), -9), pads=[1] * 4)
    y = graph.real(graph.quantize(y, inner), inner + back // 9)
    z = graph.real(graph.input(shape), other)
    y = graph.node(op, *((z, y) if swapped else (y, z)))
    y = graph.node("Relu", y) if relu else y
    layers = check(graph.model(graph.quantize(y, last)))
    # What is subtracted is multiplied by -1, so the convolution has to be in memory first.
    assert len(layers) == (2 if op == "Sub" and swapped else 1)


def test_rounding_of_a_residual_costs_no_step() -> None:
    graph = Graph()
    shape = (1, 16, 5, 5)
    x = graph.real(graph.input(shape), -5)
    y = graph.node("Conv", x, graph.weight((16, 16, 3, 3), -9), graph.bias(-14, 16), pads=[1] * 4)
    y = graph.real(graph.quantize(y, -5), -5)
    y = graph.node("Relu", graph.node("Add", y, graph.real(graph.input(shape), -4)))
    (layer,) = check(graph.model(graph.quantize(y, -4)))
    kinds = [type(step).__name__ for step in layer.steps]
    assert kinds == ["Init", "Product", "Shift", "Clip", "Product", "Shift", "Clip"]
    clips = [step for step in layer.steps if isinstance(step, Clip)]
    assert clips == [Clip(-127, 128), Clip(0, 127)]  # the second rounding constant is in the first bounds
    (_, residual) = [step for step in layer.steps if isinstance(step, Product)]
    assert residual.taps == ((0, 0),) and set(np.unique(residual.weights)) == {0, 2}


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.lists(st.integers(-10, 0), min_size=3, max_size=3), st.booleans(), st.booleans())
def test_sums_without_a_product(channels: int, exponents: list[int], relu: bool, subtract: bool) -> None:
    graph = Graph(channels)
    a, b = (graph.real(graph.input((2, channels, 3, 4)), e) for e in exponents[:2])
    y = graph.node("Sub" if subtract else "Add", a, b)
    y = graph.node("Relu", y) if relu else y
    check(graph.model(graph.quantize(y, exponents[2])))


@settings(deadline=None, max_examples=20)
@given(st.integers(-8, -2), st.integers(-10, 0), st.sampled_from(["", "Relu", "Clip"]), st.sampled_from([2, 3, 4]))
def test_requantization_alone(first: int, second: int, kind: str, rank: int) -> None:
    graph = Graph()
    y = graph.real(graph.input((3, 20, 4, 5)[:rank]), first)
    if kind:
        bounds = [graph.constant(np.float32(b)) for b in (-0.3, 1.7)] if kind == "Clip" else []
        y = graph.node(kind, y, *bounds)
    check(graph.model(graph.quantize(y, second)))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(-7, -3), st.integers(-7, -1), st.booleans(), st.integers(0, 1 << 20))
def test_scale_and_shift_of_channels(channels: int, first: int, last: int, relu: bool, seed: int) -> None:
    """A normalization whose numbers are no powers of two: exact for each of the 256 values of the input."""
    graph = Graph(seed)
    x = graph.real(graph.input((1, channels, 16, 16)), first)
    scale = graph.random.normal(size=(channels, 1, 1)).astype(np.float32)
    scale[0] = 0.0
    y = graph.node("Mul", x, graph.constant(scale))
    y = graph.node("Add", y, graph.constant(graph.random.normal(size=(channels, 1, 1)).astype(np.float32)))
    y = graph.node("Relu", y) if relu else y
    check(graph.model(graph.quantize(y, last)), seed=seed)


@pytest.mark.parametrize("swapped", [False, True])
def test_bounds_by_max_and_min(swapped: bool) -> None:
    graph = Graph()
    y = graph.real(graph.input((1, 20, 4, 5)), -5)
    for op, bound in (("Max", -0.7), ("Min", 2.1)):
        operands = [y, graph.constant(np.float32(bound))]
        y = graph.node(op, *(operands[::-1] if swapped else operands))
    check(graph.model(graph.quantize(y, -5)))


@pytest.mark.parametrize("bounds", [(1.0, 0.5), (-1.0, -2.0), (9.0, -9.0)])
def test_a_lower_bound_above_the_upper_gives_the_upper(bounds: tuple[float, float]) -> None:
    graph = Graph()
    y = graph.real(graph.input((1, 20, 4, 5)), -5)
    y = graph.node("Clip", y, *(graph.constant(np.float32(bound)) for bound in bounds))
    check(graph.model(graph.quantize(y, -5)))


def test_maxima_in_finer_units_saturate() -> None:
    graph = Graph()
    y = graph.real(graph.node("MaxPool", graph.input((1, 20, 6, 6)), kernel_shape=[2, 2]), -5)
    check(graph.model(graph.quantize(y, -7)))


def test_constants_move_only_as_far_as_numbers_of_16_bits_go() -> None:
    maximum = (Init(np.array(-128)), Maximum("x", (1, 1), ((0, 0),)))
    assert add_constant(maximum, (1 << 15) - 1) == (*maximum, Add((1 << 15) - 1))
    assert add_constant(maximum, 1 << 15) is None
    clipped = (Init(np.array(0)), Clip(-128, 127))
    moved = add_constant(clipped, 32000)
    assert moved is not None and moved[1] == Clip(31872, 32127)
    assert add_constant(clipped, 32700) == (*clipped, Add(32700))
    assert add_constant(clipped, 40000) is None


def test_scale_and_shift_after_a_residual_take_a_second_layer() -> None:
    graph = Graph()
    shape = (1, 20, 6, 6)
    x = graph.real(graph.input(shape), -5)
    y = graph.node("Conv", x, graph.weight((20, 20, 1, 1), -9))
    y = graph.node("Add", graph.real(graph.quantize(y, -4), -4), graph.real(graph.input(shape), -5))
    y = graph.node("Mul", y, graph.constant(np.linspace(0.3, 1.7, 20, dtype=np.float32).reshape(20, 1, 1)))
    y = graph.node("Add", y, graph.constant(np.linspace(-0.5, 0.5, 20, dtype=np.float32).reshape(20, 1, 1)))
    layers = check(graph.model(graph.quantize(graph.node("Relu", y), -5)))
    assert len(layers) == 2
    assert layers[0].output.name in layers[1].sources


def test_integer_constants_are_weights() -> None:
    graph = Graph()
    x = graph.real(graph.input((1, 20, 6, 6)), -5)
    powers = np.array([-6, -7] * 10)
    y = graph.node("Mul", x, graph.weight((20, 1, 1), powers))
    (layer,) = check(graph.model(graph.quantize(y, -5)), optimised=True)
    assert sum(isinstance(step, Product) for step in layer.steps) == 1


def test_constants_behind_a_maximum_are_added_by_the_alu() -> None:
    graph = Graph()
    x = graph.input((1, 20, 6, 6))
    y = graph.real(graph.node("MaxPool", x, kernel_shape=[2, 2]), -5)
    (layer,) = check(graph.model(graph.quantize(graph.node("Relu", y), -3)))
    assert [step for step in layer.steps if isinstance(step, Add)] == [Add(2)]
    assert [int(step.amounts) for step in layer.steps if isinstance(step, Shift)] == [2]


def test_what_is_refused_has_a_reason() -> None:
    graph = Graph()
    a, b = (graph.real(graph.input((1, 8, 4, 4)), -5) for _ in range(2))
    assert "multiplies only by constants" in reasons(graph.model(graph.quantize(graph.node("Mul", a, b), -5)))[0]

    graph = Graph()
    a = graph.real(graph.input((1, 8, 4, 4)), -5)
    y = graph.node("Add", a, graph.constant(np.ones((1, 1, 4, 4), np.float32)))
    assert "varies along more than the channels" in reasons(graph.model(graph.quantize(y, -5)))[0]

    graph = Graph()
    a, b = (graph.real(graph.input((1, 8, 4, 4)), e) for e in (-30, 0))
    assert "so far apart" in reasons(graph.model(graph.quantize(graph.node("Add", a, b), 0)))[0]

    graph = Graph()
    a, b = (graph.input((1, 8, 4, 4)) for _ in range(2))
    assert "on int8, not on quantized numbers" in reasons(graph.model(graph.node("Add", a, b)))[0]

    graph = Graph()
    y = graph.quantize(graph.node("Sigmoid", graph.real(graph.input((1, 8, 4, 4)), -5)), -7)
    assert reasons(graph.model(y)) == ["activation Sigmoid has no power-of-two integer form on VTA"]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(-(1 << 24), 1 << 24), st.integers(-(1 << 24), 1 << 24), st.integers(0, 24),
    st.integers(1, 600), st.sampled_from([(-128, 127), (0, 127), (0, 0)]),
)  # fmt: skip
def test_fitted_lines_are_exact(slope: int, offset: int, power: int, reach: int, limits: tuple[int, int]) -> None:
    """Every integer of the range, against Python's own integers."""
    denominator = 1 << power
    steepest = min(127, 1000 // reach)
    slope = max(min(slope, steepest * denominator), -steepest * denominator)
    offset = min(max(offset, -1000 * denominator), 1000 * denominator)
    found = fit(Line(np.array([slope], object), np.array([offset], object), denominator), -reach, reach, *limits, 1)
    m, k = int(found.multipliers[0]), int(found.constants[0])
    for z in range(-reach, reach + 1):
        expected = min(max((z * slope + offset) // denominator, limits[0]), limits[1])
        assert min(max((z * m + k) >> found.shift, limits[0]), limits[1]) == expected
    digits = digits_of(np.array([m]), found.digits)
    assert sum(int(d[0]) << (7 * i) for i, d in enumerate(digits)) == m
    assert all(-128 <= int(d[0]) <= 127 for d in digits)
    acc = k
    for place, digit in enumerate(digits):  # as the layer computes it, shifting down between the digits
        acc += reach * int(digit[0])
        acc >>= 7 if place < found.digits - 1 else found.shift - 7 * (found.digits - 1)
    assert acc == (reach * m + k) >> found.shift


@pytest.mark.parametrize("count", [3, 5, 6, 7, 9, 12, 15, 25, 36, 49, 81, 100, 121, 169, 196, 225, 289, 1000])
def test_means_are_exact(count: int) -> None:
    """floor(sum / count + 1 / 2) for every sum of `count` int8 numbers."""
    line = Line(np.array([2], object), np.array([count], object), 2 * count)
    found = fit(line, -128 * count, 127 * count, -128, 127, 1)
    sums = np.arange(-128 * count, 127 * count + 1)
    m, k = int(found.multipliers[0]), int(found.constants[0])
    expected = np.array([floor((2 * int(s) + count) / (2 * count)) for s in (sums[0], sums[-1])])
    exact = (2 * sums + count) // (2 * count)
    assert (exact[[0, -1]] == expected).all() and ceil(-0.5) == 0
    np.testing.assert_array_equal((sums * m + k) >> found.shift, exact)
    assert found.digits <= 3
