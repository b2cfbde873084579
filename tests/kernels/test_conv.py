"""Direct and depthwise convolution against ONNX Runtime and against the Tensor IR interpreter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.kernels.api import PLAIN, Layout
from nestc.kernels.checking import by_onnxruntime
from nestc.kernels.conv import CONV
from nestc.kernels.conv_shape import ConvShape, Tile, columns_pay, cut_row, fold_pixels, met, register_tile
from nestc.kernels.testing import evaluate, host_machine, region_of, run_lowered

MACHINE = host_machine()
BLOCK = Layout(MACHINE.lanes("float32"))


def check(x, w, b=None, *, tail=False, blocked=True, jit=True, **attributes):
    """Our kernel equals ONNX Runtime's on one convolution, with a residual and a Relu if `tail`."""
    feeds = {"x": x, "w": w} | ({} if b is None else {"b": b})
    nodes = [helper.make_node("Conv", list(feeds), ["y"], name="conv", **attributes)]
    constants = [name for name in ("w", "b") if name in feeds]
    if tail:
        shape = (by_onnxruntime(nodes, feeds) if x.dtype == np.float32 else evaluate(nodes, feeds))["y"].shape
        feeds["residual"] = np.random.default_rng(1).standard_normal(shape).astype(x.dtype)
        nodes += [helper.make_node("Add", ["y", "residual"], ["s"]), helper.make_node("Relu", ["s"], ["z"])]
    # ONNX Runtime has no convolution of doubles; the reference evaluator is slow but has.
    values = by_onnxruntime(nodes, feeds) if x.dtype == np.float32 else evaluate(nodes, feeds)
    output = nodes[-1].output[0]
    region = region_of(nodes, {**feeds, **values}, [output], constants)
    assert CONV.refusal(region) is None
    incoming = dict.fromkeys(region.inputs, BLOCK if blocked else PLAIN)
    layouts = dict(CONV.layouts(region, MACHINE, incoming))
    if not blocked and attributes.get("group", 1) == 1:
        layouts["x"] = PLAIN
    found = run_lowered(region, CONV.lower(region, MACHINE, layouts), feeds, MACHINE, layouts, jit)[output]
    expected = values[output]
    assert found.shape == expected.shape and found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * max(1.0, float(np.abs(expected).max())))


def tensors(seed, shape, weights, dtype="float32"):
    """Seeded input, weights scaled to unit variance, and bias."""
    random = np.random.default_rng(seed)
    scale = 1 / np.sqrt(np.prod(weights[1:]))
    x = random.standard_normal(shape).astype(dtype)
    return x, (random.standard_normal(weights) * scale).astype(dtype), random.standard_normal(weights[0]).astype(dtype)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_random_two_dimensional(data):
    draw = data.draw
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    strides, dilations = ([draw(st.integers(1, 3)) for _ in range(2)] for _ in range(2))
    pads = [draw(st.integers(0, 3)) for _ in range(4)]
    size = [d * (k - 1) + 1 + draw(st.integers(0, 12)) for d, k in zip(dilations, kernel)]
    kind = draw(st.sampled_from(["dense", "depthwise", "grouped"]))
    channels = draw(st.integers(1, 20))
    if kind == "dense":
        group, into, out = 1, channels, draw(st.integers(1, 40))
    elif kind == "depthwise":
        group = into = out = channels
    else:
        group = draw(st.integers(2, 3))
        into, out = group * draw(st.integers(1, 10)), group * draw(st.sampled_from([3, 8, 16]))
    x, w, b = tensors(draw(st.integers(0, 99)), (draw(st.integers(1, 2)), into, *size), (out, into // group, *kernel))
    bias = b if draw(st.booleans()) else None
    check(
        x,
        w,
        bias,
        tail=draw(st.booleans()),
        blocked=draw(st.booleans()),
        group=group,
        strides=strides,
        dilations=dilations,
        pads=pads,
    )


@pytest.mark.parametrize("size", [(30,), (7, 9, 11), (40, 1)])
def test_other_ranks(size):
    x, w, b = tensors(0, (1, 17, *size), (24, 17, *(min(3, n) for n in size)))
    check(x, w, b, tail=True, pads=[int(n > 1) for n in size] * 2)


def test_wide_kernel_of_many_columns():
    x, w, b = tensors(0, (1, 9, 1, 64), (16, 9, 1, 21))
    check(x, w, b, pads=[0, 10, 0, 10])
    x, w, b = tensors(0, (1, 9, 1, 64), (9, 1, 1, 21))
    check(x, w, b, pads=[0, 10, 0, 10], group=9)


def test_sums_in_chunks_of_input_channels():
    """The weights of an item exceed L1, so that partial sums wait in scratch memory."""
    x, w, b = tensors(0, (1, 256, 9, 9), (40, 256, 3, 3))
    check(x, w, b, tail=True, pads=[1, 1, 1, 1])
    x, w, b = tensors(0, (1, 1024, 5, 7), (24, 1024, 1, 1))
    check(x, w, b, tail=True)


@pytest.mark.parametrize("size", [(9, 14), (1, 13), (5, 6, 7)])
def test_pointwise_that_leaves_pixels_out(size):
    x, w, b = tensors(0, (2, 24, *size), (20, 24, *(1,) * len(size)))
    check(x, w, b, tail=True, strides=[min(2, n) for n in size])


@pytest.mark.parametrize(
    ("size", "kernel", "strides", "pads"),
    [
        ((28, 28), (5, 5), [1, 1], [2, 2, 2, 2]),
        ((11, 23), (3, 3), [2, 2], [1, 1, 0, 1]),
        ((6, 5), (2, 4), [1, 3], [0, 3, 1, 3]),
        ((40,), (5,), [1], [2, 2]),
        ((4, 5, 9), (3, 2, 3), [1, 1, 1], [1, 0, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize(("channels", "jit"), [(1, True), (3, True), (2, False)])
def test_one_vector_of_outputs_of_few_channels(size, kernel, strides, pads, channels, jit):
    """The weights of a kernel row are in registers, and an input is read once for all columns that it meets."""
    assert columns_pay(ConvShape(1, 1, channels, 8, size, size, kernel, tuple(strides), (1,) * len(size), ()), 8, 16)
    x, w, b = tensors(0, (1, channels, *size), (8, channels, *kernel))
    check(x, w, b, blocked=False, jit=jit, tail=True, strides=strides, pads=pads)


def test_what_each_input_meets():
    shape = ConvShape(1, 1, 1, 8, (1, 8), (1, 4), (1, 3), (1, 2), (1, 1), (0, 1))
    border, inner = Tile(0, 2, 1, ((1,), (0, 1), (0, 1))), Tile(2, 2, 1, None)
    assert met(border, shape) == {1: [(0, 1)], 2: [(1, 0), (0, 2)], 3: [(1, 1)], 4: [(1, 2)]}
    assert met(inner, shape) == {0: [(0, 0)], 1: [(0, 1)], 2: [(1, 0), (0, 2)], 3: [(1, 1)], 4: [(1, 2)]}
    assert not columns_pay(dataclasses.replace(shape, kernel=(1, 2)), 8, 16)  # no input meets two columns
    assert not columns_pay(dataclasses.replace(shape, out_channels=9), 8, 16)


@pytest.mark.parametrize("group", [1, 8])
def test_an_axis_of_which_only_padding_is_read(group):
    x, w, b = tensors(0, (1, 8, 3, 1), (8, 8 // group, 1, 1))
    check(x, w, b, strides=[1, 2], pads=[0, 1, 0, 0], group=group)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding(mode):
    x, w, _ = tensors(0, (1, 5, 10, 11), (8, 5, 4, 3))
    check(x, w, auto_pad=mode, strides=[2, 2])


def test_float64():
    x, w, b = tensors(0, (1, 12, 9, 9), (20, 12, 3, 3), "float64")
    check(x, w, b, tail=True, pads=[1, 1, 1, 1])


@pytest.mark.parametrize("group", [1, 12])
def test_machine_code_does_what_the_interpreter_does(group):
    x, w, b = tensors(0, (1, 12, 4, 5), (12, 12 // group, 3, 3))
    check(x, w, b, tail=True, pads=[1, 1, 1, 1], group=group, jit=False)


def test_rows_are_cut_into_balanced_tiles_with_borders_apart():
    tiles = cut_row(out=28, size=28, kernel=3, stride=1, dilation=1, pad=1, widest=6)
    assert [(t.start, t.width, t.count, t.ragged) for t in tiles] == [
        (0, 6, 1, {0}),
        (6, 6, 2, set()),
        (18, 5, 1, set()),
        (23, 5, 1, {4}),
    ]


@given(st.integers(1, 400), st.integers(1, 9), st.integers(1, 3), st.integers(0, 4), st.integers(1, 14))
def test_tiles_cover_a_row_once(out, kernel, stride, pad, widest):
    size = (out - 1) * stride + kernel - 2 * pad
    covered = [
        t.start + i * t.width + j
        for t in cut_row(out, size, kernel, stride, 1, pad, widest)
        for i in range(t.count)
        for j in range(t.width)
    ]
    assert covered == list(range(out))


@given(st.integers(1, 5000), st.integers(2, 14))
def test_folded_pixels_are_all_pixels(pixels, widest):
    rows, length = fold_pixels(pixels, widest)
    assert rows * length == pixels


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([16, 32]))
def test_register_tile_fits_the_registers(vectors, pixels, registers):
    mr, nr = register_tile(vectors, pixels, registers)
    assert mr >= 1 and nr >= 1 and mr * nr + min(nr, 4) + 1 <= registers
