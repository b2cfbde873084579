"""Our linker of ELF objects: values against LLVM's linker and assembler, damaged objects, and what memory allows."""

from __future__ import annotations

import ctypes
import math
import re
import struct
import subprocess
import sys
import types
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from handmade import chain, chain_result
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.codegen.objects import initialize
from nestc.errors import BundleError
from nestc.runtime import Executable, cpu, objects
from nestc.runtime.elf import AARCH64, X86_64
from nestc.runtime.link import load, plan
from nestc.runtime.objects_llvm import link_with_llvm
from nestc.runtime.relocate import MACHINES, Values, apply

LINUX = pytest.mark.skipif(
    not (sys.platform == "linux" and cpu._here()[0] in objects._MACHINES), reason="other formats are LLVM's"
)

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
FAR = 0x7F00_0000_0000  # where the libraries of a process are; programs of these tests lie at BASE
BASE = 0x5555_0000_0000

MAIN = """
declare float @expf(float)
declare i64 @other(i64)
@local = private constant [4 x float] [float 1.0, float 2.0, float 3.0, float 4.0], align 64
@pointers = internal constant [3 x ptr] [ptr @twice, ptr @expf, ptr @cosf]
@zeros = internal global [100 x i64] zeroinitializer, align 64
@count = global i64 5
@shared = external global i64
declare float @cosf(float)
define internal float @twice(float %x) noinline { %r = fmul float %x, 2.0 ret float %r }
define float @call_pointer(float %x, i64 %i) {
  %p = getelementptr [3 x ptr], ptr @pointers, i64 0, i64 %i
  %f = load ptr, ptr %p
  %r = call float %f(float %x)
  ret float %r
}
define float @read_constant(float %x, i64 %i) {
  %p = getelementptr [4 x float], ptr @local, i64 0, i64 %i
  %v = load float, ptr %p
  %y = fmul float %x, 0x3FF3C083A0000000
  %e = call float @expf(float %y)
  %s = fadd float %v, %e
  ret float %s
}
define i64 @write(i64 %i) {
  %old = load i64, ptr @count
  %new = add i64 %old, %i
  store i64 %new, ptr @count
  %p = getelementptr [100 x i64], ptr @zeros, i64 0, i64 %i
  %z = load i64, ptr %p
  store i64 %new, ptr %p
  %s = load i64, ptr @shared
  %a = add i64 %new, %z
  %b = add i64 %a, %s
  %r = tail call i64 @other(i64 %b)
  ret i64 %r
}
"""
OTHER = """
@shared = global i64 1000
@count = external global i64
define weak i64 @twofold() { ret i64 1 }
define i64 @other(i64 %x) { %c = load i64, ptr @count %r = add i64 %x, %c ret i64 %r }
"""
STRONG = "define i64 @twofold() { ret i64 2 }"
FUNCTIONS = ("call_pointer", "read_constant", "write", "other", "twofold")


def emit(text: str, triple: str, model: str = "small") -> bytes:
    """The object of LLVM IR, position-independent as the compiler emits it."""
    initialize()
    machine = llvm.Target.from_triple(triple).create_target_machine(opt=2, reloc="pic", codemodel=model)
    module = llvm.parse_assembly(text, llvm.create_context())
    module.triple = triple
    return machine.emit_object(module)


def damaged(blob: bytes, changes: list[tuple[float, int]], cut: float) -> bytes:
    """The object with bytes changed at some places, and its end cut off."""
    found = bytearray(blob)
    for where, value in changes:
        found[int(where * len(found))] = value
    return bytes(found[: math.ceil(cut * len(found))])


@LINUX
@pytest.mark.parametrize("model", ["small", "jitdefault"])
def test_functions_compute_what_they_do_with_llvms_linker(model):
    triple = llvm.get_process_triple()
    blobs = [emit(text, triple, model) for text in (OTHER, MAIN, STRONG)]
    flush = objects._flush()
    assert flush is not None
    image = load(blobs, FUNCTIONS, objects._address, flush)
    kept, other = link_with_llvm([emit(text, triple, model) for text in (OTHER, MAIN)], FUNCTIONS)
    float_function = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_float, ctypes.c_int64)
    for name in ("call_pointer", "read_constant"):
        ours, theirs = (float_function(at[name]) for at in (image.addresses, other))
        for i in range(3):
            assert ours(0.75, i) == theirs(0.75, i) != 0
    write = [ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(at["write"]) for at in (image.addresses, other)]
    assert [write[0](i) for i in (3, 7, 3)] == [write[1](i) for i in (3, 7, 3)] == [1016, 1030, 1044]
    # A definition that is not weak wins, whichever comes first.
    assert ctypes.CFUNCTYPE(ctypes.c_int64)(image.addresses["twofold"])() == 2
    assert kept


@LINUX
def test_memory_is_never_both_writable_and_executable():
    blobs = [emit(text, llvm.get_process_triple()) for text in (OTHER, MAIN)]
    flush = objects._flush()
    assert flush is not None
    image = load(blobs, FUNCTIONS, objects._address, flush)
    program = plan(blobs)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(image.memory))
    kinds: dict[int, str] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high, kind = re.match(r"(\w+)-(\w+) (\S+)", line).groups()  # type: ignore[union-attr]
        for part in (0, program.read_only, program.writable):
            if int(low, 16) <= begin + part < int(high, 16):
                kinds[part] = kind
    assert list(kinds.values()) == ["r-xp", "r--p", "rw-p"]


@LINUX
def test_running_a_bundle_imports_neither_the_compiler_nor_llvm(tmp_path):
    Executable(chain(2, 64, 1)).save(tmp_path / "m.nest")
    script = (
        "import sys, nestc, numpy as np; e = nestc.open(sys.argv[1]);"
        "x = [np.ones(s, d) for d, s in e.inputs.values()]; e(*x); print(float(np.sum(e(*x))));"
        "print([n for n in ('llvmlite', 'onnx', 'onnx_ir', 'typer', 'rich', 'ml_dtypes') if n in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m.nest")], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines()[1] == "[]"


def test_what_our_linker_does_not_take_llvms_does(monkeypatch):
    monkeypatch.setattr(objects, "_ours", lambda blobs: False)
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    with Executable(chain(2, 64, 1)) as executable:
        np.testing.assert_allclose(executable(x), chain_result(2, x), rtol=1e-6)


@LINUX
def test_arm_makes_code_visible_by_a_function_of_libgcc_or_leaves_it_to_llvm(monkeypatch):
    monkeypatch.setattr(objects.os, "uname", lambda: types.SimpleNamespace(machine="aarch64"))
    monkeypatch.setattr(objects, "_address", lambda name: None)
    assert objects._flush() is None
    called: list[str] = []
    monkeypatch.setattr(objects, "_address", lambda name: called.append(name) or 4096)
    assert objects._flush() is not None
    assert called == ["__clear_cache"]


def test_the_system_lists_the_features_that_llvm_finds():
    known = cpu.kernel_features()
    if not known or cpu._here()[0] != "x86_64":
        pytest.skip("another system or processor")
    ours = {name for name in cpu._X86 if cpu.host_features().get(name)}
    assert known & cpu._X86 <= ours
    assert cpu._V2 & ours <= known


# x86-64: the psABI's formulas on numbers


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (1, 0x5000 + 6),
        (2, 0x5000 + 6 - 0x2000),
        (4, 0x5000 + 6 - 0x2000),
        (9, 0x3010 + 6 - 0x2000),
        (24, 0x5000 + 6 - 0x2000),
        (25, 0x5000 + 6 - 0x3000),
        (26, 0x3000 + 6 - 0x2000),
        (27, 0x3010 + 6 - 0x3000),
        (28, 0x3010 + 6 - 0x2000),
        (29, 0x3000 + 6 - 0x2000),
        (31, 0x5000 + 6 - 0x3000),
        (41, 0x3010 + 6 - 0x2000),
        (42, 0x3010 + 6 - 0x2000),
    ],
)
def test_x86_values(kind, expected):
    rule = MACHINES[X86_64].rules[kind]
    buffer = bytearray(b"\xaa" * 12)
    apply(rule, buffer, 2, Values(symbol=0x5000, addend=6, place=0x2000, entry=0x3010, table=0x3000))
    assert int.from_bytes(buffer[2 : 2 + rule.nbytes], "little") == expected
    assert set(buffer[:2] + buffer[2 + rule.nbytes :]) == {0xAA}


def test_negative_distances_and_those_too_far():
    buffer = bytearray(8)
    apply(MACHINES[X86_64].rules[2], buffer, 0, Values(0x1000, -4, 0x2000, 0, 0))
    assert struct.unpack_from("<i", buffer) == (-0x1004,)
    with pytest.raises(BundleError, match="does not reach"):
        apply(MACHINES[X86_64].rules[2], buffer, 0, Values(FAR, 0, 0x2000, 0, 0))
    with pytest.raises(BundleError, match="does not reach"):
        apply(MACHINES[AARCH64].rules[283], buffer, 0, Values(1 << 28, 0, 0, 0, 0))
    with pytest.raises(BundleError, match="not a multiple of 8"):
        apply(MACHINES[AARCH64].rules[286], buffer, 0, Values(0x1004, 0, 0, 0, 0))


# AArch64: words before and after, as a disassembler reads them


@pytest.mark.parametrize(
    ("kind", "before", "after", "values"),
    [
        (263, 0xD2800003, 0xD2935783, (0x9ABC, 0, 0)),  # movz x3, #0x9abc
        (264, 0xF2800003, 0xF29BDE03, (0x123456789ABCDEF0, 0, 0)),  # movk x3, #0xdef0
        (266, 0xF2A00003, 0xF2B35783, (0x123456789ABCDEF0, 0, 0)),  # movk x3, #0x9abc, lsl #16
        (268, 0xF2C00003, 0xF2CACF03, (0x123456789ABCDEF0, 0, 0)),  # movk x3, #0x5678, lsl #32
        (269, 0xD2E00003, 0xD2E24683, (0x123456789ABCDEF0, 0, 0)),  # movz x3, #0x1234, lsl #48
        (273, 0x58000005, 0x58FFFC05, (0x1000, 0, 0x1080)),  # ldr x5, #-0x80
        (274, 0x10000005, 0x30FFFC05, (0x1001, 0, 0x1080)),  # adr x5, #-0x7f
        (275, 0x90000007, 0xB0091A27, (0x12346FFF, 0, 0x1FF0)),  # adrp x7, #0x12345000
        (275, 0x90000007, 0xB0FFFFE7, (0x1F00, 0, 0x4010)),  # adrp x7, #-0x3000
        (277, 0x910000E7, 0x9119E0E7, (0x12345000, 0x678, 0)),  # add x7, x7, #0x678
        (278, 0x394000E1, 0x3959DCE1, (0x12345677, 0, 0)),  # ldrb w1, [x7, #0x677]
        (279, 0x36180001, 0x361FFE01, (0x1000, 0, 0x1040)),  # tbz w1, #3, #-0x40
        (280, 0x54000001, 0x54000201, (0x1040, 0, 0x1000)),  # b.ne #0x40
        (282, 0x14000000, 0x17000000, (0x1000, 0, 0x4001000)),  # b #-0x4000000
        (283, 0x94000000, 0x94FFFFFF, (0x4000FFC, 0, 0x1000)),  # bl #0x3fffffc
        (284, 0x794000E1, 0x794CECE1, (0x12345676, 0, 0)),  # ldrh w1, [x7, #0x676]
        (285, 0xBD4000E1, 0xBD4674E1, (0x12345674, 0, 0)),  # ldr s1, [x7, #0x674]
        (286, 0xF94000E1, 0xF94338E1, (0x12345670, 0, 0)),  # ldr x1, [x7, #0x670]
        (299, 0x3DC000E1, 0x3DC3FCE1, (0x12345FF0, 0, 0)),  # ldr q1, [x7, #0xff0]
    ],
)
def test_arm_instructions(kind, before, after, values):
    buffer = bytearray(before.to_bytes(4, "little"))
    symbol, addend, place = values
    apply(MACHINES[AARCH64].rules[kind], buffer, 0, Values(symbol, addend, place, 0, 0))
    assert int.from_bytes(buffer, "little") == after


def test_arm_stub_and_entries():
    # adrp x16, #0x5a59f000; ldr x16, [x16, #0x668]; br x16
    assert struct.unpack("<3I", MACHINES[AARCH64].stub(0x1000, 0x5A5A_0668)) == (0xF02D2CF0, 0xF9433610, 0xD61F0200)
    words = bytearray(struct.pack("<2I", 0x90000008, 0xF9400108))
    apply(MACHINES[AARCH64].rules[311], words, 0, Values(0, 0, 0x1000, 0x3008, 0))
    apply(MACHINES[AARCH64].rules[312], words, 4, Values(0, 0, 0x1004, 0x3008, 0))
    assert struct.unpack("<2I", words) == (0xD0000008, 0xF9400508)  # adrp x8, #0x2000; ldr x8, [x8, #8]
    with pytest.raises(BundleError, match="with an addend"):
        apply(MACHINES[AARCH64].rules[312], words, 4, Values(0, 8, 0x1004, 0x3008, 0))


@pytest.mark.parametrize("triple", [X86, ARM])
def test_a_program_has_its_symbols_where_it_says(triple):
    program = plan([emit(text, triple) for text in (OTHER, MAIN)])
    assert program.outside == {"expf", "cosf"}
    outside = {"expf": FAR, "cosf": FAR + 64}
    image = program.fill(BASE, outside)
    # The constant table of pointers: a local function, and two of the process.
    at = image.find(FAR.to_bytes(8, "little") + (FAR + 64).to_bytes(8, "little")) - 8
    (twice,) = struct.unpack_from("<Q", image, at)
    assert program.read_only <= at < program.writable
    assert BASE <= twice < BASE + program.read_only
    # expf is called, so it has an entry and a stub; cosf is only pointed to.
    (entry,) = [place for key, place in program.entries.items() if key == "expf"]
    assert struct.unpack_from("<Q", image, entry) == (FAR,)
    assert set(program.stubs) == {"expf"}
    place = next(p for (n, i), p in program.places.items() if program.objects[n].sections[i].name == ".rodata")
    assert place % 64 == 0
    assert np.frombuffer(image, np.float32, 4, place).tolist() == [1, 2, 3, 4]
    for name in FUNCTIONS:
        assert 0 <= program.symbol(name) < program.read_only


# Faults


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([X86, ARM]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    st.sampled_from([1.0, 1.0, 0.99, 0.5, 0.01]),
)
def test_damaged_objects_are_refused_or_linked_within_their_bounds(triple, changes, cut):
    blob = damaged(_whole(triple), changes, cut)
    try:
        program = plan([blob, emit_once(OTHER, triple)])
        if program.nbytes > 1 << 24:
            return
        image = program.fill(BASE, dict.fromkeys(program.outside, FAR))
        assert len(image) == program.nbytes
        assert all(0 <= program.symbol(name) < program.read_only for name in ("write", "other"))
    except BundleError as error:
        assert str(error)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_tables_are_refused_or_linked_within_their_bounds(data):
    """Changes where they hurt most: in headers, symbols and relocations."""
    triple = data.draw(st.sampled_from([X86, ARM]))
    whole = _whole(triple)
    blob = bytearray(whole)
    (table,) = struct.unpack_from("<Q", blob, 40)
    (count,) = struct.unpack_from("<H", blob, 60)
    for _ in range(data.draw(st.integers(1, 4))):
        header = table + 64 * data.draw(st.integers(0, count - 1))
        kind, offset, nbytes = struct.unpack_from("<4xI16xQQ", whole, header)
        inside = kind in (2, 4) and nbytes and data.draw(st.booleans())
        begin, end = (offset, offset + nbytes) if inside else (header, header + 64)
        at = data.draw(st.integers(begin, end - 8)) & ~3
        value = data.draw(st.sampled_from([0, 1, 0xFF, 0xFFF1, 1 << 31, (1 << 32) - 1]) | st.integers(0, 1 << 16))
        struct.pack_into("<I", blob, at, value)
    try:
        program = plan([bytes(blob), emit_once(OTHER, triple)])
        if program.nbytes <= 1 << 24:
            program.fill(BASE, dict.fromkeys(program.outside, FAR))
    except BundleError as error:
        assert str(error)


_emitted: dict[tuple[str, str], bytes] = {}


def emit_once(text: str, triple: str) -> bytes:
    if (text, triple) not in _emitted:
        _emitted[text, triple] = emit(text, triple)
    return _emitted[text, triple]


def _whole(triple: str) -> bytes:
    return emit_once(MAIN, triple)


def _patched(offset: int, form: str, value: int) -> bytes:
    blob = bytearray(_whole(X86))
    struct.pack_into(form, blob, offset, value)
    return bytes(blob)


@pytest.mark.parametrize(
    ("blob", "sentence"),
    [
        (b"\x7fELF", "not a little-endian ELF64"),
        (b"MZ" + bytes(200), "not a little-endian ELF64"),
        (_patched(16, "<H", 3), "not a relocatable object"),
        (_patched(40, "<Q", 1 << 60), "section headers go beyond"),
        (_patched(58, "<H", 40), "section headers are of 40 bytes"),
        (_patched(62, "<H", 900), "table of its names"),
        (_patched(18, "<H", 8), "no machine"),
    ],
)
def test_what_is_no_object_is_refused(blob, sentence):
    with pytest.raises(BundleError, match=sentence):
        plan([blob])


def test_what_cannot_be_linked_is_refused():
    whole, other = _whole(X86), emit_once(OTHER, X86)
    with pytest.raises(BundleError, match="no machine, or of several"):
        plan([whole, emit_once(OTHER, ARM)])
    with pytest.raises(BundleError, match="no machine"):
        plan([])
    with pytest.raises(BundleError, match="two objects define"):
        plan([whole, whole])
    with pytest.raises(BundleError, match="defines its symbol 'cosf'"):
        load([whole, other], FUNCTIONS, lambda name: None if name == "cosf" else FAR, lambda begin, end: None)
    with pytest.raises(BundleError, match="no function 'nothing'"):
        load([whole, other], ["nothing"], lambda name: FAR, lambda begin, end: None)
    with pytest.raises(BundleError, match="'count' is not a function"):
        load([whole, other], ["count"], lambda name: FAR, lambda begin, end: None)
    kinds = emit("@t = thread_local global i64 0\ndefine ptr @f() { ret ptr @t }", X86)
    with pytest.raises(BundleError, match="of a kind that generated code does not have"):
        plan([kinds])
    table = struct.unpack_from("<Q", whole, 40)[0]
    headers = [struct.unpack_from("<IIQQQQIIQQ", whole, table + 64 * n) for n in range(whole[60])]
    begin = next(header[4] for header in headers if header[1] == 4)
    with pytest.raises(BundleError, match="a relocation of kind 10, which is not known"):
        plan([_patched(begin + 8, "<I", 10)])
