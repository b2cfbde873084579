"""Whether this process can run code that was generated for some CPU: asked before, so that nobody meets a SIGILL."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache

from nestc.errors import TargetError

# Features that LLVM uses unasked on x86. Others in a host's list (aes, sha, clflush ...) only matter to intrinsics that
# generated code does not call, so their absence must not refuse a bundle.
_X86 = frozenset(
    "cmov cx8 mmx sse sse2 sse3 ssse3 sse4.1 sse4.2 sse4a popcnt lzcnt bmi bmi2 movbe f16c fma fma4 xop tbm gfni "
    "avx avx2 avx512f avx512cd avx512bw avx512dq avx512vl avx512ifma avx512vbmi avx512vbmi2 avx512vnni avx512bitalg "
    "avx512vpopcntdq avx512bf16 avx512fp16 avx512vp2intersect avxvnni avxvnniint8 avxvnniint16 avxifma avxneconvert "
    "avx10.1 avx10.2 amx-tile amx-int8 amx-bf16 amx-fp16".split()
)

# The psABI's levels (x86-64 psABI, "Micro-Architecture Levels"), which LLVM knows as CPU names.
_V2 = frozenset(("cmov", "cx8", "sse", "sse2", "sse3", "ssse3", "sse4.1", "sse4.2", "popcnt"))
_V3 = _V2 | {"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_LEVELS = {"x86-64-v2": _V2, "x86-64-v3": _V3, "x86-64-v4": _V4}

_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}

# Linux's names (arch/x86/include/asm/cpufeatures.h, arch/arm64/kernel/cpuinfo.c) where they are not LLVM's. What the
# system does not save at a change of tasks it does not list.
_KERNEL_NAMES = {
    "pni": "sse3", "sse4_1": "sse4.1", "sse4_2": "sse4.2", "abm": "lzcnt", "bmi1": "bmi", "avx_vnni": "avxvnni",
    "avx512_vbmi2": "avx512vbmi2", "avx512_vnni": "avx512vnni", "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512vpopcntdq", "avx512_bf16": "avx512bf16", "avx512_fp16": "avx512fp16",
    "avx_ifma": "avxifma", "amx_tile": "amx-tile", "amx_int8": "amx-int8", "amx_bf16": "amx-bf16",
    "asimd": "neon", "fp": "fp-armv8", "crc32": "crc", "atomics": "lse", "asimddp": "dotprod", "asimdhp": "fullfp16",
}  # fmt: skip


def check(triple: str, cpu: str, features: Iterable[str]) -> None:
    """Raise TargetError unless code for `triple`, `cpu` and the enabled `features` (LLVM's names) runs here."""
    here, there = _here(), _platform(triple)
    if here != there:
        raise TargetError(
            f"this code was compiled for {' on '.join(there)}, but this machine is {' on '.join(here)}; "
            "compile it for this one"
        )
    if _needed(there[0], cpu, features) <= kernel_features():
        return
    # The system may not know a feature by name that is there, so LLVM, whose library is large, has the last word.
    missing = missing_features(there[0], cpu, features, host_features())
    if missing:
        import llvmlite.binding as llvm

        raise TargetError(
            f"this code needs a CPU with {', '.join(missing)}, which this one ({llvm.get_host_cpu_name()}) has not; "
            "compile it on this machine or for an older CPU"
        )


def missing_features(architecture: str, cpu: str, features: Iterable[str], host: Mapping[str, bool]) -> list[str]:
    """What code for `cpu` with `features` may use and a CPU with the features of `host` lacks, sorted."""
    needed = _needed(architecture, cpu, features)
    if architecture != "x86_64":
        return sorted(name for name in needed if host.get(name) is False)
    return sorted(name for name in needed if not host.get(name, False))


def _needed(architecture: str, cpu: str, features: Iterable[str]) -> frozenset[str]:
    if architecture != "x86_64":
        return frozenset(features)
    return _LEVELS.get(cpu, frozenset[str]()) | (frozenset(features) & _X86)


@lru_cache(maxsize=1)
def host_features() -> Mapping[str, bool]:
    """LLVM's features of this CPU, by name."""
    import llvmlite.binding as llvm

    return dict(llvm.get_host_cpu_features())


@lru_cache(maxsize=1)
def kernel_features() -> frozenset[str]:
    """The features of this CPU that Linux lists, by LLVM's names; none elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            line = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return frozenset()
    return frozenset(_KERNEL_NAMES.get(name, name) for name in line.partition(":")[2].split())


def _here() -> tuple[str, str]:
    """Architecture and operating system of this process."""
    if sys.platform == "linux" and sys.maxsize > 1 << 32 and os.uname().machine in ("x86_64", "aarch64"):
        return os.uname().machine, "linux"
    import llvmlite.binding as llvm

    return _platform(llvm.get_process_triple())


def _platform(triple: str) -> tuple[str, str]:
    """Architecture and operating system of an LLVM triple."""
    architecture, _, rest = triple.partition("-")
    system = next((name for name in ("linux", "darwin", "windows", "freebsd") if name in rest), "")
    if "macos" in rest:
        system = "darwin"
    return _ARCHITECTURES.get(architecture, architecture), system or rest
