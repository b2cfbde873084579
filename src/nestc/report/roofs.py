"""What a device can do at most, for the roofline: stated by a simulated machine, measured for the processor here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from nestc.bundle.artifact import Artifact
from nestc.measure.machine import usable_cores
from nestc.measure.peak import meter_of
from nestc.runtime.stages import CPU

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
READINGS = 25
"""Of which the best counts: another program may take the processor for a while."""
MEMORY_BYTES = 64 << 20
"""Of an array that is copied to measure memory: more than the last-level cache a core has for itself."""

CACHED_BYTES = (256 << 10, 4 << 20)
"""In use by copies that measure caches: about what a core's own cache holds, and a share of the last one."""


@dataclass(frozen=True)
class Ceiling:
    """Operations a second (a multiply-add counts two) in a number format."""

    numbers: str
    per_second: float


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second, read and written, as long as no more than ``bytes`` are in use."""

    bytes: int
    per_second: float


@dataclass(frozen=True)
class Roof:
    """Ceilings of a device and its bytes a second, how they are known (``stated`` or ``measured``), and from where."""

    ceilings: tuple[Ceiling, ...]
    bytes_per_second: float
    kind: str
    source: str


def roof_of(artifacts: Sequence[Artifact], resource: str, threads: int) -> Roof | None:
    """The roof of the device that runs these artifacts (of one kind); None where nothing states or measures it.

    What shares the resource "cpu" has the roof of this processor, vendors' runtimes too.
    """
    if artifacts and artifacts[0].kind == "vta":
        return _vta(artifacts[0].metadata)
    if artifacts and artifacts[0].kind == "aim":
        return _aim(artifacts[0])
    return processor(threads) if resource == CPU else None


def _vta(metadata: Mapping[str, Any]) -> Roof | None:
    config: Mapping[str, int] = metadata.get("config", {})
    if not {"LOG_BATCH", "LOG_BLOCK"} <= set(config) or "clock_hz" not in metadata or "bus_bits" not in metadata:
        return None
    clock, count = float(metadata["clock_hz"]), int(metadata.get("count", 1))
    macs = count * 2 ** (config["LOG_BATCH"] + 2 * config["LOG_BLOCK"])
    return Roof(
        (Ceiling("int8", 2 * macs * clock),),
        metadata["bus_bits"] / 8 * clock,
        "stated",
        f"{macs} multiply-adds a cycle at {clock / 1e6:g} MHz, and the read channel of a bus of "
        f"{metadata['bus_bits']} bits, as the configuration {metadata.get('preset', '')} says",
    )


def _aim(artifact: Artifact) -> Roof:
    from nestc.runtime.aim.device import machine_of

    machine = machine_of(artifact)
    peak = machine.peak_bytes_per_second
    return Roof(
        (Ceiling("bfloat16", peak),),  # each of two bytes is multiplied and added once
        peak,
        "stated",
        f"a column of every bank every nCCDS ticks ({machine.timing['nCCDS']} at {machine.clock_hz / 1e6:g} MHz), as "
        f"the machine {machine.name} says: a multiply-add for each weight, so operations and bytes have one ceiling",
    )


@lru_cache(maxsize=4)
def processor(threads: int) -> Roof:
    """Peaks of this processor, measured now (a second or two): chains of one instruction, and copies of memory."""
    threads = max(1, min(threads, len(usable_cores())))
    ceilings: list[Ceiling] = []
    for precision, numbers in PRECISIONS.items():
        meter = meter_of(precision, threads)
        if meter is not None:
            ceilings.append(Ceiling(numbers, 1e9 * max(meter.once() for _ in range(READINGS))))
    cores = "one core" if threads == 1 else f"{threads} cores"
    return Roof(
        tuple(ceilings),
        memory_bytes_per_second(threads),
        "measured",
        f"on {cores} here, just before this report: independent chains of one instruction, and copies of memory larger "
        "than the caches (what stays in a cache may lie above that line)",
    )


def memory_bytes_per_second(threads: int) -> float:
    """Bytes a second that copies of large arrays read and write, with `threads` of them at once; the best of some."""
    pairs = [(np.zeros(MEMORY_BYTES, np.uint8), np.ones(MEMORY_BYTES, np.uint8)) for _ in range(threads)]
    readings = range(READINGS // 3)
    return max(2 * MEMORY_BYTES * threads / _together([_copier(*pair) for pair in pairs]) for _ in readings)


@lru_cache(maxsize=4)
def bandwidths(threads: int) -> tuple[Bandwidth, ...]:
    """Bytes a second that copies of arrays which stay in caches read and write: one core's, measured now, times
    `threads`, since the small caches belong to one core each and the large ones keep up."""
    found: list[Bandwidth] = []
    for size in CACHED_BYTES:
        copy = _copier(np.zeros(size // 2, np.uint8), np.ones(size // 2, np.uint8))
        turns = max(1, (1 << 22) // size)
        best = float("inf")
        for _ in range(READINGS):
            begin = time.perf_counter()
            for _ in range(turns):
                copy()
            best = min(best, time.perf_counter() - begin)
        found.append(Bandwidth(size, threads * size * turns / best))
    return tuple(found)


def _copier(destination: np.ndarray, source: np.ndarray) -> Callable[[], None]:
    return lambda: np.copyto(destination, source)


def _together(jobs: Sequence[Callable[[], None]]) -> float:
    """Seconds from the moment all jobs begin, each in a thread, until the last has ended."""
    gate = threading.Barrier(len(jobs))
    spans: list[tuple[float, float]] = []

    def work(job: Callable[[], None]) -> None:
        gate.wait()
        begin = time.perf_counter()
        job()
        spans.append((begin, time.perf_counter()))

    workers = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(end for _, end in spans) - min(begin for begin, _ in spans)
