"""Pools between DequantizeLinear and QuantizeLinear against integer arithmetic and ONNX Runtime."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.kernels.api import Layout
from nestc.kernels.checking import by_onnxruntime
from nestc.kernels.families import choose
from nestc.kernels.pool_int8 import POOL_INT8
from nestc.kernels.testing import host_machine, region_of, run_lowered

HOST = host_machine()
WIDE = dataclasses.replace(HOST, vector_bytes=64, vector_registers=32)


def f32(value):
    return np.array(value, np.float32)


def region_with(node, x, zero=7, dtype="uint8", tail=(), axes=None):
    """The node between DequantizeLinear and QuantizeLinear, and all values by ONNX Runtime."""
    values = {"x": x, "xs": f32(0.03), "xz": np.array(zero, x.dtype), "ys": f32(0.0171234), "yz": np.array(11, dtype)}
    nodes = [helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xf"]), node]
    if axes is not None:
        values["axes"] = np.array(axes, np.int64)
    last = "y"
    for i, op in enumerate(tail):
        nodes.append(helper.make_node(op, [last], [f"t{i}"]))
        last = f"t{i}"
    nodes.append(helper.make_node("QuantizeLinear", [last, "ys", "yz"], ["q"]))
    values |= by_onnxruntime(nodes, values)
    constants = ["xs", "xz", "ys", "yz", "axes"]
    return region_of(nodes, values, ["q"], [n for n in constants if n in values], node.op_type), values


def agree(region, values, target=HOST, blocked=False, jit=True):
    assert choose(region)[0] is POOL_INT8, POOL_INT8.refusal(region)
    incoming = {"x": Layout(target.lanes("float32"))} if blocked else {}
    layouts = POOL_INT8.layouts(region, target, incoming)
    found = run_lowered(region, POOL_INT8.lower(region, target, layouts), values, target, layouts, jit)["q"]
    off = np.abs(found.astype(int) - values["q"].astype(int))
    # A mean is summed in another order by ONNX Runtime, which decides near a tie.
    assert off.max(initial=0) <= 1 and off.sum() <= max(1, off.size // 200)
    return found


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_windows(data):
    rank = data.draw(st.integers(1, 2), "rank")
    kernel = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank), "kernel")
    strides = data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank), "strides")
    kind = data.draw(st.sampled_from(["MaxPool", "AveragePool"]))
    pads = [data.draw(st.integers(0, k - 1)) for k in kernel * 2]
    extra = {} if kind == "MaxPool" else {"count_include_pad": 1}
    node = helper.make_node(kind, ["xf"], ["y"], kernel_shape=kernel, strides=strides, pads=pads, **extra)
    size = [data.draw(st.integers(k * 2, 12)) for k in kernel]
    dtype = data.draw(st.sampled_from(["uint8", "int8"]))
    shape = (data.draw(st.integers(1, 2)), data.draw(st.sampled_from([3, 8, 16, 19])), *size)
    x = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, shape, np.uint8).view(dtype)
    tail = data.draw(st.sampled_from([(), ("Relu",), ("Sigmoid",)]))
    region, values = region_with(node, x, data.draw(st.sampled_from([0, 7, 100])), dtype, tail)
    agree(region, values, data.draw(st.sampled_from([HOST, WIDE])), data.draw(st.booleans(), "blocked"))


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("kind", ["GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax"])
@pytest.mark.parametrize("shape", [(2, 16, 7, 7), (1, 19, 5, 13), (1, 8, 40)])
def test_whole_images(kind, shape, blocked):
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    reduce_ = kind.startswith("Reduce")
    node = helper.make_node(kind, ["xf", "axes"] if reduce_ else ["xf"], ["y"])
    axes = list(range(2, len(shape))) if reduce_ else None
    region, values = region_with(node, x, axes=axes)
    agree(region, values, HOST, blocked)


def test_a_mean_is_exact():
    """Sums of int32 divided once: as accurate as float64."""
    x = np.random.default_rng(0).integers(0, 256, (1, 32, 64, 64), np.uint8)
    region, values = region_with(helper.make_node("GlobalAveragePool", ["xf"], ["y"]), x, zero=128)
    found = agree(region, values, HOST, True)
    mean = (x.astype(np.int64) - 128).sum((2, 3), keepdims=True) / 4096 * 0.03 / 0.0171234
    assert np.abs(found.astype(int) - 11 - np.clip(mean, -11, 244)).max() <= 0.5001


@pytest.mark.parametrize("kind", ["GlobalAveragePool", "AveragePool", "MaxPool"])
def test_the_interpreter_agrees(kind):
    extra = {} if kind.startswith("Global") else {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 0, 1]}
    if kind == "AveragePool":
        extra["count_include_pad"] = 1
    x = np.random.default_rng(0).integers(0, 256, (1, 11, 6, 5), np.uint8)
    region, values = region_with(helper.make_node(kind, ["xf"], ["y"], **extra), x)
    for blocked in (False, True):
        agree(region, values, HOST, blocked, jit=False)


@pytest.mark.parametrize("target", [HOST, WIDE], ids=["host", "wide"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_maximum_in_blocks_is_that_of_the_integers(dtype, target):
    """Channels that fill the last block only in part, borders that windows reach over, and equal scales: no rounding."""
    x = np.random.default_rng(0).integers(0, 256, (2, 19, 9, 10), np.uint8).view(dtype)
    node = helper.make_node("MaxPool", ["xf"], ["y"], kernel_shape=[3, 3], strides=[2, 1], pads=[1, 1, 1, 1])
    region, values = region_with(node, x, dtype=dtype)
    values |= {"ys": values["xs"], "yz": values["xz"]}
    region = dataclasses.replace(region, constants={name: lambda name=name: values[name] for name in region.constants})
    least = np.iinfo(dtype).min
    wide = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=least)
    taps = [wide[:, :, i : i + 9 : 2, j : j + 10] for i in range(3) for j in range(3)]
    layouts = POOL_INT8.layouts(region, target, {"x": Layout(target.lanes("float32"))})
    assert layouts["x"].block == layouts["q"].block == target.lanes("float32")
    found = run_lowered(region, POOL_INT8.lower(region, target, layouts), values, target, layouts)["q"]
    np.testing.assert_array_equal(found, np.maximum.reduce(taps))


def test_windows_of_different_sizes_are_left_to_float():
    x = np.random.default_rng(0).integers(0, 256, (1, 16, 6, 6), np.uint8)
    node = helper.make_node("AveragePool", ["xf"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    region, values = region_with(node, x)
    assert "numbers of taps" in (POOL_INT8.refusal(region) or "")
    family, _ = choose(region)
    found = run_lowered(region, family.lower(region, HOST, {}), values, HOST)["q"]
    assert np.abs(found.astype(int) - values["q"].astype(int)).max() <= 1
