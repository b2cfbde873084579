"""The files beside an ONNX model that hold some of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from nestc.importers.check import subgraphs
from nestc.importers.mapped import parse_mapped


def external_files(model: Path) -> list[Path]:
    """Files other than `model` itself that hold its weights, sorted. Raises OSError if it cannot be read."""
    proto = parse_mapped(model) or onnx.ModelProto.FromString(model.read_bytes())
    nodes = [node for function in proto.functions for node in function.node]
    names = {
        entry.value
        for tensor in (*_tensors(proto.graph), *_of_nodes(nodes))
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sorted(model.parent / name for name in names - {model.name})


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
        for inner in subgraphs(node):
            yield from _tensors(inner)
