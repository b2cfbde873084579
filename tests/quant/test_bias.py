"""Bias correction: the mean error of every channel goes, in one pass."""

from __future__ import annotations

import numpy as np
import pytest
from tool_nets import data, mobile, ready, reference, results

import nestc
from nestc.errors import QuantizationError
from nestc.graph.passes.rewrite import array, operand
from nestc.quant import quantize as stage
from nestc.quant.bias import BIAS_CORRECTION, correct_biases, mean_error
from nestc.quant.layers import as_layer, input_moments
from nestc.quant.observe import observe
from nestc.quant.prepare import prepare
from nestc.quant.scheme import scheme_named
from nestc.quant.tools import Tool


def test_the_mean_error_is_what_the_means_of_rows_give() -> None:
    prepared, _, context = ready(mobile(), "int8:weight=int4", weights=True)
    node = next(node for node in prepared.ir.graph if node.op_type == "Conv")
    layer = as_layer(node)
    assert layer is not None and context.parameters is not None
    moments = input_moments(
        prepared, {layer.node: "x"}, [layer], context.data("test"), reference, gram=False, limit=81, samples=1000
    )  # fmt: skip
    weight = np.asarray(array(operand(node, 1)))
    rounded = context.parameters.weights[layer.node, 1].real()
    rows = np.concatenate([layer.patches(b["x"], 81, np.random.default_rng(0)) for b in data(mobile())], axis=1)
    lost = rows[0] @ (layer.rows(weight) - layer.rows(rounded))[0].T
    assert np.allclose(mean_error(layer, weight, rounded, moments[layer.node]), lost.mean(axis=0), atol=1e-5)


def quantized(model: nestc.Model, tools: tuple[Tool, ...]) -> nestc.Model:
    batches = data(model)
    profile = observe(prepare(model), batches, reference, "minmax")
    scheme = scheme_named("int8:weight=int4")
    return stage.quantize(model, profile, scheme, None, tools, batches=batches, compiler=reference)


def test_the_mean_error_of_the_model_shrinks() -> None:
    model = mobile(seed=2)
    fresh = data(model, seed=9, count=60)
    exact = results(model, fresh)
    plain = (results(quantized(model, ()), fresh) - exact).mean(axis=0)
    corrected = (results(quantized(model, (BIAS_CORRECTION,)), fresh) - exact).mean(axis=0)
    assert np.abs(corrected).sum() < 0.5 * np.abs(plain).sum()


def test_a_layer_without_bias_gets_one() -> None:
    made = quantized(mobile(), (BIAS_CORRECTION,))
    conv = [node for node in made.ir.graph if node.op_type == "Conv"][-1]
    assert len(conv.inputs) == 3 and conv.inputs[2] is not None
    source = conv.inputs[2].producer()
    assert source is not None and source.op_type == "DequantizeLinear"


def test_it_says_that_it_needs_data() -> None:
    prepared, profile, context = ready(mobile(), "int8", weights=True)
    context.batches = None
    with pytest.raises(QuantizationError, match="tool 'bias-correction' needs calibration data"):
        correct_biases(prepared, profile, context)


def test_correcting_twice_is_correcting_once() -> None:
    prepared, profile, context = ready(mobile(), "int8:weight=int4", weights=True)
    assert context.parameters is not None
    correct_biases(prepared, profile, context)
    first = {node: bias.copy() for node, bias in context.parameters.biases.items()}
    correct_biases(prepared, profile, context)
    assert all(np.array_equal(bias, first[node]) for node, bias in context.parameters.biases.items())
