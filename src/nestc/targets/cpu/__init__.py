"""CPU: native code generated through LLVM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestc.targets.cpu.target import CpuTarget

__all__ = ["CpuTarget"]


def __getattr__(name: str) -> Any:
    # The target needs all kernels; its description of machines, beside it, is asked for without them.
    if name != "CpuTarget":
        raise AttributeError(f"module 'nestc.targets.cpu' has no attribute {name!r}")
    from nestc.targets.cpu.target import CpuTarget

    return CpuTarget
