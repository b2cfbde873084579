"""HEFT list scheduling: tasks by upward rank, each on the unit that ends it first.

Topcuoglu, Hariri, Wu, "Performance-effective and low-complexity task scheduling for heterogeneous computing", IEEE
TPDS 13(3), 2002; here units of one resource share a calendar, and a launch is paid by every task.
"""

from __future__ import annotations

from nestc.partition.network import Network, compiled
from nestc.partition.problem import Problem


def heft(problem: Problem) -> dict[str, str]:
    """The unit of every task; memory limits of units are kept as long as another unit takes the task."""
    network = compiled(problem)
    units = by_rank(network)
    return {task: network.units[unit] for task, unit in zip(network.tasks, units, strict=True)}


def by_rank(network: Network) -> list[int]:
    """The unit of every task, by numbers."""
    count = len(network.tasks)
    ranks = upward(network)
    calendar: list[list[tuple[float, float]]] = [[] for _ in range(network.resources)]
    chosen = [-1] * count
    ends = [0.0] * count
    used = [0] * len(network.units)
    # Ties go to the earlier task, so a task never comes before one that it needs.
    for task in sorted(range(count), key=lambda t: (-ranks[t], t)):
        fitting = [
            u
            for u in network.allowed[task]
            if not network.memory[u] or used[u] + network.bytes[task][u] <= network.memory[u]
        ]
        options: list[tuple[float, float, int]] = []
        for unit in fitting or network.allowed[task]:
            took = network.launch[unit] + network.cost[task][unit]
            ready = network.arrives[task][unit]
            for link in network.links_into[task]:
                source = chosen[link.source]
                if source == unit:
                    ready = max(ready, ends[link.source])
                else:
                    ready = max(ready, ends[link.source] + link.out[source][unit] + link.wire[source][unit])
                    took += link.into[source][unit]
            begin = _gap(calendar[network.resource[unit]], ready, took)
            options.append((begin + took, begin, unit))
        end, begin, unit = min(options)
        chosen[task], ends[task] = unit, end
        used[unit] += network.bytes[task][unit]
        slots = calendar[network.resource[unit]]
        slots.append((begin, end))
        slots.sort()
    return chosen


def upward(network: Network, units: list[int] | None = None) -> list[float]:
    """Seconds from the beginning of each task to the end of all: at mean costs, or with units as given."""
    count = len(network.tasks)
    ranks = [0.0] * count
    for task in reversed(range(count)):
        mine = network.allowed[task] if units is None else [units[task]]
        after = 0.0
        for link in network.links_from[task]:
            theirs = network.allowed[link.destination] if units is None else [units[link.destination]]
            pairs = [
                link.out[a][b] + link.wire[a][b] + link.into[a][b] if a != b else 0.0 for a in mine for b in theirs
            ]
            after = max(after, sum(pairs) / len(pairs) + ranks[link.destination])
        ranks[task] = sum(network.cost[task][u] for u in mine) / len(mine) + after
    return ranks


def _gap(slots: list[tuple[float, float]], ready: float, took: float) -> float:
    # The first gap in a calendar that is long enough.
    begin = ready
    for start, end in slots:
        if begin + took <= start:
            return begin
        begin = max(begin, end)
    return begin
