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


@dataclass(frozen=True)
class NativeFunctions:
    """The exported functions of a native program (see `codegen.main`); keeps the code in memory while it is referred to."""

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
    names = ("main", "run", "worker", "stop", "profile")
    for name in names:
        builder.export_symbol(f"{prefix}_{name}")
    builder.add_current_process()
    try:
        library = builder.link(jit, f"nestc{next(_numbers)}")
    except RuntimeError as error:
        raise BundleError(f"the native code cannot be linked: {error}") from error
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    arguments = ((pointer, pointer, number, number), (pointer, pointer), (pointer, number), (pointer,), (pointer, pointer))
    functions = [
        ctypes.CFUNCTYPE(None, *types)(library[f"{prefix}_{name}"]) for name, types in zip(names, arguments, strict=True)
    ]
    return NativeFunctions(*functions, code=(jit, library))
