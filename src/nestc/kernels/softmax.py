"""Softmax and LogSoftmax along any axis: maximum, sum of exponentials, and the quotient through the tail."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from nestc.graph.region import Op, Region
from nestc.kernels.api import PLAIN, CpuMachine, Layout, Lowered
from nestc.kernels.operands import Operands
from nestc.kernels.rows import FLOATS, Row, merge_axes, rows_per_item, widen, work_dtype
from nestc.kernels.tail import Tail, tail_refusal
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, constant, load, splat
from nestc.tensor.ir import Binary, Expr, Load, Ramp, Unary, Var
from nestc.tensor.math import exp_below
from nestc.tensor.rewrite import cast
from nestc.tensor.vectorize import vectorize

_STACK_BYTES = 16 << 10  # a row of exponentials up to this size is kept on the stack, a longer one in scratch
_COST = 6  # passes over an element, roughly


class SoftmaxFamily:
    """Softmax and LogSoftmax of floating-point tensors (half types are computed in float32)."""

    name = "softmax"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        op = _anchor(region)
        if op is None:
            return "its anchor is neither Softmax nor LogSoftmax"
        type_ = region.types[op.inputs[0]]
        if type_.dtype not in FLOATS:
            return f"{op.op_type} (node {op.name!r}) on {type_.dtype} is not for this family"
        if 0 in type_.shape or not type_.shape:
            return f"{op.op_type} (node {op.name!r}) has no elements or no axis"
        merged = _merged(region, op)
        return merged if isinstance(merged, str) else tail_refusal(region, op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Everything row-major."""
        return dict.fromkeys((*region.inputs, *region.outputs), PLAIN)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One launch: by rows if the axis is the last, else by vectors of neighbouring columns."""
        op = _anchor(region)
        assert op is not None
        merged = _merged(region, op)
        assert not isinstance(merged, str)
        return _Softmax(merged, op, machine).lower()


def _anchor(region: Region) -> Op | None:
    return next((op for op in region.ops if op.op_type in ("Softmax", "LogSoftmax") and not op.domain), None)


def _merged(region: Region, op: Op) -> Region | str:
    """The region over (outer..., axis, inner); the outer axes stay, as rows are numbered through them anyway."""
    rank = len(region.types[op.inputs[0]].shape)
    axis = int(op.attributes.get("axis", -1)) % rank  # type: ignore[arg-type]
    inner = [list(range(axis + 1, rank))] if axis + 1 < rank else []
    return merge_axes(region, op, (), [*([d] for d in range(axis + 1)), *inner])


class _Softmax:
    def __init__(self, region: Region, op: Op, machine: CpuMachine) -> None:
        self.op, self.x = op, op.inputs[0]
        self.shape, self.dtype = region.types[self.x].shape, work_dtype(region.types[self.x].dtype)
        axis = int(op.attributes.get("axis", -1))  # type: ignore[arg-type]
        self.last = axis in (-1, len(self.shape) - 1)
        self.lead = self.shape[:-1] if self.last else self.shape[:-2]
        self.n = self.shape[-1] if self.last else self.shape[-2]
        self.lanes = machine.lanes(self.dtype)
        self.log = op.op_type == "LogSoftmax"
        self.k = Builder("softmax")
        self.operands = Operands(self.k, region, {})

    def lower(self) -> Lowered:
        """The launch."""
        k, operands = self.k, self.operands
        operands.buffer(self.x)
        self.tail = Tail(operands, self.op)
        self.tail.declare()
        length = self.n if self.last else self.n * self.lanes
        memory = k.stack if length * 8 <= _STACK_BYTES else k.scratch
        if self.last:
            if not self.log:
                self.line = memory("line", (-(-self.n // self.lanes) * self.lanes,), self.dtype)
            rows = prod(self.lead)
            count = rows_per_item(rows, self.n * _COST)
            with k.parallel("item", rows // count) as (item,), k.loop("row", count) as r:
                self.row(ix.unflatten(ix.add(ix.mul(item, count), r), self.lead))
        else:
            if not self.log:
                self.line = memory("line", (self.n, self.lanes), self.dtype)
            blocks = -(-self.shape[-1] // self.lanes)
            rows = prod(self.lead) * blocks
            count = rows_per_item(rows, self.n * self.lanes * _COST)
            with k.parallel("item", rows // count) as (item,), k.loop("row", count) as r:
                row, block = ix.unflatten(ix.add(ix.mul(item, count), r), (prod(self.lead), blocks))
                self.columns(ix.unflatten(row, self.lead), ix.mul(block, self.lanes))
        return Lowered((operands.launch(),), constants=operands.constants)

    def row(self, lead: tuple[Expr, ...]) -> None:
        """One row along the last axis."""
        k, lanes = self.k, self.lanes
        row = Row(k, self.n, lanes, self.dtype)

        def x(start: Expr, mask: Expr | None) -> Expr:
            return widen(Load(self.operands.buffer(self.x), (*lead, start), lanes, mask))

        top = row.reduce("max", x, float("-inf"))

        def exponential(start: Expr, mask: Expr | None) -> Expr:
            e = exp_below(Binary("sub", x(start, mask), splat(top, lanes)))
            if self.log:
                return e
            k.store(self.line, (start,), e)
            return load(self.line, start, lanes=lanes)

        total = row.reduce("add", exponential, 0.0)
        factor = self.factor(total)

        def finish(start: Expr, u: int, mask: Expr | None) -> None:
            lane = Var("lane", lanes)
            column = ix.add(start, lane)
            inside = None if mask is None else Binary("lt", column, ix.const(self.n))
            if self.log:
                here = widen(Load(self.operands.buffer(self.x), (*lead, column), 1, inside))
                value = Binary("sub", Binary("sub", here, top), factor)
            else:
                value = Binary("mul", Load(self.line, (column,)), factor)
            self.store((*lead, column), value, lane)

        row.walk(finish, 1)

    def columns(self, lead: tuple[Expr, ...], start: Expr) -> None:
        """Neighbouring columns, one a lane, along an axis that is not the last."""
        k, lanes, n, width = self.k, self.lanes, self.n, self.shape[-1]
        ragged = width % lanes != 0
        mask = Binary("lt", Ramp(start, 1, lanes), splat(ix.const(width), lanes)) if ragged else None
        top, total = (k.regs(name, (), lanes, self.dtype) for name in ("top", "total"))

        def x(i: Expr) -> Expr:
            return widen(Load(self.operands.buffer(self.x), (*lead, i, start), lanes, mask))

        k.store(top, (0,), constant(float("-inf"), self.dtype, lanes))
        with k.loop("i", n) as i:
            k.store(top, (0,), Binary("max", load(top, 0, lanes=lanes), x(i)))
        k.store(total, (0,), constant(0, self.dtype, lanes))
        with k.loop("i", n) as i:
            e: Expr = exp_below(Binary("sub", x(i), load(top, 0, lanes=lanes)))
            if not self.log:
                k.store(self.line, (i, 0), e)
                e = load(self.line, i, 0, lanes=lanes)
            k.store(total, (0,), Binary("add", load(total, 0, lanes=lanes), e))
        k.store(total, (0,), self.factor(load(total, 0, lanes=lanes)))
        with k.loop("i", n) as i:
            lane = Var("lane", lanes)
            column, factor = ix.add(start, lane), Load(total, (lane,))
            if self.log:
                inside = Binary("lt", column, ix.const(width)) if ragged else None
                here = widen(Load(self.operands.buffer(self.x), (*lead, i, column), 1, inside))
                value = Binary("sub", Binary("sub", here, Load(top, (lane,))), factor)
            else:
                value = Binary("mul", Load(self.line, (i, lane)), factor)
            self.store((*lead, i, column), value, lane)

    def factor(self, total: Expr) -> Expr:
        """What an exponential is multiplied by; for the logarithm, what is taken from x - maximum."""
        if self.log:
            return Unary("log", total)
        return Binary("div", constant(1, self.dtype, total.lanes), total)

    def store(self, index: tuple[Expr, ...], value: Expr, lane: Var) -> None:
        """Store one vector through the tail."""
        value = cast(value, self.operands.type(self.op.outputs[0]).dtype)
        self.k.emit(vectorize(self.tail.stores(index, value), lane, ix.const(0), self.lanes))


SOFTMAX = SoftmaxFamily()
