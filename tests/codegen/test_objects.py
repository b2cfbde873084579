"""Compiled objects and kernels are found again in the store, and never trusted blindly."""

from __future__ import annotations

from dataclasses import replace

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
    return tmp_path / "nestc" / "blobs"


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_object_is_compiled_once(folder, monkeypatch):
    first = objects.cached_object(TEXT, MACHINE)
    assert len(files(folder)) == 1
    monkeypatch.setattr(objects, "compile_ir", None)  # would fail if it were called
    assert objects.cached_object(TEXT, MACHINE) == first


def test_a_damaged_object_is_compiled_again(folder):
    first = objects.cached_object(TEXT, MACHINE)
    (stored,) = files(folder)
    stored.write_bytes(stored.read_bytes()[:-1])
    assert objects.cached_object(TEXT, MACHINE) == first
    assert stored.read_bytes().endswith(first)


def test_a_kernel_is_found_by_its_text_with_its_scratch_memory(folder):
    key = objects.kernel_key("kernel k():", MACHINE)
    assert objects.known_kernel(key) is None
    code = objects.compile_kernel(TEXT, 640, MACHINE, key)
    assert objects.known_kernel(key) == objects.KernelObject(code, 640)
    assert objects.kernel_key("kernel k2():", MACHINE) != key


@pytest.mark.parametrize("change", [{"cpu": "x86-64"}, {"l2_bytes": 1}, {"vector_registers": 5}, {"features": "+aes"}])
def test_another_machine_has_another_key(change):
    other = replace(MACHINE, **change)
    assert objects.kernel_key("kernel k():", MACHINE) != objects.kernel_key("kernel k():", other)


def test_other_code_has_another_key(monkeypatch):
    other = TEXT.replace("42", "43")
    before = objects.object_key(TEXT, MACHINE), objects.kernel_key(TEXT, MACHINE)
    assert objects.object_key(other, MACHINE) not in before
    monkeypatch.setattr(objects, "code_digest", lambda *parts: "another version")
    assert objects.object_key(TEXT, MACHINE) not in before
    assert objects.kernel_key(TEXT, MACHINE) not in before


def test_a_store_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert objects.cached_object(TEXT, MACHINE)


def test_refused_code_is_one_error():
    with pytest.raises(Error, match="LLVM refused"):
        objects.compile_ir("define void @broken() { ret i64 0 }", MACHINE)
