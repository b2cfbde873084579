"""Grouping claimed regions into partitions: maximal runs of one device in a topological order, so never a cycle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from nestc.graph.region import Region, TensorType
from nestc.targets.api import Partition

if TYPE_CHECKING:
    import onnx_ir as ir


def order(regions: Sequence[Region], device: Mapping[str, str]) -> list[Region]:
    """A topological order of the regions that changes device as seldom as a greedy choice can.

    List scheduling: of the ready regions take one on the current device while there is any, in the given order;
    only then change, to the device of the first that is ready. Two regions of one device with nothing of another
    between them in this order can be one partition without any path that leaves it and comes back.
    """
    producer = {name: region.name for region in regions for name in region.outputs}
    waits = {region.name: {producer[name] for name in region.inputs if name in producer} for region in regions}
    users: dict[str, list[str]] = {region.name: [] for region in regions}
    for name, sources in waits.items():
        for source in sources:
            users[source].append(name)
    place = {region.name: index for index, region in enumerate(regions)}
    ready = sorted((name for name, sources in waits.items() if not sources), key=place.__getitem__)
    ordered: list[Region] = []
    current: str | None = None
    while ready:
        name = next((name for name in ready if device[name] == current), ready[0])
        ready.remove(name)
        current = device[name]
        ordered.append(regions[place[name]])
        freed: list[str] = []
        for user in users[name]:
            waits[user].discard(name)
            if not waits[user]:
                freed.append(user)
        if freed:
            ready = sorted([*ready, *freed], key=place.__getitem__)
    return ordered


def runs(regions: Sequence[Region], device: Mapping[str, str]) -> list[list[Region]]:
    """Regions, in the order of `order`, as maximal runs of one device."""
    return [list(run) for _, run in itertools.groupby(regions, key=lambda region: device[region.name])]


def partitions(
    grouped: Sequence[Sequence[Region]],
    device: Mapping[str, str],
    outputs: Iterable[str],
    submodel: Callable[[Sequence[str]], ir.Model],
) -> list[Partition]:
    """The partitions in execution order: each group of regions, all of one device, becomes one.

    `outputs` are the graph's outputs; `submodel` builds the ONNX model of the regions named.
    """
    wanted = set(outputs)
    made: list[Partition] = []
    for index, group in enumerate(grouped):
        inside = {name for region in group for name in region.outputs}
        used_outside = wanted | {
            name for other in grouped if other is not group for region in other for name in region.inputs
        }
        names = tuple(region.name for region in group)
        types: dict[str, TensorType] = {}
        for region in group:
            types.update(region.types)
        target = device[group[0].name]
        made.append(
            Partition(
                name=f"{target}_{index}",
                device=target,
                regions=tuple(group),
                inputs=_unique(name for region in group for name in region.inputs if name not in inside),
                outputs=_unique(name for region in group for name in region.outputs if name in used_outside),
                types=types,
                model=lambda names=names: submodel(names),
            )
        )
    return made


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    """The names once each, in order of first appearance."""
    return tuple(dict.fromkeys(names))
