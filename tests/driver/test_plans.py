"""A plan that somebody gives is followed to the letter, or refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest

import nestc
from nestc.errors import PlanError
from nestc.partition.plan import Plan, PlannedPartition, PlannedRegion, PlannedSplit


@pytest.fixture(scope="module")
def model() -> bytes:
    """x -> three matrix products in a row, and a fourth beside the second; 8 numbers each."""
    rng = np.random.default_rng(0)
    nodes = [oh.make_node("MatMul", [a, f"w{b}"], [b], b) for a, b in (("x", "a"), ("a", "b"), ("b", "c"), ("a", "d"))]
    nodes.append(oh.make_node("Add", ["c", "d"], ["y"], "sum"))
    weights = {f"w{name}": rng.standard_normal((8, 8)).astype(np.float32) for name in "abcd"}
    graph = oh.make_graph(
        nodes,
        "net",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 8])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 8])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10).SerializeToString()


@pytest.fixture(scope="module")
def plan(model: bytes) -> Plan:
    return nestc.compile(model, threads=1).plan


X = np.linspace(-1, 1, 8, dtype=np.float32)[None]


def moved(plan: Plan, number: int, device: str) -> Plan:
    regions = list(plan.regions)
    regions[number] = replace(regions[number], device=device)
    return replace(plan, regions=tuple(regions))


def test_a_region_runs_where_a_person_puts_it(model: bytes, plan: Plan, tmp_path: Path) -> None:
    moved(plan, 1, "host").save(tmp_path / "plan.yaml")
    executable = nestc.compile(model, threads=1, plan=tmp_path / "plan.yaml")
    assert {region.name: region.device for region in executable.plan.regions}[plan.regions[1].name] == "host"
    assert [part.device for part in executable.bundle.partitions].count("host") == 1
    np.testing.assert_allclose(executable(X), nestc.compile(model, threads=1)(X), rtol=1e-5)


def test_partitions_of_the_plan_are_kept(model: bytes, plan: Plan) -> None:
    names = [region.name for region in plan.regions]
    split = replace(
        plan,
        partitions=tuple(
            PlannedPartition(f"p{i}", "cpu", (name,), (), ()) for i, name in reversed(list(enumerate(names)))
        ),
    )
    executable = nestc.compile(model, threads=1, plan=split)
    assert len(executable.bundle.partitions) == len(names)
    assert not executable.plan.transfers  # nothing leaves the device
    np.testing.assert_allclose(executable(X), nestc.compile(model, threads=1)(X), rtol=1e-5)


def test_what_cannot_be_followed_is_refused(model: bytes, plan: Plan) -> None:
    names = [region.name for region in plan.regions]
    first, rest = (names[0], names[-1]), tuple(names[1:-1])
    cases = {
        "puts region .* on 'tpu', which is not among the targets": moved(plan, 0, "tpu"),
        "on 'vta', which refuses: ": moved(plan, 0, "vta"),
        "says nothing of region": replace(plan, regions=plan.regions[1:]),
        "has a region extra that the model does not have": replace(
            plan, regions=(*plan.regions, replace(plan.regions[0], name="extra"))
        ),
        "cyclic: partitions p, q wait for each other": replace(
            plan,
            partitions=(PlannedPartition("p", "cpu", first, (), ()), PlannedPartition("q", "cpu", rest, (), ())),
        ),
        "twice": replace(plan, partitions=(PlannedPartition("p", "cpu", (*names, names[0]), (), ()),)),
        "leaves out": replace(plan, partitions=(PlannedPartition("p", "cpu", first, (), ()),)),
        "has region .* twice; leave one": replace(plan, regions=(*plan.regions, plan.regions[0])),
        "partition 'p' of the plan has no regions": replace(
            plan, partitions=(PlannedPartition("p", "cpu", (), (), ()),)
        ),
        "objective 'speed'; there are latency, throughput, energy": replace(plan, objective="speed"),
        "cuts after node 'nowhere'": replace(plan, cuts=("nowhere",)),
        "splits node 'a' twice": replace(plan, splits=(PlannedSplit("a", (4, 4)), PlannedSplit("a", (2, 6)))),
    }
    for words, wrong in cases.items():
        with pytest.raises(PlanError, match=words):
            nestc.compile(model, ["vta"], threads=1, plan=wrong)


def test_a_plan_needs_no_more_than_a_device_for_each_region(model: bytes, plan: Plan) -> None:
    least = tuple(PlannedRegion(region.name, region.device) for region in plan.regions)
    made = nestc.compile(model, threads=1, plan=Plan(plan.model, plan.objective, plan.devices, least))
    assert [part.regions for part in made.plan.partitions] == [part.regions for part in plan.partitions]
    assert made.plan.predicted_ms is None
    np.testing.assert_array_equal(made(X), nestc.compile(model, threads=1)(X))


def test_constants_must_fit_in_the_device(model: bytes, plan: Plan) -> None:
    target = nestc.targets()["cpu"]
    target.machine = replace(target.machine, capacity_bytes=1000)
    with pytest.raises(PlanError, match="puts 1024 bytes of constants on 'cpu', which holds 1000"):
        nestc.compile(model, [target], threads=1, plan=plan)
    target.machine = replace(target.machine, capacity_bytes=1024)
    assert nestc.compile(model, [target], threads=1, plan=plan).plan.partitions


def test_constants_as_compiled_must_fit_too(model: bytes) -> None:
    target = nestc.targets()["cpu"]
    target.machine = replace(target.machine, capacity_bytes=1000)
    with pytest.raises(PlanError, match="1 partitions on 'cpu' need [0-9]+ bytes for constants, but it holds 1000"):
        nestc.compile(model, [target], threads=1)
