"""The least latency of branchy networks by constraint programming: OR-tools' CP-SAT, if it is installed.

On every resource a circuit (in the sense of the travelling salesman) orders the tasks placed there; an arc of it may
*join* two tasks of one unit, which then are of one stage and begin and end together. Times are whole numbers, rounded
so that the bound stays one: work down, gains up.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nestc.partition.arrange import ordered
from nestc.partition.branch import Found, step, tails
from nestc.partition.network import Group, Link, Network, timeline
from nestc.partition.segments import hubs

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

TASKS = 40
"""Above this the circuits are too large to be of use."""

STEPS = 1e9
"""Steps of time from the beginning to the latency known; a task is rounded by less than one."""


def installed() -> bool:
    """Whether OR-tools is there."""
    return importlib.util.find_spec("ortools") is not None


def best(network: Network, start: Found, *, seconds: float) -> Found:
    """The best of all assignments, stages and orders, beginning with what is known, as far as time allows.

    One worker with a fixed seed and a limit counted in steps of work, so that equal problems give equal answers;
    ``seconds`` of wall time is the emergency stop.
    """
    model = _Latency(network, start)
    solver = model.cp.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.max_deterministic_time = max(seconds, 0.01)
    solver.parameters.max_time_in_seconds = 2 * max(seconds, 0.01)
    status = solver.solve(model.model)
    if status == model.cp.INFEASIBLE:  # nothing is below the latency known
        return Found(start.groups, start.latency, max(start.bound, start.latency - model.slack))
    if status not in (model.cp.OPTIMAL, model.cp.FEASIBLE):
        bound = min(solver.best_objective_bound / model.scale, start.latency)
        return Found(start.groups, start.latency, max(start.bound, bound))
    groups = model.groups(solver) or start.groups
    latency = timeline(network, groups)[2]
    # Rounding is at most `slack`, so an optimum is one but for that.
    bound = solver.best_objective_bound / model.scale
    if status == model.cp.OPTIMAL and latency - bound <= 2 * model.slack:
        bound = latency
    if latency >= start.latency:
        return Found(start.groups, start.latency, max(start.bound, min(bound, start.latency)))
    return Found(groups, latency, max(start.bound, min(bound, latency)))


class _Latency:
    """The model of a network: variables by task, constraints as in the docstring above."""

    def __init__(self, network: Network, start: Found) -> None:
        from ortools.sat.python import cp_model

        self.cp = cp_model
        self.network = network
        self.scale = STEPS / start.latency if start.latency > 0 else 1.0
        count = len(network.tasks)
        self.slack = (3 * count + 2) / self.scale
        self.horizon = math.ceil(start.latency * self.scale) + 3 * count
        self.model = cp_model.CpModel()
        model = self.model
        self.on = [{u: model.new_bool_var(f"on_{t}_{u}") for u in network.allowed[t]} for t in range(count)]
        self.begin = [model.new_int_var(0, self.horizon, f"begin_{t}") for t in range(count)]
        self.end = [model.new_int_var(0, self.horizon, f"end_{t}") for t in range(count)]
        self.part = [model.new_int_var(0, self.horizon, f"part_{t}") for t in range(count)]
        self.together: dict[tuple[int, int], cp_model.IntVar] = {}
        self.latency = model.new_int_var(math.floor(start.bound * self.scale * (1 - 1e-9)), self.horizon, "latency")
        for row in self.on:
            model.add_exactly_one(row.values())
        self._circuits()
        self._work()
        self._cuts()
        self._memory()
        model.minimize(self.latency)
        self._hint(start)

    def down(self, value: float) -> int:
        """Seconds in steps, rounded down."""
        return math.floor(value * self.scale)

    def up(self, value: float) -> int:
        """Seconds in steps, rounded up."""
        return math.ceil(value * self.scale)

    def _ancestors(self) -> list[int]:
        before = [0] * len(self.network.tasks)
        for task in range(len(before)):
            for link in self.network.links_into[task]:
                before[task] |= before[link.source] | 1 << link.source
        return before

    def _circuits(self) -> None:
        model, network = self.model, self.network
        before = self._ancestors()
        into: list[list[Any]] = [[] for _ in network.tasks]
        for resource in range(network.resources):
            here = [{u: v for u, v in row.items() if network.resource[u] == resource} for row in self.on]
            able = [task for task, row in enumerate(here) if row]
            arcs: list[tuple[int, int, Any]] = []
            used = model.new_bool_var(f"used_{resource}")
            arcs.append((0, 0, ~used))
            for task in able:
                away = model.new_bool_var(f"away_{task}_{resource}")
                model.add(sum(here[task].values()) + away == 1)
                arcs.append((task + 1, task + 1, away))
                arcs.append((0, task + 1, model.new_bool_var(f"first_{task}_{resource}")))
                arcs.append((task + 1, 0, model.new_bool_var(f"last_{task}_{resource}")))
                model.add_implication(~away, used)
                for other in able:
                    if other == task or before[task] >> other & 1:
                        continue
                    follows = model.new_bool_var(f"next_{task}_{other}_{resource}")
                    arcs.append((task + 1, other + 1, follows))
                    common = [u for u in here[task] if u in here[other]]
                    # Inside a stage, tasks are in ascending order.
                    if other < task or not common:
                        model.add(self.begin[other] >= self.end[task]).only_enforce_if(follows)
                        continue
                    join = model.new_bool_var(f"join_{task}_{other}_{resource}")
                    model.add_implication(join, follows)
                    into[other].append((task, join))
                    for u in set(here[task]) | set(here[other]):
                        a, b = here[task].get(u), here[other].get(u)
                        if a is None or b is None:
                            model.add_implication(join, ~(here[task][u] if u in here[task] else here[other][u]))
                        else:
                            model.add(a == b).only_enforce_if(join)
                    model.add(self.begin[other] >= self.end[task]).only_enforce_if(follows, ~join)
                    model.add(self.begin[other] == self.begin[task]).only_enforce_if(join)
                    model.add(self.end[other] == self.end[task]).only_enforce_if(join)
            if able:
                model.add_circuit(arcs)
        self.into = into

    def _stage(self, a: int, b: int) -> Any:
        # Whether two tasks are of one stage: they begin together on one unit.
        key = min(a, b), max(a, b)
        if key not in self.together:
            one = self.model.new_bool_var(f"together_{key[0]}_{key[1]}")
            self.together[key] = one
            self.model.add(self.begin[a] == self.begin[b]).only_enforce_if(one)
            self.model.add(self.end[a] == self.end[b]).only_enforce_if(one)
            for u in {*self.on[a], *self.on[b]}:
                first, second = self.on[a].get(u), self.on[b].get(u)
                if first is None or second is None:
                    self.model.add_implication(one, ~(self.on[a][u] if u in self.on[a] else self.on[b][u]))
                else:
                    self.model.add(first == second).only_enforce_if(one)
        return self.together[key]

    def _work(self) -> None:
        model, network = self.model, self.network
        takers: dict[int, list[int]] = {}
        received: dict[int, list[Any]] = {t: [] for t in range(len(network.tasks))}
        for link in network.links:
            waived = self._waived(takers, link.tensor, link.destination)
            self._edge(link, waived, received)
        for border in network.inputs:
            waived = self._waived(takers, border.tensor, border.task)
            for u, on in self.on[border.task].items():
                if border.wire[u]:
                    model.add(self.begin[border.task] >= self.down(border.wire[u])).only_enforce_if(on)
            if any(border.work):
                charge = model.new_int_var(0, self.up(max(border.work)), "")
                for u, on in self.on[border.task].items():
                    model.add(charge >= self.down(border.work[u])).only_enforce_if(on, *(~w for w in waived))
                received[border.task].append(charge)
        sent = self._sent()
        for task, row in enumerate(self.on):
            steps = sum(self.down(network.cost[task][u]) * on for u, on in row.items())
            for link in network.links_into[task]:
                if any(link.gains):
                    saved = model.new_int_var(0, self.up(max(link.gains)), "")
                    one = self._stage(link.source, task)
                    for u, on in row.items():
                        model.add(saved <= self.up(link.gains[u])).only_enforce_if(on)
                    model.add(saved == 0).only_enforce_if(~one)
                    steps = steps - saved
            steps = steps + sum(received[task]) + sum(sent[task])
            first = model.new_bool_var(f"begins_{task}")
            model.add_exactly_one([first, *(join for _, join in self.into[task])])
            for u, on in row.items():
                model.add(self.part[task] >= self.begin[task] + self.down(network.launch[u]) + steps).only_enforce_if(
                    first, on
                )
            for other, join in self.into[task]:
                model.add(self.part[task] >= self.part[other] + steps).only_enforce_if(join)
            model.add(self.end[task] >= self.part[task])
            model.add(self.latency >= self.end[task])
            for border in network.outputs_of[task]:
                for u, on in row.items():
                    if border.wire[u]:
                        model.add(self.latency >= self.end[task] + self.down(border.wire[u])).only_enforce_if(on)

    def _cuts(self) -> None:
        # Implied, but they help the search: the longest path behind each task, and each resource's work one after
        # another, to which hubs add wherever they are since nothing else runs meanwhile.
        model, network = self.model, self.network
        base = [
            [cost - sum(link.gains[u] for link in network.links_into[t]) for u, cost in enumerate(row)]
            for t, row in enumerate(network.cost)
        ]
        behind = tails(network, base)
        for task in range(len(network.tasks)):
            for u, on in self.on[task].items():
                # What the task sends is in its own part already.
                after = max(
                    (
                        min(
                            step(network, link, u, v)
                            - (link.out[u][v] if u != v else 0.0)
                            + base[link.destination][v]
                            + behind[link.destination][v]
                            for v in network.allowed[link.destination]
                        )
                        for link in network.links_from[task]
                    ),
                    default=0.0,
                )
                if after > 0:
                    model.add(self.latency >= self.part[task] + self.down(after)).only_enforce_if(on)
        serial = set(hubs(network))
        for resource in range(network.resources):
            work = [
                self.down(max(base[t][u], 0.0)) * on
                for t, row in enumerate(self.on)
                for u, on in row.items()
                if network.resource[u] == resource or t in serial
            ]
            if work:
                model.add(self.latency >= sum(work))

    def _waived(self, takers: dict[int, list[int]], tensor: int, task: int) -> list[Any]:
        # A tensor that an earlier task of the stage receives is not received again.
        waived = [self._stage(other, task) for other in takers.get(tensor, []) if other != task]
        takers.setdefault(tensor, []).append(task)
        return waived

    def _edge(self, link: Link, waived: Sequence[Any], received: dict[int, list[Any]]) -> None:
        model = self.model
        a, b = link.source, link.destination
        one = self._stage(a, b)
        model.add(self.begin[b] >= self.end[a]).only_enforce_if(~one)
        charge = None
        if any(map(any, link.into)):
            charge = model.new_int_var(0, self.up(max(map(max, link.into))), "")
            received[b].append(charge)
        for u, first in self.on[a].items():
            for v, second in self.on[b].items():
                if u == v:
                    continue
                if link.wire[u][v]:
                    model.add(self.begin[b] >= self.end[a] + self.down(link.wire[u][v])).only_enforce_if(first, second)
                if charge is not None and link.into[u][v]:
                    model.add(charge >= self.down(link.into[u][v])).only_enforce_if(
                        first, second, *(~w for w in waived)
                    )

    def _sent(self) -> list[list[Any]]:
        # A tensor is sent once, at the cost of its dearest way.
        model, network = self.model, self.network
        by_tensor: dict[int, Any] = {}
        sent: list[list[Any]] = [[] for _ in network.tasks]

        def charge(tensor: int, task: int) -> Any:
            if tensor not in by_tensor:
                by_tensor[tensor] = model.new_int_var(0, self.horizon, "")
                sent[task].append(by_tensor[tensor])
            return by_tensor[tensor]

        for link in network.links:
            for u, first in self.on[link.source].items():
                for v, second in self.on[link.destination].items():
                    if u != v and link.out[u][v]:
                        paid = charge(link.tensor, link.source)
                        model.add(paid >= self.down(link.out[u][v])).only_enforce_if(first, second)
        for border in network.outputs:
            for u, on in self.on[border.task].items():
                if border.work[u]:
                    paid = charge(border.tensor, border.task)
                    model.add(paid >= self.down(border.work[u])).only_enforce_if(on)
        return sent

    def _memory(self) -> None:
        for unit, limit in enumerate(self.network.memory):
            used = [self.network.bytes[task][unit] * row[unit] for task, row in enumerate(self.on) if unit in row]
            if limit and used:
                self.model.add(sum(used) <= limit)

    def _hint(self, start: Found) -> None:
        for unit, tasks in start.groups:
            for task in tasks:
                for u, on in self.on[task].items():
                    self.model.add_hint(on, u == unit)

    def groups(self, solver: Any) -> tuple[Group, ...] | None:
        """The stages of a solution, by their begin."""
        count = len(self.network.tasks)
        unit = [next(u for u, on in row.items() if solver.value(on)) for row in self.on]
        stage = list(range(count))
        for task in range(count):
            for other, join in self.into[task]:
                if solver.value(join):
                    stage[task] = stage[other]
        members: dict[int, list[int]] = {}
        for task in range(count):
            members.setdefault(stage[task], []).append(task)
        by_begin = sorted(members.values(), key=lambda tasks: (solver.value(self.begin[tasks[0]]), tasks[0]))
        # Work of less than a step of time takes none here, so stages that begin together may stand the wrong way round.
        return ordered(self.network, [(unit[tasks[0]], tuple(tasks)) for tasks in by_begin])
