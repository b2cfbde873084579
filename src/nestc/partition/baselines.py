"""Placements as other systems choose them, on the same problem with the same costs, to compare ours against.

Each function gives the unit of every task; `arrange` makes stages of that and `evaluate` tells what they take. HEFT is
in `heft.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from nestc.errors import PlanError
from nestc.partition.problem import Edge, Problem, Task, Unit, edges_from, edges_into

Assignment = dict[str, str]
"""The unit of every task, by name."""


def single(problem: Problem, unit: str, rest: str = "cpu") -> Assignment:
    """Every task that `unit` takes there, the others on `rest`; what neither takes goes to the first unit that does.

    Raises PlanError if the problem has no such unit.
    """
    return greedy_by_support(problem, (unit, *([rest] if _has(problem, rest) else [])))


def greedy_by_support(problem: Problem, order: Sequence[str]) -> Assignment:
    """Each task on the first unit in `order` that takes it, whatever it costs there.

    This is how ONNX Runtime assigns nodes to execution providers ("the provider higher in the list gets preference").
    Units that are not in `order` come behind, as the problem has them. Raises PlanError for an unknown unit.
    """
    unknown = next((name for name in order if not _has(problem, name)), None)
    if unknown is not None:
        raise PlanError(f"there is no unit {unknown!r}; there are {', '.join(unit.name for unit in problem.units)}")
    ranked = list(dict.fromkeys((*order, *(unit.name for unit in problem.units))))
    return {task.name: next(name for name in ranked if name in task.costs) for task in problem.tasks}


def type_based(problem: Problem, kinds: Mapping[str, str]) -> Assignment:
    """Each type of operator always on the unit that is best for that type, borders between units ignored.

    The static type-based scheduling that PartitionTuner is compared with (ETRI Journal 45(2), 2023; its code calls it
    the "OPs" plan). `kinds` gives the type of every task. From a profile of single operators, each run alone and so
    with a launch: the best unit is the one with the least sum over all tasks of the type, where a task that it does
    not take counts, and is placed, where it is fastest.
    """
    launch = {unit.name: unit.launch for unit in problem.units}
    by_kind: dict[str, list[Task]] = {}
    for task in problem.tasks:
        by_kind.setdefault(kinds[task.name], []).append(task)

    def alone(task: Task, unit: str) -> float:
        return task.costs[unit].seconds + launch[unit]

    def placed(task: Task, preferred: str) -> str:
        if preferred in task.costs:
            return preferred
        return min(_takers(problem, task), key=lambda unit: alone(task, unit))

    chosen: Assignment = {}
    for tasks in by_kind.values():
        candidates = [unit.name for unit in problem.units if any(unit.name in task.costs for task in tasks)]
        best = min(candidates, key=lambda unit: sum(alone(task, placed(task, unit)) for task in tasks))
        chosen |= {task.name: placed(task, best) for task in tasks}
    return {task.name: chosen[task.name] for task in problem.tasks}


def viterbi_per_branch(problem: Problem, switch: float | None = None) -> Assignment:
    """The best units along each branch by dynamic programming, each branch on its own.

    PartitionTuner's way (ETRI Journal 45(2), 2023): the states of a step are the units that take the task, a step costs
    the task's seconds there, and going to another unit costs `switch` seconds, or by default what it really does: a
    launch and the transfers of the tensors between the two tasks. As there, the cost of a chain that fuses is the
    chain's (`Edge.gains`), and nothing is paid where branches begin and end. Of identical units the branches of one
    level take one each in turn, so that they run at the same time.
    """
    into, launch = edges_into(problem), {unit.name: unit.launch for unit in problem.units}
    by_name = {task.name: task for task in problem.tasks}
    branches = branches_of(problem)
    paths: list[list[str]] = []
    for branch in branches:
        first = by_name[branch[0]]
        best = {unit: first.costs[unit].seconds + launch[unit] for unit in _takers(problem, first)}
        came: list[dict[str, str]] = []
        for before, name in itertools.pairwise(branch):
            task = by_name[name]
            between = [edge for edge in into[name] if edge.source == before]
            reached: dict[str, float] = {}
            origin: dict[str, str] = {}
            for unit in _takers(problem, task):
                totals = {old: best[old] + _step(between, old, unit, launch[unit], switch) for old in best}
                # Of equals the same unit: it needs no launch, which `switch` may not count.
                origin[unit] = min(totals, key=lambda old: (totals[old], old != unit))
                reached[unit] = totals[origin[unit]] + task.costs[unit].seconds
            best = reached
            came.append(origin)
        path = [min(best, key=lambda unit: best[unit])]
        for origin in reversed(came):
            path.append(origin[path[-1]])
        paths.append(path[::-1])
    chosen: Assignment = {}
    for branch, path in zip(branches, _shared(problem, branches, paths), strict=True):
        chosen |= dict(zip(branch, path, strict=True))
    return {task.name: chosen[task.name] for task in problem.tasks}


def branches_of(problem: Problem) -> list[tuple[str, ...]]:
    """The problem's tasks as maximal chains: a task goes on with its only successor where it is the only predecessor.

    In the order of their first tasks.
    """
    into, out = edges_into(problem), edges_from(problem)
    before = {name: {edge.source for edge in edges if edge.source is not None} for name, edges in into.items()}
    after = {name: {edge.destination for edge in edges if edge.destination is not None} for name, edges in out.items()}
    follower: dict[str, str] = {}
    for name, sources in before.items():
        if len(sources) == 1:
            (source,) = sources
            if len(after[source]) == 1:
                follower[source] = name
    followers = set(follower.values())
    branches: list[tuple[str, ...]] = []
    for task in problem.tasks:
        if task.name in followers:
            continue
        chain = [task.name]
        while chain[-1] in follower:
            chain.append(follower[chain[-1]])
        branches.append(tuple(chain))
    return branches


def _shared(
    problem: Problem, branches: Sequence[tuple[str, ...]], paths: Sequence[Sequence[str]]
) -> list[tuple[str, ...]]:
    """The paths with identical units handed out in turn to the branches of each level."""
    groups = _identical(problem)
    group_of = {unit: group for group in groups for unit in group}
    into = edges_into(problem)
    branch_of = {name: number for number, branch in enumerate(branches) for name in branch}
    level: list[int] = []
    turns: dict[tuple[int, str], int] = {}
    shared: list[tuple[str, ...]] = []
    # Branches are in the order of their first tasks, so all that a branch waits for has its level already.
    for branch, path in zip(branches, paths, strict=True):
        waits = [level[branch_of[edge.source]] for edge in into[branch[0]] if edge.source is not None]
        level.append(1 + max(waits, default=-1))
        renamed: dict[str, str] = {}
        for unit in path:
            group = group_of[unit]
            if unit not in renamed:
                turn = turns.get((level[-1], group[0]), 0)
                renamed |= dict.fromkeys(group, group[turn % len(group)])
                turns[level[-1], group[0]] = turn + 1
        shared.append(tuple(renamed[unit] for unit in path))
    return shared


def _identical(problem: Problem) -> list[tuple[str, ...]]:
    """Units in groups of those that cost the same for every task and may run at the same time."""
    groups: list[list[Unit]] = []
    for unit in problem.units:
        for group in groups:
            apart = all(unit.resource != other.resource for other in group)
            if apart and unit.launch == group[0].launch and _same_costs(problem, unit.name, group[0].name):
                group.append(unit)
                break
        else:
            groups.append([unit])
    return [tuple(unit.name for unit in group) for group in groups]


def _same_costs(problem: Problem, one: str, other: str) -> bool:
    return all(task.costs.get(one) == task.costs.get(other) for task in problem.tasks)


def _step(between: Sequence[Edge], old: str, unit: str, launch: float, switch: float | None) -> float:
    """Seconds to go on with the next task of a branch on `unit`, apart from the task's own."""
    if old == unit:
        return -sum(edge.gains.get(unit, 0.0) for edge in between)
    if switch is not None:
        return switch
    crossings = [edge.crossings[old, unit] for edge in between if (old, unit) in edge.crossings]
    return launch + sum(each.out_seconds + each.wire_seconds + each.in_seconds for each in crossings)


def _takers(problem: Problem, task: Task) -> list[str]:
    """The units that take a task, in the problem's order."""
    return [unit.name for unit in problem.units if unit.name in task.costs]


def _has(problem: Problem, name: str) -> bool:
    return any(unit.name == name for unit in problem.units)
