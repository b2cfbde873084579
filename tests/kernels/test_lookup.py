"""Tables for chains of one 8-bit value, against ONNX Runtime and numpy."""

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
from nestc.kernels.lookup import LOOKUP, table
from nestc.kernels.testing import host_machine, region_of, run_lowered
from nestc.targets.cpu.machine import machine
from nestc.tensor.math import expand

HOST = host_machine()
WIDE = dataclasses.replace(HOST, vector_bytes=64, vector_registers=32)
CONSTANTS = ("xs", "xz", "ys", "yz", "lo", "hi", "half", "slope")
CHAINS = {
    "sigmoid": [("Sigmoid", ["d"], {})],
    "tanh": [("Tanh", ["d"], {})],
    "swish": [("Sigmoid", ["d"], {}), ("Mul", ["d", "t0"], {})],
    "hardswish": [("HardSwish", ["d"], {})],
    "gelu": [("Gelu", ["d"], {})],
    "leaky": [("LeakyRelu", ["d"], {"alpha": 0.1})],
    "prelu": [("PRelu", ["d", "slope"], {})],
    "clip": [("Clip", ["d", "lo", "hi"], {})],
    "exp": [("Exp", ["d"], {})],
    "poly": [("Mul", ["d", "d"], {}), ("Mul", ["t0", "half"], {}), ("Sub", ["t1", "d"], {})],
    "nothing": [],
}


def region_of_chain(kind, x, dtype, rank_of_constants=0):
    """DequantizeLinear, the chain, QuantizeLinear; and all values by ONNX Runtime."""
    zero = np.array(-3 if x.dtype == np.int8 else 120, x.dtype)
    values = {
        "x": x,
        "xs": np.float32(0.05),
        "xz": zero,
        "ys": np.float32(0.021),
        "yz": np.array(5, dtype),
        "lo": np.float32(-1),
        "hi": np.float32(2.5),
        "half": np.full((1,) * rank_of_constants, 0.5, np.float32),
        "slope": np.full((1,) * rank_of_constants, 0.25, np.float32),
    }
    nodes = [helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["d"])]
    last = "d"
    for i, (op, inputs, attributes) in enumerate(CHAINS[kind]):
        last = f"t{i}"
        nodes.append(helper.make_node(op, inputs, [last], **attributes))
    nodes.append(helper.make_node("QuantizeLinear", [last, "ys", "yz"], ["y"]))
    used = {name for node in nodes for name in node.input} & set(values)
    values = {name: np.asarray(array) for name, array in values.items() if name in used}
    values |= by_onnxruntime(nodes, values)
    return region_of(nodes, values, ["y"], [n for n in CONSTANTS if n in values]), values


def compute(region, values, target, layouts, jit=True):
    assert LOOKUP.refusal(region) is None
    chosen = LOOKUP.layouts(region, target, layouts)
    return run_lowered(region, LOOKUP.lower(region, target, chosen), values, target, chosen, jit)["y"]


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("dtypes", [("uint8", "uint8"), ("int8", "int8"), ("uint8", "int8")])
def test_all_codes(kind, dtypes):
    x = np.arange(256, dtype=np.uint8).view(dtypes[0]).reshape(2, 8, 16)
    region, values = region_of_chain(kind, x, dtypes[1])
    found = compute(region, values, HOST, {})
    off = np.abs(found.astype(int) - values["y"].astype(int))
    # Of 256 results hardly one is so near a tie that the last bit of an approximation decides.
    assert off.max() <= 1 and off.sum() <= 1


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_shapes_and_layouts(data):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4), "shape")
    if data.draw(st.booleans(), "large"):
        shape = [1, 16, 19, data.draw(st.integers(5, 40))]
    dtype = data.draw(st.sampled_from(["uint8", "int8"]))
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8).view(dtype)
    region, values = region_of_chain("swish", x, dtype)
    target = data.draw(st.sampled_from([HOST, WIDE]), "machine")
    blocked = len(shape) > 2 and data.draw(st.booleans(), "blocked")
    layouts = {"x": Layout(target.lanes("float32"))} if blocked else {}
    wanted = table(region)[x.view(np.uint8)]
    np.testing.assert_array_equal(compute(region, values, target, layouts), wanted)


@pytest.mark.parametrize("channels", [16, 19])
def test_the_interpreter_agrees(channels):
    x = np.random.default_rng(0).integers(0, 256, (1, channels, 3, 5), np.uint8)
    region, values = region_of_chain("gelu", x, "uint8")
    for layouts in ({}, {"x": Layout(8)}):
        np.testing.assert_array_equal(compute(region, values, HOST, layouts, jit=False), table(region)[x])


def test_padding_of_channels_stays_zero():
    x = np.zeros((1, 3, 2, 4), np.uint8)
    region, _ = region_of_chain("sigmoid", x, "uint8")
    layouts = {"x": Layout(8), "y": Layout(8)}
    lowered = LOOKUP.lower(region, HOST, layouts)
    from nestc.kernels.testing import Compiled

    memory = {"x": np.zeros((1, 1, 2, 4, 8), np.uint8), "y": np.full((1, 1, 2, 4, 8), 9, np.uint8), **lowered.constants}
    (launch,) = lowered.launches
    Compiled(launch.kernel, HOST)([memory[name] for name in launch.args])
    assert not memory["y"][..., 3:].any() and memory["y"][..., :3].all()


def test_what_it_takes():
    x = np.zeros((1, 8, 4, 4), np.uint8)
    region, _ = region_of_chain("poly", x, "uint8", 3)
    assert choose(region)[0] is LOOKUP
    # An operand that differs by channel is no constant of the chain.
    one = np.array(1, np.float32)
    values = {"x": x, "xs": one, "c": np.ones((8, 1, 1), np.float32), "ys": one}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "xs"], ["d"]),
        helper.make_node("Mul", ["d", "c"], ["t"]),
        helper.make_node("QuantizeLinear", ["t", "ys"], ["y"]),
    ]
    other = region_of(nodes, {**values, **by_onnxruntime(nodes, values)}, ["y"], ["xs", "c", "ys"])
    assert "not one number" in (LOOKUP.refusal(other) or "")
    assert choose(other)[0] is not None


@pytest.mark.parametrize(
    "arch, instruction, count", [("avx2", "vpshufb", 16), ("avx512", "vpshufb", 16), ("neon", "tb", 4)]
)
def test_instructions(arch, instruction, count):
    target = machine(arch)
    region, _ = region_of_chain("tanh", np.zeros((1, 64, 8, 8), np.uint8), "uint8")
    layout = {"x": Layout(target.lanes("float32"))}
    (launch,) = LOOKUP.lower(region, target, LOOKUP.layouts(region, target, layout)).launches
    text = print_kernel(expand(launch.kernel, target), "k", target).text
    assert compile_ir(text, target, assembly=True).assembly.count(f"\t{instruction}") >= count
