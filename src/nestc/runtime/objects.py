"""Load relocatable object files into this process: ELF on Linux by our own linker, other formats by LLVM's."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import NamedTuple

from nestc.errors import BundleError
from nestc.runtime import link
from nestc.runtime.elf import AARCH64, X86_64, machine_of

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_EXPORTS = {
    "main": (_POINTER, _POINTER, _NUMBER, _NUMBER),
    "run": (_POINTER, _POINTER),
    "worker": (_POINTER, _NUMBER),
    "stop": (_POINTER,),
    "profile": (_POINTER, _POINTER),
}

_MACHINES = {"x86_64": X86_64, "aarch64": AARCH64}

# What generated code calls is in the process already, where Python was linked with libm; else, and for helpers of
# compilers (conversions of halves, say), it is here.
_LIBRARIES = ("libm.so.6", "libgcc_s.so.1")


class NativeFunctions(NamedTuple):
    """The exported functions of a native program (see `codegen.main`); the code stays in memory as long as this.

    They take numbers, or objects of ctypes made of them before.
    """

    main: Callable[..., None]
    run: Callable[[int, int], None]
    worker: Callable[[int, int], None]
    stop: Callable[[int], None]
    profile: Callable[[int, int], None]
    code: object


def load(objects: Iterable[bytes], prefix: str) -> NativeFunctions:
    """Link the objects with each other and with this process (libm, libc). Raises BundleError if that fails.

    The calls release Python's global lock.
    """
    blobs = list(objects)
    names = [f"{prefix}_{name}" for name in _EXPORTS]
    flush = _flush() if _ours(blobs) else None
    code: object
    addresses: Mapping[str, int]
    if flush is None:
        from nestc.runtime.objects_llvm import link_with_llvm  # a library of 100 MB: only where it is needed

        code, addresses = link_with_llvm(blobs, names)
    else:
        try:
            code = image = link.load(blobs, names, _address, flush)
        except BundleError as error:
            raise BundleError(f"the native code cannot be linked: {error}") from error
        addresses = image.addresses
    return NativeFunctions(
        **{
            short: ctypes.CFUNCTYPE(None, *types)(addresses[name])
            for name, (short, types) in zip(names, _EXPORTS.items(), strict=True)
        },
        code=code,
    )


def _ours(blobs: Iterable[bytes]) -> bool:
    """Whether our linker takes these objects: those for this machine, on Linux."""
    here = _MACHINES.get(os.uname().machine) if sys.platform == "linux" and sys.maxsize > 1 << 32 else None
    return here is not None and all(machine_of(blob) == here for blob in blobs)


@cache
def _libraries() -> tuple[ctypes.CDLL, ...]:
    """The process itself, and libraries that it may not have loaded."""
    found = [ctypes.CDLL(None)]
    for name in _LIBRARIES:
        try:
            found.append(ctypes.CDLL(name))
        except OSError:  # another C library has other names, and all functions in one file
            continue
    return tuple(found)


def _address(name: str) -> int | None:
    """Where a function of this process is."""
    for library in _libraries():
        try:
            return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        except AttributeError:
            continue
    return None


def _flush() -> link.Flush | None:
    """What makes new code visible to the processor; None where nothing here can.

    x86 keeps its instruction cache in step by itself (Intel SDM, vol. 3A, section 12.6). On AArch64 it takes
    instructions that Python has not, so libgcc's function is called; without it LLVM's linker, which has its own, is
    the way.
    """
    if os.uname().machine == "x86_64":
        return lambda begin, end: None
    address = _address("__clear_cache")
    if address is None:
        return None
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(address)
