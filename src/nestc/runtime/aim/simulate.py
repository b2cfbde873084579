"""What AiM requests do, without time: banks, global buffers, accumulators and registers as numpy arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from nestc.errors import TargetError
from nestc.runtime.aim import activation
from nestc.runtime.aim.commands import (
    CFR_AF,
    CFR_BROADCAST,
    CFR_EWMUL,
    CFR_START,
    Af,
    Command,
    CopyBkGb,
    CopyGbBk,
    Eoc,
    EwAdd,
    EwMul,
    MacAbk,
    MacSbk,
    RdAf,
    RdMac,
    RdSbk,
    ReadCfr,
    ReadGpr,
    ReadMem,
    Sync,
    WrAbk,
    WrBias,
    WrGb,
    WriteCfr,
    WriteGpr,
    WriteMem,
    WrSbk,
    channels_of,
)
from nestc.runtime.aim.machine import AimMachine

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

NUMBERS = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
"""Formats of what banks, buffers and registers hold: 16 bits."""


def widen(values: Array) -> Array:
    """Numbers of 16 bits as float32, which holds every one of them."""
    if values.dtype == NUMBERS["bfloat16"]:
        # The 16 bits of a bfloat16 are the upper half of the same number as float32.
        return (np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def multiply_accumulate(accumulator: Array, weights: Array, vector: Array) -> Array:
    """What a MAC unit adds: the one place that says in which order and precision.

    Products of 16-bit numbers are exact in float32 (8 or 11 bits of significand each), but for overflow and underflow.
    The 16 products of a column are summed by a binary tree, neighbours first, each sum rounded to float32; columns are
    then added to the accumulator one after the other, in float32.

    The tree of 16 multipliers and an accumulator of its own in each bank are published (Lee et al., ISSCC 2022); their
    internal width is not, and float32, rounded to nearest even, is our assumption.

    Args:
        accumulator: float32 (...).
        weights: float32 (..., columns, lanes).
        vector: float32, to be broadcast against `weights`.

    Returns:
        The new accumulator, float32 (...).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        sums = weights * vector
        while sums.shape[-1] > 1:
            sums = sums[..., 0::2] + sums[..., 1::2]
        columns = np.ascontiguousarray(np.moveaxis(sums[..., 0], -1, 0))
        total = accumulator
        for column in columns:
            total = total + column
    return total


def narrow(values: Array, number: np.dtype[Any]) -> Array:
    """Float32 rounded to a 16-bit format, to nearest even: registers hold 16 bits a bank (simulator README, RD_MAC)."""
    with np.errstate(over="ignore"):
        return values.astype(number)


class Machine:
    """The state of a memory, and the execution of requests on it.

    Attributes:
        memory: (channels, banks, rows, columns, lanes), of the 16-bit format.
        global_buffer: (channels, columns, lanes).
        gpr: registers (count, lanes).
        accumulator: (channels, banks), float32.
        af: results of AF, (channels, banks).
        cfr: values of the configuration registers.
    """

    def __init__(
        self,
        machine: AimMachine,
        number: str = "bfloat16",
        rows: int = 1,
        gprs: int | None = None,
        *,
        memory: Array | None = None,
    ) -> None:
        """Everything is zero at start.

        Args:
            machine: geometry.
            number: ``bfloat16`` or ``float16``.
            rows: rows of each bank that are kept, from row 0; a whole machine would have gigabytes.
            gprs: registers that are kept; the machine's if not given.
            memory: what banks hold, in place of zeros; it is written to.

        Raises:
            TargetError: another format, or more rows than the machine has.
        """
        if number not in NUMBERS:
            raise TargetError(f"AiM has no numbers of format '{number}'; it has {', '.join(NUMBERS)}")
        self.number = NUMBERS[number]
        shape = (machine.channels, machine.banks, rows, machine.columns, machine.lanes)
        if memory is not None and (
            memory.shape[:2] + memory.shape[3:] != shape[:2] + shape[3:] or memory.dtype != self.number
        ):
            raise TargetError(
                f"banks of {number} have a shape like {list(shape)}, not {memory.dtype}{list(memory.shape)}"
            )
        self.machine = machine
        self.memory = np.zeros(shape, self.number) if memory is None else memory
        if not 1 <= self.memory.shape[2] <= machine.rows:
            raise TargetError(
                f"a bank of '{machine.name}' has {machine.rows} rows; {self.memory.shape[2]} cannot be kept"
            )
        self.global_buffer = np.zeros((machine.channels, machine.global_buffer_columns, machine.lanes), self.number)
        self.gpr = np.zeros((machine.gprs if gprs is None else gprs, machine.lanes), self.number)
        self.accumulator = np.zeros((machine.channels, machine.banks), np.float32)
        self.af = np.zeros((machine.channels, machine.banks), self.number)
        self.cfr = dict(CFR_START)

    def run(self, commands: Sequence[Command], writes: Iterable[Array] = ()) -> list[Array]:
        """Execute a stream (see `commands.check`).

        Args:
            commands: the stream.
            writes: what the host writes, (lanes,) for each WriteGpr and WriteMem in turn.

        Returns:
            What the host reads, (lanes,) for each ReadGpr and ReadMem in turn.

        Raises:
            TargetError: `writes` has too few items, or a row is not kept.
        """
        host = iter(writes)
        reads: list[Array] = []
        for index, command in enumerate(commands):
            row = getattr(command, "row", 0)
            if row >= self.memory.shape[2]:
                raise TargetError(
                    f"request {index} ({command.name}): row {row} is not among {self.memory.shape[2]} kept"
                )
            if isinstance(command, (WriteGpr, WriteMem)):
                item = next(host, None)
                if item is None:
                    raise TargetError(f"request {index}: the host has nothing left to write")
                self._host_write(command, np.asarray(item).astype(self.number))
            elif isinstance(command, ReadGpr):
                reads.append(self.gpr[command.gpr].copy())
            elif isinstance(command, ReadMem):
                reads.append(self.memory[command.channel, command.bank, command.row, command.column].copy())
            else:
                self.execute(command)
        return reads

    def execute(self, command: Command) -> None:
        """Execute a request that needs nothing from the host."""
        if isinstance(command, (MacAbk, MacSbk)):
            self._mac(command)
        elif isinstance(command, (WrGb, WrBias, WrSbk, WrAbk)):
            self._write(command)
        elif isinstance(command, (RdMac, RdAf, RdSbk)):
            self._read(command)
        elif isinstance(command, (CopyBkGb, CopyGbBk)):
            self._copy(command)
        elif isinstance(command, EwMul):
            self._multiply(command)
        elif isinstance(command, Af):
            channels = channels_of(command.mask)
            name = activation.FUNCTIONS[self._function()]
            result = activation.apply(name, self.accumulator[channels], self.number)
            self.af[channels] = narrow(result, self.number)
        elif isinstance(command, EwAdd):
            first, second = self.gpr[command.gpr :][: command.size], self.gpr[command.other :][: command.size]
            self.gpr[command.gpr : command.gpr + command.size] = narrow(widen(first) + widen(second), self.number)
        elif isinstance(command, WriteCfr):
            self.cfr[command.cfr] = command.value
        elif not isinstance(command, (Sync, Eoc, ReadCfr)):
            raise TargetError(f"{command.name} {command.region} needs the host; use run()")

    def _function(self) -> int:
        number = self.cfr[CFR_AF]
        if number >= len(activation.FUNCTIONS):
            raise TargetError(
                f"CFR_AF selects function {number}; there are {len(activation.FUNCTIONS)}: "
                f"{', '.join(activation.FUNCTIONS)}"
            )
        return number

    def _host_write(self, command: WriteGpr | WriteMem, item: Array) -> None:
        if isinstance(command, WriteGpr):
            self.gpr[command.gpr] = item
        else:
            self.memory[command.channel, command.bank, command.row, command.column] = item

    def _mac(self, command: MacAbk | MacSbk) -> None:
        channels = self._channels(command.mask)
        columns = slice(command.column, command.column + command.size)
        rows = self.memory[channels, :, command.row, columns]
        if isinstance(command, MacAbk):
            # The second bank of a pair is read as the vector, and computes nothing, if the vector is not broadcast.
            banks = slice(None, None, 2) if self.cfr[CFR_BROADCAST] else slice(None)
        else:
            banks = slice(command.bank, command.bank + 1)
        weights = widen(rows[:, banks])
        if self.cfr[CFR_BROADCAST]:
            first = banks.indices(self.machine.banks)[0] + 1
            vector = widen(rows[:, np.arange(first, first + 2 * weights.shape[1], 2) % self.machine.banks])
        else:
            vector = widen(self.global_buffer[channels, columns])[:, None]
        self.accumulator[channels, banks] = multiply_accumulate(self.accumulator[channels, banks], weights, vector)

    def _channels(self, mask: int) -> slice | list[int]:
        """An index for the channels of a mask: a slice, which makes no copy, where they are all."""
        return slice(None) if mask == (1 << self.machine.channels) - 1 else channels_of(mask)

    def _write(self, command: WrGb | WrBias | WrSbk | WrAbk) -> None:
        channels = channels_of(command.mask)
        if isinstance(command, WrGb):
            data = self.gpr[command.gpr : command.gpr + command.size]
            self.global_buffer[channels, command.column : command.column + command.size] = data
        elif isinstance(command, WrAbk):
            self.memory[channels, :, command.row, command.column] = self.gpr[command.gpr]
        else:
            data = self.gpr[command.gpr : command.gpr + len(channels)]
            if isinstance(command, WrBias):
                self.accumulator[channels] = widen(data)
            else:
                self.memory[channels, command.bank, command.row, command.column] = data

    def _read(self, command: RdMac | RdAf | RdSbk) -> None:
        channels = channels_of(command.mask)
        if isinstance(command, RdMac):
            data = narrow(self.accumulator[channels], self.number)
        elif isinstance(command, RdAf):
            data = self.af[channels]
        else:
            data = self.memory[channels, command.bank, command.row, command.column]
        self.gpr[command.gpr : command.gpr + len(channels)] = data

    def _copy(self, command: CopyBkGb | CopyGbBk) -> None:
        channels = channels_of(command.mask)
        columns = slice(command.column, command.column + command.size)
        if isinstance(command, CopyBkGb):
            self.global_buffer[channels, columns] = self.memory[channels, command.bank, command.row, columns]
        else:
            self.memory[channels, command.bank, command.row, columns] = self.global_buffer[channels, columns]

    def _multiply(self, command: EwMul) -> None:
        per_group = self.machine.banks_per_group
        end = self.machine.banks if self.cfr[CFR_EWMUL] else per_group
        columns = slice(command.column, command.column + command.size)
        channels = self._channels(command.mask)
        first = widen(self.memory[channels, 0:end:per_group, command.row, columns])
        second = widen(self.memory[channels, 1:end:per_group, command.row, columns])
        with np.errstate(over="ignore", invalid="ignore"):
            self.memory[channels, 2:end:per_group, command.row, columns] = narrow(first * second, self.number)
