"""The least latency of small networks by branch and bound: first units of all tasks, then stages and their order."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from nestc.partition import bounds, labelling, pipeline
from nestc.partition.labelling import Array, Factor
from nestc.partition.network import Group, Link, Network, seconds

FEW = 4
"""Tasks up to which finding good weights takes longer than the search."""


@dataclass(frozen=True)
class Found:
    """Stages, their latency, and a bound below which no stages come; equal (but for rounding) if exact."""

    groups: tuple[Group, ...]
    latency: float
    bound: float

    @property
    def exact(self) -> bool:
        """Whether nothing better exists."""
        return self.latency - self.bound <= 1e-9 * self.latency


def best(
    network: Network, start: Found, *, serial: Collection[int] = (), deadline: float, nodes: int = 500_000
) -> Found:
    """The best of all assignments, stages and orders, beginning with what is known.

    Depth first over the units of tasks in topological order. A partial assignment is given up if one of two bounds
    reaches the best latency known: the longest path (with units as chosen, the rest at its best), and weighted loads
    (`bounds.loads`; those of tasks to come by `labelling.remaining`). ``serial``: tasks before or after all others.
    If nodes or time run out, the bound is that of the partial assignments left.
    """
    search = _Search(network, start, serial, deadline, nodes)
    search.assign(0, np.zeros(len(search.weights)))
    return Found(search.groups, search.latency, max(start.bound, min(search.open, search.latency)))


class _Search:
    def __init__(self, network: Network, start: Found, serial: Collection[int], deadline: float, nodes: int) -> None:
        self.network = network
        self.groups, self.latency = start.groups, start.latency
        self.deadline, self.nodes = deadline, nodes
        self.stopped, self.open = False, math.inf
        count, units = len(network.tasks), len(network.units)
        self.units = [-1] * count
        self.path = [0.0] * count
        base = [
            [network.cost[t][u] - sum(k.gains[u] for k in network.links_into[t]) for u in range(units)]
            for t in range(count)
        ]
        self.base = np.array(base)
        self.alone = self.base + np.array(network.launch)
        self.tail = np.array(tails(network, base))
        # By link and unit of its source: seconds from the end of the one to the beginning of the other's work.
        self.steps = [
            [
                (
                    link.source,
                    np.array([[step(network, link, a, b) for b in range(units)] for a in range(units)]),
                )
                for link in links
            ]
            for links in network.links_into
        ]
        self.weights = bounds.weights(network.resources)
        if count > FEW:
            self.weights.append(tuple(pipeline.spread(network, serial, rounds=16)[2]))
        factors = bounds.loads(network, self.weights, serial)
        self.loads: list[list[Factor]] = [[] for _ in range(count)]
        for factor in factors:
            self.loads[factor.variables[-2]].append(factor)
        self.rest = labelling.remaining([units] * count + [len(self.weights)], factors, count)

    def assign(self, task: int, load: Array) -> None:
        """Choose the unit of a task, those before it being chosen; the most promising first.

        ``load``: by weights, what the tasks chosen cost.
        """
        network = self.network
        if task == len(network.tasks):
            self.arrange()
            return
        done = self.alone[task]
        for source, steps in self.steps[task]:
            done = np.maximum(done, self.path[source] + steps[self.units[source]] + self.base[task])
        loads = load + sum(self._chosen(factor, task) for factor in self.loads[task])
        rest = loads + sum(self._chosen(factor, task) for factor in self.rest[task + 1])
        least = np.maximum(done + self.tail[task], rest.max(axis=-1))
        for unit in np.argsort(least):
            if least[unit] >= self.latency * (1 - 1e-12):
                return
            self.nodes -= 1
            if self.stopped or self.nodes < 0 or time.monotonic() > self.deadline:
                # This one and those after it stay open, here and at every level above.
                self.stopped = True
                self.open = min(self.open, float(least[unit]))
                return
            self.units[task], self.path[task] = int(unit), float(done[unit])
            self.assign(task + 1, loads[unit])

    def _chosen(self, factor: Factor, task: int) -> Array:
        # The part of a table that units chosen leave: by unit of this task (if it is among them) and by weights.
        index = tuple(self.units[v] for v in factor.variables[:-1] if v < task)
        return factor.table[index]

    def arrange(self) -> None:
        """The best stages of the assignment that is complete now, if better than what is known."""
        found = sequence(self.network, self.units, self.latency, deadline=self.deadline)
        if found is None:
            self.stopped, self.open = True, 0.0
        elif found[1] < self.latency:
            self.groups, self.latency = found


def step(network: Network, link: Link, source: int, destination: int) -> float:
    """Seconds between the end of a task and the beginning of the work of one that takes its tensor, at least."""
    if source == destination:
        return 0.0
    return (
        link.out[source][destination]
        + link.wire[source][destination]
        + link.into[source][destination]
        + network.launch[destination]
        + link.gains[destination]  # not made when apart, but taken off the task's work
    )


def tails(network: Network, base: Sequence[Sequence[float]]) -> list[list[float]]:
    """At least so long after a task's part of its stage is done, by its unit, the last output arrives."""
    units = range(len(network.units))
    found = [[0.0] * len(units) for _ in network.tasks]
    for task in reversed(range(len(network.tasks))):
        for unit in network.allowed[task]:
            after = max((b.work[unit] + b.wire[unit] for b in network.outputs_of[task]), default=0.0)
            for link in network.links_from[task]:
                after = max(
                    after,
                    min(
                        step(network, link, unit, u) + base[link.destination][u] + found[link.destination][u]
                        for u in network.allowed[link.destination]
                    ),
                )
            found[task][unit] = after
    return found


def sequence(
    network: Network, units: Sequence[int], limit: float, *, deadline: float
) -> tuple[tuple[Group, ...], float] | None:
    """The best stages, in the best order, of tasks whose units are given: their latency, or ``limit`` if none is less.

    Stages are appended in the order of their begin, which loses nothing: sorting any stages by their begin keeps
    dependencies and the order on every resource. None if time ran out.
    """
    return _Sequence(network, units, limit, deadline).run()


class _Sequence:
    def __init__(self, network: Network, units: Sequence[int], limit: float, deadline: float) -> None:
        self.network, self.units, self.latency, self.deadline = network, units, limit, deadline
        count = len(network.tasks)
        self.found: tuple[Group, ...] = ()
        self.all = (1 << count) - 1
        self.needs = [sum({1 << link.source for link in network.links_into[t]}) for t in range(count)]
        self.on = [sum(1 << t for t in range(count) if units[t] == u) for u in range(len(network.units))]
        self.work = [
            network.cost[t][units[t]] - sum(k.gains[units[t]] for k in network.links_into[t]) for t in range(count)
        ]
        self.tail = [0.0] * count
        for task in reversed(range(count)):
            after = max((b.work[units[task]] + b.wire[units[task]] for b in network.outputs_of[task]), default=0.0)
            for link in network.links_from[task]:
                d = link.destination
                after = max(after, step(network, link, units[task], units[d]) + self.work[d] + self.tail[d])
            self.tail[task] = after
        self.took: dict[tuple[int, int], tuple[float, float, tuple[int, ...]]] = {}
        self.ends = [0.0] * count
        self.chosen: list[Group] = []

    def run(self) -> tuple[tuple[Group, ...], float] | None:
        """Search all."""
        try:
            self.extend(0, [0.0] * self.network.resources, 0.0, 0.0)
        except TimeoutError:
            return None
        return self.found, self.latency

    def stage(self, unit: int, mask: int) -> tuple[float, float, tuple[int, ...]]:
        """Seconds of a stage, the least seconds from its end to the last output, and its tasks."""
        key = unit, mask
        if key not in self.took:
            tasks = tuple(t for t in range(len(self.units)) if mask >> t & 1)
            after = 0.0
            for task in tasks:
                after = max([after, *(b.wire[unit] for b in self.network.outputs_of[task])])
                for link in self.network.links_from[task]:
                    d = link.destination
                    if not mask >> d & 1:
                        over = step(self.network, link, unit, self.units[d]) - link.out[unit][self.units[d]]
                        after = max(after, over + self.work[d] + self.tail[d])
            self.took[key] = seconds(self.network, self.units, (unit, tasks)), after, tasks
        return self.took[key]

    def extend(self, done: int, free: list[float], latest: float, end: float) -> None:
        """Append every stage that may come next."""
        if done == self.all:
            if end < self.latency:
                self.latency, self.found = end, tuple(self.chosen)
            return
        if time.monotonic() > self.deadline:
            raise TimeoutError
        network = self.network
        remaining = [0.0] * network.resources
        for task, work in enumerate(self.work):
            if not done >> task & 1:
                remaining[network.resource[self.units[task]]] += work
        if any(f + r >= self.latency for f, r in zip(free, remaining, strict=True) if r > 0):
            return
        for unit, on in enumerate(self.on):
            mask = on & ~done
            subset = mask
            resource = network.resource[unit]
            while subset:
                if all(
                    not subset >> task & 1 or not self.needs[task] & ~(done | subset) for task in range(len(self.units))
                ):
                    took, after, tasks = self.stage(unit, subset)
                    begin = free[resource]
                    for task in tasks:
                        for link in network.links_into[task]:
                            if done >> link.source & 1:
                                source = self.units[link.source]
                                wire = link.wire[source][unit] if source != unit else 0.0
                                begin = max(begin, self.ends[link.source] + wire)
                    if begin >= latest and begin + took + after < self.latency:
                        ended = begin + took
                        last = max([end, ended, *(ended + b.wire[unit] for t in tasks for b in network.outputs_of[t])])
                        for task in tasks:
                            self.ends[task] = ended
                        self.chosen.append((unit, tasks))
                        then = list(free)
                        then[resource] = ended
                        self.extend(done | subset, then, begin, last)
                        self.chosen.pop()
                subset = (subset - 1) & mask
