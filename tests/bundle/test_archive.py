"""Our reader of stored zip entries beside Python's, and on damaged archives."""

from __future__ import annotations

import io
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.bundle.archive import stored

ENTRIES = {"manifest.json": b"{}", "partitions/0-a/k.o": bytes(range(256)), "leer/\u00e4": b"", "w": b"x" * 1000}


def archive(entries, comment=b"", method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        for name, data in entries.items():
            made.writestr(name, data)
        made.comment = comment
    return file.getvalue()


@pytest.mark.parametrize("comment", [b"", b"PK\x05", b"c" * 0xFFFF])
def test_entries_are_those_that_python_reads(comment):
    found = stored(memoryview(archive(ENTRIES, comment)))
    assert {name: bytes(entry.data) for name, entry in found.items()} == ENTRIES
    assert all(entry.whole for entry in found.values())


@pytest.mark.parametrize(("limit", "count"), [(10, 2), (300, 2), (1 << 40, 2)])
def test_sizes_of_64_bits(monkeypatch, limit, count):
    """Archives of more than 2 GiB, in small: Python writes their fields as soon as it thinks that it must."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", count)
    data = archive(ENTRIES)
    monkeypatch.undo()
    assert {name: bytes(entry.data) for name, entry in stored(memoryview(data)).items()} == ENTRIES
    with zipfile.ZipFile(io.BytesIO(data)) as other:
        assert {name: other.read(name) for name in other.namelist()} == ENTRIES


def test_what_is_not_stored_is_refused():
    with pytest.raises(ValueError, match="compressed"):
        stored(memoryview(archive(ENTRIES, method=zipfile.ZIP_DEFLATED)))
    with pytest.raises(ValueError, match="its end is not there"):
        stored(memoryview(b"PK\x03\x04"))
    whole = archive(ENTRIES)
    with pytest.raises(ValueError, match="twice"):
        stored(memoryview(_twice()))
    with pytest.raises(ValueError, match="has no header"):
        stored(memoryview(whole.replace(b"PK\x03\x04", b"PK\x03\x05", 1)))


def test_a_changed_byte_is_seen_by_the_checksum():
    whole = archive(ENTRIES).replace(b"{}", b"[}")
    assert not stored(memoryview(whole))["manifest.json"].whole


def _twice():
    with pytest.warns(UserWarning, match="Duplicate"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as made:
            made.writestr("a", b"1")
            made.writestr("a", b"2")
    return file.getvalue()


@settings(deadline=None, max_examples=500)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.sampled_from([1.0, 1.0, 0.99, 0.7, 0.1]),
    st.booleans(),
)
def test_damaged_archives_are_refused_or_read_within_their_bounds(changes, cut, at_the_end):
    data = bytearray(archive(ENTRIES))
    begin = data.index(b"PK\x01\x02") if at_the_end else 0
    for where, value in changes:
        data[begin + int(where * (len(data) - begin))] = value
    view = memoryview(bytes(data[: int(cut * len(data))]))
    try:
        found = stored(view)
    except ValueError as error:
        assert str(error)
        return
    assert sum(len(entry.data) for entry in found.values()) <= len(view) * len(found)
