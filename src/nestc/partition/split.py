"""Splitting one heavy operator over devices: a region becomes parts that compute some of its output channels each.

A part is the whole region (what widens its operands, the product, its tail) with the constants of its channels, so what
crosses is as narrow as before; it takes its channels of a residual by a Slice, and a Concat joins the parts. Which
regions, and how, is decided by costs (`propose`); the solver then places the parts like any other region, and is free
to put both on one device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nestc.errors import PlanError
from nestc.graph.model import Model
from nestc.graph.region import Op, Region
from nestc.partition.network import compiled
from nestc.partition.problem import HOST, Crossing, Edge, Problem, Solution, edges_from, edges_into
from nestc.partition.segments import comparable

PRODUCTS = ("Conv", "Gemm", "MatMul")

GRAIN = 32
"""Parts have whole multiples of so many channels: two blocks of a 16-wide unit, and whole vectors of any CPU."""

LEAST_GAIN = 0.1
"""A split must promise to save so much of the region's time, since joining the parts and smaller loops cost too."""

LEAST_SHARE = 2e-3
"""And so much of the whole network's: each is three regions more to be measured and placed."""


@dataclass(frozen=True)
class Split:
    """Channels of each part of the region whose product is the node of that name."""

    node: str
    channels: tuple[int, ...]


def propose(problem: Problem, solution: Solution, regions: Mapping[str, Region]) -> list[Split]:
    """Regions that two devices would compute in less time than the one they are on, borders counted.

    The share of each is such that both end together. Where the other device has not the time, a region is left alone:
    it must be idle that long between what comes before everything beside the region and what comes after it.
    """
    into, out = edges_into(problem), edges_from(problem)
    when = _windows(problem, solution)
    resource = {unit.name: unit.resource for unit in problem.units}
    launch, at = {unit.name: unit.launch for unit in problem.units}, solution.assignment
    found: list[Split] = []
    for task in problem.tasks:
        region = regions.get(task.name)  # a piece of a region that was cut is small enough
        channels = 0 if region is None else channels_of(region)
        home = at[task.name]
        if region is None or channels < 2 * GRAIN:
            continue
        best: tuple[float, tuple[int, int]] | None = None
        for other in task.costs:
            if resource[other] == resource[home]:
                continue
            here, there = task.costs[home].seconds, task.costs[other].seconds
            # What it needs goes to the other device, and its part of the result to whoever reads it.
            sources = ((edge, HOST if edge.source is None else at[edge.source]) for edge in into[task.name])
            way = launch[other] + max((_way(edge, source, other) for edge, source in sources), default=0.0)
            ends = ((edge, HOST if edge.destination is None else at[edge.destination]) for edge in out[task.name])
            back = max((_way(edge, other, end) for edge, end in ends), default=0.0)
            share = (here - way) / (here + there + back)  # share x (there + back) + way = (1 - share) x here
            part = round(share * channels / GRAIN) * GRAIN
            if not 0 < part < channels:
                continue
            took = max((1 - part / channels) * here, part / channels * (there + back) + way)
            begin, end = when.get(task.name, (0.0, here))
            idle = end - begin - _busy(problem, solution, resource[other], (begin, end))
            if took > here - max(LEAST_GAIN * here, LEAST_SHARE * solution.value):
                continue
            if part / channels * there + way <= idle and (best is None or took < best[0]):
                best = took, (channels - part, part)
        if best is not None:
            found.append(Split(_product(region).name, best[1]))
    return found


def _when(problem: Problem, solution: Solution) -> dict[str, tuple[float, float]]:
    """About when each task runs, in seconds: those of a stage one after the other, in proportion to what they cost."""
    seconds = {task.name: {unit: cost.seconds for unit, cost in task.costs.items()} for task in problem.tasks}
    found: dict[str, tuple[float, float]] = {}
    for timed in solution.evaluation.times:
        stage = solution.stages[timed.stage]
        total = sum(seconds[task][stage.unit] for task in stage.tasks) or 1.0
        at = timed.begin
        for task in stage.tasks:
            end = at + (timed.end - timed.begin) * seconds[task][stage.unit] / total
            found[task] = at, end
            at = end
    return found


def _windows(problem: Problem, solution: Solution) -> dict[str, tuple[float, float]]:
    """From when to when what runs beside each task may run: between the tasks that everything passes through."""
    when = _when(problem, solution)
    if not when:
        return {}
    names = [task.name for task in problem.tasks]
    through = set(comparable(compiled(problem)))
    found: dict[str, tuple[float, float]] = {}
    begin = 0.0
    for index, name in enumerate(names):
        if index in through:
            found[name] = when[name]
            begin = when[name][1]
            continue
        after = next((when[names[other]][0] for other in range(index, len(names)) if other in through), None)
        found[name] = begin, solution.value if after is None else after
    return found


def _busy(problem: Problem, solution: Solution, resource: str, when: tuple[float, float]) -> float:
    """Seconds of an interval in which stages run on a resource."""
    here = {unit.name for unit in problem.units if unit.resource == resource}
    stages = [timed for timed in solution.evaluation.times if solution.stages[timed.stage].unit in here]
    return sum(max(0.0, min(timed.end, when[1]) - max(timed.begin, when[0])) for timed in stages)


def _way(edge: Edge, first: str, second: str) -> float:
    crossing = edge.crossings.get((first, second), Crossing())
    return crossing.out_seconds + crossing.wire_seconds + crossing.in_seconds


def channels_of(region: Region) -> int:
    """Output channels of a region that can be split by them; 0 for one that cannot."""
    if region.anchor not in PRODUCTS or len(region.outputs) != 1:
        return 0
    anchor = _product(region)
    if (anchor.attributes.get("group") or 1) != 1 or any(op.domain for op in region.ops):
        return 0
    widened = {op.outputs[0]: op.input(0) for op in region.ops if op.op_type == "DequantizeLinear"}
    weight, bias = anchor.input(1), anchor.input(2)
    data = widened.get(anchor.input(0), anchor.input(0))
    constant = all(widened.get(name, name) in region.constants for name in (weight, bias) if name)
    readers = sum(op.inputs.count(data) for op in region.ops)
    if not constant or readers != 1 or data not in region.inputs:
        return 0
    result = region.types[region.outputs[0]].shape
    if result != region.types[anchor.outputs[0]].shape or len(result) < 2:
        return 0
    # What else comes in is added or multiplied behind the product: a residual, of which each part takes its channels.
    if any(region.types[name].shape != result for name in region.inputs if name != data):
        return 0
    if len(region.types[weight].shape) != (2 if region.anchor != "Conv" else len(result)):
        return 0
    return result[_axis(region.anchor, len(result))]


def _axis(op_type: str, rank: int) -> int:
    """The axis of the result's channels."""
    return 1 if op_type == "Conv" else rank - 1


def _product(region: Region) -> Op:
    return next(op for op in region.ops if op.op_type == region.anchor)


def split(model: Model, splits: Sequence[Split], regions: Iterable[Region]) -> Model:
    """A copy of a model (not formed) in which some of its `regions` are computed in parts.

    Raises PlanError if there is no such region, or its channels are others.
    """
    made = model.clone()
    by_name = {node.name: node for node in made.ir.graph}
    nodes = [each.node for each in splits]
    twice = next((name for name in nodes if nodes.count(name) > 1), None)
    if twice is not None:
        raise PlanError(f"the plan splits node {twice!r} twice; give all its parts at once")
    owners = {_product(region).name: region for region in regions if channels_of(region)}
    for each in splits:
        region = owners.get(each.node)
        if region is None:
            raise PlanError(f"the plan splits node {each.node!r}, but the model has no such product that can be split")
        there = channels_of(region)
        if min(each.channels, default=0) < 1 or sum(each.channels) != there:
            raise PlanError(f"the plan splits {each.node!r} into {list(each.channels)} channels, but it has {there}")
        _split(made.ir.graph, region, [by_name[op.name] for op in region.ops], each.channels)
    made.notes.append(f"split over devices: {len(splits)} operators")
    return made


def _split(graph: ir.Graph, region: Region, nodes: Sequence[ir.Node], channels: Sequence[int]) -> None:
    anchor = next(node for node in nodes if node.op_type == region.anchor)
    result = next(value for node in nodes for value in node.outputs if value.name == region.outputs[0])
    rank = len(region.types[region.outputs[0]].shape)
    axis = _axis(anchor.op_type, rank)
    total = sum(channels)
    parts: list[ir.Value] = []
    first = 0
    for number, count in enumerate(channels):
        maker = _Part(graph, nodes, anchor, axis, rank, total, slice(first, first + count), f".part{number}")
        parts.append(maker.copy(result))
        first += count
    joined = ir.Value(name=f"{result.name}.joined", type=result.type, shape=result.shape)
    node = ir.node("Concat", parts, {"axis": axis}, outputs=[joined], name=f"{anchor.name}.join")
    node.version = anchor.version
    graph.insert_before(nodes[-1], node)
    label = result.name
    result.name = f"{label}.whole"
    result.replace_all_uses_with(joined, replace_graph_outputs=True)
    joined.name = label
    graph.remove(nodes, safe=True)


class _Part:
    """Copies the nodes of a region for some of its channels."""

    def __init__(
        self,
        graph: ir.Graph,
        nodes: Sequence[ir.Node],
        anchor: ir.Node,
        axis: int,
        rank: int,
        total: int,
        taken: slice,
        suffix: str,
    ) -> None:
        self.graph, self.nodes, self.anchor = graph, nodes, anchor
        self.axis, self.rank, self.total, self.taken, self.suffix = axis, rank, total, taken, suffix
        self.values: dict[ir.Value, ir.Value] = {}

    def copy(self, result: ir.Value) -> ir.Value:
        """Copy all nodes in front of the last of them; returns the copy of `result`."""
        before = {value for value in self.anchor.inputs if value is not None}
        for node in self.nodes:
            if node is self.anchor:
                self._anchor(node)
            elif any(value in before for value in node.outputs):
                self._operand(node)
            else:
                self._add(node, [self._tail_operand(node, value) for value in node.inputs], self._narrower(node))
        return self.values[result]

    def _anchor(self, node: ir.Node) -> None:
        axis = self._weight_axis()
        inputs = list(node.inputs)
        operands = [self.values.get(value, value) if value is not None else None for value in inputs]
        if inputs[1] is not None and inputs[1] not in self.values:
            operands[1] = self._slice(inputs[1], axis)
        if len(inputs) > 2 and inputs[2] is not None and inputs[2] not in self.values:
            operands[2] = self._last(inputs[2])
        self._add(node, operands, self._narrower(node))

    def _weight_axis(self) -> int:
        if self.anchor.op_type == "Conv":
            return 0
        transposed = self.anchor.op_type == "Gemm" and self.anchor.attributes.get_int("transB", 0)
        return 0 if transposed else 1

    def _operand(self, node: ir.Node) -> None:
        """What widens an operand of the product: that of the data is copied, constants are cut."""
        index = next(i for i, value in enumerate(self.anchor.inputs) if value is node.outputs[0])
        if index == 0:
            self._add(node, list(node.inputs), {})
            return
        value = node.inputs[0]
        assert value is not None and value.shape is not None
        rank = len(value.shape)
        axis = self._weight_axis() if index == 1 else rank - 1
        along = node.attributes.get_int("axis", 1) % rank
        operands: list[ir.Value | None] = [self._slice(value, axis) if index == 1 else self._last(value)]
        for extra in node.inputs[1:]:
            per_channel = extra is not None and _size(extra) == self.total > 1 and along == axis
            operands.append(self._slice(extra, 0) if per_channel and extra is not None else extra)
        self._add(node, operands, {axis: self.taken.stop - self.taken.start} if _size(value) > 1 else {})

    def _tail_operand(self, node: ir.Node, value: ir.Value | None) -> ir.Value | None:
        if value is None or value in self.values:
            return None if value is None else self.values[value]
        assert value.shape is not None
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and value is not node.inputs[0]:
            along = node.attributes.get_int("axis", 1) % self.rank
            return self._slice(value, 0) if along == self.axis and _size(value) == self.total > 1 else value
        place = len(value.shape) - (self.rank - self.axis)
        if place < 0 or value.shape[place] != self.total:
            return value
        return self._slice(value, place) if value.const_value is not None else self._taken(value, place)

    def _last(self, value: ir.Value) -> ir.Value:
        """A bias: along its last axis, unless it is one number for all."""
        assert value.shape is not None
        rank = len(value.shape)
        return self._slice(value, rank - 1) if rank and value.shape[rank - 1] == self.total else value

    def _narrower(self, node: ir.Node) -> dict[int, int]:
        return {self.axis: self.taken.stop - self.taken.start}

    def _slice(self, value: ir.Value, axis: int) -> ir.Value:
        """A constant's part as a new initializer."""
        assert value.const_value is not None
        array = value.const_value.numpy()
        cut = np.ascontiguousarray(array[(slice(None),) * axis + (self.taken,)])
        # Operators may share a constant and be split otherwise: zero points are often the same.
        name = f"{value.name}{self.suffix}.{axis}.{self.taken.start}_{self.taken.stop}"
        known = self.graph.initializers.get(name)
        if known is not None:
            return known
        tensor = ir.tensor(cut, dtype=value.const_value.dtype, name=name)
        made = ir.Value(name=name, type=value.type, shape=ir.Shape(cut.shape), const_value=tensor)
        self.graph.register_initializer(made)
        return made

    def _taken(self, value: ir.Value, axis: int) -> ir.Value:
        """The part's channels of a value that is computed, by a Slice."""
        if value in self.values:
            return self.values[value]
        assert value.shape is not None
        name = f"{value.name}{self.suffix}.{self.anchor.name}"
        numbers: list[ir.Value] = []
        for what, number in (("from", self.taken.start), ("to", self.taken.stop), ("along", axis)):
            tensor = ir.tensor(np.array([number], np.int64), name=f"{name}.{what}")
            made = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]), const_value=tensor)
            self.graph.register_initializer(made)
            numbers.append(made)
        shape = list(value.shape)
        shape[axis] = self.taken.stop - self.taken.start
        part = ir.Value(name=name, type=value.type, shape=ir.Shape(shape))
        node = ir.node("Slice", [value, *numbers], outputs=[part], name=f"{name}.slice")
        node.version = self.anchor.version
        # Before the product in any case, which is then fused with what follows it.
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        self.values[value] = part
        return part

    def _add(self, node: ir.Node, inputs: Sequence[ir.Value | None], sizes: Mapping[int, int]) -> None:
        """A copy of `node` on other inputs; its output has other sizes on some axes."""
        (output,) = node.outputs
        assert output.shape is not None
        shape = [sizes.get(index, size) for index, size in enumerate(output.shape)]
        made = ir.Value(name=f"{output.name}{self.suffix}", type=output.type, shape=ir.Shape(shape))
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            outputs=[made],
            name=f"{node.name}{self.suffix}",
            version=node.version,
            metadata_props=dict(node.metadata_props),
        )
        self.graph.insert_before(self.nodes[-1], copy)
        self.values[output] = made


def _size(value: ir.Value) -> int:
    assert value.shape is not None
    return int(np.prod([int(size) for size in value.shape if isinstance(size, int)], dtype=np.int64))
