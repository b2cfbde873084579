"""SmoothQuant: move outliers of a transformer's activations into the weights of the products that read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from nestc.graph.kinds import BROADCASTING, UNARY
from nestc.graph.model import Model
from nestc.graph.passes.rewrite import array, operand
from nestc.quant.choose import Assignment
from nestc.quant.equalize import stretched
from nestc.quant.insert import constant, follow
from nestc.quant.profile import Profile, TensorStats
from nestc.quant.tools import Context, Tool

Floats = NDArray[np.float64]

ALPHA = 0.5
"""How much of an activation's outliers goes to the weights: 0.5 for most models (arXiv 2211.10438, section 5.1)."""

SMALLEST = 1e-5
"""Least range of a channel, relative to the largest: dead channels stay as they are."""

NORMALIZATIONS = {"LayerNormalization": (1, 2), "RMSNormalization": (1,)}
"""Operators that end in a multiplication by constants a channel, and the inputs that hold these."""


def smooth(prepared: Model, profile: Profile, context: Context, alpha: float = ALPHA) -> Profile:
    """Divide activations by s and multiply the weights that read them by s, one s a channel; results stay as they are.

    Xiao et al., arXiv 2211.10438, section 4: s = max|x|^alpha / max|w|^(1 - alpha). A normalization takes 1/s into its
    constants if only these products read it; behind an elementwise operator, or where others read the tensor too, it
    becomes a multiplication in front of the products, which is fused. Returns the changed model's profile.
    """
    changed: dict[str, tuple[str, Floats]] = {}
    for value, products in _read_by_products(prepared, context.assignment).items():
        stats = profile.tensors.get(value.name or "")
        if stats is None or not _is_smoothable(value) or stats.channel_axis != _rank(value) - 1:
            continue
        scale = smoothing_scale(stats, [_rows(node) for node in products], alpha)
        if scale is None:
            continue
        name = value.name or ""
        _divide(prepared, value, products, scale)
        for node in products:
            weight = array(operand(node, 1))
            assert weight is not None
            axis = _input_axis(node)
            factor = scale[:, None] if axis == 0 else scale[None, :]
            node.replace_input_with(1, constant(prepared, (weight * factor).astype(np.float32), f"{node.name}.weight"))
        source = operand(products[0], 0)
        assert source is not None
        changed[source.name or ""] = (name, 1.0 / scale)
    common.RemoveUnusedNodesPass()(prepared.ir)
    context.notes.append(f"smoothquant: {len(changed)} tensors smoothed for the products that read them, alpha {alpha}")
    if not changed:
        return profile
    if context.calibrate is not None:
        return context.calibrate(prepared)
    return stretched(prepared, profile, changed)


SMOOTHQUANT = Tool("smoothquant", "before", smooth)


def smoothing_scale(stats: TensorStats, weights: Sequence[Floats], alpha: float) -> Floats | None:
    """s of each channel, of geometric mean 1; None where the channels do not fit those of the weights.

    `weights` has the largest magnitude of the weights that read each channel, for each product.
    """
    ranges = np.maximum(np.abs(stats.channel_min), np.abs(stats.channel_max)).astype(np.float64)
    largest = np.max(weights, axis=0)
    if ranges.shape != largest.shape or not ranges.max() > 0 or not largest.max() > 0:
        return None
    ranges = np.maximum(ranges, SMALLEST * ranges.max())
    largest = np.maximum(largest, SMALLEST * largest.max())
    scale = ranges**alpha / largest ** (1.0 - alpha)
    return scale / np.exp(np.log(scale).mean())


def _read_by_products(prepared: Model, assignment: Assignment) -> dict[ir.Value, list[ir.Node]]:
    """Activations that products of rows with constant weights read as integers, and these products."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in prepared.ir.graph:
        decision, source = assignment.of(node), operand(node, 0)
        if decision.role != "product" or decision.scheme is None or not decision.scheme.integer or source is None:
            continue
        weight = array(operand(node, 1)) if node.op_type in ("Gemm", "MatMul") else None
        if weight is not None and weight.ndim == 2 and not node.attributes.get_int("transA", 0):
            found.setdefault(source, []).append(node)
    return found


def _is_smoothable(value: ir.Value) -> bool:
    """Whether a multiplication can be folded into what computes the value, or fused with it."""
    front = value.producer()
    if front is None or front.domain:
        return False
    return front.op_type in NORMALIZATIONS or front.op_type in UNARY | BROADCASTING


def _rank(value: ir.Value) -> int:
    return 0 if value.shape is None else len(value.shape)


def _input_axis(node: ir.Node) -> int:
    return 1 if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) else 0


def _rows(node: ir.Node) -> Floats:
    """The largest weight that reads each input channel."""
    weight = array(operand(node, 1))
    assert weight is not None
    return np.abs(weight).max(axis=1 - _input_axis(node)).astype(np.float64)


def _divide(prepared: Model, value: ir.Value, products: Sequence[ir.Node], scale: Floats) -> None:
    """Let the products read value / scale."""
    front = value.producer()
    assert front is not None
    inverse = (1.0 / scale).astype(np.float32)
    held = [operand(front, index) for index in NORMALIZATIONS.get(front.op_type, ())]
    constants = [array(each) for each in held if each is not None]
    others = {use.node for use in value.uses()} - set(products)
    last = front.attributes.get_int("axis", -1) in (-1, _rank(value) - 1)
    alone = not others and not value.is_graph_output()
    if constants and last and alone and all(each is not None and each.shape == scale.shape for each in constants):
        for index in NORMALIZATIONS[front.op_type]:
            each = array(operand(front, index))
            if each is not None:
                scaled = (each / scale).astype(np.float32)
                front.replace_input_with(index, constant(prepared, scaled, f"{front.name}.smoothed"))
        return
    follow(prepared, front, "Mul", constant(prepared, inverse, f"{value.name}.smoothing"), products)
