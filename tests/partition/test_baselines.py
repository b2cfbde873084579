"""Baselines of placement on problems small enough to work out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.errors import PlanError
from nestc.partition.baselines import branches_of, greedy_by_support, single, type_based, viterbi_per_branch
from nestc.partition.problem import HOST, Cost, Crossing, Edge, Problem, Task, Unit

CPU, NPU, PIM = Unit("cpu", "cpu"), Unit("npu", "npu", launch=0.5), Unit("pim", "pim")


def task(name: str, **seconds: float) -> Task:
    return Task(name, {unit: Cost(value) for unit, value in seconds.items()})


def edge(source: str | None, destination: str | None, cross: float = 0.0, **gains: float) -> Edge:
    """A tensor whose crossing between any two units takes `cross` seconds in all."""
    names = ("cpu", "npu", "pim", "npu_2", HOST)
    crossing = Crossing(cross / 4, cross / 2, cross / 4)
    crossings = {(one, other): crossing for one in names for other in names if one != other}
    return Edge(f"{source}>{destination}", source, destination, 8, crossings, gains)


def chain(tasks: list[Task], cross: float = 0.0, units: tuple[Unit, ...] = (CPU, NPU), **gains: float) -> Problem:
    names = [None, *(each.name for each in tasks), None]
    edges = tuple(edge(one, other, cross, **gains) for one, other in itertools.pairwise(names))
    return Problem(units, tuple(tasks), edges)


def test_single_puts_the_rest_on_the_cpu_and_what_neither_takes_on_whoever_does() -> None:
    problem = chain([task("a", cpu=1, npu=9), task("b", cpu=1), task("c", pim=1)], units=(CPU, NPU, PIM))
    assert single(problem, "npu") == {"a": "npu", "b": "cpu", "c": "pim"}
    assert single(problem, "cpu") == {"a": "cpu", "b": "cpu", "c": "pim"}
    assert single(problem, "pim", rest="npu") == {"a": "npu", "b": "cpu", "c": "pim"}


def test_greedy_takes_the_first_in_order_whatever_it_costs() -> None:
    problem = chain(
        [task("a", cpu=1, npu=99, pim=2), task("b", cpu=1, pim=50), task("c", cpu=1)], units=(CPU, NPU, PIM)
    )
    assert greedy_by_support(problem, ("npu", "pim", "cpu")) == {"a": "npu", "b": "pim", "c": "cpu"}
    assert greedy_by_support(problem, ("npu",)) == {"a": "npu", "b": "cpu", "c": "cpu"}


def test_an_unknown_unit_is_told() -> None:
    problem = chain([task("a", cpu=1)])
    with pytest.raises(PlanError, match=r"there is no unit 'gpu'; there are cpu, npu"):
        greedy_by_support(problem, ("gpu", "cpu"))
    with pytest.raises(PlanError, match="'gpu'"):
        single(problem, "gpu")


def test_type_based_sums_over_a_type_and_ignores_borders() -> None:
    # Conv: cpu 4 + 1 = 5, npu (1 + 0.5) + (2 + 0.5) = 4, so both go to npu though b alone is better on cpu.
    # Relu: cpu 0.4, npu 0.1 + 0.5 for its launch, so cpu, however much the border costs.
    tasks = [task("a", cpu=4, npu=1), task("r", cpu=0.4, npu=0.1), task("b", cpu=1, npu=2)]
    problem = chain(tasks, cross=100.0)
    assert type_based(problem, {"a": "Conv", "r": "Relu", "b": "Conv"}) == {"a": "npu", "r": "cpu", "b": "npu"}


def test_type_based_places_what_the_best_unit_refuses_where_it_is_fastest() -> None:
    tasks = [task("a", cpu=9, npu=1, pim=5), task("b", cpu=3, pim=2)]
    problem = chain(tasks, units=(CPU, NPU, PIM))
    # With npu: 1.5 + 2 (b on pim) = 3.5; with cpu 12; with pim 7.
    assert type_based(problem, {"a": "Conv", "b": "Conv"}) == {"a": "npu", "b": "pim"}


def test_viterbi_pays_for_switching_inside_a_branch() -> None:
    tasks = [task("a", cpu=5, npu=1), task("b", cpu=1, npu=3), task("c", cpu=5, npu=1)]
    # All on npu: 0.5 + 1 + 3 + 1 = 5.5. By way of cpu: (0.5 + 1) + x + 1 + (0.5 + x + 1) = 4 + 2x.
    assert viterbi_per_branch(chain(tasks, cross=0.7)) == {"a": "npu", "b": "cpu", "c": "npu"}
    assert viterbi_per_branch(chain(tasks, cross=0.8)) == {"a": "npu", "b": "npu", "c": "npu"}


def test_viterbi_with_a_constant_for_switching() -> None:
    tasks = [task("a", cpu=5, npu=1), task("b", cpu=1, npu=3), task("c", cpu=5, npu=1)]
    # npu, cpu, npu: 0.5 + 1 + s + 1 + s + 1 = 3.5 + 2s against 5.5; neither launch nor crossing is asked.
    assert viterbi_per_branch(chain(tasks, cross=100.0), switch=0.9) == {"a": "npu", "b": "cpu", "c": "npu"}
    assert viterbi_per_branch(chain(tasks, cross=0.0), switch=1.1) == {"a": "npu", "b": "npu", "c": "npu"}


def test_viterbi_knows_what_fusing_saves() -> None:
    tasks = [task("a", cpu=2, npu=1), task("b", cpu=2, npu=1.2)]
    assert viterbi_per_branch(chain(tasks)) == {"a": "npu", "b": "npu"}
    assert viterbi_per_branch(chain(tasks, cpu=1.5)) == {"a": "cpu", "b": "cpu"}


def diamond(units: tuple[Unit, ...], cross: float, **seconds: Mapping[str, float]) -> Problem:
    """in -> (left, right) -> out."""
    tasks = tuple(task(name, **seconds[name]) for name in ("first", "left", "right", "last"))
    pairs = [
        (None, "first"), ("first", "left"), ("first", "right"), ("left", "last"), ("right", "last"), ("last", None),
    ]  # fmt: skip
    return Problem(units, tasks, tuple(edge(one, other, cross) for one, other in pairs))


def test_viterbi_does_not_see_borders_of_branches() -> None:
    problem = diamond(
        (CPU, NPU), 100.0,
        first={"cpu": 1}, left={"cpu": 2, "npu": 1}, right={"cpu": 2, "npu": 1.6}, last={"cpu": 1, "npu": 2},
    )  # fmt: skip
    # left: npu 1.5 with its launch against 2, though its borders cost 200; right: 2.1 against 2.
    assert viterbi_per_branch(problem) == {"first": "cpu", "left": "npu", "right": "cpu", "last": "cpu"}


def test_viterbi_gives_branches_of_one_level_to_identical_units_in_turn() -> None:
    second = Unit("npu_2", "npu_2", launch=0.5)
    both = {"npu": 1.0, "npu_2": 1.0}
    problem = diamond(
        (CPU, NPU, second), 0.0,
        first={"cpu": 5, **both}, left={"cpu": 5, **both}, right={"cpu": 5, **both}, last={"cpu": 5, **both},
    )  # fmt: skip
    assert viterbi_per_branch(problem) == {"first": "npu", "left": "npu", "right": "npu_2", "last": "npu"}


def test_branches_are_maximal_chains() -> None:
    tasks = tuple(task(name, cpu=1) for name in "abcdefg")
    pairs = [(None, "a"), ("a", "b"), ("b", "c"), ("b", "d"), ("d", "e"), ("c", "f"), ("e", "f"), ("f", "g")]
    edges = tuple(edge(one, other) for one, other in [*pairs, ("g", None)])
    assert branches_of(Problem((CPU,), tasks, edges)) == [("a", "b"), ("c",), ("d", "e"), ("f", "g")]


def test_two_tensors_between_two_tasks_are_one_step() -> None:
    tasks = (task("a", cpu=1, npu=0.1), task("b", cpu=1, npu=5))
    edges = (edge("a", "b", 0.2), Edge("other", "a", "b", 8, {("npu", "cpu"): Crossing(0.1, 0.0, 0.1)}))
    problem = Problem((CPU, NPU), tasks, edges)
    assert branches_of(problem) == [("a", "b")]
    # npu, cpu: 0.5 + 0.1 + 0.2 + 1 = 1.8 with the first tensor alone, 2.1 with both, against 2 on cpu.
    assert viterbi_per_branch(Problem((CPU, NPU), tasks, edges[:1]))["a"] == "npu"
    dearer = Edge("other", "a", "b", 8, {("npu", "cpu"): Crossing(0.2, 0.0, 0.1)})
    assert viterbi_per_branch(Problem((CPU, NPU), tasks, (edges[0], dearer)))["a"] == "cpu"


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_viterbi_is_the_best_of_all_paths_of_a_chain(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    seconds = st.integers(0, 20)
    tasks = [task(f"t{i}", **{unit: data.draw(seconds) for unit in ("cpu", "npu", "pim")}) for i in range(count)]
    cross = data.draw(st.integers(0, 8))
    problem = chain(tasks, cross=cross, units=(CPU, NPU, PIM))

    def total(path: list[str]) -> float:
        launch = {unit.name: unit.launch for unit in problem.units}
        value = launch[path[0]]
        for number, unit in enumerate(path):
            value += tasks[number].costs[unit].seconds
            if number and unit != path[number - 1]:
                value += launch[unit] + cross
        return value

    paths: list[list[str]] = [[]]
    for _ in tasks:
        paths = [[*path, unit] for path in paths for unit in ("cpu", "npu", "pim")]
    assert total(list(viterbi_per_branch(problem).values())) == min(total(path) for path in paths)
