"""Pooling against ONNX Runtime, the node tests of the onnx package, and numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.kernels.checking import FamilyCheck, by_onnxruntime, node_cases
from nestc.kernels.pool import POOL
from nestc.kernels.testing import host_machine, region_of

MACHINE = host_machine()
RANDOM = np.random.default_rng(0)


CHECK = FamilyCheck(POOL)
compute, compare = by_onnxruntime, CHECK.compare
lowered_values, run_node_case = CHECK.lowered_values, CHECK.run_node_case


@pytest.mark.parametrize("blocked", [False, True])
def test_node_cases(blocked):
    kinds = ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
    cases = node_cases(*kinds)
    assert len(cases) > 40
    for case in cases:
        run_node_case(case, blocked)


def node_of(kind, kernel, strides, pads, extra):
    return helper.make_node(kind, ["x"], ["y"], kernel_shape=kernel, strides=strides, pads=pads, **extra)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_windows(data):
    rank = data.draw(st.integers(1, 3), "rank")
    kernel = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank), "kernel")
    strides = data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank), "strides")
    pads = [data.draw(st.integers(0, k - 1)) for k in kernel * 2]
    kind = data.draw(st.sampled_from(["MaxPool", "AveragePool"]))
    dilations = data.draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank), "dilations")
    extra = {"ceil_mode": data.draw(st.integers(0, 1)), "dilations": dilations}
    if kind == "AveragePool":
        # Without a tap inside, an average has no meaning.
        extra = {"count_include_pad": data.draw(st.integers(0, 1))}
    size = [data.draw(st.integers(k * 2, 12)) for k in kernel]
    channels = data.draw(st.integers(1, 19), "channels")
    x = RANDOM.normal(size=(data.draw(st.integers(1, 2)), channels, *size)).astype(np.float32)
    nodes = [node_of(kind, kernel, strides, pads, extra)]
    if data.draw(st.booleans(), "tail"):
        nodes.append(helper.make_node("Relu", ["y"], ["z"]))
    compare(nodes, {"x": x}, data.draw(st.booleans(), "blocked"))


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool"])
def test_interpreter_agrees(kind, blocked):
    x = RANDOM.normal(size=(1, 5, 6, 9)).astype(np.float32)
    compare([node_of(kind, [3, 3], [2, 1], [1, 1, 1, 1], {})], {"x": x}, blocked, jit=(True, False))


@pytest.mark.parametrize("blocked", [False, True])
def test_large_window_is_a_loop(blocked):
    x = RANDOM.normal(size=(1, 9, 16, 17)).astype(np.float32)
    compare([node_of("AveragePool", [13, 9], [1, 2], [3, 3, 3, 3], {})], {"x": x}, blocked)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float64", "float16"])
@pytest.mark.parametrize("blocked", [False, True])
def test_max_of_other_types(dtype, blocked):
    x = (RANDOM.normal(size=(1, 11, 9, 10)) * 50).astype(np.int8).astype(dtype)
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    wanted = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2].max(axis=(4, 5))
    node = node_of("MaxPool", [3, 3], [2, 2], [1, 1, 1, 1], {})
    compare([node], {"x": x}, blocked, expected={"y": wanted.astype(dtype)})


@pytest.mark.parametrize("order", [0, 1])
def test_indices(order):
    x = RANDOM.integers(0, 4, (2, 3, 7, 8)).astype(np.float32)  # few values: ties go to the first
    node = helper.make_node(
        "MaxPool", ["x"], ["y", "i"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], storage_order=order
    )
    compare([node], {"x": x}, blocked=True)


@pytest.mark.parametrize("shape", [(2, 11, 7, 7), (1, 16, 5), (1, 3, 4, 5, 6), (1, 8, 1, 1)])
@pytest.mark.parametrize("kind", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("blocked", [False, True])
def test_whole_image(kind, shape, blocked):
    x = RANDOM.normal(size=shape).astype(np.float32)
    nodes = [helper.make_node(kind, ["x"], ["y"]), helper.make_node("HardSwish", ["y"], ["z"])]
    compare(nodes, {"x": x}, blocked, jit=(True, False))


@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceMax"])
@pytest.mark.parametrize("keep", [0, 1])
def test_reduction_over_space(kind, keep):
    node = helper.make_node(kind, ["x", "axes"], ["y"], keepdims=keep)
    x = RANDOM.normal(size=(2, 19, 6, 5)).astype(np.float32)
    compare([node], {"x": x, "axes": np.array([-1, 2])}, blocked=True)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_lp(p):
    x = RANDOM.normal(size=(1, 9, 6, 7)).astype(np.float32)
    wanted = (np.abs(x.astype(np.float64)) ** p).sum(axis=(2, 3), keepdims=True) ** (1 / p)
    node = helper.make_node("GlobalLpPool", ["x"], ["y"], p=p)
    compare([node], {"x": x}, blocked=True, expected={"y": wanted.astype(np.float32)})


def test_refusals():
    x = np.zeros((1, 2, 4, 4), np.float32)
    y = np.zeros((1, 2, 1, 1), np.float32)
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"])
    region = region_of([node], {"x": x, "axes": np.array([1]), "y": y}, ["y"])
    assert "spatial axes" in (POOL.refusal(region) or "")
    assert POOL.refusal(region_of([helper.make_node("Relu", ["x"], ["y"])], {"x": x, "y": x}, ["y"]))
