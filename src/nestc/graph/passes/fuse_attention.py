"""Put scaled dot-product attention together from its two matrix products and the softmax between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nestc.graph.kinds import is_constant
from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import Rewrite, ints, only_use, producer, scalar

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class _Scores:
    """softmax(query @ transposed_key * scale + mask): what stands before the second product."""

    query: ir.Value
    transposed_key: ir.Value
    key_source: ir.Value | None  # what the Transpose that makes K^T is to read, without a factor; None if none does
    scale: float
    mask: ir.Value | None


class FuseAttention(Rewrite):
    """MatMul(Softmax(MatMul(Q, K^T) * scale + mask), V) becomes the standard operator Attention.

    Scalar factors may stand on the scores, on Q or on K. The mask is added to the scaled scores, so it must be
    floating point and broadcast to them. Three axes (batch * heads, length, size) are taken as a batch of one.
    """

    what = "attentions recognised"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.masks: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
        return super().call(model)

    def rewrite(self, node: ir.Node) -> bool:
        if node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
            return False
        softmax = producer(node.inputs[0], "Softmax")
        value, shape = node.inputs[1], static_shape(node.outputs[0])
        if softmax is None or shape is None or not only_use(softmax.outputs[0]) or node.outputs[0].dtype not in _FLOATS:
            return False
        if softmax.attributes.get_int("axis", -1) not in (-1, len(shape) - 1):
            return False
        scores = _scores(softmax.inputs[0])
        if scores is None or len(shape) not in (3, 4):
            return False
        sizes = [static_shape(item) for item in (scores.query, scores.transposed_key, value)]
        if any(size is None or len(size) != len(shape) or size[:-2] != shape[:-2] for size in sizes):
            return False
        key = self.key(node, scores)
        inputs = [self.four(node, item) for item in (scores.query, key, value)]
        if scores.mask is not None:
            mask = self.mask(node, scores.mask, (static_shape(softmax.outputs[0]) or ()))
            if mask is None:
                return False
            inputs.append(mask)
        full = (1,) * (4 - len(shape)) + shape
        made = self.insert(node, "Attention", inputs, {"scale": scores.scale}, like=node.outputs[0], shape=full)
        self.replace(node.outputs[0], made if len(shape) == 4 else self.reshape(node, made, shape))
        return True

    def key(self, before: ir.Node, scores: _Scores) -> ir.Value:
        """K itself: the operand of the transpose that made K^T, or another transpose of it."""
        shape = list(static_shape(scores.transposed_key) or ())
        order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        swapped = [shape[axis] for axis in order]
        source, made = scores.key_source, producer(scores.transposed_key, "Transpose")
        if source is None or made is None:
            like = scores.transposed_key
            return self.insert(before, "Transpose", [like], {"perm": order}, like=like, shape=swapped)
        old = ints(made, "perm", range(len(shape))[::-1])
        both = [old[axis] for axis in order]
        if both == list(range(len(shape))):
            return source
        return self.insert(before, "Transpose", [source], {"perm": both}, like=source, shape=swapped)

    def four(self, before: ir.Node, value: ir.Value) -> ir.Value:
        """The value with four axes."""
        shape = static_shape(value) or ()
        return value if len(shape) == 4 else self.reshape(before, value, (1, *shape))

    def mask(self, before: ir.Node, mask: ir.Value, scores: tuple[int, ...]) -> ir.Value | None:
        """The mask with four axes, if it broadcasts to the scores and its last axis is whole.

        ONNX Runtime wants a row for each query too, so one row is repeated: once for all layers that share a mask.
        """
        shape = static_shape(mask)
        if shape is None or mask.dtype != before.outputs[0].dtype or len(shape) > len(scores):
            return None
        full = (1,) * (len(scores) - len(shape)) + shape
        if any(size not in (1, wanted) for size, wanted in zip(full, scores, strict=True)) or full[-1] != scores[-1]:
            return None
        full = (1,) * (4 - len(full)) + full
        rows = (*full[:2], scores[-2], full[3])
        if (mask, rows) not in self.masks:
            four = mask if shape == full else self.reshape(before, mask, full)
            if rows != full:
                sizes = self.constant(np.array(rows, np.int64), f"{mask.name}.rows")
                four = self.insert(before, "Expand", [four, sizes], like=mask, shape=rows)
            self.masks[mask, rows] = four
        return self.masks[mask, rows]

    def reshape(self, before: ir.Node, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        sizes = self.constant(np.array(shape, np.int64), f"{value.name}.shape")
        return self.insert(before, "Reshape", [value, sizes], like=value, shape=shape)


def _scores(value: ir.Value | None) -> _Scores | None:
    """Match (Q @ K^T) * scale + mask from its result backward."""
    mask: ir.Value | None = None
    add = producer(value, "Add")
    if add is not None and only_use(add.outputs[0]):
        sides = [_product(side) for side in add.inputs]
        index = next((i for i, side in enumerate(sides) if side is not None), None)
        if index is None:
            return None
        mask, found = add.inputs[1 - index], sides[index]
    else:
        found = _product(value)
    if found is None:
        return None
    product, scale = found
    query, query_scale = _unscaled(product.inputs[0])
    key, key_scale = _unscaled(product.inputs[1])
    before = producer(key, "Transpose")
    source, factor = (None, 1.0) if before is None else _unscaled(before.inputs[0])
    if before is not None and not only_use(before.outputs[0]):
        source, factor = before.inputs[0], 1.0
    key_scale *= factor
    total = scale * query_scale * key_scale
    if query is None or key is None or not math.isfinite(total) or total <= 0.0:
        return None
    return _Scores(query, key, source, total, mask)


def _product(value: ir.Value | None) -> tuple[ir.Node, float] | None:
    """The MatMul that makes the scores and the factor they are multiplied with."""
    inner, scale = _unscaled(value)
    product = producer(inner, "MatMul")
    return None if product is None or not only_use(product.outputs[0]) else (product, scale)


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """A value without a scalar factor that it was just multiplied with, and the factor."""
    node = producer(value, "Mul", "Div")
    if node is None or not only_use(node.outputs[0]):
        return value, 1.0
    factor = scalar(node.inputs[1])
    if factor is not None and not is_constant(node.inputs[0]):
        return node.inputs[0], factor if node.op_type == "Mul" else 1.0 / factor if factor else math.nan
    factor = scalar(node.inputs[0])
    return (node.inputs[1], factor) if factor is not None and node.op_type == "Mul" else (value, 1.0)
