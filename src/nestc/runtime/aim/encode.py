"""AiM requests as bytes, and back: 32 bytes each, the lowest byte of a number first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.aim.commands import KINDS, Command

RECORD_BYTES = 32

# Fields that a request does not have are zero. `code` is the place of the kind in KINDS; `operand` holds the second
# register of EWADD, the value of a configuration register or the channel of ordinary memory.
_RECORD = np.dtype(
    {
        "names": ["code", "bank", "size", "column", "cfr", "row", "gpr", "operand", "mask"],
        "formats": ["<u1", "<u1", "<u2", "<u2", "<u2", "<u4", "<u4", "<u4", "<u8"],
        "offsets": [0, 1, 2, 4, 6, 8, 12, 16, 24],
        "itemsize": RECORD_BYTES,
    }
)
_OPERANDS = ("other", "value", "channel")
_HIGHEST = {name: int(np.iinfo(_RECORD[name]).max) for name in _RECORD.names or ()}
_FIELDS = {kind: tuple(item.name for item in fields(kind)) for kind in KINDS}
_CODES = {kind: code for code, kind in enumerate(KINDS)}


def encode(commands: Sequence[Command]) -> bytes:
    """The records of `commands`.

    Raises:
        TargetError: a number does not fit its field.
    """
    records = np.zeros(len(commands), _RECORD)
    columns: dict[str, list[int]] = {name: [0] * len(commands) for name in _HIGHEST}
    for index, command in enumerate(commands):
        columns["code"][index] = _CODES[type(command)]
        for name in _FIELDS[type(command)]:
            value: int = getattr(command, name)
            place = _place(name)
            if not 0 <= value <= _HIGHEST[place]:
                raise TargetError(
                    f"request {index} ({command.name}): {name} is {value}; its field holds 0 to {_HIGHEST[place]}"
                )
            columns[place][index] = value
    for name, values in columns.items():
        records[name] = values
    return records.tobytes()


def decode(data: bytes) -> list[Command]:
    """The requests that `data` holds.

    Raises:
        TargetError: a cut record, an unknown code, or bits set in a field that the request does not have.
    """
    if len(data) % RECORD_BYTES:
        raise TargetError(
            f"a stream of AiM requests has {len(data)} bytes; it must be a multiple of {RECORD_BYTES}, so it is cut"
        )
    records = np.frombuffer(data, _RECORD)
    unknown = np.flatnonzero(records["code"] >= len(KINDS))
    if unknown.size:
        raise TargetError(f"request {unknown[0]}: there is no code {records['code'][unknown[0]]}")
    columns = {name: records[name].tolist() for name in _HIGHEST}
    codes: list[int] = columns.pop("code")
    commands: list[Command] = []
    for index, code in enumerate(codes):
        kind = KINDS[code]
        names = _FIELDS[kind]
        places = [_place(name) for name in names]
        if any(columns[place][index] for place in columns if place not in places):
            raise TargetError(f"request {index} ({kind.name}) has a number in a field that it does not have")
        commands.append(kind(*(columns[place][index] for place in places)))
    if encode(commands) != data:
        raise TargetError("a stream of AiM requests has bits set between its fields; it is damaged")
    return commands


def _place(name: str) -> str:
    return "operand" if name in _OPERANDS else name
