"""Regions with quantized operands: what they say, how sums are requantized, and the way through float kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.graph.region import Region
from nestc.kernels.api import Layout, Lowered
from nestc.kernels.checking import by_onnxruntime
from nestc.kernels.families import choose
from nestc.kernels.operands import Operands
from nestc.kernels.quantized import float_region, quantized_anchor
from nestc.kernels.requantize import Requantize
from nestc.kernels.testing import host_machine, region_of, run_lowered
from nestc.tensor.build import Builder
from nestc.tensor.ir import Load

MACHINE = host_machine()
node = helper.make_node


def quantized_conv(
    tail: Sequence[onnx.NodeProto], more: Mapping[str, np.ndarray], outputs: Sequence[str], seed: int = 0
) -> tuple[Region, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A region of a quantized 1x1 convolution of 3 to 5 channels with `tail`, its inputs, and all values by ORT."""
    random = np.random.default_rng(seed)
    feeds = {
        "x": random.integers(0, 256, (1, 3, 4, 4)).astype(np.uint8),
        "w": random.integers(-127, 128, (5, 3, 1, 1)).astype(np.int8),
        "b": random.integers(-5000, 5000, 5).astype(np.int32),
        "sx": np.array(0.02, np.float32),
        "zx": np.array(117, np.uint8),
        "sw": np.linspace(0.01, 0.03, 5).astype(np.float32),
        "zw": np.zeros(5, np.int8),
        "sb": (np.float32(0.02) * np.linspace(0.01, 0.03, 5).astype(np.float32)),
        "sy": np.array(0.11, np.float32),
        "zy": np.array(30, np.uint8),
        **more,
    }
    nodes = [
        node("DequantizeLinear", ["x", "sx", "zx"], ["xf"]),
        node("DequantizeLinear", ["w", "sw", "zw"], ["wf"], axis=0),
        node("DequantizeLinear", ["b", "sb"], ["bf"], axis=0),
        node("Conv", ["xf", "wf", "bf"], ["c"]),
        *tail,
    ]
    values = {**feeds, **by_onnxruntime(nodes, feeds)}
    constants = [name for name in feeds if name not in ("x", "r")]
    return region_of(nodes, values, outputs, constants, anchor="Conv"), feeds, values


def test_what_a_region_says() -> None:
    region, feeds, values = quantized_conv([node("Relu", ["c"], ["y"])], {}, ["y"])
    found = quantized_anchor(region)
    assert found is not None and found.op.op_type == "Conv"
    x, w, b = (found.operand(i) for i in range(3))
    assert x is not None and w is not None and b is not None
    assert (x.name, x.dtype, float(x.scale), int(x.zero_point)) == ("x", "uint8", np.float32(0.02), 117)
    assert (w.name, w.dtype, w.axis, w.scale.shape) == ("w", "int8", 0, (5,))
    assert (b.name, b.dtype, b.axis) == ("b", "int32", 0)
    assert [op.op_type for op in found.tail] == ["Relu"]
    np.testing.assert_allclose(w.values(feeds["w"]), values["wf"], rtol=1e-6)
    inner = float_region(region)
    assert inner.inputs == ("xf",) and set(inner.constants) == {"wf", "bf"}
    np.testing.assert_allclose(inner.constant("bf"), values["bf"], rtol=1e-6)


def test_no_prologue_says_nothing() -> None:
    x = np.ones((2, 3), np.float32)
    region = region_of([node("Relu", ["x"], ["y"])], {"x": x, "y": x}, ["y"])
    assert quantized_anchor(region) is None


RESIDUAL = [
    node("QuantizeLinear", ["c", "sy", "zy"], ["q"]),
    node("DequantizeLinear", ["q", "sy", "zy"], ["d"]),
    node("DequantizeLinear", ["r", "sx", "zx"], ["rf"]),
    node("Add", ["d", "rf"], ["s"]),
    node("Relu", ["s"], ["t"]),
    node("QuantizeLinear", ["t", "sy", "zy"], ["y"]),
]
TAILS = {
    "none": [node("QuantizeLinear", ["c", "sy", "zy"], ["y"])],
    "relu": [node("Relu", ["c"], ["t"]), node("QuantizeLinear", ["t", "sy", "zy"], ["y"])],
    "clip": [node("Clip", ["c", "lo", "hi"], ["t"]), node("QuantizeLinear", ["t", "sy", "zy"], ["y"])],
    "float": [node("LeakyRelu", ["c"], ["y"])],
    "residual": RESIDUAL,
}


@pytest.mark.parametrize("name", TAILS)
def test_the_way_through_float_kernels(name: str) -> None:
    more = {"lo": np.array(0.0, np.float32), "hi": np.array(6.0, np.float32)} if name == "clip" else {}
    if name == "residual":
        more = {"r": np.random.default_rng(1).integers(0, 256, (1, 5, 4, 4)).astype(np.uint8)}
    region, feeds, values = quantized_conv(TAILS[name], more, ["y"])
    family, refusals = choose(region)
    assert family is not None, refusals
    block = Layout(MACHINE.lanes("float32"))
    layouts = family.layouts(region, MACHINE, dict.fromkeys(region.inputs, block))
    found = run_lowered(region, family.lower(region, MACHINE, layouts), feeds, MACHINE, layouts)["y"]
    off_by = np.abs(found.astype(np.float64) - values["y"].astype(np.float64))
    assert off_by.max() <= (1 if name != "float" else 1e-4)
    assert np.mean(off_by == 0) >= 0.95 or name == "float"


def requantized(
    region: Region, acc: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, feeds: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The region's output for the int32 sums `acc` of its anchor, through a kernel that only requantizes."""
    k = Builder("requantize")
    operands = Operands(k, region, {})
    sums = k.param("acc", "int32", acc.shape)
    operands.args.append("acc")
    anchor = next(op for op in region.ops if op.op_type == "Conv")
    tail = Requantize(operands, region, anchor, scale, 1, bias)
    tail.declare()
    with k.parallel("item", *acc.shape) as index:
        k.emit(tail.stores(index, Load(sums, index)))
    lowered = Lowered((operands.launch(),), constants={**operands.constants, "acc": acc})
    outputs = [run_lowered(region, lowered, feeds, MACHINE, jit=jit)[region.outputs[0]] for jit in (True, False)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    return outputs[0]


@pytest.mark.parametrize("name", TAILS)
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 1 << 30), with_bias=st.booleans())
def test_sums_are_requantized(name: str, seed: int, with_bias: bool) -> None:
    random = np.random.default_rng(seed)
    more = {"lo": np.array(-1.3, np.float32), "hi": np.array(6.0, np.float32)} if name == "clip" else {}
    if name == "residual":
        more = {"r": random.integers(0, 256, (1, 5, 4, 4)).astype(np.uint8)}
    region, feeds, values = quantized_conv(TAILS[name], more, ["y"], seed % 7)
    acc = random.integers(-40000, 40000, values["c"].shape).astype(np.int32)
    scale = np.float32(0.02) * feeds["sw"]
    bias = random.standard_normal(5).astype(np.float32) if with_bias else None
    found = requantized(region, acc, scale, bias, feeds)
    real = (acc * scale.reshape(1, -1, 1, 1).astype(np.float64)).astype(np.float32)
    if bias is not None:
        real += bias.reshape(1, -1, 1, 1)
    wanted = by_onnxruntime(TAILS[name], {"c": real, **{k: v for k, v in feeds.items() if k in _read(TAILS[name])}})
    off_by = np.abs(found.astype(np.float64) - wanted["y"].astype(np.float64))
    if found.dtype == np.float32:
        assert off_by.max() < 1e-4
    else:
        assert off_by.max() <= 1 and np.mean(off_by == 0) >= 0.97


def _read(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    return {name for each in nodes for name in each.input}
