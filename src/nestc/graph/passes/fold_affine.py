"""Fold batch normalization, and multiplying or adding a constant a channel, into the convolution or Gemm beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nestc.graph.kinds import is_constant
from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import Rewrite, array, ints, only_use, operand, producer

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_EXACT_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Affine:
    """y = x * scale + shift with one scale and shift a channel (axis 1), in float64."""

    scale: np.ndarray
    shift: np.ndarray


class FoldAffine(Rewrite):
    """Conv, ConvTranspose or Gemm followed by an affine map a channel becomes one with other weights and bias.

    The map is a BatchNormalization in inference mode, or Mul, Div, Add or Sub with a constant. One that stands before
    an unpadded Conv is folded forward.
    """

    what = "normalizations and biases folded into weights"

    def rewrite(self, node: ir.Node) -> bool:
        return self.backward(node) or self.forward(node)

    def backward(self, node: ir.Node) -> bool:
        """Fold `node` into the operator before it."""
        for index in range(2 if node.op_type in {"Add", "Mul"} else 1):
            value = operand(node, index)
            before = producer(value, "Conv", "ConvTranspose", "Gemm")
            if before is None or value is None or not only_use(value):
                continue
            channels = channels_of(before.outputs[0])
            affine = None if channels is None else affine_of(node, index, channels)
            if affine is not None and self.absorb(before, affine, node.outputs[0]):
                return True
        return False

    def absorb(self, before: ir.Node, affine: Affine, result: ir.Value) -> bool:
        """Give `before` weights and bias that include `affine`, and let it stand for `result`."""
        weight = before.inputs[1]
        bias_value = operand(before, 2)
        bias = array(bias_value)
        if weight is None or not is_constant(weight) or weight.dtype is None or weight.const_value is None:
            return False
        if (bias_value is not None and bias is None) or result.dtype not in _FLOATS:
            return False
        tensor = weight.const_value
        old_bias = np.zeros(affine.scale.shape) if bias is None else np.asarray(bias, np.float64)
        if before.op_type == "Gemm":
            old_bias = old_bias * before.attributes.get_float("beta", 1.0)
            if old_bias.ndim > 2 or (old_bias.ndim == 2 and old_bias.shape[0] != 1):
                return False
            old_bias = np.broadcast_to(old_bias.reshape(-1), affine.scale.shape)
        name = result.name or before.op_type
        inputs = [before.inputs[0], before.inputs[1]]
        if not np.all(affine.scale == 1.0):
            factor = _over_outputs(before, static_shape(weight) or (), affine.scale)
            inputs[1] = self.lazy(lambda: _scaled(tensor, factor), weight, f"{name}.weight")
        shifted = old_bias * affine.scale + affine.shift
        inputs.append(self.constant(shifted.astype(weight.dtype.numpy()), f"{name}.bias", weight.dtype))
        attributes = {key: value for key, value in before.attributes.items() if key != "beta"}
        output = self.insert(before, before.op_type, inputs, like=result, name=f"{name}.folded")
        made = output.producer()
        assert made is not None
        made.attributes.update(attributes)
        made.name = before.name
        self.replace(result, output)
        return True

    def forward(self, node: ir.Node) -> bool:
        """Fold an affine map into the Conv after it; a shift may only go in where no zero padding meets it."""
        if node.op_type not in {"BatchNormalization", "Mul", "Add", "Sub"} or not only_use(node.outputs[0]):
            return False
        after = next(iter(node.outputs[0].uses())).node
        channels = channels_of(node.outputs[0])
        if after.op_type != "Conv" or after.domain or after.inputs[0] is not node.outputs[0] or channels is None:
            return False
        weight, bias_value = array(after.inputs[1]), operand(after, 2)
        bias = array(bias_value)
        index = next((i for i, value in enumerate(node.inputs[:2]) if array(value) is None), 0)
        affine = affine_of(node, index, channels)
        if affine is None or weight is None or (bias_value is not None and bias is None):
            return False
        automatic = after.attributes.get_string("auto_pad", "NOTSET") not in {"NOTSET", "VALID"}
        if (automatic or any(ints(after, "pads"))) and np.any(affine.shift):
            return False
        if node.outputs[0].dtype not in _FLOATS or not np.isfinite(affine.scale).all():
            return False
        groups = after.attributes.get_int("group", 1)
        repeats = weight.shape[0] // groups  # each group's input channels, once for each of its outputs
        wide = np.asarray(weight, np.float64)
        spatial = (1,) * (weight.ndim - 2)
        scaled = wide * np.repeat(affine.scale.reshape(groups, -1), repeats, axis=0).reshape(weight.shape[:2] + spatial)
        shift = np.repeat(affine.shift.reshape(groups, -1), repeats, axis=0)
        added = (wide.reshape(weight.shape[0], weight.shape[1], -1).sum(2) * shift).sum(1)
        total = added if bias is None else added + np.asarray(bias, np.float64)
        name, dtype = after.outputs[0].name, node.outputs[0].dtype
        after.replace_input_with(0, node.inputs[index])
        after.replace_input_with(1, self.constant(scaled.astype(weight.dtype), f"{name}.weight", dtype))
        after.resize_inputs(3)
        after.replace_input_with(2, self.constant(total.astype(weight.dtype), f"{name}.bias", dtype))
        return True


class LowerBatchNormalization(Rewrite):
    """Write a batch normalization that could not be folded as x * scale + shift, which fuses with more."""

    what = "batch normalizations written as Mul and Add"

    def rewrite(self, node: ir.Node) -> bool:
        if node.op_type != "BatchNormalization":
            return False
        if node.attributes.get_int("training_mode", 0):
            return self.training(node)
        shape, dtype = node.outputs[0].shape, node.outputs[0].dtype
        channels = channels_of(node.outputs[0])
        affine = None if channels is None else affine_of(node, 0, channels)
        data = node.inputs[0]
        # Not in half precision, where the rounded scale and shift would differ from what the operator computes.
        if affine is None or shape is None or data is None or dtype is None or dtype not in _EXACT_FLOATS:
            return False
        column = (-1,) + (1,) * (len(shape) - 2)
        name = node.outputs[0].name
        element = dtype.numpy()
        scale = self.constant(affine.scale.astype(element).reshape(column), f"{name}.scale", dtype)
        shift = self.constant(affine.shift.astype(element).reshape(column), f"{name}.shift", dtype)
        product = self.insert(node, "Mul", [data, scale], like=node.outputs[0])
        self.replace(node.outputs[0], self.insert(node, "Add", [product, shift], like=node.outputs[0]))
        return True

    def training(self, node: ir.Node) -> bool:
        """Normalize by the batch's own mean and variance, and move the running ones towards them, as ONNX defines."""
        data, scale, bias, mean, variance = node.inputs[:5]
        shape, dtype = None if data is None else static_shape(data), node.outputs[0].dtype
        if data is None or scale is None or shape is None or len(shape) < 2:
            return False
        if dtype is None or dtype not in _EXACT_FLOATS:
            return False
        if any(value is None or value.dtype != dtype for value in (scale, bias, mean, variance)):
            return False
        result, name, channels = node.outputs[0], node.outputs[0].name, (shape[1],)
        element = dtype.numpy()
        axes = self.constant(np.array([axis for axis in range(len(shape)) if axis != 1], np.int64), f"{name}.axes")
        column = self.constant(np.array([-1] + [1] * (len(shape) - 2), np.int64), f"{name}.column")
        epsilon = self.constant(np.array(node.attributes.get_float("epsilon", 1e-5), element), f"{name}.epsilon", dtype)
        kept = node.attributes.get_float("momentum", 0.9)

        def made(op: str, *inputs: ir.Value | None, like: ir.Value = scale) -> ir.Value:
            return self.insert(node, op, list(inputs), {"keepdims": 0} if op == "ReduceMean" else None, like=like)

        def wide(value: ir.Value | None) -> ir.Value:
            return self.insert(node, "Reshape", [value, column], like=result, shape=channels + (1,) * (len(shape) - 2))

        average = made("ReduceMean", data, axes)
        centred = made("Sub", data, wide(average), like=result)
        spread = made("ReduceMean", made("Mul", centred, centred, like=result), axes)
        factor = made("Div", scale, made("Sqrt", made("Add", spread, epsilon)))
        scaled = made("Mul", centred, wide(factor), like=result)
        self.replace(result, made("Add", scaled, wide(bias), like=result))
        for old, running, new in zip(node.outputs[1:], (mean, variance), (average, spread), strict=False):
            weights = (("kept", kept), ("new", 1 - kept))
            share = [self.constant(np.array(part, element), f"{name}.{label}", dtype) for label, part in weights]
            moved = made("Add", made("Mul", running, share[0]), made("Mul", new, share[1]))
            if old.uses() or old.is_graph_output():
                self.replace(old, moved)
        return True


def _scaled(weight: ir.TensorProtocol, factor: np.ndarray) -> np.ndarray:
    """The weights times a factor; in float32 unless they are float64, which costs one more rounding (6e-8)."""
    values = weight.numpy()
    wide = np.float64 if values.dtype == np.float64 else np.float32
    return np.multiply(values, factor.astype(wide), dtype=wide).astype(values.dtype, copy=False)


def affine_of(node: ir.Node, index: int, channels: int) -> Affine | None:
    """What `node` does to its operand `index` of `channels` channels, if that is an affine map a channel."""
    if node.op_type == "BatchNormalization":
        return _batch_normalization(node) if index == 0 else None
    if node.op_type not in {"Add", "Sub", "Mul", "Div"}:
        return None
    value, other = node.inputs[index], node.inputs[1 - index]
    constant = _per_channel(other, value, channels)
    if constant is None or (index == 1 and node.op_type in {"Sub", "Div"}):
        return None
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op_type == "Add":
        return Affine(one, constant)
    if node.op_type == "Sub":
        return Affine(one, -constant)
    if node.op_type == "Div" and not np.all(constant):
        return None
    return Affine(constant if node.op_type == "Mul" else 1.0 / constant, zero)


def _batch_normalization(node: ir.Node) -> Affine | None:
    """y = (x - mean) / sqrt(variance + epsilon) * gamma + beta, as in the ONNX standard, for constant parameters."""
    gamma, beta, mean, variance = (array(operand(node, index)) for index in range(1, 5))
    outputs = [value for value in node.outputs[1:] if value.uses() or value.is_graph_output()]
    if gamma is None or beta is None or mean is None or variance is None or outputs:
        return None
    if node.attributes.get_int("training_mode", 0):
        return None
    wide = [np.asarray(item, np.float64) for item in (gamma, beta, mean, variance)]
    scale = wide[0] / np.sqrt(wide[3] + node.attributes.get_float("epsilon", 1e-5))
    return Affine(scale, wide[1] - wide[2] * scale) if np.isfinite(scale).all() else None


def _per_channel(value: ir.Value | None, data: ir.Value | None, channels: int) -> np.ndarray | None:
    """A constant as one float64 number a channel if it broadcasts along every axis but axis 1 of `data`."""
    constant = array(value)
    shape = None if data is None else data.shape
    if constant is None or shape is None or constant.ndim > len(shape) or value is None or value.dtype not in _FLOATS:
        return None
    full = (1,) * (len(shape) - constant.ndim) + constant.shape
    if any(size != 1 for axis, size in enumerate(full) if axis != 1):
        return None
    if full[1] not in (1, channels):
        return None
    return np.broadcast_to(np.asarray(constant, np.float64).reshape(-1), (channels,))


def channels_of(value: ir.Value) -> int | None:
    """Size of axis 1 of a value of rank 2 or more, if it is known; the other sizes may be open."""
    size = value.shape[1] if value.shape is not None and len(value.shape) > 1 else None
    return size if isinstance(size, int) else None


def _over_outputs(node: ir.Node, shape: tuple[int, ...], scale: np.ndarray) -> np.ndarray:
    """`scale` (one number an output channel) in a shape that broadcasts over the weights."""
    if node.op_type == "Conv":
        return scale.reshape((-1,) + (1,) * (len(shape) - 1))
    if node.op_type == "Gemm":
        return scale[:, None] if node.attributes.get_int("transB", 0) else scale[None, :]
    groups = node.attributes.get_int("group", 1)
    rows = np.repeat(scale.reshape(groups, -1), shape[0] // groups, axis=0)  # ConvTranspose: (in, out / groups, ...)
    return rows.reshape(shape[:2] + (1,) * (len(shape) - 2))
