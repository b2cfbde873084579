"""LLVM IR text to object code through llvmlite, and a content-addressed store of objects on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import llvmlite.binding as llvm

from nestc.cache import cache_folder
from nestc.errors import Error
from nestc.kernels.api import CpuMachine

_CODE_VERSION = "3"  # raise when the passes or the printed code change, so that cached objects are not reused
_CACHE_FILES = 100  # kept in each of the store's 256 folders; a network needs some 50 in all
_lock = threading.Lock()
_ready = False


def initialize() -> None:
    """Load every code generator that the llvmlite wheel carries; once a process."""
    global _ready
    with _lock:
        if not _ready:
            llvm.initialize_all_targets()
            llvm.initialize_all_asmprinters()
            # Addresses come as one pointer a loop plus constants; loop strength reduction would trade that for a
            # pointer an access, and spill them (a 3x3 convolution then runs at 60 % of its speed).
            llvm.set_option("nestc", "--disable-lsr")
            # The machine scheduler hoists loads of a register tile until accumulators spill; a kernel's text is
            # already in the order that it should run in.
            llvm.set_option("nestc", "--enable-misched=false")
            # It adds two products before it adds them to a sum, to shorten the chain; the tile's sums are spilled then
            # (an integer matrix product at 55 % of its speed).
            llvm.set_option("nestc", "--x86-machine-combiner=false")
            _ready = True


def target_machine(machine: CpuMachine) -> llvm.TargetMachine:
    """LLVM's code generator for `machine`; not shared between threads."""
    initialize()
    try:
        target = llvm.Target.from_triple(machine.triple)
    except RuntimeError as error:
        raise Error(f"LLVM has no code generator for {machine.triple!r}: {error}") from error
    return target.create_target_machine(
        cpu=machine.cpu, features=machine.features, opt=3, reloc="pic", codemodel="jitdefault"
    )


@dataclass(frozen=True)
class Object:
    """Relocatable object code, and its assembly if it was asked for."""

    code: bytes
    assembly: str = ""


def compile_ir(text: str, machine: CpuMachine, assembly: bool = False) -> Object:
    """Compile one LLVM module. Raises nestc.Error (a bug of ours) if LLVM refuses the text."""
    codegen = target_machine(machine)
    context = llvm.create_context()
    try:
        module = llvm.parse_assembly(text, context)
        module.verify()
    except RuntimeError as error:
        raise Error(f"LLVM refused generated code: {error}") from error
    optimise(module, codegen)
    shown = codegen.emit_assembly(module) if assembly else ""
    return Object(codegen.emit_object(module), shown)


def optimise(module: llvm.ModuleRef, codegen: llvm.TargetMachine) -> None:
    """A short list of passes: the code comes optimised, so registers, common values and branches are all that is left.

    The vectorisers and unrollers of the full pipeline would undo the schedule of a kernel; so would GVN, which keeps
    every value that is loaded twice in a register until it spills.
    """
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = False
    options.slp_vectorization = False
    options.loop_unrolling = False
    builder = llvm.create_pass_builder(codegen, options)
    passes = llvm.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    passes.add_dead_code_elimination_pass()
    passes.run(module, builder)


def object_key(text: str, machine: CpuMachine) -> str:
    """Content address of the object that `text` becomes on `machine`."""
    tool = f"{llvm.llvm_version_info}|{_CODE_VERSION}|{machine.triple}|{machine.cpu}|{machine.features}"
    return hashlib.sha256(f"{tool}|{text}".encode()).hexdigest()


def cached_object(text: str, machine: CpuMachine) -> bytes:
    """The object for `text`, from the store if it is there. Safe for concurrent processes; a full disk is no error."""
    key = object_key(text, machine)
    path = cache_folder() / "objects" / key[:2] / f"{key}.o"
    try:
        stored = path.read_bytes()
        if len(stored) > 32 and stored[:32] == hashlib.sha256(stored[32:]).digest():
            return stored[32:]
    except OSError:
        pass  # not there, or not readable: compile
    code = compile_ir(text, machine).code
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
        _prune(path.parent)
    except OSError:
        pass  # the store only saves time
    return code


def _prune(folder: Path) -> None:
    """Remove the oldest objects of a folder that has become full."""
    files = list(folder.iterdir())
    if len(files) <= _CACHE_FILES:
        return
    for file in sorted(files, key=lambda each: each.stat().st_mtime)[: _CACHE_FILES // 2]:
        file.unlink(missing_ok=True)
