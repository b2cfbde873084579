"""Elementwise regions and moved data between 8-bit integers, with the scales folded, against ONNX Runtime."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.codegen.llvm import print_kernel
from nestc.codegen.objects import compile_ir
from nestc.kernels.api import Layout
from nestc.kernels.checking import by_onnxruntime
from nestc.kernels.families import choose
from nestc.kernels.fold_scales import folded, interval, scaled
from nestc.kernels.moves import MOVES
from nestc.kernels.testing import host_machine, region_of, run_lowered
from nestc.targets.cpu.machine import machine
from nestc.tensor import index as ix
from nestc.tensor.build import constant, load
from nestc.tensor.ir import Binary, Buffer, Cast, Expr, Fma, Load, Unary, Var
from nestc.tensor.math import expand
from nestc.tensor.text import show

HOST = host_machine()
WIDE = dataclasses.replace(HOST, vector_bytes=64, vector_registers=32)
X = Load(Buffer("x", "uint8", (256,)), (Var("i", 256),))
Y = Load(Buffer("y", "int8", (256,)), (Var("i", 256),))


def real(x: Load, zero: int, scale: float) -> Expr:
    """DequantizeLinear."""
    wide = Binary("sub", Cast(x, "int32"), constant(zero, "int32"))
    return Binary("mul", Cast(wide, "float32"), constant(scale, "float32"))


def rounded(e: Expr, scale: float, zero: int, dtype: str) -> Expr:
    """QuantizeLinear as `elementwise.quantize` writes it."""
    low, high = (0, 255) if dtype == "uint8" else (-128, 127)
    y = Binary("add", Unary("rint", Binary("div", e, constant(scale, "float32"))), constant(zero, "float32"))
    limited = Binary("min", Binary("max", y, constant(low, "float32")), constant(high, "float32"))
    return Cast(limited, dtype)


def test_a_sum_is_two_multiply_adds():
    e = folded(rounded(Binary("add", real(X, 10, 0.5), real(Y, -3, 0.25)), 0.5, 7, "uint8"))
    text = show(e)
    assert text.count("fma") + text.count("*") <= 2 and "/" not in text
    assert "-8.5" in text  # -10 * 0.5 / 0.5 + 3 * 0.25 / 0.5
    assert "+ 7" in text


def test_clamps_move_behind_the_rounding():
    relu = Binary("max", constant(0, "float32"), real(X, 100, 0.1))
    e = folded(rounded(Binary("min", relu, constant(6, "float32")), 0.05, 20, "uint8"))
    text = show(e)
    assert "20" in text and "140" in text  # 0 / 0.05 + 20, 6 / 0.05 + 20
    assert text.count("rint") == 1


def test_equal_scales_are_a_copy():
    e = folded(rounded(real(X, 5, 0.5), 0.5, 5, "uint8"))
    assert "rint" in show(e)  # x - 5 + 5: the offset is a number of its own
    e = folded(rounded(real(X, 0, 0.5), 0.5, 0, "uint8"))
    assert "rint" not in show(e) and "float32" not in show(e)


def test_other_expressions_stay():
    e = Binary("add", X, X)
    assert folded(e) is e
    e = rounded(Load(Buffer("f", "float32", (4,)), (ix.const(0),)), 0.5, 0, "int8")
    assert isinstance(folded(e), Cast)


def test_intervals():
    assert interval(scaled(real(X, 10, 0.5), 2.0)) == (-10.0, 245.0)
    assert interval(Fma(Cast(Cast(Y, "int32"), "float32"), constant(-1, "float32"), constant(1, "float32"))) == (
        -126.0,
        129.0,
    )
    assert interval(load(Buffer("f", "float32", (4,)), 0))[1] == float("inf")


def f32(value):
    return np.array(value, np.float32)


def region_of_ops(rng, shape, kinds, middle, dtype="uint8", outputs=1, scales=None):
    """Two dequantized tensors, the nodes `middle` from a and b to s, and QuantizeLinear; with ORT's values."""
    values = {}
    nodes = []
    for i, (name, kind) in enumerate(zip("ab", kinds, strict=True)):
        info = np.iinfo(kind)
        values[f"{name}q"] = rng.integers(info.min, info.max, shape[i], kind, endpoint=True)
        values[f"{name}s"] = f32(rng.uniform(0.01, 0.05) if scales is None else scales[i])
        values[f"{name}z"] = np.array(rng.integers(-5, 5) if kind == "int8" else rng.integers(0, 200), kind)
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}q", f"{name}s", f"{name}z"], [name]))
    nodes += middle
    values |= {"ys": f32(0.04 if scales is None else scales[2]), "yz": np.array(3, dtype)}
    nodes.append(helper.make_node("QuantizeLinear", ["s", "ys", "yz"], ["q"]))
    values |= {"zero": f32(0), "six": f32(6)}
    used = {n for node in nodes for n in node.input}
    values = {n: a for n, a in values.items() if n in used}
    values |= by_onnxruntime(nodes, values)
    constants = [n for n in ("as", "az", "bs", "bz", "ys", "yz", "zero", "six") if n in values]
    anchor = next((node.op_type for node in middle if node.op_type in ("Concat", "Slice", "Pad")), None)
    return region_of(nodes, values, ["q"], constants, anchor), values


def agree(region, values, target=HOST, blocked=False, jit=True):
    family, _ = choose(region)
    assert family is not None
    block = Layout(target.lanes("float32"))
    incoming = {n: block if blocked and len(region.types[n].shape) > 2 else Layout() for n in region.inputs}
    layouts = family.layouts(region, target, incoming)
    found = run_lowered(region, family.lower(region, target, layouts), values, target, layouts, jit)["q"]
    off = np.abs(found.astype(int) - values["q"].astype(int))
    assert off.max(initial=0) <= 1 and off.sum() <= max(1, off.size // 1000)
    return layouts


MIDDLES = {
    "add": [("Add", ["a", "b"], "s")],
    "sub relu": [("Sub", ["a", "b"], "r"), ("Relu", ["r"], "s")],
    "mul": [("Mul", ["a", "b"], "s")],
    "clip": [("Add", ["a", "b"], "r"), ("Clip", ["r", "zero", "six"], "s")],
    "sigmoid": [("Sigmoid", ["a"], "r"), ("Mul", ["r", "b"], "s")],
}


def nodes_of(kind):
    return [helper.make_node(op, inputs, [out]) for op, inputs, out in MIDDLES[kind]]


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_elementwise(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    shape = (data.draw(st.integers(1, 2)), data.draw(st.sampled_from([3, 8, 16, 19])), *rng.integers(1, 12, 2))
    kinds = data.draw(st.tuples(*[st.sampled_from(["uint8", "int8"])] * 2))
    middle = nodes_of(data.draw(st.sampled_from(list(MIDDLES))))
    region, values = region_of_ops(rng, (shape, shape), kinds, middle, data.draw(st.sampled_from(["uint8", "int8"])))
    agree(region, values, data.draw(st.sampled_from([HOST, WIDE])), data.draw(st.booleans(), "blocked"))


@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_powers_of_two_agree_exactly(kind):
    """With such scales half of all sums are ties."""
    rng = np.random.default_rng(0)
    shape = (1, 16, 20, 20)
    middle = nodes_of("add")
    region, values = region_of_ops(rng, (shape, shape), (kind, kind), middle, kind, scales=(0.25, 0.5, 1.0))
    family, _ = choose(region)
    found = run_lowered(region, family.lower(region, HOST, {}), values, HOST)["q"]
    np.testing.assert_array_equal(found, values["q"])


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("channels", [(16, 8), (3, 5)])
@pytest.mark.parametrize("size", [(4, 5), (60, 61)])
def test_concat_of_different_scales(blocked, channels, size):
    rng = np.random.default_rng(0)
    shapes = [(1, c, *size) for c in channels]
    middle = [helper.make_node("Concat", ["a", "b"], ["s"], axis=1)]
    region, values = region_of_ops(rng, shapes, ("uint8", "uint8"), middle)
    assert choose(region)[0] is MOVES
    layouts = agree(region, values, HOST, blocked)
    assert bool(layouts["q"].block) == (blocked and channels == (16, 8))
    lowered = MOVES.lower(region, HOST, layouts)
    assert not lowered.temporaries  # no tensor in float


def test_a_channel_gate():
    rng = np.random.default_rng(0)
    region, values = region_of_ops(rng, ((1, 16, 7, 9), (1, 16, 1, 1)), ("uint8", "uint8"), nodes_of("mul"))
    for blocked in (False, True):
        agree(region, values, HOST, blocked)


def test_the_interpreter_agrees():
    rng = np.random.default_rng(0)
    region, values = region_of_ops(rng, ((1, 19, 3, 4),) * 2, ("uint8", "int8"), nodes_of("clip"))
    for blocked in (False, True):
        agree(region, values, HOST, blocked, jit=False)


def test_float_operands_are_limited_before_they_are_rounded():
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("QuantizeLinear", ["r", "s", "z"], ["q"])]
    x = f32([[1e30, -1e30, 3e9, 5e8, 1.25, 2.5, 0.0, 7.0] * 8])
    values = {"x": x, "s": f32(0.5), "z": np.array(100, np.int8)}
    values |= by_onnxruntime(nodes, values)
    region = region_of(nodes, values, ["q"], ["s", "z"])
    family, _ = choose(region)
    found = run_lowered(region, family.lower(region, HOST, {}), values, HOST)["q"]
    np.testing.assert_array_equal(found, values["q"])


@pytest.mark.parametrize("scale", [0.0187, 0.25, 2.0**-20])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_quantization_alone_divides(scale, dtype):
    """As ONNX says, also next to ties, where a reciprocal would differ."""
    rng = np.random.default_rng(0)
    halves = (rng.integers(-600, 600, 500) + 0.5) * np.float32(scale)
    far = [np.inf, -np.inf, 1e30, -1e30, 3e9, 0.0, -0.0, 1e-30]
    x = f32([[*halves, *far, *rng.normal(scale=50 * scale, size=4001)]])
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    values = {"x": x, "s": f32(scale), "z": np.array(-100 if dtype == "int8" else 100, dtype)}
    values |= by_onnxruntime([node], values)
    region = region_of([node], values, ["q"], ["s", "z"])
    family, _ = choose(region)
    for jit in (True, False):
        found = run_lowered(region, family.lower(region, HOST, {}), values, HOST, jit=jit)["q"]
        np.testing.assert_array_equal(found, values["q"])


def test_whole_vectors_of_bytes():
    """Four vectors of int32 are narrowed at once; nothing is divided."""
    target = machine("avx2")
    shape = (1, 32, 16, 16)
    region, _ = region_of_ops(np.random.default_rng(0), (shape, shape), ("uint8", "uint8"), nodes_of("clip"))
    family, _ = choose(region)
    layouts = dict.fromkeys((*region.inputs, *region.outputs), Layout(8))
    (launch,) = family.lower(region, target, layouts).launches
    text = print_kernel(expand(launch.kernel, target), "k", target).text
    assembly = compile_ir(text, target, assembly=True).assembly
    assert "vpackuswb" in assembly and "vpmaxub" in assembly and "vdivps" not in assembly
