"""Convolution of 8-bit integers against exact sums in 64-bit integers and one rounding at the end."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.codegen.llvm import print_kernel
from nestc.codegen.objects import compile_ir
from nestc.kernels import conv_pack
from nestc.kernels.api import PLAIN, CpuMachine, Layout
from nestc.kernels.conv_int8 import CONV_INT8
from nestc.kernels.conv_pack import pair_tile, paired_tile, sums_tile
from nestc.kernels.conv_shape import conv_shape
from nestc.kernels.families import choose
from nestc.kernels.testing import host_machine, op_of, region_of, run_lowered, type_of
from nestc.targets.cpu.machine import machine
from nestc.tensor.math import expand

HOST = host_machine()
WIDE = dataclasses.replace(HOST, vector_bytes=64, vector_registers=32)
X86 = HOST.triple.startswith("x86_64")
# (made for, run on): kernels for dot instructions that are not here run where they are made of other ones.
MACHINES: dict[str, tuple[CpuMachine, CpuMachine]] = {
    "host": (HOST, HOST),
    "wide": (WIDE, WIDE),
    "vnni": (dataclasses.replace(WIDE, vnni=True), WIDE),
    "dotprod": (dataclasses.replace(HOST, vector_bytes=16, vector_registers=32, dotprod=True), HOST),
}
if X86:
    MACHINES["sse2"] = (machine("sse2"), machine("sse2"))
Arrays = dict[str, np.ndarray]


def exact(x: np.ndarray, w: np.ndarray, node: Any, out: tuple[int, ...]) -> np.ndarray:
    """The convolution of integers whose zero points are taken off, in int64; `out` is the shape of the result."""
    types = {"x": type_of(x), "w": type_of(w)}
    y = np.zeros(out, np.int64)
    op = op_of(node)
    fake = region_of([node], {"x": x.astype(np.float32), "w": w.astype(np.float32), "y": y.astype(np.float32)}, ["y"])
    assert fake.types["x"].shape == types["x"].shape
    s = conv_shape(op, fake)
    per_in, per_out = s.in_channels // s.group, s.out_channels // s.group
    for tap in np.ndindex(*s.kernel):
        places, outputs = [], []
        for t, d, st_, p, n, o in zip(tap, s.dilations, s.strides, s.pads_begin, s.size, s.out, strict=True):
            source = np.arange(o) * st_ + t * d - p
            held = (source >= 0) & (source < n)
            places.append(source[held])
            outputs.append(np.nonzero(held)[0])
        for g in range(s.group):
            a = x[np.ix_(range(s.batch), range(g * per_in, (g + 1) * per_in), *places)].astype(np.int64)
            b = w[(slice(g * per_out, (g + 1) * per_out), slice(None), *tap)].astype(np.int64)
            index = np.ix_(range(s.batch), range(g * per_out, (g + 1) * per_out), *outputs)
            y[index] += np.moveaxis(np.tensordot(a, b, (1, 1)), -1, 1)
    return y


def out_shape(x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any]) -> tuple[int, ...]:
    """The shape of the result, as ONNX defines it."""
    rank = len(x) - 2
    strides, dilations = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
    pads = attributes.get("pads", [0] * 2 * rank)
    spatial = [
        (x[2 + d] + pads[d] + pads[rank + d] - dilations[d] * (w[2 + d] - 1) - 1) // strides[d] + 1 for d in range(rank)
    ]
    return (x[0], w[0], *spatial)


def integers(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Integers of the whole range, the extremes often among them."""
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    return np.where(rng.random(shape) < 0.1, rng.choice([info.min, info.max], shape), values).astype(dtype)


def quantized_case(
    seed: int,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    x_dtype: str = "uint8",
    w_dtype: str = "int8",
    bias: str = "int32",
    relu: bool = False,
    per_channel: bool = True,
    w_zero: bool = False,
    bits: int = 8,
    **attributes: Any,
) -> tuple[list[Any], Arrays, Arrays]:
    """Nodes, feeds (with constants), and every value of DequantizeLinear -> Conv -> [Relu] -> QuantizeLinear."""
    rng = np.random.default_rng(seed)
    x, w = integers(rng, x_dtype, x_shape), integers(rng, w_dtype, w_shape)
    if bits < 8:
        w = (w.astype(np.int32) >> (8 - bits)).astype(w_dtype)
    out = w_shape[0]
    zx = np.asarray(rng.integers(np.iinfo(x_dtype).min, np.iinfo(x_dtype).max, endpoint=True), x_dtype)
    sx = np.asarray(rng.uniform(0.001, 0.1), np.float32)
    sw = rng.uniform(0.001, 0.01, out if per_channel else ()).astype(np.float32)
    zw = integers(rng, w_dtype, sw.shape) if w_zero else np.full(sw.shape, 128 if w_dtype == "uint8" else 0, w_dtype)
    along = (-1, *(1,) * (len(w_shape) - 1)) if per_channel else ()
    wide = w.astype(np.int32) - zw.astype(np.int32).reshape(along)
    feeds: Arrays = {"xq": x, "sx": sx, "zx": zx, "wq": w, "sw": sw, "zw": zw}
    nodes = [
        helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["x"]),
        helper.make_node("DequantizeLinear", ["wq", "sw", "zw"], ["w"], axis=0),
    ]
    unit = sx.astype(np.float64) * sw.astype(np.float64)
    values: Arrays = {"x": (x.astype(np.int32) - zx).astype(np.float32) * sx, "w": wide.astype(np.float32)}
    offset = None
    whole = np.zeros(out, np.int64)
    if bias:
        feeds["bq"] = rng.integers(-(2**16), 2**16, out).astype(np.int32)
        if bias == "int32":
            whole = feeds["bq"].astype(np.int64)
            feeds["sb"] = (sx * sw).astype(np.float32)
        elif bias == "scaled":
            feeds["sb"] = np.asarray(0.0173, np.float32)
            offset = (feeds["bq"].astype(np.float32) * feeds["sb"]).astype(np.float64)
        if bias == "float32":
            feeds["b"] = rng.normal(size=out).astype(np.float32)
            del feeds["bq"]
            offset = feeds["b"].astype(np.float64)
        else:
            values["b"] = feeds["bq"].astype(np.float32)
            nodes.append(helper.make_node("DequantizeLinear", ["bq", "sb"], ["b"], axis=0))
    conv = helper.make_node("Conv", ["x", "w", *(["b"] if bias else [])], ["y"], name="conv", **attributes)
    nodes.append(conv)
    shape = out_shape(x_shape, w_shape, attributes)
    plain = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    channels = (1, -1, *(1,) * (len(shape) - 2))
    acc = exact(x.astype(np.int32) - zx, wide, plain, shape) + whole.reshape(channels)
    scale = np.broadcast_to(unit, out).reshape(channels)
    real = acc * scale + (0 if offset is None else offset.reshape(channels))
    sy = np.asarray(max(1e-6, np.abs(real).max() / 140), np.float32)
    zy = np.asarray(rng.integers(0, 256), np.uint8)
    feeds |= {"sy": sy, "zy": zy}
    last = "y"
    values["y"] = real.astype(np.float32)
    if relu:
        nodes.append(helper.make_node("Relu", ["y"], ["r"]))
        values["r"] = np.maximum(values["y"], 0)
        last = "r"
    nodes.append(helper.make_node("QuantizeLinear", [last, "sy", "zy"], ["yq"]))
    # One multiplication in float32, as the kernel does it.
    multiplied = acc.astype(np.float32) * (scale / float(sy)).astype(np.float32)
    if offset is not None:
        multiplied = multiplied + (offset / float(sy)).astype(np.float32).reshape(channels)
    values["tie"] = np.abs(multiplied - np.floor(multiplied) - 0.5) < 1e-4 + 1e-5 * np.abs(multiplied)
    low = max(0.0 if relu else -np.inf, -float(zy))
    values["yq"] = (np.rint(np.clip(multiplied, low, 255 - float(zy))) + zy).astype(np.uint8)
    return nodes, feeds, values


def check(nodes: list[Any], feeds: Arrays, values: Arrays, output: str, which: str = "host", jit: bool = True) -> None:
    """The kernel's result is exact, but for one unit where a quotient lies on the border of two."""
    made_for, run_on = MACHINES[which]
    constants = [name for name in feeds if name not in ("xq", "zero")]
    anchor = next(n.op_type for n in nodes if n.op_type in ("Conv", "ConvInteger"))
    region = region_of(nodes, {**feeds, **values}, [output], constants, anchor)
    assert CONV_INT8.refusal(region) is None
    block = Layout(made_for.lanes("float32"))
    layouts = dict(CONV_INT8.layouts(region, made_for, dict.fromkeys(region.inputs, PLAIN)))
    lowered = CONV_INT8.lower(region, made_for, layouts)
    found = run_lowered(region, lowered, feeds, run_on, layouts, jit)[output]
    assert layouts[output] == block
    expected = values[output]
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if output == "yq":
        difference = np.abs(found.astype(np.int32) - expected.astype(np.int32))
        assert difference.max() <= 1 and not difference[~values["tie"]].any()
    else:
        np.testing.assert_array_equal(found, expected)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_random_convolutions(data: st.DataObject) -> None:
    draw = data.draw
    rank = draw(st.sampled_from([1, 2, 2, 2, 3]))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    strides, dilations = ([draw(st.integers(1, 2)) for _ in range(rank)] for _ in range(2))
    pads = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    size = [max(1, d * (k - 1) + 1) + draw(st.integers(0, 10 if rank < 3 else 4)) for d, k in zip(dilations, kernel)]
    group = draw(st.sampled_from([1, 1, 2, 3]))
    into, out = group * draw(st.integers(1, 20)), group * draw(st.sampled_from([1, 4, 8, 16, 21]))
    if group == into == out > 1:
        into *= 2
    case = quantized_case(
        draw(st.integers(0, 999)),
        (draw(st.integers(1, 2)), into, *size),
        (out, into // group, *kernel),
        x_dtype=draw(st.sampled_from(["uint8", "int8"])),
        w_dtype=draw(st.sampled_from(["int8", "uint8"])),
        bias=draw(st.sampled_from(["", "int32", "scaled", "float32"])),
        relu=draw(st.booleans()),
        per_channel=draw(st.booleans()),
        w_zero=draw(st.booleans()),
        bits=draw(st.sampled_from([4, 7, 8])),
        group=group,
        strides=strides,
        dilations=dilations,
        pads=pads,
    )
    check(*case, "yq", draw(st.sampled_from(sorted(MACHINES))))


LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1x1": ((1, 64, 9, 8), (48, 64, 1, 1), {}),
    "1x1 of many channels": ((1, 520, 4, 5), (24, 520, 1, 1), {}),
    "1x1, stride 2": ((1, 24, 9, 8), (40, 24, 1, 1), {"strides": [2, 2]}),
    "3x3": ((1, 24, 11, 13), (24, 24, 3, 3), {"pads": [1, 1, 1, 1]}),
    "3x3 in chunks": ((1, 256, 5, 5), (16, 256, 3, 3), {"pads": [1, 1, 1, 1]}),
    "3x3, dilated": ((1, 12, 9, 9), (16, 12, 3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    "first layer": ((1, 3, 37, 45), (20, 3, 7, 7), {"pads": [3, 3, 3, 3], "strides": [2, 2]}),
    "one channel": ((2, 1, 20, 33), (9, 1, 3, 3), {"pads": [1, 1, 1, 1]}),
    "grouped": ((1, 32, 7, 9), (32, 4, 3, 3), {"pads": [1, 1, 1, 1], "group": 8}),
    "depthwise of two": ((1, 8, 7, 9), (16, 1, 3, 3), {"group": 8}),
    "large": ((1, 32, 60, 60), (64, 32, 3, 3), {"pads": [1, 1, 1, 1]}),
    "rows that no part divides": ((1, 64, 53, 40), (64, 64, 3, 3), {"pads": [1, 1, 1, 1]}),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("which", MACHINES)
def test_layers_on_every_machine(name: str, which: str) -> None:
    x, w, attributes = LAYERS[name]
    bits = 4 + len(name) % 5
    check(*quantized_case(0, x, w, relu=True, bits=bits, **attributes), "yq", which)


PAIRED = (3, 3)  # among the ways: `byte_pairs`


def only(way: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels multiply in one way alone (where it can be had)."""
    monkeypatch.setattr(conv_pack, "WAYS", {(0, 0): 1.0} if way == PAIRED else {way: 1.0})
    monkeypatch.setattr(conv_pack, "PAIRED", (0.0, 0.0, 0.0) if way == PAIRED else (1e9, 1e9, 1e9))
    monkeypatch.setattr(conv_pack, "PAIRED_TILE", 0.0)


@pytest.mark.parametrize("way", [*sorted(conv_pack.WAYS), PAIRED])
@pytest.mark.parametrize("name", LAYERS)
def test_every_way_of_multiplying(name: str, way: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    only(way, monkeypatch)
    x, w, attributes = LAYERS[name]
    check(*quantized_case(0, x, w, **attributes), "yq")


@pytest.mark.parametrize("name", ["1x1", "3x3 in chunks", "first layer", "grouped"])
@pytest.mark.parametrize("x_dtype", ["uint8", "int8"])
def test_paired_units_in_wide_vectors(name: str, x_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(PAIRED, monkeypatch)
    x, w, attributes = LAYERS[name]
    check(*quantized_case(2, x, w, x_dtype=x_dtype, **attributes), "yq", "wide")


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 999), st.integers(1, 3), st.sampled_from([1, 2]), st.integers(1, 5), st.sampled_from([4, 7, 8]))
def test_no_sum_can_saturate(seed: int, columns: int, depth: int, count: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    units = integers(rng, "int8", (columns, count * depth, 8 * 4)) >> (8 - bits)
    rest = units.copy()
    numbers, extra = conv_pack.take_excess(rest, depth)
    total = rest.astype(np.int32)
    sums = rest.reshape(columns, count, depth, 8, 2, 2).astype(np.int32)
    for part in (np.maximum(sums, 0), np.minimum(sums, 0)):
        assert np.abs(part.sum(axis=(2, 5))).max() * 255 < 1 << 15
    if numbers is not None and extra is not None:
        for column in range(columns):
            np.add.at(total[column], numbers[column], extra[column].astype(np.int32))
        pairs = extra.reshape(columns, -1, 8, 2, 2).astype(np.int32)
        for part in (np.maximum(pairs, 0), np.minimum(pairs, 0)):
            assert np.abs(part.sum(-1)).max() * 255 < 1 << 15
    np.testing.assert_array_equal(total, units)


@pytest.mark.parametrize("way", [(0, 0), (1, 1), (2, 2), PAIRED])
@pytest.mark.parametrize("name", ["1x1", "3x3", "first layer"])
def test_machine_code_does_what_the_interpreter_does(
    name: str, way: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(way, monkeypatch)
    x, w, attributes = LAYERS[name]
    x = (1, min(x[1], 6), 4, 5)
    w = (9, x[1], *w[2:])
    check(*quantized_case(1, x, w, **attributes), "yq", jit=False)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("which", MACHINES)
@pytest.mark.parametrize("x_dtype", ["uint8", "int8"])
def test_conv_integer(which: str, x_dtype: str, dynamic: bool) -> None:
    rng = np.random.default_rng(3)
    x, w = integers(rng, x_dtype, (1, 10, 8, 9)), integers(rng, "int8", (12, 10, 3, 3))
    zero, zw = np.asarray(77, x_dtype), np.asarray(3, "int8")
    node = helper.make_node("ConvInteger", ["xq", "w", "zero" if dynamic else "z", "zw"], ["y"], pads=[1, 0, 1, 2])
    plain = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 0, 1, 2])
    shape = out_shape(x.shape, w.shape, {"pads": [1, 0, 1, 2]})
    y = exact(x.astype(np.int32) - 77, w.astype(np.int32) - 3, plain, shape).astype(np.int32)
    check([node], {"xq": x, "w": w, "zero" if dynamic else "z": zero, "zw": zw}, {"y": y}, "y", which)


def test_what_is_for_others() -> None:
    def reason(**changes: Any) -> str | None:
        nodes, feeds, values = quantized_case(0, (1, 8, 5, 5), (8, 8, 3, 3), **changes)
        constants = [name for name in feeds if name != "xq"]
        region = region_of(nodes, {**feeds, **values}, ["yq"], constants, "Conv")
        family, refusals = choose(region)
        assert family is not None
        return refusals.get("conv_int8", family.name)

    assert reason() == "conv_int8"
    nodes, feeds, values = quantized_case(0, (1, 8, 5, 5), (8, 1, 3, 3), group=8)
    region = region_of(nodes, {**feeds, **values}, ["yq"], [n for n in feeds if n != "xq"], "Conv")
    assert "depthwise" in str(CONV_INT8.refusal(region))
    region = region_of(nodes, {**feeds, **values}, ["yq"], [n for n in feeds if n not in ("xq", "wq")], "Conv")
    assert "are not constant" in str(CONV_INT8.refusal(region))


def hot_loops(name: str, arch: str, bits: int = 8) -> list[str]:
    """The assembly of a layer for a machine: the basic blocks that add products, up to the jump at their end."""
    x, w, attributes = LAYERS[name]
    target = machine(arch)
    nodes, feeds, values = quantized_case(0, x, w, bits=bits, **attributes)
    region = region_of(nodes, {**feeds, **values}, ["yq"], [n for n in feeds if n != "xq"], "Conv")
    layouts = dict(CONV_INT8.layouts(region, target, dict.fromkeys(region.inputs, PLAIN)))
    blocks: list[str] = []
    for launch in CONV_INT8.lower(region, target, layouts).launches:
        text = print_kernel(expand(launch.kernel, target), "kernel", target).text
        assembly = compile_ir(text, target, assembly=True).assembly
        blocks += re.split(r"^\.LBB\S+:|\t(?:j[a-z]+|b\.[a-z]+)\t", assembly, flags=re.MULTILINE)
    return [block for block in blocks if re.search(r"\t(vpmaddwd|vpdpbusd|sdot)\t", block)]


@pytest.mark.parametrize(
    ("arch", "instruction"),
    [
        ("avx512_vnni", r"\tvpdpbusd\t.*%zmm"),
        ("avx512", r"\tvpmaddwd\t.*%zmm"),
        ("avx2", r"\tvpmaddwd\t.*%ymm"),
        ("neon_dotprod", r"\tsdot\tv\d+\.4s"),
    ],
)
@pytest.mark.parametrize("name", ["1x1", "3x3", "first layer"])
def test_dots_without_spills(name: str, arch: str, instruction: str) -> None:
    loops = hot_loops(name, arch)
    assert any(re.search(instruction, loop) for loop in loops)
    for loop in loops:
        assert not re.search(r"\tvmovdq[au]\S*\t(%[yz]mm\d+, -?\d*\(%rsp\)|-?\d*\(%rsp\), %[yz]mm\d+)", loop)
        assert not re.search(r"\t(ld|st)[rpu]+\tq\d+,.*\[sp", loop)


@pytest.mark.parametrize(("arch", "register"), [("avx2", "ymm"), ("avx512", "zmm")])
@pytest.mark.parametrize("name", ["1x1", "3x3"])
def test_small_weights_multiply_as_bytes(name: str, arch: str, register: str) -> None:
    loops = [loop for loop in hot_loops(name, arch, bits=5) if "vpmaddubsw" in loop]
    assert loops
    for loop in loops:
        assert re.search(rf"\tvpmaddubsw\t.*%{register}", loop) and re.search(rf"\tvpaddw\t.*%{register}", loop)
        assert len(re.findall(r"\(%rsp\)", loop)) <= 2


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([16, 32]))
def test_a_tile_fits_the_registers(vectors: int, pixels: int, registers: int) -> None:
    mr, nr = pair_tile(vectors, pixels, registers)
    assert 1 <= mr <= pixels and 1 <= nr <= vectors and mr * nr + nr + 2 <= registers
    for depth, together in ((1, 1), (1, 2), (2, 1), (2, 2)):
        mr, nr = sums_tile(vectors, pixels, registers, depth, together)
        assert 1 <= mr <= pixels and 1 <= nr <= vectors and mr * nr + depth * nr + depth + 2 <= registers
    mr, nr = paired_tile(vectors, pixels, registers)
    assert 1 <= mr <= pixels and 1 <= nr <= vectors and mr * nr + 3 * nr + 3 <= registers


@pytest.mark.parametrize(("arch", "register"), [("avx2", "ymm"), ("avx512", "zmm")])
def test_weights_of_eight_bits_multiply_as_bytes(arch: str, register: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(PAIRED, monkeypatch)
    loops = hot_loops("1x1 of many channels", arch)
    assert loops
    for loop in loops:
        assert re.search(rf"\tvpmaddubsw\t.*%{register}", loop) and "(%rsp)" not in loop
    assert any("vpxor" in loop and "vpaddw" in loop for loop in loops)


def widest_case(channels: int, bias: int, group: int = 1) -> tuple[Any, Arrays]:
    """The region of a 1x1 Conv whose inputs are all 255 and weights 127, with one int32 bias; and its input."""
    x, w = np.full((1, channels, 1, 2), 255, np.uint8), np.full((8, channels // group, 1, 1), 127, np.int8)
    one, sy = np.asarray(1, np.float32), np.asarray(1e8, np.float32)
    feeds = {"xq": x, "wq": w, "bq": np.full(8, bias, np.int32), "s": one, "sy": sy, "zy": np.asarray(100, np.uint8)}
    nodes = [helper.make_node("DequantizeLinear", [name + "q", "s"], [name]) for name in "xwb"]
    nodes.append(helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", group=group))
    nodes.append(helper.make_node("QuantizeLinear", ["y", "sy", "zy"], ["yq"]))
    values = {name: feeds[name + "q"].astype(np.float32) for name in "xwb"}
    values |= {"y": np.zeros((1, 8, 1, 2), np.float32), "yq": np.zeros((1, 8, 1, 2), np.uint8)}
    constants = [name for name in feeds if name != "xq"]
    return region_of(nodes, {**feeds, **values}, ["yq"], constants, "Conv"), {"xq": x}


@pytest.mark.parametrize("bias", [2**31 - 1, -(2**31), 2**31 - 1 - 255 * 127 * 8, 5])
@pytest.mark.parametrize("group", [1, 8])
def test_a_bias_that_leaves_no_room_for_the_sum(bias: int, group: int) -> None:
    region, feeds = widest_case(8, bias, group)
    family, _ = choose(region)
    assert family is not None and family.name == ("conv_int8" if group == 1 else "depthwise_int8")
    layouts = dict(family.layouts(region, HOST, dict.fromkeys(region.inputs, PLAIN)))
    found = run_lowered(region, family.lower(region, HOST, layouts), feeds, HOST, layouts)["yq"]
    exact = round((255 * 127 * 8 // group + bias) / 1e8) + 100
    np.testing.assert_array_equal(found, exact)


def test_sums_that_do_not_fit_are_left_to_float() -> None:
    region, _ = widest_case(66400, 0)
    assert "do not fit in 32 bits" in str(CONV_INT8.refusal(region))
    region, _ = widest_case(66300, 0)
    assert CONV_INT8.refusal(region) is None


@pytest.mark.parametrize("group", [1, 8])
def test_ties_go_to_the_even_integer(group: int) -> None:
    x = np.arange(128, dtype=np.uint8).reshape(1, 8, 1, 16)
    w = np.ones((8, 1, 1, 1), np.int8) if group == 8 else np.eye(8, dtype=np.int8).reshape(8, 8, 1, 1)
    feeds = {"xq": x, "wq": w, "s": np.asarray(1, np.float32), "sy": np.asarray(2, np.float32)}
    feeds["zy"] = np.asarray(3, np.uint8)
    nodes = [helper.make_node("DequantizeLinear", [name + "q", "s"], [name]) for name in "xw"]
    nodes.append(helper.make_node("Conv", ["x", "w"], ["y"], name="conv", group=group))
    nodes.append(helper.make_node("QuantizeLinear", ["y", "sy", "zy"], ["yq"]))
    expected = np.rint(x / 2).astype(np.uint8) + 3
    values = {"x": x.astype(np.float32), "w": w.astype(np.float32), "y": x.astype(np.float32), "yq": expected}
    region = region_of(nodes, {**feeds, **values}, ["yq"], ["wq", "s", "sy", "zy"], "Conv")
    family, _ = choose(region)
    assert family is not None and family.name == ("conv_int8" if group == 1 else "depthwise_int8")
    layouts = dict(family.layouts(region, HOST, dict.fromkeys(region.inputs, PLAIN)))
    found = run_lowered(region, family.lower(region, HOST, layouts), {"xq": x}, HOST, layouts)["yq"]
    np.testing.assert_array_equal(found, expected)
