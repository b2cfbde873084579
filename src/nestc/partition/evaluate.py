"""What stages cost: checked, timed alone and timed with several requests in flight, by the rules of `problem.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nestc.errors import PlanError
from nestc.partition import network as net
from nestc.partition.network import Group, Network
from nestc.partition.problem import Evaluation, Problem, Stage, Timed, stage_of


def check(problem: Problem, stages: Sequence[Stage]) -> None:
    """Refuse stages that cannot run.

    Raises PlanError if a task or unit is unknown, a task is placed twice or not at all, a unit does not take a task,
    a stage needs what only a later one makes (a cyclic partitioning among them), or a unit's memory is exceeded.
    """
    tasks = {task.name: task for task in problem.tasks}
    units = {unit.name: unit for unit in problem.units}
    placed = Counter(task for stage in stages for task in stage.tasks)
    for stage in stages:
        if stage.unit not in units:
            raise PlanError(f"the plan places tasks on {stage.unit!r}, which is not among the units {', '.join(units)}")
        if not stage.tasks:
            raise PlanError(f"the plan has a stage on {stage.unit!r} without tasks; leave it out")
        for name in stage.tasks:
            if name not in tasks:
                raise PlanError(f"the plan places task {name!r}, which the problem does not have")
            if stage.unit not in tasks[name].costs:
                takers = ", ".join(tasks[name].costs)
                raise PlanError(f"unit {stage.unit!r} does not take task {name!r}; place it on one of {takers}")
    for name in tasks:
        if placed[name] != 1:
            times = "nowhere" if not placed[name] else f"{placed[name]} times"
            raise PlanError(f"the plan places task {name!r} {times}; every task must be placed exactly once")
    _check_order(problem, stages)
    for name, unit in units.items():
        used = sum(tasks[task].costs[name].bytes for stage in stages if stage.unit == name for task in stage.tasks)
        if unit.memory_bytes and used > unit.memory_bytes:
            raise PlanError(
                f"the tasks placed on {name!r} occupy {used} bytes, but it has {unit.memory_bytes}; move some elsewhere"
            )


def _check_order(problem: Problem, stages: Sequence[Stage]) -> None:
    stage = stage_of(stages)
    place = {task: position for each in stages for position, task in enumerate(each.tasks)}
    for edge in problem.edges:
        source, destination = edge.source, edge.destination
        if source is None or destination is None:
            continue
        before, after = stage[source], stage[destination]
        if before > after:
            raise PlanError(
                f"stage {after + 1} on {stages[after].unit!r} runs task {destination!r}, which needs {edge.tensor!r} "
                f"of task {source!r} in the later stage {before + 1}; reorder them, or split one if cyclic"
            )
        if before == after and place[source] >= place[destination]:
            raise PlanError(f"in stage {before + 1} task {destination!r} stands before {source!r}, which it needs")


def evaluate(problem: Problem, stages: Sequence[Stage]) -> Evaluation:
    """What stages cost, exactly by the rules; raises PlanError if they cannot run (see `check`)."""
    check(problem, stages)
    network = net.compiled(problem)
    groups = net.grouped(network, stages)
    begins, ends, latency = net.timeline(network, groups)
    names = dict.fromkeys(unit.resource for unit in problem.units)
    busy = dict(zip(names, net.busy(network, groups), strict=True))
    return Evaluation(
        latency=latency,
        period=max(busy.values(), default=0.0),
        joules=net.joules(network, net.units_of(network, groups)),
        busy=busy,
        times=tuple(Timed(number, 0, begins[number], ends[number]) for number in range(len(groups))),
    )


@dataclass(frozen=True)
class Pipelined:
    """What several requests in flight cost.

    ``period``: seconds a request in the steady state; ``latency``: the mean seconds from a request's arrival to its
    last output, of the second half of them; ``makespan``: when the last one has ended; ``busy``: seconds a request by
    resource; ``times``: when each stage of each request runs, in the order of their begin.
    """

    period: float
    latency: float
    makespan: float
    busy: dict[str, float]
    times: tuple[Timed, ...]


def pipelined(problem: Problem, stages: Sequence[Stage], requests: int, in_flight: int) -> Pipelined:
    """Run several requests by discrete events, as the runtime does.

    Of all stages whose inputs are being made or exist, the one with the least begin goes first (ties by request, then
    plan order); of one request the stages of a resource begin in plan order. Request i arrives when request
    i - in_flight has ended, the first ones at 0. Raises PlanError if stages cannot run, ValueError below one request.
    """
    if requests < 1 or in_flight < 1:
        raise ValueError(f"needs at least one request and one in flight, not {requests} and {in_flight}")
    check(problem, stages)
    network = net.compiled(problem)
    groups = net.grouped(network, stages)
    needs = _needs(network, groups)
    units = net.units_of(network, groups)
    took = [net.seconds(network, units, group) for group in groups]
    after = [
        max((border.wire[unit] for task in tasks for border in network.outputs_of[task]), default=0.0)
        for unit, tasks in groups
    ]
    given = [max(network.arrives[task][unit] for task in tasks) for unit, tasks in groups]
    free = [0.0] * network.resources
    ends: dict[tuple[int, int], float] = {}
    arrived = dict.fromkeys(range(min(in_flight, requests)), 0.0)
    ended = [0.0] * requests
    # Stages by resource: of each request only the first that has not begun can be next there.
    queues = [
        [n for n, (unit, _) in enumerate(groups) if network.resource[unit] == r] for r in range(network.resources)
    ]
    begun = {request: [0] * len(queues) for request in arrived}
    times: list[Timed] = []
    while begun:
        ready: list[tuple[float, int, int]] = []
        for request, positions in begun.items():
            for resource, (queue, position) in enumerate(zip(queues, positions, strict=True)):
                if position == len(queue):
                    continue
                number = queue[position]
                if all((request, source) in ends for source, _ in needs[number]):
                    arrivals = (ends[request, source] + wire for source, wire in needs[number])
                    begin = max([arrived[request] + given[number], free[resource], *arrivals])
                    ready.append((begin, request, number))
        begin, request, number = min(ready)
        resource = network.resource[groups[number][0]]
        end = begin + took[number]
        ends[request, number] = free[resource] = end
        times.append(Timed(number, request, begin, end))
        ended[request] = max(ended[request], end + after[number])
        begun[request][resource] += 1
        if sum(begun[request]) == len(groups):
            del begun[request]
            following = request + in_flight
            if following < requests:
                arrived[following] = ended[request]
                begun[following] = [0] * len(queues)
    # Filling and draining are left out: the first half, and what ends while nothing more arrives.
    half = requests // 2
    last = max(requests - in_flight, half + 1) if half else 1
    moments = sorted(ended)
    steady = (moments[last - 1] - (moments[half - 1] if half else 0.0)) / (last - half)
    names = dict.fromkeys(unit.resource for unit in problem.units)
    return Pipelined(
        period=steady,
        latency=sum(ended[request] - arrived[request] for request in range(half, requests)) / (requests - half),
        makespan=max(ended),
        busy=dict(zip(names, net.busy(network, groups), strict=True)),
        times=tuple(times),
    )


def _needs(network: Network, groups: Sequence[Group]) -> list[list[tuple[int, float]]]:
    # For each stage: the stages it waits for, with the seconds on the way.
    where = {task: number for number, (_, tasks) in enumerate(groups) for task in tasks}
    units = net.units_of(network, groups)
    needs: list[list[tuple[int, float]]] = []
    for number, (unit, tasks) in enumerate(groups):
        found: dict[int, float] = {}
        for task in tasks:
            for link in network.links_into[task]:
                source = where[link.source]
                if source != number:
                    wire = link.wire[units[link.source]][unit]
                    found[source] = max(found.get(source, 0.0), wire)
        needs.append(list(found.items()))
    return needs
