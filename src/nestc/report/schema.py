"""What a report shows, as plain dataclasses; `to_json` is what the page reads and ``nestc report --json`` prints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from nestc.report.roofs import Roof

KINDS = ("measured", "modelled", "estimated")
FORMAT = 1


@dataclass(frozen=True)
class Figure:
    """A number and how it is known: measured, modelled, estimated, or several of these."""

    value: float
    kind: str


@dataclass(frozen=True)
class RegionData:
    """A region: where it runs and why, what it has to do, what it took. Sizes in bytes, None where not known.

    ``x`` and ``y``: the middle of its place in the drawing. ``observed`` is None where only the partition as a whole
    was timed; ``about`` says of what the time is. ``numbers``: the format that it computes with.
    """

    name: str
    device: str
    partition: str
    ops: tuple[str, ...]
    nodes: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: str
    operations: int | None
    bytes_in: int | None
    bytes_out: int | None
    weights: int | None
    observed: Figure | None
    about: str
    predicted: Figure | None
    energy: Figure | None
    costs: Mapping[str, Figure]
    reason: str
    refusals: Mapping[str, str]
    x: float
    y: float


@dataclass(frozen=True)
class EdgeData:
    """A value that goes from a region to another; None stands for the graph's inputs and outputs.

    ``crosses``: it goes from one device to another. ``us``: predicted time of that. ``path``: of an SVG.
    """

    tensor: str
    source: str | None
    destination: str | None
    dtype: str
    shape: tuple[int, ...]
    bytes: int | None
    crosses: bool
    us: Figure | None
    path: str


@dataclass(frozen=True)
class BorderData:
    """An input or an output of the graph in the drawing."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    x: float
    y: float


@dataclass(frozen=True)
class PartitionData:
    """Regions that a device runs without interruption; ``begin_ms`` and ``end_ms`` are predicted."""

    name: str
    device: str
    regions: tuple[str, ...]
    operations: int | None
    bytes: int | None
    weights: int | None
    observed: Figure | None
    predicted: Figure | None
    begin_ms: float | None
    end_ms: float | None
    energy: Figure | None


@dataclass(frozen=True)
class DeviceData:
    """A device: what it takes, how long it is busy in one inference, and its roof."""

    name: str
    kind: str
    resource: str
    regions: int
    partitions: int
    busy: Figure | None
    energy: Figure | None
    link: str
    roof: Roof | None


@dataclass(frozen=True)
class MarkData:
    """A span in a lane of a timeline, in microseconds since it began: a partition, or a tensor on its way (``bytes``).

    ``instead_of``: the device that failed, so that this one ran the partition.
    """

    lane: str
    name: str
    request: int
    begin_us: float
    end_us: float
    kind: str
    bytes: int | None = None
    instead_of: str = ""


@dataclass(frozen=True)
class TimelineData:
    """What ran when. ``lanes``: devices, then links; ``per_second``: requests, where there were several."""

    requests: int
    lanes: tuple[str, ...]
    marks: tuple[MarkData, ...]
    per_second: Figure | None = None


@dataclass(frozen=True)
class AccuracyData:
    """A measure on data, of the model and of a reference: a fraction (top1, top5), cosine, or dB (sqnr)."""

    metric: str
    value: float | None
    samples: int
    data: str
    against: str | None = None
    reference: float | None = None
    interval: tuple[float, float] | None = None
    reference_interval: tuple[float, float] | None = None
    disagreements: int | None = None
    outputs: Mapping[str, float | None] | None = None


@dataclass(frozen=True)
class ReportData:
    """A report. Times in milliseconds, energies in millijoules unless a name says otherwise.

    ``energy`` is without the devices of ``energy_without``, of which neither a simulator nor a power tells it.
    ``timelines``: one inference, and perhaps several requests in flight. ``splits``: by node, the output channels of
    the parts that an operator is computed in.
    """

    model: str
    objective: str
    method: str
    optimal: bool
    threads: int
    processor: str
    versions: Mapping[str, str]
    date: str
    runs: int
    latency: Figure
    predicted: Figure | None
    lower_bound: Figure | None
    energy: Figure | None
    energy_without: tuple[str, ...]
    predicted_energy: Figure | None
    single_device_ms: Mapping[str, float]
    fallback_ops: Mapping[str, int]
    splits: Mapping[str, tuple[int, ...]]
    devices: tuple[DeviceData, ...]
    regions: tuple[RegionData, ...]
    partitions: tuple[PartitionData, ...]
    borders: tuple[BorderData, ...]
    edges: tuple[EdgeData, ...]
    width: float
    height: float
    timelines: tuple[TimelineData, ...]
    accuracy: tuple[AccuracyData, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is not finite is null."""
        return {"format": FORMAT, **cast("dict[str, Any]", _plain(dataclasses.asdict(self)))}


def together(kinds: Iterable[str]) -> str:
    """How a figure is known that is made of others: all their kinds, e.g. "measured + modelled"."""
    single = {part for kind in kinds for part in kind.split(" + ")}
    return " + ".join([kind for kind in KINDS if kind in single] + sorted(single - set(KINDS)))


def total(figures: Iterable[Figure | None]) -> Figure | None:
    """The sum of some figures; None if there are none, or one of them is not known."""
    found = list(figures)
    if not found or None in found:
        return None
    known = cast("list[Figure]", found)
    return Figure(sum(each.value for each in known), together(each.kind for each in known))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast("tuple[Any, ...]", value)]
    return value
