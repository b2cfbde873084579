"""Resize and Upsample: copies for nearest, else a separable filter, rows first into a small buffer, then columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import ceil, prod

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Layout, Lowered
from nestc.kernels.operands import Operands
from nestc.kernels.resample import Resampling, resampling
from nestc.kernels.tail import Tail, tail_refusal
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, constant, load, splat
from nestc.tensor.ir import Buffer, Const, Expr, Fma, Load, Var
from nestc.tensor.rewrite import binary, cast, select
from nestc.tensor.vectorize import vectorize

_FLOATS = ("float32", "float64", "float16", "bfloat16")
_UNROLLED_TAPS = 16
# Positions in tables are inside by construction, which intervals cannot show; a mask that always holds says so.
_INSIDE = Const(True, "bool")


def _anchor(region: Region) -> Op | None:
    names = ("Resize", "Upsample")
    return next((op for op in region.ops if op.op_type in names and op.domain in ("", "ai.onnx")), None)


class Resize:
    """All modes for constant scales or sizes, in NCHWc or in ONNX's order."""

    name = "resize"

    def refusal(self, region: Region) -> str | None:
        """Why the region cannot be lowered here."""
        op = _anchor(region)
        if op is None:
            return "no Resize"
        x, y = region.types[op.inputs[0]], region.types[op.outputs[0]]
        if 0 in x.shape or 0 in y.shape or not x.shape:
            return f"{op.op_type} (node {op.name!r}) works on an empty tensor or a scalar"
        plan = resampling(op, region)
        if isinstance(plan, str):
            return plan
        if not plan.nearest and x.dtype not in _FLOATS:
            return f"{op.op_type} (node {op.name!r}) interpolates {x.dtype}"
        return tail_refusal(region, op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """NCHWc where the input comes so and neither batch nor channels change; else ONNX's order."""
        op = _anchor(region)
        assert op is not None
        plan = resampling(op, region)
        assert not isinstance(plan, str)
        block = machine.lanes("float32")
        shape = region.types[op.outputs[0]].shape
        blocked = incoming.get(op.inputs[0], PLAIN).block == block > 1
        own = Layout(block) if blocked and len(shape) > 2 and not {0, 1} & plan.axes.keys() else PLAIN
        chosen = {name: incoming.get(name, PLAIN) for name in region.inputs}
        for name in (*region.inputs, *region.outputs):
            if region.types[name].shape == shape:
                chosen[name] = own
        return {**chosen, op.inputs[0]: own}

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One kernel, parallel over rows of the output."""
        op = _anchor(region)
        assert op is not None
        plan = resampling(op, region)
        assert not isinstance(plan, str)
        operands = Operands(Builder("resize"), region, layouts)
        _Rows(op, plan, operands, machine).build()
        return Lowered((operands.launch(),), {}, operands.constants)


class _Rows:
    """Builds the kernel; a parallel iteration is one row of the output (of a channel block)."""

    def __init__(self, op: Op, plan: Resampling, operands: Operands, machine: CpuMachine) -> None:
        self.op = op
        self.plan = plan
        self.operands = operands
        self.builder = operands.builder
        self.source = op.inputs[0]
        type_ = operands.type(self.source)
        self.size, self.out = type_.shape, operands.type(op.outputs[0]).shape
        self.last = len(self.size) - 1
        self.block = operands.layout(self.source).block
        # Values that are only copied keep their type; halves are interpolated in float32.
        halves = type_.dtype in ("float16", "bfloat16") and not plan.nearest
        self.dtype = "float32" if halves else type_.dtype
        self.lanes = self.block or machine.lanes(type_.dtype)
        self.input = operands.buffer(self.source)
        self.tables = {axis: self.table(axis, "at", plan.axes[axis].positions, "int64") for axis in self.tabled()}
        self.weights: dict[int, Buffer] = {}
        if not plan.nearest:
            for axis, taps in plan.axes.items():
                self.weights[axis] = self.table(axis, "weight", taps.weights, self.dtype)
        self.outside = {
            axis: self.table(axis, "outside", taps.outside[:, None], "bool")
            for axis, taps in plan.axes.items()
            if taps.outside.any()
        }
        self.tail = Tail(operands, op)
        self.tail.declare()
        self.value = {n: self.builder.regs("value", (1,), n, self.dtype) for n in {1, self.lanes}}

    def tabled(self) -> list[int]:
        """Axes whose positions need a table: those of a repetition are computed."""
        return [axis for axis in self.plan.axes if self.repeat(axis) is None]

    def repeat(self, axis: int) -> int | None:
        """How many outputs copy each input in turn, if that is what happens along the axis."""
        taps = self.plan.axes[axis]
        factor = ceil(self.out[axis] / self.size[axis])
        if not self.plan.nearest or not np.array_equal(taps.positions[:, 0], np.arange(self.out[axis]) // factor):
            return None
        return factor

    def table(self, axis: int, what: str, array: np.ndarray, dtype: str) -> Buffer:
        """A packed constant as a parameter."""
        name = f"{self.op.outputs[0]}.{what}{axis}"
        self.operands.define(name, TensorType(dtype, array.shape))
        self.operands.constants[name] = np.ascontiguousarray(array.astype(dtype))
        return self.operands.buffer(name)

    def build(self) -> None:
        """The kernel."""
        lead = (self.size[0], ceil(self.size[1] / self.block)) if self.block else ()
        extents = (*lead, *self.out[len(lead) : self.last])
        with self.builder.parallel("row", *extents) as row:
            self.row = list(row)
            self.across = [axis for axis in self.plan.axes if axis != self.last]
            if self.plan.nearest:
                self.copy_row()
            elif self.last not in self.plan.axes and self.combinations() <= _UNROLLED_TAPS:
                self.sweep(self.size[self.last], self.down(), self.emit)
            else:
                self.filter_row()

    def combinations(self) -> int:
        """Taps of an output over all axes but the last."""
        return prod(self.plan.axes[axis].taps for axis in self.across)

    # -- places

    def read(self, row: Sequence[Expr], column: Expr, lanes: int) -> Expr:
        """Input at a row (one index an axis before the last, the channel block in NCHWc) and column."""
        index = (*row, column, ix.const(0)) if self.block else (*row, column)
        return cast(Load(self.input, index, lanes, _INSIDE), self.dtype)

    def sweep(self, extent: int, value: Callable[[Expr, int], Expr], use: Callable[[Expr, Expr, int], None]) -> None:
        """`use(column, value, lanes)` for every column, as vectors of channels or of neighbouring columns."""
        builder = self.builder
        if self.block:
            with builder.loop("col", extent) as i:
                use(i, value(i, self.lanes), self.lanes)
            return
        whole, rest = divmod(extent, self.lanes)
        with builder.loop("col", whole) as i:
            at = ix.mul(i, self.lanes)
            use(at, value(at, self.lanes), self.lanes)
        with builder.loop("col", rest) as i:
            at = ix.add(i, whole * self.lanes)
            use(at, value(at, 1), 1)

    def emit(self, column: Expr, value: Expr, lanes: int) -> None:
        """Store the outputs at `column` (and the next lanes - 1 in ONNX's order)."""
        register = self.value[lanes]
        for axis, flags in self.outside.items():
            at = column if axis == self.last else self.row[axis]
            instead = constant(self.plan.extrapolation, self.dtype, lanes)
            # Lanes along a row never meet a table of the last axis: rows that are resized are stored one by one.
            value = select(load(flags, at, 0), instead, value)
        self.builder.store(register, (0, 0), value)
        lane = Var("lane", lanes)
        if self.block:
            n, block, *rest = self.row
            index = (n, ix.add(ix.mul(block, self.block), lane), *rest, column)
        else:
            index = (*self.row, ix.add(column, lane)) if lanes > 1 else (*self.row, column)
        result = cast(Load(register, (ix.const(0), lane)), self.operands.type(self.op.outputs[0]).dtype)
        if lanes == 1:
            result = cast(load(register, 0, 0), self.operands.type(self.op.outputs[0]).dtype)
            self.builder.emit(self.tail.stores(index, result))
            return
        self.builder.emit(vectorize(self.tail.stores(index, result), lane, ix.const(0), lanes))

    # -- nearest

    def position(self, axis: int, o: Expr) -> Expr:
        """Input position of output `o` for a copied axis."""
        if axis not in self.plan.axes:
            return o
        factor = self.repeat(axis)
        return load(self.tables[axis], o, 0) if factor is None else ix.floordiv(o, factor)

    def copy_row(self) -> None:
        """Nearest: one load and one store."""
        where = self.builder.regs("where", (max(1, self.last),), 1, "int64")
        row: list[Expr] = []
        for axis, o in enumerate(self.row):
            self.builder.store(where, (axis, 0), self.position(axis, o))
            row.append(load(where, axis, 0) if axis in self.plan.axes else o)
        if self.last not in self.plan.axes:
            self.sweep(self.out[self.last], lambda at, lanes: self.read(row, at, lanes), self.emit)
            return
        lanes = self.lanes if self.block else 1
        factor = self.repeat(self.last)
        if factor is not None and factor * self.size[self.last] == self.out[self.last] and factor <= _UNROLLED_TAPS:
            with self.builder.loop("col", self.size[self.last]) as i:
                for j in range(factor):
                    self.emit(ix.add(ix.mul(i, factor), j), self.read(row, i, lanes), lanes)
            return
        with self.builder.loop("col", self.out[self.last]) as o:
            self.emit(o, self.read(row, self.position(self.last, o), lanes), lanes)

    # -- filters

    def down(self) -> Callable[[Expr, int], Expr]:
        """The filter over the axes before the last, written out: a function of column and lanes."""
        taps = [self.plan.axes[axis].taps for axis in self.across]
        where = self.builder.regs("where", (max(1, sum(taps)),), 1, "int64")
        factor = self.builder.regs("factor", (self.combinations(),), 1, self.dtype)
        first = {axis: sum(taps[:i]) for i, axis in enumerate(self.across)}
        for axis, count in zip(self.across, taps):
            for k in range(count):
                self.builder.store(where, (first[axis] + k, 0), load(self.tables[axis], self.row[axis], k))
        choices = list(product(*map(range, taps)))
        for j, choice in enumerate(choices):
            weight: Expr = constant(1, self.dtype)
            for i, (axis, k) in enumerate(zip(self.across, choice)):
                part = load(self.weights[axis], self.row[axis], k)
                weight = part if i == 0 else binary("mul", weight, part)
            self.builder.store(factor, (j, 0), weight)

        def value(column: Expr, lanes: int) -> Expr:
            total: Expr | None = None
            for j, choice in enumerate(choices):
                row = list(self.row)
                for axis, k in zip(self.across, choice):
                    row[axis] = load(where, first[axis] + k, 0)
                x, weight = self.read(row, column, lanes), splat(load(factor, j, 0), lanes)
                total = binary("mul", weight, x) if total is None else Fma(weight, x, total)
            assert total is not None
            return total

        return value

    def filter_row(self) -> None:
        """Filter down into a buffer of one input row, then along it."""
        builder, width = self.builder, self.size[self.last]
        if not self.across:
            self.along(lambda column, lanes: self.read(self.row, column, lanes))
            return
        line = builder.scratch("line", (width, self.block) if self.block else (width,), self.dtype)

        def place(column: Expr) -> tuple[Expr, ...]:
            return (column, ix.const(0)) if self.block else (column,)

        def keep(column: Expr, value: Expr, lanes: int) -> None:
            builder.store(line, place(column), value)

        if self.combinations() <= _UNROLLED_TAPS:
            self.sweep(width, self.down(), keep)
        else:
            self.sweep(width, lambda _, lanes: constant(0, self.dtype, lanes), keep)
            self.accumulate([], [], lambda column, lanes: Load(line, place(column), lanes), keep)
        read = lambda column, lanes: Load(line, place(column), lanes, _INSIDE)  # noqa: E731
        if self.last in self.plan.axes:
            self.along(read)
        else:
            self.sweep(width, read, self.emit)

    def accumulate(
        self,
        taps: list[Expr],
        weights: list[Expr],
        line: Callable[[Expr, int], Expr],
        keep: Callable[[Expr, Expr, int], None],
    ) -> None:
        """Wide filters: a loop over the taps of each axis adds one weighted input row at a time."""
        if len(taps) < len(self.across):
            axis = self.across[len(taps)]
            with self.builder.loop("tap", self.plan.axes[axis].taps) as k:
                at = load(self.tables[axis], self.row[axis], k)
                weight = load(self.weights[axis], self.row[axis], k)
                self.accumulate([*taps, at], [*weights, weight], line, keep)
            return
        row = list(self.row)
        for axis, at in zip(self.across, taps):
            row[axis] = at
        factor = weights[0]
        for weight in weights[1:]:
            factor = binary("mul", factor, weight)
        width = self.size[self.last]
        self.sweep(width, lambda c, lanes: Fma(splat(factor, lanes), self.read(row, c, lanes), line(c, lanes)), keep)

    def along(self, read: Callable[[Expr, int], Expr]) -> None:
        """The filter over the last axis, reading columns of a row."""
        builder, taps = self.builder, self.plan.axes[self.last].taps
        positions, weights = self.tables[self.last], self.weights[self.last]
        lanes = self.lanes if self.block else 1

        def term(o: Expr, k: Expr | int, total: Expr | None) -> Expr:
            x = read(load(positions, o, k), lanes)
            weight = splat(load(weights, o, k), lanes)
            return binary("mul", weight, x) if total is None else Fma(weight, x, total)

        total = builder.regs("total", (1,), lanes, self.dtype)
        with builder.loop("out", self.out[self.last]) as o:
            if taps <= _UNROLLED_TAPS:
                value: Expr | None = None
                for k in range(taps):
                    value = term(o, k, value)
                assert value is not None
                self.emit(o, value, lanes)
                return
            builder.store(total, (0, 0), constant(0, self.dtype, lanes))
            with builder.loop("tap", taps) as k:
                builder.store(total, (0, 0), term(o, k, load(total, 0, 0, lanes=lanes)))
            self.emit(o, load(total, 0, 0, lanes=lanes), lanes)


RESIZE = Resize()
