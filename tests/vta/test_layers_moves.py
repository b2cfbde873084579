"""Concat, Pad, Slice, Split and views as layers, against the independent reference, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_nets import PYNQ, Graph, check, compare, inputs_of, reasons, regions

from nestc.targets.vta.layer import Clip, Init, Product, Shift
from nestc.targets.vta.layers import Alias, layers_of, refusal


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(-9, -1)), min_size=2, max_size=4), st.integers(-8, -2))
def test_concat_with_scales(parts: list[tuple[int, int]], last: int) -> None:
    graph = Graph()
    operands = [graph.real(graph.input((1, channels, 3, 5)), exponent) for channels, exponent in parts]
    check(graph.model(graph.quantize(graph.node("Concat", *operands, axis=1), last)))


def test_concat_of_integers_only_copies() -> None:
    graph = Graph()
    y = graph.node("Concat", *[graph.input((2, channels, 3, 5)) for channels in (16, 20, 7)], axis=1)
    (layer,) = check(graph.model(y))
    assert not [step for step in layer.steps if isinstance(step, Shift | Clip)]
    first, *rest = layer.steps
    assert isinstance(first, Init) and not first.values.any()
    assert [step.pairs for step in rest if isinstance(step, Product)] == [((0, 0),), ((1, 0), (2, 1)), ((2, 0),)]


def test_concat_of_rows_is_refused() -> None:
    graph = Graph()
    y = graph.node("Concat", *[graph.input((2, 8, 3, 5)) for _ in range(2)], axis=2)
    assert "not along the channels" in reasons(graph.model(y))[0]


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize(("start", "end", "step"), [(1, 7, 1), (0, 9, 2), (-3, 100, 1), (2, -1, 3)])
def test_slice(axis: int, start: int, end: int, step: int) -> None:
    graph = Graph()
    bounds = [graph.constant(np.array([number])) for number in (start, end, axis, step)]
    check(graph.model(graph.node("Slice", graph.input((1, 20, 9, 8)), *bounds)))


def test_split() -> None:
    graph = Graph()
    sizes = graph.constant(np.array([20, 12, 8]))
    parts = graph.node("Split", graph.input((1, 40, 3, 3)), sizes, outputs=3, axis=1)
    assert len(check(graph.model(*parts))) == 3


@pytest.mark.parametrize("sizes", [(0, 0, 1, 2, 0, 0, 3, 0), (0, 5, 0, 1, 0, 3, 0, 0)])
def test_pad(sizes: tuple[int, ...]) -> None:
    graph = Graph()
    y = graph.node("Pad", graph.input((1, 20, 4, 5)), graph.constant(np.array(sizes)))
    check(graph.model(y))


def test_negative_pads_cut_off() -> None:
    graph = Graph()
    y = graph.node("Pad", graph.input((1, 20, 4, 5)), graph.constant(np.array([0, -3, -1, 0, 0, 2, 0, -1])))
    model = graph.model(y)
    values = inputs_of(model, 0)
    (region,) = regions(model)
    x = values["x0"]
    values[y] = np.pad(x[:, 3:, 1:, :4], [(0, 0), (0, 2), (0, 0), (0, 0)])
    compare(region, layers_of(region, PYNQ), values)


def test_pads_with_another_number_are_refused() -> None:
    graph = Graph()
    pads, value = graph.constant(np.array([0, 0, 1, 2, 0, 0, 3, 0])), graph.constant(np.int8(5))
    y = graph.node("Pad", graph.input((1, 20, 4, 5)), pads, value)
    assert "other than zeros" in reasons(graph.model(y))[0]


@pytest.mark.parametrize("shape", [(1, 20, 4, 5), (1, 3, 7), (1, 16, 2, 2)])
def test_small_maps_are_flattened_by_products(shape: tuple[int, ...]) -> None:
    graph = Graph()
    y = graph.node("Flatten", graph.input(shape))
    x = graph.real(y, -5)
    y = graph.node("Gemm", x, graph.weight((int(np.prod(shape)), 10), -9))
    check(graph.model(graph.quantize(y, -3)))


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ((1, 20, 1, 1), (1, 20), True),
        ((1, 20, 4, 5), (1, 20, 20), True),
        ((2, 20, 20), (2, 20, 4, 5), True),
        ((1, 20), (1, 20, 1, 1), True),
        ((1, 512, 7, 7), (1, 25088), False),
        ((2, 20, 1, 1), (2, 20), False),
        ((1, 20, 4, 5), (1, 4, 5, 20), False),
    ],
)
def test_views(before: tuple[int, ...], after: tuple[int, ...], same: bool) -> None:
    graph = Graph()
    model = graph.model(graph.node("Reshape", graph.input(before), graph.constant(np.array(after))))
    (region,) = regions(model)
    if same:
        assert layers_of(region, PYNQ) == (Alias(region.outputs[0], region.inputs[0]),)
        check(model)
    else:
        assert "lies differently" in str(refusal(region, PYNQ))
