"""One network on some devices: how well it decides, and time and energy of an image, each said to be of what kind."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nestc.runtime import Executable

MEASURED_CALLS = 100
"""Calls of which the median is a latency where all of it is measured."""

SIMULATED_CALLS = 5
"""The same where a device is simulated: of its time every call says the same."""

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


def measure(
    executable: Executable,
    images: np.ndarray,
    labels: np.ndarray,
    decided: np.ndarray,
    *,
    name: str,
    scheme: str,
    objective: str | None,
    compile_seconds: float,
) -> Row:
    """Classify images [N, 1, 28, 28] with labels [N] one by one; `decided` [N] are the float network's classes."""
    plan = executable.plan
    # All images in flight together give the decisions and the pipeline's throughput in one pass.
    outputs = list(executable.map([image[None] for image in images], IN_FLIGHT))
    classes = np.array([int(output.argmax()) for output in outputs])
    flowing = executable.throughput()
    calls = SIMULATED_CALLS if flowing["kind"] == "modelled" else MEASURED_CALLS
    times: list[float] = []
    energies: list[tuple[float | None, str | None]] = []
    for number in range(calls):
        executable(images[number % len(images)][None])
        times.append(executable.throughput()["seconds"])
        energies.append(energy_of(executable.energy()))
    latency = statistics.median(times)
    joules = [each for each, _ in energies if each is not None]
    regions: dict[str, int] = {}
    for region in plan.regions:
        regions[region.device] = regions.get(region.device, 0) + 1
    # On one device images follow each other, and nothing overlaps.
    alone = len(regions) == 1
    placed = objective is not None
    return Row(
        name=name,
        scheme=scheme,
        objective=objective,
        images=len(images),
        accuracy=float((classes == labels).mean()),
        agreement=float((classes == decided).mean()),
        latency_ms=latency * 1e3,
        latency_kind=flowing["kind"],
        images_per_second=1 / latency if alone else flowing["per_second"],
        throughput_kind=flowing["kind"],
        millijoules=statistics.median(joules) * 1e3 if joules else None,
        energy_kind=energies[0][1],
        regions=regions,
        predicted_ms=plan.predicted_ms if placed else None,
        lower_bound_ms=plan.lower_bound_ms if placed else None,
        optimal=plan.optimal if placed else None,
        compile_seconds=compile_seconds,
    )


def energy_of(parts: Sequence[Mapping[str, Any]]) -> tuple[float | None, str | None]:
    """Joules of all devices together and of what kind; None where a device (a link may) tells nothing of its own."""
    if any(part["joules"] is None and "->" not in part["device"] for part in parts):
        return None, None
    known = [part for part in parts if part["joules"] is not None]
    kind = min((str(part["kind"]) for part in known), key=WORST_FIRST.index, default=None)
    return (sum(part["joules"] for part in known), kind) if known else (None, None)
