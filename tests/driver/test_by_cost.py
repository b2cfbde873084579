"""Networks placed by cost run as planned: covered once, never cyclic, and with the results of the CPU alone."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import nestc
from nestc.driver import build, with_fallbacks
from nestc.errors import TargetError
from nestc.graph.region import Region
from nestc.partition import measure
from nestc.partition.costs import Chain
from nestc.partition.store import Entry
from nestc.runtime import devices
from nestc.targets.api import Artifact, Partition, Target

from .conftest import Only


class ScriptedMeter:
    """Draws what regions cost; the same region costs the same again."""

    costs: Mapping[tuple[str, str], float] = {}
    seed = 0

    def __init__(self, *_: object) -> None:
        """Takes what the real one does."""

    def region(self, target: Target, region: Region, submodel: object, network: int = 0) -> Entry:
        seconds = self.costs.get((target.name, region.ops[-1].op_type))
        if seconds is None:
            seconds = random.Random(f"{self.seed}{target.name}{region.name}").uniform(1e-6, 1e-4)
        return Entry(seconds, joules=seconds)

    def chain(self, target: Target, regions: Sequence[Region], submodel: object, network: int = 0) -> dict[str, Entry]:
        return {each.name: self.region(target, each, submodel) for each in regions}

    def regions(
        self, targets: Sequence[Target], region: Region, submodel: object, network: int = 0
    ) -> dict[str, Entry]:
        return {target.name: self.region(target, region, submodel) for target in targets}

    def chains(
        self, given: Sequence[tuple[Target, Sequence[Region]]], submodel: object, network: int = 0
    ) -> list[dict[str, Entry]]:
        return [self.chain(target, regions, submodel) for target, regions in given]

    def compare(self, chains: Sequence[Chain]) -> list[Entry]:
        entries = [self.chain(each.target, each.regions, each.submodel).values() for each in chains]
        return [Entry(seconds := sum(one.seconds for one in each), joules=seconds) for each in entries]

    def launch(self, target: Target, network: int = 0) -> Entry:
        return Entry(1e-6)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedMeter]:
    monkeypatch.setattr(measure, "Meter", ScriptedMeter)
    monkeypatch.setattr(ScriptedMeter, "costs", {})
    return ScriptedMeter


OPS = ("MatMul", "Add", "Mul", "Relu", "Neg")


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """A random DAG of 2 to 9 operators on 4x4 matrices of small whole numbers, with one to three outputs."""
    nodes: list[onnx.NodeProto] = []
    names = ["x"]
    for index in range(draw(st.integers(2, 9))):
        op = draw(st.sampled_from(OPS))
        inputs = [draw(st.sampled_from(names))]
        if op in ("Add", "Mul"):
            inputs.append(draw(st.sampled_from(names)))
        if op == "MatMul":
            inputs.append("w")
        nodes.append(helper.make_node(op, inputs, [f"v{index}"], f"n{index}"))
        names.append(f"v{index}")
    read = {name for node in nodes for name in node.input}
    ends = [name for name in names[1:] if name not in read]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in ends]
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])],
        outputs,
        [onnx.numpy_helper.from_array(np.eye(4, k=1, dtype=np.float32) - np.eye(4, dtype=np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


X = np.arange(-8, 8, dtype=np.float32).reshape(4, 4) / 4


@settings(deadline=None, max_examples=15)
@given(graphs(), st.integers(0, 1000), st.sampled_from(["latency", "throughput", "energy"]))
def test_any_network_runs_as_placed(proto: onnx.ModelProto, seed: int, objective: str) -> None:
    patch = pytest.MonkeyPatch()
    with patch.context() as inside:
        inside.setattr(measure, "Meter", ScriptedMeter)
        inside.setattr(ScriptedMeter, "seed", seed)
        targets: list[str | Target] = [Only("one", *OPS), Only("two", "MatMul", "Add"), "cpu"]
        placed = nestc.compile(proto, targets, threads=1, objective=objective)
    plan = placed.plan
    listed = [name for partition in plan.partitions for name in partition.regions]
    assert sorted(listed) == sorted(region.name for region in plan.regions)
    made = {"x"}
    for partition in plan.partitions:
        assert set(partition.inputs) <= made
        made |= set(partition.outputs)
    assert plan.predicted_ms is not None and plan.lower_bound_ms is not None
    value = plan.predicted_mj if objective == "energy" else plan.predicted_ms
    assert value is not None and value >= plan.lower_bound_ms * (1 - 1e-9)
    if objective != "energy":
        assert plan.predicted_ms <= min(plan.single_device_ms.values()) * (1 + 1e-9)
    alone = nestc.compile(proto, threads=1)
    for name, wanted in alone.run({"x": X}).items():
        np.testing.assert_array_equal(placed.run({"x": X})[name], wanted)


def chain_of(*ops: str) -> onnx.ModelProto:
    nodes = [
        helper.make_node(op, [f"v{i}", *(["w"] if op == "MatMul" else [])], [f"v{i + 1}"], f"n{i}")
        for i, op in enumerate(ops)
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info(f"v{len(ops)}", TensorProto.FLOAT, [4, 4])],
        [onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_a_region_goes_where_it_is_cheapest_unless_the_border_costs_more(meter: type[ScriptedMeter]) -> None:
    proto = chain_of("MatMul", "Softmax", "MatMul")
    far = Only("npu", "MatMul")
    meter.costs = {("npu", "MatMul"): 10e-6, ("cpu", "MatMul"): 20e-6, ("cpu", "Softmax"): 5e-6}
    devices = [region.device for region in nestc.compile(proto, [far, "cpu"], threads=1).plan.regions]
    assert devices == ["npu", "cpu", "npu"]
    meter.costs = {**meter.costs, ("npu", "MatMul"): 19.5e-6}  # a launch costs 1 us
    plan = nestc.compile(proto, [far, "cpu"], threads=1).plan
    assert [region.device for region in plan.regions] == ["cpu", "cpu", "cpu"]
    assert "stays with its neighbours" in plan.regions[0].reason
    assert plan.predicted_ms == pytest.approx(0.046) and plan.optimal
    assert plan.single_device_ms == {"npu": pytest.approx(0.047), "cpu": pytest.approx(0.046)}


def test_one_target_takes_all_it_can_and_order_can_be_asked_for(meter: type[ScriptedMeter]) -> None:
    proto = chain_of("MatMul", "Softmax", "MatMul")
    meter.costs = {("npu", "MatMul"): 1.0, ("cpu", "MatMul"): 1e-6, ("cpu", "Softmax"): 1e-6}
    wanted = ["npu", "cpu", "npu"]
    far = Only("npu", "MatMul")
    assert [each.device for each in nestc.compile(proto, [far], threads=1).plan.regions] == wanted
    ordered = nestc.compile(proto, [far, "cpu"], threads=1, placement="order").plan
    assert [each.device for each in ordered.regions] == wanted
    costed = nestc.compile(proto, [far], threads=1, placement="cost").plan
    assert {each.device for each in costed.regions} == {"cpu"}


def test_a_plan_that_was_made_by_cost_is_followed(meter: type[ScriptedMeter], tmp_path) -> None:
    proto = chain_of("MatMul", "Softmax", "MatMul", "Relu")
    targets: list[str | Target] = [Only("npu", "MatMul"), "cpu"]
    made = nestc.compile(proto, targets, threads=1)
    made.plan.save(tmp_path / "plan.yaml")
    again = nestc.compile(proto, targets, threads=1, plan=tmp_path / "plan.yaml")
    assert again.plan.partitions == made.plan.partitions or [p.regions for p in again.plan.partitions] == [
        p.regions for p in made.plan.partitions
    ]
    assert again.plan.predicted_ms == pytest.approx(made.plan.predicted_ms, rel=1e-5)
    np.testing.assert_array_equal(again(X), made(X))


def test_what_fails_elsewhere_is_compiled_for_the_cpu_too(meter: type[ScriptedMeter]) -> None:
    proto = chain_of("MatMul", "Softmax")
    meter.costs = {("npu", "MatMul"): 1e-6, ("cpu", "MatMul"): 1.0, ("cpu", "Softmax"): 1e-6}
    targets = with_fallbacks([Only("npu", "MatMul")], 1)
    done = build(nestc.load(proto.SerializeToString()), targets, threads=1, by_cost=True, fallback=True)
    assert done.bundle is not None
    kinds = [(part.device, None if part.fallback is None else part.fallback.kind) for part in done.bundle.partitions]
    assert kinds == [("npu", "cpu-native"), ("cpu", None)]
    assert {each.name: each.resource for each in done.bundle.devices}["npu"] == "npu"


def test_the_cpu_takes_over_where_a_device_fails(
    meter: type[ScriptedMeter], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Only):
        def compile(self, partition: Partition, emit: object = None) -> Artifact:
            return replace(super().compile(partition), kind="broken")

    class BrokenDevice:
        name = "npu"

        def load(self, artifact: Artifact, threads: int) -> object:
            raise TargetError("the board does not answer")

    monkeypatch.setitem(devices._OWN, "broken", (__name__, "BrokenDevice"))
    monkeypatch.setattr(sys.modules[__name__], "BrokenDevice", BrokenDevice, raising=False)
    proto = chain_of("MatMul", "Softmax")
    meter.costs = {("npu", "MatMul"): 1e-6, ("cpu", "MatMul"): 1.0, ("cpu", "Softmax"): 1e-6}
    exe = nestc.compile(proto, [Broken("npu", "MatMul"), "cpu"], threads=1, on_failure="cpu")
    np.testing.assert_array_equal(exe(X), nestc.compile(proto, threads=1)(X))
    assert {row["device"] for row in exe.timeline()} == {"cpu"}
    assert "the board does not answer" in caplog.text
