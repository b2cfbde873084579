"""Stages measured as they are: what the problem learns of them, and which plan is taken in the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from nestc.errors import PlanError
from nestc.partition.evaluate import evaluate
from nestc.partition.problem import Cost, Crossing, Edge, Problem, Solution, Stage, Task, Unit
from nestc.partition.refine import FINALISTS, Actual, Actuals, corrected, refine

UNITS = (Unit("cpu", "cpu", launch=0.25), Unit("npu", "npu", launch=0.5))


def actuals(*seconds: float | None) -> Actuals:
    return [None if each is None else Actual(each) for each in seconds]


def chain(*costs: tuple[float, float], work: float = 1.0) -> Problem:
    """Tasks t0, t1 ... one after another, by seconds on cpu and npu; a border is `work` on both sides."""
    tasks = tuple(Task(f"t{n}", {"cpu": Cost(a), "npu": Cost(b)}) for n, (a, b) in enumerate(costs))
    crossing = Crossing(work, 0.125, work)
    crossings = {("cpu", "npu"): crossing, ("npu", "cpu"): crossing}
    edges = [Edge(f"v{n}", f"t{n}", f"t{n + 1}", 8, crossings) for n in range(len(tasks) - 1)]
    return Problem(UNITS, tasks, (Edge("x", None, "t0"), *edges, Edge("y", tasks[-1].name, None)))


def solution(problem: Problem, *stages: Stage, bound: float = 0.0) -> Solution:
    return Solution(stages, evaluate(problem, stages), "latency", bound, False, "by hand")


def latency(problem: Problem, *stages: Stage) -> float:
    return evaluate(problem, stages).latency


MIXED = (Stage("cpu", ("t0",)), Stage("npu", ("t1",)), Stage("cpu", ("t2",)))
CPU = (Stage("cpu", ("t0", "t1", "t2")),)


@pytest.mark.parametrize("seconds", [(4.0, 7.0, 5.0), (1.5, 0.25, 0.125), (2.0, 3.0, None), (3.0, 5.0, 3.0)])
def test_stages_take_what_was_measured(seconds: tuple[float | None, ...]) -> None:
    problem = chain((2, 9), (9, 3), (2, 9))
    assert latency(problem, *MIXED) == (0.25 + 2 + 1) + 0.125 + (0.5 + 1 + 3 + 1) + 0.125 + (0.25 + 1 + 2)
    found = evaluate(corrected(problem, MIXED, actuals(*seconds)), MIXED).times
    spent = [timed.end - timed.begin - launch for timed, launch in zip(found, (0.25, 0.5, 0.25), strict=True)]
    assert spent == pytest.approx([3.0 if each is None else each for each in seconds])


def test_what_a_stage_takes_longer_is_put_on_its_borders_so_that_other_stages_cost_the_same() -> None:
    problem = chain((2, 9), (9, 3), (2, 9))
    learned = corrected(problem, MIXED, actuals(3.0, 7.0, 3.0))
    assert latency(learned, *CPU) == latency(problem, *CPU)
    assert learned.tasks == problem.tasks


def test_a_stage_without_borders_changes_its_tasks() -> None:
    problem = chain((2, 9), (6, 3), (2, 9))
    learned = corrected(problem, CPU, actuals(5.0))
    assert [task.costs["cpu"].seconds for task in learned.tasks] == pytest.approx([1.0, 3.0, 1.0])
    assert [task.costs["npu"].seconds for task in learned.tasks] == [9, 3, 9]


def test_a_tensor_that_several_tasks_of_a_stage_take_counts_once() -> None:
    tasks = tuple(Task(f"t{n}", {"cpu": Cost(1.0), "npu": Cost(1.0)}) for n in range(3))
    edges = tuple(Edge("v", "t0", f"t{n}", 8, {("cpu", "npu"): Crossing(0.5, 0.0, 0.25)}) for n in (1, 2))
    problem = Problem(UNITS, tasks, edges)
    stages = (Stage("cpu", ("t0",)), Stage("npu", ("t1", "t2")))
    for seconds in ((3.0, 4.0), (1.25, 2.0), (1.0, 1.0)):
        times = evaluate(corrected(problem, stages, actuals(*seconds)), stages).times
        assert times[0].end - times[0].begin - 0.25 == pytest.approx(seconds[0])
        assert times[1].end - times[1].begin - 0.5 == pytest.approx(seconds[1])


def test_a_plan_that_disappoints_gives_way_to_what_is_solved_next() -> None:
    problem = chain((2, 9), (9, 3), (2, 9))
    promising, other = solution(problem, *MIXED), solution(problem, *CPU, bound=11.0)
    asked: list[Problem] = []

    def solve(learned: Problem) -> Solution:
        asked.append(learned)
        return solution(learned, *CPU, bound=11.0)

    measured = {MIXED: [3.0, 9.0, 3.0], CPU: [13.0]}
    found = refine(problem, promising, solve, lambda plan: actuals(*measured[plan.stages]), [], rounds=3)
    assert found.solution.stages == CPU
    assert found.solution.value == 13.25
    assert found.solution.lower_bound == 11.0
    assert not found.solution.optimal
    assert latency(asked[0], *MIXED) == pytest.approx(3.25 + 0.125 + 9.5 + 0.125 + 3.25)
    assert len(asked) == 2
    assert latency(found.problem, *CPU) == 13.25
    assert other.value == 13.25


def test_single_devices_are_measured_too_and_win_where_they_are_best() -> None:
    problem = chain((2, 9), (9, 3), (2, 9))
    measured = {MIXED: [3.0, 9.0, 3.0], CPU: [10.0]}

    def again(learned: Problem) -> Solution:
        return solution(learned, *MIXED, bound=8.0)

    found = refine(
        problem, again(problem), again, lambda plan: actuals(*measured[plan.stages]), [solution(problem, *CPU)]
    )
    assert found.solution.stages == CPU
    assert found.solution.value == pytest.approx(10.25)
    assert {stages: each and each.latency for stages, each in found.evaluations.items()} == {
        CPU: pytest.approx(10.25),
        MIXED: pytest.approx(16.25),
    }


def test_stages_that_a_unit_refuses_are_no_plan() -> None:
    problem = chain((2, 9), (9, 3), (2, 9))
    measured = {MIXED: [3.0, math.inf, 3.0], CPU: [13.0]}
    plans = iter((CPU, CPU))

    def next_plan(learned: Problem) -> Solution:
        return solution(learned, *next(plans))

    found = refine(problem, solution(problem, *MIXED), next_plan, lambda plan: actuals(*measured[plan.stages]))
    assert found.solution.stages == CPU
    with pytest.raises(PlanError, match="no device takes the stages"):
        refine(
            problem,
            solution(problem, *MIXED),
            lambda learned: solution(learned, *MIXED),
            lambda plan: actuals(*[math.inf] * 3),
        )


def test_libraries_of_one_processor_are_mixed_only_for_a_gain_that_is_sure() -> None:
    units = (Unit("cpu", "cpu"), Unit("library", "cpu"))
    tasks = (Task("t0", {"cpu": Cost(1.0), "library": Cost(2.0)}), Task("t1", {"cpu": Cost(2.0), "library": Cost(1.0)}))
    problem = Problem(units, tasks, (Edge("x", None, "t0"), Edge("v", "t0", "t1"), Edge("y", "t1", None)))
    mixed = (Stage("cpu", ("t0",)), Stage("library", ("t1",)))
    alone = (Stage("cpu", ("t0", "t1")),)
    for seconds, wanted in ((2.15, alone), (2.5, mixed)):
        measured = {mixed: [1.0, 1.0], alone: [seconds]}
        found = refine(
            problem,
            solution(problem, *mixed),
            lambda learned: solution(learned, *mixed),
            lambda plan, measured=measured: actuals(*measured[plan.stages]),
            [solution(problem, *alone)],
        )
        assert found.solution.stages == wanted


def test_plans_that_are_about_as_good_are_measured_again_in_turns() -> None:
    problem = chain((2, 9), (9, 3), (2, 9))
    others = [solution(problem, *CPU), solution(problem, Stage("npu", ("t0", "t1", "t2")))]
    measured = {MIXED: [3.0, 5.0, 3.0], CPU: [12.5], others[1].stages: [30.0]}
    later = {MIXED: [4.0, 5.0, 3.0], CPU: [12.0]}  # the machine was slower when the CPU alone was measured
    asked: list[tuple[Stage, ...]] = []

    def compare(plans: Sequence[Solution]) -> list[Actuals]:
        asked.extend(plan.stages for plan in plans)
        return [actuals(*later[plan.stages]) for plan in plans]

    found = refine(
        problem,
        solution(problem, *MIXED),
        lambda learned: solution(learned, *MIXED),
        lambda plan: actuals(*measured[plan.stages]),
        others,
        compare=compare,
    )
    assert asked == [MIXED, CPU]  # the best first; the other one is out of question
    assert found.solution.stages == CPU and found.solution.value == pytest.approx(12.25)
    assert {stages: each and each.latency for stages, each in found.evaluations.items()} == {
        CPU: pytest.approx(12.25),
        MIXED: pytest.approx(13.25),
        others[1].stages: pytest.approx(30.5),
    }
    asked.clear()
    refine(problem, others[0], lambda learned: others[0], lambda plan: actuals(12.5), compare=compare)
    assert asked == []  # nothing to compare it with


def test_what_other_ways_have_found_is_compared_however_many_are_better() -> None:
    problem = chain(*[(2, 9)] * 6)
    names = [task.name for task in problem.tasks]
    plans = [(Stage("cpu", tuple(names[:n])), Stage("npu", tuple(names[n:]))) for n in range(1, 6)]
    plans = [solution(problem, *plan) for plan in (*plans, (Stage("cpu", tuple(names)),))]
    seconds = {plan.stages: 5.0 + 0.01 * n for n, plan in enumerate(plans)}
    asked: list[tuple[Stage, ...]] = []

    def measure(plan: Solution) -> Actuals:
        return actuals(*[seconds[plan.stages] * (1 if len(plan.stages) == 2 else 2.3)] * len(plan.stages))

    def compare(given: Sequence[Solution]) -> list[Actuals]:
        asked.extend(plan.stages for plan in given)
        return [measure(plan) for plan in given]

    left = iter([*plans[1:5], plans[0], plans[0]])
    refine(problem, plans[0], lambda _: next(left), measure, plans[5:], compare=compare)
    assert len(asked) == FINALISTS + 1 and asked[-1] == plans[5].stages


def test_the_bound_is_by_costs_by_which_the_plan_takes_what_was_measured() -> None:
    """The CPU alone is measured again in the end; the bound is of the problem that has learned that, not of one before."""
    problem = chain((2, 9), (9, 3), (2, 9))
    asked: list[Problem] = []

    def solve(learned: Problem) -> Solution:
        asked.append(learned)
        bound = 0.9 * min(latency(learned, *CPU), latency(learned, *MIXED))
        return solution(learned, *MIXED, bound=bound)

    measured = {MIXED: [3.0, 9.0, 3.0], CPU: [13.0]}
    found = refine(
        problem,
        solution(problem, *MIXED),
        solve,
        lambda plan: actuals(*measured[plan.stages]),
        [solution(problem, *CPU)],
        compare=lambda plans: [actuals(*[12.0] if plan.stages == CPU else [3.0, 9.5, 3.0]) for plan in plans],
    )
    assert found.solution.stages == CPU and found.solution.value == pytest.approx(12.25)
    assert latency(asked[-1], *CPU) == pytest.approx(12.25)
    assert found.solution.lower_bound == pytest.approx(0.9 * 12.25) and not found.solution.optimal
    assert found.promised == pytest.approx(12.25)  # MIXED would take longer


def test_the_energy_of_a_stage_is_what_was_measured_of_the_whole() -> None:
    tasks = tuple(Task(f"t{n}", {"npu": Cost(1.0, joules, "modelled")}) for n, joules in enumerate((1.0, 3.0)))
    edges = (Edge("x", None, "t0"), Edge("v", "t0", "t1", gains={"npu": 0.5}), Edge("y", "t1", None))
    problem = Problem(UNITS, tasks, edges)
    stages = (Stage("npu", ("t0", "t1")),)
    assert evaluate(problem, stages).joules == 4.0
    learned = corrected(problem, stages, [Actual(1.25, 3.0)])
    assert evaluate(learned, stages).joules == pytest.approx(3.0)
    assert evaluate(learned, stages).latency == pytest.approx(1.75)
    assert [task.costs["npu"].joules for task in learned.tasks] == pytest.approx([0.75, 2.25])
