"""Whether this process can run code that was generated for some CPU: asked before, so that nobody meets a SIGILL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

import llvmlite.binding as llvm

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


def check(triple: str, cpu: str, features: Iterable[str]) -> None:
    """Raise TargetError unless code for `triple`, `cpu` and the enabled `features` (LLVM's names) runs here."""
    here, there = _platform(llvm.get_process_triple()), _platform(triple)
    if here != there:
        raise TargetError(
            f"this code was compiled for {' on '.join(there)}, but this machine is {' on '.join(here)}; "
            "compile it for this one"
        )
    missing = missing_features(there[0], cpu, features, host_features())
    if missing:
        raise TargetError(
            f"this code needs a CPU with {', '.join(missing)}, which this one ({llvm.get_host_cpu_name()}) has not; "
            "compile it on this machine or for an older CPU"
        )


def missing_features(architecture: str, cpu: str, features: Iterable[str], host: Mapping[str, bool]) -> list[str]:
    """What code for `cpu` with `features` may use and a CPU with the features of `host` lacks, sorted."""
    if architecture != "x86_64":
        return sorted(name for name in set(features) if host.get(name) is False)
    needed = _LEVELS.get(cpu, frozenset[str]()) | (set(features) & _X86)
    return sorted(name for name in needed if not host.get(name, False))


@lru_cache(maxsize=1)
def host_features() -> Mapping[str, bool]:
    """LLVM's features of this CPU, by name."""
    return dict(llvm.get_host_cpu_features())


def _platform(triple: str) -> tuple[str, str]:
    """Architecture and operating system of an LLVM triple."""
    architecture, _, rest = triple.partition("-")
    system = next((name for name in ("linux", "darwin", "windows", "freebsd") if name in rest), "")
    if "macos" in rest:
        system = "darwin"
    return _ARCHITECTURES.get(architecture, architecture), system or rest
