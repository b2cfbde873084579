"""The entries of a zip archive that are stored as they are, as views of its bytes.

Python's own reader does more than that, and brings modules that take longer to import than a small bundle to load.
Source: PKWARE's APPNOTE, sections 4.3 (structures) and 4.5.3 (the extra field of 64-bit sizes).
"""

from __future__ import annotations

import binascii
import struct
from collections.abc import Iterator
from typing import NamedTuple

_LOCAL, _LOCAL_BYTES = b"PK\x03\x04", 30
_ENTRY, _END, _END64, _LOCATOR = b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY_FIELDS = struct.Struct("<4s6H3I5H2I")
_END_FIELDS = struct.Struct("<4s4H2IH")
_END64_FIELDS = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_FIELDS = struct.Struct("<4sIQI")
_MOST_COMMENT = 0xFFFF
_IN_EXTRA = 0xFFFFFFFF  # a size or place that does not fit, and is in the extra field
_ENCRYPTED, _STORED, _EXTRA64 = 1, 0, 1


class Stored(NamedTuple):
    """The bytes of an entry, and the checksum that the archive has of them."""

    data: memoryview
    checksum: int

    @property
    def whole(self) -> bool:
        """Whether the checksum is right."""
        return binascii.crc32(self.data) == self.checksum


def stored(archive: memoryview) -> dict[str, Stored]:
    """Entries by name. Raises ValueError, with what is wrong, if this is no such archive or it is damaged."""
    found: dict[str, Stored] = {}
    for name, begin, nbytes, checksum in _listed(archive):
        header = bytes(_cut(archive, begin, _LOCAL_BYTES, name))
        if not header.startswith(_LOCAL):
            raise ValueError(f"{name} has no header")
        if name in found:
            raise ValueError(f"{name} is there twice")
        name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
        found[name] = Stored(_cut(archive, begin + _LOCAL_BYTES + name_bytes + extra_bytes, nbytes, name), checksum)
    return found


def _listed(archive: memoryview) -> Iterator[tuple[str, int, int, int]]:
    """Name, place of the local header, bytes and checksum of each entry of the central directory."""
    count, nbytes, begin = _directory(archive)
    directory = _cut(archive, begin, nbytes, "its directory")
    at = 0
    for _ in range(count):
        fields = _ENTRY_FIELDS.unpack(_cut(directory, at, _ENTRY_FIELDS.size, "its directory"))
        signature, flags, method, checksum, packed, size = fields[0], fields[3], fields[4], *fields[7:10]
        name_bytes, extra_bytes, comment_bytes, header = *fields[10:13], fields[16]
        if signature != _ENTRY:
            raise ValueError("its directory is damaged")
        at += _ENTRY_FIELDS.size
        name = bytes(_cut(directory, at, name_bytes, "its directory")).decode("utf-8")
        extra = _cut(directory, at + name_bytes, extra_bytes, "its directory")
        at += name_bytes + extra_bytes + comment_bytes
        size, packed, header = _wide(extra, size, packed, header)
        if method != _STORED or flags & _ENCRYPTED or packed != size:
            raise ValueError(f"{name} is compressed or encrypted")
        yield name, header, size, checksum


def _directory(archive: memoryview) -> tuple[int, int, int]:
    """Number of entries, bytes and place of the central directory."""
    tail = bytes(archive[-(_END_FIELDS.size + _MOST_COMMENT) :])
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + _END_FIELDS.size:
        raise ValueError("its end is not there")
    _, _, _, _, count, nbytes, begin, _ = _END_FIELDS.unpack_from(tail, at)
    locator = tail[max(0, at - _LOCATOR_FIELDS.size) : at]
    if not locator.startswith(_LOCATOR) or len(locator) < _LOCATOR_FIELDS.size:
        return count, nbytes, begin
    place = _LOCATOR_FIELDS.unpack(locator)[2]
    fields = _END64_FIELDS.unpack(_cut(archive, place, _END64_FIELDS.size, "its end"))
    if fields[0] != _END64:
        raise ValueError("its end is damaged")
    return fields[7], fields[8], fields[9]


def _wide(extra: memoryview, *narrow: int) -> list[int]:
    """Sizes and places, those that do not fit into 32 bits from the extra field, where they are in this order."""
    wide: list[int] = []
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<HH", extra, at)
        if kind == _EXTRA64:
            values = _cut(extra, at + 4, nbytes, "an extra field")
            wide = [value for (value,) in struct.iter_unpack("<Q", values[: nbytes // 8 * 8])]
        at += 4 + nbytes
    if len(wide) < narrow.count(_IN_EXTRA):
        raise ValueError("an extra field is not there")
    return [wide.pop(0) if value == _IN_EXTRA else value for value in narrow]


def _cut(data: memoryview, begin: int, nbytes: int, what: str) -> memoryview:
    if begin + nbytes > len(data):
        raise ValueError(f"{what} is cut")
    return data[begin : begin + nbytes]
