"""Bias correction: give the mean of what rounding the weights adds to each channel back through the bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nestc.graph.model import Model
from nestc.graph.passes.rewrite import array, operand
from nestc.quant.layers import Layer, Moments, input_moments, integer_layers
from nestc.quant.parameters import Parameters
from nestc.quant.profile import Profile
from nestc.quant.tools import Context, Tool

POSITIONS = 64
"""Output positions of each sample whose inputs are averaged."""

SAMPLES = 128
"""Samples that are averaged at the most; the mean of a channel is known well by then."""


def correct_biases(prepared: Model, profile: Profile, context: Context) -> Profile:
    """Add E[y] - E[y'] to the bias, y and y' a layer's results with float and with rounded weights, before its tail.

    Nagel et al., arXiv 1906.04721, section 4.2, with means from data (appendix D). Both results are taken on the inputs
    that the layer has in the float model: all layers are then measured in one pass, and none is corrected for what
    those before it, which are corrected themselves, have done to its inputs.
    """
    parameters = context.parameters
    assert parameters is not None
    nodes = {node.name: node for node in prepared.ir.graph}
    layers = [
        layer for layer in integer_layers(prepared, context.assignment) if has_bias(nodes[layer.node], parameters)
    ]
    if not layers:
        context.notes.append("bias-correction: no product has a bias that could be corrected")
        return profile
    moments = input_moments(
        prepared, {layer.node: layer.tensor for layer in layers}, layers, context.data("bias-correction"),
        context.compile("bias-correction"), gram=False, limit=POSITIONS, samples=SAMPLES,
        progress=context.progress, label="bias correction",
    )  # fmt: skip
    for layer in layers:
        weight = array(operand(nodes[layer.node], 1))
        assert weight is not None
        rounded = parameters.weights[layer.node, 1].real()
        error = mean_error(layer, weight, rounded, moments[layer.node])
        parameters.biases[layer.node] = corrected(nodes[layer.node], error)
    context.notes.append(f"bias-correction: biases of {len(layers)} products corrected by the mean of their error")
    return profile


BIAS_CORRECTION = Tool("bias-correction", "weights", correct_biases, data=True)


def mean_error(layer: Layer, weight: np.ndarray, rounded: np.ndarray, moments: Moments) -> np.ndarray:
    """E[y] - E[y'] of each output channel, float64."""
    lost = layer.rows(weight).astype(np.float64) - layer.rows(rounded)
    return np.einsum("gok,gk->go", lost, moments.mean).reshape(-1)


def corrected(node: ir.Node, error: np.ndarray) -> np.ndarray:
    """The bias of the float layer plus the error, float32."""
    given = array(operand(node, 2))
    bias = error if given is None else given.astype(np.float64).reshape(-1) + error
    return bias.astype(np.float32)


def has_bias(node: ir.Node, parameters: Parameters) -> bool:
    """Whether the layer's bias is added to its integer sums, or can be given one that is."""
    if node.name in parameters.biases:
        return True
    plain = node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
    return node.op_type in ("Conv", "Gemm") and plain and operand(node, 2) is None
