"""Local search over assignments: other units for a task or for a stage, kept when the stages get better."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from nestc.partition.arrange import arranged
from nestc.partition.network import Group, Network, busy, joules, units_of
from nestc.partition.network import timeline as timed
from nestc.partition.problem import Objective

Value = Callable[[Sequence[Group]], tuple[float, ...]]


def measure(network: Network, objective: Objective) -> Value:
    """What stages are compared by: the objective's value, then what else is better."""

    def latency(groups: Sequence[Group]) -> tuple[float, ...]:
        return timed(network, groups)[2], float(len(groups))

    def period(groups: Sequence[Group]) -> tuple[float, ...]:
        load = sorted(busy(network, groups), reverse=True)
        return (*load, timed(network, groups)[2])

    def energy(groups: Sequence[Group]) -> tuple[float, ...]:
        return joules(network, units_of(network, groups)), timed(network, groups)[2]

    return {"latency": latency, "throughput": period, "energy": energy}[objective]


def improve(
    network: Network, groups: tuple[Group, ...], objective: Objective, *, deadline: float, tries: int, goal: float
) -> tuple[Group, ...]:
    """Better stages, if moves find any; memories that fit go on to fit.

    Ends when no move helps, after so many ``tries``, at the deadline, or when the value reaches ``goal``.
    """
    value = measure(network, objective)
    best, least = groups, value(groups)
    found = True
    while found:
        found = False
        for units in moves(network, best):
            if tries <= 0 or time.thread_time() > deadline or least[0] <= goal:
                return best
            if not network.fits(units):
                continue
            tries -= 1
            candidate = arranged(network, units, objective, tries=0)
            better = value(candidate)
            if better < least:
                best, least, found = candidate, better, True
                break
    return best


def moves(network: Network, groups: Sequence[Group]) -> Iterator[list[int]]:
    """Assignments near that of some stages: a stage elsewhere, a task where its neighbours are, a task anywhere."""
    units = units_of(network, groups)
    for unit, tasks in groups:
        for other in range(len(network.units)):
            if other != unit and all(other in network.allowed[task] for task in tasks):
                yield [other if task in tasks else u for task, u in enumerate(units)]
    for task, unit in enumerate(units):
        near = {units[link.source] for link in network.links_into[task]}
        near |= {units[link.destination] for link in network.links_from[task]}
        for other in sorted(network.allowed[task], key=lambda u: (u not in near, u)):
            if other != unit:
                yield [other if each == task else u for each, u in enumerate(units)]


def repaired(network: Network, units: Sequence[int]) -> list[int] | None:
    """Units changed until the memories fit: the tasks that cost least more elsewhere, per byte, go first.

    None if that ends with a unit that is still too full.
    """
    fixed = list(units)
    for unit, limit in enumerate(network.memory):
        if not limit:
            continue
        while sum(network.bytes[t][unit] for t, u in enumerate(fixed) if u == unit) > limit:
            options: list[tuple[float, int, int]] = []
            for task, at in enumerate(fixed):
                if at != unit or not network.bytes[task][unit]:
                    continue
                for other in network.allowed[task]:
                    used = sum(network.bytes[t][other] for t, u in enumerate(fixed) if u == other)
                    room = network.memory[other]
                    if other != unit and (not room or used + network.bytes[task][other] <= room):
                        more = network.cost[task][other] - network.cost[task][unit]
                        options.append((more / network.bytes[task][unit], task, other))
            if not options:
                return None
            _, task, other = min(options)
            fixed[task] = other
    return fixed
