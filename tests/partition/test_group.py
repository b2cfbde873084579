"""Partitions: as few as list scheduling finds, covering everything once, and without a cycle between them."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.graph.region import Op, Region, TensorType
from nestc.partition.group import order, partitions, runs


def region(name: str, inputs: tuple[str, ...], output: str) -> Region:
    types = {value: TensorType("float32", (1,)) for value in (*inputs, output)}
    return Region(name, None, (Op("Relu", inputs, (output,)),), inputs, (output,), types, {})


def no_model(names):
    raise AssertionError("the model is built only on demand")


def test_two_branches_on_two_devices_become_two_partitions_each_way() -> None:
    regions = [
        region("a", ("x",), "a"),
        region("b", ("a",), "b"),
        region("c", ("a",), "c"),
        region("d", ("b",), "d"),
        region("e", ("c", "d"), "e"),
    ]
    device = {"a": "cpu", "b": "npu", "c": "cpu", "d": "npu", "e": "cpu"}
    ordered = order(regions, device)
    made = partitions(runs(ordered, device), device, ["e"], no_model)
    assert [(p.device, [r.name for r in p.regions], p.inputs, p.outputs) for p in made] == [
        ("cpu", ["a", "c"], ("x",), ("a", "c")),
        ("npu", ["b", "d"], ("a",), ("d",)),
        ("cpu", ["e"], ("c", "d"), ("e",)),
    ]


def test_a_value_that_is_both_used_and_a_graph_output_leaves_its_partition() -> None:
    regions = [region("a", ("x",), "a"), region("b", ("a",), "b")]
    made = partitions([regions], {"a": "cpu", "b": "cpu"}, ["b", "a"], no_model)
    assert len(made) == 1
    assert made[0].outputs == ("a", "b")


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Region], dict[str, str]]:
    regions: list[Region] = []
    device: dict[str, str] = {}
    for index in range(draw(st.integers(1, 12))):
        earlier = [f"v{number}" for number in range(index)] + ["x"]
        inputs = draw(st.lists(st.sampled_from(earlier), min_size=1, max_size=3, unique=True))
        regions.append(region(f"r{index}", tuple(inputs), f"v{index}"))
        device[f"r{index}"] = draw(st.sampled_from(["cpu", "npu", "pim"]))
    return regions, device


@settings(deadline=None, max_examples=40)
@given(graphs())
def test_partitions_cover_everything_once_and_run_in_order(drawn: tuple[list[Region], dict[str, str]]) -> None:
    regions, device = drawn
    made = partitions(runs(order(regions, device), device), device, [regions[-1].outputs[0]], no_model)
    names = [r.name for partition in made for r in partition.regions]
    assert sorted(names) == sorted(r.name for r in regions)
    available = {"x"}
    for partition in made:
        assert all(device[r.name] == partition.device for r in partition.regions)
        assert set(partition.inputs) <= available
        available |= set(partition.outputs)
    assert all(first.device != second.device for first, second in itertools.pairwise(made))
    assert regions[-1].outputs[0] in available
