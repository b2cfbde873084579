"""Sums and products of whole values, element by element: what goes to which registers and columns, and its kernel.

Values lie in registers. EWADD adds registers to registers. For EWMUL the first operand goes to banks 0 of the bank
groups, the second to banks 1 (constants are there from the start), and products are read from banks 2. Results stay in
registers for what follows in the same launch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.aim.commands import CFR_EWMUL, Eoc
from nestc.runtime.aim.elements import ElementLayout, chunks_of
from nestc.runtime.aim.layout import Array
from nestc.runtime.aim.machine import AimMachine
from nestc.runtime.aim.timing import simulate_timing
from nestc.targets.aim import intrinsics as aim
from nestc.targets.aim.emit import Addresses, emit
from nestc.tensor import index as ix
from nestc.tensor.ir import Buffer, Call, Expr, For, Intrinsic, Kernel, Stmt, Var, Window

FIRST, SECOND, PRODUCT = 0, 1, 2
"""Banks of a group that EWMUL multiplies, and writes."""


@dataclass(frozen=True)
class Step:
    """``result = left <op> right``, ``op`` being ``mul`` or ``add``; values by name."""

    op: str
    left: str
    right: str
    result: str


@dataclass(frozen=True, eq=False)
class Elementwise:
    """Steps in order on values of `elements` numbers. ``inputs`` come from the host; ``constants``: float (elements,);
    ``outputs`` are results that are read. ``origin`` names the ONNX nodes."""

    name: str
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    constants: Mapping[str, Array]
    outputs: tuple[str, ...]
    elements: int
    origin: tuple[str, ...] = ()


@dataclass(frozen=True)
class Action:
    """One thing to do with all registers of a chunk.

    ``write``: the host writes input ``value`` to `slot`. ``multiply``: `slot` times ``other`` (-1: the constant of
    the block), to bank 2 of block ``value``. ``collect``: bank ``other`` of block ``value`` to `slot`. ``store``:
    `slot` to bank 0 of block ``value``. ``add``: ``other`` is added to `slot`. ``read``: output ``value``.
    """

    kind: str
    slot: int
    other: int = -1
    value: int = -1


@dataclass(frozen=True)
class ElementPlan:
    """A layer worked out for a machine; rows count from 0.

    ``slots``: values that registers hold at a time. A block is what one chunk of a value takes in a row: `width`
    columns of `groups` bank groups, in all channels. ``blocks``: by constant those of its chunks, then one that is only
    worked in (``scratch``).
    """

    layout: ElementLayout
    actions: tuple[Action, ...]
    slots: int
    groups: int
    width: int
    constants: int
    scratch: bool
    rows: int

    def place(self, block: int, chunk: int, columns: int) -> tuple[int, int]:
        """Row and column of a block; ``constants`` stands for the one to work in."""
        number = self.constants * self.layout.chunks if block == self.constants else block * self.layout.chunks + chunk
        row, column = divmod(number, columns // self.width)
        return row, column * self.width


def plan(layer: Elementwise, machine: AimMachine, number: str, gprs: int) -> ElementPlan:
    """The plan of a layer that may use `gprs` registers. Columns go to as many bank groups as there are columns.

    (How many groups work makes less than 2 % of the ticks, which the host's accesses to registers take.)

    Raises:
        TargetError: the machine's geometry or `gprs` do not allow any.
    """
    found = actions(layer)
    if machine.banks_per_group <= PRODUCT:
        raise TargetError(f"{layer.name}: a bank group of {machine.name} has no third bank for EWMUL to write")
    slots = 1 + max(action.slot for action in found)
    most = min(gprs // slots, machine.channels * machine.bank_groups * machine.columns)
    if most < 1:
        raise TargetError(f"{layer.name}: {gprs} registers do not hold {slots} values")
    chunks, registers = chunks_of(layer.elements, machine.lanes, most)
    each = math.ceil(registers / machine.channels)
    groups = min(each, machine.bank_groups)
    width = math.ceil(each / groups)
    constants = len(layer.constants)
    scratch = any(action.value == constants and action.kind in ("multiply", "store") for action in found)
    layout = ElementLayout(
        elements=layer.elements,
        number=number,
        lanes=machine.lanes,
        chunks=chunks,
        registers=registers,
        writes=tuple(action.value for action in found if action.kind == "write"),
        reads=tuple(action.value for action in found if action.kind == "read"),
    )
    rows = math.ceil((constants * chunks + scratch) / (machine.columns // width))
    return ElementPlan(layout, tuple(found), slots, groups, width, constants, scratch, rows)


def ticks(layer: Elementwise, found: ElementPlan, machine: AimMachine) -> int:
    """Modelled ticks of the first chunk."""
    layout = found.layout
    layout = replace(layout, elements=min(layout.elements, layout.registers * layout.lanes), chunks=1)
    kernel = lower(layer, replace(found, layout=layout), machine)
    return simulate_timing([*emit(kernel, Addresses(0, 0, 0), machine).commands, Eoc()], machine).ticks


def actions(layer: Elementwise) -> list[Action]:
    """What is done in order, with a slot of registers for every value that is alive."""
    return _Registers(layer).run()


class _Registers:
    """Slots by value while the steps of a layer are gone through."""

    def __init__(self, layer: Elementwise) -> None:
        self.layer = layer
        self.constants = list(layer.constants)
        self.scratch = len(self.constants)
        self.home: dict[str, int] = {}
        self.done: list[Action] = []

    def run(self) -> list[Action]:
        steps = self.layer.steps
        for index, step in enumerate(steps):
            later = {name for other in steps[index + 1 :] for name in (other.left, other.right)}
            (self.multiply if step.op == "mul" else self.add)(step, later)
            if step.result in self.layer.outputs:
                place = self.layer.outputs.index(step.result)
                self.done.append(Action("read", self.home[step.result], value=place))
            self.release(later)
        return self.done

    def multiply(self, step: Step, later: set[str]) -> None:
        fixed = next((name for name in (step.right, step.left) if name in self.constants), None)
        if fixed is not None:
            block, names = self.constants.index(fixed), (step.right if fixed == step.left else step.left,)
        else:
            block, names = self.scratch, (step.left, step.right)
        slots = [self.bring(name) for name in names]
        self.done.append(Action("multiply", slots[0], slots[1] if len(slots) > 1 else -1, block))
        self.release(later)
        self.home[step.result] = self.free()
        self.done.append(Action("collect", self.home[step.result], PRODUCT, block))

    def add(self, step: Step, later: set[str]) -> None:
        """EWADD destroys its first operand: one that is not needed any more, or a copy."""
        names = (step.left, step.right)
        places = [self.bring(name) for name in names]
        chosen = next((i for i in (0, 1) if names[i] not in later), None)
        if chosen is None:
            # One more copy: from the host or the banks where it came from, or through the banks.
            chosen = next((i for i in (0, 1) if names[i] in self.layer.inputs or names[i] in self.constants), 0)
            name, source, to = names[chosen], places[chosen], self.free()
            if name in self.layer.inputs:
                self.done.append(Action("write", to, value=self.layer.inputs.index(name)))
            elif name in self.constants:
                self.done.append(Action("collect", to, SECOND, self.constants.index(name)))
            else:
                self.done.append(Action("store", source, value=self.scratch))
                self.done.append(Action("collect", to, FIRST, self.scratch))
        else:
            to = places[chosen]
        self.done.append(Action("add", to, places[1 - chosen]))
        self.home[step.result] = to  # the value that was there is released

    def bring(self, name: str) -> int:
        """The slot of a value, which is filled if it is not there."""
        if name not in self.home:
            slot = self.home[name] = self.free()
            if name in self.constants:
                self.done.append(Action("collect", slot, SECOND, self.constants.index(name)))
            else:
                self.done.append(Action("write", slot, value=self.layer.inputs.index(name)))
        return self.home[name]

    def free(self) -> int:
        return next(slot for slot in range(len(self.home) + 1) if slot not in self.home.values())

    def release(self, later: set[str]) -> None:
        self.home = {name: slot for name, slot in self.home.items() if name in later}


def lower(layer: Elementwise, found: ElementPlan, machine: AimMachine) -> Kernel:
    """The kernel of a layer. Parameters: ``x`` what the host writes, ``<name>/banks`` the rows of the layer, ``y`` what
    the host reads."""
    return _Lowering(layer, found, machine).run()


def write_constants(memory: Array, base: int, layer: Elementwise, found: ElementPlan, machine: AimMachine) -> None:
    """Put constants in their places, rounded to nearest even.

    ``memory``: (channels, banks, rows, columns, lanes) of the 16-bit format; rows from `base` on are written.
    """
    for block, values in enumerate(layer.constants.values()):
        for chunk, registers in enumerate(found.layout.cut(np.asarray(values))):
            row, column = found.place(block, chunk, machine.columns)
            for register, line in enumerate(registers):
                place, channel = divmod(register, machine.channels)
                bank = place % found.groups * machine.banks_per_group + SECOND
                memory[channel, bank, base + row, column + place // found.groups] = line


class _Lowering:
    def __init__(self, layer: Elementwise, found: ElementPlan, machine: AimMachine) -> None:
        self.layer, self.plan, self.machine = layer, found, machine
        layout = self.layout = found.layout
        self.set = aim.Set(machine, layout.number)
        self.write_bank, self.read_bank = cache(self.set.write_bank), cache(self.set.read_bank)
        self.move_in, self.move_out = self.set.write_register(), self.set.read_register()
        self.sum = self.set.add_registers()
        chunk = layout.chunks * layout.registers
        self.x = self.set.lines("x", max(chunk * len(layout.writes), 1))
        self.y = self.set.lines("y", chunk * len(layout.reads))
        self.banks = self.set.banks(f"{layer.name}/banks", max(found.rows, 1))
        self.gpr = self.set.registers(found.slots * layout.registers)
        self.waiting: set[int] = set()
        self.variables = self.written = self.read = 0

    def run(self) -> Kernel:
        body: list[Stmt] = []
        if any(action.kind == "multiply" for action in self.plan.actions):
            body.append(aim.configure(CFR_EWMUL, 0 if self.plan.groups == 1 else 1))
        for chunk in range(self.layout.chunks):
            for action in self.plan.actions:
                body += self.action(action, chunk)
        return Kernel(self.layer.name, (self.x, self.banks, self.y), tuple(body), (self.gpr,), self.layer.origin)

    def action(self, action: Action, chunk: int) -> Iterator[Stmt]:
        """The statements of an action. What RD_SBK brings is waited for before it is used."""
        kind, slot = action.kind, action.slot
        if kind != "write" and kind != "collect" and {slot, action.other} & self.waiting:
            self.waiting.clear()
            yield aim.wait()
        if kind == "write":
            yield self.host(self.move_in, slot, self.x, self.written, write=True)
            self.written += self.layout.registers
        elif kind == "read":
            yield self.host(self.move_out, slot, self.y, self.read, write=False)
            self.read += self.layout.registers
        elif kind == "add":
            var = self.var("register", self.layout.registers)
            places = (ix.add(var, each * self.layout.registers) for each in (slot, action.other))
            yield For(var, (self.call(self.sum, *((self.gpr, place) for place in places)),))
        elif kind == "collect":
            yield from self.columns(slot, action.value, chunk, action.other, write=False)
            self.waiting.add(slot)
        else:
            yield from self.columns(slot, action.value, chunk, FIRST, write=True)
            if kind == "store":
                yield aim.wait()
                return
            if action.other >= 0:
                yield from self.columns(action.other, action.value, chunk, SECOND, write=True)
            mask = (1 << min(self.machine.channels, self.layout.registers)) - 1
            groups = 1 if self.plan.groups == 1 else self.machine.bank_groups
            step = self.set.multiply_banks(self.plan.width, mask, groups)
            yield self.call(step, (self.banks, ix.const(self.element(action.value, chunk))))

    def host(self, step: Intrinsic, slot: int, lines: Buffer, base: int, write: bool) -> Stmt:
        """The host writes or reads all registers of a slot."""
        var = self.var("register", self.layout.registers)
        register = (self.gpr, ix.add(var, slot * self.layout.registers))
        line = (lines, ix.add(var, base))
        return For(var, (self.call(step, *((register, line) if write else (line, register))),))

    def columns(self, slot: int, block: int, chunk: int, bank: int, write: bool) -> Iterator[Stmt]:
        """Registers of a slot to or from `bank` of each group: one request moves a register of every channel.

        The i-th register is in channel i mod channels; a column of every channel after the other, group by group.
        """
        channels, groups = self.machine.channels, self.plan.groups
        full, rest = divmod(self.layout.registers, channels)
        base = self.element(block, chunk)
        for group in range(groups):
            step = self.write_bank if write else self.read_bank
            place = group * self.machine.banks_per_group + bank
            count = len(range(group, full, groups))
            if count:
                var = self.var("column", count)
                register = ix.add(ix.mul(var, groups * channels), slot * self.layout.registers + group * channels)
                intrinsic = step((1 << channels) - 1, place)
                yield For(var, (self.transfer(intrinsic, ix.add(var, base), register, write),))
            if rest and full % groups == group:
                register = ix.const(slot * self.layout.registers + full * channels)
                intrinsic = step((1 << rest) - 1, place)
                yield self.transfer(intrinsic, ix.const(base + full // groups), register, write)

    def transfer(self, intrinsic: Intrinsic, column: Expr, register: Expr, write: bool) -> Call:
        bank, gpr = (self.banks, column), (self.gpr, register)
        return self.call(intrinsic, *((bank, gpr) if write else (gpr, bank)))

    def element(self, block: int, chunk: int) -> int:
        """The column, counted through all rows, at which a block begins."""
        row, column = self.plan.place(block, chunk, self.machine.columns)
        return row * self.machine.columns + column

    def call(self, intrinsic: Intrinsic, *operands: tuple[Buffer, Expr]) -> Call:
        windows = [Window(b, (i, *[ix.const(0)] * (len(b.shape) - 1))) for b, i in operands]
        return Call(intrinsic, tuple(windows))

    def var(self, name: str, extent: int) -> Var:
        self.variables += 1
        return Var(f"{name}{self.variables}", extent)
