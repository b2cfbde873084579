"""The profile store keeps entries between processes, and takes nothing for an entry that is none."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nestc.partition.store import Entry, Key, ProfileStore, stamped, store_path

ENTRY = Entry(1.5e-4, "measured", 2e-6, 30, 1.5e-3, "estimated", 4096)


def test_keeps_and_replaces(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path / "folder" / "profiles.sqlite")
    key = Key("region", "device")
    assert store.get(key) is None
    store.put(key, ENTRY)
    refused = Entry(0.0, refusal="it has no such operator")
    modelled = Entry(1e-6, "modelled", runs=1, joules=2e-9, energy_kind="modelled")
    store.put_all({Key("other", "device"): refused, Key("region", "device", "chain:x:0"): modelled})
    again = ProfileStore(store.path)
    assert again.get(key) == ENTRY
    assert again.get(Key("other", "device")) == refused
    assert again.get(Key("region", "device", "chain:x:0")) == modelled
    assert again.get(Key("region", "another device")) is None
    store.put(key, replace(ENTRY, seconds=2e-4))
    assert again.get(key) == replace(ENTRY, seconds=2e-4)


def test_an_entry_says_when_and_by_what_it_was_made() -> None:
    made = stamped(ENTRY)
    assert made.at[:2] == "20" and made.at.endswith("Z") and made.version
    assert replace(made, at="", version="") == ENTRY


def test_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ProfileStore().path == store_path() == tmp_path / "nestc" / "profiles.sqlite"


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": "long"},
        {"seconds": -1.0},
        {"seconds": float("nan")},
        {"kind": "guessed"},
        {"energy_kind": "guessed"},
        {"joules": float("inf")},
        {"bytes": None},
        {"another": 1},
    ],
)
def test_what_is_no_entry_is_not_there(tmp_path: Path, change: dict[str, object]) -> None:
    store, key = ProfileStore(tmp_path / "profiles.sqlite"), Key("region", "device")
    store.put(key, ENTRY)
    with sqlite3.connect(store.path) as database:
        database.execute("update result set value = ?", (json.dumps({**asdict(ENTRY), **change}),))
    database.close()
    assert store.get(key) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "3"])
def test_a_text_that_is_no_entry_is_not_there(tmp_path: Path, text: str) -> None:
    store, key = ProfileStore(tmp_path / "profiles.sqlite"), Key("region", "device")
    store.put(key, ENTRY)
    with sqlite3.connect(store.path) as database:
        database.execute("update result set value = ?", (text,))
    database.close()
    assert store.get(key) is None
    store.put(key, ENTRY)
    assert store.get(key) == ENTRY


def test_a_corrupt_file_is_put_aside(tmp_path: Path) -> None:
    store, key = ProfileStore(tmp_path / "profiles.sqlite"), Key("region", "device")
    store.path.write_bytes(b"no database at all" * 100)
    assert store.get(key) is None
    store.put(key, ENTRY)
    assert store.get(key) == ENTRY
    assert (tmp_path / "profiles.corrupt").read_bytes().startswith(b"no database")


def test_works_without_a_folder_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of the folder")
    store = ProfileStore(tmp_path / "file" / "profiles.sqlite")
    store.put(Key("region", "device"), ENTRY)
    assert store.get(Key("region", "device")) is None


def test_keeps_no_more_than_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestc.partition.store._ENTRIES", 10)
    store = ProfileStore(tmp_path / "profiles.sqlite")
    for number in range(8):
        store.put_all({Key(str(number), "device"): ENTRY, Key(str(number), "other"): ENTRY})
    kept = [store.get(Key(str(number), "device")) is not None for number in range(8)]
    assert kept == [False] * 3 + [True] * 5


def _write_many(path: Path, first: int) -> None:
    store = ProfileStore(path)
    for number in range(first, first + 20, 2):
        store.put_all({Key(str(each), "device"): replace(ENTRY, runs=each) for each in (number, number + 1)})
        assert store.get(Key(str(number), "device")) == replace(ENTRY, runs=number)


def test_processes_write_at_once(tmp_path: Path, at_once: Callable[..., None]) -> None:
    path = tmp_path / "profiles.sqlite"
    at_once(_write_many, *((path, first) for first in (0, 20, 40)))
    store = ProfileStore(path)
    found = [store.get(Key(str(number), "device")) for number in range(60)]
    assert found == [replace(ENTRY, runs=number) for number in range(60)]
