"""Let operators that only move or order elements run on integers, above DequantizeLinear and below QuantizeLinear."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from nestc.graph.kinds import is_constant, is_view
from nestc.graph.model import static_shape
from nestc.graph.passes.cancel import bounds
from nestc.graph.passes.rewrite import Rewrite, array, ints, operand, scalar, used
from nestc.graph.qdq import Quantization, dequantized, quantization

_MOVES = frozenset(
    """DepthToSpace Dropout Expand Flatten Gather GatherElements GatherND Identity MaxPool Pad ReduceMax ReduceMin
    Reshape Resize Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze""".split()
)
"""Every result is one of the elements of operand 0; the other operands say which."""

_OF_ALL = frozenset({"Concat", "Max", "Min"})
"""Every result is one of the elements of the operands."""


class IntegerMoves(Rewrite):
    """DequantizeLinear sinks below, and QuantizeLinear rises above, an operator that moves or orders elements.

    Where they meet with equal parameters both go, and so do Relu and Clip between them, which become Clip on integers.
    All of it is exact, because quantizing never changes the order of two numbers. A QuantizeLinear rises only past a
    value that nobody else uses, or one that is dequantized from another quantized tensor.
    """

    what = "operators moved to integers"

    def rewrite(self, node: ir.Node) -> bool:
        if node.op_type in _MOVES:
            return self.sink(node)
        if node.op_type in _OF_ALL:
            return self.sink_all(node)
        if node.op_type in {"ArgMax", "ArgMin"}:
            return self.order(node)
        if node.op_type == "QuantizeLinear":
            return self.meet(node) or self.clamp(node) or self.rise(node)
        return False

    def sink(self, node: ir.Node) -> bool:
        """op(DequantizeLinear(x)) as DequantizeLinear(op(x))."""
        source = dequantized(node.inputs[0])
        parameters = quantization(source)
        if source is None or parameters is None or not _moves(node) or not _takes(node, parameters.dtype):
            return False
        if not parameters.whole:
            return self.sink_along(node, source, parameters)
        if node.op_type == "Pad" and not _exact_padding(node, parameters):
            return False
        integers = self.moved(node, [source.inputs[0]], parameters)
        for old, new in zip(node.outputs, integers, strict=True):
            self.replace(old, self.like_dequantize(node, source, new, old))
        self.drop(node)
        return True

    def sink_all(self, node: ir.Node) -> bool:
        """The same for operators of several tensors, all dequantized by the same parameters."""
        sources = [dequantized(value) for value in node.inputs]
        first = quantization(sources[0])
        if first is None or not first.whole or not _takes(node, first.dtype):
            return False
        if not all(first.same(quantization(source)) for source in sources):
            return False
        taken = [source.inputs[0] for source in sources if source is not None]
        assert sources[0] is not None  # it has parameters
        integers = self.moved(node, taken, first)
        self.replace(node.outputs[0], self.like_dequantize(node, sources[0], integers[0], node.outputs[0]))
        self.drop(node)
        return True

    def sink_along(self, node: ir.Node, source: ir.Node, parameters: Quantization) -> bool:
        """A Transpose or view of a tensor with a scale a channel or block, if the scales can follow."""
        data, shape, axis = source.inputs[0], static_shape(node.outputs[0]), parameters.axis
        before = None if data is None else static_shape(data)
        if data is None or shape is None or before is None or axis is None or not _followable(node):
            return False
        follow: list[ir.Value | None] = list(source.inputs[1:])
        if node.op_type == "Transpose":
            order = ints(node, "perm", range(len(shape))[::-1])
            place = order.index(axis)
            if parameters.block:
                follow = [None if value is None else self.turned(value, order) for value in follow]
        elif parameters.block or (place := _same_place(before, shape, axis)) is None:
            return False
        integers = self.moved(node, [data], parameters)
        result = self.like_dequantize(node, source, integers[0], node.outputs[0], follow)
        made = result.producer()
        assert made is not None
        made.attributes["axis"] = ir.AttrInt64("axis", place)
        self.replace(node.outputs[0], result)
        self.drop(node)
        return True

    def turned(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        constant = array(value)
        assert constant is not None  # `quantization` asks for constants
        return self.constant(np.ascontiguousarray(constant.transpose(order)), f"{value.name}.moved", value.dtype)

    def moved(self, node: ir.Node, data: Sequence[ir.Value | None], parameters: Quantization) -> list[ir.Value]:
        """The results of `node` on these integers in place of its first operands."""
        inputs = [*data, *node.inputs[len(data) :]]
        if node.op_type == "Pad" and _padding(node) is not None:
            integer = parameters.quantize(np.array(_padding(node), np.float32))
            inputs += [None] * (3 - len(inputs))
            inputs[2] = self.constant(integer, f"{node.outputs[0].name}.pad", parameters.dtype)
        folded = self.folded(node, data[0], parameters.dtype)
        if folded is not None:
            return [folded]
        outputs = [
            ir.Value(
                name=self.fresh(f"{old.name}.integer"),
                type=ir.TensorType(parameters.dtype),
                shape=old.shape,
            )
            for old in node.outputs
        ]
        version = self.graph.opset_imports.get("")
        attributes = list(node.attributes.values())
        made = ir.Node("", node.op_type, inputs, attributes, outputs=outputs, name=outputs[0].name, version=version)
        self.graph.insert_before(node, made)
        return outputs

    def folded(self, node: ir.Node, data: ir.Value | None, dtype: ir.DataType) -> ir.Value | None:
        """A Transpose or view of a weight, done now, since whether it is a weight decides what comes after."""
        shape = static_shape(node.outputs[0])
        tensor = data.const_value if data is not None and is_constant(data) else None
        if tensor is None or shape is None or not _followable(node):
            return None
        order = ints(node, "perm", range(len(shape))[::-1]) if node.op_type == "Transpose" else None
        name = f"{node.outputs[0].name}.integer"
        return self.later(lambda: _rearranged(tensor.numpy(), order, shape), dtype, shape, name)

    def like_dequantize(
        self,
        node: ir.Node,
        source: ir.Node,
        integers: ir.Value,
        like: ir.Value,
        follow: Sequence[ir.Value | None] | None = None,
    ) -> ir.Value:
        """A DequantizeLinear with the parameters of `source`."""
        given = [integers, *(source.inputs[1:] if follow is None else follow)]
        result = self.insert(node, "DequantizeLinear", given, like=like)
        made = result.producer()
        assert made is not None
        made.attributes.update(source.attributes)
        return result

    def order(self, node: ir.Node) -> bool:
        """The place of the largest integer is that of the largest number."""
        source = dequantized(node.inputs[0])
        parameters = quantization(source)
        if source is None or parameters is None or not parameters.whole or not _takes(node, parameters.dtype):
            return False
        if parameters.scale <= 0:
            return False
        node.replace_input_with(0, source.inputs[0])
        return True

    def meet(self, node: ir.Node) -> bool:
        """QuantizeLinear(DequantizeLinear(x)) of equal parameters is x."""
        source, parameters = dequantized(node.inputs[0]), quantization(node)
        if source is None or parameters is None or not parameters.same(quantization(source)):
            return False
        assert source.inputs[0] is not None
        self.replace(node.outputs[0], source.inputs[0])
        self.drop(node)
        return True

    def clamp(self, node: ir.Node) -> bool:
        """Relu or Clip between DequantizeLinear and QuantizeLinear of equal parameters, on integers."""
        between = None if node.inputs[0] is None else node.inputs[0].producer()
        if between is None or between.domain or between.op_type not in {"Relu", "Clip"}:
            return False
        limits, source, parameters = bounds(between), dequantized(between.inputs[0]), quantization(node)
        if limits is None or source is None or parameters is None or not parameters.whole:
            return False
        if not parameters.same(quantization(source)) or not _takes(between, parameters.dtype):
            return False
        inputs = [source.inputs[0]]
        for limit, label in zip(limits, ("min", "max"), strict=True):
            integer = parameters.quantize(np.array(limit, np.float32))
            inputs.append(self.constant(integer, f"{node.outputs[0].name}.{label}", parameters.dtype))
        self.replace(node.outputs[0], self.insert(node, "Clip", inputs, like=node.outputs[0]))
        return True

    def rise(self, node: ir.Node) -> bool:
        """QuantizeLinear(op(x)) as op(QuantizeLinear(x)), as far up as it goes."""
        value, parameters = node.inputs[0], quantization(node)
        mover = None if value is None else value.producer()
        if mover is None or mover.domain or mover.graph is not self.graph or parameters is None:
            return False
        if not parameters.whole or not _takes(mover, parameters.dtype):
            return False
        readers = self.readers(mover, parameters)
        many = mover.op_type in _OF_ALL
        if readers is None or not (many or (mover.op_type in _MOVES and _moves(mover))):
            return False
        data = [value for value in (mover.inputs if many else mover.inputs[:1]) if value is not None]
        if any(not self.free(value, mover) for value in data):
            return False
        before = {value: self.like_quantize(mover, node, value) for value in dict.fromkeys(data)}
        results = self.moved(mover, [before[value] for value in data], parameters)
        for result, users in zip(results, readers, strict=True):
            for user in users:
                self.replace(user.outputs[0], result)
                self.drop(user)
        self.drop(mover)
        for value in before.values():
            above = value.producer()
            assert above is not None
            if not self.meet(above):
                self.rise(above)
        return True

    def drop(self, node: ir.Node) -> None:
        """Take a node out now that nothing uses it, so that it does not count as a user of its operands."""
        if not used(node):
            self.graph.remove(node, safe=True)

    def readers(self, mover: ir.Node, parameters: Quantization) -> list[list[ir.Node]] | None:
        """Who quantizes each result, if all users of the results do, by the same parameters."""
        found: list[list[ir.Node]] = []
        for value in mover.outputs:
            users = [user for user, _ in value.uses()]
            if value.is_graph_output() or not all(parameters.same(quantization(user)) for user in users):
                return None
            found.append([user for user in users if user.op_type == "QuantizeLinear"])
            if len(found[-1]) != len(users):
                return None
        return found

    def free(self, value: ir.Value, mover: ir.Node) -> bool:
        """Whether quantizing a value before `mover` costs nothing: nobody else reads it, or it is quantized anyway."""
        if is_constant(value) or dequantized(value) is not None:
            return True
        return not value.is_graph_output() and all(user is mover for user, _ in value.uses())

    def like_quantize(self, before: ir.Node, quantizer: ir.Node, value: ir.Value) -> ir.Value:
        """`value` quantized by the parameters of `quantizer`."""
        dtype = quantizer.outputs[0].dtype
        result = self.insert(before, "QuantizeLinear", [value, *quantizer.inputs[1:]], like=value, dtype=dtype)
        made = result.producer()
        assert made is not None
        made.attributes.update(quantizer.attributes)
        return result


def _moves(node: ir.Node) -> bool:
    """Whether every result of `node` is an element of operand 0, and only its first result is used (but for Split)."""
    spare = node.outputs[1:] if node.op_type != "Split" else ()
    if any(value.uses() or value.is_graph_output() for value in spare):
        return False
    if node.op_type == "Resize":
        mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
        return node.attributes.get_string("mode", "nearest") == "nearest" and mode != "tf_crop_and_resize"
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
        return _padding(node) is not None
    if node.op_type == "MaxPool":
        return len(node.outputs) == 1
    if node.op_type == "Dropout":
        return operand(node, 2) is None or scalar(operand(node, 2)) == 0.0
    if node.op_type in {"ReduceMax", "ReduceMin"}:
        return not node.attributes.get_int("noop_with_empty_axes", 0) or operand(node, 1) is not None
    return True


def _padding(node: ir.Node) -> float | None:
    """The number that a Pad puts around its operand, if it does and the number is a constant."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return None
    given = operand(node, 2)
    return 0.0 if given is None else scalar(given)


def _exact_padding(node: ir.Node, parameters: Quantization) -> bool:
    """Whether an integer stands for the number to pad with."""
    number = _padding(node)
    return number is None or float(parameters.dequantize(parameters.quantize(np.array(number, np.float32)))) == number


def _takes(node: ir.Node, dtype: ir.DataType) -> bool:
    """Whether ONNX defines the operator for integers of this type."""
    version = node.version or onnx.defs.onnx_opset_version()
    if not onnx.defs.has(node.op_type, version, ""):
        return False
    schema = onnx.defs.get_schema(node.op_type, version, "")
    return f"tensor({dtype.name.lower()})" in schema.inputs[0].types


def _followable(node: ir.Node) -> bool:
    """Whether `node` is a Transpose or a view."""
    return node.op_type == "Transpose" or is_view(node)


def _same_place(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """The axis of a view that counts the same as `axis` of the tensor: as long, and as many elements before it."""
    ahead = int(np.prod(before[:axis], dtype=np.int64))
    for place, size in enumerate(after):
        if size == before[axis] and int(np.prod(after[:place], dtype=np.int64)) == ahead:
            return place
    return None


def _rearranged(data: np.ndarray, order: Sequence[int] | None, shape: Sequence[int]) -> np.ndarray:
    return data.reshape(tuple(shape)) if order is None else np.ascontiguousarray(data.transpose(order))
