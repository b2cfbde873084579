"""Times of regions from what each kind of device tells, runs, and the roofs of devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest

import nestc
from nestc.bundle.artifact import Artifact
from nestc.bundle.bundle import BundlePartition
from nestc.report import observe as observing
from nestc.report import roofs
from nestc.report.graph import graph_of
from nestc.report.observe import Runs, Spent, latency_ms, observe, region_times
from nestc.report.roofs import Ceiling, roof_of
from nestc.report.schema import Figure
from nestc.runtime.aim.device import MACHINE_FILE
from nestc.runtime.aim.machine import format_machine, load

WHOLE = Spent(0.5, "measured", None, "all of it")


def mark(end_us: float, **more: Any) -> Mapping[str, Any]:
    return {"device": "cpu", "region": "p", "start_us": 0.0, "end_us": end_us, "kind": "measured", "request": 0, **more}


def partition(on_cpu: nestc.Executable, kind: str, metadata: Mapping[str, Any]) -> BundlePartition:
    """The only partition, as if a device of another kind ran it."""
    (own,) = on_cpu.bundle.partitions
    return dataclasses.replace(own, artifact=Artifact(kind, {}, {}, metadata))


def test_layers_of_aim_count_ticks_and_energy(on_cpu: nestc.Executable) -> None:
    regions = graph_of(on_cpu.bundle).regions[:2]
    layers = [
        {"name": regions[0].name, "ticks": 400, "energy_joules": 1e-6},
        {"name": regions[0].name, "ticks": 200, "energy_joules": 2e-6},
        {"name": "of nobody", "ticks": 5, "energy_joules": 1e-6},
    ]
    timing = {"ticks": 605, "memory_seconds": 605 / 2e9, "host_seconds": 1e-6, "seconds": 2e-6, "layers": layers}
    found = region_times(partition(on_cpu, "aim", {"timing": timing}), regions, [], WHOLE)
    assert list(found) == [regions[0].name]
    spent = found[regions[0].name]
    assert (spent.ms, spent.kind) == (pytest.approx(600 / 2e9 * 1e3), "modelled")
    assert spent.energy == Figure(pytest.approx(3e-3), "modelled") and "without what the host does" in spent.about


def test_a_device_that_tells_only_the_whole(on_cpu: nestc.Executable) -> None:
    regions = graph_of(on_cpu.bundle).regions
    vendor = partition(on_cpu, "onnxruntime", {})
    rows = [{"partition": vendor.name, "us": 500.0}]
    assert region_times(vendor, regions, rows, WHOLE) == {}
    assert region_times(vendor, regions[:1], rows, WHOLE) == {regions[0].name: WHOLE}


def test_regions_share_the_kernel_that_computes_both(on_cpu: nestc.Executable) -> None:
    conv, pool, *_ = regions = graph_of(on_cpu.bundle).regions
    rows = [{"origin": (*conv.origin, *pool.origin), "us": 100.0}]
    found = region_times(partition(on_cpu, "cpu-native", {}), regions, rows, WHOLE)
    operations = 256 * 55, 256
    assert {name: spent.ms for name, spent in found.items()} == {
        conv.name: pytest.approx(0.1 * operations[0] / sum(operations)),
        pool.name: pytest.approx(0.1 * operations[1] / sum(operations)),
    }
    assert "computes several regions" in found[pool.name].about
    # A kernel of part of what is known, and of something else, belongs to nobody.
    rows = [{"origin": (*conv.origin, "Other:one"), "us": 100.0}]
    assert region_times(partition(on_cpu, "cpu-native", {}), regions, rows, WHOLE) == {}


def test_layers_without_a_clock_tell_nothing(on_cpu: nestc.Executable) -> None:
    regions = graph_of(on_cpu.bundle).regions
    timing = {"cycles": 7, "layers": [{"name": regions[0].name, "cycles": 7}]}
    assert region_times(partition(on_cpu, "vta", {"timing": timing}), regions, [], WHOLE) == {}


def test_the_typical_run_is_the_median_one() -> None:
    runs = Runs(tuple((mark(end),) for end in (9e3, 1e3, 4e3, 2e3)))
    assert runs.latency_ms == 3.0 and latency_ms(runs.typical) == 2.0
    assert runs.partition_ms() == {"p": (3.0, "measured")}


def test_a_tensor_on_its_way_is_no_partition() -> None:
    runs = Runs(((mark(1e3), mark(2e3, region="x", device="cpu->npu", bytes=4)),))
    assert runs.partition_ms() == {"p": (1.0, "measured")} and runs.latency_ms == 2.0


def test_slow_runs_are_few(played: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(observe(played(), {}, 3).timelines) == 3
    monkeypatch.setattr(observing, "ENOUGH_SECONDS", -1.0)
    assert len(observe(played(), {}, 3).timelines) == 1


def test_the_roof_of_aim_is_its_banks_bandwidth() -> None:
    machine = load("gddr6_aim")
    artifact = Artifact("aim", {MACHINE_FILE: format_machine(machine).encode()}, {}, {"machine": "gddr6_aim"})
    roof = roof_of([artifact], "aim", 1)
    assert roof is not None and roof.kind == "stated"
    assert roof.bytes_per_second == machine.peak_bytes_per_second == roof.ceilings[0].per_second


def test_two_vta_devices_share_the_bus() -> None:
    metadata = {"config": {"LOG_BATCH": 1, "LOG_BLOCK": 4}, "clock_hz": 1e8, "bus_bits": 128, "count": 2}
    roof = roof_of([Artifact("vta", {}, {}, metadata)], "vta", 1)
    assert roof is not None
    assert roof.ceilings == (Ceiling("int8", 2 * 2 * 512 * 1e8),) and roof.bytes_per_second == 1.6e9
    assert roof_of([Artifact("vta", {}, {}, {})], "vta", 1) is None


def test_only_what_uses_the_processor_has_its_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = roofs.Roof((), 1.0, "measured", "made up")
    monkeypatch.setattr(roofs, "processor", lambda threads: measured)
    vendor = Artifact("openvino", {}, {}, {})
    assert roof_of([vendor], "cpu", 1) is measured
    assert roof_of([vendor], "gpu", 1) is None
