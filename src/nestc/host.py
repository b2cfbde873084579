"""The processor that this process runs on, as LLVM and the operating system describe it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import llvmlite.binding as llvm


@dataclass(frozen=True)
class HostCpu:
    """LLVM's triple, name and features of the processor, and bytes of its data caches (L1, L2, L3)."""

    triple: str
    name: str
    features: Mapping[str, bool]
    cache_bytes: tuple[int, int, int]

    @property
    def feature_text(self) -> str:
        """The features as LLVM's code generators take them: ``+avx2,-avx512f`` ..."""
        return ",".join(f"{'+' if there else '-'}{name}" for name, there in sorted(self.features.items()))


def host_cpu() -> HostCpu:
    """This machine's processor."""
    features = llvm.get_host_cpu_features()
    return HostCpu(llvm.get_process_triple(), llvm.get_host_cpu_name(), dict(features), _cache_bytes())


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache_bytes() -> tuple[int, int, int]:
    """Data cache sizes of core 0 (L1, L2, L3) from Linux's sysfs; common values where it does not tell."""
    sizes = {1: 32 << 10, 2: 512 << 10, 3: 8 << 20}
    base = Path("/sys/devices/system/cpu/cpu0/cache")
    if not base.is_dir():
        return sizes[1], sizes[2], sizes[3]
    for entry in sorted(os.listdir(base)):
        try:
            kind = (base / entry / "type").read_text().strip()
            level = int((base / entry / "level").read_text())
            text = (base / entry / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if kind in ("Data", "Unified") and level in sizes and text[-1:] in "KM":
            sizes[level] = int(text[:-1]) << (10 if text[-1] == "K" else 20)
    return sizes[1], sizes[2], sizes[3]
