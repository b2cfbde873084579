"""Parameters of direct convolutions and products that a measurement may choose: every one computes the same, and names them."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from nestc.kernels.api import Layout
from nestc.kernels.checking import by_onnxruntime
from nestc.kernels.choices import ConvChoice, GemmChoice, below, conv_choice, gemm_choice
from nestc.kernels.conv import CONV, ConvFamily, conv_ways
from nestc.kernels.families import GENERIC
from nestc.kernels.gemm import GEMM, gemm_ways
from nestc.kernels.testing import host_machine, region_of, run_lowered
from nestc.kernels.ways import around, named

MACHINE = host_machine()
BLOCK = Layout(MACHINE.lanes("float32"))


def convolution(channels, outputs, size, kernel, stride=1, group=1):
    """Region, feeds and expected output of a seeded convolution with a Relu."""
    random = np.random.default_rng(5)
    x = random.standard_normal((1, channels, *size)).astype(np.float32)
    w = random.standard_normal((outputs, channels // group, *kernel)).astype(np.float32)
    w /= np.sqrt(np.prod(w.shape[1:]))
    feeds = {"x": x, "w": w, "b": random.standard_normal(outputs).astype(np.float32)}
    pads = [each // 2 for each in kernel] * 2
    attributes = {"pads": pads, "strides": [stride] * 2, "group": group}
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", **attributes)]
    nodes.append(helper.make_node("Relu", ["y"], ["z"]))
    values = by_onnxruntime(nodes, feeds)
    return region_of(nodes, {**feeds, **values}, ["z"], ["w", "b"]), feeds, values["z"]


@pytest.mark.parametrize(
    "shape",
    [
        (32, 40, (9, 13), (3, 3)),
        (64, 64, (14, 14), (1, 1)),
        (64, 32, (14, 14), (1, 1), 2),
        (128, 24, (7, 7), (3, 3), 2),
        (48, 48, (10, 11), (3, 3), 1, 3),
        (12, 12, (6, 6), (3, 3), 1, 3),
        (3, 16, (20, 20), (7, 7), 2),
    ],
)
def test_every_way_computes_the_same(shape) -> None:
    region, feeds, expected = convolution(*shape)
    ways = conv_ways(region, MACHINE)
    assert ways[0] is CONV and len(ways) > 2
    assert len({way.name for way in ways}) == len(ways)
    for way in ways:
        layouts = way.layouts(region, MACHINE, dict.fromkeys(region.inputs, BLOCK))
        found = run_lowered(region, way.lower(region, MACHINE, layouts), feeds, MACHINE, layouts)["z"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * float(np.abs(expected).max()), err_msg=way.name)


@pytest.mark.parametrize("name", ["conv_99x9", "conv_1x1_r99999_c99999", "conv_r1_c1", "conv_0x0_r0_c0", "conv_3x7"])
def test_a_choice_of_another_region_does_no_harm(name) -> None:
    choice = conv_choice(name)
    assert choice is not None
    region, feeds, expected = convolution(16, 24, (5, 7), (3, 3))
    layouts = CONV.layouts(region, MACHINE, dict.fromkeys(region.inputs, BLOCK))
    found = run_lowered(region, ConvFamily(choice).lower(region, MACHINE, layouts), feeds, MACHINE, layouts)["z"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * float(np.abs(expected).max()))


def test_ways_around_a_tile_keep_it() -> None:
    region, _, _ = convolution(64, 64, (28, 28), (3, 3))
    around = ConvFamily(ConvChoice(tile=(4, 3)))
    ways = conv_ways(region, MACHINE, around)
    assert ways[0] is around and len(ways) > 1
    assert all(way.choice.tile == (4, 3) for way in ways)


def test_depthwise_kernels_leave_nothing_to_choose() -> None:
    region, _, _ = convolution(16, 16, (8, 8), (3, 3), 1, 16)
    assert conv_ways(region, MACHINE) == (CONV,)


@pytest.mark.parametrize(
    "choice", [ConvChoice(), ConvChoice((6, 2)), ConvChoice(None, 4), ConvChoice((14, 1), 2, 8), ConvChoice(blocks=3)]
)
def test_names_of_convolutions_are_read_back(choice) -> None:
    assert conv_choice(ConvFamily(choice).name) == choice


@pytest.mark.parametrize(
    "choice", [GemmChoice(), GemmChoice((6, 2)), GemmChoice(None, (4, 1)), GemmChoice((4, 3), (1, 9), 2)]
)
def test_names_of_products_are_read_back(choice) -> None:
    assert gemm_choice(f"gemm{choice.text}") == choice


@pytest.mark.parametrize(
    "name", ["", "winograd4", "conv_", "conv_6", "conv_6x2x3", "conv_r", "gemm_6x2", "convolution"]
)
def test_other_names_are_none_of_a_convolution(name) -> None:
    assert conv_choice(name) is None


def test_below() -> None:
    assert [below(12, most) for most in (0, 1, 2, 5, 7, 11, 12, 99)] == [1, 1, 2, 4, 6, 6, 12, 12]


def product(a, b, tail=False):
    """Region, feeds and expected output of a seeded MatMul with constant weights, and a heavy tail if asked for."""
    random = np.random.default_rng(6)
    feeds = {"a": random.standard_normal(a).astype(np.float32), "b": random.standard_normal(b).astype(np.float32)}
    feeds["b"] /= np.sqrt(b[0])
    nodes = [helper.make_node("MatMul", ["a", "b"], ["y"], name="product")]
    if tail:
        nodes.append(helper.make_node("Tanh", ["y"], ["z"]))
    values = by_onnxruntime(nodes, feeds)
    output = nodes[-1].output[0]
    return region_of(nodes, {**feeds, **values}, [output], ["b"]), feeds, values[output]


@pytest.mark.parametrize(
    "shape", [((31, 64), (64, 72)), ((2, 24, 1024), (1024, 40)), ((100, 520), (520, 33), True), ((1, 600), (600, 64))]
)
def test_every_way_of_a_product_computes_the_same(shape) -> None:
    region, feeds, expected = product(*shape)
    ways = gemm_ways(region, MACHINE)
    assert ways[0] is GEMM and len(ways) > 2
    assert len({way.name for way in ways}) == len(ways)
    for way in [*ways, *around(ways[1], region, MACHINE)]:
        assert named(way.name, region) is not None
        layouts = way.layouts(region, MACHINE, {})
        (found,) = run_lowered(region, way.lower(region, MACHINE, layouts), feeds, MACHINE, layouts).values()
        np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * float(np.abs(expected).max()), err_msg=way.name)


@pytest.mark.parametrize("name", ["gemm_99x9", "gemm_0x0_i0x0_k0", "gemm_i999x999", "gemm_k999", "gemm_16x1_k7"])
def test_a_choice_of_another_product_does_no_harm(name) -> None:
    region, feeds, expected = product((7, 36), (36, 20))
    family = named(name, region)
    assert family is not None
    (found,) = run_lowered(region, family.lower(region, MACHINE, {}), feeds, MACHINE, {}).values()
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * float(np.abs(expected).max()))


def test_names_of_others_are_nothing() -> None:
    region, _, _ = product((7, 36), (36, 20))
    assert named("conv_6x2", region) is None and named("winograd4", region) is None
    assert around(GENERIC, region, MACHINE) == ()


def test_products_with_a_vector_leave_nothing_to_choose() -> None:
    region, _, _ = product((1, 4096), (4096, 1))
    assert gemm_ways(region, MACHINE) == (GEMM,)
