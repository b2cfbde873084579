"""The meter: chains of regions that are one partition, and launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from partition_fakes import (
    CHAIN,
    NEG,
    US,
    Scripted,
    Step,
    meter,
    models,
    unary,
)

from nestc.errors import TargetError
from nestc.graph.region import Op, Region, TensorType
from nestc.partition.measure import attribute
from nestc.targets.api import Artifact, Partition


def test_a_chain_is_shared_by_what_its_steps_take(tmp_path: Path) -> None:
    seconds = {"Relu": 6 * US, "Neg": 6 * US, "Abs": 3 * US}  # 10 us in all
    steps = [
        Step(1, ("Identity:layout_0_8",)),
        Step(1, ("Relu:n_a",), team_us=0.5),
        Step(2, ("Neg:n_b", "Abs:elsewhere")),
        Step(1, ("Identity:layout_8_0",)),
        Step(0.25, ("Abs:n_c",)),
        Step(0.25, ("Identity:layout_0_8",)),
    ]
    target = Scripted(seconds, steps=steps, watts=10.0)
    found = meter(tmp_path).chain(target, CHAIN, models(*CHAIN))
    assert [entry.seconds for entry in found.values()] == pytest.approx([3 * US, 4 * US, 3 * US])
    assert sum(entry.joules or 0.0 for entry in found.values()) == pytest.approx(100 * US)
    assert list(found) == [region.name for region in CHAIN]
    assert target._compiled == [("Relu", "Neg", "Abs")]
    later = Scripted(seconds, watts=20.0)
    again = meter(tmp_path).chain(later, CHAIN, models(*CHAIN))
    assert [entry.seconds for entry in again.values()] == [entry.seconds for entry in found.values()]
    assert sum(entry.joules or 0.0 for entry in again.values()) == pytest.approx(200 * US)
    assert later._compiled == []


def test_a_chain_is_shared_by_times_alone_where_steps_are_not_known(tmp_path: Path) -> None:
    target = Scripted({"Relu": 6 * US, "Neg": 6 * US, "Abs": 3 * US})
    found = meter(tmp_path).chain(target, CHAIN, models(*CHAIN))
    assert [entry.seconds for entry in found.values()] == pytest.approx([4 * US, 4 * US, 2 * US])
    assert sorted(target._compiled) == sorted([("Relu", "Neg", "Abs"), ("Relu",), ("Neg",), ("Abs",)])


def test_a_modelled_chain_sums_to_its_artifacts_time(tmp_path: Path) -> None:
    target = Scripted(timing={"seconds": 6e-5, "energy_joules": 3e-9})
    found = meter(tmp_path).chain(target, CHAIN, models(*CHAIN))
    assert [(entry.seconds, entry.kind) for entry in found.values()] == [(pytest.approx(2e-5), "modelled")] * 3
    assert sum(entry.joules or 0.0 for entry in found.values()) == pytest.approx(3e-9)


class Foretelling(Scripted):
    """A simulator whose compiler can leave out proofs."""

    def compile_unproven(self, partition: Partition) -> Artifact:
        self._compiled.append(("unproven",))
        return replace(self.compile(partition), metadata={"timing": {"seconds": 5e-5}})


def test_a_chain_is_modelled_without_proofs_and_a_region_with_them(tmp_path: Path) -> None:
    target = Foretelling(timing={"seconds": 1e-5})
    measured = meter(tmp_path)
    assert measured.region(target, NEG, models(NEG)).seconds == 1e-5
    assert target._compiled == [("Neg",)]
    chain = measured.chain(target, CHAIN, models(*CHAIN))
    assert sum(entry.seconds for entry in chain.values()) == pytest.approx(5e-5)
    assert target._compiled.count(("unproven",)) == 1


def test_a_chain_of_one_is_the_region_alone(tmp_path: Path) -> None:
    measured = meter(tmp_path)
    target = Scripted({"Neg": 2 * US})
    assert measured.chain(target, (NEG,), models(NEG)) == {NEG.name: measured.region(target, NEG, models(NEG))}
    assert target._compiled == [("Neg",)]


def test_what_leaves_a_chain_makes_it_another(tmp_path: Path) -> None:
    target = Scripted()
    measured = meter(tmp_path)
    other = unary("Neg", "a", "d")  # reads what the chain computes inside, and is not in it
    measured.chain(target, CHAIN[:2], models(*CHAIN[:2]))
    measured.chain(target, CHAIN[:2], lambda names: models(*CHAIN[:2])(names))
    before = len(target._compiled)

    def both(names: Sequence[str]) -> ir.Model:
        model = models(*CHAIN[:2], other)(names)
        model.graph.outputs.append(next(value for node in model.graph for value in node.outputs if value.name == "a"))
        return model

    measured.chain(target, CHAIN[:2], both)
    assert target._compiled[before:] == [("Relu", "Neg")]


def test_a_chain_that_is_refused_is_refused_for_each(tmp_path: Path) -> None:
    target = Scripted(faults={"compile": TargetError("too long")})
    found = meter(tmp_path).chain(target, CHAIN, models(*CHAIN))
    assert [entry.refusal for entry in found.values()] == ["too long"] * 3
    later = Scripted()
    meter(tmp_path).chain(later, CHAIN, models(*CHAIN))
    assert later._compiled == []


def test_a_chain_on_a_device_that_is_not_here_is_estimated_region_by_region(tmp_path: Path) -> None:
    cost = {"Relu": 1e-3, "Neg": 2e-3, "Abs": 3e-3}
    target = Scripted(faults={"open": TargetError("no card")}, cost=lambda region: cost[region.ops[0].op_type])
    found = meter(tmp_path).chain(target, CHAIN, models(*CHAIN))
    assert [(entry.seconds, entry.kind) for entry in found.values()] == [
        (1e-3, "estimated"),
        (2e-3, "estimated"),
        (3e-3, "estimated"),
    ]


def test_steps_of_nodes_that_share_a_name_go_with_the_next() -> None:
    twice = [unary("Neg", "x", "y"), unary("Neg", "y", "z")]
    twice = [Region(r.name, None, (Op("Neg", r.inputs, r.outputs),), r.inputs, r.outputs, r.types, {}) for r in twice]
    steps = [Step(1, ("Neg:",)), Step(2, ("Abs:n_c",))]
    assert attribute(steps, [*twice, CHAIN[2]]) == pytest.approx((0.0, 0.0, 3 * US))
    assert attribute(steps[:1], twice) == (0.0, 0.0)


def test_a_step_of_two_regions_is_shared() -> None:
    step = Step(6, (*CHAIN[0].origin, *CHAIN[1].origin))
    assert attribute([step], CHAIN) == pytest.approx((3 * US, 3 * US, 0.0))
    weights = {"w": TensorType("float32", (3,)), "v": TensorType("float32", (9,))}
    few, many = (
        replace(each, types={**each.types, **weights}, constants={name: lambda: np.zeros(1)})
        for each, name in zip(CHAIN[:2], weights, strict=True)
    )
    assert attribute([step], [few, many]) == pytest.approx((1.5 * US, 4.5 * US))


def test_a_launch_is_what_the_call_takes_beside_the_program(tmp_path: Path) -> None:
    target = Scripted({"Relu": 0.0})
    measured = meter(tmp_path)
    found = measured.launch(target)
    assert 0 < found.seconds < 1e-2 and found.kind == "measured" and found.runs >= 5
    assert measured.launch(target) == found
    assert target._compiled == [("Relu",)]
    later = Scripted()
    assert meter(tmp_path).launch(later).seconds == found.seconds and later._compiled == []


@pytest.mark.parametrize(
    "target",
    [
        Scripted(faults={"open": TargetError("no card")}),
        Scripted(ops="Conv"),
        Scripted(facts={"times_and_energies": "modelled"}),
        Scripted(timing={"seconds": 1e-5}),
        Scripted(kind="modelled"),
    ],
)
def test_a_launch_that_cannot_be_measured_is_what_the_link_says(tmp_path: Path, target: Scripted) -> None:
    found = meter(tmp_path).launch(target)
    assert (found.seconds, found.kind) == (7e-6, "estimated")
