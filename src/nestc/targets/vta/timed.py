"""What the timing simulator says of a partition, as the JSON values that its artifact carries: all of it modelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.energy import HOROWITZ_45NM, Energy, joules
from nestc.runtime.vta.isa import Stream
from nestc.runtime.vta.report import Report
from nestc.runtime.vta.timing import simulate_timing_many


def timed(
    launches: Sequence[Sequence[Stream]],
    last: Sequence[Mapping[str, int]],
    config: VtaConfig,
    count: int,
    energy: Energy = HOROWITZ_45NM,
) -> dict[str, Any]:
    """Cycles, seconds, energy and utilization of launches that run one after the other, on up to `count` devices each.

    ``last``: for each launch, of each layer the number of its last instruction in the first device's stream.
    """
    reports = [simulate_timing_many([stream.instructions for stream in launch], config) for launch in launches]
    cycles = sum(_slowest(launch) for launch in reports)
    every = [report for launch in reports for report in launch]
    spent = [joules(report, energy) for report in every]
    layers: list[dict[str, Any]] = []
    for launch, ends in zip(reports, last, strict=True):
        first = 0
        for name, end in ends.items():
            took = launch[0].between(first, end + 1)
            layers.append({"name": name, "cycles": took, "first": first, "last": end})
            first = end + 1
        if layers and launch:
            # What follows the last layer's instructions (the end of the stream, slower devices) is counted with it.
            layers[-1]["cycles"] += _slowest(launch) - launch[0].between(0, first)
    return {
        "kind": "modelled",
        "cycles": cycles,
        "seconds": cycles / config.clock_hz,
        "energy_joules": sum(each["total"] for each in spent),
        "energy_parts": {part: sum(each[part] for each in spent) for part in ("mac", "alu", "sram", "dram")},
        "engines": _engines(every, cycles * count),
        "gemm_utilization": sum(report.work.gemm for report in every) / max(cycles * count, 1),
        "bytes_read": sum(report.work.bus_read for report in every),
        "bytes_written": sum(report.work.bus_written for report in every),
        "layers": layers,
    }


def _slowest(launch: Sequence[Report]) -> int:
    return max((report.cycles for report in launch), default=0)


def _engines(reports: Sequence[Report], cycles: int) -> dict[str, dict[str, Any]]:
    """For each engine its instructions, cycles by what it did, and the part of all cycles in which it was busy."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        for engine in report.engines:
            total = found.setdefault(engine.name, {"instructions": 0, "busy": 0, "waiting": 0, "fetching": 0})
            total["instructions"] += engine.count
            total["busy"] += engine.busy
            total["waiting"] += engine.tokens
            total["fetching"] += engine.instructions
    for total in found.values():
        total["utilization"] = total["busy"] / max(cycles, 1)
    return found
