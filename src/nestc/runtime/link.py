"""Link relocatable ELF objects with each other and with this process, and place them in memory, ready to be called.

A program is planned without an address, then filled in for one: text first, with stubs for functions that may be
further away than a call reaches; then what is only read, with the global offset table; then what is written. Each of
the three begins a page, so that no memory is ever both writable and executable.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from nestc.errors import BundleError
from nestc.runtime.elf import MOST_BYTES, ElfObject, Relocation, Section, Symbol, parse
from nestc.runtime.relocate import MACHINES, Machine, Rule, Values, apply

TABLE = "_GLOBAL_OFFSET_TABLE_"
"""The symbol of the table itself, which compilers refer to."""

Outside = Callable[[str], "int | None"]
"""Gives the address of a function or variable of this process, by name."""

_Key = str | tuple[int, int]
"""A symbol: its name, or, of a local one, the numbers of its object and of itself."""

_ENTRY_BYTES = 8
_PROT_READ, _PROT_WRITE, _PROT_EXECUTE = 1, 2, 4


class Program(NamedTuple):
    """Objects with a place for everything, in bytes from the begin of the program.

    ``places``: by object and section. ``entries``: of the global offset table, by symbol. ``stubs``: of functions of
    the process. ``read_only`` and ``writable``: where these parts begin; before them is the text.
    """

    machine: Machine
    objects: tuple[ElfObject, ...]
    definitions: Mapping[str, tuple[int, Symbol]]
    outside: frozenset[str]
    places: Mapping[tuple[int, int], int]
    entries: Mapping[_Key, int]
    stubs: Mapping[_Key, int]
    table: int
    read_only: int
    writable: int
    nbytes: int

    def fill(self, base: int, outside: Mapping[str, int]) -> bytearray:
        """The bytes of the program for the address `base`, with symbols of the process at `outside`.

        Raises BundleError if a relocation does not reach, or is of a kind that our compiler does not emit.
        """
        buffer = bytearray(self.nbytes)
        for (number, index), place in self.places.items():
            data = self.objects[number].sections[index].data
            buffer[place : place + len(data)] = data
        for number, item in enumerate(self.objects):
            for relocation in item.relocations:
                self._relocate(buffer, base, outside, number, relocation)
        for key, place in self.entries.items():
            address = self._address(key, base, outside)
            buffer[place : place + _ENTRY_BYTES] = (address & (1 << 64) - 1).to_bytes(_ENTRY_BYTES, "little")
        for key, place in self.stubs.items():
            code = self.machine.stub(base + place, base + self.entries[key])
            buffer[place : place + len(code)] = code
        return buffer

    def symbol(self, name: str) -> int:
        """Where a function begins, in bytes from the begin. Raises BundleError if it is not in the text."""
        found = self.definitions.get(name)
        if found is None:
            raise BundleError(f"there is no function {name!r}")
        number, symbol = found
        section = None if symbol.section is None else self.objects[number].sections.get(symbol.section)
        if section is None or not section.executable or symbol.value >= section.nbytes:
            raise BundleError(f"{name!r} is not a function")
        return self.places[number, symbol.section or 0] + symbol.value

    def _relocate(
        self, buffer: bytearray, base: int, outside: Mapping[str, int], number: int, relocation: Relocation
    ) -> None:
        section = self.objects[number].sections[relocation.section]
        symbol = self.objects[number].symbols[relocation.symbol]
        key = _key(number, relocation.symbol, symbol)
        rule = _rule(self.machine, relocation, section)
        place = self.places[number, relocation.section] + relocation.offset
        stub = self.stubs.get(key) if rule.call else None
        address = self._address(key, base, outside) if stub is None else base + stub
        entry = base + self.entries[key] if rule.entry else 0
        apply(rule, buffer, place, Values(address, relocation.addend, base + place, entry, base + self.table))

    def _address(self, key: _Key, base: int, outside: Mapping[str, int]) -> int:
        if isinstance(key, tuple):
            number, symbol = key[0], self.objects[key[0]].symbols[key[1]]
        elif key in self.definitions:
            number, symbol = self.definitions[key]
        elif key == TABLE:
            return base + self.table
        else:
            return outside[key]
        if symbol.section is None:
            return symbol.value
        place = self.places.get((number, symbol.section))
        if place is None:
            raise BundleError(f"the symbol {symbol.name!r} is in a section that is not in memory")
        return base + place + symbol.value


class Image(NamedTuple):
    """A program in memory, as long as this lives. `addresses` are those of the functions that were asked for."""

    memory: mmap.mmap
    addresses: Mapping[str, int]


def plan(blobs: Sequence[bytes]) -> Program:
    """Read the objects, and give everything in them a place. Raises BundleError, with the reason."""
    objects = tuple(_parsed(number, blob) for number, blob in enumerate(blobs))
    machines = {item.machine for item in objects}
    machine = MACHINES.get(next(iter(machines), 0))
    if machine is None or len(machines) != 1:
        raise BundleError("its objects are of no machine, or of several, that can be linked")
    definitions = _definitions(objects)
    entries, stubs, outside = _needed(objects, machine, definitions)
    text = [(at, section) for at, section in _all(objects) if section.executable]
    constant = [(at, section) for at, section in _all(objects) if not section.executable and not section.writable]
    data = [(at, section) for at, section in _all(objects) if section.writable]
    places: dict[tuple[int, int], int] = {}
    end = _aligned(_place(text, 0, places), 16)
    stub_places = {key: end + machine.stub_bytes * count for count, key in enumerate(stubs)}
    read_only = _aligned(end + machine.stub_bytes * len(stubs), mmap.PAGESIZE)
    table = _aligned(_place(constant, read_only, places), _ENTRY_BYTES)
    entry_places = {key: table + _ENTRY_BYTES * count for count, key in enumerate(entries)}
    writable = _aligned(table + _ENTRY_BYTES * len(entries), mmap.PAGESIZE)
    nbytes = _aligned(_place(data, writable, places), mmap.PAGESIZE)
    if nbytes > MOST_BYTES:
        raise BundleError(f"it needs more than {MOST_BYTES >> 20} MiB")
    return Program(
        machine, objects, definitions, frozenset(outside), places, entry_places, stub_places,
        table, read_only, writable, nbytes,
    )  # fmt: skip


def load(blobs: Sequence[bytes], functions: Sequence[str], outside: Outside, flush: Flush) -> Image:
    """Link the objects and make them callable. Raises BundleError if they are damaged or a symbol is not there."""
    program = plan(blobs)
    begins = {name: program.symbol(name) for name in functions}
    addresses: dict[str, int] = {}
    for name in sorted(program.outside):
        address = outside(name)
        if address is None:
            raise BundleError(f"nothing here defines its symbol {name!r}")
        addresses[name] = address
    try:
        memory = mmap.mmap(-1, max(program.nbytes, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise BundleError(f"there is no memory for it: {error.strerror}") from error
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory[: program.nbytes] = bytes(program.fill(base, addresses))
    _protect(base, program.read_only, _PROT_READ | _PROT_EXECUTE)
    _protect(base + program.read_only, program.writable - program.read_only, _PROT_READ)
    flush(base, base + program.read_only)
    return Image(memory, {name: base + begin for name, begin in begins.items()})


Flush = Callable[[int, int], None]
"""Makes instructions from an address up to another visible to the processor."""


def _parsed(number: int, blob: bytes) -> ElfObject:
    try:
        return parse(blob)
    except BundleError as error:
        raise BundleError(f"object {number} of it is damaged: {error}") from error


def _protect(begin: int, nbytes: int, how: int) -> None:
    if nbytes == 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(begin), ctypes.c_size_t(nbytes), ctypes.c_int(how)):
        raise BundleError(f"the system refuses to protect its memory: {os.strerror(ctypes.get_errno())}")


def _all(objects: Sequence[ElfObject]) -> list[tuple[tuple[int, int], Section]]:
    return [
        ((number, index), section) for number, item in enumerate(objects) for index, section in item.sections.items()
    ]


def _place(sections: Sequence[tuple[tuple[int, int], Section]], begin: int, places: dict[tuple[int, int], int]) -> int:
    """Give sections places one behind the other from `begin`; returns their end."""
    for at, section in sections:
        begin = _aligned(begin, section.alignment)
        places[at] = begin
        begin += section.nbytes
    return begin


def _definitions(objects: Sequence[ElfObject]) -> dict[str, tuple[int, Symbol]]:
    """Where each global symbol is defined; a weak definition gives way to others."""
    found: dict[str, tuple[int, Symbol]] = {}
    for number, item in enumerate(objects):
        for symbol in item.symbols:
            if symbol.local or not symbol.defined:
                continue
            before = found.get(symbol.name)
            if before is None or (before[1].weak and not symbol.weak):
                found[symbol.name] = number, symbol
            elif not symbol.weak:
                raise BundleError(f"two objects define {symbol.name!r}")
    return found


def _needed(
    objects: Sequence[ElfObject], machine: Machine, definitions: Mapping[str, tuple[int, Symbol]]
) -> tuple[list[_Key], list[_Key], set[str]]:
    """Symbols that need an entry of the table, those that need a stub, and those that the process has to have."""
    entries: dict[_Key, None] = {}
    stubs: dict[_Key, None] = {}
    outside: set[str] = set()
    for number, item in enumerate(objects):
        for relocation in item.relocations:
            symbol = item.symbols[relocation.symbol]
            key = _key(number, relocation.symbol, symbol)
            rule = _rule(machine, relocation, item.sections[relocation.section])
            strange = isinstance(key, str) and key not in definitions and key != TABLE
            if strange:
                outside.add(symbol.name)
            if strange and rule.call:
                stubs[key] = None
            if rule.entry or (strange and rule.call):
                entries[key] = None
    return list(entries), list(stubs), outside


def _key(number: int, index: int, symbol: Symbol) -> _Key:
    return (number, index) if symbol.local else symbol.name


def _rule(machine: Machine, relocation: Relocation, section: Section) -> Rule:
    rule = machine.rules.get(relocation.kind)
    if rule is None:
        raise BundleError(f"{section.name} has a relocation of kind {relocation.kind}, which is not known")
    if relocation.offset + rule.nbytes > len(section.data):
        raise BundleError(f"a relocation goes beyond {section.name}")
    return rule


def _aligned(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
