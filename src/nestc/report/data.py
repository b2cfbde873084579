"""Collects what a report shows from an executable, which is run, and from its bundle: its graph and its plan."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nestc.bundle.bundle import Bundle, BundlePartition, DeviceSpec
from nestc.graph.region import Region
from nestc.measure.machine import cpu_name, versions
from nestc.partition.plan import Plan, PlannedPartition, PlannedRegion
from nestc.report.graph import Drawn, Graph, drawn, graph_of
from nestc.report.observe import (
    Inputs,
    Runs,
    Spent,
    Timeline,
    observe,
    pipelined,
    random_inputs,
    region_times,
)
from nestc.report.roofs import roof_of
from nestc.report.schema import (
    AccuracyData,
    DeviceData,
    Figure,
    MarkData,
    PartitionData,
    RegionData,
    ReportData,
    TimelineData,
    together,
    total,
)
from nestc.report.work import Work, numbers, total_bytes, work
from nestc.runtime.stages import CPU, CPU_KINDS

if TYPE_CHECKING:
    from nestc.runtime.executable import Executable


def collect(
    executable: Executable,
    runs: int = 10,
    inputs: Inputs | None = None,
    accuracy: Sequence[AccuracyData] = (),
    requests: int = 1,
) -> ReportData:
    """Run an executable (inputs drawn with seed 0 unless given) up to `runs` times and put together what is known.

    With `requests` above 1 there is also a timeline of that many requests in flight. Raises BundleError if its bundle
    holds no graph, PlanError if no plan, ShapeError if inputs do not fit.
    """
    bundle, plan = executable.bundle, executable.plan
    graph = graph_of(bundle)
    given = random_inputs(executable) if inputs is None else inputs
    seen = observe(executable, given, runs)
    rows = executable.profile(*(given[spec.name] for spec in bundle.inputs), runs=runs)
    timelines = [_timeline(bundle, plan, seen.typical)]
    if requests > 1:
        timelines.append(_timeline(bundle, plan, *pipelined(executable, given, requests)))
    works = {region.name: work(region, graph.weights) for region in graph.regions}
    partitions = _partitions(bundle, plan, graph, works, seen)
    drawing = drawn(graph, bundle, plan)
    return ReportData(
        model=bundle.name,
        objective=plan.objective,
        method=plan.method,
        optimal=plan.optimal,
        threads=executable.threads,
        processor=cpu_name(),
        versions=versions(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        runs=len(seen.timelines),
        latency=Figure(seen.latency_ms, together(mark["kind"] for mark in seen.typical)),
        predicted=None if plan.predicted_ms is None else Figure(plan.predicted_ms, _kind(plan)),
        lower_bound=None if plan.lower_bound_ms is None else Figure(plan.lower_bound_ms, _kind(plan)),
        energy=_energy_of(seen),
        energy_without=tuple(str(row["device"]) for row in seen.energy if row["joules"] is None),
        predicted_energy=None if plan.predicted_mj is None else Figure(plan.predicted_mj, "estimated"),
        single_device_ms=dict(plan.single_device_ms),
        fallback_ops=executable.fallback_ops,
        splits={each.node: each.channels for each in plan.splits},
        devices=_devices(bundle, plan, partitions, executable.threads),
        regions=_regions(graph, bundle, plan, works, _region_times(graph, bundle, partitions, rows), drawing),
        partitions=partitions,
        borders=drawing.borders,
        edges=drawing.edges,
        width=drawing.width,
        height=drawing.height,
        timelines=tuple(timelines),
        accuracy=tuple(accuracy),
    )


def _kind(plan: Plan) -> str:
    """How a prediction is known that is made of the costs of all regions."""
    return together(region.kind for region in plan.regions)


def _partitions(
    bundle: Bundle, plan: Plan, graph: Graph, works: Mapping[str, Work], seen: Runs
) -> tuple[PartitionData, ...]:
    by_name = {region.name: region for region in graph.regions}
    planned = {each.name: each for each in plan.partitions}
    took = seen.partition_ms()
    watts = {device.name: device.watts for device in bundle.devices}
    found: list[PartitionData] = []
    for partition in bundle.partitions:
        inside = [by_name[name] for name in partition.regions if name in by_name]
        counted = [works[region.name].operations for region in inside]
        observed = took.get(partition.name)
        time = None if observed is None else Figure(*observed)
        weights = _weights(inside, graph.weights)
        border = _border_bytes(partition, inside)
        expected = planned.get(partition.name)
        found.append(
            PartitionData(
                name=partition.name,
                device=partition.device,
                regions=partition.regions,
                operations=None if None in counted else sum(each for each in counted if each is not None),
                bytes=None if border is None or weights is None else border + weights,
                weights=weights,
                observed=time,
                predicted=_span(expected, plan),
                begin_ms=None if expected is None else expected.begin_ms,
                end_ms=None if expected is None else expected.end_ms,
                energy=_energy(partition, time, watts.get(partition.device, 0.0)),
            )
        )
    return tuple(found)


def _span(planned: PlannedPartition | None, plan: Plan) -> Figure | None:
    """What the plan says that a partition takes."""
    if planned is None or planned.begin_ms is None or planned.end_ms is None:
        return None
    inside = set(planned.regions)
    kinds = together(region.kind for region in plan.regions if region.name in inside)
    return Figure(planned.end_ms - planned.begin_ms, kinds)


def _weights(regions: Sequence[Region], weights: Collection[str]) -> int | None:
    """Bytes of the constants of some regions, each counted once."""
    types = {name: kind for region in regions for name, kind in region.types.items()}
    names = {name for region in regions for name in region.constants}
    return total_bytes(types, names | {name for region in regions for name in region.inputs if name in weights})


def _border_bytes(partition: BundlePartition, regions: Sequence[Region]) -> int | None:
    types = {name: kind for region in regions for name, kind in region.types.items()}
    names = [*partition.inputs, *(spec.name for spec in partition.outputs)]
    return None if any(name not in types for name in names) else total_bytes(types, names)


def _energy(partition: BundlePartition, observed: Figure | None, watts: float) -> Figure | None:
    """In millijoules: what a simulator says, or else the power that the device's description assumes, times time."""
    timing: Mapping[str, Any] = partition.artifact.metadata.get("timing") or {}
    if "energy_joules" in timing:
        return Figure(1e3 * float(timing["energy_joules"]), "modelled")
    return Figure(observed.value * watts, "estimated") if observed is not None and watts else None


def _region_times(
    graph: Graph, bundle: Bundle, partitions: Sequence[PartitionData], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Spent]:
    """Times of the regions, and energies: a simulator's, all of the partition's if alone in it, or power times time."""
    by_name = {region.name: region for region in graph.regions}
    watts = {device.name: device.watts for device in bundle.devices}
    found: dict[str, Spent] = {}
    for partition, known in zip(bundle.partitions, partitions, strict=True):
        if known.observed is None:
            continue
        inside = [by_name[name] for name in partition.regions if name in by_name]
        here = [row for row in rows if row["partition"] == partition.name]
        whole = Spent(known.observed.value, known.observed.kind, known.energy, "its partition, in which it is alone")
        for name, spent in region_times(partition, inside, here, whole).items():
            energy = spent.energy or (known.energy if len(inside) == 1 else None)
            if energy is None and spent.kind == "measured" and watts.get(partition.device):
                energy = Figure(spent.ms * watts[partition.device], "estimated")
            found[name] = dataclasses.replace(spent, energy=energy)
    return found


def _regions(
    graph: Graph,
    bundle: Bundle,
    plan: Plan,
    works: Mapping[str, Work],
    times: Mapping[str, Spent],
    drawing: Drawn,
) -> tuple[RegionData, ...]:
    planned = {region.name: region for region in plan.regions}
    home = {name: (part.name, part.device) for part in bundle.partitions for name in part.regions}
    found: list[RegionData] = []
    for region in graph.regions:
        about = planned.get(region.name, PlannedRegion(region.name, "", ()))
        partition, device = home.get(region.name, ("", about.device))
        counted, took = works[region.name], times.get(region.name)
        x, y = drawing.places[region.name]
        found.append(
            RegionData(
                name=region.name,
                device=device,
                partition=partition,
                ops=tuple(op.op_type for op in region.ops),
                nodes=tuple(op.name for op in region.ops),
                outputs=region.outputs,
                numbers=numbers(region),
                operations=counted.operations,
                bytes_in=counted.bytes_in,
                bytes_out=counted.bytes_out,
                weights=counted.weights,
                observed=None if took is None else Figure(took.ms, took.kind),
                about="only its partition as a whole was timed" if took is None else took.about,
                predicted=None if about.predicted_ms is None else Figure(about.predicted_ms, about.kind),
                energy=None if took is None else took.energy,
                costs={name: Figure(each.ms, each.kind) for name, each in about.costs.items()},
                reason=about.reason,
                refusals=dict(about.refusals),
                x=x,
                y=y,
            )
        )
    return tuple(found)


def _devices(bundle: Bundle, plan: Plan, partitions: Sequence[PartitionData], threads: int) -> tuple[DeviceData, ...]:
    """Every device that takes something, in the plan's order."""
    specs = {device.name: device for device in bundle.devices}
    names = dict.fromkeys([*plan.devices, *(each.device for each in partitions)])
    found: list[DeviceData] = []
    for name in names:
        own = [each for each in partitions if each.device == name]
        artifacts = [each.artifact for each in bundle.partitions if each.device == name]
        if not own:
            continue
        spec = specs.get(name) or DeviceSpec(name, CPU if artifacts[0].kind in CPU_KINDS else name)
        busy = total(each.observed for each in own)
        found.append(
            DeviceData(
                name=name,
                kind="" if busy is None else busy.kind,
                resource=spec.resource,
                regions=sum(len(each.regions) for each in own),
                partitions=len(own),
                busy=busy,
                energy=total(each.energy for each in own),
                link=_link(spec) if spec.bytes_per_second else "",
                roof=roof_of(artifacts, spec.resource, threads),
            )
        )
    return tuple(found)


def _link(spec: DeviceSpec) -> str:
    """How a device is reached, in words."""
    launch = [f"a launch {spec.launch_seconds * 1e6:g} us"] if spec.launch_seconds else []
    latency = f"{spec.latency_seconds * 1e6:g} us and " if spec.latency_seconds else ""
    tensor = f"a tensor {latency}its bytes at {spec.bytes_per_second / 1e9:g} GB/s ({spec.kind})"
    return ", ".join([*launch, tensor])


def _energy_of(seen: Runs) -> Figure | None:
    """Of one inference, links included, as far as it is known."""
    return total(
        Figure(1e3 * float(row["joules"]), str(row["kind"])) for row in seen.energy if row["joules"] is not None
    )


def _timeline(bundle: Bundle, plan: Plan, timeline: Timeline, per_second: Figure | None = None) -> TimelineData:
    used = dict.fromkeys(str(mark["device"]) for mark in timeline)
    known = dict.fromkeys([*plan.devices, *(part.device for part in bundle.partitions)])
    marks = tuple(
        MarkData(
            lane=str(mark["device"]),
            name=str(mark["region"]),
            request=int(mark["request"]),
            begin_us=float(mark["start_us"]),
            end_us=float(mark["end_us"]),
            kind=str(mark["kind"]),
            bytes=mark.get("bytes"),
            instead_of=str(mark.get("instead_of", "")),
        )
        for mark in timeline
    )
    lanes = (*(name for name in known if name in used), *(name for name in used if name not in known))
    return TimelineData(len({mark.request for mark in marks}), lanes, marks, per_second)
