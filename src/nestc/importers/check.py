"""Refuse what is not a sound ONNX model, in one sentence: undefined values, cycles, unknown operators, stray files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from nestc.errors import ModelError, UnsupportedOp
from nestc.importers import contrib

_SUBGRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def check_structure(proto: onnx.ModelProto, name: str) -> None:
    """Raise `ModelError` where a value is used that nothing defines, or is defined twice, or needs itself."""
    if not proto.HasField("graph") or not proto.ir_version:
        raise ModelError(f"{name} is not an ONNX model (no graph in it)")
    if not proto.opset_import:
        raise ModelError(f"{name} does not say which ONNX operator set it uses; export it again")
    _check_graph(proto.graph, frozenset())
    for function in proto.functions:
        _check_nodes(function.node, set(function.input), f"function {function.name!r}", function.output)


def _check_graph(graph: onnx.GraphProto, outer: frozenset[str]) -> None:
    defined = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    defined |= {tensor.values.name for tensor in graph.sparse_initializer} | outer
    _check_nodes(graph.node, defined, f"graph {graph.name!r}", [value.name for value in graph.output])


def _check_nodes(nodes: Iterable[onnx.NodeProto], defined: set[str], where: str, outputs: Iterable[str]) -> None:
    """`defined` holds the names known before the first node. Nodes may come in any order that has no cycle."""
    waiting = list(nodes)
    producers: dict[str, onnx.NodeProto] = {}
    for node in waiting:
        for output in filter(None, node.output):
            if output in producers:
                raise ModelError(f"value {output!r} is written by two nodes of {where}, {label(producers[output])} too")
            producers[output] = node
    everything = frozenset(defined | producers.keys())
    for node in waiting:
        for used in filter(None, node.input):
            if used not in everything:
                raise ModelError(
                    f"node {label(node)} of {where} uses the value {used!r}, which no node, input or weight defines"
                )
        for graph in subgraphs(node):
            _check_graph(graph, everything)
    for output in outputs:
        if output not in everything:
            raise ModelError(f"output {output!r} of {where} is not computed by any node")
    _check_acyclic(waiting, producers, where)


def _check_acyclic(nodes: list[onnx.NodeProto], producers: dict[str, onnx.NodeProto], where: str) -> None:
    """Depth-first search without recursion; a node met again while it is open closes a cycle."""
    done: set[int] = set()
    for start in nodes:
        if id(start) in done:
            continue
        opened = {id(start)}
        stack: list[tuple[onnx.NodeProto, Iterator[str]]] = [(start, used_names(start))]
        while stack:
            node, names = stack[-1]
            for used in names:
                source = producers.get(used)
                if source is None or id(source) in done:
                    continue
                if id(source) in opened:
                    raise ModelError(f"{where} has a cycle through node {label(source)}, so it cannot be computed")
                opened.add(id(source))
                stack.append((source, used_names(source)))
                break
            else:
                done.add(id(node))
                stack.pop()


def used_names(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the values a node reads, those its subgraphs capture included (and their own, which do no harm)."""
    yield from filter(None, node.input)
    for graph in subgraphs(node):
        inner = {output for child in graph.node for output in child.output}
        inner |= {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        for child in graph.node:
            yield from (name for name in used_names(child) if name not in inner)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes (branches, loop bodies)."""
    for attribute in node.attribute:
        if attribute.type in _SUBGRAPHS:
            yield from ([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs)


def label(node: onnx.NodeProto) -> str:
    """A node in words: its operator and its name, or its first output."""
    return f"{node.op_type} {node.name or (node.output[0] if node.output else '')!r}"


def check_operators(model: ir.Model) -> None:
    """Raise `UnsupportedOp` for an operator or a domain that ONNX does not define and the model does not either."""
    known = {schema.domain for schema in onnx.defs.get_all_schemas()}
    for node in model.graph.all_nodes():
        version = model.opset_imports.get(node.domain)
        where = f"node {node.name or node.outputs[0].name!r}"
        if node.domain == contrib.DOMAIN and node.op_type in contrib.OPERATORS and node.graph is model.graph:
            continue  # replaced by standard operators
        if node.domain not in known:
            raise UnsupportedOp(
                f"{where} uses operator {node.domain}::{node.op_type}, of a domain that is not part of ONNX; "
                "export the model with standard operators"
            )
        if version is None:
            raise ModelError(f"{where} uses the domain {node.domain or 'ai.onnx'!r}, which the model does not import")
        if not onnx.defs.has(node.op_type, version, node.domain):
            raise UnsupportedOp(
                f"{where} uses operator {node.op_type!r}, which ONNX operator set {version}"
                f"{' of ' + node.domain if node.domain else ''} does not have"
            )


def check_external_data(model: ir.Model, folder: Path | None) -> None:
    """Raise `ModelError` unless every external weight lies, whole, in a file inside the model's own folder."""
    for tensor in external_tensors(model):
        location = os.fspath(tensor.location)
        where = f"weight {tensor.name!r}"
        if folder is None:
            raise ModelError(f"{where} lies in the file {location!r}, so give the model as a path, not as bytes")
        path = Path(os.path.realpath(folder / location))
        if os.path.isabs(location) or not path.is_relative_to(os.path.realpath(folder)):
            raise ModelError(f"{where} lies in {location!r}, outside the model's folder, which is not allowed")
        if not path.is_file():
            raise ModelError(f"{where} lies in the file {location!r}, which is not in the model's folder")
        status = path.stat()
        if status.st_nlink > 1:
            raise ModelError(f"{where} lies in {location!r}, which is a hard link to another file; make it a copy")
        needed = (tensor.offset or 0) + tensor.nbytes
        if tensor.length is not None and tensor.length != tensor.nbytes:
            raise ModelError(f"{where} needs {tensor.nbytes} bytes, but the model gives {tensor.length} for it")
        if status.st_size < needed:
            raise ModelError(
                f"{where} needs bytes up to {needed} of {location!r}, which has only {status.st_size}: the file is cut"
            )


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """All tensors of the model whose data lies in another file."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if not attribute.is_ref() and isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value
