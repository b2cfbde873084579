"""Winograd of strided convolutions of few channels: the folded map and weights, and kernels against direct sums."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.codegen.llvm import print_kernel
from nestc.codegen.objects import compile_ir
from nestc.graph.region import Region
from nestc.kernels.api import PLAIN
from nestc.kernels.conv_shape import ConvShape
from nestc.kernels.families import alternatives
from nestc.kernels.testing import host_machine, region_of, run_lowered
from nestc.kernels.winograd_folded import (
    WINOGRAD_FOLDED,
    FoldedWinogradFamily,
    fold_weights,
    folded_shape,
    folded_taps,
)
from nestc.targets.cpu.machine import machine
from nestc.tensor import math
from nestc.tensor.verify import verify

MACHINE = host_machine()
BOUND = 2e-5  # as in test_winograd


def region_and_values(x_shape, w_shape, strides, pads, tail=(), bias=True) -> tuple[Region, dict[str, np.ndarray]]:
    """A strided Conv with elementwise operators behind it, and every value, by its definition in float64."""
    random = np.random.default_rng(0)
    rank = len(strides)
    x = random.standard_normal(x_shape).astype(np.float32)
    w = (random.standard_normal(w_shape) / np.sqrt(np.prod(w_shape[1:]))).astype(np.float32)
    b = random.standard_normal(w_shape[0]).astype(np.float32) * bias
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:])])
    windows = np.lib.stride_tricks.sliding_window_view(padded, w_shape[2:], tuple(range(2, 2 + rank)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, stride) for stride in strides))]
    axes = tuple(range(windows.ndim - rank, windows.ndim))
    y = np.tensordot(windows, w.astype(np.float64), ((1, *axes), (1, *range(2, 2 + rank))))
    values = {"x": x, "w": w, "y": np.moveaxis(y, -1, 1) + b.reshape(-1, *(1,) * rank)}
    names = ["x", "w"]
    if bias:
        values["b"] = b
        names.append("b")
    nodes = [helper.make_node("Conv", names, ["y"], "conv", strides=strides, pads=pads, kernel_shape=w_shape[2:])]
    last = "y"
    for i, kind in enumerate(tail):
        name = f"t{i}"
        if kind == "Add":
            values["residual"] = random.standard_normal(values[last].shape).astype(np.float32)
            nodes.append(helper.make_node("Add", ["residual", last], [name]))
            values[name] = values[last] + values["residual"]
        else:
            nodes.append(helper.make_node("Relu", [last], [name]))
            values[name] = np.maximum(values[last], 0)
        last = name
    stored = {name: np.asarray(value, np.float32) for name, value in values.items()}
    return region_of(nodes, stored, [last], names[1:]), {**stored, last: values[last]}


def check(m, x_shape, w_shape, strides, pads, tail=(), bias=True, fused=None, jit=True, cpu=MACHINE):
    """Our kernels are as good as a direct sum in float64, but for the error that the transforms may make."""
    region, values = region_and_values(x_shape, w_shape, strides, pads, tail, bias)
    family = FoldedWinogradFamily(m, fused)
    assert family.refusal(region) is None
    layouts = family.layouts(region, cpu, dict.fromkeys(region.inputs, PLAIN))
    feeds = {name: values[name] for name in region.inputs}
    output = region.outputs[0]
    found = run_lowered(region, family.lower(region, cpu, layouts), feeds, cpu, layouts, jit)[output]
    expected = values[output]
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND * max(1.0, float(np.abs(expected).max())))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_random_convolutions(data):
    draw = data.draw
    m, taps = draw(st.sampled_from([(2, 3), (3, 2), (3, 4), (4, 3), (5, 2), (5, 4)]))
    rank = draw(st.sampled_from([1, 2, 2, 2]))
    strides = draw(st.sampled_from([[2, 2], [2, 2], [3, 2], [1, 2], [2, 1], [4, 4]]))[:rank]
    if max(strides) == 1:
        strides[0] = 2
    kernel = [draw(st.integers((taps - 1) * s + 1, taps * s)) for s in strides]
    pads = [draw(st.integers(0, k - 1)) for k in (*kernel, *kernel)]
    size = [max(1, k - pads[i] - pads[rank + i]) + draw(st.integers(0, 25)) for i, k in enumerate(kernel)]
    channels, outputs = draw(st.integers(1, 5)), draw(st.integers(16, 25))
    tail = draw(st.sampled_from([(), ("Relu",), ("Add", "Relu")]))
    x_shape, w_shape = (draw(st.integers(1, 2)), channels, *size), (outputs, channels, *kernel)
    check(m, x_shape, w_shape, strides, pads, tail, draw(st.booleans()))


@pytest.mark.parametrize("m", [3, 5])
@pytest.mark.parametrize("fused", [False, True])
def test_first_layer_of_a_residual_network(m, fused):
    check(m, (1, 3, 60, 64), (64, 3, 7, 7), [2, 2], [3, 3, 3, 3], ("Relu",), fused=fused)


def test_machine_code_does_what_the_interpreter_does():
    check(3, (1, 2, 9, 10), (16, 2, 7, 7), [2, 2], [3, 3, 2, 2], jit=False)


def test_an_axis_without_stride_and_one_of_one_tap():
    check(4, (1, 2, 20, 21), (16, 2, 3, 5), [1, 2], [1, 2, 1, 2])
    check(4, (1, 2, 20, 21), (16, 2, 1, 5), [1, 2], [0, 2, 0, 2])


def test_weights_and_sizes_of_a_folded_convolution():
    """Taps whose places are equal modulo the stride meet the same channel; the last row and column are zero."""
    shape = ConvShape(1, 1, 1, 1, (9, 9), (5, 5), (3, 3), (2, 2), (1, 1), (1, 1))
    weights = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    folded = fold_weights(weights, shape)
    assert folded_taps(shape) == (2, 2)
    assert folded[0].tolist() == [[[0, 2], [6, 8]], [[1, 0], [7, 0]], [[3, 5], [0, 0]], [[4, 0], [0, 0]]]
    dense = folded_shape(shape)
    assert (dense.in_channels, dense.size, dense.out, dense.kernel) == (4, (6, 6), (5, 5), (2, 2))
    assert dense.strides == (1, 1) and dense.pads_begin == (0, 0)


@pytest.mark.parametrize("arch", ["avx512", "neon", "sse2"])
def test_other_machines_get_kernels(arch):
    cpu = machine(arch)
    region, _ = region_and_values((1, 3, 20, 20), (24, 3, 7, 7), [2, 2], [3, 3, 3, 3])
    for family in (FoldedWinogradFamily(3), FoldedWinogradFamily(5)):
        for launch in family.lower(region, cpu, family.layouts(region, cpu, {})).launches:
            verify(launch.kernel)
            code = print_kernel(math.expand(launch.kernel, cpu), "kernel", cpu)
            assert compile_ir(code.text, cpu).code


@pytest.mark.parametrize("bytes_", [16, 64])
def test_vectors_of_other_widths(bytes_):
    """The kernels of such machines, with their vectors split or narrow, on this one."""
    registers = 32 if bytes_ == 64 else 16
    cpu = dataclasses.replace(MACHINE, vector_bytes=bytes_, vector_registers=registers)
    check(3, (1, 3, 25, 24), (24, 3, 7, 7), [2, 2], [3, 3, 3, 3], ("Relu",), cpu=cpu)


def test_what_is_refused():
    def reason(m=5, channels=3, outputs=64, kernel=7, stride=2):
        region, _ = region_and_values((1, channels, 16, 16), (outputs, channels, kernel, kernel), [stride] * 2, [0] * 4)
        return FoldedWinogradFamily(m).refusal(region)

    assert reason() is None and reason(3) is None
    assert reason(stride=1) == "there is no stride to fold"
    assert reason(stride=5) == "strides above 4 are not folded"
    assert reason(4) == "F(4, r) of (4, 4) taps is not among the transforms"
    assert reason(kernel=2) == "F(5, r) of (1, 1) taps is not among the transforms"
    assert reason(channels=16) == "16 channels or more are not folded"
    assert reason(outputs=15) == "fewer than 16 outputs are not worth transforming"


def test_the_first_layer_of_a_residual_network_is_folded_unless_exact():
    region, _ = region_and_values((1, 3, 224, 224), (64, 3, 7, 7), [2, 2], [3, 3, 3, 3], ("Relu",))
    names = [family.name for family in alternatives(region, MACHINE)]
    assert len(set(names)) == len(names)
    assert names[0] == "winograd5_folded"
    assert {"winograd3_folded", "winograd5_folded_split"} <= set(names)
    assert not any("winograd" in family.name for family in alternatives(region, MACHINE, exact=True))
    small, _ = region_and_values((1, 3, 224, 224), (32, 3, 3, 3), [2, 2], [1, 1, 1, 1], ("Relu",))
    assert alternatives(small, MACHINE)[0].name == "conv"
    assert {family.name for family in WINOGRAD_FOLDED} == {f"winograd{m}_folded" for m in (2, 3, 4, 5)}
