"""Instructions to VTA's 128-bit words and back, and micro-ops to 32-bit words and back (tvm-vta ``hw_spec.h``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.fields import INSTRUCTION_BITS, UOP_BITS, WORD_BITS, Field, Layout
from nestc.runtime.vta.isa import Alu, AluOp, Finish, Gemm, Instruction, Load, MemoryId, Store, Tokens

INSTRUCTION_BYTES = INSTRUCTION_BITS // 8
UOP_BYTES = UOP_BITS // 8

_TOKENS = ("pop_prev", "pop_next", "push_prev", "push_next")
# Every value of the four token bits, the lowest first.
_ALL_TOKENS = tuple(Tokens(bool(n & 1), bool(n & 2), bool(n & 4), bool(n & 8)) for n in range(16))


class EncodingError(TargetError):
    """A value does not fit the bits of its field; ``index`` is the instruction's, or the micro-op's."""

    def __init__(self, message: str, index: int) -> None:
        """Keeps the index beside the message, for those who know the place by another name."""
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class _Form:
    """How a class of instructions is written: its struct, its opcode, and fields that always hold the same number."""

    kind: type[Load] | type[Store] | type[Gemm] | type[Alu] | type[Finish]
    name: str
    layout: str
    opcode: int
    fixed: dict[str, int] = field(default_factory=dict[str, int])

    def own(self, layout: Layout) -> list[Field]:
        """Fields that hold what the instruction says: its tokens first."""
        return [f for f in layout.fields if f.name != "opcode" and f.name not in self.fixed]


# Opcodes: hw_spec_const.h. A STORE has the struct of a LOAD, but no padding, and writes output elements.
_PADS = {"y_pad_0": 0, "y_pad_1": 0, "x_pad_0": 0, "x_pad_1": 0}
_FORMS = (
    _Form(Load, "load", "memory", 0),
    _Form(Store, "store", "memory", 1, {"memory": int(MemoryId.OUT), **_PADS}),
    _Form(Gemm, "gemm", "gemm", 2),
    _Form(Finish, "finish", "finish", 3),
    _Form(Alu, "alu", "alu", 4, {"reset": 0}),
)


def encode(instructions: Sequence[Instruction], config: VtaConfig) -> bytes:
    """16 bytes an instruction, the lowest bit first.

    Raises:
        EncodingError: a value does not fit its field.
    """
    words = np.zeros((len(instructions), INSTRUCTION_BITS // WORD_BITS), np.uint64)
    faults: list[EncodingError] = []
    for form in _FORMS:
        places = [index for index, item in enumerate(instructions) if type(item) is form.kind]
        if not places:
            continue
        layout: Layout = getattr(config.layouts, form.layout)
        fields = form.own(layout)
        read = attrgetter(*(f"tokens.{f.name}" if f.name in _TOKENS else f.name for f in fields))
        rows = [read(instructions[index]) for index in places]
        fault = _fault(rows, fields)
        if fault is not None:
            row, message = fault
            faults.append(EncodingError(f"instruction {places[row]} ({form.name}): {message}", places[row]))
            continue
        _put(words, np.array(places), fields, np.array(rows, np.int64))
        constants = [f for f in layout.fields if f.name == "opcode" or f.name in form.fixed]
        values = [form.opcode if f.name == "opcode" else form.fixed[f.name] for f in constants]
        _put(words, np.array(places), constants, np.broadcast_to(np.array(values), (len(places), len(values))))
    if faults:
        raise min(faults, key=lambda fault: fault.index)
    return words.astype("<u8").tobytes()


def decode(data: bytes, config: VtaConfig) -> list[Instruction]:
    """The instructions that `data` holds.

    Raises:
        TargetError: a cut instruction, an unknown opcode, memory or operation, or bits set that no field owns.
    """
    if len(data) % INSTRUCTION_BYTES:
        raise TargetError(
            f"a VTA instruction stream has {len(data)} bytes; it must be a multiple of {INSTRUCTION_BYTES}"
        )
    words = np.frombuffer(data, "<u8").astype(np.uint64).reshape(-1, INSTRUCTION_BITS // WORD_BITS)
    opcodes = (words[:, 0] & np.uint64(7)).astype(np.int64)
    unknown = np.flatnonzero(opcodes > max(form.opcode for form in _FORMS))
    if unknown.size:
        raise TargetError(f"instruction {unknown[0]}: there is no opcode {opcodes[unknown[0]]}")
    found: dict[int, Instruction] = {}
    for form in _FORMS:
        places = np.flatnonzero(opcodes == form.opcode)
        if places.size:
            found.update(zip(places.tolist(), _decode_form(words[places], places, form, config), strict=True))
    return [found[index] for index in range(len(words))]


def encode_uops(uops: np.ndarray, config: VtaConfig) -> bytes:
    """4 bytes a micro-op; `uops` is int64 (n, 3): dst, src, wgt.

    Raises:
        EncodingError: an index does not fit its field.
    """
    fields = config.layouts.uop.fields
    rows = np.asarray(uops, np.int64).reshape(-1, len(fields))
    fault = _outside(rows, fields)
    if fault is not None:
        row, message = fault
        raise EncodingError(f"micro-op {row}: {message}", row)
    words = np.zeros(len(rows), np.uint64)
    for f, column in zip(fields, rows.T, strict=True):
        words |= column.astype(np.uint64) << np.uint64(f.start)
    return words.astype("<u4").tobytes()


def decode_uops(data: bytes, config: VtaConfig) -> np.ndarray:
    """The micro-ops that `data` holds, int64 (n, 3): dst, src, wgt. Bits above the fields are not looked at.

    Raises:
        TargetError: the last micro-op is cut.
    """
    if len(data) % UOP_BYTES:
        raise TargetError(f"an image of VTA micro-ops has {len(data)} bytes; it must be a multiple of {UOP_BYTES}")
    words = np.frombuffer(data, "<u4").astype(np.int64)
    return np.stack([words >> f.start & f.high for f in config.layouts.uop.fields], axis=1)


def _fault(rows: list[tuple[int, ...]], fields: Sequence[Field]) -> tuple[int, str] | None:
    try:
        return _outside(np.array(rows, np.int64), fields)
    except OverflowError:
        # A number beyond 64 bits: found again in Python, where numbers have no end.
        for row, values in enumerate(rows):
            for f, value in zip(fields, values, strict=True):
                if not f.low <= value <= f.high:
                    return row, _does_not_fit(f, value)
        raise


def _outside(rows: np.ndarray, fields: Sequence[Field]) -> tuple[int, str] | None:
    """The first row with a value outside its field, and what is wrong with it."""
    lows, highs = np.array([f.low for f in fields]), np.array([f.high for f in fields])
    wrong = (rows < lows) | (rows > highs)
    if not wrong.any():
        return None
    row = int(np.argmax(wrong.any(axis=1)))
    column = int(np.argmax(wrong[row]))
    return row, _does_not_fit(fields[column], int(rows[row, column]))


def _does_not_fit(f: Field, value: int) -> str:
    return f"{f.name} is {value}, and its {f.width} bits hold {f.low} to {f.high}"


def _put(words: np.ndarray, places: np.ndarray, fields: Sequence[Field], rows: np.ndarray) -> None:
    for f, column in zip(fields, rows.T, strict=True):
        bits = column.astype(np.uint64) & np.uint64((1 << f.width) - 1)
        words[places, f.start // WORD_BITS] |= bits << np.uint64(f.start % WORD_BITS)


def _take(words: np.ndarray, f: Field) -> np.ndarray:
    bits = words[:, f.start // WORD_BITS] >> np.uint64(f.start % WORD_BITS) & np.uint64((1 << f.width) - 1)
    values = bits.astype(np.int64)
    return np.where(values > f.high, values - (1 << f.width), values)


def _decode_form(words: np.ndarray, places: np.ndarray, form: _Form, config: VtaConfig) -> list[Instruction]:
    layout: Layout = getattr(config.layouts, form.layout)
    _check_owned(words, places, form, layout)
    columns = {f.name: _take(words, f) for f in layout.fields}
    for name, value in form.fixed.items():
        _check(columns[name] == value, columns[name], places, f"{form.name} with {name}")
    if form.kind is Load:
        _check(columns["memory"] <= max(MemoryId), columns["memory"], places, "memory")
    if form.kind is Alu:
        _check(columns["op"] <= max(AluOp), columns["op"], places, "ALU operation")
    tokens = sum(columns[name] << bit for bit, name in enumerate(_TOKENS))
    names = [f.name for f in form.own(layout) if f.name not in _TOKENS]
    values = [_TYPED[name](columns[name]) if name in _TYPED else columns[name].tolist() for name in names]
    rows = zip(*values, strict=True) if values else ((),) * len(places)
    return [
        form.kind(**dict(zip(names, row, strict=True)), tokens=_ALL_TOKENS[bits])
        for row, bits in zip(rows, np.asarray(tokens).tolist(), strict=True)
    ]


_TYPED = {
    "memory": lambda column: [MemoryId(value) for value in column.tolist()],
    "op": lambda column: [AluOp(value) for value in column.tolist()],
    "reset": lambda column: column.astype(bool).tolist(),
    "use_imm": lambda column: column.astype(bool).tolist(),
}


def _check(good: np.ndarray, values: np.ndarray, places: np.ndarray, what: str) -> None:
    if not good.all():
        bad = int(np.argmin(good))
        raise TargetError(f"instruction {places[bad]}: there is no {what} {values[bad]}")


def _check_owned(words: np.ndarray, places: np.ndarray, form: _Form, layout: Layout) -> None:
    """Bits outside all fields would be lost by decoding, and say that the stream is for another configuration."""
    owned = [0] * words.shape[1]
    for f in layout.fields:
        owned[f.start // WORD_BITS] |= ((1 << f.width) - 1) << f.start % WORD_BITS
    stray = (words & ~np.array(owned, np.uint64)).any(axis=1)
    if stray.any():
        raise TargetError(
            f"instruction {places[int(np.argmax(stray))]} ({form.name}) has bits set outside its fields; "
            "it was made for another configuration, or is damaged"
        )
