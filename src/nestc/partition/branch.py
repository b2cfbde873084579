"""Small networks by branch and bound: first the units of all tasks, then their stages and the order of those."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nestc.partition import bounds, labelling
from nestc.partition.labelling import Array, Factor
from nestc.partition.network import Group, Link, Network, in_runs, joules, seconds
from nestc.partition.problem import Objective


@dataclass(frozen=True)
class Found:
    """Stages, their value (latency unless told otherwise), and a bound below which no stages come.

    Those are equal (but for rounding) if exact.
    """

    groups: tuple[Group, ...]
    latency: float
    bound: float

    @property
    def exact(self) -> bool:
        """Whether nothing better exists."""
        return self.latency - self.bound <= 1e-9 * self.latency


def best(
    network: Network,
    start: Found,
    *,
    objective: Objective = "latency",
    weights: Sequence[Sequence[float]] = (),
    serial: Collection[int] = (),
    deadline: float,
) -> Found:
    """The best of all assignments, stages and orders, beginning with what is known.

    Depth first over the units of tasks in topological order. A partial assignment is given up if a bound reaches the
    best value known: for latency the longest path (with units as chosen, the rest at its best), and for all what the
    tasks chosen cost plus what those to come cost at least (weighted loads with ``weights`` and ``serial`` as
    `bounds.loads` takes them, or joules; `labelling.remaining`). If time runs out, the bound is that of the partial
    assignments left.
    """
    search = _Search(network, start, objective, weights, serial, deadline)
    search.assign(0, np.zeros(search.size))
    return Found(search.groups, search.latency, max(start.bound, min(search.open, search.latency)))


class _Search:
    def __init__(
        self,
        network: Network,
        start: Found,
        objective: Objective,
        weights: Sequence[Sequence[float]],
        serial: Collection[int],
        deadline: float,
    ) -> None:
        self.network, self.objective = network, objective
        self.groups, self.latency = start.groups, start.latency
        self.deadline = deadline
        self.stopped, self.open = False, math.inf
        count, units = len(network.tasks), len(network.units)
        self.units = [-1] * count
        self.path = [0.0] * count
        base = [
            [network.cost[t][u] - sum(k.gains[u] for k in network.links_into[t]) for u in range(units)]
            for t in range(count)
        ]
        self.base = np.array(base)
        self.alone = self.base + np.array(network.launch) + np.array(network.arrives)
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
        if objective == "energy":
            factors = [Factor((*f.variables, count), f.table[..., None]) for f in bounds.joules(network)]
        else:
            factors = bounds.loads(network, weights, serial) if weights else []
        self.size = 1 if objective == "energy" else len(weights)
        self.loads: list[list[Factor]] = [[] for _ in range(count)]
        for factor in factors:
            self.loads[factor.variables[-2]].append(factor)
        self.rest = labelling.remaining([units] * count + [self.size], factors, count)

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
        refused = np.isinf(self.base[task])
        least = done + self.tail[task] if self.objective == "latency" else np.where(refused, np.inf, 0.0)
        loads = load + sum((self._chosen(f, task) for f in self.loads[task]), np.zeros((len(least), 1)))
        if load.size:
            rest = sum((self._chosen(f, task) for f in self.rest[task + 1]), loads)
            least = np.maximum(least, rest.max(axis=-1))
        for unit in np.argsort(least):
            if least[unit] >= self.latency * (1 - 1e-12):
                return
            if self.stopped or time.thread_time() > self.deadline:
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
        if not self.network.fits(self.units):
            return
        if self.objective == "energy":
            least = joules(self.network, self.units)
            if least < self.latency:
                self.groups, self.latency = in_runs(self.network, self.units), least
            return
        way = sequence if self.objective == "latency" else fewest
        found = way(self.network, self.units, self.latency, deadline=self.deadline)
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


def fewest(
    network: Network, units: Sequence[int], limit: float, *, deadline: float
) -> tuple[tuple[Group, ...], float] | None:
    """The same for the period: the stages whose busiest resource is busy for the least time."""
    return _Fewest(network, units, limit, deadline).run()


class _Sequence:
    def __init__(self, network: Network, units: Sequence[int], limit: float, deadline: float) -> None:
        self.network, self.units, self.latency, self.deadline = network, units, limit, deadline
        count = len(network.tasks)
        self.found: tuple[Group, ...] = ()
        self.all = (1 << count) - 1
        self.needs = [sum({1 << link.source for link in network.links_into[t]}) for t in range(count)]
        self.on = [sum(1 << t for t in range(count) if units[t] == u) for u in range(len(network.units))]
        self.of = [
            sum(on for unit, on in enumerate(self.on) if network.resource[unit] == resource)
            for resource in range(network.resources)
        ]
        self.lefts: dict[int, tuple[float, float]] = {}
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
        self.waits = [
            [(k.source, k.wire[units[k.source]][units[t]] if units[k.source] != units[t] else 0.0) for k in links]
            for t, links in enumerate(network.links_into)
        ]
        self.took: dict[tuple[int, int], tuple[float, float, tuple[int, ...]]] = {}
        self.ends = [0.0] * count
        self.chosen: list[Group] = []

    def run(self) -> tuple[tuple[Group, ...], float] | None:
        """Search all."""
        if self.bound() >= self.latency:
            return (), self.latency
        try:
            self.extend(0, [0.0] * self.network.resources, 0.0, 0.0)
        except TimeoutError:
            return None
        return self.found, self.latency

    def bound(self) -> float:
        """A lower bound: each resource does the work of any of its tasks after the earliest begin of their stages.

        Then follows the least of what depends on them. One-machine bound with heads and tails (Carlier, EJOR 11, 1982)
        over the sets of tasks above a head and a tail; the begin of a task's stage is that of a task before it if both
        may be of one stage.
        """
        begin: list[float] = []
        done: list[float] = []
        for task, unit in enumerate(self.units):
            head = self.network.arrives[task][unit]
            ready = head + self.network.launch[unit]
            for link in self.network.links_into[task]:
                source = self.units[link.source]
                if source == unit:
                    head = max(head, begin[link.source])
                    ready = max(ready, done[link.source])
                else:
                    sent = done[link.source] + link.out[source][unit] + link.wire[source][unit]
                    head = max(head, sent)
                    ready = max(ready, sent + self.network.launch[unit] + link.into[source][unit] + link.gains[unit])
            begin.append(head)
            done.append(ready + self.work[task])
        best = 0.0
        for on in self.of:
            members = [task for task in range(len(self.units)) if on >> task & 1]
            for head in {begin[task] for task in members}:
                for tail in {self.tail[task] for task in members}:
                    chosen = sum(1 << t for t in members if begin[t] >= head and self.tail[t] >= tail)
                    if chosen:
                        best = max(best, head + self.left(chosen)[0] + tail)
        return best

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
        if time.thread_time() > self.deadline:
            raise TimeoutError
        network = self.network
        # What is left on a resource is done one after another, each unit of it launched once more, and whatever comes
        # last has what depends on it behind it.
        for resource, on in enumerate(self.of):
            left = on & ~done
            if left:
                work, behind = self.left(left)
                if free[resource] + work + behind >= self.latency:
                    return
        for unit, on in enumerate(self.on):
            resource = network.resource[unit]
            for subset in self.closed(on & ~done, done):
                took, after, tasks = self.stage(unit, subset)
                begin = free[resource]
                for task in tasks:
                    begin = max(begin, network.arrives[task][unit])
                    for source, wire in self.waits[task]:
                        if done >> source & 1:
                            begin = max(begin, self.ends[source] + wire)
                if begin < latest or begin + took + after >= self.latency:
                    continue
                ended = begin + took
                last = max([end, ended, *(ended + b.wire[unit] for t in tasks for b in network.outputs_of[t])])
                for task in tasks:
                    self.ends[task] = ended
                self.chosen.append((unit, tasks))
                then = list(free)
                then[resource] = ended
                self.extend(done | subset, then, begin, last)
                self.chosen.pop()

    def left(self, tasks: int) -> tuple[float, float]:
        """Least seconds of work of some tasks of a resource, and from the end of their last to the last output."""
        if tasks not in self.lefts:
            members = [task for task in range(len(self.units)) if tasks >> task & 1]
            launches = sum(self.network.launch[unit] for unit in {self.units[task] for task in members})
            self.lefts[tasks] = (
                launches + sum(self.work[task] for task in members),
                min(self.tail[task] for task in members),
            )
        return self.lefts[tasks]

    def closed(self, mask: int, done: int) -> Iterator[int]:
        """Sets of tasks out of some that need nothing but each other and what is done; the largest first."""
        found = [0]
        task = 0
        while mask >> task:
            if mask >> task & 1:
                needs = self.needs[task] & ~done
                found += [each | 1 << task for each in found if not needs & ~each]
            task += 1
        return reversed(found[1:])


class _Fewest(_Sequence):
    """Stages are appended in any topological order; only what each resource does by then matters, not when."""

    def run(self) -> tuple[tuple[Group, ...], float] | None:
        """Search all."""
        self.seen: dict[int, list[list[float]]] = {}
        try:
            self.append(0, [0.0] * self.network.resources)
        except TimeoutError:
            return None
        return self.found, self.latency

    def append(self, done: int, busy: list[float]) -> None:
        """Append every stage that may come next."""
        if done == self.all:
            if max(busy) < self.latency:
                self.latency, self.found = max(busy), tuple(self.chosen)
            return
        if time.thread_time() > self.deadline:
            raise TimeoutError
        for resource, on in enumerate(self.of):
            left = on & ~done
            if busy[resource] + (self.left(left)[0] if left else 0.0) >= self.latency:
                return
        # The same tasks done with no resource busy for less: nothing new.
        seen = self.seen.setdefault(done, [])
        if any(all(a <= b for a, b in zip(other, busy, strict=True)) for other in seen):
            return
        seen.append(busy)
        for unit, on in enumerate(self.on):
            resource = self.network.resource[unit]
            for subset in self.closed(on & ~done, done):
                took, _, tasks = self.stage(unit, subset)
                then = list(busy)
                then[resource] += took
                self.chosen.append((unit, tasks))
                self.append(done | subset, then)
                self.chosen.pop()
