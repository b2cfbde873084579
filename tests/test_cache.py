"""The tuning store keeps results between processes, and is never the reason that a compilation fails."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from nestc.cache import TuningStore, tuning_path


def test_keeps_and_replaces(tmp_path: Path) -> None:
    store = TuningStore(tmp_path / "folder" / "tuning.sqlite")
    assert store.get("a") is None
    store.put("a", "1")
    store.put("b", "2")
    store.put("a", "3")
    again = TuningStore(store.path)
    assert (again.get("a"), again.get("b"), again.get("c")) == ("3", "2", None)


def test_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_path() == tmp_path / "nestc" / "tuning.sqlite"
    TuningStore().put("a", "1")
    assert tuning_path().is_file()


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100, b"SQLite format 3\0" + bytes(3000)])
def test_a_corrupt_file_is_rebuilt(tmp_path: Path, content: bytes) -> None:
    store = TuningStore(tmp_path / "tuning.sqlite")
    store.path.write_bytes(content)
    assert store.get("a") is None
    store.put("a", "1")
    assert store.get("a") == "1"


def test_a_file_cut_short_is_rebuilt(tmp_path: Path) -> None:
    store = TuningStore(tmp_path / "tuning.sqlite")
    for number in range(200):
        store.put(str(number), "x" * 100)
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[: len(whole) // 2])
    for number in range(200):
        assert store.get(str(number)) in (None, "x" * 100)
    store.put("new", "1")
    assert store.get("new") == "1"


def test_a_database_with_other_tables_is_rebuilt(tmp_path: Path) -> None:
    store = TuningStore(tmp_path / "tuning.sqlite")
    with sqlite3.connect(store.path) as database:
        database.execute("create table result (something integer)")
    database.close()
    assert store.get("a") is None
    store.put("a", "1")
    assert store.get("a") == "1"


def test_works_without_a_folder_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of the folder")
    store = TuningStore(tmp_path / "file" / "tuning.sqlite")
    store.put("a", "1")
    assert store.get("a") is None


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_reads_from_a_read_only_folder(tmp_path: Path) -> None:
    store = TuningStore(tmp_path / "tuning.sqlite")
    store.put("a", "1")
    tmp_path.chmod(0o500)
    store.put("a", "2")
    assert store.get("a") == "1"
    tmp_path.chmod(0o700)


def _write_many(path: Path, first: int) -> None:
    store = TuningStore(path)
    for number in range(first, first + 25):
        store.put(str(number), str(number * number))


def test_processes_write_at_once(tmp_path: Path, at_once: Callable[..., None]) -> None:
    path = tmp_path / "tuning.sqlite"
    at_once(_write_many, *((path, first) for first in (0, 25, 50)))
    store = TuningStore(path)
    assert [store.get(str(number)) for number in range(75)] == [str(number * number) for number in range(75)]
