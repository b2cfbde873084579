"""Replace composite operators that no target takes by the functions with which ONNX defines them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from nestc.errors import UnsupportedOp
from nestc.graph.infer_shapes import InferShapes
from nestc.graph.kinds import BODIES
from nestc.graph.model import Model
from nestc.graph.passes.fold_constants import FoldConstants
from nestc.graph.quiet import quiet
from nestc.graph.region import Op


def expandable(op: Op | ir.Node) -> bool:
    """Whether ONNX defines the operator by simpler ones (perhaps only for some types and attributes)."""
    if not onnx.defs.has(op.op_type, op.domain):
        return False
    schema: Any = onnx.defs.get_schema(op.op_type, op.domain)  # onnx's type stub lacks the function members
    return schema.has_function or schema.has_context_dependent_function


def expand(model: Model, nodes: Collection[str]) -> Model:
    """A copy of an optimized (not yet formed) model in which the nodes of these names are replaced by their bodies.

    Shapes inside the bodies are inferred and what is constant in them is folded; composite operators in a body stay
    composite. Raises `UnsupportedOp` for a node that ONNX does not define by simpler operators.
    """
    expanded = model.clone()
    wanted = set(nodes)
    if not wanted:
        return expanded
    for index, node in enumerate([node for node in expanded.ir.graph if node.name in wanted]):
        overload = f"expand{index}"
        function = _body(expanded.ir, node, overload)
        expanded.ir.functions[function.identifier()] = function
        node.overload = overload
        wanted.discard(node.name or "")
        expanded.notes.append(f"{node.op_type} {node.name!r} replaced by its definition")
    if wanted:
        raise ValueError(f"the model has no node {sorted(wanted)[0]!r}")
    with quiet("onnxscript", "onnx_ir"):
        common.InlinePass()(expanded.ir)
        common.NameFixPass()(expanded.ir)
        FoldConstants()(expanded.ir)
        InferShapes()(expanded.ir)
    return expanded


def _body(model: ir.Model, node: ir.Node, overload: str) -> ir.Function:
    """The function that defines a node, for its types and attributes, in the model's operator set."""
    version = model.opset_imports[node.domain]
    schema: Any = onnx.defs.get_schema(node.op_type, version, node.domain)
    for name, attribute in schema.attributes.items():
        if name not in node.attributes and attribute.default_value.type:
            node.attributes[name] = ir.from_proto(attribute.default_value)
    content = b""
    proto = ir.to_proto(node)
    if schema.has_context_dependent_function:
        types = [_type(value).SerializeToString() for value in node.inputs]
        choices = schema.context_dependent_function_opset_versions
        chosen = max((choice for choice in choices if choice <= version), default=version)
        content = schema.get_context_dependent_function_with_opset_version(chosen, proto.SerializeToString(), types)
    if not content and schema.has_function:
        chosen = max((choice for choice in schema.function_opset_versions if choice <= version), default=version)
        content = schema.get_function_with_opset_version(chosen)
    if not content:
        raise UnsupportedOp(f"operator {node.op_type} (node {node.name!r}) has no definition by simpler operators")
    body = onnx.FunctionProto.FromString(content)
    made = {name for inner in body.node for name in inner.output} | set(body.input)
    for name in set(body.output) - made:
        # An optional output that this node does not have: the body leaves it open, and nobody reads the stand-in.
        body.node.append(onnx.helper.make_node("Identity", [body.input[0]], [name]))
    node.resize_outputs(len(body.output))
    function = ir.from_proto(body)
    for name in [name for name, attribute in node.attributes.items() if attribute.type in BODIES]:
        # A body made for this node has the graph in it already, and functions that are called take no graphs.
        if any(attribute.ref_attr_name == name for inner in function for attribute in inner.attributes.values()):
            raise UnsupportedOp(f"operator {node.op_type} (node {node.name!r}): its definition calls graph {name!r}")
        del node.attributes[name]
        function.attributes.pop(name, None)
    function.overload = overload
    function.domain, function.name = node.domain, node.op_type
    for domain in {"", *function.opset_imports}:
        function.opset_imports[domain] = model.opset_imports.get(domain) or function.opset_imports[domain]
    return function


def _type(value: ir.Value | None) -> onnx.TypeProto:
    """The type of an operand as protobuf; an empty one if it is absent."""
    proto = onnx.TypeProto()
    if value is None or value.type is None:
        return proto
    ir.serde.serialize_type_into(proto, value.type)
    if value.shape is not None:
        ir.serde.serialize_shape_into(proto, value.shape)
    return proto
