"""Tensor IR becomes AiM requests: every call is one, loops are unrolled into the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nestc.errors import TargetError
from nestc.runtime.aim.commands import (
    Af,
    Command,
    EwAdd,
    EwMul,
    MacAbk,
    RdAf,
    RdMac,
    RdSbk,
    ReadGpr,
    Sync,
    WrBias,
    WrGb,
    WriteCfr,
    WriteGpr,
    WrSbk,
)
from nestc.runtime.aim.machine import AimMachine
from nestc.targets.aim.intrinsics import Add, Bank, Column, Configure, Host, Register, Wait
from nestc.tensor import index as ix
from nestc.tensor.ir import Block, Call, Const, For, Kernel, Stmt, Window
from nestc.tensor.text import statement_text


@dataclass(frozen=True)
class Addresses:
    """Where a kernel's buffers lie: first row of its banks, first register of ``gpr`` and of its constants."""

    row: int
    gpr: int
    constants: int


@dataclass(frozen=True)
class Emitted:
    """Requests without EOC, and for each W GPR and R GPR the line of the host's numbers that it moves."""

    commands: list[Command]
    writes: list[int]
    reads: list[int]


def emit(kernel: Kernel, addresses: Addresses, machine: AimMachine) -> Emitted:
    """The requests of a kernel, in order.

    Raises TargetError, naming the statement, for one that is no request: an index that is not affine in the loops.
    """
    emitter = _Emitter(kernel, addresses, machine)
    commands: list[Command] = []
    for number, statement in enumerate(kernel.body):
        try:
            commands.extend(emitter.block((statement,), {}))
        except _Refused as problem:
            text = statement_text(statement)
            raise TargetError(
                f"kernel {kernel.name}, statement {number}: {problem}, so that it is no AiM request: {text}"
            ) from None
    return Emitted(commands, emitter.writes, emitter.reads)


class _Refused(Exception):
    """Why a statement is not a request."""


class _Emitter:
    def __init__(self, kernel: Kernel, addresses: Addresses, machine: AimMachine) -> None:
        self.addresses, self.machine = addresses, machine
        self.banks, self.constants = kernel.params[1].name, kernel.params[2].name if len(kernel.params) > 3 else ""
        self.writes: list[int] = []
        self.reads: list[int] = []
        self.forms: dict[int, tuple[Call, Callable[[Mapping[str, int]], Command]]] = {}

    def block(self, block: Block, values: dict[str, int]) -> Iterator[Command]:
        for statement in block:
            if isinstance(statement, For):
                for value in range(statement.var.extent):
                    values[statement.var.name] = value
                    yield from self.block(statement.body, values)
            else:
                yield self.form(statement)(values)

    def form(self, statement: Stmt) -> Callable[[Mapping[str, int]], Command]:
        """The request of a statement, given its loop variables; worked out once."""
        if not isinstance(statement, Call):
            raise _Refused("it is neither a loop nor a call")
        known = self.forms.get(id(statement))
        if known is None:
            known = self.forms[id(statement)] = (statement, self.request(statement))
        return known[1]

    def request(self, call: Call) -> Callable[[Mapping[str, int]], Command]:
        step = call.intrinsic
        if isinstance(step, Configure):
            command = WriteCfr(step.cfr, step.value)
            return lambda values: command
        if isinstance(step, Wait):
            return lambda values: Sync()
        places = [_affine(window) for window in call.operands]
        if isinstance(step, Host):
            return self.moves(step, call.operands, places)
        if isinstance(step, Register):
            return self.registers(step, call.operands, places)
        if isinstance(step, Column):
            return self.columns(step, call.operands, places)
        if isinstance(step, Bank):
            return self.bank(step, call.operands, places)
        if isinstance(step, Add):
            first, second = (self.register(window) for window in call.operands)
            to, other = places
            return lambda values: EwAdd(step.size, first + to(values), second + other(values))
        raise _Refused(f"there is no request {step.name}")

    def moves(
        self, step: Host, operands: Sequence[Window], places: Sequence[_Place]
    ) -> Callable[[Mapping[str, int]], Command]:
        to, source = places
        base = self.register(operands[0 if step.write else 1])

        def write(values: Mapping[str, int]) -> Command:
            self.writes.append(source(values))
            return WriteGpr(base + to(values))

        def read(values: Mapping[str, int]) -> Command:
            self.reads.append(to(values))
            return ReadGpr(base + source(values))

        return write if step.write else read

    def registers(
        self, step: Register, operands: Sequence[Window], places: Sequence[_Place]
    ) -> Callable[[Mapping[str, int]], Command]:
        mask = step.mask
        if step.request == "AF":
            return lambda values: Af(mask)
        which = 1 if step.request == "WR_BIAS" else 0
        place, base = places[which], self.register(operands[which])
        kind = {"WR_BIAS": WrBias, "RD_MAC": RdMac, "RD_AF": RdAf}[step.request]
        return lambda values: kind(base + place(values), mask)

    def columns(
        self, step: Column, operands: Sequence[Window], places: Sequence[_Place]
    ) -> Callable[[Mapping[str, int]], Command]:
        size, mask, columns = step.size, step.mask, self.machine.columns
        if step.request == "WR_GB":
            to, source, base = places[0], places[1], self.register(operands[1])
            return lambda values: WrGb(size, base + source(values), mask, to(values))
        which = 1 if step.request == "MAC_ABK" else 0
        if operands[which].buffer.name != self.banks:
            raise _Refused(f"{operands[which].buffer.name} is not in the banks")
        place, row = places[which], self.addresses.row
        if step.request == "EWMUL":
            return lambda values: EwMul(size, mask, row + place(values) // columns, place(values) % columns)
        vector = places[2]

        def multiply(values: Mapping[str, int]) -> Command:
            found, column = divmod(place(values), columns)
            if column != vector(values) or column + size > columns:
                raise _Refused("columns of the banks are not those of the global buffer")
            return MacAbk(size, mask, row + found, column)

        return multiply

    def bank(
        self, step: Bank, operands: Sequence[Window], places: Sequence[_Place]
    ) -> Callable[[Mapping[str, int]], Command]:
        write, columns = step.request == "WR_SBK", self.machine.columns
        which = 0 if write else 1
        if operands[which].buffer.name != self.banks:
            raise _Refused(f"{operands[which].buffer.name} is not in the banks")
        column, register, row = places[which], places[1 - which], self.addresses.row
        base, kind = self.register(operands[1 - which]), WrSbk if write else RdSbk

        def move(values: Mapping[str, int]) -> Command:
            found, start = divmod(column(values), columns)
            return kind(base + register(values), step.mask, step.bank, row + found, start)

        return move

    def register(self, window: Window) -> int:
        """First register of the buffer that an operand is in."""
        if window.buffer.memory == "aim.gpr":
            return self.addresses.gpr
        if window.buffer.name == self.constants:
            return self.addresses.constants
        raise _Refused(f"{window.buffer.name} is not in registers")


_Place = Callable[[Mapping[str, int]], int]


def _affine(window: Window) -> _Place:
    """The element of a window, given the loop variables."""
    base, terms = ix.linear(window.index[0])
    if any(not (isinstance(i, Const) and i.value == 0) for i in window.index[1:]):
        raise _Refused(f"the place in {window.buffer.name} is not where an element begins")
    names: list[tuple[str, int]] = []
    for term, factor in terms.items():
        name = getattr(term, "name", None)
        if name is None:
            raise _Refused(f"the place in {window.buffer.name} is not affine in the loops")
        names.append((name, factor))
    return lambda values: base + sum(values[name] * factor for name, factor in names)
