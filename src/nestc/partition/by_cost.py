"""Placement by measured and modelled costs: cut, measure, solve, join what stayed together, and say why."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from nestc.errors import PlanError
from nestc.graph.model import Model
from nestc.graph.region import Region
from nestc.graph.regions import form, regions, submodel
from nestc.partition.arrange import arrange
from nestc.partition.baselines import single, viterbi_per_branch
from nestc.partition.costs import Chain, Costed, Meter, Submodel, measure_costs, number_of
from nestc.partition.cut import find_cuts
from nestc.partition.evaluate import evaluate
from nestc.partition.fingerprint import is_modelled
from nestc.partition.group import order
from nestc.partition.heft import heft
from nestc.partition.match import unknown_at_compile_time
from nestc.partition.place import Placed, assemble
from nestc.partition.plan import Alternative, PlannedRegion, PlannedSplit, Transfer
from nestc.partition.problem import HOST, Edge, Evaluation, Objective, Problem, Solution, Stage, Task, stage_of
from nestc.partition.refine import CLOSE, Actual, corrected, refine
from nestc.partition.sizes import constant_bytes
from nestc.partition.solve import solve
from nestc.partition.split import Split, propose, split
from nestc.partition.store import Entry
from nestc.targets.api import Target

FIRST, NEXT, LAST = 1 / 3, 1 / 6, 1 / 2
"""Parts of the solver's time for the first solution, for each one after something was learned, and for the bound."""

SPLIT_GAIN = 0.02
"""Operators are split over devices for a gain of so much at least: it makes a plan harder to read."""


@dataclass(frozen=True)
class Placement:
    """A network placed by cost: what was solved, how, and what became of it.

    ``given`` is the problem by what regions take, before partitions were measured, and ``first`` its solution.
    ``describe`` makes partitions and a plan of any other solution of it, so that it can be compiled and run;
    ``measure`` evaluates one by what its own partitions take (what was measured in turns with ours, if it was), and
    gives None if a device does not take one.
    """

    placed: Placed
    costed: Costed
    solution: Solution
    given: Problem
    first: Solution
    describe: Callable[[Solution], Placed]
    measure: Callable[[Solution], Evaluation | None]

    @property
    def problem(self) -> Problem:
        """Costs of every region on every device, and of every border."""
        return self.costed.problem


def place_by_cost(
    model: Model,
    whole: Model,
    targets: Sequence[Target],
    objective: Objective,
    meter: Meter,
    *,
    time_limit: float = 30.0,
    progress: Callable[[str, float], None],
) -> Placement:
    """Place a `model`, whose regions formed for all devices are `whole`, on the targets.

    Where that promises to pay, heavy operators are split over two devices, and the result is kept if it is better by
    the costs of the parts. `time_limit` is the solver's, in seconds. Raises UnsupportedOp if nobody takes a region.
    """
    found = _place(model, whole, targets, objective, meter, time_limit, progress, ())
    assert found is not None
    if objective != "latency":
        return found
    every = regions(whole)
    splits = propose(found.problem, found.solution, {region.name: region for region in every})
    if not splits:
        return found
    parted = split(model, splits, every)
    below = (1 - SPLIT_GAIN) * found.first.value
    other = _place(parted, form(parted), targets, objective, meter, time_limit, progress, splits, below)
    if other is None or other.solution.value >= (1 - SPLIT_GAIN) * found.solution.value:
        return found
    return other


def _place(
    model: Model,
    whole: Model,
    targets: Sequence[Target],
    objective: Objective,
    meter: Meter,
    time_limit: float,
    progress: Callable[[str, float], None],
    splits: Sequence[Split],
    below: float = math.inf,
) -> Placement | None:
    """Costs, solution, refinement; None if by costs of regions no solution is better than `below`."""
    every = regions(whole)
    cuts = find_cuts(every, targets)
    cut = form(model, cuts=cuts) if cuts else whole
    pieces = regions(cut)
    costed = measure_costs(
        every,
        pieces,
        targets,
        list(whole.outputs),
        meter,
        (lambda names: submodel(whole, names), lambda names: submodel(cut, names)),
        progress,
    )
    by_name = {target.name: target for target in targets}
    resources = {target.name: target.machine.resource or target.name for target in targets}

    names = [unit.name for unit in costed.problem.units]
    singles = _solutions(costed.problem, {name: single(costed.problem, name) for name in names}, objective)

    def describe(
        solution: Solution, costed: Costed, alone: Mapping[str, float], promised: float | None = None
    ) -> Placed:
        kept = [node for node in cuts if not _joined(node, pieces, solution, costed)]
        formed = form(model, cuts=kept) if kept else whole
        placed = _describe(formed, kept, targets, costed, solution)
        parted = tuple(PlannedSplit(s.node, s.channels) for s in splits)
        plan = replace(placed.plan, splits=parted, single_device_ms=alone)
        return replace(placed, plan=replace(plan, promised_ms=None if promised is None else promised * 1e3))

    def stages(solution: Solution) -> list[Chain]:
        placed = describe(solution, costed, {})
        # Only what runs on the same resource goes through the same caches.
        shared: dict[str, int] = {}
        for each in placed.partitions:
            resource = resources[each.device]
            shared[resource] = shared.get(resource, 0) + constant_bytes(each.regions)
        return [
            Chain(by_name[each.device], each.regions, _models(placed.formed), shared[resources[each.device]])
            for each in placed.partitions
        ]

    def measure(solution: Solution) -> list[Actual | None]:
        found = stages(solution)
        progress(f"measure the {len(found)} partitions of a plan", 1.0)
        return _measure_stages(found, meter)

    def compare(solutions: Sequence[Solution]) -> list[list[Actual | None]]:
        progress(f"compare {len(solutions)} plans", 1.0)
        plans = [stages(solution) for solution in solutions]
        first = [_measure_stages(plan, meter) for plan in plans]
        pairs = [list(zip(plan, actuals, strict=True)) for plan, actuals in zip(plans, first, strict=True)]
        chains = [chain for plan in pairs for chain, actual in plan if _varies(chain, actual)]
        again = iter(meter.compare(chains))
        return [
            [_actual([next(again)]) if _varies(chain, actual) else actual for chain, actual in plan] for plan in pairs
        ]

    def solved(problem: Problem, part: float = FIRST) -> Solution:
        progress("solve", 1.0)
        found = solve(problem, objective, time_limit=part * time_limit, start=before)
        before[:] = found.stages
        return found

    def evaluated(solution: Solution) -> Evaluation | None:
        if solution.stages in found.evaluations:  # in turns with ours, so that they compare
            return found.evaluations[solution.stages]
        actuals = measure(solution)
        if any(actual is not None and actual.seconds == math.inf for actual in actuals):
            return None
        return evaluate(corrected(costed.problem, solution.stages, actuals), solution.stages)

    before: list[Stage] = []
    first = solved(costed.problem)
    if first.value >= below:
        return None
    ways = {"heft": heft(costed.problem), "viterbi": viterbi_per_branch(costed.problem)}
    good = [
        each for each in _solutions(costed.problem, ways, objective).values() if each.value <= (1 + CLOSE) * first.value
    ]
    found = refine(
        costed.problem,
        first,
        lambda learned: solved(learned, NEXT),
        measure,
        [*singles.values(), *good],
        compare=compare,
        prove=lambda learned: solved(learned, LAST),
    )
    final = replace(costed, problem=found.problem)
    alone = {
        name: _milliseconds(objective, evaluation)
        for name, each in singles.items()
        if (evaluation := found.evaluations[each.stages]) is not None
    }
    return Placement(
        describe(found.solution, final, alone, found.promised),
        final,
        found.solution,
        costed.problem,
        first,
        lambda other: describe(other, final, alone),
        evaluated,
    )


def _solutions(problem: Problem, ways: Mapping[str, Mapping[str, str]], objective: Objective) -> dict[str, Solution]:
    """Solutions of which only the units are given, by name; without those that exceed the memory of one."""
    found: dict[str, Solution] = {}
    for name, units in ways.items():
        stages = arrange(problem, units, objective)
        with contextlib.suppress(PlanError):
            found[name] = Solution(stages, evaluate(problem, stages), objective, 0.0, False, f"by {name}")
    return found


def _models(formed: Model) -> Submodel:
    return lambda names: submodel(formed, names)


def _measure_stages(plan: Sequence[Chain], meter: Meter) -> list[Actual | None]:
    """What the partitions of a plan take as they are, without their launches; those of one resource in turns."""
    found: list[Actual | None] = [None] * len(plan)
    beside: dict[int, list[int]] = {}
    for index, chain in enumerate(plan):
        if all(unknown_at_compile_time(region) is None for region in chain.regions):
            beside.setdefault(chain.network, []).append(index)
    for network, members in beside.items():
        given = [(plan[index].target, plan[index].regions) for index in members]
        for index, entries in zip(members, meter.chains(given, plan[members[0]].submodel, network), strict=True):
            found[index] = _actual(entries.values())
    return found


def _varies(chain: Chain, actual: Actual | None) -> bool:
    """Whether another measurement may give another time; what a simulator tells is the same every time."""
    return actual is not None and actual.seconds < math.inf and not is_modelled(chain.target)


def _actual(entries: Collection[Entry]) -> Actual | None:
    if any(entry.refusal is not None for entry in entries):
        return Actual(math.inf)
    if any(entry.kind == "estimated" for entry in entries):
        return None
    joules = [entry.joules for entry in entries if entry.joules is not None]
    known = sum(joules) if len(joules) == len(entries) else None
    return Actual(sum(entry.seconds for entry in entries), known)


def _joined(node: str, pieces: Sequence[Region], solution: Solution, costed: Costed) -> bool:
    """Whether all pieces of the region that was cut at `node` run in one stage of a device that takes it whole."""
    number = next(number_of(each.name) for each in pieces if any(op.name == node for op in each.ops))
    stages = stage_of(solution.stages)
    used = {stages[each.name] for each in pieces if number_of(each.name) == number}
    return len(used) == 1 and solution.stages[used.pop()].unit in costed.whole.get(number, frozenset())


def _describe(
    formed: Model, cuts: Sequence[str], targets: Sequence[Target], costed: Costed, solution: Solution
) -> Placed:
    """Partitions of the solution's stages, and the plan with its costs and reasons."""
    problem, evaluation = costed.problem, solution.evaluation
    stages = stage_of(solution.stages)
    tasks = {task.name: task for task in problem.tasks}
    final = regions(formed)
    parts = {
        region.name: [region.name]
        if region.name in tasks
        else [task for task in tasks if number_of(task) == number_of(region.name)]
        for region in final
    }
    device = {region.name: solution.stages[stages[parts[region.name][0]]].unit for region in final}
    planned = {
        region.name: _planned(region, device[region.name], [tasks[name] for name in parts[region.name]], costed)
        for region in final
    }
    grouped = [
        order([region for region in final if stages[parts[region.name][0]] == number], device)
        for number in range(len(solution.stages))
    ]
    placed = assemble(formed, grouped, device, planned, targets, solution.objective)
    times = {timed.stage: timed for timed in evaluation.times}
    plan = replace(
        placed.plan,
        partitions=tuple(
            replace(each, begin_ms=times[number].begin * 1e3, end_ms=times[number].end * 1e3)
            for number, each in enumerate(placed.plan.partitions)
        ),
        transfers=tuple(_with_conversion(each, problem, stages, solution) for each in placed.plan.transfers),
        predicted_ms=_milliseconds(solution.objective, evaluation),
        predicted_mj=evaluation.joules * 1e3,
        lower_bound_ms=solution.lower_bound * 1e3,
        optimal=solution.optimal,
        method=solution.method,
        cuts=tuple(cuts),
    )
    return replace(placed, plan=plan)


def _milliseconds(objective: Objective, evaluation: Evaluation) -> float:
    return 1e3 * (evaluation.period if objective == "throughput" else evaluation.latency)


def _planned(region: Region, device: str, tasks: Sequence[Task], costed: Costed) -> PlannedRegion:
    """What is said of a region: that of the task, or of the tasks that were joined in it."""
    takers = [name for name in tasks[0].costs if all(name in task.costs for task in tasks)]
    gains = _gains(costed.problem.edges, [task.name for task in tasks])
    costs = {
        name: Alternative(
            (sum(task.costs[name].seconds for task in tasks) - gains.get(name, 0.0)) * 1e3, tasks[0].costs[name].kind
        )
        for name in takers
    }
    refusals = dict(costed.refusals.get(region.name, {}))
    return PlannedRegion(
        name=region.name,
        device=device,
        ops=tuple(op.op_type for op in region.ops),
        nodes=tuple(op.name for op in region.ops),
        refusals={name: reason for name, reason in refusals.items() if name != device},
        predicted_ms=costs[device].ms,
        kind=costs[device].kind,
        costs=costs,
        reason=_reason(device, costs),
    )


def _gains(edges: Sequence[Edge], names: Sequence[str]) -> dict[str, float]:
    """Seconds that computing tasks as one saves, by device."""
    found: dict[str, float] = {}
    for edge in edges:
        if edge.source in names and edge.destination in names:
            for unit, gain in edge.gains.items():
                found[unit] = found.get(unit, 0.0) + gain
    return found


def _reason(device: str, costs: dict[str, Alternative]) -> str:
    """Why a region is where it is, in words."""
    others = {name: each for name, each in costs.items() if name != device}
    if not others:
        return "no other device takes it"
    best = min(others, key=lambda name: others[name].ms)
    here, there = costs[device], others[best]
    if here.ms <= there.ms:
        return f"cheapest here ({_shown(here)}; next {best}, {_shown(there)})"
    return f"stays with its neighbours ({_shown(here)}; alone {best} would take {_shown(there)}, with borders more)"


def _shown(cost: Alternative) -> str:
    return f"{cost.ms:.3g} ms {cost.kind}"


def _with_conversion(transfer: Transfer, problem: Problem, stages: dict[str, int], solution: Solution) -> Transfer:
    """A transfer with the times of its crossing, on the links and for conversions of layout."""
    for edge in problem.edges:
        source = HOST if edge.source is None else solution.stages[stages[edge.source]].unit
        destination = HOST if edge.destination is None else solution.stages[stages[edge.destination]].unit
        if edge.tensor == transfer.tensor and transfer.destination == destination and transfer.source == source:
            crossing = edge.crossings.get((transfer.source, transfer.destination))
            if crossing is not None:
                work = crossing.out_seconds + crossing.in_seconds
                return replace(transfer, us=crossing.wire_seconds * 1e6, kind=crossing.kind, conversion_us=work * 1e6)
    return transfer
