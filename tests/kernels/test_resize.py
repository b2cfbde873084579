"""Resize and Upsample against ONNX Runtime and the node tests of the onnx package."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.kernels.checking import FamilyCheck, by_onnxruntime, node_cases
from nestc.kernels.resize import RESIZE
from nestc.kernels.testing import host_machine, region_of

MACHINE = host_machine()
RANDOM = np.random.default_rng(0)


CHECK = FamilyCheck(RESIZE)
compute, compare = by_onnxruntime, CHECK.compare
lowered_values, run_node_case = CHECK.lowered_values, CHECK.run_node_case


@pytest.mark.parametrize("blocked", [False, True])
def test_node_cases(blocked):
    cases = node_cases("Resize", "Upsample")
    assert len(cases) > 30
    for case in cases:
        run_node_case(case, blocked, constants=[value.name for value in case.model.graph.input][1:])


def resize(scales=None, sizes=None, **attributes):
    inputs = ["x", "", "scales"] if scales is not None else ["x", "", "", "sizes"]
    feeds = {"scales": np.array(scales, np.float32)} if scales is not None else {"sizes": np.array(sizes)}
    return helper.make_node("Resize", inputs, ["y"], **attributes), feeds


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_images(data):
    mode = data.draw(st.sampled_from(["nearest", "linear", "cubic"]), "mode")
    transforms = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
    attributes = {"mode": mode, "coordinate_transformation_mode": data.draw(st.sampled_from(transforms), "transform")}
    if mode == "nearest":
        roundings = ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]
        attributes["nearest_mode"] = data.draw(st.sampled_from(roundings), "rounding")
    if mode == "cubic":
        attributes["exclude_outside"] = data.draw(st.integers(0, 1), "exclude_outside")
    shape = (1, data.draw(st.integers(1, 11), "channels"), *(data.draw(st.integers(2, 9)) for _ in range(2)))
    out = [*shape[:2], *(data.draw(st.integers(2, 14)) for _ in range(2))]
    node, feeds = resize(sizes=out, **attributes)
    x = RANDOM.normal(size=shape).astype(np.float32)
    compare([node], {"x": x, **feeds}, data.draw(st.booleans(), "blocked"))


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_interpreter_agrees(mode, blocked):
    node, feeds = resize(scales=[1, 1, 2, 1.5], mode=mode)
    x = RANDOM.normal(size=(1, 5, 3, 4)).astype(np.float32)
    nodes = [node, helper.make_node("Sigmoid", ["y"], ["z"])]
    compare(nodes, {"x": x, **feeds}, blocked, jit=(True, False))


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("scales", [[1, 1, 3], [1, 1, 2, 2, 2], [1, 1, 2, 1], [1, 1, 1, 3]])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_ranks(mode, scales, blocked):
    node, feeds = resize(scales=scales, mode=mode)
    x = RANDOM.normal(size=(1, 9, *[4] * (len(scales) - 2))).astype(np.float32)
    compare([node], {"x": x, **feeds}, blocked)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool", "float16"])
def test_copies_of_other_types(dtype):
    node, feeds = resize(scales=[1, 1, 2, 2], mode="nearest", coordinate_transformation_mode="asymmetric")
    x = RANDOM.integers(0, 100, (1, 9, 3, 4)).astype(dtype)
    wanted = x.repeat(2, axis=2).repeat(2, axis=3)
    for blocked in (False, True):
        compare([node], {"x": x, **feeds}, blocked, expected={"y": wanted})


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_crop(mode):
    node = helper.make_node(
        "Resize",
        ["x", "roi", "", "sizes"],
        ["y"],
        mode=mode,
        coordinate_transformation_mode="tf_crop_and_resize",
        extrapolation_value=7.0,
    )
    roi = np.array([0, 0, 0.1, -0.2, 1, 1, 1.3, 0.9], np.float32)
    x = RANDOM.normal(size=(1, 3, 5, 7)).astype(np.float32)
    feeds = {"x": x, "roi": roi, "sizes": np.array([1, 3, 4, 6])}
    compare([node], feeds, blocked=True)


def test_refusals():
    node, feeds = resize(scales=[1, 1, 2, 2], mode="linear")
    x = np.zeros((1, 2, 3, 3), np.uint8)
    y = np.zeros((1, 2, 6, 6), np.uint8)
    assert "uint8" in (RESIZE.refusal(region_of([node], {"x": x, "y": y, **feeds}, ["y"])) or "")
