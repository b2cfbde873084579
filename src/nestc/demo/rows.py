"""One network on some devices: how well it decides, and time and energy of an image, each said to be of what kind."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nestc.runtime import Executable

TURNS, CALLS = 20, 5
"""A latency is the median of so many turns of so many calls; programs take turns, so that what disturbs the machine
disturbs all of them."""

SIMULATED_TURNS = 4
"""Turns, of one call, where a device is simulated: of its time every call says the same."""

IN_FLIGHT = 4
"""Images at work at once when throughput is taken."""

WORST_FIRST = ("estimated", "modelled", "measured")
"""Kinds of figures; a sum is of the least certain kind among its parts."""


@dataclass(frozen=True)
class Row:
    """What a network does on some devices.

    ``accuracy`` and ``agreement`` (decisions that are the float network's on the CPU) are fractions of ``images``.
    Times are those of the devices, without the interpreter's between calls; ``millijoules`` an image is None where a
    device states neither energy nor power. ``regions``: how many run on each device. ``predicted_ms`` and
    ``lower_bound_ms`` are the solver's, None where devices were taken in order.
    """

    name: str
    scheme: str
    objective: str | None
    images: int
    accuracy: float
    agreement: float
    latency_ms: float
    latency_kind: str
    images_per_second: float
    throughput_kind: str
    millijoules: float | None
    energy_kind: str | None
    regions: Mapping[str, int]
    predicted_ms: float | None
    lower_bound_ms: float | None
    optimal: bool | None
    compile_seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Program:
    """What becomes a row: an executable and the images [N, 1, 28, 28] it is judged on, with labels [N] and the float
    network's classes [N]."""

    name: str
    scheme: str
    objective: str | None
    executable: Executable
    images: np.ndarray
    labels: np.ndarray
    decided: np.ndarray
    compile_seconds: float


def measure(programs: Sequence[Program]) -> list[Row]:
    """Run all programs: decisions and the pipeline's throughput in one pass each, then latencies in turns."""
    flows: list[tuple[np.ndarray, dict[str, Any]]] = []
    for each in programs:
        outputs = list(each.executable.map([image[None] for image in each.images], IN_FLIGHT))
        flows.append((np.array([int(output.argmax()) for output in outputs]), each.executable.throughput()))
    seconds: list[list[float]] = [[] for _ in programs]
    joules: list[list[tuple[float | None, str | None]]] = [[] for _ in programs]
    for turn in range(TURNS):
        for number, each in enumerate(programs):
            simulated = flows[number][1]["kind"] == "modelled"
            for call in range(CALLS if not simulated else 1 if turn < SIMULATED_TURNS else 0):
                each.executable(each.images[(turn * CALLS + call) % len(each.images)][None])
                seconds[number].append(each.executable.throughput()["seconds"])
                joules[number].append(energy_of(each.executable.energy()))
    return [_row(*parts) for parts in zip(programs, flows, seconds, joules, strict=True)]


def _row(
    program: Program,
    flow: tuple[np.ndarray, Mapping[str, Any]],
    seconds: Sequence[float],
    energies: Sequence[tuple[float | None, str | None]],
) -> Row:
    """A program with what its runs have shown."""
    plan, (classes, flowing) = program.executable.plan, flow
    regions: dict[str, int] = {}
    for region in plan.regions:
        regions[region.device] = regions.get(region.device, 0) + 1
    latency = statistics.median(seconds)
    joules = [each for each, _ in energies if each is not None]
    placed = program.objective is not None
    return Row(
        name=program.name,
        scheme=program.scheme,
        objective=program.objective,
        images=len(program.images),
        accuracy=float((classes == program.labels).mean()),
        agreement=float((classes == program.decided).mean()),
        latency_ms=latency * 1e3,
        latency_kind=flowing["kind"],
        # On one device images follow each other, and nothing overlaps.
        images_per_second=1 / latency if len(regions) == 1 else flowing["per_second"],
        throughput_kind=flowing["kind"],
        millijoules=statistics.median(joules) * 1e3 if joules else None,
        energy_kind=energies[0][1],
        regions=regions,
        predicted_ms=plan.predicted_ms if placed else None,
        lower_bound_ms=plan.lower_bound_ms if placed else None,
        optimal=plan.optimal if placed else None,
        compile_seconds=program.compile_seconds,
    )


def energy_of(parts: Sequence[Mapping[str, Any]]) -> tuple[float | None, str | None]:
    """Joules of all devices together and of what kind; None where a device (a link may) tells nothing of its own."""
    if any(part["joules"] is None and "->" not in part["device"] for part in parts):
        return None, None
    known = [part for part in parts if part["joules"] is not None]
    kind = min((str(part["kind"]) for part in known), key=WORST_FIRST.index, default=None)
    return (sum(part["joules"] for part in known), kind) if known else (None, None)
