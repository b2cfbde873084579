"""Solvers of the placement problem: latency, throughput, energy; with a lower bound of what any placement could reach.

Whatever finds stages, what is reported of them comes from `evaluate`; a bound is of the same rules, for any stages.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from nestc.errors import PlanError
from nestc.partition import assign, bounds, branch, chain, cpsat, latency, pipeline
from nestc.partition.arrange import arranged
from nestc.partition.branch import Found
from nestc.partition.evaluate import evaluate
from nestc.partition.heft import by_rank
from nestc.partition.network import Group, Network, compiled, grouped, in_runs, joules, named, timeline, units_of
from nestc.partition.problem import Objective, Problem, Solution, Stage
from nestc.partition.search import improve, measure, repaired
from nestc.partition.segments import hubs

PROVEN = 1e-6
"""A value within this part of its bound is called optimal: numbers are measured to fewer digits."""

NEAR = 1e-3
"""Within this part of the bound local search stops: what it could still gain is less than the numbers are known to."""


def solve(problem: Problem, objective: Objective, *, time_limit: float = 30.0, start: Sequence[Stage] = ()) -> Solution:
    """Stages that make the objective small, and how far from the least possible they can be.

    ``time_limit``: seconds of computing (of this thread, so that results do not depend on what else runs); methods
    not done by then give the best they found and its bound. Latency is found by dynamic programming between
    hubs (`chain`), throughput and energy over assignments (`assign`).
    ``start``: stages, for instance those found when costs were others; the latency found is not above theirs.
    Raises PlanError if a task has no unit, or no placement was found that the memories hold.
    """
    for task in problem.tasks:
        if not task.costs:
            raise PlanError(f"no unit takes task {task.name!r}; add a unit that does")
    network = compiled(problem)
    deadline = time.thread_time() + 0.9 * time_limit
    if not problem.tasks:
        return _solution(problem, network, (), objective, 0.0, "nothing to place")
    if objective == "latency":
        groups, bound, method = _latency(network, deadline, grouped(network, start))
    elif objective == "throughput":
        groups, bound, method = _throughput(network, deadline)
    else:
        groups, bound, method = _energy(network, deadline)
    return _solution(problem, network, groups, objective, bound, method)


def _solution(
    problem: Problem, network: Network, groups: Sequence[Group], objective: Objective, bound: float, method: str
) -> Solution:
    stages = named(network, groups)
    evaluation = evaluate(problem, stages)
    value = evaluation.value(objective)
    return Solution(
        stages=stages,
        evaluation=evaluation,
        objective=objective,
        # Sums in another order differ in the last digits.
        lower_bound=min(bound, value),
        optimal=value - bound <= PROVEN * abs(value),
        method=method,
    )


def _closed(value: float, bound: float) -> bool:
    return value - bound <= PROVEN * abs(value)


def _latency(network: Network, deadline: float, before: Sequence[Group]) -> tuple[tuple[Group, ...], float, str]:
    cuts = hubs(network)
    start = latency.known(network, serial=cuts, tries=100)
    best, bound, method = start.groups, start.bound, "list scheduling"
    value = start.latency
    if before and network.fits(units_of(network, before)) and timeline(network, before)[2] < value:
        best, value, method = tuple(before), timeline(network, before)[2], "as before"
    fits = network.fits(units_of(network, best))
    if cuts and not _closed(value, bound):
        # Where the whole is too large for an exact method, only its segments have one.
        share = 0.6 if len(network.tasks) <= cpsat.TASKS else 0.85
        found = chain.solve(network, cuts, seconds=share * (deadline - time.thread_time()))
        bound = max(bound, found.bound)
        least = timeline(network, found.groups)[2]
        if network.fits(units_of(network, found.groups)) and (least < value or not fits):
            best, value, fits = found.groups, least, True
            method = f"dynamic programming over {len(cuts)} hubs"
    if not fits:
        best, method = _repair(network, best, "latency"), "moved until memories fit"
        value = timeline(network, best)[2]
    if not _closed(value, bound):
        found = latency.whole(
            network,
            Found(best, value, bound),
            weights=bounds.weights(network.resources),
            serial=cuts,
            seconds=0.4 * (deadline - time.thread_time()),
        )
        bound = max(bound, found.bound)
        if found.latency < value:
            best, value = found.groups, found.latency
            method = "CP-SAT" if cpsat.installed() and len(network.tasks) > latency.SMALL else "branch and bound"
    if not _closed(value, bound):
        better = improve(network, best, "latency", deadline=deadline, tries=2000, goal=bound * (1 + NEAR))
        if timeline(network, better)[2] < value:
            best, method = better, method + ", local search"
    return best, bound, method


def _repair(network: Network, groups: Sequence[Group], objective: Objective) -> tuple[Group, ...]:
    units = repaired(network, units_of(network, groups))
    if units is None:
        raise PlanError("the tasks do not fit the memories of their units in any placement found; allow another unit")
    return arranged(network, units, objective)


def _candidates(network: Network, found: Iterable[Sequence[int]]) -> list[list[int]]:
    # What is found, HEFT's, and each unit that takes all; made to fit memories.
    every = [*map(list, found), by_rank(network)]
    for unit in range(len(network.units)):
        if all(unit in allowed for allowed in network.allowed):
            every.append([unit] * len(network.tasks))
    distinct = [list(units) for units in dict.fromkeys(map(tuple, every))]
    fitting = [fixed for units in distinct if (fixed := repaired(network, units)) is not None]
    if not fitting:
        raise PlanError("the tasks do not fit the memories of their units in any placement found; allow another unit")
    return fitting


def _throughput(network: Network, deadline: float) -> tuple[tuple[Group, ...], float, str]:
    found, bound, _ = pipeline.spread(network)
    value = measure(network, "throughput")
    options = [arranged(network, units, "throughput", tries=0) for units in _candidates(network, found)]
    best = min(options, key=value)
    best = arranged_better(network, best, "throughput")
    method = "weighted loads"
    if len(network.tasks) <= latency.SMALL and not _closed(value(best)[0], bound):
        found, bound = _small(network, best, value(best)[0], bound, "throughput", deadline)
        if value(found) < value(best):
            best, method = found, "branch and bound"
    if not _closed(value(best)[0], bound) and cpsat.installed():
        seconds = 0.5 * (deadline - time.thread_time())
        assigned = assign.best(network, "throughput", units_of(network, best), value(best)[0], bound, seconds=seconds)
        bound = max(bound, assigned.bound)
        if assigned.units is not None:
            options = arranged(network, assigned.units, "throughput")
            if value(options) < value(best):
                best, method = options, "CP-SAT"
    if not _closed(value(best)[0], bound):
        better = improve(network, best, "throughput", deadline=deadline, tries=1000, goal=bound * (1 + NEAR))
        if value(better) < value(best):
            best, method = better, method + ", local search"
    return best, bound, method


def arranged_better(network: Network, groups: tuple[Group, ...], objective: Objective) -> tuple[Group, ...]:
    """Stages of the same assignment arranged with more effort, if that is better."""
    value = measure(network, objective)
    return min([groups, arranged(network, units_of(network, groups), objective)], key=value)


def _small(
    network: Network, groups: tuple[Group, ...], value: float, bound: float, objective: Objective, deadline: float
) -> tuple[tuple[Group, ...], float]:
    # Stages and bound by branch and bound, in half the time left.
    now = time.thread_time()
    found = branch.best(
        network,
        Found(groups, value, bound),
        objective=objective,
        weights=bounds.weights(network.resources),
        deadline=now + 0.5 * (deadline - now),
    )
    return found.groups, found.bound


def _energy(network: Network, deadline: float) -> tuple[tuple[Group, ...], float, str]:
    labelling = bounds.energy(network)
    bound = labelling.bound
    options = _candidates(network, [labelling.labels])
    units = min(options, key=lambda each: joules(network, each))
    method = "dynamic programming over tasks"
    if len(network.tasks) <= latency.SMALL and not _closed(joules(network, units), bound):
        groups, bound = _small(network, in_runs(network, units), joules(network, units), bound, "energy", deadline)
        units, method = units_of(network, groups), "branch and bound"
    if not _closed(joules(network, units), bound) and cpsat.installed():
        seconds = 0.5 * (deadline - time.thread_time())
        found = assign.best(network, "energy", units, joules(network, units), bound, seconds=seconds)
        bound = max(bound, found.bound)
        if found.units is not None and joules(network, found.units) < joules(network, units):
            units, method = found.units, "CP-SAT"
    groups = arranged(network, units)
    if not _closed(joules(network, units), bound):
        better = improve(network, groups, "energy", deadline=deadline, tries=1000, goal=bound * (1 + NEAR))
        if joules(network, units_of(network, better)) < joules(network, units):
            groups, method = better, method + ", local search"
    return groups, bound, method
