"""The plan: which device takes which region and why, what crosses between devices, as plain data that prints and saves.

Nothing here imports a compiler stage, so an opened bundle can show its plan.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestc.errors import PlanError

FORMAT = 2


@dataclass(frozen=True)
class Alternative:
    """What a region costs on a device: milliseconds (of it alone, borders apart), and how that is known."""

    ms: float
    kind: str = "measured"


@dataclass(frozen=True)
class PlannedRegion:
    """A region, the device that takes it and why; the refusals, in words, of the devices that do not take it.

    ``costs``: by device, for all that take it. ``predicted_ms`` is the cost where it is placed.
    """

    name: str
    device: str
    ops: tuple[str, ...]
    nodes: tuple[str, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    predicted_ms: float | None = None
    kind: str = "estimated"
    costs: Mapping[str, Alternative] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class PlannedPartition:
    """Regions, by name and in execution order, that one device runs without interruption, and when by prediction."""

    name: str
    device: str
    regions: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    begin_ms: float | None = None
    end_ms: float | None = None


@dataclass(frozen=True)
class Transfer:
    """A tensor that crosses from one device to another; `bytes` is its plain size, `us` the time predicted for it.

    "host memory" stands for the graph's inputs and outputs.
    """

    tensor: str
    source: str
    destination: str
    bytes: int
    us: float = 0.0
    kind: str = "estimated"


@dataclass(frozen=True)
class Plan:
    """Where everything of a model runs. Regions are in execution order.

    ``predicted_ms`` is of the objective "latency" or "energy" one inference, of "throughput" the time a request when
    pipelined; ``lower_bound_ms``: no placement of these regions does better by the same costs (millijoules for the
    objective "energy", as ``predicted_mj``); ``single_device_ms``: by device, all it takes there and the rest on the
    CPU. ``method`` tells how it was found. ``cuts``: nodes after which regions are cut for a device that takes a piece.
    """

    model: str
    objective: str
    devices: tuple[str, ...]
    regions: tuple[PlannedRegion, ...]
    partitions: tuple[PlannedPartition, ...]
    transfers: tuple[Transfer, ...]
    predicted_ms: float | None = None
    predicted_mj: float | None = None
    lower_bound_ms: float | None = None
    optimal: bool = False
    single_device_ms: Mapping[str, float] = field(default_factory=dict)
    method: str = "in the order of the targets"
    cuts: tuple[str, ...] = ()

    @property
    def fallback_ops(self) -> dict[str, int]:
        """Operators that run in an interpreter instead of generated code, and how many of each."""
        counts = Counter(op for region in self.regions if region.device == "host" for op in region.ops)
        return dict(sorted(counts.items()))

    def ops(self, partition: PlannedPartition) -> dict[str, int]:
        """Operators of a partition and how many of each, most frequent first."""
        inside = set(partition.regions)
        counts = Counter(op for region in self.regions if region.name in inside for op in region.ops)
        return dict(counts.most_common())

    def explain(self) -> str:
        """The plan in words: each device's share, each region, and each refusal."""
        lines = [f"{self.model}: {len(self.regions)} regions in {len(self.partitions)} partitions ({self.objective})"]
        for device in self.devices:
            taken = [region for region in self.regions if region.device == device]
            if taken:
                counts = Counter(op for region in taken for op in region.ops)
                share = ", ".join(f"{op} {count}" for op, count in counts.most_common())
                lines.append(f"  {device} takes {len(taken)} regions: {share}")
            elif device != "host":
                lines.append(f"  {device} takes nothing")
        if self.fallback_ops:
            listed = ", ".join(f"{op} {count}" for op, count in self.fallback_ops.items())
            lines.append(f"  interpreted, not compiled: {listed}")
        for transfer in self.transfers:
            lines.append(f"  {transfer.tensor}: {transfer.source} -> {transfer.destination}, {transfer.bytes} bytes")
        lines.append("")
        for region in self.regions:
            lines.append(f"{region.name} -> {region.device}: {', '.join(region.ops)}")
            lines.extend(f"  not {target}: {reason}" for target, reason in region.refusals.items())
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values; `from_json` reads them back."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from `to_json`'s values; PlanError if a field is missing or the format is newer."""
        if data.get("format") != FORMAT:
            raise PlanError(f"the plan is of format {data.get('format')!r}; this version reads format {FORMAT}")
        try:
            return Plan(
                model=str(data["model"]),
                objective=str(data["objective"]),
                devices=tuple(data["devices"]),
                regions=tuple(
                    PlannedRegion(
                        name=entry["name"],
                        device=entry["device"],
                        ops=tuple(entry["ops"]),
                        nodes=tuple(entry["nodes"]),
                        refusals=dict(entry["refusals"]),
                        predicted_ms=entry["predicted_ms"],
                    )
                    for entry in data["regions"]
                ),
                partitions=tuple(
                    PlannedPartition(
                        name=entry["name"],
                        device=entry["device"],
                        regions=tuple(entry["regions"]),
                        inputs=tuple(entry["inputs"]),
                        outputs=tuple(entry["outputs"]),
                    )
                    for entry in data["partitions"]
                ),
                transfers=tuple(Transfer(**entry) for entry in data["transfers"]),
                predicted_ms=data.get("predicted_ms"),
            )
        except (KeyError, TypeError) as error:
            raise PlanError(f"the plan is not complete: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as YAML (in the part of YAML that is also JSON, one region a line). PlanError if it cannot."""
        destination = Path(path)
        temporary = destination.with_name(f"{destination.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(_lines(self.to_json()), encoding="utf-8")
            temporary.replace(destination)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise PlanError(f"cannot write the plan to {destination}: {error.strerror or error}") from error

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote. PlanError if the file is missing or is not one."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"cannot read the plan {os.fspath(path)}: {error.strerror or error}") from error
        except ValueError as error:
            raise PlanError(f"{os.fspath(path)} is not a plan that nestc wrote: {error}") from error
        if not isinstance(data, dict):
            raise PlanError(f"{os.fspath(path)} is not a plan that nestc wrote: it is not a mapping")
        return Plan.from_json(data)


def _lines(data: Mapping[str, Any]) -> str:
    """JSON with each element of a top-level list on a line of its own, so that plans can be compared by line."""
    parts: list[str] = []
    for key, value in data.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            rows = ",\n    ".join(json.dumps(row) for row in value)
            parts.append(f'  "{key}": [\n    {rows}\n  ]')
        else:
            parts.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
