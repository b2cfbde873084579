"""The store of byte strings: found again, never trusted blindly, never without bound, shared by processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from nestc.blobs import BlobStore, code_digest, key_of, user_store

KEY, OTHER = key_of("one"), key_of("other")


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "blobs")


def files(store):
    return sorted(path for path in store.folder.rglob("*") if path.is_file())


def test_what_was_put_is_found(store):
    assert store.get(KEY) is None
    store.put(KEY, b"content")
    store.put(OTHER, b"")
    assert (store.get(KEY), store.get(OTHER)) == (b"content", b"")
    store.put(KEY, b"new")
    assert store.get(KEY) == b"new"


def test_a_cut_or_altered_file_is_not_there_and_is_written_anew(store):
    store.put(KEY, b"some content")
    whole = store.path(KEY).read_bytes()
    for damaged in (b"", whole[:30], whole[:-1], whole + b"x", b"x" + whole[1:], whole[:-1] + b"x"):
        store.path(KEY).write_bytes(damaged)
        assert store.get(KEY) is None
    store.put(KEY, b"some content")
    assert store.path(KEY).read_bytes() == whole


def test_a_copy_is_made_of_what_is_whole_only(store, tmp_path, monkeypatch):
    content = bytes(range(256)) * 1000
    target = tmp_path / "copy"
    assert not store.copy(KEY, target)
    store.put(KEY, content)
    store.put(OTHER, b"")
    for key, expected in ((KEY, content), (OTHER, b"")):
        assert store.copy(key, target)
        assert target.read_bytes() == expected
    monkeypatch.delattr(os, "copy_file_range", raising=False)  # as where the system has no such call
    assert store.copy(KEY, target)
    assert target.read_bytes() == content
    whole = store.path(KEY).read_bytes()
    for damaged in (b"", whole[:10], whole[:-1], whole + b"x", whole[:-1] + b"x"):
        store.path(KEY).write_bytes(damaged)
        assert not store.copy(KEY, target)
    assert target.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blobs", "copy"]


def test_a_copy_that_cannot_be_written_is_an_error_and_leaves_nothing(store, tmp_path):
    store.put(KEY, b"content")
    with pytest.raises(FileNotFoundError):
        store.copy(KEY, tmp_path / "no folder" / "copy")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        store.copy(KEY, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blobs", "folder"]


def test_what_was_used_longest_ago_is_removed_first(tmp_path):
    store = BlobStore(tmp_path, limit=1000)
    keys = [key_of(str(number)) for number in range(8)]
    for age, key in enumerate(keys):
        store.put(key, bytes(60))
        os.utime(store.path(key), (time.time() - 1000 + age,) * 2)
    assert store.get(keys[0]) is not None  # used now
    store.put(key_of("last"), bytes(60))
    store.trim()
    assert sum(path.stat().st_size for path in files(store)) <= 1000
    assert store.get(keys[0]) is not None
    assert store.get(key_of("last")) is not None
    assert [store.get(key) is None for key in keys[1:4]] == [True, True, True]
    assert store.get(keys[7]) is not None


def test_the_bound_holds_without_anybody_asking(tmp_path):
    store = BlobStore(tmp_path, limit=4000)
    for number in range(100):
        store.put(key_of(str(number)), bytes(200))
    assert sum(path.stat().st_size for path in files(store)) <= 4000 + 4000 // 8 + 264
    assert store.get(key_of("99")) is not None


def test_one_that_would_fill_the_store_is_not_kept(tmp_path):
    store = BlobStore(tmp_path, limit=1000)
    store.put(KEY, bytes(501))
    assert store.get(KEY) is None


def test_files_of_processes_that_died_are_removed(store):
    store.put(KEY, b"content")
    left, busy = store.path(KEY).with_suffix(".tmp"), store.path(KEY).with_name("busy.tmp")
    left.write_bytes(b"")
    busy.write_bytes(b"")
    os.utime(left, (time.time() - 7200,) * 2)
    store.trim()
    assert files(store) == sorted([store.path(KEY), busy])


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    store = BlobStore(tmp_path / "file" / "blobs")
    store.put(KEY, b"content")
    assert store.get(KEY) is None
    store.trim()


def test_a_full_disk_is_no_error_and_leaves_nothing(store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nestc.blobs.os.replace", full)
    store.put(KEY, b"content")
    assert files(store) == []


def test_keys_tell_where_a_part_ends():
    assert len({key_of("ab", "c"), key_of("a", "bc"), key_of("abc"), key_of(b"abc"), key_of("a", "b", "c")}) == 5


def test_the_digest_of_code_is_that_of_its_files():
    assert code_digest("tensor") != code_digest("tensor", "codegen") != code_digest("codegen")
    assert code_digest("blobs.py") == code_digest("blobs.py")


def test_the_store_follows_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_store().folder == tmp_path / "nestc" / "blobs"
    assert user_store() is user_store()


_WRITER = """
import sys
from pathlib import Path
from nestc.blobs import BlobStore, key_of
store = BlobStore(Path(sys.argv[1]), limit=200_000)
for turn in range(60):
    for number in range(8):
        content = str(number).encode() * 5000
        found = store.get(key_of(str(number)))
        assert found in (None, content), number
        store.put(key_of(str(number)), content)
    store.put(key_of(sys.argv[2], str(turn)), bytes(9000))
"""


def test_eight_processes_share_a_store(tmp_path):
    running = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), str(number)], stderr=subprocess.PIPE)
        for number in range(8)
    ]
    errors = [process.communicate()[1].decode() for process in running]
    assert [process.returncode for process in running] == [0] * 8, errors
    assert not list(tmp_path.rglob("*.tmp"))
