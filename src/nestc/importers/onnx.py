"""Read an ONNX file into a Model: any operator set from 7 on, external data, local functions, symbolic sizes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import google.protobuf.message
import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir import external_data

from nestc.errors import ModelError
from nestc.graph.bind import bind
from nestc.graph.infer_shapes import InferShapes
from nestc.graph.model import Model, skeleton
from nestc.graph.quiet import quiet
from nestc.importers.check import check_external_data, check_operators, check_structure, subgraphs
from nestc.importers.contrib import StandardOperators
from nestc.importers.mapped import map_external, parse_mapped
from nestc.importers.upgrade import to_canonical_opset

IR_VERSION = 11
"""The first ONNX file version that keeps both the types inside functions (10) and device placement (11)."""


def load(
    source: str | os.PathLike[str] | onnx.ModelProto | bytes,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    values: Mapping[str, np.ndarray] | None = None,
) -> Model:
    """Read a model and bring it to the one form that the compiler works on.

    `shapes` gives inputs other shapes, `dims` sizes to symbolic dimensions, `values` constants in place of inputs.
    Weights stay where they are until somebody reads them. Raises `ModelError` for what is not sound ONNX,
    `UnsupportedOp` for an operator that ONNX does not have, `ShapeError` for a shape that does not fit.
    """
    proto, name, folder = _read(source)
    check_structure(proto, name)
    proto = _inline(proto, name)
    with quiet("onnxscript", "onnx_ir"):
        model = _to_ir(proto, name)
        model.graph.sort()
        common.RemoveInitializersFromInputsPass()(model)
    model.ir_version = IR_VERSION  # before version 4 a weight had to be an input too, which we have undone
    if folder is not None:
        external_data.set_base_dir(model.graph, folder)
    check_operators(model)
    check_external_data(model, folder)
    if folder is not None:
        map_external(model, folder)
    _name_nodes(model)
    _check_standard(model, name)
    standard = StandardOperators()
    standard(model)  # before the conversion, whose steps need types and shapes
    model = to_canonical_opset(model)
    standard(model)  # what older operator sets cannot say
    _name_nodes(model)  # those that the conversion has added
    loaded = bind(Model(model), shapes, dims, values)
    with quiet("onnxscript", "onnx_ir"):
        InferShapes()(loaded.ir)
    return loaded


def _read(source: str | os.PathLike[str] | onnx.ModelProto | bytes) -> tuple[onnx.ModelProto, str, Path | None]:
    """The parsed file, its name for messages, and the folder in which external data may lie."""
    if isinstance(source, onnx.ModelProto):
        return source, "the model", None
    if isinstance(source, bytes):
        return _parse(source, "the model"), "the model", None
    path = Path(source)
    try:
        mapped = parse_mapped(path)
        proto = _parse(path.read_bytes(), str(path)) if mapped is None else mapped
    except google.protobuf.message.DecodeError as error:
        raise _unreadable(str(path), path.read_bytes()[:4]) from error
    except OSError as error:
        raise ModelError(f"cannot read the model {str(path)!r}: {error.strerror or error}") from error
    return proto, str(path), path.parent


def _parse(content: bytes, name: str) -> onnx.ModelProto:
    if not content:
        raise ModelError(f"{name} is empty")
    try:
        return onnx.ModelProto.FromString(content)
    except google.protobuf.message.DecodeError as error:
        raise _unreadable(name, content[:4]) from error


def _unreadable(name: str, begin: bytes) -> ModelError:
    """What is not ONNX; a bundle begins as a ZIP file does."""
    if begin == b"PK\x03\x04":
        return ModelError(f"{name} is not an ONNX model; if it is a bundle, run it (nestc.open, nestc run)")
    return ModelError(f"{name} is not an ONNX model, or is cut")


def _inline(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Put the bodies of the model's own functions in place of their calls."""
    if not proto.functions:
        return proto
    try:
        inlined = onnx.inliner.inline_local_functions(proto, convert_version=True)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the functions inside {name} cannot be inlined: {str(error).splitlines()[-1]}") from error
    del inlined.functions[:]
    return inlined


def _to_ir(proto: onnx.ModelProto, name: str) -> ir.Model:
    for tensor in proto.graph.initializer:
        _check_size(tensor)
    if proto.graph.sparse_initializer:
        raise ModelError(f"{name} has sparse weights, which are not supported; export it with dense ones")
    try:
        return ir.from_proto(proto)
    except (ValueError, TypeError, RuntimeError, KeyError, NotImplementedError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ModelError(f"{name} is not valid ONNX: {reason}") from error


def _name_nodes(model: ir.Model) -> None:
    """Give every node a name of its own, since messages, plans and profiles speak of nodes by name."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph.all_nodes()):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}_{index}"
            while node.name in taken:
                node.name += "_"
        taken.add(node.name)


def _check_size(tensor: onnx.TensorProto) -> None:
    """Raise `ModelError` if a weight inside the file has not as many bytes as its shape says."""
    if not tensor.HasField("raw_data"):
        return
    known = tensor.data_type in onnx.TensorProto.DataType.values() and tensor.data_type != onnx.TensorProto.UNDEFINED
    if not known:
        raise ModelError(f"weight {tensor.name!r} has an unknown element type ({tensor.data_type})")
    bits = ir.DataType(tensor.data_type).itemsize * 8
    needed = -int(-int(np.prod(tensor.dims, dtype=np.int64)) * bits // 8)
    if len(tensor.raw_data) != needed:
        found = len(tensor.raw_data)
        raise ModelError(f"weight {tensor.name!r} of shape {list(tensor.dims)} needs {needed} bytes, not {found}")


def _check_standard(model: ir.Model, name: str) -> None:
    """Raise `ModelError` where onnx's checker finds a fault (attributes, counts of inputs, ...)."""
    proto = skeleton(model)
    _complete_shapes(proto.graph)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        reason = " ".join(str(error).split("==>")[0].split())
        if "is deprecated" in reason:
            return  # GroupNormalization of sets 18 to 20, which the conversion below replaces
        raise ModelError(f"{name} is not valid ONNX: {reason}") from error


def _complete_shapes(graph: onnx.GraphProto) -> None:
    """Give inputs and outputs a shape field, which the checker wants and many exporters leave out."""
    for info in (*graph.input, *graph.output):
        if info.type.HasField("tensor_type") and not info.type.tensor_type.HasField("shape"):
            info.type.tensor_type.shape.SetInParent()
    for node in graph.node:
        for inner in subgraphs(node):
            _complete_shapes(inner)
