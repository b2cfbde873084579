"""A roofline for each kernel of an executable: what it took, what its work takes at least here, and what is between."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from nestc.graph.region import Op, Region
from nestc.report.graph import Graph, graph_of
from nestc.report.observe import regions_of
from nestc.report.roofs import Bandwidth, Roof, bandwidths, processor
from nestc.report.work import nbytes, numbers, operations, together, work
from nestc.runtime.stages import CPU

if TYPE_CHECKING:
    from nestc.runtime.executable import Executable
    from nestc.specialise import Specialised

PICKING = frozenset({"Gather", "GatherElements", "GatherND", "Slice", "Split"})
"""Of what these take elements from, only those taken count as read."""

LAYOUT = "Identity:layout_"
"""How the CPU target names copies that only change a layout: no node asks for them, so all of their time is lost."""


@dataclass(frozen=True)
class Call:
    """One call of native code, and its median time in milliseconds."""

    symbol: str
    ms: float


@dataclass(frozen=True)
class Kernel:
    """What computes some nodes: one call or several in a row (a transform and a product, say).

    ``shape``: of the data and of the weights that go in, and of what comes out. ``operations`` are those of the nodes
    by definition (a Winograd convolution does fewer, and may so lie above the roof), ``weights`` and ``data`` bytes
    that cross the border. ``roof``: the limit that counts, ``float32`` (or another format), ``bytes``, or ``nothing``
    where no node needs the kernel; ``roof_ms``: the time at that limit. What is not known is None; ``modelled`` times
    have no roof here.
    """

    name: str
    calls: tuple[Call, ...]
    device: str
    nodes: tuple[str, ...]
    shape: str
    ms: float
    modelled: bool = False
    operations: int | None = None
    data: int | None = None
    weights: int | None = None
    roof: str = ""
    roof_ms: float | None = None

    @property
    def percent(self) -> float | None:
        """The roof's time as a share of the kernel's, in percent."""
        return None if self.roof_ms is None or not self.ms else 100 * self.roof_ms / self.ms

    @property
    def above_ms(self) -> float | None:
        """Milliseconds that could be saved at most; 0 where the kernel is faster than its roof."""
        return None if self.roof_ms is None else max(0.0, self.ms - self.roof_ms)

    @property
    def gflops(self) -> float | None:
        """Billions of operations a second."""
        return None if self.operations is None or not self.ms else self.operations / self.ms / 1e6

    @property
    def gbytes(self) -> float | None:
        """Billions of bytes a second."""
        return None if self.data is None or self.weights is None or not self.ms else self.bytes / self.ms / 1e6

    @property
    def bytes(self) -> int:
        """All that crosses the border, as far as it is known."""
        return (self.data or 0) + (self.weights or 0)


@dataclass(frozen=True)
class Limits:
    """What this processor does at most with some threads: operations by format, bytes by how many there are."""

    threads: int
    roof: Roof
    bandwidths: tuple[Bandwidth, ...]

    def per_second(self, format_: str) -> float:
        """Operations a second in a number format; of those not measured, the float32 one."""
        found = {ceiling.numbers: ceiling.per_second for ceiling in self.roof.ceilings}
        return found.get(format_, found["float32"])

    def seconds(self, amount: int, within: int) -> float:
        """Seconds to move `amount` bytes that are used with others; `within`, bytes in all, decides in which cache."""
        return amount / next((b.per_second for b in self.bandwidths if within <= b.bytes), self.roof.bytes_per_second)


@dataclass(frozen=True)
class Roofline:
    """Kernels, worst (most milliseconds above its roof) first, and the model's operations by definition."""

    kernels: tuple[Kernel, ...]
    limits: Limits
    operations: int | None
    numbers: str

    @property
    def ms(self) -> float:
        """All kernels one after another."""
        return sum(kernel.ms for kernel in self.kernels)

    def percent_of_peak(self, ms: float) -> float | None:
        """Percent of the arithmetic peak that a run of `ms` milliseconds is; above 100 with Winograd."""
        if self.operations is None or not ms:
            return None
        return 100 * self.operations / (ms / 1e3) / self.limits.per_second(self.numbers)

    def as_json(self, latency_ms: float | None = None) -> dict[str, Any]:
        """Plain values; `latency_ms` is what a whole run takes, measured without looking at the kernels."""
        took = self.ms if latency_ms is None else latency_ms
        above = [kernel.above_ms for kernel in self.kernels if kernel.above_ms is not None]
        return {
            "roofs": {
                "threads": self.limits.threads,
                "gflops": {ceiling.numbers: ceiling.per_second / 1e9 for ceiling in self.limits.roof.ceilings},
                "gbytes_per_second": {str(each.bytes): each.per_second / 1e9 for each in self.limits.bandwidths}
                | {"memory": self.limits.roof.bytes_per_second / 1e9},
            },
            "kernels": [_json(kernel) for kernel in self.kernels],
            "total": {
                "ms": self.ms,
                "latency_ms": latency_ms,
                "gflop": None if self.operations is None else self.operations / 1e9,
                "gflops": None if self.operations is None or not took else self.operations / took / 1e6,
                "percent_of_peak": self.percent_of_peak(took),
                "roof_ms": sum(kernel.roof_ms for kernel in self.kernels if kernel.roof_ms is not None),
                "above_roof_ms": sum(above),
            },
        }


def roofline(
    executable: Executable | Specialised,
    arrays: Sequence[np.ndarray] = (),
    runs: int = 20,
    limits: Limits | None = None,
) -> Roofline:
    """Time the kernels of an executable (see `Executable.profile`) and compare each with its roof.

    The roofs are measured now (a few seconds) unless `limits` are given. Raises BundleError if the bundle has no graph.
    """
    graph = graph_of(executable.bundle)
    stats = executable.stats()
    limits = limits_of(int(stats["threads"])) if limits is None else limits
    rows = executable.profile(*arrays, runs=runs)
    resources = {device.name: device.resource for device in executable.bundle.devices}
    found = _kernels(rows, graph, limits, int(stats["weights_bytes"]), resources)
    counted = [work(region, graph.weights).operations for region in graph.regions]
    known = [(count, numbers(region)) for count, region in zip(counted, graph.regions, strict=True) if count]
    totals: dict[str, int] = {}
    for count, format_ in known:
        totals[format_] = totals.get(format_, 0) + count
    return Roofline(
        tuple(sorted(found, key=_worth, reverse=True)),
        limits,
        sum(totals.values()) if totals else None,
        max(totals, key=lambda format_: totals[format_]) if totals else "float32",
    )


def _worth(kernel: Kernel) -> tuple[bool, float, float]:
    """What could be saved; without a roof, the time."""
    return kernel.above_ms is not None, kernel.above_ms or 0.0, kernel.ms


def limits_of(threads: int) -> Limits:
    """The limits of this processor, measured now."""
    return Limits(threads, processor(threads), bandwidths(threads))


def _kernels(
    rows: Sequence[Mapping[str, Any]], graph: Graph, limits: Limits, model: int, resources: Mapping[str, str]
) -> list[Kernel]:
    """Kernels in the order in which they run. `model`: bytes of all weights, which share the caches."""
    origins = [frozenset(region.origin) for region in graph.regions]
    found: list[Kernel] = []
    at = 0
    for (device, origin), group in groupby(rows, _source):
        members = list(group)
        calls = tuple(Call(str(row.get("symbol", "")), _ms(row)) for row in members)
        name = max(calls, key=lambda call: call.ms).symbol
        ms = sum(call.ms for call in calls)
        places = regions_of(frozenset(origin), origins, at)
        modelled = any(row.get("kind") == "modelled" for row in members)
        if not places and origin and all(node.startswith(LAYOUT) for node in origin):
            found.append(Kernel(name, calls, device, origin, "", ms, False, roof="nothing", roof_ms=0.0))
            continue
        if not places or modelled or resources.get(device, CPU) != CPU:
            found.append(Kernel(name, calls, device, origin, "", ms, modelled))
            continue
        at = places[0]
        region = together([graph.regions[place] for place in places])
        ops = [op for op in region.ops if f"{op.op_type}:{op.name}" in origin]
        amount = _Amount.of(region, ops, graph.weights)
        roof, roof_ms = _bound(amount, numbers(region), limits, model)
        found.append(
            Kernel(
                name, calls, device, origin, _shape(region, ops, graph.weights), ms, False,
                amount.operations, amount.data, amount.weights, roof, roof_ms,
            )
        )  # fmt: skip
    return found


def _source(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The device of a row, and the nodes that it computes."""
    return str(row["device"]), tuple(str(node) for node in row.get("origin") or ())


def _ms(row: Mapping[str, Any]) -> float:
    """What a row took, with all threads if there are several."""
    return (row["us"] if row.get("team_us") is None else row["team_us"]) / 1e3


@dataclass(frozen=True)
class _Amount:
    """Operations and bytes of some nodes of a region."""

    operations: int | None
    data: int | None
    weights: int | None

    @staticmethod
    def of(region: Region, ops: Sequence[Op], constants: Collection[str]) -> _Amount:
        counts = [operations(op, region.types) for op in ops]
        made = {name for op in ops for name in op.outputs if name}
        used = dict.fromkeys(name for op in ops for name in op.inputs if name and name not in made)
        elsewhere = {name for op in region.ops if op not in ops for name in op.inputs}
        data = [nbytes(region.types[name]) for name in made if name in region.outputs or name in elsewhere]
        weights: list[int | None] = []
        for name in used:
            if name not in region.types:
                continue
            (weights if name in region.constants or name in constants else data).append(_read(region, ops, name))
        return _Amount(_total(counts), _total(data), _total(weights))


def _read(region: Region, ops: Sequence[Op], name: str) -> int | None:
    """Bytes of a value that some nodes read."""
    whole = nbytes(region.types[name])
    users = [op for op in ops if name in op.inputs]
    if whole is None or not all(op.op_type in PICKING and op.input(0) == name for op in users):
        return whole
    picked = _total([nbytes(region.types[out]) for op in users for out in op.outputs if out in region.types])
    return whole if picked is None else min(whole, picked)


def _total(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(count for count in counts if count is not None)


def _bound(amount: _Amount, format_: str, limits: Limits, model: int) -> tuple[str, float | None]:
    """The limit that counts and its time in milliseconds: of arithmetic, or of bytes.

    Data comes from and goes to the smallest cache that holds it; weights come from where those of the whole model fit.
    """
    if amount.operations is None or amount.data is None or amount.weights is None:
        return "", None
    arithmetic = amount.operations / limits.per_second(format_)
    moving = limits.seconds(amount.data, amount.data) + limits.seconds(amount.weights, max(model, amount.weights))
    return (format_ or "float32", 1e3 * arithmetic) if arithmetic >= moving else ("bytes", 1e3 * moving)


def _shape(region: Region, ops: Sequence[Op], constants: Collection[str]) -> str:
    """The largest data and weights that go in, and what comes out last, as ``1x3x8x8 * 4x3x3x3 -> 1x4x8x8``."""
    made = {name for op in ops for name in op.outputs}
    used = [name for op in ops for name in op.inputs if name in region.types and name not in made]
    weights = [name for name in used if name in region.constants or name in constants]

    def largest(names: Sequence[str]) -> str:
        best = max(names, key=lambda name: nbytes(region.types[name]) or 0)
        return "x".join(map(str, region.types[best].shape)) or "scalar"

    ends = [name for name in ops[-1].outputs if name in region.types] if ops else []
    data = [name for name in used if name not in weights]
    parts = [largest(names) for names in (data, weights) if names]
    return " * ".join(parts) + (f" -> {largest(ends)}" if ends else "")


def _json(kernel: Kernel) -> dict[str, Any]:
    return {
        "name": kernel.name,
        "calls": [{"symbol": call.symbol, "ms": call.ms} for call in kernel.calls],
        "device": kernel.device,
        "nodes": list(kernel.nodes),
        "shape": kernel.shape,
        "ms": kernel.ms,
        "modelled": kernel.modelled,
        "operations": kernel.operations,
        "bytes": kernel.bytes if kernel.gbytes is not None else None,
        "gflops": kernel.gflops,
        "gbytes_per_second": kernel.gbytes,
        "roof": kernel.roof,
        "roof_ms": kernel.roof_ms,
        "percent_of_roof": kernel.percent,
        "above_roof_ms": kernel.above_ms,
    }
