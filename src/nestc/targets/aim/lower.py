"""A layer and its plan become one Tensor IR kernel: loads of buffers, bursts of MACs, openers and reads, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

import numpy as np

from nestc.runtime.aim.commands import CFR_EWMUL
from nestc.runtime.aim.layout import Array
from nestc.runtime.aim.machine import AimMachine
from nestc.targets.aim import intrinsics as aim
from nestc.targets.aim.layer import MatrixVector
from nestc.targets.aim.mapping import Plan
from nestc.tensor import index as ix
from nestc.tensor.ir import Buffer, Call, Expr, For, Intrinsic, Kernel, Stmt, Var, Window

VERSION = 1
"""Raised when kernels of the same layer and mapping change: stored choices are searched anew."""


@dataclass(frozen=True)
class _Fill:
    """Columns of global buffers of `mask` = registers of a vector, from register ``source`` on, at ``columns``."""

    source: int
    size: int
    columns: tuple[int, ...]
    mask: int


@dataclass(frozen=True)
class _Step:
    """One burst and its read: `size` columns of `row` from `column` on, in the channels of `mask`.

    ``fills`` come before it; ``bias`` is the register with what accumulators start from.
    """

    vector: int
    mask: int
    row: int
    column: int
    size: int
    bias: int
    first_read: int
    spoilt: int | None
    fills: tuple[_Fill, ...] = ()


@dataclass(frozen=True)
class _Near:
    """A step, with the ones before and after it."""

    before: _Step | None
    step: _Step
    after: _Step | None

    def follows(self, other: _Near) -> bool:
        """Whether this is what the next turn of a loop over `other` does."""
        pairs = ((self.before, other.before), (self.step, other.step), (self.after, other.after))
        for mine, others in pairs:
            if mine is None or others is None or mine.row != others.row + 1:
                return False
            if replace(mine, row=0, bias=0, first_read=0) != replace(others, row=0, bias=0, first_read=0):
                return False
        return True


def lower(layer: MatrixVector, found: Plan, machine: AimMachine) -> Kernel:
    """The kernel of a layer.

    Parameters: ``x`` what the host writes (registers of all vectors), ``<name>/weights`` the rows of the layer's own
    banks, ``<name>/bias`` constant registers (see `bias_registers`), ``y`` what the host reads.
    """
    return _Lowering(layer, found, machine).run()


def bias_registers(layer: MatrixVector, found: Plan, machine: AimMachine) -> Array:
    """Constant registers, float32 (n, lanes): what accumulators start from, one register a channel and step.

    Without a bias there are only those of one step, zeros.
    """
    layout = found.layout
    if not layout.bias_inside or layer.bias is None:
        return np.zeros((machine.channels, machine.lanes), np.float32)
    padded = np.zeros(layout.blocks * layout.banks, np.float32)
    padded[: layer.m] = layer.bias
    _, blocks = layout.steps
    registers = np.zeros((layout.spares + len(blocks), machine.channels, machine.lanes), np.float32)
    for step, active in enumerate(blocks):
        chosen = active[active >= 0]
        registers[step, : len(chosen), : layout.banks] = padded.reshape(-1, layout.banks)[chosen]
    return registers.reshape(-1, machine.lanes)


class _Lowering:
    def __init__(self, layer: MatrixVector, found: Plan, machine: AimMachine) -> None:
        self.layer, self.plan, self.machine = layer, found, machine
        layout = self.layout = found.layout
        self.set = aim.Set(machine, layout.number)
        # Most steps use the same intrinsics, which are made once.
        self.multiply, self.write_buffer = cache(self.set.multiply), cache(self.set.write_buffer)
        self.write_bias, self.read_sums = cache(self.set.write_bias), cache(self.set.read_sums)
        self.opener, self.apply = cache(self.set.open_row), cache(self.set.apply)
        self.moves = (self.set.write_register(), self.set.read_register())
        reads = len(layout.outputs)
        self.x = self.set.lines("x", layout.vectors * layout.inputs)
        self.y = self.set.lines("y", layout.vectors * reads)
        self.weights = self.set.banks(f"{layer.name}/weights", found.rows)
        registers = bias_registers(layer, found, machine)
        self.bias = self.set.lines(f"{layer.name}/bias", len(registers))
        self.gpr = self.set.registers(layout.inputs + machine.channels)
        self.gb, self.mac, self.af = self.set.buffers(), self.set.accumulators(), self.set.results()
        self.variables = 0

    def run(self) -> Kernel:
        steps = list(self.steps())
        body = [*self.configuration(), *self.fill_first(steps)]
        for group in self.runs(steps):
            body += group
        last = steps[-1]
        body += self.read_back(last, ix.const(last.first_read))
        locals_ = (self.gpr, self.gb, self.mac, *((self.af,) if self.plan.mapping.inside else ()))
        params = (self.x, self.weights, self.bias, self.y)
        return Kernel(self.layer.name, params, tuple(body), locals_, self.layer.origin)

    # --- what is to be done

    def steps(self) -> Iterator[_Step]:
        """Every burst of every vector."""
        layout, openers = self.layout, self.plan.spoilt
        slices, blocks = layout.steps
        reads = len(layout.outputs)
        for vector in range(layout.vectors):
            held = np.full(self.machine.channels, -1)
            read = vector * reads
            for item in range(self.plan.items):
                active = blocks[item] >= 0
                row, column = self.plan.place(item)
                fills = self.fills(vector, np.where(active & (slices[item] != held), slices[item], -1))
                held = np.where(active, slices[item], held)
                bias = item * self.machine.channels if layout.bias_inside else 0
                spoilt = openers[row] if openers and not column else None
                yield _Step(vector, _mask(active), row, column, layout.width, bias, read, spoilt, fills)
                read += int(active.sum())
            yield from self.spares(vector, read)

    def spares(self, vector: int, read: int) -> Iterator[_Step]:
        """The bursts of spare columns: -p and w times the same column of the vector."""
        layout, banks = self.layout, self.layout.banks
        slices, blocks = layout.steps
        for number, column in enumerate(self.plan.spares):
            active = np.any(blocks[number * banks : (number + 1) * banks] >= 0, axis=0)
            fills = [
                _Fill(int(piece) * layout.width + column, 1, (column - 1,), _mask(active & (slices[0] == piece)))
                for piece in np.unique(slices[0][active])
            ]
            row = self.plan.rows - 1
            bias = (self.plan.items + number) * self.machine.channels if layout.bias_inside else 0
            yield _Step(vector, _mask(active), row, column - 1, 2, bias, read, None, tuple(fills))
            read += int(active.sum())

    def fills(self, vector: int, wanted: Array) -> tuple[_Fill, ...]:
        """What brings the slices `wanted` (-1: none) into the buffers.

        A request of more columns than a queue has places stops the host, so that buffers are filled in parts.
        """
        layout = self.layout
        part = self.machine.queue - 1
        copies = min(self.plan.mapping.pack, self.plan.items)
        found: list[_Fill] = []
        for start in range(0, layout.width, part):
            size = min(part, layout.width - start)
            for piece in np.unique(wanted[wanted >= 0]).tolist():
                columns = tuple(copy * layout.width + start for copy in range(copies))
                found.append(_Fill(piece * layout.width + start, size, columns, _mask(wanted == piece)))
        return tuple(found)

    # --- statements

    def configuration(self) -> list[Stmt]:
        calls: list[Stmt] = []
        if self.plan.spoilt:
            calls.append(aim.configure(CFR_EWMUL, 0))
        if self.plan.mapping.inside and self.layer.activation is not None:
            calls.append(aim.select_function(self.layer.activation))
        return calls

    def fill_first(self, steps: list[_Step]) -> list[Stmt]:
        """The first row is opened, then the first vector is written, each part as it is needed."""
        first = steps[0]
        body = self.open_row(first)
        done: set[int] = set()
        for fill in first.fills:
            body += self.write_registers(0, self.missing((fill,), done))
            body += self.fill(fill)
        self.written = done
        return body

    def missing(self, fills: Iterable[_Fill], done: set[int]) -> list[int]:
        """Registers that `fills` read and the host has not written yet; they are `done` then."""
        wanted = [r for fill in fills for r in range(fill.source, fill.source + fill.size) if r not in done]
        done.update(wanted)
        return wanted

    def runs(self, steps: Sequence[_Step]) -> Iterator[list[Stmt]]:
        """Statements of all steps; steps that differ in nothing but their places become one loop."""
        near = [_Near(before, step, after) for before, step, after in zip([None, *steps], steps, [*steps[1:], None])]
        start = 0
        for end in range(1, len(near) + 1):
            if end < len(near) and near[end].follows(near[end - 1]):
                continue
            if end - start == 1:
                yield self.step(near[start], None)
            else:
                var = self.var("item", end - start)
                yield [For(var, tuple(self.step(near[start], var)))]
            start = end

    def step(self, near: _Near, var: Var | None) -> list[Stmt]:
        """One burst: accumulators are set, MACs, meanwhile the last results are read; then the new ones come.

        `var` moves rows, results and biases from step to step, where this is the body of a loop.
        """
        before, step, after = near.before, near.step, near.after
        body: list[Stmt] = []
        channels = self.machine.channels
        bias = _moved(step.bias, var, channels if self.layout.bias_inside else 0)
        body.append(self.call(self.write_bias(step.mask), (self.mac, None), (self.bias, bias)))
        place = _moved(step.row * self.machine.columns + step.column, var, self.machine.columns)
        multiply = self.multiply(step.size, step.mask)
        body.append(self.call(multiply, (self.mac, None), (self.weights, place), (self.gb, ix.const(step.column))))
        if before is not None:
            count = before.mask.bit_count()
            body += self.read_back(before, _moved(before.first_read, var, count))
        if after is not None:
            done = self.written if after.vector == step.vector else set[int]()
            body += self.write_registers(after.vector, self.missing(after.fills, done))
            self.written = done
        # The opener goes before the read, so that it hides behind the change of mode.
        if after is not None:
            body += self.open_row(after, var)
        body += self.sums(step)
        for fill in after.fills if after is not None else ():
            body += self.fill(fill)
        return body

    def sums(self, step: _Step) -> list[Stmt]:
        """Results go to registers, through the activation function where the memory applies it."""
        home = (self.gpr, ix.const(self.layout.inputs))
        if not self.plan.mapping.inside or self.layer.activation is None:
            return [self.call(self.read_sums(step.mask), home, (self.mac, None))]
        return [
            self.call(self.apply(self.layer.activation, step.mask), (self.af, None), (self.mac, None)),
            self.call(self.read_sums(step.mask, results=True), home, (self.af, None)),
        ]

    def open_row(self, step: _Step, var: Var | None = None) -> list[Stmt]:
        """EWMUL opens the row of a step, if it is one that openers spoil a column of."""
        if step.spoilt is None:
            return []
        place = _moved(step.row * self.machine.columns + step.spoilt, var, self.machine.columns)
        return [self.call(self.opener(step.mask), (self.weights, place))]

    def fill(self, fill: _Fill) -> list[Stmt]:
        write = self.write_buffer(fill.size, fill.mask)
        return [self.call(write, (self.gb, ix.const(c)), (self.gpr, ix.const(fill.source))) for c in fill.columns]

    def write_registers(self, vector: int, registers: list[int]) -> list[Stmt]:
        """The host writes registers of a vector; neighbours become a loop."""
        body: list[Stmt] = []
        base = vector * self.layout.inputs
        for _, run in groupby(enumerate(registers), lambda pair: pair[1] - pair[0]):
            first, *rest = [register for _, register in run]
            var = self.var("register", 1 + len(rest))
            to, source = (self.gpr, ix.add(var, first)), (self.x, ix.add(var, base + first))
            body.append(For(var, (self.call(self.moves[0], to, source),)))
        return body

    def read_back(self, step: _Step, place: Expr) -> list[Stmt]:
        """The host reads the registers of a step's results."""
        var = self.var("channel", step.mask.bit_count())
        home = (self.gpr, ix.add(var, self.layout.inputs))
        return [For(var, (self.call(self.moves[1], (self.y, ix.add(place, var)), home),))]

    def call(self, intrinsic: Intrinsic, *operands: tuple[Buffer, Expr | None]) -> Call:
        zero = ix.const(0)
        windows = [Window(b, (zero if i is None else i, *[zero] * (len(b.shape) - 1))) for b, i in operands]
        return Call(intrinsic, tuple(windows))

    def var(self, name: str, extent: int) -> Var:
        self.variables += 1
        return Var(f"{name}{self.variables}", extent)


def _moved(base: int, var: Var | None, by: int) -> Expr:
    return ix.const(base) if var is None or not by else ix.add(ix.mul(var, by), base)


def _mask(active: Array) -> int:
    return sum(1 << int(channel) for channel in np.flatnonzero(active))
