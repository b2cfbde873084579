"""Rewritten networks compute what they did, and the rewrites happen where they should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.runtime.vta.config import VtaConfig
from nestc.targets.vta.evaluate import evaluate
from nestc.targets.vta.layer import Add, Clip, FeatureMap, Init, Layer, Maximum, Product, Shift, Step
from nestc.targets.vta.rewrite import add_to_finer, rewritten, sort_channels

CONFIG = VtaConfig("small", log_block=2, log_inp_buff_size=8, log_wgt_buff_size=10, log_acc_buff_size=11)
BLOCK = CONFIG.block


def dense(source: FeatureMap, channels: int, kernel: int, random: np.random.Generator) -> Product:
    """A convolution of stride 1 that keeps the size."""
    outputs, inputs = channels // BLOCK, source.channels // BLOCK
    taps = tuple((y - kernel // 2, x - kernel // 2) for y in range(kernel) for x in range(kernel))
    pairs = tuple((o, i) for o in range(outputs) for i in range(inputs))
    weights = random.integers(-128, 128, (len(pairs), len(taps), BLOCK, BLOCK)).astype(np.int8)
    return Product(source.name, (1, 1), taps, pairs, weights)


def identity(source: FeatureMap, factor: int = 1) -> Product:
    """The product that adds a map times a factor."""
    pairs = tuple((block, block) for block in range(source.channels // BLOCK))
    eye = (np.eye(BLOCK) * factor).astype(np.int8)
    return Product(source.name, (1, 1), ((0, 0),), pairs, np.broadcast_to(eye, (len(pairs), 1, BLOCK, BLOCK)).copy())


def convolution(name: str, source: FeatureMap, channels: int, kernel: int, random: np.random.Generator) -> Layer:
    """A convolution with shifts that differ by channel."""
    out = replace(source, name=name, channels=channels)
    steps: tuple[Step, ...] = (
        Init(random.integers(-500, 500, channels)),
        dense(source, channels, kernel, random),
        Shift(random.integers(5, 8, channels)),
        Clip(-128, 127),
    )
    return Layer(f"{name}_layer", out, {source.name: source}, steps, (name,))


def block(random: np.random.Generator, channels: int, doublings: int, constant: int) -> list[Layer]:
    """Two convolutions in a row, and one beside them that doubles its result and adds theirs."""
    x = FeatureMap("x", 1, 8, 5, 4)
    a = convolution("a", x, channels, 1, random)
    b = convolution("b", a.output, channels, 3, random)
    side = convolution("y", x, channels, 1, random)
    more: list[Step] = [Shift(np.array(-doublings)), identity(b.output)]
    more += [Add(constant)] if constant else []
    more += [Shift(np.array(doublings)), Clip(-128, 127)]
    side = replace(side, sources={"x": x, "b": b.output}, steps=(*side.steps, *more))
    last = convolution("z", side.output, 8, 1, random)
    return [a, b, side, last]


def run(layers: Sequence[Layer], values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every map of a network."""
    found = dict(values)
    for layer in layers:
        found[layer.output.name] = evaluate(layer, found)
    return found


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1 << 30), st.sampled_from([4, 8, 16]), st.integers(1, 6), st.integers(0, 3))
def test_the_same_values(seed: int, channels: int, doublings: int, constant: int) -> None:
    random = np.random.default_rng(seed)
    layers = block(random, channels, doublings, constant)
    x = random.integers(-128, 128, (1, 8, 5, 4)).astype(np.int8)
    expected = run(layers, {"x": x})
    for kept in ({"y", "z"}, {"z"}):
        found = run(rewritten(layers, kept, CONFIG), {"x": x})
        for name in kept:
            assert np.array_equal(found[name], expected[name])


def test_the_sum_moves_to_the_finer_layer() -> None:
    layers = block(np.random.default_rng(0), 8, 1, 1)
    found = add_to_finer(layers, {"z"})
    assert [layer.name for layer in found] == ["a_layer", "y_layer", "b_layer", "z_layer"]
    first, second = found[1:3]
    assert first.output.name in second.sources and second.output.name == "y"
    kinds = [type(step) for step in second.steps]
    assert kinds == [Init, Product, Shift, Clip, Product, Shift, Clip]  # neither the doubling nor the constant is left
    assert set(first.sources) == {"x"} and set(second.sources) == {"a", "y/addend"}


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: (layers, {"b", "z"}),  # the map is wanted as it is
        lambda layers: ([*layers, convolution("w", layers[1].output, 4, 1, np.random.default_rng(1))], {"z", "w"}),
        lambda layers: (
            [*layers[:2], replace(layers[2], steps=layers[2].steps[:3] + layers[2].steps[4:]), layers[3]],
            (),
        ),
    ],
    ids=["kept", "used twice", "not int8"],
)
def test_a_sum_that_has_to_stay(change: object) -> None:
    layers, kept = change(block(np.random.default_rng(0), 8, 1, 1))  # type: ignore[operator]
    assert add_to_finer(layers, set(kept)) == list(layers)


def test_a_constant_that_would_take_a_bias_out_of_32_bits_stays() -> None:
    layers = block(np.random.default_rng(0), 8, 1, 1)
    b = layers[1]
    steps = (Init(np.full(8, 120 << 24)), b.steps[1], Shift(np.array(24)), Clip(-128, 127))
    assert add_to_finer([layers[0], replace(b, steps=steps), *layers[2:]], {"z"})[1].name == "y_layer"
    steps = (Init(np.full(8, (1 << 31) - (1 << 23))), *steps[1:])
    assert add_to_finer([layers[0], replace(b, steps=steps), *layers[2:]], {"z"})[1].name == "b_layer"


def test_channels_are_sorted_where_only_dense_products_see_them() -> None:
    random = np.random.default_rng(3)
    layers = block(random, 16, 1, 0)
    found = sort_channels(layers, {"z"}, CONFIG)
    amounts = found[0].steps[2]
    assert isinstance(amounts, Shift) and (np.diff(amounts.amounts) >= 0).all()  # a: only b reads it
    assert found[1].steps[2] is layers[1].steps[2]  # b is added channel by channel
    assert sort_channels(layers, {"a", "z"}, CONFIG) == layers


def test_channels_that_fill_no_block_or_are_compared_with_a_map_stay() -> None:
    random = np.random.default_rng(3)
    layers = block(random, 16, 1, 0)
    a = layers[0]
    compared = FeatureMap("w", 1, 16, 5, 4)
    other = replace(a, sources={**a.sources, "w": compared}, steps=(*a.steps, Maximum("w", (1, 1), ((0, 0),))))
    assert sort_channels([other, *layers[1:]], {"z"}, CONFIG)[0] is other
    few = replace(a.output, channels=14)
    shift = Shift(random.integers(5, 8, 14))
    ragged = replace(a, output=few, steps=(Init(np.array(0)), a.steps[1], shift, a.steps[3]))
    assert sort_channels([ragged, replace(layers[1], sources={"a": few})], {"b"}, CONFIG)[0] is ragged
