"""A placement problem by numbers instead of names, which is what the solvers work on, and how long stages take there.

Tasks and units are indices in the order of the problem; a table is indexed [unit of source][unit of destination].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from nestc.partition.problem import HOST, Crossing, Edge, Problem, Stage

Row = tuple[float, ...]
Table = tuple[Row, ...]
Group = tuple[int, tuple[int, ...]]
"""A stage by numbers: its unit and its tasks in ascending order."""


@dataclass(frozen=True)
class Link:
    """A tensor from one task to another: seconds of work before and after, seconds on the way, joules, and gains."""

    source: int
    destination: int
    tensor: int
    out: Table
    wire: Table
    into: Table
    joules: Table
    gains: Row


@dataclass(frozen=True)
class Border:
    """A graph input of a task (``work``: its in_seconds by unit) or a graph output (its out_seconds)."""

    task: int
    tensor: int
    work: Row
    wire: Row
    joules: Row


@dataclass(frozen=True)
class Network:
    """Tasks in a topological order with their costs by unit (infinite where a unit does not take a task)."""

    tasks: tuple[str, ...]
    units: tuple[str, ...]
    resource: tuple[int, ...]
    launch: Row
    memory: tuple[int, ...]
    cost: tuple[Row, ...]
    joules: tuple[Row, ...]
    bytes: tuple[tuple[int, ...], ...]
    links: tuple[Link, ...]
    inputs: tuple[Border, ...]
    outputs: tuple[Border, ...]

    @cached_property
    def allowed(self) -> list[list[int]]:
        """The units that take each task."""
        return [[u for u, seconds in enumerate(row) if seconds < math.inf] for row in self.cost]

    @cached_property
    def links_into(self) -> list[list[Link]]:
        """Links by the task where they end."""
        found: list[list[Link]] = [[] for _ in self.tasks]
        for link in self.links:
            found[link.destination].append(link)
        return found

    @cached_property
    def links_from(self) -> list[list[Link]]:
        """Links by the task where they begin."""
        found: list[list[Link]] = [[] for _ in self.tasks]
        for link in self.links:
            found[link.source].append(link)
        return found

    @cached_property
    def inputs_of(self) -> list[list[Border]]:
        """Graph inputs by the task that takes them."""
        return _by_task(self.inputs, len(self.tasks))

    @cached_property
    def outputs_of(self) -> list[list[Border]]:
        """Graph outputs by the task that makes them."""
        return _by_task(self.outputs, len(self.tasks))

    @cached_property
    def arrives(self) -> list[Row]:
        """By task and unit, when all graph inputs of a task have arrived there."""
        none = (0.0,) * len(self.units)
        return [
            tuple(max(column) for column in zip(*(border.wire for border in borders), strict=True)) if borders else none
            for borders in self.inputs_of
        ]

    @cached_property
    def resources(self) -> int:
        """How many resources there are."""
        return max(self.resource) + 1

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal for networks of equal numbers, whatever their tasks are called."""
        return (
            self.resource,
            self.launch,
            self.memory,
            self.cost,
            self.bytes,
            self.links,
            self.inputs,
            self.outputs,
        )

    def only(self, units: Mapping[int, int]) -> Network:
        """The same network with some tasks held on a unit each."""
        cost = list(self.cost)
        for task, unit in units.items():
            cost[task] = tuple(c if u == unit else math.inf for u, c in enumerate(cost[task]))
        return replace(self, cost=tuple(cost))

    def fits(self, units: Sequence[int]) -> bool:
        """Whether the tasks' bytes fit the memory of the units they are on."""
        used = [0] * len(self.units)
        for task, unit in enumerate(units):
            used[unit] += self.bytes[task][unit]
        return all(not limit or use <= limit for use, limit in zip(used, self.memory, strict=True))


def compiled(problem: Problem) -> Network:
    """The numbers of a problem."""
    names = tuple(unit.name for unit in problem.units)
    resources = {name: number for number, name in enumerate(dict.fromkeys(unit.resource for unit in problem.units))}
    number = {task.name: index for index, task in enumerate(problem.tasks)}
    tensors: dict[tuple[str | None, str], int] = {}
    tables: dict[tuple[tuple[tuple[str, str], Crossing], ...], tuple[Table, Table, Table, Table]] = {}
    links: list[Link] = []
    inputs: list[Border] = []
    outputs: list[Border] = []
    for edge in problem.edges:
        tensor = tensors.setdefault((edge.source, edge.tensor), len(tensors))
        if edge.source is not None and edge.destination is not None:
            key = tuple(sorted(edge.crossings.items(), key=lambda item: item[0]))
            if key not in tables:
                tables[key] = _tables(edge, names)
            gains = tuple(edge.gains.get(name, 0.0) for name in names)
            links.append(Link(number[edge.source], number[edge.destination], tensor, *tables[key], gains))
        elif edge.destination is not None:
            found = [edge.crossings.get((HOST, name), Crossing()) for name in names]
            inputs.append(
                Border(
                    number[edge.destination],
                    tensor,
                    tuple(c.in_seconds for c in found),
                    tuple(c.wire_seconds for c in found),
                    tuple(c.joules for c in found),
                )
            )
        elif edge.source is not None:
            found = [edge.crossings.get((name, HOST), Crossing()) for name in names]
            outputs.append(
                Border(
                    number[edge.source],
                    tensor,
                    tuple(c.out_seconds for c in found),
                    tuple(c.wire_seconds for c in found),
                    tuple(c.joules for c in found),
                )
            )
    costs = [[task.costs.get(name) for name in names] for task in problem.tasks]
    return Network(
        tasks=tuple(task.name for task in problem.tasks),
        units=names,
        resource=tuple(resources[unit.resource] for unit in problem.units),
        launch=tuple(unit.launch for unit in problem.units),
        memory=tuple(unit.memory_bytes for unit in problem.units),
        cost=tuple(tuple(c.seconds if c else math.inf for c in row) for row in costs),
        joules=tuple(tuple(c.joules if c else math.inf for c in row) for row in costs),
        bytes=tuple(tuple(c.bytes if c else 0 for c in row) for row in costs),
        links=tuple(links),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


def grouped(network: Network, stages: Iterable[Stage]) -> list[Group]:
    """Stages by numbers."""
    number = {name: index for index, name in enumerate(network.tasks)}
    unit = {name: index for index, name in enumerate(network.units)}
    return [(unit[stage.unit], tuple(sorted(number[task] for task in stage.tasks))) for stage in stages]


def named(network: Network, groups: Iterable[Group]) -> tuple[Stage, ...]:
    """Stages by names."""
    return tuple(Stage(network.units[unit], tuple(network.tasks[task] for task in tasks)) for unit, tasks in groups)


def units_of(network: Network, groups: Iterable[Group]) -> list[int]:
    """The unit of every task."""
    units = [-1] * len(network.tasks)
    for unit, tasks in groups:
        for task in tasks:
            units[task] = unit
    return units


def seconds(network: Network, units: Sequence[int], group: Group) -> float:
    """How long a stage takes, given the units of all tasks: the third rule of `nestc.partition.problem`.

    A tensor leaves a stage with the largest out_seconds of those that take it elsewhere, the host among them, once,
    and enters with the largest in_seconds once, however many tasks of the stage take it.
    """
    unit, tasks = group
    inside = set(tasks)
    total = network.launch[unit]
    moved: dict[int, float] = {}
    for task in tasks:
        total += network.cost[task][unit]
        for link in network.links_into[task]:
            if link.source in inside:
                total -= link.gains[unit]
            elif units[link.source] != unit:
                moved[link.tensor] = max(moved.get(link.tensor, 0.0), link.into[units[link.source]][unit])
        for border in network.inputs_of[task]:
            moved[border.tensor] = max(moved.get(border.tensor, 0.0), border.work[unit])
        for link in network.links_from[task]:
            if units[link.destination] != unit:
                moved[link.tensor] = max(moved.get(link.tensor, 0.0), link.out[unit][units[link.destination]])
        for border in network.outputs_of[task]:
            moved[border.tensor] = max(moved.get(border.tensor, 0.0), border.work[unit])
    return total + sum(moved.values())


def timeline(network: Network, groups: Sequence[Group]) -> tuple[list[float], list[float], float]:
    """When each stage begins and ends, and the latency, of one request alone.

    Latency is the greatest of all arrivals of outputs and all ends, so that a task nothing needs is not free.
    """
    units = units_of(network, groups)
    where = [-1] * len(network.tasks)
    free = [0.0] * network.resources
    begins: list[float] = []
    ends: list[float] = []
    latency = 0.0
    for number, (unit, tasks) in enumerate(groups):
        for task in tasks:
            where[task] = number
        begin = free[network.resource[unit]]
        for task in tasks:
            begin = max(begin, network.arrives[task][unit])
            for link in network.links_into[task]:
                source = where[link.source]
                if source != number:
                    arrival = ends[source]
                    if units[link.source] != unit:
                        arrival += link.wire[units[link.source]][unit]
                    begin = max(begin, arrival)
        end = begin + seconds(network, units, (unit, tasks))
        begins.append(begin)
        ends.append(end)
        free[network.resource[unit]] = end
        latency = max(latency, end)
        for task in tasks:
            for border in network.outputs_of[task]:
                latency = max(latency, end + border.wire[unit])
    return begins, ends, latency


def busy(network: Network, groups: Sequence[Group]) -> list[float]:
    """Seconds of work a request, by resource."""
    units = units_of(network, groups)
    total = [0.0] * network.resources
    for group in groups:
        total[network.resource[group[0]]] += seconds(network, units, group)
    return total


def joules(network: Network, units: Sequence[int]) -> float:
    """Energy a request: of every task, and of every tensor once for each unit (or the host) that it goes to."""
    total = sum(network.joules[task][unit] for task, unit in enumerate(units))
    moved: dict[tuple[int, int], float] = {}
    for link in network.links:
        source, destination = units[link.source], units[link.destination]
        if source != destination:
            key = link.tensor, destination
            moved[key] = max(moved.get(key, 0.0), link.joules[source][destination])
    for border in network.inputs:
        key = border.tensor, units[border.task]
        moved[key] = max(moved.get(key, 0.0), border.joules[units[border.task]])
    for border in network.outputs:
        key = border.tensor, -1
        moved[key] = max(moved.get(key, 0.0), border.joules[units[border.task]])
    return total + sum(moved.values())


def in_runs(network: Network, units: Sequence[int]) -> tuple[Group, ...]:
    """Few stages: a unit goes on as long as it has ready tasks, then that of the earliest ready task takes over."""
    count = len(units)
    waiting = [len({link.source for link in network.links_into[task]}) for task in range(count)]
    ready: list[list[int]] = [[] for _ in network.units]
    for task in range(count):
        if not waiting[task]:
            ready[units[task]].append(task)
    groups: list[Group] = []
    while any(ready):
        unit = min((u for u in range(len(ready)) if ready[u]), key=lambda u: min(ready[u]))
        tasks: list[int] = []
        while ready[unit]:
            task = ready[unit].pop()
            tasks.append(task)
            for following in {link.destination for link in network.links_from[task]}:
                waiting[following] -= 1
                if not waiting[following]:
                    ready[units[following]].append(following)
        groups.append((unit, tuple(sorted(tasks))))
    return tuple(groups)


def _by_task(borders: Iterable[Border], tasks: int) -> list[list[Border]]:
    found: list[list[Border]] = [[] for _ in range(tasks)]
    for border in borders:
        found[border.task].append(border)
    return found


def _tables(edge: Edge, names: Sequence[str]) -> tuple[Table, Table, Table, Table]:
    # Between tasks of one unit nothing crosses, whatever the pair (unit, unit) may say.
    crossings = [[edge.crossings.get((a, b)) if a != b else None for b in names] for a in names]
    return (
        tuple(tuple(c.out_seconds if c else 0.0 for c in row) for row in crossings),
        tuple(tuple(c.wire_seconds if c else 0.0 for c in row) for row in crossings),
        tuple(tuple(c.in_seconds if c else 0.0 for c in row) for row in crossings),
        tuple(tuple(c.joules if c else 0.0 for c in row) for row in crossings),
    )
