"""The plan prints, saves and comes back the same; what is no plan is refused in a sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nestc.errors import PlanError
from nestc.partition.plan import Plan, PlannedPartition, PlannedRegion, Transfer

PLAN = Plan(
    model="net",
    objective="latency",
    devices=("npu", "cpu", "host"),
    regions=(
        PlannedRegion("r0", "cpu", ("Conv", "Relu"), ("conv1", "relu1"), {"npu": "only int8"}, 0.5),
        PlannedRegion("r1", "host", ("NonZero",), ("nz",), {"npu": "no", "cpu": "size known only at run time"}),
    ),
    partitions=(
        PlannedPartition("cpu_0", "cpu", ("r0",), ("x",), ("y",)),
        PlannedPartition("host_1", "host", ("r1",), ("y",), ("z",)),
    ),
    transfers=(Transfer("y", "cpu", "host", 64),),
)


def test_it_comes_back_the_same(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == PLAN
    assert [file.name for file in tmp_path.iterdir()] == ["plan.yaml"]


def test_it_says_who_takes_what_and_why() -> None:
    text = PLAN.explain()
    for said in (
        "npu takes nothing",
        "r0 -> cpu: Conv, Relu",
        "not npu: only int8",
        "interpreted, not compiled: NonZero 1",
    ):
        assert said in text
    assert PLAN.fallback_ops == {"NonZero": 1}
    assert PLAN.ops(PLAN.partitions[0]) == {"Conv": 1, "Relu": 1}


def test_a_bound_of_nothing_says_nothing() -> None:
    plan = replace(PLAN, predicted_ms=3.0, lower_bound_ms=0.0, optimal=False)
    assert "not known how far above the best by these costs" in plan.predictions()[0]
    assert "at most 50 % above" in replace(plan, lower_bound_ms=2.0).predictions()[0]
    assert ": optimal by these costs" in replace(plan, lower_bound_ms=3.0, optimal=True).predictions()[0]


LEAST = "format: 2\nmodel: m\nobjective: latency\ndevices: [cpu]\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not a mapping"),
        ("a: [1", "does not read as YAML"),
        ("[]", "not a mapping"),
        ("format: 99", "format 99"),
        ("format: 2\nmodel: m", "lacks the field 'objective'"),
        (LEAST + "regions: 3", "regions must be a list"),
        (LEAST + "regions: [{name: r0, device: cpu, colour: red}]", "field 'colour' that no plan has"),
        (LEAST + "regions: [{name: r0, device: [cpu]}]", "item 0 r0, device must be a str"),
        (LEAST + "regions: [{name: r0, device: cpu, predicted_ms: fast}]", "predicted_ms must be a float"),
        (LEAST + "regions: []\npredicted_ms: .nan", "predicted_ms must be a finite number"),
        ("[" * 3000, "does not read as YAML"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(PlanError, match=words):
        Plan.load(tmp_path / "plan.yaml")


def test_a_person_may_write_only_what_matters(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(LEAST + "regions:\n- {name: r0, device: cpu, predicted_ms: 1}\n")
    assert Plan.load(tmp_path / "plan.yaml") == Plan(
        "m", "latency", ("cpu",), (PlannedRegion("r0", "cpu", predicted_ms=1.0),)
    )


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot write the plan"):
        PLAN.save(tmp_path / "missing" / "plan.yaml")


def test_the_gap_of_the_plan_and_that_of_the_solver_are_told_apart() -> None:
    plan = replace(PLAN, predicted_ms=14.3, lower_bound_ms=13.0, promised_ms=13.26, optimal=False, objective="latency")
    first, second, *_ = plan.predictions()
    assert "lower bound 13 ms: at most 10 % above the best" in first
    assert second == (
        "the solver's last solution: 13.26 ms, at most 2 % above the best if partitions take what their regions say"
    )
    assert ", the best if partitions" in replace(plan, promised_ms=13.0).predictions()[1]
    assert not any("last solution" in line for line in replace(plan, optimal=True).predictions())
    crossing = Transfer("t", "cpu", "vta", 64, 2.5, "estimated", 4.0)
    assert "64 bytes, 2.5 us estimated, 4 us of conversions" in replace(plan, transfers=(crossing,)).explain()
