"""Bring a model of any ONNX operator set from 7 on to the one canonical operator set."""

from __future__ import annotations

import onnx
import onnx.version_converter
import onnx_ir as ir
import onnxscript.version_converter as script_converter

from nestc.errors import ModelError, UnsupportedOp
from nestc.graph.infer_shapes import InferShapes
from nestc.graph.model import skeleton
from nestc.graph.quiet import quiet

CANONICAL_OPSET = 24
"""The newest operator set for which ONNX Runtime 1.32 has kernels of all its operators (it lost Swish in 25)."""
OLDEST_OPSET = 1
_BROADCASTING = 7  # from here on operands broadcast as in numpy; onnx's converter forgets PRelu
_RESIZE_CHANGED = 11  # from here on Resize has modes, whose defaults differ from what it did before
_SCRIPT_OLDEST = 18  # onnxscript's converter starts here; below it onnx's own one is used


def to_canonical_opset(model: ir.Model) -> ir.Model:
    """Convert to `CANONICAL_OPSET`; the weights are not copied. Raises `ModelError` if the version is unknown.

    A model that is newer stays as it is only if it uses something that the canonical set cannot say.
    """
    version = model.opset_imports.get("", CANONICAL_OPSET)
    newest = onnx.defs.onnx_opset_version()
    _say_onesided(model)
    if not OLDEST_OPSET <= version <= newest:
        raise ModelError(
            f"the model uses ONNX operator set {version}; supported are {OLDEST_OPSET} to {newest}: export it again"
        )
    if version > CANONICAL_OPSET:
        _relabel_if_equal(model)
        return model
    if version < CANONICAL_OPSET:
        # Some converters need ranks and channels, and pass over in silence what they lack them for.
        InferShapes()(model)
    if version < _SCRIPT_OLDEST:
        if version < _BROADCASTING and any(node.op_type == "PRelu" for node in model.graph.all_nodes()):
            raise ModelError(
                f"the model uses PRelu as of operator set {version}, which is not supported: export it again"
            )
        model = _convert_with_onnx(model, _SCRIPT_OLDEST)
        if version < _RESIZE_CHANGED:
            _resize_as_before(model)
    with quiet("onnxscript", "onnx_ir"):
        script_converter.convert_version(model, CANONICAL_OPSET)
    _set_version(model, CANONICAL_OPSET)
    return model


def _convert_with_onnx(model: ir.Model, version: int) -> ir.Model:
    """Convert with onnx's own converter, which sees the graph without its large weights."""
    inputs = [value.name for value in model.graph.inputs]
    weights = dict(model.graph.initializers)
    try:
        converted = ir.from_proto(onnx.version_converter.convert_version(skeleton(model), version))
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        old = model.opset_imports.get("")
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(f"the model cannot be brought from operator set {old} to {version}: {reason}") from error
    values = {value.name: value for value in converted.graph.inputs}
    for value in model.graph.inputs:
        if value.shape != values[value.name].shape:
            # onnx's adapter for Scan of set 8 takes the batch axis away, from the inputs of the model too.
            raise UnsupportedOp("the model uses Scan as of operator set 8, which is not supported: export it again")
    for name, weight in weights.items():
        # A weight that was left out came back as a graph input of that name.
        if name in values and name not in converted.graph.initializers:
            values[name].const_value = weight.const_value
            converted.graph.initializers.add(values[name])
    converted.graph.inputs.clear()
    converted.graph.inputs.extend(values[name] for name in inputs)
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(converted, field, getattr(model, field))
    return converted


def _say_onesided(model: ir.Model) -> None:
    """Write out the default of STFT's ``onesided`` (1), which onnx 1.23 takes for 0 when it infers the shape."""
    for node in model.graph.all_nodes():
        if node.op_type == "STFT" and not node.domain and "onesided" not in node.attributes:
            node.attributes["onesided"] = ir.AttrInt64("onesided", 1)


def _resize_as_before(model: ir.Model) -> None:
    """Give Resize the modes that it and Upsample had before they could be chosen, which onnx's converter forgets."""
    for node in model.graph.all_nodes():
        if node.op_type == "Resize" and not node.domain:
            node.attributes["coordinate_transformation_mode"] = ir.AttrString(
                "coordinate_transformation_mode", "asymmetric"
            )
            node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "floor")


def _relabel_if_equal(model: ir.Model) -> None:
    """Call a newer model one of the canonical set if every operator in it is valid there.

    From set 24 to 28 operators gained element types and attributes, and new ones came; no meaning changed.
    """
    version = model.opset_imports[""]
    floored = [node for node in model.graph if node.op_type == "Mod" and not node.attributes.get_int("fmod", 0)]
    if any(map(_is_float, floored)):
        return  # floor division of floats is new in set 28
    _set_version(model, CANONICAL_OPSET)
    proto = skeleton(model)
    for info in proto.graph.output:
        info.type.ClearField("tensor_type") if info.type.tensor_type.elem_type == 0 else None
    try:
        onnx.checker.check_model(proto)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        _set_version(model, version)


def _is_float(node: ir.Node) -> bool:
    dtype = None if node.inputs[0] is None else node.inputs[0].dtype
    return dtype is not None and dtype.is_floating_point()


def _set_version(model: ir.Model, version: int) -> None:
    model.opset_imports[""] = version
    for node in model.graph.all_nodes():
        if node.domain == "":
            node.version = version
