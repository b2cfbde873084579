"""Depthwise convolution of 8-bit maps against sums of 64-bit integers and one rounding at the end."""

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
from nestc.kernels.depthwise_int8 import DEPTHWISE_INT8
from nestc.kernels.families import choose
from nestc.kernels.testing import host_machine, region_of, run_lowered
from nestc.targets.cpu.machine import machine
from nestc.tensor.math import expand

HOST = host_machine()
WIDE = dataclasses.replace(HOST, vector_bytes=64, vector_registers=32)
X86 = HOST.triple.startswith("x86_64")
MACHINES = [HOST, WIDE, *([machine("sse2")] if X86 else [])]


def integers(rng, dtype, shape):
    """Integers of the whole range, the extremes often among them."""
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    return np.where(rng.random(shape) < 0.1, rng.choice([info.min, info.max], shape), values).astype(dtype)


@dataclasses.dataclass
class Case:
    """A depthwise Conv between DequantizeLinear and a tail, and its result by definition."""

    region: object
    feeds: dict
    sums: np.ndarray
    real: np.ndarray
    expected: dict


def case_of(
    seed=0,
    channels=16,
    size=(9, 9),
    kernel=(3, 3),
    strides=(1, 1),
    dilations=(1, 1),
    pads=None,
    batch=1,
    x_type="uint8",
    w_type="int8",
    per_channel=True,
    w_zero=0,
    x_zero=7,
    bias="int32",
    tail="clip",
    y_type="uint8",
):
    """Build one case; `pads` default to half of the kernel on each side."""
    rng = np.random.default_rng(seed)
    pads = [k // 2 * d for k, d in zip(kernel, dilations, strict=True)] * 2 if pads is None else pads
    rank = len(size)
    x = integers(rng, x_type, (batch, channels, *size))
    w = integers(rng, w_type, (channels, 1, *kernel))
    xs, ys = np.float32(rng.uniform(0.01, 0.1)), np.float32(rng.uniform(0.02, 0.3))
    ws = rng.uniform(0.001, 0.01, channels if per_channel else ()).astype(np.float32)
    x_zero = np.array(x_zero, x_type)
    w_zero = np.full(ws.shape, w_zero, w_type)
    y_zero = np.array(3, y_type)
    out = [
        (n + pads[i] + pads[rank + i] - d * (k - 1) - 1) // s + 1
        for i, (n, k, s, d) in enumerate(zip(size, kernel, strides, dilations, strict=True))
    ]
    sums = np.zeros((batch, channels, *out), np.int64)
    wide = np.pad(x.astype(np.int64) - int(x_zero), [(0, 0), (0, 0), *((pads[i], pads[rank + i]) for i in range(rank))])
    centred = w.astype(np.int64) - w_zero.astype(np.int64).reshape(-1, *(1,) * (rank + 1))
    for tap in np.ndindex(*kernel):
        place = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, o, s in zip(tap, dilations, out, strides, strict=True)
        )
        sums += wide[(slice(None), slice(None), *place)] * centred[(slice(None), 0, *tap)].reshape(-1, *(1,) * rank)
    scale = (xs * ws).astype(np.float32)
    constants = {"xs": xs, "xz": x_zero, "w": w, "ws": ws, "wz": w_zero, "ys": ys, "yz": y_zero}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=0),
    ]
    names = ["xf", "wf"]
    column = (-1, *(1,) * rank)
    offset = np.float32(0)
    if bias == "int32":
        constants |= {"b": rng.integers(-9999, 9999, channels).astype(np.int32), "bs": scale}
        nodes.append(helper.make_node("DequantizeLinear", ["b", "bs"], ["bf"], axis=0))
        sums += constants["b"].astype(np.int64).reshape(column)
        names.append("bf")
    elif bias == "float32":
        constants["bf"] = rng.normal(size=channels).astype(np.float32)
        offset = constants["bf"].reshape(column)
        names.append("bf")
    nodes.append(
        helper.make_node(
            "Conv", names, ["y"], group=channels, strides=strides, dilations=dilations, pads=pads, kernel_shape=kernel
        )
    )
    column_scale = scale.reshape(column) if per_channel else scale
    real = sums.astype(np.float32) * column_scale + offset
    values = {**constants, "x": x, "xf": x.astype(np.float32), "wf": w.astype(np.float32), "y": real}
    if bias == "int32":
        values["bf"] = constants["b"].astype(np.float32)
    given_, result = "y", real
    if tail in ("relu", "clip"):
        constants |= {"lo": np.float32(0), "hi": np.float32(6)}
        inputs = ["y"] if tail == "relu" else ["y", "lo", "hi"]
        nodes.append(helper.make_node("Relu" if tail == "relu" else "Clip", inputs, ["r"]))
        given_, result = "r", np.maximum(real, 0) if tail == "relu" else np.clip(real, 0, 6)
    values |= constants
    feeds = {"x": x}
    if tail == "add":
        feeds["z"] = values["z"] = rng.normal(size=real.shape).astype(np.float32)
        nodes.append(helper.make_node("Add", ["y", "z"], ["r"]))
        given_, result = "r", real + feeds["z"]
    if tail == "float":
        nodes.append(helper.make_node("Relu", ["y"], ["q"]))
        expected = np.maximum(real, 0)
    else:
        nodes.append(helper.make_node("QuantizeLinear", [given_, "ys", "yz"], ["q"]))
        info = np.iinfo(y_type)
        factor = column_scale / ys if tail in ("none", "relu", "clip") else None
        if factor is None:
            rounded = np.rint(result * np.float32(1 / float(ys)))
        else:
            limits = {"none": (-np.inf, np.inf), "relu": (0, np.inf), "clip": (0, 6)}[tail]
            limits = [np.rint(np.float32(limit) / ys) for limit in limits]
            rounded = np.clip(np.rint(sums.astype(np.float32) * factor + offset / ys), *limits)
        expected = np.clip(rounded + int(y_zero), info.min, info.max).astype(y_type)
    values |= {"r": result, "q": expected}
    region = region_of(nodes, values, ["q"], list(constants), "Conv")
    return Case(region, feeds, sums, real, {"q": expected})


def run(case, target=HOST, jit=True):
    assert DEPTHWISE_INT8.refusal(case.region) is None
    block = Layout(target.lanes("float32"))
    layouts = DEPTHWISE_INT8.layouts(case.region, target, dict.fromkeys(case.region.inputs, block))
    lowered = DEPTHWISE_INT8.lower(case.region, target, layouts)
    return run_lowered(case.region, lowered, case.feeds, target, layouts, jit)["q"]


def check(case, target=HOST, jit=True, inexact=0.0):
    """Results equal those by definition; of quantized ones, a share `inexact` may be off by one (rounded elsewhere)."""
    found, wanted = run(case, target, jit), case.expected["q"]
    if wanted.dtype == np.float32:
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
        return
    off = np.abs(found.astype(np.int32) - wanted.astype(np.int32))
    assert off.max() <= (1 if inexact else 0) and np.mean(off) <= inexact


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_shapes(data):
    rank = data.draw(st.integers(1, 2), "rank")

    def sizes(low, high, name):
        return tuple(data.draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank), name))

    kernel = sizes(1, 5, "kernel")
    dilations = sizes(1, 2, "dilations")
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = [data.draw(st.integers(0, r - 1)) for r in reach * 2]
    case = case_of(
        seed=data.draw(st.integers(0, 99)),
        channels=data.draw(st.sampled_from([2, 8, 16, 19, 33]), "channels"),
        size=tuple(data.draw(st.integers(r, r + 12)) for r in reach),
        kernel=kernel,
        strides=sizes(1, 3, "strides"),
        dilations=dilations,
        pads=pads,
        batch=data.draw(st.integers(1, 2)),
        x_type=data.draw(st.sampled_from(["uint8", "int8"]), "x"),
        w_type=data.draw(st.sampled_from(["uint8", "int8"]), "w"),
        per_channel=data.draw(st.booleans(), "per channel"),
        w_zero=data.draw(st.sampled_from([0, 5])),
        x_zero=data.draw(st.sampled_from([0, 7, 127])),
        bias=data.draw(st.sampled_from(["int32", ""]), "bias"),
        tail=data.draw(st.sampled_from(["none", "relu", "clip"]), "tail"),
        y_type=data.draw(st.sampled_from(["uint8", "int8"]), "y"),
    )
    check(case, data.draw(st.sampled_from(MACHINES), "machine"))


@pytest.mark.parametrize("tail", ["add", "float"])
@pytest.mark.parametrize("channels", [16, 19])
def test_tails_in_float(tail, channels):
    # Multiplying by a reciprocal instead of dividing moves results that lie next to a tie.
    check(case_of(channels=channels, tail=tail), inexact=1e-3)


@pytest.mark.parametrize("channels", [16, 19])
def test_bias_with_a_scale_of_its_own(channels):
    check(case_of(channels=channels, bias="float32", tail="none"), inexact=1e-3)


@pytest.mark.parametrize(
    "kernel, strides, dilations, size",
    [
        ((3, 3), (1, 1), (1, 1), (40, 112)),  # several items
        ((3, 3), (2, 2), (1, 1), (57, 56)),
        ((5, 5), (1, 1), (1, 1), (28, 28)),
        ((3, 3), (2, 1), (3, 2), (30, 17)),
        ((9, 9), (1, 1), (1, 1), (20, 20)),  # columns in a loop
        ((2, 4), (3, 1), (1, 1), (31, 9)),
    ],
)
def test_larger_maps(kernel, strides, dilations, size):
    check(case_of(size=size, kernel=kernel, strides=strides, dilations=dilations))


@pytest.mark.parametrize("target", MACHINES, ids=lambda m: f"{m.name}{m.vector_bytes}")
def test_the_interpreter_agrees(target):
    check(case_of(channels=19, size=(5, 6), strides=(2, 1), x_type="int8", x_zero=-3), target, jit=False)


def test_widest_sums():
    """The largest products that there are, all of one sign."""
    case = case_of(channels=8, size=(6, 6), w_type="uint8", x_zero=255, w_zero=255, bias="", tail="none")
    case.feeds["x"][:] = 0
    assert run(case).shape == case.real.shape
    case = case_of(channels=8, size=(9, 9), kernel=(7, 7), tail="none", x_zero=0)
    check(case)


def test_what_it_leaves_to_others():
    for change in ({"x_zero": 0}, {"kernel": (1, 1), "size": (4, 4)}):
        assert choose(case_of(**change).region)[0] is DEPTHWISE_INT8
    volume = case_of(size=(4, 4, 4), kernel=(3, 3, 3), strides=(1, 1, 1), dilations=(1, 1, 1))
    assert "spatial axes" in (DEPTHWISE_INT8.refusal(volume.region) or "")
    assert choose(volume.region)[0] is not None


@pytest.mark.parametrize(
    "arch, instruction", [("avx2", "vpmaddwd"), ("avx512", "vpmaddwd|vpdpwssd"), ("sse2", "pmaddwd"), ("neon", "smull")]
)
def test_instructions(arch, instruction):
    """Two taps an instruction where the machine has one for that, and saturation by packing on AVX2."""
    target = machine(arch)
    case = case_of(channels=32, size=(16, 16))
    block = Layout(target.lanes("float32"))
    lowered = DEPTHWISE_INT8.lower(case.region, target, DEPTHWISE_INT8.layouts(case.region, target, {"x": block}))
    text = print_kernel(expand(lowered.launches[0].kernel, target), "k", target).text
    assembly = compile_ir(text, target, assembly=True).assembly
    assert any(name in assembly for name in instruction.split("|"))
    if arch == "avx2":
        assert "vpackuswb" in assembly and "vpermd" in assembly
