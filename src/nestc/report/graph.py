"""The graph of a bundle: its regions, which of its inputs are weights, and where everything is drawn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from nestc.bundle.bundle import Bundle
from nestc.errors import BundleError
from nestc.graph.model import Model
from nestc.graph.region import Region, TensorType
from nestc.graph.regions import regions
from nestc.partition.plan import Plan
from nestc.report.layout import draw
from nestc.report.schema import BorderData, EdgeData, Figure
from nestc.report.work import nbytes


@dataclass(frozen=True)
class Graph:
    """Regions in execution order, and the values that are weights though the stored graph has them as inputs."""

    regions: tuple[Region, ...]
    weights: frozenset[str]


@dataclass(frozen=True)
class Drawn:
    """Places of the regions (their middles), the graph's inputs and outputs, the edges, and the size of it all."""

    places: Mapping[str, tuple[float, float]]
    borders: tuple[BorderData, ...]
    edges: tuple[EdgeData, ...]
    width: float
    height: float


def graph_of(bundle: Bundle) -> Graph:
    """The graph that a bundle carries. Raises BundleError if it has none."""
    if not bundle.graph:
        raise BundleError(f"bundle {bundle.name!r} holds no graph, so there is nothing to report; compile it again")
    try:
        model = Model(ir.from_proto(onnx.load_from_string(bundle.graph)))
    except (DecodeError, ValueError) as error:
        raise BundleError(f"the graph in bundle {bundle.name!r} cannot be read: {error}") from error
    border = {spec.name for spec in bundle.inputs}
    return Graph(tuple(regions(model)), frozenset(name for name in model.inputs if name not in border))


def drawn(graph: Graph, bundle: Bundle, plan: Plan) -> Drawn:
    """Place regions, inputs and outputs, and every value between them."""
    makers = {name: region.name for region in graph.regions for name in region.outputs}
    inputs = [spec.name for spec in bundle.inputs]
    # No region has such names.
    node = {("input", name): f"\1input {name}" for name in inputs}
    node |= {("output", spec.name): f"\1output {spec.name}" for spec in bundle.outputs}
    found: list[tuple[str, str | None, str | None]] = []
    for region in graph.regions:
        for name in dict.fromkeys(region.inputs):
            if name in makers or name in inputs:
                found.append((name, makers.get(name), region.name))
    for spec in bundle.outputs:
        found.append((spec.name, makers.get(spec.name), None))
    ends = [
        (node[("input", name)] if source is None else source, node[("output", name)] if user is None else user)
        for name, source, user in found
        if source is not None or name in inputs
    ]
    kept = [each for each in found if each[1] is not None or each[0] in inputs]
    names = [node[("input", name)] for name in inputs]
    names += [region.name for region in graph.regions]
    names += [node[("output", spec.name)] for spec in bundle.outputs]
    picture = draw(names, ends)
    types = _types(graph.regions, bundle)
    return Drawn(
        places=picture.places,
        borders=tuple(
            BorderData(name, kind, types[name].dtype, types[name].shape, *picture.places[place])
            for (kind, name), place in node.items()
        ),
        edges=_edges(kept, picture.paths, types, plan),
        width=picture.width,
        height=picture.height,
    )


def _edges(
    found: Sequence[tuple[str, str | None, str | None]],
    paths: Sequence[str],
    types: Mapping[str, TensorType],
    plan: Plan,
) -> tuple[EdgeData, ...]:
    device = {region.name: region.device for region in plan.regions}
    transfers = {(each.tensor, each.source, each.destination): each for each in plan.transfers}
    edges: list[EdgeData] = []
    for (name, source, user), path in zip(found, paths, strict=True):
        ends = [device.get(end, "") if end is not None else "host memory" for end in (source, user)]
        crossing = transfers.get((name, ends[0], ends[1]))
        inner = source is not None and user is not None
        edges.append(
            EdgeData(
                tensor=name,
                source=source,
                destination=user,
                dtype=types[name].dtype,
                shape=types[name].shape,
                bytes=nbytes(types[name]),
                crosses=inner and ends[0] != ends[1],
                us=None if crossing is None or not crossing.us else Figure(crossing.us, crossing.kind),
                path=path,
            )
        )
    return tuple(edges)


def _types(found: Collection[Region], bundle: Bundle) -> dict[str, TensorType]:
    """Types of all values at a border; -1 stands for a size that only a run tells."""
    types: dict[str, TensorType] = {}
    for region in found:
        types |= {name: region.types[name] for name in (*region.inputs, *region.outputs)}
    for spec in (*bundle.inputs, *bundle.outputs):
        shape = (-1,) if spec.shape is None else tuple(-1 if size is None else size for size in spec.shape)
        types.setdefault(spec.name, TensorType(spec.dtype, shape))
    return types
