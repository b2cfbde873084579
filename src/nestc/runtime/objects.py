"""Load relocatable object files into this process with LLVM's JIT linker."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import llvmlite.binding as llvm

from nestc.errors import BundleError

_numbers = itertools.count()
_initialised = threading.Lock()

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_EXPORTS = {
    "main": (_POINTER, _POINTER, _NUMBER, _NUMBER),
    "run": (_POINTER, _POINTER),
    "worker": (_POINTER, _NUMBER),
    "stop": (_POINTER,),
    "profile": (_POINTER, _POINTER),
}


@dataclass(frozen=True)
class NativeFunctions:
    """The exported functions of a native program (see `codegen.main`); the code stays in memory as long as this."""

    main: Callable[[int, int, int, int], None]
    run: Callable[[int, int], None]
    worker: Callable[[int, int], None]
    stop: Callable[[int], None]
    profile: Callable[[int, int], None]
    code: object


def load(objects: Iterable[bytes], prefix: str) -> NativeFunctions:
    """Link the objects with each other and with this process (libm, libc). Raises BundleError if that fails.

    The calls release Python's global lock.
    """
    with _initialised:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    jit = cast(Any, llvm.create_lljit_compiler(machine))
    builder = cast(Any, llvm.JITLibraryBuilder())
    for blob in objects:
        builder.add_object_img(blob)
    for name in _EXPORTS:
        builder.export_symbol(f"{prefix}_{name}")
    builder.add_current_process()
    try:
        library = builder.link(jit, f"nestc{next(_numbers)}")
    except RuntimeError as error:
        raise BundleError(f"the native code cannot be linked: {error}") from error
    return NativeFunctions(
        **{name: ctypes.CFUNCTYPE(None, *types)(library[f"{prefix}_{name}"]) for name, types in _EXPORTS.items()},
        code=(jit, library),
    )
