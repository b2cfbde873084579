"""The best assignment for what adds up over tasks and crossings (load of resources, joules), by CP-SAT.

Stages are not modelled: what depends on them is counted at its least (`bounds.load`), so the solver's bound is one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nestc.partition.bounds import longest_path
from nestc.partition.network import Network, Table
from nestc.partition.problem import Objective

STEPS = 1e8


@dataclass(frozen=True)
class Assigned:
    """The unit of every task (None if none was found), and a bound of the objective below which none comes."""

    units: list[int] | None
    bound: float


def best(
    network: Network, objective: Objective, start: Sequence[int], value: float, bound: float, *, seconds: float
) -> Assigned:
    """The assignment of the least period (objective "throughput") or energy that memories allow.

    ``start``: an assignment, of that ``value`` by the rules, to begin with; ``bound``: a lower bound known already.
    """
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    scale = STEPS / value if value > 0 else 1.0
    on = [{u: model.new_bool_var("") for u in allowed} for allowed in network.allowed]
    for task, row in enumerate(on):
        model.add_exactly_one(row.values())
        for u, var in row.items():
            model.add_hint(var, start[task] == u)
    for unit, limit in enumerate(network.memory):
        used = [network.bytes[task][unit] * row[unit] for task, row in enumerate(on) if unit in row]
        if limit and used:
            model.add(sum(used) <= limit)
    builder = _Terms(model, network, on, scale)
    horizon = math.ceil(STEPS * 4)
    target = model.new_int_var(math.floor(bound * scale * (1 - 1e-9)), horizon, "value")
    if objective == "energy":
        model.add(target >= sum(builder.energy()))
    else:
        terms = builder.load()
        for resource in range(network.resources):
            mine = [term for unit, term in terms if network.resource[unit] == resource]
            if mine:
                model.add(target >= sum(mine))
    model.minimize(target)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.max_deterministic_time = max(seconds, 0.01)
    solver.parameters.max_time_in_seconds = 2 * max(seconds, 0.01)
    solver.parameters.relative_gap_limit = 1e-4
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Assigned(None, bound)
    units = [next(u for u, var in row.items() if solver.value(var)) for row in on]
    return Assigned(units, max(bound, solver.best_objective_bound / scale))


class _Terms:
    """Linear terms of what an assignment costs, in whole steps, rounded down."""

    def __init__(self, model: Any, network: Network, on: list[dict[int, Any]], scale: float) -> None:
        self.model, self.network, self.on, self.scale = model, network, on, scale

    def steps(self, value: float) -> int:
        return math.floor(value * self.scale)

    def energy(self) -> list[Any]:
        network = self.network
        terms = [self.steps(network.joules[t][u]) * var for t, row in enumerate(self.on) for u, var in row.items()]
        paid: dict[tuple[int, int], Any] = {}
        for link in network.links:
            self.crossing(link.source, link.destination, link.joules, link.tensor, paid, at_source=False)
        for border in network.inputs:
            for u, var in self.on[border.task].items():
                self.at_least(paid, (border.tensor, u), border.joules[u], [var])
        for border in network.outputs:
            for u, var in self.on[border.task].items():
                terms.append(self.steps(border.joules[u]) * var)
        return [*terms, *paid.values()]

    def load(self) -> list[tuple[int, Any]]:
        network = self.network
        terms = [(u, self.steps(network.cost[t][u]) * var) for t, row in enumerate(self.on) for u, var in row.items()]
        received: dict[tuple[int, int], Any] = {}
        sent: dict[tuple[int, int], Any] = {}
        spine = longest_path(network)
        following = set(itertools.pairwise(spine))
        if spine:
            terms += [(u, self.steps(network.launch[u]) * var) for u, var in self.on[spine[0]].items()]
        for link in network.links:
            self.crossing(link.source, link.destination, link.into, link.tensor, received, at_source=False)
            self.crossing(link.source, link.destination, link.out, link.tensor, sent, at_source=True)
            pair = link.source, link.destination
            for u, var in self.on[link.destination].items():
                before = self.on[link.source].get(u)
                if link.gains[u] and before is not None:
                    both = self.model.new_bool_var("")
                    self.model.add_implication(both, var)
                    self.model.add_implication(both, before)
                    terms.append((u, -math.ceil(link.gains[u] * self.scale) * both))
                if pair in following and network.launch[u]:
                    if before is None:
                        terms.append((u, self.steps(network.launch[u]) * var))
                        continue
                    starts = self.model.new_bool_var("")
                    self.model.add(starts >= var - before)
                    terms.append((u, self.steps(network.launch[u]) * starts))
            following.discard(pair)
        for border in network.inputs:
            for u, var in self.on[border.task].items():
                self.at_least(received, (border.tensor, u), border.work[u], [var])
        for border in network.outputs:
            for u, var in self.on[border.task].items():
                self.at_least(sent, (border.tensor, u), border.work[u], [var])
        return [*terms, *((u, var) for paid in (received, sent) for (_, u), var in paid.items())]

    def crossing(
        self,
        source: int,
        destination: int,
        table: Table,
        tensor: int,
        paid: dict[tuple[int, int], Any],
        *,
        at_source: bool,
    ) -> None:
        for u, first in self.on[source].items():
            for v, second in self.on[destination].items():
                if u != v:
                    self.at_least(paid, (tensor, u if at_source else v), table[u][v], [first, second])

    def at_least(self, paid: dict[tuple[int, int], Any], key: tuple[int, int], value: float, given: list[Any]) -> None:
        # `value` is paid if all given hold; linear, which is tighter than an implication.
        steps = self.steps(value)
        if steps <= 0:
            return
        if key not in paid:
            paid[key] = self.model.new_int_var(0, math.ceil(STEPS * 4), "")
        self.model.add(paid[key] >= steps * (sum(given) - len(given) + 1))
