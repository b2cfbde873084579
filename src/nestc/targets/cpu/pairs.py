"""Neighbouring regions of a partition that one kernel computes faster than two, as single regions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from nestc.graph.region import Region
from nestc.kernels.api import CpuMachine, Family
from nestc.kernels.fused import FusedFamily, join
from nestc.kernels.fused_bands import DEPTHWISE_POINTWISE, ELEMENTWISE_POINTWISE
from nestc.kernels.fused_pool import CONV_POOL
from nestc.kernels.fused_scale import SCALED_WEIGHTS
from nestc.kernels.fused_winograd import WINOGRAD_POOL

FUSED: tuple[FusedFamily, ...] = (DEPTHWISE_POINTWISE, ELEMENTWISE_POINTWISE, CONV_POOL, WINOGRAD_POOL, SCALED_WEIGHTS)
"""Families that are asked about each pair."""


@dataclass(frozen=True)
class Merged:
    """The regions that are left, in order, and of each that was joined of two its family and the name of the first."""

    regions: Sequence[Region]
    families: Mapping[str, FusedFamily] = field(default_factory=dict)
    firsts: Mapping[str, str] = field(default_factory=dict)


def merge_pairs(
    regions: Sequence[Region],
    outputs: Sequence[str],
    machine: CpuMachine,
    threads: int,
    exact: bool,
    way: Callable[[Region], Family | None],
) -> Merged:
    """Join each region with its only reader where a fused family takes both and is modelled to save time.

    `outputs` are the values of the partition that others read. With `exact`, only families that add and multiply as
    two kernels do. `way` is what would compute a region alone: a fused kernel takes over its parameters, and nothing
    is joined that it cannot stand for. A region is joined once; the earlier pair wins.
    """
    uses = Counter(name for region in regions for name in region.inputs)
    uses.update(outputs)
    readers = {name: region for region in regions for name in region.inputs if uses[name] == 1}
    families: dict[str, FusedFamily] = {}
    firsts: dict[str, str] = {}
    joined: dict[str, Region] = {}
    gone: set[str] = set()
    for region in regions:
        second = readers.get(region.outputs[0]) if len(region.outputs) == 1 else None
        if second is None or region.name in joined or region.name in gone or second.name in joined:
            continue
        both = join(region, second)
        family = None if both is None else _best(both, (region, second), way, machine, threads, exact)
        if both is None or family is None:
            continue
        joined[second.name], families[second.name], firsts[second.name] = both, family, region.name
        gone.add(region.name)
    left = tuple(joined.get(region.name, region) for region in regions if region.name not in gone)
    return Merged(left, families, firsts)


def _best(
    both: Region,
    halves: tuple[Region, Region],
    way: Callable[[Region], Family | None],
    machine: CpuMachine,
    threads: int,
    exact: bool,
) -> FusedFamily | None:
    """The family that is modelled to save most of the time of a joined region among those that can stand for the ways
    of its halves; None if none saves any."""
    found = [family for family in FUSED if (family.exact or not exact) and family.refusal(both) is None]
    gains = [(family.gain(both, machine, threads), family) for family in found]
    saving = sorted((each for each in gains if each[0] > 0), key=lambda each: -each[0])
    if not saving:
        return None
    first, second = map(way, halves)
    if first is None or second is None:
        return None
    standing = (family.replacing(first, second) for _, family in saving)
    return next((family for family in standing if family is not None), None)
