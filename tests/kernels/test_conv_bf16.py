"""Convolution of bfloat16 with float32 sums against the same sums in float64."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, helper

from nestc.codegen.llvm import print_kernel
from nestc.codegen.objects import compile_ir
from nestc.graph.region import Region
from nestc.kernels.api import PLAIN, CpuMachine, Layout
from nestc.kernels.conv_bf16 import CONV_BF16
from nestc.kernels.families import alternatives
from nestc.kernels.testing import evaluate, host_machine, region_of, run_lowered
from nestc.targets.cpu.machine import machine as machine_of
from nestc.tensor.math import expand

MACHINE = host_machine()  # computes Dot in other instructions if it has none for it
AVX512 = dataclasses.replace(MACHINE, vector_bytes=64, dot_bytes=64, vector_registers=32, bf16=True)
NEON = dataclasses.replace(MACHINE, vector_bytes=16, dot_bytes=16, vector_registers=32, bf16=True)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Array = np.ndarray[Any, np.dtype[Any]]


def build(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    *,
    residual: bool = False,
    narrow: bool = False,
    cast_weights: bool = False,
    seed: int = 0,
    **attributes: Any,
) -> tuple[Region, dict[str, Array], Array]:
    """A region, what it is fed with, and its output in float64.

    A residual is added before a Relu; `narrow` rounds the output to bfloat16; with `cast_weights` the prologue widens
    the weights, else they are float32 constants.
    """
    random = np.random.default_rng([seed, *x_shape, *w_shape])
    x = random.standard_normal(x_shape).astype(BFLOAT16)
    w = (random.standard_normal(w_shape) / np.sqrt(np.prod(w_shape[1:]))).astype(BFLOAT16)
    b = random.standard_normal(w_shape[0]).astype(np.float32)
    conv = helper.make_node("Conv", ["xf", "wf" if cast_weights else "w", "b"], ["y"], "conv", **attributes)
    exact = evaluate([conv], {k: v.astype(np.float64) for k, v in {"xf": x, "wf": w, "w": w, "b": b}.items()})["y"]
    feeds: dict[str, Array] = {"x": x, "b": b, "w": w if cast_weights else w.astype(np.float32)}
    values: dict[str, Array] = {"xf": x.astype(np.float32), "wf": w.astype(np.float32)}
    values["y"] = exact.astype(np.float32)
    nodes: list[NodeProto] = [helper.make_node("Cast", ["x"], ["xf"], "cast_x", to=1)]
    if cast_weights:
        nodes.append(helper.make_node("Cast", ["w"], ["wf"], "cast_w", to=1))
    nodes.append(conv)
    if residual:
        feeds["r"] = random.standard_normal(exact.shape).astype(np.float32)
        exact = np.maximum(exact + feeds["r"], 0)
        nodes += [helper.make_node("Add", ["y", "r"], ["s"]), helper.make_node("Relu", ["s"], ["z"])]
        values |= {"s": exact.astype(np.float32), "z": exact.astype(np.float32)}
    if narrow:
        nodes.append(helper.make_node("Cast", [nodes[-1].output[0]], ["q"], "narrow", to=16))
        values["q"] = exact.astype(BFLOAT16)
    region = region_of(nodes, {**feeds, **values}, [nodes[-1].output[0]], ["w", "b"], "Conv")
    return region, feeds, exact


def check(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], machine: CpuMachine = MACHINE, jit: bool = True, **options: Any
) -> None:
    region, feeds, exact = build(x_shape, w_shape, **options)
    assert CONV_BF16.refusal(region) is None, CONV_BF16.refusal(region)
    layouts = dict(CONV_BF16.layouts(region, machine, dict.fromkeys(region.inputs, PLAIN)))
    assert layouts["x"] == layouts[region.outputs[0]] == Layout(machine.lanes("float32"))
    lowered = CONV_BF16.lower(region, machine, layouts)
    if w_shape[1] > 1:
        assert all(array.dtype == BFLOAT16 for name, array in lowered.constants.items() if name.endswith("packed"))
    found = run_lowered(region, lowered, feeds, machine, layouts, jit)[region.outputs[0]]
    assert found.shape == exact.shape
    assert str(found.dtype) == region.types[region.outputs[0]].dtype
    scale = max(1.0, float(np.abs(exact).max()))
    rounding = 2.0**-8 * np.abs(exact) if options.get("narrow") else 0.0
    assert np.all(np.abs(found.astype(np.float64) - exact) <= 3e-6 * scale + rounding)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_random(data: st.DataObject) -> None:
    draw = data.draw
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    strides, dilations = ([draw(st.integers(1, 2)) for _ in range(2)] for _ in range(2))
    size = [d * (k - 1) + 1 + draw(st.integers(0, 9)) for d, k in zip(dilations, kernel)]
    group = draw(st.sampled_from([1, 1, 2, 3, 20]))
    into = group * draw(st.sampled_from([16, 18, 24])) if group > 1 else draw(st.integers(16, 40))
    out = group * draw(st.sampled_from([3, 8, 16])) if group > 1 else draw(st.integers(1, 40))
    if group == 20:  # depthwise
        into = out = group
    check(
        (draw(st.integers(1, 2)), into, *size),
        (out, into // group, *kernel),
        residual=draw(st.booleans()),
        narrow=draw(st.booleans()),
        cast_weights=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
        group=group,
        strides=strides,
        dilations=dilations,
        pads=[draw(st.integers(0, 2)) for _ in range(4)],
    )


@pytest.mark.parametrize("machine", [AVX512, NEON])
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options"),
    [
        ((1, 33, 3, 4), (18, 33, 2, 3), {"pads": [1, 1, 0, 1]}),
        ((1, 17, 3, 5), (9, 17, 1, 1), {"residual": True, "narrow": True}),
        ((1, 32, 5, 3), (32, 16, 2, 1), {"group": 2, "strides": [2, 1], "narrow": True}),
    ],
)
def test_other_machines(
    machine: CpuMachine, x_shape: tuple[int, ...], w_shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    check(x_shape, w_shape, machine, jit=False, **options)


@pytest.mark.parametrize("size", [(30,), (5, 6, 7), (20, 1)])
def test_other_ranks(size: tuple[int, ...]) -> None:
    kernel = tuple(min(3, n) for n in size)
    check((1, 40, *size), (24, 40, *kernel), residual=True, pads=[int(n > 1) for n in size] * 2)


def test_pointwise_that_leaves_pixels_out() -> None:
    check((2, 32, 9, 14), (20, 32, 1, 1), residual=True, narrow=True, strides=[2, 2])


def test_sums_in_chunks_of_input_channels() -> None:
    """The weights of an item exceed L1, so that partial sums wait in scratch memory."""
    check((1, 512, 6, 6), (40, 512, 3, 3), pads=[1, 1, 1, 1], residual=True, narrow=True)


@pytest.mark.parametrize("columns", [3, 9])
def test_depthwise(columns: int) -> None:
    check((1, 21, 4, 17), (21, 1, 3, columns), group=21, pads=[1, columns // 2] * 2, residual=True, narrow=True)
    check((1, 21, 4, 17), (21, 1, 3, columns), group=21, pads=[1, columns // 2] * 2, strides=[2, 2])


def test_only_machines_with_the_instruction_take_it() -> None:
    region, _, _ = build((1, 32, 6, 6), (8, 32, 3, 3))
    assert [way.name for way in alternatives(region, AVX512)] == ["conv_bf16", "dequantize"]
    assert [way.name for way in alternatives(region, dataclasses.replace(AVX512, bf16=False))] == ["dequantize"]


def test_the_inner_loop_is_nothing_but_pairs_of_products() -> None:
    """The code for a machine that cannot run here: every tile in registers, one broadcast for four multiplications."""
    region, _, _ = build((1, 64, 14, 14), (64, 64, 3, 3), pads=[1, 1, 1, 1], narrow=True)
    machine = machine_of("avx512_vnni")
    layouts = dict(CONV_BF16.layouts(region, machine, dict.fromkeys(region.inputs, PLAIN)))
    (launch,) = CONV_BF16.lower(region, machine, layouts).launches
    text = print_kernel(expand(launch.kernel, machine), "kernel", machine).text
    assembly = compile_ir(text, machine, assembly=True).assembly
    inner = [block for block in re.split(r"^(?=\.LBB\S+:)", assembly, flags=re.MULTILINE) if "vdpbf16ps" in block]
    assert inner
    for block in inner:
        products, broadcasts = (len(re.findall(rf"\t{name}\S*\t", block)) for name in ("vdpbf16ps", "vp?broadcast"))
        assert products >= 3.9 * broadcasts
        assert not re.search(r"%zmm\d+, -?\d*\(%rsp\)", block)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options", "reason"),
    [
        ((1, 15, 5, 5), (32, 15, 3, 3), {}, "few input channels"),
        ((1, 51, 5, 5), (48, 17, 3, 3), {"group": 3}, "odd number"),
    ],
)
def test_refusals(x_shape: tuple[int, ...], w_shape: tuple[int, ...], options: dict[str, Any], reason: str) -> None:
    region, _, _ = build(x_shape, w_shape, **options)
    assert reason in (CONV_BF16.refusal(region) or "")


def test_refusal_of_other_operands() -> None:
    region, feeds, _ = build((1, 32, 5, 5), (8, 32, 3, 3))
    wide = {**region.constants, "w": lambda: feeds["w"] + np.float32(1e-4)}
    assert "not bfloat16 numbers" in (CONV_BF16.refusal(dataclasses.replace(region, constants=wide)) or "")
    plain = dataclasses.replace(region, ops=region.ops[1:], inputs=("xf",))
    assert "not a Conv on narrow operands" in (CONV_BF16.refusal(plain) or "")
    twice = dataclasses.replace(region.ops[1], op_type="Add", inputs=("y", "xf"), outputs=("s",), attributes={})
    types = {**region.types, "s": region.types["y"]}
    both = dataclasses.replace(region, ops=(*region.ops, twice), outputs=("s",), types=types)
    assert "more than the input" in (CONV_BF16.refusal(both) or "")
