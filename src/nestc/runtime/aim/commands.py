"""Requests of an AiM memory: what a host sends, one record each, as the public simulator's trace names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from nestc.errors import TargetError
from nestc.runtime.aim.machine import AimMachine

# Source of names, fields and meanings: arkhadem/aim_simulator, src/base/request.h and README.md at 0f28a07.
# Common to all: `gpr` is a general register of 256 bits, `mask` has a bit for each channel (bit c is channel c), `size`
# counts columns of 256 bits. `column` is where to start; the simulator's trace has no such field (see trace.py).
# A request for n registers and channels takes consecutive registers, the lowest channel first.


class Request:
    """A request; each kind is a frozen record of integers. ``name`` is its word in a trace."""

    __slots__ = ()

    name: ClassVar[str]
    region: ClassVar[str] = "AiM"
    """``AiM``, or what is read or written: ``GPR``, ``CFR``, ``MEM``."""
    blocking: ClassVar[bool] = False
    """The host waits until every channel has answered."""
    register_mode: ClassVar[bool] = False
    """The channel must be in register mode, where banks cannot be used; each change of mode takes nMODCH ticks."""


@dataclass(frozen=True, slots=True)
class WrSbk(Request):
    """Write register ``gpr + i`` to a column of one bank of the i-th channel."""

    gpr: int
    mask: int
    bank: int
    row: int
    column: int = 0
    name: ClassVar[str] = "WR_SBK"


@dataclass(frozen=True, slots=True)
class WrAbk(Request):
    """Write a register to the same column of all banks of one channel, whose rows it closes."""

    gpr: int
    mask: int
    row: int
    column: int = 0
    name: ClassVar[str] = "WR_ABK"


@dataclass(frozen=True, slots=True)
class WrGb(Request):
    """Write ``size`` registers to columns of the global buffers: the same to every channel."""

    size: int
    gpr: int
    mask: int
    column: int = 0
    name: ClassVar[str] = "WR_GB"
    register_mode: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class WrBias(Request):
    """Set the MAC accumulators: lane b of register ``gpr + i`` to bank b of the i-th channel."""

    gpr: int
    mask: int
    name: ClassVar[str] = "WR_BIAS"
    register_mode: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class RdMac(Request):
    """Read the MAC accumulators, rounded to 16 bits: bank b of the i-th channel to lane b of register ``gpr + i``."""

    gpr: int
    mask: int
    name: ClassVar[str] = "RD_MAC"
    blocking: ClassVar[bool] = True
    register_mode: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class RdAf(Request):
    """Read the results of activation functions, placed as by ``RdMac``."""

    gpr: int
    mask: int
    name: ClassVar[str] = "RD_AF"
    blocking: ClassVar[bool] = True
    register_mode: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class RdSbk(Request):
    """Read a column of one bank of the i-th channel to register ``gpr + i``."""

    gpr: int
    mask: int
    bank: int
    row: int
    column: int = 0
    name: ClassVar[str] = "RD_SBK"


@dataclass(frozen=True, slots=True)
class CopyBkGb(Request):
    """Copy columns of one bank to the same columns of the global buffer."""

    size: int
    mask: int
    bank: int
    row: int
    column: int = 0
    name: ClassVar[str] = "COPY_BKGB"


@dataclass(frozen=True, slots=True)
class CopyGbBk(Request):
    """Copy columns of the global buffer to the same columns of one bank."""

    size: int
    mask: int
    bank: int
    row: int
    column: int = 0
    name: ClassVar[str] = "COPY_GBBK"


@dataclass(frozen=True, slots=True)
class MacSbk(Request):
    """Multiply columns of one bank with the same columns of the global buffer, and add to its accumulator."""

    size: int
    mask: int
    bank: int
    row: int
    column: int = 0
    name: ClassVar[str] = "MAC_SBK"


@dataclass(frozen=True, slots=True)
class MacAbk(Request):
    """Multiply columns of every bank with the same columns of the global buffer, and add to the accumulators."""

    size: int
    mask: int
    row: int
    column: int = 0
    name: ClassVar[str] = "MAC_ABK"


@dataclass(frozen=True, slots=True)
class Af(Request):
    """Apply the activation function that CFR_AF selects to the accumulators; ``RdAf`` reads the results."""

    mask: int
    name: ClassVar[str] = "AF"


@dataclass(frozen=True, slots=True)
class EwMul(Request):
    """In each bank group, multiply columns of its first two banks element by element into its third."""

    size: int
    mask: int
    row: int
    column: int = 0
    name: ClassVar[str] = "EWMUL"


@dataclass(frozen=True, slots=True)
class EwAdd(Request):
    """Add registers ``other + i`` to registers ``gpr + i``, element by element."""

    size: int
    gpr: int
    other: int
    name: ClassVar[str] = "EWADD"


@dataclass(frozen=True, slots=True)
class Sync(Request):
    """Wait until every channel has finished everything before."""

    name: ClassVar[str] = "SYNC"
    blocking: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Eoc(Request):
    """End of the computation: the last request of every stream."""

    name: ClassVar[str] = "EOC"
    blocking: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class WriteGpr(Request):
    """The host writes a register."""

    gpr: int
    name: ClassVar[str] = "W"
    region: ClassVar[str] = "GPR"


@dataclass(frozen=True, slots=True)
class ReadGpr(Request):
    """The host reads a register."""

    gpr: int
    name: ClassVar[str] = "R"
    region: ClassVar[str] = "GPR"


@dataclass(frozen=True, slots=True)
class WriteCfr(Request):
    """Set a configuration register, one of the ``CFR_`` numbers."""

    cfr: int
    value: int
    name: ClassVar[str] = "W"
    region: ClassVar[str] = "CFR"


@dataclass(frozen=True, slots=True)
class ReadCfr(Request):
    """The host reads a configuration register."""

    cfr: int
    value: int = 0
    name: ClassVar[str] = "R"
    region: ClassVar[str] = "CFR"


@dataclass(frozen=True, slots=True)
class WriteMem(Request):
    """The host writes a column of a bank, as to ordinary memory."""

    channel: int
    bank: int
    row: int
    column: int = 0
    name: ClassVar[str] = "W"
    region: ClassVar[str] = "MEM"


@dataclass(frozen=True, slots=True)
class ReadMem(Request):
    """The host reads a column of a bank, as from ordinary memory."""

    channel: int
    bank: int
    row: int
    column: int = 0
    name: ClassVar[str] = "R"
    region: ClassVar[str] = "MEM"


Command: TypeAlias = (
    WrSbk
    | WrAbk
    | WrGb
    | WrBias
    | RdMac
    | RdAf
    | RdSbk
    | CopyBkGb
    | CopyGbBk
    | MacSbk
    | MacAbk
    | Af
    | EwMul
    | EwAdd
    | Sync
    | Eoc
    | WriteGpr
    | ReadGpr
    | WriteCfr
    | ReadCfr
    | WriteMem
    | ReadMem
)

KINDS: tuple[type[Command], ...] = (
    WrSbk,
    WrGb,
    WrBias,
    RdMac,
    RdAf,
    RdSbk,
    CopyBkGb,
    CopyGbBk,
    MacSbk,
    MacAbk,
    Af,
    EwMul,
    EwAdd,
    WrAbk,
    Sync,
    Eoc,
    WriteGpr,
    ReadGpr,
    WriteCfr,
    ReadCfr,
    WriteMem,
    ReadMem,
)
"""Every kind of request; its place is its number in the binary form."""

CFR_BROADCAST, CFR_EWMUL, CFR_AF = 0, 1, 2
"""Configuration registers: the vector of MACs comes from the global buffer (0) or the next bank (1); EWMUL works in the
first bank group (0) or in all (1, the value at start); the activation function, a place in ``activation.FUNCTIONS``."""

CFR_LIMITS = {CFR_BROADCAST: 2, CFR_EWMUL: 2, CFR_AF: 8}
CFR_START = {CFR_BROADCAST: 0, CFR_EWMUL: 1, CFR_AF: 0}


def channels_of(mask: int) -> list[int]:
    """The channels of a mask, the lowest first."""
    return [channel for channel in range(mask.bit_length()) if mask >> channel & 1]


def check(commands: Sequence[Command], machine: AimMachine, gprs: int | None = None) -> None:
    """See that every field is one that the machine has, and that the stream ends with EOC.

    Args:
        commands: the stream.
        machine: where it is to run.
        gprs: registers there are, if fewer than the machine's.

    Raises:
        TargetError: names the request, the field and what would be right.
    """
    if not commands or not isinstance(commands[-1], Eoc):
        raise TargetError("a stream of AiM requests must end with EOC")
    limits = {
        "bank": machine.banks,
        "row": machine.rows,
        "channel": machine.channels,
        "cfr": len(CFR_LIMITS),
        "value": 8,
    }
    registers = machine.gprs if gprs is None else gprs
    for index, command in enumerate(commands):
        if isinstance(command, Eoc) and index != len(commands) - 1:
            raise TargetError(f"request {index} of {len(commands)} is EOC, which must be the last one")
        for field, limit in limits.items():
            _within(index, command, field, getattr(command, field, 0), limit)
        _check_columns(index, command, machine)
        _check_registers(index, command, registers)
        mask = getattr(command, "mask", 1)
        if not 0 < mask < 1 << machine.channels:
            raise TargetError(
                f"request {index} ({command.name}): the channel mask {mask:#x} must name at least one of "
                f"{machine.channels} channels, and no other"
            )
        if isinstance(command, WrAbk) and mask & (mask - 1):
            raise TargetError(f"request {index} (WR_ABK): it takes one channel, and the mask {mask:#x} names several")
        if isinstance(command, EwMul) and machine.banks_per_group < 3:
            raise TargetError(
                f"request {index} (EWMUL): it takes three banks of a group, and '{machine.name}' has "
                f"{machine.banks_per_group}"
            )
        if isinstance(command, WriteCfr):
            _within(index, command, "value", command.value, CFR_LIMITS[command.cfr])


def _within(index: int, command: Command, field: str, value: int, limit: int) -> None:
    if not 0 <= value < limit:
        raise TargetError(f"request {index} ({command.name}): {field} is {value}; it must be from 0 to {limit - 1}")


def _check_columns(index: int, command: Command, machine: AimMachine) -> None:
    size, column = getattr(command, "size", 1), getattr(command, "column", 0)
    if size < 1:
        raise TargetError(f"request {index} ({command.name}): size is {size}; it must be at least 1")
    if isinstance(command, EwAdd):
        return
    uses_buffer = isinstance(command, (WrGb, CopyBkGb, CopyGbBk, MacSbk, MacAbk))
    limit = min(machine.columns, machine.global_buffer_columns) if uses_buffer else machine.columns
    if not 0 <= column <= limit - size:
        raise TargetError(
            f"request {index} ({command.name}): columns {column} to {column + size - 1} are not all among the {limit} "
            f"of a {'global buffer' if uses_buffer else 'row'}"
        )


def _check_registers(index: int, command: Command, registers: int) -> None:
    if isinstance(command, (WrGb, EwAdd)):
        count = command.size
    elif isinstance(command, (WrBias, RdMac, RdAf, WrSbk, RdSbk)):
        count = command.mask.bit_count()
    else:
        count = 1
    for field in ("gpr", "other"):
        first = getattr(command, field, 0)
        if not 0 <= first <= registers - count:
            raise TargetError(
                f"request {index} ({command.name}): registers {first} to {first + count - 1} are not all among the "
                f"{registers} that there are"
            )


def count_kinds(commands: Iterable[Command]) -> dict[str, int]:
    """How many requests of each kind a stream has, by words such as ``MAC_ABK`` or ``W GPR``."""
    counts: dict[str, int] = {}
    for command in commands:
        word = command.name if command.region == "AiM" else f"{command.name} {command.region}"
        counts[word] = counts.get(word, 0) + 1
    return counts
