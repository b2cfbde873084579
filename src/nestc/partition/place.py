"""Placement: from claims (or a plan that somebody wrote) to partitions and the plan that describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from nestc.errors import PlanError, TargetError, UnsupportedOp
from nestc.graph.model import Model
from nestc.graph.region import TensorType
from nestc.graph.regions import submodel
from nestc.partition.group import order, partitions
from nestc.partition.match import Claim, claim
from nestc.partition.plan import Plan, PlannedPartition, PlannedRegion, Transfer
from nestc.targets.api import Partition, Target


def place(
    model: Model, claims: Sequence[Claim], targets: Sequence[Target], objective: str
) -> tuple[list[Partition], Plan]:
    """Partitions of a formed model, and the plan, of claims that all found a target.

    Raises UnsupportedOp if a region found none, with every target's reason.
    """
    device: dict[str, str] = {}
    for each in claims:
        if each.target is None:
            raise UnsupportedOp(refused(each))
        device[each.region.name] = each.target
    by_name = {each.region.name: each for each in claims}
    ordered = order([each.region for each in claims], device)
    made = partitions(ordered, device, model.outputs, lambda names: submodel(model, names))
    planned = [_planned_region(by_name[region.name]) for region in ordered]
    known = [region.predicted_ms for region in planned if region.predicted_ms is not None]
    plan = Plan(
        model=model.ir.graph.name or "model",
        objective=objective,
        devices=tuple(target.name for target in targets),
        regions=tuple(planned),
        partitions=tuple(
            PlannedPartition(p.name, p.device, tuple(region.name for region in p.regions), p.inputs, p.outputs)
            for p in made
        ),
        transfers=_transfers(made),
        predicted_ms=sum(known) if len(known) == len(planned) else None,
    )
    return made, plan


def follow(plan: Plan, claims: Sequence[Claim], targets: Sequence[Target]) -> list[Claim]:
    """The claims that a given plan asks for instead.

    Raises PlanError if the plan is of another model, names a target that is not given, or one that refuses a region.
    """
    wanted = {region.name: region.device for region in plan.regions}
    by_name = {target.name: target for target in targets}
    chosen: list[Claim] = []
    for each in claims:
        name = each.region.name
        if name not in wanted:
            raise PlanError(f"the plan says nothing of region {name}; it is of another model or other shapes")
        if wanted[name] not in by_name:
            raise PlanError(f"the plan puts region {name} on {wanted[name]!r}, which is not among the targets given")
        moved = claim(each.region, [by_name[wanted[name]]])
        if moved.target is None:
            raise PlanError(f"the plan puts region {name} on {wanted[name]!r}, which refuses: {moved.refusals[0][1]}")
        chosen.append(moved)
    extra = sorted(set(wanted) - {each.region.name for each in claims})
    if extra:
        raise PlanError(f"the plan has a region {extra[0]} that the model does not have")
    return chosen


def refused(each: Claim) -> str:
    """Why nobody takes a region: its operators, where they stand, and each target's reason."""
    ops = ", ".join(
        dict.fromkeys(op.op_type if not op.domain else f"{op.domain}::{op.op_type}" for op in each.region.ops)
    )
    node = each.region.ops[0].name
    reasons = "; ".join(f"{target}: {reason}" for target, reason in each.refusals)
    return f"no target runs {ops} (node {node!r}): {reasons}"


def _planned_region(each: Claim) -> PlannedRegion:
    region = each.region
    if each.target is None:
        raise TargetError(f"region {region.name} has no target")
    cost = each.offer.cost if each.offer is not None else None
    return PlannedRegion(
        name=region.name,
        device=each.target,
        ops=tuple(op.op_type for op in region.ops),
        nodes=tuple(op.name for op in region.ops),
        refusals=dict(each.refusals),
        predicted_ms=None if cost is None else cost(region) * 1e3,
    )


def _transfers(made: Sequence[Partition]) -> tuple[Transfer, ...]:
    """Every value that one device makes and another reads, once for each reading device."""
    maker = {name: partition for partition in made for name in partition.outputs}
    found: dict[tuple[str, str], Transfer] = {}
    for partition in made:
        for name in partition.inputs:
            source = maker.get(name)
            if source is not None and source.device != partition.device:
                size = nbytes(partition.types.get(name))
                found[name, partition.device] = Transfer(name, source.device, partition.device, size)
    return tuple(found.values())


def nbytes(type_: TensorType | None) -> int:
    """Plain size of a tensor; 0 where it is known only at run time."""
    if type_ is None or any(size < 0 for size in type_.shape):
        return 0
    kinds: Mapping[str, int] = {"string": 8}
    size = kinds.get(type_.dtype)
    if size is None:
        kind = getattr(np, type_.dtype, None) or getattr(ml_dtypes, type_.dtype, None)
        size = 0 if kind is None else np.dtype(kind).itemsize
    return size * int(np.prod(type_.shape, dtype=np.int64))
