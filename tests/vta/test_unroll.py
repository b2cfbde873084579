"""Inputs unrolled along their rows: which are, that convolutions stay the same, and what it saves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.device import VtaDevice
from nestc.runtime.vta.layout import Columns, columns_from_json
from nestc.targets.vta.compiler import Network, compile_network
from nestc.targets.vta.evaluate import evaluate
from nestc.targets.vta.layer import Clip, FeatureMap, Init, Layer, Product, Shift
from nestc.targets.vta.unroll import unroll_inputs

CONFIG = VtaConfig()


def conv(
    channels: int, kernel: int, stride: int, dilation: int, pad: int, size: tuple[int, int], outputs: int = 20
) -> Layer:
    random = np.random.default_rng(channels + kernel)
    reach = (kernel - 1) * dilation + 1
    height, width = ((edge + 2 * pad - reach) // stride + 1 for edge in size)
    weights = random.integers(-128, 128, (2, kernel * kernel, 16, 16), np.int8)
    weights[:, :, :, channels:] = 0
    weights[1, :, outputs - 16 :] = 0
    taps = tuple((a * dilation - pad, b * dilation - pad) for a in range(kernel) for b in range(kernel))
    product = Product("x", (stride, stride), taps, ((0, 0), (1, 0)), weights)
    x, y = FeatureMap("x", 1, channels, *size), FeatureMap("y", 1, outputs, height, width)
    return Layer("conv", y, {"x": x}, (Init(np.array(128)), product, Shift(np.array(8)), Clip(-128, 127)))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 5), st.integers(2, 5), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3),
    st.tuples(st.integers(9, 12), st.integers(9, 12)),
)  # fmt: skip
def test_the_convolution_is_the_same(
    channels: int, kernel: int, stride: int, dilation: int, pad: int, size: tuple[int, int]
) -> None:
    layer = conv(channels, kernel, stride, dilation, pad, size)
    (made,), found = unroll_inputs([layer], {"x": (1, channels, *size)}, [], CONFIG)
    assert set(found) == {"x"}
    image = np.random.default_rng(1).integers(-128, 128, (1, channels, *size), np.int8)
    unrolled = found["x"].apply(image)
    source = made.sources["x"]
    assert unrolled.shape == (1, source.channels, source.height, source.width) == found["x"].shape(image.shape)
    assert np.array_equal(evaluate(made, {"x": unrolled}), evaluate(layer, {"x": image}))


def test_columns_by_hand() -> None:
    image = np.arange(1, 5, dtype=np.int8).reshape(1, 1, 1, 4)
    columns = Columns((-1, 0, 2), 2, 2)
    assert columns.apply(image).reshape(3, 2).tolist() == [[0, 2], [1, 3], [3, 0]]
    assert columns_from_json(columns.to_json()) == columns


def test_the_first_layer_of_resnet_multiplies_14_times_instead_of_49() -> None:
    layer = conv(3, 7, 2, 1, 3, (30, 30))
    (made,), _ = unroll_inputs([layer], {"x": (1, 3, 30, 30)}, [], CONFIG)
    product = made.steps[1]
    assert isinstance(product, Product)
    assert len(product.pairs) * len(product.taps) == 2 * 2 * 7
    assert product.strides == (2, 1)


@pytest.mark.parametrize(("channels", "kernel", "fixed"), [(16, 3, []), (9, 2, []), (3, 1, []), (3, 3, ["x"])], ids=str)
def test_what_would_not_gain_stays(channels: int, kernel: int, fixed: list[str]) -> None:
    layer = conv(channels, kernel, 1, 1, 0, (9, 9))
    assert unroll_inputs([layer], {"x": (1, channels, 9, 9)}, fixed, CONFIG) == ((layer,), {})


def test_two_products_of_one_layer_keep_the_image() -> None:
    layer = conv(3, 3, 1, 1, 1, (9, 9))
    twice = replace(layer, steps=(*layer.steps[:2], layer.steps[1], *layer.steps[2:]))
    assert unroll_inputs([twice], {"x": (1, 3, 9, 9)}, [], CONFIG) == ((twice,), {})


def test_readers_that_differ_keep_the_image() -> None:
    layers = [conv(3, 3, 1, 1, 1, (9, 9)), conv(3, 5, 1, 1, 2, (9, 9))]
    assert unroll_inputs(layers, {"x": (1, 3, 9, 9)}, [], CONFIG) == (tuple(layers), {})


@pytest.mark.parametrize("unroll", [True, False])
def test_an_unrolled_network_runs(unroll: bool) -> None:
    layer = conv(3, 5, 2, 1, 2, (11, 12))
    y = layer.output
    net = Network("net", [layer], {}, {"x": (1, 3, 11, 12)}, {"y": (1, y.channels, y.height, y.width)})
    artifact = compile_network(net, CONFIG, unroll=unroll)
    assert ("columns" in artifact.metadata["inputs"][0]) == unroll
    image = np.random.default_rng(2).integers(-128, 128, (1, 3, 11, 12), np.int8)
    (found,), _ = VtaDevice().load(artifact, 1)([image], [None])
    assert np.array_equal(found, evaluate(layer, {"x": image}))
