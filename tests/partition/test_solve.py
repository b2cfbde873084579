"""Solvers against everything there is: all assignments, stages and orders of small problems; bounds on larger ones."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.errors import PlanError
from nestc.partition import bounds, branch, chain, cpsat, latency
from nestc.partition import network as net
from nestc.partition.arrange import arrange
from nestc.partition.evaluate import check, evaluate
from nestc.partition.heft import heft
from nestc.partition.labelling import Factor, minimise, remaining
from nestc.partition.network import Group, Network
from nestc.partition.problem import HOST, Cost, Crossing, Edge, Objective, Problem, Stage, Task, Unit
from nestc.partition.segments import comparable, hubs
from nestc.partition.solve import solve

UNITS = (Unit("cpu", "cpu", launch=1.0), Unit("vta", "vta", launch=3.0), Unit("ort", "cpu", launch=0.5))
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "energy")
SHAPES = ("chain", "blocks", "any")


def everything(problem: Problem, objective: Objective) -> float:
    """The least value over all assignments, stages and orders that keep the memories."""
    network = net.compiled(problem)
    least = float("inf")
    for groups in plans(network, 0, []):
        units = net.units_of(network, groups)
        if network.fits(units):
            least = min(least, value_of(network, groups, objective))
    return least


def value_of(network: Network, groups: list[Group], objective: Objective) -> float:
    if objective == "latency":
        return net.timeline(network, groups)[2]
    if objective == "throughput":
        return max(net.busy(network, groups))
    return net.joules(network, net.units_of(network, groups))


def plans(network: Network, done: int, groups: list[Group]) -> Iterator[list[Group]]:
    """Every order of stages in which a topological order exists."""
    left = [task for task in range(len(network.tasks)) if not done >> task & 1]
    if not left:
        yield groups
    for size in range(1, len(left) + 1):
        for tasks in itertools.combinations(left, size):
            mask = done | sum(1 << task for task in tasks)
            if any(not mask >> link.source & 1 for task in tasks for link in network.links_into[task]):
                continue
            for unit in range(len(network.units)):
                if all(unit in network.allowed[task] for task in tasks):
                    yield from plans(network, mask, [*groups, (unit, tasks)])


def pairs_of(rng: random.Random, tasks: int, shape: str) -> Iterator[tuple[int, int]]:
    """Edges of a chain, of branches that meet again ("blocks"), or of any DAG."""
    if shape == "chain":
        yield from itertools.pairwise(range(tasks))
    elif shape == "any":
        for destination in range(1, tasks):
            count = min(destination, rng.randint(0, 2))
            yield from (
                (source, destination) for source in rng.sample(range(max(0, destination - 4), destination), count)
            )
    else:
        head = 0
        while head < tasks - 1:
            inner = list(range(head + 1, min(head + 1 + rng.randint(0, 4), tasks - 1)))
            tail = inner[-1] + 1 if inner else head + 1
            branches = [inner[at::3] for at in range(3) if inner[at::3]]
            for members in branches:
                yield from itertools.pairwise((head, *members, tail))
            if not branches or rng.random() < 0.3:
                yield head, tail
            head = tail


def drawn(
    seed: int, tasks: int, shape: str = "any", *, units: tuple[Unit, ...] = UNITS, memory: bool = False
) -> Problem:
    """A problem of random numbers; with ``memory`` all but the first unit, which takes everything, may be limited."""
    rng = random.Random(seed)
    if memory:
        limited = (Unit(u.name, u.resource, u.launch, rng.choice([0, 2 * tasks])) for u in units[1:])
        units = (units[0], *limited)
    made: list[Task] = []
    for index in range(tasks):
        takers = {u.name for u in units if rng.random() > 0.15} | {units[0].name}
        costs = {
            u.name: Cost(rng.uniform(1, 10), rng.uniform(0, 5), bytes=rng.randint(0, 9))
            for u in units
            if u.name in takers
        }
        made.append(Task(f"t{index}", costs))
    free = rng.random() < 0.2

    def crossings(sources: list[str], destinations: list[str]) -> dict[tuple[str, str], Crossing]:
        return {
            (a, b): Crossing(*(rng.choice([0.0, rng.uniform(0, 2)]) for _ in range(3)), rng.uniform(0, 2))
            for a in sources
            for b in destinations
            if a != b and not free
        }

    names = [u.name for u in units]
    pairs = sorted(set(pairs_of(rng, tasks, shape)))
    tensors = {source: crossings(names, names) for source, _ in pairs}
    edges: list[Edge] = []
    for source, destination in pairs:
        gains = {name: rng.uniform(0, 0.9) / 2 for name in names} if rng.random() < 0.3 else {}
        edges.append(Edge(f"x{source}", f"t{source}", f"t{destination}", 4, tensors[source], gains))
    given = crossings([HOST], names)
    for index in range(tasks):
        if all(index != destination for _, destination in pairs):
            edges.append(Edge("input", None, f"t{index}", 4, given))
        if all(index != source for source, _ in pairs):
            edges.append(Edge(f"x{index}", f"t{index}", None, 4, crossings(names, [HOST])))
    return Problem(units, tuple(made), tuple(edges))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if OR-tools were not installed."""
    monkeypatch.setattr(cpsat, "installed", lambda: False)


def best_is_found(seed: int, tasks: int, shape: str, memory: bool, units: tuple[Unit, ...] = UNITS) -> None:
    problem = drawn(seed, tasks, shape, memory=memory, units=units)
    for objective in OBJECTIVES:
        found = solve(problem, objective)
        assert found.value == pytest.approx(everything(problem, objective), rel=1e-6), objective
        assert found.evaluation == evaluate(problem, found.stages)
        assert found.optimal
        assert found.lower_bound == pytest.approx(found.value, rel=1e-6)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES), memory=st.booleans())
def test_small_problems_are_solved_to_the_best(seed: int, shape: str, memory: bool):
    best_is_found(seed, 4, shape, memory)


@pytest.mark.parametrize("shape", ["chain", "blocks"])
def test_two_devices_and_six_tasks_are_solved_to_the_best(shape: str):
    best_is_found(11, 6, shape, memory=False, units=UNITS[:2])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory", [False, True])
def test_small_problems_are_solved_to_the_best_without_ortools(shape: str, memory: bool):
    best_is_found(5, 4, shape, memory)


@pytest.mark.parametrize(("seed", "shape"), [(1, "chain"), (2, "blocks")])
def test_twelve_tasks_against_all_assignments(seed: int, shape: str):
    units = UNITS[:2]
    problem = drawn(seed, 12, shape, units=units)
    network = net.compiled(problem)
    assignments = itertools.product(*network.allowed)
    assert solve(problem, "energy").value == pytest.approx(min(net.joules(network, each) for each in assignments))
    # On a chain an assignment has one best way into stages: whole runs.
    if shape == "chain":
        for objective in ("latency", "throughput"):
            least = min(
                value_of(network, list(net.in_runs(network, each)), objective)
                for each in itertools.product(*network.allowed)
            )
            assert solve(problem, objective).value == pytest.approx(least)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), tasks=st.integers(5, 24), shape=st.sampled_from(SHAPES), memory=st.booleans())
def test_larger_problems_keep_their_word(seed: int, tasks: int, shape: str, memory: bool):
    problem = drawn(seed, tasks, shape, memory=memory)
    network = net.compiled(problem)
    options = [heft(problem), *({t.name: u.name for t in problem.tasks} for u in problem.units)]
    for objective in OBJECTIVES:
        found = solve(problem, objective, time_limit=0.5)
        check(problem, found.stages)
        assert found.lower_bound <= found.value
        for assignment in options:
            if all(assignment[t.name] in t.costs for t in problem.tasks):
                units = [network.units.index(assignment[name]) for name in network.tasks]
                if network.fits(units):
                    stages = arrange(problem, assignment, objective)
                    assert found.value <= evaluate(problem, stages).value(objective) * (1 + 1e-9)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES))
def test_bounds_stay_below_the_best(seed: int, shape: str):
    problem = drawn(seed, 4, shape)
    network = net.compiled(problem)
    least, period = everything(problem, "latency"), everything(problem, "throughput")
    every = comparable(network)
    assert latency.longest(bounds.along_paths(network), network) <= least * (1 + 1e-9)
    for weight in bounds.weights(network.resources):
        assert bounds.load(network, weight).bound <= period * (1 + 1e-9)
        assert bounds.load(network, weight, every).bound <= least * (1 + 1e-9)
    assert bounds.energy(network).bound <= everything(problem, "energy") * (1 + 1e-9)
    if hubs(network):
        found = chain.solve(network, hubs(network), seconds=10.0)
        assert found.bound <= least * (1 + 1e-9)
        assert net.timeline(network, found.groups)[2] >= least * (1 - 1e-9)


@pytest.mark.skipif(not cpsat.installed(), reason="needs OR-tools")
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES), memory=st.booleans())
def test_constraint_programming_finds_the_best(seed: int, shape: str, memory: bool):
    problem = drawn(seed, 4, shape, memory=memory)
    network = net.compiled(problem)
    groups = [(0, (task,)) for task in range(4)]
    start = branch.Found(tuple(groups), net.timeline(network, groups)[2], 0.0)
    found = cpsat.best(network, start, seconds=10.0)
    least = everything(problem, "latency")
    assert found.latency == pytest.approx(least)
    assert found.bound == pytest.approx(least, rel=1e-6)


def test_time_that_runs_out_leaves_a_bound():
    problem = drawn(3, 30, "any")
    for objective in OBJECTIVES:
        found = solve(problem, objective, time_limit=0.0)
        check(problem, found.stages)
        assert 0 < found.lower_bound <= found.value


@pytest.mark.parametrize("seed", range(4))
def test_what_was_known_before_is_where_it_begins(seed: int):
    problem = drawn(seed, 40, "any")
    known = solve(problem, "latency", time_limit=1.0)
    again = solve(problem, "latency", time_limit=0.0, start=known.stages)
    assert again.value <= known.value * (1 + 1e-12)
    assert again.lower_bound <= again.value


def test_equal_problems_get_equal_answers():
    problem = drawn(8, 14, "any")
    assert solve(problem, "latency", time_limit=2.0).stages == solve(problem, "latency", time_limit=2.0).stages


def test_equal_segments_are_solved_once(monkeypatch: pytest.MonkeyPatch):
    units = UNITS[:2]
    costs = {"cpu": Cost(4.0), "vta": Cost(3.0)}
    tasks = tuple(Task(f"t{n}", costs) for n in range(61))
    over = {("cpu", "vta"): Crossing(0.1, 0.1, 0.1), ("vta", "cpu"): Crossing(0.1, 0.1, 0.1)}
    edges = [
        Edge(f"x{a}", f"t{a}", f"t{b}", 4, over)
        for h in range(0, 60, 3)
        for a, b in ((h, h + 1), (h, h + 2), (h + 1, h + 3), (h + 2, h + 3))
    ]
    problem = Problem(units, tasks, (*edges, Edge("out", "t60", None)))
    solved: list[object] = []
    original = chain.Steps.solve

    def counted(self: chain.Steps, pair: tuple[int, int], seconds: float) -> None:
        solved.append((id(self), pair))
        original(self, pair, seconds)

    monkeypatch.setattr(chain.Steps, "solve", counted)
    assert solve(problem, "latency").optimal
    # Beginning, middle and end, by at most four pairs of units.
    assert 0 < len(solved) <= 12


def test_hubs_are_what_everything_passes_through():
    names = "abcdefg"
    tasks = tuple(Task(name, {"cpu": Cost(1.0)}) for name in names)
    links = ("ab", "ac", "bd", "cd", "de", "ef", "eg")
    problem = Problem(UNITS[:1], tasks, tuple(Edge(f"x{a}", a, b) for a, b in links))
    assert hubs(net.compiled(problem)) == [0, 3, 4]
    # b to e passes over d
    passed = Problem(UNITS[:1], tasks, (*problem.edges, Edge("xb", "b", "e")))
    assert hubs(net.compiled(passed)) == [0, 4]
    assert comparable(net.compiled(passed)) == [0, 3, 4]


def test_memory_that_nothing_fits_is_an_error():
    units = (Unit("npu", "npu", memory_bytes=10),)
    tasks = tuple(Task(name, {"npu": Cost(1.0, bytes=6)}) for name in "ab")
    problem = Problem(units, tasks, (Edge("x", "a", "b"), Edge("y", "b", None)))
    for objective in OBJECTIVES:
        with pytest.raises(PlanError, match="do not fit the memories"):
            solve(problem, objective)


def test_a_task_that_nobody_takes_is_an_error():
    problem = Problem(UNITS, (Task("a", {}),), ())
    with pytest.raises(PlanError, match="no unit takes task 'a'"):
        solve(problem, "latency")


def test_nothing_to_place():
    found = solve(Problem(UNITS, (), ()), "latency")
    assert (found.stages, found.value, found.optimal) == ((), 0.0, True)


def test_branches_go_to_two_devices_when_that_pays():
    units = (Unit("cpu", "cpu"), Unit("npu", "npu", launch=0.5))
    costs = {"cpu": Cost(4.0), "npu": Cost(4.5)}
    tasks = (Task("a", {"cpu": Cost(1.0)}), Task("b", costs), Task("c", costs), Task("d", {"cpu": Cost(1.0)}))
    edges = (Edge("x", "a", "b"), Edge("x", "a", "c"), Edge("y", "b", "d"), Edge("z", "c", "d"), Edge("o", "d", None))
    found = solve(Problem(units, tasks, edges), "latency")
    # 1, then 4 beside 0.5 + 4.5, then 1
    assert found.value == 7.0
    assert sorted(found.assignment.values()) == ["cpu", "cpu", "cpu", "npu"]
    assert len(found.stages) == 4 and found.optimal
    assert solve(Problem(units, tasks, edges), "throughput").value == 6.0
    assert found.stages[0] == Stage("cpu", ("a",))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_elimination_finds_the_least_sum(seed: int):
    rng = np.random.default_rng(seed)
    sizes = [int(size) for size in rng.integers(1, 4, 5)]
    scopes = [tuple(sorted(rng.choice(5, int(rng.integers(1, 4)), replace=False).tolist())) for _ in range(6)]
    factors = [Factor(scope, rng.uniform(-1, 1, [sizes[v] for v in scope])) for scope in scopes]

    def total(labels: tuple[int, ...]) -> float:
        return sum(float(f.table[tuple(labels[v] for v in f.variables)]) for f in factors)

    every = list(itertools.product(*map(range, sizes)))
    found = minimise(sizes, factors)
    assert found.exact
    assert found.bound == pytest.approx(min(map(total, every)))
    assert total(tuple(found.labels)) == pytest.approx(found.bound)
    kept = minimise(sizes, factors, keep=(3, 1)).table
    for a, b in itertools.product(range(sizes[3]), range(sizes[1])):
        assert kept[a, b] == pytest.approx(min(total(each) for each in every if (each[3], each[1]) == (a, b)))
    # With the first two chosen, what remains is at least what the tables say, and here just that.
    tables = remaining(sizes, factors, -1)[2]
    for first in itertools.product(*map(range, sizes[:2])):
        rest = sum(float(f.table[tuple(first[v] for v in f.variables)]) for f in tables)
        later = [f for f in factors if max(f.variables) >= 2]
        least = min(
            sum(float(f.table[tuple(each[v] for v in f.variables)]) for f in later)
            for each in every
            if each[:2] == first
        )
        assert rest == pytest.approx(least)


def test_elimination_that_would_grow_too_large_still_bounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nestc.partition.labelling.ENTRIES", 9)
    rng = np.random.default_rng(4)
    factors = [Factor(pair, rng.uniform(0, 1, (3, 3))) for pair in itertools.combinations(range(5), 2)]
    found = minimise([3] * 5, factors)
    least = min(
        sum(f.table[each[f.variables[0]], each[f.variables[1]]] for f in factors)
        for each in itertools.product(range(3), repeat=5)
    )
    assert not found.exact
    assert 0 < found.bound <= least


def test_search_that_is_stopped_bounds_what_is_left():
    problem = drawn(21, 6, "any")
    network = net.compiled(problem)
    start = latency.known(network)
    stopped = branch.best(network, start, weights=bounds.weights(2), deadline=time.thread_time())
    done = branch.best(network, start, weights=bounds.weights(2), deadline=time.thread_time() + 20.0)
    assert start.bound <= stopped.bound <= done.latency * (1 + 1e-9)
    assert done.exact
