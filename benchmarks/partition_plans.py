"""The plans that benchmarks/partition.py compares: ours, and those of other ways to place, on the same problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from nestc.errors import PlanError
from nestc.partition.arrange import arrange
from nestc.partition.baselines import greedy_by_support, single, type_based, viterbi_per_branch
from nestc.partition.by_cost import Placement
from nestc.partition.evaluate import evaluate
from nestc.partition.heft import heft
from nestc.partition.problem import Problem, Solution

OURS = "nestc"

LAST = ("cpu", "host")
"""Units that take what is left, in this order."""

TYPES = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "Attention", "Softmax", "LayerNormalization", "MaxPool",
    "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Concat", "Add", "Mul", "Sub", "Div",
)  # fmt: skip
"""What a region of several operators is called by: the first of these that is in it, else its first operator."""


@dataclass(frozen=True)
class Candidates:
    """Ways to place a network, by name, and why some could not be: ours is `OURS`."""

    solutions: Mapping[str, Solution]
    refused: Mapping[str, str]

    def values(self) -> dict[str, float]:
        """What each minimises: seconds, seconds a request, or joules."""
        return {name: solution.value for name, solution in self.solutions.items()}

    def distinct(self) -> dict[str, list[str]]:
        """Names by the first of those that have the same stages: what is the same is compiled and run once."""
        found: dict[str, list[str]] = {}
        for name, solution in self.solutions.items():
            first = next((other for other in found if self.solutions[other].stages == solution.stages), name)
            found.setdefault(first, []).append(name)
        return found


def kind_of(ops: Sequence[str]) -> str:
    """The type of a region: its heaviest operator's; conversions of numbers count only where there is nothing else."""
    heavy = next((kind for kind in TYPES if kind in ops), None)
    others = [op for op in ops if op not in ("QuantizeLinear", "DequantizeLinear", "Cast")]
    return heavy or (others or list(ops))[0]


def support_order(problem: Problem) -> list[str]:
    """Accelerators and libraries as they were given, then the CPU and the interpreter: ONNX Runtime's usual list."""
    names = [unit.name for unit in problem.units]
    return [name for name in names if name not in LAST] + [name for name in LAST if name in names]


def candidates(placement: Placement, kinds: Mapping[str, str]) -> Candidates:
    """Ours and every baseline, each by what its own partitions take. `kinds`: the type of each task.

    Baselines choose units by the time of regions, as published; their stages are those that suit the objective best.
    """
    problem, ours = placement.given, placement.solution
    ways: dict[str, Callable[[], Mapping[str, str]]] = {
        f"single_{unit.name}": lambda unit=unit: single(problem, unit.name)
        for unit in problem.units
        if unit.name != "host"
    }
    ways |= {
        "type_based": lambda: type_based(problem, kinds),
        "greedy": lambda: greedy_by_support(problem, support_order(problem)),
        "viterbi": lambda: viterbi_per_branch(problem),
        "heft": lambda: heft(problem),
    }
    solutions = {OURS: ours}
    refused: dict[str, str] = {}
    for name, assign in ways.items():
        try:
            stages = tuple(arrange(problem, assign(), ours.objective))
            guess = Solution(stages, evaluate(problem, stages), ours.objective, ours.lower_bound, False, name)
        except PlanError as error:  # most have never heard of a limit to a device's memory
            refused[name] = str(error)
            continue
        evaluation = placement.measure(guess)
        if evaluation is None:
            refused[name] = "a device does not take one of its partitions as a whole"
        else:
            solutions[name] = replace(guess, evaluation=evaluation)
    return Candidates(solutions, refused)


def best_single(values: Mapping[str, float]) -> tuple[str, float] | None:
    """Of the plans that use one device (and the CPU for the rest) the one with the least value."""
    singles = {name: value for name, value in values.items() if name.startswith("single_")}
    return min(singles.items(), key=lambda item: item[1]) if singles else None


def gain(baseline: float, ours: float) -> float:
    """Percent by which ours is faster: 100 * (baseline / ours - 1)."""
    return 100 * (baseline / ours - 1)
