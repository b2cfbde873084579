"""The placement problem and its solution as plain numbers: tasks, units to run them on, what passes between.

Seconds and joules everywhere. Nothing here knows of graphs or targets, so solvers are tested on numbers alone.

How time passes (`evaluate.py` and `nestc.runtime` keep to these rules):

- A *stage* is what runs as one partition: tasks of one unit, without interruption. Its results exist when it ends.
- Units of one `resource` never run at the same time (the CPU's own code and a vendor's runtime share the cores).
- A stage takes its unit's `launch` + the costs of its tasks - the gains of edges inside it + for each tensor that
  leaves it to another unit the largest `out_seconds` once + for each tensor that enters it from another unit or from
  the host the `in_seconds` once.
- A stage may begin when its resource is free, all stages before it on the same resource (same request) have begun,
  and each tensor from another stage has arrived: end of the producing stage + `wire_seconds`. Tensors of stages on
  the same unit arrive at once. Graph inputs leave the host at time 0 and arrive after their `wire_seconds`; a graph
  output arrives there `wire_seconds` after its stage.
- Latency is the arrival of the last output. With several requests in flight the time a request is the period.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["measured", "modelled", "estimated"]
"""Timed on the device; from its simulator; or from the offer's cost, since the device is not here."""

Objective = Literal["latency", "throughput", "energy"]

HOST = "host memory"
"""Stands for the place of graph inputs and outputs in the pairs of `Edge.crossings`."""


@dataclass(frozen=True)
class Cost:
    """What a task costs on a unit. ``bytes``: memory of the device it occupies all the time (weights)."""

    seconds: float
    joules: float = 0.0
    kind: Kind = "measured"
    bytes: int = 0


@dataclass(frozen=True)
class Unit:
    """A device as the solver sees it; ``launch`` seconds begin each stage, ``memory_bytes`` 0 is no limit."""

    name: str
    resource: str
    launch: float = 0.0
    memory_bytes: int = 0


@dataclass(frozen=True)
class Task:
    """Something that runs on one unit as a whole: its cost on every unit that takes it (at least one)."""

    name: str
    costs: Mapping[str, Cost]


@dataclass(frozen=True)
class Crossing:
    """A tensor that goes from one unit to another: work of the first, time on the way, work of the second."""

    out_seconds: float = 0.0
    wire_seconds: float = 0.0
    in_seconds: float = 0.0
    joules: float = 0.0
    kind: Kind = "modelled"


@dataclass(frozen=True)
class Edge:
    """A tensor from one task to another; None stands for the host (a graph input, a graph output).

    ``crossings``: by (unit of source, unit of destination), with `HOST` for the host; a pair that is missing is free.
    ``gains``: seconds saved, by unit, if both tasks are in one stage there (fused they cost less than apart).
    """

    tensor: str
    source: str | None
    destination: str | None
    bytes: int = 0
    crossings: Mapping[tuple[str, str], Crossing] = field(default_factory=dict[tuple[str, str], Crossing])
    gains: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Problem:
    """Tasks in a topological order, and everything that passes between them."""

    units: tuple[Unit, ...]
    tasks: tuple[Task, ...]
    edges: tuple[Edge, ...]

    def unit(self, name: str) -> Unit:
        """The unit of that name; KeyError if there is none."""
        return next(unit for unit in self.units if unit.name == name)


@dataclass(frozen=True)
class Stage:
    """Tasks, in execution order, that one unit runs as one partition."""

    unit: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Timed:
    """When a stage runs, in seconds since its request began (or since the first one did)."""

    stage: int
    request: int
    begin: float
    end: float


@dataclass(frozen=True)
class Evaluation:
    """What stages cost under the rules above.

    ``latency`` of one request alone; ``period``: the busiest resource's seconds a request, which bounds throughput;
    ``busy``: seconds a request by resource; ``joules`` a request; ``times``: when each stage runs, one request alone.
    """

    latency: float
    period: float
    joules: float
    busy: Mapping[str, float]
    times: tuple[Timed, ...]

    def value(self, objective: Objective) -> float:
        """What an objective minimises: seconds, seconds a request, or joules."""
        return {"latency": self.latency, "throughput": self.period, "energy": self.joules}[objective]


@dataclass(frozen=True)
class Solution:
    """Stages in an order in which they can run, what they cost, and how good that is.

    ``lower_bound`` is of the objective's value: no placement is better. ``optimal``: proven to be the best (the value
    is within 1e-6 of the bound). ``method`` says in words how it was found.
    """

    stages: tuple[Stage, ...]
    evaluation: Evaluation
    objective: Objective
    lower_bound: float
    optimal: bool
    method: str

    @property
    def assignment(self) -> dict[str, str]:
        """The unit of every task."""
        return {task: stage.unit for stage in self.stages for task in stage.tasks}

    @property
    def value(self) -> float:
        """The objective's value."""
        return self.evaluation.value(self.objective)


def edges_into(problem: Problem) -> dict[str, list[Edge]]:
    """Edges by the task that they end at (those to the host are left out)."""
    found: dict[str, list[Edge]] = {task.name: [] for task in problem.tasks}
    for edge in problem.edges:
        if edge.destination is not None:
            found[edge.destination].append(edge)
    return found


def edges_from(problem: Problem) -> dict[str, list[Edge]]:
    """Edges by the task that they begin at (those from the host are left out)."""
    found: dict[str, list[Edge]] = {task.name: [] for task in problem.tasks}
    for edge in problem.edges:
        if edge.source is not None:
            found[edge.source].append(edge)
    return found


def stage_of(stages: Sequence[Stage]) -> dict[str, int]:
    """The number of each task's stage."""
    return {task: number for number, stage in enumerate(stages) for task in stage.tasks}
