"""AiM requests as text in the trace format of the public simulator, and back; who reads it can time the same stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from nestc.errors import TargetError
from nestc.runtime.aim.commands import KINDS, Command

# Source: arkhadem/aim_simulator, src/frontend/impl/memory_trace/aim_trace.cpp: a line a request, fields separated by
# one space, in the order opsize, GPR_addr_0, GPR_addr_1, channel_mask, bank_index, row_addr; a line whose first word is
# "#" is a comment. Our `column`, which no request has there and which does not change the time, is such a comment.
_COLUMN = "# column"

_LAST_CHANNEL = 31
"""The simulator numbers channels from the highest bit of a mask (``FindFirstChannelIndex``), but takes numbers for R/W
MEM; ours are numbered by bits, so that R/W MEM is written with the number that means the same channel there."""


def format_trace(commands: Sequence[Command]) -> str:
    """A line a request (two where it does not start at column 0), ready for the public simulator."""
    lines: list[str] = []
    for command in commands:
        column = getattr(command, "column", 0)
        if column:
            lines.append(f"{_COLUMN} {column}")
        lines.append(_line(command))
    return "\n".join(lines) + "\n"


def parse_trace(text: str) -> list[Command]:
    """The requests of a trace.

    Raises:
        TargetError: with the number of the line that is wrong.
    """
    commands: list[Command] = []
    column: int | None = None
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if words[:2] == _COLUMN.split():
            column = _integers(words[2:], 1, "# column", number)[0]
        if not words or words[0] == "#":
            continue
        form, values = _form(words, number)
        if column is not None:
            if not form.has_column:
                raise TargetError(f"line {number} of the trace: {form.word} does not start at a column")
            values = [*values, column]
        commands.append(form.kind(*values))
        column = None
    return commands


@dataclass(frozen=True)
class _Form:
    kind: type[Command]
    word: str
    names: tuple[str, ...]
    """Fields in the text, in order."""
    has_column: bool


def _forms() -> dict[str, _Form]:
    forms: dict[str, _Form] = {}
    for kind in KINDS:
        names = tuple(field.name for field in fields(kind))
        shown = tuple(name for name in names if name != "column")
        if kind.region == "CFR" and kind.name == "R":
            shown = ("cfr", "value")
        word = f"AiM {kind.name}" if kind.region == "AiM" else f"{kind.name} {kind.region}"
        forms[word] = _Form(kind, word, shown, "column" in names)
    return forms


_FORMS = _forms()
_BY_KIND = {form.kind: form for form in _FORMS.values()}


def _line(command: Command) -> str:
    form = _BY_KIND[type(command)]
    values: list[str] = []
    for name in form.names:
        value: int = getattr(command, name)
        if name == "channel":
            value = _LAST_CHANNEL - value
        values.append(f"{value:#010x}" if name == "mask" else str(value))
    return " ".join([form.word, *values])


def _form(words: list[str], number: int) -> tuple[_Form, list[int]]:
    head = " ".join([words[0], words[1].removeprefix("ISR_") if len(words) > 1 else ""])
    form = _FORMS.get(head)
    if form is None:
        raise TargetError(
            f"line {number} of the trace: there is no request '{head.strip()}'; there are {', '.join(_FORMS)}"
        )
    values = _integers(words[2:], len(form.names), form.word, number)
    if "channel" in form.names:
        place = form.names.index("channel")
        values[place] = _LAST_CHANNEL - values[place]
    return form, values


def _integers(words: list[str], count: int, what: str, number: int) -> list[int]:
    if len(words) != count:
        raise TargetError(f"line {number} of the trace: {what} takes {count} numbers, not {len(words)}")
    try:
        return [int(word, 16 if word[:2].lower() == "0x" else 10) for word in words]
    except ValueError as error:
        raise TargetError(f"line {number} of the trace: {' '.join(words)!r} are not all whole numbers") from error
