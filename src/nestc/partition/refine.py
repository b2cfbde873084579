"""Measuring the stages that were chosen, as they are, and placing again with what was learned.

What a stage takes is not quite the sum of its tasks: layouts are chosen for all of it, and what is measured inside one
chain differs inside another. So the stages of a solution are measured as whole partitions, the difference is written
into the problem, and it is solved again, until nothing new turns up. Of all that was measured the best is taken, the
plans of single devices among them: what is taken is then not slower than any of these, by measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from nestc.errors import PlanError
from nestc.partition.evaluate import evaluate
from nestc.partition.problem import HOST, Cost, Crossing, Edge, Evaluation, Problem, Solution, Stage, Task, stage_of

ROUNDS = 5
"""Solutions that are measured, at most; each costs a compilation of its new stages."""

ENOUGH = 0.01
"""What promises less than this is not measured any more."""

PROVEN = 1e-6
"""A value within this part of its bound is called optimal, as by the solver."""

UNCERTAIN = 0.1
"""Devices of one resource take turns, so that a plan over several gains by small differences of measured times alone,
which are not surer than this: one that promised 6 % on three libraries of a CPU took 11 % longer than the fastest."""

LEAST = 1e-9
"""Seconds below which a difference is none."""

CLOSE = 0.25
FINALISTS = 4
"""Of the plans that are no worse than the best by this part at most so many, and those that other ways to place have
found, are measured once more, in turns: what was measured at different times differs by how busy the machine was."""


@dataclass(frozen=True)
class Actual:
    """What a stage takes as a whole: ``seconds`` without its launch, infinite if its unit refuses it; ``joules``, None
    where they are not known."""

    seconds: float
    joules: float | None = None


Actuals = Sequence[Actual | None]
"""What each stage of a solution takes; None: not known."""


@dataclass(frozen=True)
class Refined:
    """The problem with what was learned of `solution`, whose evaluation is by measured stages.

    ``promised``: the value of the last solution found, by the same costs as the lower bound; it is less than that of
    `solution` where what it promises is too little to be measured, or there were no rounds left to do so.
    ``evaluations``: of all stages that were measured, by what was measured last; None: refused.
    """

    problem: Problem
    solution: Solution
    promised: float
    evaluations: Mapping[tuple[Stage, ...], Evaluation | None]


def refine(
    problem: Problem,
    first: Solution,
    solve: Callable[[Problem], Solution],
    measure: Callable[[Solution], Actuals],
    others: Sequence[Solution] = (),
    rounds: int = ROUNDS,
    compare: Callable[[Sequence[Solution]], Sequence[Actuals]] | None = None,
    prove: Callable[[Problem], Solution] | None = None,
) -> Refined:
    """Measure `first` and what `solve` finds after it, and `others`; the best by what was measured.

    Where several are about as good they are measured once more by `compare`, if there is one, `others` among them. The
    lower bound is that of the problem in which all that was measured is learned, the stages of the best one last: by
    its costs they take what was measured, so that the two compare. `prove`, or else `solve`, finds it where the last
    solution was not proven to be the best. Raises PlanError if no plan can run.
    """
    learned = problem
    tried: dict[tuple[Stage, ...], tuple[Problem, Solution] | None] = {}
    taken: dict[tuple[Stage, ...], Actuals] = {}

    def note(solution: Solution, actuals: Actuals) -> None:
        tried[solution.stages] = None
        taken[solution.stages] = actuals
        if not any(actual is not None and actual.seconds == math.inf for actual in actuals):
            own = corrected(problem, solution.stages, actuals)
            tried[solution.stages] = own, replace(solution, evaluation=evaluate(own, solution.stages))

    def attempt(solution: Solution) -> None:
        nonlocal learned
        actuals = measure(solution)
        note(solution, actuals)
        learned = corrected(learned, solution.stages, actuals)

    for other in others:
        if other.stages not in tried:
            attempt(other)
    solution, solved = first, problem
    for _ in range(rounds):
        values = [each[1].value for each in tried.values() if each is not None]
        if solution.stages in tried or (values and solution.lower_bound >= (1 - ENOUGH) * min(values)):
            break
        attempt(solution)
        solution, solved = solve(learned), learned
    runnable = [each for each in tried.values() if each is not None]
    if not runnable:
        raise PlanError("no device takes the stages that it was given as a whole; compile for fewer devices")
    close = _close([each for _, each in runnable], {other.stages for other in others})
    if compare is not None and len(close) > 1:
        for each, actuals in zip(close, compare(close), strict=True):
            note(each, actuals)
        runnable = [each for each in tried.values() if each is not None]
    own, best = _surest(problem, runnable)
    learned = corrected(learned, best.stages, taken[best.stages])
    if learned != solved or (prove is not None and not solution.optimal):
        solution = (prove or solve)(learned)
    bound = min(solution.lower_bound, best.value)
    done = replace(
        best,
        lower_bound=bound,
        optimal=best.value - bound <= PROVEN * best.value,
        method=f"{solution.method}; stages measured, plans compared: {len(runnable)}",
    )
    evaluations = {stages: None if each is None else each[1].evaluation for stages, each in tried.items()}
    return Refined(own, done, min(solution.value, best.value), evaluations)


def _close(solutions: Sequence[Solution], always: Collection[tuple[Stage, ...]]) -> list[Solution]:
    """The best of some solutions and those about as good, the best first; of `always` all that are."""
    by_value = sorted(solutions, key=lambda each: each.value)
    good = [each for each in by_value if each.value <= (1 + CLOSE) * by_value[0].value]
    return [each for rank, each in enumerate(good) if rank < FINALISTS or each.stages in always]


def _surest(problem: Problem, runnable: Sequence[tuple[Problem, Solution]]) -> tuple[Problem, Solution]:
    """The best of some solutions; where nothing runs at the same time, one of few stages that is about as good."""
    best = min(runnable, key=lambda each: each[1].value)
    resource = {unit.name: unit.resource for unit in problem.units}
    if len({resource[stage.unit] for stage in best[1].stages}) > 1:
        return best
    good = [each for each in runnable if each[1].value <= (1 + UNCERTAIN) * best[1].value]
    return min(good, key=lambda each: (len(each[1].stages), each[1].value))


def corrected(problem: Problem, stages: Sequence[Stage], actuals: Actuals) -> Problem:
    """The problem in which these stages take these seconds, and joules where they are known.

    What a stage takes longer than its tasks say is put on the tensors that cross its borders from and to other units,
    by their bytes, or where there are none on its tasks. What it takes less is taken off the borders first. Its energy
    is shared among its tasks as theirs was.
    """
    predicted = _stage_seconds(problem, stages)
    unit_of = {task: stage.unit for stage in stages for task in stage.tasks}
    number = stage_of(stages)
    border: dict[tuple[int, str, str | None], float] = {}  # seconds more, by stage, tensor and its source
    factor: dict[str, float] = {}
    energy: dict[str, float] = {}
    for index, (stage, actual) in enumerate(zip(stages, actuals, strict=True)):
        if actual is None:
            continue
        known = sum(_cost(problem, task, stage.unit).joules for task in stage.tasks)
        if actual.joules is not None and known > 0:
            energy |= dict.fromkeys(stage.tasks, actual.joules / known)
        more = _LARGE if actual.seconds == math.inf else actual.seconds - predicted[index]
        if abs(more) < LEAST:
            continue
        crossing = _borders(problem, stage, index, number, unit_of)
        if more < 0:
            now = {key: _work(edges, stage.unit, unit_of) for key, edges in crossing.items()}
            less = min(sum(now.values()), -more)
            total = sum(now.values())
            border |= {key: -less * value / total for key, value in now.items() if value}
            more += less
        elif crossing:
            sizes = {key: max(1, edges[0].bytes) for key, edges in crossing.items()}
            total = sum(sizes.values())
            border |= {key: more * size / total for key, size in sizes.items()}
            more = 0.0
        inside = sum(_cost(problem, task, stage.unit).seconds for task in stage.tasks)
        if abs(more) >= LEAST and inside > 0:
            factor |= dict.fromkeys(stage.tasks, max(0.0, 1 + more / inside))
    tasks = tuple(
        _with_cost(task, unit_of[task.name], factor.get(task.name, 1.0), energy.get(task.name))
        for task in problem.tasks
    )
    return replace(problem, tasks=tasks, edges=tuple(_moved(edge, border, number, unit_of) for edge in problem.edges))


_LARGE = 3600.0
"""Seconds more that a stage is said to take which its unit refuses, so that it is not chosen again."""


def _stage_seconds(problem: Problem, stages: Sequence[Stage]) -> list[float]:
    """What the problem says of each stage, without its launch."""
    launch = {unit.name: unit.launch for unit in problem.units}
    times = {timed.stage: timed for timed in evaluate(problem, stages).times}
    return [times[n].end - times[n].begin - launch[stage.unit] for n, stage in enumerate(stages)]


_Borders = dict[tuple[int, str, str | None], list[Edge]]


def _borders(problem: Problem, stage: Stage, index: int, number: dict[str, int], unit_of: dict[str, str]) -> _Borders:
    """The edges over which tensors enter a stage from other units or leave it to them, by tensor."""
    found: _Borders = {}
    for edge in problem.edges:
        if edge.source is None or edge.destination is None or unit_of[edge.source] == unit_of[edge.destination]:
            continue
        if index in (number[edge.source], number[edge.destination]):
            found.setdefault((index, edge.tensor, edge.source), []).append(edge)
    return found


def _work(edges: Sequence[Edge], unit: str, unit_of: dict[str, str]) -> float:
    """Seconds that a unit works on a tensor at its border."""
    largest = 0.0
    for edge in edges:
        assert edge.source is not None and edge.destination is not None
        crossing = edge.crossings.get((unit_of[edge.source], unit_of[edge.destination]), Crossing())
        largest = max(largest, crossing.out_seconds if unit_of[edge.source] == unit else crossing.in_seconds)
    return largest


def _cost(problem: Problem, task: str, unit: str) -> Cost:
    return next(each for each in problem.tasks if each.name == task).costs[unit]


def _with_cost(task: Task, unit: str, seconds: float, joules: float | None) -> Task:
    """A task whose seconds and joules on a unit are multiplied; the energy of a measured time follows it if nothing
    else is known."""
    cost = task.costs[unit]
    if joules is None:
        joules = seconds if cost.kind == "measured" else 1.0
    changed = replace(cost, seconds=cost.seconds * seconds, joules=cost.joules * joules)
    return task if changed == cost else replace(task, costs={**task.costs, unit: changed})


def _moved(
    edge: Edge,
    border: dict[tuple[int, str, str | None], float],
    number: dict[str, int],
    unit_of: dict[str, str],
) -> Edge:
    """An edge whose ends work so much more on its tensor wherever it crosses from or to their unit."""
    if edge.source is None or edge.destination is None:
        return edge
    out = border.get((number[edge.source], edge.tensor, edge.source), 0.0)
    into = border.get((number[edge.destination], edge.tensor, edge.source), 0.0)
    if number[edge.source] == number[edge.destination] or not (out or into):
        return edge
    first, second = unit_of[edge.source], unit_of[edge.destination]
    pairs = {(a, b) for a, b in [*edge.crossings, (first, second)] if HOST not in (a, b) and a != b}
    changed = dict(edge.crossings)
    for pair in pairs:
        now = changed.get(pair, Crossing())
        more_out = out if pair[0] == first and first != second else 0.0
        more_in = into if pair[1] == second and first != second else 0.0
        changed[pair] = replace(
            now,
            out_seconds=max(0.0, now.out_seconds + more_out),
            in_seconds=max(0.0, now.in_seconds + more_in),
        )
    return replace(edge, crossings=changed)
