"""LLVM IR text to object code through llvmlite, and objects from the user's store."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import llvmlite.binding as llvm

from nestc.blobs import code_digest, key_of, user_store
from nestc.errors import Error
from nestc.kernels.api import CpuMachine

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
    """Content address of the object that LLVM IR becomes on `machine`."""
    return key_of("object", text, _tools(machine))


def cached_object(text: str, machine: CpuMachine) -> bytes:
    """The object for LLVM IR, from the user's store if it is there. Safe for concurrent processes."""
    key = object_key(text, machine)
    known = user_store().get(key)
    if known is not None:
        return known
    code = compile_ir(text, machine).code
    user_store().put(key, code)
    return code


@dataclass(frozen=True)
class KernelObject:
    """The object code of one kernel, and the bytes of scratch memory that each worker needs for it."""

    code: bytes
    scratch_bytes: int


def kernel_key(text: str, machine: CpuMachine) -> str:
    """Content address of what a kernel of this text (`tensor.text`) becomes: its object is found before its code is
    made, or even verified, which takes most of the time of compiling it."""
    return key_of("kernel", text, repr(machine), _tools(machine))


def known_kernel(key: str) -> KernelObject | None:
    """What `compile_kernel` has stored under `key`, in this process or another."""
    found = user_store().get(key)
    return None if found is None else KernelObject(found[8:], int.from_bytes(found[:8], "little"))


def compile_kernel(text: str, scratch_bytes: int, machine: CpuMachine, key: str) -> bytes:
    """The object for the LLVM IR of a kernel, which is then kept under `key`."""
    code = compile_ir(text, machine).code
    user_store().put(key, scratch_bytes.to_bytes(8, "little") + code)
    return code


def _tools(machine: CpuMachine) -> str:
    """All that turns a text into an object, as text."""
    version = ".".join(map(str, llvm.llvm_version_info))
    return f"{version}|{code_digest('tensor', 'codegen')}|{machine.triple}|{machine.cpu}|{machine.features}"
