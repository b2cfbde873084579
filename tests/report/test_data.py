"""What a report collects: work, times, lanes, energies, and how each is known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nestc
from nestc.bundle.schema import DeviceSpec
from nestc.errors import BundleError
from nestc.partition.plan import PlannedSplit
from nestc.report import AccuracyData, collect
from nestc.report.observe import Spent, region_times
from nestc.report.schema import Figure, together, total

Make = Callable[..., Any]


def test_work_and_bytes_of_each_region(played: Make) -> None:
    conv, pool, flat, gemm = collect(played()).regions
    assert [region.ops for region in (conv, pool, flat, gemm)] == [
        ("Conv", "Relu"),
        ("MaxPool",),
        ("Flatten",),
        ("Gemm",),
    ]
    assert conv.operations == 2 * 4 * 8 * 8 * 27 + 4 * 8 * 8
    assert (conv.bytes_in, conv.bytes_out, conv.weights) == (3 * 64 * 4, 4 * 64 * 4, (4 * 27 + 4) * 4)
    assert pool.operations == 4 * 16 * 4
    assert flat.operations == 0
    # The weights of the Gemm are larger than what the stored graph keeps: there they are an input.
    assert gemm.operations == 2 * 5 * 64
    assert (gemm.bytes_in, gemm.bytes_out, gemm.weights) == (64 * 4, 5 * 4, (64 * 5 + 5) * 4)
    assert {region.numbers for region in (conv, pool, gemm)} == {"float32"}


def test_times_of_regions_say_how_they_are_known(played: Make) -> None:
    conv, pool, flat, gemm = collect(played()).regions
    assert conv.observed == Figure(pytest.approx(0.03), "modelled")
    assert pool.observed == Figure(pytest.approx(0.01), "modelled")
    assert flat.observed is None and "whole" in flat.about
    assert gemm.observed == Figure(pytest.approx(0.009), "measured")
    assert conv.predicted == Figure(0.02, "modelled") and gemm.predicted == Figure(0.005, "measured")
    assert conv.costs == {"cpu": Figure(0.05, "measured"), "npu": Figure(0.02, "modelled")}
    assert gemm.refusals == {"npu": "no <such> layer"}


def test_partitions_and_devices(played: Make) -> None:
    data = collect(played())
    npu, cpu = data.partitions
    assert npu.observed == Figure(pytest.approx(0.04), "modelled") and npu.predicted == Figure(0.04, "modelled")
    assert cpu.observed == Figure(pytest.approx(0.01), "measured")
    assert cpu.predicted == Figure(pytest.approx(0.005), "measured")
    assert npu.bytes == (3 * 64 + 64 + 4 * 27 + 4) * 4  # what is between its regions crosses no border
    assert npu.energy == Figure(pytest.approx(2e-3), "modelled") and cpu.energy is None
    assert [(device.name, device.kind, device.regions) for device in data.devices] == [
        ("npu", "modelled", 2),
        ("cpu", "measured", 2),
    ]
    roof = data.devices[0].roof
    assert roof is not None and roof.kind == "stated"
    assert roof.ceilings[0].per_second == 2 * 256 * 1e8 and roof.bytes_per_second == 8e8
    measured = data.devices[1].roof
    assert measured is not None and measured.kind == "measured" and measured.bytes_per_second > 0
    assert "1 GB/s (estimated)" in data.devices[0].link and not data.devices[1].link


def test_latency_energy_and_bound(played: Make) -> None:
    data = collect(played(optimal=True, splits=(PlannedSplit("conv", (3, 1)),)))
    assert data.latency == Figure(pytest.approx(0.055), "measured + modelled + estimated")
    assert data.energy == Figure(pytest.approx(3e-3), "modelled + estimated") and data.energy_without == ("cpu",)
    assert data.predicted == Figure(0.05, "measured + modelled")
    assert data.lower_bound is not None and data.lower_bound.value == 0.045 and data.optimal
    assert data.splits == {"conv": (3, 1)} and data.single_device_ms == {"cpu": 0.11}


def test_energies_of_regions(played: Make, on_cpu: nestc.Executable) -> None:
    # The simulator tells that of all its layers only; the processor's is its power, if that is stated, times its time.
    assert [region.energy for region in collect(played()).regions] == [None] * 4
    bundle = dataclasses.replace(on_cpu.bundle, devices=(DeviceSpec("cpu", "cpu", watts=10.0),))
    conv = collect(nestc.Executable(bundle), runs=1).regions[0]
    assert conv.observed is not None
    assert conv.energy == Figure(pytest.approx(10 * conv.observed.value), "estimated")


def test_lanes_are_devices_then_links(played: Make) -> None:
    (timeline,) = collect(played(), runs=2).timelines
    assert timeline.lanes == ("npu", "cpu", "npu->cpu") and timeline.requests == 1
    link = timeline.marks[1]
    assert (link.lane, link.name, link.bytes, link.kind) == ("npu->cpu", "p", 256, "estimated")


def test_several_requests_are_a_timeline_more(played: Make) -> None:
    one, several = collect(played(), requests=3).timelines
    assert one.per_second is None and several.per_second == Figure(25000.0, "modelled")
    assert several.requests == 3 and {mark.request for mark in several.marks} == {0, 1, 2}


def test_edges_have_types_and_say_where_they_cross(played: Make) -> None:
    data = collect(played())
    edges = {edge.tensor: edge for edge in data.edges}
    assert (edges["x"].source, edges["y"].destination) == (None, None)
    assert [name for name, edge in edges.items() if edge.crosses] == ["p"]
    assert edges["p"].us == Figure(5.0, "estimated") and edges["p"].bytes == 256 and edges["p"].shape == (1, 4, 4, 4)
    assert [(border.kind, border.name) for border in data.borders] == [("input", "x"), ("output", "y")]


def test_a_bundle_of_the_cpu_alone_has_one_lane(on_cpu: nestc.Executable) -> None:
    data = collect(on_cpu, runs=2)
    assert data.timelines[0].lanes == ("cpu",) and data.runs == 2
    assert data.latency.kind == "measured" and data.latency.value > 0
    times = [region.observed for region in data.regions if region.ops != ("Flatten",)]
    assert all(time is not None and time.kind == "measured" and time.value > 0 for time in times)
    assert data.energy is None or data.energy.kind == "estimated"  # a processor has no meter that we read


def test_inputs_may_be_given(on_cpu: nestc.Executable) -> None:
    with pytest.raises(nestc.ShapeError):
        collect(on_cpu, inputs={"x": np.zeros((1, 3, 8, 9), np.float32)})
    assert collect(on_cpu, runs=1, inputs={"x": np.zeros((1, 3, 8, 8), np.float32)}).runs == 1


def test_a_bundle_without_a_graph_is_an_error(played: Make) -> None:
    executable = played()
    executable.bundle = dataclasses.replace(executable.bundle, graph=b"")
    with pytest.raises(BundleError, match="holds no graph"):
        collect(executable)


def test_json_has_no_number_that_json_has_not(played: Make) -> None:
    accuracy = AccuracyData("sqnr", float("inf"), 3, "data.npz", "float.onnx")
    data = json.loads(json.dumps(collect(played(), accuracy=[accuracy]).to_json(), allow_nan=False))
    assert data["format"] == 1 and data["accuracy"][0]["value"] is None
    assert data["regions"][0]["observed"] == {"value": pytest.approx(0.03), "kind": "modelled"}


def test_kernels_of_equal_names_belong_to_the_next_region(on_cpu: nestc.Executable) -> None:
    from nestc.report.graph import graph_of

    (partition,) = on_cpu.bundle.partitions
    conv = graph_of(on_cpu.bundle).regions[0]
    twins = [dataclasses.replace(conv, name="first"), dataclasses.replace(conv, name="second")]
    rows = [{"origin": conv.origin, "us": 1.0}, {"origin": ("Other:one",), "us": 9.0}]
    found = region_times(partition, twins, rows, Spent(1.0, "measured"))
    assert {name: spent.ms for name, spent in found.items()} == {"first": 0.001}


def test_figures_add_up_with_all_their_kinds() -> None:
    assert total([Figure(1.0, "modelled"), Figure(2.0, "measured")]) == Figure(3.0, "measured + modelled")
    assert total([]) is None and total([Figure(1.0, "measured"), None]) is None
    assert together(["estimated", "measured + modelled"]) == "measured + modelled + estimated"
