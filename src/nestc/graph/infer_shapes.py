"""Find the type and shape of every value, without copying weights."""

from __future__ import annotations

import re

import onnx
import onnx_ir as ir

from nestc.errors import ModelError, ShapeError
from nestc.graph.model import skeleton


class InferShapes(ir.passes.InPlacePass):
    """Run onnx's shape inference, with data propagation, over the graph without its large weights.

    Shapes that inference finds replace those that the file claims; a rank or size found nowhere stays unknown.
    Raises `ShapeError` where two shapes cannot go together, `ModelError` where types do not fit an operator.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        proto = skeleton(model)
        declared = {info.name: info for info in proto.graph.output}
        del proto.graph.value_info[:]
        for info in declared.values():
            if info.type.HasField("tensor_type"):
                info.type.tensor_type.ClearField("shape")
        _substitute_uninferable(proto)
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
        except onnx.shape_inference.InferenceError as error:
            reason = _reason(str(error))
            kind = ModelError if "TypeInference" in str(error) or "inconsistent type" in reason else ShapeError
            raise kind(f"the model's shapes or types do not fit together: {reason}") from error
        found = {info.name: info for info in (*inferred.graph.value_info, *inferred.graph.output)}
        modified = False
        for node in model.graph:
            for value in node.outputs:
                if value.name in found:
                    modified |= _merge(value, found[value.name].type)
            if node.op_type in ("Conv", "ConvTranspose") and node.domain == "":
                _require_channels(node)
        return ir.passes.PassResult(model, modified)


def _merge(value: ir.Value, proto: onnx.TypeProto) -> bool:
    """Take the inferred type and every dimension that is known; True if something changed."""
    before = (value.type, value.shape)
    kind = ir.serde.deserialize_type_proto_for_type(proto)
    if kind is not None and getattr(kind, "dtype", None) is not None:
        value.type = kind
    shape = ir.serde.deserialize_type_proto_for_shape(proto)
    if shape is not None:
        old = value.shape
        if old is not None and len(old) == len(shape):
            dims = [b if isinstance(b, int) or not _better(a, b) else a for a, b in zip(old, shape, strict=True)]
            shape = ir.Shape(dims)
        value.shape = shape
    return before != (value.type, value.shape)


def _better(old: int | ir.SymbolicDim, new: ir.SymbolicDim) -> bool:
    """Whether the dimension known before says more than an inferred one that has no size."""
    if isinstance(old, int):
        return True
    # onnx calls a size that it cannot compute unk__N.
    return old.value is not None and (new.value is None or new.value.startswith("unk__"))


def _require_channels(node: ir.Node) -> None:
    """Raise `ShapeError` where a convolution's input has other channels than its weights; onnx does not look there."""
    x, w = (value.shape if value is not None else None for value in node.inputs[:2])
    if x is None or w is None or len(x) < 2 or len(w) < 2:
        return
    group = node.attributes.get_int("group", 1)
    transposed = node.op_type == "ConvTranspose"
    given, held = x[1], w[0] if transposed else w[1]
    if not isinstance(given, int) or not isinstance(held, int):
        return
    wanted = held if transposed else held * group
    if given != wanted:
        raise ShapeError(
            f"{node.op_type} {node.name or node.outputs[0].name!r}: its weights are for {wanted} channels, but its "
            f"input {node.inputs[0].name if node.inputs[0] else ''!r} has {given}"
        )


def _reason(text: str) -> str:
    """The innermost reason in onnx's message, with the operator it speaks of."""
    reason = re.sub(r"^\(op_type:[^)]*\): ", "", text.strip().splitlines()[-1].split("InferenceError] ")[-1].strip())
    operator = re.search(r"op_type:(\w+)(?:, node name: ([^)]+))?", text)
    if operator is None:
        return reason
    return f"{operator[1]}{f' {operator[2]!r}' if operator[2] else ''}: {reason}"


def _substitute_uninferable(proto: onnx.ModelProto) -> None:
    """Infer MeanVarianceNormalization as Identity: onnx 1.23 fails on that operator's function body."""
    for node in proto.graph.node:
        if node.op_type == "MeanVarianceNormalization" and not node.domain:
            node.op_type = "Identity"
            del node.attribute[:]
