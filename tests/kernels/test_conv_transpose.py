"""Transposed convolution against ONNX Runtime and the node tests of the onnx package."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.kernels.checking import FamilyCheck, by_onnxruntime, node_cases
from nestc.kernels.conv_transpose import CONV_TRANSPOSE
from nestc.kernels.testing import host_machine, region_of

MACHINE = host_machine()
RANDOM = np.random.default_rng(0)


CHECK = FamilyCheck(CONV_TRANSPOSE)
compute, compare = by_onnxruntime, CHECK.compare
lowered_values, run_node_case = CHECK.lowered_values, CHECK.run_node_case


@pytest.mark.parametrize("blocked", [False, True])
def test_node_cases(blocked):
    cases = node_cases("ConvTranspose")
    assert len(cases) > 9
    for case in cases:
        run_node_case(case, blocked, ("test_convtranspose_group_2", "test_convtranspose_group_2_image_3"))


def case(data_shape, weight_shape, tail=False, **attributes):
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], **attributes)
    shapes = {"x": data_shape, "w": weight_shape, "b": (weight_shape[1] * attributes.get("group", 1),)}
    feeds = {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return [node, helper.make_node("Relu", ["y"], ["z"])] if tail else [node], feeds


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_shapes(data):
    rank = data.draw(st.integers(1, 3), "rank")
    kernel = [data.draw(st.integers(1, 4)) for _ in range(rank)]
    strides = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    dilations = [data.draw(st.integers(1, 2)) for _ in range(rank)]
    pads = [data.draw(st.integers(0, k - 1)) for k in kernel * 2]
    size = [data.draw(st.integers(3, 7)) for _ in range(rank)]
    extra = [data.draw(st.integers(0, max(0, s - 1))) for s in strides]
    channels, features = data.draw(st.integers(1, 19), "channels"), data.draw(st.integers(1, 19), "features")
    nodes, feeds = case(
        (data.draw(st.integers(1, 2)), channels, *size),
        (channels, features, *kernel),
        data.draw(st.booleans(), "tail"),
        strides=strides,
        dilations=dilations,
        pads=pads,
        output_padding=extra,
    )
    if any(n < 1 for n in compute(nodes, feeds)["y"].shape):
        return
    constants = ["w", "b"] if data.draw(st.booleans(), "constant") else []
    compare(nodes, feeds, data.draw(st.booleans(), "blocked"), constants)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize(("kernel", "pad"), [(2, 0), (3, 1), (4, 1)])
def test_interpreter_agrees(kernel, pad, blocked):
    nodes, feeds = case((1, 5, 3, 4), (5, 6, kernel, kernel), strides=[2, 2], pads=[pad] * 4)
    compare(nodes, feeds, blocked, ["w", "b"], jit=(True, False))


@pytest.mark.parametrize("constants", [[], ["w", "b"]])
def test_groups(constants):
    nodes, feeds = case((2, 32, 4, 5), (32, 16, 3, 3), strides=[2, 2], group=2)
    compare(nodes, feeds, True, constants)


@pytest.mark.parametrize("extra", [{"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}, {"output_shape": [11, 8]}])
def test_output_shapes(extra):
    nodes, feeds = case((1, 9, 5, 4), (9, 10, 3, 3), strides=[2, 2], **extra)
    compare(nodes, feeds, True, ["w", "b"])


@pytest.mark.parametrize("features", [1, 3])
def test_few_output_channels(features):
    nodes, feeds = case((2, 24, 5, 6), (24, features, 3, 4), True, strides=[2, 2], pads=[1, 0, 0, 1])
    compare(nodes, feeds, True, ["w", "b"], jit=(True, False))


def test_row_without_border():
    nodes, feeds = case((1, 16, 4, 10), (16, 8, 2, 2), strides=[2, 2])
    compare(nodes, feeds, True, ["w", "b"])


def test_many_phases():
    nodes, feeds = case((1, 8, 4, 5), (8, 9, 16, 16), strides=[8, 8], pads=[4] * 4)
    compare(nodes, feeds, True, ["w", "b"])


def test_refuses_other_types():
    nodes, feeds = case((1, 8, 4, 5), (8, 9, 2, 2))
    wide = {name: array.astype(np.float64) for name, array in (feeds | compute(nodes, feeds)).items()}
    assert "float64" in (CONV_TRANSPOSE.refusal(region_of(nodes, wide, ["y"])) or "")
