"""Taps that meet only padding: what goes, and that ONNX Runtime computes the same without them."""

from __future__ import annotations

import numpy as np
import pytest
from graph_support import assert_same, feeds, parse, run
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.graph.infer_shapes import InferShapes
from nestc.graph.passes.trim_taps import TrimTaps

RANDOM = np.random.default_rng(3)


def convolution(size: list[int], kernel: list[int], pads: list[int], strides: list[int], dilations: list[int]) -> str:
    """Text of one convolution of [1, 2, *size] with 3 x 2 x kernel weights."""
    shape = ",".join(map(str, size))
    out = ",".join(
        str((n + a + b - d * (k - 1) - 1) // s + 1)
        for n, k, a, b, s, d in zip(size, kernel, pads, pads[len(size) :], strides, dilations, strict=False)
    )
    return (
        f"g (float[1,2,{shape}] x) => (float[1,3,{out}] y) {{"
        f"y = Conv<pads={pads}, strides={strides}, dilations={dilations}>(x, w) }}"
    )


def trimmed(text: str, kernel: list[int]):
    """The model before and after the pass, with weights of `kernel`."""
    weights = {"w": RANDOM.standard_normal((3, 2, *kernel)).astype(np.float32)}
    before, after = parse(text, **weights), parse(text, **weights)
    for model in (before, after):
        InferShapes()(model.ir)
    TrimTaps()(after.ir)
    return before, after


@pytest.mark.parametrize(
    ("size", "kernel", "pads", "strides", "left", "left_pads"),
    [
        ([1], [3], [1, 1], [1], [1], (0, 0)),  # only the middle tap meets the one element
        ([2], [3], [1, 1], [2], [2], (0, 0)),
        ([4], [3], [1, 1], [2], [3], (1, 0)),  # nothing goes but padding that no output reads; so it stays
        ([1, 4], [3, 3], [1, 1, 1, 1], [1, 1], [1, 3], (0, 1, 0, 1)),
        ([2, 2], [5, 5], [2, 2, 2, 2], [1, 1], [3, 3], (1, 1, 1, 1)),
        ([7, 7], [3, 3], [1, 1, 1, 1], [1, 1], [3, 3], (1, 1, 1, 1)),
    ],
)
def test_what_goes(size, kernel, pads, strides, left, left_pads):
    before, after = trimmed(convolution(size, kernel, pads, strides, [1] * len(size)), kernel)
    (node,) = after.ir.graph
    assert list(node.inputs[1].shape.numpy())[2:] == left
    if left != kernel:
        assert tuple(node.attributes["pads"].as_ints()) == left_pads
        assert list(node.attributes["kernel_shape"].as_ints()) == left
    given_ = feeds(before)
    assert_same(run(after, given_), run(before, given_))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_same_values_without_them(data):
    rank = data.draw(st.integers(1, 2))
    number = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(rank)]  # noqa: E731
    size, kernel, strides, dilations = number(1, 5), number(1, 5), number(1, 3), number(1, 2)
    pads = number(0, 5) + number(0, 5)
    for axis in range(rank):
        if size[axis] + pads[axis] + pads[rank + axis] < dilations[axis] * (kernel[axis] - 1) + 1:
            pads[axis] += dilations[axis] * (kernel[axis] - 1)
    before, after = trimmed(convolution(size, kernel, pads, strides, dilations), kernel)
    given_ = feeds(before)
    assert_same(run(after, given_), run(before, given_))
