"""Relocatable ELF64 objects as data: what they put into memory, their symbols and relocations.

Source of all layouts: System V gABI, chapter 4 (object files). Whatever an object says of places and sizes is checked
here, so that a damaged file is refused and never read or written beyond its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from nestc.errors import BundleError

MAGIC = b"\x7fELF"
X86_64, AARCH64 = 62, 183
"""Machines (``e_machine``)."""

MOST_BYTES = 1 << 28
"""What a program may take in memory, far more than generated code does: offsets of 32 bits reach all over it."""

MOST_ALIGNMENT = 4096
"""The smallest page there is: memory that is mapped begins at a multiple of it, not of more."""

_HEADER = struct.Struct("<4sBBBB8xHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELA = struct.Struct("<QQq")

_RELOCATABLE = 1  # e_type
_SYMTAB, _STRTAB, _RELA_TABLE, _NOBITS, _REL_TABLE = 2, 3, 4, 8, 9  # sh_type
_INITIALISERS = frozenset((14, 15, 16))  # init, fini and preinit arrays: code that nobody here would call
_WRITE, _ALLOC, _EXECUTE, _TLS, _COMPRESSED = 1, 2, 4, 0x400, 0x800  # sh_flags
_LOCAL, _WEAK = 0, 2  # symbol binding
_INDIRECT = 10  # symbol type: a function that picks the function
_UNDEFINED, _ABSOLUTE, _RESERVED = 0, 0xFFF1, 0xFF00  # st_shndx

# Tables to unwind the stack with: no exception passes generated code.
_UNUSED = frozenset((".eh_frame",))


class Section(NamedTuple):
    """Bytes that a program has in memory: `data`, and zeros up to `nbytes`."""

    name: str
    data: bytes
    nbytes: int
    alignment: int
    executable: bool
    writable: bool


class Symbol(NamedTuple):
    """A name for a place: `value` bytes into section number `section`; an address of its own where that is None.

    A symbol that is not `defined` is another object's, or the process's.
    """

    name: str
    section: int | None
    value: int
    defined: bool
    local: bool
    weak: bool


class Relocation(NamedTuple):
    """A field at `offset` of section number `section`, to be set from `symbol` (a number) and `addend`."""

    section: int
    offset: int
    kind: int
    symbol: int
    addend: int


class ElfObject(NamedTuple):
    """One object. `sections` are those that are in memory when it runs, by their numbers in the file."""

    machine: int
    sections: dict[int, Section]
    symbols: tuple[Symbol, ...]
    relocations: tuple[Relocation, ...]


class _Header(NamedTuple):
    """A section header."""

    name: int
    kind: int
    flags: int
    address: int
    offset: int
    nbytes: int
    link: int
    info: int
    alignment: int
    entry_bytes: int


def machine_of(blob: bytes) -> int | None:
    """The machine of a little-endian ELF64 object; None of anything else."""
    if len(blob) < _HEADER.size or blob[:4] != MAGIC or blob[4] != 2 or blob[5] != 1:
        return None
    return int.from_bytes(blob[18:20], "little")


def parse(blob: bytes) -> ElfObject:
    """Read an object. Raises BundleError, with the reason, if it is damaged or holds what no compiler of ours emits."""
    machine = machine_of(blob)
    if machine is None:
        raise BundleError("it is not a little-endian ELF64 object")
    fields = _HEADER.unpack_from(blob)
    kind, table, (entry_bytes, count, names) = fields[5], fields[10], fields[15:]
    if kind != _RELOCATABLE:
        raise BundleError(f"it is not a relocatable object (its type is {kind})")
    if count and entry_bytes != _SECTION.size:
        raise BundleError(f"its section headers are of {entry_bytes} bytes")
    rows = _cut(blob, table, count * _SECTION.size, "its section headers")
    headers = [_Header(*row) for row in _SECTION.iter_unpack(rows)]
    texts = _strings(blob, headers, names)
    sections: dict[int, Section] = {}
    for number, header in enumerate(headers):
        if header.flags & _ALLOC:
            name = _text(texts, header.name)
            if name not in _UNUSED:
                sections[number] = _section(blob, header, name)
    if sum(section.nbytes + section.alignment for section in sections.values()) > MOST_BYTES:
        raise BundleError(f"it needs more than {MOST_BYTES >> 20} MiB")
    tables = [number for number, header in enumerate(headers) if header.kind == _SYMTAB]
    if len(tables) > 1:
        raise BundleError("it has two symbol tables")
    symbols = tuple(_symbols(blob, headers, tables[0], sections)) if tables else ()
    return ElfObject(machine, sections, symbols, tuple(_relocations(blob, headers, tables, sections, len(symbols))))


def _cut(blob: bytes, begin: int, nbytes: int, what: str) -> bytes:
    if begin + nbytes > len(blob):
        raise BundleError(f"{what} go beyond its end")
    return blob[begin : begin + nbytes]


def _strings(blob: bytes, headers: Sequence[_Header], number: int) -> bytes:
    """A table of names, each with a zero behind it."""
    if number >= len(headers) or headers[number].kind != _STRTAB:
        raise BundleError("a table of its names is not there")
    return _cut(blob, headers[number].offset, headers[number].nbytes, "its names")


def _text(texts: bytes, begin: int) -> str:
    end = texts.find(b"\0", begin)
    if end < 0:
        raise BundleError("a name goes beyond the table of names")
    return texts[begin:end].decode("utf-8", "backslashreplace")


def _section(blob: bytes, header: _Header, name: str) -> Section:
    if header.kind in _INITIALISERS or header.flags & (_TLS | _COMPRESSED):
        raise BundleError(f"its section {name} is of a kind that generated code does not have")
    alignment = max(1, header.alignment)
    if alignment & (alignment - 1) or alignment > MOST_ALIGNMENT:
        raise BundleError(f"its section {name} is aligned to {header.alignment} bytes")
    writable, executable = bool(header.flags & _WRITE), bool(header.flags & _EXECUTE)
    if writable and executable:
        raise BundleError(f"its section {name} is both writable and executable")
    data = b"" if header.kind == _NOBITS else _cut(blob, header.offset, header.nbytes, f"the bytes of {name}")
    return Section(name, data, header.nbytes, alignment, executable, writable and name != ".data.rel.ro")


def _symbols(blob: bytes, headers: Sequence[_Header], table: int, sections: dict[int, Section]) -> list[Symbol]:
    header = headers[table]
    if header.nbytes % _SYMBOL.size:
        raise BundleError("its symbol table is cut")
    texts = _strings(blob, headers, header.link)
    found: list[Symbol] = []
    rows = _cut(blob, header.offset, header.nbytes, "its symbols")
    for begin, info, _, number, value, _ in _SYMBOL.iter_unpack(rows):
        binding, name = info >> 4, _text(texts, begin)
        absolute, defined = number == _ABSOLUTE, number != _UNDEFINED
        if defined and not absolute and (number >= _RESERVED or number >= len(headers)):
            raise BundleError(f"its symbol {name!r} is in a section that is not there")
        if info & 15 == _INDIRECT:
            raise BundleError(f"its symbol {name!r} is of a kind that generated code does not have")
        # A symbol of a section that is not in memory has no address; it is an error only to use it.
        section = sections.get(number)
        if defined and section is not None and value > section.nbytes:
            raise BundleError(f"its symbol {name!r} is beyond its section")
        found.append(Symbol(name, None if absolute else number, value, defined, binding == _LOCAL, binding == _WEAK))
    return found


def _relocations(
    blob: bytes, headers: Sequence[_Header], tables: Sequence[int], sections: dict[int, Section], symbols: int
) -> list[Relocation]:
    found: list[Relocation] = []
    for header in headers:
        if header.kind not in (_RELA_TABLE, _REL_TABLE) or header.info not in sections:
            continue
        target = sections[header.info]
        if header.kind == _REL_TABLE or header.nbytes % _RELA.size or list(tables) != [header.link]:
            raise BundleError(f"its relocations of {target.name} are of another form than those of generated code")
        for offset, info, addend in _RELA.iter_unpack(_cut(blob, header.offset, header.nbytes, "its relocations")):
            symbol = info >> 32
            if offset >= len(target.data) or symbol >= symbols:
                raise BundleError(f"a relocation of {target.name} names a place or a symbol that is not there")
            found.append(Relocation(header.info, offset, info & 0xFFFFFFFF, symbol, addend))
    return found
