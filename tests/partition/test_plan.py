"""The plan prints, saves and comes back the same; what is no plan is refused in a sentence."""

from __future__ import annotations

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


@pytest.mark.parametrize("content", ["", "a: [1", "[]", '{"format": 99}', '{"format": 1, "model": "m"}'])
def test_what_is_no_plan_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "plan.yaml")


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot write the plan"):
        PLAN.save(tmp_path / "missing" / "plan.yaml")
