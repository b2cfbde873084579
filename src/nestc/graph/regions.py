"""Regions: nodes that become one kernel, held in the model as calls of ONNX functions, and read out as plain data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from nestc.graph.cluster import Cluster, clusters, cut_cluster
from nestc.graph.kinds import has_body, widens
from nestc.graph.model import Model, dtype_name
from nestc.graph.region import AttributeValue, Op, Region, TensorType

DOMAIN = "nestc.region"
NAME_KEY = "nestc.region"
ANCHOR_KEY = "nestc.anchor"


def form(model: Model, alone: Collection[str] = (), cuts: Collection[str] = ()) -> Model:
    """A copy of `model` in which every node is inside a region.

    A region is a call of an ONNX function of the domain `DOMAIN`, so the result is still valid ONNX; weights stay in
    the main graph and are handed to the call. Nodes with a graph inside (If, Loop, Scan) stay as they are, each a
    region of its own, and so are the nodes named in `alone`. The regions come in an order in which they can run.
    A node named in `cuts` ends a region: with all it needs of its region it becomes one, and the rest another. Pieces
    have the number of the whole and a letter.
    """
    formed = model.clone()
    graph = formed.ir.graph
    found = clusters(graph, alone)
    pieces = [
        (name, piece)
        for index, cluster in enumerate(found)
        for name, piece in _named(index, cut_cluster(cluster, cuts) if cuts else [cluster])
    ]
    for name, cluster in pieces:
        if has_body(cluster.nodes[0]):
            node = cluster.nodes[0]
            node.metadata_props[NAME_KEY] = name
            graph.remove(node)
            graph.append(node)
            continue
        _outline(formed.ir, cluster, name)
    graph.opset_imports[DOMAIN] = 1
    formed.notes.append(f"regions: {len(pieces)} from {sum(len(cluster.nodes) for cluster in found)} operators")
    return formed


def _named(index: int, pieces: Sequence[Cluster]) -> list[tuple[str, Cluster]]:
    if len(pieces) == 1:
        return [(_region_name(f"{index:03d}", pieces[0]), pieces[0])]
    return [(_region_name(f"{index:03d}{chr(ord('a') + number)}", piece), piece) for number, piece in enumerate(pieces)]


def _region_name(number: str, cluster: Cluster) -> str:
    # What widens operands comes first and says little.
    first = next((i for i, node in enumerate(cluster.nodes) if not widens(node)), 0)
    ops = [node.op_type for node in cluster.nodes[first:]]
    shown = ops if len(ops) <= 5 else [*ops[:4], f"and{len(ops) - 4}"]
    return f"r{number}_{'_'.join(shown)}"


def _outline(model: ir.Model, cluster: Cluster, name: str) -> None:
    """Move the nodes of a cluster into a new function and put one call at the end of the graph."""
    inside = set(cluster.nodes)
    made = {value for node in cluster.nodes for value in node.outputs}
    taken = _unique(value for node in cluster.nodes for value in node.inputs if value is not None and value not in made)
    given = [value for node in cluster.nodes for value in node.outputs if _escapes(value, inside)]
    mapping = {value: _copy_value(value) for value in taken}
    body = [_copy_node(node, mapping) for node in cluster.nodes]
    opsets = {domain: version for domain, version in model.opset_imports.items() if domain != DOMAIN}
    function = ir.Function(
        DOMAIN,
        name,
        graph=ir.Graph(
            [mapping[value] for value in taken],
            [mapping[value] for value in given],
            nodes=body,
            opset_imports=opsets,
            name=name,
        ),
        attributes=(),
    )
    if cluster.anchor:
        function.metadata_props[ANCHOR_KEY] = cluster.anchor
    model.functions[function.identifier()] = function
    call = ir.Node(DOMAIN, name, taken, num_outputs=len(given), name=name)
    model.graph.append(call)
    for old, new in zip(given, call.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        label = old.name
        old.name = f"{label}.inside"
        new.name = label
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    model.graph.remove(cluster.nodes, safe=True)


def _escapes(value: ir.Value, inside: Collection[ir.Node]) -> bool:
    return value.is_graph_output() or any(user not in inside for user, _ in value.uses())


def _unique(values: Iterable[ir.Value]) -> list[ir.Value]:
    return list(dict.fromkeys(values))


def _copy_value(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type, shape=value.shape)


def _copy_node(node: ir.Node, mapping: dict[ir.Value, ir.Value]) -> ir.Node:
    """A node of the same operator on the mapped inputs; its outputs are added to `mapping`."""
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else mapping[value] for value in node.inputs],
        list(node.attributes.values()),
        outputs=[_copy_value(value) for value in node.outputs],
        overload=node.overload,
        name=node.name,
        version=node.version,
        metadata_props=dict(node.metadata_props),
    )
    mapping.update(zip(node.outputs, copy.outputs, strict=True))
    return copy


def regions(model: Model) -> list[Region]:
    """The regions of a formed model as plain data, in an order in which they can run."""
    return [_region(model.ir, node) for node in model.ir.graph]


def region_name(node: ir.Node) -> str:
    """The name of the region that a node of a formed main graph stands for."""
    return node.op_type if node.domain == DOMAIN else node.metadata_props.get(NAME_KEY, node.name or node.op_type)


def _region(model: ir.Model, node: ir.Node) -> Region:
    if node.domain != DOMAIN:
        return _bare_region(node)
    function = model.functions[node.op_identifier()]
    pairs = (*zip(function.inputs, node.inputs, strict=True), *zip(function.outputs, node.outputs, strict=True))
    outer = {inner.name or "": value.name or "" for inner, value in pairs if value is not None}
    types: dict[str, TensorType] = {}
    constants: dict[str, Callable[[], np.ndarray]] = {}
    inputs: list[str] = []
    for value in node.inputs:
        assert value is not None and value.name
        types[value.name] = tensor_type(value)
        if value.is_initializer() and value.const_value is not None:
            constants[value.name] = _reader(value.const_value)
        else:
            inputs.append(value.name)
    ops: list[Op] = []
    for inner in function:
        for value in inner.outputs:
            if value.name:  # an optional output that is left out has none
                types[outer.get(value.name, value.name)] = tensor_type(value)
        ops.append(_op(inner, outer))
    for value in node.outputs:  # the type outside is the one later passes keep up to date
        types[value.name or ""] = tensor_type(value)
    return Region(
        name=node.op_type,
        anchor=function.metadata_props.get(ANCHOR_KEY),
        ops=tuple(ops),
        inputs=tuple(inputs),
        outputs=tuple(value.name or "" for value in node.outputs),
        types=types,
        constants=constants,
    )


def _bare_region(node: ir.Node) -> Region:
    """A node that stands in the main graph itself, because a graph is inside it."""
    taken = _unique([*(value for value in node.inputs if value is not None), *captured(node)])
    constant = {value for value in taken if value.is_initializer() and value.const_value is not None}
    given = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    return Region(
        name=region_name(node),
        anchor=node.op_type,
        ops=(_op(node, {}),),
        inputs=tuple(value.name or "" for value in taken if value not in constant),
        outputs=tuple(value.name or "" for value in given),
        types={value.name: tensor_type(value) for value in (*taken, *node.outputs) if value.name},
        constants={value.name or "": _reader(value.const_value) for value in constant if value.const_value is not None},
    )


def captured(node: ir.Node) -> list[ir.Value]:
    """Values of the surrounding graph that the graphs inside a node read."""
    found: list[ir.Value] = []
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        graphs = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
        for graph in graphs:
            own = set(graph.inputs) | set(graph.initializers.values())
            own |= {value for inner in graph for value in inner.outputs}
            for inner in graph:
                found += [value for value in inner.inputs if value is not None and value not in own]
                found += [value for value in captured(inner) if value not in own]
            found += [value for value in graph.outputs if value not in own]
    return _unique(found)


def _reader(tensor: ir.TensorProtocol) -> Callable[[], np.ndarray]:
    return tensor.numpy


def tensor_type(value: ir.Value) -> TensorType:
    """The type of a value for a Region; -1 stands for a size that is not known, ``(-1,)`` for an unknown rank."""
    if value.shape is None:
        known = isinstance(value.type, ir.SequenceType | ir.OptionalType)
        return TensorType(dtype_name(value), () if known else (-1,))
    return TensorType(dtype_name(value), tuple(dim if isinstance(dim, int) else -1 for dim in value.shape))


def _op(node: ir.Node, outer: Mapping[str, str]) -> Op:
    def name(value: ir.Value | None) -> str:
        return "" if value is None or not value.name else outer.get(value.name, value.name)

    inputs = [name(value) for value in node.inputs]
    while inputs and not inputs[-1]:
        inputs.pop()
    attributes = {
        key: attribute_value(attribute)
        for key, attribute in node.attributes.items()
        if not attribute.is_ref() and attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    }
    return Op(node.op_type, tuple(inputs), tuple(map(name, node.outputs)), attributes, node.domain, node.name or "")


def attribute_value(attribute: ir.Attr) -> AttributeValue:
    """An attribute as a Python or numpy value; None for kinds that no kernel reads (types, sparse tensors)."""
    kind = ir.AttributeType
    if attribute.type == kind.TENSOR:
        return attribute.as_tensor().numpy()
    if attribute.type in (kind.INTS, kind.FLOATS, kind.STRINGS):
        return tuple(attribute.value)
    if attribute.type in (kind.INT, kind.FLOAT, kind.STRING):
        return attribute.value
    return None


def submodel(model: Model, names: Collection[str]) -> ir.Model:
    """A self-contained ONNX model, without functions, of some regions of a formed model, for another runtime.

    Its inputs are the values that come from outside, its outputs those used outside, under the same names.
    """
    chosen = [node for node in model.ir.graph if region_name(node) in set(names)]
    missing = set(names) - {region_name(node) for node in chosen}
    if missing:
        raise KeyError(f"the model has no region {sorted(missing)[0]!r}")
    inside = set(chosen)
    made = {value for node in chosen for value in node.outputs}
    taken = _unique(
        value for node in chosen for value in (*node.inputs, *captured(node)) if value is not None and value not in made
    )
    given = [value for node in chosen for value in node.outputs if _escapes(value, inside)]
    mapping = {value: _copy_value(value) for value in taken}
    constants = [value for value in taken if value.is_initializer() and value.const_value is not None]
    for value in constants:
        mapping[value].const_value = value.const_value
    nodes: list[ir.Node] = []
    for node in chosen:
        if node.domain != DOMAIN:
            nodes.append(_copy_with_body(node, mapping))
            continue
        function = model.ir.functions[node.op_identifier()]
        inner = {a: mapping[b] for a, b in zip(function.inputs, node.inputs, strict=True) if b is not None}
        nodes += [_copy_node(child, inner) for child in function]
        mapping.update((b, inner[a]) for a, b in zip(function.outputs, node.outputs, strict=True))
    opsets = {domain: version for domain, version in model.ir.opset_imports.items() if domain != DOMAIN}
    graph = ir.Graph(
        [mapping[value] for value in taken if value not in set(constants)],
        [mapping[value] for value in given],
        nodes=nodes,
        initializers=[mapping[value] for value in constants],
        opset_imports=opsets,
        name="partition",
    )
    for value, new in mapping.items():
        if new.type is None:
            new.type = value.type
    return ir.Model(graph, ir_version=model.ir.ir_version)


def _copy_with_body(node: ir.Node, mapping: dict[ir.Value, ir.Value]) -> ir.Node:
    """A copy of a node with graphs inside, whose captured values are the mapped ones."""
    copy = _copy_node(node, mapping)
    for key, attribute in node.attributes.items():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            copy.attributes[key] = ir.AttrGraph(key, _copy_graph(attribute.as_graph(), mapping))
        else:
            copy.attributes[key] = ir.AttrGraphs(key, [_copy_graph(graph, mapping) for graph in attribute.as_graphs()])
    return copy


def _copy_graph(graph: ir.Graph, outer: Mapping[ir.Value, ir.Value]) -> ir.Graph:
    mapping = dict(outer)
    for value in (*graph.inputs, *graph.initializers.values()):
        if value not in mapping:
            mapping[value] = _copy_value(value)
            mapping[value].const_value = value.const_value
    nodes = [_copy_with_body(node, mapping) for node in graph]
    return ir.Graph(
        [mapping[value] for value in graph.inputs],
        [mapping[value] for value in graph.outputs],
        nodes=nodes,
        initializers=[mapping[value] for value in graph.initializers.values()],
        name=graph.name,
    )
