"""Costs of regions and borders become the numbers that the solver sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from nestc.graph.region import Op, Region, TensorType
from nestc.partition.costs import measure_costs
from nestc.partition.evaluate import evaluate
from nestc.partition.problem import HOST, Crossing, Problem, Stage
from nestc.partition.store import Entry
from nestc.targets.api import Link, Machine, Offer, Target

KB = TensorType("int8", (1024,))


def region(name: str, ops: str, inputs: Sequence[str], outputs: Sequence[str]) -> Region:
    """Operators `ops` in a row; values of 1024 bytes."""
    names = ops.split()
    values = [inputs[0], *(f"{name}.{index}" for index in range(1, len(names))), outputs[0]]
    made = tuple(
        Op(op, (values[i], *(inputs[1:] if i == 0 else ())), (values[i + 1],), name=f"{name}.{op}")
        for i, op in enumerate(names)
    )
    types = dict.fromkeys((*inputs, *values, *outputs), KB)
    return Region(name, None, made, tuple(inputs), tuple(outputs), types, {})


class FakeTarget:
    """Takes regions of some operators."""

    def __init__(self, name: str, ops: str, link: Link | None = None) -> None:
        self.name = name
        self.machine = Machine(name, (), ("int8",), link=link or Link(), resource="cpu" if name == "cpu" else "")
        self.offers = (Offer("all", frozenset(ops.split())),)


class FakeMeter:
    """Says what it is told: microseconds by (target, region), alone and in chains."""

    def __init__(self, alone: Mapping[tuple[str, str], float], chain: Mapping[tuple[str, str], float]) -> None:
        self.alone, self.inside = alone, chain

    def region(self, target: Target, region: Region, submodel: object, network: int = 0) -> Entry:
        microseconds = self.alone.get((target.name, region.name))
        if microseconds is None:
            return Entry(0.0, refusal="it does not load")
        kind = "measured" if target.name == "cpu" else "modelled"
        return Entry(microseconds * 1e-6, kind, joules=microseconds * 1e-6, bytes=7)

    def chain(self, target: Target, regions: Sequence[Region], submodel: object, network: int = 0) -> dict[str, Entry]:
        return {each.name: Entry(self.inside[target.name, each.name] * 1e-6) for each in regions}

    def regions(
        self, targets: Sequence[Target], region: Region, submodel: object, network: int = 0
    ) -> dict[str, Entry]:
        return {target.name: self.region(target, region, submodel) for target in targets}

    def chains(
        self, given: Sequence[tuple[Target, Sequence[Region]]], submodel: object, network: int = 0
    ) -> list[dict[str, Entry]]:
        return [self.chain(target, regions, submodel) for target, regions in given]

    def launch(self, target: Target, network: int = 0) -> Entry:
        return Entry(3e-6)


CPU = FakeTarget("cpu", "A B C")
NPU = FakeTarget("npu", "A C", Link(5e-6, 1e-6, 1e9, 0.0, "estimated"))
WHOLE = (
    region("r000_A", "A", ["x"], ["a"]),
    region("r001_A_B", "A B", ["a"], ["b"]),
    region("r002_C", "C", ["b"], ["y"]),
)
CUT = (
    WHOLE[0],
    region("r001a_A", "A", ["a"], ["m"]),
    region("r001b_B", "B", ["m"], ["b"]),
    WHOLE[2],
)
ALONE = {
    ("cpu", "r000_A"): 12.0, ("cpu", "r001_A_B"): 20.0, ("cpu", "r001a_A"): 15.0, ("cpu", "r001b_B"): 10.0,
    ("cpu", "r002_C"): 8.0, ("npu", "r000_A"): 4.0, ("npu", "r001a_A"): 5.0, ("npu", "r002_C"): 2.0,
}  # fmt: skip
CHAIN = {("cpu", "r000_A"): 10.0, ("cpu", "r001_A_B"): 18.0, ("cpu", "r002_C"): 8.0}


def no_model(names: Sequence[str]) -> object:
    raise AssertionError("the fake meter needs no model")


def problem_of(alone: Mapping[tuple[str, str], float]) -> Problem:
    models = (no_model, no_model)
    return measure_costs(
        WHOLE,
        CUT,
        [CPU, NPU],
        ["y"],
        FakeMeter(alone, CHAIN),
        models,
        lambda *_: None,  # type: ignore[arg-type]
    ).problem


def micro(problem: Problem) -> dict[str, dict[str, float]]:
    return {
        task.name: {name: pytest.approx(cost.seconds * 1e6) for name, cost in task.costs.items()}
        for task in problem.tasks
    }


def test_regions_cost_what_they_take_in_a_chain_and_pieces_in_proportion() -> None:
    assert micro(problem_of(ALONE)) == {
        "r000_A": {"cpu": 10.0, "npu": 4.0},
        "r001a_A": {"cpu": 13.5, "npu": 5.0},  # 15 x 18 / 20
        "r001b_B": {"cpu": 9.0},
        "r002_C": {"cpu": 8.0, "npu": 2.0},
    }


def test_units_have_launches_and_resources() -> None:
    cpu, npu = problem_of(ALONE).units
    assert (cpu.name, cpu.resource, cpu.launch) == ("cpu", "cpu", 3e-6)
    assert (npu.name, npu.resource, npu.launch) == ("npu", "npu", 5e-6)


def test_a_border_costs_the_conversion_and_the_way() -> None:
    edges = {edge.tensor: edge for edge in problem_of(ALONE).edges}
    way = 1e-6 + 1024 / 1e9
    # Alone r000 takes 2 us more than in the chain, for its one value inside the graph.
    out = edges["a"].crossings["cpu", "npu"]
    assert out == Crossing(pytest.approx(2e-6), pytest.approx(way), 0.0, 0.0, "estimated")
    # r001a takes 15 us alone, 13.5 in the chain: 1.5 us for its two values, of the same size.
    assert edges["a"].crossings["npu", "cpu"].in_seconds == pytest.approx(0.75e-6)
    assert edges["x"].crossings == {(HOST, "npu"): Crossing(0.0, pytest.approx(way), 0.0, 0.0, "estimated")}
    assert (edges["y"].source, edges["y"].destination) == ("r002_C", None)
    assert set(edges["y"].crossings) == {("npu", HOST)}


def test_what_leaves_the_graph_crosses_a_border_in_a_chain_too() -> None:
    meter = FakeMeter(ALONE, CHAIN)
    found = measure_costs(WHOLE, CUT, [CPU, NPU], ["a", "y"], meter, (no_model, no_model), lambda what, fraction: None)
    edges = {(edge.tensor, edge.destination): edge for edge in found.problem.edges}
    assert edges["a", "r001a_A"].crossings["cpu", "npu"].out_seconds == 0.0


def test_pieces_on_one_device_save_what_fusing_them_saves() -> None:
    edges = {edge.tensor: edge for edge in problem_of(ALONE).edges}
    assert edges["m"].gains == {"cpu": pytest.approx(13.5e-6 + 9e-6 - 18e-6)}
    assert all(not edge.gains for name, edge in edges.items() if name != "m")


def test_three_pieces_on_one_device_take_what_the_whole_takes() -> None:
    """The last piece reads values of both others, as in x * sigmoid(x); what fusing saves is counted once."""
    whole = region("r000_A_B_C", "A B C", ["x"], ["y"])
    cut = (
        region("r000a_A", "A", ["x"], ["m"]),
        region("r000b_B", "B", ["m"], ["n"]),
        region("r000c_C", "C", ["n", "m"], ["y"]),
    )
    alone = {("cpu", "r000_A_B_C"): 20.0, ("cpu", "r000a_A"): 15.0, ("cpu", "r000b_B"): 5.0, ("cpu", "r000c_C"): 10.0}
    meter = FakeMeter(alone, {})
    problem = measure_costs(
        (whole,), cut, [CPU], ["y"], meter, (no_model, no_model), lambda what, fraction: None
    ).problem
    edges = {(edge.tensor, edge.destination): edge for edge in problem.edges}
    assert edges["m", "r000b_B"].gains == {"cpu": pytest.approx(10e-6 / 3)}
    assert edges["n", "r000c_C"].gains == {"cpu": pytest.approx(20e-6 / 3)}
    assert edges["m", "r000c_C"].gains == {}
    stages = (Stage("cpu", ("r000a_A", "r000b_B", "r000c_C")),)
    assert evaluate(problem, stages).latency == pytest.approx(3e-6 + 20e-6)


def test_what_a_device_does_not_load_is_a_refusal() -> None:
    alone = {key: value for key, value in ALONE.items() if key != ("npu", "r002_C")}
    found = measure_costs(
        WHOLE,
        CUT,
        [CPU, NPU],
        ["y"],
        FakeMeter(alone, CHAIN),
        (no_model, no_model),
        lambda *_: None,  # type: ignore[arg-type]
    )
    assert found.refusals["r002_C"] == {"npu": "it does not load"}
    assert found.whole == {"001": frozenset({"cpu"})}


def test_joules_of_a_measured_time_go_with_it() -> None:
    task = problem_of(ALONE).tasks[0]
    assert task.costs["cpu"].joules == pytest.approx(10e-6)
    assert task.costs["npu"] == replace(task.costs["npu"], joules=4e-6, kind="modelled", bytes=7)
