"""Winograd convolution in integers: its matrices, its bounds, and its kernels against the direct one, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.graph.region import Region
from nestc.kernels.api import PLAIN
from nestc.kernels.conv_int8 import CONV_INT8
from nestc.kernels.families import alternatives
from nestc.kernels.position_products import Plan
from nestc.kernels.requantize import Requantize
from nestc.kernels.testing import host_machine, region_of, run_lowered
from nestc.kernels.winograd_int8 import WINOGRAD_INT8, WinogradInt8Family
from nestc.kernels.winograd_int8_plan import IntegerTiling, plan, tile
from nestc.kernels.winograd_int8_transform import integer_transform
from nestc.targets.cpu.machine import machine

HOST = host_machine()
X86 = HOST.triple.startswith("x86_64")
WIDE = dataclasses.replace(HOST, vector_bytes=64, vector_registers=32)
MACHINES = {
    "host": HOST,
    "wide": WIDE,
    "dotprod": dataclasses.replace(HOST, vector_bytes=16, vector_registers=32, dotprod=True),
    **({"sse2": machine("sse2")} if X86 else {}),
}
Arrays = dict[str, np.ndarray]


def case(
    seed: int,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    pads: list[int],
    x_dtype: str = "uint8",
    zero: int = 3,
    bias: bool = True,
    residual: bool = False,
    quantized: bool = True,
    most: int = 127,
) -> tuple[Region, Arrays]:
    """DequantizeLinear -> Conv -> [DequantizeLinear, Add] -> [Relu, QuantizeLinear], and what it is fed. Extremes are
    frequent among inputs and weights (-`most` to `most`)."""
    rng = np.random.default_rng(seed)
    info, rank = np.iinfo(x_dtype), len(x_shape) - 2
    x = rng.integers(info.min, info.max, x_shape, x_dtype, endpoint=True)
    x = np.where(rng.random(x_shape) < 0.3, rng.choice([info.min, info.max], x_shape), x).astype(x_dtype)
    w = np.where(rng.random(w_shape) < 0.3, rng.choice([-most, most], w_shape), rng.integers(-most, most + 1, w_shape))
    out = w_shape[0]
    spatial = [x_shape[2 + d] + pads[d] + pads[rank + d] - w_shape[2 + d] + 1 for d in range(rank)]
    shape = (x_shape[0], out, *spatial)
    values: Arrays = {
        "xq": x,
        "sx": np.asarray(0.02, np.float32),
        "zx": np.asarray(zero, x_dtype),
        "wq": w.astype(np.int8),
        "sw": rng.uniform(0.001, 0.002, out).astype(np.float32),
        "zw": np.zeros(out, np.int8),
        "x": np.zeros(x_shape, np.float32),
        "w": np.zeros(w_shape, np.float32),
        **{name: np.zeros(shape, np.float32) for name in ("y", "d", "s", "r")},
        "sy": np.asarray(0.37, np.float32),
        "zy": np.asarray(5, np.uint8),
        "q": np.zeros(shape, np.uint8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["x"]),
        helper.make_node("DequantizeLinear", ["wq", "sw", "zw"], ["w"], axis=0),
    ]
    names = ["x", "w"]
    if bias:
        values |= {"bq": rng.integers(-(2**14), 2**14, out).astype(np.int32), "sb": 0.02 * values["sw"]}
        values["b"] = np.zeros(out, np.float32)
        nodes.append(helper.make_node("DequantizeLinear", ["bq", "sb"], ["b"], axis=0))
        names.append("b")
    last = "y"
    if residual:
        values |= {"rq": rng.integers(0, 255, shape).astype(np.uint8), "sr": np.asarray(0.3, np.float32)}
        values["zr"] = np.asarray(7, np.uint8)
    nodes.append(helper.make_node("Conv", names, ["y"], name="conv", pads=pads))
    if residual:
        nodes.append(helper.make_node("DequantizeLinear", ["rq", "sr", "zr"], ["d"]))
        nodes.append(helper.make_node("Add", ["y", "d"], ["s"]))
        last = "s"
    nodes.append(helper.make_node("Relu", [last], ["r"]))
    if quantized:
        nodes.append(helper.make_node("QuantizeLinear", ["r", "sy", "zy"], ["q"]))
    made = {"xq", "rq"}
    region = region_of(nodes, values, ["q" if quantized else "r"], [n for n in values if n not in made], "Conv")
    return region, {name: values[name] for name in region.inputs}


def check(
    family: WinogradInt8Family,
    region: Region,
    feeds: Arrays,
    which: str = "host",
    cut: Plan | None = None,
    jit: bool = True,
) -> None:
    """The kernels give what the direct one gives, bit for bit."""
    cpu = MACHINES[which]
    run_on = cpu if which == "sse2" else HOST
    assert family.refusal(region) is None
    layouts = dict(family.layouts(region, cpu, dict.fromkeys(region.inputs, PLAIN)))
    lowered = family.lower(region, cpu, layouts) if cut is None else family.lower_with(region, cpu, layouts, cut)
    name = region.outputs[0]
    found = run_lowered(region, lowered, feeds, run_on, layouts, jit)[name]
    expected = run_lowered(region, CONV_INT8.lower(region, cpu, layouts), feeds, run_on, layouts)[name]
    np.testing.assert_array_equal(found, expected)
    assert np.unique(found).size > 8


# -- matrices


@pytest.mark.parametrize(("m", "r"), [(2, 3), (4, 3), (2, 5), (1, 1)])
@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_the_identity_holds_exactly(m: int, r: int, data: st.DataObject) -> None:
    t = integer_transform(m, r)
    assert t is not None and t.n == m + r - 1
    numbers = data.draw(st.lists(st.integers(-255, 255), min_size=t.n + r, max_size=t.n + r))
    d, w = np.array(numbers[: t.n]), np.array(numbers[t.n :])
    wide = np.array(t.at) @ ((np.array(t.g) @ w) * (np.array(t.bt) @ d))
    expected = np.array([(d[i : i + r] * w).sum() for i in range(m)])
    np.testing.assert_array_equal(wide, expected * t.odd << np.array(t.shifts))
    assert np.abs(np.array(t.bt) @ d).max() <= 255 * t.input_growth
    assert np.abs(np.array(t.g) @ w).max() <= 255 * t.weight_growth


def test_other_points_are_refused() -> None:
    assert integer_transform(6, 3) is None and integer_transform(1, 3) is None and integer_transform(4, 5) is None


# -- kernels


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("fused", [True, False])
def test_tails_and_borders(m: int, fused: bool) -> None:
    family = WinogradInt8Family(m, fused)
    same = [1, 1, 1, 1]
    check(family, *case(1, (1, 24, 9, 11), (32, 24, 3, 3), same))
    check(family, *case(2, (2, 16, 8, 8), (20, 16, 3, 3), same, "int8", -128, bias=False))
    check(family, *case(3, (1, 16, 6, 7), (16, 16, 3, 3), same, residual=True))
    check(family, *case(4, (1, 32, 7, 6), (24, 32, 3, 3), [0, 2, 1, 0], quantized=False))
    check(family, *case(5, (1, 16, 2, 3), (16, 16, 3, 3), same, zero=255))


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_random_convolutions(data: st.DataObject) -> None:
    draw = data.draw
    rank = draw(st.sampled_from([1, 2, 2, 2]))
    m = draw(st.sampled_from([2, 4]))
    kernels = [(3,), (5,)] if rank == 1 else [(3, 3), (3, 3), (1, 3), (3, 1), (5, 1)]
    kernel = draw(st.sampled_from([k for k in kernels if m == 2 or 5 not in k]))
    pads = [draw(st.integers(0, k // 2)) for k in kernel * 2]
    size = [k + draw(st.integers(0, 9)) for k in kernel]
    into, out = draw(st.integers(16, 50)), draw(st.sampled_from([16, 21, 40]))
    x_dtype = draw(st.sampled_from(["uint8", "int8"]))
    zero = draw(st.integers(np.iinfo(x_dtype).min, np.iinfo(x_dtype).max))
    region, feeds = case(
        draw(st.integers(0, 99)),
        (draw(st.integers(1, 2)), into, *size),
        (out, into, *kernel),
        pads,
        x_dtype,
        zero,
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        quantized=draw(st.booleans()),
    )
    fused = draw(st.sampled_from([None, True, False]))
    check(WinogradInt8Family(m, fused), region, feeds, draw(st.sampled_from(sorted(MACHINES))))


@pytest.mark.parametrize("cut", [Plan(2, 3, 2, 1, True), Plan(5, 1, 3, 2, False), Plan(1, 2, 1, 2, True)])
def test_any_cut_is_right(cut: Plan) -> None:
    check(WinogradInt8Family(4), *case(6, (2, 40, 9, 10), (48, 40, 3, 3), [1, 1, 1, 1]), cut=cut)


def test_the_interpreter_agrees() -> None:
    region, feeds = case(7, (1, 16, 5, 6), (16, 16, 3, 3), [1, 1, 1, 1])
    for m in (2, 4):
        check(WinogradInt8Family(m), region, feeds, jit=False)


def test_sums_that_wrap_are_exact() -> None:
    """Products at single positions are far beyond 32 bits here, and the largest outputs near the limit."""
    region, feeds = case(8, (1, 112, 6, 6), (16, 112, 3, 3), [1, 1, 1, 1], zero=0)
    check(WinogradInt8Family(4), region, feeds)


def test_zero_point_that_only_the_run_knows() -> None:
    rng = np.random.default_rng(9)
    x, w = rng.integers(0, 255, (1, 16, 6, 5)).astype(np.uint8), rng.integers(-128, 127, (16, 16, 3, 3)).astype(np.int8)
    node = helper.make_node("ConvInteger", ["x", "w", "z"], ["y"], name="conv", pads=[1, 1, 1, 1])
    values: dict[str, Any] = {"x": x, "w": w, "z": np.asarray(17, np.uint8), "y": np.zeros((1, 16, 6, 5), np.int32)}
    region = region_of([node], values, ["y"], ["w"], "ConvInteger")
    for m, fused in ((2, True), (4, False)):
        check(WinogradInt8Family(m, fused), region, {"x": x, "z": values["z"]})


# -- choices


def test_sums_without_room_are_refused() -> None:
    """64 times the largest sum must fit in 32 bits for m = 4: here it is 255 * 127 * 9 * 160."""
    region, _ = case(10, (1, 160, 4, 4), (16, 160, 3, 3), [1, 1, 1, 1], zero=0)
    weights = np.full((16, 160, 3, 3), 127, np.int8)
    full = dataclasses.replace(region, constants={**region.constants, "wq": lambda: weights})
    assert "6 bits" in (WinogradInt8Family(4).refusal(full) or "")
    assert WinogradInt8Family(2).refusal(full) is None
    few = dataclasses.replace(region, constants={**region.constants, "wq": lambda: weights // 4})
    assert WinogradInt8Family(4).refusal(few) is None


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "reason"),
    [
        ((1, 8, 9, 9), (16, 8, 3, 3), "fewer than 16"),
        ((1, 16, 9, 9), (16, 16, 1, 1), "kernel (1, 1)"),
        ((1, 16, 9, 9), (16, 16, 5, 5), "16 bits"),
        ((1, 16, 9, 9), (16, 16, 7, 7), "kernel (7, 7)"),
    ],
)
def test_refusals(x_shape: tuple[int, ...], w_shape: tuple[int, ...], reason: str) -> None:
    region, _ = case(11, x_shape, w_shape, [0, 0, 0, 0])
    assert reason in (WinogradInt8Family(2).refusal(region) or "")


def test_the_model_orders_the_ways() -> None:
    region, _ = case(12, (1, 64, 28, 28), (64, 64, 3, 3), [1, 1, 1, 1])
    for exact in (False, True):  # it is exact, so nobody may forbid it
        names = [family.name for family in alternatives(region, machine("avx2"), exact)]
        assert names[:3] == ["winograd4_int8", "winograd2_int8", "conv_int8"]
    # Where bytes are multiplied four at a time, products of 16 bits pay less.
    small, _ = case(13, (1, 32, 14, 14), (32, 32, 3, 3), [1, 1, 1, 1])
    assert alternatives(small, machine("avx512_vnni"))[0] is CONV_INT8
    assert alternatives(small, machine("avx2"))[0].name == "winograd4_int8"


@pytest.mark.parametrize("arch", ["avx2", "avx512", "avx512_vnni", "neon", "sse2"])
def test_register_tiles_fit(arch: str) -> None:
    region, _ = case(14, (1, 64, 14, 14), (128, 64, 3, 3), [1, 1, 1, 1])
    cpu = machine(arch)
    for family in WINOGRAD_INT8:
        tiling: IntegerTiling = family.tiling(region, cpu)
        mr, nr = tile(tiling)
        assert mr * nr + 2 * nr < cpu.vector_registers
        cut = plan(tiling)
        assert 1 <= cut.groups <= tiling.groups(cut) and tiling.steps(cut) * cut.columns * nr >= tiling.vectors


# -- tails in float32


@pytest.mark.parametrize("family", [CONV_INT8, WinogradInt8Family(4)])
@pytest.mark.parametrize("width", [16, 20])
def test_a_tail_of_constants_writes_pixels_together(family: Any, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """HardSwish, a factor and a term a channel before the quantization: as the tail that stores pixel by pixel."""
    region, feeds = case(15, (1, 16, 7, 9), (width, 16, 3, 3), [1, 1, 1, 1])
    rng = np.random.default_rng(0)
    shape = region.types["y"].shape
    values: Arrays = {name: region.constants[name]() for name in region.constants}
    values |= {name: np.zeros(shape, np.float32) for name in ("y", "h", "m", "a")} | feeds
    values |= {"x": np.zeros((1, 16, 7, 9), np.float32), "w": np.zeros((width, 16, 3, 3), np.float32)}
    values |= {"b": np.zeros(width, np.float32), "q": np.zeros(shape, np.uint8), "f": np.asarray([1.3], np.float32)}
    values["t"] = rng.normal(size=(1, width, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["x"]),
        helper.make_node("DequantizeLinear", ["wq", "sw", "zw"], ["w"], axis=0),
        helper.make_node("DequantizeLinear", ["bq", "sb"], ["b"], axis=0),
        helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("HardSwish", ["y"], ["h"]),
        helper.make_node("Mul", ["f", "h"], ["m"]),
        helper.make_node("Add", ["m", "t"], ["a"]),
        helper.make_node("QuantizeLinear", ["a", "sy", "zy"], ["q"]),
    ]
    region = region_of(nodes, values, ["q"], [name for name in values if name != "xq"], "Conv")
    layouts = dict(family.layouts(region, HOST, dict.fromkeys(region.inputs, PLAIN)))
    together = family.lower(region, HOST, layouts)
    monkeypatch.setattr(Requantize, "_chain", lambda self: ())
    apart = family.lower(region, HOST, layouts)
    found, expected = (run_lowered(region, lowered, feeds, HOST, layouts)["q"] for lowered in (together, apart))
    np.testing.assert_array_equal(found, expected)
    assert np.unique(found).size > 8
