"""Layer, RMS, instance and group normalisation: the mean, squared deviations from it, and the map through the tail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from nestc.graph.region import Op, Region
from nestc.kernels.api import PLAIN, CpuMachine, Layout, Lowered
from nestc.kernels.operands import Operands
from nestc.kernels.rows import FLOATS, Row, merge_axes, rows_per_item, widen, work_dtype
from nestc.kernels.tail import Tail, tail_refusal
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, constant, less, load, splat
from nestc.tensor.ir import Binary, Expr, Fma, Load, Unary, Var
from nestc.tensor.rewrite import cast
from nestc.tensor.vectorize import vectorize

_OPS = frozenset({"LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization"})
_COST = 4  # passes over an element, roughly


class NormalizationFamily:
    """LayerNormalization, RMSNormalization, InstanceNormalization and GroupNormalization on floats."""

    name = "normalization"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        op = _anchor(region)
        if op is None:
            return f"its anchor is none of {', '.join(sorted(_OPS))}"
        type_ = region.types[op.inputs[0]]
        if type_.dtype not in FLOATS:
            return f"{op.op_type} (node {op.name!r}) on {type_.dtype} is not for this family"
        if 0 in type_.shape or not type_.shape:
            return f"{op.op_type} (node {op.name!r}) has no elements or no axis"
        if op.op_type == "GroupNormalization" and region.types[op.inputs[1]].shape != type_.shape[1:2]:
            return f"GroupNormalization (node {op.name!r}) has a scale for each group"
        merged = _merged(region, op)
        return merged if isinstance(merged, str) else tail_refusal(_without_statistics(merged, op), op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Everything row-major."""
        return dict.fromkeys((*region.inputs, *region.outputs), PLAIN)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One launch whose parallel items are groups of rows."""
        op = _anchor(region)
        assert op is not None
        merged = _merged(region, op)
        assert not isinstance(merged, str)
        return _Normalization(merged, op, machine).lower()


def _anchor(region: Region) -> Op | None:
    return next((op for op in region.ops if op.op_type in _OPS and not op.domain), None)


def _axis(region: Region, op: Op) -> int:
    """The first axis that is normalised as a whole."""
    if op.op_type in ("InstanceNormalization", "GroupNormalization"):
        return 2
    return int(op.attributes.get("axis", -1)) % len(region.types[op.inputs[0]].shape)  # type: ignore[arg-type]


def _merged(region: Region, op: Op) -> Region | str:
    """The region with the normalised axes as one; scale and bias of channels stay as they are."""
    rank, axis = len(region.types[op.inputs[0]].shape), _axis(region, op)
    fixed = op.inputs[1:] if axis == 2 and op.op_type in ("InstanceNormalization", "GroupNormalization") else ()
    if axis >= rank:
        return f"{op.op_type} (node {op.name!r}) has no spatial axis"
    return merge_axes(region, op, [n for n in fixed if n], [*([d] for d in range(axis)), list(range(axis, rank))])


def _without_statistics(region: Region, op: Op) -> Region:
    """The region whose outputs are those of the tail alone: mean and deviation are stored by the anchor itself."""
    return replace(region, outputs=tuple(n for n in region.outputs if n not in op.outputs[1:]))


@dataclass(frozen=True)
class _Statistics:
    """Of the row at hand: what is taken from x (None for RMS), and what it is then multiplied by."""

    mean: Expr | None
    factor: Expr


class _Normalization:
    def __init__(self, region: Region, op: Op, machine: CpuMachine) -> None:
        self.region, self.op, self.x = region, op, op.inputs[0]
        type_ = region.types[self.x]
        self.shape, self.dtype = type_.shape, work_dtype(type_.dtype)
        self.lanes = machine.lanes(self.dtype)
        self.groups = int(op.attributes.get("num_groups", 0))  # type: ignore[arg-type]
        self.by_channel = op.op_type in ("InstanceNormalization", "GroupNormalization")
        self.segments = self.shape[1] // self.groups if self.groups else 1
        self.lead = (self.shape[0], self.groups) if self.groups else self.shape[:-1]
        epsilon = op.attributes.get("epsilon", 1e-5)
        self.epsilon = float(epsilon) if isinstance(epsilon, (int, float)) else 1e-5
        self.k = Builder("normalize")
        self.operands = Operands(self.k, region, {})

    def lower(self) -> Lowered:
        """The launch."""
        k, operands = self.k, self.operands
        operands.buffer(self.x)
        self.tail = Tail(Operands(k, _without_statistics(self.region, self.op), {}), self.op)
        self.tail.operands = operands
        self.tail.declare()
        self.extra = [name if name in self.region.outputs else "" for name in (*self.op.outputs[1:], "", "")][:2]
        for name in filter(None, self.extra):
            operands.buffer(name)
        rows, n = prod(self.lead), self.shape[-1]
        count = rows_per_item(rows, n * self.segments * _COST)
        with k.parallel("item", rows // count) as (item,), k.loop("row", count) as r:
            self.row(ix.unflatten(ix.add(ix.mul(item, count), r), self.lead))
        return Lowered((operands.launch(),), constants=operands.constants)

    def index(self, lead: tuple[Expr, ...], segment: Expr, column: Expr) -> tuple[Expr, ...]:
        """Index of an element of a row."""
        if not self.groups:
            return (*lead, column)
        return (lead[0], ix.add(ix.mul(lead[1], self.segments), segment), column)

    def row(self, lead: tuple[Expr, ...]) -> None:
        """Statistics and map of one row."""
        k, lanes = self.k, self.lanes
        row = Row(k, self.shape[-1], lanes, self.dtype, segments=self.segments)
        found = self.statistics(row, lead)
        for name, value in zip(self.extra, (found.mean, found.factor)):
            if name:
                assert value is not None
                place = (*lead, *((ix.const(0),) * (len(self.operands.type(name).shape) - len(lead))))
                k.emit(self.operands.stores(name, place, cast(value, self.operands.type(name).dtype)))

        def finish(start: Expr, u: int, mask: Expr | None) -> None:
            lane = Var("lane", lanes)
            column = ix.add(start, lane)
            index = self.index(lead, row.segment, column)
            inside = None if mask is None else less(column, self.shape[-1])
            value = widen(Load(self.operands.buffer(self.x), index, 1, inside))
            if found.mean is not None:
                value = Binary("sub", value, found.mean)
            value = Binary("mul", value, found.factor)
            scale, bias = self.op.input(1), self.op.input(2)
            if scale:
                value = Binary("mul", value, self.parameter(scale, index, inside))
            if bias:
                value = Binary("add", value, self.parameter(bias, index, inside))
            value = cast(value, self.operands.type(self.op.outputs[0]).dtype)
            k.emit(vectorize(self.tail.stores(index, value), lane, ix.const(0), lanes))

        row.walk(finish, min(2, row.unroll))

    def parameter(self, name: str, index: tuple[Expr, ...], inside: Expr | None) -> Expr:
        """Scale or bias at an index of x."""
        if self.by_channel:
            return cast(self.operands.load(name, (index[1],)), self.dtype)
        return cast(self.operands.broadcast(name, index, inside), self.dtype)

    def statistics(self, row: Row, lead: tuple[Expr, ...]) -> _Statistics:
        """Two passes, so that a mean much larger than the deviation does no harm."""
        k, lanes = self.k, self.lanes
        share = constant(1 / (self.shape[-1] * self.segments), self.dtype)
        mean: Expr | None = None

        def x(start: Expr, mask: Expr | None) -> Expr:
            return widen(Load(self.operands.buffer(self.x), self.index(lead, row.segment, start), lanes, mask))

        if self.op.op_type != "RMSNormalization":
            average = k.regs("mean", (), 1, self.dtype)
            k.store(average, (0,), Binary("mul", row.reduce("add", x, 0.0), share))
            mean = load(average, 0)

        def square(start: Expr, mask: Expr | None) -> Expr:
            value = x(start, mask)
            if mean is not None:
                value = Binary("sub", value, splat(mean, lanes))
            return Binary("mul", value, value)

        variance = Fma(row.reduce("add", square, 0.0), share, constant(self.epsilon, self.dtype))
        factor = k.regs("factor", (), 1, self.dtype)
        k.store(factor, (0,), Binary("div", constant(1, self.dtype), Unary("sqrt", variance)))
        return _Statistics(mean, load(factor, 0))


NORMALIZATION = NormalizationFamily()
