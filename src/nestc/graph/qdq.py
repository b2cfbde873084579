"""What a QuantizeLinear or DequantizeLinear with constant parameters does, as data and in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nestc.graph.kinds import is_constant


@dataclass(frozen=True, eq=False)
class Quantization:
    """real = (integer - zero_point) * scale, between float32 and an integer type.

    `scale` (float32) and `zero_point` (int64) have the shape () for a whole tensor, (n,) along `axis`, or the shape of
    the tensor with `axis` divided by `block` (`block` is 0 unless the parameters go with blocks).
    """

    dtype: ir.DataType
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None
    block: int = 0

    @property
    def whole(self) -> bool:
        """Whether one scale and zero point hold for all elements."""
        return self.axis is None

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        return integer_limits(self.dtype)

    def same(self, other: Quantization | None) -> bool:
        """Whether both take every element by the same map."""
        return (
            other is not None
            and (self.dtype, self.axis, self.block) == (other.dtype, other.axis, other.block)
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )

    def quantize(self, real: np.ndarray) -> np.ndarray:
        """Integers of the elements as QuantizeLinear defines them: divide, round half to even, shift, saturate."""
        scale, zero_point = (self.spread(item, real.shape) for item in (self.scale, self.zero_point))
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            whole = np.rint(real.astype(np.float32, copy=False) / scale).astype(np.float64) + zero_point
        return np.clip(whole, *self.limits).astype(self.dtype.numpy())

    def dequantize(self, integers: np.ndarray) -> np.ndarray:
        """Float32 numbers that the integers stand for."""
        scale, zero_point = (self.spread(item, integers.shape) for item in (self.scale, self.zero_point))
        return (integers.astype(np.int64) - zero_point).astype(np.float32) * scale

    def spread(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Scales or zero points in a form that broadcasts over a tensor of `shape`."""
        if self.axis is None:
            return values
        if self.block:
            return np.repeat(values, self.block, axis=self.axis).take(range(shape[self.axis]), axis=self.axis)
        return values.reshape([-1 if axis == self.axis else 1 for axis in range(len(shape))])


def integer_limits(dtype: ir.DataType) -> tuple[int, int]:
    """The smallest and the largest number of an integer type."""
    bits = dtype.bitwidth
    return (0, 2**bits - 1) if dtype.name.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def quantization(node: ir.Node | None) -> Quantization | None:
    """The parameters of a QuantizeLinear or DequantizeLinear between float32 and integers, if they are constants."""
    if node is None or node.domain or node.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
        return None
    data, result, scale = node.inputs[0], node.outputs[0], node.inputs[1]
    shift = node.inputs[2] if len(node.inputs) > 2 else None
    if data is None or scale is None or not is_constant(scale) or scale.const_value is None:
        return None
    real, whole = (data, result) if node.op_type == "QuantizeLinear" else (result, data)
    floats = (real.dtype, scale.dtype) == (ir.DataType.FLOAT, ir.DataType.FLOAT)
    if not floats or whole.dtype is None or not whole.dtype.is_integer() or node.attributes.get_int("precision", 0) > 1:
        return None
    scales = scale.const_value.numpy()
    zero_points = np.zeros(scales.shape, np.int64)
    if shift is not None:
        if not is_constant(shift) or shift.const_value is None:
            return None
        zero_points = shift.const_value.numpy().astype(np.int64)
    block = node.attributes.get_int("block_size", 0) or 0
    if not block and scales.size == 1:
        return Quantization(whole.dtype, scales.reshape(()), zero_points.reshape(()))
    if data.shape is None or not len(data.shape) or zero_points.shape != scales.shape:
        return None
    axis = (node.attributes.get_int("axis", 1) or 0) % len(data.shape)
    return Quantization(whole.dtype, scales, zero_points, axis, block)


def dequantized(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that computes a value."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" and not node.domain else None
