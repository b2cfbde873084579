"""Layers as plain products of rows: patches times weights are what the operator computes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qdq_support import HEAD, run
from quant_nets import parsed
from tool_nets import data, mobile, ready, reference

from nestc.quant.layers import as_layer, input_moments, integer_layers

CONVOLUTION = """
convolution (float[2, {channels}, {size}, {size}] x) => (float[2, {out}, A, B] y) {{
  y = Conv <group = {group}, strides = [{stride}, 1], dilations = [1, {dilation}], {pads}> (x, w)
}}
"""


@settings(deadline=None, max_examples=25)
@given(
    group=st.sampled_from([1, 2, 4]), each=st.integers(1, 2), out=st.integers(1, 2), kernel=st.integers(1, 3),
    stride=st.integers(1, 2), dilation=st.integers(1, 2), size=st.integers(5, 8),
    pads=st.sampled_from(["pads = [1, 0, 2, 1]", 'auto_pad = "SAME_UPPER"', 'auto_pad = "SAME_LOWER"',
                          'auto_pad = "VALID"']),
)  # fmt: skip
def test_patches_times_weights_are_the_convolution(
    group: int, each: int, out: int, kernel: int, stride: int, dilation: int, size: int, pads: str
) -> None:
    if "SAME" in pads:
        dilation = 1  # ONNX Runtime has no other
    random = np.random.default_rng(0)
    weight = random.standard_normal((group * out, each, kernel, kernel)).astype(np.float32)
    text = CONVOLUTION.format(
        channels=group * each, size=size, out=group * out, group=group, stride=stride, dilation=dilation, pads=pads
    )
    model = parsed(f"{HEAD} {text}", w=weight)
    x = random.standard_normal((2, group * each, size, size)).astype(np.float32)
    wanted = run(model, {"x": x})["y"]
    layer = as_layer(next(iter(model.ir.graph)))
    assert layer is not None
    patches = layer.patches(x, 10_000, random)
    product = np.matmul(patches, layer.rows(weight).transpose(0, 2, 1))  # (G, N * positions, O)
    made = product.reshape(group, 2, -1, out).transpose(1, 0, 3, 2).reshape(wanted.shape)
    assert np.allclose(made, wanted, atol=1e-4)
    assert np.array_equal(layer.weight(layer.rows(weight)), weight)


@pytest.mark.parametrize("op", ["Gemm", "Gemm <transB = 1>", "MatMul"])
def test_rows_of_matrix_products(op: str) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((6, 4) if "trans" not in op else (4, 6)).astype(np.float32)
    model = parsed(f"{HEAD} product (float[3, 6] x) => (float[3, 4] y) {{ y = {op} (x, w) }}", w=weight)
    x = random.standard_normal((3, 6)).astype(np.float32)
    layer = as_layer(next(iter(model.ir.graph)))
    assert layer is not None
    made = layer.patches(x, 10, random)[0] @ layer.rows(weight)[0].T
    assert np.allclose(made, run(model, {"x": x})["y"], atol=1e-5)
    assert np.array_equal(layer.weight(layer.rows(weight)), weight)


def test_moments_are_those_of_all_rows_and_samples_are_bounded() -> None:
    prepared, _, context = ready(mobile(), "int8")
    layers = integer_layers(prepared, context.assignment)
    assert [layer.op for layer in layers] == ["Conv"] * 5 + ["Gemm"]
    first = layers[:1]
    batches = data(mobile())
    moments = input_moments(
        prepared, {first[0].node: "x"}, first, batches, reference, gram=True, limit=81, samples=6
    )[first[0].node]  # fmt: skip
    rows = np.concatenate([first[0].patches(batch["x"], 81, np.random.default_rng(0)) for batch in batches[:3]], axis=1)
    assert moments.rows == rows.shape[1] == 6 * 81
    assert moments.gram is not None
    assert np.allclose(moments.mean, rows.mean(axis=1), atol=1e-5)
    assert np.allclose(moments.gram, np.matmul(rows.transpose(0, 2, 1), rows) / rows.shape[1], atol=1e-4)
