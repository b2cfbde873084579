"""Machine data of CPUs: this one, or a named instruction set to cross-compile for."""

from __future__ import annotations

import dataclasses

import llvmlite.binding as llvm

from nestc.errors import TargetError
from nestc.host import host_cpu
from nestc.kernels.api import CpuMachine
from nestc.targets import suggestion

# Cache sizes of the presets are those that current cores of that instruction set have at least.
_X86 = "x86_64-unknown-linux-gnu"
_PRESETS: dict[str, CpuMachine] = {
    "avx512": CpuMachine(
        name="avx512",
        triple=_X86,
        cpu="x86-64-v4",
        features="",
        vector_bytes=64,
        vector_registers=32,
        fma=True,
        l1_bytes=32 << 10,
        l2_bytes=1 << 20,
        l3_bytes=16 << 20,
        f16c=True,
        dot_bytes=64,
    ),
    "avx2": CpuMachine(
        name="avx2",
        triple=_X86,
        cpu="x86-64-v3",
        features="",
        vector_bytes=32,
        vector_registers=16,
        fma=True,
        l1_bytes=32 << 10,
        l2_bytes=512 << 10,
        l3_bytes=8 << 20,
        f16c=True,
        dot_bytes=32,
    ),
    "sse2": CpuMachine(
        name="sse2",
        triple=_X86,
        cpu="x86-64",
        features="",
        vector_bytes=16,
        vector_registers=16,
        fma=False,
        l1_bytes=32 << 10,
        l2_bytes=256 << 10,
        l3_bytes=4 << 20,
        dot_bytes=16,
    ),
    "neon": CpuMachine(
        name="neon",
        triple="aarch64-unknown-linux-gnu",
        cpu="generic",
        features="+neon",
        vector_bytes=16,
        vector_registers=32,
        fma=True,
        l1_bytes=32 << 10,
        l2_bytes=512 << 10,
        l3_bytes=4 << 20,
        f16c=True,
    ),
}
_PRESETS["avx512_vnni"] = dataclasses.replace(
    _PRESETS["avx512"], name="avx512_vnni", features="+avx512vnni,+avx512bf16", vnni=True, bf16=True
)
_PRESETS["neon_dotprod"] = dataclasses.replace(
    _PRESETS["neon"], name="neon_dotprod", features="+neon,+dotprod", dot_bytes=16, dotprod=True
)
NAMES = ("native", *_PRESETS)


def machine(arch: str) -> CpuMachine:
    """The machine called `arch`: ``native`` or a preset. Raises TargetError for another name."""
    if arch == "native":
        return host_machine()
    if arch not in _PRESETS:
        near = suggestion(arch.lower(), NAMES)
        raise TargetError(f"target cpu: there is no arch {arch!r}{near}; choose one of {', '.join(NAMES)}")
    preset = _PRESETS[arch]
    here = llvm.get_process_triple()
    if preset.triple.split("-")[0] != here.split("-")[0]:
        return preset
    # The same architecture: keep this system's object format, so that the code can run here.
    return dataclasses.replace(preset, triple=here)


def host_machine() -> CpuMachine:
    """This machine, as LLVM and the operating system describe it."""
    host = host_cpu()
    triple, cpu, features, flat = host.triple, host.name, host.features, host.feature_text
    l1, l2, l3 = host.cache_bytes
    if triple.startswith(("x86_64", "amd64")):
        wide = bool(features.get("avx512f") and features.get("avx512vl") and features.get("avx512bw"))
        vector = 64 if wide else 32 if features.get("avx2") else 16
        return CpuMachine(
            name=cpu,
            triple=triple,
            cpu=cpu,
            features=flat,
            vector_bytes=vector,
            vector_registers=32 if wide else 16,
            fma=bool(features.get("fma")),
            l1_bytes=l1,
            l2_bytes=l2,
            l3_bytes=l3,
            f16c=bool(features.get("f16c")),
            dot_bytes=vector,
            vnni=bool(features.get("avxvnni") or (wide and features.get("avx512vnni"))),
            bf16=bool(wide and features.get("avx512bf16")),
        )
    if triple.startswith(("aarch64", "arm64")):
        return CpuMachine(
            name=cpu,
            triple=triple,
            cpu=cpu,
            features=flat,
            vector_bytes=16,
            vector_registers=32,
            fma=True,
            l1_bytes=l1,
            l2_bytes=l2,
            l3_bytes=l3,
            f16c=True,
            dot_bytes=16,
            bf16=bool(features.get("bf16")),
            dotprod=bool(features.get("dotprod")),
        )
    # Any other processor: vectors of 16 bytes, which LLVM splits where the machine has none.
    return CpuMachine(cpu, triple, cpu, flat, 16, 16, False, l1, l2, l3)
