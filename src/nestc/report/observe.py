"""Runs a bundle and says how long each partition and each region took, and how that is known."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from nestc.bundle.bundle import BundlePartition
from nestc.bundle.dtypes import numpy_dtype
from nestc.errors import ShapeError
from nestc.graph.region import Region
from nestc.report.schema import Figure, total
from nestc.report.work import operations

if TYPE_CHECKING:
    from nestc.runtime.executable import Executable

ENOUGH_SECONDS = 5.0
"""Runs beyond this are left out: a simulator may take long for a time that never varies."""

Inputs = Mapping[str, np.ndarray]
Timeline = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Spent:
    """Milliseconds and how they are known, energy in millijoules if it is known, and what was timed, in words."""

    ms: float
    kind: str
    energy: Figure | None = None
    about: str = ""


@dataclass(frozen=True)
class Runs:
    """Timelines of some runs, after one that warmed up, and the energy of the last (`Executable.energy`)."""

    timelines: tuple[Timeline, ...]
    energy: tuple[Mapping[str, Any], ...] = ()

    @property
    def typical(self) -> Timeline:
        """The timeline whose latency is the median (the lower one of two)."""
        return sorted(self.timelines, key=latency_ms)[(len(self.timelines) - 1) // 2]

    @property
    def latency_ms(self) -> float:
        """The median latency."""
        return median(map(latency_ms, self.timelines))

    def partition_ms(self) -> dict[str, tuple[float, str]]:
        """Median time of each partition, by name, and how it is known."""
        spans: dict[str, list[float]] = {}
        kinds: dict[str, str] = {}
        for timeline in self.timelines:
            for mark in partitions_only(timeline):
                spans.setdefault(mark["region"], []).append((mark["end_us"] - mark["start_us"]) / 1e3)
                kinds[mark["region"]] = mark["kind"]
        return {name: (median(found), kinds[name]) for name, found in spans.items()}


def partitions_only(timeline: Timeline) -> list[Mapping[str, Any]]:
    """The marks that are no tensors on their way."""
    return [mark for mark in timeline if "bytes" not in mark]


def latency_ms(timeline: Timeline) -> float:
    """When the last mark ends."""
    return max((mark["end_us"] for mark in timeline), default=0.0) / 1e3


def observe(executable: Executable, inputs: Inputs, runs: int) -> Runs:
    """Run once to warm up and then up to `runs` times; fewer if that takes long, but at least once."""
    executable.run(inputs)
    begin = time.perf_counter()
    timelines: list[Timeline] = []
    while len(timelines) < max(1, runs) and (not timelines or time.perf_counter() - begin < ENOUGH_SECONDS):
        executable.run(inputs)
        timelines.append(tuple(executable.timeline()))
    return Runs(tuple(timelines), tuple(executable.energy()))


def pipelined(executable: Executable, inputs: Inputs, requests: int) -> tuple[Timeline, Figure]:
    """The timeline of equal requests that are all in flight at once, and how many of them are done a second."""
    for _ in executable.map([inputs] * requests, in_flight=requests):
        pass
    done = executable.throughput()
    return tuple(executable.timeline()), Figure(float(done["per_second"]), str(done["kind"]))


def random_inputs(executable: Executable) -> dict[str, np.ndarray]:
    """Inputs drawn with seed 0: floats normally distributed, all else 0. Raises ShapeError if a size is open."""
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name, (dtype, shape) in executable.inputs.items():
        sizes = [size for size in shape if isinstance(size, int)]
        if len(sizes) < len(shape):
            raise ShapeError(f"input {name!r} has no fixed shape; give it with --input {name}=FILE")
        kind = numpy_dtype(dtype)
        floats = dtype.startswith(("float", "bfloat"))
        arrays[name] = generator.standard_normal(sizes).astype(kind) if floats else np.zeros(sizes, kind)
    return arrays


def region_times(
    partition: BundlePartition, regions: Sequence[Region], rows: Sequence[Mapping[str, Any]], whole: Spent
) -> dict[str, Spent]:
    """Times of the regions of a partition, by name, as far as they are known one by one.

    `rows` are those of `Executable.profile` for this partition, `whole` what all of it took.
    """
    timing: Mapping[str, Any] | None = partition.artifact.metadata.get("timing")
    found: dict[str, Spent] = {}
    if timing and timing.get("layers"):
        found = _modelled(timing, partition.artifact.metadata, regions)
    elif any(row.get("origin") for row in rows):
        found = _measured(regions, rows)
    return {regions[0].name: whole} if not found and len(regions) == 1 else found


def _modelled(timing: Mapping[str, Any], metadata: Mapping[str, Any], regions: Sequence[Region]) -> dict[str, Spent]:
    """From the layers that a simulator has timed; a layer is named after its region, or begins with its name."""
    units, clock = _clock(timing, metadata)
    apart = ", without what the host does between them" if timing.get("host_seconds") else ""
    found: dict[str, Spent] = {}
    if not clock:
        return found
    names = sorted((region.name for region in regions), key=len, reverse=True)
    for layer in timing["layers"]:
        name = next((name for name in names if str(layer["name"]).startswith(name)), None)
        if name is None:
            continue
        ms, joules = 1e3 * float(layer[units]) / clock, layer.get("energy_joules")
        energy = None if joules is None else Figure(1e3 * float(joules), "modelled")
        before = found.get(name)
        if before is not None:
            ms, energy = ms + before.ms, total([before.energy, energy])
        found[name] = Spent(ms, "modelled", energy, f"its layers in the simulator{apart}")
    return found


def _clock(timing: Mapping[str, Any], metadata: Mapping[str, Any]) -> tuple[str, float]:
    """What a simulator counts its layers in, and how many of that are a second (0: not known)."""
    if "cycles" in timing:
        return "cycles", float(metadata.get("clock_hz", 0))
    seconds = float(timing.get("memory_seconds", 0))
    return "ticks", timing.get("ticks", 0) / seconds if seconds else 0.0


def _measured(regions: Sequence[Region], rows: Sequence[Mapping[str, Any]]) -> dict[str, Spent]:
    """From the kernels of native code, each of which names the nodes that it computes."""
    origins = [frozenset(region.origin) for region in regions]
    spent: dict[str, float] = {}
    shared: set[str] = set()
    at = 0
    for row in rows:
        places = regions_of(frozenset(row.get("origin") or ()), origins, at)
        if not places:
            continue
        at = places[0]
        took = row["us"] if row.get("team_us") is None else row["team_us"]
        here = [regions[place] for place in places]
        for region, share in zip(here, _shares(here), strict=True):
            spent[region.name] = spent.get(region.name, 0.0) + share * took / 1e3
        if len(here) > 1:
            shared.update(region.name for region in here)
    about = ("its kernels, one by one", "its share, by operations, of a kernel that computes several regions")
    return {name: Spent(ms, "measured", about=about[name in shared]) for name, ms in spent.items()}


def _shares(regions: Sequence[Region]) -> list[float]:
    """The parts of the operations of some regions that each has; equal ones where they are not known."""
    counts = [[operations(op, region.types) for op in region.ops] for region in regions]
    sums = [sum(count or 0 for count in each) for each in counts]
    whole = sum(sums)
    return [each / whole for each in sums] if whole else [1 / len(regions)] * len(regions)


def regions_of(nodes: frozenset[str], origins: Sequence[frozenset[str]], at: int) -> list[int]:
    """The places of the regions (by the nodes of each) that a kernel of these nodes computes: of the one that it is a
    part of, or of several that it is all of.

    Kernels come in the order of their regions, so that of several regions with equal names the next one from `at`
    counts.
    """
    order = (*range(at, len(origins)), *range(at))
    one = next((number for number in order if nodes and nodes <= origins[number]), None)
    if one is not None:
        return [one]
    inside = [number for number in order if origins[number] and origins[number] <= nodes]
    left, found = set(nodes), list[int]()
    for number in inside:
        if origins[number] <= left:
            left -= origins[number]
            found.append(number)
    return [] if left else sorted(found)
