"""Stages and their order for tasks whose units are given."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Mapping, Sequence

from nestc.errors import PlanError
from nestc.partition.branch import fewest, sequence
from nestc.partition.heft import upward
from nestc.partition.network import Group, Network, busy, compiled, in_runs, named, timeline, units_of
from nestc.partition.problem import Objective, Problem, Stage

EXACT = 6
"""Tasks up to which all stages and orders are tried."""

TRIES = 300
"""Merges that are tried by timing all stages."""


def arrange(problem: Problem, assignment: Mapping[str, str], objective: Objective = "latency") -> tuple[Stage, ...]:
    """Stages, in an order in which they can run, for an assignment of tasks to units.

    The best ones of up to `EXACT` tasks (energy depends on the assignment alone, so for it those of least latency).
    Else by list scheduling, after which neighbours on a unit are merged where that is no cycle and makes nothing worse
    (a launch is saved, results of the first come later).
    Raises PlanError if a task is not assigned, or to a unit that does not take it.
    """
    network = compiled(problem)
    number = {name: index for index, name in enumerate(network.units)}
    units: list[int] = []
    for index, name in enumerate(network.tasks):
        if name not in assignment:
            raise PlanError(f"the assignment says nothing of task {name!r}; give every task a unit")
        unit = number.get(assignment[name])
        if unit is None or unit not in network.allowed[index]:
            takers = ", ".join(network.units[u] for u in network.allowed[index])
            raise PlanError(f"unit {assignment[name]!r} does not take task {name!r}; place it on one of {takers}")
        units.append(unit)
    return named(network, arranged(network, units, objective))


def arranged(
    network: Network, units: Sequence[int], objective: Objective = "latency", *, tries: int = TRIES
) -> tuple[Group, ...]:
    """The same by numbers; ``tries`` limits the effort."""
    if len(units) <= EXACT and tries:
        way = fewest if objective == "throughput" else sequence
        found = way(network, units, math.inf, deadline=time.thread_time() + 5.0)
        if found is not None:
            return found[0]
    candidates = [in_runs(network, units), harmless(network, listed(network, units))]
    if tries:
        candidates = [merged(network, groups, objective, tries // 2) for groups in candidates]
    return min(candidates, key=lambda groups: worth(network, groups, objective))


def worth(network: Network, groups: Sequence[Group], objective: Objective) -> tuple[float, float]:
    """What stages are compared by: latency, or for the other objectives the period and then latency.

    Energy depends on units alone.
    """
    latency = timeline(network, groups)[2]
    if objective == "latency":
        return latency, len(groups)
    return max(busy(network, groups)), latency


def listed(network: Network, units: Sequence[int]) -> tuple[Group, ...]:
    """A stage for every task, by list scheduling: of the ready ones the first to begin, then the one most urgent."""
    count = len(units)
    ranks = upward(network, list(units))
    waiting = [len({link.source for link in network.links_into[task]}) for task in range(count)]
    arrival = [network.arrives[task][unit] for task, unit in enumerate(units)]
    free = [0.0] * network.resources
    last = [-1] * network.resources
    ready = {task for task in range(count) if not waiting[task]}
    groups: list[Group] = []
    while ready:

        def order(task: int) -> tuple[float, bool, float, int]:
            resource = network.resource[units[task]]
            return max(free[resource], arrival[task]), units[task] != last[resource], -ranks[task], task

        task = min(ready, key=order)
        ready.remove(task)
        unit = units[task]
        resource = network.resource[unit]
        # A launch is paid where the unit changes; what crosses is worked on by both sides.
        took = network.cost[task][unit] + (network.launch[unit] if last[resource] != unit else 0.0)
        took += sum(link.into[units[link.source]][unit] for link in network.links_into[task])
        took += max((link.out[unit][units[link.destination]] for link in network.links_from[task]), default=0.0)
        end = max(free[resource], arrival[task]) + took
        free[resource], last[resource] = end, unit
        groups.append((unit, (task,)))
        for following in {link.destination for link in network.links_from[task]}:
            wire = max(
                link.wire[unit][units[following]] for link in network.links_from[task] if link.destination == following
            )
            arrival[following] = max(arrival[following], end + wire)
            waiting[following] -= 1
            if not waiting[following]:
                ready.add(following)
    return tuple(groups)


def harmless(network: Network, groups: Sequence[Group]) -> tuple[Group, ...]:
    """Neighbours of a resource made one stage where nobody waits longer for it.

    That is: what the second needs from elsewhere is there when the first begins, and whoever needs results of the
    first begins after the second has ended. So no cycle can arise either.
    """
    begins, ends, _ = timeline(network, groups)
    units = units_of(network, groups)
    where = {task: number for number, (_, tasks) in enumerate(groups) for task in tasks}
    made: list[list[int]] = []
    current: dict[int, int] = {}
    for number, (unit, tasks) in enumerate(groups):
        resource = network.resource[unit]
        at = current.get(resource)
        if at is not None and groups[made[at][0]][0] == unit:
            members = set(made[at])
            begin = begins[made[at][0]]
            given = max(network.arrives[task][unit] for task in tasks)
            inputs = (link for task in tasks for link in network.links_into[task])
            outputs = (link for n in members for task in groups[n][1] for link in network.links_from[task])
            if (
                given <= begin
                and all(
                    where[link.source] in members
                    or ends[where[link.source]] + link.wire[units[link.source]][unit] <= begin
                    for link in inputs
                )
                and all(
                    where[link.destination] in members
                    or where[link.destination] == number
                    or begins[where[link.destination]] >= ends[number]
                    for link in outputs
                )
            ):
                made[at].append(number)
                continue
        current[resource] = len(made)
        made.append([number])
    joined = [
        (groups[numbers[0]][0], tuple(sorted(task for n in numbers for task in groups[n][1]))) for numbers in made
    ]
    return ordered(network, joined) or tuple(groups)


def merged(network: Network, groups: Sequence[Group], objective: Objective, tries: int) -> tuple[Group, ...]:
    """Runs of one unit on a resource made one stage, whole or in halves, where that is worth it."""
    best = tuple(groups)
    value = worth(network, best, objective)
    left = tries
    work = [run for run in _runs(network, best) if len(run) > 1]
    while work and left:
        run = work.pop()
        left -= 1
        members = set(run)
        joined = (run[0][0], tuple(sorted(task for group in run for task in group[1])))
        if not members <= set(best):
            continue
        first = next(index for index, group in enumerate(best) if group in members)
        rest = [group for group in best if group not in members]
        found = ordered(network, [*rest[:first], joined, *rest[first:]])
        if found is not None:
            better = worth(network, found, objective)
            if better <= value:
                best, value = found, better
                continue
        if len(run) > 2:
            middle = len(run) // 2
            work += [run[middle:], run[:middle]]
    # Halves cut a run at fixed places; neighbours across them are tried last.
    for first, second in [pair for run in _runs(network, best) for pair in itertools.pairwise(run)]:
        if not left or first not in best or second not in best:
            continue
        left -= 1
        joined = (first[0], tuple(sorted(first[1] + second[1])))
        found = ordered(network, [joined if group == first else group for group in best if group != second])
        if found is not None and worth(network, found, objective) <= value:
            best, value = found, worth(network, found, objective)
    return best


def _runs(network: Network, groups: Sequence[Group]) -> list[list[Group]]:
    runs: list[list[Group]] = []
    current: dict[int, list[Group]] = {}
    for group in groups:
        resource = network.resource[group[0]]
        run = current.get(resource)
        if run is not None and run[0][0] == group[0]:
            run.append(group)
        else:
            current[resource] = [group]
            runs.append(current[resource])
    return runs


def ordered(network: Network, groups: Sequence[Group]) -> tuple[Group, ...] | None:
    """Stages in a topological order, as near as possible to the one given; None if they depend on one another."""
    where = [-1] * len(network.tasks)
    for number, (_, tasks) in enumerate(groups):
        for task in tasks:
            where[task] = number
    following: list[set[int]] = [set() for _ in groups]
    waiting = [0] * len(groups)
    for link in network.links:
        a, b = where[link.source], where[link.destination]
        if a != b and b not in following[a]:
            following[a].add(b)
            waiting[b] += 1
    ready = [number for number, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    found: list[Group] = []
    while ready:
        number = heapq.heappop(ready)
        found.append(groups[number])
        for other in following[number]:
            waiting[other] -= 1
            if not waiting[other]:
                heapq.heappush(ready, other)
    return tuple(found) if len(found) == len(groups) else None
