"""From devices chosen for regions to partitions, and to the plan that describes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from nestc.errors import PlanError, UnsupportedOp
from nestc.graph.model import Model
from nestc.graph.region import Region
from nestc.graph.regions import form, submodel
from nestc.graph.regions import regions as read
from nestc.partition.group import order, partitions, runs
from nestc.partition.match import Claim, ask, refused
from nestc.partition.plan import Plan, PlannedPartition, PlannedRegion, Transfer
from nestc.partition.problem import HOST, Objective
from nestc.partition.sizes import constant_bytes, nbytes
from nestc.partition.split import Split, split
from nestc.targets.api import Link, Offer, Partition, Target


@dataclass(frozen=True)
class Placed:
    """A formed model, its partitions in execution order, and the plan."""

    formed: Model
    partitions: tuple[Partition, ...]
    plan: Plan


def place(
    formed: Model, claims: Sequence[Claim], targets: Sequence[Target], objective: str, cuts: Sequence[str] = ()
) -> Placed:
    """Partitions of a formed model by who claimed what: as few as list scheduling finds. `cuts`: as it was formed with.

    Raises UnsupportedOp if a region found no target, with every target's reason.
    """
    device: dict[str, str] = {}
    for each in claims:
        if each.target is None:
            raise UnsupportedOp(refused(each))
        device[each.region.name] = each.target
    grouped = runs(order([each.region for each in claims], device), device)
    by_name = {each.region.name: _claimed(each) for each in claims}
    placed = assemble(formed, grouped, device, by_name, targets, objective)
    return replace(placed, plan=replace(placed.plan, cuts=tuple(cuts)))


def assemble(
    formed: Model,
    grouped: Sequence[Sequence[Region]],
    device: Mapping[str, str],
    planned: Mapping[str, PlannedRegion],
    targets: Sequence[Target],
    objective: str,
) -> Placed:
    """Partitions of groups of regions, and a plan whose sum of region times is its prediction."""
    made = partitions(grouped, device, formed.outputs, lambda names: submodel(formed, names))
    links = {target.name: target.machine.link for target in targets}
    rows = tuple(planned[region.name] for group in grouped for region in group)
    known = [row.predicted_ms for row in rows if row.predicted_ms is not None]
    plan = Plan(
        model=formed.ir.graph.name or "model",
        objective=objective,
        devices=tuple(target.name for target in targets),
        regions=rows,
        partitions=tuple(
            PlannedPartition(p.name, p.device, tuple(region.name for region in p.regions), p.inputs, p.outputs)
            for p in made
        ),
        transfers=_transfers(made, formed, links),
        predicted_ms=sum(known) if len(known) == len(rows) else None,
    )
    return Placed(formed, tuple(made), plan)


def follow(plan: Plan, model: Model, targets: Sequence[Target]) -> Placed:
    """What a given plan asks for of a `model` that is not formed yet.

    Its devices count, and its partitions too as long as they agree with these. Raises PlanError if the plan is of
    another model, names an unknown target or one that refuses a region, is cyclic, or exceeds a device's memory.
    """
    if plan.splits:
        model = split(model, [Split(each.node, each.channels) for each in plan.splits], read(form(model)))
    formed = form(model, cuts=plan.cuts)
    regions = read(formed)
    _require_sound(plan, {op.name for region in regions for op in region.ops})
    wanted = {region.name: region for region in plan.regions}
    by_name = {target.name: target for target in targets}
    device: dict[str, str] = {}
    for region in regions:
        if region.name not in wanted:
            raise PlanError(f"the plan says nothing of region {region.name}; it is of another model or other shapes")
        name = wanted[region.name].device
        if name not in by_name:
            known = ", ".join(by_name)
            raise PlanError(f"the plan puts region {region.name} on {name!r}, which is not among the targets ({known})")
        answer = ask(region, by_name[name])
        if not isinstance(answer, Offer):
            raise PlanError(f"the plan puts region {region.name} on {name!r}, which refuses: {answer}")
        device[region.name] = name
    extra = sorted(set(wanted) - set(device))
    if extra:
        raise PlanError(f"the plan has a region {extra[0]} that the model does not have")
    _require_memory(regions, device, by_name)
    grouped = _planned_groups(plan, {region.name: region for region in regions}, device)
    if grouped is None:
        grouped = runs(order(regions, device), device)
    placed = assemble(formed, grouped, device, wanted, targets, plan.objective)
    kept = replace(plan, transfers=placed.plan.transfers, devices=placed.plan.devices, method="by a plan given")
    if _shape(placed.plan) != _shape(plan):
        # The prediction was made for other partitions; of these nobody has said anything.
        kept = replace(kept, partitions=placed.plan.partitions, predicted_ms=None, predicted_mj=None)
        kept = replace(kept, lower_bound_ms=None, optimal=False)
    return Placed(formed, placed.partitions, kept)


def _require_sound(plan: Plan, nodes: Collection[str]) -> None:
    """Raise PlanError for what no plan of a model with these nodes says."""
    if plan.objective not in get_args(Objective):
        raise PlanError(f"the plan is for objective {plan.objective!r}; there are {', '.join(get_args(Objective))}")
    unknown = next((name for name in plan.cuts if name not in nodes), None)
    if unknown is not None:
        raise PlanError(f"the plan cuts after node {unknown!r}, which the model does not have")
    for what, names in (
        ("region", [region.name for region in plan.regions]),
        ("partition", [partition.name for partition in plan.partitions]),
    ):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PlanError(f"the plan has {what} {twice!r} twice; leave one of them out")
    empty = next((partition.name for partition in plan.partitions if not partition.regions), None)
    if empty is not None:
        raise PlanError(f"partition {empty!r} of the plan has no regions; leave it out")


def _shape(plan: Plan) -> list[tuple[str, frozenset[str]]]:
    return [(partition.device, frozenset(partition.regions)) for partition in plan.partitions]


def _planned_groups(plan: Plan, regions: Mapping[str, Region], device: Mapping[str, str]) -> list[list[Region]] | None:
    """The plan's own partitions in an order in which they can run; None if it has none, or a region has changed its
    device since.

    Raises PlanError if they leave a region out, have one twice, or wait for each other.
    """
    if not plan.partitions:
        return None
    listed = [name for partition in plan.partitions for name in partition.regions]
    missing = sorted(set(regions) - set(listed))
    twice = next((name for name in listed if listed.count(name) > 1), None)
    if missing or twice is not None or len(listed) > len(regions):
        what = f"has region {twice} twice" if twice is not None else "leaves out or adds regions"
        raise PlanError(f"the partitions of the plan are not those of its regions: the plan {what}")
    if any(device[name] != partition.device for partition in plan.partitions for name in partition.regions):
        return None
    maker = {value: region.name for region in regions.values() for value in region.outputs}
    place = {name: index for index, partition in enumerate(plan.partitions) for name in partition.regions}
    waits = [
        {
            place[maker[value]]
            for name in partition.regions
            for value in regions[name].inputs
            if value in maker and place[maker[value]] != index
        }
        for index, partition in enumerate(plan.partitions)
    ]
    done: list[int] = []
    while len(done) < len(waits):
        ready = next((i for i in range(len(waits)) if i not in done and waits[i] <= set(done)), None)
        if ready is None:
            stuck = [plan.partitions[i].name for i in range(len(waits)) if i not in done]
            raise PlanError(f"the plan is cyclic: partitions {', '.join(stuck)} wait for each other")
        done.append(ready)
    return [order([regions[name] for name in plan.partitions[i].regions], device) for i in done]


def _require_memory(regions: Sequence[Region], device: Mapping[str, str], targets: Mapping[str, Target]) -> None:
    """Raise PlanError if the constants placed on a device are more than it holds."""
    for name, target in targets.items():
        capacity = target.machine.capacity_bytes
        needed = constant_bytes([region for region in regions if device[region.name] == name])
        if capacity and needed > capacity:
            raise PlanError(f"the plan puts {needed} bytes of constants on {name!r}, which holds {capacity}")


def _claimed(each: Claim) -> PlannedRegion:
    cost = each.offer.cost if each.offer is not None else None
    return PlannedRegion(
        name=each.region.name,
        device=each.target or "",
        ops=tuple(op.op_type for op in each.region.ops),
        nodes=tuple(op.name for op in each.region.ops),
        refusals=dict(each.refusals),
        predicted_ms=None if cost is None else cost(each.region) * 1e3,
        reason="the first of the targets given that takes it",
    )


def _transfers(made: Sequence[Partition], formed: Model, links: Mapping[str, Link]) -> tuple[Transfer, ...]:
    """Every value that crosses from one device to another, once for each reading device; also to and from the host
    where that takes time."""
    maker = {name: partition for partition in made for name in partition.outputs}
    found: dict[tuple[str, str], Transfer] = {}

    def add(name: str, source: str, destination: str, partition: Partition) -> None:
        ends = [links[each] for each in (source, destination) if each != HOST]
        size = nbytes(partition.types.get(name))
        seconds = sum(link.seconds(size) for link in ends)
        if HOST not in (source, destination) or seconds:
            kind = next((link.kind for link in ends if link.seconds(size)), "measured")
            found.setdefault((name, destination), Transfer(name, source, destination, size, seconds * 1e6, kind))

    for partition in made:
        for name in partition.inputs:
            source = maker[name].device if name in maker else HOST
            if source != partition.device:
                add(name, source, partition.device, partition)
    for name in formed.outputs:
        if name in maker:
            add(name, maker[name].device, HOST, maker[name])
    return tuple(found.values())
