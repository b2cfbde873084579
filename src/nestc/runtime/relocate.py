"""How each relocation of ELF64 objects changes the bytes at its place, for x86-64 and AArch64.

Sources: System V psABI for x86-64, section 4.4 "Relocation", with the large code model's; "ELF for the Arm 64-bit
Architecture (AArch64)", section "Relocation". Letters are theirs: S symbol, A addend, P place, G its entry of the
global offset table, GOT that table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from nestc.errors import BundleError
from nestc.runtime.elf import AARCH64, X86_64


class Values(NamedTuple):
    """What a relocation is computed from: S, A, P, the address of the symbol's entry in the table, and GOT."""

    symbol: int
    addend: int
    place: int
    entry: int
    table: int


class Rule(NamedTuple):
    """What a relocation is: the number, how it is written, and what it needs.

    `write` puts the number into the field that `nbytes` are read of, and raises ValueError if it does not fit.
    `entry`: the symbol has an entry of the global offset table; `call`: a stub may stand in for a function far away.
    """

    value: Callable[[Values], int]
    write: Callable[[int, int], int]
    nbytes: int
    entry: bool = False
    call: bool = False


def apply(rule: Rule, buffer: bytearray, at: int, values: Values) -> None:
    """Set the field at `buffer[at]`. Raises BundleError if what belongs there does not fit."""
    field = int.from_bytes(buffer[at : at + rule.nbytes], "little")
    try:
        buffer[at : at + rule.nbytes] = rule.write(field, rule.value(values)).to_bytes(rule.nbytes, "little")
    except (ValueError, OverflowError) as error:
        raise BundleError(f"a relocation does not reach its symbol ({error})") from error


def _signed(bits: int, number: int) -> int:
    """`number` as that many bits. Raises ValueError if they are too few."""
    if not -(1 << (bits - 1)) <= number < 1 << (bits - 1):
        raise ValueError(f"{number:#x} needs more than {bits} bits")
    return number & ((1 << bits) - 1)


def _word32(_: int, number: int) -> int:
    return _signed(32, number)


def _word64(_: int, number: int) -> int:
    return number & ((1 << 64) - 1)


# x86-64


def _absolute(v: Values) -> int:
    return v.symbol + v.addend


def _relative(v: Values) -> int:
    return v.symbol + v.addend - v.place


def _entry_relative(v: Values) -> int:
    return v.entry + v.addend - v.place


def _table_relative(v: Values) -> int:
    return v.table + v.addend - v.place


def _from_table(v: Values) -> int:
    return v.symbol + v.addend - v.table


def _entry_from_table(v: Values) -> int:
    return v.entry + v.addend - v.table


_X86_64: Mapping[int, Rule] = {
    1: Rule(_absolute, _word64, 8),  # 64
    2: Rule(_relative, _word32, 4),  # PC32
    4: Rule(_relative, _word32, 4, call=True),  # PLT32
    9: Rule(_entry_relative, _word32, 4, entry=True),  # GOTPCREL
    24: Rule(_relative, _word64, 8),  # PC64
    25: Rule(_from_table, _word64, 8),  # GOTOFF64
    26: Rule(_table_relative, _word32, 4),  # GOTPC32
    27: Rule(_entry_from_table, _word64, 8, entry=True),  # GOT64
    28: Rule(_entry_relative, _word64, 8, entry=True),  # GOTPCREL64
    29: Rule(_table_relative, _word64, 8),  # GOTPC64
    31: Rule(_from_table, _word64, 8, call=True),  # PLTOFF64
    41: Rule(_entry_relative, _word32, 4, entry=True),  # GOTPCRELX
    42: Rule(_entry_relative, _word32, 4, entry=True),  # REX_GOTPCRELX
}


# AArch64


def _page(address: int) -> int:
    return address & ~0xFFF


def _pages(v: Values) -> int:
    return (_page(v.symbol + v.addend) - _page(v.place)) >> 12


def _in_page(v: Values) -> int:
    return v.symbol + v.addend & 0xFFF


def _entry_pages(v: Values) -> int:
    return (_page(_plain_entry(v)) - _page(v.place)) >> 12


def _entry_in_page(v: Values) -> int:
    return _plain_entry(v) & 0xFFF


def _plain_entry(v: Values) -> int:
    """The entry of the symbol; one of a place beside it (an addend) is never asked for by LLVM, and not made."""
    if v.addend:
        raise ValueError("an entry of the offset table with an addend")
    return v.entry


def _adr(field: int, number: int) -> int:
    """ADR, ADRP: 21 bits, the lowest two at bit 29, the others at bit 5."""
    bits = _signed(21, number)
    return field & ~(3 << 29 | 0x7FFFF << 5) | (bits & 3) << 29 | (bits >> 2) << 5


def _unsigned12(shift: int) -> Callable[[int, int], int]:
    """ADD, and loads and stores of ``1 << shift`` bytes, which count in these."""

    def write(field: int, number: int) -> int:
        if number & ((1 << shift) - 1):
            raise ValueError(f"{number:#x} is not a multiple of {1 << shift}")
        return field & ~(0xFFF << 10) | (number >> shift) << 10

    return write


def _branch(bits: int, at: int) -> Callable[[int, int], int]:
    """Branches, and loads of constants: a distance in instructions."""

    def write(field: int, number: int) -> int:
        if number & 3:
            raise ValueError(f"{number:#x} is not a multiple of 4")
        mask = (1 << bits) - 1
        return field & ~(mask << at) | _signed(bits, number >> 2) << at

    return write


def _quarter(number: int, checked: bool = False) -> Callable[[int, int], int]:
    """MOVZ, MOVK: 16 bits of an address, the lowest ones with `number` 0."""

    def write(field: int, address: int) -> int:
        if checked and address >> (16 * (number + 1)):
            raise ValueError(f"{address:#x} needs more than {16 * (number + 1)} bits")
        return field & ~(0xFFFF << 5) | (address >> (16 * number) & 0xFFFF) << 5

    return write


_AARCH64: Mapping[int, Rule] = {
    257: Rule(_absolute, _word64, 8),  # ABS64
    260: Rule(_relative, _word64, 8),  # PREL64
    261: Rule(_relative, _word32, 4),  # PREL32
    263: Rule(_absolute, _quarter(0, checked=True), 4),  # MOVW_UABS_G0
    264: Rule(_absolute, _quarter(0), 4),  # MOVW_UABS_G0_NC
    265: Rule(_absolute, _quarter(1, checked=True), 4),  # MOVW_UABS_G1
    266: Rule(_absolute, _quarter(1), 4),  # MOVW_UABS_G1_NC
    267: Rule(_absolute, _quarter(2, checked=True), 4),  # MOVW_UABS_G2
    268: Rule(_absolute, _quarter(2), 4),  # MOVW_UABS_G2_NC
    269: Rule(_absolute, _quarter(3), 4),  # MOVW_UABS_G3
    273: Rule(_relative, _branch(19, 5), 4),  # LD_PREL_LO19
    274: Rule(_relative, _adr, 4),  # ADR_PREL_LO21
    275: Rule(_pages, _adr, 4),  # ADR_PREL_PG_HI21
    277: Rule(_in_page, _unsigned12(0), 4),  # ADD_ABS_LO12_NC
    278: Rule(_in_page, _unsigned12(0), 4),  # LDST8_ABS_LO12_NC
    279: Rule(_relative, _branch(14, 5), 4),  # TSTBR14
    280: Rule(_relative, _branch(19, 5), 4),  # CONDBR19
    282: Rule(_relative, _branch(26, 0), 4, call=True),  # JUMP26
    283: Rule(_relative, _branch(26, 0), 4, call=True),  # CALL26
    284: Rule(_in_page, _unsigned12(1), 4),  # LDST16_ABS_LO12_NC
    285: Rule(_in_page, _unsigned12(2), 4),  # LDST32_ABS_LO12_NC
    286: Rule(_in_page, _unsigned12(3), 4),  # LDST64_ABS_LO12_NC
    299: Rule(_in_page, _unsigned12(4), 4),  # LDST128_ABS_LO12_NC
    311: Rule(_entry_pages, _adr, 4, entry=True),  # ADR_GOT_PAGE
    312: Rule(_entry_in_page, _unsigned12(3), 4, entry=True),  # LD64_GOT_LO12_NC
    314: Rule(_relative, _word32, 4, call=True),  # PLT32
}


class Machine(NamedTuple):
    """The rules of a machine by the number of the relocation, and `stub`: code that jumps to where an entry points.

    `stub` takes the addresses of the stub and of the entry; all stubs have `stub_bytes`.
    """

    rules: Mapping[int, Rule]
    stub: Callable[[int, int], bytes]
    stub_bytes: int


def _x86_64_stub(place: int, entry: int) -> bytes:
    """jmp *entry(%rip), padded with int3."""
    return b"\xff\x25" + _signed(32, entry - place - 6).to_bytes(4, "little") + b"\xcc\xcc"


def _aarch64_stub(place: int, entry: int) -> bytes:
    """adrp x16, entry; ldr x16, [x16, entry]; br x16: the registers that calls may lose (AAPCS64, section 6.1.1)."""
    adrp = _adr(0x90000010, (_page(entry) - _page(place)) >> 12)
    load = _unsigned12(3)(0xF9400210, entry & 0xFFF)
    return b"".join(word.to_bytes(4, "little") for word in (adrp, load, 0xD61F0200))


MACHINES: Mapping[int, Machine] = {
    X86_64: Machine(_X86_64, _x86_64_stub, 8),
    AARCH64: Machine(_AARCH64, _aarch64_stub, 12),
}
"""By ``e_machine``."""
