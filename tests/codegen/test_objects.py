"""The store of compiled objects: found again, never trusted blindly, never without bound."""

from __future__ import annotations

import pytest

from nestc.codegen import objects
from nestc.errors import Error
from nestc.kernels.testing import host_machine

MACHINE = host_machine()
TEXT = f'target triple = "{MACHINE.triple}"\ndefine i64 @answer() {{\n  ret i64 42\n}}\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nestc" / "objects"


def test_an_object_is_compiled_once(folder, monkeypatch):
    first = objects.cached_object(TEXT, MACHINE)
    assert len(list(folder.rglob("*.o"))) == 1
    monkeypatch.setattr(objects, "compile_ir", None)  # would fail if it were called
    assert objects.cached_object(TEXT, MACHINE) == first


def test_a_damaged_object_is_compiled_again(folder):
    first = objects.cached_object(TEXT, MACHINE)
    stored = next(folder.rglob("*.o"))
    stored.write_bytes(stored.read_bytes()[:-1])
    assert objects.cached_object(TEXT, MACHINE) == first


def test_other_code_has_another_key():
    other = TEXT.replace("42", "43")
    assert objects.object_key(TEXT, MACHINE) != objects.object_key(other, MACHINE)


def test_a_full_folder_loses_its_oldest_objects(folder, monkeypatch):
    monkeypatch.setattr(objects, "_CACHE_FILES", 2)
    objects.cached_object(TEXT, MACHINE)
    home = next(folder.rglob("*.o")).parent
    for name in ("old", "older"):
        (home / name).write_bytes(b"")
    monkeypatch.setattr(objects, "object_key", lambda text, machine: home.name + "f" * 62)
    objects.cached_object(TEXT, MACHINE)
    assert len(list(home.iterdir())) == 3


def test_a_store_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert objects.cached_object(TEXT, MACHINE)


def test_refused_code_is_one_error():
    with pytest.raises(Error, match="LLVM refused"):
        objects.compile_ir("define void @broken() { ret i64 0 }", MACHINE)
