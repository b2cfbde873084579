"""Say ONNX Runtime's own operators for quantized models (domain com.microsoft) in standard ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from nestc.errors import UnsupportedOp
from nestc.graph.passes.rewrite import AttributeInput, Rewrite, array, operand

DOMAIN = "com.microsoft"
_UNARY = {
    "QLinearAveragePool": "AveragePool",
    "QLinearGlobalAveragePool": "GlobalAveragePool",
    "QLinearLeakyRelu": "LeakyRelu",
    "QLinearReduceMean": "ReduceMean",
    "QLinearSigmoid": "Sigmoid",
    "QLinearSoftmax": "Softmax",
}
_BINARY = {"QLinearAdd": "Add", "QLinearMul": "Mul"}
_PRODUCTS = frozenset({"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "QGemm"})
OPERATORS = frozenset({*_UNARY, *_BINARY, *_PRODUCTS, "DequantizeLinear", "QLinearConcat", "QuantizeLinear"})
"""Operators of the domain that `StandardOperators` replaces."""

_BYTES = (ir.DataType.UINT8, ir.DataType.INT8)
_ATTRIBUTES = frozenset(
    """alpha auto_pad axis block_size ceil_mode count_include_pad kernel_shape keepdims pads strides""".split()
)
"""Attributes that mean the same in the standard operator."""


class StandardOperators(Rewrite):
    """QLinearAdd and the like become DequantizeLinear, the float operator, QuantizeLinear; MatMulNBits becomes MatMul
    with a blockwise DequantizeLinear; MatMulIntegerToFloat and DynamicQuantizeMatMul become MatMulInteger and scaling.

    The operators are those of ONNX Runtime's ContribOperators.md. What the model's operator set cannot say yet
    (scales a channel before 13, 16 and 4 bits before 21) stays for another run after the conversion to a newer set.
    Raises `UnsupportedOp` where an operator is used in a way that standard ones cannot say.
    """

    what = "operators of com.microsoft written as standard ones"
    domain = DOMAIN

    def rewrite(self, node: ir.Node) -> bool:
        if node.op_type not in OPERATORS or not self.sayable(node):
            return False
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            return self.rename(node)
        if node.op_type in _UNARY:
            return self.unary(node)
        if node.op_type in _BINARY:
            data = [self.real(node, *_three(node, first)) for first in (0, 3)]
            return self.finish(node, _BINARY[node.op_type], data, *_two(node, 6))
        if node.op_type == "QLinearConcat":
            data = [self.real(node, *_three(node, first)) for first in range(2, len(node.inputs), 3)]
            return self.finish(node, "Concat", data, *_two(node, 0))
        if node.op_type == "QGemm":
            return self.gemm(node)
        if node.op_type == "MatMulNBits":
            return self.narrow_weights(node)
        return self.dynamic(node)

    def sayable(self, node: ir.Node) -> bool:
        """Whether the standard operators of the model's operator set can take the types and scales of the node."""
        version = self.graph.opset_imports.get("", 1)
        if version >= 21:
            return True
        integers = [value.dtype for value in node.inputs if value is not None and value.dtype is not None]
        narrow = all(dtype in _BYTES for dtype in integers if dtype.is_integer() and dtype != ir.DataType.INT32)
        if node.op_type == "MatMulNBits" or not narrow or version < 10:
            return False
        return version >= 13 or node.op_type in _BINARY or node.op_type in {"QLinearSigmoid", "QLinearConcat"}

    def rename(self, node: ir.Node) -> bool:
        scale = node.inputs[1]
        kept = {} if scale is not None and scale.shape is not None and len(scale.shape) == 0 else _kept(node)
        dtype = self.integer_type(node, operand(node, 2)) if node.op_type == "QuantizeLinear" else _float_type(scale)
        made = self.insert(node, node.op_type, list(node.inputs), kept, like=node.outputs[0], dtype=dtype)
        self.replace(node.outputs[0], made)
        return True

    def unary(self, node: ir.Node) -> bool:
        data = self.real(node, *_three(node, 0))
        scale, zero_point = _two(node, 3)
        if node.op_type == "QLinearReduceMean" and "axes" in node.attributes:
            raise self.refuse(node, "its axes are an attribute")
        if node.op_type == "QLinearSoftmax" and node.attributes.get_int("opset", 13) < 13 and not _over_last(node):
            raise self.refuse(node, "it is the Softmax of an operator set before 13, over several axes")
        if not node.attributes.get_int("channels_last", 0):
            return self.finish(node, _UNARY[node.op_type], [data], scale, zero_point)
        rank = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else 0
        if rank < 3:
            raise self.refuse(node, "its channels come last and the rank of its operand is not known")
        there, back = (0, rank - 1, *range(1, rank - 1)), (0, *range(2, rank), 1)
        turned = self.insert(node, "Transpose", [data], {"perm": there}, like=data)
        turned.shape = None
        value = self.insert(node, _UNARY[node.op_type], [turned], _kept(node), like=turned)
        return self.quantize(
            node, self.insert(node, "Transpose", [value], {"perm": back}, like=turned), scale, zero_point
        )

    def gemm(self, node: ir.Node) -> bool:
        first = self.real(node, *_three(node, 0))
        across = 0 if node.attributes.get_int("transB", 0) else 1
        inputs = [first, self.real(node, *_three(node, 3), axis=across)]
        bias, a_scale, b_scale = operand(node, 6), node.inputs[1], node.inputs[4]
        alpha = node.attributes.get_float("alpha", 1.0) or 1.0
        if bias is not None:
            scales, shares = array(a_scale), array(b_scale)
            if scales is None or shares is None:
                raise self.refuse(node, "its scales are computed")
            product = np.multiply(scales.reshape(()) * np.float32(alpha), shares).astype(np.float32)
            scale = self.constant(product, f"{node.outputs[0].name}.bias_scale")
            inputs.append(self.real(node, bias, scale, None, axis=0))
        kept = {name: node.attributes.get_int(name, 0) or 0 for name in ("transA", "transB")}
        made = self.insert(
            node, "Gemm", inputs, {**kept, "alpha": float(alpha)}, like=node.outputs[0], dtype=_float_type(a_scale)
        )
        made.producer().name = node.name  # pyright: ignore[reportOptionalMemberAccess]
        scale, zero_point = _two(node, 7)
        if scale is not None:
            return self.quantize(node, made, scale, zero_point)
        self.replace(node.outputs[0], made)
        return True

    def dynamic(self, node: ir.Node) -> bool:
        """Products of integers whose result is scaled: (a - za) @ (b - zb) * (scale_a * scale_b) + bias."""
        data, weight = node.inputs[0], node.inputs[1]
        if node.op_type == "DynamicQuantizeMatMul":
            weight_scale, weight_zero, bias = (operand(node, index) for index in (2, 3, 4))
            data, scale, zero_point = self.quantized_now(node, data)
        else:
            scale, weight_scale, zero_point, weight_zero, bias = (operand(node, index) for index in range(2, 7))
        result = node.outputs[0]
        factors = [data, weight, zero_point, weight_zero]
        while factors[-1] is None:
            factors.pop()
        kind = scale.dtype if scale is not None and scale.dtype is not None else ir.DataType.FLOAT
        product = self.insert(node, "MatMulInteger", factors, like=result, dtype=ir.DataType.INT32)
        product.producer().name = node.name  # pyright: ignore[reportOptionalMemberAccess]
        wide = self.insert(node, "Cast", [product], {"to": int(kind)}, like=result, dtype=kind)
        both = self.insert(node, "Mul", [scale, weight_scale], like=result, dtype=kind)
        both.shape = None
        made = self.insert(node, "Mul", [wide, both], like=result, dtype=kind)
        if bias is not None:
            made = self.insert(node, "Add", [made, bias], like=result, dtype=kind)
        self.replace(result, made)
        return True

    def quantized_now(self, node: ir.Node, data: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Integers, scale and zero point that DynamicQuantizeLinear gives."""
        types = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
        names = [self.fresh(f"{node.outputs[0].name}.{label}") for label in ("x", "x_scale", "x_zero_point")]
        outputs = [ir.Value(name=name, type=ir.TensorType(kind)) for name, kind in zip(names, types, strict=True)]
        version = self.graph.opset_imports.get("")
        made = ir.node("DynamicQuantizeLinear", [data], outputs=outputs, name=names[0], version=version)
        self.graph.insert_before(node, made)
        return outputs[0], outputs[1], outputs[2]

    def narrow_weights(self, node: ir.Node) -> bool:
        """MatMulNBits: weights (n, blocks, bytes of a block), the lower bits of a byte first; scales (n, blocks)."""
        depth, count, bits, size = (node.attributes.get_int(name, 0) or 0 for name in ("K", "N", "bits", "block_size"))
        bits = bits or 4
        packed, scales, shifts = array(node.inputs[1]), array(node.inputs[2]), array(operand(node, 3))
        scale_type = None if node.inputs[2] is None else node.inputs[2].dtype
        if packed is None or scales is None or (operand(node, 3) is not None and shifts is None):
            raise self.refuse(node, "its weights are not constants")
        if operand(node, 4) is not None or bits not in (4, 8) or (shifts is not None and shifts.dtype != np.uint8):
            raise self.refuse(node, f"only integers of 4 or 8 bits without a group index are known, not {bits} bits")
        blocks, name = -(-depth // size), node.inputs[1].name if node.inputs[1] is not None else ""
        integers = _unpacked(packed.reshape(count, -1), bits)[:, :depth].T
        middle = 1 << (bits - 1)
        inputs: list[ir.Value | None] = [
            None,
            self.constant(scales.reshape(count, blocks).T, f"{name}.scale", scale_type),
        ]
        if shifts is None:
            dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
            integers = integers.astype(np.int16) - middle
        else:
            dtype = ir.DataType.UINT4 if bits == 4 else ir.DataType.UINT8
            zero_points = _unpacked(shifts.reshape(count, -1), bits)[:, :blocks].T
            inputs.append(self.constant(np.ascontiguousarray(zero_points).astype(dtype.numpy()), f"{name}.zero", dtype))
        inputs[0] = self.constant(np.ascontiguousarray(integers).astype(dtype.numpy()), f"{name}.narrow", dtype)
        attributes = {"axis": 0, "block_size": size}
        result = node.outputs[0]
        weight = self.insert(
            node, "DequantizeLinear", inputs, attributes, like=result, shape=(depth, count), dtype=scale_type
        )
        made = self.insert(node, "MatMul", [node.inputs[0], weight], like=result, dtype=scale_type)
        made.producer().name = node.name  # pyright: ignore[reportOptionalMemberAccess]
        bias = operand(node, 5)
        if bias is not None:
            made = self.insert(node, "Add", [made, bias], like=result, dtype=scale_type)
        self.replace(result, made)
        return True

    def real(
        self,
        node: ir.Node,
        data: ir.Value | None,
        scale: ir.Value | None,
        zero_point: ir.Value | None,
        axis: int | None = None,
    ) -> ir.Value:
        """The float tensor that `data` stands for; scales go along `axis` if there are several."""
        given = [data, scale] if zero_point is None else [data, scale, zero_point]
        many = axis is not None and scale is not None and scale.shape is not None and len(scale.shape) == 1
        label = None if data is None else data.name
        like = node.outputs[0] if data is None else data
        return self.insert(
            node,
            "DequantizeLinear",
            given,
            {"axis": axis} if many and axis is not None else None,
            like=like,
            dtype=_float_type(scale),
            name=f"{label}.real",
        )

    def finish(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        scale: ir.Value | None,
        zero_point: ir.Value | None,
    ) -> bool:
        """The float operator, and its result quantized, in place of `node`."""
        kept = _kept(node)
        result = self.insert(node, op_type, inputs, kept, like=node.outputs[0], dtype=_float_type(scale))
        result.producer().name = node.name  # pyright: ignore[reportOptionalMemberAccess]
        return self.quantize(node, result, scale, zero_point)

    def quantize(self, node: ir.Node, value: ir.Value, scale: ir.Value | None, zero_point: ir.Value | None) -> bool:
        """`value` quantized, in place of the result of `node`."""
        dtype = self.integer_type(node, zero_point)
        if zero_point is None:
            shape = () if scale is None or scale.shape is None else tuple(scale.shape.numpy())
            zero_point = self.constant(np.zeros(shape, dtype.numpy()), f"{node.outputs[0].name}.zero_point", dtype)
        made = self.insert(node, "QuantizeLinear", [value, scale, zero_point], like=node.outputs[0], dtype=dtype)
        self.replace(node.outputs[0], made)
        return True

    def integer_type(self, node: ir.Node, zero_point: ir.Value | None) -> ir.DataType:
        """The type of the integers that `node` gives: that of its zero point, else that of its operands, else uint8."""
        if zero_point is not None and zero_point.dtype is not None:
            return zero_point.dtype
        known = [
            value.dtype for value in (*node.outputs, *node.inputs) if value is not None and value.dtype is not None
        ]
        return next((dtype for dtype in known if dtype.is_integer() and dtype != ir.DataType.INT32), ir.DataType.UINT8)

    def refuse(self, node: ir.Node, why: str) -> UnsupportedOp:
        return UnsupportedOp(f"node {node.name!r}: {DOMAIN}::{node.op_type} is not supported as it is used here: {why}")


def _three(node: ir.Node, first: int) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
    return operand(node, first), operand(node, first + 1), operand(node, first + 2)


def _two(node: ir.Node, first: int) -> tuple[ir.Value | None, ir.Value | None]:
    return operand(node, first), operand(node, first + 1)


def _float_type(scale: ir.Value | None) -> ir.DataType:
    return ir.DataType.FLOAT if scale is None or scale.dtype is None else scale.dtype


def _over_last(node: ir.Node) -> bool:
    """Whether a softmax goes over the last axis only."""
    axis = node.attributes.get_int("axis", -1)
    data = node.inputs[0]
    rank = None if data is None or data.shape is None else len(data.shape)
    return axis == -1 or (rank is not None and axis == rank - 1)


def _kept(node: ir.Node) -> dict[str, AttributeInput]:
    """The attributes that the standard operator has too."""
    return {
        name: attribute.value  # pyright: ignore[reportReturnType]
        for name, attribute in node.attributes.items()
        if name in _ATTRIBUTES and (name != "block_size" or attribute.as_int())
    }


def _unpacked(data: np.ndarray, bits: int) -> np.ndarray:
    """The integers in rows of bytes."""
    if bits == 8:
        return data
    return np.stack([data & 15, data >> 4], axis=-1).reshape(data.shape[0], -1)
