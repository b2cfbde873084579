"""Write the quantized model: integers between QuantizeLinear and DequantizeLinear, integer weights and biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from nestc.graph.model import Model
from nestc.graph.passes.affine_convolutions import ConvolutionToAffine
from nestc.graph.passes.rewrite import operand
from nestc.quant.choose import Assignment, Decision, data_inputs
from nestc.quant.derive import quantized_input
from nestc.quant.explain import annotate
from nestc.quant.parameters import Activation, Parameters, Weight
from nestc.quant.scheme import Format

_TYPES: Mapping[str, ir.DataType] = {
    "int4": ir.DataType.INT4,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "int16": ir.DataType.INT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
_NUMPY = {"int4": ml_dtypes.int4, "bfloat16": ml_dtypes.bfloat16}

BIAS_MAX = 2**31 - 1


def apply(prepared: Model, assignment: Assignment, parameters: Parameters) -> Model:
    """A quantized copy of the prepared model, in the form that ONNX Runtime and NNCF call QDQ.

    An activation is rounded once and read by all its quantized consumers. What an integer operator has computed is
    read as it was rounded by the others too, so that it need not be kept twice; outputs of the model are never rounded.
    Weights become integers, biases int32, each behind a DequantizeLinear. Scales and shifts that were prepared as
    convolutions and stay float become Mul and Add again.
    """
    writer = _Writer(prepared.clone(), parameters)
    for node in list(writer.graph):
        writer.weights(node, assignment.of(node))
    for value in [*writer.graph.inputs, *(out for node in list(writer.graph) for out in node.outputs)]:
        writer.activation(value, assignment)
    for node in writer.graph:
        if node.name in assignment.decisions:
            annotate(node, assignment.of(node))
    quantized = writer.model
    quantized.ir.metadata_props["nestc.scheme"] = assignment.scheme.name
    common.RemoveUnusedNodesPass()(quantized.ir)
    ConvolutionToAffine(quantized.notes)(quantized.ir)
    common.TopologicalSortPass()(quantized.ir)
    quantized.notes.append(f"quantized in scheme {assignment.scheme.name}")
    return quantized


class _Writer:
    """Adds nodes and initializers to the copy, each under a name of its own."""

    def __init__(self, model: Model, parameters: Parameters) -> None:
        self.model = model
        self.graph = model.ir.graph
        self.parameters = parameters
        self.formats: dict[str, list[Activation]] = {}
        for activation in parameters.activations.values():
            self.formats.setdefault(activation.tensor, []).append(activation)
        self.stored: dict[tuple[str, Format, int], list[tuple[Weight, ir.Value]]] = {}
        self.taken = {value.name or "" for node in self.graph.all_nodes() for value in node.outputs}
        self.taken |= {value.name or "" for value in self.graph.inputs} | set(self.graph.initializers)
        self.taken |= {node.name or "" for node in self.graph.all_nodes()}

    def weights(self, node: ir.Node, decision: Decision) -> None:
        """Let a node read its constant operands, and its bias, from integers."""
        scheme = decision.scheme
        if scheme is None or decision.role == "tail":
            return
        # Before the weight becomes the result of a node, too.
        source = quantized_input(node, scheme, self.parameters)
        for index in data_inputs(node):
            weight = self.parameters.weights.get((node.name or "", index))
            if weight is not None:
                node.replace_input_with(index, self._weight(weight, node))
        bias = self.parameters.biases.get(node.name or "")
        if bias is None:
            return
        weight = self.parameters.weights[node.name or "", 1]
        value = self._float_bias(bias, node) if source is None else self._bias(bias, node, source, weight)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, value)

    def activation(self, value: ir.Value, assignment: Assignment) -> None:
        """Round a tensor for those that want it rounded, and let them read the result."""
        wanted = self.formats.get(value.name or "", [])
        uses = list(value.uses())
        if not wanted:
            return
        front = value.producer()
        made_of = assignment.of(front) if front is not None else None
        on_integers = made_of is not None and made_of.scheme is not None and made_of.scheme.integer
        read: dict[Format, ir.Value] = {}
        stored = self.parameters.stored.get(value.name or "")

        def rank(one: Activation) -> tuple[bool, bool, int]:
            return (one.format != stored, one.format.is_float, 0 if one.format.is_float else -one.format.levels)

        # Integers first, the finest first: what an integer operator computed is read by all others as it was rounded.
        for each in sorted(wanted, key=rank):
            rounded = bool(read) and (stored is not None or (on_integers and each.format.is_float))
            base = next(iter(read.values())) if rounded else value
            read[each.format] = self._rounded(base, each, value)
        integers = [each for form, each in read.items() if not form.is_float]
        for user, index in uses:
            decision = assignment.of(user)
            scheme = decision.scheme
            form = None if scheme is None or decision.role == "tail" else scheme.activation
            if form in read and index in data_inputs(user) and user.graph is self.graph:
                user.replace_input_with(index, read[form])
            elif on_integers and integers:
                user.replace_input_with(index, integers[0])

    def _rounded(self, base: ir.Value, activation: Activation, value: ir.Value) -> ir.Value:
        """The value behind QuantizeLinear and DequantizeLinear, or behind Casts to bfloat16 and back."""
        dtype, name = _TYPES[activation.format.dtype], value.name or ""
        if activation.format.is_float:
            rounded = self._node("Cast", [base], {"to": dtype.value}, dtype, base.shape, f"{name}_bfloat16", base)
            to = ir.DataType.FLOAT
            return self._node("Cast", [rounded], {"to": to.value}, to, base.shape, f"{name}_float32", rounded)
        scale = self._constant(np.asarray(activation.scale, np.float32), f"{name}_scale")
        zero = np.asarray(activation.zero_point, activation.format.dtype)
        operands = [scale, self._constant(zero, f"{name}_zero_point")]
        rounded = self._node("QuantizeLinear", [base, *operands], {}, dtype, base.shape, f"{name}_QuantizeLinear", base)
        label = f"{name}_DequantizeLinear"
        return self._node("DequantizeLinear", [rounded, *operands], {}, ir.DataType.FLOAT, base.shape, label, rounded)

    def _weight(self, weight: Weight, node: ir.Node) -> ir.Value:
        """The float value of an integer weight; nodes with the same weight in the same integers share it."""
        key = (weight.tensor, weight.format, weight.axis)
        for other, value in self.stored.setdefault(key, []):
            if np.array_equal(other.scale, weight.scale) and np.array_equal(other.values, weight.values):
                return value
        values = weight.values.astype(_NUMPY.get(weight.format.dtype, weight.format.dtype))
        stored = self._constant(values, f"{weight.tensor}_quantized")
        made = self._dequantized(stored, weight, node)
        self.stored[key].append((weight, made))
        return made

    def _dequantized(self, stored: ir.Value, weight: Weight, node: ir.Node) -> ir.Value:
        to, shape = ir.DataType.FLOAT, ir.Shape(weight.values.shape)
        if weight.format.is_float:
            return self._node("Cast", [stored], {"to": to.value}, to, shape, f"{weight.tensor}_float32", node, True)
        scale = self._constant(weight.scale, f"{weight.tensor}_scale")
        kind = _NUMPY.get(weight.format.dtype, weight.format.dtype)
        zero = self._constant(np.full(weight.scale.shape, weight.zero_point, kind), f"{weight.tensor}_zero_point")
        attributes: dict[str, int] = {"axis": weight.axis} if weight.scale.ndim else {}
        if weight.format.block:
            attributes["block_size"] = weight.format.block
        label = f"{weight.tensor}_DequantizeLinear"
        return self._node("DequantizeLinear", [stored, scale, zero], attributes, to, shape, label, node, True)

    def _bias(self, bias: np.ndarray, node: ir.Node, source: Activation, weight: Weight) -> ir.Value:
        """The bias as int32 with the scale of the int32 sums; as float32 where a corrected one does not fit."""
        scale = (np.float32(source.scale) * weight.scale).astype(np.float32)
        integers = np.rint(bias.astype(np.float64) / scale)
        if np.abs(integers).max(initial=0.0) > BIAS_MAX:
            return self._float_bias(bias, node)
        given = operand(node, 2)
        name = given.name if given is not None and given.name else f"{node.name}_bias"
        stored = self._constant(integers.astype(np.int32), f"{name}_quantized")
        attributes = {"axis": 0} if scale.ndim else {}
        inputs = [stored, self._constant(scale, f"{name}_scale")]
        label, shape = f"{name}_DequantizeLinear", ir.Shape(bias.shape)
        return self._node("DequantizeLinear", inputs, attributes, ir.DataType.FLOAT, shape, label, node, True)

    def _float_bias(self, bias: np.ndarray, node: ir.Node) -> ir.Value:
        return self._constant(bias, f"{node.name}_bias")

    def _constant(self, values: np.ndarray, name: str) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(values).reshape(values.shape), name=self._fresh(name))
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(values.shape), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, int],
        dtype: ir.DataType,
        shape: ir.Shape | None,
        name: str,
        place: ir.Value | ir.Node,
        before: bool = False,
    ) -> ir.Value:
        """A new node behind the producer of the value `place`, or in front of the node `place`."""
        label = self._fresh(name)
        output = ir.Value(name=f"{label}_Output", type=ir.TensorType(dtype), shape=shape)
        version = self.graph.opset_imports.get("")
        node = ir.node(op_type, list(inputs), dict(attributes), outputs=[output], name=label, version=version)
        if isinstance(place, ir.Node):
            self.graph.insert_before(place, node)
        elif (front := place.producer()) is not None:
            self.graph.insert_after(front, node)
        else:
            first = next(iter(self.graph))
            self.graph.insert_before(first, node)
        return output

    def _fresh(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self.taken:
            candidate, count = f"{name}.{count}", count + 1
        self.taken.add(candidate)
        return candidate
