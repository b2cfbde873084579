"""Facts about the machine and the software that a figure needs beside it, and this process's cores and memory."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("nestc", "numpy", "onnx", "llvmlite", "onnxruntime", "openvino", "nncf", "ncnn", "pnnx", "mnn")


def context(data: str, seed: int | None) -> dict[str, object]:
    """What every benchmark's JSON carries: data, seed, versions, processor, cores and date (UTC)."""
    return {
        "data": data,
        "seed": seed,
        "versions": versions(),
        "cpu": cpu_name(),
        "cores": len(usable_cores()),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter here and are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor as the system names it, with family and model where the name says little."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}
    for line in info.read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts.get('model', '?')})"
    return name


def usable_cores() -> list[int]:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextmanager
def pinned(count: int) -> Iterator[Sequence[int]]:
    """Restrict this process to its last `count` cores, threads made from now on included; undone at the end.

    The last ones, because the first serves most interrupts. Does nothing where the system has no such call.
    """
    before = usable_cores()
    chosen = before[-count:]
    if not hasattr(os, "sched_setaffinity"):
        yield chosen
        return
    _restrict(chosen)
    try:
        yield chosen
    finally:
        _restrict(before)


def _restrict(cores: Sequence[int]) -> None:
    """Set the cores of every thread this process has."""
    tasks = Path("/proc/self/task")
    threads = [int(entry.name) for entry in tasks.iterdir()] if tasks.exists() else [0]
    for thread in threads:
        try:
            os.sched_setaffinity(thread, cores)
        except ProcessLookupError:
            continue  # the thread ended in the meantime


def peak_rss_mb() -> float:
    """The most memory this process has had resident so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
