"""Put LayerNormalization and RMSNormalization together from the means, squares and roots that exporters write."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nestc.graph.kinds import is_constant
from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import Rewrite, array, only_use, operand, producer, scalar


@dataclass(frozen=True)
class _Normalized:
    """x (or its deviation from the mean) over the root of a mean square: what both normalizations have in common."""

    x: ir.Value
    axis: int
    epsilon: float
    centred: bool


class FuseNormalization(Rewrite):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axes is LayerNormalization; without the mean
    it is RMSNormalization. Both for float32, whose computation ONNX then also prescribes (stash type 1)."""

    what = "layer and RMS normalizations recognised"

    def rewrite(self, node: ir.Node) -> bool:
        found = _normalized(node)
        if found is None or node.outputs[0].dtype != ir.DataType.FLOAT:
            return False
        shape = static_shape(found.x)
        if shape is None:
            return False
        last, result = node, node.outputs[0]
        scale, bias = None, None
        following = _next(result, "Mul")
        if following is not None:
            scale = _parameter(_other(following, result), shape[found.axis :])
            if scale is not None:
                last, result = following, following.outputs[0]
        following = _next(result, "Add") if found.centred and scale is not None else None
        if following is not None:
            bias = _parameter(_other(following, result), shape[found.axis :])
            if bias is not None:
                last, result = following, following.outputs[0]
        inputs = [found.x, self.parameter(scale, shape[found.axis :], f"{result.name}.scale", last)]
        if bias is not None:
            inputs.append(self.parameter(bias, shape[found.axis :], f"{result.name}.bias", last))
        op_type = "LayerNormalization" if found.centred else "RMSNormalization"
        attributes = {"axis": found.axis - len(shape), "epsilon": found.epsilon}
        self.replace(result, self.insert(last, op_type, inputs, attributes, like=result))
        return True

    def parameter(self, value: ir.Value | None, shape: tuple[int, ...], name: str, before: ir.Node) -> ir.Value:
        """The scale or bias in exactly the normalized shape; ones if there is no scale."""
        if value is None:
            return self.constant(np.ones(shape, np.float32), name)
        if static_shape(value) == shape:
            return value
        constant = array(value)
        if constant is not None:
            full = np.broadcast_to(constant.reshape(()), shape) if constant.size == 1 else constant.reshape(shape)
            return self.constant(np.ascontiguousarray(full), name)
        sizes = self.constant(np.array(shape, np.int64), f"{name}.shape")
        return self.insert(before, "Reshape", [value, sizes], like=value, shape=shape)


def _normalized(node: ir.Node) -> _Normalized | None:
    """Match Div(d, sqrt(m)), Mul(d, 1 / sqrt(m)) with m = ReduceMean(d * d) + epsilon."""
    if node.domain or node.op_type not in {"Div", "Mul"}:
        return None
    for place in (0, 1) if node.op_type == "Mul" else (0,):
        deviation, root = node.inputs[place], node.inputs[1 - place]
        if node.op_type == "Mul":
            root = _inverse(root)
        square_root = producer(root, "Sqrt")
        if square_root is None or deviation is None:
            continue
        found = _mean_square(square_root.inputs[0], deviation)
        if found is not None:
            return found
    return None


def _inverse(value: ir.Value | None) -> ir.Value | None:
    """The r of a value that is 1 / r."""
    node = producer(value, "Reciprocal", "Div")
    if node is None:
        return None
    if node.op_type == "Div":
        return node.inputs[1] if scalar(node.inputs[0]) == 1.0 else None
    return node.inputs[0]


def _mean_square(value: ir.Value | None, deviation: ir.Value) -> _Normalized | None:
    """Match ReduceMean(deviation ** 2) + epsilon over the last axes, and see whether deviation is x - ReduceMean(x)."""
    add = producer(value, "Add")
    if add is None:
        return None
    for place in (0, 1):
        epsilon, mean = scalar(add.inputs[1 - place]), producer(add.inputs[place], "ReduceMean")
        axes = None if mean is None else _last_axes(mean)
        if epsilon is None or mean is None or axes is None or not _is_square(mean.inputs[0], deviation):
            continue
        centre = producer(deviation, "Sub")
        average = None if centre is None else producer(centre.inputs[1], "ReduceMean")
        if centre is not None and average is not None and average.inputs[0] is centre.inputs[0]:
            x = centre.inputs[0]
            return None if x is None or _last_axes(average) != axes else _Normalized(x, axes, epsilon, True)
        return _Normalized(deviation, axes, epsilon, False)
    return None


def _is_square(value: ir.Value | None, of: ir.Value) -> bool:
    node = producer(value, "Mul", "Pow")
    if node is None or node.inputs[0] is not of:
        return False
    return node.inputs[1] is of if node.op_type == "Mul" else scalar(node.inputs[1]) == 2.0


def _last_axes(mean: ir.Node) -> int | None:
    """The first axis of a ReduceMean that keeps its dimensions and goes over all axes from there on."""
    shape = None if mean.inputs[0] is None else static_shape(mean.inputs[0])
    chosen = array(operand(mean, 1))
    if shape is None or chosen is None or not chosen.size or not mean.attributes.get_int("keepdims", 1):
        return None
    axes = sorted(int(axis) % len(shape) for axis in chosen.reshape(-1))
    return axes[0] if axes == list(range(axes[0], len(shape))) else None


def _next(value: ir.Value, op_type: str) -> ir.Node | None:
    """The only user of a value if it is a standard operator of that type."""
    if not only_use(value):
        return None
    node = next(iter(value.uses())).node
    return node if node.op_type == op_type and node.domain == "" else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _parameter(value: ir.Value | None, shape: tuple[int, ...]) -> ir.Value | None:
    """The value if it has the normalized shape, perhaps with axes of size 1 before it (or one element, if constant)."""
    known = None if value is None else static_shape(value)
    if known is None or value is None or value.dtype != ir.DataType.FLOAT:
        return None
    if is_constant(value) and int(np.prod(known)) == 1:
        return value
    extra = len(known) - len(shape)
    return value if extra >= 0 and known[extra:] == shape and all(size == 1 for size in known[:extra]) else None
