"""Link object files into this process with LLVM's JIT linker: what `runtime.link` does not know."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from typing import Any, cast

import llvmlite.binding as llvm

from nestc.errors import BundleError

_numbers = itertools.count()
_initialised = threading.Lock()


def link_with_llvm(objects: Iterable[bytes], names: Sequence[str]) -> tuple[object, dict[str, int]]:
    """What keeps the code in memory, and the addresses of the functions `names`. Raises BundleError if that fails."""
    with _initialised:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    jit = cast(Any, llvm.create_lljit_compiler(machine))
    builder = cast(Any, llvm.JITLibraryBuilder())
    for blob in objects:
        builder.add_object_img(blob)
    for name in names:
        builder.export_symbol(name)
    builder.add_current_process()
    try:
        library = builder.link(jit, f"nestc{next(_numbers)}")
    except RuntimeError as error:
        raise BundleError(f"the native code cannot be linked: {error}") from error
    return (jit, library), {name: library[name] for name in names}
