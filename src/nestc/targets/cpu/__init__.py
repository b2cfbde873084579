"""CPU: native code generated through LLVM."""

from nestc.targets.cpu.target import CpuTarget

__all__ = ["CpuTarget"]
